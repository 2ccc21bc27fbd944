"""The losses at their best: quality, time and memory side by side (the paper's Fig. 1)."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.frame import MEMORY, TIME, numeric, records, trainings
from analysis.plots import style
from db.measures import MEASURES

SHOWN: tuple[str, ...] = ("ndcg_at_10", TIME, MEMORY)
_POINT = ["dataset", "model", "loss", "batch_size", "max_seq_len", "num_negatives",
          "negative_sampler", "filter_eps", "filter_mode", "training"]  # fmt: skip


def losses_data(frame: pd.DataFrame) -> pd.DataFrame:
    """The best point of every loss on every dataset, by its mean NDCG@10 over seeds.

    Parameters
    ----------
    frame : DataFrame
        Finished runs of one device class and memory source per dataset.

    Returns
    -------
    DataFrame
        Columns dataset, loss, the settings of the point, NDCG@10, epoch_seconds and peak memory
        (means over the point's runs), num_runs. The best of many points is flattered by chance,
        the more the more points there are: `num_points` tells how many it was picked from.
    """
    table = frame.assign(training=trainings(frame))
    names = [name for name in _POINT if name in table]
    table = table.assign(**{name: numeric(frame, name) for name in SHOWN})
    table = table.dropna(subset=["ndcg_at_10"])
    grouped = table.groupby(names, dropna=False, sort=False)
    points = grouped.agg(
        **{name: (name, "mean") for name in SHOWN}, num_runs=("ndcg_at_10", "size")
    ).reset_index()
    counts = points.groupby(["dataset", "loss"], sort=False)["ndcg_at_10"].transform("size")
    points = points.assign(num_points=counts)
    order = points["ndcg_at_10"].sort_values(ascending=False, kind="stable").index
    best = points.loc[order].drop_duplicates(["dataset", "loss"])
    rank = {loss: place for place, loss in enumerate(style.FAMILY_LABELS)}
    datasets = {name: place for place, name in enumerate(dict.fromkeys(frame["dataset"]))}
    return best.sort_values(
        ["dataset", "loss"], key=lambda column: column.map({**rank, **datasets}), kind="stable"
    ).reset_index(drop=True)


def plot_losses(
    axis: Axes, table: pd.DataFrame, measure: str, colors: dict[str, style.Color]
) -> Axes:
    """Draw one measure of one dataset, a bar for each loss with its value on top."""
    values = table[measure] / MEASURES[measure].display_scale
    labels = [style.FAMILY_LABELS.get(loss, loss) for loss in table["loss"]]
    bars = axis.bar(range(len(table)), values, 0.75, color=[colors[loss] for loss in table["loss"]])
    axis.bar_label(
        bars,
        [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values],
        fontsize=5.5,
        padding=1,
    )
    axis.set_xticks(range(len(table)), labels)
    axis.margins(y=0.15)
    axis.grid(visible=False, axis="x")
    return axis


def losses_figure(frame: pd.DataFrame) -> style.Drawing:
    """One row of panels per measure, one column per dataset with several losses."""
    data = losses_data(frame)
    name = "losses"
    with style.look():
        counts = data.groupby("dataset", sort=False)["loss"].nunique()
        datasets = [str(dataset) for dataset in counts[counts > 1].index]
        if not datasets:
            there = ", ".join(sorted(set(data["loss"]))) or "none"
            figure, _ = style.facets([""])
            text = f"Losses are compared where a dataset has runs of several; here: {there}."
            return style.nothing(name, figure, data, text)
        colors: dict[str, style.Color] = dict(
            style.nominal_colors(list(dict.fromkeys(data["loss"])))
        )
        figure, grid = _grid(datasets)
        for column, dataset in enumerate(datasets):
            rows = data[data["dataset"] == dataset]
            for place, measure in enumerate(SHOWN):
                plot_losses(grid[place][column], rows.dropna(subset=[measure]), measure, colors)
    parts = [
        f"{row['dataset']} {row['loss']} bs {row['batch_size']:g} sl {row['max_seq_len']:g}"
        + ("" if pd.isna(row["num_negatives"]) else f" ns {row['num_negatives']:g}")
        + f" (best of {row['num_points']} points)"
        for row in records(data[data["dataset"].isin(datasets)])
    ]
    return style.Drawing(
        name, figure, data,
        "Every loss at its point with the best mean NDCG@10: quality, time per epoch and peak "
        f"training memory. {'; '.join(parts)}.",
    )  # fmt: skip


def _grid(datasets: Sequence[str]) -> tuple[Figure, list[list[Axes]]]:
    """Panels by measure and dataset; a single dataset has its measures in a row."""
    single = len(datasets) == 1
    shape = (1, len(SHOWN)) if single else (len(SHOWN), len(datasets))
    size = (style.PAGE_WIDTH, 2.0 if single else 1.5 * shape[0] + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(*shape, number + 1) for number in range(shape[0] * shape[1])]
    rows = [
        axes[place * len(datasets) : (place + 1) * len(datasets)] for place in range(len(SHOWN))
    ]
    for panels, measure in zip(rows, SHOWN, strict=True):
        panels[0].set_ylabel(MEASURES[measure].label, fontsize=7)
    for axis, dataset in zip(rows[0], datasets, strict=True):
        axis.set_title(dataset)
    return figure, rows
