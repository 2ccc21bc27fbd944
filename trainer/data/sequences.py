"""From rows in file order to one sequence per user, partition of users by partition of users."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.interactions import BLOCK_ROWS, Block, Int32Array, Int64Array, InteractionLog
from trainer.data.split import Split

MAX_PARTITION_USERS = 1 << 16
"""Users of a partition: their numbers then fit 16 bits, which numpy sorts in linear time."""


@dataclass
class SequenceStatistics:
    """What is counted while the sequences are written."""

    item_counts: Int64Array
    """Training rows by item, shape (V,)."""
    item_users: Int64Array
    """Distinct training users by item, shape (V,)."""
    test_history_item_users: Int64Array
    """Distinct users by item in the histories of users with an event after the cutoff."""
    num_duplicates: int = 0
    """Rows that equal an earlier one in user, item and time."""
    num_tied_rows: int = 0
    """Rows that share user and time with the row before."""
    num_tied_targets: dict[str, int] = field(default_factory=dict)
    """Targets at the same time as the row before, by split: their choice rests on row order."""
    num_targets_in_train: int = 0
    """Test targets that are training events: possible only where all later events are cold."""


@dataclass(frozen=True)
class SequencePlan:
    """Where each user's sequence goes; users are in their final order."""

    user_codes: Int32Array
    """Final number by code in the log, -1 for users left out."""
    item_codes: Int32Array
    """Final number by code in the log, -1 for items outside the catalog."""
    offsets: Int64Array
    """User u owns rows offsets[u] to offsets[u + 1], shape (U + 1,)."""
    train_counts: Int64Array
    """Training rows of each user, the first ones, shape (U,)."""
    validation_ends: Int64Array
    """Rows up to and including the validation target, 0 where there is none, shape (U,)."""
    is_test: npt.NDArray[np.bool_]
    """Whether the user's last row is a test target or its rows a test history, shape (U,)."""
    num_items: int
    """Catalog V."""

    @property
    def num_users(self) -> int:
        """Users with at least one row."""
        return len(self.offsets) - 1


def plan_sequences(split: Split, num_items: int) -> SequencePlan:
    """Final numbers and places of users and items.

    Parameters
    ----------
    split : Split
        Roles by code in the log.
    num_items : int
        Item codes in the log are below it.
    """
    order = split.user_order
    user_codes = np.full(len(split.row_counts), -1, dtype=np.int32)
    user_codes[order] = np.arange(len(order), dtype=np.int32)
    item_codes = np.full(num_items, -1, dtype=np.int32)
    item_codes[split.item_order] = np.arange(len(split.item_order), dtype=np.int32)
    return SequencePlan(
        user_codes=user_codes,
        item_codes=item_codes,
        offsets=np.concatenate([[0], np.cumsum(split.row_counts[order])]),
        train_counts=split.train_counts[order],
        validation_ends=split.validation_counts[order],
        is_test=split.is_test[order],
        num_items=len(split.item_order),
    )


def write_sequences(
    log: InteractionLog, plan: SequencePlan, folder: Path, memory_rows: int
) -> SequenceStatistics:
    """Write `items.npy` and `timestamps.npy`, users in order, each oldest row first.

    Ties in time keep the order of the rows in the log.

    Parameters
    ----------
    log : InteractionLog
        Rows that passed the filters.
    plan : SequencePlan
        Final numbers and places.
    folder : Path
        Where the arrays go.
    memory_rows : int
        Most rows sorted at a time; a single user with more rows is a partition of its own.
    """
    statistics = SequenceStatistics(
        item_counts=np.zeros(plan.num_items, dtype=np.int64),
        item_users=np.zeros(plan.num_items, dtype=np.int64),
        test_history_item_users=np.zeros(plan.num_items, dtype=np.int64),
        num_tied_targets={"validation": 0, "test": 0},
    )
    num_rows = int(plan.offsets[-1])
    with (folder / "items.npy").open("wb") as items, (folder / "timestamps.npy").open("wb") as time:
        _write_header(items, np.int32, num_rows)
        _write_header(time, np.int64, num_rows)
        bounds = _partition_bounds(plan.offsets, min(memory_rows, BLOCK_ROWS))
        parts = _partitions(log, plan, bounds, folder / "partitions", memory_rows)
        for number, rows in enumerate(parts):
            first, last = int(bounds[number]), int(bounds[number + 1])
            columns = _sort_rows(rows, first)
            columns[1].tofile(items)
            columns[2].tofile(time)
            _count_partition(columns, plan, first, last, statistics)
    return statistics


def _write_header(file: object, dtype: type[np.generic], size: int) -> None:
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]


def _partition_bounds(offsets: Int64Array, partition_rows: int) -> Int64Array:
    """First users of consecutive partitions, and the number of users at the end."""
    bounds = [0]
    num_users = len(offsets) - 1
    while bounds[-1] < num_users:
        first = bounds[-1]
        fitting = np.searchsorted(offsets, offsets[first] + partition_rows, side="right") - 1
        bounds.append(int(min(max(fitting, first + 1), first + MAX_PARTITION_USERS, num_users)))
    return np.array(bounds, dtype=np.int64)


def _partitions(
    log: InteractionLog, plan: SequencePlan, bounds: Int64Array, folder: Path, memory_rows: int
) -> Iterator[Block]:
    """Rows of each partition with final numbers, in the order of the log."""
    num_partitions = len(bounds) - 1
    # 16 bits are sorted in linear time.
    narrow = num_partitions <= np.iinfo(np.uint16).max
    numbers = np.arange(num_partitions, dtype=np.uint16 if narrow else np.uint32)
    partition_of = np.repeat(numbers, np.diff(bounds))
    in_files = log.spilled
    parts = [
        InteractionLog(
            folder / str(k), max(memory_rows, len(log) * (not in_files)), in_files=in_files
        )
        for k in range(num_partitions)
    ]
    for _, (user_codes, item_codes, block_times) in log.blocks():
        users, items = plan.user_codes[user_codes], plan.item_codes[item_codes]
        # Every user with a catalog item has a number, so the item alone decides.
        rows = np.flatnonzero(items >= 0)
        if num_partitions == 1:
            parts[0].append(users[rows], items[rows], block_times[rows])
            continue
        part = partition_of[users[rows]]
        rows = rows[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=num_partitions))
        users, items, times = users[rows], items[rows], block_times[rows]
        for k, (start, end) in enumerate(zip(np.r_[0, ends[:-1]], ends, strict=True)):
            if end > start:
                parts[k].append(users[start:end], items[start:end], times[start:end])
    log.clear()
    for part_log in parts:
        blocks = [block for _, block in part_log.blocks()]
        columns = zip(*blocks, strict=True)
        users, items, times = (np.concatenate(column) for column in columns)
        part_log.clear()
        yield users, items, times
    if folder.exists():
        folder.rmdir()


def _sort_rows(rows: Block, first_user: int) -> Block:
    """Rows by user and time; equal ones keep their order."""
    users, items, times = rows
    local = (users - first_user).astype(np.uint16)
    order = np.argsort(local, kind="stable")
    local, times = local[order], times[order]
    later = (times[1:] >= times[:-1]) | (local[1:] != local[:-1])
    if not later.all():
        again = np.lexsort((times, local))
        order, local, times = order[again], local[again], times[again]
    return local.astype(np.int32), items[order], times


def _count_partition(
    rows: Block, plan: SequencePlan, first: int, last: int, statistics: SequenceStatistics
) -> None:
    users, items, times = rows
    base = plan.offsets[first]
    starts, ends = plan.offsets[first:last] - base, plan.offsets[first + 1 : last + 1] - base
    train_ends = starts + plan.train_counts[first:last]
    numbers = np.arange(len(users))

    in_train = numbers < train_ends[users]
    statistics.item_counts += np.bincount(items[in_train], minlength=plan.num_items)
    statistics.item_users += _distinct_users(users[in_train], items[in_train], plan.num_items)
    is_test = plan.is_test[first:last]
    in_history = is_test[users] & (numbers < ends[users] - 1)
    statistics.test_history_item_users += _distinct_users(
        users[in_history], items[in_history], plan.num_items
    )

    tied = np.zeros(len(users) + 1, dtype=np.bool_)
    tied[1:-1] = (times[1:] == times[:-1]) & (users[1:] == users[:-1])
    statistics.num_tied_rows += int(tied.sum())
    statistics.num_duplicates += _count_duplicates(rows, tied)
    warm = is_test & (plan.train_counts[first:last] > 0)
    statistics.num_tied_targets["test"] += int(tied[ends[warm] - 1].sum())
    validation_ends = plan.validation_ends[first:last]
    targets = (starts + validation_ends - 1)[validation_ends > 1]
    statistics.num_tied_targets["validation"] += int(tied[targets].sum())
    statistics.num_targets_in_train += int((train_ends[warm] == ends[warm]).sum())


def _distinct_users(users: Int32Array, items: Int32Array, num_items: int) -> Int64Array:
    """Distinct users of each item."""
    pairs = (users.astype(np.int64) << 32) | items
    pairs.sort()
    new = np.ones(len(pairs), dtype=np.bool_)
    np.not_equal(pairs[1:], pairs[:-1], out=new[1:])
    return np.bincount(pairs[new] & 0xFFFFFFFF, minlength=num_items)


def _count_duplicates(rows: Block, tied: npt.NDArray[np.bool_]) -> int:
    """Rows equal to an earlier one; only runs of equal user and time can hold any."""
    users, items, times = rows
    run = np.flatnonzero(tied[:-1] | tied[1:])
    if not len(run):
        return 0
    keys = np.lexsort((items[run], times[run], users[run]))
    users, items, times = users[run][keys], items[run][keys], times[run][keys]
    equal = (users[1:] == users[:-1]) & (items[1:] == items[:-1]) & (times[1:] == times[:-1])
    return int(equal.sum())
