"""A worker killed at each named point of its attempt: nothing is lost and nothing run twice."""

import dataclasses
import os
import signal

import pytest

from bench import _faults
from bench._toy_trainer import Behaviour
from bench.chaos import journal_violations, violations
from db import query
from db.planning import SweepView, end_attempts
from db.spec import AttemptStatus, RunSpec
from db.store import PlannedRun, RunStore
from sweeper.datasets import dataset_record
from sweeper.plan import Slot
from sweeper.worker import WorkerSettings, execute
from trainer.data.dataset import load_dataset

STEPS = 6


@pytest.fixture
def planned(tmp_path, store_url, toy_data):
    """A run that waits in the database, its key, and what its workers need to know."""
    dataset = load_dataset(toy_data / "toy")
    run = PlannedRun(spec=RunSpec(dataset="toy", precision="fp32"), fingerprint=dataset.fingerprint)
    store = RunStore.open(store_url)
    store.put_dataset(dataset_record(dataset))
    store.put_sweep("toy", "", [run])
    settings = WorkerSettings(
        database=store_url, sweep="toy", launch_id="test", spool_dir=str(tmp_path / "spool"),
        datasets={"toy": (str(dataset.path), dataset.fingerprint)},
        trainer="bench._toy_trainer:train",
    )  # fmt: skip
    return store, run.key, settings


def in_a_process_of_its_own(key, settings) -> int:
    """Exit status of a worker, as `os.waitpid` reports it."""
    pid = os.fork()
    if pid == 0:
        try:
            execute(key, settings, Slot(1, 0, whole=True))
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("point", _faults.POINTS)
def test_a_worker_killed_at_a_named_point(planned, store_url, tmp_path, monkeypatch, point):
    store, key, settings = planned
    toy = Behaviour(
        journal=str(tmp_path / "journal"), steps=STEPS, step_seconds=0.005, evaluate_every=2,
        faults={"42": point},
    )  # fmt: skip
    for name, value in toy.environment().items():
        monkeypatch.setenv(name, value)
    status = in_a_process_of_its_own(key, settings)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [path.name for path in (tmp_path / "faults" / "42").iterdir()] == [
        point.replace(" ", "-")
    ]
    finished = point == "after finish"
    steps = query.rows(store_url, "select count(*) as n from steps")[0]["n"]
    if finished:
        assert steps == STEPS
    elif point in ("after claim", "mid buffer", "before commit"):
        assert steps == 0, "nothing was committed"
    elif point == "after commit":
        assert steps > 0, "what was committed is there"
    store.replay_spools(settings.spool_dir)
    running = SweepView(store_url, "toy").running_attempts()
    assert len(running) == (0 if finished else 1)
    dead = [attempt.attempt_id for attempt in running]
    end_attempts(store_url, dead, AttemptStatus.LOST, "its process is gone")
    assert in_a_process_of_its_own(key, settings) == 0
    assert violations(store_url, tmp_path / "spool") == []
    assert journal_violations(store_url, tmp_path / "journal") == []
    attempts = [attempt.status for attempt in store.attempts(key)]
    assert attempts == (["done"] if finished else ["lost", "done"])
    assert len(list((tmp_path / "journal").iterdir())) == len(attempts) - (point == "after claim")


def test_a_run_that_is_final_is_not_executed_again(planned, tmp_path, monkeypatch):
    _, key, settings = planned
    toy = Behaviour(journal=str(tmp_path / "journal"), steps=2, step_seconds=0.0)
    for name, value in toy.environment().items():
        monkeypatch.setenv(name, value)
    slot = Slot(1, 0, whole=True)
    assert execute(key, settings, slot)["outcome"] == "done"
    late = dataclasses.replace(settings, launch_id="another")
    assert execute(key, late, slot)["outcome"] == "elsewhere"
    assert len(list((tmp_path / "journal").iterdir())) == 1
