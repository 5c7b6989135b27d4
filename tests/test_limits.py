"""What a loaded engine takes at once is changed between its steps, by whoever holds it, in whichever process."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.measure.limits import SCHEDULER, LimitedScheduler, Limits


class FakeScheduler:
    """Of vLLM: what it takes is in plain attributes, which it looks at in every step."""

    def __init__(self, vllm_config: Any, *, log_stats: bool = False) -> None:
        self.vllm_config, self.log_stats = vllm_config, log_stats
        self.max_num_running_reqs = 16
        self.max_num_scheduled_tokens = 2048

    def schedule(self, *words: Any) -> tuple[Any, ...]:
        return self.max_num_running_reqs, self.max_num_scheduled_tokens, *words


class NewerScheduler(FakeScheduler):
    """Counts those that wait for something else apart; later versions have both names."""

    def __init__(self, vllm_config: Any, **keywords: Any) -> None:
        super().__init__(vllm_config, **keywords)
        self.max_num_active_reqs = 12

    def schedule(self, *words: Any) -> tuple[Any, ...]:
        return self.max_num_active_reqs, *super().schedule(*words)


def config_of(scheduler: type[FakeScheduler]) -> Any:
    """Of vLLM, which says which scheduler it takes where none is named."""

    class SchedulerConfig:
        scheduler_cls: Any = SCHEDULER

        def get_scheduler_cls(self) -> Any:
            return scheduler if self.scheduler_cls is None else LimitedScheduler

    return SimpleNamespace(scheduler_config=SchedulerConfig())


@pytest.fixture(autouse=True)
def own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFERENCE_LIMITS", "")


def test_the_scheduler_is_vllms_own_choice_and_knows_its_configuration() -> None:
    Limits()
    config = config_of(FakeScheduler)
    made = LimitedScheduler(config, log_stats=True)
    assert isinstance(made, FakeScheduler)
    assert (made.vllm_config, made.log_stats) == (config, True)
    # vLLM's own configuration is left as it was.
    assert config.scheduler_config.scheduler_cls == SCHEDULER


def test_a_limit_holds_from_the_next_step_on_and_is_lifted_again() -> None:
    limits = Limits()
    made: Any = LimitedScheduler(config_of(FakeScheduler))
    assert made.schedule() == (16, 2048)
    for requests, tokens, expected in [
        (4, None, (4, 2048)),
        (None, 512, (16, 512)),
        (2, 64, (2, 64)),
        (None, None, (16, 2048)),
        # More than it was loaded for there is no room for.
        (99, 9999, (16, 2048)),
        (16, 2048, (16, 2048)),
        (1, 1, (1, 1)),
    ]:
        limits.set(requests, tokens)
        assert made.schedule("word") == (*expected, "word")


def test_where_there_are_both_names_the_first_is_the_limit_of_what_runs() -> None:
    limits = Limits()
    made: Any = LimitedScheduler(config_of(NewerScheduler))
    limits.set(3, None)
    assert made.schedule() == (3, 16, 2048)
    limits.set(None, None)
    assert made.schedule() == (12, 16, 2048)


def test_each_engine_has_limits_of_its_own() -> None:
    first = Limits()
    of_first: Any = LimitedScheduler(config_of(FakeScheduler))
    second = Limits()
    of_second: Any = LimitedScheduler(config_of(FakeScheduler))
    first.set(1, None)
    second.set(2, None)
    assert (of_first.schedule()[0], of_second.schedule()[0]) == (1, 2)


def _steps(limits_are_set: Any, step_is_wanted: Any, answers: Any) -> None:
    made: Any = LimitedScheduler(config_of(FakeScheduler))
    answers.put(made.schedule())
    step_is_wanted.set()
    limits_are_set.wait(20)
    answers.put(made.schedule())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_scheduler_in_another_process_sees_the_limits(method: str) -> None:
    """As vLLM's EngineCore is one."""
    context = multiprocessing.get_context(method)
    limits_are_set, has_started, answers = context.Event(), context.Event(), context.Queue()
    limits = Limits()
    process = context.Process(target=_steps, args=(limits_are_set, has_started, answers))
    process.start()
    try:
        assert has_started.wait(20)
        limits.set(5, 77)
        limits_are_set.set()
        assert [answers.get(timeout=20) for _ in range(2)] == [(16, 2048), (5, 77)]
    finally:
        process.join(20)
    assert process.exitcode == 0


def test_limits_are_in_no_folder_where_they_could_be_left_behind() -> None:
    Limits().set(1, 1)
    path = Path(os.environ["BATCH_INFERENCE_LIMITS"])
    assert path.parent == Path(f"/proc/{os.getpid()}/fd")
    assert str(path.readlink()).startswith("/memfd:limits")


def test_the_scheduler_is_named_as_vllm_loads_it() -> None:
    module, _, name = SCHEDULER.rpartition(".")
    assert (module, name) == (LimitedScheduler.__module__, LimitedScheduler.__name__)
