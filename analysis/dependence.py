"""Beside rank correlation: mutual information, and a linear model on standardised parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.feature_selection import mutual_info_regression

from analysis.association import point_weights
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
    "dataset", "metric", "parameter", "mutual_information", "coefficient", "low", "high",
    "r2_in_sample", "n",
)  # fmt: skip
"""Columns of `dependence.csv`."""
MIN_POINTS = 10
"""Fewer points than parameters and a few to spare determine no linear model."""
_NEIGHBORS = 3


@dataclass(frozen=True)
class Dependence:
    """What two further models say of one metric and one parameter on one dataset.

    Attributes
    ----------
    dataset, metric, parameter : str
    mutual_information : float
        In nats, of the metric and this parameter alone; also sees what is not monotone.
    coefficient : float
        Standard deviations of the metric per standard deviation of the parameter with all others
        held, in a linear model of all of them. Products are collinear with their factors, so
        that signs may flip from one dataset to the next: read it with its interval.
    low, high : float
        95 % bootstrap percentile interval over points.
    r2_in_sample : float
        Of the linear model.
    n : int
    """

    dataset: str
    metric: str
    parameter: str
    mutual_information: float
    coefficient: float
    low: float
    high: float
    r2_in_sample: float
    n: int


@dataclass(frozen=True)
class Dependences:
    """All pairs, and why some are missing."""

    rows: tuple[Dependence, ...]
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, with the columns of `dependence.csv`."""
        return pd.DataFrame([row.__dict__ for row in self.rows], columns=list(COLUMNS))


def dependences(
    frame: pd.DataFrame,
    *,
    metrics: Sequence[str] = QUALITY,
    parameters: Sequence[str] = PARAMETERS,
    full_catalog: FullCatalog = "paper",
    resamples: int = 1_000,
    seed: int = 42,
) -> Dependences:
    """Mutual information and linear coefficients of every metric and parameter, per dataset.

    Parameters
    ----------
    frame : DataFrame
        Finished, comparable runs (`analysis.frame`).
    metrics, parameters : sequence of str
        Columns; a product is written `a*b`. Parameters that never vary are left out.
    full_catalog : {"paper", "vocabulary", "drop"}
        `paper` and `drop` both leave full-catalog runs out: the model needs every parameter.
    resamples : int
        Bootstrap resamples of the coefficients; whole points are drawn.
    seed : int
        Of the resampling, and of the noise that breaks ties for the mutual information.

    References
    ----------
    .. [1] A. Kraskov, H. Stoegbauer, P. Grassberger, "Estimating Mutual Information",
       Phys. Rev. E 69 (2004), arXiv:cond-mat/0305641.
    """
    rows: list[Dependence] = []
    notes: list[str] = []
    for dataset, group in frame.groupby("dataset", sort=False):
        values = parameter_frame(group, full_catalog, parameters)
        points = point_labels(group).to_numpy()
        for metric in metrics:
            target = numeric(group, metric)
            used = (values.notna().all(axis=1) & target.notna()).to_numpy()
            x, y = values.to_numpy(float)[used], target.to_numpy(float)[used]
            count = len(np.unique(points[used]))
            if count < MIN_POINTS or np.ptp(y) == 0:
                notes.append(
                    f"{dataset}: no mutual information and linear model of {metric}: "
                    + (f"{count} points are too few, {MIN_POINTS} are needed."
                       if count < MIN_POINTS else f"it is constant ({y[0]:g}).")
                )  # fmt: skip
                continue
            rows += _pairs(str(dataset), metric, tuple(parameters), x, y, points[used],
                           resamples, seed)  # fmt: skip
    return Dependences(tuple(rows), tuple(notes))


def standardised_coefficients(x: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Least-squares coefficients between standardised columns under each row of weights.

    Parameters
    ----------
    x : ndarray, shape (n, p)
    y : ndarray, shape (n,)
    weights : ndarray, shape (resamples, n)

    Returns
    -------
    coefficients : ndarray, shape (resamples, p)
        Of minimum norm where columns are collinear or constant in a resample.
    r2 : ndarray, shape (resamples,)
    """
    total = weights.sum(axis=1, keepdims=True)
    columns = np.column_stack([x, y])
    # centring and scaling first keeps the moments of counts and their products apart
    columns = (columns - columns.mean(axis=0)) / np.where(np.ptp(columns, axis=0) > 0,
                                                          columns.std(axis=0), 1.0)  # fmt: skip
    means = weights @ columns / total
    moments = np.einsum("rn,ni,nj->rij", weights, columns, columns, optimize=True) / total[:, None]
    covariance = moments - means[:, :, None] * means[:, None, :]
    scale = np.sqrt(np.clip(np.einsum("rii->ri", covariance), 0, None))
    safe = np.where(scale > 1e-9, scale, np.inf)
    correlation = covariance / safe[:, :, None] / safe[:, None, :]
    inside, across = correlation[:, :-1, :-1], correlation[:, :-1, -1]
    inverse = np.linalg.pinv(inside, rcond=1e-10, hermitian=True)
    coefficients: Floats = np.einsum("rij,rj->ri", inverse, across)
    return coefficients, np.einsum("ri,ri->r", coefficients, across)


def _pairs(
    dataset: str,
    metric: str,
    names: tuple[str, ...],
    x: Floats,
    y: Floats,
    points: npt.NDArray[np.int64],
    resamples: int,
    seed: int,
) -> list[Dependence]:
    varying = np.ptp(x, axis=0) > 0
    x, names = x[:, varying], tuple(np.array(names)[varying])
    shared = mutual_info_regression(x, y, n_neighbors=_NEIGHBORS, random_state=seed)
    coefficients, r2 = standardised_coefficients(x, y, np.ones((1, len(y))))
    drawn, _ = standardised_coefficients(x, y, point_weights(points, resamples, seed))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [
        Dependence(
            dataset, metric, str(name), float(shared[place]), float(coefficients[0, place]),
            float(low[place]), float(high[place]), float(r2[0]), len(y),
        )
        for place, name in enumerate(names)
    ]  # fmt: skip
