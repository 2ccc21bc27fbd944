"""The read side: rows, frames and listings, and nothing that could write."""

import dataclasses
import datetime
import os
import sqlite3
import stat
import subprocess
import sys

import numpy as np
import psycopg
import pytest

from db import query
from db.errors import StoreError
from db.measures import METRIC_COLUMNS, METRICS
from db.query import LISTED
from db.schema import SPEC_COLUMNS
from db.spec import RunStatus
from db.store import RunStore

WRITES = [
    "DELETE FROM runs",
    "UPDATE runs SET status = 'done'",
    "INSERT INTO sweeps (name, grid) VALUES ('x', 'y')",
    "DROP TABLE runs",
    "DROP VIEW run_steps",
    "CREATE TABLE x (a integer)",
    "CREATE TEMP TABLE x (a integer)",
    "CREATE VIEW x AS SELECT 1",
    "CREATE INDEX x ON runs (seed)",
    "ALTER TABLE runs ADD COLUMN x integer",
    "SELECT 1; DELETE FROM runs",
    "SELECT 1; COMMIT; DELETE FROM runs",
    "/* a */ DELETE FROM runs -- SELECT",
    "WITH gone AS (DELETE FROM runs RETURNING id) SELECT * FROM gone",
    "WITH x AS (SELECT 1) DELETE FROM runs",
    "WITH x AS (SELECT 1) UPDATE runs SET status = 'done'",
    "EXPLAIN ANALYZE DELETE FROM runs",
    "REPLACE INTO sweeps (id, name) VALUES (1, 'x')",
    "VACUUM",
    "ANALYZE",
    "REINDEX TABLE runs",
    "BEGIN",
    "COMMIT",
    "SAVEPOINT x",
    "",
    "   ",
    "-- nothing",
]
WRITES_SQLITE = [
    "ATTACH DATABASE 'other.db' AS other",
    "DETACH DATABASE main",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA writable_schema = 1",
    "PRAGMA query_only = OFF",
    "PRAGMA user_version = 7",
    "PRAGMA wal_checkpoint(TRUNCATE)",
    "VACUUM INTO 'copy.db'",
    "SELECT load_extension('x')",
    "SELECT writefile('x', 'y')",
    "UPDATE sqlite_master SET sql = ''",
    "SELECT * FROM pragma_journal_mode('delete')",
    "CREATE VIRTUAL TABLE x USING fts5(a)",
    "CREATE TRIGGER x AFTER INSERT ON runs BEGIN DELETE FROM runs; END",
    "CREATE TEMP TRIGGER x AFTER INSERT ON runs BEGIN DELETE FROM runs; END",
    "CREATE VIRTUAL TABLE temp.x USING rtree(a, b, c)",
    "ATTACH ':memory:' AS x",
    "ATTACH 'file:other.db?mode=rwc' AS x",
    "WITH x AS (SELECT 1) INSERT INTO sweeps (name) SELECT 'x'",
    "INSERT INTO sweeps (name) VALUES ('x') RETURNING id",
    "UPDATE runs SET status = 'done' RETURNING id",
    "SELECT * FROM runs; PRAGMA query_only = OFF",
    "PRAGMA query_only(0)",
    "PRAGMA main.journal_mode(off)",
    "PRAGMA schema_version = 1",
    "PRAGMA application_id(7)",
    "PRAGMA temp_store_directory = '.'",
    "PRAGMA data_store_directory = '.'",
    "PRAGMA trusted_schema = ON",
    "PRAGMA foreign_keys = OFF",
    "PRAGMA incremental_vacuum",
    "PRAGMA optimize",
    "PRAGMA hard_heap_limit = 1",
    "SELECT * FROM pragma_query_only(0)",
    "SELECT * FROM pragma_user_version(7)",
    "SELECT load_extension('x', 'y') FROM runs",
    "SELECT fts3_tokenizer('simple', x'00')",
    "SELECT LOAD_EXTENSION('x')",
    "SELECT \"load_extension\"('x')",
    "EXPLAIN DELETE FROM runs",
    "EXPLAIN QUERY PLAN DELETE FROM runs",
    "BEGIN IMMEDIATE",
    "END",
    "ROLLBACK",
    "RELEASE x",
    "DROP TABLE IF EXISTS runs",
    "ALTER TABLE runs RENAME TO x",
    "DELETE FROM sqlite_sequence",
    "INSERT OR REPLACE INTO sqlite_master VALUES (1, 2, 3, 4, 5)",
]
WRITES_POSTGRES = [
    "COPY runs TO PROGRAM 'true'",
    "COPY runs FROM '/etc/passwd'",
    "TRUNCATE runs CASCADE",
    "SET default_transaction_read_only = off",
    "SET TRANSACTION READ WRITE",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "RESET ALL",
    "DO $$ BEGIN DELETE FROM runs; END $$",
    "DO $$ BEGIN PERFORM set_config('default_transaction_read_only', 'off', false); COMMIT; "
    "DELETE FROM runs; END $$",
    "SELECT * INTO x FROM runs",
    "SELECT * FROM runs FOR UPDATE",
    "SELECT nextval('runs_id_seq')",
    "SELECT setval('runs_id_seq', 1)",
    "SELECT lo_create(0)",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "CALL nothing()",
    "LISTEN x",
    "NOTIFY x",
    "LOCK TABLE runs",
    "PREPARE x AS DELETE FROM runs",
    "CREATE FUNCTION x() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "GRANT ALL ON runs TO public",
    "MERGE INTO runs USING runs r ON false WHEN NOT MATCHED THEN DO NOTHING",
    "SELECT 1 UNION ALL SELECT 2; DROP TABLE runs",
    "CLOSE ALL",
    "FETCH ALL FROM srsweep_query",
    "SELECT 1) TO STDOUT; DELETE FROM runs; --",
    "WITH x AS (INSERT INTO sweeps (name) VALUES ('x') RETURNING id) SELECT id FROM x",
    "WITH a AS (SELECT 1), b AS (UPDATE runs SET status = 'done' RETURNING id) SELECT * FROM b",
    "SELECT * FROM runs FOR SHARE",
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "SELECT set_config('role', 'none', false), set_config('statement_timeout', '0', false)",
    "SET LOCAL transaction_read_only = off; DELETE FROM runs",
    "ROLLBACK; BEGIN READ WRITE; DELETE FROM runs; COMMIT",
    "COMMIT AND CHAIN; DELETE FROM runs",
    "START TRANSACTION READ WRITE",
    "ABORT",
    "ALTER SYSTEM SET fsync = off",
    "ALTER ROLE current_user SUPERUSER",
    "COPY (SELECT 1) TO PROGRAM 'touch x'",
    "COPY (SELECT 1) TO '/dev/shm/srsweep-x'",
    "COPY runs TO STDOUT",
    "SELECT lo_export(0, '/dev/shm/srsweep-x')",
    "SELECT lo_import('/etc/hostname')",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT pg_read_file('/etc/hostname')",
    "SELECT * FROM pg_ls_dir('.')",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity",
    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile()",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_create_physical_replication_slot('x', true)",
    "SELECT pg_logical_emit_message(false, 'a', 'b')",
    "SELECT pg_notify('x', 'y')",
    "SELECT pg_sleep(1)",
    "SELECT pg_stat_reset()",
    "SELECT query_to_xml('SELECT lo_create(0)', true, true, '')",
    "SELECT * FROM ts_stat('SELECT lo_create(0)::text::tsvector')",
    "SELECT PG_CATALOG.PG_NOTIFY('x', 'y')",
    "SELECT \"pg_notify\"('x', 'y')",
    "SELECT pg_notify /* */ -- \n ('x', 'y')",
    "SELECT U&\"\\0070g_notify\"('x', 'y')",
    "SELECT u&\"!0070g_notify\" UESCAPE '!' ('x', 'y')",
    "SELECT '\\', pg_notify('x', '\\')",
    "SELECT E'\\'', pg_notify('x', $a$y$a$)",
    "SELECT count(*) FROM runs WHERE pg_notify('x', 'y') IS NULL",
    "SELECT count(*) FROM generate_series(1, 2) ORDER BY max(nextval('runs_id_seq'))",
    "IMPORT FOREIGN SCHEMA public FROM SERVER x INTO public",
    "CREATE EXTENSION dblink",
    "REFRESH MATERIALIZED VIEW x",
    "SECURITY LABEL ON TABLE runs IS 'x'",
    "COMMENT ON TABLE runs IS 'x'",
    "REASSIGN OWNED BY current_user TO public",
    "DISCARD ALL",
    "VACUUM FULL runs",
    "EXECUTE x",
    "DECLARE y CURSOR WITH HOLD FOR SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "TABLE runs; TRUNCATE steps",
]


class Still:
    """A database that no test here can change, and a connection that looks after it."""

    def __init__(self, url, make_bench):
        self.url = make_bench(url).url
        if self.url.startswith("sqlite"):
            path = self.url.removeprefix("sqlite:///")
            self._connection = sqlite3.connect(path, isolation_level=None)
        else:
            self._connection = psycopg.connect(self.url, autocommit=True)
        self._first = self.contents()

    def contents(self):
        """What a write could have changed: rows, statuses, tables, and settings that stay."""
        tables = ("runs", "sweeps", "attempts", "steps", "run_summary")
        counts = ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        if self.url.startswith("sqlite"):
            more = ("(SELECT group_concat(name || coalesce(sql, '')) FROM sqlite_master), "
                    "(SELECT journal_mode FROM pragma_journal_mode), "
                    "(SELECT user_version FROM pragma_user_version)")  # fmt: skip
        else:
            more = (
                "(SELECT string_agg(relname || coalesce(relacl::text, ''), ',' ORDER BY oid) "
                "FROM pg_class WHERE relname !~ '^pg_'), (SELECT count(*) FROM pg_proc), "
                "(SELECT last_value FROM runs_id_seq), "
                "(SELECT count(*) FROM pg_largeobject_metadata), "
                "(SELECT count(*) FROM pg_prepared_xacts), "
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'), "
                "(SELECT count(*) FROM pg_replication_slots)"
            )
        sql = f"SELECT {counts}, (SELECT min(status) FROM runs), {more}"
        return self._connection.execute(sql).fetchall()

    def check(self):
        """Fail when anything is not as it was at first."""
        assert self.contents() == self._first

    def close(self):
        self._connection.close()


@pytest.fixture(scope="module")
def still_sqlite(databases, make_bench):
    """The one on SQLite."""
    made = Still(databases.sqlite(), make_bench)
    yield made
    made.close()


@pytest.fixture(scope="module")
def still_postgres(databases, make_bench):
    """The one on PostgreSQL."""
    made = Still(databases.postgres(), make_bench)
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgres"])
def still(request):
    """The one or the other."""
    return request.getfixturevalue(f"still_{request.param}")


@pytest.fixture
def filled(bench, step, evaluation, result):
    """One run done with 30 steps and two validations, one out of memory, one running."""
    with bench.writer(bench.claim(0)) as writer:
        for number in range(30):
            writer.step(step(number))
        writer.evaluation(evaluation(10, value=0.25))
        writer.evaluation(evaluation(20, value=0.5))
        writer.evaluation(evaluation(20, split="test", value=0.125))
        writer.finish(result())
    with bench.writer(bench.claim(1)) as writer:
        oom = result(RunStatus.OUT_OF_MEMORY, total_bytes=2**33, test={}, validation={})
        writer.finish(oom)
    with bench.writer(bench.claim(2)) as writer:
        writer.step(step(0))
        writer.flush()
        yield bench


def test_the_guard_of_these_tests_sees_a_write(databases, make_bench):
    for url in (databases.sqlite(), databases.postgres()):
        watched = Still(url, make_bench)
        watched.check()
        RunStore(url).put_sweep("other", "", [])
        with pytest.raises(AssertionError):
            watched.check()
        watched.close()


@pytest.mark.parametrize("sql", WRITES)
def test_no_statement_writes(still, sql):
    with pytest.raises(StoreError, match=r"^query: ") as caught:
        query.rows(still.url, sql)
    assert "\n" not in str(caught.value)
    still.check()


@pytest.mark.parametrize("sql", WRITES_SQLITE)
def test_no_statement_of_sqlite_writes(still_sqlite, sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"^query: "):
        query.rows(still_sqlite.url, sql)
    still_sqlite.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sql", WRITES_POSTGRES)
def test_no_statement_of_postgresql_writes(still_postgres, sql):
    with pytest.raises(StoreError, match=r"^query: "):
        query.rows(still_postgres.url, sql)
    still_postgres.check()


def test_a_function_of_the_database_itself_is_refused(databases, make_bench):
    """Functions, operators of dblink and text run as SQL, which a read-only transaction admits."""
    bench = make_bench(databases.postgres())
    bench.execute("CREATE EXTENSION dblink")
    bench.execute("CREATE EXTENSION tablefunc")
    bench.execute(
        'CREATE FUNCTION "End it ""all""!"() RETURNS integer LANGUAGE plpgsql AS '
        "'BEGIN PERFORM pg_sleep(0); RETURN 1; END'"
    )
    bench.execute("CREATE FUNCTION twice(integer) RETURNS integer IMMUTABLE LANGUAGE sql AS "
                  "'SELECT 2 * $1'")  # fmt: skip
    for call in (
        f"dblink_exec('{bench.url}', 'DELETE FROM runs')",
        f"* FROM dblink('{bench.url}', 'DELETE FROM runs RETURNING id') AS t(id bigint)",
        f"public . \"dblink_exec\" /* ( */ ('{bench.url}', 'DELETE FROM runs')",
        "* FROM crosstab('SELECT ''a'', ''b'', lo' || '_create(0)::text') AS t(a text, b text)",
        '"End it ""all""!"()',
    ):
        with pytest.raises(StoreError, match="is a function that may have side effects"):
            query.rows(bench.url, f"SELECT {call}")
    assert bench.rows("SELECT count(*) FROM runs") == [(3,)]
    assert query.rows(bench.url, "SELECT twice(2) AS n, random() < 2 AS r") == [{"n": 4, "r": True}]


def test_a_value_that_takes_all_memory_is_refused(still_sqlite):
    with pytest.raises(StoreError, match=r"query: .*too big"):
        query.rows(still_sqlite.url, "SELECT length(randomblob(1000000000)) AS n")


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT count(*) AS n FROM runs", [{"n": 3}]),
        ("select count(*) as n from runs;", [{"n": 3}]),
        ("WITH x AS (SELECT seed FROM runs) SELECT max(seed) AS m FROM x", [{"m": 2}]),
        ("VALUES (1)", [{"column1": 1}]),
        ("SELECT 1 AS a, 2 AS a, 3 AS a", [{"a": 1, "a_2": 2, "a_3": 3}]),
        ("SELECT '50%' AS a, 'x:y' AS b, ' :c' AS c", [{"a": "50%", "b": "x:y", "c": " :c"}]),
        ("-- how many?\nSELECT count(*) AS n FROM sweeps", [{"n": 1}]),
        ("SELECT 1 AS a WHERE 1 = 0", []),
    ],
)
def test_selects_are_answered(still, sql, expected):
    assert query.rows(still.url, sql) == expected


def test_parameters_are_values_never_sql(still):
    sql = "SELECT count(*) AS n FROM runs WHERE dataset = :name AND '%' <> :name"
    assert query.rows(still.url, sql, {"name": "tiny"}) == [{"n": 3}]
    assert query.rows(still.url, sql, {"name": "x'; DROP TABLE runs; --"}) == [{"n": 0}]
    assert len(query.rows(still.url, "SELECT id FROM runs WHERE seed > :s", {"s": 0})) == 2
    with pytest.raises(StoreError, match=r"^query: .*name"):
        query.rows(still.url, sql, {"other": 1})


def test_averages_are_floats(still):
    (row,) = query.rows(still.url, "SELECT avg(seed) AS mean FROM runs")
    assert row == {"mean": 1.0}
    assert type(row["mean"]) is float


def test_values_of_every_type_on_postgresql(databases):
    sql = (
        "SELECT 0.1::float8 AS a, 0.1::numeric AS b, true AS c, 7::smallint AS d, 2^62 AS e, "
        "'x'::varchar AS f, timestamptz '2026-01-01 00:00:00+00' AS g, null AS h"
    )
    (row,) = query.rows(databases.postgres(), sql)
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert list(row.values()) == [0.1, 0.1, True, 7, 2.0**62, "x", day, None]
    assert type(row["b"]) is float
    (text,) = query.rows(databases.postgres(), f"{sql}, 0.1::float4 AS i, '1.2.3.4'::inet AS j")
    assert [*text.values()][:8] == [*row.values()]
    assert (text["i"], str(text["j"])) == (0.1, "1.2.3.4")


def test_unknown_names_are_named(still):
    with pytest.raises(StoreError, match=r"query: .*nosuch"):
        query.rows(still.url, "SELECT nosuch FROM runs")
    with pytest.raises(StoreError, match=r"query: .*no_table"):
        query.frame(still.url, "SELECT 1 FROM no_table")


def test_a_query_without_end_is_ended(still):
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )
    with pytest.raises(StoreError, match="took too long; narrow it with WHERE or LIMIT"):
        query.rows(still.url, endless, timeout_seconds=0.2)


def test_one_row_per_step_with_memory_time_and_metrics(filled):
    sql = (
        "SELECT step, loss, step_seconds, peak_bytes, evaluation_step, ndcg_at_10, "
        "coverage_at_10, surprisal_at_10 FROM run_steps WHERE run_key = :key ORDER BY step"
    )
    rows = query.rows(filled.url, sql, {"key": filled.keys[0]})
    assert [row["step"] for row in rows] == list(range(30))
    assert [row["evaluation_step"] for row in rows] == [None] * 10 + [10] * 10 + [20] * 10
    assert rows[9]["ndcg_at_10"] is None
    assert rows[10]["ndcg_at_10"] == 0.25
    assert rows[29] == pytest.approx(
        {
            "step": 29,
            "loss": 1 / 30,
            "step_seconds": 0.01,
            "peak_bytes": 2029,
            "evaluation_step": 20,
            "ndcg_at_10": 0.5,
            "coverage_at_10": 0.56,
            "surprisal_at_10": 0.57,
        },
        rel=1e-12,
    )


def test_the_frame_of_steps_equals_the_view(filled):
    sql = "SELECT * FROM run_steps WHERE run_key = :key ORDER BY step"
    view = query.frame(filled.url, sql, {"key": filled.keys[0]})
    frame = query.steps_frame(filled.url, filled.keys[0])
    for name in frame:
        np.testing.assert_array_equal(
            frame[name].to_numpy(dtype=float), view[name].to_numpy(dtype=float), err_msg=name
        )
    assert {f"{metric}_at_10" for metric in METRICS} < set(frame)


def test_steps_of_a_run_by_the_beginning_of_its_key(filled):
    frame = query.steps_frame(filled.url, filled.keys[2][:12])
    assert list(frame["step"]) == [0]
    assert np.isnan(frame["ndcg_at_10"]).all()
    with pytest.raises(StoreError, match="no run 'x'"):
        query.steps_frame(filled.url, "x")
    with pytest.raises(StoreError, match="the beginning of several keys"):
        query.steps_frame(filled.url, "")
    with pytest.raises(StoreError, match=r"no attempt 3 yet \(1 in all\)"):
        query.steps_frame(filled.url, filled.keys[0], attempt=3)
    with pytest.raises(StoreError, match="no run '%'"):
        query.steps_frame(filled.url, "%")


def test_the_view_shows_the_last_attempt(bench, step):
    for loss in (1.0, 2.0):
        with bench.writer(bench.claim()) as writer:
            writer.step(step(0, loss=loss))
            writer.fail("ValueError", "x")
    assert query.rows(bench.url, "SELECT attempt, loss FROM run_steps") == [
        {"attempt": 2, "loss": 2.0}
    ]
    assert list(query.steps_frame(bench.url, bench.keys[0], attempt=1)["loss"]) == [1.0]


def test_the_listing(filled):
    rows = query.runs(filled.url, sweep="demo")
    assert [tuple(row) for row in rows] == [LISTED] * 3
    assert [row["status"] for row in rows] == ["done", "out_of_memory", "running"]
    assert rows[0]["ndcg_at_10"] == 0.125
    assert rows[0]["finished_at"].tzinfo is datetime.UTC
    assert rows[1]["memory_bound_bytes"] == 2**33
    assert (rows[2]["last_step"], rows[2]["device_class"]) == (0, "cpu-8GiB")
    assert [row["num_attempts"] for row in rows] == [1, 1, 1]


def test_the_listing_is_filtered_sorted_and_cut(filled):
    def seeds(**options):
        return [row["seed"] for row in query.runs(filled.url, **options)]

    assert seeds(status="done") == [0]
    assert seeds(status=["done", RunStatus.RUNNING]) == [0, 2]
    assert seeds(dataset="tiny", limit=2) == [0, 1]
    assert seeds(dataset="other") == []
    assert seeds(order="-seed") == [2, 1, 0]
    assert seeds(order="-ndcg_at_10") == seeds(order="ndcg_at_10") == [0, 1, 2]
    with pytest.raises(StoreError, match="order='ndgc_at_10': no such column; did you mean"):
        seeds(order="ndgc_at_10")
    with pytest.raises(StoreError, match="status='finished' is unknown; "):
        seeds(status="finished")
    with pytest.raises(StoreError, match="no sweep 'dem'; did you mean 'demo'"):
        seeds(sweep="dem")


def test_a_sorted_listing_that_is_cut_is_the_head_of_the_whole(filled):
    for name in LISTED:
        for order in (name, f"-{name}"):
            whole = query.runs(filled.url, order=order)
            assert query.runs(filled.url, order=order, limit=2) == whole[:2], order


def test_the_frame_of_summaries(filled):
    filled.store.put_sweep("later", "", [filled.planned[1]])
    frame = query.summary_frame(filled.url)
    assert list(frame["status"]) == ["done", "out_of_memory"]
    assert {*SPEC_COLUMNS, *METRIC_COLUMNS, "run_key", "replicate", "num_items", "source",
            "device_class", "timing", "memory_source", "ndcg_at_10_se", "validation_ndcg_at_10",
            "memory_bound_bytes", "skipped_by"} <= set(frame)  # fmt: skip
    assert frame["num_items"].tolist() == [50, 50]
    assert frame["peak_train_memory_bytes"].tolist()[0] == 3e9
    assert np.isnan(frame["peak_train_memory_bytes"].tolist()[1])
    assert frame["ndcg_at_10"].dtype == frame["num_negatives"].dtype == np.float64
    assert frame["mask_seen"].dtype == bool
    assert frame["batch_size"].dtype == np.int64
    assert len(query.summary_frame(filled.url, sweeps=["later"])) == 1
    assert len(query.summary_frame(filled.url, sweeps=["later", "demo"])) == 2
    assert len(query.summary_frame(filled.url, datasets=["other"])) == 0
    with pytest.raises(StoreError, match="no sweep 'x'"):
        query.summary_frame(filled.url, sweeps=["x"])


def test_the_frame_of_no_runs_has_the_same_columns_and_types(bench, filled):
    some = query.summary_frame(filled.url)
    none = query.summary_frame(filled.url, datasets=["other"])
    assert list(none) == list(some)
    numbers = [name for name in some if some[name].dtype != none[name].dtype]
    assert all(some[name].dtype.kind not in "biuf" for name in numbers)


def test_a_failed_run_is_in_the_frame_without_measures(bench):
    bench.store.give_up(bench.keys[0], RunStatus.FAILED, "3 attempts failed")
    (row,) = query.summary_frame(bench.url).to_dict("records")
    assert (row["status"], row["reason"]) == ("failed", "3 attempts failed")
    assert np.isnan(row["ndcg_at_10"])


def test_a_missing_file_is_not_made(tmp_path):
    url = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(StoreError, match=r"none.db does not exist; `srsweep launch` makes it"):
        query.runs(url)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("these are notes, longer than one hundred bytes " * 5)
    with pytest.raises(StoreError, match="not a SQLite database, or a damaged one"):
        query.runs(f"sqlite:///{path}")


def test_a_file_without_write_permission_is_read(databases, make_bench):
    bench = make_bench(databases.sqlite())
    path = bench.url.removeprefix("sqlite:///")
    os.chmod(path, stat.S_IRUSR)
    try:
        assert len(query.runs(bench.url)) == 3
    finally:
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)


def test_a_listing_imports_neither_pandas_nor_torch(databases):
    code = (
        "import sys; from db import query; query.runs(sys.argv[1]); "
        "print(sorted({'pandas', 'torch', 'ray', 'alembic', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, databases.sqlite()], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_records_are_values(bench):
    run = bench.store.run(bench.keys[0])
    assert dataclasses.replace(run) == run
