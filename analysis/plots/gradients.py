"""Sizes of the final layer's gradients early and late in training (the paper's Fig. 4)."""

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots import style

_NAMES = {"logit_gradient": "gradient of a logit", "item_gradient": "gradient of an item vector"}


def plot_gradients(axis: Axes, table: pd.DataFrame) -> Axes:
    """Draw the shares of the bins at each recorded step of one run and one gradient.

    Parameters
    ----------
    axis : Axes
    table : DataFrame
        Rows of `analysis.traces.gradient_histograms`.
    """
    steps = sorted(set(table["step"]))
    colors = style.ordinal_colors(steps)
    for step in steps:
        bins = table[(table["step"] == step) & (table["edge_low"] > 0)]
        bins = bins[bins["count"] > 0]
        axis.step(
            bins["edge_low"], bins["share"], where="post", color=colors[step],
            label=f"step {step:,}",
        )  # fmt: skip
        zero = table[(table["step"] == step) & (table["edge_low"] <= 0)]["share"].sum()
        if zero > 0:
            axis.plot([], [], " ", label=f"  {zero:.1%} below the first bin")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.legend(fontsize=5.5, handlelength=1.0, labelspacing=0.25)
    return axis


def gradients_figure(data: pd.DataFrame) -> style.Drawing:
    """One panel per run and gradient."""
    name = "gradients"
    with style.look():
        keys = list(dict.fromkeys(zip(data["run_key"], data["name"], strict=True)))
        titles = []
        for key, kind in keys:
            row = data[(data["run_key"] == key) & (data["name"] == kind)].iloc[0]
            titles.append(f"{row['dataset']}, {_NAMES.get(kind, kind)}\n{row['label']}")
        figure, axes = style.facets(titles, columns=2, height=2.2)
        if not keys:
            text = (
                "No run has recorded histograms of gradients: "
                "srsweep train --histograms-every makes some."
            )
            return style.nothing(name, figure, data, text)
        for axis, (key, kind) in zip(axes, keys, strict=True):
            plot_gradients(axis, data[(data["run_key"] == key) & (data["name"] == kind)])
            axis.title.set_fontsize(6.5)
        figure.supxlabel("Absolute gradient", fontsize=8)
        figure.supylabel("Share of entries", fontsize=8)
    return style.Drawing(
        name, figure, data,
        "How large the gradients at the final layer are at the first and the last recorded step.",
    )  # fmt: skip
