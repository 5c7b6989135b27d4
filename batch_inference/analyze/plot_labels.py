"""Numbers beside marks where there is room for them: none lies on another, nor on a mark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from batch_inference.analyze.plot_colors import color

_SIZE_PT = 7.0
# Of a character and a line, and from the middle of a mark to its edge and to the text; in points.
_WIDTH_PT, _HEIGHT_PT = 0.62 * _SIZE_PT, 1.15 * _SIZE_PT
_MARK_PT, _GAPS_PT = 3.2, (4.5, 10.0)
# And of the cap of an interval.
_CAP_PT = 2.5
_SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True)
class Box:
    """In points from the lower left corner of the figure."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


Place = tuple[float, float]


@dataclass(frozen=True)
class Label:
    mark: Place
    text: str
    size_pt: float = 5.0  # of the mark


def label_marks(axes: Axes, labels: Sequence[Label], lines: Iterable[tuple[Place, Place]] = ()) -> None:
    """`labels` are those that matter most first: one without room is left out, and of marks that lie on one another the
    first alone has one. A mark without a text is kept clear of. `lines`, level or upright, are kept clear of where that
    can be. To be called when the limits of the axes are as they stay."""
    frame = _box(axes, *zip(axes.get_xlim(), axes.get_ylim(), strict=True))
    taken = [_grown(_box(axes, one.mark, one.mark), max(_MARK_PT, one.size_pt / 2)) for one in labels]
    thin = [_grown(_box(axes, *line), _CAP_PT) for line in lines]
    labelled: list[Box] = []
    for one in filter(lambda label: label.text, labels):
        middle = _box(axes, one.mark, one.mark)
        if any(map(_grown(middle, _MARK_PT).meets, labelled)):
            continue
        boxes = [box for box in _places(middle, one) if box.within(frame) and not any(map(box.meets, taken))]
        best = next((box for box in boxes if not any(map(box.meets, thin))), boxes[0] if boxes else None)
        if best is None:
            continue
        taken.append(best)
        labelled.append(_grown(middle, _MARK_PT))
        place = ((best.left + best.right) / 2 - middle.left, (best.bottom + best.top) / 2 - middle.bottom)
        axes.annotate(one.text, one.mark, place, textcoords="offset points", ha="center", va="center",
                      fontsize=_SIZE_PT, color=color("soft"), annotation_clip=True)  # fmt: skip


def _places(mark: Box, label: Label) -> Iterator[Box]:
    """The nearest first."""
    half_width, half_height = _WIDTH_PT * len(label.text) / 2, _HEIGHT_PT / 2
    for gap in (max(0.0, label.size_pt / 2 - _MARK_PT) + gap for gap in _GAPS_PT):
        for right, up in _SIDES:
            # Aslant, the corner is what is near the mark.
            near = gap * (0.6 if right and up else 1.0)
            x, y = mark.left + right * (near + half_width), mark.bottom + up * (near + half_height)
            yield Box(x - half_width, y - half_height, x + half_width, y + half_height)


def _box(axes: Axes, one: Place, other: Place) -> Box:
    points = axes.transData.transform([one, other]) * 72 / axes.figure.dpi
    (left, right), (bottom, top) = sorted(points[:, 0].tolist()), sorted(points[:, 1].tolist())
    return Box(left, bottom, right, top)


def _grown(box: Box, by: float) -> Box:
    return Box(box.left - by, box.bottom - by, box.right + by, box.top + by)
