"""Loss and quality per step of the runs along the front."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots import style

_WHAT = {"loss": "Training loss", "ndcg_at_10": "Validation NDCG@10"}


def plot_curves(axis: Axes, table: pd.DataFrame, column: str) -> Axes:
    """Draw one line per run of one dataset, from light (least memory) to dark.

    Parameters
    ----------
    axis : Axes
    table : DataFrame
        Rows of `analysis.traces.curves` of one dataset.
    column : {"loss", "ndcg_at_10"}
    """
    keys = list(dict.fromkeys(table["run_key"]))
    colors = style.ordinal_colors(range(len(keys)))
    for number, key in enumerate(keys):
        line = table[table["run_key"] == key].dropna(subset=[column])
        if line.empty:
            continue
        where = line["step"].to_numpy(float) + 1
        axis.plot(
            where, line[column].to_numpy(float), color=colors[number], linewidth=0.9,
            drawstyle="default" if column == "loss" else "steps-post",
            label=str(line["label"].iloc[0]),
        )  # fmt: skip
    style.log_if_wide(axis, table["step"].astype(float) + 1)
    axis.legend(fontsize=5.2, handlelength=1.0, borderpad=0.2, labelspacing=0.25)
    return axis


def curves_figure(data: pd.DataFrame, column: str = "loss") -> style.Drawing:
    """One panel per dataset whose runs have steps."""
    name = f"curves_{column}"
    drawn = data[np.isfinite(data[column].to_numpy(float))]
    with style.look():
        datasets = list(dict.fromkeys(drawn["dataset"]))
        figure, axes = style.facets(datasets, height=2.1)
        if not datasets:
            text = f"No run has recorded its {_WHAT[column].lower()} by step."
            return style.nothing(name, figure, drawn, text)
        for axis, dataset in zip(axes, datasets, strict=True):
            plot_curves(axis, drawn[drawn["dataset"] == dataset], column)
        figure.supxlabel("Optimizer steps", fontsize=8)
        figure.supylabel(_WHAT[column], fontsize=8)
    return style.Drawing(
        name, figure, drawn,
        f"{_WHAT[column]} by optimizer step of runs along the Pareto front of memory and NDCG@10, "
        "light for the least memory, dark for the most; long curves are averaged in bins.",
    )  # fmt: skip
