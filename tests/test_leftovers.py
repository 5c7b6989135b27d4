"""Shared memory and semaphores of a process group: found by what its processes have mapped."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from batch_inference.measure import leftovers
from batch_inference.measure.leftovers import all_shared_memory, processes_of, remove, shared_memory_of

PROGRAM = """
import multiprocessing, sys, time
from multiprocessing.shared_memory import SharedMemory
lock = multiprocessing.get_context("spawn").Lock()  # mapped under another name than its own
memory = SharedMemory(create=True, size=8)
print(memory.name, lock._semlock.name, flush=True)
time.sleep(60)
"""


def test_what_a_group_has_mapped_is_found_and_removed_and_nothing_else() -> None:
    others = all_shared_memory()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        memory, lock = process.stdout.readline().split()
        found = shared_memory_of(process.pid)
        assert {file.name for file in found} == {memory, f"sem.{lock.removeprefix('/')}"}
        remove(found)
        remove(found)  # gone already
        assert not found & all_shared_memory()
        assert shared_memory_of(os.getpgid(0)).isdisjoint(found)
        assert not others & found
    finally:
        process.kill()
        process.wait()


def test_what_other_groups_have_mapped_is_theirs() -> None:
    """What is found is deleted: a filter that lets others through would end their engines."""
    own = SharedMemory(create=True, size=8)
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        file = Path("/dev/shm") / own.name
        assert file in shared_memory_of(os.getpgid(0))
        assert shared_memory_of(other.pid) == set()
        assert [process.name for process in processes_of(other.pid)] == [str(other.pid)]
        assert str(os.getpid()) in {process.name for process in processes_of(os.getpgid(0))}
    finally:
        other.kill()
        other.wait()
        own.close()
        own.unlink()


def test_what_is_mapped_and_none_of_ours_by_its_name_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("psm_1", "sem.mp-1", "vllm_dist_1", "nccl-1", "my_psm_1")
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(leftovers, "_FOLDER", tmp_path)
    assert {file.name for file in all_shared_memory()} == set(names[:3])
