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
    ratios = []
    for _, by, *_, weights_ratio, planned_gib, seen_gib, _not_counted, _planned, _tokens, kv_ratio in rows:
        assert by in ("formula", "vLLM 0.26.0")
        assert abs(float(weights_ratio) - 1) < 0.01
        # A plan's text says what is left and no tokens, its JSON says the tokens.
        by_tokens = kv_ratio.strip(" |")
        ratios.append(float(by_tokens) if by_tokens else float(planned_gib) / float(seen_gib))
    # The margin that a plan states is the one that was seen.
    missing_gib = sorted(float(row[9]) for row in rows if row[9])
    percent = sorted(round(100 * (ratio - 1)) for ratio in ratios)
    assert f"{missing_gib[0]:.1f} to {missing_gib[-1]:.1f} GiB ({percent[0]} to {percent[-1]} %)" in NOT_COUNTED
