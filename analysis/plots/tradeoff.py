"""Memory against quality, one mark per run (the paper's Fig. 5)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.audit import hidden_points, in_hidden_box
from analysis.frame import MEMORY, numeric, records
from analysis.pareto import pareto_fronts
from analysis.plots import style
from db.measures import MEASURES

Hidden = Literal["none", "paper"]
_FAMILIES = {"ce": "CE, CE⁻", "ce_minus": "CE, CE⁻", "cce": "CCE, CCE⁻", "cce_minus": "CCE, CCE⁻"}
_COLUMNS = ["panel", "dataset", "run_key", "loss", "batch_size", "max_seq_len", "num_negatives"]


@dataclass(frozen=True)
class TradeoffData:
    """What the trade-off figure draws.

    Attributes
    ----------
    marks : DataFrame
        One row per run: panel, settings, cost, quality, whether on the front, whether the cost
        is a bound (then the quality is missing).
    cost, metric : str
    note : str
        What is not drawn, and why.
    hidden : {"none", "paper"}
        Whether the runs that the paper's Fig. 5 hides are left out.
    """

    marks: pd.DataFrame
    cost: str
    metric: str
    note: str
    hidden: Hidden = "none"


def tradeoff_data(
    frame: pd.DataFrame,
    infeasible: pd.DataFrame | None = None,
    *,
    cost: str = MEMORY,
    metric: str = "ndcg_at_10",
    hidden: Hidden = "none",
) -> TradeoffData:
    """Prepare the marks: runs with both measures, their front, and runs that did not fit.

    Parameters
    ----------
    frame, infeasible : DataFrame
        Of `analysis.frame.Runs`.
    cost, metric : str
        Measures on the horizontal and the vertical axis.
    hidden : {"none", "paper"}
        Whether the runs that the paper's Fig. 5 hides are left out; the note says how many.
    """
    notes = []
    if hidden == "paper":
        notes.append(_hidden_note(frame))
        frame = frame[~in_hidden_box(frame)]
    table = frame.assign(**{name: numeric(frame, name) for name in (cost, metric)})
    drawn = table.dropna(subset=[cost, metric])
    on_front = [
        key for front in pareto_fronts(drawn, (cost, metric)) for key in front.runs["run_key"]
    ]
    marks = drawn.assign(on_front=drawn["run_key"].isin(on_front), bound=False)
    if cost == MEMORY and infeasible is not None and len(infeasible):
        bounds = infeasible.assign(**{cost: numeric(infeasible, "memory_bound_bytes")})
        bounds = bounds.dropna(subset=[cost]).assign(on_front=False, bound=True)
        bounds[metric] = float("nan")
        if len(bounds):
            marks = pd.concat([marks, bounds], ignore_index=True)
    marks["panel"] = _panels(marks)
    missing = len(table) - len(drawn)
    if missing:
        notes.append(f"{missing} of {len(table)} runs have no {cost} or {metric}.")
    columns = [*_COLUMNS, cost, metric, "on_front", "bound"]
    marks = marks[columns].reset_index(drop=True)
    return TradeoffData(marks, cost, metric, " ".join(notes), hidden)


def plot_tradeoff(
    axis: Axes, marks: pd.DataFrame, data: TradeoffData, scales: "Scales | None" = None
) -> Axes:
    """Draw one panel: color batch size, size sequence length, shape negatives, line the front.

    Parameters
    ----------
    axis : Axes
    marks : DataFrame
        Rows of `data.marks` of one panel.
    data : TradeoffData
    scales : Scales, optional
        Colors, sizes and shapes shared between panels; by default those of these marks.
    """
    scales = scales or Scales.of(data.marks)
    unit = MEASURES[data.cost].display_scale
    runs = marks[~marks["bound"]]
    runs = runs.sort_values("max_seq_len", ascending=False, kind="stable")
    for _, group in runs.groupby(["batch_size", "num_negatives"], dropna=False):
        batch_size, negatives = (
            float(group[name].iloc[0]) for name in ("batch_size", "num_negatives")
        )
        full = bool(np.isnan(negatives))
        sizes = [scales.size(length) * (1.9 if full else 1.0) for length in group["max_seq_len"]]
        axis.scatter(
            group[data.cost] / unit, group[data.metric], s=sizes,
            color=scales.colors[batch_size],
            marker=style.FULL_MARKER if full else scales.markers[negatives],
            edgecolor="white", linewidth=0.3, alpha=0.9, zorder=3,
        )  # fmt: skip
    front = runs[runs["on_front"]].sort_values(data.cost)
    axis.step(
        front[data.cost] / unit, front[data.metric], where="post", color="#333333",
        linewidth=0.8, zorder=2,
    )  # fmt: skip
    bounds = marks[marks["bound"]]
    if len(bounds):
        floor = runs[data.metric].min() if len(runs) else 0.0
        axis.scatter(
            bounds[data.cost] / unit, [floor] * len(bounds), marker=">", s=16, facecolor="none",
            edgecolor=[scales.colors[value] for value in bounds["batch_size"]], linewidth=0.8,
            zorder=3,
        )  # fmt: skip
    style.log_if_wide(axis, marks[data.cost] / unit)
    return axis


@dataclass(frozen=True)
class Scales:
    """Colors of batch sizes, sizes of lengths, markers of negatives, shared by all panels."""

    colors: dict[float, tuple[float, float, float]]
    lengths: tuple[float, ...]
    markers: dict[float, str]

    @classmethod
    def of(cls, marks: pd.DataFrame) -> "Scales":
        """Scales that cover every mark."""
        return cls(
            style.ordinal_colors(marks["batch_size"].tolist()),
            tuple(sorted(set(marks["max_seq_len"]))),
            style.marker_of(marks["num_negatives"].dropna().tolist()),
        )

    def size(self, length: float) -> float:
        """Area of the mark of a sequence length."""
        return style.marker_size(length, self.lengths)


def tradeoff_figure(data: TradeoffData) -> style.Drawing:
    """One panel per dataset (and loss family, where there are several)."""
    name = f"tradeoff_{_short(data.cost)}_{data.metric}"
    with style.look():
        panels = list(dict.fromkeys(data.marks["panel"]))
        figure, axes = style.facets(panels, height=2.0)
        if not panels:
            text = f"No run has both {data.cost} and {data.metric}. {data.note}".strip()
            return style.nothing(name, figure, data.marks, text)
        scales = Scales.of(data.marks)
        for axis, panel in zip(axes, panels, strict=True):
            plot_tradeoff(axis, data.marks[data.marks["panel"] == panel], data, scales)
        figure.supxlabel(MEASURES[data.cost].label, fontsize=8)
        figure.supylabel(MEASURES[data.metric].label, fontsize=8)
        _legends(figure, data, scales)
    return style.Drawing(name, figure, data.marks, _caption(data, panels))


def _hidden_note(frame: pd.DataFrame) -> str:
    found = hidden_points(frame)
    listed = ", ".join(f"{row['dataset']}: {row['hidden']}" for row in records(found))
    return (
        f"{found['hidden'].sum()} runs are hidden, as far as the boxes of the paper's Fig. 5 are "
        f"known ({listed or 'none of these datasets'})."
    )


def _panels(marks: pd.DataFrame) -> pd.Series:
    family = marks["loss"].map({**style.FAMILY_LABELS, **_FAMILIES})
    several = family.groupby(marks["dataset"]).transform("nunique") > 1
    return marks["dataset"].where(~several, marks["dataset"] + ": " + family)


def _legends(figure: Figure, data: TradeoffData, scales: Scales) -> None:
    def square(value: float) -> float:
        return math.sqrt(scales.size(value))

    handles = [style.handle("none", "none", label="batch size")]
    handles += [
        style.handle("o", color, label=f"{value:g}") for value, color in scales.colors.items()
    ]
    handles.append(style.handle("none", "none", label="sequence length"))
    handles += [
        style.handle("o", style.GREY, square(value), f"{value:g}") for value in _few(scales.lengths)
    ]
    handles.append(style.handle("none", "none", label="negatives"))
    handles += [
        style.handle(marker, style.GREY, label=f"{value:g}")
        for value, marker in scales.markers.items()
    ]
    if data.marks["num_negatives"].isna().any():
        handles.append(style.handle(style.FULL_MARKER, style.GREY, 8, "full catalog"))
    if data.marks["bound"].any():
        handles.append(style.handle(">", style.GREY, 4, "out of memory: needs more"))
    figure.legend(
        handles=handles, loc="outside right center", handletextpad=0.3, labelspacing=0.35,
        borderpad=0.2,
    )  # fmt: skip


def _few(values: Sequence[float], most: int = 6) -> list[float]:
    """At most `most` values, evenly picked, ends included."""
    if len(values) <= most:
        return list(values)
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _short(measure: str) -> str:
    return {MEMORY: "memory", "epoch_seconds": "time"}.get(measure, measure)


def _caption(data: TradeoffData, panels: Sequence[str]) -> str:
    counts = data.marks.loc[~data.marks["bound"], "panel"].value_counts()
    parts = [f"{panel}: {counts.get(panel, 0)}" for panel in panels]
    text = (
        f"{MEASURES[data.metric].label} against {MEASURES[data.cost].label}, one mark per run "
        f"({', '.join(parts)}). Color is the batch size, size the sequence length, shape the "
        "number of negatives; the line is the Pareto front."
    )
    if data.hidden == "none":
        text += " No run is hidden."
    bounds = int(data.marks["bound"].sum())
    if bounds:
        text += f" {bounds} runs did not fit and are drawn at what they needed at least."
    return f"{text} {data.note}".strip()
