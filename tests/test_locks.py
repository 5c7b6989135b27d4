"""Locks, logs and leftovers: what they say, and what they leave as it was."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import DeviceInfo
from batch_inference.measure import leftovers, locks, logs
from batch_inference.measure.locks import LockedError, devices_in_use, holder_of, holders_in, lock_of, locked


@pytest.fixture(autouse=True)
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long a lock was waited for, without any waiting."""
    slept: list[float] = []
    monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=slept.append))
    return slept


def said(purpose: str) -> str:
    return f"process {os.getpid()} on {socket.gethostname()} ({purpose})"


def test_a_lock_says_who_and_what_for_and_is_gone_afterwards(tmp_path: Path, slept_s: list[float]) -> None:
    path = lock_of(tmp_path / "x.json")
    assert path == tmp_path / ".x.json.lock"
    path.write_text("of one that was longer than what is written now" * 9)
    with locked(path, "tp_1, settings abc") as is_locked:
        assert is_locked
        assert path.read_text() == said("tp_1, settings abc") + "\n"
        with pytest.raises(LockedError) as caught, locked(path, "another"):
            pass
        assert str(caught.value) == holder_of(tmp_path / "x.json") == said("tp_1, settings abc")
        # What is not said is told so.
        path.write_text("")
        with pytest.raises(LockedError) as caught, locked(path, "another"):
            pass
        assert str(caught.value) == holder_of(tmp_path / "x.json") == "another process"
    assert not path.exists()
    assert holder_of(tmp_path / "x.json") is None
    # Somebody may just be looking who holds it.
    assert slept_s == [0.05] * 4 * 2


def test_a_lock_that_another_has_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "mine"):
        path.unlink()
        path.write_text("of another")
    assert path.read_text() == "of another"


def test_all_who_measure_into_a_folder_are_told_in_order(tmp_path: Path) -> None:
    (tmp_path / ".left.json.lock").write_text("of one that is gone")
    with locked(lock_of(tmp_path / "b.json"), "second"), locked(lock_of(tmp_path / "a.json"), "first"):
        assert list(holders_in(tmp_path)) == [said("first"), said("second")]
    assert list(holders_in(tmp_path)) == []


def test_the_purpose_of_a_lock_is_the_name_and_the_settings() -> None:
    config = ExperimentConfig(tensor_parallel_size=2)
    assert locks.purpose_of(config) == f"tp_2, settings {config.settings_hash()}"


def test_devices_are_told_apart_by_what_is_theirs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    gpus = [DeviceInfo(index, "H100", uuid=f"GPU-{index}") for index in range(2)]
    cores = [DeviceInfo(0, "a CPU", cores="0,1"), DeviceInfo(1, "a CPU", cores="2,3")]
    with devices_in_use([*gpus, *cores], "tp_4") as nobody:
        assert nobody == []
        folder = tmp_path / f"batch_inference_{os.getuid()}"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(list(folder.iterdir())) == 4
        with devices_in_use([cores[1], DeviceInfo(1, "H100", uuid="GPU-7"), gpus[1]], "tp_1") as used:
            assert used == [f"cores 2,3: used by {said('tp_4')}", f"GPU 1: used by {said('tp_4')}"]
        # A number alone is enough where there is no more.
        with devices_in_use([DeviceInfo(5, "x")], "tp_1"), devices_in_use([DeviceInfo(5, "x")], "tp_2") as used:
            assert used == [f"GPU 5: used by {said('tp_1')}"]
    assert list(folder.iterdir()) == []


def test_cores_that_workers_of_one_sweep_share_are_not_used_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    shared = [DeviceInfo(index, "a CPU", cores="01"[index % 2]) for index in range(8)]
    with devices_in_use(shared, "tp_8") as used:
        assert used == []
        assert len(list((tmp_path / f"batch_inference_{os.getuid()}").iterdir())) == 2


@pytest.mark.parametrize(("fresh", "content"), [(True, b"new"), (False, b"old\nnew")])
def test_a_log_is_begun_anew_or_gone_on_with_for_its_owner_alone(fresh: bool, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"old\n")
    path.chmod(0o644)
    with logs.open_log(path, fresh=fresh) as log:
        log.write(b"new")
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # Behind a link may be what is wanted.
    (tmp_path / "link.log").symlink_to(path)
    with logs.open_log(tmp_path / "link.log", fresh=fresh) as log:
        log.write(b"+")
    assert path.read_bytes() == content + b"+"
    # By another name it is kept, where it is begun anew.
    os.link(path, tmp_path / "backup.log")
    with logs.open_log(path, fresh=fresh):
        pass
    assert (tmp_path / "backup.log").read_bytes() == content + b"+"
    assert path.read_bytes() == (b"" if fresh else content + b"+")
    logs.empty_log(path)
    assert path.read_bytes() == b""


def test_what_the_engine_is_told_and_its_variables_hold_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(logs, "remember", lambda *words: told.append(words))
    logs.hide_secrets_of(ExperimentConfig(model="org/name", engine_args=("--hf-token", "hush")))
    assert told == [(["org/name", "--hf-token", "hush"], os.environ)]


def test_only_files_of_these_names_are_shared_memory_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_FOLDER", tmp_path)
    names = ("psm_1", "sem.mp-2", "vllm_dist_3")
    for name in (*names, "other", "xpsm_4", "sem.other"):
        (tmp_path / name).touch()
    assert leftovers.all_shared_memory() == {tmp_path / name for name in names}
    inodes = [(tmp_path / name).stat().st_ino for name in names]
    process = tmp_path / "process"
    process.mkdir()
    pattern = leftovers.re.compile(leftovers._MAPPED_INODE.pattern.replace("/dev/shm", str(tmp_path)), leftovers.re.M)
    monkeypatch.setattr(leftovers, "_MAPPED_INODE", pattern)
    (process / "maps").write_text(
        f"7f00-7f01 rw-s 0000 00:19 {inodes[0]}   {tmp_path}/psm_1\n7f02-7f03 rw-s 0000 00:19 {inodes[1]} /elsewhere\n"
        f"7f04-7f05 rw-s 0000 00:19 {inodes[2]}  {tmp_path}/before_it_had_a_name (deleted)\n"
    )
    of_group = {7: [tmp_path / "gone", process]}
    monkeypatch.setattr(leftovers, "processes_of", lambda group: of_group[group])
    found = leftovers.shared_memory_of(7)
    assert found == {tmp_path / "psm_1", tmp_path / "vllm_dist_3"}
    leftovers.remove([tmp_path / "gone", *found])
    assert leftovers.all_shared_memory() == {tmp_path / "sem.mp-2"}
    assert leftovers._inode(tmp_path / "gone") is None
    monkeypatch.setattr(leftovers, "_FOLDER", tmp_path / "gone")
    assert leftovers.all_shared_memory() == set()
