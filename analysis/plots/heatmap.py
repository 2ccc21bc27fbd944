"""Rank correlations of parameters and qualities (the paper's Fig. 7a)."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize

from analysis.association import Associations
from analysis.frame import SHORT_NAMES, records
from analysis.plots import style
from db.measures import MEASURES

Floats = npt.NDArray[np.float64]
_CAPTION = {
    "paper": "full-catalog runs are left out of pairs with ns",
    "vocabulary": "full-catalog runs count as ns = catalog size",
    "drop": "full-catalog runs are left out",
}


def plot_heatmap(axis: Axes, table: pd.DataFrame, level: float = 0.05) -> Axes:
    """Draw one dataset: a cell per metric and parameter, pale where not significant.

    Parameters
    ----------
    axis : Axes
    table : DataFrame
        Rows of `associations.csv` of one dataset.
    level : float
        False discovery rate above which a cell is pale and its number in grey italics.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    parameters = list(dict.fromkeys(table["parameter"]))
    cells = table.pivot(index="metric", columns="parameter", values="coefficient")
    cells = cells.loc[metrics, parameters].astype(float)
    quiet_cells = table.pivot(index="metric", columns="parameter", values="q_value")
    quiet_cells = quiet_cells.loc[metrics, parameters].astype(float) > level
    axis.imshow(_cell_colors(cells.to_numpy(float), quiet_cells.to_numpy(bool)), aspect="auto")
    for row in records(table):
        x, y = parameters.index(row["parameter"]), metrics.index(row["metric"])
        value = row["coefficient"]
        missing = value is None or np.isnan(value)
        quiet = missing or row["q_value"] > level
        color = "#666666" if quiet else ("white" if abs(value) > 0.62 else "#111111")
        axis.text(
            x, y, "–" if missing else f"{value:.2f}".replace("-", "−"), ha="center", va="center",
            fontsize=6.2, color=color, fontstyle="italic" if quiet else "normal",
        )  # fmt: skip
    axis.set_xticks(range(len(parameters)), [SHORT_NAMES.get(name, name) for name in parameters])
    axis.set_yticks(range(len(metrics)), [MEASURES[name].label for name in metrics])
    axis.grid(visible=False)
    axis.tick_params(length=0)
    return axis


def heatmap_figure(found: Associations) -> style.Drawing:
    """One panel per dataset."""
    data = found.to_frame()
    name = "associations_heatmap"
    defined = data.dropna(subset=["coefficient"])
    with style.look():
        datasets = list(dict.fromkeys(defined["dataset"]))
        figure, axes = style.facets(datasets, columns=2, height=1.15)
        if not datasets:
            text = " ".join(found.notes) or "No runs, so no associations."
            return style.nothing(name, figure, data, text)
        for number, (axis, dataset) in enumerate(zip(axes, datasets, strict=True)):
            plot_heatmap(axis, data[data["dataset"] == dataset])
            if number % 2:
                axis.set_yticklabels([])
        colors = ScalarMappable(Normalize(-1, 1), _palette())
        figure.colorbar(colors, ax=axes, label="Spearman", shrink=0.6, aspect=30)
    caption = (
        "Spearman correlation of parameters and their products with each quality; "
        f"{_CAPTION[found.full_catalog]}. Pale cells in italics: q > 0.05 (Benjamini-Hochberg over "
        f"{len(defined)} tests)."
    )
    return style.Drawing(name, figure, data, " ".join([caption, *found.notes]))


def _cell_colors(values: Floats, quiet: npt.NDArray[np.bool_]) -> Floats:
    """Colors of the cells, shape (metrics, parameters, 3); white where there is no value."""
    colors: Floats = _palette()(Normalize(-1, 1)(np.nan_to_num(values)))[..., :3]
    colors = np.where(quiet[..., None], 1 - 0.25 * (1 - colors), colors)
    return np.where(np.isnan(values)[..., None], 1.0, colors)


def _palette() -> Colormap:
    palette: Colormap = sns.color_palette("vlag", as_cmap=True)
    return palette
