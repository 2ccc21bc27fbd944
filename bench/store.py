"""Step values per second into the run database, and how fast its main questions are answered.

`python -m bench store [--writes | --queries | --many-runs] [--seconds S] [--save]`

Writers are processes; each claims a run of its own and hands step records to `RunWriter`, so each
row passes fence, heartbeat and duplicate check. The clock runs from the first record of the first
writer to the end of the last `finish`; afterwards every row is counted. A step row has 10 numeric
columns and counts as 10 values. PostgreSQL is a local server with fsync and synchronous commit on.
Queries are asked of finished runs that the database made itself from a few series of numbers.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.measure import save, spread, table
from bench.postgres import temporary_server
from db import leases, query, reader
from db.connect import write_engine
from db.measures import METRICS, RunResult, StepRecord
from db.rows import STEP_COLUMNS, Batch, insert_batch
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
        with temporary_server(durable=True, settings={"shared_buffers": "512MB"}) as server:
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
                for number in range(number, number + _PER_FLUSH):
                    writer.step(_step(number))
                number += 1
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


def _load(url: str, num_runs: int, num_steps: int) -> list[str]:
    """Fill a database with finished runs: the writer's transactions without its thread."""
    store, keys = _prepare(url, num_runs)
    batch = Batch(
        steps=[_row(number) for number in range(num_steps)],
        evaluations=[
            ("validation", metric, 10, step, 0, 0.1, 0.01, 1000)
            for step in range(num_steps // 20, num_steps + 1, num_steps // 20)
            for metric in METRICS
        ],
    )
    engine = write_engine(url)
    for key in keys:
        held = store.claim(key, WORKER)
        if held is None:
            raise RuntimeError(f"run {key[:12]} cannot be claimed")
        with engine.begin() as connection:
            insert_batch(connection, held.attempt_id, batch, fresh=True)
            leases.finish(connection, held, _result(num_steps))
    with engine.begin() as connection:
        # a server's autovacuum does this within a minute
        connection.exec_driver_sql("ANALYZE")
    engine.dispose()
    return keys


def _row(number: int) -> tuple[Any, ...]:
    record = _step(number)
    return tuple(getattr(record, name) for name in STEP_COLUMNS)


def _read_times(url: str, backend: str, num_runs: int, num_steps: int) -> list[dict[str, object]]:
    begin = time.perf_counter()
    keys = _load(url, num_runs, num_steps)
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
    rows: list[dict[str, object]] = []
    with reader.connected(url) as connection:
        questions = {
            "runs listing": (lambda: query.listed(connection), num_runs),
            "curve of one run": (
                lambda: reader.select(connection, curve, {"key": middle}).rows,
                num_steps,
            ),
            "view run_steps of one run": (
                lambda: reader.select(connection, view, {"key": middle}).rows,
                num_steps,
            ),
        }
        for question, (ask, expected) in questions.items():
            seconds = []
            for _ in range(8):
                start = time.perf_counter()
                found = ask()
                seconds.append(time.perf_counter() - start)
                if len(found) != expected:
                    raise RuntimeError(f"{question}: {len(found)} rows, not {expected}")
            low, median, high = spread([1000 * s for s in seconds[1:]])
            rows.append(
                {"question": question, "database": backend, "median": median, "low": low,
                 "high": high, "rounds": 7, "unit": "ms", "runs": num_runs, "steps": num_steps}
            )  # fmt: skip
    return rows
