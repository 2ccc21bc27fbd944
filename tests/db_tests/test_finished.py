"""The frame of summaries from packed rows is the one that plain columns give."""

import pandas as pd
import pytest

from db import finished, packed
from db.imported import ForeignRun, put_foreign
from db.query import _summary, _typed_frame, summary_frame
from db.reader import connected
from db.schema import runs
from db.spec import RunSpec, RunStatus
from db.store import DatasetRecord, PlannedRun, RunStore

FINGERPRINT = "a" * 64


def plain_frame(url, *conditions):
    """The frame as it is made column by column."""
    with connected(url) as connection:
        wanted = _summary().where(*conditions)
        return _typed_frame(connection.execute(wanted), wanted)


def is_packed(url):
    with connected(url) as connection:
        return finished.columns(connection, []) is not None


def assert_same(read, plain):
    pd.testing.assert_frame_equal(read, plain, check_exact=True, check_column_type=True)
    assert [str(a) for a in read.dtypes] == [str(b) for b in plain.dtypes]
    for name in plain.columns[plain.isna().any()]:
        kinds = [{type(v) for v in f[name][f[name].isna()]} for f in (read, plain)]
        assert kinds[0] == kinds[1], name


@pytest.fixture
def every_kind(bench, result):
    """Runs that are done, out of memory, diverged, skipped, failed, running, pending, imported."""
    bench.planned = [
        PlannedRun(spec=RunSpec(dataset="tiny", precision="fp32", seed=2**63 - 1 - seed),
                   fingerprint=bench.planned[0].fingerprint)
        for seed in range(9)
    ]  # fmt: skip
    bench.keys = [run.key for run in bench.planned]
    bench.store.put_sweep("more", "", bench.planned)
    results = {
        0: result(train_seconds=0.1, num_parameters=2**60 + 1),
        1: result(RunStatus.OUT_OF_MEMORY, requested_bytes=2**40, allocated_bytes=3,
                  error='no "room"\n\x1f\u2028 \U0001f600'),
        2: result(RunStatus.DIVERGED, test={"ndcg_at_10": float("nan"), "mrr_at_1": None},
                  final_loss=float("inf")),
        6: result(stop_reason="patience", validation={}),
    }  # fmt: skip
    bench.store.give_up(bench.keys[3], RunStatus.FAILED, "three attempts\nfailed")
    for number, ended in results.items():
        with bench.writer(bench.claim(number)) as writer:
            assert writer.finish(ended)
    bench.store.give_up(bench.keys[4], RunStatus.SKIPPED, "larger", proven_by=bench.keys[1])
    assert bench.claim(5).number == 1
    bench.store.put_dataset(DatasetRecord(name="käse", fingerprint=FINGERPRINT, num_users=7))
    spec = RunSpec(dataset="käse", precision="fp32", batch_size=2**40, learning_rate=1 / 3)
    foreign = [
        ForeignRun(spec=spec, fingerprint=FINGERPRINT, replicate=3, source="paper",
                   device_class=device, summary={"ndcg_at_10": 1e-310, "timing": timing})
        for device, timing in (("z-gpu", "shared"), ("A-gpu", None))
    ]  # fmt: skip
    put_foreign(bench.url, "other", "", [], foreign)
    return bench


def test_the_frame_of_packed_rows_equals_that_of_columns(every_kind, monkeypatch):
    plain = plain_frame(every_kind.url)
    assert is_packed(every_kind.url)
    for rows_at_once in (1, 2, 2000):
        monkeypatch.setattr(finished, "_ROWS_AT_ONCE", rows_at_once)
        assert_same(summary_frame(every_kind.url), plain)
    assert {"done", "out_of_memory", "diverged", "failed", "skipped"} == set(plain["status"])
    assert list(plain["device_class"])[-2:] == ["A-gpu", "z-gpu"]
    assert len(plain) == 8


def test_frames_of_some_runs_equal_too(every_kind):
    url = every_kind.url
    for name in ("tiny", "käse", "nothing"):
        assert_same(summary_frame(url, datasets=[name]), plain_frame(url, runs.c.dataset == name))
    assert len(summary_frame(url, sweeps=["other"])) == 2
    assert list(summary_frame(url, sweeps=["more"])["seed"]) == [
        run.spec.seed for run in every_kind.planned if run.spec.seed > 2**63 - 6
    ] + [2**63 - 7]


CHANGES = [
    "UPDATE run_summary SET ndcg_at_10 = 0.75 WHERE num_parameters > 2000",
    "UPDATE runs SET dataset = 'cheese' WHERE dataset = 'käse'",
    "UPDATE runs SET reason = 'by hand', status = 'failed'",
    "UPDATE run_summary SET device_class = 'other' WHERE device_class = 'z-gpu'",
    "DELETE FROM run_summary WHERE device_class = 'A-gpu'",
]


def test_a_change_by_hand_is_seen_at_once_and_packed_again(every_kind):
    before = summary_frame(every_kind.url)
    for change in CHANGES:
        every_kind.execute(change)
        changed = summary_frame(every_kind.url)
        assert_same(changed, plain_frame(every_kind.url))
        assert not changed.equals(before)
        RunStore.open(every_kind.url, upgrade=True)
        assert is_packed(every_kind.url)
        assert_same(summary_frame(every_kind.url), changed)
        before = changed


def test_rows_of_another_layout_are_not_read(every_kind, monkeypatch):
    plain = plain_frame(every_kind.url)
    every_kind.execute("UPDATE packed_summaries SET layout = 1, numbers = '\\x00'"
                       if every_kind.url.startswith("postgres") else
                       "UPDATE packed_summaries SET layout = 1, numbers = x'00'")  # fmt: skip
    assert_same(summary_frame(every_kind.url), plain)
    RunStore.open(every_kind.url, upgrade=True)
    assert is_packed(every_kind.url)
    assert_same(summary_frame(every_kind.url), plain)


def test_many_results_are_packed_in_parts(every_kind, monkeypatch):
    monkeypatch.setattr(packed, "_ROWS_AT_ONCE", 2)
    every_kind.execute("DELETE FROM packed_summaries")
    assert not is_packed(every_kind.url)
    RunStore.open(every_kind.url, upgrade=True)
    assert is_packed(every_kind.url)
    assert every_kind.rows("SELECT count(*) FROM packed_summaries") == [(7,)]
