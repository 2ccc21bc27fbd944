"""A whole run database from one place to another: all of it or nothing.

A SQLite file is copied by SQLite's online backup, which writers do not notice. Between databases
of two kinds the rows go table by table, out of one snapshot and into one transaction; a copy that
was interrupted leaves the target empty, and the same command begins again.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db import migrate
from db.connect import check_local, shown, sqlite_path, translated, write_engine
from db.errors import StoreError
from db.schema import UtcDateTime, attempts, evaluations, histograms, metadata, steps
from db.spec import AttemptStatus

_ROWS_AT_ONCE = 5000
_PLAIN = (steps, evaluations, histograms)
"""Tables whose values SQLite takes as they are; the others have times and truth values."""
_PER_ATTEMPT = (steps, evaluations)


def copy_database(source: str, target: str, *, live: bool = False) -> dict[str, int]:
    """Copy every row of a run database into a new or empty one, and compare the two.

    Parameters
    ----------
    source : str
        Database with the schema of this srsweep; it is only read.
    target : str
        A SQLite file that does not exist yet, or an empty PostgreSQL database.
    live : bool
        Copy although attempts are running. In the copy their leases run out and they are lost; the
        workers go on writing into the source.

    Returns
    -------
    dict of str to int
        Rows by table, equal on both sides.

    Raises
    ------
    StoreError
        Either cannot be reached or used, the target holds something, attempts are running, or the
        counts differ; the target is then as it was before.
    """
    file = sqlite_path(target)
    if file is not None:
        check_local(target)
        if file.exists():
            raise StoreError(f"{shown(target)} exists; name a file that does not, or remove it")
    with _snapshot(source) as reading:
        if not live:
            _refuse_running(reading, source)
        if file is None:
            return _into_server(reading, source, target)
        return _into_file(reading, source, target, file)


@contextmanager
def _snapshot(url: str) -> Iterator[Connection]:
    """Connection whose queries all see the database at one moment, with this schema."""
    path = sqlite_path(url)
    if path is not None and not path.exists():
        raise StoreError(f"{shown(url)} does not exist; there is nothing to copy")
    engine = write_engine(url)
    options: dict[str, Any] = {"reads": True}
    if path is None:
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with (
        translated(url),
        engine.connect().execution_options(**options) as connection,
        connection.begin(),
    ):
        migrate.check(connection)
        yield connection
    engine.dispose()


def _refuse_running(connection: Connection, source: str) -> None:
    running = connection.scalar(
        sa.select(sa.func.count()).where(attempts.c.status == AttemptStatus.RUNNING)
    )
    if running:
        raise StoreError(
            f"{shown(source)} has {running} running attempts; let the sweep end or stop it with "
            "`srsweep stop`, or copy with --live, which counts them as lost in the copy"
        )


def _into_file(reading: Connection, source: str, target: str, file: Path) -> dict[str, int]:
    """Make the copy under another name and put it in place when it is complete."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        if sqlite_path(source) is not None:
            with translated(target):
                _back_up(reading, partial)
        else:
            _fill(reading, source, f"sqlite:///{partial}", target)
        counts = _verified(reading, f"sqlite:///{partial}", target)
        with translated(target):
            _settle(partial)
        if file.exists():
            raise StoreError(f"{shown(target)} was made by another program meanwhile")
        partial.rename(file)
        return counts
    except OSError as error:
        raise StoreError(
            f"{shown(target)}: {error.strerror or error}; nothing was copied"
        ) from None
    finally:
        for path in (partial, *(partial.with_name(partial.name + end) for end in ("-wal", "-shm"))):
            path.unlink(missing_ok=True)


def _back_up(reading: Connection, partial: Path) -> None:
    driver: Any = reading.connection.driver_connection
    partial.touch(mode=0o600)
    copy = sqlite3.connect(partial)
    try:
        driver.backup(copy)
    finally:
        copy.close()


def _settle(partial: Path) -> None:
    """Bring the whole database into its one file, on disk before it gets its name."""
    connection = sqlite3.connect(partial, isolation_level=None)
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        answer = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    finally:
        connection.close()
    if answer != "ok":
        raise StoreError(f"the copy is damaged ({answer}); nothing was copied")
    with partial.open("rb") as file:
        os.fsync(file.fileno())


def _fill(reading: Connection, source: str, place: str, target: str) -> None:
    engine = write_engine(place)
    with translated(target):
        migrate.ensure(engine)
        with engine.begin() as writing:
            _copy_tables(reading, source, writing)
    engine.dispose()


def _into_server(reading: Connection, source: str, target: str) -> dict[str, int]:
    engine = write_engine(target)
    with translated(target):
        migrate.ensure(engine)
        with engine.begin() as writing:
            # a second copy, or a sweep that begins, waits until this one is complete
            writing.exec_driver_sql("LOCK TABLE runs, sweeps, datasets IN EXCLUSIVE MODE")
            taken = [table.name for table in metadata.sorted_tables if _count(writing, table)]
            if taken:
                raise StoreError(
                    f"{shown(target)} already has rows in {', '.join(taken)}; "
                    "copy into an empty database"
                )
            _copy_tables(reading, source, writing)
            _set_sequences(writing)
            counts = _compared(reading, writing, target)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    engine.dispose()
    return counts


def _copy_tables(reading: Connection, source: str, writing: Connection) -> None:
    for table in metadata.sorted_tables:
        # in the order of the key, so that the new table is laid out like a fresh one
        query = sa.select(table).order_by(*table.primary_key.columns)
        streaming = {"stream_results": True, "yield_per": _ROWS_AT_ONCE}
        with translated(source):
            found = reading.execute(query, execution_options=streaming)
        with closing(found):
            batches = found.partitions()
            while True:
                with translated(source):
                    batch = next(batches, None)
                if batch is None:
                    break
                _insert(writing, table, batch)


def _insert(writing: Connection, table: sa.Table, rows: Sequence[sa.Row[Any]]) -> None:
    names = [column.name for column in table.c]
    driver: Any = writing.connection.driver_connection
    if writing.dialect.name == "postgresql":
        with (
            driver.cursor() as cursor,
            cursor.copy(f"COPY {table.name} ({', '.join(names)}) FROM STDIN (FORMAT BINARY)") as to,
        ):
            to.set_types([_type_name(column) for column in table.c])
            for row in rows:
                to.write_row(row)
    elif table in _PLAIN:
        marks = ", ".join("?" * len(names))
        driver.executemany(
            f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})",
            [tuple(row) for row in rows],
        )
    else:
        writing.execute(table.insert(), [dict(row._mapping) for row in rows])


def _type_name(column: sa.Column[Any]) -> str:
    kinds: list[tuple[type[sa.types.TypeEngine[Any]], str]] = [
        (sa.BigInteger, "int8"),
        (sa.Integer, "int4"),
        (sa.Double, "float8"),
        (sa.Boolean, "bool"),
        (UtcDateTime, "timestamptz"),
        (sa.Text, "text"),
        (sa.LargeBinary, "bytea"),
    ]
    return next(name for kind, name in kinds if isinstance(column.type, kind))


def _set_sequences(writing: Connection) -> None:
    """Let the server's next ids come after the copied ones."""
    for table in metadata.sorted_tables:
        if "id" in table.c:
            writing.exec_driver_sql(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), "
                f"(SELECT coalesce(max(id), 0) + 1 FROM {table.name}), false)"
            )


def _count(connection: Connection, table: sa.Table) -> int:
    return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def _verified(reading: Connection, place: str, target: str) -> dict[str, int]:
    engine = write_engine(place)
    with translated(target), engine.connect().execution_options(reads=True) as connection:
        counts = _compared(reading, connection, target)
    engine.dispose()
    return counts


def _compared(reading: Connection, copied: Connection, target: str) -> dict[str, int]:
    """Rows by table, once they and those of each attempt are the same on both sides."""
    counts = {}
    for table in metadata.sorted_tables:
        counts[table.name], found = _count(reading, table), _count(copied, table)
        if counts[table.name] != found:
            raise StoreError(
                f"{shown(target)} got {found:,} of {counts[table.name]:,} rows of {table.name}; "
                "nothing was kept"
            )
    for table in _PER_ATTEMPT:
        number = sa.func.count(), sa.func.min(table.c.step), sa.func.max(table.c.step)
        query = sa.select(table.c.attempt_id, *number).group_by(table.c.attempt_id)
        pairs = [sorted(tuple(row) for row in c.execute(query)) for c in (reading, copied)]
        if pairs[0] != pairs[1]:
            raise StoreError(f"{shown(target)} has other {table.name} than the source; "
                             "nothing was kept")  # fmt: skip
    return counts
