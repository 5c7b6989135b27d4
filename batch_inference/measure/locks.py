"""Who is measuring into a file or on a device: locks that end with the process that holds them, however it ends.

flock(2) belongs to an open file, which no other process of ours inherits, so a leftover engine holds no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.files import check_no_link, open_regular, read_regular, real
from batch_inference.core.results import DeviceInfo

# The holder of a lock that does not say.
ANOTHER = "another process"
_LONGEST_HOLDER_BYTES = 4096
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class LockedError(Exception):
    """Somebody else holds it; the message says who, and what for."""


@contextlib.contextmanager
def locked(path: Path, purpose: str) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs; False if its file system cannot lock. `purpose` is for others
    to read. Raises LockedError at once if somebody else holds it, and OSError if the file cannot be made."""
    file = _open_locked(path)
    if file is None:
        yield False
        return
    os.ftruncate(file, 0)
    # A name may contain bytes that are not text.
    os.write(file, os.fsencode(f"process {os.getpid()} on {socket.gethostname()} ({purpose})\n"))
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            # If the folder was replaced meanwhile, the lock there belongs to somebody else.
            if _is_at(path, file):
                path.unlink()
        os.close(file)


def _open_locked(path: Path) -> int | None:
    while True:
        check_no_link(path)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(file)
        except BlockingIOError:
            holder = os.fsdecode(os.read(file, _LONGEST_HOLDER_BYTES)).strip()
            os.close(file)
            raise LockedError(holder or ANOTHER) from None
        except OSError as error:
            os.close(file)
            if error.errno not in _CANNOT_LOCK:
                raise
            path.unlink(missing_ok=True)
            return None
        # Its last holder may have removed the file between the two calls.
        with contextlib.suppress(OSError):
            if _is_at(path, file):
                return file
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    """Raises OSError if nothing is there."""
    return os.path.samestat(os.fstat(file), path.stat())


def _lock(file: int) -> None:
    """Raises BlockingIOError if somebody holds it, rather than just checking who does."""
    for _ in range(4):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_of(result: Path) -> Path:
    """The lock beside a result file; the same one for all links to the file."""
    result = real(result)
    return result.with_name(f".{result.name}.lock")


def purpose_of(config: ExperimentConfig) -> str:
    """What the lock of a setting says: its name, and what tells its settings apart."""
    return f"{config.setting_name}, settings {config.settings_hash()}"


def holders_in(folder: Path) -> Iterator[str]:
    """Who is measuring into result files of a folder now."""
    for path in sorted(folder.glob(".*.lock")):
        if holder := holder_of(path.with_name(path.name.removeprefix(".").removesuffix(".lock"))):
            yield holder


def holder_of(result: Path) -> str | None:
    """Who is measuring into a result file now; None if nobody is."""
    try:
        with open_regular(lock_of(result), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError):
            return os.fsdecode(read_regular(lock_of(result))[:_LONGEST_HOLDER_BYTES]).strip() or ANOTHER
    except OSError:
        pass
    return None


@contextlib.contextmanager
def devices_in_use(devices: Iterable[DeviceInfo], purpose: str) -> Iterator[list[str]]:
    """While the block runs, others can see that these devices are in use; yields a line for each device that another
    sweep of this user already uses."""
    folder = Path(tempfile.gettempdir()) / f"batch_inference_{os.getuid()}"
    lines = []
    with contextlib.ExitStack() as held:
        # Being unable to tell is no reason not to measure.
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            # Workers may share cores; a device is held once.
            named = {device.uuid or _name_of(device): _name_of(device) for device in devices}
            for identity, name in named.items():
                try:
                    path = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
                    held.enter_context(locked(path, purpose))
                except LockedError as error:
                    lines.append(f"{name}: used by {error}")
        yield lines


def _name_of(device: DeviceInfo) -> str:
    return f"cores {device.cores}" if device.cores else f"GPU {device.index}"
