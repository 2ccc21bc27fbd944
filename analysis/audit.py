"""What published runs say about themselves: repeats, hidden points, memory out of order."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis.frame import MEMORY, TIME, numeric, point_labels
from analysis.tables import printed_twice, recomputed_differences

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


def memory_excess(frame: pd.DataFrame) -> pd.Series:
    """How much more memory each run takes than the cheapest run that is nowhere smaller.

    Training memory grows with batch size, length and negatives. A run that needs more than
    another of the same loss with none of the three smaller was charged for something else: an
    evaluation (its own, or of the run before) or a leak.

    Returns
    -------
    Series
        Relative, 0 where the run itself is the cheapest; index of `frame`.
    """
    out = pd.Series(np.nan, index=frame.index)
    for _, part in frame.groupby(["dataset", "loss"], sort=False):
        memory = numeric(part, MEMORY).to_numpy(float)
        negatives = numeric(part, "num_negatives").fillna(0)
        factors = np.c_[part["batch_size"], part["max_seq_len"], negatives].astype(float)
        covers = (factors[None, :, :] >= factors[:, None, :]).all(axis=2)
        out[part.index] = memory / np.where(covers, memory[None, :], np.inf).min(axis=1) - 1
    return out


def follows_short(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Whether the run before, in the order of the file, was the last of a series cut short.

    A grid walks through the numbers of negatives of one batch size and length, fewest first. A
    series that ends below the dataset's most negatives was cut short, as by running out of
    memory; the run marked here is the first of the series after it.

    Returns
    -------
    Series
        Boolean, index of `frame`; runs over the full catalog take no part.
    """
    out = pd.Series(False, index=frame.index)
    sampled = frame[numeric(frame, "num_negatives").notna()]
    for _, group in sampled.groupby(["dataset", "loss"], sort=False):
        negatives = numeric(group, "num_negatives")
        settings = group[["batch_size", "max_seq_len"]]
        begins = (settings != settings.shift()).any(axis=1) | (negatives <= negatives.shift())
        out[group.index] = begins & (negatives.shift() < negatives.max())
    return out


def memory_out_of_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs with a `memory_excess` over 5 %, and what they do to the memory-quality relation.

    Returns
    -------
    DataFrame
        Columns dataset, runs, out_of_order, fewest_negatives (how many of those out of order
        have the dataset's fewest negatives), after_short (how many of them `follows_short`),
        follow_short (how many runs do that at all), largest_excess, spearman_all and
        spearman_in_order (of memory and NDCG@10 over all runs, and without those out of order).
    """
    rows = []
    excess, follows = memory_excess(frame), follows_short(frame)
    for dataset, group in frame.groupby("dataset", sort=False):
        out = excess[group.index] > MARGIN
        negatives = numeric(group, "num_negatives")
        memory, quality = numeric(group, MEMORY), numeric(group, "ndcg_at_10")
        rows.append(
            {
                "dataset": dataset,
                "runs": len(group),
                "out_of_order": int(out.sum()),
                "fewest_negatives": int((out & (negatives == negatives.min())).sum()),
                "after_short": int((out & follows[group.index]).sum()),
                "follow_short": int(follows[group.index].sum()),
                "largest_excess": excess[group.index].max(),
                "spearman_all": memory.corr(quality, method="spearman"),
                "spearman_in_order": memory[~out].corr(quality[~out], method="spearman"),
            }
        )
    return pd.DataFrame(rows)


def audit_tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All statements of the audit by name.

    Parameters
    ----------
    frame : DataFrame
        Finished runs, every one of them (selection `all`).
    """
    return {
        "repeats": repeats(frame),
        "hidden": hidden_points(frame),
        "memory": memory_out_of_order(frame),
        "contradictions": contradictions(),
        "denominators": denominators(),
        "values": printed_twice(),
    }


def contradictions() -> pd.DataFrame:
    """Differences that the paper prints and its own values do not give."""
    found = recomputed_differences()
    return found[found["agrees"].isin(["neither", "not recomputable"])]


def denominators() -> pd.DataFrame:
    """Columns table, agrees, differences: which value each of the paper's tables divides by."""
    found = recomputed_differences()
    counts = found.groupby(["table", "agrees"]).size()
    return counts.rename("differences").reset_index()
