"""What a practitioner looks at before training: lengths, popularity, repeats, ties, cold, drift."""

import datetime as dt
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from db.errors import DataError
from trainer.data.dataset import Dataset, EvaluationSet

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Row = dict[str, Any]

SEQUENCE_LENGTHS = (16, 32, 64, 128, 200, 256, 512, 1024)
"""Values of `max_seq_len` whose share of the training rows is listed."""

NUM_PERIODS = 12
"""Periods of equal length into which drift divides the recorded time."""

TOP_ITEMS = 100
"""Most popular items whose change from period to period is drift."""

_BLOCK_ROWS = 1 << 22
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_CURVE_POINTS = 200
_LENGTH_BINS = 40


@dataclass(frozen=True)
class Description:
    """Figures and curves of one prepared dataset; every curve is a table of rows."""

    name: str
    """Name of the dataset."""
    summary: list[Row]
    """Rows of `measure` and `value`: counts and shares."""
    lengths: list[Row]
    """Histogram of training sequence lengths: `length_from`, `length_to` (excluded), `users`."""
    coverage: list[Row]
    """What a `max_seq_len` keeps: `row_share` of training rows, `truncated_user_share`."""
    popularity: list[Row]
    """Training rows by popularity rank: `rank`, `rows`, `cumulated_row_share`."""
    drift: list[Row]
    """By period of time: the date when it `begins`, `rows`, `users`, `items`,
    `new_item_row_share` and the overlaps of the most popular items with the period before and with
    the first one. Cold items are not in it."""


def describe(dataset: Dataset) -> Description:
    """Describe a prepared dataset, reading its arrays block by block.

    Parameters
    ----------
    dataset : Dataset
        Opened by `load_dataset`.
    """
    lengths = dataset.train.lengths
    return Description(
        name=dataset.name,
        summary=_summary(dataset),
        lengths=_length_histogram(lengths),
        coverage=_coverage(lengths),
        popularity=_popularity_curve(dataset.item_counts),
        drift=_drift(dataset),
    )


def gini(counts: npt.ArrayLike) -> float:
    """Gini coefficient of non-negative counts: 0 where all are equal, near 1 where one has all.

    Parameters
    ----------
    counts : array_like, shape (n,)
        Not all zero.

    Raises
    ------
    DataError
        No counts, or all of them zero.
    """
    values = np.sort(np.asarray(counts, dtype=np.float64))
    if not values.sum():
        raise DataError("a Gini coefficient needs counts that are not all zero; give more data")
    ranks = np.arange(1, len(values) + 1)
    return float(2 * (ranks * values).sum() / (len(values) * values.sum()) - 1 - 1 / len(values))


def seen_target_share(dataset: Dataset, evaluation: EvaluationSet) -> float:
    """Share of the targets that stand in their user's history: never hit where seen are masked.

    Parameters
    ----------
    dataset : Dataset
        Whose items the slices refer to.
    evaluation : EvaluationSet
        Validation or test.
    """
    seen = [
        bool((dataset.items[start:end] == target).any())
        for start, end, target in zip(
            evaluation.starts, evaluation.ends, evaluation.targets, strict=True
        )
    ]
    return float(np.mean(seen)) if seen else 0.0


def _summary(dataset: Dataset) -> list[Row]:
    meta, counts = dataset.meta, dataset.meta["counts"]
    top = np.sort(dataset.item_counts)[::-1]
    lengths = meta["sequence_length"]
    tied = meta["tied_target_share"]
    values: dict[str, Any] = {
        "raw rows": counts["raw_rows"],
        "bad rows left out": counts["bad_rows"],
        "users": counts["filtered_users"],
        "items": counts["filtered_items"],
        "interactions": counts["filtered_rows"],
        "mean length": lengths["mean"],
        "median length": lengths["quantiles"]["0.5"],
        "99 % of lengths up to": lengths["quantiles"]["0.99"],
        "density": counts["filtered_rows"] / (counts["filtered_users"] * counts["filtered_items"]),
        "catalog (items of training events)": dataset.num_items,
        "cold items (first seen after training)": counts["filtered_items"] - dataset.num_items,
        "rows on cold items": counts["filtered_rows"] - counts["num_rows"],
        "training users": dataset.num_train_users,
        "training rows": counts["train_rows"],
        "validation users": len(dataset.validation),
        "test users": len(dataset.test),
        "repeat share of training rows": meta["train_repeat_share"],
        "validation targets already seen": seen_target_share(dataset, dataset.validation),
        "test targets already seen": seen_target_share(dataset, dataset.test),
        "rows tied in time with the row before": meta["tied_row_share"],
        "validation targets tied in time": tied["validation"],
        "test targets tied in time": tied["test"],
        "duplicate rows": counts["num_duplicate_rows"],
        "share of the largest user": meta["largest_user_share"],
        "share of the ten largest users": meta["ten_largest_users_share"],
        "share of the top 1 % items": float(top[: max(1, len(top) // 100)].sum() / top.sum()),
        "items with fewer than 5 training rows": float((top < 5).mean()),
        "Gini of item popularity": gini(dataset.item_counts),
    }
    return [{"measure": name, "value": value} for name, value in values.items()]


def _length_histogram(lengths: Int64Array) -> list[Row]:
    """Bins of equal width in the log of the length, whole numbers at their edges."""
    edges = np.unique(np.geomspace(1, lengths.max() + 1, _LENGTH_BINS + 1).round().astype(int))
    users, _ = np.histogram(lengths, bins=edges)
    return [
        {"length_from": int(low), "length_to": int(high), "users": int(count)}
        # numpy closes the last bin; its upper edge lies above every length all the same.
        for low, high, count in zip(edges[:-1], edges[1:], users, strict=True)
    ]


def _coverage(lengths: Int64Array) -> list[Row]:
    """One epoch takes the last max_seq_len + 1 items of each user."""
    rows = []
    for length in SEQUENCE_LENGTHS:
        kept = np.minimum(lengths, length + 1)
        rows.append(
            {
                "max_seq_len": length,
                "row_share": float(kept.sum() / lengths.sum()),
                "truncated_user_share": float((lengths > length + 1).mean()),
            }
        )
        if (lengths <= length + 1).all():
            break
    return rows


def _popularity_curve(item_counts: Int64Array) -> list[Row]:
    counts = np.sort(item_counts)[::-1]
    cumulated = np.cumsum(counts) / counts.sum()
    points = np.geomspace(1, len(counts), _CURVE_POINTS).round().astype(int)
    return [
        {
            "rank": int(rank),
            "rows": int(counts[rank - 1]),
            "cumulated_row_share": float(cumulated[rank - 1]),
        }
        for rank in np.unique(points)
    ]


def _drift(dataset: Dataset) -> list[Row]:
    times = dataset.timestamps
    first, last = _extent(times)
    if first == last:
        return []
    width = (last - first) / NUM_PERIODS
    by_item = np.zeros((NUM_PERIODS, dataset.num_items), dtype=np.int64)
    is_active = np.zeros((NUM_PERIODS, dataset.num_users), dtype=np.bool_)
    for start in range(0, len(times), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        numbers = np.arange(start, start + len(times[rows]))
        users = np.searchsorted(dataset.offsets, numbers, side="right") - 1
        periods = np.minimum(((times[rows] - first) / width).astype(np.int64), NUM_PERIODS - 1)
        np.add.at(by_item, (periods, dataset.items[rows]), 1)
        is_active[periods, users] = True
    known = np.zeros(dataset.num_items, dtype=np.bool_)
    tops: list[set[int]] = []
    result = []
    for period in range(NUM_PERIODS):
        counts = by_item[period]
        total = int(counts.sum())
        tops.append(_top(counts))
        result.append(
            {
                "period": period + 1,
                "begins": _date(first + period * width),
                "rows": total,
                "users": int(is_active[period].sum()),
                "items": int((counts > 0).sum()),
                "new_item_row_share": float(counts[~known].sum() / total)
                if total and period
                else None,
                "top_overlap_previous": _overlap(tops[-1], tops[-2]) if period else None,
                "top_overlap_first": _overlap(tops[-1], tops[0]) if period else None,
            }
        )
        known |= counts > 0
    return result


def _date(seconds: float) -> str:
    return (_EPOCH + dt.timedelta(seconds=seconds)).date().isoformat()


def _extent(times: Int64Array) -> tuple[int, int]:
    blocks = [times[start : start + _BLOCK_ROWS] for start in range(0, len(times), _BLOCK_ROWS)]
    return min(int(b.min()) for b in blocks), max(int(b.max()) for b in blocks)


def _top(counts: Int64Array) -> set[int]:
    """The most popular items that occur at all; ties go to the older item."""
    order = np.argsort(-counts, kind="stable")[:TOP_ITEMS]
    return set(order[counts[order] > 0].tolist())


def _overlap(one: set[int], other: set[int]) -> float | None:
    """Common items over the smaller number of items."""
    return len(one & other) / min(len(one), len(other)) if one and other else None
