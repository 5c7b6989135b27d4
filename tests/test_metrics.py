from __future__ import annotations

import pytest

from batch_inference.metrics import METRICS, summarise
from batch_inference.results import Point
from builders import make_result, make_run
from conftest import REPOSITORY


@pytest.fixture
def summary() -> dict[str, float | None]:
    """Two replicas of two devices; batches of 4; runs of 1, 2 and 3 s."""
    result = make_result(tp=2, dp=2)
    point = Point(4, 512, 128, "ok", runs=[make_run(4, latency_s, dp=2) for latency_s in (1.0, 2.0, 3.0)])
    return summarise(result, point)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_tok_per_s", 3 * 8 * 128 / 6),
        ("prompt_tok_per_s", 3 * 8 * 512 / 6),
        ("total_tok_per_s", 3 * 8 * 640 / 6),
        ("requests_per_s", 3 * 8 / 6),
        ("output_tok_per_s_per_device", 3 * 8 * 128 / 6 / 4),
        ("latency_mean_s", 2.0),
        ("latency_p50_s", 2.0),
        ("latency_p90_s", 2.8),
        ("latency_p99_s", 2.98),
        ("latency_ci95_s", 4.303 / 3**0.5),
        ("ttft_mean_s", 0.2),
        ("ttft_p50_s", 0.2),
        ("ttft_p99_s", 0.3),
        ("tpot_mean_s", 1.8 / 127),
        ("tpot_p50_s", 1.8 / 127),
        ("tpot_p99_s", 2.7 / 127),
        ("queue_mean_s", 0.1),
        ("memory_used_gib", 64.0),
        ("weights_gib", 6.3),
        ("kv_pool_gib", 50.0),
        ("kv_cache_tokens", 100_000),
        ("kv_use", 4 * 640 / 100_000),
        ("preemptions", 0),
        ("energy_j_per_output_token", 1800 / (3 * 8 * 128)),
        ("load_s", 42.0),
    ],
)
def test_every_metric_by_hand(summary: dict[str, float | None], name: str, value: float) -> None:
    assert summary[name] == pytest.approx(value)


def test_no_metric_is_left_without_a_test() -> None:
    (mark,) = test_every_metric_by_hand.pytestmark  # type: ignore[attr-defined]
    tested = {name for name, _ in mark.args[1]}
    # The 90th percentiles of requests are made by the same code as the others.
    assert {metric.name for metric in METRICS} - tested == {"ttft_p90_s", "tpot_p90_s"}


def test_a_point_without_runs_has_no_numbers() -> None:
    summary = summarise(make_result(), Point(1, 8, 4, "oom"))
    assert set(summary.values()) == {None}
    assert len(summary) == len(METRICS)


def test_what_was_not_measured_is_none_and_never_zero() -> None:
    result = make_result()
    run = make_run(1, 1.0, max_tokens=1)
    bare = Point(1, 512, 1, "ok", runs=[type(run)(**{**vars(run), "energy_j": None, "memory": {"used_gib": None}})])
    result.engine = {}
    summary = summarise(result, bare)
    unknown = {name for name, value in summary.items() if value is None}
    assert {"energy_j_per_output_token", "memory_used_gib", "load_s", "weights_gib", "kv_use"} <= unknown
    assert {"tpot_mean_s", "latency_ci95_s"} <= unknown  # a single token, a single run


def test_the_readme_shows_the_table_of_metrics_as_it_is() -> None:
    from batch_inference.metrics import markdown_table

    assert markdown_table() in (REPOSITORY / "README_batch_inference.md").read_text()
