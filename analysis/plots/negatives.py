"""Quality against the number of negatives, by batch size (the paper's Fig. 6)."""

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.frame import numeric
from analysis.plots import style
from db.measures import MEASURES

Bars = Literal["standard_deviation", "standard_error_interval"]
"""The paper's caption says standard deviations; its code draws 1.96 standard errors."""
_BAR_TEXT = {
    "standard_deviation": "one standard deviation over sequence lengths",
    "standard_error_interval": "1.96 standard errors of the mean over sequence lengths",
}


def negatives_data(
    frame: pd.DataFrame, metric: str = "ndcg_at_10", bars: Bars = "standard_deviation"
) -> pd.DataFrame:
    """Mean and spread over sequence lengths (and seeds) for each number of negatives.

    Returns
    -------
    DataFrame
        Columns dataset, batch_size, num_negatives, mean, bar (nan with one run), n.
    """
    table = frame.assign(**{metric: numeric(frame, metric)})
    table = table.dropna(subset=["num_negatives", metric])
    keys = ["dataset", "batch_size", "num_negatives"]
    grouped = table.groupby(keys, sort=False)[metric]
    out = grouped.agg(mean="mean", bar="std", n="size").reset_index()
    if bars == "standard_error_interval":
        out["bar"] = 1.96 * out["bar"] / np.sqrt(out["n"])
    order = {name: number for number, name in enumerate(dict.fromkeys(table["dataset"]))}
    out["order"] = out["dataset"].map(order)
    return out.sort_values(["order", "batch_size", "num_negatives"]).drop(columns="order")


def plot_negatives(
    axis: Axes, data: pd.DataFrame, colors: dict[float, tuple[float, float, float]]
) -> Axes:
    """Draw one dataset's lines, one per batch size."""
    for batch_size in sorted(set(data["batch_size"])):
        line = data[data["batch_size"] == batch_size]
        axis.errorbar(
            line["num_negatives"], line["mean"], yerr=line["bar"].fillna(0.0),
            color=colors[batch_size], marker="o", markersize=2.5, capsize=1.5, elinewidth=0.6,
            linewidth=1.0,
        )  # fmt: skip
    style.base_two(axis, data["num_negatives"].tolist())
    return axis


def negatives_figure(
    frame: pd.DataFrame, metric: str = "ndcg_at_10", bars: Bars = "standard_deviation"
) -> style.Drawing:
    """One panel per dataset that has sampled losses."""
    data = negatives_data(frame, metric, bars)
    name = f"negatives_{metric}"
    with style.look():
        datasets = list(dict.fromkeys(data["dataset"]))
        figure, axes = style.facets(datasets, height=1.9)
        if not datasets:
            text = "No run has a number of negatives: there is nothing to draw against it."
            return style.nothing(name, figure, data, text)
        colors = style.ordinal_colors(data["batch_size"].tolist())
        for axis, dataset in zip(axes, datasets, strict=True):
            plot_negatives(axis, data[data["dataset"] == dataset], colors)
        figure.supxlabel("Number of negatives", fontsize=8)
        figure.supylabel(MEASURES[metric].label, fontsize=8)
        handles = [style.handle("o", color, label=f"{key:g}") for key, color in colors.items()]
        figure.legend(handles=handles, title="batch size", loc="outside right center")
    return style.Drawing(
        name, figure, data,
        f"{MEASURES[metric].label} against the number of negatives by batch size, mean over "
        f"sequence lengths and seeds; bars are {_BAR_TEXT[bars]}.",
    )  # fmt: skip
