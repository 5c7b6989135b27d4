"""The result file: round trip, atomic save, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_inference.core import result_file
from batch_inference.core.config import ExperimentConfig
from batch_inference.core.files import check_writable
from batch_inference.core.result_file import (
    Heading,
    ResultFileError,
    cannot_be_written,
    journal_of,
    load_result,
    point_line,
    read_heading,
    save_result,
    to_json,
)
from batch_inference.core.results import (
    SCHEMA_VERSION,
    EngineInfo,
    Point,
    PointKey,
    Requests,
    StoredConfig,
    WorkloadKey,
    workload_key,
)
from batch_inference.core.values import MOST_DEVICES
from builders import make_point, make_queue_point, make_result, make_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tp_1_results.json"


def write(path: Path, **changes: Any) -> None:
    """A good result file with some entries changed; None takes an entry out."""
    save_result(make_result(points=[make_point()]), path)
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_what_is_saved_is_what_is_loaded(path: Path) -> None:
    failed = Point(16, 64, 32, "oom", reason="out of memory", log_tail=["a", "ä"])
    result = make_result("tp_2_dp_2", [make_point(replicas=2), failed], (2, 1, 2), status="partial")
    save_result(result, path)
    assert load_result(path) == result


def test_a_setting_has_tp_times_pp_times_dp_devices() -> None:
    assert make_result(sizes=(2, 3, 4)).num_devices == 24


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(path: Path) -> None:
    save_result(make_result("old"), path)
    save_result(make_result("new"), path)
    assert load_result(path).name == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_result(make_result("old"), path)

    def cut_short(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", cut_short)
    with pytest.raises(ResultFileError, match=r"tp_1_results\.json: cannot be written: No space left"):
        save_result(make_result("new"), path)
    assert load_result(path).name == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match=r"missing/x\.json: cannot be written"):
        save_result(make_result(), tmp_path / "missing" / "x.json")
    with pytest.raises(OSError, match="No such file"):
        check_writable(tmp_path / "missing" / "x.json")


def test_checking_does_not_touch_the_file(path: Path) -> None:
    save_result(make_result("old"), path)
    check_writable(path)
    assert load_result(path).name == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_no_number_is_never_written(path: Path, number: float) -> None:
    save_result(make_result("old"), path)
    result = make_result("new", points=[make_point()])
    assert result.engine is not None
    result.engine.weights_gib = number
    with pytest.raises(ValueError, match=r"^new\.engine\.weights_gib is not a finite number"):
        save_result(result, path)
    assert load_result(path).name == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_value_that_json_does_not_know_is_never_written(path: Path) -> None:
    result = make_result()
    result.name = path  # type: ignore[assignment]
    path.with_suffix(".txt").touch()
    with pytest.raises(TypeError, match="PosixPath"):
        save_result(result, path)
    assert not path.exists()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_no_number_is_never_read(path: Path, word: str) -> None:
    write(path, engine={"weights_gib": "HERE"})
    path.write_text(path.read_text().replace('"HERE"', word))
    with pytest.raises(ResultFileError, match="not valid JSON"):
        load_result(path)


def test_a_newer_file_asks_for_a_newer_program(path: Path) -> None:
    write(path, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(ResultFileError, match=f"schema_version is {SCHEMA_VERSION + 1}.*update it"):
        load_result(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"schema_version": 1, "name"', "not valid JSON"),
        ("\x80", "not valid JSON"),
        ("[" * 100000, "not a result of this program"),
        ("[1, 2]", "not a result of this program: expected `object`"),
        ('{"results": []}', "not a result of this program: .*`schema_version`"),
        ('{"schema_version": "one"}', "schema_version is 'one', expected `int`"),
        ('{"schema_version": 1}', "not a result of this program: config: expected `object`"),
    ],
)
def test_a_foreign_or_broken_file_is_named_with_the_reason(path: Path, text: str, reason: str) -> None:
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ResultFileError, match=f"^{path}: .*{reason}"):
        load_result(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": None},
        {"points": [{"batch_size": 1}]},
        {"points": [1]},
        {"points": 5},
        {"config": {}},
        {"config": []},
        {"engine": "none"},
        {"config": {"tensor_parallel_size": 0, "pipeline_parallel_size": 1, "data_parallel_size": 1}},
        {"config": {"tensor_parallel_size": "two", "pipeline_parallel_size": 1, "data_parallel_size": 1}},
    ],
)
def test_a_file_with_the_wrong_shape_is_not_ours(path: Path, changes: dict[str, Any]) -> None:
    write(path, **changes)
    with pytest.raises(ResultFileError, match="not a result of this program"):
        load_result(path)


@pytest.mark.parametrize("latency_s", [0, -1.5, "fast", True])
def test_a_run_needs_a_latency_above_zero(path: Path, latency_s: Any) -> None:
    save_result(make_result(points=[make_point()]), path)
    document = json.loads(path.read_text())
    document["points"][0]["runs"][1]["latency_s"] = latency_s
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match=r"points\[0\]\.runs\[1\]\.latency_s is"):
        load_result(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ResultFileError, match="cannot be read: No such file"):
        load_result(path)


def test_unknown_sections_of_the_same_version_are_left_alone(path: Path) -> None:
    write(path, remark="kept by hand")
    assert load_result(path).name == "tp_1"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("points", 0, "seq_len"), "x", r"points\[0\]\.seq_len is 'x', expected `int \| null`"),
        (
            ("points", 0, "runs", 0, "latency_s"),
            -1.5,
            r"points\[0\]\.runs\[0\]\.latency_s is -1\.5, expected `float` > 1e-09",
        ),
        (("status",), "done", r"status is 'done', which is not one of the allowed words"),
        (("config", "tensor_parallel_size"), "2", r"config: tensor_parallel_size is '2', expected `int`"),
        (("config", "batch_sizes"), [0], r"batch_sizes holds 0, which is not a size"),
        (("config", "seq_lens"), [8, 0], r"seq_lens holds 0, which is not a size"),
        (("schema_version",), 0, r"schema_version is below 1"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(
    path: Path, place: tuple[str | int, ...], value: Any, said: str
) -> None:
    save_result(make_result(points=[make_point()]), path)
    document = inner = json.loads(path.read_text())
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match=said) as error:
        load_result(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_configuration_with_a_number_that_is_none_is_never_written(path: Path) -> None:
    result = make_result()
    result.config = dataclasses.replace(result.config, temperature=float("nan"))
    with pytest.raises(ValueError, match=r"config\.temperature is not a finite number"):
        save_result(result, path)


def test_work_of_days_fits(path: Path) -> None:
    run = make_run(1e6, counters={"flops_per_device": 1e21})
    save_result(make_result(points=[make_point(runs=[run])]), path)
    assert load_result(path).points[0].runs == [run]


def test_text_that_is_no_utf_8_is_still_written(path: Path) -> None:
    save_result(make_result(points=[Point(1, 8, 4, "error", reason="a \udcff path")]), path)
    assert load_result(path).points[0].reason == "a ? path"


def test_a_file_is_set_out_with_a_line_for_each_point() -> None:
    points = [make_point(1), make_point(2)]
    text = to_json(make_result(points=points))
    names = [name for name, _ in json.loads(text, object_pairs_hook=list)]
    assert (names[0], names[-1], len(set(names))) == ("schema_version", "points", len(names))
    lines = text.split("\n")
    assert lines[:3] == ["{", ' "schema_version": 2,', ' "name": "tp_1",']
    assert lines[-7:-5] == [' "earlier_engines": [],', ' "points": [']
    assert text.endswith(f' "points": [\n{point_line(points[0])},\n{point_line(points[1])}\n ]\n}}\n')
    assert to_json(make_result()).endswith(' "points": [\n ]\n}\n')


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (lambda point, nan: setattr(point.runs[1], "energy_j", nan), "runs[1].energy_j"),
        (lambda point, nan: point.runs[1].requests.ttft_s.__setitem__(2, nan), "runs[1].requests.ttft_s[2]"),
        (lambda point, nan: setattr(point.runs[0].clocks, "sm_mhz", [None, nan]), "runs[0].clocks.sm_mhz[1]"),
        (lambda point, nan: point.summary.update(latency_s=nan), "summary.latency_s"),
        (lambda point, nan: setattr(point.warmups[0], "latency_s", nan), "warmups[0].latency_s"),
    ],
)
def test_of_a_point_the_place_of_what_is_no_number_is_named(spoil: Any, place: str) -> None:
    for value in (float("nan"), float("-inf")):
        point = make_point(3, 5, warmups=[{"latency_s": 1.0}])
        spoil(point, value)
        with pytest.raises(
            ValueError, match=r"^" + re.escape(f"batch_size 3, seq_len 5.{place} is not a finite number")
        ):
            point_line(point)


def test_of_the_rest_of_a_file_too() -> None:
    result = make_result("tp_2", environment={"variables": {"A": "1"}})
    assert result.engine is not None
    result.engine.weights_gib = float("inf")
    with pytest.raises(ValueError, match=r"^tp_2\.engine\.weights_gib is not a finite number$"):
        to_json(result)


def test_what_json_cannot_hold_is_a_question_mark_wherever_it_stands() -> None:
    result = make_result(environment={"argv": ["a\udcff", "b"], "variables": {"N\udcff": "v\udcff"}})
    environment = json.loads(to_json(result))["environment"]
    assert (environment["argv"], environment["variables"]) == (["a?", "b"], {"N?": "v?"})


def test_a_heading_tells_a_result_from_others(path: Path) -> None:
    assert read_heading(path) is None
    result = make_result("tp_2", [make_point()], (2, 1, 1), environment={"started_at": "2026-01-02T03:04:05+00:00"})
    save_result(result, path)
    heading = read_heading(path)
    assert heading == Heading("tp_2", result.config, result.environment)
    for text in ("{}", "[]", "no JSON", "[" * 100000, '{"name": "x", "config": {}}'):
        path.write_text(text)
        assert read_heading(path) is None


def said_of(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ResultFileError) as caught:
        load_result(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_what_is_wrong_with_a_file_is_said_to_the_letter(path: Path) -> None:
    good = json.loads(to_json(make_result(points=[make_point()])))
    none = "not a result of this program: "
    for changes, said in (
        ({"schema_version": 3}, "schema_version is 3, but this program reads up to 2; update it"),
        (
            {"schema_version": 10**30},
            "schema_version is 1000000000…000000000, but this program reads up to 2; update it",
        ),
        ({"schema_version": 0}, none + "schema_version is below 1"),
        ({"config": {**good["config"], "model": 5}}, none + "config: model is 5, expected `str`"),
        ({"points": 5}, none + "points is 5, expected `array`"),
        ({"points": [{}]}, none + "points[0]: object missing required field `batch_size`"),
        ({"name": ["x"]}, none + "name: expected `str`, got `array`"),
        ({"status": "done"}, none + "status is 'done', which is not one of the allowed words"),
        ({"name": None, "engine": "x" * 50}, none + "name: expected `str`, got `null`"),
        ({"engine": "x" * 50}, none + f"engine is '{'x' * 19}…{'x' * 18}', expected `object | null`"),
        ({"restarts": -1}, none + "restarts is -1, expected `int` >= 0"),
        (
            {"points": [{**good["points"][0], "engine": 0}]},
            none + "points[0].engine is 0, but there are 0",
        ),
        ({"engine": None}, none + "points[0] is measured, but there is no engine"),
        ({"points": [{**good["points"][0], "runs": []}]}, none + "points[0] is ok, but has no runs"),
    ):
        assert said_of(path, json.dumps(good | changes)) == said
    path.unlink()
    with pytest.raises(ResultFileError, match=f"^{re.escape(str(path))}: cannot be read: No such file or directory$"):
        load_result(path)
    broken = said_of(path, '{"schema_version": NaN}')
    assert broken == "not valid JSON (NaN is not JSON); move it away, and run that setting again"


def test_why_a_file_cannot_be_written_is_said_to_the_letter() -> None:
    error = cannot_be_written(Path("a/b.json"), OSError(errno.ENOSPC, "No space left on device"))
    assert str(error) == "a/b.json: cannot be written: No space left on device; free disk space or choose another path"


def test_a_journal_lies_beside_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to("there/x.json")
    assert journal_of(tmp_path / "link.json") == tmp_path / "there" / "x.json.journal"
    path = tmp_path / "there" / "x.json"
    save_result(make_result(), path)
    head = json.dumps({"started_at": load_result(path).environment.started_at, "points": 0})
    journal_of(path).write_text(f"{head}\n5\n")
    with pytest.raises(ResultFileError) as caught:
        load_result(path)
    assert str(caught.value) == (
        f"{journal_of(path)}: has no points of x.json (Expected `object`, got `int`); move it away"
    )


def test_a_point_is_known_by_all_that_tells_it_apart() -> None:
    workload = WorkloadKey("abc", 7, "given")
    point = Point(1, 2, 3, "ok", workload=workload, max_num_batched_tokens=4)
    assert point.key == PointKey(batch_size=1, seq_len=2, max_tokens=3, workload=workload, max_num_batched_tokens=4)
    assert point.tokens_per_request == 5
    assert Point(1, None, 3, "ok").tokens_per_request is None
    assert Point(1, 2, None, "ok").tokens_per_request is None


def test_a_point_has_the_engine_that_it_names() -> None:
    result = make_result(points=[make_point(1), make_point(2), make_point(4)])
    result.earlier_engines = [EngineInfo("first"), EngineInfo("second")]
    result.points[0].engine, result.points[1].engine = 0, 1
    engines = [result.engine_of(point) for point in result.points]
    assert engines == [*result.earlier_engines, result.engine]


def test_what_is_stored_of_what_was_asked_is_all_but_secrets() -> None:
    config = ExperimentConfig(
        model="https://me:pass@h/m", seed=3, engine_args=("--hf-token", "abc"), batch_sizes=(2, 3)
    )
    stored = StoredConfig.of(config)
    expected = dataclasses.asdict(config) | {
        "model": config.model_shown, "engine_args": ("--hf-token", "<hf_token>"), "config_hash": config.settings_hash(),
        "model_id": "https://<login>@h/m",
    }  # fmt: skip
    assert dataclasses.asdict(stored) == expected
    assert "pass" not in stored.model


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_sizes_of_a_stored_setting_are_sizes(name: str) -> None:
    for size in (1, MOST_DEVICES):
        assert getattr(StoredConfig(**{name: size}), name) == size
    for size in (0, MOST_DEVICES + 1):
        with pytest.raises(ValueError, match=f"^{name} is {size}$"):
            StoredConfig(**{name: size})


@pytest.mark.parametrize("name", ["batch_sizes", "seq_lens"])
def test_every_size_of_a_stored_grid_is_one(name: str) -> None:
    for size in (1, 2**31):
        StoredConfig(**{name: (1, size)})
    for size in (0, 2**31 + 1):
        for sizes in ((size, 1), (1, size)):
            with pytest.raises(ValueError, match=f"^{name} holds {size}, which is not a size$"):
                StoredConfig(**{name: sizes})


def test_what_a_queue_has_beside_is_there_of_every_request_or_of_none() -> None:
    lists: dict[str, Any] = {key: [1] for key in ("ttft_s", "latency_s", "queue_s", "output_tokens")}
    for name in ("arrival_s", "prompt_tokens"):
        Requests(**lists, **{name: [1]})
        with pytest.raises(ValueError, match=r"^its lists differ in length$"):
            Requests(**lists, **{name: [1, 1]})


@pytest.mark.parametrize("name", WorkloadKey.__struct_fields__)
def test_the_workload_of_a_point_is_as_a_configuration_has_it(name: str) -> None:
    config = ExperimentConfig(prompts_file="w", workload_hash="abc", output_lengths=7, order="shuffled")
    key = workload_key(config)
    assert key == WorkloadKey("abc", 7, "shuffled", is_cached=False)
    assert key.as_tuple() == config.workload
    cached = dataclasses.replace(config, engine_args=("--enable-prefix-caching",))
    assert workload_key(cached) == WorkloadKey("abc", 7, "shuffled", is_cached=True)
    others = {"content_hash": "x", "output_lengths": "eos", "order": "given", "is_cached": True}
    assert msgspec.structs.replace(key, **{name: others[name]}) != key


def test_a_queue_point_is_loaded_as_it_was_saved(path: Path) -> None:
    result = make_result(points=[make_queue_point(2, (24, 26))], sizes=(1, 1, 2))
    save_result(result, path)
    assert load_result(path) == result


def test_an_order_that_is_none_is_refused_where_it_stands(path: Path) -> None:
    save_result(make_result(points=[make_queue_point()]), path)
    path.write_text(path.read_text().replace('"order":"given"', '"order":"random"'))
    with pytest.raises(ResultFileError, match=r"points\[0\]\.workload\.order"):
        load_result(path)


@pytest.mark.parametrize("name", ["ttft_s", "latency_s", "queue_s", "output_tokens"])
def test_the_requests_of_a_run_have_as_many_of_each(name: str) -> None:
    lists: dict[str, Any] = {key: [1] for key in ("ttft_s", "latency_s", "queue_s", "output_tokens")}
    Requests(**lists)
    for other in ([], [1, 1]):
        with pytest.raises(ValueError, match=r"^its lists differ in length$"):
            Requests(**(lists | {name: other}))


def test_a_file_of_version_1_has_the_engine_of_each_point_in_a_list() -> None:
    engine = {"vllm_version": "1", "dtype": "a", "workers": [1], "failure": {"class": "x"}, "restarts": 2}
    points = [{"n": 0}, {"n": 1, "engine": {"dtype": "b"}}, {"n": 2, "engine": {}}, {"n": 3, "engine": {"dtype": "c"}},
              {"n": 4, "engine": {"dtype": "b"}}, 5]  # fmt: skip
    document = {"schema_version": 1, "name": "x", "engine": engine, "points": points}
    whole = {**engine, "workers": [], "replicas": []}
    assert result_file._from_version_1(document) == {
        "schema_version": 2,
        "name": "x",
        "engine": engine,
        "failure": {"class": "x"},
        "restarts": 2,
        "earlier_engines": [whole | {"dtype": "b"}, whole | {"dtype": "c"}],
        "points": [
            {"n": 0}, {"n": 1, "engine": 0}, {"n": 2, "engine": None}, {"n": 3, "engine": 1}, {"n": 4, "engine": 0}, 5,
        ],
    }  # fmt: skip
    # One that failed before it had an engine.
    failed = {"schema_version": 1, "engine": {"failure": {}}, "points": "none"}
    assert result_file._from_version_1(failed) == {
        "schema_version": 2, "engine": None, "failure": {}, "points": "none", "earlier_engines": [],
    }  # fmt: skip
    for other in ([], {"engine": None, "points": []}, {"engine": [], "points": []}, {"points": []}):
        assert result_file._from_version_1(other) is other


def test_a_file_with_characters_that_are_no_utf_8_is_checked_like_others(path: Path) -> None:
    good = json.loads(to_json(make_result("tp_\udcff".encode("utf-8", "replace").decode(), [make_point()])))
    for version, said in (
        (3, "schema_version is 3, but this program reads up to 2; update it"),
        (0, "not a result of this program: schema_version is below 1"),
    ):
        text = json.dumps(good | {"schema_version": version, "name": "\udcff"})
        assert said_of(path, text) == said
    assert said_of(path, json.dumps(good | {"name": "\udcff", "config": {}})) == (
        "not a result of this program: config: object missing required field `model`"
    )


def test_the_schema_is_a_json_schema_with_its_name() -> None:
    schema = result_file.json_schema()
    assert list(schema)[:2] == ["$schema", "title"]
    assert (schema["$schema"], schema["title"]) == ("https://json-schema.org/draft/2020-12/schema", "Result")
    assert schema["$ref"] == "#/$defs/Result"
