"""One look for all figures: palette, sizes, markers, and files with the same bytes every time."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLUMN_WIDTH = 3.4
"""Width of a figure in one column of a paper, in inches."""
PAGE_WIDTH = 7.0
"""Width of a figure across both columns, in inches."""
GREY = "#8a8a8a"
MARKERS: tuple[str, ...] = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">", "p", "d")
FULL_MARKER = "*"
"""Runs over the full catalog."""
FAMILY_LABELS = {
    "ce": "CE", "ce_minus": "CE⁻", "cce": "CCE", "cce_minus": "CCE⁻", "sce": "SCE",
    "bce": "BCE", "bce_plus": "BCE⁺", "gbce": "gBCE",
}  # fmt: skip
"""Losses as the paper writes them."""

Color = str | tuple[float, float, float]

_LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8.5,
    "figure.dpi": 200,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.title_fontsize": 7,
    "lines.linewidth": 1.2,
    "savefig.dpi": 200,
    "svg.hashsalt": "srsweep",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


@dataclass(frozen=True)
class Drawing:
    """A figure, the numbers it shows and what it says.

    Attributes
    ----------
    name : str
        Stem of its files.
    figure : Figure
    data : DataFrame
        What is drawn, one row per mark.
    caption : str
        Plain text, also the alternative text for screen readers.
    said : bool
        Whether the figure says why it is empty, in place of a plot.
    """

    name: str
    figure: Figure
    data: pd.DataFrame
    caption: str
    said: bool = False

    def save(self, folder: Path) -> list[Path]:
        """Write `<name>.svg`, `.png` and `.csv` into a folder; equal input gives equal bytes."""
        paths = [folder / f"{self.name}.{suffix}" for suffix in ("svg", "png", "csv")]
        with look():
            # the layout is the dearer half of a drawing: once for both files
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
            self.figure.savefig(paths[0], metadata={"Date": None, "Creator": "srsweep"})
            self.figure.savefig(paths[1], metadata={"Software": None})
        self.data.to_csv(paths[2], index=False, float_format="%.10g", lineterminator="\n")
        return paths


@contextmanager
def look() -> Iterator[None]:
    """Apply the style of all figures for the length of a block."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)
        yield


def facets(
    titles: Sequence[str], *, columns: int = 3, height: float = 1.9, width: float | None = None
) -> tuple[Figure, list[Axes]]:
    """Figure with one axes per title, in rows of at most `columns`."""
    count = max(1, len(titles))
    across = min(columns, count)
    rows = math.ceil(count / across)
    size = (width or (COLUMN_WIDTH if across == 1 else PAGE_WIDTH), height * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, across, number + 1) for number in range(count)]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    return figure, axes


def ordinal_colors(values: Sequence[float]) -> dict[float, tuple[float, float, float]]:
    """A color for every value, light for small and dark for large, safe for the color-blind."""
    ordered = sorted(set(values))
    palette = sns.color_palette("viridis_r", len(ordered) + 1)[1:]
    return dict(zip(ordered, palette, strict=True))


def nominal_colors(values: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A color for every name, told apart by the color-blind as well."""
    return dict(zip(values, sns.color_palette("colorblind", len(values)), strict=True))


def marker_of(values: Sequence[float]) -> dict[float, str]:
    """A marker for every number of negatives."""
    ordered = sorted(set(values))
    return {value: MARKERS[number % len(MARKERS)] for number, value in enumerate(ordered)}


def say(axis: Axes, text: str) -> None:
    """Write into an axes what the data lack, in place of an empty plot."""
    axis.set_axis_off()
    axis.text(
        0.5, 0.5, textwrap.fill(text, 34), ha="center", va="center", fontsize=8,
        color="#555555", transform=axis.transAxes,
    )  # fmt: skip


def nothing(name: str, figure: Figure, data: pd.DataFrame, text: str) -> Drawing:
    """A drawing that says in its first panel what the runs lack."""
    say(figure.axes[0], text)
    return Drawing(name, figure, data, text, said=True)


def log_if_wide(axis: Axes, values: pd.Series, which: str = "x", *, ratio: float = 8.0) -> None:
    """Logarithmic axis with plain numbers where positive values span more than a factor."""
    positive = values[values > 0]
    if positive.empty or positive.max() / positive.min() < ratio:
        return
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(10, subs=_log_steps(axis, positive, which)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


_DIGIT_INCHES = 0.062
"""Width of a digit of a tick's label."""
_LOG_STEPS: tuple[tuple[tuple[float, ...], float], ...] = (
    ((1.0, 2.0, 5.0), math.log10(2)), ((1.0, 3.0), math.log10(3)), ((1.0,), 1.0),
)  # fmt: skip
"""Ticks within a decade, and the least distance between two of them in decades."""


def _log_steps(axis: Axes, positive: pd.Series, which: str) -> tuple[float, ...]:
    """The densest ticks whose labels do not run into each other."""
    margin = (positive.max() / positive.min()) ** 0.05  # the axis reaches beyond the values
    low, high = float(positive.min() / margin), float(positive.max() * margin)
    grid = axis.get_gridspec()
    figure = axis.get_figure(root=True)
    if grid is None or figure is None or which == "y":
        return (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)
    beside_legend = 0.5
    inches = figure.get_figwidth() * beside_legend / grid.ncols
    per_decade = inches / math.log10(high / low)
    for steps, gap in _LOG_STEPS:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        labels = [f"{step * 10.0**power:g}" for power in range(first, last + 1) for step in steps
                  if low <= step * 10.0**power <= high]  # fmt: skip
        longest = max(map(len, labels), default=1)
        if len(labels) > 1 and gap * per_decade >= (longest + 1) * _DIGIT_INCHES:
            return steps
    return (1.0,)


def base_two(axis: Axes, values: Sequence[float]) -> None:
    """Horizontal axis of a parameter that grows by doubling, with its own values as ticks."""
    ordered = sorted(set(values))
    if len(ordered) > 1:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ordered, [f"{value:g}" for value in ordered], rotation=45, ha="right")
    axis.minorticks_off()


def marker_size(length: float, lengths: Sequence[float]) -> float:
    """Area of a mark for a sequence length, in points squared."""
    low, high = np.log2(min(lengths)), np.log2(max(lengths))
    share = (np.log2(length) - low) / (high - low) if high > low else 0.5
    return float(6 + 30 * share)


def handle(marker: str, color: Color, size: float = 5.0, label: str = "") -> Line2D:
    """Legend entry of one mark."""
    return Line2D(
        [], [], linestyle="none", marker=marker, color=color, markersize=size, label=label,
        markeredgecolor="white", markeredgewidth=0.3,
    )  # fmt: skip
