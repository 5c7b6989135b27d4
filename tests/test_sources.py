"""Which files an analysis reads, which of them count, and what it says of both."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pandas as pd
import pytest

import analyze_results
from batch_inference.analyze.files import find_files, mark_of
from batch_inference.analyze.flags import UsageError
from batch_inference.analyze.sources import newest
from batch_inference.analyze.tables import MeasuredSetting, load_setting, setting_labels
from batch_inference.core.result_file import save_result
from batch_inference.core.results import Answers, Result
from builders import make_point, make_result

Run = Callable[..., CompletedProcess[str]]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("coarse_plots")]
LLAMA, QWEN = "meta-llama/Llama-2-7b-chat-hf", "Qwen/Qwen3-0.6B"


@pytest.fixture
def analyze(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*flags: object) -> CompletedProcess[str]:
        capsys.readouterr()
        status = analyze_results.main([*map(str, flags), "--no-plots"])
        out, error = capsys.readouterr()
        # Without line breaks, so that a sentence is found wherever it is wrapped.
        return CompletedProcess(flags, status, " ".join(out.split()), error)

    return run


def result(name: str = "tp_1", latency_s: float = 1.0, **sections: Any) -> Result:
    return make_result(name, [make_point(latencies_s=[latency_s, latency_s * 1.01, latency_s * 0.99])], **sections)


def save(path: Path, *of: Result) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_result(of[0] if of else result(path.stem.removesuffix("_results")), path)
    return path


def names(top: Path, *others: Path) -> list[str]:
    return [str(path.relative_to(top)) for path in find_files("--input", top, others).paths]


# --- which files --------------------------------------------------------------------------------------------------


def test_the_folders_below_are_read_too(analyze: Run, tmp_path: Path) -> None:
    for name in ("tp_1_results.json", "more/tp_2_results.json", "more/deep/tp_4_results.json", "tp_8_results.json"):
        save(tmp_path / name)
    done = analyze("--input", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    said = "4 in 3 folders: tp_1_results.json, tp_8_results.json, more/tp_2_results.json and 1 more"
    assert f"files {said}" in done.stdout
    assert f"- files: {said}" in (tmp_path / "analysis" / "report.md").read_text()
    files = pd.read_csv(tmp_path / "analysis" / "results.csv")["file"]
    assert "more/deep/tp_4_results.json" in files.tolist()
    # What was written is not read the next time.
    assert len(names(tmp_path)) == 4


def test_folders_that_hold_no_results_of_ours_are_left_alone(tmp_path: Path) -> None:
    for folder in (".", "analysis", "analysis_tp_2", ".cache", "old", "mine"):
        save(tmp_path / folder / "tp_1_results.json")
    assert names(tmp_path, tmp_path / "old", tmp_path / "mine") == ["tp_1_results.json"]
    # One that the user names is read, whatever it is called.
    assert names(tmp_path / "analysis") == ["tp_1_results.json"]
    assert names(tmp_path, tmp_path) == names(tmp_path)


def test_the_folder_of_the_earlier_results_and_that_of_the_report_may_lie_inside(analyze: Run, tmp_path: Path) -> None:
    save(tmp_path / "tp_1_results.json", result(latency_s=2.0))
    save(tmp_path / "old" / "tp_1_results.json", result(latency_s=1.0))
    save(tmp_path / "my_report" / "x.json")
    flags = ("--input", tmp_path, "--compare", tmp_path / "old", "--output-dir", tmp_path / "my_report")
    assert "points compared 1: 1 worse" in analyze(*flags).stdout
    # Or the other way round.
    assert "1 better" in analyze(*flags[4:], "--input", tmp_path / "old", "--compare", tmp_path).stdout


def test_a_linked_folder_is_read_once(tmp_path: Path) -> None:
    save(tmp_path / "b" / "tp_1_results.json")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to("self")
    (tmp_path / "again.json").symlink_to("tp_2_results.json")
    save(tmp_path / "tp_2_results.json")
    assert names(tmp_path) == ["tp_2_results.json", "b/tp_1_results.json"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked").symlink_to(tmp_path / "b")
    assert names(elsewhere)[0] == "linked/tp_1_results.json"


def test_only_regular_files_are_read(analyze: Run, tmp_path: Path) -> None:
    """A pipe without a writer would never end."""
    save(tmp_path / "tp_1_results.json")
    os.mkfifo(tmp_path / "x.json")
    done = analyze("--input", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = analyze("--input", tmp_path / "x.json")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --input {tmp_path}/x.json: is no regular file and no folder")


def test_a_folder_below_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "tp_1_results.json")
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refusing(folder: Path) -> Any:
        if folder == closed:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find_files("--input", tmp_path)
    assert [path.name for path in found.paths] == ["tp_1_results.json"]
    assert found.unreadable == [f"{closed}: this folder cannot be read: Permission denied"]
    with pytest.raises(UsageError, match="closed: cannot be read: Permission denied"):
        find_files("--input", closed)


# --- which of them count ------------------------------------------------------------------------------------------


def at(ended_at: str | None, **more: Any) -> dict[str, Any]:
    return {"started_at": "2026-01-02T00:00:00+00:00", "ended_at": ended_at, **more}


def test_the_same_setting_found_twice_counts_once_and_a_line_says_so(analyze: Run, tmp_path: Path) -> None:
    # 10 o'clock in India is before 6 o'clock in London.
    save(tmp_path / "a" / "tp_1_results.json", result(latency_s=1.0, environment=at("2026-01-03T06:00:00+00:00")))
    save(tmp_path / "b" / "tp_1_results.json", result(latency_s=2.0, environment=at("2026-01-03T10:00:00+05:30")))
    save(tmp_path / "c" / "tp_1_results.json", result(latency_s=3.0, environment=at(None)))
    done = analyze("--input", tmp_path)
    assert done.returncode == 0
    line = (
        "tp_1 was measured in several files: a/tp_1_results.json is the newest and counts, c/tp_1_results.json, "
        "b/tp_1_results.json do not."
    )
    assert line in done.stdout
    assert line in (tmp_path / "analysis" / "report.md").read_text().replace("\\_", "_")
    summary = json.loads((tmp_path / "analysis" / "summary.json").read_text())
    assert summary["notes"] == [line]
    assert [setting["file"] for setting in summary["settings"]] == ["a/tp_1_results.json"]
    assert pd.read_csv(tmp_path / "analysis" / "results.csv")["setting"].tolist() == ["tp_1"]


def test_of_another_grid_of_a_setting_the_points_that_the_newest_lacks_count(analyze: Run, tmp_path: Path) -> None:
    def sized(day: str, *sizes: int) -> Result:
        when = {"started_at": f"2026-01-{day}T00:00:00+00:00", "ended_at": None}
        return make_result(
            "tp_1", [make_point(size) for size in sizes], config={"batch_sizes": list(sizes)}, environment=when
        )

    for folder, content in (("a", sized("03", 1, 2)), ("b", sized("02", 2, 4)), ("c", sized("01", 1, 4))):
        save(tmp_path / folder / "tp_1_results.json", content)
    done = analyze("--input", tmp_path)
    assert (
        "tp_1 was measured in several files: a/tp_1_results.json is the newest and counts, c/tp_1_results.json does "
        "not, of b/tp_1_results.json only the points that no newer file has."
    ) in done.stdout
    table = pd.read_csv(tmp_path / "analysis" / "results.csv")
    # One setting, so that it does not tie with itself.
    assert sorted(zip(table["setting"], table["batch_size"], table["file"], strict=True)) == [
        ("tp_1", 1, "a/tp_1_results.json"), ("tp_1", 2, "a/tp_1_results.json"), ("tp_1", 4, "b/tp_1_results.json"),
    ]  # fmt: skip
    assert "tie" not in done.stdout


def test_what_another_file_of_a_setting_has_is_not_missing(tmp_path: Path) -> None:
    def part(folder: str, day: str, asked: list[int], measured: list[int]) -> MeasuredSetting:
        when = {"started_at": f"2026-01-{day}T00:00:00+00:00", "ended_at": None}
        points = [make_point(size) for size in measured]
        status = "complete" if asked == measured else "partial"
        result = make_result("tp_1", points, config={"batch_sizes": asked}, environment=when, status=status)
        return load_setting(save(tmp_path / folder / "tp_1_results.json", result), top=tmp_path)

    older, newer = part("a", "01", [1, 2, 4, 8, 16], [1, 2]), part("b", "02", [4, 8], [4, 8])
    kept, notes = newest([older, newer])
    assert [(one.file, one.points_ok, one.points_asked, one.is_interrupted) for one in kept] == [
        ("a/tp_1_results.json", 2, 3, True), ("b/tp_1_results.json", 2, 2, False),
    ]  # fmt: skip
    assert [one.largest_size((1, 64, 32, None, None)) for one in kept] == [16, 16]
    assert set(setting_labels(kept).values()) == {"tp_1"}
    assert notes == [
        "tp_1 was measured in several files: b/tp_1_results.json is the newest and counts, of a/tp_1_results.json only "
        "the points that no newer file has."
    ]
    # What two of them did not reach is missing once, and other work has no larger sizes.
    again = part("c", "03", [1, 2, 4, 8, 16], [1])
    assert [one.points_asked - one.num_points for one in newest([older, newer, again])[0]] == [0, 0, 1]
    assert again.largest_size((1, 128, 32, None, None)) == 0


def test_a_setting_that_fails_now_is_not_shown_as_it_once_was(tmp_path: Path) -> None:
    old = result(config={"batch_sizes": [1]}, environment=at("2026-01-01T00:00:00+00:00"))
    failed = make_result("tp_1", status="failed", config={"batch_sizes": [1]},
                         environment=at("2026-01-02T00:00:00+00:00"))  # fmt: skip
    paths = [save(tmp_path / folder / "tp_1_results.json", one) for folder, one in (("a", old), ("b", failed))]
    ((one,), _) = newest([load_setting(path, top=tmp_path) for path in paths])
    assert (one.file, one.num_points, one.points_asked) == ("b/tp_1_results.json", 0, 1)


def test_answers_of_an_older_file_are_those_of_the_setting(tmp_path: Path) -> None:
    old = result(environment=at("2026-01-01T00:00:00+00:00"))
    old.answers = Answers(0, 8, 4, [], [], [])
    paths = [
        save(tmp_path / folder / "tp_1_results.json", one)
        for folder, one in (("a", old), ("b", result(environment=at("2026-01-02T00:00:00+00:00"))))
    ]
    assert [one.answers for one in newest([load_setting(path, top=tmp_path) for path in paths])[0]] == [old.answers]


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"seed": 1}},
        {"config": {"max_tokens": 64}},
        {"config": {"config_hash": None}},
        {"environment": {"devices": [{"name": "NVIDIA A100"}]}},
        {"environment": {"versions": {"vllm": "0.33.0"}}},
    ],
)
def test_other_settings_of_the_same_name_are_told_apart_by_their_files(
    analyze: Run, tmp_path: Path, other: dict[str, Any]
) -> None:
    save(tmp_path / "a" / "tp_1_results.json", result())
    save(tmp_path / "b" / "tp_1_results.json", result(**other))
    done = analyze("--input", tmp_path)
    assert "in several files" not in done.stdout
    table = pd.read_csv(tmp_path / "analysis" / "results.csv")
    assert set(table["setting"]) == {"tp_1 [a/tp_1_results]", "tp_1 [b/tp_1_results]"}


def test_files_that_do_not_say_what_was_asked_are_never_the_same(analyze: Run, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        save(tmp_path / name, result(config={"config_hash": None}, environment=at("yesterday")))
    assert "in several files" not in analyze("--input", tmp_path).stdout


# --- what is chosen -----------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name in ("tp_1", "tp_2"):
        for model in (LLAMA, QWEN):
            config = {"model": model, "config_hash": f"{model} {name}"}
            save(tmp_path / "study" / Path(model).name / f"{name}_results.json", result(name, config=config))
    return tmp_path / "study"


def settings_in(study: Path) -> list[str]:
    summary = json.loads((study / "analysis" / "summary.json").read_text())
    return [setting["file"] for setting in summary["settings"]]


@pytest.mark.parametrize("name", [QWEN, "Qwen3-0.6B"])
def test_a_model_is_chosen_by_its_name_or_the_last_part_of_it(analyze: Run, study: Path, name: str) -> None:
    done = analyze("--input", study, "--model", name)
    assert done.returncode == 0
    assert f"--model {name}: 2 other files left out." in done.stdout
    assert settings_in(study) == ["Qwen3-0.6B/tp_1_results.json", "Qwen3-0.6B/tp_2_results.json"]


def test_settings_are_chosen_by_their_names(analyze: Run, study: Path) -> None:
    assert analyze("--input", study, "--setting", "tp_2", "--model", LLAMA).returncode == 0
    assert settings_in(study) == ["Llama-2-7b-chat-hf/tp_2_results.json"]
    assert analyze("--input", study, "--setting", "tp_2, tp_1").returncode == 0
    assert len(settings_in(study)) == 4


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model", "Qwen"), f"--model Qwen: not found in --input {{}}, which has {QWEN}, {LLAMA}"),
        (("--setting", "tp_1,tp_9,dp_2"), "--setting tp_9,dp_2: not found in --input {}, which has tp_1, tp_2"),
    ],
)
def test_what_is_not_there_is_refused_and_what_is_there_named(
    analyze: Run, study: Path, flags: tuple[str, ...], told: str
) -> None:
    done = analyze("--input", study, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {told.format(study)}\n"


def test_the_choice_holds_for_the_earlier_results_too(analyze: Run, study: Path, tmp_path: Path) -> None:
    old = shutil.copytree(study, tmp_path / "old")
    done = analyze("--input", study, "--compare", old, "--model", QWEN, "--setting", "tp_1")
    assert "points compared 1: 1 no difference" in done.stdout
    assert f"--compare: --model {QWEN}: 2 other files left out." in done.stdout
    shutil.rmtree(old / "Qwen3-0.6B")
    done = analyze("--input", study, "--compare", old, "--model", QWEN)
    assert done.stderr == f"error: --model {QWEN}: not found in --compare {old}, which has {LLAMA}\n"


# --- where it goes, and what stays there --------------------------------------------------------------------------


def test_the_report_of_a_single_file_does_not_replace_that_of_its_folder(analyze: Run, study: Path) -> None:
    folder = study / "Qwen3-0.6B"
    analyze("--input", folder)
    before = (folder / "analysis" / "report.md").read_text()
    analyze("--input", folder / "tp_2_results.json")
    assert (folder / "analysis_tp_2" / "report.md").exists()
    assert (folder / "analysis" / "report.md").read_text() == before
    save(folder / "notes.json")
    analyze("--input", folder / "notes.json")
    assert (folder / "analysis_notes").is_dir()
    assert len(find_files("--input", folder).paths) == 3


def test_what_lies_where_the_analysis_goes_is_none_of_it(analyze: Run, tmp_path: Path) -> None:
    save(tmp_path / "tp_1_results.json")
    save(tmp_path / "out" / "tp_8_results.json")
    assert len(names(tmp_path)) == 2
    assert "tp_8" not in analyze("--input", tmp_path, "--output-dir", tmp_path / "out").stdout


def test_plots_that_are_not_drawn_again_go_and_those_of_others_stay(tmp_path: Path) -> None:
    save(tmp_path / "tp_1_results.json")
    analysis = tmp_path / "analysis"
    assert analyze_results.main(["--input", str(tmp_path), "--plots", "throughput,memory,pareto"]) == 0
    shutil.copy(analysis / "memory.png", analysis / "mine.png")  # a copy that somebody keeps
    (analysis / "ttft.png").write_bytes(b"\x89PNG of another program")
    (analysis / "latency.svg").symlink_to(analysis / "throughput.svg")
    os.mkfifo(analysis / "energy.png")
    (tmp_path / "tpot.png").write_text(mark_of(tmp_path / "tpot.png"))
    (analysis / "tpot.png").symlink_to(tmp_path / "tpot.png")
    assert analyze_results.main(["--input", str(tmp_path), "--plots", "throughput"]) == 0
    foreign = ["energy.png", "latency.svg", "mine.png", "tpot.png", "ttft.png"]
    there = sorted(path.name for path in analysis.iterdir() if path.suffix in (".png", ".svg"))
    assert there == sorted([*foreign, "throughput.png", "throughput.svg", "throughput_dark.svg"])
    assert analyze_results.main(["--input", str(tmp_path), "--no-plots"]) == 0
    assert sorted(path.name for path in analysis.iterdir() if path.suffix in (".png", ".svg")) == foreign
