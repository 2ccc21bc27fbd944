import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.pareto import (
    attainment,
    best_under_budget,
    hypervolume_by_seed,
    hypervolume_share,
    marginal_gains,
    memory_bounds,
    pareto_fronts,
)
from db.errors import AnalysisError

MEMORY, NDCG = "peak_train_memory_bytes", "ndcg_at_10"
points = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=25)


def frame_of(found) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run_key": [f"{number:064x}" for number in range(len(found))],
            "dataset": "demo",
            "loss": "ce_minus",
            "batch_size": 1,
            "max_seq_len": 1,
            "num_negatives": [float(number) for number in range(len(found))],
            "seed": 42,
            MEMORY: [2.0**30 * memory for memory, _ in found],
            NDCG: [0.01 * quality for _, quality in found],
        }
    )


@given(points)
@settings(max_examples=80, deadline=None)
def test_the_front_is_exactly_the_undominated_points(found):
    front = pareto_fronts(frame_of(found))[0].runs
    kept = {
        (round(m / 2**30), round(q / 0.01)) for m, q in zip(front[MEMORY], front[NDCG], strict=True)
    }
    undominated = {
        (m, q)
        for m, q in found
        if not any((a <= m and b >= q) and (a, b) != (m, q) for a, b in found)
    }
    assert kept == undominated
    assert len(front) == len(undominated)


@given(points, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_front_is_idempotent_and_free_of_order(found, random):
    frame = frame_of(found)
    front = pareto_fronts(frame)[0]
    again = pareto_fronts(front.runs)[0]
    pd.testing.assert_frame_equal(front.to_frame(), again.to_frame())
    order = list(range(len(found)))
    random.shuffle(order)
    shuffled = pareto_fronts(frame.iloc[order])[0]
    assert sorted(zip(front.runs[MEMORY], front.runs[NDCG], strict=True)) == sorted(
        zip(shuffled.runs[MEMORY], shuffled.runs[NDCG], strict=True)
    )
    assert front.hypervolume == pytest.approx(shuffled.hypervolume)


@given(points)
@settings(max_examples=40, deadline=None)
def test_hypervolume_is_the_area_counted_cell_by_cell(found):
    losses = np.array([(m, -q) for m, q in found], float)
    span = np.ptp(losses, axis=0)
    share = hypervolume_share(losses)
    assert 0 <= share <= 1
    if (span > 0).all():
        low, high = losses.min(axis=0), losses.max(axis=0)
        cells = [
            any(m <= x and q <= y for m, q in losses)
            for x in np.arange(low[0], high[0])
            for y in np.arange(low[1], high[1])
        ]
        assert share == pytest.approx(np.sum(cells) / np.prod(span))


def test_another_run_never_lowers_the_hypervolume_in_a_fixed_box():
    rng = np.random.default_rng(0)
    best = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    losses = np.concatenate([best, rng.random((20, 3))])
    volumes = [hypervolume_share(losses[:n], np.ones(3)) for n in range(3, 23)]
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1] < 1


def test_best_under_budget_and_marginal_gains():
    frame = frame_of([(1, 2), (2, 4), (4, 5), (8, 5)])
    best = best_under_budget(frame, {"demo": [2**30 * 3.0, 2**30 * 0.5, 2**30 * 8.0]})
    assert best[NDCG].tolist() == [0.04, 0.05]
    gains = marginal_gains(frame)
    assert gains["gain"].tolist() == pytest.approx([0.02, 0.01])
    assert gains["gain_per_unit"].tolist() == pytest.approx([0.02, 0.005])


def test_attainment_lies_between_best_and_worst_seed(sweep_frame):
    frame = sweep_frame(seeds=(1, 2, 3), noise=0.003)
    surfaces = attainment(frame, (MEMORY, NDCG))
    best = surfaces[surfaces["percentile"] == surfaces["percentile"].min()][NDCG].max()
    worst = surfaces[surfaces["percentile"] == surfaces["percentile"].max()][NDCG].max()
    tops = frame.groupby("seed")[NDCG].max()
    assert best == pytest.approx(tops.max())
    assert worst == pytest.approx(tops.min())
    assert len(hypervolume_by_seed(frame, (MEMORY, NDCG))) == 3
    assert attainment(sweep_frame(), (MEMORY, NDCG)).empty


def test_runs_out_of_memory_are_bounds(sweep_frame):
    lost = sweep_frame().head(2).assign(status="out_of_memory", memory_bound_bytes=[9e9, np.nan])
    bounds = memory_bounds(lost)
    assert [bound.memory_bound_bytes for bound in bounds] == [9e9, None]
    assert bounds[0].num_negatives == 8


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ((MEMORY,), "1 objectives"),
        ((MEMORY, MEMORY), "two or three different ones"),
        ((MEMORY, "ndcg"), "objective 'ndcg' is no measure"),
    ],
)
def test_bad_objectives_are_refused(sweep_frame, objectives, message):
    with pytest.raises(AnalysisError, match=message):
        pareto_fronts(sweep_frame(), objectives)
