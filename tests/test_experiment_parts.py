"""The parts of batch_inference_experiment.py one by one, with nothing loaded: what each is given, and what it gives."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import batch_inference_experiment as script
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.failures import ADVICE, WorkFailedError
from batch_inference.core.result_file import ResultFileError
from batch_inference.core.results import Failure
from batch_inference.plan.devices import Devices
from batch_inference.plan.place import Place
from batch_inference_experiment import Surroundings, build_replicas, choose, follow_rank_0, look_around, tell
from builders import make_point, make_result

GPUS = Devices("gpu", ("4", "5", "6", "7"))
CPU = Devices("cpu", ("0-1", "2-3"))
# Of two nodes with two ranks each: the first, the second of the first node, and both of the second node.
FIRST, BESIDE, SECOND, LAST = (Place(rank, 4, rank % 2, 2) for rank in range(4))


def here_is(
    devices: Devices = GPUS, place: Place | None = None, cluster: Any = None, facts: Any = None, said: Any = None
) -> Surroundings:
    return Surroundings(facts, devices, place, cluster, said)


# --- main ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def main_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """main() at a place, with the work that it would choose; its exit code, and what it called in which order."""

    def run(place: Place | None, work: Callable[..., int]) -> tuple[int, list[str]]:
        called: list[str] = []
        monkeypatch.setattr(sys, "argv", ["x", "--seed", "5"])
        monkeypatch.setattr(script, "secure_streams", lambda: called.append("secure_streams"))
        monkeypatch.setattr(script, "end_in_order", lambda: called.append("end_in_order"))
        monkeypatch.setattr(script, "find_place", lambda: place)
        monkeypatch.setattr(
            script, "remember", lambda words, environment: called.append(f"{words} {environment is os.environ}")
        )
        monkeypatch.setattr(script, "parse_flags", lambda words: (ExperimentConfig(seed=int(words[1])), ["one", "two"]))
        monkeypatch.setattr(script, "look_around", lambda config, place, _: (config.seed, place))
        monkeypatch.setattr(script, "choose", lambda config, here: lambda *given: work(*given, (config.seed, here)))
        return script.main(), called

    return run


BEGINS = ["secure_streams", "['--seed', '5'] True"]


@pytest.mark.parametrize("place", [None, FIRST, BESIDE, SECOND])
def test_one_process_says_the_notes_and_ends_in_order(
    main_at: Any, place: Place | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: ExperimentConfig, here: Any, chosen: Any) -> int:
        assert (config.seed, here) == (5, (5, place)) == chosen
        return 7

    leads = place in (None, FIRST)
    assert main_at(place, work) == (7, [*BEGINS, "end_in_order"] if leads else BEGINS)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "note: one\nnote: two\n" if leads else "")


@pytest.mark.parametrize(
    ("error", "place", "told"),
    [
        (ConfigError("x"), None, (2, "error: x\n")),
        (ConfigError("x"), FIRST, (2, "error: x\n")),
        (ConfigError("x"), BESIDE, (2, "")),
        (ConfigError("x"), SECOND, (2, "error: x\n")),
        (WorkFailedError("y\n  z"), None, (1, "error: y\n  z\n")),
        (WorkFailedError("y"), BESIDE, (1, "error: y\n")),
        (KeyboardInterrupt(), None, (130, "interrupted\n")),
    ],
)
def test_each_end_has_its_exit_code_and_its_words(
    main_at: Any, error: BaseException, place: Place | None, told: tuple[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: Any) -> int:
        raise error

    code = main_at(place, work)[0]
    assert (code, capsys.readouterr().err.removeprefix("note: one\nnote: two\n")) == told


# --- what this process finds --------------------------------------------------------------------------------------


def test_what_is_found_is_of_this_machine_or_of_the_one_that_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(script, "check_place", lambda *given: asked.append(given))
    monkeypatch.setattr(script, "facts_of", lambda given: f"facts of {given.model}")
    monkeypatch.setattr(script, "ask", lambda _, here: f"{here.facts}, asked of vLLM")
    monkeypatch.setattr(script, "find_devices", lambda: CPU)
    config = ExperimentConfig(model="m")
    assert look_around(config, FIRST) == Surroundings(
        "facts of m",
        CPU,
        FIRST,
        None,
        "facts of m, asked of vLLM",  # type: ignore[arg-type]
    )
    assert asked.pop() == (config, FIRST)
    planned = look_around(dataclasses.replace(config, devices=3, dry_run=True), None)
    assert planned.devices == Devices("gpu", ("0", "1", "2"), are_here=False)
    # Of the processes of a node, one asks.
    assert [look_around(config, place).said is None for place in (BESIDE, SECOND)] == [True, False]
    assert (planned.processes, here_is(place=BESIDE).processes) == (None, 2)


@pytest.mark.parametrize(
    ("backend", "devices", "dry_run", "asks"),
    [
        ("ray", GPUS, False, True),
        ("ray", GPUS, True, False),
        ("ray", CPU, False, False),
        ("mp", GPUS, False, False),
        (None, GPUS, False, False),
    ],
)
def test_a_ray_cluster_is_looked_for_where_it_is_measured_on(
    backend: str | None, devices: Devices, dry_run: bool, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "facts_of", lambda _: None)
    monkeypatch.setattr(script, "ask", lambda *_: None)
    monkeypatch.setattr(script, "find_devices", lambda: devices)
    monkeypatch.setattr("batch_inference.measure.ray_cluster.find_cluster", lambda: "cluster")
    config = ExperimentConfig(distributed_executor_backend=backend, dry_run=dry_run)
    assert look_around(config, None).cluster == ("cluster" if asks else None)


# --- what it is to do ---------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What was checked, in its order, where everything fits."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(script, "devices_against", lambda *given: made.append(("devices", given)))
    monkeypatch.setattr(script, "rules_against", lambda *given: made.append(("rules", given)))
    monkeypatch.setattr(script, "needs_of", lambda *given: given)
    monkeypatch.setattr(script, "smallest_memory_gib", lambda _: 70.0)
    monkeypatch.setattr(script, "memory_against", lambda needs: made.append(("memory", needs)))
    monkeypatch.setattr(script, "missing_to_measure", lambda: made.append(("packages", ())))
    return made


@pytest.mark.parametrize(
    ("flags", "place", "work", "checks"),
    [
        ({}, None, script.measure, ["devices", "rules", "memory", "packages"]),
        ({"node_rank": 1}, None, script.serve_node_0, ["devices", "rules", "memory", "packages"]),
        ({"node_rank": 1}, FIRST, script.measure, ["devices", "rules", "memory", "packages"]),
        # Others of a node do not know what vLLM says.
        ({}, BESIDE, script.follow_rank_0, ["devices", "packages"]),
        ({}, SECOND, script.follow_rank_0, ["devices", "rules", "memory", "packages"]),
        ({}, LAST, script.follow_rank_0, ["devices", "packages"]),
        ({"dry_run": True}, None, script.show_plan, []),
        ({"dry_run": True}, FIRST, script.show_plan, []),
        ({"dry_run": True}, BESIDE, script.say_nothing, []),
        ({"dry_run": True}, SECOND, script.say_nothing, []),
    ],
)
def test_every_process_has_its_work(
    flags: dict[str, Any], place: Place | None, work: object, checks: list[str], checked: list[tuple[str, Any]]
) -> None:
    config = ExperimentConfig(engine_args=("--a", "b"), **flags)
    here = here_is(place=place, facts="facts", said="said")
    assert choose(config, here) is work
    assert [name for name, _ in checked] == checks
    told = dict(checked)
    for name, given in (
        ("devices", (config, GPUS, place and 2, 4)),
        ("rules", (config, "facts", GPUS, "said")),
        ("memory", (config, "facts", GPUS, 70.0, "said")),
    ):
        assert told.get(name, given) == given


def test_a_ray_cluster_has_gpus_of_its_own(checked: list[tuple[str, Any]]) -> None:
    choose(ExperimentConfig(), here_is(cluster=SimpleNamespace(gpus=9, address="a")))
    assert dict(checked)["devices"][-1] == 9


@pytest.mark.parametrize(("dry_run", "obstacle", "asks"), [(False, None, 1), (False, "x", 0), (True, "x", 1)])
def test_vllm_is_asked_once_its_flags_are_right_and_there_are_devices_to_measure_on(
    dry_run: bool, obstacle: str | None, asks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(script, "check_vllm_flags", lambda *given: made.append(given))
    monkeypatch.setattr(script, "devices_against", lambda *given: made.append(given) or obstacle)
    monkeypatch.setattr(script, "ask_vllm", lambda *given, **how: made.append((*given, how)) or ["said"])
    monkeypatch.setattr(script, "smallest_memory_gib", lambda _: 70.0)
    config = ExperimentConfig(engine_args=("--a", "b"), dry_run=dry_run)
    here = here_is(facts="facts")
    assert script.ask(config, here) == ("said" if asks else None)
    assert made[0] == (("--a", "b"), script.say)
    assert ((config, GPUS, None, 4) in made) is not dry_run
    asked = ([(config, "facts", 70.0)], GPUS, script.say, {"only_in_doubt": not dry_run})
    assert made[2 - dry_run :] == [asked] * asks
    script.ask(dataclasses.replace(config, device_memory_gib=80.0, dry_run=True), here)
    assert made[-1][0][0][2] == 80.0


def test_what_does_not_fit_stands_before_what_is_not_installed(
    checked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "missing_to_measure", lambda: "not installed")
    with pytest.raises(ConfigError, match=r"^not installed$"):
        choose(ExperimentConfig(), here_is())
    for check in ("memory_against", "rules_against", "devices_against"):
        monkeypatch.setattr(script, check, lambda *_, check=check: check)
        with pytest.raises(ConfigError, match=f"^{check}$"):
            choose(ExperimentConfig(), here_is())
    assert [name for name, _ in checked] == ["devices", "rules", "memory", "devices", "rules", "devices"]
    assert script.say_nothing(ExperimentConfig(), here_is()) == 0


@pytest.mark.parametrize("check", ["devices_against", "rules_against", "memory_against"])
@pytest.mark.parametrize(("obstacle", "shown", "code"), [(None, 0, 0), (None, 1, 1), ("x", 0, 1), ("x", 1, 1)])
def test_a_plan_that_cannot_run_or_be_shown_is_exit_1(
    check: str, obstacle: str | None, shown: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def show(text: str) -> int:
        texts.append(text)
        return shown

    monkeypatch.setattr(script, "devices_against", lambda *_: None)
    monkeypatch.setattr(script, "rules_against", lambda *_: None)
    monkeypatch.setattr(script, "needs_of", lambda *_: None)
    monkeypatch.setattr(script, "memory_against", lambda _: None)
    monkeypatch.setattr(script, check, lambda *_: obstacle)
    monkeypatch.setattr(script, "smallest_memory_gib", lambda devices: devices.ids)
    monkeypatch.setattr(script, "setting_plan", lambda *given: [repr(given[1:]), "end"])
    monkeypatch.setattr(script, "show", show)
    assert script.show_plan(ExperimentConfig(), here_is(facts="facts", said="said")) == code
    assert texts == [f"{('facts', GPUS, GPUS.ids, 'said')!r}\nend"]


# --- measuring ----------------------------------------------------------------------------------------------------


class Replicas:
    def __init__(self, *given: Any, **named: Any) -> None:
        self.made = (*given, named)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LocalReplicas", "TorchrunReplicas"):
        monkeypatch.setattr(f"batch_inference.measure.replicas.{name}", type(name, (Replicas,), {}))
    monkeypatch.setattr(script, "is_coupled", lambda config, facts: (config, facts))


@pytest.mark.usefixtures("replicas")
@pytest.mark.parametrize(
    ("backend", "address", "ray_address"),
    [("ray", "1.2.3.4:5", "1.2.3.4:5"), ("ray", None, "local"), ("mp", "1.2.3.4:5", None), (None, None, None)],
)
def test_replicas_are_processes_here_or_of_a_ray_cluster(
    backend: str | None, address: str | None, ray_address: str | None
) -> None:
    config = ExperimentConfig(distributed_executor_backend=backend)
    cluster = SimpleNamespace(address=address, gpus=8) if address else None
    made: Any = build_replicas(config, here_is(cluster=cluster, facts="facts"), CPU, "nodes")  # type: ignore[arg-type]
    named = {"coupled": (config, "facts"), "nodes": "nodes", "ray_address": ray_address}
    assert (type(made).__name__, made.made) == ("LocalReplicas", (config, CPU, named))


@pytest.mark.usefixtures("replicas")
def test_ranks_of_torchrun_are_replicas_of_their_own() -> None:
    config = ExperimentConfig(distributed_executor_backend="external_launcher")
    made: Any = build_replicas(config, here_is(GPUS, FIRST), CPU, None)
    assert type(made).__name__ == "TorchrunReplicas"
    assert made.made == (config, CPU.rank_environment(0), FIRST, {})


def test_the_devices_that_are_measured_on_are_those_of_this_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = SimpleNamespace(devices=["device"], peaks="none yet")
    seen: list[Any] = []

    @contextlib.contextmanager
    def claimed(config: ExperimentConfig, _: Any) -> Iterator[Any]:
        yield dataclasses.replace(config, output_file="other.json"), ["claimed"]

    @contextlib.contextmanager
    def in_use(devices: Any, what: str) -> Iterator[list[str]]:
        seen.append((devices, what))
        yield ["in use"]

    monkeypatch.setattr("batch_inference.measure.hardware.monitor", lambda devices: ("watch", devices))
    monkeypatch.setattr("batch_inference.measure.locks.devices_in_use", in_use)
    monkeypatch.setattr("batch_inference.measure.study.claimed", claimed)
    monkeypatch.setattr(
        "batch_inference.measure.environment.collect_environment",
        lambda devices, watch: environment if watch == ("watch", devices) else None,
    )
    monkeypatch.setattr(script, "measured_peaks", lambda config, _: f"peaks of {config.seed}")
    monkeypatch.setattr(script, "sweep", lambda *given: seen.append(given) or 9)
    for config, place, count, peaks in (
        (ExperimentConfig(tensor_parallel_size=2, nnodes=2, master_addr="a"), None, 1, None),
        (ExperimentConfig(tensor_parallel_size=3), None, 3, None),
        (ExperimentConfig(tensor_parallel_size=4, measure_peaks=True, seed=6), FIRST, 2, "peaks of 6"),
    ):
        seen.clear()
        here = here_is(place=place)
        assert script.measure(config, here) == 9
        devices = Devices("gpu", GPUS.ids[:count])
        claim = dataclasses.replace(config, output_file="other.json")
        assert seen == [
            (["device"], f"{config.setting_name}, other.json"),
            (claim, here, devices, ("watch", devices), environment),
        ]
        assert environment.peaks == peaks
        assert capsys.readouterr().err == "note: claimed\nnote: in use\n"


def test_what_became_of_it_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(script, "print_kept", lambda *given: kept.append(given))
    monkeypatch.setattr("batch_inference.measure.console.closing_table", lambda result: f"table of {result.name}")
    config, result = ExperimentConfig(output_file="a/b.json"), make_result("tp_2", [make_point()])
    assert [tell(config, result, [], is_whole=is_whole) for is_whole in (True, False)] == [0, 1]
    assert kept == [("table of tp_2\n\na/b.json", Path("a/b.json"))] * 2
    result.failure = Failure("oom_load", "no room")
    with pytest.raises(WorkFailedError) as caught:
        tell(config, result, [], is_whole=True)
    assert str(caught.value) == f"tp_1: no room\n  oom_load: {ADVICE['oom_load']}\n  vLLM's log: a/b.log"
    assert len(kept) == 2
    assert capsys.readouterr() == ("", "")


def test_a_rank_follows_with_its_devices_and_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"KEPT": "1", "A": "of the user"})
    monkeypatch.setattr("batch_inference.measure.engine_process.quiet_environment", lambda: {"A": "quiet"})
    monkeypatch.setattr("batch_inference.measure.worker.follow", lambda *given: given)
    config = ExperimentConfig(output_file="x.json")
    followed: Any = follow_rank_0(config, here_is(CPU, LAST))
    assert followed == (config, LAST, Path("x.rank_3.log"))
    assert os.environ == {"KEPT": "1", "A": "quiet", **CPU.rank_environment(1)}


def test_a_node_works_for_node_0_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batch_inference.measure.engine_process import ReplicaError

    seen: list[Any] = []

    @contextlib.contextmanager
    def meet(config: ExperimentConfig, say: Any) -> Iterator[str]:
        seen.append((config, say))
        yield "nodes"

    def hold(*given: Any) -> None:
        seen.append(given)
        if len(seen) > 3:
            raise ReplicaError("lost", "error")

    monkeypatch.setattr("batch_inference.measure.nodes.meet", meet)
    monkeypatch.setattr("batch_inference.measure.replicas.hold_workers", hold)
    config = ExperimentConfig(
        tensor_parallel_size=4, nnodes=2, node_rank=1, master_addr="a", output_file=str(tmp_path / "x.json")
    )
    log = tmp_path / "x.node_1.log"
    log.write_text("old")
    assert script.serve_node_0(config, here_is()) == 0
    assert seen == [(config, script.say), (config, Devices("gpu", ("4", "5")), "nodes")]
    assert log.read_text() == ""
    told = f"tp_4_nodes_2: node 1 works for node 0, which prints the results\n  vLLM's log: {log}\n"
    assert capsys.readouterr() == (told, "")
    with pytest.raises(WorkFailedError) as caught:
        script.serve_node_0(config, here_is())
    assert str(caught.value) == f"tp_4_nodes_2: lost\n  vLLM's log: {log}"


class SweepOf:
    """What `sweep` called, and with what; an experiment that ends as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, points: int, *, is_open: bool = True) -> None:
        self.called: list[Any] = []
        self.result = make_result(points=[make_point(number) for number in range(1, points + 1)])
        self.is_open, self.is_whole = is_open, "whole"
        self.fails: str | None = None
        self.told: str | None = "the document"
        room = "batch_inference.measure"
        monkeypatch.setattr(f"{room}.resume.starting_result", self.begin)
        monkeypatch.setattr(f"{room}.logs.empty_log", lambda log: self.called.append(("empty", str(log))))
        monkeypatch.setattr(f"{room}.console.Console", lambda: "console")
        monkeypatch.setattr(f"{room}.experiment.Experiment", self.experiment)
        monkeypatch.setattr(f"{room}.hub.fetch_models", lambda *given: self.called.append(("fetch", *given)))
        monkeypatch.setattr(f"{room}.nodes.meet", self.meet)
        monkeypatch.setattr(script, "build_replicas", lambda *given: given)
        monkeypatch.setattr(
            script, "tell", lambda config, result, answers, is_whole: (config, result, *answers, is_whole)
        )

    def begin(self, config: Any, environment: Any) -> Any:
        assert (type(config), environment) == (ExperimentConfig, "environment")
        return self.result

    def experiment(self, *given: Any) -> Any:
        self.given = given
        return SimpleNamespace(
            is_open=self.is_open, is_whole=self.is_whole, run=self.run, unsaved=lambda: self.told, answers=list
        )

    @contextlib.contextmanager
    def meet(self, *given: Any) -> Iterator[str]:
        self.called.append(("meet", *given))
        yield "nodes"
        self.called.append("parted")

    def run(self, replicas: Any, nodes: Any) -> None:
        self.called.append(("run", replicas, nodes))
        if self.fails:
            raise ResultFileError(self.fails)


@pytest.mark.parametrize("points", [0, 1])
def test_a_sweep_goes_on_with_the_log_of_earlier_points_alone(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, config, here = SweepOf(monkeypatch, points), ExperimentConfig(output_file="x.json"), here_is()
    assert script.sweep(config, here, CPU, "watch", "environment") == (  # type: ignore[arg-type, comparison-overlap]
        config, seen.result, "whole",
    )  # fmt: skip
    assert seen.given == (config, seen.result, "watch", "console", None)
    emptied: list[Any] = [] if points else [("empty", "x.log")]
    assert seen.called == [*emptied, ("run", (config, here, CPU, None), None)]


@pytest.mark.parametrize(
    ("replicas", "place", "is_open", "fetches"),
    [(2, None, True, True), (1, None, True, False), (2, FIRST, True, False), (2, None, False, False)],
)
def test_what_several_replicas_load_is_fetched_once_before(
    replicas: int, place: Place | None, is_open: bool, fetches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = SweepOf(monkeypatch, 1, is_open=is_open)
    config = ExperimentConfig(data_parallel_size=replicas)
    script.sweep(config, here_is(place=place), CPU, "watch", "environment")  # type: ignore[arg-type]
    assert seen.called[:-1] == ([("fetch", [config], script.say)] if fetches else [])


def test_nodes_meet_before_and_part_after(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, config, here = SweepOf(monkeypatch, 1), ExperimentConfig(nnodes=2), here_is()
    script.sweep(config, here, CPU, "watch", "environment")  # type: ignore[arg-type]
    assert seen.called == [
        ("meet", config, script.say), ("run", (config, here, CPU, "nodes"), "nodes"), "parted",
    ]  # fmt: skip


@pytest.mark.parametrize("measured", [None, "the document"])
def test_what_cannot_be_saved_is_said_instead(
    measured: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = SweepOf(monkeypatch, 1)
    seen.fails, seen.told = "x.json: cannot be written", measured
    assert script.sweep(ExperimentConfig(), here_is(), CPU, "watch", "environment") == 1  # type: ignore[arg-type]
    instead = "what was measured, as it would have been saved:\nthe document\n" if measured else ""
    assert capsys.readouterr() == ("", f"error: x.json: cannot be written\n{instead}")
