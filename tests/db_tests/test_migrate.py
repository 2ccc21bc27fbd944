"""Schema versions: migrations make what the metadata says, and strangers are refused."""

import datetime
import re
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from db import migrate, packed, query
from db.connect import shown, write_engine
from db.errors import SchemaVersionError, StoreError
from db.schema import (
    METRIC_SUMMARY_COLUMNS,
    SCHEMA_VERSION,
    SPEC_COLUMNS,
    VIEWS,
    metadata,
    spec_values,
)
from db.spec import RunSpec
from db.store import RunStore


@pytest.fixture
def engine(empty_url):
    made = write_engine(empty_url)
    yield made
    made.dispose()


def test_migrations_make_exactly_the_metadata(empty_url, engine):
    RunStore.open(empty_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrations_make_the_same_sql_as_the_metadata(databases):
    """Constraints, partial indices, WITHOUT ROWID and views, which alembic does not compare."""

    def objects(url):
        engine = write_engine(url)
        with engine.connect() as connection:
            rows = connection.execute(
                sa.text("SELECT type, name, sql FROM sqlite_master WHERE name <> 'alembic_version' "
                        "AND tbl_name <> 'alembic_version' ORDER BY 1, 2")
            ).all()  # fmt: skip
        engine.dispose()
        return {(row.type, row.name): _words(row.sql) for row in rows}

    def _words(sql):
        if sql is None:
            return sql
        head, _, body = sql.partition("(")
        if head.startswith("CREATE TABLE"):
            # columns in any order: those of later migrations come last
            body, _, options = body.rpartition(")")
            parts = re.split(r",(?![^()]*\))", body)  # at commas outside parentheses
            return head.split(), sorted(" ".join(part.split()) for part in parts), options.strip()
        return sql.split()

    migrated = databases.sqlite(empty=True)
    RunStore.open(migrated)
    direct = databases.sqlite(empty=True)
    engine = write_engine(direct)
    with engine.begin() as connection:
        metadata.create_all(connection)
        for name, sql in VIEWS.items():
            connection.exec_driver_sql(f"CREATE VIEW {name} AS {sql}")
        for statement in packed.triggers("sqlite"):
            connection.exec_driver_sql(statement)
    engine.dispose()
    assert objects(migrated) == objects(direct)


def test_the_view_is_the_same_on_postgresql(databases):
    url = databases.postgres(empty=True)
    RunStore.open(url)
    engine = write_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE VIEW again AS {VIEWS['run_steps']}")
        definitions = {
            name: connection.execute(sa.select(sa.func.pg_get_viewdef(name))).scalar_one()
            for name in ("run_steps", "again")
        }
    engine.dispose()
    assert definitions["run_steps"] == definitions["again"]


def test_the_triggers_are_the_same_on_postgresql(databases):
    url = databases.postgres(empty=True)
    RunStore.open(url)
    made = (
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal UNION ALL "
        "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname LIKE 'unpack%' ORDER BY 1"
    )
    engine = write_engine(url)
    with engine.begin() as connection:
        migrated = connection.execute(sa.text(made)).scalars().all()
        for function in ("unpack_result", "unpack_run"):
            connection.exec_driver_sql(f"DROP FUNCTION {function} CASCADE")
        for statement in packed.triggers("postgresql"):
            connection.exec_driver_sql(statement)
        direct = connection.execute(sa.text(made)).scalars().all()
    engine.dispose()
    assert len(migrated) == 4
    assert direct == migrated


def test_the_newest_migration_is_the_version_of_the_code():
    script = ScriptDirectory.from_config(migrate._config())
    assert script.get_current_head() == SCHEMA_VERSION


def test_columns_are_derived_from_the_vocabulary(store_url):
    engine = write_engine(store_url)
    inspector = sa.inspect(engine)
    runs = {column["name"]: column for column in inspector.get_columns("runs")}
    assert set(SPEC_COLUMNS) < set(runs)
    assert runs["num_negatives"]["nullable"]
    assert not runs["precision"]["nullable"]
    assert not runs["batch_size"]["nullable"]
    summary = {column["name"] for column in inspector.get_columns("run_summary")}
    assert set(METRIC_SUMMARY_COLUMNS) < summary
    assert "run_steps" in inspector.get_view_names()
    engine.dispose()


def test_opening_twice_changes_nothing(empty_url):
    RunStore.open(empty_url)
    assert RunStore.open(empty_url, upgrade=True).sweeps() == []


def test_three_first_openings_at_once(empty_url):
    code = "import sys; from db.store import RunStore; RunStore.open(sys.argv[1])"
    command = [sys.executable, "-c", code, empty_url]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    assert RunStore.open(empty_url).sweeps() == []


def _set_version(engine, version):
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")


def test_a_newer_schema_is_refused(empty_url, engine):
    RunStore.open(empty_url)
    _set_version(engine, "9999")
    for opened in (
        lambda: RunStore.open(empty_url),
        lambda: RunStore.open(empty_url, upgrade=True),
        lambda: query.rows(empty_url, "SELECT 1 AS one"),
    ):
        with pytest.raises(SchemaVersionError, match=f"schema 9999, newer than {SCHEMA_VERSION}"):
            opened()


def test_an_older_schema_names_the_command(empty_url, engine, monkeypatch):
    RunStore.open(empty_url)
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", "9999")
    for opened in (
        lambda: RunStore.open(empty_url),
        lambda: query.rows(empty_url, "SELECT 1 AS one"),
    ):
        with pytest.raises(SchemaVersionError) as caught:
            opened()
        message = str(caught.value)
        assert f"schema {SCHEMA_VERSION}, older than 9999" in message
        assert f"srsweep db upgrade --db {shown(empty_url)}" in message


def test_tables_of_others_are_left_alone(empty_url, engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE runs (name TEXT)")
    with pytest.raises(StoreError, match="holds tables that are not srsweep's"):
        RunStore.open(empty_url)
    assert sa.inspect(engine).get_table_names() == ["runs"]


def test_an_empty_database_has_nothing_to_read(empty_url, engine):
    with engine.connect():
        pass
    with pytest.raises(StoreError, match=r"is empty; `srsweep launch`"):
        query.rows(empty_url, "SELECT 1 AS one")


def test_sqlite_uses_a_write_ahead_log(databases):
    url = databases.sqlite(empty=True)
    RunStore.open(url)
    engine = write_engine(url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    engine.dispose()


REVISIONS = [script.revision for script in ScriptDirectory.from_config(migrate._config())
             .walk_revisions()]  # fmt: skip


@pytest.mark.parametrize("revision", REVISIONS)
def test_rows_of_every_schema_survive_the_upgrade(empty_url, engine, revision):
    """A database that an older srsweep filled is read by this one, row for row."""
    with engine.begin() as connection:
        migrate.run_migrations(connection, revision)
        tables = sa.MetaData()
        tables.reflect(connection)
        for table in tables.sorted_tables:
            if table.name != "alembic_version":
                connection.execute(table.insert(), _row(table))
    RunStore.open(empty_url, upgrade=True)
    assert len(RunStore(empty_url).sweep_runs("done")) == 1
    (row,) = query.rows(empty_url, "SELECT * FROM run_steps")
    assert (row["run_key"], row["step"], row["ndcg_at_10"]) == ("done", 1, None)
    assert query.runs(empty_url)[0]["status"] == "done"


def _row(table):
    values = {column.name: _value(column) for column in table.columns}
    if table.name == "runs":
        spec = spec_values(RunSpec(dataset="done", precision="fp32"))
        values |= {name: value for name, value in spec.items() if name in values}
    return values


def _value(column):
    """A value that fits each column and meets every constraint between the tables."""
    if isinstance(column.type, sa.Boolean):
        return False
    if isinstance(column.type, sa.DateTime):
        return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    if isinstance(column.type, sa.LargeBinary):
        return b""
    if isinstance(column.type, sa.Text):
        return None if column.nullable else "done"
    return None if column.nullable else 1


def test_an_upgrade_that_fails_leaves_the_older_schema(empty_url, engine, monkeypatch):
    RunStore.open(empty_url)
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", "9999")

    def breaks(connection, revision="head"):
        connection.exec_driver_sql("ALTER TABLE runs ADD COLUMN half INTEGER")
        connection.exec_driver_sql("DROP VIEW run_steps")
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(migrate, "run_migrations", breaks)
        with pytest.raises(StoreError, match="the disk is full"):
            RunStore.open(empty_url, upgrade=True)
    monkeypatch.undo()
    assert query.rows(empty_url, "SELECT * FROM run_steps") == []
    assert "half" not in {column["name"] for column in sa.inspect(engine).get_columns("runs")}
