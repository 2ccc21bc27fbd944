import dataclasses

import pytest

from bench.chaos import violations
from db import query
from db.errors import StoreError
from db.measures import RunResult
from db.spec import RunSpec, RunStatus
from db.store import PlannedRun, RunStore
from sweeper import worker
from sweeper.datasets import dataset_record
from sweeper.plan import SHARED_OUT_OF_MEMORY, Slot
from sweeper.worker import WorkerSettings, execute
from trainer.data.dataset import load_dataset


@pytest.fixture
def planned(store_url, toy_data, tmp_path):
    """A small real run, and the settings to execute it with checkpoints at every step."""
    dataset = load_dataset(toy_data / "toy")
    spec = RunSpec(
        dataset="toy", embedding_dim=8, num_blocks=1, num_heads=1, max_seq_len=8, batch_size=8,
        max_epochs=2, precision="fp32",
    )  # fmt: skip
    run = PlannedRun(spec=spec, fingerprint=dataset.fingerprint)
    store = RunStore(store_url)
    store.put_dataset(dataset_record(dataset))
    store.put_sweep("s", "", [run])
    settings = WorkerSettings(
        database=store_url,
        sweep="s",
        datasets={"toy": (str(dataset.path), dataset.fingerprint)},
        launch_id="here",
        spool_dir=str(tmp_path / "spool"),
        checkpoint_minutes=0.0,
    )
    return run, settings


@pytest.fixture
def trained_steps(monkeypatch):
    """Steps that training itself took, over all executions."""
    taken, original = [], worker._Watched.step

    def step(self, record):
        original(self, record)
        taken.append(record.step)

    monkeypatch.setattr(worker._Watched, "step", step)
    return taken


def stop_at(monkeypatch, step):
    original = worker.RunWriter.step

    def fail(self, record):
        if record.step == step and self.claim.number == 1:
            raise OSError("the machine is on fire")
        original(self, record)

    monkeypatch.setattr(worker.RunWriter, "step", fail)


def test_second_attempt_goes_on_from_the_checkpoint(planned, trained_steps, monkeypatch):
    run, settings = planned
    stop_at(monkeypatch, 6)
    assert execute(run.key, settings, Slot(1, 0))["outcome"] == "error"
    assert trained_steps == list(range(6))
    assert execute(run.key, settings, Slot(1, 0))["outcome"] == "done"
    assert trained_steps[6] > 1, "the second attempt began anew"
    assert violations(settings.database) == []
    summary = query.rows(settings.database, "select num_steps from run_summary")[0]
    assert trained_steps[-1] == summary["num_steps"] - 1


def test_checkpoint_without_its_rows_is_dropped(planned, trained_steps, monkeypatch):
    run, settings = planned
    stop_at(monkeypatch, 6)
    execute(run.key, settings, Slot(1, 0))
    monkeypatch.setattr(RunStore, "inherit_steps", lambda self, held, before_step: 1)
    assert execute(run.key, settings, Slot(1, 0))["outcome"] == "done"
    assert trained_steps[6] == 0
    assert violations(settings.database) == []


def test_dataset_that_differs_between_hosts_is_refused(planned):
    run, settings = planned
    path, _ = settings.datasets["toy"]
    other = dataclasses.replace(settings, datasets={"toy": (path, "0" * 64)})
    outcome = execute(run.key, other, Slot(1, 0))
    assert "has fingerprint" in outcome["error"]
    assert "the sweep was planned for 000000000000" in outcome["error"]


def test_settings_never_show_the_database_url(planned):
    _, settings = planned
    assert settings.database not in repr(settings)


def test_finished_run_is_not_executed_again(planned, trained_steps):
    run, settings = planned
    execute(run.key, settings, Slot(1, 0))
    before = len(trained_steps)
    assert execute(run.key, settings, Slot(1, 0)) == {"key": run.key, "outcome": "elsewhere"}
    assert len(trained_steps) == before


def test_a_worker_waits_for_a_database_that_is_away(planned, monkeypatch):
    run, settings = planned
    calls = []
    original = RunStore.claim

    def claim(self, key, info, **how):
        calls.append(key)
        if len(calls) < 3:
            raise StoreError("away")
        return original(self, key, info, **how)

    monkeypatch.setattr(RunStore, "claim", claim)
    assert execute(run.key, settings, Slot(1, 0))["outcome"] == "done"
    calls.clear()
    impatient = dataclasses.replace(settings, patience_seconds=0.1)
    with pytest.raises(StoreError, match="away"):
        execute(run.key, impatient, Slot(1, 0))


@pytest.mark.parametrize(
    ("slot", "status"),
    [
        (Slot(1, 0, whole=False), "error"),
        (Slot(1, 0, whole=True, largest=False), "error"),
        (Slot(1, 0, whole=True), "out_of_memory"),
    ],
)
def test_out_of_memory_is_a_result_only_where_no_more_can_be_had(
    planned, slot, status, monkeypatch
):
    run, settings = planned
    result = RunResult(
        status=RunStatus.OUT_OF_MEMORY, num_steps=0, num_epochs=0, best_step=None,
        num_parameters=1, requested_bytes=2, allocated_bytes=1, total_bytes=2,
    )  # fmt: skip
    monkeypatch.setattr(worker, "_load_trainer", lambda name: lambda *a, **k: result)
    execute(run.key, settings, slot)
    rows = query.rows(settings.database, "select status, error_class from attempts")
    assert rows[0]["status"] == status
    assert (rows[0]["error_class"] == SHARED_OUT_OF_MEMORY) == (status == "error")
