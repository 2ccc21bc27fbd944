"""Results of finished runs in one piece each, so that a frame of many runs is quick to make.

A result has about 190 numbers, and every one that passes through a driver becomes an object:
some seconds for 100,000 runs. `packed_summaries` holds the same values once more, the numbers of
a row as bytes and its words as JSON. The columns stay the record: triggers drop a packed row as
soon as anything changes what it was made from, and a database that lacks packed rows is read
column by column, more slowly.
"""

import datetime
import json
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db.schema import SPEC_COLUMNS, UtcDateTime, packed_summaries, run_summary, runs

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_NO_TIME = -(2**63)
"""numpy's NaT among 64-bit integers."""
_ROWS_AT_ONCE = 2000

OF_RUN: tuple[sa.Column[Any], ...] = (runs.c.replicate, *(runs.c[name] for name in SPEC_COLUMNS))
"""Columns of `runs` in a packed row; they never change, since a run's key is made of them."""
OF_RESULT: tuple[sa.Column[Any], ...] = tuple(
    column for column in run_summary.c if column.name not in {"run_id", "attempt_id"}
)
"""Columns of `run_summary` in a packed row."""


def _kind(column: sa.Column[Any]) -> str:
    if isinstance(column.type, sa.Text):
        return "label"
    if isinstance(column.type, UtcDateTime):
        return "time"
    is_whole = isinstance(column.type, sa.Integer) and not column.nullable
    return "whole" if is_whole or isinstance(column.type, sa.Boolean) else "real"


COLUMNS: tuple[sa.Column[Any], ...] = (*OF_RUN, *OF_RESULT)
LABELS, REALS, WHOLES, TIMES = (
    [place for place, column in enumerate(COLUMNS) if _kind(column) == kind]
    for kind in ("label", "real", "whole", "time")
)
_DEVICE_CLASS = [str(column) for column in COLUMNS].index("run_summary.device_class")
NUMBERS = struct.Struct(f"<{len(REALS)}d{len(WHOLES) + len(TIMES)}q")
"""Values at `REALS`, `WHOLES` and `TIMES` of `COLUMNS`, the latter in microseconds since 1970."""

LAYOUT: int = zlib.crc32(" ".join(f"{column} {_kind(column)}" for column in COLUMNS).encode())
"""What the columns and their order are; rows of another layout are not read."""


def refresh(connection: Connection, run_id: int | None = None) -> None:
    """Pack the results that are not packed, inside the caller's transaction.

    Parameters
    ----------
    connection : sqlalchemy.engine.Connection
        In a transaction that may write.
    run_id : int, optional
        Only those of one run; else of all, and rows of another layout are made anew.
    """
    mine = packed_summaries.c.run_id == run_summary.c.run_id
    query = (
        sa.select(run_summary.c.run_id, *COLUMNS)
        .join_from(run_summary, runs, runs.c.id == run_summary.c.run_id)
        .where(
            ~sa.exists().where(mine, packed_summaries.c.device_class == run_summary.c.device_class)
        )
        .order_by(run_summary.c.run_id, run_summary.c.device_class)
        .limit(_ROWS_AT_ONCE)
    )
    if run_id is None:
        connection.execute(packed_summaries.delete().where(packed_summaries.c.layout != LAYOUT))
    else:
        query = query.where(run_summary.c.run_id == run_id)
    while found := connection.execute(query).all():
        connection.execute(packed_summaries.insert(), [_packed(row) for row in found])
        if len(found) < _ROWS_AT_ONCE:
            break
        # rows of the last run that are packed by now are not found again
        query = query.where(run_summary.c.run_id >= found[-1][0])


def _packed(row: Sequence[Any]) -> dict[str, Any]:
    numbers, labels = pack(row[1:])
    return {
        "run_id": row[0],
        "device_class": row[1 + _DEVICE_CLASS],
        "layout": LAYOUT,
        "labels": labels,
        "numbers": numbers,
    }


def pack(values: Sequence[Any]) -> tuple[bytes, str]:
    """Numbers and words of one row.

    Parameters
    ----------
    values : sequence
        Of `COLUMNS`.
    """
    numbers = NUMBERS.pack(
        *[math.nan if values[place] is None else values[place] for place in REALS],
        *[values[place] for place in WHOLES],
        *[_microseconds(values[place]) for place in TIMES],
    )
    return numbers, json.dumps([values[place] for place in LABELS], separators=(",", ":"))


def _microseconds(time: datetime.datetime | None) -> int:
    return _NO_TIME if time is None else (time - _EPOCH) // _MICROSECOND


def triggers(dialect: str) -> list[str]:
    """Statements that make a change of a result, or of its run, drop the packed row.

    Parameters
    ----------
    dialect : {'sqlite', 'postgresql'}
        Name of the database.
    """
    redefined = ", ".join(column.name for column in OF_RUN)
    of_result = "run_id = OLD.run_id AND device_class = OLD.device_class"
    drop = "DELETE FROM packed_summaries WHERE"
    if dialect == "sqlite":
        # the delete is the foreign key's work too, but not every client turns those on
        return [
            "CREATE TRIGGER run_summary_updated BEFORE UPDATE ON run_summary "
            f"BEGIN {drop} {of_result}; END",
            "CREATE TRIGGER run_summary_deleted AFTER DELETE ON run_summary "
            f"BEGIN {drop} {of_result}; END",
            f"CREATE TRIGGER runs_redefined AFTER UPDATE OF {redefined} ON runs "
            f"BEGIN {drop} run_id = OLD.id; END",
        ]
    function = "CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS $$ {} $$"
    each = "FOR EACH ROW EXECUTE FUNCTION"
    return [
        function.format("unpack_result", f"BEGIN {drop} {of_result}; RETURN NEW; END"),
        function.format("unpack_run", f"BEGIN {drop} run_id = OLD.id; RETURN NULL; END"),
        f"CREATE TRIGGER run_summary_updated BEFORE UPDATE ON run_summary {each} unpack_result()",
        f"CREATE TRIGGER runs_redefined AFTER UPDATE OF {redefined} ON runs {each} unpack_run()",
    ]
