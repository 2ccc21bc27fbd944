"""Schema versions: tables for a new database, upgrades for an older one, no for a newer one."""

import sqlite3
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from db import packed
from db.connect import reading, shown, sqlite_path, translated, write_engine
from db.errors import SchemaVersionError, StoreError
from db.schema import SCHEMA_VERSION, metadata

if TYPE_CHECKING:
    from alembic.config import Config

_ADVISORY_LOCK = 5_072_655_973_018_837
VERSION_TABLE = "alembic_version"


def version_of(connection: Connection) -> str | None:
    """Revision of the schema in a database; None in an empty one.

    Raises
    ------
    StoreError
        There are tables, but not srsweep's.
    """
    names = set(sa.inspect(connection).get_table_names())
    if VERSION_TABLE in names and "run_summary" in names:
        query = sa.text(f"SELECT version_num FROM {VERSION_TABLE}")
        return str(connection.execute(query).scalar_one())
    if names & {VERSION_TABLE, *metadata.tables} or (names and connection.dialect.name == "sqlite"):
        where = shown(connection.engine.url)
        raise StoreError(f"{where} holds tables that are not srsweep's; name another database")
    return None


def check(connection: Connection) -> None:
    """Refuse a database whose schema this srsweep does not read.

    Raises
    ------
    SchemaVersionError
        Older (names the command that upgrades it) or newer.
    StoreError
        Not a run database.
    """
    version = version_of(connection)
    if version == SCHEMA_VERSION:
        return
    where = shown(connection.engine.url)
    if version is None:
        raise StoreError(f"{where} is empty; `srsweep launch` or `srsweep import` fill it")
    if version in _revisions():
        raise SchemaVersionError(
            f"{where} has schema {version}, older than {SCHEMA_VERSION} of this srsweep; "
            f"upgrade it with: srsweep db upgrade --db {where}"
        )
    raise SchemaVersionError(
        f"{where} has schema {version}, newer than {SCHEMA_VERSION} of this srsweep; "
        "use the srsweep that wrote it or a later one"
    )


def ensure(engine: Engine, *, upgrade: bool = False) -> None:
    """Create the tables in an empty database, upgrade an older one if asked, else check it.

    Raises
    ------
    SchemaVersionError
        Older without `upgrade`, or newer.
    StoreError
        Not a run database.
    """
    if engine.dialect.name == "sqlite":
        _use_wal(engine)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # two first launches at once: one creates, the other finds the tables
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        version = version_of(connection)
        if version is None or (upgrade and version in _revisions()):
            run_migrations(connection)
        elif version == SCHEMA_VERSION:
            return
        check(connection)
        packed.refresh(connection)


def back_up_older(url: str) -> Path | None:
    """Copy a SQLite file whose schema is older than this srsweep's, before it is upgraded.

    Returns
    -------
    pathlib.Path or None
        The copy, `FILE.schema-VERSION`; None where nothing will be upgraded, or for PostgreSQL.

    Raises
    ------
    StoreError
        The file is not srsweep's, or the copy cannot be made.
    """
    path = sqlite_path(url)
    if path is None or not path.exists() or path.stat().st_size == 0:
        return None
    engine = write_engine(url)
    # a transaction that writes would wait for itself in the backup
    with translated(url), reading(engine) as connection:
        version = version_of(connection)
        if version is None or version == SCHEMA_VERSION or version not in _revisions():
            return None
        copy = path.with_name(f"{path.name}.schema-{version}")
        driver: Any = connection.connection.driver_connection
        target = sqlite3.connect(copy)
        try:
            driver.backup(target)
        finally:
            target.close()
    engine.dispose()
    return copy


def run_migrations(connection: Connection, revision: str = "head") -> None:
    """Apply the migrations up to a revision inside the caller's transaction."""
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.files("db") / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def _revisions() -> set[str]:
    """Revisions this srsweep can upgrade from, its own included."""
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _use_wal(engine: Engine, attempts: int = 50) -> None:
    """Switch a SQLite file to write-ahead logging, which stays with the file.

    The switch needs the file for itself for a moment and does not wait by itself.
    """
    for attempt in range(attempts):
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            if driver.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
                return
            try:
                driver.execute("PRAGMA journal_mode = WAL")
            except Exception as error:
                if "locked" not in str(error) or attempt == attempts - 1:
                    raise
        time.sleep(0.05)
