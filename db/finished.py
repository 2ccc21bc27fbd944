"""Columns of many finished runs at once, from their packed results."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db import reader
from db.packed import (
    COLUMNS,
    LABELS,
    LAYOUT,
    NUMBERS,
    OF_RESULT,
    OF_RUN,
    REALS,
    TIMES,
    WHOLES,
    pack,
)
from db.schema import datasets, packed_summaries, run_summary, runs
from db.spec import RunStatus

if TYPE_CHECKING:
    import pandas as pd

_ROWS_AT_ONCE = 2000
_FINAL = [str(status) for status in RunStatus if status.is_final]
_OF_DATASET = ("num_users", "num_items", "num_items_filtered", "num_interactions")
_AS_IS = ("run_key", "reason", "skipped_by", "source")


def columns(
    connection: Connection, conditions: Sequence[sa.ColumnElement[bool]]
) -> dict[str, Any] | None:
    """Columns of the finished runs by name, in the order of runs and device classes.

    Parameters
    ----------
    connection : sqlalchemy.engine.Connection
        Of `db.reader.connected`.
    conditions : sequence of sqlalchemy.ColumnElement
        Over columns of `runs`.

    Returns
    -------
    dict of str to array or None
        Types are those that `DataFrame` makes of plain values; None where not every result is
        packed, or nothing was found.
    """
    if not _is_complete(connection):
        return None
    query = (
        sa.select(
            runs.c.id, packed_summaries.c.device_class, runs.c.dataset_id,
            *(runs.c[name] for name in _AS_IS),
            packed_summaries.c.layout, packed_summaries.c.labels, packed_summaries.c.numbers,
        )
        .select_from(runs)
        .outerjoin(packed_summaries, packed_summaries.c.run_id == runs.c.id)
        .where(
            sa.or_(packed_summaries.c.run_id.is_not(None), runs.c.status.in_(_FINAL)),
            *conditions,
        )
    )  # fmt: skip
    rows = _Rows()
    for batch in reader.batches(connection, query, _ROWS_AT_ONCE):
        rows.add(batch)
    if not rows.keys or not rows.layouts <= {LAYOUT, None}:
        return None
    if None in rows.layouts and not rows.add_bare(_bare(connection, conditions)):
        return None
    return rows.columns(_counts(connection))


def _is_complete(connection: Connection) -> bool:
    """Whether there are as many packed results as results."""
    counts = [
        sa.select(sa.func.count()).select_from(table).scalar_subquery()
        for table in (run_summary, packed_summaries)
    ]
    results, packed = connection.execute(sa.select(*counts)).one()
    return bool(results == packed)


def _bare(
    connection: Connection, conditions: Sequence[sa.ColumnElement[bool]]
) -> dict[int, tuple[bytes, str]]:
    """Runs that ended without a result, packed, by id."""
    query = sa.select(runs.c.id, runs.c.status, *OF_RUN).where(
        runs.c.status.in_(_FINAL),
        ~sa.exists().where(run_summary.c.run_id == runs.c.id),
        *conditions,
    )
    found = {}
    for run_id, status, *spec in connection.execute(query):
        result = [status if column is run_summary.c.status else None for column in OF_RESULT]
        found[run_id] = pack([*spec, *result])
    return found


def _counts(connection: Connection) -> dict[int, tuple[Any, ...]]:
    query = sa.select(datasets.c.id, *(datasets.c[name] for name in _OF_DATASET))
    return {row[0]: tuple(row[1:]) for row in connection.execute(query)}


class _Rows:
    """Rows as they come, taken apart into columns at the end."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, str]] = []
        self.layouts: set[int | None] = set()
        self._dataset_ids: list[int] = []
        self._as_is: tuple[list[Any], ...] = tuple([] for _ in _AS_IS)
        self._labels: list[str | None] = []
        self._numbers: list[bytes] = []
        self._bare: dict[int, int] = {}

    def add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        ids, classes, dataset_ids, *as_is, layouts, labels, numbers = zip(*rows, strict=True)
        if None in layouts:
            start = len(self.keys)
            self._bare |= {
                run_id: start + i
                for i, (run_id, layout) in enumerate(zip(ids, layouts, strict=True))
                if layout is None
            }
            classes = tuple(name or "" for name in classes)
        self.keys += zip(ids, classes, strict=True)
        self.layouts.update(layouts)
        self._dataset_ids += dataset_ids
        for mine, values in zip(self._as_is, as_is, strict=True):
            mine += values
        self._labels += labels
        self._numbers += numbers

    def add_bare(self, found: Mapping[int, tuple[bytes, str]]) -> bool:
        """Fill in the runs without results; False where they are others than those seen."""
        if set(found) != set(self._bare):
            return False
        for run_id, (numbers, labels) in found.items():
            place = self._bare[run_id]
            self._labels[place], self._numbers[place] = labels, numbers
        return True

    def columns(self, counts: Mapping[int, tuple[Any, ...]]) -> dict[str, Any]:
        """Columns by name."""
        import numpy as np

        order = None
        if sorted(self.keys) != self.keys:
            order = np.array(sorted(range(len(self.keys)), key=self.keys.__getitem__))
        found: dict[str, Any] = {}
        for name, values in zip(_AS_IS, self._as_is, strict=True):
            found[name] = values if order is None else [values[i] for i in order]
        number, dataset = self._positions(self._dataset_ids, order)
        for i, name in enumerate(_OF_DATASET):
            of_each = np.array([counts[d][i] for d in dataset], dtype=np.float64)
            found[name] = of_each[number]
        found |= self._words(order)
        found |= self._values(order)
        return found

    @staticmethod
    def _positions(values: Sequence[Any], order: Any) -> tuple[Any, list[Any]]:
        """Number of each value among the different ones, and these."""
        import numpy as np

        known: dict[Any, int] = {}
        number = np.array([known.setdefault(value, len(known)) for value in values])
        return number if order is None else number[order], list(known)

    def _words(self, order: Any) -> dict[str, "pd.Series[Any]"]:
        import pandas as pd

        number, different = self._positions(self._labels, order)
        # many rows share all their words, so each set of them is read once
        words = zip(*(json.loads(text) for text in different), strict=True)
        return {
            COLUMNS[place].name: pd.Series(values).iloc[number].reset_index(drop=True)
            for place, values in zip(LABELS, words, strict=True)
        }

    def _values(self, order: Any) -> dict[str, Any]:
        import numpy as np
        import pandas as pd

        table = np.empty((NUMBERS.size // 8, len(self.keys)), dtype=np.int64)
        for start in range(0, len(self.keys), _ROWS_AT_ONCE):
            part = b"".join(self._numbers[start : start + _ROWS_AT_ONCE])
            rows = np.frombuffer(part, dtype="<i8").reshape(-1, len(table))
            table[:, start : start + len(rows)] = rows.T
        if order is not None:
            table = table[:, order]
        found: dict[str, Any] = {}
        for place, values in zip([*REALS, *WHOLES, *TIMES], table, strict=True):
            column = COLUMNS[place]
            if place in REALS:
                found[column.name] = values.view(np.float64)
            elif place in TIMES:
                times = pd.Series(values.view("datetime64[us]"))
                found[column.name] = times.dt.tz_localize("UTC")
            else:
                is_bool = isinstance(column.type, sa.Boolean)
                found[column.name] = values.astype(bool) if is_bool else values
        return found
