import pytest

from db.spec import RunSpec
from sweeper.feasibility import dominated, dominates
from sweeper.plan import (
    SHARED_OUT_OF_MEMORY,
    History,
    RetryLimits,
    Slot,
    predicted_cost,
    reason_to_give_up,
    summarise,
)
from sweeper.progress import PlainDisplay, RateClock, Snapshot, describe, duration, result_line


def spec(**values):
    return RunSpec(**{"dataset": "d", "loss": "ce_minus", "num_negatives": 8, **values})


def test_histories_are_counted_by_kind():
    rows = [
        {"run_key": "a", "status": "lost", "error_class": "lost", "error_message": None},
        {"run_key": "a", "status": "error", "error_class": "OSError", "error_message": "disk"},
        {"run_key": "b", "status": "error", "error_class": SHARED_OUT_OF_MEMORY,
         "error_message": "x"},
    ]  # fmt: skip
    found = summarise(rows)
    assert found["a"] == History(1, 1, 0, "OSError", "disk")
    assert found["b"] == History(shared_out_of_memory=1)


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (History(), None),
        (History(lost=2), None),
        (History(lost=3), "killed: 3 workers vanished at it"),
        (History(errors=1, last_error_class="OSError", last_error_message="disk"), None),
        (
            History(errors=2, last_error_class="OSError", last_error_message="disk"),
            "OSError: disk (2 attempts)",
        ),
        (
            History(errors=1, last_error_class="SpecError", last_error_message="no"),
            "SpecError: no",
        ),
        (History(shared_out_of_memory=5), None),
    ],
)
def test_retries_go_by_class(history, reason):
    found = reason_to_give_up(history, RetryLimits())
    assert (found or "").startswith(reason or "")
    assert (found is None) == (reason is None)


def test_larger_sizes_dominate():
    small = spec(batch_size=64, max_seq_len=50)
    assert dominates(spec(batch_size=128, max_seq_len=50, num_negatives=64), small)
    assert dominates(spec(batch_size=64, max_seq_len=50, seed=1), small)
    assert not dominates(small, small)
    assert not dominates(spec(batch_size=128, max_seq_len=20), small)
    assert not dominates(spec(batch_size=128, max_seq_len=50, embedding_dim=512), small)
    assert not dominates(spec(loss="ce", num_negatives=None, batch_size=999), small)


def test_dominated_points_name_their_proof():
    proof = ("p", spec(batch_size=64))
    pending = [("x", spec(batch_size=128)), ("y", spec(batch_size=32))]
    assert dominated(pending, [proof]) == {"x": "p"}
    assert dominated(pending, []) == {}


def test_cost_grows_with_every_size():
    base = predicted_cost(spec(), 1000)
    assert predicted_cost(spec(max_seq_len=400), 1000) > base
    assert predicted_cost(spec(num_negatives=64), 1000) > base
    assert predicted_cost(spec(batch_size=8), 1000) > base
    assert predicted_cost(spec(loss="ce", num_negatives=None), 1000) > base


def test_slot_says_where_and_how_times_are_measured():
    assert Slot(1, 0).device == "cpu"
    assert Slot(1, 0.5).device == "cuda"
    assert Slot(1, 0.5).timing == "shared"
    assert Slot(1, 1, whole=True).timing == "exclusive"


def test_snapshot_says_what_matters():
    snapshot = Snapshot({"done": 3, "running": 2, "out_of_memory": 1, "pending": 4}, 0.12345, 125)
    assert snapshot.total == 10
    assert snapshot.final == 4
    assert snapshot.text() == (
        "3 done, 2 running, 1 out of memory, best NDCG@10 0.1235, about 2 min 5 s left"
    )


def test_remaining_time_weighs_runs_by_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sweeper.progress.time.monotonic", lambda: now[0])
    clock = RateClock({"long": 30.0, "short": 10.0}, began=0.0)
    assert clock.remaining_seconds(["short"]) is None
    now[0] = 60.0
    clock.finished("long")
    assert clock.remaining_seconds(["short"]) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (65, "1 min 5 s"), (7300, "2 h 1 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plain_display_prints_a_line_when_a_run_became_final(capsys):
    display = PlainDisplay()
    display.update(Snapshot({"pending": 1, "done": 1}))
    display.update(Snapshot({"running": 1, "done": 1}))
    display.finished("ce bs=32", {"outcome": "done", "ndcg_at_10": 0.5, "seconds": 61})
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] 1 done, 0 running",
        result_line("ce bs=32", {"outcome": "done", "ndcg_at_10": 0.5, "seconds": 61}),
    ]


def test_runs_are_named_by_what_varies():
    assert describe(spec(batch_size=32), ("loss", "batch_size", "num_negatives")) == (
        "ce_minus bs=32 ns=8"
    )
    assert describe(spec(), ()) == "ce_minus"
