"""Exact Gaussian-process regression with a Bayesian linear trend, for the small tables of a search.

Covariance of the standardised observations: `s^2 M(x, x') + phi(x)^T diag(v) phi(x') + noise`,
M the Matern 5/2 kernel with one length scale per input and phi the trend features, whose weights
have prior variance v. Hyperparameters maximise the marginal likelihood times weak priors, by
L-BFGS with analytic gradients; right-censored observations enter by expectation propagation.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import log_ndtr

Array = NDArray[np.float64]

_JITTER: Final = 1e-8
_LENGTH_PRIOR: Final = (np.log(1.0), 0.8)
"""Mean and standard deviation of the log length scale, inputs spanning [0, 1]."""
_SIGNAL_PRIOR: Final = (np.log(0.5), 1.0)
"""Of the log signal variance, observations having variance 1."""
_NOISE_PRIOR: Final = (np.log(0.01), 1.5)
"""Of the log noise variance."""
_BOUND: Final = 4.0
"""Standard deviations of its prior that a hyperparameter may move."""


@dataclass(frozen=True)
class Hyperparameters:
    """Logarithms of length scales (d,), signal variance and noise variance."""

    log_lengths: Array
    log_signal: float
    log_noise: float


@dataclass(frozen=True)
class Posterior:
    """A Gaussian process given its observations.

    Attributes
    ----------
    inputs : ndarray, shape (n, d)
    features : ndarray, shape (n, p)
        Trend features at the inputs.
    feature_variances : ndarray, shape (p,)
    hyperparameters : Hyperparameters
    cholesky_factor : ndarray, shape (n, n)
        Lower factor of the covariance of the observations.
    weights : ndarray, shape (n,)
        Inverse covariance times the observations.
    """

    inputs: Array
    features: Array
    feature_variances: Array
    hyperparameters: Hyperparameters
    cholesky_factor: Array
    weights: Array

    def predict(self, inputs: Array, features: Array) -> tuple[Array, Array]:
        """Mean and variance of the noise-free function, each of shape (m,)."""
        cross = self._covariance(inputs, features)
        mean = cross @ self.weights
        half = solve_triangular(self.cholesky_factor, cross.T, lower=True, check_finite=False)
        prior = np.exp(self.hyperparameters.log_signal) + features**2 @ self.feature_variances
        return mean, np.maximum(prior - np.sum(half**2, axis=0), 1e-12)

    @property
    def noise_variance(self) -> float:
        """Variance of an observation around the function."""
        return float(np.exp(self.hyperparameters.log_noise))

    def _covariance(self, inputs: Array, features: Array) -> Array:
        matern = _matern(inputs, self.inputs, self.hyperparameters)
        return matern + (features * self.feature_variances) @ self.features.T


def fit(
    inputs: Array,
    features: Array,
    feature_variances: Array,
    observed: Array,
    *,
    hyperparameters: Hyperparameters | None = None,
    priors: tuple[Array, Array] | None = None,
    censored_below: NDArray[np.bool_] | None = None,
) -> Posterior:
    """Condition a Gaussian process on observations.

    Parameters
    ----------
    inputs : ndarray, shape (n, d)
        Each column within [0, 1].
    features : ndarray, shape (n, p)
        Trend features.
    feature_variances : ndarray, shape (p,)
        Prior variance of each trend weight.
    observed : ndarray, shape (n,)
        Standardised observations.
    hyperparameters : Hyperparameters, optional
        Taken as they are; fitted when left out.
    priors : tuple of ndarray, optional
        Means and deviations of the log hyperparameters, in place of `default_priors`.
    censored_below : ndarray of bool, shape (n,), optional
        True where the observation is a lower bound of the true value.

    Returns
    -------
    Posterior

    References
    ----------
    Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), algorithms 2.1, 5.1
    and, for the moments of a bound, section 3.6.
    """
    trend = (features * feature_variances) @ features.T
    bounds = np.zeros(len(observed), bool) if censored_below is None else censored_below
    exact = ~bounds
    if hyperparameters is None:
        hyperparameters = _maximise(
            inputs[exact], trend[np.ix_(exact, exact)], observed[exact], priors
        )
    prior = _matern(inputs, inputs, hyperparameters) + trend
    noise = np.full(len(observed), np.exp(hyperparameters.log_noise) + _JITTER)
    targets = observed
    if bounds.any():
        targets, noise = _bound_sites(prior, observed, bounds, noise)
    factor = cholesky(prior + np.diag(noise), lower=True, check_finite=False)
    weights = cho_solve((factor, True), targets, check_finite=False)
    return Posterior(inputs, features, feature_variances, hyperparameters, factor, weights)


def negative_log_posterior(
    parameters: Array,
    squares: Array,
    trend: Array,
    observed: Array,
    means: Array,
    deviations: Array,
) -> tuple[float, Array]:
    """Negative log marginal likelihood minus the log priors, and its gradient.

    Parameters
    ----------
    parameters : ndarray, shape (d + 2,)
        Log length scales, log signal variance, log noise variance.
    squares : ndarray, shape (d, n, n)
        Squared differences of the inputs, one matrix per input.
    trend : ndarray, shape (n, n)
        Covariance of the trend.
    observed : ndarray, shape (n,)
    means, deviations : ndarray, shape (d + 2,)
        Of the priors of the parameters.
    """
    dims = len(squares)
    inverse_squares = np.exp(-2 * parameters[:dims])
    signal, noise = np.exp(parameters[dims]), np.exp(parameters[dims + 1])
    distance = np.sqrt(5 * np.tensordot(inverse_squares, squares, axes=1))
    decay = np.exp(-distance)
    matern = signal * (1 + distance + distance**2 / 3) * decay
    covariance = matern + trend
    covariance[np.diag_indices_from(covariance)] += noise + _JITTER
    factor = cholesky(covariance, lower=True, check_finite=False)
    inverse = cho_solve((factor, True), np.eye(len(observed)), check_finite=False)
    weights = inverse @ observed
    value = 0.5 * observed @ weights + np.sum(np.log(np.diag(factor)))
    inner = 0.5 * (inverse - np.outer(weights, weights))
    # d matern / d log l = signal * 5/3 * r_j^2 / l_j^2 * (1 + distance) * exp(-distance)
    slope = inner * (signal * 5 / 3 * (1 + distance) * decay)
    gradient = np.empty_like(parameters)
    gradient[:dims] = np.tensordot(squares, slope, axes=2) * inverse_squares
    gradient[dims] = np.sum(inner * matern)
    gradient[dims + 1] = noise * np.trace(inner)
    standardised = (parameters - means) / deviations
    return value + 0.5 * standardised @ standardised, gradient + standardised / deviations


def default_priors(dims: int) -> tuple[Array, Array]:
    """Means and standard deviations of the log hyperparameters, each of shape (d + 2,)."""
    pairs = [_LENGTH_PRIOR] * dims + [_SIGNAL_PRIOR, _NOISE_PRIOR]
    table = np.array(pairs)
    return table[:, 0], table[:, 1]


def _maximise(
    inputs: Array, trend: Array, observed: Array, priors: tuple[Array, Array] | None
) -> Hyperparameters:
    dims = inputs.shape[1]
    means, deviations = default_priors(dims) if priors is None else priors
    best = means
    if len(observed) > 1:
        squares = (inputs.T[:, :, None] - inputs.T[:, None, :]) ** 2
        bounds = list(zip(means - _BOUND * deviations, means + _BOUND * deviations, strict=True))
        noisy = means.copy()
        noisy[dims:] += [-1.0, 3.0]
        found = [
            minimize(
                negative_log_posterior, start, (squares, trend, observed, means, deviations),
                "L-BFGS-B", jac=True,
                bounds=bounds, options={"maxiter": 30, "ftol": 1e-4, "gtol": 1e-2},
            )
            for start in (means, noisy)
        ]  # fmt: skip
        best = min(found, key=lambda result: result.fun).x
    return Hyperparameters(best[:dims], float(best[dims]), float(best[dims + 1]))


def _matern(left: Array, right: Array, hyperparameters: Hyperparameters) -> Array:
    scale = np.exp(-hyperparameters.log_lengths)
    difference = (left * scale)[:, None, :] - (right * scale)[None, :, :]
    distance = np.sqrt(5 * np.sum(difference**2, axis=-1))
    value: Array = np.exp(hyperparameters.log_signal - distance) * (1 + distance + distance**2 / 3)
    return value


def _bound_sites(
    prior: Array, observed: Array, bounds: NDArray[np.bool_], noise: Array
) -> tuple[Array, Array]:
    """Gaussian sites that stand for lower bounds, by expectation propagation (parallel, damped)."""
    precision = np.where(bounds, 1e-6, 1 / noise)
    shift = np.where(bounds, 0.0, observed / noise)
    for _ in range(50):
        inverse = np.linalg.solve(np.eye(len(prior)) + prior * precision, prior)
        variance, mean = np.diag(inverse), inverse @ shift
        cavity_precision = np.maximum(1 / variance[bounds] - precision[bounds], 1e-10)
        cavity = 1 / cavity_precision
        cavity_mean = cavity * (mean[bounds] / variance[bounds] - shift[bounds])
        total = np.sqrt(cavity + noise[bounds])
        z = (cavity_mean - observed[bounds]) / total
        ratio = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - log_ndtr(z))
        tilted_mean = cavity_mean + cavity * ratio / total
        tilted = cavity - cavity**2 * ratio * (z + ratio) / total**2
        new_precision = np.maximum(1 / np.maximum(tilted, 1e-10) - cavity_precision, 1e-6)
        new_shift = tilted_mean * (new_precision + cavity_precision) - cavity_mean / cavity
        change = np.max(np.abs(new_precision - precision[bounds]) / (1 + new_precision))
        precision[bounds] += 0.7 * (new_precision - precision[bounds])
        shift[bounds] += 0.7 * (new_shift - shift[bounds])
        if change < 1e-4:
            break
    return shift / precision, 1 / precision
