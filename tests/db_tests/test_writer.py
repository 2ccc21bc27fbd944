"""The writer: fenced, buffered, never in the way of training, and without loss."""

import contextlib
import logging
import sqlite3
import time

import numpy as np
import pytest

from bench.postgres import temporary_server
from db.errors import LostLeaseError, StoreError
from db.measures import HistogramRecord, Recorder
from db.spec import AttemptStatus, RunStatus
from db.store import RunStore


def test_rows_arrive_once_and_in_full(bench, step, evaluation, result):
    held = bench.claim()
    with bench.writer(held) as writer:
        recorder: Recorder = writer
        for number in range(30):
            recorder.step(step(number))
        recorder.evaluation(evaluation(30))
        recorder.histogram(HistogramRecord(30, "hidden", (0.0, 0.5, 1.0), (3, 4)))
        assert writer.flush()
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(30))
    query = "SELECT epoch, loss, tokens, peak_bytes FROM steps WHERE step = 12"
    assert bench.rows(query) == [(1, 1 / 13, 640, 2012)]
    assert bench.rows("SELECT count(*), sum(num_users) FROM evaluations") == [(40, 800)]
    assert bench.rows("SELECT name, step, edges, counts FROM histograms") == [
        ("hidden", 30, "[0.0, 0.5, 1.0]", "[3, 4]")
    ]
    (attempt,) = bench.store.attempts(held.run_key)
    assert (attempt.status, attempt.last_step) == (AttemptStatus.DONE, 29)
    assert attempt.lease_until is None
    assert attempt.ended_at >= attempt.started_at
    summary = "SELECT status, ndcg_at_10, validation_ndcg_at_10, num_steps FROM run_summary"
    assert bench.rows(summary) == [("done", 0.125, 0.25, 30)]
    assert not bench.spool_dir.exists()


def test_nan_and_infinity_become_null_and_numpy_numbers_plain(bench, step, evaluation, result):
    held = bench.claim()
    with bench.writer(held) as writer:
        writer.step(step(0, loss=float("nan"), gradient_norm=float("inf")))
        writer.step(
            step(
                np.int64(1),
                loss=np.float32(0.5),
                tokens=np.int32(7),
                learning_rate=np.float64(-np.inf),
                reserved_bytes=None,
            )
        )
        writer.evaluation(evaluation(np.int64(1), value=float("nan")))
        writer.finish(
            result(RunStatus.DIVERGED, final_loss=float("nan"), test={"mrr_at_5": np.nan})
        )
    query = (
        "SELECT loss, gradient_norm, learning_rate, tokens, reserved_bytes FROM steps ORDER BY step"
    )
    assert bench.rows(query) == [(None, None, 1e-3, 640, 4096), (0.5, 0.5, None, 7, None)]
    assert bench.rows("SELECT DISTINCT value FROM evaluations") == [(None,)]
    assert bench.rows("SELECT final_loss, mrr_at_5, status FROM run_summary") == [
        (None, None, "diverged")
    ]
    if bench.url.startswith("sqlite"):
        query = "SELECT DISTINCT typeof(loss), typeof(tokens) FROM steps WHERE step = 1"
        assert bench.rows(query) == [("real", "integer")]


def test_wrong_records_are_refused_at_once(bench, step, result):
    with bench.writer(bench.claim()) as writer:
        with pytest.raises(TypeError):
            writer.step(step(1.5))
        with pytest.raises(StoreError, match="metric 'ndgc_at_10' is no column"):
            writer.finish(result(test={"ndgc_at_10": 0.1}))
        with pytest.raises(StoreError, match="status='failed' is no result"):
            writer.finish(result(RunStatus.FAILED))
        assert writer.finish(result())
        with pytest.raises(StoreError, match="has ended; nothing can be added"):
            writer.step(step(1))
        with pytest.raises(StoreError, match="has ended"):
            writer.finish(result())


def test_a_worker_that_lost_its_lease_is_stopped_and_writes_nothing(bench, step, result):
    zombie = bench.claim()
    with bench.writer(zombie) as writer:
        for number in range(5):
            writer.step(step(number))
        assert writer.flush()
        bench.run_out(zombie)
        assert bench.store.expire_leases() == [zombie.run_key]
        successor = bench.claim()
        assert successor.number == 2
        writer.step(step(5))
        with pytest.raises(LostLeaseError, match=f"attempt 1 at run {zombie.run_key[:12]}"):
            writer.flush()
        with pytest.raises(LostLeaseError):
            writer.step(step(6))
        with pytest.raises(LostLeaseError):
            writer.finish(result())
    assert bench.steps_of(zombie) == list(range(5))
    assert bench.store.run(zombie.run_key).status is RunStatus.RUNNING
    with bench.writer(successor) as writer:
        writer.step(step(0))
        assert writer.finish(result())
    attempts = bench.store.attempts(zombie.run_key)
    assert [a.status for a in attempts] == [AttemptStatus.LOST, AttemptStatus.DONE]
    assert bench.rows("SELECT count(*) FROM run_summary") == [(1,)]


def test_finishing_after_the_lease_was_lost_writes_nothing(bench, step, result):
    held = bench.claim()
    with bench.writer(held, flush_seconds=30.0) as writer:
        writer.step(step(0))
        bench.run_out(held)
        bench.store.expire_leases()
        with pytest.raises(LostLeaseError):
            writer.finish(result())
    assert bench.steps_of(held) == []
    assert bench.rows("SELECT count(*) FROM run_summary") == [(0,)]


def test_a_late_worker_that_nobody_replaced_goes_on(bench, step, result):
    held = bench.claim()
    with bench.writer(held) as writer:
        bench.run_out(held)
        writer.step(step(0))
        assert writer.flush()
        assert bench.store.expire_leases() == []
        assert writer.finish(result())


def test_the_lease_is_renewed_while_no_rows_come(bench):
    held = bench.claim(lease_seconds=0.4)
    with bench.writer(held, flush_seconds=0.05):
        first = bench.store.attempts(held.run_key)[0].lease_until
        for _ in range(100):
            time.sleep(0.05)
            assert bench.store.expire_leases() == []
            if bench.store.attempts(held.run_key)[0].lease_until > first:
                break
        else:
            pytest.fail("no heartbeat in 5 seconds")


def test_leaving_by_an_exception_ends_the_attempt(bench, step):
    def train(writer, error):
        with writer:
            writer.step(step(0))
            raise error

    with pytest.raises(ZeroDivisionError):
        train(bench.writer(bench.claim(0)), ZeroDivisionError("no users"))
    run = bench.store.run(bench.keys[0])
    assert (run.status, run.last_error_class) == (RunStatus.PENDING, "ZeroDivisionError")
    assert run.last_error_message == "no users"
    assert bench.rows("SELECT count(*) FROM steps") == [(1,)]
    with pytest.raises(KeyboardInterrupt):
        train(bench.writer(bench.claim(1)), KeyboardInterrupt())
    assert bench.store.run(bench.keys[1]).last_attempt_status is AttemptStatus.CANCELLED


def test_leaving_without_an_end_keeps_rows_and_attempt(bench, step):
    held = bench.claim()
    with bench.writer(held, flush_seconds=30.0) as writer:
        writer.step(step(0))
    assert bench.steps_of(held) == [0]
    assert bench.store.run(held.run_key).status is RunStatus.RUNNING


def test_many_rows_go_in_several_transactions(bench, step, result, monkeypatch):
    monkeypatch.setattr("db.writer.CHUNK_ROWS", 7)
    held = bench.claim()
    with bench.writer(held, flush_seconds=30.0) as writer:
        for number in range(50):
            writer.step(step(number))
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(50))


def test_rows_sent_twice_count_once(bench, step, result):
    held = bench.claim()
    with bench.writer(held) as writer:
        writer.step(step(0))
        assert writer.flush()
        writer.step(step(0, loss=9.0))
        writer.step(step(1))
        assert writer.flush()
        assert writer.finish(result())
    assert bench.rows("SELECT step, loss FROM steps ORDER BY step") == [(0, 1.0), (1, 0.5)]


@contextlib.contextmanager
def _locked(url):
    """Hold the write lock of a SQLite file, as another program would."""
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


def test_a_locked_file_only_delays_rows(databases, make_bench, step, result, monkeypatch, caplog):
    monkeypatch.setattr("db.writer.BUSY_SECONDS", 0.02)
    bench = make_bench(databases.sqlite())
    held = bench.claim()
    with bench.writer(held) as writer:
        with _locked(bench.url), caplog.at_level(logging.WARNING):
            for number in range(10):
                writer.step(step(number))
            assert not writer.flush()
            assert len(list(bench.spool_dir.glob("*.spool"))) == 1
        writer.step(step(10))
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(11))
    assert list(bench.spool_dir.iterdir()) == []
    assert "another program holds the database" in caplog.text


def test_a_full_database_only_delays_rows(databases, make_bench, step, result, monkeypatch):
    bench = make_bench(databases.sqlite())
    held = bench.claim()
    full = True

    def insert(connection, attempt_id, batch, *, fresh):
        pages = "PRAGMA max_page_count = 1" if full else "PRAGMA max_page_count = 1073741823"
        connection.exec_driver_sql(pages)
        original(connection, attempt_id, batch, fresh=fresh)

    import db.writer

    original = db.writer.insert_batch
    monkeypatch.setattr("db.writer.insert_batch", insert)
    with bench.writer(held) as writer:
        for number in range(3000):
            writer.step(step(number))
        assert not writer.flush()
        full = False
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(3000))


def test_a_full_disk_for_the_spool_keeps_rows_in_memory(
    databases, make_bench, step, result, monkeypatch, caplog
):
    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("db.writer.BUSY_SECONDS", 0.02)
    bench = make_bench(databases.sqlite())
    held = bench.claim()
    with bench.writer(held) as writer:
        with _locked(bench.url), monkeypatch.context() as full, caplog.at_level(logging.WARNING):
            full.setattr("db.spool.os.fsync", no_space)
            for number in range(10):
                writer.step(step(number))
            assert not writer.flush()
            assert list(bench.spool_dir.glob("*.spool")) == []
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(10))
    assert "cannot be written (No space left on device); rows stay in memory" in caplog.text


def test_neither_database_nor_spool_is_an_error_at_the_end(
    databases, make_bench, step, result, monkeypatch
):
    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("db.writer.BUSY_SECONDS", 0.02)
    bench = make_bench(databases.sqlite())
    held = bench.claim()
    with bench.writer(held, patience_seconds=0.1) as writer, _locked(bench.url):
        monkeypatch.setattr("db.spool.os.fsync", no_space)
        writer.step(step(0))
        with pytest.raises(StoreError, match="neither the database nor the spool"):
            writer.finish(result())


def test_an_end_that_cannot_be_written_is_replayed(
    databases, make_bench, step, evaluation, result, monkeypatch
):
    monkeypatch.setattr("db.writer.BUSY_SECONDS", 0.02)
    bench = make_bench(databases.sqlite())
    held = bench.claim()
    with bench.writer(held, patience_seconds=0.1) as writer, _locked(bench.url):
        for number in range(10):
            writer.step(step(number))
        writer.evaluation(evaluation(10))
        writer.histogram(HistogramRecord(9, "hidden", (0.0, 1.0), (3,)))
        assert writer.finish(result()) is False
    assert bench.store.run(held.run_key).status is RunStatus.RUNNING
    counts = bench.store.replay_spools(bench.spool_dir)
    assert (counts.replayed, counts.fenced, counts.rows) == (1, 0, 51)
    assert bench.store.run(held.run_key).status is RunStatus.DONE
    assert bench.steps_of(held) == list(range(10))
    assert bench.rows("SELECT ndcg_at_10 FROM run_summary") == [(0.125,)]
    assert bench.store.replay_spools(bench.spool_dir).replayed == 0


def test_the_server_goes_away_in_the_middle_of_a_run(tmp_path, make_bench, step, result, caplog):
    with temporary_server() as server:
        bench = make_bench(server.url())
        held = bench.claim(lease_seconds=1.0)
        with bench.writer(held) as writer, caplog.at_level(logging.WARNING):
            for number in range(50):
                writer.step(step(number))
            assert writer.flush()
            server.stop(immediate=True)
            for number in range(50, 250):
                writer.step(step(number))
                time.sleep(0.002)
            assert not writer.flush()
            with pytest.raises(StoreError, match="cannot be reached"):
                bench.store.expire_leases()
            time.sleep(1.0)
            server.start()
            # the lease ran out long ago, but nobody could renew it: the worker gets its time
            assert bench.store.expire_leases() == []
            writer.step(step(250))
            assert writer.finish(result())
        assert bench.steps_of(held) == list(range(251))
        assert bench.store.run(held.run_key).status is RunStatus.DONE
        assert server.password not in caplog.text
        assert "rows wait in" in caplog.text


def test_cut_connections_lose_and_repeat_nothing(databases, make_bench, step, result):
    bench = make_bench(databases.postgres())
    held = bench.claim()
    cut = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with bench.writer(held, flush_seconds=0.001) as writer:
        for number in range(400):
            writer.step(step(number))
            if number % 40 == 0:
                bench.rows(cut)
            time.sleep(0.001)
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(400))


def test_a_commit_whose_answer_is_lost_is_not_repeated(bench, step, result, monkeypatch):
    """Every transaction is committed, and the first of each kind reports failure all the same."""
    import db.writer

    original = db.writer.RunWriter._transact
    broken = []

    def transact(writer, batch, *, fresh, then=None):
        original(writer, batch, fresh=fresh, then=then)
        if (fresh, then is None) not in broken:
            broken.append((fresh, then is None))
            raise sqlite3.OperationalError("the answer was lost")

    monkeypatch.setattr(db.writer.RunWriter, "_transact", transact)
    held = bench.claim()
    with bench.writer(held) as writer:
        for number in range(20):
            writer.step(step(number))
        writer.flush()
        assert writer.finish(result())
    assert bench.steps_of(held) == list(range(20))
    assert bench.store.run(held.run_key).status is RunStatus.DONE
    assert (True, True) in broken
    assert (True, False) in broken


def test_the_writer_gives_its_connection_back_when_idle(databases, make_bench, step, monkeypatch):
    monkeypatch.setattr("db.writer.IDLE_SECONDS", 0.05)
    bench = make_bench(databases.postgres())
    count = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid()"
    )
    with bench.writer(bench.claim()) as writer:
        writer.step(step(0))
        assert writer.flush()
        for _ in range(200):
            time.sleep(0.02)
            if bench.rows(count) == [(0,)]:
                break
        else:
            pytest.fail("the connection is still there after 4 seconds")
        writer.step(step(1))
        assert writer.flush()


def test_two_stores_in_one_process_do_not_share_connections(bench, result):
    other = RunStore(bench.url)
    with bench.writer(bench.claim(0)) as writer:
        assert other.run(bench.keys[0]).status is RunStatus.RUNNING
        writer.finish(result())
    assert other.run(bench.keys[0]).status is RunStatus.DONE


def test_a_connection_is_given_back_while_training_goes_on(databases, make_bench, step):
    bench = make_bench(databases.postgres())
    with bench.writer(bench.claim()) as writer:
        writer.step(step(0))
        assert writer.flush()
        assert writer._connection is None
        writer.step(step(1))
        assert writer.flush()
        writer.cancel()
    assert bench.steps_of(writer.claim) == [0, 1]
