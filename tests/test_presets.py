"""The table of presets, and the jobs that its settings become: in process, word by word."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.launch import overview
from batch_inference.launch.jobs import Here, Job, check_together, folder_of, job_of, jobs_of, nodes_in_words
from batch_inference.launch.options import parse_options
from batch_inference.launch.overview import PlannedJob, planned, uncompared
from batch_inference.launch.presets import Preset, Setting, find_preset, read_table, settings_of
from batch_inference.launch.stored import time_left
from batch_inference.plan.devices import Devices
from batch_inference.plan.model import read_model_facts
from conftest import TINY

HERE = Here("python3", "")
STUDY, DEMO = Preset("study", ""), Preset("quickstart", "", is_demo=True)


def preset(*lines: str) -> Preset:
    return Preset("study", "", settings=[line.split() for line in lines])


def names(devices: int, *lines: str) -> tuple[list[str], list[str]]:
    settings, left_out = settings_of(preset(*lines), parse_options(["study"]), devices)
    return [setting.name for setting in settings], left_out


def test_sizes_are_numbers_or_parts_of_the_devices() -> None:
    assert names(8, "TP=2", "TP=N", "DP=N/2 TP=2", "PP=N/8", "TP=3") == (
        ["tp_2", "tp_8", "tp_2_dp_4", "tp_1", "tp_3"], [],
    )  # fmt: skip


def test_a_size_that_is_no_whole_number_here_is_left_out_and_said() -> None:
    found, left_out = names(3, "TP=N", "TP=N/2", "TP=2 DP=N/2", "DP=N/4")
    assert found == ["tp_3"]
    assert left_out == [
        "TP=N/2 is left out: N/2 of 3 devices is not a whole number",
        "TP=2 DP=N/2 is left out: N/2 of 3 devices is not a whole number",
        "DP=N/4 is left out: N/4 of 3 devices is not a whole number",
    ]
    assert names(0, "TP=1", "TP=N") == (
        ["tp_1"], ["TP=N is left out: N of 0 devices is not a whole number"],
    )  # fmt: skip


@pytest.mark.parametrize("line", ["TP=0", "TP=N/0", "TP=2 TP=2", "XP=2", "torchrun torchrun"])
def test_a_line_that_means_nothing_is_wrong_use(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^preset study: "):
        names(8, line)


def test_repeats_are_dropped_and_two_settings_of_one_name_refused() -> None:
    assert names(8, "TP=2", "TP=N/4", "TP=2")[0] == ["tp_2"]
    with pytest.raises(ConfigError, match="two settings are named tp_2; give one a suffix=WORD"):
        names(8, "TP=2", "TP=2 --enforce-eager")
    assert names(8, "TP=2", "TP=2 suffix=eager --enforce-eager", "TP=2 torchrun")[0] == [
        "tp_2", "tp_2_eager", "torchrun_tp_2",
    ]  # fmt: skip


# --- experts in parallel ------------------------------------------------------------------------------------------

PARALLEL = ("TP=N", "TP=N experts", "DP=N experts", "TP=2 DP=N/2 experts")  # the preset expert-parallel
TOO_FEW = "experts are divided among TP x DP devices, which is 1"


@pytest.mark.parametrize(
    ("devices", "found", "left_out"),
    [
        (8, ["tp_8", "tp_8_ep", "dp_8_ep", "tp_2_dp_4_ep"], []),
        (
            3,
            ["tp_3", "tp_3_ep", "dp_3_ep"],
            ["TP=2 DP=N/2 experts is left out: N/2 of 3 devices is not a whole number"],
        ),
        # TP=2 with one replica is TP=N here.
        (2, ["tp_2", "tp_2_ep", "dp_2_ep"], []),
        (
            1,
            ["tp_1"],
            [
                f"TP=N experts is left out: {TOO_FEW}",
                f"DP=N experts is left out: {TOO_FEW}",
                "TP=2 DP=N/2 experts is left out: N/2 of 1 device is not a whole number",
            ],
        ),
    ],
)
def test_experts_are_shared_out_over_the_devices_there_are(devices: int, found: list[str], left_out: list[str]) -> None:
    assert names(devices, *PARALLEL) == (found, left_out)
    # Stages of a pipeline have experts of their own.
    assert names(8, "PP=8 experts") == ([], [f"PP=8 experts is left out: {TOO_FEW}"])


def jobs_with(lines: Sequence[str], words: str = "", flags: Sequence[str] = ()) -> list[Job]:
    """Of a preset with these lines and flags for all of them, as the user calls it."""
    of = replace(preset(*lines), flags=list(flags))
    options = parse_options(["study", "--model", "who/knows", *words.split()])
    return jobs_of(settings_of(of, options, 4)[0], of, options, HERE)


@pytest.mark.parametrize(
    ("words", "flags", "found"),
    [
        ("", (), {"tp_4": False, "tp_4_ep": True, "dp_4_ep": True, "tp_2_dp_2_ep": True}),
        # Said for all, whole experts are no other setting than the first; the last word counts.
        ("-- --enable_expert_parallel", (), {"tp_4_ep": True, "dp_4_ep": True, "tp_2_dp_2_ep": True}),
        ("", ("-ep",), {"tp_4_ep": True, "dp_4_ep": True, "tp_2_dp_2_ep": True}),
        ("-- --no-enable-expert-parallel", (), {"tp_4": False, "dp_4": False, "tp_2_dp_2": False}),
    ],
)
def test_whoever_asks_for_whole_experts_the_name_says_so_and_the_flag_is_there_once(
    words: str, flags: tuple[str, ...], found: dict[str, bool]
) -> None:
    jobs = jobs_with(PARALLEL, words, flags)
    assert {one.name: one.config.enable_expert_parallel for one in jobs} == found
    assert [one.config.setting_name for one in jobs] == list(found)
    asking = {"--enable-expert-parallel", "--enable_expert_parallel", "-ep"}
    assert [sum(word in asking for word in one.words) for one in jobs] == list(found.values())


def test_a_flag_of_one_setting_names_it_too_with_the_suffix_that_did_so_before_or_without() -> None:
    flag = "--enable-expert-parallel"
    jobs = jobs_with(["TP=4", f"TP=4 {flag}", f"DP=4 suffix=ep {flag}", f"DP=2 suffix=x {flag}", "TP=2 suffix=ep"])
    assert [one.name for one in jobs] == ["tp_4", "tp_4_ep", "dp_4_ep", "dp_2_ep_x", "tp_2_ep"]
    assert [one.config.enable_expert_parallel for one in jobs] == [False, True, True, True, False]
    assert Setting(8, 1, 2, torchrun=True, nodes=2, experts=True).name == "torchrun_tp_8_dp_2_nodes_2_ep"


# --- jobs ---------------------------------------------------------------------------------------------------------


def job(setting: Setting, *words: str, of: Preset = STUDY, rank: int = 0, port: int = 29501) -> Job:
    options = parse_options(["study", "--model", TINY, *words])
    return job_of(setting, port, rank, of, options, HERE)


@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        (Setting(1, 1, 1), None),
        (Setting(1, 1, 4), None),
        (Setting(2, 1, 1), "mp"),
        (Setting(1, 2, 1), "mp"),
        (Setting(2, 1, 1, torchrun=True), "external_launcher"),
    ],
)
def test_workers_are_processes_where_a_replica_has_more_than_one_device(setting: Setting, backend: str | None) -> None:
    one = job(setting)
    assert one.config.distributed_executor_backend == backend
    sizes = one.config.tensor_parallel_size, one.config.pipeline_parallel_size, one.config.data_parallel_size
    assert sizes == (setting.tp, setting.pp, setting.dp)


def value_of(one: Job, flag: str) -> str | None:
    return one.words[one.words.index(flag) + 1] if flag in one.words else None


def test_torchrun_starts_the_share_of_this_node() -> None:
    alone = job(Setting(4, 2, 2, torchrun=True))
    assert (value_of(alone, "--nproc-per-node"), "--standalone" in alone.words) == ("16", True)
    over = job(Setting(4, 2, 2, torchrun=True, nodes=4), "--nnodes", "4", "--master-addr", "a", rank=3)
    assert [value_of(over, flag) for flag in ("--nproc-per-node", "--nnodes", "--node-rank", "--master-port")] == [
        "4", "4", "3", "29501",
    ]  # fmt: skip
    assert "--standalone" not in over.words


def test_a_replica_over_nodes_is_vllms_own_and_only_where_it_can_be_shared_out() -> None:
    over = ("--nnodes", "2", "--master-addr", "a")
    assert job(Setting(8, 1, 1, nodes=2), *over).config.nnodes == 2
    assert job(Setting(3, 1, 1, nodes=2), *over).config.nnodes == 1
    assert job(Setting(2, 1, 1)).config.nnodes == 1


def test_every_setting_over_nodes_has_two_ports_of_its_own() -> None:
    options = parse_options(["study", "--model", TINY, "--nnodes", "2", "--master-addr", "a", "--master-port", "1000"])
    settings = [Setting(2, 1, 1), Setting(4, 1, 1), Setting(8, 1, 1)]
    assert [one.port for one in jobs_of(settings, STUDY, options, HERE)] == [1001, 1003, 1005]
    last = [*["study", "--model", TINY, "--nnodes", "2", "--master-addr", "a", "--master-port"]]
    assert jobs_of(settings, STUDY, parse_options([*last, "65529"]), HERE)[-1].port == 65534
    with pytest.raises(
        ConfigError, match=r"--master-port: '65530' was given, but study takes two ports .* at most 65529"
    ):
        jobs_of(settings, STUDY, parse_options([*last, "65530"]), HERE)


@pytest.mark.parametrize(
    ("of", "words", "overwrite", "folder"),
    [
        (STUDY, (), False, "experiment_results"),
        (DEMO, (), True, "quickstart_results"),
        (DEMO, ("--resume",), False, "quickstart_results"),
        (DEMO, ("--output-dir", "mine"), False, "mine"),
        (STUDY, ("--output-dir", "mine"), False, "mine"),
    ],
)
def test_only_the_demo_in_its_own_folder_is_measured_anew(
    of: Preset, words: tuple[str, ...], overwrite: bool, folder: str
) -> None:
    one = job(Setting(1, 1, 1), *words, of=of)
    assert one.config.overwrite is overwrite
    assert one.config.output_dir == folder == folder_of(of, parse_options(["study", *words]))


def test_a_demo_and_packing_are_for_one_node() -> None:
    check_together(DEMO, parse_options(["quickstart", "--nnodes", "1"]))
    with pytest.raises(ConfigError, match="quickstart is for one node"):
        check_together(DEMO, parse_options(["quickstart", "--nnodes", "2", "--master-addr", "a"]))


# --- what can be known of a job before it runs --------------------------------------------------------------------

FOUR = Devices("gpu", tuple("0123"))


@pytest.mark.parametrize(
    ("sizes", "nnodes", "reason"),
    [
        ((4, 1, 1), 1, None),
        ((8, 1, 1), 1, "it needs 8 devices, but there are 4 (gpu)"),
        ((4, 1, 2), 2, None),
        ((4, 1, 4), 2, "it needs 16 devices, but there are 8 (gpu)"),
        ((1, 1, 3), 2, "its 3 devices cannot be divided evenly among 2 nodes"),
    ],
)
def test_a_setting_that_has_no_devices_is_known_before(
    sizes: tuple[int, int, int], nnodes: int, reason: str | None
) -> None:
    one = replace(job(Setting(*sizes), "--seq-lens", "64"), setting=Setting(*sizes, nodes=nnodes))
    assert [found.reason for found in planned([one], FOUR, print)] == [reason]


def runnable(*settings: tuple[int, int, int], batch_sizes: str, reason: str | None = None) -> list[PlannedJob]:
    return [PlannedJob(job(Setting(*sizes), "--batch-sizes", batch_sizes), None, reason) for sizes in settings]


def test_replicas_whose_batches_meet_no_others_are_named_with_the_remedy() -> None:
    (line,) = uncompared(runnable((4, 1, 1), (1, 1, 4), batch_sizes="1,8"))
    assert line == (
        "dp_4 will not be compared with tp_4: its replicas' batches add up to 4, 32; add 2 to --batch-sizes"
    )
    (line,) = uncompared(runnable((2, 1, 1), (1, 1, 2), batch_sizes="1"))
    assert line.endswith("add up to 2; add 2 to --batch-sizes")
    # 4 is there as it is and as 1 of each; other numbers of devices, and what cannot run, are not compared.
    assert uncompared(runnable((4, 1, 1), (1, 1, 4), batch_sizes="1,4")) == []
    assert uncompared(runnable((2, 1, 1), (1, 1, 4), batch_sizes="1")) == []
    assert uncompared(runnable((4, 1, 1), (1, 1, 4), batch_sizes="1", reason="no")) == []


def test_nothing_measured_has_no_time_left(tmp_path: Any) -> None:
    assert time_left([ExperimentConfig(output_dir=str(tmp_path))], "gpu") is None
    assert time_left([], "gpu") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["TP=2", "PP=2"], None),
        (["experts", "DP=4"], None),
        (["experts", "TP=2", "experts"], "custom: experts is given twice"),
        (["experts"], "at least one of TP=N, PP=N, DP=N is needed"),
        (["experts=2", "TP=2"], "'experts=2' was given"),
        (["XP=2"], "'XP=2' was given, but TP=N, PP=N, DP=N or experts is needed"),
        (["TP"], "'TP' was given"),
        (["TP=2", "TP=4"], "custom: TP is given twice"),
        (["TP=0"], "custom TP: '0' was given; a whole number of at least 1 is needed"),
        (["TP=N"], "custom TP: 'N' was given"),
        (["TP=9999999999"], "at most 1048576 is allowed"),
        ([], "at least one of TP=N, PP=N, DP=N is needed"),
    ],
)
def test_a_setting_of_the_users_own_is_checked_word_by_word(words: list[str], said: str | None) -> None:
    custom = Preset("custom", "", made_by="custom")
    if said is None:
        assert custom.words_of_settings(words) == [words]
        return
    with pytest.raises(ConfigError, match=re.escape(said)):
        custom.words_of_settings(words)


def test_the_table_of_presets_is_read_line_by_line() -> None:
    lines = [
        ["preset", "study", "a comment"], ["setting", "TP=1"], ["setting", "TP=2", "--x"], ["flags", "--y", "1"],
        ["flags", "--z"], ["preset", "quick", ""], ["demo"], ["preset", "custom", "own"], ["made_by", "custom"],
    ]  # fmt: skip
    study, quick, custom = read_table("\x1e".join("".join(f"{word}\x1f" for word in line) for line in lines)).values()
    assert (study.name, study.comment, study.settings, study.flags) == (
        "study", "a comment", [["TP=1"], ["TP=2", "--x"]], ["--y", "1", "--z"],
    )  # fmt: skip
    assert (quick.is_demo, quick.folder, study.folder) == (True, "quick_results", None)
    assert custom.made_by == "custom"
    for wrong in ("preset\x1fa\x1fb\x1f\x1enothing\x1fx\x1f", "preset\x1fa\x1fb\x1f\x1emade_by\x1fx\x1f"):
        with pytest.raises(ConfigError, match=r"^preset a: "):
            read_table(wrong)


def test_a_value_that_begins_with_a_dash_is_joined_with_its_option() -> None:
    assert parse_options(["study", "--output-dir=-x"]).output_dir == "-x"
    with pytest.raises(ConfigError, match="--output-dir: a value is needed"):
        parse_options(["study", "--output-dir", "-x"])


def test_where_the_devices_of_a_plan_are_is_said() -> None:
    assert nodes_in_words(parse_options(["study"])) == ""
    assert nodes_in_words(parse_options(["study", "--nnodes", "2", "--master-addr", "a"])) == " on each of 2 nodes"
    assert "on each node, if all are like this one" in nodes_in_words(parse_options(["study", "--master-addr", "a"]))


@pytest.mark.parametrize("given", [None, "4"])
def test_torchrun_has_as_many_threads_as_the_user_says(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = job(Setting(2, 1, 1, torchrun=True)).words
    assert words[:2] == (("env", "OMP_NUM_THREADS=1") if given is None else ("python3", "-m"))


def test_a_plan_for_other_devices_is_no_part_of_the_commands() -> None:
    plain = job(Setting(1, 1, 1))
    assert not plain.config.dry_run
    dry = job(Setting(1, 1, 1), "--dry-run", "--devices", "4", "--device-memory-gib", "80")
    assert (dry.config.dry_run, dry.config.devices, dry.config.device_memory_gib) == (True, 4, 80.0)
    assert dry.words == plain.words


def test_the_plan_of_a_preset_counts_with_the_memory_that_is_given_or_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(*words: str, here_gib: float | None) -> Any:
        monkeypatch.setattr(overview, "smallest_memory_gib", lambda _: here_gib)
        one = PlannedJob(job(Setting(1, 1, 1), "--seq-lens", "64", *words), read_model_facts(TINY), None)
        (found,) = json.loads(overview.plan_as_json([one], FOUR))
        return found["kv_cache_tokens"]

    here, given = tokens(here_gib=40.0), tokens("--dry-run", "--device-memory-gib", "80", here_gib=40.0)
    assert given == pytest.approx(2 * here, rel=0.01)
    assert tokens("--dry-run", "--device-memory-gib", "80", here_gib=None) == given
    assert tokens(here_gib=None) is None
    # vLLM counts in whole requests of the longest kind, and those in whole blocks.
    assert tokens("--", "--max-model-len", "193", here_gib=40.0) < here


def test_the_plan_says_who_starts_the_workers() -> None:
    def by(setting: Setting, nnodes: int = 1, reason: str | None = None) -> str:
        return overview._by(PlannedJob(job(setting), None, reason), nnodes)

    assert [by(Setting(1, 1, 1)), by(Setting(2, 1, 1)), by(Setting(2, 1, 1, torchrun=True))] == [
        "uni",
        "mp",
        "torchrun",
    ]
    assert by(Setting(2, 1, 1), nnodes=2) == "mp, 2 nodes"
    assert by(Setting(2, 1, 1), reason="no") == "-"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("TP=2 PP=1 TP=4", "'setting TP=2 PP=1 TP=4': TP is given twice"),
        ("torchrun torchrun", "'setting torchrun torchrun': torchrun is given twice"),
        ("TP=0", "'setting TP=0': TP=0 is not a size"),
        ("TP=1 DP=N/0", "'setting TP=1 DP=N/0': DP=N/0 is not a size"),
        (
            "TP=1 XP=2",
            "'setting TP=1 XP=2': 'XP=2' is neither a flag nor TP=N, PP=N, DP=N, experts, torchrun, suffix=WORD",
        ),
    ],
)
def test_a_slip_in_a_setting_is_said_in_these_words(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        names(8, line)
    assert str(caught.value) == f"preset study: {said}"


def test_a_slip_in_the_table_or_in_the_users_words_is_said_in_these_words() -> None:
    for words, said in (
        ("nothing\x1fx\x1f", "preset a: 'nothing x' is not a line of a preset"),
        ("made_by\x1fx\x1f", "preset a: 'made_by x': it is one of custom"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_table(f"preset\x1fa\x1fb\x1f\x1e{words}\x1e")
        assert str(caught.value) == said
    with pytest.raises(ConfigError) as caught:
        preset("TP=1").words_of_settings(["first", "second"])
    assert str(caught.value) == "'first' is one word too many after the preset study"
    for given, said in (
        (["TP=x"], "custom TP: 'x' was given; a whole number of at least 1 is needed"),
        (["TP=1", "PP"], "custom: 'PP' was given, but TP=N, PP=N, DP=N or experts is needed"),
        (["TP=1", "=3"], "custom: '=3' was given, but TP=N, PP=N, DP=N or experts is needed"),
        (["DP"], "custom: 'DP' was given, but TP=N, PP=N, DP=N or experts is needed"),
    ):
        with pytest.raises(ConfigError) as caught:
            Preset("custom", "", made_by="custom").words_of_settings(given)
        assert str(caught.value) == said
    two = {"study": STUDY, "a-first": DEMO}
    assert find_preset(two, "study") is STUDY
    with pytest.raises(ConfigError) as caught:
        find_preset(two, "stud")
    assert str(caught.value) == "'stud' is not a preset; choose one of: study a-first"


def test_every_part_of_a_setting_is_read() -> None:
    lines = ("TP=2 torchrun suffix=a.b-c --x 1 --y", "PP=2 DP=N", "--z TP=3")
    settings, _ = settings_of(preset(*lines), parse_options(["study"]), 4)
    assert settings == [
        Setting(2, 1, 1, torchrun=True, suffix="a.b-c", flags=("--x", "1", "--y")),
        Setting(1, 2, 4),
        Setting(1, 1, 1, flags=("--z", "TP=3")),
    ]
    assert [one.name for one in settings] == ["torchrun_tp_2_a.b-c", "pp_2_dp_4", "tp_1"]
    assert Setting(2, 3, 5).num_devices == 30
