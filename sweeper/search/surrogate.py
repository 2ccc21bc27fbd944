"""One Gaussian process per measure over the points of a search, warm-started from other datasets.

Measures become numbers to minimise: bytes and seconds by their logarithm, metrics to maximise with
the sign turned; then standardised by what was observed, and the worst tail of a metric is clipped,
because a run that learned nothing says little about where the front lies.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from db.measures import MEASURES
from db.spec import RunSpec, RunStatus
from sweeper.memory_model import Shape, analytic_bytes
from sweeper.search import gp
from sweeper.search.space import MEMORY, Constraint, Encoder, Observation, fixed_values

Array = NDArray[np.float64]

MIN_SOURCE_RUNS: Final = 8
"""Finished runs that a related dataset needs before it is learned from."""
_MAX_SOURCES: Final = 8
"""Related sources that are learned from, those with most runs."""
_CLIP: Final = 3.0
"""Worst value kept of a metric, in distances from the median to the best quartile."""
_SLOPE_VARIANCE: Final = (1.0, 0.25)
"""Prior variance of each linear trend weight: alone, and beside related datasets."""
_CURVATURE_VARIANCE: Final = 0.5
"""Prior variance of each quadratic trend weight; beside related datasets there is none."""
_TRANSFER_VARIANCE: Final = 0.5
"""Prior variance of the weights of the related datasets, shared among them."""
_ANALYTIC_WIDTH: Final = 3.0
"""Weight of the analytic memory beside the other trend features."""
_MIN_LOG_DEVIATION: Final = 0.3
"""Least prior deviation of a hyperparameter that was learned from related datasets."""


@dataclass(frozen=True)
class Scale:
    """How a measure becomes a standardised number to minimise, and back."""

    log: bool
    sign: float
    center: float = 0.0
    spread: float = 1.0
    ceiling: float = np.inf
    """Standardised values above are clipped."""

    @classmethod
    def of(cls, name: str, values: Array) -> "Scale":
        """Scale of a measure, standardised by observed values of shape (n,)."""
        measure = MEASURES[name]
        plain = cls(log=measure.unit != "", sign=-1.0 if measure.maximise else 1.0)
        turned = plain.forward(values)
        least = 1e-3 if plain.log else max(1e-3 * float(np.abs(turned).max()), 1e-12)
        spread = max(float(np.std(turned)), least)
        scale = dataclasses.replace(plain, center=float(np.mean(turned)), spread=spread)
        if plain.log:
            return scale
        best, middle = np.quantile(scale.forward(values), [0.25, 0.5])
        return dataclasses.replace(scale, ceiling=float(middle + _CLIP * max(middle - best, 0.2)))

    def forward(self, values: Array) -> Array:
        """Measured values to standardised ones."""
        turned = self.sign * (np.log(np.maximum(values, 1e-300)) if self.log else values)
        return np.minimum((turned - self.center) / self.spread, self.ceiling)

    def backward(self, standardised: Array) -> Array:
        """Standardised values to the measure's SI unit."""
        turned = self.sign * (standardised * self.spread + self.center)
        return np.exp(turned) if self.log else turned

    def window(self, constraint: Constraint) -> tuple[float, float]:
        """Standardised interval that a constraint allows."""
        open_ended = dataclasses.replace(self, ceiling=np.inf)

        def edge(bound: float) -> float | None:
            if not np.isfinite(bound) or (self.log and bound <= 0):
                return None
            return float(open_ended.forward(np.array([bound]))[0])

        low, high = edge(constraint.at_least), edge(constraint.at_most)
        if self.sign < 0:
            low, high = high, low
        return -np.inf if low is None else low, np.inf if high is None else high


@dataclass(frozen=True)
class Table:
    """Points as a surrogate sees them.

    Attributes
    ----------
    inputs : ndarray, shape (n, d)
    features : ndarray, shape (n, p)
        Trend features.
    variances : ndarray, shape (p,)
        Prior variances of their weights.
    offsets : ndarray, shape (n,)
        Prior mean, standardised.
    """

    inputs: Array
    features: Array
    variances: Array
    offsets: Array

    def fit(
        self,
        rows: NDArray[np.intp],
        targets: Array,
        bounds: NDArray[np.bool_],
        *,
        hyperparameters: gp.Hyperparameters | None = None,
        priors: tuple[Array, Array] | None = None,
    ) -> gp.Posterior:
        """Condition on standardised targets at some rows."""
        return gp.fit(
            self.inputs[rows], self.features[rows], self.variances, targets - self.offsets[rows],
            hyperparameters=hyperparameters, priors=priors, censored_below=bounds,
        )  # fmt: skip


@dataclass(frozen=True)
class Surrogate:
    """Prediction of one measure at the points of a table."""

    scale: Scale
    table: Table
    rows: NDArray[np.intp]
    """Points that were observed."""
    targets: Array
    """Standardised observations at `rows`."""
    bounds: NDArray[np.bool_]
    """Whether the observation is a lower bound."""
    posterior: gp.Posterior

    def predict(self, table: Table | None = None) -> tuple[Array, Array]:
        """Standardised mean and standard deviation of a new run at every point, each (n,)."""
        where = self.table if table is None else table
        mean, variance = self.posterior.predict(where.inputs, where.features)
        return mean + where.offsets, np.sqrt(variance + self.posterior.noise_variance)

    def believe(self, rows: Sequence[int]) -> "Surrogate":
        """Take the predicted mean for the outcome of runs still under way (kriging believer)."""
        new = np.setdiff1d(np.asarray(rows, np.intp), self.rows)
        if not len(new):
            return self
        mean, _ = self.predict()
        all_rows = np.concatenate([self.rows, new])
        targets = np.concatenate([self.targets, mean[new]])
        bounds = np.concatenate([self.bounds, np.zeros(len(new), bool)])
        posterior = self.table.fit(
            all_rows, targets, bounds, hyperparameters=self.posterior.hyperparameters
        )
        return Surrogate(self.scale, self.table, all_rows, targets, bounds, posterior)

    def probability(self, constraint: Constraint) -> Array:
        """Probability that a new run at each point keeps a constraint, shape (n,)."""
        low, high = self.scale.window(constraint)
        mean, deviation = self.predict()
        within: Array = norm.cdf((high - mean) / deviation) - norm.cdf((low - mean) / deviation)
        return within


@dataclass(frozen=True)
class Transfer:
    """What the runs of other datasets say about one measure at any point of a search.

    Attributes
    ----------
    sources : tuple of (Surrogate, Trend)
        Surrogate of each related dataset, and what its table is made with.
    """

    sources: tuple[tuple[Surrogate, "Trend"], ...]

    def features(self, specs: Sequence[RunSpec], inputs: Array) -> Array:
        """Standardised predictions of every source, shape (n, number of sources)."""
        columns = [
            surrogate.predict(trend.table(specs, inputs))[0] for surrogate, trend in self.sources
        ]
        return np.column_stack(columns)

    def priors(self) -> tuple[Array, Array]:
        """Mean and deviation of the hyperparameters over the sources."""
        found = [surrogate.posterior.hyperparameters for surrogate, _ in self.sources]
        table = np.array([np.append(h.log_lengths, [h.log_signal, h.log_noise]) for h in found])
        return table.mean(axis=0), np.maximum(table.std(axis=0), _MIN_LOG_DEVIATION)


@dataclass(frozen=True)
class Trend:
    """Makes the trend features of one measure.

    Attributes
    ----------
    shape : Shape or None
        Sizes of the dataset, for the analytic memory; without it the trend is linear only.
    center, width : float
        Standardise the logarithm of the analytic memory over the space.
    transfer : Transfer or None
        Related datasets.
    """

    shape: Shape | None
    center: float = 0.0
    width: float = 1.0
    transfer: Transfer | None = None

    @classmethod
    def of(
        cls, name: str, specs: Sequence[RunSpec], shape: Shape | None, transfer: Transfer | None
    ) -> "Trend":
        """Trend of a measure whose analytic part is standardised over `specs`."""
        if name != MEMORY or shape is None:
            return cls(None, transfer=transfer)
        logs = _log_analytic(tuple(specs), shape)
        return cls(shape, float(logs.mean()), max(float(logs.std()), 1e-9), transfer)

    def table(self, specs: Sequence[RunSpec], inputs: Array) -> Table:
        """Points with their features."""
        columns = [np.ones(len(inputs)), *(inputs.T - 0.5)]
        if self.shape is not None:
            logs = _log_analytic(tuple(specs), self.shape)
            columns.append(_ANALYTIC_WIDTH * (logs - self.center) / self.width)
        variances = np.full(len(columns), _SLOPE_VARIANCE[self.transfer is not None])
        offsets = np.zeros(len(inputs))
        if self.transfer is None:
            # quality rises and falls with a size: a bend costs less than a short length scale
            columns += list((4 * (inputs - 0.5) ** 2 - 1 / 3).T)
            variances = np.append(variances, np.full(inputs.shape[1], _CURVATURE_VARIANCE))
        else:
            learned = self.transfer.features(specs, inputs)
            count = learned.shape[1]
            columns += list(learned.T)
            variances = np.append(variances, np.full(count, _TRANSFER_VARIANCE / count))
            offsets = learned.mean(axis=1)
        return Table(inputs, np.column_stack(columns), variances, offsets)


@functools.lru_cache(maxsize=32)
def _log_analytic(specs: tuple[RunSpec, ...], shape: Shape) -> Array:
    return np.log([analytic_bytes(spec, shape) for spec in specs])


def learn(
    name: str,
    encoder: Encoder,
    space: Sequence[RunSpec],
    related: Mapping[str, Sequence[Observation]],
    shapes: Mapping[str, Shape],
) -> Transfer | None:
    """Learn a measure from related finished runs; None where there are too few.

    Each dataset is a source, or several, where its runs differ in what the space does not vary.

    Parameters
    ----------
    name : str
        Measure.
    encoder : Encoder
        Of the space that is searched.
    space : sequence of RunSpec
        Its points.
    related : mapping of str to sequence of Observation
        Runs by dataset.
    shapes : mapping of str to Shape
        Sizes of those datasets, where known.
    """
    fixed = fixed_values(space)
    groups: dict[tuple[object, ...], list[Observation]] = {}
    for dataset in sorted(related):
        for observation in related[dataset]:
            if observation.value(name) is not None:
                groups.setdefault((dataset, *fixed(observation.spec)), []).append(observation)
    enough = [known for known in groups.values() if len(known) >= MIN_SOURCE_RUNS]
    sources = []
    for known in sorted(enough, key=len, reverse=True)[:_MAX_SOURCES]:
        trend = Trend.of(name, space, shapes.get(known[0].spec.dataset), None)
        specs = [observation.spec for observation in known]
        surrogate = fit_surrogate(name, trend.table(specs, encoder.encode(specs)), known)
        sources.append((surrogate, trend))
    return Transfer(tuple(sources)) if sources else None


def fit_surrogate(
    name: str,
    table: Table,
    observations: Sequence[Observation | None],
    transfer: Transfer | None = None,
) -> Surrogate:
    """Fit one measure to what was observed.

    Parameters
    ----------
    name : str
        Measure.
    table : Table
        All points.
    observations : sequence of Observation or None
        One per point of the table; None where nothing is known. At least one has the measure.
    transfer : Transfer, optional
        Related datasets, whose hyperparameters become the prior.
    """
    values = [None if o is None else o.value(name) for o in observations]
    known = np.array([v for v in values if v is not None], float)
    scale = Scale.of(name, known)
    rows, targets, bounds = [], [], []
    worst = float(scale.forward(known).max())
    for row, (observation, value) in enumerate(zip(observations, values, strict=True)):
        if observation is None:
            continue
        if value is not None:
            target, bound = float(scale.forward(np.array([value]))[0]), False
        elif observation.memory_bound_bytes is not None and name == MEMORY:
            limit = np.array([observation.memory_bound_bytes])
            target, bound = float(scale.forward(limit)[0]), True
        elif observation.status is RunStatus.DIVERGED and not scale.log:
            target, bound = worst, False
        else:
            continue
        rows.append(row)
        targets.append(target)
        bounds.append(bound)
    where, aims, limits = np.array(rows, np.intp), np.array(targets), np.array(bounds, bool)
    priors = transfer.priors() if transfer is not None else None
    posterior = table.fit(where, aims, limits, priors=priors)
    return Surrogate(scale, table, where, aims, limits, posterior)
