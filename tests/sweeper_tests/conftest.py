import collections
import contextlib
import sys
import types
from pathlib import Path

import pytest

from bench import _toy_trainer
from bench.chaos import make_dataset
from sweeper import launch as launching
from sweeper.grid import parse_grid
from sweeper.launch import launch
from sweeper.launch_options import LaunchOptions
from sweeper.session import Node, Session
from sweeper.worker import execute


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """Folder of prepared datasets with one called `toy`."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "toy")
    return folder


class Recording:
    """A display that keeps what it was told."""

    def __init__(self):
        self.notes, self.results, self.snapshots = [], [], []

    def note(self, text):
        self.notes.append(text)

    def finished(self, name, result):
        self.results.append((name, result))

    def update(self, snapshot):
        self.snapshots.append(snapshot)


class Planner:
    """Launches grids with the toy trainer in this process; Ray Tune is replaced by a loop."""

    def __init__(self, tmp_path, url, data, monkeypatch):
        self.url, self.data = url, data
        self.journal = tmp_path / "journal"
        self.rounds: list[list] = []
        self.before_task = lambda task: None
        self.display = Recording()
        self.sessions: list[tuple] = []
        self._monkeypatch = monkeypatch
        self.nodes = (Node(2.0, 0.0),)
        tuning = types.ModuleType("sweeper.tuning")
        tuning.Round = collections.namedtuple("Round", "agenda take check refill")
        tuning.run_round = self.run_round
        monkeypatch.setitem(sys.modules, "sweeper.tuning", tuning)
        monkeypatch.setattr(launching, "ray_session", self.session)
        self.behave()

    def behave(self, **how):
        toy = _toy_trainer.Behaviour(
            **{"journal": str(self.journal), "steps": 4, "step_seconds": 0.0, **how}
        )
        for name, value in toy.environment().items():
            self._monkeypatch.setenv(name, value)

    @contextlib.contextmanager
    def session(self, address, **size):
        self.sessions.append((address, size))
        yield Session(self.journal.parent, self.nodes)

    def run_round(self, now, settings, folder, *, reuse):
        """Carry out an agenda as Ray Tune would with one worker."""
        self.settings, self.agenda, errors = settings, now.agenda, []
        self.rounds.append([])
        while True:
            task = now.agenda.next()
            if task is None:
                while not now.refill():
                    now.check()
                task = now.agenda.next()
            if task is None:
                return errors
            self.rounds[-1].append(task)
            result = {"key": task.key, "outcome": "vanished"}
            try:
                self.before_task(task)
                now.check()
                result = execute(task.key, settings, task.slot)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            now.agenda.ended(task.key, started=result["outcome"] != "vanished")
            now.take(result)

    def launch(self, grid, **options):
        chosen = {"cpus": 2, "gpus": 0, "poll_seconds": 0.02, **options}
        return launch(
            parse_grid(grid, "toy"),
            LaunchOptions(
                database=self.url,
                data_dir=self.data,
                trainer="bench._toy_trainer:train",
                **chosen,
            ),
            self.display,
        )


@pytest.fixture
def planner(tmp_path, databases, toy_data, monkeypatch) -> Planner:
    return Planner(tmp_path, databases.sqlite(), toy_data, monkeypatch)
