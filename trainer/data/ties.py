"""Rows in another order, so that ties in time fall to their items and not to the file."""

import numpy as np

from trainer.data.interactions import Int64Array, InteractionLog


def ordered_by_item(
    log: InteractionLog, order: Int64Array, target: InteractionLog, memory_rows: int
) -> InteractionLog:
    """Move the rows to another log, item by item.

    Everything that reads a log breaks ties in time by the order of its rows. The rows of an item
    keep theirs.

    Parameters
    ----------
    log : InteractionLog
        At least one row; empty afterwards.
    order : ndarray of int64, shape (n,)
        Codes of all items that have rows, the first first.
    target : InteractionLog
        Takes the rows.
    memory_rows : int
        Rows held in memory at once; a single item with more than half of it is taken whole.

    Returns
    -------
    InteractionLog
        `target`.
    """
    places = np.full(int(order.max()) + 1, -1, dtype=np.int64)
    places[order] = np.arange(len(order))
    counts = np.zeros(len(order), dtype=np.int64)
    for _, (_, items, _) in log.blocks():
        counts += np.bincount(places[items], minlength=len(order))
    bounds = _bounds(counts, max(memory_rows // 2, 1))
    for first, last in zip(bounds, bounds[1:], strict=False):
        chosen = []
        for _, (users, items, times) in log.blocks():
            place = places[items]
            rows = np.flatnonzero((place >= first) & (place < last))
            chosen.append((users[rows], items[rows], times[rows]))
        users, items, times = (np.concatenate(column) for column in zip(*chosen, strict=True))
        rows = np.argsort(places[items], kind="stable")
        target.append(users[rows], items[rows], times[rows])
    log.clear()
    return target


def _bounds(counts: Int64Array, most_rows: int) -> list[int]:
    """First places of consecutive groups of items, and the number of items at the end."""
    ends = np.cumsum(counts)
    bounds = [0]
    while bounds[-1] < len(counts):
        done = ends[bounds[-1] - 1] if bounds[-1] else 0
        fitting = int(np.searchsorted(ends, done + most_rows, side="right"))
        bounds.append(max(fitting, bounds[-1] + 1))
    return bounds
