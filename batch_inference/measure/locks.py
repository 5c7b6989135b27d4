"""Who measures into a file, and on a device: locks that end with the process that holds them, however it ends.

flock(2) belongs to an open file, which no other process of ours inherits: an engine that is left over holds none.
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

# Of a lock that does not say.
ANOTHER = "another process"
_LONGEST_HOLDER_BYTES = 4096
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class LockedError(Exception):
    """Somebody else holds it; the message says who, and what for."""


@contextlib.contextmanager
def locked(path: Path, purpose: str) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs; False where its file system cannot lock. `purpose` is for others
    to read. Raises LockedError at once where somebody else holds it, and OSError where the file cannot be made."""
    file = _open_locked(path)
    if file is None:
        yield False
        return
    os.ftruncate(file, 0)
    # A name may hold bytes that are no text.
    os.write(file, os.fsencode(f"process {os.getpid()} on {socket.gethostname()} ({purpose})\n"))
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            # Of a folder that was replaced meanwhile, the lock there is another's.
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
    """Raises OSError where nothing is there."""
    return os.path.samestat(os.fstat(file), path.stat())


def _lock(file: int) -> None:
    """Raises BlockingIOError where somebody holds it, and is not just looking who does."""
    for _ in range(4):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_of(result: Path) -> Path:
    """The lock beside a result file; it has one, whatever links lead to it."""
    result = real(result)
    return result.with_name(f".{result.name}.lock")


def purpose_of(config: ExperimentConfig) -> str:
    """What the lock of a setting says: its name, and what tells its settings from others."""
    return f"{config.setting_name}, settings {config.settings_hash()}"


def holders_in(folder: Path) -> Iterator[str]:
    """Who measures into result files of a folder now."""
    for path in sorted(folder.glob(".*.lock")):
        if holder := holder_of(path.with_name(path.name.removeprefix(".").removesuffix(".lock"))):
            yield holder


def holder_of(result: Path) -> str | None:
    """Who measures into a result file now; None where nobody does."""
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
    """While the block runs others can see that these devices are used; a line for each that another sweep of this user
    is using already."""
    folder = Path(tempfile.gettempdir()) / f"batch_inference_{os.getuid()}"
    lines = []
    with contextlib.ExitStack() as held:
        # What cannot be told is no reason not to measure.
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
