"""Result sets with a planted truth, through the whole program: the report says it, in words and in numbers."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import analyze_results
from batch_inference.core.results import Point
from builders import make_point, make_result, save_all
from in_process import called

pytestmark = pytest.mark.slow

# Spread of the planted runs: half a percent, as on a quiet machine.
NOISE = 0.005
BATCHES, LENGTHS = (4, 16), (512, 2048)


@pytest.fixture
def analyze(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code, and the summary without line breaks."""

    def run(*flags: object) -> tuple[int, str]:
        capsys.readouterr()
        status = analyze_results.main([*map(str, flags), "--no-plots"])
        return status, " ".join(capsys.readouterr().out.split())

    return run


Analysed = tuple[Path, str]


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    """The folder of the truth, and what is said of it."""
    folder = tmp_path_factory.mktemp("truth")
    save_all(truth(), folder)
    done = called(
        analyze_results.main, ["analyze_results.py", "--input", str(folder), "--no-plots"], folder, os.environ
    )
    assert done.returncode == 0
    return folder, " ".join(done.stdout.split())


def planted(name: str, sizes: tuple[int, int, int], seconds: float, seed: int = 0, **changes: Any) -> Any:
    """A setting whose every batch takes `seconds` per request of the global batch and thousand prompt tokens, give or
    take the noise."""
    noise = random.Random(f"{name} {seed}")
    points: list[Point] = []
    for length in LENGTHS:
        for batch in BATCHES:
            true_s = seconds * batch * length / 1000
            runs_s = [true_s * noise.gauss(1, NOISE) for _ in range(5)]
            points.append(make_point(batch // sizes[2], length, runs_s, replicas=sizes[2]))
    return make_result(name, points, sizes, **changes)


def truth() -> list[Any]:
    """On four devices DP is the fastest, PP takes twice as long, and TP as long as PP: a tie; alone takes 3.2 times."""
    return [
        planted("tp_1", (1, 1, 1), 0.032),
        planted("tp_4", (4, 1, 1), 0.020, seed=1),
        planted("pp_4", (1, 4, 1), 0.020, seed=2),
        planted("dp_4", (1, 1, 4), 0.010),
    ]


def summary(folder: Path) -> Any:
    return json.loads((folder / "analysis" / "summary.json").read_text())


def test_a_planted_winner_wins_in_words_and_numbers(analysed: Analysed) -> None:
    folder, text = analysed
    for length, throughput in ((512, 6250), (2048, 1562)):
        (best,) = [
            choice["best"] for choice in summary(folder)["groups"][0]["best"]
            if (choice["seq_len"], choice["goal"]) == (length, "throughput")
        ]  # fmt: skip
        assert best["setting"] == "dp_4"
        # 32 output tokens for each request.
        assert best["value"] == pytest.approx(throughput, rel=0.01)
        assert 0 < best["ci95"] < 0.02 * throughput
        assert re.search(rf" {length} throughput [\d.]+ ±[\d.]+ tok/s dp_4 ", text)
        assert re.search(
            rf"{length} \+ 32 tokens: DP=4 at \d requests? per replica gives [\d,.]+ ± [\d.]+ tok/s\.", text
        )
    for report in ("report.md", "report.html"):
        assert "dp_4" in (folder / "analysis" / report).read_text()


def test_tp_against_pp_against_dp_is_what_was_planted(analysed: Analysed) -> None:
    folder, text = analysed
    assert "TP, PP or DP? 4 devices, output tok/s fastest DP=4, at both batch sizes" in text
    rows = summary(folder)["groups"][0]["tp_pp_or_dp"]
    assert len(rows) == 3 * 4
    for row in rows:
        true = {"TP=4": 1, "PP=4": 1, "DP=4": 2}[row["layout"]]
        assert row["ratio"] == pytest.approx(true, abs=0.03)
        assert row["is_best"] == (row["layout"] == "DP=4")


def test_a_planted_tie_is_called_a_tie(analyze: Any, tmp_path: Path) -> None:
    save_all(truth()[1:3], tmp_path)
    _, text = analyze("--input", tmp_path)
    found = [choice for choice in summary(tmp_path)["groups"][0]["best"] if choice["goal"] == "throughput"]
    assert all(
        {choice["best"]["setting"], *(tie["setting"] for tie in choice["ties"])} == {"tp_4", "pp_4"} for choice in found
    )
    assert "tie, length 512, throughput, as good within the intervals: " in text
    assert " requests on, " in text
    assert "=4 from 4 on; where two are named, their intervals overlap" in text
    assert "(tied within the intervals with " in text


def test_scaling_is_what_was_planted(analysed: Analysed) -> None:
    folder, _ = analysed
    assert "Scaling against tp_1" in (folder / "analysis" / "report.md").read_text()
    for row in summary(folder)["groups"][0]["scaling"]:
        true = {"tp_1": 1, "tp_4": 1.6, "pp_4": 1.6, "dp_4": 3.2}[row["setting"]]
        assert row["speedup"] == pytest.approx(true, rel=0.03)
        assert row["scaling_efficiency"] == pytest.approx(true / row["num_devices"], rel=0.03)


def test_a_regression_of_5_percent_is_found_and_the_rest_left_in_peace(analyze: Any, tmp_path: Path) -> None:
    before = [planted("tp_1", (1, 1, 1), 0.032, seed=1), planted("tp_4", (4, 1, 1), 0.020, seed=1)]
    newer = {"environment": {"versions": {"vllm": "0.33.0"}}}
    after = [
        planted("tp_1", (1, 1, 1), 0.032, seed=2, **newer),
        planted("tp_4", (4, 1, 1), 0.020 * 1.05, seed=2, **newer),
    ]
    save_all(before, tmp_path / "old")
    save_all(after, tmp_path / "new")
    flags = ("--input", tmp_path / "new", "--compare", tmp_path / "old")
    status, text = analyze(*flags, "--fail-on-regression", 3)
    assert status == 3
    assert "points compared 8: 4 worse, 4 no difference" in text
    assert "vLLM 0.32.0 before, 0.33.0 now" in text
    points = summary(tmp_path / "new")["comparison"]["points"]
    assert {(point["setting"], point["change"]) for point in points} == {("tp_4", "worse"), ("tp_1", "no difference")}
    for point in points:
        true = 1 / 1.05 if point["setting"] == "tp_4" else 1
        assert abs(point["ratio"] - true) <= 1.5 * point["ratio_ci95"]
    assert analyze(*flags, "--fail-on-regression", 10)[0] == 0


def test_planted_mixed_gpus_are_never_ranked_together_silently(analyze: Any, tmp_path: Path) -> None:
    a100 = {"environment": {"devices": [{"name": "NVIDIA A100", "memory_gib": 79.3}]}}
    save_all([planted("h100", (1, 1, 1), 0.010), planted("a100", (1, 1, 1), 0.032, **a100)], tmp_path)
    _, text = analyze("--input", tmp_path)
    assert (
        "2 groups of points that cannot be compared with each other: they differ in device. Each is ranked on" in text
    )
    groups = summary(tmp_path)["groups"]
    assert [group["is"]["device_name"] for group in groups] == ["NVIDIA A100", "NVIDIA H100 80GB HBM3"]
    for group, name in zip(groups, ("a100", "h100"), strict=True):
        assert {choice["best"]["setting"] for choice in group["best"]} == {name}
        assert not any(choice["ties"] for choice in group["best"])
    _, text = analyze("--input", tmp_path, "--allow-mixed")
    assert "Best [MIXED: device]" in text
    assert summary(tmp_path)["groups"][0]["mixed"] == ["device_name"]
    assert {choice["best"]["setting"] for choice in summary(tmp_path)["groups"][0]["best"]} == {"h100"}


def test_an_invalid_point_that_would_win_does_not(analyze: Any, tmp_path: Path) -> None:
    wrong = planted("wrong", (1, 1, 1), 0.001)
    for point in wrong.points:
        point.verdict, point.verdict_reasons = "invalid", ["token counts off"]
    save_all([planted("tp_1", (1, 1, 1), 0.032), wrong], tmp_path)
    _, text = analyze("--input", tmp_path)
    assert {choice["best"]["setting"] for choice in summary(tmp_path)["groups"][0]["best"]} == {"tp_1"}
    assert "invalid (wrong, batch 4, 16 x length 512, 2048): token counts off" in text


def test_limits_and_price_decide_as_planted(analyze: Any, tmp_path: Path) -> None:
    save_all(truth(), tmp_path)
    # dp_4 at batch 4 takes 20 ms at 512 tokens, and 82 ms at 2048: only the first keeps 50 ms, with batch 16 at 328 ms.
    _, text = analyze("--input", tmp_path, "--max-latency-s", 0.05, "--device-hour-price", 3.6)
    choices = {(c["seq_len"], c["goal"]): c["best"] for c in summary(tmp_path)["groups"][0]["best"]}
    assert (choices[512, "throughput"]["setting"], choices[512, "throughput"]["global_batch_size"]) == ("dp_4", 4)
    assert choices[2048, "throughput"] is None
    # Four devices at 0.001 a second, 6250 tok/s.
    assert choices[512, "cost"]["value"] == pytest.approx(0.64, rel=0.02)
    assert "length 2048: no point meets the limits; nearest: dp_4 at batch 1" in text


def test_the_summary_for_scripts_is_strict_json_without_numbers_that_are_none(analyze: Any, tmp_path: Path) -> None:
    one_run = make_result("one", [make_point(1, 512, [1.0]), Point(2, 512, 32, "oom", reason="x")])
    save_all([one_run, make_result("failed", status="failed")], tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert analyze("--input", tmp_path)[0] == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / "analysis" / "summary.json").read_text(), parse_constant=refuse)
    assert found["summary_version"] == 1
    assert found["comparison"] is None
    assert [setting["status"] for setting in found["settings"]] == ["failed", "complete"]
    assert len(found["unreadable"]) == 1
    assert found["groups"][0]["best"][0]["best"]["ci95"] is None


def test_a_point_that_the_baseline_has_at_one_of_both_batches_is_in_the_summary(analyze: Any, tmp_path: Path) -> None:
    two = make_result("dp_2", [make_point(2, 512, replicas=2)], (1, 1, 2))
    save_all([make_result("tp_1", [make_point(4, 512)]), two], tmp_path)
    analyze("--input", tmp_path)
    scaled = [row for row in summary(tmp_path)["groups"][0]["scaling"] if row["setting"] == "dp_2"]
    assert [(row["weak_speedup"], row["speedup"]) for row in scaled] == [(None, pytest.approx(1.0))]


def test_every_value_of_the_summary_has_its_own_interval(analyze: Any, tmp_path: Path) -> None:
    save_all([make_result("tp_1", [make_point(4, 512)])], tmp_path)
    analyze("--input", tmp_path)
    chosen = [choice["best"] for choice in summary(tmp_path)["groups"][0]["best"]]
    assert len(chosen) == 3
    # All go with the latency of the same runs, which stopped by themselves: 1 s, give or take 1.4 times 2.5 %.
    assert [one["ci95"] / one["value"] for one in chosen] == pytest.approx([0.03478] * 3, rel=0.01)
