"""The sentence before all tables: what to take, how fast it is, and how sure that is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_launcher import Launcher

from batch_inference.analyze.answers import Question, analyse
from batch_inference.analyze.decide import Limits
from batch_inference.analyze.headline import Headline, headline
from batch_inference.analyze.layouts import layouts
from batch_inference.analyze.markdown import as_markdown
from batch_inference.analyze.sections import Section, best
from batch_inference.analyze.tables import GROUP_BY, TO_MENTION, load_setting
from batch_inference.analyze.terminal import as_text
from batch_inference.analyze.wording import column_words
from batch_inference.core.results import Result
from builders import make_point, make_result, make_run, save_all
from conftest import REPOSITORY

LLAMA, H100 = "Llama-2-7b-chat-hf", {"devices": [{"name": "NVIDIA H100 80GB HBM3"}]}


@pytest.fixture
def head(tmp_path: Path) -> Any:
    def build(results: Sequence[Result], question: Question | None = None, old: Sequence[Result] = ()) -> Headline:
        earlier = [load_setting(path) for path in save_all(old, tmp_path / "old")] if old else None
        new = [load_setting(path) for path in save_all(results, tmp_path / "new")]
        return headline(analyse(new, question or Question(), earlier))

    return build


def alone(name: str, sizes: tuple[int, int, int], latencies_s: dict[int, float], **changes: Any) -> Result:
    """A setting of 64 + 32 tokens, by its batch sizes."""
    points = [
        make_point(batch, latencies_s=[second] * 2, replicas=sizes[2], **changes)
        for batch, second in latencies_s.items()
    ]
    return make_result(name, points, sizes)


def test_nine_settings_on_four_gpus_are_answered_in_two_sentences() -> None:
    """Measured ones, as the issue has them that asked for this."""
    paths = sorted((REPOSITORY / "tests" / "h100x4").glob("*.json"))
    found = headline(analyse([load_setting(path) for path in paths], Question()))
    assert found.title == "Batch inference: results of llama-3.1-8b"
    assert found.facts == (
        "9 settings", "models/llama-3.1-8b", "NVIDIA H100 80GB HBM3", "vLLM 0.26.0", "2026-11-26",
    )  # fmt: skip
    assert found.sentences == (
        "On 4 × H100, llama-3.1-8b, 512 + 128 tokens: DP=4 at 256 requests per replica gives 25,490 ± 190 tok/s. For "
        "the shortest batch time take TP=4 at 16 requests: 0.554 ± 0.016 s (suspect). 256 is the largest size measured "
        "with DP=4, and throughput still grew by 14 % from 128: try larger ones with --batch-sizes.",
    )


def test_tp_pp_or_dp_is_answered_in_words() -> None:
    paths = sorted((REPOSITORY / "tests" / "h100x4").glob("*.json"))
    (group,) = analyse([load_setting(path) for path in paths], Question()).groups
    two, four = (part.pairs for part in layouts(group))
    assert two == [("fastest", "TP=2 at 16 to 128 requests, DP=2 at 256; at 512 only DP=2 was measured")]
    assert four == [
        ("fastest", "TP=4 at 16 to 64 requests, TP=2 DP=2 at 128 and 256, DP=4 at 256 and 512; where two are named, "
         "their intervals overlap; at 1024 only DP=4 was measured"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wins", "words"),
    [
        ("tttt", "TP=2, at all 4 batch sizes"),
        ("pttt", "PP=2 at 1 request, TP=2 from 2 on"),
        ("tppt", "TP=2 at 1 request and at 8, PP=2 at 2 and 4"),
        ("tptt", "TP=2 at 1 request and from 4 on, PP=2 at 2"),
        ("tttp", "TP=2 at 1 to 4 requests, PP=2 at 8"),
        ("ttpp", "TP=2 at 1 and 2 requests, PP=2 from 4 on"),
    ],
)
def test_batches_at_which_a_layout_is_fastest_are_told_in_ranges(tmp_path: Path, wins: str, words: str) -> None:
    batches = (1, 2, 4, 8)
    tp = {batch: 1.0 if won == "t" else 3.0 for batch, won in zip(batches, wins, strict=True)}
    results = [alone("tp_2", (2, 1, 1), tp), alone("pp_2", (1, 2, 1), dict.fromkeys(batches, 2.0))]
    (group,) = analyse([load_setting(path) for path in save_all(results, tmp_path)], Question()).groups
    (part,) = layouts(group)
    assert part.pairs == [("fastest", words)]


def test_a_layout_that_was_not_measured_between_is_not_said_to_lose_there(tmp_path: Path) -> None:
    results = [
        alone("tp_2", (2, 1, 1), {1: 1.0, 4: 1.0, 8: 1.0}), alone("pp_2", (1, 2, 1), {1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0}),
        alone("dp_2", (1, 1, 2), {1: 1.5}),
    ]  # fmt: skip
    (group,) = analyse([load_setting(path) for path in save_all(results, tmp_path)], Question()).groups
    (part,) = layouts(group)
    words = "TP=2 from 1 request on, DP=2 at 2; not every layout was measured at every size"
    assert part.pairs == [("fastest", words)]


def test_a_winner_for_both_is_said_once_and_on_how_many_of_the_devices(head: Any) -> None:
    found = head([alone("tp_1", (1, 1, 1), {1: 0.5}), alone("tp_2", (2, 1, 1), {1: 1.0})])
    assert found.sentences == (
        f"On 2 × H100, {LLAMA}, 64 + 32 tokens: TP=1 on 1 device at 1 request gives 64.00 tok/s. It also has the "
        "shortest batch time: 0.5000 s.",
    )


def test_ties_are_named_and_settings_of_one_layout_told_apart(head: Any) -> None:
    points = [make_point(1, latencies_s=[1.0, 1.1, 0.9])]
    (sentence,) = head([make_result(name, points) for name in ("a", "b", "c", "d")]).sentences
    others = "TP=1 (b) and 2 more"
    assert f"TP=1 (a) at 1 request gives 32 ± 12 tok/s (tied within the intervals with {others})." in sentence


def test_what_is_said_of_a_number_stands_in_one_pair_of_brackets(head: Any) -> None:
    points = [make_point(1, latencies_s=[1.0, 1.1, 0.9], verdict="suspect")]
    (sentence,) = head([make_result(name, points) for name in ("a", "b")]).sentences
    assert "gives 32 ± 12 tok/s (suspect; tied within the intervals with TP=1 (b))." in sentence


def test_limits_and_a_price_are_part_of_the_answer(head: Any) -> None:
    one = alone("tp_1", (1, 1, 1), {1: 1.0, 4: 2.0})
    (sentence,) = head([one], Question(Limits(latency_s=1.5), price=3.6)).sentences
    assert sentence == (
        f"On 1 × H100, {LLAMA}, 64 + 32 tokens, with latency p99 ≤ 1.5 s: TP=1 at 1 request gives 32.00 tok/s. It also "
        "has the shortest batch time: 1.000 s. It costs 31.25 per M tokens."
    )
    (sentence,) = head([one], Question(Limits(latency_s=0.5))).sentences
    assert sentence.endswith("with latency p99 ≤ 0.5 s: no point meets the limits.")


def test_of_several_machines_the_one_with_the_most_points_comes_first(head: Any) -> None:
    a100 = make_result("a100", [make_point()], environment={"devices": [{"name": "NVIDIA A100-SXM4-80GB"}]})
    sentences = head([a100, alone("h100", (1, 1, 1), {1: 1.0, 2: 1.0})]).sentences
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        f"On 1 × H100, {LLAMA}, 64 + 32 tokens", f"On 1 × A100-SXM4, {LLAMA}, 64 + 32 tokens",
    ]  # fmt: skip


def test_names_that_are_short_alike_stay_long(head: Any) -> None:
    results = [
        make_result(f"{place}{memory}", [make_point()], config={"model": f"{place}/llama"},
                    environment={"devices": [{"name": f"NVIDIA A100-SXM4-{memory}GB"}]})
        for place in ("a", "b") for memory in (40, 80)
    ]  # fmt: skip
    sentences = head(results).sentences
    assert {sentence.partition(", 64 ")[0] for sentence in sentences} == {
        f"On 1 × NVIDIA A100-SXM4-{memory}GB, {place}/llama" for place in ("a", "b") for memory in (40, 80)
    }


def test_devices_that_are_cores_are_one_cpu(head: Any) -> None:
    cpu = {"device_kind": "cpu", "devices": [{"name": "AMD EPYC"}] * 2}
    results = [make_result(f"tp_{size}", [make_point()], (size, 1, 1), environment=cpu) for size in (1, 2)]
    assert head(results).sentences[0].startswith(f"On 2 devices (AMD EPYC), {LLAMA}, 64")


def test_what_else_tells_groups_apart_is_said(head: Any) -> None:
    other = make_result("b", [make_point()], engine={"quantization": "fp8"})
    first, second = head([make_result("a", [make_point()]), other]).sentences
    assert first.startswith(f"On 1 × H100, {LLAMA} (quantization unknown), 64")
    assert second.startswith(f"On 1 × H100, {LLAMA} (quantization fp8), 64")


def test_what_tells_groups_apart_is_said_in_words(head: Any) -> None:
    eager = make_result("b", [make_point()], engine={"enforce_eager": True, "kv_cache_dtype": "fp8"})
    first, second = head([make_result("a", [make_point()]), eager]).sentences
    assert first.startswith(f"On 1 × H100, {LLAMA} (KV cache dtype auto, without eager mode), 64")
    assert second.startswith(f"On 1 × H100, {LLAMA} (KV cache dtype fp8, with eager mode), 64")
    # Flags are called what a user gives.
    assert not [name for name in (*GROUP_BY, *TO_MENTION) if "_" in column_words(name)]


def test_three_lengths_have_a_sentence_each_and_others_are_counted(head: Any) -> None:
    points = [make_point(1, length) for length in (64, 128, 256, 512, 1024)]
    sentences = head([make_result("tp_1", points)]).sentences
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        f"On 1 × H100, {LLAMA}, 64 + 32 tokens", "At 128 + 32 tokens", "At 256 + 32 tokens",
    ]  # fmt: skip
    assert [sentence.endswith(" 2 more prompt lengths below.") for sentence in sentences] == [False, False, True]


# --- larger batches -----------------------------------------------------------------------------------------------

LARGER = re.compile(r"(?<=\. )[^.]*try larger ones with --batch-sizes\.")


def growing(name: str = "tp_1", at_4_s: float = 2.0, spread: float = 0.01, **changes: Any) -> Result:
    """1, 2 and 4 requests; 2 take 1.5 s."""
    seconds = {1: 1.0, 2: 1.5, 4: at_4_s}
    points = [
        make_point(batch, latencies_s=[second * (1 + one * spread) for one in (-1, 0, 1)])
        for batch, second in seconds.items()
    ]
    for name_of_field, value in changes.pop("of_largest", {}).items():
        setattr(points[-1], name_of_field, value)
    return make_result(name, points, **changes)


def larger(found: Headline) -> list[str]:
    return [words for sentence in found.sentences for words in LARGER.findall(sentence)]


def test_throughput_that_still_grew_at_the_largest_size_is_said(head: Any) -> None:
    # 2 / 1.5 and 4 / 2 requests a second: half as many more.
    (sentence,) = head([growing()]).sentences
    words = "4 is the largest size measured with TP=1, and throughput still grew by 50 % from 2: try larger ones with "
    assert sentence.endswith(f" {words}--batch-sizes.")
    assert sentence.count("try larger") == 1


def test_a_growth_of_many_times_is_a_factor(head: Any) -> None:
    points = [make_point(batch, latencies_s=[second] * 3) for batch, second in ((1, 1.0), (64, 2.5))]
    assert "throughput still grew by a factor of 26 from 1: " in " ".join(head([make_result("tp_1", points)]).sentences)


def test_where_the_cost_has_another_winner_its_growth_is_said_too(head: Any) -> None:
    two = make_result("tp_2", [make_point(batch, latencies_s=[s] * 3) for batch, s in ((2, 1.4), (4, 1.9))], (2, 1, 1))
    assert larger(head([growing(), two], Question(price=1.0))) == [
        "Throughput still grew at the largest sizes measured (TP=2 by 47 % from 2 to 4, TP=1 by 50 % from 2 to 4): try "
        "larger ones with --batch-sizes."
    ]


def test_of_several_lengths_the_largest_growth_is_said_once(head: Any) -> None:
    points = [
        make_point(batch, length, latencies_s=[s] * 3)
        for length, at_4_s in ((64, 2.0), (128, 2.5))
        for batch, s in ((2, 1.5), (4, at_4_s))
    ]
    first, second = head([make_result("tp_1", points)]).sentences
    assert "larger" not in first
    assert second.endswith("throughput still grew by 50 % from 2: try larger ones with --batch-sizes.")


@pytest.mark.parametrize(
    "result",
    [
        growing(at_4_s=2.96),  # by 1 %, which a search calls a tie
        growing(at_4_s=2.5, spread=0.2),  # no more than chance
        growing(at_4_s=4.0),  # 2 are better
        make_result("tp_1", [make_point(4)]),  # nothing to compare with
        make_result("tp_1", [make_point(b, latencies_s=[s]) for b, s in ((2, 1.5), (4, 2.0))]),  # no interval
        # Asked for, and not reached: the search ended before, or memory did.
        growing(config={"batch_sizes": [1, 2, 4, 8]}),
        # It ran in waves, waited for memory, or the memory was nearly full.
        growing(engine={"max_num_seqs": 2}),
        growing(engine={"kv_cache_tokens": 4 * 96}),
        growing(of_largest={"runs": [make_run(s, requests=4, counters={"preemptions": 1}) for s in (2.0, 2.01, 1.99)]}),
    ],
)
def test_a_larger_size_is_not_named_where_it_would_not_help_or_was_tried(head: Any, result: Result) -> None:
    assert larger(head([result])) == []


def test_a_size_that_a_limit_holds_back_is_not_called_the_largest(head: Any) -> None:
    assert larger(head([growing()], Question(Limits(latency_s=1.6)))) == []


# --- replicas that nobody measured --------------------------------------------------------------------------------


def one_and_tp(tp_s: float = 1.5, **changes: Any) -> list[Result]:
    """One device makes 64 requests in 2 s, two by TP in `tp_s`: two replicas would make 128 in 2 s."""
    points = [make_point(64, seq_len, latencies_s=[2.0, 2.01, 1.99]) for seq_len in (64, 128)]
    wide = [make_point(64, seq_len, latencies_s=[tp_s, tp_s, tp_s]) for seq_len in (64, 128)]
    return [make_result("tp_1", points, **changes), make_result("tp_2", wide, (2, 1, 1), **changes)]


def test_replicas_that_would_be_faster_and_were_not_measured_are_named_with_their_command(
    head: Any, tmp_path: Path
) -> None:
    told = {"engine_args": ["--load-format", "dummy"], "temperature": 0.0, "gpu_memory_utilization": 0.95}
    found = head(one_and_tp(config=told))
    assert found.sentences[0].partition(": ")[2].startswith("TP=2 at 64 requests gives 1,365 tok/s.")
    # 2 x 64 requests of 32 tokens in 2 s
    assert found.unmeasured == (
        "2 replicas of TP=1 (DP=2) were not measured. One of them gives 1,024 tok/s at 64 tokens with 64 requests at "
        "once, so that 2 should give about 2,050 tok/s, more than any setting here. Measure them:"
    )
    sized = head(one_and_tp(config=told | {"max_num_seqs": 32, "max_num_batched_tokens": 2048}))
    assert (
        "--temperature 0.0 --gpu-memory-utilization 0.95 --max-num-seqs 32 --max-num-batched-tokens 2048 "
        in " ".join(sized.to_measure)
    )
    launcher, *words = shlex.split(" ".join(found.to_measure))
    assert launcher == "./run_batch_experiments.sh"
    assert words == [
        "custom", "DP=2", "--model", "meta-llama/Llama-2-7b-chat-hf", "--batch-sizes", "64", "--seq-lens", "64,128",
        "--output-dir", str(tmp_path / "new"), "--", "--max-tokens", "32", "--temperature", "0.0",
        "--gpu-memory-utilization", "0.95", "--load-format", "dummy",
    ]  # fmt: skip
    done = Launcher(tmp_path)("--dry-run", *words, DEVICES="2")
    assert done.returncode == 0, done.stderr
    assert "--data-parallel-size 2" in done.stdout
    text = as_text([], found).splitlines()
    assert text[-1].endswith("--load-format dummy")
    assert not any(line.endswith(("--batch-sizes \\", "--model \\")) for line in text)


@pytest.mark.parametrize(
    "results",
    [
        one_and_tp(0.9),  # TP=2 is faster than twice one
        one_and_tp(1.0),  # as fast, as far as the intervals tell
        one_and_tp()[:1],
        [*one_and_tp(), alone("dp_2", (1, 1, 2), {64: 2.1})],
        # Asked for, and failed: why is among the reasons.
        [*one_and_tp(), make_result("dp_2", [], (1, 1, 2), status="failed")],
        # Slices of a CPU share its memory; experts may be shared out over replicas.
        one_and_tp(environment={"device_kind": "cpu", "devices": [{"name": "AMD EPYC"}] * 2}),
        one_and_tp(config={"engine_args": ["--enable-expert-parallel"]}),
    ],
)
def test_no_replicas_are_named_that_were_measured_or_would_not_win(head: Any, results: list[Result]) -> None:
    found = head(results)
    assert (found.unmeasured, found.to_measure) == ("", ())


def test_replicas_must_keep_the_limits(head: Any) -> None:
    assert head(one_and_tp(), Question(Limits(latency_s=2.5))).unmeasured
    assert not head(one_and_tp(), Question(Limits(latency_s=1.8))).unmeasured


def test_replicas_over_nodes_have_no_command_of_one_line(head: Any) -> None:
    found = head(one_and_tp(config={"nnodes": 2}))
    assert found.unmeasured
    assert found.to_measure == ()


def test_of_settings_that_the_intervals_do_not_tell_apart_the_simplest_is_taken(head: Any) -> None:
    def near(name: str, sizes: tuple[int, int, int], second: float, **config: Any) -> Result:
        point = make_point(4 // sizes[2], latencies_s=[second, 1.02 * second, 0.98 * second], replicas=sizes[2])
        return make_result(name, [point], sizes, config=config)

    results = [near("mixed", (2, 1, 2), 1.0), near("flags", (4, 1, 1), 1.005, engine_args=["--swap-space", "1"]),
               near("tp_4", (4, 1, 1), 1.01), near("slow", (1, 1, 1), 1.5)]  # fmt: skip
    (sentence, *_) = head(results).sentences
    assert "TP=4 (tp_4) at 4 requests gives 126.7" in sentence
    assert "(tied within the intervals with TP=4 (flags) and 1 more)" in sentence


def test_of_ties_one_to_rely_on_is_taken_and_a_suspect_one_is_marked(head: Any, tmp_path: Path) -> None:
    spread = [1.0, 1.02, 0.98]
    doubtful = make_result("tp_1", [make_point(2, latencies_s=spread, verdict="suspect", verdict_reasons=["x"])])
    point = make_point(1, latencies_s=spread, replicas=2)
    good = make_result("dp_2", [point], (1, 1, 2))
    assert "DP=2 at 1 request per replica gives 64" in head([doubtful, good]).sentences[0]
    analysis = analyse([load_setting(path) for path in save_all([doubtful, good], tmp_path)], Question())
    lines = best(analysis.groups[0], analysis).lines
    assert lines[0].startswith("tie, length 64, throughput, as good within the intervals: tp_1 (batch 2: 64.0 ±")
    assert any(line.startswith("* suspect") for line in lines)


def test_a_long_name_is_short_in_the_sentence_and_never_that_of_two(head: Any) -> None:
    names = [f"tp_1_with_a_name_that_is_as_long_as_{end}_names_may_be_of_settings" for end in ("some", "other")]
    results = [
        make_result(name, [make_point(1, latencies_s=[1.0 + 0.5 * number])]) for number, name in enumerate(names)
    ]
    (sentence, *_) = head(results).sentences
    (name,) = re.findall(r"TP=1 \((.*?)\)", sentence.partition(".")[0])
    assert len(name) <= 32
    assert "some" in name


def test_nothing_measured_is_said(head: Any) -> None:
    invalid = make_point(verdict="invalid", verdict_reasons=["too short"])
    (sentence,) = head([make_result("tp_1", [invalid])]).sentences
    assert sentence == f"On 1 × H100, {LLAMA}: no valid point was measured; the reasons are below."
    assert head([make_result("tp_1", [], status="failed")]).sentences == (
        "No point was measured; the reasons are below.",
    )


def test_earlier_results_are_the_first_answer(head: Any) -> None:
    steady = [1.0, 1.001, 0.999, 1.0005]
    old = [make_result(points=[make_point(1, latencies_s=steady)])]
    new = [make_result(points=[make_point(1, latencies_s=[1.1 * second for second in steady])])]
    assert head(new, old=old).sentences[0] == "Compared with the earlier results, 1 point: 1 worse."
    other = [make_result("other", points=[make_point(2)])]
    assert head(other, old=old).sentences[0] == "Compared with the earlier results, 0 points: no point is in both."


def test_the_answer_comes_first_everywhere_and_no_number_is_broken() -> None:
    sentence = "On 4 × H100, " + "word " * 11 + "25,490 ± 190 tok/s."
    answer = Headline("Title", ("9 settings", "H100"), (sentence, "Second."), ("vllm", "serve"), "This runs it:")
    lines = as_text([], answer).splitlines()
    assert lines[:2] == ["On 4 × H100, " + " ".join(["word"] * 11), "25,490 ± 190 tok/s."]
    assert lines[2:] == ["", "Second."]
    # In a section too.
    text = as_text([Section("T", lines=["word " * 15 + "14 % of 25490 ±190 tok/s"])])
    assert text.splitlines()[-1] == "    14 % of 25490 ±190 tok/s"
    assert as_markdown([], [], [], answer).startswith(
        f"# Title\n\n9 settings · H100\n\n**{sentence}**\n\nSecond.\n\nThis runs it:\n\n```bash\nvllm serve\n```\n"
    )
