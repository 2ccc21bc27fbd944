import dataclasses
import threading
import time

import pytest

from db import query
from db.errors import DataError, LaunchError
from sweeper import cluster, parcels
from sweeper import launch as launching
from sweeper.device import git_commit, package_versions
from sweeper.parcels import Parcel, default_cache, is_here, receive, send
from trainer.data.dataset import load_dataset


class Objects:
    """Stands in for the object store."""

    def __init__(self):
        self.held, self.taken = [], 0

    def put(self, data):
        self.held.append(data)
        return len(self.held) - 1

    def get(self, reference):
        self.taken += 1
        return self.held[reference]


@pytest.fixture
def objects(monkeypatch) -> Objects:
    monkeypatch.setattr(parcels, "PIECE_BYTES", 1000)
    return Objects()


@pytest.fixture
def parcel(toy_data, objects) -> Parcel:
    dataset = load_dataset(toy_data / "toy")
    return send(dataset.path, dataset.fingerprint, objects.put)


def test_what_arrives_is_what_was_sent(toy_data, objects, parcel, tmp_path):
    assert max(map(len, objects.held)) == 1000, "large files go in pieces"
    there = receive(parcel, tmp_path, objects.get)
    sent = {path.name: path.read_bytes() for path in (toy_data / "toy").iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == sent
    assert is_here(str(there), parcel.fingerprint)
    assert not is_here(str(there), "another")
    assert not is_here(str(tmp_path / "nowhere"), parcel.fingerprint)


def test_each_node_fetches_once(objects, parcel, tmp_path):
    """Many workers begin at the same moment; one writes, the others wait for it."""
    slow = threading.Barrier(4)
    found = []

    def get(reference):
        time.sleep(0.001)
        return objects.get(reference)

    def work():
        slow.wait()
        found.append(receive(parcel, tmp_path, get))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert found == [tmp_path / parcel.fingerprint[:32]] * 4
    assert objects.taken == len(objects.held)


def test_what_a_killed_worker_left_is_removed(objects, parcel, tmp_path):
    left = tmp_path / f".{parcel.fingerprint[:32]}-abandoned"
    left.mkdir()
    receive(parcel, tmp_path, objects.get)
    assert not left.exists()


def test_damage_on_the_way_is_noticed_and_nothing_stays(objects, parcel, tmp_path):
    objects.held[2] = b"x" + objects.held[2][1:]
    with pytest.raises(DataError, match=r"\S+ of a dataset was damaged on its way here"):
        receive(parcel, tmp_path, objects.get)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_dataset_with_another_fingerprint_is_refused(objects, parcel, tmp_path):
    with pytest.raises(DataError, match=r"arrived with fingerprint \w+, f{12} was sent"):
        receive(dataclasses.replace(parcel, fingerprint="f" * 64), tmp_path, objects.get)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_names_never_become_paths(objects, parcel, tmp_path):
    evil = dataclasses.replace(parcel.files[0], name="../evil.npy")
    with pytest.raises(DataError, match=r"'../evil.npy' is no name of a file"):
        receive(dataclasses.replace(parcel, files=(evil,)), tmp_path / "cache", objects.get)
    assert not (tmp_path / "evil.npy").exists()


def test_a_cache_that_cannot_be_written_is_one_clear_line(objects, parcel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to .*file.*set XDG_CACHE_HOME"):
        receive(parcel, tmp_path / "file", objects.get)


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "srsweep" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(default_cache()) == "/home/somebody/.cache/srsweep/datasets"


def test_a_node_without_the_dataset_gets_it(planner, databases, objects, tmp_path, monkeypatch):
    """A launch on a cluster of one node, which does not see the driver's folder."""
    planner.url = databases.postgres()
    versions = package_versions() | {"commit": git_commit() or ""}
    node = cluster.NodeReport("other", 2.0, 0.0, "cpu", versions, 0.0, {})
    monkeypatch.setattr(launching, "ask_nodes", lambda *words: {"": node})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ray = type("Ray", (), {"put": staticmethod(objects.put), "get": staticmethod(objects.get)})
    monkeypatch.setattr(parcels, "_ray", lambda: ray)
    grid = "dataset: toy\nseeds: 2\n"
    with pytest.raises(LaunchError, match=r"dataset 'toy' is missing on other .*copy the same"):
        planner.launch(grid, address="head:6379")
    assert query.rows(planner.url, "select * from runs") == []

    def hide(task):
        path, fingerprint = planner.settings.datasets["toy"]
        planner.settings.datasets["toy"] = (f"{path}-is-not-here", fingerprint)
        planner.before_task = lambda task: None

    planner.before_task = hide
    outcome = planner.launch(grid, address="head:6379", send_datasets=True)
    assert outcome.snapshot.counts == {"done": 2}
    assert objects.taken == len(objects.held), "fetched once for two runs"
    fetched = tmp_path / "cache" / "srsweep" / "datasets" / load_dataset(
        planner.data / "toy"
    ).fingerprint[:32]  # fmt: skip
    assert fetched.is_dir()
