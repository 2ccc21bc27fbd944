"""The store against a model: whatever happens in whatever order, no row is lost or doubled."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from db import leases, replay
from db.connect import write_engine
from db.errors import LostLeaseError, StoreError
from db.measures import RunResult, StepRecord
from db.rows import Batch, insert_batch, step_row
from db.spec import AttemptStatus, RunStatus
from db.spool import Spool
from db.store import WorkerInfo

RUNS = st.integers(0, 1)


def _rows(first: int, count: int) -> Batch:
    return Batch(
        [
            step_row(StepRecord(step, 0, 1.0, None, 1e-3, 0.1, 1, None, None, None))
            for step in range(first, first + count)
        ]
    )


class Attempt:
    """What the model knows of an attempt."""

    def __init__(self, claim: leases.Claim, spool: Spool) -> None:
        self.claim = claim
        self.spool = spool
        self.status = AttemptStatus.RUNNING
        self.written = 0
        self.spooled = 0
        self.spooled_end = False
        self.ran_out = False


def make_machine(bench: object, folder: Path) -> type[RuleBasedStateMachine]:
    """State machine over one database; each example begins with new attempts at reset runs."""

    class StoreMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.engine = write_engine(bench.url)
            self.attempts: list[Attempt] = []
            self.statuses = [RunStatus.PENDING, RunStatus.PENDING]
            with self.engine.begin() as connection:
                for table in ("events", "run_summary", "steps", "evaluations", "attempts"):
                    connection.exec_driver_sql(f"DELETE FROM {table}")
                connection.exec_driver_sql("UPDATE runs SET status = 'pending', reason = NULL")

        def teardown(self) -> None:
            for attempt in self.attempts:
                attempt.spool.close()
                attempt.spool.path.unlink(missing_ok=True)
            self.engine.dispose()

        def running(self, run: int) -> Attempt | None:
            key = bench.keys[run]
            found = [
                a
                for a in self.attempts
                if a.claim.run_key == key and a.status is AttemptStatus.RUNNING
            ]
            assert len(found) <= 1
            return found[0] if found else None

        def last(self, run: int) -> Attempt | None:
            found = [a for a in self.attempts if a.claim.run_key == bench.keys[run]]
            return found[-1] if found else None

        @contextlib.contextmanager
        def fenced_unless(self, attempt: Attempt):
            if attempt.status is AttemptStatus.RUNNING:
                yield
            else:
                with pytest.raises(LostLeaseError):
                    yield

        @initialize()
        def begin(self) -> None:
            """Without an attempt most rules have nothing to do."""
            self.claim(0)

        @rule(run=RUNS)
        def claim(self, run: int) -> None:
            worker = WorkerInfo(host="h", pid=1, device_class="cpu")
            held = bench.store.claim(bench.keys[run], worker)
            free = self.statuses[run] is RunStatus.PENDING
            assert (held is not None) == free
            if held is not None:
                before = self.last(run)
                assert held.number == (before.claim.number + 1 if before else 1)
                self.attempts.append(Attempt(held, Spool(folder, held)))
                self.statuses[run] = RunStatus.RUNNING

        @precondition(lambda self: self.attempts)
        @rule(data=st.data(), count=st.integers(1, 5))
        def flush(self, data: st.DataObject, count: int) -> None:
            """Any worker, a zombie among them, writes rows and renews its lease."""
            attempt = data.draw(st.sampled_from(self.attempts))
            batch = _rows(attempt.written + attempt.spooled, count)
            with self.fenced_unless(attempt), self.engine.begin() as connection:
                leases.fence(connection, attempt.claim, batch.last_step())
                insert_batch(connection, attempt.claim.attempt_id, batch, fresh=True)
            if attempt.status is AttemptStatus.RUNNING and not attempt.spooled:
                attempt.written += count
                attempt.ran_out = False
            elif attempt.status is AttemptStatus.RUNNING:
                # rows of the spool are a hole until its replay
                attempt.ran_out = False
                self.undo(attempt, batch)

        def undo(self, attempt: Attempt, batch: Batch) -> None:
            with self.engine.begin() as connection:
                connection.exec_driver_sql(
                    f"DELETE FROM steps WHERE attempt_id = {attempt.claim.attempt_id} "
                    f"AND step >= {batch.steps[0][0]}"
                )

        @precondition(lambda self: self.attempts)
        @rule(data=st.data(), count=st.integers(1, 5), overlap=st.integers(0, 3))
        def to_spool(self, data: st.DataObject, count: int, overlap: int) -> None:
            """The database is away; some of the rows had been committed after all."""
            attempt = data.draw(st.sampled_from(self.attempts))
            # a writer that has ended takes no more rows; one that was fenced may not know it yet
            if attempt.spooled_end or attempt.status is AttemptStatus.DONE:
                return
            total = attempt.written + attempt.spooled
            first = max(0, total - overlap)
            attempt.spool.append(_rows(first, total - first + count))
            attempt.spooled += count

        @precondition(lambda self: self.attempts)
        @rule(data=st.data())
        def spool_end(self, data: st.DataObject) -> None:
            attempt = data.draw(st.sampled_from(self.attempts))
            if not attempt.spooled_end and attempt.status is not AttemptStatus.DONE:
                end = leases.result_to_dict(self.result(attempt))
                attempt.spool.append_end("finish", {"result": end})
                attempt.spooled_end = True

        def result(self, attempt: Attempt) -> RunResult:
            return RunResult(
                status=RunStatus.DONE,
                num_steps=attempt.written + attempt.spooled,
                num_epochs=1,
                best_step=None,
                num_parameters=1,
            )

        @rule()
        def replay(self) -> None:
            for attempt in self.attempts:
                attempt.spool.close()
            counts = replay.replay_folder(self.engine, folder)
            waiting = [a for a in self.attempts if a.spooled or a.spooled_end]
            fenced = [a for a in waiting if a.status is not AttemptStatus.RUNNING]
            assert (counts.replayed, counts.fenced) == (len(waiting) - len(fenced), len(fenced))
            for attempt in waiting:
                if attempt.status is AttemptStatus.RUNNING:
                    attempt.written += attempt.spooled
                    attempt.ran_out = False
                    if attempt.spooled_end:
                        self.ended(attempt, AttemptStatus.DONE, RunStatus.DONE)
                attempt.spooled, attempt.spooled_end = 0, False
                attempt.spool = Spool(folder, attempt.claim)
            for path in folder.glob("*.fenced"):
                path.unlink()

        def ended(self, attempt: Attempt, status: AttemptStatus, run: RunStatus) -> None:
            attempt.status = status
            self.statuses[bench.keys.index(attempt.claim.run_key)] = run

        @precondition(lambda self: self.attempts)
        @rule(data=st.data())
        def finish(self, data: st.DataObject) -> None:
            attempt = data.draw(st.sampled_from(self.attempts))
            if attempt.spooled or attempt.spooled_end:
                return
            with self.fenced_unless(attempt), self.engine.begin() as connection:
                leases.finish(connection, attempt.claim, self.result(attempt))
            if attempt.status is AttemptStatus.RUNNING:
                self.ended(attempt, AttemptStatus.DONE, RunStatus.DONE)

        @precondition(lambda self: self.attempts)
        @rule(data=st.data())
        def fail(self, data: st.DataObject) -> None:
            attempt = data.draw(st.sampled_from(self.attempts))
            with self.fenced_unless(attempt), self.engine.begin() as connection:
                leases.end(connection, attempt.claim, AttemptStatus.ERROR, "X", "y")
            if attempt.status is AttemptStatus.RUNNING:
                self.ended(attempt, AttemptStatus.ERROR, RunStatus.PENDING)

        @rule(run=RUNS)
        def lose(self, run: int) -> None:
            attempt = self.running(run)
            if attempt is not None:
                bench.run_out(attempt.claim)
                attempt.ran_out = True

        @rule()
        def expire(self) -> None:
            gone = [a for a in self.attempts if a.ran_out and a.status is AttemptStatus.RUNNING]
            assert sorted(bench.store.expire_leases()) == sorted(a.claim.run_key for a in gone)
            for attempt in gone:
                self.ended(attempt, AttemptStatus.LOST, RunStatus.PENDING)

        @rule(run=RUNS)
        def give_up(self, run: int) -> None:
            key = bench.keys[run]
            if self.statuses[run] in (RunStatus.PENDING, RunStatus.FAILED):
                bench.store.give_up(key, RunStatus.FAILED, "enough")
                self.statuses[run] = RunStatus.FAILED
            else:
                with pytest.raises(StoreError):
                    bench.store.give_up(key, RunStatus.FAILED, "enough")

        @rule(run=RUNS)
        def reset(self, run: int) -> None:
            if self.statuses[run] in (RunStatus.PENDING, RunStatus.FAILED):
                bench.store.reset(bench.keys[run])
                self.statuses[run] = RunStatus.PENDING
            else:
                with pytest.raises(StoreError):
                    bench.store.reset(bench.keys[run])

        @invariant()
        def database_equals_model(self) -> None:
            with self.engine.begin() as connection:
                steps = connection.exec_driver_sql(
                    "SELECT attempt_id, count(*), max(step) FROM steps GROUP BY attempt_id"
                ).all()
                attempts = connection.exec_driver_sql("SELECT id, status FROM attempts").all()
                runs = connection.exec_driver_sql("SELECT run_key, status FROM runs").all()
                summaries = connection.exec_driver_sql(
                    "SELECT attempt_id, num_steps FROM run_summary"
                ).all()
            expected = {
                (a.claim.attempt_id, a.written, a.written - 1) for a in self.attempts if a.written
            }
            assert {tuple(row) for row in steps} == expected
            assert dict(map(tuple, attempts)) == {
                a.claim.attempt_id: a.status for a in self.attempts
            }
            assert dict(map(tuple, runs)) == dict(zip(bench.keys, self.statuses, strict=True))
            done = {(a.claim.attempt_id, a.written) for a in self.attempts if a.status == "done"}
            assert {tuple(row) for row in summaries} == done

    return StoreMachine


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_the_store_behaves_as_its_model(databases, make_bench, tmp_path, backend):
    bench = make_bench(databases.sqlite() if backend == "sqlite" else databases.postgres())
    bench.execute("DELETE FROM sweep_runs")
    bench.execute("DELETE FROM runs WHERE run_key = :key", key=bench.keys.pop())
    folder = tmp_path / "spool"
    folder.mkdir()
    run_state_machine_as_test(
        make_machine(bench, folder),
        settings=settings(
            # a step costs a server five times what it costs a file
            max_examples=12 if backend == "sqlite" else 4,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        ),
    )
