"""Pruning: step rows of finished runs go as asked, and nothing else ever does."""

import pytest

from db import query
from db.errors import StoreError
from db.retention import Retention, prune_steps, vacuum
from db.spec import RunStatus


@pytest.fixture
def filled(bench, step, evaluation, result):
    """Run 0 done at its second attempt, run 1 failed, run 2 running; 25 steps each."""

    def write(writer, count=25):
        for number in range(count):
            writer.step(step(number))
        writer.evaluation(evaluation(10))
        assert writer.flush()

    with bench.writer(bench.claim(0)) as writer:
        write(writer, 12)
        writer.fail("X", "y")
    with bench.writer(bench.claim(0)) as writer:
        write(writer)
        writer.finish(result())
    with bench.writer(bench.claim(1)) as writer:
        write(writer)
        writer.fail("X", "y")
    bench.store.give_up(bench.keys[1], RunStatus.FAILED, "no")
    with bench.writer(bench.claim(2)) as writer:
        write(writer)
        yield bench


def _steps(bench, run, attempt=1):
    sql = (
        "SELECT s.step FROM steps s JOIN attempts a ON a.id = s.attempt_id JOIN runs r "
        "ON r.id = a.run_id WHERE r.run_key = :key AND a.number = :number ORDER BY s.step"
    )
    return [row[0] for row in bench.rows(sql, key=bench.keys[run], number=attempt)]


def _others(bench):
    tables = ("evaluations", "run_summary", "attempts", "runs")
    return [bench.rows(f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables]


def test_a_dry_run_says_what_the_run_then_does(filled):
    others = _others(filled)
    planned = prune_steps(filled.url, Retention(), dry_run=True)
    assert [len(_steps(filled, 0, n)) for n in (1, 2)] == [12, 25]
    assert prune_steps(filled.url, Retention()) == planned
    assert [(p.run_key, p.attempt, p.rows, p.kept) for p in planned] == [
        (filled.keys[0], 1, 12, 0), (filled.keys[0], 2, 25, 0), (filled.keys[1], 1, 25, 0),
    ]  # fmt: skip
    assert _steps(filled, 0, 1) == _steps(filled, 0, 2) == _steps(filled, 1) == []
    assert _steps(filled, 2) == list(range(25))
    assert _others(filled) == others
    assert prune_steps(filled.url, Retention()) == []
    assert filled.rows("SELECT count(*) FROM events WHERE kind = 'steps pruned'") == [(3,)]


def test_thinning_keeps_each_nth_and_the_last(filled):
    found = prune_steps(filled.url, Retention(keep_every=10))
    assert [(p.attempt, p.rows, p.kept) for p in found] == [(1, 9, 3), (2, 21, 4), (1, 21, 4)]
    assert _steps(filled, 0, 1) == [0, 10, 11]
    assert _steps(filled, 0, 2) == [0, 10, 20, 24]
    rows = query.rows(
        filled.url,
        "SELECT step, evaluation_step FROM run_steps WHERE run_key = :key ORDER BY step",
        {"key": filled.keys[0]},
    )
    assert [row["evaluation_step"] for row in rows] == [None, 10, 10, 10]
    assert prune_steps(filled.url, Retention(keep_every=10)) == []


def test_only_what_is_asked_for_goes(filled):
    filled.store.put_sweep("other", "", [filled.planned[1]])
    assert [p.run_key for p in prune_steps(filled.url, Retention(sweep="other"))] == [
        filled.keys[1]
    ]
    (found,) = prune_steps(filled.url, Retention(superseded=True), dry_run=True)
    assert (found.run_key, found.attempt) == (filled.keys[0], 1)
    assert prune_steps(filled.url, Retention(older_than_days=1)) == []
    filled.execute("UPDATE attempts SET ended_at = '2000-01-01 00:00:00.000000' WHERE number = 2")
    (found,) = prune_steps(filled.url, Retention(older_than_days=1))
    assert (found.attempt, found.rows) == (2, 25)


def test_rules_that_make_no_sense_are_refused(filled):
    with pytest.raises(StoreError, match="keep_every=1 must be at least 2"):
        Retention(keep_every=1)
    with pytest.raises(StoreError, match=r"older_than_days=-1 must not be negative"):
        Retention(older_than_days=-1)
    with pytest.raises(StoreError, match="no sweep 'x'"):
        prune_steps(filled.url, Retention(sweep="x"))


def test_a_vacuum_keeps_every_row(filled):
    prune_steps(filled.url, Retention(keep_every=10))
    vacuum(filled.url)
    assert _steps(filled, 0, 2) == [0, 10, 20, 24]
