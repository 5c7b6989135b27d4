"""benchmarks/plan_check.py on the result files of GPU runs that lie in docs."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPOSITORY


def test_the_table_in_docs_is_the_one_the_program_prints_and_the_plan_is_close() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/plan_check.py", "docs/routes", "docs/h200", "docs/h100"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    assert done.stdout == (REPOSITORY / "docs" / "plan_check.md").read_text()
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= 7
    for *_, weights_ratio, _planned, _seen, kv_ratio in rows:
        assert abs(float(weights_ratio) - 1) < 0.03
        assert abs(float(kv_ratio.strip(" |")) - 1) < 0.1
