import functools
import math
import sys
import types

import pytest

from db import query
from db.errors import GridError
from db.measures import EvaluationRecord
from sweeper import early_stopping
from sweeper.early_stopping import METRIC, TIME, Conversation, CutShort, EarlyStopping
from sweeper.grid import parse_grid
from sweeper.worker import execute

GRID = "dataset: toy\nseeds: 5\nearly_stopping: asha\n"


def evaluation(epoch, value):
    return [EvaluationRecord(10 * epoch, epoch, "validation", "ndcg", 10, value, None, 5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("asha", EarlyStopping("asha")),
        ("median", EarlyStopping("median")),
        (
            "{scheduler: asha, grace_epochs: 2, reduction_factor: 3}",
            EarlyStopping("asha", grace_epochs=2, reduction_factor=3.0),
        ),
        ("{scheduler: median, min_runs: 5}", EarlyStopping("median", min_runs=5)),
    ],
)
def test_what_a_grid_may_ask_for(text, expected):
    grid = parse_grid(f"dataset: toy\nearly_stopping: {text}\n", "toy")
    assert grid.early_stopping == expected


def test_nothing_is_cut_unless_the_grid_asks_for_it():
    assert parse_grid("dataset: toy\n", "toy").early_stopping is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("early_stopping: ahsa", r"toy.yaml:2: scheduler 'ahsa' is unknown; did you mean 'asha'"),
        ("early_stopping: {grace_epochs: 2}", r"toy.yaml:2: early_stopping needs 'scheduler'"),
        ("early_stopping: {scheduler: asha, grace: 2}", r"unknown key 'grace'"),
        ("early_stopping: {scheduler: asha, min_runs: 2}", r"min_runs is a setting of median"),
        ("early_stopping: {scheduler: asha, grace_epochs: 0}", r"grace_epochs=0 must be a whole"),
        ("early_stopping: {scheduler: asha, reduction_factor: 1}", r"reduction_factor=1 must be"),
        ("early_stopping: asha\nmax_epochs: 1", r"grace_epochs=1 spares every run"),
        (
            "early_stopping: asha\nblocks: [{seed: 1}]\nsearch: {objectives: ndcg_at_10, runs: 2}",
            r"early_stopping and search exclude each other",
        ),
    ],
)
def test_what_cannot_be_carried_out_names_file_and_line(text, message):
    with pytest.raises(GridError, match=message):
        parse_grid(f"dataset: toy\n{text}\n", "toy")


def test_values_of_several_datasets_are_not_compared():
    with pytest.raises(GridError, match=r"the grid has 2 datasets \(a, b\); make a grid of each"):
        parse_grid("dataset: [a, b]\nearly_stopping: median\n", "toy")


class Training:
    """Stands in for a run of four evaluations."""

    def __init__(self, error=None):
        self.epochs, self.raised, self.error = [], None, error

    def __call__(self, report):
        try:
            for epoch in range(1, 5):
                report(())  # a step
                report(evaluation(epoch, 0.1 * epoch))
                self.epochs.append(epoch)
        except BaseException as error:
            self.raised = error
            return {"outcome": "ended"}
        if self.error is not None:
            raise self.error
        return {"outcome": "done"}


def test_a_run_that_is_never_cut_reports_each_evaluation_and_its_end():
    training = Training()
    conversation = Conversation(training, "asha")
    told = [conversation.next() for _ in range(5)]
    assert [(t[TIME], round(t[METRIC], 1), t["done"]) for t in told] == [
        (1, 0.1, False), (2, 0.2, False), (3, 0.3, False), (4, 0.4, False), (4, 0.4, True),
    ]  # fmt: skip
    assert told[-1]["outcome"] == "done"


def test_a_cut_run_ends_at_its_evaluation_and_says_why():
    training = Training()
    conversation = Conversation(training, "asha")
    conversation.next()
    conversation.next()
    conversation.cut()
    assert training.epochs == [1]
    assert isinstance(training.raised, CutShort)
    assert str(training.raised) == (
        "cut short by asha after epoch 2 (20 steps) with validation NDCG@10 0.2000"
    )


def test_a_run_that_is_let_go_was_not_cut():
    training = Training()
    conversation = Conversation(training, "asha")
    conversation.next()
    conversation.abandon()
    assert isinstance(training.raised, SystemExit)


def test_a_scheduler_that_does_not_answer_does_not_hold_up_training(monkeypatch):
    monkeypatch.setattr(early_stopping, "ANSWER_SECONDS", 0.01)
    training = Training()
    conversation = Conversation(training, "asha")
    conversation._thread.join(30)
    assert training.epochs == [1, 2, 3, 4]
    assert conversation.next()[TIME] == 4
    assert conversation.next()["outcome"] == "done"


def test_what_a_run_raises_reaches_the_one_that_asks():
    conversation = Conversation(Training(ValueError("no")), "asha")
    for _ in range(4):
        conversation.next()
    with pytest.raises(ValueError, match="no"):
        conversation.next()


def test_a_run_without_evaluations_still_has_what_schedulers_ask_for():
    conversation = Conversation(lambda report: {"outcome": "elsewhere"}, "median")
    told = conversation.next()
    assert told["done"]
    assert told[TIME] == 0
    assert math.isnan(told[METRIC])


def behind_the_best(planner):
    """A round in which a run is cut as soon as another one was better after as many epochs."""
    best: dict[int, float] = {}

    def run_round(now, settings, folder, *, reuse):
        while (task := now.agenda.next()) is not None or not now.agenda.is_idle:
            carry_out = functools.partial(execute, task.key, settings, task.slot)
            if settings.early_stopping is None:
                result = carry_out()
            else:
                conversation = Conversation(carry_out, settings.early_stopping.scheduler)
                while not (result := conversation.next())["done"]:
                    if result[METRIC] < best.setdefault(result[TIME], result[METRIC]):
                        conversation.cut()
                        result = {"key": task.key, "outcome": "cut"}
                        break
            now.agenda.ended(task.key)
            now.take(result)
        return []

    sys.modules["sweeper.tuning"].run_round = run_round


def test_cut_runs_are_no_results_and_can_be_asked_for_again(planner):
    behind_the_best(planner)
    planner.behave(steps=8, evaluate_every=2)
    outcome = planner.launch(GRID)
    assert outcome.exit_code == 0
    assert outcome.snapshot.counts == {"done": 1, "pending": 4}
    assert outcome.snapshot.text().startswith("1 done, 0 running, 4 cut short")
    rows = query.rows(
        planner.url,
        "select r.seed, r.status, r.reason, a.status as attempt, a.error_class, a.error_message, "
        "(select count(*) from steps s where s.attempt_id = a.id) as steps "
        "from runs r join attempts a on a.run_id = r.id order by r.seed",
    )
    assert [(r["status"], r["attempt"], r["steps"]) for r in rows] == [
        ("done", "done", 8), *[("pending", "cancelled", 2)] * 4,
    ]  # fmt: skip
    for row in rows[1:]:
        assert row["error_class"] == "CutShort"
        assert row["reason"] == row["error_message"]
        assert row["reason"].startswith("cut short by asha after epoch 1 (2 steps)")
    assert len(query.rows(planner.url, "select * from run_summary")) == 1, "no figure of a cut run"
    assert planner.launch(GRID).exit_code == 0
    assert len(planner.sessions) == 1, "no Ray is started for runs that were cut"
    outcome = planner.launch(GRID, early_stopping=False)
    assert outcome.snapshot.counts == {"done": 5}
    reasons = query.rows(planner.url, "select reason from runs where reason is not null")
    assert reasons == []


def test_a_grid_without_a_scheduler_takes_cut_runs_up(planner):
    behind_the_best(planner)
    planner.launch(GRID)
    outcome = planner.launch("dataset: toy\nseeds: 5\n")
    assert outcome.snapshot.counts == {"done": 5}


def test_the_last_epoch_is_not_judged(planner):
    behind_the_best(planner)
    planner.behave(steps=2, evaluate_every=1)
    outcome = planner.launch("dataset: toy\nseeds: 3\nmax_epochs: 2\nearly_stopping: median\n")
    judged = query.rows(planner.url, "select max(epoch) as last from evaluations e join attempts a "
                        "on a.id = e.attempt_id where a.status = 'cancelled'")  # fmt: skip
    assert judged == [{"last": 1}]
    assert outcome.snapshot.counts == {"done": 1, "pending": 2}


def test_tunes_own_schedulers_decide():
    from sweeper.tuning import _scheduler

    def decisions(settings, values):
        scheduler = _scheduler(types.SimpleNamespace(early_stopping=settings, longest_epochs=16))
        found = []
        for number, value in enumerate(values):
            trial = Trial(number)
            scheduler.on_trial_add(None, trial)
            found.append(scheduler.on_trial_result(None, trial, {METRIC: value, TIME: 1}))
        return found

    assert _scheduler(types.SimpleNamespace(early_stopping=None)) is None
    asha = EarlyStopping("asha", reduction_factor=2)
    assert decisions(asha, [0.5, 0.1, 0.6, 0.4]) == ["CONTINUE", "STOP", "CONTINUE", "STOP"]
    median = EarlyStopping("median", min_runs=2)
    assert decisions(median, [0.5, 0.4, 0.1, 0.6]) == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]


class Trial:
    """As much of a trial as the schedulers look at."""

    def __init__(self, number):
        self.trial_id = str(number)
