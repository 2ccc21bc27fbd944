"""Step values per second into the run database, and how fast its main questions are answered.

`python -m bench store [--writes | --queries | --many-runs] [--seconds S] [--save]`

Writers are processes; each claims a run of its own and hands step records to `RunWriter`, so each
row passes fence, heartbeat and duplicate check. The clock runs from the first record of the first
writer to the end of the last `finish`; afterwards every row is counted. A step row has 10 numeric
columns and counts as 10 values. PostgreSQL is a local server with fsync and synchronous commit on.
Queries are asked of finished runs that the database made itself from a few series of numbers:
by default 1,000 runs of 10,000 steps, which are 100 M values, and 100,000 runs without steps.
Four writers for a minute each: `--writes --rounds 1 --seconds 60`.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

from bench.measure import save, spread, table
from bench.postgres import temporary_server
from db import packed, query, reader
from db.connect import write_engine
from db.measures import METRICS, RunResult, StepRecord
from db.rows import STEP_COLUMNS
from db.schema import METRIC_SUMMARY_COLUMNS, SPEC_COLUMNS
from db.spec import RunSpec, RunStatus
from db.store import DatasetRecord, PlannedRun, RunStore, WorkerInfo

FINGERPRINT = "b" * 64
VALUES_PER_ROW = len(STEP_COLUMNS)
_PER_FLUSH = 50_000
WORKER = WorkerInfo(host="bench", pid=os.getpid(), device_class="cpu")


def main(arguments: list[str]) -> int:
    """Measure and print; non-zero when a count is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench store", description=__doc__)
    parser.add_argument("--writes", action="store_true", help="only how fast rows are written")
    parser.add_argument("--queries", action="store_true", help="only the queries over many steps")
    parser.add_argument("--many-runs", action="store_true", help="only the queries over many runs")
    parser.add_argument("--database", choices=["sqlite", "postgres"], help="only this one")
    parser.add_argument("--seconds", type=float, default=5.0, help="of writing, each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load-runs", type=int, default=1000)
    parser.add_argument("--load-steps", type=int, default=10_000)
    parser.add_argument("--num-runs", type=int, default=100_000, help="runs of --many-runs")
    parser.add_argument("--save", action="store_true", help="append to bench/results/store.csv")
    options = parser.parse_args(arguments)
    every = not (options.writes or options.queries or options.many_runs)
    backends = [options.database] if options.database else ["sqlite", "postgres"]
    summary: list[dict[str, object]] = []
    if every or options.writes:
        summary += _write_rates(backends, options.rounds, options.seconds)
    if every or options.queries:
        for backend in backends:
            with _database(backend) as url:
                summary += _step_questions(url, backend, options.load_runs, options.load_steps)
    if every or options.many_runs:
        for backend in backends:
            with _database(backend) as url:
                summary += _run_questions(url, backend, options.num_runs)
    print(table(summary))
    if options.save:
        print(save("store", summary))
    return 0


@contextlib.contextmanager
def _database(backend: str) -> Iterator[str]:
    """A database on disk with every safety on, gone afterwards."""
    if backend == "postgres":
        with temporary_server(
            durable=True, settings={"shared_buffers": "512MB", "max_wal_size": "4GB"}
        ) as server:
            yield server.url()
        return
    folder = tempfile.mkdtemp(prefix="srsweep-bench-")
    try:
        yield f"sqlite:///{folder}/runs.db"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _planned(num_runs: int) -> list[PlannedRun]:
    return [
        PlannedRun(
            spec=RunSpec(dataset="bench", precision="fp32", seed=seed), fingerprint=FINGERPRINT
        )
        for seed in range(num_runs)
    ]


def _prepare(url: str, num_runs: int) -> tuple[RunStore, list[str]]:
    store = RunStore.open(url)
    store.put_dataset(DatasetRecord(name="bench", fingerprint=FINGERPRINT, num_items=50_000))
    planned = _planned(num_runs)
    store.put_sweep("bench", "", planned)
    return store, [run.key for run in planned]


def _step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        epoch=number // 1000,
        loss=7.0 / (1 + number),
        gradient_norm=0.1 + 1.0 / (1 + number),
        learning_rate=1e-3,
        step_seconds=0.0123 + number * 1e-9,
        tokens=25_600 - number % 100,
        allocated_bytes=3_000_000_000 + number,
        reserved_bytes=4_000_000_000,
        peak_bytes=3_500_000_000 + number,
    )


def _write_rates(backends: list[str], rounds: int, seconds: float) -> list[dict[str, object]]:
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for backend in backends:
            for writers in (1, 4):
                with _database(backend) as url:
                    rate = _write_rate(url, writers, seconds)
                rates.setdefault((backend, writers), []).append(rate)
                print(f"{backend:9} {writers} writers: {rate:,.0f} values/s", flush=True)
    summary: list[dict[str, object]] = []
    for (backend, writers), values in rates.items():
        low, middle, high = spread(values)
        summary.append(
            {"question": "step values/s written", "database": backend, "writers": writers,
             "seconds": seconds, "median": middle, "low": low, "high": high, "rounds": len(values),
             "unit": "values/s"}
        )  # fmt: skip
    return summary


def _write_rate(url: str, writers: int, seconds: float) -> float:
    """Values per second of all writers together; raises when a row is missing."""
    _, keys = _prepare(url, writers)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(writers)
    answers = context.Queue()
    processes = [
        context.Process(target=_write, args=(url, key, seconds, barrier, answers), daemon=True)
        for key in keys
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=10 * seconds + 300) for _ in processes]
    for process in processes:
        process.join(60)
    _check_written(url, {key: rows for key, rows, _, _ in found})
    begin, end = min(a[2] for a in found), max(a[3] for a in found)
    return sum(a[1] for a in found) * VALUES_PER_ROW / float(end - begin)


def _check_written(url: str, rows_by_key: dict[str, int]) -> None:
    counts = query.rows(
        url,
        "SELECT r.run_key, count(*) AS n, min(s.step) AS low, max(s.step) AS high FROM steps s "
        "JOIN attempts a ON a.id = s.attempt_id JOIN runs r ON r.id = a.run_id GROUP BY r.run_key",
    )
    found = {row["run_key"]: (row["n"], row["low"], row["high"]) for row in counts}
    statuses = {run["status"] for run in query.runs(url)}
    if found != {k: (n, 0, n - 1) for k, n in rows_by_key.items()} or statuses != {"done"}:
        raise RuntimeError(f"rows are missing: {counts}, statuses {statuses}")


def _write(url: str, key: str, seconds: float, barrier: Any, answers: Any) -> None:
    store = RunStore(url)
    held = store.claim(key, WORKER)
    if held is None:
        raise RuntimeError(f"run {key[:12]} cannot be claimed")
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        with store.writer(held, spool_dir=Path(folder)) as writer:
            barrier.wait(120)
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                for step in range(number, number + _PER_FLUSH):
                    writer.step(_step(step))
                number += _PER_FLUSH
                # a bound on what gathers in memory when training outruns the database
                writer.flush()
            if not writer.finish(_result(number)):
                raise RuntimeError("the end was spooled")
        # one clock for all processes of a machine
        answers.put((key, number, begin, time.perf_counter()))


def _result(rows: int) -> RunResult:
    return RunResult(
        status=RunStatus.DONE, num_steps=rows, num_epochs=1, best_step=rows, num_parameters=1,
        test={"ndcg_at_10": 0.1}, peak_train_memory_bytes=3_500_000_000,
    )  # fmt: skip


def _load_steps(url: str, num_runs: int, num_steps: int) -> list[str]:
    """Fill a database with finished runs of many steps, made by the database itself."""
    _, keys = _prepare(url, num_runs)
    steps_with, steps_from = _times(url, "attempts", num_steps)
    points_with, points_from = _times(url, "attempts", 20)
    values = (
        f"n.n, n.n / 1000, 7.0 / (1 + n.n), 0.1 + 1.0 / (1 + n.n), 1e-3, 0.0123 + n.n * 1e-9, "
        f"25600 - n.n % 100, {3_000_000_000} + n.n, {4_000_000_000}, {3_500_000_000} + n.n"
    )
    measured = " UNION ALL ".join(f"SELECT '{metric}' AS metric" for metric in METRICS)
    statements = [
        "UPDATE runs SET status = 'done'",
        "INSERT INTO attempts (run_id, number, status, token, lease_seconds, started_at, "
        "last_step, device_class) SELECT id, 1, 'done', 'x', 60, created_at, "
        f"{num_steps - 1}, 'cpu' FROM runs ORDER BY id",
        f"INSERT INTO steps (attempt_id, {', '.join(STEP_COLUMNS)}) {steps_with} "
        f"SELECT a.id, {values} {steps_from}",
        "INSERT INTO evaluations (attempt_id, split, metric, k, step, epoch, value, "
        f"standard_error, num_users) {points_with} "
        f"SELECT a.id, 'validation', m.metric, 10, (n.n + 1) * {num_steps // 20}, 0, 0.1, 0.01, "
        f"1000 {points_from} CROSS JOIN ({measured}) AS m",
        "INSERT INTO run_summary (run_id, device_class, attempt_id, status, finished_at, "
        "ndcg_at_10, peak_train_memory_bytes) SELECT run_id, 'cpu', id, 'done', started_at, "
        "0.1 + 1e-4 * run_id, 3500000000 FROM attempts",
    ]
    _execute(url, statements)
    return keys


def _times(url: str, table: str, count: int) -> tuple[str, str]:
    """Common table and FROM clause: each row `a` of a table with the numbers n.n from 0."""
    if url.startswith("sqlite"):
        numbers = f"SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < {count - 1}"
        return f"WITH RECURSIVE n(n) AS ({numbers})", f"FROM {table} a CROSS JOIN n"
    # the reference to `a` keeps the planner from turning the loops round
    numbers = f"SELECT generate_series(0, {count - 1} + 0 * a.id) AS n"
    return "", f"FROM {table} a CROSS JOIN LATERAL ({numbers}) AS n"


def _execute(url: str, statements: list[str]) -> None:
    """Run statements, then what a server's autovacuum does within a minute."""
    is_sqlite = url.startswith("sqlite")
    engine = write_engine(url)
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        if is_sqlite:
            driver.execute("PRAGMA synchronous = OFF")
            driver.execute("PRAGMA journal_mode = MEMORY")
        with connection.begin():
            for statement in statements:
                driver.execute(statement)
        if is_sqlite:
            driver.execute("PRAGMA journal_mode = WAL")
            driver.execute("ANALYZE")
        else:
            driver.autocommit = True
            driver.execute("VACUUM (ANALYZE)")
    engine.dispose()


def _step_questions(
    url: str, backend: str, num_runs: int, num_steps: int
) -> list[dict[str, object]]:
    begin = time.perf_counter()
    keys = _load_steps(url, num_runs, num_steps)
    print(f"{backend}: {num_runs * num_steps:,} rows in {time.perf_counter() - begin:.0f} s")
    (count,) = query.rows(url, "SELECT count(*) AS n FROM steps")
    if count["n"] != num_runs * num_steps:
        raise RuntimeError(f"rows are missing: {count}")
    middle = keys[num_runs // 2]
    curve = (
        "SELECT s.step, s.loss, s.peak_bytes FROM steps s JOIN attempts a ON a.id = s.attempt_id "
        "JOIN runs r ON r.id = a.run_id WHERE r.run_key = :key ORDER BY s.step"
    )
    view = "SELECT step, loss, peak_bytes, ndcg_at_10 FROM run_steps WHERE run_key = :key"
    whole = "SELECT * FROM run_steps WHERE run_key = :key"
    with reader.connected(url) as connection:

        def ask(sql: str) -> Callable[[], Sized]:
            return lambda: reader.select(connection, sql, {"key": middle}).rows

        questions: dict[str, tuple[Callable[[], Sized], int]] = {
            "runs listing": (lambda: query.listed(connection), num_runs),
            "curve of one run": (ask(curve), num_steps),
            "view run_steps of one run": (ask(view), num_steps),
            "view run_steps of one run, all columns": (ask(whole), num_steps),
            "steps_frame of one run": (lambda: query.steps_frame(url, middle), num_steps),
        }
        size = {"runs": num_runs, "steps": num_steps}
        rows = [_answer(name, backend, *what, **size) for name, what in questions.items()]
        if backend == "postgres":
            rows += _server_times(connection, {"curve of one run": curve,
                                  "view run_steps of one run": view}, middle, **size)  # fmt: skip
    return rows


def _answer(
    question: str, backend: str, ask: Callable[[], Sized], expected: int, **size: int
) -> dict[str, object]:
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        found = ask()
        seconds.append(time.perf_counter() - start)
        if len(found) != expected:
            raise RuntimeError(f"{question}: {len(found)} rows, not {expected}")
    low, median, high = spread([1000 * s for s in seconds[1:]])
    return {"question": question, "database": backend, "median": median, "low": low, "high": high,
            "rounds": 7, "unit": "ms", **size}  # fmt: skip


def _server_times(
    connection: Any, statements: dict[str, str], key: str, **size: int
) -> list[dict[str, object]]:
    """Time inside the server, by EXPLAIN ANALYZE, without the way to the client."""
    driver = connection.connection.driver_connection
    found: list[dict[str, object]] = []
    for question, sql in statements.items():
        text = f"EXPLAIN (ANALYZE, TIMING OFF) {sql.replace(':key', chr(39) + key + chr(39))}"
        plans = [[line for (line,) in driver.execute(text).fetchall()] for _ in range(8)]
        times = [sum(float(line.split()[2]) for line in plan[-2:] if "Time:" in line)
                 for plan in plans[1:]]  # fmt: skip
        low, median, high = spread(times)
        found.append(
            {"question": f"{question}, in the server", "database": "postgres", "median": median,
             "low": low, "high": high, "rounds": 7, "unit": "ms", **size}
        )  # fmt: skip
    driver.rollback()
    return found


def _load_runs(url: str, num_runs: int) -> None:
    """Fill a database with finished runs that have every metric and no steps."""
    _prepare(url, 1)
    runs_with, runs_from = _times(url, "runs", num_runs)
    drawn = {"seed": "n.n", "batch_size": "32 * (1 + n.n % 5)", "max_seq_len": "16 * (1 + n.n % 4)"}
    spec = ", ".join(drawn.get(name, f"a.{name}") for name in SPEC_COLUMNS)
    hexadecimal = (
        "printf('%064x', n.n)" if url.startswith("sqlite") else "lpad(to_hex(n.n), 64, '0')"
    )
    status = "CASE n.n % 10 WHEN 9 THEN 'out_of_memory' ELSE 'done' END"
    metrics = ", ".join(METRIC_SUMMARY_COLUMNS)
    values = ", ".join(
        f"0.0{i + 11} + 1e-7 * (id % {i + 7001})" for i in range(len(METRIC_SUMMARY_COLUMNS))
    )
    _execute(url, [
        f"INSERT INTO runs (run_key, dataset_id, {', '.join(SPEC_COLUMNS)}, replicate, source, "
        f"status, created_at, updated_at) {runs_with} SELECT {hexadecimal}, a.dataset_id, "
        f"{spec}, 0, a.source, {status}, a.created_at, a.updated_at {runs_from}",
        "DELETE FROM sweep_runs",
        "DELETE FROM runs WHERE id = (SELECT min(id) FROM runs)",
        "INSERT INTO sweep_runs (sweep_id, run_id, position) SELECT s.id, r.id, r.id "
        "FROM sweeps s CROSS JOIN runs r",
        "INSERT INTO attempts (run_id, number, status, token, lease_seconds, started_at, "
        "last_step, device_class) SELECT id, 1, status, 'x', 60, created_at, 999, 'cpu' FROM runs",
        "INSERT INTO run_summary (run_id, device_class, attempt_id, status, finished_at, timing, "
        "memory_source, time_source, stop_reason, num_steps, num_epochs, best_step, "
        "num_parameters, final_loss, peak_train_memory_bytes, peak_eval_memory_bytes, "
        "epoch_seconds, evaluation_seconds, step_seconds, train_seconds, tokens_per_second, "
        f"{metrics}) SELECT run_id, 'cpu', id, status, started_at, 'exclusive', 'resident', "
        "'training_only', 'patience', 1000, 4, 800, 123456, 6.5, 3500000000 + run_id, "
        f"2000000000, 12.5, 0.5, 0.01, 50.0, 12000.0, {values} FROM attempts",
    ])  # fmt: skip
    # a finishing run packs its own result
    engine = write_engine(url)
    with engine.begin() as connection:
        packed.refresh(connection)
    engine.dispose()
    _execute(url, [])


def _run_questions(url: str, backend: str, num_runs: int) -> list[dict[str, object]]:
    begin = time.perf_counter()
    _load_runs(url, num_runs)
    print(f"{backend}: {num_runs:,} runs in {time.perf_counter() - begin:.0f} s", flush=True)
    filtered: dict[str, Any] = {"sweep": "bench", "status": "done", "limit": 50}
    done = num_runs - num_runs // 10
    questions: dict[str, tuple[Callable[[], Sized], int]] = {
        "runs filtered, the 50 best": (
            lambda: query.runs(url, order="-ndcg_at_10", **filtered), 50),
        "runs filtered, the 50 smallest": (
            lambda: query.runs(url, order="peak_train_memory_bytes", **filtered), 50),
        "all runs filtered and sorted": (
            lambda: query.runs(url, status="done", order="-ndcg_at_10"), done),
        "summary_frame": (lambda: query.summary_frame(url), num_runs),
        "srsweep runs, the whole command": (lambda: _command(url), 50),
    }  # fmt: skip
    return [
        _answer(name, backend, ask, expected, runs=num_runs)
        for name, (ask, expected) in questions.items()
    ]


def _command(url: str) -> list[str]:
    """Rows that the command line prints, in a process of its own."""
    words = ["runs", "--db", url, "--sweep", "bench", "--status", "done", "--sort", "ndcg_at_10"]
    code = "import sys; from sweeper.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--limit", "50", "--csv"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[1:]
