"""The colours of every plot, for a light page and a dark one: what is drawn within STYLES[theme] has those of it."""

from __future__ import annotations

from typing import Any, Literal

import matplotlib as mpl
import seaborn as sns
from matplotlib.colors import to_rgb

# By what it is for: on a light page, and on a dark one. Text has a contrast of 4.5 or more with the paper.
_COLORS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#12161c"),
    "ink": ("#1b1f24", "#e3e8ee"),
    "soft": ("#57606a", "#9aa6b2"),
    "dots": ("#c0c7cf", "#4a5460"),  # of settings without a name
    "band": ("#dfe3e8", "#29313b"),
    "grid": ("#e6e9ed", "#262e38"),
    "blank": ("#eceff2", "#1d242d"),  # not measured
    "ramp": ("#f6e7c1", "#463a15"),
    "plateau": ("#e4f0e4", "#1c3823"),
    "drain": ("#f3dcd6", "#482a22"),
    "weights": ("#3d5a80", "#7ea6d8"),
    "activations": ("#e09f3e", "#d9962f"),
    "used": ("#8f9aa6", "#6b7886"),
    "kv_pool": ("#b8d4ea", "#2f4a66"),
}
# The shades of a family of settings, smallest setting first: strength grows with it. Each has a contrast of 3 or more.
_SHADES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one": (("#24292f", "#6e7781", "#57606a", "#8c959f"), ("#e3e8ee", "#8b949e", "#b1bac4", "#6e7781")),
    "tp": (("#3a8fe0", "#1a5fb4", "#0b2f6b", "#0b8a94"), ("#4a90e2", "#86bfff", "#cfe5ff", "#39c5cf")),
    "pp": (("#e06c00", "#a84300", "#6b2a00", "#a67c00"), ("#e8801a", "#ffb066", "#ffdcb0", "#e3b341")),
    "dp": (("#2f9e44", "#1b6e2c", "#0b3d17", "#6b8500"), ("#3fae55", "#86e89a", "#d0f7d8", "#b8cc30")),
    "mixed": (("#b14fd0", "#7326a3", "#d6336c", "#43145f"), ("#b07be0", "#d9b8ff", "#ff8cc0", "#f2e3ff")),
}
# Of settings that are no families: colours as unlike as can be.
_UNLIKE = (("tp", 1), ("pp", 0), ("dp", 0), ("mixed", 0), ("one", 0), ("tp", 3), ("mixed", 2), ("pp", 2))
SHADES_OF_FAMILY, UNLIKE = 4, len(_UNLIKE)


def color(name: str) -> str:
    """Of the page that is drawn for."""
    return _COLORS[name][_is_dark()]


def shade(family: str, number: int) -> str:
    """That of a member of a family of settings; after the last shade the first comes again."""
    shades = _SHADES[family][_is_dark()]
    return shades[number % len(shades)]


def unlike(number: int) -> str:
    family, shade_number = _UNLIKE[number % len(_UNLIKE)]
    return shade(family, shade_number)


def text_on(background: Any) -> str:
    """Black or white, whichever has the higher contrast, which is then 4.5 or more on every colour."""
    bright = _luminance(background)
    return "#000000" if (bright + 0.05) / 0.05 > 1.05 / (bright + 0.05) else "#ffffff"


def contrast(one: Any, other: Any) -> float:
    """By WCAG 2: from 1, alike, to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(value: Any) -> float:
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(value))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _is_dark() -> bool:
    # The setting of matplotlib that holds within the style: a plot need not be told.
    return bool(mpl.rcParams["axes.facecolor"] == _COLORS["paper"][True])


def _style(theme: Literal["light", "dark"]) -> dict[str, Any]:
    paper, ink, soft, grid = (_COLORS[name][theme == "dark"] for name in ("paper", "ink", "soft", "grid"))
    return {
        **sns.axes_style("whitegrid"),
        "font.size": 9,
        "axes.titlesize": 9,
        "legend.fontsize": 8.5,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink),
        "axes.edgecolor": soft,
        "hatch.color": soft,
        "grid.color": grid,
        # Names come from files: a $ in one is no formula.
        "text.parse_math": False,
        # The same figure is the same file.
        "svg.hashsalt": "batch_inference",
    }


STYLES: dict[str, Any] = {"light": _style("light"), "dark": _style("dark")}
