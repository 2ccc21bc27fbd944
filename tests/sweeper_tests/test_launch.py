import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time

import pytest

from bench.chaos import violations
from db import query
from db.errors import DataError, LaunchError, SpecError, StoreError
from db.planning import SweepView, end_attempts
from db.spec import AttemptStatus, RunStatus
from db.store import RunStore
from sweeper import launch as launching
from sweeper import planner as planning
from sweeper.launch_options import default_spool_dir
from sweeper.plan import SHARED_OUT_OF_MEMORY, RetryLimits
from sweeper.session import Node
from sweeper.worker import WorkerSettings, describe_worker, execute

GRID = "dataset: toy\nseeds: {}\n"


def statuses(url):
    return {r["seed"]: r["status"] for r in query.rows(url, "select seed, status from runs")}


def test_everything_is_run_once_and_the_same_line_finds_nothing_to_do(planner):
    outcome = planner.launch(GRID.format(3))
    assert outcome.exit_code == 0
    assert outcome.snapshot.counts == {"done": 3}
    assert outcome.snapshot.best == pytest.approx(1 / 43)
    assert violations(planner.url) == []
    assert planner.launch(GRID.format(3)).exit_code == 0
    assert len(planner.rounds) == 1
    assert len(planner.sessions) == 1, "no Ray is started when nothing is left"
    assert len(list(planner.journal.iterdir())) == 3


def test_runs_of_another_sweep_are_not_repeated(planner):
    planner.launch("sweep: a\n" + GRID.format(2))
    planner.launch("sweep: b\n" + GRID.format(3))
    assert [len(tasks) for tasks in planner.rounds] == [2, 1]
    assert len(list(planner.journal.iterdir())) == 3


def test_long_runs_come_first(planner):
    planner.launch("dataset: toy\nmax_seq_len: [8, 64, 16]\n")
    keys = [task.key for task in planner.rounds[0]]
    by_key = {r["run_key"]: r["max_seq_len"] for r in query.runs(planner.url)}
    assert [by_key[key] for key in keys] == [64, 16, 8]


def test_errors_are_retried_by_class(planner):
    planner.behave(errors={"42": "ValueError", "43": "RuntimeError"})
    outcome = planner.launch(GRID.format(3))
    assert outcome.exit_code == 1
    assert outcome.snapshot.counts == {"failed": 2, "done": 1}
    tries = query.rows(
        planner.url,
        "select seed, count(*) as n from runs join attempts on run_id = runs.id group by seed",
    )
    assert {row["seed"]: row["n"] for row in tries} == {42: 1, 43: 2, 44: 1}
    reasons = query.rows(planner.url, "select seed, reason from runs where status = 'failed'")
    assert {r["seed"]: r["reason"] for r in reasons} == {
        42: "ValueError: toy 42 failed",
        43: "RuntimeError: toy 43 failed (2 attempts)",
    }


def test_failed_runs_are_tried_again_only_when_asked(planner):
    planner.behave(errors={"42": "ValueError"})
    planner.launch(GRID.format(1))
    planner.behave()
    assert planner.launch(GRID.format(1)).exit_code == 1
    assert planner.launch(GRID.format(1), retry_failed=True).exit_code == 0


def test_vanished_workers_are_tried_again_and_then_given_up(planner):
    """A process that died is not waited for: its attempt ends at once, not with its lease."""
    dead = dead_pid()

    def die(task):
        worker = dataclasses.replace(describe_worker(planner.settings, task.slot), pid=dead)
        RunStore(planner.url).claim(task.key, worker, lease_seconds=600)
        raise RuntimeError("the actor died unexpectedly")

    planner.before_task = die
    outcome = planner.launch(GRID.format(1), retries=RetryLimits(lost=2))
    assert outcome.snapshot.counts == {"failed": 1}
    row = query.rows(planner.url, "select reason from runs")[0]
    assert row["reason"].startswith("killed: 2 workers vanished at it")
    lost = query.rows(planner.url, "select status from attempts")
    assert [r["status"] for r in lost] == ["lost", "lost"]


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_out_of_memory_is_confirmed_on_a_whole_device_and_prunes(planner):
    planner.behave(out_of_memory_from=64)
    outcome = planner.launch("dataset: toy\nresources: {cpus: 1}\nbatch_size: [32, 64, 128, 256]\n")
    assert outcome.exit_code == 0
    assert outcome.snapshot.counts["done"] == 1
    counts = outcome.snapshot.counts
    assert counts["out_of_memory"] + counts.get("skipped", 0) == 3
    rows = query.rows(
        planner.url,
        "select batch_size, a.number, a.timing, a.status, a.error_class from attempts a "
        "join runs r on r.id = a.run_id where r.status = 'out_of_memory' order by 1, 2",
    )
    first = [row for row in rows if row["batch_size"] == rows[0]["batch_size"]]
    assert [(r["status"], r["timing"]) for r in first] == [
        ("error", "shared"),
        ("out_of_memory", "exclusive"),
    ]
    assert first[0]["error_class"] == SHARED_OUT_OF_MEMORY


def test_dominated_points_name_the_run_that_proves_it(planner):
    planner.behave(out_of_memory_from=64)
    planner.before_task = lambda task: time.sleep(0.3)  # the monitor prunes between two runs
    grid = "dataset: toy\nresources: {cpus: 2}\nseeds: 3\nbatch_size: 64\n"
    outcome = planner.launch(grid)
    assert outcome.snapshot.counts == {"out_of_memory": 1, "skipped": 2}
    skipped = query.rows(planner.url, "select skipped_by, reason from runs where skipped_by <> ''")
    proof = query.rows(planner.url, "select run_key from runs where status = 'out_of_memory'")
    assert {row["skipped_by"] for row in skipped} == {proof[0]["run_key"]}


def test_runs_that_did_not_fit_are_tried_again_on_a_larger_device(planner):
    planner.behave(out_of_memory_from=64)
    grid = "dataset: toy\nresources: {cpus: 2}\nbatch_size: 64\n"
    assert planner.launch(grid).snapshot.counts == {"out_of_memory": 1}
    planner.behave()
    assert planner.launch(grid).snapshot.counts == {"out_of_memory": 1}
    assert planner.launch(grid, retry_out_of_memory=True).snapshot.counts == {"done": 1}


def test_what_did_not_fit_on_a_smaller_device_proves_nothing_here(planner, monkeypatch):
    planner.behave(out_of_memory_from=64)
    monkeypatch.setattr("sweeper.worker.device_class", lambda device: ("small", 2**30))
    grid = "dataset: toy\nresources: {{cpus: 2}}\nbatch_size: {}\n"
    assert planner.launch(grid.format(64)).snapshot.counts == {"out_of_memory": 1}
    planner.behave()
    counts = planner.launch(grid.format("[64, 128, 256]")).snapshot.counts
    assert counts == {"out_of_memory": 1, "done": 2}


def test_no_prune_tries_every_point(planner):
    planner.behave(out_of_memory_from=64)
    planner.before_task = lambda task: time.sleep(0.1)
    grid = "dataset: toy\nresources: {cpus: 2}\nseeds: 3\nbatch_size: 64\n"
    assert planner.launch(grid, prune=False).snapshot.counts == {"out_of_memory": 3}


def test_a_round_that_ray_ends_early_is_taken_up_again(planner):
    """The memory monitor of Ray makes `Tuner.fit` raise whatever max_failures says."""
    calls = []

    def run_round(now, settings, folder, *, reuse):
        calls.append(len(now.agenda.waiting))
        if len(calls) == 1:
            task = now.agenda.next()
            execute(task.key, settings, task.slot)
            raise RuntimeError("Caught unexpected exception: OutOfMemoryError")
        return planner.run_round(now, settings, folder, reuse=reuse)

    sys.modules["sweeper.tuning"].run_round = run_round
    outcome = planner.launch(GRID.format(3))
    assert outcome.snapshot.counts == {"done": 3}
    assert calls == [3, 2]
    assert any("Caught unexpected exception: OutOfMemoryError" in n for n in planner.display.notes)


def test_workers_that_cannot_start_end_the_launch(planner):
    def fail(task):
        raise ModuleNotFoundError("No module named 'torch'")

    planner.before_task = fail
    with pytest.raises(LaunchError, match=r"no worker can start a run: .*No module named 'torch'"):
        planner.launch(GRID.format(2))
    assert len(planner.rounds) == 3


def test_stop_lets_running_points_finish(planner):
    def ask(task):
        if len(planner.rounds[0]) == 2:
            SweepView(planner.url, "toy").request_stop()

    planner.before_task = ask
    outcome = planner.launch(GRID.format(4))
    assert outcome.drained
    assert outcome.exit_code == 1
    assert outcome.snapshot.counts == {"done": 1, "pending": 3}
    planner.before_task = lambda task: None
    assert planner.launch(GRID.format(4)).exit_code == 0, "an old request does not count"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_frees_the_runs_at_once(planner, number):
    def interrupt(task):
        if len(planner.rounds[0]) == 2:
            RunStore(planner.url).claim(
                task.key, describe_worker(planner.settings, task.slot), lease_seconds=600
            )
            os.kill(os.getpid(), number)

    planner.before_task = interrupt
    before = signal.getsignal(number)
    outcome = planner.launch(GRID.format(3))
    assert outcome.exit_code == 128 + number
    assert signal.getsignal(number) == before
    ended = query.rows(planner.url, "select status from attempts order by id")
    assert [row["status"] for row in ended] == ["done", "cancelled"]
    planner.before_task = lambda task: None
    assert planner.launch(GRID.format(3)).snapshot.counts == {"done": 3}
    assert violations(planner.url) == []


def test_a_worker_that_claims_until_ray_has_ended_is_freed_too(planner, monkeypatch):
    whole = planner.session

    def claim(task):
        worker = describe_worker(planner.settings, task.slot)
        RunStore(planner.url).claim(task.key, worker, lease_seconds=600)

    @contextlib.contextmanager
    def slow_to_end(address, **size):
        with whole(address, **size) as session:
            try:
                yield session
            finally:
                claim(planner.rounds[0][-1])

    monkeypatch.setattr(launching, "ray_session", slow_to_end)
    planner.before_task = lambda task: os.kill(os.getpid(), signal.SIGINT)
    assert planner.launch(GRID.format(1)).exit_code == 130
    assert query.rows(planner.url, "select status, lease_until from attempts") == [
        {"status": "cancelled", "lease_until": None}
    ]


def test_workers_that_ray_ends_on_a_signal_are_cancelled_not_lost(planner, monkeypatch):
    """The monitor sees their processes go before the round has ended."""
    run_round = planner.run_round

    def slow_to_end(*given, **options):
        try:
            return run_round(*given, **options)
        except BaseException:
            monkeypatch.setattr(planning, "process_is_alive", lambda pid: False)
            time.sleep(0.2)
            raise

    def interrupt(task):
        worker = describe_worker(planner.settings, task.slot)
        RunStore(planner.url).claim(task.key, worker, lease_seconds=600)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys.modules["sweeper.tuning"], "run_round", slow_to_end)
    planner.before_task = interrupt
    assert planner.launch(GRID.format(1)).exit_code == 130
    assert query.rows(planner.url, "select status from attempts") == [{"status": "cancelled"}]


def test_a_run_that_another_launch_holds_is_waited_for(planner):
    grid = GRID.format(2)
    planner.launch(GRID.format(1))
    other = WorkerSettings(
        database=planner.url, sweep="toy", datasets={}, launch_id="other", spool_dir=""
    )
    held = []

    def hold(task):
        claim = RunStore(planner.url).claim(task.key, describe_worker(other, task.slot))
        held.append(claim)
        timer = threading.Timer(0.5, release)
        timer.start()

    def release():
        view = SweepView(planner.url, "toy")
        ids = [a.attempt_id for a in view.running_attempts()]
        planner.before_task = lambda task: None
        end_attempts(planner.url, ids, AttemptStatus.CANCELLED, "test")

    planner.before_task = hold
    outcome = planner.launch(grid)
    assert outcome.snapshot.counts == {"done": 2}
    assert len(held) == 1
    assert [len(tasks) for tasks in planner.rounds] == [1, 1, 1]


def test_time_limit_ends_a_run_as_failed(planner):
    planner.behave(steps=50, step_seconds=0.05)
    outcome = planner.launch(
        "dataset: toy\nresources: {cpus: 1, time_limit_seconds: 0.2}\nseeds: 1\n"
    )
    assert outcome.snapshot.counts == {"failed": 1}
    row = query.rows(planner.url, "select reason from runs")[0]
    assert "took longer than time_limit_seconds=0.2" in row["reason"]
    assert len(list(planner.journal.iterdir())) == 1, "not tried again"


def test_the_run_database_may_go_away_between_rounds(planner, monkeypatch):
    """The planner waits; it does not take the sweep down with it."""
    calls = []
    original = SweepView.num_attempts

    def flaky(self, launch_id):
        calls.append(launch_id)
        if len(calls) in (1, 2):
            raise StoreError("the database is away")
        return original(self, launch_id)

    monkeypatch.setattr(SweepView, "num_attempts", flaky)
    assert planner.launch(GRID.format(2)).snapshot.counts == {"done": 2}
    monkeypatch.setattr(SweepView, "num_attempts", lambda *_: flaky_always())
    with pytest.raises(StoreError, match="away for good"):
        planner.launch(GRID.format(3), away_seconds=0.1)


def flaky_always():
    raise StoreError("away for good")


def test_too_many_negatives_are_refused_before_anything_starts(planner):
    grid = "dataset: toy\nloss: ce_minus\nnum_negatives: 4096\n"
    with pytest.raises(
        SpecError, match=r"num_negatives=4096 exceeds the \d+ items of 'toy'; lower it or use null"
    ):
        planner.launch(grid)
    assert query.rows(planner.url, "select * from sweeps") == []


def test_missing_dataset_says_what_to_type(planner):
    with pytest.raises(DataError, match=r"dataset 'moon' is not prepared: .*srsweep prepare"):
        planner.launch("dataset: moon\n")


def test_gpus_that_are_not_there_are_refused_in_one_line(planner):
    with pytest.raises(LaunchError, match=r"asks for gpus=1 but this machine has 0 GPUs"):
        planner.launch("dataset: toy\nresources: {gpus: 1}\n")
    assert query.rows(planner.url, "select * from sweeps") == []
    assert planner.sessions == []


def test_more_cpus_than_there_are_is_refused(planner):
    with pytest.raises(LaunchError, match=r"asks for cpus=64 but this machine has 2"):
        planner.launch("dataset: toy\nresources: {cpus: 64}\n")


def test_sqlite_is_refused_for_a_cluster(planner):
    with pytest.raises(LaunchError, match="needs PostgreSQL"):
        planner.launch(GRID.format(1), address="head:6379")


def test_cluster_gpus_are_those_of_the_largest_node(planner, databases):
    planner.url = databases.postgres()
    planner.nodes = (Node(4.0, 0.0), Node(8.0, 2.0))
    with pytest.raises(LaunchError, match=r"gpus=4 but the cluster's largest node has 2"):
        planner.launch("dataset: toy\nresources: {gpus: 4}\n", address="head:6379")


def test_each_database_has_its_own_spool(tmp_path):
    sqlite = default_spool_dir(f"sqlite:///{tmp_path}/runs.db")
    assert sqlite == tmp_path / "runs.db.spool"
    one = default_spool_dir("postgresql://me:secret@host/runs")
    assert one == default_spool_dir("postgresql://other:word@host:5432/runs")
    assert one != default_spool_dir("postgresql://me:secret@host/other")
    assert "secret" not in str(one)


def test_status_of_the_enum_is_what_the_counts_use(planner):
    planner.launch(GRID.format(1))
    assert statuses(planner.url) == {42: RunStatus.DONE.value}
