"""Replicas that nobody measured: what they would give by one replica's numbers, and the command that measures them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from batch_inference.analyze.answers import Analysis, Group
from batch_inference.analyze.compare import SIZES, layout
from batch_inference.analyze.decide import GOALS, Record, keeps
from batch_inference.analyze.tables import MeasuredSetting, believable, half_width
from batch_inference.analyze.wording import spoken
from batch_inference.core.config import ExperimentConfig, flag_of
from batch_inference.core.text import counted, short

_THROUGHPUT = GOALS[0].column
# The command says these where they are not the default: points that differ in the first are never ranked together, and
# without the last a model may not fit.
_KEPT = ("dtype", "temperature", "top_p", "enforce_eager", "trust_remote_code", "gpu_memory_utilization")
# Of a model whose weights say nothing else.
_USUAL_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Unmeasured:
    """So many replicas of a setting that was measured with one."""

    row: Record  # the point of one replica
    replicas: int
    is_of_several_lengths: bool

    @property
    def tok_per_s(self) -> float:
        return float(self.replicas * self.row[_THROUGHPUT])

    @property
    def half_width(self) -> float:
        return self.replicas * (half_width(self.row, _THROUGHPUT) or 0.0)

    @property
    def sizes(self) -> tuple[int, int, int]:
        tp, pp, _ = (int(self.row[name]) for name in SIZES)
        return tp, pp, self.replicas


def unmeasured_replicas(analysis: Analysis) -> Unmeasured | None:
    """Of the largest group that has some: replicas that would beat, beyond the intervals, the best of its settings.

    Independent replicas do not know of each other, so N of them do N times what one does. On a CPU they share its
    memory, and the replicas of a mixture of experts may share out its experts: of those nothing is said."""
    for group in sorted(analysis.groups, key=lambda one: (-len(one.points), one.number)):
        highest = {row["seq_len"]: row for row in _ranked(_that_count(group, analysis), "seq_len")}
        found = [one for one in _of_group(group, analysis) if _is_faster(one, highest[one.row["seq_len"]])]
        if found:
            return max(found, key=lambda one: one.tok_per_s / highest[one.row["seq_len"]][_THROUGHPUT])
    return None


def _that_count(group: Group, analysis: Analysis) -> pd.DataFrame:
    points = believable(group.points)
    return points[keeps(points, analysis.question.limits) & points[_THROUGHPUT].notna()]


def _ranked(points: pd.DataFrame, *keys: str) -> list[Record]:
    """The fastest point of each of these."""
    ranked = points.sort_values(_THROUGHPUT, ascending=False, kind="stable")
    return ranked.drop_duplicates(list(keys)).to_dict("records")


def _of_group(group: Group, analysis: Analysis) -> Iterator[Unmeasured]:
    points = group.points
    if (points["device_kind"] == "cpu").any():
        return
    devices = int(points["num_devices"].max())
    asked = {tuple(one.shared.get(name) for name in SIZES) for one in analysis.settings}
    kept = _that_count(group, analysis)
    alone = kept[(kept["data_parallel_size"] == 1) & ~kept["enable_expert_parallel"].astype(bool)]
    several = points["seq_len"].nunique() > 1
    for row in _ranked(alone, "setting", "seq_len"):
        found = Unmeasured(row, devices // int(row["num_devices"]), several)
        if found.replicas > 1 and found.sizes not in asked:
            yield found


def _is_faster(one: Unmeasured, highest: Record) -> bool:
    half = half_width(highest, _THROUGHPUT) or 0.0
    return one.tok_per_s - one.half_width > float(highest[_THROUGHPUT]) + half


# --- as it is said --------------------------------------------------------------------------------------------------


def said(one: Unmeasured) -> str:
    row, (tp, pp, dp) = one.row, one.sizes
    where = f"at {int(row['seq_len'])} tokens " if one.is_of_several_lengths else ""
    value = short(row[_THROUGHPUT])
    words = (
        f"{counted(one.replicas, 'replica')} of {layout(tp, pp, 1)} ({layout(tp, pp, dp)}) were not measured. One of "
        f"them gives {value} tok/s {where}with {counted(int(row['batch_size']), 'request')} at once, so that "
        f"{one.replicas} should give about {_about(one.tok_per_s)} tok/s, more than any setting here. Measure them:"
    )
    return spoken(words)


def _about(value: float) -> str:
    """Three digits: it is no measurement."""
    return short(float(f"{value:.3g}"))


def to_measure(one: Unmeasured, analysis: Analysis) -> tuple[str, ...]:
    """The words of a shell; none where it takes more than a line on one node."""
    row = one.row
    setting = next(one for one in analysis.settings if one.file == row["file"])
    if (setting.shared.get("nnodes") or 1) > 1:
        return ()
    sizes = [f"{name}={size}" for name, size in zip(("TP", "PP", "DP"), one.sizes, strict=True) if size > 1]
    points = analysis.points[analysis.points["setting"] == row["setting"]]
    batches, lengths = (sorted(points[name].unique()) for name in ("batch_size", "seq_len"))
    return (
        "./run_batch_experiments.sh", "custom", *sizes, "--model", shlex.quote(str(row["model"])),
        "--batch-sizes", ",".join(map(str, batches)), "--seq-lens", ",".join(map(str, lengths)),
        "--output-dir", shlex.quote(str(setting.path.parent)), "--", *_flags(setting, row),
    )  # fmt: skip


def _flags(setting: MeasuredSetting, row: Record) -> Sequence[str]:
    """Behind the dashes: what else the measured setting was told."""
    words = ["--max-tokens", str(int(row["max_tokens"]))]
    usual = ExperimentConfig()
    for name in _KEPT:
        value = setting.shared.get(name)
        default = _USUAL_DTYPE if name == "dtype" else getattr(usual, name)
        if value is not None and value != default:
            words += [flag_of(name)] if value is True else [flag_of(name), shlex.quote(str(value))]
    sizes = dict(setting.sizes_asked)
    if not pd.isna(row["tokens_per_step"]):
        sizes["max_num_batched_tokens"] = int(row["tokens_per_step"])
    for name, size in sizes.items():
        words += [flag_of(name), str(size)]
    # Quoted already.
    engine = setting.shared.get("engine_args")
    return [*words, *([] if engine is None or pd.isna(engine) else [str(engine)])]
