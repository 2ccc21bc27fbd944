"""More workers than the server admits connections: they take turns, and everything arrives."""

import contextlib
import threading
import time

import pytest

from bench._toy_trainer import Behaviour
from bench.chaos import journal_violations, violations
from bench.postgres import temporary_server
from db import query
from db.errors import StoreError
from db.spec import RunSpec
from db.store import PlannedRun, RunStore
from sweeper.datasets import dataset_record
from sweeper.plan import Slot
from sweeper.worker import WorkerSettings, execute
from trainer.data.dataset import load_dataset

CONNECTIONS = 3
WORKERS = 9


@pytest.fixture(scope="module")
def small_server():
    """A server with few connections, none of them kept for superusers."""
    settings = {
        "max_connections": str(CONNECTIONS), "superuser_reserved_connections": "0",
        "max_wal_senders": "0",
    }  # fmt: skip
    with temporary_server(settings=settings) as server:
        yield server


def test_three_workers_to_each_connection(small_server, tmp_path, toy_data, monkeypatch):
    url, held = small_server.url(), tmp_path / "held"
    toy = Behaviour(
        journal=str(tmp_path / "journal"), steps=5, step_seconds=0.1, extended_while=str(held)
    )
    for name, value in toy.environment().items():
        monkeypatch.setenv(name, value)
    held.touch()
    dataset = load_dataset(toy_data / "toy")
    store = RunStore.open(url)
    store.put_dataset(dataset_record(dataset))
    planned = [
        PlannedRun(spec=RunSpec(dataset="toy", precision="fp32", seed=seed),
                   fingerprint=dataset.fingerprint)
        for seed in range(WORKERS)
    ]  # fmt: skip
    store.put_sweep("toy", "", planned)
    settings = WorkerSettings(
        database=url, sweep="toy", launch_id="test", spool_dir=str(tmp_path / "spool"),
        datasets={"toy": (str(dataset.path), dataset.fingerprint)},
        trainer="bench._toy_trainer:train",
    )  # fmt: skip
    together, outcomes = threading.Barrier(WORKERS), []

    def work(key):
        together.wait()
        outcomes.append(execute(key, settings, Slot(1, 0))["outcome"])

    workers = [threading.Thread(target=work, args=(run.key,)) for run in planned]
    for worker in workers:
        worker.start()
    training = 0
    deadline = time.monotonic() + 120
    while training < WORKERS and time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(StoreError):  # it has to take its turn as well
            found = query.rows(url, "select count(*) as n from attempts where status = 'running'")
            training = found[0]["n"]
    held.unlink()
    for worker in workers:
        worker.join(120)
    assert training == WORKERS, "all of them were training at the same time"
    assert outcomes == ["done"] * WORKERS
    assert "too many clients" in small_server._log.read_text(), "the server had to refuse some"
    RunStore(url).replay_spools(tmp_path / "spool")
    assert violations(url, tmp_path / "spool") == []
    assert journal_violations(url, tmp_path / "journal") == []
