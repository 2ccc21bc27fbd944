"""One's own runs beside the paper's tables, and the paper's tables against themselves.

The one denominator of every relative difference is the first named (`loss_from`) value:
(to - from) / from. `analysis/reference/` holds the printed values, typed from the paper.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.frame import MEMORY, TIME, numeric, records

REFERENCE = Path(__file__).parent / "reference"
_QUALITIES = ("ndcg_at_10", "coverage_at_10", "surprisal_at_10")
_POINT = ["dataset", "model", "loss", "batch_size", "max_seq_len", "num_negatives"]
_LAST_DIGIT = 1.01e-4
"""Values printed with four decimals agree where they differ by one of the last."""
TOLERANCE = 0.6
"""Percentage points by which a printed difference may miss the recomputed one through rounding
of its one-digit operands, beside a hundredth of its size."""


def printed_results() -> pd.DataFrame:
    """Every row of the paper's Tables 1, 3-6, 8, 11 and 14-17 (memory in GB as printed)."""
    return pd.read_csv(REFERENCE / "results.csv")


def printed_differences() -> pd.DataFrame:
    """Every relative difference that the paper prints, in percent."""
    return pd.read_csv(REFERENCE / "differences.csv")


def beside_the_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows for which there are runs, with the runs' means beside them.

    Parameters
    ----------
    frame : DataFrame
        Finished runs. A run counts for a printed row when dataset, model, loss, batch size,
        length, sampler and number of negatives (give or take one: the paper prints 511 for
        512 - 1) agree; Table 1, which names no settings, takes the best run of the loss.

    Returns
    -------
    DataFrame
        The columns of the printed table, and `own_<measure>`, `difference_<measure>` (percent of
        the printed value) and `num_runs`.
    """
    rows = []
    own = frame.assign(
        **{name: numeric(frame, name) for name in (*_QUALITIES, MEMORY, TIME)},
        base=frame["dataset"].astype(str).str.split(" \\[").str[0],
    )
    if "negative_sampler" not in own:
        own["negative_sampler"] = "uniform"
    printed_rows = printed_results()
    for printed in records(printed_rows[printed_rows["dataset"].isin(set(own["base"]))]):
        runs = _runs_of(own, printed)
        if runs.empty:
            continue
        row = dict(printed)
        values = {name: runs[name].mean() for name in _QUALITIES}
        values |= {"memory_gb": runs[MEMORY].mean() / 2**30, "epoch_seconds": runs[TIME].mean()}
        for name, value in values.items():
            row[f"own_{name}"] = value
            row[f"difference_{name}"] = _percent(printed[name], value)
        row["num_runs"] = len(runs)
        rows.append(row)
    return pd.DataFrame(rows)


def recomputed_differences() -> pd.DataFrame:
    """The printed differences against those that the printed values give.

    Returns
    -------
    DataFrame
        Columns of `printed_differences`, `value_from`, `value_to`, `recomputed` (percent of
        `value_from`), `of_value_to` (the same with the other denominator) and `agrees`: with
        `value_from`, `value_to` or neither.
    """
    results = printed_results()
    rows = []
    for row in records(printed_differences()):
        first = _printed_value(results, row, row["loss_from"])
        second = _printed_value(results, row, row["loss_to"])
        recomputed, other = _percent(first, second), -_percent(second, first)
        rows.append(
            {
                **row,
                "value_from": first,
                "value_to": second,
                "recomputed": recomputed,
                "of_value_to": other,
                "agrees": _agreement(row["percent"], recomputed, other),
            }
        )
    return pd.DataFrame(rows)


def printed_twice() -> pd.DataFrame:
    """Values that two of the paper's tables give differently.

    Table 1 names no settings: its NDCG@10 is held against every value that another table prints
    for the model, loss and dataset, and listed with the nearest where none agrees. All other
    values are compared at equal settings.

    Returns
    -------
    DataFrame
        Columns dataset, model, loss, quantity, table, value, other_table, other_value.
    """
    results = printed_results()
    rows: list[dict[str, Any]] = []
    named = ["dataset", "model", "loss", "negative_sampler"]
    settings = results.dropna(subset=["batch_size"])
    point = [*named, "batch_size", "max_seq_len", "num_negatives"]
    for _, group in settings.groupby(point, dropna=False, sort=False):
        for quantity in (*_QUALITIES, "memory_gb", "epoch_seconds"):
            given = group.dropna(subset=[quantity]).drop_duplicates(quantity)
            if len(given) > 1:
                rows.append(_two_values(quantity, given.iloc[0], given.iloc[1]))
    overall = results[results["batch_size"].isna()].dropna(subset=["ndcg_at_10"])
    for row in records(overall):
        same = (settings[named] == pd.Series(row)[named]).all(axis=1)
        others = settings[same].dropna(subset=["ndcg_at_10"])
        apart = (others["ndcg_at_10"] - row["ndcg_at_10"]).abs()
        if len(apart) and apart.min() > _LAST_DIGIT:
            nearest = others.iloc[int(apart.to_numpy(float).argmin())]
            rows.append(_two_values("ndcg_at_10", pd.Series(row), nearest))
    return pd.DataFrame(rows)


def _two_values(quantity: str, first: pd.Series, second: pd.Series) -> dict[str, Any]:
    return {
        **{name: first[name] for name in ("dataset", "model", "loss")},
        "quantity": quantity,
        "table": first["table"],
        "value": first[quantity],
        "other_table": second["table"],
        "other_value": second[quantity],
    }


def _runs_of(own: pd.DataFrame, printed: dict[str, Any]) -> pd.DataFrame:
    chosen: pd.Series[bool] = (
        (own["base"] == printed["dataset"])
        & (own["model"] == printed["model"])
        & (own["loss"] == printed["loss"])
        & (own["negative_sampler"] == printed["negative_sampler"])
    )
    if pd.isna(printed["batch_size"]):
        runs = own[chosen].dropna(subset=["ndcg_at_10"])
        return runs.nlargest(1, "ndcg_at_10")
    for name in ("batch_size", "max_seq_len"):
        chosen &= own[name].astype(float) == printed[name]
    negatives = own["num_negatives"].astype(float)
    if pd.isna(printed["num_negatives"]):
        return own[chosen & negatives.isna()]
    return own[chosen & ((negatives - float(printed["num_negatives"])).abs() <= 1)]


def _printed_value(results: pd.DataFrame, row: dict[str, Any], name: str) -> float:
    """Value of a loss at the settings of a difference, in the table nearest before it."""
    loss, _, sampler = name.partition(" ")
    found = results[
        (results["dataset"] == row["dataset"])
        & (results["model"] == row["model"])
        & (results["loss"] == loss)
        & (results["negative_sampler"] == (sampler or "uniform"))
        & (results["table"] <= row["table"])
        & results[row["quantity"]].notna()
        & results["batch_size"].notna()
    ]
    exact = found[
        (found["batch_size"] == row["batch_size"]) & (found["max_seq_len"] == row["max_seq_len"])
    ]
    nearest = exact if len(exact) else found[found["max_seq_len"] == row["max_seq_len"]]
    if nearest.empty:
        return float("nan")
    return float(nearest.sort_values("table")[row["quantity"]].iloc[-1])


def _percent(start: float, second: float) -> float:
    return 100 * (second - start) / start if start > 0 else float("nan")


def _agreement(printed: float, recomputed: float, other: float) -> str:
    if np.isnan(recomputed):
        return "not recomputable"
    close = [abs(abs(printed) - abs(value)) <= TOLERANCE + 0.01 * abs(value)
             for value in (recomputed, other)]  # fmt: skip
    if close[0]:
        return "value_from"
    return "value_to" if close[1] else "neither"
