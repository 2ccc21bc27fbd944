"""What a unit of memory or time buys: fronts, hypervolume, budgets, marginal gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.frame import MEMORY, numeric, point_labels, records
from db.errors import AnalysisError
from db.measures import MEASURES

Floats = npt.NDArray[np.float64]
DEFAULT_OBJECTIVES: tuple[str, ...] = (MEMORY, "ndcg_at_10")


@dataclass(frozen=True)
class Front:
    """Runs that no other run beats in every objective.

    Attributes
    ----------
    dataset : str
    objectives : tuple of str
        Measures; each knows by itself whether more is better.
    runs : DataFrame
        The front, ordered by the first objective: one row for each distinct point.
    hypervolume : float
        Share of the box between the reference point and the best value of each objective that
        the front dominates; the reference is the worst value among all runs.
    num_runs : int
        Runs with all objectives.
    """

    dataset: str
    objectives: tuple[str, ...]
    runs: pd.DataFrame
    hypervolume: float
    num_runs: int

    def to_frame(self) -> pd.DataFrame:
        """Columns dataset, run_key and the objectives."""
        return self.runs[["dataset", "run_key", *self.objectives]].reset_index(drop=True)


@dataclass(frozen=True)
class Bound:
    """A run that did not fit: its true memory lies above the bound (right-censored)."""

    dataset: str
    run_key: str
    device_class: str
    memory_bound_bytes: float | None
    batch_size: int
    max_seq_len: int
    num_negatives: int | None


def pareto_fronts(
    frame: pd.DataFrame, objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> list[Front]:
    """Pareto front of two or three measures on every dataset.

    Parameters
    ----------
    frame : DataFrame
        Finished runs of one device class and memory source per dataset (`frame.same_memory`).
    objectives : sequence of str
        Two or three of `db.measures.MEASURES`.

    Raises
    ------
    AnalysisError
        Not two or three objectives, or an unknown one.
    """
    signs = _signs(objectives)
    fronts = []
    for dataset, group in frame.groupby("dataset", sort=False):
        values = pd.DataFrame({name: numeric(group, name) for name in objectives}).dropna()
        if values.empty:
            continue
        losses = values.to_numpy(float) * signs
        chosen = moocore.is_nondominated(losses, keep_weakly=False)
        runs = group.loc[values.index[chosen]].copy()
        runs[list(objectives)] = values.loc[runs.index]
        runs = runs.sort_values([objectives[0], "run_key"], kind="stable")
        volume = hypervolume_share(losses)
        fronts.append(Front(str(dataset), tuple(objectives), runs, volume, len(values)))
    return fronts


def hypervolume_share(losses: Floats, reference: Floats | None = None) -> float:
    """Share of the box from the ideal to the reference point that the points dominate.

    Parameters
    ----------
    losses : ndarray, shape (runs, objectives)
        Less is better in every column.
    reference : ndarray, shape (objectives,), optional
        By default the worst value of every column, so that the worst runs add nothing.

    Returns
    -------
    float
        Between 0 and 1; 1 where one run is best in everything, also where nothing varies.

    References
    ----------
    .. [1] A. P. Guerreiro, C. M. Fonseca, L. Paquete, "The Hypervolume Indicator",
       ACM Computing Surveys 54 (2021), arXiv:2005.00515.
    """
    best = losses.min(axis=0)
    worst = losses.max(axis=0) if reference is None else reference
    span = worst - best
    varying = span > 0
    if not varying.any():
        return 1.0
    scaled = (losses[:, varying] - best[varying]) / span[varying]
    if scaled.shape[1] == 1:
        return float(1.0 - scaled.min())
    return float(moocore.hypervolume(scaled, ref=np.ones(scaled.shape[1])))


def hypervolume_by_seed(frame: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """Hypervolume of each seed's runs against the box of all seeds.

    Returns
    -------
    DataFrame
        Columns dataset, seed, hypervolume, num_runs; with one seed there is no spread to see.
    """
    signs = _signs(objectives)
    rows = []
    for dataset, group in frame.groupby("dataset", sort=False):
        values = pd.DataFrame({name: numeric(group, name) for name in objectives}).dropna()
        if values.empty:
            continue
        losses = values.to_numpy(float) * signs
        seeds = group.loc[values.index, "seed"].to_numpy()
        low, span = losses.min(axis=0), np.ptp(losses, axis=0)
        scaled = (losses - low) / np.where(span > 0, span, 1.0)
        for seed in np.unique(seeds):
            part = scaled[seeds == seed]
            volume = float(moocore.hypervolume(part, ref=np.ones(scaled.shape[1])))
            rows.append((dataset, int(seed), volume, len(part)))
    return pd.DataFrame(rows, columns=["dataset", "seed", "hypervolume", "num_runs"])


def attainment(
    frame: pd.DataFrame, objectives: Sequence[str], percentiles: Sequence[float] = (0, 50, 100)
) -> pd.DataFrame:
    """Empirical attainment surfaces over the seeds: what best, half and all seeds reach.

    Returns
    -------
    DataFrame
        Columns dataset, percentile and the objectives; no rows for a dataset with one seed.

    References
    ----------
    .. [1] C. M. Fonseca, V. Grunert da Fonseca, L. Paquete, "Exploring the Performance of
       Stochastic Multiobjective Optimisers with the Second-Order Attainment Function", EMO 2005.
    """
    signs = _signs(objectives)
    tables = []
    for dataset, group in frame.groupby("dataset", sort=False):
        values = pd.DataFrame({name: numeric(group, name) for name in objectives}).dropna()
        seeds = group.loc[values.index, "seed"].to_numpy()
        if len(np.unique(seeds)) < 2:
            continue
        order = np.argsort(seeds, kind="stable")
        losses = values.to_numpy(float)[order] * signs
        surface = moocore.eaf(losses, sets=seeds[order], percentiles=list(percentiles))
        table = pd.DataFrame(surface[:, :-1] * signs, columns=list(objectives))
        table.insert(0, "percentile", surface[:, -1])
        table.insert(0, "dataset", dataset)
        tables.append(table)
    if not tables:
        return pd.DataFrame(columns=["dataset", "percentile", *objectives])
    return pd.concat(tables, ignore_index=True)


def best_under_budget(
    frame: pd.DataFrame,
    budgets: Mapping[str, Sequence[float]] | None = None,
    *,
    cost: str = MEMORY,
    metric: str = "ndcg_at_10",
) -> pd.DataFrame:
    """Best run of each dataset that costs no more than a budget.

    Parameters
    ----------
    frame : DataFrame
    budgets : mapping of dataset to sequence of float, optional
        In the unit of `cost`; by default the costs of the front, at which the answer changes.
    cost, metric : str
        Measures.

    Returns
    -------
    DataFrame
        Columns dataset, budget, run_key, the factors, loss, cost and metric, num_runs; a budget
        that no run keeps has no row.
    """
    rows = []
    for dataset, group in frame.groupby("dataset", sort=False):
        table = group.assign(**{name: numeric(group, name) for name in (cost, metric)})
        table = table.dropna(subset=[cost, metric])
        if table.empty:
            continue
        steps = (budgets or {}).get(str(dataset)) or _front_costs(table, cost, metric)
        for budget in steps:
            within = table[table[cost] <= budget]
            if within.empty:
                continue
            best = _best(within, metric)
            rows.append(
                {
                    "dataset": dataset,
                    "budget": float(budget),
                    **{name: best[name] for name in _SHOWN if name in best},
                    cost: best[cost],
                    metric: best[metric],
                    "num_runs": len(within),
                }
            )
    return pd.DataFrame(rows)


def marginal_gains(
    frame: pd.DataFrame, *, cost: str = MEMORY, metric: str = "ndcg_at_10"
) -> pd.DataFrame:
    """What each further unit of cost buys along the front of two measures.

    Returns
    -------
    DataFrame
        Columns dataset, cost_from, cost_to, gain, gain_per_unit: the metric gained per GiB (or
        per display unit of the cost) from one point of the front to the next.
    """
    unit = MEASURES[cost].display_scale
    rows = []
    for front in pareto_fronts(frame, (cost, metric)):
        table = front.to_frame()
        for before, after in zip(table.itertuples(), table.iloc[1:].itertuples(), strict=False):
            gain = getattr(after, metric) - getattr(before, metric)
            extra = (getattr(after, cost) - getattr(before, cost)) / unit
            rows.append(
                (front.dataset, getattr(before, cost), getattr(after, cost), gain, gain / extra)
            )
    return pd.DataFrame(rows, columns=["dataset", "cost_from", "cost_to", "gain", "gain_per_unit"])


def memory_bounds(infeasible: pd.DataFrame) -> list[Bound]:
    """Runs that ran out of memory or were skipped for it, each with what it at least needs."""
    bounds = []
    for row in records(infeasible):
        bound = row.get("memory_bound_bytes")
        negatives = row.get("num_negatives")
        bounds.append(
            Bound(
                str(row["dataset"]),
                str(row["run_key"]),
                str(row.get("device_class") or "unknown"),
                None if bound is None or pd.isna(bound) else float(bound),
                int(row["batch_size"]),
                int(row["max_seq_len"]),
                None if negatives is None or pd.isna(negatives) else int(negatives),
            )
        )
    return bounds


_SHOWN = ("run_key", "loss", "batch_size", "max_seq_len", "num_negatives", "seed")


def _signs(objectives: Sequence[str]) -> Floats:
    """-1 for what is to be maximised, so that less is better in every column."""
    if not 2 <= len(objectives) <= 3 or len(set(objectives)) < len(objectives):
        raise AnalysisError(
            f"{len(objectives)} objectives {', '.join(objectives)}; a front takes two or three "
            "different ones"
        )
    for name in objectives:
        if name not in MEASURES:
            raise AnalysisError(
                f"objective {name!r} is no measure; known are {', '.join(sorted(MEASURES))}"
            )
    return np.array([-1.0 if MEASURES[name].maximise else 1.0 for name in objectives])


def _front_costs(table: pd.DataFrame, cost: str, metric: str) -> list[float]:
    fronts = pareto_fronts(table, (cost, metric))
    return [float(value) for value in fronts[0].runs[cost]]


def _best(table: pd.DataFrame, metric: str) -> pd.Series:
    ascending = not MEASURES[metric].maximise
    return table.sort_values([metric, "run_key"], ascending=[ascending, True], kind="stable").iloc[
        0
    ]


def distinct_points(frame: pd.DataFrame) -> int:
    """Number of distinct points (settings but for seed and repeat) among the runs."""
    return int(point_labels(frame).nunique())
