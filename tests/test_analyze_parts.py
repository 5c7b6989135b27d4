"""The parts of analyze_results.py one by one, without a file or a table: what each is given, and what it gives."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import analyze_results as script
from batch_inference.analyze import plots, sources
from batch_inference.analyze.answers import Question, QuestionError
from batch_inference.analyze.decide import Limits
from batch_inference.analyze.flags import UsageError, parse


def said(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


class Steps:
    """main() with each of its steps replaced: what they were given, in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[Any] = []
        self.points_ok = {"new": [0, 1], "old": [1]}
        self.unreadable: dict[str, list[str]] = {"new": [], "old": []}
        self.gate = 0
        for name in ("secure_streams", "check_packages", "check_plots", "make_folder", "print_kept"):
            monkeypatch.setattr(script, name, self.step(name))
        monkeypatch.setattr(script, "read_settings", self.read)
        monkeypatch.setattr(script, "ask", self.step("ask", "analysis"))
        monkeypatch.setattr(script, "write", self.step("write", "text"))
        monkeypatch.setattr(script, "gate", lambda *given: self.called.append(("gate", *given)) or self.gate)

    def step(self, name: str, gives: Any = None) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            self.called.append((name, *(item for item in given if not isinstance(item, Namespace))))
            return given[0] if name == "make_folder" else gives

        return run

    def read(self, flag: str, path: Path, _: Namespace, other: Path | None) -> Any:
        self.called.append(("read", flag, str(path), other and str(other)))
        settings = [SimpleNamespace(points_ok=count, of=path.name) for count in self.points_ok[path.name]]
        return settings, list(self.unreadable[path.name]), [f"note of {path.name}"]

    def of(self, name: str) -> Any:
        (found,) = (given[1:] for given in self.called if given[0] == name)
        return found


def test_one_set_is_read_asked_written_and_shown(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    steps = Steps(monkeypatch)
    assert script.main(["--input", "new", "--output-dir", "out", "--plots", "throughput"]) == 0
    assert [given[0] for given in steps.called] == [
        "secure_streams", "check_packages", "read", "check_plots", "ask", "make_folder", "write", "print_kept", "gate",
    ]  # fmt: skip
    assert steps.of("read") == ("--input", "new", None)
    assert steps.of("check_plots") == (("throughput",),)
    settings, earlier, notes = steps.of("ask")
    assert ([one.of for one in settings], earlier, notes) == (["new", "new"], None, ["note of new"])
    assert steps.of("write") == ("analysis", [], Path("out"))
    assert steps.of("print_kept") == ("text", Path("out"))
    assert steps.of("gate") == ("analysis", None)
    assert said(capsys) == ""


def test_two_sets_are_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    steps = Steps(monkeypatch)
    steps.unreadable = {"new": ["new\x1b: bad"], "old": ["old: bad"]}
    assert script.main(["--input", "new", "--compare", "old", "--fail-on-regression", "3"]) == 1
    assert [given for given in steps.called if given[0] == "read"] == [
        ("read", "--input", "new", "old"),
        ("read", "--compare", "old", "new"),
    ]
    settings, earlier, notes = steps.of("ask")
    assert ([one.of for one in settings], [one.of for one in earlier]) == (["new", "new"], ["old"])
    assert notes == ["note of new", "--compare: note of old"]
    assert steps.of("write") == ("analysis", ["new\x1b: bad", "old: bad"], Path("analysis_new"))
    assert steps.of("gate") == ("analysis", 3.0)
    assert said(capsys) == "error: new\\x1b: bad\nerror: old: bad\n"


@pytest.mark.parametrize(
    ("points_ok", "unreadable", "gate", "code"),
    [
        ([1, 0], [], 0, 0), ([0, 1], [], 0, 0), ([0, 0], [], 0, 1), ([1], ["x"], 0, 1), ([1], [], 3, 3),
        ([1], ["x"], 3, 3), ([0], ["x"], 2, 2),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_gate_before_that_of_files(
    points_ok: list[int], unreadable: list[str], gate: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    steps.points_ok["new"], steps.unreadable["new"], steps.gate = points_ok, unreadable, gate
    assert script.main(["--input", "new"]) == code


def test_a_set_without_a_measured_point_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    steps = Steps(monkeypatch)
    steps.points_ok["new"] = [0]
    assert script.main(["--input", "new"]) == 1
    assert said(capsys) == "error: --input new: no point was measured; the report says why\n"
    monkeypatch.setattr(script, "check_packages", lambda _: (_ for _ in ()).throw(UsageError("missing\x1b")))
    assert script.main(["--input", "new"]) == 2
    assert said(capsys) == "error: missing\\x1b\n"


@pytest.mark.parametrize(("words", "draws"), [([], True), (["--plots", "throughput"], True), (["--no-plots"], False)])
def test_what_draws_is_needed_where_something_is_drawn(
    words: list[str], draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(script, "missing_to_analyse", lambda *, plots: asked.append(plots))
    script.check_packages(parse(["--input", "x", *words]))
    assert asked == [draws]
    monkeypatch.setattr(script, "missing_to_analyse", lambda *, plots: f"missing {plots}")
    with pytest.raises(UsageError, match=f"^missing {draws}$"):
        script.check_packages(parse(["--input", "x", *words]))


def test_a_plot_is_one_that_there_is() -> None:
    known = [name for name, _, _ in (*plots.JOB_PLOTS, *plots.PLOTS)]
    for names in (None, [], known, known[-1:]):
        script.check_plots(names)
    with pytest.raises(UsageError) as caught:
        script.check_plots([known[0], "a", "b"])
    assert str(caught.value) == f"--plots a,b: no such plot; choose of {', '.join(known)}"


def test_what_is_asked_of_batches_where_there_are_only_jobs_is_said() -> None:
    def setting(*batches: object) -> Any:
        return SimpleNamespace(queues=["a job"], batch_points=lambda: iter(batches))

    flags = parse(["--input", "x", "--goal", "latency", "--max-ttft-s", "2"])
    assert script.notes_on_jobs([setting()], flags) == [
        "--goal latency is for batches, and only jobs were measured: no files to use are written. A job is fastest "
        "where throughput is highest.",
        "--max-ttft-s has no effect: it limits the points of a grid, and only jobs were measured.",
    ]
    assert script.notes_on_jobs([setting(), setting((1, 2, 3, 4.0))], flags) == []
    assert script.notes_on_jobs([setting()], parse(["--input", "x"])) == []


def test_what_is_asked_is_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--input x --max-latency-s 1 --max-ttft-s 2 --max-tpot-s 3 --slo-percentile 90 --device-hour-price 4"
        " --baseline tp_2 --group-by model,dtype --allow-mixed"
    )
    given: list[Any] = []
    monkeypatch.setattr("batch_inference.analyze.answers.analyse", lambda *asked: given.append(asked) or "analysis")
    settings: Any = []
    assert script.ask(settings, parse(words.split()), ["earlier"], ["note"]) == "analysis"  # type: ignore[list-item, comparison-overlap]
    assert script.ask(settings, parse(["--input", "x"]), None, []) == "analysis"  # type: ignore[comparison-overlap]
    (_, full, *rest), (_, plain, *_) = given
    assert (full.limits, full.price, full.baseline) == (Limits(1.0, 2.0, 3.0, 90.0), 4.0, "tp_2")
    assert (list(full.group_by), full.allow_mixed, rest) == (["model", "dtype"], True, [["earlier"], ["note"]])
    assert plain == Question()

    def cannot(*_: Any) -> Any:
        raise QuestionError("cannot say")

    monkeypatch.setattr("batch_inference.analyze.answers.analyse", cannot)
    with pytest.raises(UsageError, match=r"^cannot say$"):
        script.ask(settings, parse(["--input", "x"]), None, [])


def test_a_folder_that_fills_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_inference.analyze.report.write_report", lambda *given: given)
    monkeypatch.setattr("batch_inference.analyze.to_use.write_to_use", lambda *given: given)
    analysis: Any = "analysis"
    asked = parse(["--input", "in", "--goal", "latency", "--plots", "pareto"])
    written: Any = script.write(analysis, ["bad"], Path("out"), asked)
    to_use = ("analysis", "latency", Path("best_in"))
    assert written == ("analysis", ["bad"], Path("out"), ("pareto",), to_use)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batch_inference.analyze.report.write_report", full)
    with pytest.raises(UsageError) as caught:
        script.write(analysis, [], Path("out"), asked)
    assert str(caught.value) == "--output-dir out: cannot be written to: No space left on device; choose another"


GATE = [
    # Changes and their ratios, the percentage asked for, the exit code, and what is said.
    ([("worse", 0.9), ("lost", None), ("better", 1.1)], None, 0, ""),
    ([("worse", 0.9), ("lost", None), ("better", 1.1)], 5.0, 3, "2 of 3 points are lost or worse by more"),
    ([("worse", 0.9), ("lost", None), ("better", 1.1)], 12.5, 3, "1 of 3 points are lost or worse by more"),
    ([("worse", 0.9), ("unknown", None)], 12.5, 0, "1 of 2 points cannot be judged: a single run; raise --num-runs"),
    ([("worse", 0.9), ("unknown", None)], 5.0, 3, "1 of 2 points are lost or worse by more"),
    ([("unknown", None), ("unknown", None)], 0.0, 2,
     "no point is in both sets with two runs or more; compare settings of the same name and grid"),
    ([("no difference", 1.0)], 0.0, 0, ""),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "percent", "code", "told"), GATE)
def test_the_gate_tells_how_many_points_are_worse(
    changes: list[Any], percent: float | None, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    points = pd.DataFrame(changes, columns=["change", "ratio"])
    analysis: Any = SimpleNamespace(comparison=SimpleNamespace(points=points))
    assert script.gate(analysis, percent) == code
    assert said(capsys) == (
        f"{'error' if code else 'note'}: --fail-on-regression {percent:g}: {told}\n" if told else ""
    )
    assert script.gate(SimpleNamespace(comparison=None), percent) == 0  # type: ignore[arg-type]


def test_what_counts_is_chosen_before_the_newest_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Setting:
        pass

    one, two, older = Setting(), Setting(), Setting()
    seen: list[Any] = []
    found = SimpleNamespace(paths=["paths"], unreadable=["a folder\nof \x1b lines"])
    loaded: list[Any] = [one, ValueError("x.json:  bad"), two, older]

    def find(*given: Any) -> Any:
        seen.append(given)
        return SimpleNamespace(paths=found.paths, unreadable=list(found.unreadable))

    def load(*given: Any) -> Any:
        seen.append(given)
        return loaded

    def choose(*given: Any) -> Any:
        seen.append(given)
        return [one, older], ["left out"]

    monkeypatch.setattr(script, "find_files", find)
    monkeypatch.setattr("batch_inference.analyze.tables.MeasuredSetting", Setting)
    monkeypatch.setattr(sources, "load_settings", load)
    monkeypatch.setattr(sources, "chosen", choose)
    monkeypatch.setattr(sources, "newest", lambda settings: (settings[:1], ["older"]))
    words = ["--input", "x", "--model", "m", "--setting", "a,b", "--slo-percentile", "90", "--output-dir", "out"]
    flags, file = parse(words), tmp_path / "x.json"
    read = script.read_settings("--compare", file, flags, Path("other"))
    assert read == ([one], ["a folder of   lines", "x.json: bad"], ["left out", "older"])
    assert seen == [
        ("--compare", file, (Path("other"), Path("out"))),
        (["paths"], 90.0, tmp_path),
        ([one, two, older], "m", flags.setting, f"--compare {file}"),
    ]
    script.read_settings("--input", tmp_path, flags, None)
    assert seen[4] == (["paths"], 90.0, tmp_path)  # a folder is its own
    loaded[:] = [ValueError(f"{number}.json: bad") for number in range(4)]
    with pytest.raises(UsageError) as caught:
        script.read_settings("--input", file, flags, None)
    assert str(caught.value) == (
        "--input a folder of   lines; 0.json: bad; 1.json: bad; and 2 more files that cannot be read"
    )
