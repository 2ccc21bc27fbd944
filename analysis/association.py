"""How strongly a parameter and a quality go together: rank correlation with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special, stats

from analysis.frame import (
    PARAMETERS,
    QUALITY,
    FullCatalog,
    numeric,
    parameter_frame,
    point_labels,
)

Floats = npt.NDArray[np.float64]

COLUMNS: tuple[str, ...] = (
    "dataset", "metric", "parameter", "coefficient", "low", "high", "p_value", "q_value", "n",
)  # fmt: skip
"""Columns of `associations.csv`."""
_MIN_POINTS = 4
"""With fewer points no rank correlation says anything: three points give 1 by chance in three."""
_CHUNK = 2_000_000
"""Elements of one block of resamples, to bound memory at about 100 MB."""


@dataclass(frozen=True)
class Association:
    """Rank correlation of one metric and one parameter on one dataset.

    Attributes
    ----------
    dataset, metric, parameter : str
    coefficient : float or None
        Spearman's rho; None where it is not defined.
    low, high : float or None
        BCa bootstrap interval.
    p_value : float or None
        Two-sided, of no association; points, not repeats of one, count as observations.
    q_value : float or None
        Smallest false discovery rate (Benjamini-Hochberg) at which it would be called.
    n : int
        Runs behind the coefficient.
    note : str
        Why there is no coefficient or no interval; empty otherwise.
    """

    dataset: str
    metric: str
    parameter: str
    coefficient: float | None
    low: float | None
    high: float | None
    p_value: float | None
    q_value: float | None
    n: int
    note: str = ""


@dataclass(frozen=True)
class Associations:
    """All rank correlations of one family, and how they were computed."""

    rows: tuple[Association, ...]
    full_catalog: FullCatalog
    """How runs over the full catalog entered the pairs with num_negatives."""
    resamples: int
    confidence: float

    @property
    def notes(self) -> tuple[str, ...]:
        """Distinct reasons why a number is missing."""
        return tuple(dict.fromkeys(row.note for row in self.rows if row.note))

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, with the columns of `associations.csv`."""
        return pd.DataFrame([row.__dict__ for row in self.rows], columns=list(COLUMNS))


def associations(
    frame: pd.DataFrame,
    *,
    metrics: Sequence[str] = QUALITY,
    parameters: Sequence[str] = PARAMETERS,
    full_catalog: FullCatalog = "paper",
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Associations:
    """Spearman correlation of metrics with parameters and their products, per dataset.

    Parameters
    ----------
    frame : DataFrame
        Finished, comparable runs (`analysis.frame`).
    metrics, parameters : sequence of str
        Columns; a product is written `a*b`.
    full_catalog : {"paper", "vocabulary", "drop"}
        What becomes of runs without a number of negatives.
    resamples : int
        Bootstrap resamples; whole points are drawn, with all their repeats and seeds.
    confidence : float
        Coverage of the intervals.
    seed : int
        Of the resampling.

    Raises
    ------
    AnalysisError
        An unknown parameter.

    References
    ----------
    .. [1] B. Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987), 171-185.
    .. [2] Y. Benjamini, Y. Hochberg, "Controlling the False Discovery Rate", JRSS B 57 (1995).
    """
    found: list[Association] = []
    for dataset, group in frame.groupby("dataset", sort=False):
        values = parameter_frame(group, full_catalog, parameters)
        measured = pd.DataFrame({name: numeric(group, name) for name in metrics})
        found += _dataset_associations(
            str(dataset), values, measured, point_labels(group).to_numpy(), resamples, confidence,
            seed,
        )  # fmt: skip
    return Associations(_with_q_values(found), full_catalog, resamples, confidence)


def bca_interval(
    estimate: float, resampled: Floats, jackknife: Floats, confidence: float
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval.

    Parameters
    ----------
    estimate : float
        Of the sample.
    resampled : ndarray, shape (resamples,)
        Of the bootstrap resamples; undefined ones (nan) are left out.
    jackknife : ndarray, shape (points,)
        Of the sample without each of its points.
    confidence : float

    Returns
    -------
    low, high : float
        nan where more than a twentieth of the resamples is undefined.
    """
    defined = resampled[np.isfinite(resampled)]
    if len(defined) < 0.95 * len(resampled) or not len(defined):
        return np.nan, np.nan
    if np.ptp(defined) < 1e-12:
        return float(defined.min()), float(defined.max())
    below = (np.mean(defined < estimate) + np.mean(defined <= estimate)) / 2
    bias = special.ndtri(below)
    spread = np.nanmean(jackknife) - jackknife[np.isfinite(jackknife)]
    scale = float(np.sum(spread**2)) ** 1.5
    acceleration = float(np.sum(spread**3)) / (6 * scale) if scale > 0 else 0.0
    tails = special.ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    shifted = bias + tails
    levels = special.ndtr(bias + shifted / (1 - acceleration * shifted))
    if not np.isfinite(levels).all():
        return np.nan, np.nan
    low, high = np.quantile(defined, levels)
    return float(low), float(high)


def rank_correlations(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Spearman correlation of x and y under every row of integer weights.

    A weighted sample is one in which observation i occurs `weights[i]` times, so that ranks
    (ties at their mean) follow from cumulated counts and no sample has to be built or sorted.

    Parameters
    ----------
    x, y : ndarray, shape (n,)
    weights : ndarray, shape (resamples, n)

    Returns
    -------
    ndarray, shape (resamples,)
        nan where x or y is constant in the resample.
    """
    rank_x, square_x = _weighted_ranks(x, weights)
    rank_y, square_y = _weighted_ranks(y, weights)
    product = np.einsum("rn,rn,rn->r", weights, rank_x, rank_y, optimize=False)
    scale = np.sqrt(square_x * square_y)
    out: Floats = np.full(len(scale), np.nan)
    np.divide(product, scale, out=out, where=scale > 0)
    return out


def point_weights(points: npt.NDArray[np.int64], resamples: int, seed: int) -> Floats:
    """How often each run occurs when whole points are drawn with replacement.

    Returns
    -------
    ndarray, shape (resamples, n)
    """
    codes = np.unique(points, return_inverse=True)[1]
    count = int(codes.max()) + 1
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    offsets = count * np.arange(resamples)[:, None]
    weights = np.bincount((drawn + offsets).ravel(), minlength=count * resamples)
    counts: Floats = weights.reshape(resamples, count)[:, codes].astype(float)
    return counts


def false_discovery_rates(p_values: Sequence[float | None]) -> list[float | None]:
    """Benjamini-Hochberg q-values over the defined p-values, in the same order."""
    defined = [value for value in p_values if value is not None]
    if not defined:
        return [None] * len(p_values)
    adjusted = iter(stats.false_discovery_control(defined, method="bh"))
    return [None if value is None else float(next(adjusted)) for value in p_values]


def _weighted_ranks(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Centred mean ranks, shape (resamples, n), and their weighted sums of squares."""
    levels, codes = np.unique(values, return_inverse=True)
    if len(levels) < len(values):
        totals = weights @ np.eye(len(levels))[codes]
    else:
        totals = weights[:, np.argsort(codes)]
    ranks = np.cumsum(totals, axis=1)
    size = ranks[:, -1:].copy()
    ranks -= (totals - 1) / 2 + (size + 1) / 2
    return ranks[:, codes], np.einsum("rg,rg,rg->r", totals, ranks, ranks)


def _dataset_associations(
    dataset: str,
    parameters: pd.DataFrame,
    metrics: pd.DataFrame,
    points: npt.NDArray[np.int64],
    resamples: int,
    confidence: float,
    seed: int,
) -> list[Association]:
    found = []
    for metric in map(str, metrics):
        for parameter in map(str, parameters):
            both = (metrics[metric].notna() & parameters[parameter].notna()).to_numpy()
            x = parameters[parameter].to_numpy(float)[both]
            y = metrics[metric].to_numpy(float)[both]
            found.append(
                _association(dataset, metric, parameter, x, y, points[both], resamples, confidence,
                             seed)
            )  # fmt: skip
    return found


def _association(
    dataset: str,
    metric: str,
    parameter: str,
    x: Floats,
    y: Floats,
    points: npt.NDArray[np.int64],
    resamples: int,
    confidence: float,
    seed: int,
) -> Association:
    count, num_points = len(x), len(np.unique(points))
    note = _reason(dataset, metric, parameter, x, y, num_points)
    if note:
        return Association(dataset, metric, parameter, None, None, None, None, None, count, note)
    coefficient = float(rank_correlations(x, y, np.ones((1, count)))[0])
    low, high = _interval(x, y, points, coefficient, resamples, confidence, seed)
    if not np.isfinite(low):
        note = f"{dataset}: no interval for {metric} and {parameter}, too few distinct values."
    return Association(
        dataset, metric, parameter, coefficient,
        low if np.isfinite(low) else None, high if np.isfinite(high) else None,
        _p_value(coefficient, num_points), None, count, note,
    )  # fmt: skip


def _reason(
    dataset: str, metric: str, parameter: str, x: Floats, y: Floats, num_points: int
) -> str:
    """Why no coefficient can be given, or nothing."""
    if not len(x):
        return f"{dataset}: no run has both {metric} and {parameter}."
    if num_points < _MIN_POINTS:
        return (
            f"{dataset}: {num_points} points are too few for a rank correlation; "
            f"{_MIN_POINTS} are needed."
        )
    if np.ptp(x) == 0:
        return f"{dataset}: {parameter} never varies (it is {x[0]:g} in all {len(x)} runs)."
    if np.ptp(y) == 0:
        return f"{dataset}: {metric} is constant ({y[0]:g} in all {len(y)} runs)."
    return ""


def _interval(
    x: Floats,
    y: Floats,
    points: npt.NDArray[np.int64],
    coefficient: float,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[float, float]:
    block = max(1, _CHUNK // len(x))
    weights = [
        point_weights(points, min(block, resamples - start), seed + start)
        for start in range(0, resamples, block)
    ]
    resampled = np.concatenate([rank_correlations(x, y, part) for part in weights])
    codes = np.unique(points, return_inverse=True)[1]
    labels = np.arange(codes.max() + 1)
    jackknife = np.concatenate(
        [
            rank_correlations(x, y, (codes != labels[start : start + block, None]).astype(float))
            for start in range(0, len(labels), block)
        ]
    )
    return bca_interval(coefficient, resampled, jackknife, confidence)


def _p_value(coefficient: float, count: int) -> float:
    """Two-sided p of rank correlation by Student's t, as scipy.stats.spearmanr has it."""
    if abs(coefficient) >= 1:
        return 0.0
    freedom = count - 2
    t = coefficient * np.sqrt(freedom / ((1 + coefficient) * (1 - coefficient)))
    return float(2 * stats.t.sf(abs(t), freedom))


def _with_q_values(rows: Sequence[Association]) -> tuple[Association, ...]:
    q_values = false_discovery_rates([row.p_value for row in rows])
    return tuple(
        Association(**{**row.__dict__, "q_value": q}) for row, q in zip(rows, q_values, strict=True)
    )
