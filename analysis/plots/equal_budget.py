"""The best quality of each loss at equal memory or equal time (the paper's reallocation)."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

from analysis.frame import MEMORY, numeric
from analysis.plots import style
from db.measures import MEASURES

_COLUMNS = ["batch_size", "max_seq_len", "num_negatives"]


@dataclass(frozen=True)
class EqualBudget:
    """Where the best of each loss changes as the budget grows.

    Attributes
    ----------
    steps : DataFrame
        One row per dataset, loss and budget at which a better run comes within reach: `dataset`,
        `loss`, `run_key`, the cost (which is the budget), the metric, `gain` over the best other
        loss within the same budget (missing where no other loss fits), and the settings.
    ends : dict of str to float
        Largest cost of any run, by dataset: up to there each loss keeps its last value.
    cost, metric : str
    note : str
        What is not drawn, and why.
    """

    steps: pd.DataFrame
    ends: dict[str, float]
    cost: str
    metric: str
    note: str


def equal_budget(
    frame: pd.DataFrame, *, cost: str = MEMORY, metric: str = "ndcg_at_10"
) -> EqualBudget:
    """Best run of each loss within every budget, by dataset.

    Parameters
    ----------
    frame : DataFrame
        Runs whose costs may be compared (`analysis.frame.same_memory`).
    cost, metric : str
        Measures; for equal time take `epoch_seconds` or `train_seconds`.

    References
    ----------
    "Faster and Memory-Efficient Training of Sequential Recommendation Models for Large Catalogs",
    section 5.3: memory saved by a loss is spent on batch size and sequence length.
    """
    table = frame.assign(**{name: numeric(frame, name) for name in (cost, metric)})
    known = table.dropna(subset=[cost, metric])
    better = MEASURES[metric].maximise
    steps, ends = [], {}
    for dataset, group in known.groupby("dataset", sort=False):
        ends[str(dataset)] = float(group[cost].max())
        for _, runs in group.groupby("loss", sort=False):
            ordered = runs.sort_values([cost, metric], ascending=[True, not better], kind="stable")
            signed = ordered[metric] if better else -ordered[metric]
            reached = signed.cummax().shift()
            steps.append(ordered[reached.isna() | (signed > reached)])
    kept = [name for name in _COLUMNS if name in known]
    columns = ["dataset", "loss", "run_key", cost, metric, *kept]
    found = pd.concat(steps, ignore_index=True)[columns] if steps else known[columns]
    found = found.assign(gain=_gains(found, cost, metric, better))
    missing = len(frame) - len(known)
    note = f"{missing} of {len(frame)} runs have no {cost} or {metric}." if missing else ""
    return EqualBudget(found, ends, cost, metric, note)


def _gains(steps: pd.DataFrame, cost: str, metric: str, better: bool) -> list[float]:
    """Relative advantage over the best other loss that the same budget allows."""
    gains = []
    for dataset, loss, budget, value in zip(
        steps["dataset"], steps["loss"], steps[cost], steps[metric], strict=True
    ):
        others = steps[
            (steps["dataset"] == dataset) & (steps["loss"] != loss) & (steps[cost] <= budget)
        ][metric]
        best = others.max() if better else others.min()
        known = len(others) > 0 and best != 0
        gains.append(float(value / best - 1) if known else float("nan"))
    return gains


def plot_equal_budget(
    axis: Axes, data: EqualBudget, dataset: str, colors: dict[str, tuple[float, float, float]]
) -> Axes:
    """Draw one dataset: a staircase per loss."""
    unit = MEASURES[data.cost].display_scale
    mine = data.steps[data.steps["dataset"] == dataset]
    for loss, group in mine.groupby("loss", sort=False):
        costs = [*(group[data.cost] / unit), data.ends[dataset] / unit]
        values = [*group[data.metric], group[data.metric].iloc[-1]]
        axis.step(costs, values, where="post", color=colors[str(loss)], linewidth=1.3)
        axis.plot(costs[:-1], values[:-1], "o", color=colors[str(loss)], markersize=2.2)
    style.log_if_wide(axis, pd.Series([*mine[data.cost], data.ends[dataset]]) / unit)
    return axis


def equal_budget_figure(data: EqualBudget) -> style.Drawing:
    """One panel per dataset, one color per loss."""
    name = f"equal_budget_{data.cost}_{data.metric}"
    datasets: Sequence[str] = list(data.ends)
    with style.look():
        figure, axes = style.facets(datasets, height=2.0)
        if not datasets:
            text = f"No run has both {data.cost} and {data.metric}. {data.note}".strip()
            return style.nothing(name, figure, data.steps, text)
        losses = list(dict.fromkeys(data.steps["loss"]))
        colors = style.nominal_colors(losses)
        for axis, dataset in zip(axes, datasets, strict=True):
            plot_equal_budget(axis, data, dataset, colors)
        figure.supxlabel(f"budget: {MEASURES[data.cost].label}", fontsize=8)
        figure.supylabel(f"best {MEASURES[data.metric].label}", fontsize=8)
        handles = [
            style.handle("o", colors[loss], label=style.FAMILY_LABELS.get(loss, loss))
            for loss in losses
        ]
        figure.legend(handles=handles, loc="outside right upper")
    return style.Drawing(name, figure, data.steps, _caption(data))


def _caption(data: EqualBudget) -> str:
    text = (
        f"Best {MEASURES[data.metric].label} of each loss among its runs that cost no more than a "
        f"budget of {MEASURES[data.cost].label}. A staircase rises where a better run comes within "
        "reach; it depends on which settings were run for each loss."
    )
    return f"{text} {data.note}".strip()
