"""Copies of a whole database: equal to the source in every row, or not there at all."""

import sqlite3

import pytest
import sqlalchemy as sa

from db import copy, query
from db.connect import write_engine
from db.copy import copy_database
from db.errors import StoreError
from db.measures import HistogramRecord
from db.schema import metadata
from db.spec import RunStatus
from db.store import RunStore


@pytest.fixture
def filled(bench, step, evaluation, result):
    """Two runs with results and one that has not begun."""
    with bench.writer(bench.claim(0)) as writer:
        for number in range(25):
            writer.step(step(number, loss=None if number == 3 else 1 / 3))
        writer.evaluation(evaluation(10))
        writer.histogram(HistogramRecord(10, "hidden", (0.0, 1.0), (3,)))
        writer.finish(result(error="a\tb\\N\n'é"))
    with bench.writer(bench.claim(1)) as writer:
        writer.finish(result(RunStatus.OUT_OF_MEMORY, total_bytes=2**33, test={}))
    bench.store.give_up(bench.keys[2], RunStatus.FAILED, "no")
    return bench


def _rows(url):
    engine = write_engine(url)
    with engine.begin() as connection:
        found = {
            table.name: [
                tuple(row)
                for row in connection.execute(sa.select(table).order_by(*table.primary_key))
            ]
            for table in metadata.sorted_tables
        }
    engine.dispose()
    return found


@pytest.fixture(params=["sqlite", "postgres"])
def target(request, databases, tmp_path):
    """URL that a copy may fill."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/copy.db"
    return databases.postgres(empty=True)


def test_every_row_arrives(filled, target, worker):
    before = _rows(filled.url)
    counts = copy_database(filled.url, target)
    assert _rows(target) == before == _rows(filled.url)
    assert counts == {name: len(rows) for name, rows in before.items()}
    assert counts["steps"] == 25
    assert len(query.summary_frame(target)) == 3
    # ids of new rows come after the copied ones
    store = RunStore(target)
    store.put_sweep("next", "", filled.planned)
    store.reset(filled.keys[2])
    assert store.claim(filled.keys[2], worker).number == 1


def test_many_rows_go_in_pieces(filled, target, monkeypatch):
    monkeypatch.setattr(copy, "_ROWS_AT_ONCE", 7)
    copy_database(filled.url, target)
    assert _rows(target) == _rows(filled.url)


def test_running_attempts_must_be_accepted(bench, target, worker):
    held = bench.claim(0)
    with pytest.raises(StoreError, match=r"1 running attempts; .*--live"):
        copy_database(bench.url, target)
    copy_database(bench.url, target, live=True)
    assert RunStore(target).run(held.run_key).status is RunStatus.RUNNING


def test_a_target_with_rows_is_left_alone(filled, databases, make_bench, tmp_path):
    other = make_bench(databases.postgres())
    before = _rows(other.url)
    with pytest.raises(StoreError, match="already has rows in datasets"):
        copy_database(filled.url, other.url)
    assert _rows(other.url) == before
    (tmp_path / "x.db").write_text("mine")
    with pytest.raises(StoreError, match=r"x.db exists; name a file that does not"):
        copy_database(filled.url, f"sqlite:///{tmp_path}/x.db")
    assert (tmp_path / "x.db").read_text() == "mine"


def test_a_copy_that_breaks_off_leaves_nothing_and_can_be_repeated(filled, target, monkeypatch):
    files = _files(target)

    def broken(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(copy, "_compared", broken)
        with pytest.raises((StoreError, OSError), match="No space left"):
            copy_database(filled.url, target)
    assert _files(target) == files
    copy_database(filled.url, target)
    assert _rows(target) == _rows(filled.url)


def _files(url):
    if url.startswith("sqlite"):
        folder = url.removeprefix("sqlite:///").rpartition("/")[0]
        return sorted(str(p) for p in __import__("pathlib").Path(folder).glob("*copy*"))
    try:
        return [len(rows) for rows in _rows(url).values()]
    except sa.exc.ProgrammingError:
        return [0] * len(metadata.sorted_tables)


@pytest.mark.parametrize("table", ["steps", "runs", "evaluations"])
def test_a_lost_row_is_noticed(filled, target, monkeypatch, table):
    true_insert = copy._insert

    def lossy(writing, into, rows):
        true_insert(writing, into, rows[1:] if into.name == table else rows)

    def lossy_backup(reading, partial):
        true_backup(reading, partial)
        connection = sqlite3.connect(partial)
        connection.execute(f"DELETE FROM {table} WHERE rowid IN (SELECT min(rowid) FROM {table})"
                           if table == "runs" else f"DELETE FROM {table} WHERE step = "
                           f"(SELECT min(step) FROM {table})")  # fmt: skip
        connection.commit()
        connection.close()

    true_backup = copy._back_up
    monkeypatch.setattr(copy, "_insert", lossy)
    monkeypatch.setattr(copy, "_back_up", lossy_backup)
    with pytest.raises(StoreError, match=rf"rows of {table}|FOREIGN KEY|foreign key"):
        copy_database(filled.url, target)


def test_a_row_in_the_place_of_another_is_noticed(filled, target, monkeypatch):
    true_insert = copy._insert

    def shifted(writing, into, rows):
        if into.name == "steps":
            rows = [(row[0], row[1] + 1, *row[2:]) for row in rows]
        true_insert(writing, into, rows)

    def shifted_backup(reading, partial):
        true_backup(reading, partial)
        with sqlite3.connect(partial) as connection:
            connection.execute("UPDATE steps SET step = step + 100")
        connection.close()

    true_backup = copy._back_up
    monkeypatch.setattr(copy, "_insert", shifted)
    monkeypatch.setattr(copy, "_back_up", shifted_backup)
    with pytest.raises(StoreError, match="has other steps than the source"):
        copy_database(filled.url, target)


def test_writers_go_on_during_a_backup(databases, make_bench, step, tmp_path, monkeypatch):
    bench = make_bench(databases.sqlite())
    with bench.writer(bench.claim(0)) as writer:
        writer.step(step(0))
        assert writer.flush()
        true_backup = copy._back_up

        def late(reading, partial):
            writer.step(step(1))
            assert writer.flush()
            true_backup(reading, partial)

        monkeypatch.setattr(copy, "_back_up", late)
        url = f"sqlite:///{tmp_path}/copy.db"
        assert copy_database(bench.url, url, live=True)["steps"] == 1
        assert query.rows(url, "SELECT count(*) AS n FROM steps") == [{"n": 1}]
        writer.cancel()


def test_nothing_to_copy(tmp_path, databases):
    with pytest.raises(StoreError, match=r"none.db does not exist; there is nothing to copy"):
        copy_database(f"sqlite:///{tmp_path}/none.db", f"sqlite:///{tmp_path}/copy.db")
    with pytest.raises(StoreError, match="is empty"):
        copy_database(databases.postgres(empty=True), f"sqlite:///{tmp_path}/copy.db")
    assert list(tmp_path.iterdir()) == []
