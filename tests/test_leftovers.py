"""Shared memory and semaphores of a process group: found by what its processes have mapped."""

from __future__ import annotations

import os
import subprocess
import sys

from batch_inference.measure.leftovers import all_shared_memory, remove, shared_memory_of

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
