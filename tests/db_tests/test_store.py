"""The contract of the store: the same on SQLite and PostgreSQL."""

import dataclasses
import sqlite3
import threading
import time

import pytest

from db.errors import LostLeaseError, StoreError
from db.spec import AttemptStatus, RunStatus
from db.store import DatasetRecord, PlannedRun, RunStore


def test_putting_a_sweep_again_changes_nothing(bench):
    before = bench.rows("SELECT count(*) FROM runs")
    counts = bench.store.put_sweep("demo", "seed: [0, 1, 2]", bench.planned)
    assert (counts.new, counts.known, counts.final, counts.total) == (0, 3, 0, 3)
    assert bench.rows("SELECT count(*) FROM runs") == before == [(3,)]
    assert [run.key for run in bench.store.sweep_runs("demo")] == bench.keys


def test_a_second_sweep_shares_runs_and_their_results(bench, result):
    with bench.writer(bench.claim(0)) as writer:
        assert writer.finish(result())
    counts = bench.store.put_sweep("other", "x", [*bench.planned[:2], bench.planned[0]])
    assert (counts.new, counts.known, counts.final) == (0, 1, 1)
    assert [r.status for r in bench.store.sweep_runs("other")] == ["done", "pending"]
    assert bench.store.claim(bench.keys[0], _worker(bench)) is None


def test_a_grown_grid_adds_runs_and_replaces_the_text(bench):
    more = dataclasses.replace(
        bench.planned[0], spec=dataclasses.replace(bench.planned[0].spec, seed=9)
    )
    assert bench.store.put_sweep("demo", "seed: [9]", [more]).new == 1
    (sweep,) = bench.store.sweeps()
    assert sweep.grid == "seed: [9]"
    assert sweep.counts == {RunStatus.PENDING: 4}
    assert sweep.created_at.utcoffset().total_seconds() == 0


def test_a_run_of_an_unknown_dataset_is_refused(bench):
    run = PlannedRun(spec=bench.planned[0].spec, fingerprint="0" * 64)
    with pytest.raises(StoreError, match=r"dataset 'tiny' \(000000000000\) is not in the"):
        bench.store.put_sweep("demo", "", [run])


def test_an_integer_beyond_64_bits_is_refused(bench):
    spec = dataclasses.replace(bench.planned[0].spec, batch_size=2**63)
    with pytest.raises(StoreError, match=f"batch_size={2**63} does not fit"):
        bench.store.put_sweep("demo", "", [PlannedRun(spec=spec, fingerprint="f" * 64)])


def test_unknown_sweeps_and_runs_are_named(bench):
    with pytest.raises(StoreError, match="no sweep 'dema'; known are demo"):
        bench.store.sweep_runs("dema")
    with pytest.raises(StoreError, match="no run 'abc'"):
        bench.store.run("abc")
    with pytest.raises(StoreError, match="run abc is not in the database"):
        bench.store.claim("abc", _worker(bench))


def test_filter_by_status(bench):
    bench.claim(1)
    assert [r.key for r in bench.store.sweep_runs("demo", [RunStatus.RUNNING])] == [bench.keys[1]]


def test_only_one_of_two_claimers_gets_the_run(bench):
    barrier = threading.Barrier(4)
    claims = []

    def claim():
        store = RunStore(bench.url)
        barrier.wait()
        claims.append(store.claim(bench.keys[0], _worker(bench)))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(held is not None for held in claims) == 1
    assert bench.rows("SELECT count(*) FROM attempts") == [(1,)]


def test_the_claim_carries_the_run(bench):
    held = bench.claim(2, lease_seconds=30.0)
    assert held.spec == bench.planned[2].spec
    assert (held.run_key, held.number, held.lease_seconds) == (bench.keys[2], 1, 30.0)
    assert held.token not in repr(held)
    (attempt,) = bench.store.attempts(bench.keys[2])
    assert (attempt.host, attempt.pid, attempt.device_class) == ("node-1", 4711, "cpu-8GiB")
    assert 29.0 < (attempt.lease_until - attempt.started_at).total_seconds() < 31.0


def test_a_lease_must_be_positive(bench):
    with pytest.raises(StoreError, match="lease_seconds=0 must be above 0"):
        bench.store.claim(bench.keys[0], _worker(bench), lease_seconds=0)


def test_leases_expire_by_the_clock_of_the_database(bench, monkeypatch):
    held = bench.claim(0, lease_seconds=0.05)
    alive = bench.claim(1, lease_seconds=60.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    lost = []
    for _ in range(200):
        lost += bench.store.expire_leases()
        if lost:
            break
        threading.Event().wait(0.02)
    assert lost == [held.run_key]
    run = bench.store.run(held.run_key)
    assert (run.status, run.last_attempt_status) == (RunStatus.PENDING, AttemptStatus.LOST)
    assert bench.store.run(alive.run_key).status is RunStatus.RUNNING
    assert bench.store.expire_leases() == []
    assert bench.claim(0).number == 2


def test_a_failed_attempt_leaves_the_run_to_the_planner(bench):
    with bench.writer(bench.claim()) as writer:
        assert writer.fail("ValueError", "no luck with postgresql://me:secret@host/db")
    run = bench.store.run(bench.keys[0])
    assert (run.status, run.num_attempts) == (RunStatus.PENDING, 1)
    assert run.last_attempt_status is AttemptStatus.ERROR
    assert run.last_error_class == "ValueError"
    assert run.last_error_message == "no luck with postgresql://me:***@host/db"
    bench.store.give_up(bench.keys[0], RunStatus.FAILED, "1 attempt failed")
    assert bench.store.run(bench.keys[0]).status is RunStatus.FAILED
    assert bench.store.run(bench.keys[0]).reason == "1 attempt failed"
    assert bench.store.claim(bench.keys[0], _worker(bench)) is None
    bench.store.reset(bench.keys[0])
    assert bench.store.run(bench.keys[0]).reason is None
    assert bench.claim().number == 2


def test_a_finished_run_is_immutable(bench, result):
    held = bench.claim()
    with bench.writer(held) as writer:
        writer.finish(result())
    with pytest.raises(StoreError, match="is done; only runs that did not end well"):
        bench.store.reset(bench.keys[0])
    with pytest.raises(StoreError, match="is done; only pending runs"):
        bench.store.give_up(bench.keys[0], RunStatus.FAILED, "no")
    with bench.writer(held) as late, pytest.raises(LostLeaseError, match="attempt 1 at run"):
        late.finish(result(test={"ndcg_at_10": 0.9}))
    assert bench.rows("SELECT ndcg_at_10 FROM run_summary") == [(0.125,)]


def test_a_running_run_is_neither_reset_nor_given_up(bench):
    bench.claim()
    with pytest.raises(StoreError, match="is running; only runs that did not end well"):
        bench.store.reset(bench.keys[0])
    with pytest.raises(StoreError, match="is running; only pending runs"):
        bench.store.give_up(bench.keys[0], RunStatus.FAILED, "no")


def test_out_of_memory_is_a_result_that_bounds_what_it_dominates(bench, result):
    with bench.writer(bench.claim()) as writer:
        writer.finish(
            result(
                RunStatus.OUT_OF_MEMORY,
                requested_bytes=2**30,
                allocated_bytes=2**32,
                total_bytes=2**33,
                error="CUDA out of memory",
            )
        )
    reason = "dominates a run that ran out of memory"
    bench.store.give_up(bench.keys[1], RunStatus.SKIPPED, reason, proven_by=bench.keys[0])
    summary = bench.rows(
        "SELECT run_id, status, device_class, peak_train_memory_bytes, memory_bound_bytes "
        "FROM run_summary ORDER BY run_id"
    )
    bound = 2**30 + 2**32
    assert [row[1:] for row in summary] == [
        ("out_of_memory", "cpu-8GiB", None, bound),
        ("skipped", "cpu-8GiB", None, bound),
    ]
    assert bench.store.run(bench.keys[1]).skipped_by == bench.keys[0]
    bench.store.reset(bench.keys[0])
    assert bench.claim().number == 2


def test_skipping_needs_a_proof(bench):
    with pytest.raises(StoreError, match="a skipped run names the run that proves it"):
        bench.store.give_up(bench.keys[1], RunStatus.SKIPPED, "why")
    with pytest.raises(StoreError, match="proves nothing"):
        bench.store.give_up(bench.keys[1], RunStatus.SKIPPED, "why", proven_by=bench.keys[0])
    assert bench.store.run(bench.keys[1]).status is RunStatus.PENDING
    with pytest.raises(StoreError, match="status='done'; use 'failed' or 'skipped'"):
        bench.store.give_up(bench.keys[1], RunStatus.DONE, "why")


def test_a_larger_device_gets_its_own_summary(bench, result, worker):
    with bench.writer(bench.claim()) as writer:
        writer.finish(result(RunStatus.OUT_OF_MEMORY, total_bytes=2**33))
    bench.store.reset(bench.keys[0])
    larger = dataclasses.replace(worker, device_class="gpu-80GiB")
    held = bench.store.claim(bench.keys[0], larger)
    with bench.writer(held) as writer:
        writer.finish(result())
    assert bench.rows("SELECT device_class, status FROM run_summary ORDER BY 1") == [
        ("cpu-8GiB", "out_of_memory"),
        ("gpu-80GiB", "done"),
    ]


def test_resuming_training_takes_over_the_rows_before_it(bench, step, evaluation):
    first = bench.claim()
    with bench.writer(first) as writer:
        for number in range(20):
            writer.step(step(number))
        writer.evaluation(evaluation(10))
        writer.evaluation(evaluation(20))
        writer.flush()
        writer.fail("Killed", "preempted")
    second = bench.claim()
    assert bench.store.inherit_steps(second, 15) == 15
    assert bench.store.inherit_steps(second, 15) == 15
    assert bench.steps_of(second) == list(range(15))
    query = "SELECT DISTINCT step FROM evaluations WHERE attempt_id = :id"
    assert bench.rows(query, id=second.attempt_id) == [(10,)]
    assert bench.store.inherit_steps(second, 25) == 20


def test_a_locked_file_is_one_clear_line(databases, make_bench, monkeypatch):
    bench = make_bench(databases.sqlite())
    store = RunStore(bench.url)
    monkeypatch.setattr("db.store.write_engine", None)
    path = bench.url.removeprefix("sqlite:///")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._engine.dispose()
    store._engine = __import__("db.connect").connect.write_engine(bench.url, busy_seconds=0.05)
    with pytest.raises(StoreError, match="another program holds the database") as caught:
        store.put_dataset(DatasetRecord(name="x", fingerprint="1" * 64))
    assert "\n" not in str(caught.value)
    other.close()


def _worker(bench):
    from db.store import WorkerInfo

    return WorkerInfo(host="node-2", pid=1, device_class="cpu-8GiB")
