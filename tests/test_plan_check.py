"""benchmarks/plan_check.py on the result files of GPU runs that lie in docs."""

from __future__ import annotations

import subprocess
import sys

from batch_inference.plan.memory import NOT_COUNTED
from conftest import REPOSITORY


def test_the_table_in_docs_is_the_one_the_program_prints_and_the_plan_is_close() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/plan_check.py", "docs/routes", "docs/h200", "docs/h100"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    assert done.stdout == (REPOSITORY / "docs" / "plan_check.md").read_text()
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= 7
    for *_, weights_ratio, _left, _seen, _not_counted, _planned, _tokens, kv_ratio in rows:
        assert abs(float(weights_ratio) - 1) < 0.01
        assert abs(float(kv_ratio.strip(" |")) - 1) < 0.1
    # The margin that a plan states is the one that was seen.
    missing_gib = sorted(float(row[8]) for row in rows)
    percent = sorted(round(100 * (float(row[-1].strip(" |")) - 1)) for row in rows)
    assert f"{missing_gib[0]:.1f} to {missing_gib[-1]:.1f} GiB ({percent[0]} to {percent[-1]} %)" in NOT_COUNTED
