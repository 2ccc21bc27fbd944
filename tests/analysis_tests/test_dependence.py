import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from analysis.dependence import dependences, standardised_coefficients


def test_coefficients_are_those_of_least_squares_on_standardised_columns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)) * [1, 50, 1e6] + [0, 9, 1e7]
    y = x[:, 0] - 0.01 * x[:, 1] + rng.normal(size=60)
    found, r2 = standardised_coefficients(x, y, np.ones((1, 60)))
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    model = LinearRegression().fit(scaled, (y - y.mean()) / y.std())
    assert found[0] == pytest.approx(model.coef_, abs=1e-9)
    assert r2[0] == pytest.approx(model.score(scaled, (y - y.mean()) / y.std()), abs=1e-9)


def test_integer_weights_are_repeated_rows():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 2)), rng.normal(size=30)
    weights = rng.integers(0, 4, size=(1, 30))
    rows = np.repeat(np.arange(30), weights[0])
    weighted, _ = standardised_coefficients(x, y, weights.astype(float))
    repeated, _ = standardised_coefficients(x[rows], y[rows], np.ones((1, len(rows))))
    assert weighted[0] == pytest.approx(repeated[0], abs=1e-9)


def test_a_known_law_is_found(sweep_frame):
    frame = sweep_frame(
        batch_sizes=(16, 32, 64, 128), lengths=(16, 32, 64), negatives=(8, 16, 32, 64),
        quality=lambda bs, sl, ns: 0.001 * bs,
    )  # fmt: skip
    found = dependences(
        frame, metrics=["ndcg_at_10"], parameters=["batch_size", "max_seq_len"], resamples=200
    )
    by_name = {row.parameter: row for row in found.rows}
    assert by_name["batch_size"].coefficient == pytest.approx(1, abs=0.02)
    assert by_name["batch_size"].low > 0.9
    assert by_name["max_seq_len"].low < 0 < by_name["max_seq_len"].high
    assert by_name["batch_size"].mutual_information > by_name["max_seq_len"].mutual_information
    assert by_name["batch_size"].r2_in_sample > 0.95


def test_what_is_missing_is_said(sweep_frame):
    assert dependences(sweep_frame().head(8), metrics=["ndcg_at_10"]).notes == (
        "demo: no mutual information and linear model of ndcg_at_10: 6 points are too few, "
        "10 are needed.",
    )
    constant = dependences(sweep_frame().assign(ndcg_at_10=0.1), metrics=["ndcg_at_10"])
    assert "it is constant (0.1)" in constant.notes[0]
    fixed = dependences(
        sweep_frame(batch_sizes=(64,), lengths=(8, 16, 32, 64)), metrics=["ndcg_at_10"]
    )
    assert "batch_size" not in {row.parameter for row in fixed.rows}
    assert len(fixed.rows) == 5
