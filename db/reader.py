"""Connections that cannot write, whatever SQL comes over them.

SQLite files are opened with mode=ro, `query_only` and an authorizer that admits SELECT alone;
PostgreSQL runs one cursor inside a read-only transaction with a time limit, and calls no function
that may have side effects: such functions write files, signal other sessions or open connections
of their own, which a read-only transaction does not prevent.
"""

import decimal
import os
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool

from db import migrate
from db.connect import DRIVER_ERRORS, explained, parse_url, postgresql_engine, shown, sqlite_path
from db.errors import SrsweepError, StoreError

TIMEOUT_SECONDS = 300.0
"""How long one query may take."""

_ADMITTED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_PRAGMAS = {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "quick_check"}
# without a value these only tell; SQLAlchemy asks for the first
_TELLING = {("read_uncommitted", None), ("journal_mode", None)}
_REFUSED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}
_LONGEST_VALUE = 64 * 2**20
"""Most bytes of one value that SQLite may make, so that no `randomblob` takes all memory."""

_MAPPED_BYTES = 2**40
"""Most bytes of a SQLite file to map into memory; SQLite itself stops at 2 GiB or so."""

_NUMERIC = 1700
_SENT_BINARY = {16, 20, 21, 23, 25, 701, 1043, 1184, _NUMERIC}
"""Type numbers that PostgreSQL never changes: truth values, whole numbers, doubles, texts, times.

Their values are the same objects from text and from bytes."""

_HARMLESS = (
    "array_sample", "array_shuffle", "bernoulli", "clock_timestamp", "gen_random_uuid",
    "pg_database_size", "pg_indexes_size", "pg_relation_size", "pg_table_size",
    "pg_total_relation_size", "random", "random_normal", "setseed", "system", "timeofday",
    "uuidv4", "uuidv7",
)  # fmt: skip
# Functions declared volatile, and those of extensions that run a text as SQL. Names are sought
# in the whole text, strings and comments included: no trick of quoting hides one.
_SIDE_EFFECTS = """
SELECT min(proname) FROM pg_catalog.pg_proc
WHERE (provolatile = 'v' OR proname ~ '^(crosstab|connectby|xpath_table|dblink)')
AND NOT proname::text = ANY(%(harmless)s)
AND (proname::text = ANY(%(words)s)
     OR (proname !~ '^[a-zA-Z_][a-zA-Z0-9_$]*$' AND position(proname::text in %(text)s) > 0))
"""
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")
_ESCAPED_NAME = re.compile(r"[uU]&\"")


@dataclass(frozen=True)
class Result:
    """Names of the columns and the rows of a query."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def dicts(self) -> list[dict[str, Any]]:
        """Rows by column name."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@contextmanager
def connected(
    url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, any_version: bool = False
) -> Iterator[Connection]:
    """Read-only connection to a run database of this schema.

    Parameters
    ----------
    url : str
        See `db.connect.parse_url`.
    timeout_seconds : float
        After so long a query ends with an error.
    any_version : bool
        Do not look at the schema.

    Raises
    ------
    StoreError
        The database cannot be reached, is empty or is not srsweep's; every error of the body.
    SchemaVersionError
        It has another schema.
    """
    engine = _engine(url, timeout_seconds)
    try:
        with engine.connect() as connection:
            if not any_version:
                migrate.check(connection)
            yield connection
    except SrsweepError:
        raise
    except DRIVER_ERRORS as error:
        raise StoreError(explained(url, error)) from None
    finally:
        engine.dispose()


def _engine(url: str, timeout_seconds: float) -> Engine:
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is not None:
        if not path.exists():
            raise StoreError(f"{shown(url)} does not exist; `srsweep launch` makes it")
        return sa.create_engine(
            parsed,
            creator=lambda: _open_sqlite(path, timeout_seconds),
            poolclass=NullPool,
        )
    milliseconds = max(1, int(timeout_seconds * 1000))
    settings = (
        "-c default_transaction_read_only=on -c cursor_tuple_fraction=1.0 "
        f"-c statement_timeout={milliseconds}"
    )
    return postgresql_engine(parsed, {"options": settings})


def _open_sqlite(path: Path, timeout_seconds: float) -> sqlite3.Connection:
    place = urllib.parse.quote(str(path.resolve()))
    log = path.with_name(path.name + "-wal")
    # a folder that cannot be written cannot hold the shared memory file that WAL needs
    frozen = not os.access(path.parent, os.W_OK) and not log.exists()
    mode = "mode=ro&immutable=1" if frozen else "mode=ro"
    connection = sqlite3.connect(
        f"file:{place}?{mode}", uri=True, timeout=30.0, check_same_thread=False
    )
    connection.isolation_level = None
    connection.execute("PRAGMA query_only = ON")
    # the file is read where the system has it; a copy of every page doubled the time of a listing
    connection.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
    connection.set_authorizer(_authorize)
    end = time.monotonic() + timeout_seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > end), 10_000)
    return connection


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second in _REFUSED_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    if action in _ADMITTED:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and (first in _PRAGMAS or (first, second) in _TELLING):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def select(connection: Connection, sql: str, params: Mapping[str, Any] | None = None) -> Result:
    """Run one SELECT that a user wrote, on a connection of `connected`.

    Parameters
    ----------
    connection : sqlalchemy.engine.Connection
        Read-only.
    sql : str
        One statement; parameters as `:name`.
    params : mapping, optional
        Values of the parameters.

    Raises
    ------
    StoreError
        Anything but one SELECT, an unknown table or column, a missing parameter, too slow.
    """
    where = shown(connection.engine.url)
    try:
        if connection.dialect.name == "sqlite":
            return _select_sqlite(connection, sql, params)
        return _select_postgresql(connection, sql, params)
    except _QUERY_ERRORS as error:
        text = explained(where, error).removeprefix(f"{where}: ")
        if any(word in text for word in _REFUSALS):
            text = f"a query is one SELECT and cannot write ({text})"
        elif "interrupted" in text or "statement timeout" in text:
            text = f"the query took too long; narrow it with WHERE or LIMIT ({text})"
        raise StoreError(f"query: {text}") from None


# Python 3.11 raises a Warning where later versions raise a ProgrammingError
_QUERY_ERRORS: tuple[type[Exception], ...] = (*DRIVER_ERRORS, sqlite3.Warning)
_REFUSALS = (
    "not authorized", "one statement at a time", "multiple commands", "prohibited", "readonly",
    "read-only", "syntax error at or near", "DECLARE CURSOR",
)  # fmt: skip


def _driver(connection: Connection) -> Any:
    driver = connection.connection.driver_connection
    assert driver is not None
    return driver


def _select_sqlite(connection: Connection, sql: str, params: Mapping[str, Any] | None) -> Result:
    cursor = _driver(connection).execute(sql, dict(params or {}))
    if cursor.description is None:
        raise StoreError("query: nothing is selected; a query is one SELECT")
    return Result(_names([column[0] for column in cursor.description]), cursor.fetchall())


def _select_postgresql(
    connection: Connection, sql: str, params: Mapping[str, Any] | None
) -> Result:
    driver = _driver(connection)
    driver.rollback()
    driver.read_only = True
    _refuse_side_effects(driver, sql)
    # A named cursor is DECLAREd: the server itself admits one SELECT, no writing CTE, no
    # second statement and no command that could change or end the read-only transaction.
    with driver.cursor(name="srsweep_query") as cursor:
        if params:
            compiled = sa.text(sql).compile(dialect=connection.dialect)
            cursor.execute(str(compiled), dict(params))
        else:
            cursor.execute(sql)
        kinds = {column.type_code for column in cursor.description or ()}
        names = _names([column.name for column in cursor.description or ()])
        if kinds <= _SENT_BINARY:
            # numbers written out and read again took longer than the query
            fetch = "FETCH ALL FROM srsweep_query"
            rows = driver.execute(fetch, binary=True, prepare=False).fetchall()
        else:
            rows = cursor.fetchall()
    driver.rollback()
    return Result(names, [_plain(row) for row in rows] if _NUMERIC in kinds else rows)


def batches(
    connection: Connection, query: sa.Select[Any], rows_at_once: int
) -> Iterator[list[tuple[Any, ...]]]:
    """Rows of a query of srsweep's own, as the driver makes them: no type of ours is applied.

    Parameters
    ----------
    connection : sqlalchemy.engine.Connection
        Of `connected`.
    query : sqlalchemy.Select
        Parameters are numbers and texts.
    rows_at_once : int
        Rows of every batch but the last.
    """
    compiled = query.compile(
        dialect=connection.dialect, compile_kwargs={"render_postcompile": True}
    )
    driver = _driver(connection)
    if connection.dialect.name == "sqlite":
        values = [compiled.params[name] for name in compiled.positiontup or ()]
        with closing(driver.execute(str(compiled), values)) as cursor:
            while found := cursor.fetchmany(rows_at_once):
                yield found
        return
    # a cursor in the server, so that the client never holds the whole answer
    with driver.cursor(name="srsweep_batches", binary=True) as cursor:
        cursor.execute(str(compiled), compiled.params)
        while found := cursor.fetchmany(rows_at_once):
            yield found


def _refuse_side_effects(driver: Any, sql: str) -> None:
    if _ESCAPED_NAME.search(sql):
        raise StoreError('query: names written as U&"..." are refused; write the name itself')
    words = set(_WORD.findall(sql))
    values = {
        "harmless": list(_HARMLESS),
        "words": sorted(words | {word.lower() for word in words}),
        "text": sql.replace('""', '"').replace("\0", ""),
    }
    found = driver.execute(_SIDE_EFFECTS, values).fetchone()
    if found[0] is not None:
        raise StoreError(
            f"query: {found[0]!r} is a function that may have side effects; a query is one SELECT "
            "and cannot write"
        )


def _plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """PostgreSQL's averages of integers are decimals; elsewhere they are floats."""
    if any(isinstance(value, decimal.Decimal) for value in row):
        return tuple(float(v) if isinstance(v, decimal.Decimal) else v for v in row)
    return row


def _names(names: list[str]) -> list[str]:
    """Column names made unique: the second `id` is `id_2`."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique
