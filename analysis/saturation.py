"""From which memory on more of it buys no more quality."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.association import point_weights
from analysis.frame import MEMORY, numeric, point_labels

Floats = npt.NDArray[np.float64]
TOLERANCE = 0.01
"""Within one percent of the best counts as the best: less is lost in the noise of one seed."""
_MIN_POINTS = 8
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Saturation:
    """Where the best quality within a budget stops growing.

    Attributes
    ----------
    dataset : str
    point : float
        Least cost at which the best run is within the tolerance of the best of all.
    point_low, point_high : float
        95 % bootstrap percentile interval over points.
    gain : float
        Relative gain of the best run by the last doubling of the cost.
    gain_low, gain_high : float
    largest_cost : float
    n : int
    """

    dataset: str
    point: float
    point_low: float
    point_high: float
    gain: float
    gain_low: float
    gain_high: float
    largest_cost: float
    n: int


def saturations(
    frame: pd.DataFrame,
    *,
    cost: str = MEMORY,
    metric: str = "ndcg_at_10",
    resamples: int = 2_000,
    seed: int = 0,
) -> list[Saturation]:
    """Saturation point and gain of the last doubling, per dataset with enough points.

    Parameters
    ----------
    frame : DataFrame
        Runs of one device class and memory source per dataset.
    cost, metric : str
        Measures; of the metric more is better.
    resamples, seed : int
        Of the bootstrap, which draws whole points. The best of a resample can only be as good as
        the best of all, so the interval of the point reaches down further than up.
    """
    found = []
    for dataset, group in frame.groupby("dataset", sort=False):
        table = pd.DataFrame({"cost": numeric(group, cost), "quality": numeric(group, metric)})
        table["point"] = point_labels(group)
        table = table.dropna().sort_values("cost", kind="stable")
        if table["point"].nunique() < _MIN_POINTS or table["quality"].max() <= 0:
            continue
        costs = table["cost"].to_numpy(float)
        quality = table["quality"].to_numpy(float)
        point, gain = _curve_summary(costs, quality, np.ones((1, len(costs))))
        points, gains = _resampled(costs, quality, table["point"].to_numpy(), resamples, seed)
        low, high = np.nanquantile(points, [0.025, 0.975])
        gain_low, gain_high = np.nanquantile(gains, [0.025, 0.975])
        found.append(
            Saturation(
                str(dataset), float(point[0]), float(low), float(high), float(gain[0]),
                float(gain_low), float(gain_high), float(costs[-1]), len(table),
            )
        )  # fmt: skip
    return found


def saturation_frame(found: list[Saturation]) -> pd.DataFrame:
    """One row per dataset."""
    return pd.DataFrame(
        [item.__dict__ for item in found], columns=list(Saturation.__dataclass_fields__)
    )


def _resampled(
    costs: Floats, quality: Floats, points: npt.NDArray[np.int64], resamples: int, seed: int
) -> tuple[Floats, Floats]:
    block = max(1, _BLOCK // len(costs))
    parts = [
        _curve_summary(
            costs, quality, point_weights(points, min(block, resamples - start), seed + start)
        )
        for start in range(0, resamples, block)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _curve_summary(costs: Floats, quality: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Saturation point and gain of the last doubling under each row of weights."""
    best = np.maximum.accumulate(np.where(weights > 0, quality, -np.inf), axis=1)
    most = best[:, -1]
    reached = best >= (1 - TOLERANCE) * most[:, None]
    point = costs[np.argmax(reached, axis=1)]
    drawn = np.where(weights > 0, costs, -np.inf).max(axis=1)
    half = np.searchsorted(costs, drawn / 2, side="right") - 1
    before = np.where(half >= 0, best[np.arange(len(best)), np.maximum(half, 0)], np.nan)
    before = np.where(np.isfinite(before) & (before > 0), before, np.nan)
    return point, most / before - 1
