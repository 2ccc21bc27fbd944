import dataclasses
import json

import numpy as np
import pytest

from bench.search import (
    OBJECTIVES,
    Replay,
    fraction,
    load_replays,
    measure_sampler,
    overview,
    read_rows,
    replay_order,
    replay_search,
    summary,
)
from db.errors import SearchError
from db.spec import RunSpec, RunStatus
from sweeper.memory_model import Shape, analytic_bytes
from sweeper.search.ask import Search, propose
from sweeper.search.settings import SAMPLERS
from sweeper.search.space import MEMORY, Constraint, Encoder, Objective, Observation, SearchSpace
from sweeper.search.surrogate import Scale

SHAPE = Shape(20_000, 50.0)


def answer(spec, shift=0.0):
    """Memory by the model; quality saturates in batch size and peaks at 256 negatives."""
    size = np.log2([spec.batch_size, spec.max_seq_len, spec.num_negatives])
    ndcg = 0.1 - 0.002 * (10 - size[0]) ** 2 + 0.004 * size[1] - 0.003 * (size[2] - 8 + shift) ** 2
    values = {"ndcg_at_10": float(ndcg), MEMORY: analytic_bytes(spec, SHAPE), "epoch_seconds": 9.0}
    return Observation(spec, RunStatus.DONE, values)


def grid(dataset="toy", loss="ce_minus"):
    return tuple(
        RunSpec(dataset=dataset, loss=loss, batch_size=b, max_seq_len=s, num_negatives=n,
                precision="fp32")
        for b in (32, 64, 128, 256, 512) for s in (16, 32, 64, 128) for n in (32, 128, 512)
    )  # fmt: skip


@pytest.fixture(scope="module")
def replay():
    return Replay("toy", {spec: answer(spec) for spec in grid()})


def order_of(replay, others, sampler, seed, **how):
    return replay_order(replay, replay_search(replay, others, sampler).with_seed(seed), **how)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "gp"])
@pytest.mark.parametrize("batch", [1, 7])
def test_every_sampler_asks_for_each_point_once_and_the_same_again(replay, sampler, batch):
    budget = 21
    orders = [order_of(replay, {}, sampler, 3, batch=batch, budget=budget) for _ in range(2)]
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == budget
    assert set(orders[0]) <= set(replay.points)


def test_optunas_gp_sampler_asks_for_new_points(replay):
    known = [replay.answers[spec] for spec in replay.points[::12]]
    found = propose(SearchSpace(replay.points), known, OBJECTIVES, sampler="gp", count=2)
    assert len(set(found)) == 2
    assert not set(found) & {o.spec for o in known}


def test_the_default_beats_random_with_a_sixth_of_the_runs(replay):
    shares = {
        sampler: np.mean([
            fraction(replay, order_of(replay, {}, sampler, s, batch=1, budget=10), 1 / 6)
            for s in range(3)
        ])
        for sampler in ("srsweep", "random")
    }  # fmt: skip
    assert shares["srsweep"] > 0.9
    assert shares["srsweep"] > shares["random"] + 0.03


def test_related_runs_make_the_first_question_a_good_one(replay):
    others = {
        name: [answer(spec, shift) for spec in grid(name)]
        for name, shift in (("a", 0.3), ("b", -0.3))
    }
    cold = order_of(replay, {}, "srsweep", 0, batch=1, budget=4)
    warm = order_of(replay, others, "srsweep", 0, batch=1, budget=4)
    assert fraction(replay, warm, 4 / 60) > fraction(replay, cold, 4 / 60)


def test_runs_of_another_width_are_not_taken_for_points(replay):
    """They are learned from as related runs; as observations they change nothing."""
    known = [replay.answers[spec] for spec in replay.points[::9]]
    wide = [
        dataclasses.replace(answer(spec, 3.0), spec=dataclasses.replace(spec, embedding_dim=512))
        for spec in replay.points
    ]
    search = Search(SearchSpace(replay.points), OBJECTIVES)
    assert search.propose([*wide, *known], 3) == search.propose(known, 3)
    encoder = Encoder.of(replay.points)
    warm = Search(SearchSpace(replay.points), OBJECTIVES, related={"toy": [*wide, *known]})
    assert len(warm.transfer(MEMORY, encoder).sources) == 1
    alone = Search(SearchSpace(replay.points), OBJECTIVES, related={"toy": known})
    assert alone.transfer(MEMORY, encoder) is None


def test_a_field_that_follows_another_one_adds_no_input():
    points = [
        dataclasses.replace(spec, learning_rate=1e-3 if spec.batch_size < 128 else 3e-3)
        for spec in grid()
    ]
    names = [name for name, _, _ in Encoder.of(points).ordered]
    assert names == ["batch_size", "max_seq_len", "num_negatives"]


def test_pending_runs_are_believed_and_not_asked_again(replay):
    known = [replay.answers[spec] for spec in replay.points[::7]]
    search = Search(SearchSpace(replay.points), OBJECTIVES)
    first = search.propose(known, 1)[0]
    waiting = Observation(first, RunStatus.PENDING)
    assert search.propose([*known, waiting], 1) == search.propose(known, 2)[1:]


def test_memory_that_did_not_fit_keeps_the_search_below_it(replay):
    """Runs above 1 GB do not fit; after a few failures hardly any is asked for."""
    limit = 1e9

    def outcome(spec):
        found = replay.answers[spec]
        if found.values[MEMORY] <= limit:
            return found
        return Observation(spec, RunStatus.OUT_OF_MEMORY, {}, memory_bound_bytes=limit)

    search = Search(SearchSpace(replay.points), OBJECTIVES)
    known = []
    while len(known) < 24:
        known += [outcome(spec) for spec in search.propose(known, 1)]
    statuses = [o.status for o in known]
    assert RunStatus.OUT_OF_MEMORY in statuses[:8]
    assert statuses[8:].count(RunStatus.OUT_OF_MEMORY) <= 4


def test_a_constraint_is_kept(replay):
    bound = float(np.quantile([o.values[MEMORY] for o in replay.answers.values()], 0.5))
    search = Search(SearchSpace(replay.points), OBJECTIVES, (Constraint(MEMORY, at_most=bound),))
    known = [replay.answers[spec] for spec in replay.points[::8]]
    for _ in range(8):
        known += [replay.answers[spec] for spec in search.propose(known, 1)]
    assert sum(o.values[MEMORY] > bound * 1.02 for o in known[-8:]) <= 1


def test_three_objectives(replay):
    objectives = (*OBJECTIVES, Objective("coverage_at_10"))
    known = [
        Observation(o.spec, o.status, {**o.values, "coverage_at_10": o.spec.max_seq_len / 200})
        for o in list(replay.answers.values())[::6]
    ]
    assert len(propose(SearchSpace(replay.points), known, objectives, count=3)) == 3


def test_a_diverged_run_counts_as_the_worst(replay):
    known = [replay.answers[spec] for spec in replay.points[::7]]
    bad = Observation(replay.points[-2], RunStatus.DIVERGED)
    assert propose(SearchSpace(replay.points), [*known, bad], OBJECTIVES)


def test_one_finished_run_is_enough_to_go_on_and_none_is_enough_to_begin(replay):
    space = SearchSpace(replay.points)
    assert len(propose(space, [], OBJECTIVES, count=8)) == 8
    assert len(propose(space, [replay.answers[replay.points[5]]], OBJECTIVES)) == 1


def test_a_used_up_space_has_nothing_left(replay):
    assert propose(SearchSpace(replay.points), list(replay.answers.values()), OBJECTIVES) == []


def test_full_losses_and_sampled_ones_share_a_space():
    points = (*grid()[:6], RunSpec(dataset="toy", loss="ce", batch_size=32, precision="fp32"))
    inputs = Encoder.of(points).encode(points)
    assert np.isfinite(inputs).all()
    assert inputs.min() >= 0
    assert inputs.max() <= 1
    assert len({tuple(row) for row in inputs}) == 7


def test_scales_are_inverted():
    for name, values in ((MEMORY, [1e9, 3e9, 9e9]), ("ndcg_at_10", [0.1, 0.12, 0.15])):
        scale = Scale.of(name, np.array(values))
        assert scale.backward(scale.forward(np.array(values))) == pytest.approx(values)


def test_constraints_on_metrics_point_the_right_way():
    scale = Scale.of("ndcg_at_10", np.array([0.1, 0.2, 0.3]))
    low, high = scale.window(Constraint("ndcg_at_10", at_least=0.2))
    assert low == -np.inf
    assert high == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Objective("batch_size"), "'batch_size' is a setting of a run"),
        (lambda: Objective("ndcg_at_11"), "'ndcg_at_11' is not a measure; did you mean 'ndcg_at_1"),
        (lambda: Constraint(MEMORY, at_most=0.0), "peak_train_memory_bytes <= 0 can hold"),
        (
            lambda: Search(
                SearchSpace(grid()), OBJECTIVES,
                (Constraint(MEMORY, at_most=5.0), Constraint(MEMORY, at_least=7.0)),
            ),
            "contradict each other: at least 7 and at most 5",
        ),
        (lambda: Search(SearchSpace(grid()[:1]), OBJECTIVES), "has one point only"),
        (lambda: SearchSpace(()), "the search space is empty"),
        (lambda: SearchSpace((grid()[0], grid("b")[0])), r"mixes datasets \(b, toy\)"),
        (lambda: Search(SearchSpace(grid()), ()), "at least one objective"),
        (lambda: Search(SearchSpace(grid()), OBJECTIVES * 2), "stands twice"),
        (lambda: Search(SearchSpace(grid()), OBJECTIVES, sampler="tpo"), "did you mean 'tpe'"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(call, text):
    with pytest.raises(SearchError, match=text):
        call()


def test_an_objective_that_was_never_measured_is_named(replay):
    known = [replay.answers[spec] for spec in replay.points[:3]]
    with pytest.raises(SearchError, match="'map_at_5' was measured in none of the 3 finished"):
        propose(SearchSpace(replay.points), known, (Objective("map_at_5"),))


def test_constraints_that_nothing_fits_are_refused_with_what_was_seen(replay):
    known = [replay.answers[spec] for spec in replay.points[::4]]
    tight = Constraint(MEMORY, at_most=1000.0)
    with pytest.raises(SearchError, match=r"peak_train_memory_bytes <= 1000 \(the 15 finished"):
        propose(SearchSpace(replay.points), known, OBJECTIVES, constraints=(tight,))


def test_a_bench_that_was_broken_off_goes_on(replay, tmp_path):
    """What was kept is not measured again, and a kept row is read back as it was."""
    first, second = [], []
    measure_sampler([replay], "random", [0, 1], 1, 0.2, first.extend)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in first))
    known = frozenset(
        (r["sampler"], r["dataset"], r["batch"], r["seed"], r["share"]) for r in read_rows(path)
    )
    measure_sampler([replay], "random", [1, 2], 1, 0.2, second.extend, known)
    assert read_rows(path) == first
    assert {row["seed"] for row in second} == {2}


def test_the_published_grids_replay(shared):
    """One seed on the two smallest grids; the full figures come from `python -m bench search`."""
    replays = [
        r for r in load_replays(shared / "paper" / "experiments.csv")
        if r.name in ("30music", "megamarket")
    ]  # fmt: skip
    assert [len(r.points) for r in replays] == [128, 113]
    rows = []
    for label in ("srsweep", "random"):
        measure_sampler(replays, label, [0], 1, 0.2, rows.extend)
    means = {
        line["sampler"]: line["mean"] for line in overview(summary(rows)) if line["share"] == 0.2
    }
    assert means["srsweep"] > 0.97
    assert means["srsweep"] > means["random"] + 0.03
