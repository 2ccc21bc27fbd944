"""Rows of steps, evaluations and histograms: made from records, inserted without repeats."""

import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db.measures import EvaluationRecord, HistogramRecord, StepRecord
from db.schema import evaluations, histograms, steps

Row = tuple[Any, ...]

STEP_COLUMNS: tuple[str, ...] = tuple(c.name for c in steps.c)[1:]
EVALUATION_COLUMNS: tuple[str, ...] = tuple(c.name for c in evaluations.c)[1:]
HISTOGRAM_COLUMNS: tuple[str, ...] = tuple(c.name for c in histograms.c)[1:]
_COLUMNS = {"steps": STEP_COLUMNS, "evaluations": EVALUATION_COLUMNS,
            "histograms": HISTOGRAM_COLUMNS}  # fmt: skip
_ROWS_PER_STATEMENT = 100
_TABLES = {"steps": steps, "evaluations": evaluations, "histograms": histograms}


def real(value: Any) -> float | None:
    """A finite Python float; None for None, NaN and infinities, which never enter SQL.

    Parameters
    ----------
    value : number or None
        Of Python, numpy or a one-element tensor.
    """
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def whole(value: Any) -> int | None:
    """A Python int of any integer type; None stays None.

    Raises
    ------
    TypeError
        Not an integer, such as 2.5.
    """
    return None if value is None else operator.index(value)


def step_row(record: StepRecord) -> Row:
    """Values of `STEP_COLUMNS`."""
    return (
        operator.index(record.step),
        operator.index(record.epoch),
        real(record.loss),
        real(record.gradient_norm),
        real(record.learning_rate),
        real(record.step_seconds),
        whole(record.tokens),
        whole(record.allocated_bytes),
        whole(record.reserved_bytes),
        whole(record.peak_bytes),
    )


def evaluation_row(record: EvaluationRecord) -> Row:
    """Values of `EVALUATION_COLUMNS`."""
    return (
        str(record.split),
        str(record.metric),
        operator.index(record.k),
        operator.index(record.step),
        operator.index(record.epoch),
        real(record.value),
        real(record.standard_error),
        whole(record.num_users),
    )


def histogram_row(record: HistogramRecord) -> Row:
    """Values of `HISTOGRAM_COLUMNS`; edges and counts as JSON lists."""
    edges = json.dumps([real(edge) for edge in record.edges])
    counts = json.dumps([operator.index(count) for count in record.counts])
    return (str(record.name), operator.index(record.step), edges, counts)


@dataclass(slots=True)
class Batch:
    """Rows of one attempt on their way into the database."""

    steps: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    histograms: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps) + len(self.evaluations) + len(self.histograms)

    def parts(self) -> list[tuple[str, list[Row]]]:
        """Table name and rows, in the order of insertion, empty ones left out."""
        named = [("steps", self.steps), ("evaluations", self.evaluations)]
        named.append(("histograms", self.histograms))
        return [(name, rows) for name, rows in named if rows]

    def last_step(self) -> int | None:
        """Highest step number among the step rows."""
        return max((row[0] for row in self.steps), default=None)


def insert_batch(connection: Connection, attempt_id: int, batch: Batch, *, fresh: bool) -> None:
    """Insert the rows of an attempt inside the caller's transaction; rows already there stay.

    Parameters
    ----------
    connection : sqlalchemy.engine.Connection
        In a transaction that has fenced the attempt.
    attempt_id : int
        Attempt of all rows.
    batch : Batch
        What to insert.
    fresh : bool
        No row was ever sent before, so PostgreSQL may take step rows by plain COPY; a repeat then
        raises IntegrityError and the caller comes back with False.
    """
    for name, rows in batch.parts():
        if connection.dialect.name == "sqlite":
            _insert_sqlite(connection, name, attempt_id, rows)
        elif fresh and name == "steps":
            _copy(connection, name, attempt_id, rows)
        else:
            _insert_unnest(connection, name, attempt_id, rows)


def _insert_sqlite(connection: Connection, name: str, attempt_id: int, rows: Sequence[Row]) -> None:
    # many rows a statement take a third less time than executemany
    driver = connection.connection.driver_connection
    assert driver is not None
    for start in range(0, len(rows), _ROWS_PER_STATEMENT):
        chunk = rows[start : start + _ROWS_PER_STATEMENT]
        driver.execute(
            _insert_statement(name, attempt_id, len(chunk)), list(chain.from_iterable(chunk))
        )


def _insert_statement(name: str, attempt_id: int, count: int) -> str:
    columns = _COLUMNS[name]
    # the attempt is text of the statement: an int, never user input
    row = f"({int(attempt_id)}, {', '.join('?' * len(columns))})"
    return (
        f"INSERT INTO {name} (attempt_id, {', '.join(columns)}) "
        f"VALUES {', '.join([row] * count)} ON CONFLICT DO NOTHING"
    )


def _copy(connection: Connection, name: str, attempt_id: int, rows: Sequence[Row]) -> None:
    columns = _COLUMNS[name]
    driver = connection.connection.driver_connection
    assert driver is not None
    with (
        driver.cursor() as cursor,
        cursor.copy(
            f"COPY {name} (attempt_id, {', '.join(columns)}) FROM STDIN (FORMAT BINARY)"
        ) as copy,
    ):
        copy.set_types(["int8", *_postgresql_types(name)])
        for row in rows:
            copy.write_row((attempt_id, *row))


def _insert_unnest(connection: Connection, name: str, attempt_id: int, rows: Sequence[Row]) -> None:
    columns = _COLUMNS[name]
    arrays = ", ".join(f"%s::{kind}[]" for kind in _postgresql_types(name))
    statement = (
        f"INSERT INTO {name} (attempt_id, {', '.join(columns)}) "
        f"SELECT {int(attempt_id)}, u.* FROM unnest({arrays}) AS u ON CONFLICT DO NOTHING"
    )
    connection.exec_driver_sql(statement, tuple(list(column) for column in zip(*rows, strict=True)))


def _postgresql_types(name: str) -> list[str]:
    kinds: list[tuple[type[sa.types.TypeEngine[Any]], str]] = [
        (sa.BigInteger, "int8"),
        (sa.Integer, "int4"),
        (sa.Double, "float8"),
        (sa.Text, "text"),
    ]
    columns = list(_TABLES[name].c)[1:]
    return [next(text for kind, text in kinds if isinstance(c.type, kind)) for c in columns]
