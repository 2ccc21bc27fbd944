"""Database URLs and connections: SQLite in one local file, or PostgreSQL through psycopg 3.

Passwords are hidden in every text that leaves this module.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from db.errors import SrsweepError, StoreError

BUSY_SECONDS = 30.0
"""How long a transaction waits for other writers of a SQLite file."""

DRIVER_ERRORS: tuple[type[Exception], ...] = (SQLAlchemyError, sqlite3.Error)
"""What the database and its drivers raise."""
try:
    import psycopg
except ModuleNotFoundError:  # an installation without the extra `postgres`
    pass
else:
    # COPY and named cursors do not pass through SQLAlchemy
    DRIVER_ERRORS = (*DRIVER_ERRORS, psycopg.Error)

_FORMS = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
_CREDENTIALS = re.compile(r"(://[^:/@\s]*):[^@\s]*@")
_PASSWORD_WORD = re.compile(r"(password\s*=\s*)('[^']*'|\S+)", re.IGNORECASE)
NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "afs", "9p", "ceph",
    "fuse.sshfs", "fuse.glusterfs", "glusterfs", "fuse.ceph", "fuse.gcsfuse", "fuse.s3fs",
)  # fmt: skip


def redact(text: str) -> str:
    """Hide the passwords of URLs and connection strings in a text."""
    return _PASSWORD_WORD.sub(r"\1***", _CREDENTIALS.sub(r"\1:***@", text))


def parse_url(url: str | URL) -> URL:
    """Read a database URL.

    Parameters
    ----------
    url : str or sqlalchemy.engine.URL
        `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/DATABASE`.

    Returns
    -------
    sqlalchemy.engine.URL
        With the driver filled in.

    Raises
    ------
    StoreError
        Not a URL, another database, or SQLite without a file.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StoreError(f"{redact(str(url))!r} is not a database URL; use {_FORMS}") from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if parsed.drivername not in {"sqlite", "sqlite+pysqlite"} or parsed.query:
            raise StoreError(f"{shown(parsed)}: only the plain form sqlite:///FILE is supported")
        if not parsed.database or parsed.database == ":memory:":
            raise StoreError("a run database is shared by processes; give SQLite a file")
        return parsed.set(drivername="sqlite+pysqlite")
    if backend == "postgresql":
        if parsed.drivername not in {"postgresql", "postgresql+psycopg"}:
            raise StoreError(f"{shown(parsed)}: the driver is psycopg; use {_FORMS}")
        return parsed.set(drivername="postgresql+psycopg")
    raise StoreError(f"{shown(parsed)}: {backend!r} is no supported database; use {_FORMS}")


def shown(url: str | URL) -> str:
    """Text of a URL without its password, as messages show it."""
    parsed = make_url(url)
    secret = {name: "***" for name in parsed.query if "password" in name.lower()}
    parsed = parsed.update_query_dict(secret)
    plain = parsed.set(drivername=parsed.get_backend_name())
    return redact(plain.render_as_string(hide_password=True))


def sqlite_path(url: str | URL) -> Path | None:
    """File of a SQLite URL; None for PostgreSQL."""
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None:
        return None
    return Path(parsed.database).expanduser()


def write_engine(url: str | URL, *, busy_seconds: float = BUSY_SECONDS) -> Engine:
    """Engine whose transactions write: BEGIN IMMEDIATE on SQLite, one connection at a time.

    Connections are closed as soon as they are given back, so an idle process holds none.

    Parameters
    ----------
    url : str or sqlalchemy.engine.URL
        See `parse_url`.
    busy_seconds : float
        How long SQLite waits for another writer before it reports that it is locked.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        path = sqlite_path(parsed)
        engine = sa.create_engine(
            parsed.set(database=str(path)),
            poolclass=NullPool,
            connect_args={"timeout": busy_seconds, "check_same_thread": False},
        )
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    return postgresql_engine(parsed, {})


def postgresql_engine(parsed: URL, arguments: dict[str, Any]) -> Engine:
    """Engine over psycopg whose connections close when given back; `arguments` go to libpq."""
    defaults: dict[str, Any] = {
        "connect_timeout": 10,
        "application_name": "srsweep",
        # a server that vanished is noticed in half a minute, not in two hours
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 4,
        "tcp_user_timeout": 30_000,
    }
    given = {name: value for name, value in defaults.items() if name not in parsed.query}
    try:
        return sa.create_engine(
            parsed,
            poolclass=NullPool,
            connect_args={**given, **arguments},
            # no column has that type, and every new connection would ask for it
            use_native_hstore=False,
        )
    except (ModuleNotFoundError, NoSuchModuleError):
        raise StoreError(
            f"{shown(parsed)} needs psycopg; install it with: pip install 'srsweep[postgres]'"
        ) from None


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # SQLAlchemy's begin event starts transactions; sqlite3 must not start its own
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Transaction that only reads, so that SQLite takes no write lock for it."""
    with engine.connect().execution_options(reads=True) as connection, connection.begin():
        yield connection


@contextmanager
def translated(url: str | URL) -> Iterator[None]:
    """Turn errors of the database into one StoreError line without secrets.

    Raises
    ------
    StoreError
        For every error of SQLAlchemy, psycopg or sqlite3 raised inside.
    """
    try:
        yield
    except SrsweepError:
        raise
    except DRIVER_ERRORS as error:
        raise StoreError(explained(url, error)) from None


def explained(url: str | URL, error: BaseException) -> str:
    """One line for an error of the database: what happened, where, what to do."""
    where = shown(url)
    # SQLAlchemy's own text carries statement and parameters; the driver's is what matters
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = [line.strip() for line in redact(str(cause)).splitlines() if line.strip()]
    text = lines[0] if lines else type(cause).__name__
    for pattern, advice in _ADVICE:
        if re.search(pattern, " ".join(lines), re.IGNORECASE):
            return f"{where}: {advice} ({text})"
    return f"{where}: {text}"


_ADVICE: tuple[tuple[str, str], ...] = (
    (r"password authentication failed|no password supplied", "wrong user or password"),
    (r"no pg_hba.conf entry", "the server does not admit this host or user; see its pg_hba.conf"),
    (r"database .* does not exist", "no such database; create it with createdb"),
    (r"role .* does not exist", "wrong user or password"),
    (r"too many clients|remaining connection slots", "the server's connections are used up; "
     "raise max_connections or lower --max-concurrent"),
    (r"connection refused|could not translate|name or service|timeout expired|no route",
     "the server cannot be reached; check host and port, and that it runs"),
    (r"readonly database|read-only transaction", "the database is read-only; "
     "change its permissions or copy it"),
    (r"permission denied", "this user may not do that; ask for the writer role"),
    (r"database is locked", "another program holds the database; close it or try again"),
    (r"disk is full|no space left", "the disk is full; make room"),
    (r"unable to open database file", "the file cannot be opened; check that its folder exists "
     "and may be written"),
    (r"not a database|malformed", "not a SQLite database, or a damaged one; restore a backup"),
)  # fmt: skip


def file_system(path: Path) -> str:
    """Type of the file system that holds a path (`ext4`, `nfs4`), empty where unknown.

    Parameters
    ----------
    path : pathlib.Path
        A file or folder that need not exist yet.
    """
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return ""
    resolved = str(path.resolve())
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        point = fields[1].encode().decode("unicode_escape")
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def check_local(url: str | URL) -> None:
    """Refuse a SQLite file on a network file system, where locks fail and files get damaged.

    Raises
    ------
    StoreError
        The file lies on NFS, CIFS, Lustre or the like.
    """
    path = sqlite_path(url)
    if path is None:
        return
    kind = file_system(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"{shown(url)} lies on {kind}, a network file system on which SQLite loses data; "
            "put it on a local disk or use PostgreSQL"
        )
