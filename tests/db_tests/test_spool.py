"""Spools on disk: torn lines, damage, locks, and fenced attempts."""

import json
import os

import pytest

from db import leases, spool
from db.errors import StoreError
from db.rows import Batch, step_row
from db.spec import RunStatus
from db.spool import Spool


@pytest.fixture
def filled(bench, step):
    """A spool with two lines of two rows, whose writer is gone."""
    held = bench.claim()
    made = Spool(bench.spool_dir, held)
    assert not made
    made.append(Batch([step_row(step(0)), step_row(step(1))]))
    made.append(Batch([step_row(step(2)), step_row(step(3))]))
    assert made
    made.close()
    return held, made.path


def test_the_file_is_only_for_its_owner_and_has_no_password(filled, bench):
    _, path = filled
    assert path.stat().st_mode & 0o777 == 0o600
    password = bench.url.partition("://")[2].partition("@")[0].rpartition(":")[2]
    assert not password or password not in path.read_text()


def test_a_torn_last_line_is_left_out(filled, bench):
    held, path = filled
    path.write_bytes(path.read_bytes()[:-5])
    assert bench.store.replay_spools(bench.spool_dir).rows == 2
    assert bench.steps_of(held) == [0, 1]
    assert not path.exists()


def test_a_replay_that_broke_off_is_repeated_without_repeats(filled, bench):
    held, path = filled
    content = path.read_bytes()
    bench.store.replay_spools(bench.spool_dir)
    path.write_bytes(content)
    bench.store.replay_spools(bench.spool_dir)
    assert bench.steps_of(held) == [0, 1, 2, 3]


def test_a_replayed_end_is_recognised_and_never_repeated(filled, bench, result):
    held, path = filled
    with path.open("ab") as file:
        end = {"finish": {"result": leases.result_to_dict(result())}}
        file.write(json.dumps(end).encode() + b"\n")
    content = path.read_bytes()
    assert bench.store.replay_spools(bench.spool_dir).replayed == 1
    assert bench.store.run(held.run_key).status is RunStatus.DONE
    path.write_bytes(content)
    counts = bench.store.replay_spools(bench.spool_dir)
    assert (counts.replayed, counts.fenced, counts.rows) == (1, 0, 0)
    assert bench.rows("SELECT count(*) FROM run_summary") == [(1,)]
    assert not path.exists()


def test_damage_is_named_and_nothing_is_removed(filled, bench):
    _, path = filled
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(StoreError, match=f"{path.name}, line 2: not a spool line"):
        bench.store.replay_spools(bench.spool_dir)
    assert path.exists()
    path.write_text(json.dumps({"rows": {}}) + "\n")
    with pytest.raises(StoreError, match="line 1: not a spool"):
        bench.store.replay_spools(bench.spool_dir)


def test_a_spool_of_a_lost_attempt_is_set_aside(filled, bench):
    held, path = filled
    bench.run_out(held)
    bench.store.expire_leases()
    counts = bench.store.replay_spools(bench.spool_dir)
    assert (counts.replayed, counts.fenced) == (0, 1)
    assert bench.steps_of(held) == []
    assert [p.name for p in bench.spool_dir.iterdir()] == [path.with_suffix(".fenced").name]
    assert bench.store.run(held.run_key).status is RunStatus.PENDING


def test_a_spool_that_a_writer_holds_is_left_alone(bench, step):
    made = Spool(bench.spool_dir, bench.claim())
    made.append(Batch([step_row(step(0))]))
    assert spool.waiting(bench.spool_dir) == []
    assert bench.store.replay_spools(bench.spool_dir).replayed == 0
    made.close()
    assert bench.store.replay_spools(bench.spool_dir).replayed == 1


def test_a_failed_append_leaves_whole_lines(bench, step, monkeypatch):
    made = Spool(bench.spool_dir, bench.claim())
    made.append(Batch([step_row(step(0))]))
    good = made.path.read_bytes()

    def torn(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", torn)
        with pytest.raises(OSError, match="No space left"):
            made.append(Batch([step_row(step(1))]))
    assert made.path.read_bytes() == good
    made.append(Batch([step_row(step(2))]))
    assert [row[0] for batch in made.batches() for row in batch.steps] == [0, 2]
    made.close()


def test_no_folder_means_nothing_to_replay(bench):
    assert bench.store.replay_spools(bench.spool_dir / "none").replayed == 0


def test_an_empty_spool_is_removed(bench):
    bench.spool_dir.mkdir()
    (bench.spool_dir / "1-x.spool").touch()
    assert bench.store.replay_spools(bench.spool_dir).rows == 0
    assert list(bench.spool_dir.iterdir()) == []
