from __future__ import annotations

from batch_inference.report import escape, markdown, summary
from batch_inference.results import Point, Result
from batch_inference.tables import points_table
from builders import make_result


def failed(reason: str) -> Result:
    """A setting whose engine did not start."""
    result = make_result(tp=4)
    result.status, result.points, result.engine = "failed", [], {"failure": {"reason": reason, "log_tail": []}}
    return result


def test_the_summary_names_the_best_and_fits_80_columns() -> None:
    results = [make_result(seq_lens=(512, 1024)), make_result(tp=2, speed=150, seq_lens=(512, 1024))]
    text = summary(results, points_table(results))
    assert max(map(len, text.splitlines())) <= 80
    (_, best) = text.split("Best by output throughput\n")
    assert best.splitlines()[2].split() == ["512", "tp_2", "16", "2400", "2.5%", "valid"]


def test_groups_are_numbered_and_their_difference_is_said() -> None:
    results = [make_result(), make_result(tp=2, gpu="NVIDIA H200")]
    text = " ".join(summary(results, points_table(results)).split())
    assert "2 groups were measured on unlike things" in text
    assert "device: group 1 NVIDIA H100 80GB HBM3, group 2 NVIDIA H200" in text


def test_what_went_wrong_is_named() -> None:
    broken = make_result(tp=4)
    broken.status, broken.points, broken.engine = (
        "failed",
        [],
        {"failure": {"reason": "ValueError: no", "log_tail": []}},
    )
    partial = make_result()
    partial.points.append(Point(64, 512, 128, "oom", "out of memory"))
    partial.points[0].verdict, partial.points[0].verdict_reasons = "suspect", ["ran in waves"]
    text = summary([partial, broken], points_table([partial, broken]))
    assert "tp_4 failed: ValueError: no" in text
    assert "tp_1, batch 64, length 512: oom: out of memory" in text
    assert "tp_1, batch 1, length 512: suspect: ran in waves" in text


def test_failed_settings_alone_still_make_a_summary() -> None:
    broken = failed("no")
    assert "tp_4 failed: no" in summary([broken], points_table([broken]))
    assert "tp_4 failed: no" in markdown([broken], points_table([broken]), [], [])


def test_text_from_files_cannot_break_the_report() -> None:
    nasty = "a|b <script>alert(1)</script> [x](http://y) `z`\n# h"
    assert escape(nasty) == "a\\|b &lt;script&gt;alert(1)&lt;/script&gt; \\[x\\](http://y) \\`z\\` # h"
    result = make_result(config={"model": nasty})
    result.name = nasty
    text = markdown([result], points_table([result]), [], ["throughput: <b>"])
    assert "<script>" not in text
    assert "<b>" not in text
