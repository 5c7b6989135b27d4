"""Result files with something wrong: each is analysed or named, and costs the others nothing."""

from __future__ import annotations

import csv
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import analyze_results
from batch_inference.core.result_file import to_json
from batch_inference.core.text import has_control
from builders import make_sweep
from conftest import REPOSITORY
from fuzz.mutations import mutated
from fuzz.tries import NUMBERS, chance, told

FILES_OF_A_TRY = 10
_LIVE = re.compile(r"(?<!`)<script>alert|(?<!`)<img src=x|!\[x\]\(http|(?<!\\)\[x\]\(javascript")
_FORMULA = re.compile(r"\s*[=+\-@]")
_PLOTS = ["throughput,pareto", "latency,ttft", "scaling,heatmap", "memory,roofline", "tpot,energy"]


def good_documents() -> dict[str, str]:
    golden = {path.stem: path.read_text() for path in sorted((REPOSITORY / "tests" / "golden").glob("*.json"))}
    made = make_sweep([(1, 1, 1), (2, 1, 1), (1, 1, 2)], batch_sizes=(1, 4), seq_lens=(8, 16))
    return golden | {result.name: to_json(result) for result in made}


GOOD = good_documents()
(WHOLE,) = make_sweep([(4, 1, 1)], batch_sizes=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_each_file_is_analysed_or_named(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(number)
    folder, old, tried = tmp_path / "new", tmp_path / "old", {}
    for place in (folder, old):
        place.mkdir()
        (place / "whole_results.json").write_text(to_json(WHOLE))
    for place in range(FILES_OF_A_TRY):
        base = rng.choice(list(GOOD))
        data, done = mutated(json.loads(GOOD[base]), rng)
        name = f"m{place}_results.json"
        (folder / name).write_bytes(data)
        # The other side of a comparison.
        (old / name).write_text(GOOD[base])
        tried[name] = (base, *done)
    flags = flags_of(rng, old)
    with told(number, (flags, tried)):
        code = analysed("--input", str(folder), *flags)
        out, errors = capsys.readouterr()
        check_terminal(out, errors)
        assert code in ({0, 1} | ({2} if "--group-by" in flags else set()) | ({3} if "--compare" in flags else set()))
        if code != 2:
            check_files(folder / "analysis", {"whole_results.json", *tried}, errors)
            check_to_use(folder / "best")


def flags_of(rng: random.Random, old: Path) -> list[str]:
    flags = ["--plots", rng.choice(_PLOTS)] if chance(rng, 0.05) else ["--no-plots"]
    flags += ["--device-hour-price", "2.5"] if chance(rng, 0.25) else []
    flags += ["--max-ttft-s", "0.5"] if chance(rng, 0.2) else []
    flags += ["--slo-percentile", rng.choice(["50", "99.9", "100"])] if chance(rng, 0.2) else []
    flags += ["--goal", rng.choice(["per-device", "latency"])] if chance(rng, 0.3) else []
    flags += ["--allow-mixed"] if chance(rng, 0.15) else []
    flags += ["--group-by", rng.choice(["model", "model,dtype", "max_tokens"])] if chance(rng, 0.1) else []
    if chance(rng, 0.4):
        flags += ["--compare", str(old), *(["--fail-on-regression", "3"] if chance(rng, 0.5) else [])]
    return flags


def analysed(*flags: str) -> int:
    with warnings.catch_warnings():
        # A user would read them.
        warnings.simplefilter("error")
        return analyze_results.main(list(flags))


def check_terminal(out: str, errors: str) -> None:
    assert not has_control(out, allowed="\n")
    assert not has_control(errors, allowed="\n")
    assert [line for line in errors.splitlines() if not line.startswith("error: ")] == []


def check_files(analysis: Path, names: set[str], errors: str) -> None:
    text = (analysis / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=no_number)
    assert "whole_results.json" in {setting["file"] for setting in summary["settings"]}
    assert {name for name in names if name not in text} == set()
    assert {name for name in names if name in errors} == {
        name for name in names if any(name in line for line in summary["unreadable"])
    }
    with (analysis / "results.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert len(set(header)) == len(header)
    assert {len(row) for row in rows} <= {len(header)}
    assert [cell for row in [header, *rows] for cell in row if is_formula(cell)] == []
    page = (analysis / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert not _LIVE.search((analysis / "report.md").read_text(encoding="utf-8"))


def check_to_use(folder: Path) -> None:
    """Whatever stood in the winner's file, it is a value here, and nothing else."""
    lines = (folder / "vllm_config.yaml").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line and not re.match(r"# |[a-z][a-z0-9-]*: ", line)] == []
    assert not has_control("".join(lines))
    if (folder / "run.py").exists():
        space: dict[str, Any] = {"__name__": "read"}
        exec(compile((folder / "run.py").read_text(encoding="utf-8"), "run.py", "exec"), space)
        names = [line.partition(":")[0].replace("-", "_") for line in lines if line and line[0] != "#"]
        assert list(space["ENGINE"]) == names


def no_number(name: str) -> Any:
    raise ValueError(name)


def is_formula(cell: str) -> bool:
    if not _FORMULA.match(cell):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False
