import dataclasses
import itertools
import json
import math

import pytest

from bench.advise import BUDGETS, regret_rows, summary
from bench.search import load_replays
from db.errors import SearchError
from db.spec import RunSpec, RunStatus
from sweeper.advice import Budget, completed_grid
from sweeper.advise import advise
from sweeper.advise_new import advise_new
from sweeper.cli.advise import _dataset, parse_bytes, parse_seconds
from sweeper.cli.main import main
from sweeper.memory_model import Shape, analytic_bytes
from sweeper.search.history import History, KnownRun
from sweeper.search.space import MEMORY, Observation

SHAPES = {"a": Shape(20_000, 50.0), "b": Shape(40_000, 30.0), "c": Shape(10_000, 80.0)}


def known(dataset, *, keep=lambda spec: True, shift=0.0):
    runs = []
    for b in (32, 128, 512):
        for s in (16, 64):
            for n in (32, 256):
                spec = RunSpec(dataset=dataset, loss="ce_minus", batch_size=b, max_seq_len=s,
                               num_negatives=n, precision="fp32")  # fmt: skip
                values = {
                    "ndcg_at_10": 0.1 + 0.01 * math.log2(b * s) - shift * math.log2(n),
                    MEMORY: 1.2 * analytic_bytes(spec, SHAPES[dataset]),
                    "train_seconds": 10.0 * s + 10 * 1e4 / b,
                }
                if keep(spec):
                    found = Observation(spec, RunStatus.DONE, values)
                    runs.append(KnownRun(f"{dataset}{len(runs):063d}", found, "gpu", "resident"))
    return runs


@pytest.fixture
def history():
    return History({name: known(name) for name in SHAPES}, SHAPES)


def test_the_best_measured_run_within_the_budget_is_advised(history):
    memory = sorted(r.observation.values[MEMORY] for r in history.runs["a"])
    for budget in (memory[4], memory[8] * 1.01, 1e15):
        found = advise(history, "a", Budget(budget))
        fits = [r.observation for r in history.runs["a"] if r.observation.values[MEMORY] <= budget]
        best = max(o.values["ndcg_at_10"] for o in fits)
        assert found.best.quality.value == pytest.approx(best)
        assert found.best.measured
        assert found.best.memory.high <= budget
        assert found.best.rests_on[0].startswith("a")


def test_the_front_is_undominated_and_within_every_budget(history):
    found = advise(history, "a", Budget(1e15, seconds=1000.0))
    values = [(p.memory.value, p.quality.value) for p in found.points]
    assert values == sorted(values)
    assert all(a[1] < b[1] for a, b in itertools.pairwise(values))
    assert all(p.seconds.high <= 1000.0 for p in found.points)


def test_a_point_never_run_is_predicted_with_an_interval(history):
    missing = history.runs["a"][5].observation
    runs = {**history.runs, "a": [r for r in history.runs["a"] if r.observation is not missing]}
    found = advise(History(runs, SHAPES), "a", Budget(1e15))
    assert missing.spec in completed_grid([r.observation.spec for r in runs["a"]])
    for p in found.points:
        assert p.quality.low <= p.quality.value <= p.quality.high
        if p.spec == missing.spec:
            assert not p.measured
            assert p.doublings >= 1
    assert found.next_runs[0] == missing.spec


def test_when_everything_was_run_there_is_no_next_run(history):
    found = advise(history, "a", Budget(1e15))
    assert found.next_runs == ()
    assert any("every setting" in note for note in found.notes)


def test_a_run_that_did_not_fit_is_never_advised(history):
    best = advise(history, "a", Budget(1e15)).best.spec
    runs = [
        r if r.observation.spec != best else dataclasses.replace(
            r, observation=Observation(best, RunStatus.OUT_OF_MEMORY, {}, 5e9))
        for r in history.runs["a"]
    ]  # fmt: skip
    found = advise(History({**history.runs, "a": runs}, SHAPES), "a", Budget(1e15))
    assert best not in [p.spec for p in found.points]


def test_a_new_dataset_gets_relative_quality_and_its_own_memory(history):
    found = advise_new(history, Shape(15_000, 60.0), Budget(1e12))
    assert found.relative
    assert 0.9 < found.best.quality.value <= 1
    truth = 1.2 * analytic_bytes(found.best.spec, Shape(15_000, 60.0))
    assert found.best.memory.value == pytest.approx(truth, rel=0.1)
    assert not found.best.measured


def test_what_datasets_disagree_on_widens_the_interval_of_quality(history):
    apart = History({**history.runs, "c": known("c", shift=0.02)}, SHAPES)
    widths, fewest = [], []
    for runs in (history, apart):
        best = advise_new(runs, Shape(15_000, 60.0), Budget(1e12)).best
        widths.append(best.quality.high - best.quality.low)
        fewest.append(best.spec.num_negatives == 32)
    assert widths[0] < 0.02
    assert widths[1] > 0.1
    assert fewest[1]


def test_sizes_outside_the_known_ones_are_said_and_far_ones_refused(history):
    found = advise_new(history, Shape(80_000, 60.0), Budget(1e12))
    assert any("num_items=80000 lies outside" in note and "2.0" in note for note in found.notes)
    with pytest.raises(SearchError, match="by a factor of 250"):
        advise_new(history, Shape(10_000_000, 60.0), Budget(1e12))


def test_refusals(history):
    one = History({"a": history.runs["a"][:1]}, SHAPES)
    with pytest.raises(SearchError, match=r"1 finished runs on 'a'.*it takes 5"):
        advise(one, "a", Budget(1e12))
    with pytest.raises(SearchError, match=r"no setting on 'a' fits 0\.00 GiB: the smallest needs"):
        advise(history, "a", Budget(1000.0))
    with pytest.raises(SearchError, match="trains within 1 s"):
        advise(history, "a", Budget(1e15, seconds=1.0))
    with pytest.raises(SearchError, match="a memory budget of 0 fits nothing"):
        Budget(0.0)
    with pytest.raises(SearchError, match="the database has 1"):
        advise_new(History({"a": known("a")}, SHAPES),
                   Shape(15_000, 60.0), Budget(1e12))  # fmt: skip
    with pytest.raises(SearchError, match="cannot be predicted from other datasets"):
        advise_new(history, Shape(15_000, 60.0), Budget(1e12, seconds=5.0))


def test_quantities():
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("500 MB") == 5e8
    assert parse_seconds("1.5h") == 5400
    with pytest.raises(SearchError, match="'24 bananas' is not a memory"):
        parse_bytes("24 bananas")
    with pytest.raises(SearchError, match="'soon' is not a time"):
        parse_seconds("soon")


def test_the_dataset_is_named_or_the_only_one():
    assert _dataset(None, ["a"]) == "a"
    with pytest.raises(SearchError, match=r"several datasets \(a, b\)"):
        _dataset(None, ["b", "a"])
    with pytest.raises(SearchError, match="no runs on dataset 'beaty'; did you mean 'beauty'"):
        _dataset("beaty", ["beauty", "zvuk"])
    with pytest.raises(SearchError, match="the database holds no runs"):
        _dataset(None, [])


def test_the_command_answers_from_imported_runs(shared, tmp_path, capsys):
    from db.transfer_paper import import_paper

    url = f"sqlite:///{tmp_path / 'paper.db'}"
    import_paper(url, shared / "paper" / "experiments.csv")
    with pytest.raises(SystemExit):
        main(["advise", "--memory", "10GiB", "--dataset", "30music", "--db", url, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert all(row["peak_train_memory_bytes_high"] <= 10 * 2**30 for row in rows)
    assert max(row["ndcg_at_10"] for row in rows) > 0.07


def test_advice_for_an_unseen_published_dataset_beats_copying_the_most_similar_one(shared):
    rows = regret_rows(load_replays(shared / "paper" / "experiments.csv"))
    assert {row["budget_gb"] for row in rows} == set(BUDGETS)
    means = {line["choice"]: line["mean_regret"] for line in summary(rows)}
    assert means["srsweep advise"] < 0.5 * means["copy the most similar dataset"]
    assert means["srsweep advise"] < 0.25
