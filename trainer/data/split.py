"""Filters and splits, computed in passes over a log of any size.

Every function reads the log block by block, so its memory depends on the number of users and items
and on the size of a block, never on the number of rows; the result does not depend on the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from db.errors import DataError
from trainer.data.interactions import Block, Int64Array, InteractionLog

BoolArray = npt.NDArray[np.bool_]
SplitKind = Literal["global_temporal", "leave_one_out"]
TieOrder = Literal["row", "item_age", "item_id"]
RowMask = Callable[[int, Block], BoolArray]
"""From the number of a block's first row and the block to the rows that take part."""

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which users and items take part."""

    min_item_count: int = 5
    """Least rows of an item; counted first."""
    min_user_count: int = 3
    """Least rows of a user, counted on the rows of the remaining items."""
    iterated: bool = False
    """Repeat both until nothing changes; false is the paper's one pass."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which events train, validate and test.

    Raises
    ------
    DataError
        A share that is not between 0 and 1.
    """

    kind: SplitKind = "global_temporal"
    """One cutoff in time for all users (the paper's), or each user's last two events held out."""
    test_fraction: float = 0.1
    """Share of the latest rows after the cutoff (global_temporal)."""
    validation_fraction: float = 0.05
    """Share of the training users set aside for validation (global_temporal)."""
    validation_seed: int = 42
    """Seed of the draw of validation users (global_temporal)."""
    tie_order: TieOrder = "row"
    """Which of two events at the same time is the earlier one: that of the earlier row, that on the
    item which appeared earlier (the paper's code numbers items so, and sorts by time and then by
    this number), or that on the item with the lower id (files written item by item, such as those
    of the Amazon reviews)."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise DataError(
                    f"{name}={value} is not between 0 and 1 (both excluded): each part of the "
                    "split needs rows; use --split leave-one-out to hold out each user's last two"
                )


@dataclass(frozen=True)
class Split:
    """Roles of users and items, by their codes in the log."""

    cutoff: int | None
    """First time of the test period; None for leave_one_out."""
    item_order: Int64Array
    """Item codes of the catalog in order of first appearance in the training events, shape (V,)."""
    user_order: Int64Array
    """User codes with an event on a catalog item: training, validation, other users."""
    row_counts: Int64Array
    """Rows on catalog items by user code."""
    train_counts: Int64Array
    """Training rows by user code; they are the user's first ones."""
    validation_counts: Int64Array
    """Rows up to and including the validation target by user code; 0 where there is none."""
    is_test: BoolArray
    """Whether a user code has a test target: its last row on a catalog item."""


def filter_counts(
    log: InteractionLog, num_users: int, num_items: int, options: FilterOptions
) -> tuple[BoolArray, BoolArray]:
    """Users and items that pass the count filters: items first, then users.

    Counts are of rows, not of distinct users or items, as in the paper's code.

    Parameters
    ----------
    log : InteractionLog
        All rows.
    num_users, num_items : int
        Codes in the log are below these.
    options : FilterOptions
        Thresholds, and whether to repeat until nothing changes.

    Returns
    -------
    keep_users, keep_items : ndarray of bool, by code
    """
    keep_users = np.ones(num_users, dtype=np.bool_)
    keep_items = np.ones(num_items, dtype=np.bool_)
    while True:
        items = _count(log, 1, num_items, _keeps(0, keep_users))
        new_items = keep_items & (items >= options.min_item_count)
        users = _count(log, 0, num_users, _keeps(1, new_items))
        new_users = keep_users & (users >= options.min_user_count)
        same = np.array_equal(new_users, keep_users) and np.array_equal(new_items, keep_items)
        keep_users, keep_items = new_users, new_items
        if same or not options.iterated:
            return keep_users, keep_items


def split_global_temporal(
    log: InteractionLog,
    num_users: int,
    num_items: int,
    options: SplitOptions,
    validation_users: Int64Array | None = None,
) -> Split:
    """Cut all users at one moment; validate on users set aside; the last event is the target.

    Parameters
    ----------
    log : InteractionLog
        Rows that passed the filters.
    num_users, num_items : int
        Codes in the log are below these.
    options : SplitOptions
        Shares and seed.
    validation_users : ndarray of int64, optional
        Codes of the users to validate on, instead of a draw.

    Raises
    ------
    DataError
        Nothing lies before the cutoff.

    References
    ----------
    "Faster and Memory-Efficient Training of Sequential Recommendation Models for Large Catalogs",
    section on data splitting, and the preprocessing of its published code.
    """
    cutoff = kth_time(log, int(len(log) * (1 - options.test_fraction)))
    before: RowMask = lambda _, b: b[2] < cutoff  # noqa: E731
    appearing = first_appearance(log, 0, num_users, before)
    if not len(appearing):
        raise DataError(
            f"no event lies before the cutoff at time {cutoff}: most rows share the earliest "
            "time; check the time column or use --split leave-one-out"
        )
    if validation_users is None:
        stay = np.zeros(len(appearing), dtype=np.bool_)
        number = round((1 - options.validation_fraction) * len(appearing))
        # The legacy generator is what `pandas.DataFrame.sample` draws with.
        random = np.random.RandomState(options.validation_seed)
        stay[random.choice(len(appearing), number, replace=False)] = True
    else:
        stay = ~np.isin(appearing, validation_users)
    is_validation = np.zeros(num_users, dtype=np.bool_)
    is_validation[appearing[~stay]] = True

    trains: RowMask = lambda _, b: (b[2] < cutoff) & ~is_validation[b[0]]  # noqa: E731
    item_order = first_appearance(log, 1, num_items, trains)
    in_catalog = np.zeros(num_items, dtype=np.bool_)
    in_catalog[item_order] = True
    before_items = _count(log, 1, num_items, before) > 0
    has_test = _count(log, 0, num_users, lambda _, b: (b[2] >= cutoff) & before_items[b[1]]) > 0
    row_counts = _count(log, 0, num_users, lambda _, b: in_catalog[b[1]])
    early = _count(log, 0, num_users, lambda _, b: (b[2] < cutoff) & in_catalog[b[1]])
    return Split(
        cutoff=cutoff,
        item_order=item_order,
        user_order=_order_users(appearing[stay], appearing[~stay], row_counts),
        row_counts=row_counts,
        train_counts=np.where(is_validation, 0, early),
        validation_counts=np.where(is_validation, early, 0),
        is_test=has_test & ~is_validation,
    )


def split_leave_one_out(log: InteractionLog, num_users: int, num_items: int) -> Split:
    """Hold out the last event of each user for test and the one before it for validation.

    Users with fewer than three rows only train. A held-out item that no training event has leaves
    its user without that target.

    Parameters
    ----------
    log : InteractionLog
        Rows that passed the filters.
    num_users, num_items : int
        Codes in the log are below these.
    """
    counts = _count(log, 0, num_users, all_rows)
    long = counts >= 3
    last = _last_rows(log, num_users, np.full(num_users, -1, dtype=np.int64))
    second = _last_rows(log, num_users, last)

    def held_out(start: int, block: Block) -> BoolArray:
        rows = np.arange(start, start + len(block[0]))
        users = block[0]
        result: BoolArray = long[users] & ((rows == last[users]) | (rows == second[users]))
        return result

    trains: RowMask = lambda start, b: ~held_out(start, b)  # noqa: E731
    item_order = first_appearance(log, 1, num_items, trains)
    in_catalog = np.zeros(num_items, dtype=np.bool_)
    in_catalog[item_order] = True
    train_counts = _count(log, 0, num_users, trains)
    row_counts = _count(log, 0, num_users, lambda _, b: in_catalog[b[1]])

    def warm(rows: Int64Array) -> BoolArray:
        def is_row(start: int, block: Block) -> BoolArray:
            numbers = np.arange(start, start + len(block[0]))
            hit: BoolArray = (numbers == rows[block[0]]) & long[block[0]] & in_catalog[block[1]]
            return hit

        return _count(log, 0, num_users, is_row) > 0

    order = first_appearance(log, 0, num_users, trains)
    return Split(
        cutoff=None,
        item_order=item_order,
        user_order=_order_users(order, order[:0], row_counts),
        row_counts=row_counts,
        train_counts=train_counts,
        validation_counts=np.where(warm(second), train_counts + 1, 0),
        is_test=warm(last),
    )


def kth_time(log: InteractionLog, k: int) -> int:
    """Time at position k of the sorted rows, by refining histograms instead of sorting.

    Parameters
    ----------
    log : InteractionLog
        At least k + 1 rows.
    k : int
        Position from 0.
    """
    low = min(int(block[2].min()) for _, block in log.blocks())
    high = max(int(block[2].max()) for _, block in log.blocks())
    while low < high:
        shift = max(0, (high - low).bit_length() - 16)
        counts = np.zeros(((high - low) >> shift) + 1, dtype=np.int64)
        for _, (_, _, times) in log.blocks():
            inside = times[(times >= low) & (times <= high)]
            counts += np.bincount((inside - low) >> shift, minlength=len(counts))
        cumulated = np.cumsum(counts)
        position = int(np.searchsorted(cumulated, k, side="right"))
        k -= int(cumulated[position - 1]) if position else 0
        low += position << shift
        high = min(high, low + (1 << shift) - 1)
    return low


def first_appearance(log: InteractionLog, column: int, size: int, mask: RowMask) -> Int64Array:
    """Codes of a column ordered by their first row in time, ties by row number.

    Parameters
    ----------
    log : InteractionLog
        Rows in any order of time.
    column : int
        0 for users, 1 for items.
    size : int
        Codes are below it.
    mask : callable
        Rows that take part.
    """
    earliest = np.full(size, _NEVER, dtype=np.int64)
    for start, block in log.blocks():
        rows = mask(start, block)
        np.minimum.at(earliest, block[column][rows], block[2][rows])
    first_row = np.full(size, -1, dtype=np.int64)
    for start, block in log.blocks():
        codes = block[column]
        hits = np.flatnonzero(mask(start, block) & (block[2] == earliest[codes]))
        hits = hits[first_row[codes[hits]] < 0]
        # Of several assignments to one place the last one holds: go backwards.
        first_row[codes[hits[::-1]]] = hits[::-1] + start
    seen = np.flatnonzero(first_row >= 0)
    return seen[np.lexsort((first_row[seen], earliest[seen]))]


def _last_rows(log: InteractionLog, num_users: int, leave_out: Int64Array) -> Int64Array:
    """Number of each user's last row in time but for `leave_out`; the later row wins a tie."""
    latest = np.full(num_users, np.iinfo(np.int64).min, dtype=np.int64)
    for start, (users, _, times) in log.blocks():
        rows = np.arange(start, start + len(users)) != leave_out[users]
        np.maximum.at(latest, users[rows], times[rows])
    result = np.full(num_users, -1, dtype=np.int64)
    for start, (users, _, times) in log.blocks():
        numbers = np.arange(start, start + len(users))
        hits = np.flatnonzero((numbers != leave_out[users]) & (times == latest[users]))
        result[users[hits]] = numbers[hits]
    return result


def _order_users(train: Int64Array, validation: Int64Array, row_counts: Int64Array) -> Int64Array:
    """Training users, validation users, then all others that have a row on a catalog item."""
    listed = np.concatenate([train, validation])
    others = row_counts > 0
    others[listed] = False
    return np.concatenate([listed[row_counts[listed] > 0], np.flatnonzero(others)])


def _count(log: InteractionLog, column: int, size: int, mask: RowMask) -> Int64Array:
    counts = np.zeros(size, dtype=np.int64)
    for start, block in log.blocks():
        counts += np.bincount(block[column][mask(start, block)], minlength=size)
    return counts


def _keeps(column: int, keep: BoolArray) -> RowMask:
    return lambda _, block: keep[block[column]]


def all_rows(_: int, block: Block) -> BoolArray:
    """The mask that every row passes."""
    return np.ones(len(block[0]), dtype=np.bool_)
