"""The read side: rows, frames and listings, and nothing that could write."""

import dataclasses
import datetime
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from db import query
from db.errors import StoreError
from db.measures import METRIC_COLUMNS, METRICS
from db.query import LISTED
from db.schema import SPEC_COLUMNS
from db.spec import RunStatus

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
]


@pytest.fixture(scope="module")
def still_sqlite(databases, make_bench):
    """A SQLite database that no test here can change."""
    return make_bench(databases.sqlite())


@pytest.fixture(scope="module")
def still_postgres(databases, make_bench):
    """A PostgreSQL database that no test here can change."""
    return make_bench(databases.postgres())


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


def _contents(bench):
    tables = ("runs", "sweeps", "attempts", "steps", "run_summary")
    return [bench.rows(f"SELECT count(*) FROM {table}") for table in tables]


@pytest.mark.parametrize("sql", WRITES)
def test_no_statement_writes(still, sql):
    before = _contents(still)
    with pytest.raises(StoreError, match=r"^query: ") as caught:
        query.rows(still.url, sql)
    assert "\n" not in str(caught.value)
    assert _contents(still) == before


@pytest.mark.parametrize("sql", WRITES_SQLITE)
def test_no_statement_of_sqlite_writes(still_sqlite, sql, tmp_path, monkeypatch):
    bench = still_sqlite
    monkeypatch.chdir(tmp_path)
    before = _contents(bench)
    with pytest.raises(StoreError, match=r"^query: "):
        query.rows(bench.url, sql)
    assert _contents(bench) == before
    assert not list(tmp_path.glob("*.db"))
    assert bench.rows("PRAGMA journal_mode") == [("wal",)]
    assert bench.rows("PRAGMA user_version") == [(0,)]


@pytest.mark.parametrize("sql", WRITES_POSTGRES)
def test_no_statement_of_postgresql_writes(still_postgres, sql):
    bench = still_postgres
    before = _contents(bench)
    sequence = bench.rows("SELECT last_value FROM runs_id_seq")
    with pytest.raises(StoreError, match=r"^query: "):
        query.rows(bench.url, sql)
    assert _contents(bench) == before
    assert bench.rows("SELECT last_value FROM runs_id_seq") == sequence


def test_a_setting_changed_by_a_query_is_gone_with_it(still_postgres):
    bench = still_postgres
    change = "SELECT set_config('default_transaction_read_only', 'off', false) AS value"
    assert query.rows(bench.url, change) == [{"value": "off"}]
    with pytest.raises(StoreError, match="a query is one SELECT and cannot write"):
        query.rows(bench.url, "WITH x AS (DELETE FROM runs RETURNING 1) SELECT * FROM x")
    assert len(_contents(bench)) == 5


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
