"""What is wrong with a run database, or soon will be, and what to do about it."""

import datetime
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex

from db import migrate, reader, spool
from db.connect import NETWORK_FILE_SYSTEMS, file_system, shown, sqlite_path
from db.errors import SchemaVersionError
from db.schema import SCHEMA_VERSION, VIEWS, attempts, metadata, runs, utc_in
from db.spec import AttemptStatus, RunStatus

_SKEW_SECONDS = 5.0
_FREE_BYTES = 2**30
_UNSEEN_ROWS = 100_000

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


def examine(url: str, spool_dir: Path | None = None, *, integrity: bool = False) -> list[Finding]:
    """Look at a run database without changing it.

    Parameters
    ----------
    url : str
        Run database.
    spool_dir : pathlib.Path, optional
        Folder of this host's spools.
    integrity : bool
        Read the whole of a SQLite file for damage, some seconds per gigabyte.

    Raises
    ------
    StoreError
        The database cannot be reached, is empty or is not srsweep's.
    """
    with reader.connected(url, any_version=True) as connection:
        found = list(_schema(connection))
        if found[0].level == "ok":
            for check in _CHECKS:
                found += check(connection)
        if sqlite_path(url) is None:
            found += _of_server(connection)
        else:
            found += _of_sqlite(connection, url, integrity)
    if spool_dir is not None:
        found += _spools(spool_dir)
    return found


def _schema(connection: Connection) -> Iterator[Finding]:
    try:
        migrate.check(connection)
    except SchemaVersionError as error:
        text, _, remedy = str(error).partition("; ")
        yield Finding(check="schema", level="error", text=text, remedy=remedy)
    else:
        yield Finding(check="schema", level="ok", text=f"version {SCHEMA_VERSION}")


def _objects(connection: Connection) -> Iterator[Finding]:
    inspector = sa.inspect(connection)
    tables, views = set(inspector.get_table_names()), set(inspector.get_view_names())
    gone = sorted((set(metadata.tables) - tables) | (set(VIEWS) - views))
    if gone:
        yield Finding(
            check="tables", level="error", text=f"missing: {', '.join(gone)}",
            remedy="restore a backup, or `srsweep db copy` what is left into a new database",
        )  # fmt: skip
    missing: list[sa.Index] = []
    for table in metadata.sorted_tables:
        if table.name in tables:
            known = {index["name"] for index in inspector.get_indexes(table.name)}
            missing += [index for index in table.indexes if index.name not in known]
    for index in sorted(missing, key=lambda i: str(i.name)):
        statement = " ".join(str(CreateIndex(index).compile(dialect=connection.dialect)).split())
        yield Finding(
            check="indices", level="error" if index.unique else "warning",
            text=f"{index.name} is missing: "
            + ("two workers may run one run" if index.unique else "queries read whole tables"),
            remedy=f"run this SQL: {statement}",
        )  # fmt: skip
    if not gone and not missing:
        yield Finding(check="indices", level="ok", text="all there")


def _leases(connection: Connection) -> Iterator[Finding]:
    running = attempts.c.status == AttemptStatus.RUNNING
    overdue = connection.execute(
        sa.select(runs.c.run_key, attempts.c.host)
        .join(runs, runs.c.id == attempts.c.run_id)
        .where(running, attempts.c.lease_until < utc_in())
        .order_by(attempts.c.id)
    ).all()
    alive = connection.scalar(sa.select(sa.func.count()).where(running)) or 0
    if overdue:
        named = ", ".join(f"{row.run_key[:12]} on {row.host}" for row in overdue[:3])
        yield Finding(
            check="leases", level="warning",
            text=f"{len(overdue)} of {alive} running attempts no longer report: {named}",
            remedy="`srsweep launch` of their sweep counts them as lost and runs them again",
        )  # fmt: skip
    else:
        yield Finding(check="leases", level="ok", text=f"{alive} running attempts, none overdue")


def _statuses(connection: Connection) -> Iterator[Finding]:
    held = sa.exists().where(
        attempts.c.run_id == runs.c.id, attempts.c.status == AttemptStatus.RUNNING
    )
    is_running = runs.c.status == RunStatus.RUNNING
    wrong = connection.scalar(
        sa.select(sa.func.count()).select_from(runs).where(sa.or_(
            sa.and_(is_running, ~held), sa.and_(~is_running, held)))
    )  # fmt: skip
    if wrong:
        yield Finding(
            check="statuses", level="error",
            text=f"{wrong} runs say they run without an attempt that does, or the reverse",
            remedy="something else wrote into the database; restore a backup",
        )  # fmt: skip


def _packed(connection: Connection) -> Iterator[Finding]:
    tables = (metadata.tables["run_summary"], metadata.tables["packed_summaries"])
    results, packed = (
        connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in tables
    )
    if results != packed:
        yield Finding(
            check="packed results", level="warning",
            text=f"{packed:,} of {results:,} results are packed; frames of many runs are slow",
            remedy="`srsweep db upgrade` packs the others",
        )  # fmt: skip


def _clock(connection: Connection) -> Iterator[Finding]:
    there = connection.scalar(sa.select(utc_in()))
    assert there is not None
    skew = abs((there - datetime.datetime.now(datetime.UTC)).total_seconds())
    if skew > _SKEW_SECONDS:
        yield Finding(
            check="clock", level="warning",
            text=f"this host and the database differ by {skew:.0f} s",
            remedy="leases go by the database's clock alone; synchronise the clocks (NTP) so that "
            "logs and database can be compared",
        )  # fmt: skip


_CHECKS: tuple[Callable[[Connection], Iterator[Finding]], ...] = (
    _objects, _leases, _statuses, _packed, _clock,
)  # fmt: skip


def _of_sqlite(connection: Connection, url: str, integrity: bool) -> Iterator[Finding]:
    path = sqlite_path(url)
    assert path is not None
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode != "wal":
        yield Finding(
            check="journal", level="warning",
            text=f"journal_mode is {mode}: readers and writers block each other",
            remedy="`srsweep db upgrade` switches to write-ahead logging",
        )  # fmt: skip
    else:
        yield Finding(check="journal", level="ok", text="write-ahead log")
    if integrity:
        answer = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
        whole = answer == "ok"
        yield Finding(
            check="integrity", level="ok" if whole else "error",
            text="no damage found" if whole else answer.splitlines()[0],
            remedy="" if whole else "restore a backup, or `srsweep db copy` what is left into a "
            "new database",
        )  # fmt: skip
    kind = file_system(path)
    if kind in NETWORK_FILE_SYSTEMS:
        yield Finding(
            check="file system", level="error",
            text=f"{kind} is a network file system, on which SQLite loses data",
            remedy="`srsweep db copy` it to a local disk or to PostgreSQL",
        )  # fmt: skip
    else:
        yield Finding(check="file system", level="ok", text=kind or "local")
    yield _disk("disk", path.resolve().parent)


def _disk(check: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free in {folder}"
    if free >= _FREE_BYTES:
        return Finding(check=check, level="ok", text=text)
    return Finding(
        check=check, level="warning", text=text,
        remedy="make room, or thin old runs with `srsweep db prune --steps --vacuum`",
    )  # fmt: skip


def _of_server(connection: Connection) -> Iterator[Finding]:
    version = str(connection.exec_driver_sql("SHOW server_version").scalar())
    most, used = connection.exec_driver_sql(
        "SELECT current_setting('max_connections')::int, "
        "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
    ).one()
    text = f"{used} of {most} connections of PostgreSQL {version}"
    if used > 0.8 * most:
        yield Finding(
            check="connections", level="warning", text=text,
            remedy="raise max_connections, close idle clients, or lower --max-concurrent",
        )  # fmt: skip
    else:
        yield Finding(check="connections", level="ok", text=text)
    if connection.exec_driver_sql("SHOW fsync").scalar() == "off":
        yield Finding(
            check="fsync", level="warning", text="the server does not wait for its disk",
            remedy="a power cut can destroy the database; set fsync = on",
        )  # fmt: skip
    unseen = connection.exec_driver_sql(
        "SELECT string_agg(c.relname, ', ' ORDER BY c.relname) FROM pg_class c "
        "WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND c.reltuples < 0 "
        f"AND pg_relation_size(c.oid) > {100 * _UNSEEN_ROWS}"
    ).scalar()
    if unseen:
        yield Finding(
            check="statistics", level="warning", text=f"the planner knows nothing of {unseen}",
            remedy="run the SQL ANALYZE, and leave autovacuum on",
        )  # fmt: skip


def _spools(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    if not folder.is_dir():
        yield Finding(check="spools", level="ok", text="nothing waits on this host")
        return
    left = spool.waiting(folder)
    fenced = sorted(folder.glob(f"*{spool.FENCED_SUFFIX}"))
    if left:
        size = sum(path.stat().st_size for path in left)
        yield Finding(
            check="spools", level="warning",
            text=f"{len(left)} spools ({size / 2**20:.1f} MiB) of workers that are gone wait in "
            f"{place}",
            remedy="`srsweep launch` of their sweep on this host brings them into the database",
        )  # fmt: skip
    if fenced:
        yield Finding(
            check="spools", level="warning",
            text=f"{len(fenced)} spools of lost attempts are set aside in {place}",
            remedy="their runs were run again; remove the files once you have looked at them",
        )  # fmt: skip
    if not left and not fenced:
        yield Finding(check="spools", level="ok", text="nothing waits on this host")


def worst(found: list[Finding]) -> Level:
    """The gravest level among findings."""
    levels = {finding.level for finding in found}
    return "error" if "error" in levels else "warning" if "warning" in levels else "ok"


def described(url: str) -> str:
    """One line about a database that this srsweep can read: schema and sizes.

    Raises
    ------
    SchemaVersionError, StoreError
        It cannot.
    """
    with reader.connected(url) as connection:
        runs_known = connection.scalar(sa.select(sa.func.count()).select_from(runs))
        sweeps = connection.scalar(
            sa.select(sa.func.count()).select_from(metadata.tables["sweeps"])
        )
    return f"{shown(url)}: schema {SCHEMA_VERSION}, {sweeps:,} sweeps, {runs_known:,} runs"
