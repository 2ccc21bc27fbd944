import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.association import (
    associations,
    bca_interval,
    false_discovery_rates,
    point_weights,
    rank_correlations,
)
from db.errors import AnalysisError

values = st.lists(st.integers(0, 5), min_size=6, max_size=20)


@given(values, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_weighted_ranks_are_those_of_the_resample(found, random):
    x = np.array(found, float)
    y = np.array([random.randint(0, 4) for _ in found], float)
    weights = np.array([[random.randint(0, 3) for _ in found]], float)
    taken = np.repeat(np.arange(len(x)), weights[0].astype(int))
    result = rank_correlations(x, y, weights)[0]
    if len(taken) < 2 or np.ptp(x[taken]) == 0 or np.ptp(y[taken]) == 0:
        assert np.isnan(result)
    else:
        assert result == pytest.approx(stats.spearmanr(x[taken], y[taken]).statistic, abs=1e-9)


@given(values)
@settings(max_examples=30, deadline=None)
def test_spearman_does_not_change_under_a_monotone_map(found):
    x = np.array(found, float)
    y = np.sin(np.arange(len(x)))
    ones = np.ones((1, len(x)))
    np.testing.assert_allclose(
        rank_correlations(x, y, ones), rank_correlations(np.exp(x), y**3, ones), atol=1e-12
    )


def test_bca_interval_agrees_with_scipy():
    rng = np.random.default_rng(3)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)

    def statistic(a, b, axis=-1):
        ranks = [stats.rankdata(item, axis=axis) for item in (a, b)]
        centred = [item - item.mean(axis=axis, keepdims=True) for item in ranks]
        product = (centred[0] * centred[1]).sum(axis=axis)
        return product / np.sqrt(
            (centred[0] ** 2).sum(axis=axis) * (centred[1] ** 2).sum(axis=axis)
        )

    theirs = stats.bootstrap(
        (x, y), statistic, paired=True, vectorized=True, n_resamples=10_000, method="BCa", rng=1
    )
    weights = point_weights(np.arange(60), 10_000, 0)
    ours = rank_correlations(x, y, weights)
    left_out = rank_correlations(x, y, 1.0 - np.eye(60))
    point = rank_correlations(x, y, np.ones((1, 60)))[0]
    low, high = bca_interval(point, ours, left_out, 0.95)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.015)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.015)
    # given scipy's own resamples only the arithmetic is left to differ
    exact = bca_interval(point, theirs.bootstrap_distribution, left_out, 0.95)
    np.testing.assert_allclose(exact, theirs.confidence_interval, atol=1e-6)


def test_repeats_of_a_point_are_drawn_together():
    weights = point_weights(np.array([0, 0, 1, 2, 2]), 50, 0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


def test_false_discovery_rates_are_benjamini_hochbergs():
    assert false_discovery_rates([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03), None, pytest.approx(0.04), pytest.approx(0.04),
    ]  # fmt: skip


def test_known_directions_are_found(sweep_frame):
    found = associations(sweep_frame(), resamples=300)
    rows = {(row.metric, row.parameter): row for row in found.rows}
    strong = rows["ndcg_at_10", "batch_size"]
    assert strong.coefficient > 0.8
    assert strong.low > 0.5
    assert strong.q_value < 0.01


@pytest.mark.parametrize(("option", "count"), [("paper", 18), ("vocabulary", 24), ("drop", 18)])
def test_full_catalog_runs_enter_as_the_option_says(sweep_frame, option, count):
    found = associations(sweep_frame(), resamples=200, full_catalog=option)
    by_name = {row.parameter: row.n for row in found.rows if row.metric == "ndcg_at_10"}
    assert by_name["num_negatives"] == count
    assert by_name["batch_size"] == (18 if option == "drop" else 24)
    assert found.full_catalog == option


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ndcg_at_10": 0.1}, r"ndcg_at_10 is constant \(0.1 in all 24 runs\)"),
        ({"batch_size": 64}, r"batch_size never varies \(it is 64 in all 24 runs\)"),
        ({"ndcg_at_10": np.nan}, r"no run has both ndcg_at_10 and batch_size"),
    ],
)
def test_what_cannot_be_correlated_is_said(sweep_frame, change, sentence):
    frame = sweep_frame().assign(**change)
    found = associations(frame, metrics=["ndcg_at_10"], parameters=["batch_size"], resamples=200)
    assert found.rows[0].coefficient is None
    assert pd.Series(found.notes).str.contains(sentence).any()


def test_three_runs_are_too_few(sweep_frame):
    found = associations(sweep_frame().head(3), resamples=200)
    assert all(row.coefficient is None for row in found.rows)
    assert any("3 points are too few" in note for note in found.notes)


def test_an_unknown_parameter_is_named(sweep_frame):
    with pytest.raises(AnalysisError, match=r"parameter 'bs\*ns': no column 'bs'"):
        associations(sweep_frame(), parameters=["bs*ns"], resamples=200)
