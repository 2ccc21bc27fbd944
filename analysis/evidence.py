"""Verdicts from numbers: matched comparisons, their intervals, and what they decide."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.association import bca_interval
from analysis.frame import numeric

Floats = npt.NDArray[np.float64]
Verdict = Literal["supported", "contradicted", "undecidable"]
VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "undecidable")
MIN_COMPARISONS = 4
"""With fewer matched comparisons an interval would be a guess."""


@dataclass(frozen=True)
class Finding:
    """Verdict on one claim for one dataset.

    Attributes
    ----------
    claim : int
        Number in `analysis.findings.CLAIMS`.
    dataset : str
        A dataset, or `all` for a claim about several.
    verdict : {"supported", "contradicted", "undecidable"}
    value, low, high : float or None
        The claim's measure with its 95 % interval.
    n : int
        Runs behind it.
    reason : str
        Why the verdict is this one.
    run_keys : tuple of str
        The runs behind it.
    """

    claim: int
    dataset: str
    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str
    run_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and the runs behind it."""

    value: float
    low: float
    high: float
    count: int
    """Comparisons behind the number."""
    run_keys: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())


def undecidable(claim: int, dataset: str, reason: str, estimate: Estimate | None = None) -> Finding:
    """A claim that these runs cannot decide."""
    return _finding(claim, dataset, "undecidable", estimate, reason)


def above(claim: int, dataset: str, estimate: Estimate, threshold: float, what: str) -> Finding:
    """Supported where the interval lies above a threshold, contradicted where below it."""
    verdict = judge(estimate, threshold)
    reason = f"{what}; {estimate.count} comparisons"
    return _finding(claim, dataset, verdict, estimate, reason)


def judge(estimate: Estimate, threshold: float) -> Verdict:
    """Verdict on `value > threshold`."""
    if not estimate.is_known:
        return "undecidable"
    if estimate.low > threshold:
        return "supported"
    return "contradicted" if estimate.high < threshold else "undecidable"


def both(verdicts: Iterable[Verdict]) -> Verdict:
    """Verdict on a conjunction: one contradicted part contradicts it."""
    parts = list(verdicts)
    if "contradicted" in parts:
        return "contradicted"
    return "supported" if all(part == "supported" for part in parts) else "undecidable"


def combined(
    claim: int, dataset: str, estimate: Estimate | None, verdicts: Iterable[Verdict], reason: str
) -> Finding:
    """Finding of a claim with several parts; the value is that of its first part."""
    return _finding(claim, dataset, both(verdicts), estimate, reason)


def mean_estimate(
    values: npt.ArrayLike, run_keys: Iterable[str], *, resamples: int = 5_000, seed: int = 0
) -> Estimate:
    """Mean of comparisons with its BCa bootstrap interval; no interval below four of them."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    keys = tuple(dict.fromkeys(run_keys))
    if not len(found):
        return Estimate(np.nan, np.nan, np.nan, 0, keys)
    mean = float(found.mean())
    if len(found) < MIN_COMPARISONS:
        return Estimate(mean, np.nan, np.nan, len(found), keys)
    if np.ptp(found) <= 1e-12 * np.abs(found).max():
        return Estimate(mean, mean, mean, len(found), keys)
    drawn = np.random.default_rng(seed).integers(len(found), size=(resamples, len(found)))
    jackknife = (found.sum() - found) / (len(found) - 1)
    low, high = bca_interval(mean, found[drawn].mean(axis=1), jackknife, 0.95)
    return Estimate(mean, low, high, len(found), keys)


def cells(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Means over seeds and repeats of each cell, with the keys of its runs.

    Parameters
    ----------
    frame : DataFrame
    by : sequence of str
        What makes a cell; a missing number of negatives is a value of its own.
    columns : sequence of str
        Measures to average.

    Returns
    -------
    DataFrame
        Columns by, columns and `run_keys` (tuple).
    """
    table = frame.assign(**{name: numeric(frame, name) for name in columns})
    table = table.dropna(subset=list(columns))
    if table.empty:
        return pd.DataFrame(columns=[*by, *columns, "run_keys"])
    grouped = table.groupby(list(by), dropna=False, sort=True)
    # one aggregation: a second one would not align on a missing number of negatives
    out = grouped.agg({**dict.fromkeys(columns, "mean"), "run_key": tuple})
    return out.rename(columns={"run_key": "run_keys"}).reset_index()


def matched(
    left: pd.DataFrame, right: pd.DataFrame, on: Sequence[str], columns: Sequence[str]
) -> pd.DataFrame:
    """Cells that two groups of runs have in common, side by side.

    Returns
    -------
    DataFrame
        Columns on, `<column>_left`, `<column>_right` and `run_keys` of both.
    """
    pairs = cells(left, on, columns).merge(
        cells(right, on, columns), on=list(on), suffixes=("_left", "_right")
    )
    if pairs.empty:
        return pairs.assign(run_keys=pd.Series(dtype=object))
    pairs["run_keys"] = pairs["run_keys_left"] + pairs["run_keys_right"]
    return pairs


def relative(pairs: pd.DataFrame, column: str) -> Floats:
    """(right - left) / left of matched cells: the one denominator of all comparisons."""
    left = pairs[f"{column}_left"].to_numpy(float)
    right = pairs[f"{column}_right"].to_numpy(float)
    out: Floats = np.full(len(left), np.nan)
    np.divide(right - left, left, out=out, where=left > 0)
    return out


def keys_of(pairs: pd.DataFrame) -> list[str]:
    """Run keys of all rows."""
    return [key for keys in pairs["run_keys"] for key in keys]


def percent(value: float | None) -> str:
    """A share as text with its sign."""
    return "–" if value is None or not np.isfinite(value) else f"{100 * value:+.1f} %"


def findings_frame(found: Sequence[Finding]) -> pd.DataFrame:
    """Columns of `findings.csv`."""
    names = ["claim", "dataset", "verdict", "value", "low", "high", "n"]
    rows: list[Mapping[str, object]] = [
        {name: getattr(item, name) for name in names} for item in found
    ]
    return pd.DataFrame(rows, columns=names)


def _finding(
    claim: int, dataset: str, verdict: Verdict, estimate: Estimate | None, reason: str
) -> Finding:
    if estimate is None:
        return Finding(claim, dataset, verdict, None, None, None, 0, reason)

    def known(number: float) -> float | None:
        return float(number) if np.isfinite(number) else None

    return Finding(
        claim, dataset, verdict, known(estimate.value), known(estimate.low), known(estimate.high),
        len(estimate.run_keys), reason, estimate.run_keys,
    )  # fmt: skip
