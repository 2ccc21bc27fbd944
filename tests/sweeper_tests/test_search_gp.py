import numpy as np
import pytest
from scipy.stats import multivariate_normal, truncnorm

from sweeper.search import gp
from sweeper.search.acquisition import (
    expected_improvement,
    hypervolume,
    undominated,
    undominated_boxes,
)


def problem(rng, n=12, d=3):
    inputs = rng.random((n, d))
    features = np.column_stack([np.ones(n), inputs])
    return inputs, features, np.full(d + 1, 0.5), rng.normal(size=n)


def test_the_gradient_of_the_marginal_likelihood_is_exact():
    rng = np.random.default_rng(0)
    inputs, features, variances, observed = problem(rng)
    squares = (inputs.T[:, :, None] - inputs.T[:, None, :]) ** 2
    trend = (features * variances) @ features.T
    means, deviations = gp.default_priors(3)
    arguments = (squares, trend, observed, means, deviations)
    for shift in (-0.7, 0.0, 0.9):
        _, gradient = gp.negative_log_posterior(means + shift, *arguments)
        for i, step in enumerate(1e-5 * np.eye(5)):
            ends = [gp.negative_log_posterior(means + shift + s * step, *arguments)[0]
                    for s in (-1, 1)]  # fmt: skip
            assert gradient[i] == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-4, abs=1e-5)


def test_the_likelihood_is_that_of_the_joint_gaussian():
    inputs, features, variances, observed = problem(np.random.default_rng(1))
    means, deviations = gp.default_priors(3)
    squares = (inputs.T[:, :, None] - inputs.T[:, None, :]) ** 2
    trend = (features * variances) @ features.T
    value, _ = gp.negative_log_posterior(means, squares, trend, observed, means, deviations)
    h = gp.Hyperparameters(means[:3], means[3], means[4])
    covariance = gp._matern(inputs, inputs, h) + trend + np.exp(means[4]) * np.eye(12)
    exact = -multivariate_normal(np.zeros(12), covariance).logpdf(observed)
    assert value == pytest.approx(exact - 6 * np.log(2 * np.pi), abs=1e-4)


def test_the_posterior_is_the_conditional_gaussian():
    inputs, features, variances, observed = problem(np.random.default_rng(2))
    h = gp.Hyperparameters(np.zeros(3), 0.0, np.log(0.1))
    posterior = gp.fit(inputs[:9], features[:9], variances, observed[:9], hyperparameters=h)
    mean, variance = posterior.predict(inputs[9:], features[9:])
    whole = gp._matern(inputs, inputs, h) + (features * variances) @ features.T
    noisy = whole[:9, :9] + 0.1 * np.eye(9)
    assert mean == pytest.approx(whole[9:, :9] @ np.linalg.solve(noisy, observed[:9]), abs=1e-6)
    exact = whole[9:, 9:] - whole[9:, :9] @ np.linalg.solve(noisy, whole[:9, 9:])
    assert variance == pytest.approx(np.diag(exact), abs=1e-6)


def test_a_lower_bound_gives_the_moments_of_a_truncated_gaussian():
    """One point, known to lie above a bound: the exact answer is a truncated normal."""
    h = gp.Hyperparameters(np.zeros(1), np.log(1.0), np.log(1e-6))
    zero = np.zeros((1, 1))
    posterior = gp.fit(
        zero, np.zeros((1, 1)), np.ones(1), np.array([0.8]),
        hyperparameters=h, censored_below=np.array([True]),
    )  # fmt: skip
    mean, variance = posterior.predict(zero, np.zeros((1, 1)))
    exact = truncnorm(0.8, np.inf)
    assert mean[0] == pytest.approx(exact.mean(), abs=2e-3)
    assert variance[0] == pytest.approx(exact.var(), abs=2e-3)


def test_a_satisfied_bound_changes_little_and_a_violated_one_lifts_its_neighbours():
    x = np.linspace(0, 1, 5)[:, None]
    features, variances = np.ones((5, 1)), np.ones(1)
    h = gp.Hyperparameters(np.zeros(1), 0.0, np.log(1e-3))
    y = np.array([0.0, 0.5, 1.0, 1.5, 1.2])
    flags = np.array([False] * 4 + [True])
    plain = gp.fit(x[:4], features[:4], variances, y[:4], hyperparameters=h)
    bounded = gp.fit(x, features, variances, y, hyperparameters=h, censored_below=flags)
    assert bounded.predict(x, features)[0][4] == pytest.approx(
        plain.predict(x, features)[0][4], abs=0.1
    )
    y[4] = 3.0
    lifted = gp.fit(x, features, variances, y, hyperparameters=h, censored_below=flags)
    assert lifted.predict(x, features)[0][4] > 2.9


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_boxes_fill_what_the_front_leaves(dims):
    """Clipped at zero, their volume and that of the front make up the whole cube."""
    rng = np.random.default_rng(dims)
    front, reference = rng.random((9, dims)), np.ones(dims)
    lower, upper = undominated_boxes(front, reference)
    volume = np.prod(upper - np.maximum(lower, 0.0), axis=1).sum()
    assert volume + hypervolume(front, reference) == pytest.approx(1.0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_expected_improvement_is_the_mean_growth_of_the_hypervolume(dims):
    rng = np.random.default_rng(dims)
    front, reference = rng.random((6, dims)), np.full(dims, 1.05)
    mean, deviation = rng.random((3, dims)), rng.uniform(0.05, 0.3, (3, dims))
    exact = expected_improvement(mean, deviation, front, reference)
    before = hypervolume(front, reference)
    for candidate in range(3):
        samples = rng.normal(mean[candidate], deviation[candidate], (4000, dims))
        growth = [hypervolume(np.vstack([front, s]), reference) - before for s in samples]
        error = np.std(growth) / np.sqrt(len(growth))
        assert exact[candidate] == pytest.approx(np.mean(growth), abs=4 * error + 1e-6)


def test_undominated_keeps_the_first_of_equal_points():
    points = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [2.0, 3.0]])
    assert undominated(points).tolist() == [True, False, True, False]
