"""What filtering small gradients costs and saves (the paper's Fig. 8 and 9)."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.frame import TIME, numeric, trainings
from analysis.plots import style
from db.measures import MEASURES

_SETTING = ["dataset", "model", "training", "batch_size", "max_seq_len"]
_COLUMNS = [
    "dataset",
    "model",
    "batch_size",
    "max_seq_len",
    "loss",
    "num_negatives",
    "filter_eps",
    "ndcg_at_10",
    TIME,
    "num_runs",
]


def filtering_data(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of CCE and CCE- by filter threshold, at the setting with the most thresholds.

    Runs are averaged over seeds only, and those of the unbiased filter, which leaves nothing out,
    do not count.

    Parameters
    ----------
    frame : DataFrame
        Finished runs of one device class and time source per dataset.

    Returns
    -------
    DataFrame
        Columns dataset, model, batch_size, max_seq_len, loss, num_negatives, filter_eps (0 is
        none), ndcg_at_10, epoch_seconds, num_runs. Only datasets with CCE at two thresholds.
    """
    fused = frame[frame["loss"].isin(["cce", "cce_minus"])]
    if "filter_mode" in fused:
        fused = fused[fused["filter_mode"] != "unbiased"]
    table = fused.assign(
        filter_eps=numeric(fused, "filter_eps").fillna(0.0),
        training=trainings(fused),
        **{name: numeric(fused, name) for name in ("ndcg_at_10", TIME)},
    ).dropna(subset=["ndcg_at_10"])
    if "model" not in table:
        table = table.assign(model="sasrec")
    keys = [*_SETTING, "loss", "num_negatives", "filter_eps"]
    means = (
        table.groupby(keys, dropna=False)
        .agg(ndcg_at_10=("ndcg_at_10", "mean"), epoch_seconds=(TIME, "mean"),
             num_runs=(TIME, "size"))
        .reset_index()
    )  # fmt: skip
    parts = []
    for _, group in means.groupby("dataset", sort=False):
        full = group[group["loss"] == "cce"]
        levels = full.groupby(_SETTING)["filter_eps"].nunique()
        if levels.max() >= 2 if len(levels) else False:
            chosen = full.set_index(_SETTING).index == levels.idxmax()
            setting = full[chosen].iloc[0]
            same = (group[_SETTING[1:]] == setting[_SETTING[1:]]).all(axis=1)
            parts.append(group[same])
    return pd.concat(parts)[_COLUMNS] if parts else pd.DataFrame(columns=_COLUMNS)


def plot_filtering(axis: Axes, table: pd.DataFrame) -> Axes:
    """Draw NDCG@10 (left axis) and time per epoch (right axis) of CCE against the threshold."""
    line = table[table["loss"] == "cce"].sort_values("filter_eps")
    places = np.arange(len(line))
    quality, cost = style.nominal_colors(["quality", "cost"]).values()
    axis.plot(places, line["ndcg_at_10"].to_numpy(float), "o-", color=quality, markersize=3)
    axis.set_xticks(places, [_threshold(value) for value in line["filter_eps"]], rotation=45)
    axis.tick_params(axis="y", labelcolor=quality)
    other = axis.twinx()
    other.plot(places, line[TIME].to_numpy(float), "s--", color=cost, markersize=3)
    other.tick_params(axis="y", labelcolor=cost)
    other.spines["right"].set_visible(True)
    other.grid(visible=False)
    other.set_ylim(bottom=0)
    return axis


def plot_filtering_scatter(axis: Axes, table: pd.DataFrame) -> Axes:
    """Draw NDCG@10 against time per epoch: CCE by threshold, CCE- by negatives."""
    full = table[table["loss"] == "cce"].dropna(subset=[TIME]).sort_values("filter_eps")
    sampled = table[table["loss"] == "cce_minus"].dropna(subset=[TIME])
    first, second = style.nominal_colors(["cce", "cce_minus"]).values()
    axis.plot(full[TIME], full["ndcg_at_10"], "o-", color=first, markersize=3, linewidth=0.7)
    axis.plot(sampled[TIME], sampled["ndcg_at_10"], "*", color=second, markersize=6)
    for eps, x, y in zip(full["filter_eps"], full[TIME], full["ndcg_at_10"], strict=True):
        _name_mark(axis, _threshold(eps), float(x), float(y))
    for negatives, x, y in zip(
        sampled["num_negatives"], sampled[TIME], sampled["ndcg_at_10"], strict=True
    ):
        _name_mark(axis, f"ns {negatives:g}", float(x), float(y))
    return axis


def filtering_figures(frame: pd.DataFrame) -> list[style.Drawing]:
    """Figures `filtering` (against the threshold) and `filtering_time` (beside CCE-)."""
    data = filtering_data(frame)
    datasets = list(dict.fromkeys(data["dataset"]))
    lacking = "No dataset has runs of cce at two or more values of filter_eps."
    drawings = []
    with style.look():
        figure, axes = style.facets(datasets, height=1.9)
        if not datasets:
            other, _ = style.facets(datasets)
            return [
                style.nothing("filtering", figure, data, lacking),
                style.nothing("filtering_time", other, data, lacking),
            ]
        for axis, dataset in zip(axes, datasets, strict=True):
            plot_filtering(axis, data[data["dataset"] == dataset])
        figure.supxlabel("Gradients below this are left out (filter_eps)", fontsize=8)
        figure.supylabel(f"{MEASURES['ndcg_at_10'].label} (○), {MEASURES[TIME].label} (□)",
                         fontsize=8)  # fmt: skip
        drawings.append(
            style.Drawing(
                "filtering", figure, data,
                "NDCG@10 (circles, left axis) and time per epoch (squares, right axis, from 0) of "
                "CCE by gradient filtering threshold.",
            )
        )  # fmt: skip
        figure, axes = style.facets(datasets, height=1.9)
        for axis, dataset in zip(axes, datasets, strict=True):
            plot_filtering_scatter(axis, data[data["dataset"] == dataset])
        figure.supxlabel(MEASURES[TIME].label, fontsize=8)
        figure.supylabel(MEASURES["ndcg_at_10"].label, fontsize=8)
        drawings.append(
            style.Drawing(
                "filtering_time", figure, data,
                "NDCG@10 against time per epoch: CCE (circles) by filtering threshold, CCE⁻ "
                "(stars) by number of negatives, at equal batch size and sequence length.",
            )
        )  # fmt: skip
    return drawings


def _threshold(eps: float) -> str:
    return "none" if eps == 0 else f"{eps:.0e}".replace("e-0", "e-")


def _name_mark(axis: Axes, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), (3, 3), textcoords="offset points", fontsize=5.5)
