import math

import pytest

from bench import _toy_trainer
from db import query
from db.errors import GridError, SearchError
from db.measures import RunResult
from db.spec import RunStatus
from sweeper.grid import parse_grid
from sweeper.search.history import read_history
from sweeper.search.space import MEMORY

GRID = """
dataset: toy
loss: ce_minus
batch_size: [32, 64, 128, 256]
max_seq_len: [8, 16, 32]
num_negatives: [4, 16, 48]
search:
  objectives: [ndcg_at_10, peak_train_memory_bytes]
  runs: 11
  batch: 2
"""


def fake_train(spec, dataset, recorder, device="cpu", *, options=None):
    size = math.log2(spec.batch_size) + math.log2(spec.num_negatives)
    return RunResult(
        status=RunStatus.DONE, num_steps=1, num_epochs=1, best_step=1, num_parameters=1,
        test={"ndcg_at_10": 0.2 - 0.001 * (size - 11) ** 2 + 1e-4 * spec.max_seq_len},
        peak_train_memory_bytes=spec.batch_size * spec.max_seq_len * spec.num_negatives,
        train_seconds=1800.0, stop_reason="max_epochs",
    )  # fmt: skip


@pytest.fixture
def searching(planner, monkeypatch):
    monkeypatch.setattr(_toy_trainer, "train", fake_train)
    return planner


def asked(url):
    columns = "batch_size, max_seq_len, num_negatives"
    rows = query.rows(url, f"select {columns}, status from runs order by runs.id")
    assert all(row.pop("status") == "done" for row in rows)
    return [tuple(row.values()) for row in rows]


class Killed(BaseException):
    pass


def test_a_search_spends_its_budget_in_rounds_and_then_has_nothing_to_do(searching):
    outcome = searching.launch(GRID)
    assert outcome.exit_code == 0
    assert outcome.snapshot.counts == {"done": 11}
    assert [len(tasks) for tasks in searching.rounds] == [2, 2, 2, 2, 2, 1]
    assert len(set(asked(searching.url))) == 11
    searching.launch(GRID)
    assert len(searching.rounds) == 6


def test_a_search_killed_three_times_asks_for_the_same_runs(
    searching, tmp_path, databases, toy_data, monkeypatch
):
    searching.launch(GRID)
    alone = asked(searching.url)
    searching.url = databases.sqlite()
    searching.rounds.clear()
    done = 0

    def count(task):
        nonlocal done
        done += 1
        if done in (2, 6, 9):
            raise Killed

    searching.before_task = count
    for _ in range(3):
        with pytest.raises(Killed):
            searching.launch(GRID)
    assert searching.launch(GRID).exit_code == 0
    assert sorted(asked(searching.url)) == sorted(alone)


def test_a_run_that_another_sweep_did_is_known_and_not_asked_for(searching):
    searching.launch("sweep: before\n" + GRID.split("search:")[0].replace(", 128, 256]", "]"))
    before = len(asked(searching.url))
    searching.launch(GRID)
    assert len(asked(searching.url)) == before + 11


@pytest.mark.parametrize(("budget", "runs"), [("device_hours: 2", 4), ("wall_hours: 1000", 36)])
def test_other_budgets(searching, budget, runs):
    text = GRID.replace("runs: 11", budget).replace("batch: 2", "batch: 4\n  sampler: random")
    assert searching.launch(text).snapshot.counts == {"done": runs}


SCREENED = GRID.replace("max_seq_len: [8, 16, 32]", "max_seq_len: [8, 16]\nmax_epochs: [2, 20]")


def test_short_runs_come_first_and_are_recorded_as_such(searching):
    text = SCREENED.replace("runs: 11", "runs: 3\n  screen: 8").replace("batch: 2", "batch: 4")
    assert searching.launch(text).snapshot.counts == {"done": 11}
    rows = query.rows(searching.url, "select max_epochs from runs order by id")
    assert [row["max_epochs"] for row in rows] == [2] * 8 + [20] * 3


def test_screening_needs_two_lengths_of_runs(searching):
    with pytest.raises(SearchError, match=r"two values of max_epochs.*this one has 20$"):
        searching.launch(GRID + "  screen: 4\n")


def test_history_reads_back_what_was_stored(searching):
    searching.launch(GRID)
    history = read_history(searching.url)
    (dataset,) = history.runs
    observations = history.observations(dataset)
    assert len(observations) == 11
    for o in observations:
        spec = o.spec
        assert o.value(MEMORY) == spec.batch_size * spec.max_seq_len * spec.num_negatives
    with pytest.raises(SearchError, match="no run on device 'abacus'"):
        history.on_device("abacus")


def test_settings_are_read_with_units():
    text = GRID + "  constraints: {peak_train_memory_bytes: 8GiB, ndcg_at_10: 0.1}\n  seed: 0\n"
    settings = parse_grid(text).search
    memory, ndcg = settings.constraints
    assert memory.at_most == 8 * 2**30
    assert (ndcg.at_least, ndcg.at_most) == (0.1, math.inf)
    assert (settings.seed, settings.batch, settings.runs) == (0, 2, 11)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("runs: 11", "", "toy.yaml:7: search needs a budget"),
        ("runs: 11", "runs: 0", r"toy.yaml:9: runs=0 must be a number above 0"),
        ("runs: 11", "runs: 1.5", r"toy.yaml:9: runs=1.5 must be a whole number, 1 or more"),
        ("batch: 2", "bach: 2", "toy.yaml:10: unknown key 'bach'; did you mean 'batch'"),
        ("batch: 2", "sampler: nsga", "sampler 'nsga' is unknown; did you mean 'nsga2'"),
        ("ndcg_at_10,", "ndcg,", "objective 'ndcg' is not a measure"),
        ("batch: 2", "constraints: {epoch_seconds: 5 parsecs}", "'5 parsecs' is no number"),
        (
            "batch: 2",
            "constraints: {epoch_seconds: {at_most: 5, at_least: 9}}",
            "contradict each other: at least 9 and at most 5",
        ),
    ],
)
def test_mistakes_in_the_block_are_answered_with_their_line(old, new, text):
    with pytest.raises(GridError, match=text):
        parse_grid(GRID.replace(old, new), "toy")
