"""What published runs say about themselves: repeats, hidden points, memory out of order."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis.frame import MEMORY, TIME, numeric, point_labels
from analysis.tables import recomputed_differences

HIDDEN_BOXES: dict[str, Callable[[pd.Series, pd.Series], pd.Series]] = {
    "zvuk": lambda memory, ndcg: (memory >= 50.0) & (ndcg >= 0.05),
    "movielens_20m": lambda memory, ndcg: (memory >= 50.2) & (ndcg < 0.052),
}
"""Boxes in which the paper's notebook leaves points out of its Fig. 5 (GiB, NDCG@10), as far as
they are known here; the figures of srsweep draw every run."""
MARGIN = 0.05
"""Relative excess from which memory counts as out of order."""


def repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Points that were run more than once, and how far their measures lie apart.

    Returns
    -------
    DataFrame
        Columns dataset, runs, points, repeats, and for NDCG@10, memory and time the largest
        relative spread (greatest over least, less one) within a point.
    """
    rows = []
    for dataset, group in frame.groupby("dataset", sort=False):
        labels = point_labels(group)
        points = int(labels.nunique())
        row: dict[str, object] = {"dataset": dataset, "runs": len(group), "points": points}
        row["repeats"] = len(group) - points
        for short, name in (("ndcg", "ndcg_at_10"), ("memory", MEMORY), ("time", TIME)):
            values = numeric(group, name).groupby(labels)
            least = values.min()
            spread = (values.max() / least.where(least > 0) - 1)[values.size() > 1]
            row[f"largest_spread_{short}"] = spread.max() if len(spread) else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def hidden_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs that fall into the boxes which the paper's Fig. 5 leaves out.

    Returns
    -------
    DataFrame
        Columns dataset, runs, hidden; only datasets whose box is known.
    """
    rows = []
    for dataset, group in frame.groupby("dataset", sort=False):
        if _base_name(dataset) in HIDDEN_BOXES:
            rows.append((dataset, len(group), int(in_hidden_box(group).sum())))
    return pd.DataFrame(rows, columns=["dataset", "runs", "hidden"])


def in_hidden_box(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each run falls into a box of `HIDDEN_BOXES`."""
    inside = pd.Series(False, index=frame.index)
    for dataset, group in frame.groupby("dataset", sort=False):
        box = HIDDEN_BOXES.get(_base_name(dataset))
        if box is not None:
            found = box(numeric(group, MEMORY) / 2**30, numeric(group, "ndcg_at_10"))
            inside[group.index] = found.to_numpy(bool)
    return inside


def _base_name(dataset: object) -> str:
    return str(dataset).split(" [")[0]


def memory_out_of_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs that take more memory than one that is nowhere smaller.

    Training memory grows with batch size, length and negatives. A run that needs over 5 % more
    than another of the same loss with none of the three smaller was charged for something else:
    an evaluation (its own, or of the run before) or a leak.

    Returns
    -------
    DataFrame
        Columns dataset, runs, out_of_order, largest_excess.
    """
    rows = []
    for dataset, group in frame.groupby("dataset", sort=False):
        count, largest, total = 0, 0.0, 0
        for _, part in group.groupby("loss"):
            memory = numeric(part, MEMORY).to_numpy(float)
            factors = np.c_[
                part["batch_size"], part["max_seq_len"], numeric(part, "num_negatives").fillna(0)
            ].astype(float)
            covers = (factors[None, :, :] >= factors[:, None, :]).all(axis=2)
            least = np.where(covers, memory[None, :], np.inf).min(axis=1)
            excess = memory / least - 1
            count += int((excess > MARGIN).sum())
            largest = max(largest, float(np.nanmax(excess, initial=0.0)))
            total += len(part)
        rows.append((dataset, total, count, largest))
    return pd.DataFrame(rows, columns=["dataset", "runs", "out_of_order", "largest_excess"])


def audit_tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All statements of the audit by name.

    Parameters
    ----------
    frame : DataFrame
        Finished runs, every one of them (selection `all`).
    """
    differences = recomputed_differences()
    return {
        "repeats": repeats(frame),
        "hidden": hidden_points(frame),
        "memory": memory_out_of_order(frame),
        "contradictions": differences[differences["agrees"].isin(["neither", "not recomputable"])],
        "denominators": differences.groupby(["table", "agrees"])
        .size()
        .rename("differences")
        .reset_index(),
    }
