"""Importances of the parameters, averaged over the datasets (the paper's Fig. 7b)."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.frame import PARAMETERS, SHORT_NAMES
from analysis.importance import Importances, Method
from analysis.plots import style
from db.measures import MEASURES

_AXIS = {
    "impurity": "Share of impurity decrease",
    "permutation": "Loss of out-of-sample R²",
    "permutation_grouped": "Loss of out-of-sample R²",
    "fanova": "Share of variance",
    "ped_anova": "Share of divergence",
}


def plot_importances(axis: Axes, table: pd.DataFrame, colors: dict[str, style.Color]) -> Axes:
    """Draw one group of bars per parameter, one bar per metric; grey where nothing predicts.

    Parameters
    ----------
    axis : Axes
    table : DataFrame
        Rows of `importances.csv` of one dataset (or `mean`) and one method.
    colors : dict of str to color
        Of each metric.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    parameters = [name for name in PARAMETERS if name in set(table["parameter"])]
    width = 0.8 / len(metrics)
    for number, metric in enumerate(metrics):
        rows = table[table["metric"] == metric].set_index("parameter").loc[parameters]
        places = np.arange(len(parameters)) + (number - (len(metrics) - 1) / 2) * width
        predicts = bool((rows["score_out_of_sample"].fillna(-1) > 0).all())
        heights = rows["importance"].to_numpy(float)
        reach = np.abs(rows[["low", "high"]].astype(float).to_numpy().T - heights)
        axis.bar(
            places, heights, width, color=colors[metric] if predicts else "#d5d5d5",
            hatch=None if predicts else "////", edgecolor="white" if predicts else "#9a9a9a",
            linewidth=0.3,
        )  # fmt: skip
        axis.errorbar(
            places, heights, yerr=np.nan_to_num(reach), fmt="none", ecolor="#333333",
            elinewidth=0.6,
        )  # fmt: skip
    axis.set_xticks(range(len(parameters)), [SHORT_NAMES[name] for name in parameters])
    axis.grid(visible=False, axis="x")
    return axis


def importances_figure(found: Importances, method: Method = "impurity") -> style.Drawing:
    """One panel per dataset and one for their mean."""
    data = found.to_frame()
    data = data[data["method"] == method]
    name = f"importances_{method}"
    with style.look():
        datasets = sorted(set(data["dataset"]), key=lambda item: (item != "mean", item))
        if len(datasets) == 2:
            datasets.remove("mean")
        figure, axes = style.facets(datasets, columns=2, height=1.6)
        if not datasets:
            text = " ".join(found.notes) or "No runs, so no importances."
            return style.nothing(name, figure, data, text)
        metrics = list(dict.fromkeys(data["metric"]))
        colors: dict[str, style.Color] = dict(style.nominal_colors(metrics))
        for axis, dataset in zip(axes, datasets, strict=True):
            rows = data[data["dataset"] == dataset]
            plot_importances(axis, rows, colors)
            axis.set_title(f"{dataset}  ({_scores(rows)})", fontsize=7)
        figure.supylabel(_AXIS[method], fontsize=8)
        handles = [
            style.handle("s", color, label=MEASURES[key].label) for key, color in colors.items()
        ]
        handles.append(style.handle("s", "#d5d5d5", label="model does not predict"))
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles) if len(datasets) > 1 else 2,
        )
    return style.Drawing(
        name, figure, data,
        f"{_AXIS[method]} ({method}); in brackets the forest's R² on unseen points. Hatched grey: "
        "the model behind the number does not predict, so the number means nothing. "
        + " ".join(found.notes),
    )  # fmt: skip


def _scores(rows: pd.DataFrame) -> str:
    scores = rows.drop_duplicates("metric").set_index("metric")["score_out_of_sample"]
    return ", ".join(
        f"{MEASURES[metric].label[0]} {value:.2f}".replace("-", "−")
        for metric, value in zip(scores.index.astype(str), scores.to_numpy(float), strict=True)
    )
