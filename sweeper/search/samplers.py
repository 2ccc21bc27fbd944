"""Samplers without a model of ours: the grid in file order, random order, and Optuna's."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from db.spec import RunSpec, RunStatus
from sweeper.search.space import IGNORED, Constraint, Encoder, Objective, Observation

if TYPE_CHECKING:
    import optuna

_WORST = 1e30
"""Stands for the objectives of a run without result, in Optuna's eyes."""


def grid_order(free: Sequence[int]) -> list[int]:
    """Free points in the order of the file."""
    return sorted(free)


def random_order(free: Sequence[int], num_points: int, seed: int) -> list[int]:
    """Free points in the order of one seeded permutation of all points."""
    allowed = set(free)
    return [int(i) for i in np.random.default_rng(seed).permutation(num_points) if i in allowed]


def optuna_points(
    name: str,
    points: Sequence[RunSpec],
    observations: Sequence[Observation],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    count: int,
    seed: int,
) -> list[int]:
    """Ask one of Optuna's samplers, whose study is rebuilt from the observations.

    Axes are integers that count the sorted values of each field; a suggestion that is no point of
    the space, or known already, becomes the nearest free point.

    Parameters
    ----------
    name : {"tpe", "nsga2", "gp"}
    points : sequence of RunSpec
        The space.
    observations : sequence of Observation
        Runs asked for so far, in order.
    objectives, constraints : sequence
        What is asked for; a constraint is told to Optuna as a violation.
    count : int
        Points wanted; at most the number of free ones.
    seed : int
        Seeds the sampler, together with the number of runs asked so far.

    Returns
    -------
    list of int
        Rows of `points`.
    """
    import optuna

    axes = _Axes(points)
    with _quiet():
        study = optuna.create_study(
            directions=["maximize" if o.maximise else "minimize" for o in objectives],
            sampler=_sampler(name, seed + 7919 * len(observations), bool(constraints)),
        )
        for observation in observations:
            _tell(study, name, axes, observation, objectives, constraints)
        inputs = Encoder.of(points).encode(points)
        known = {observation.spec for observation in observations}
        taken = {i for i, point in enumerate(points) if point in known}
        chosen: list[int] = []
        for _ in range(count):
            trial = study.ask(axes.distributions)
            wanted = axes.spec_row(trial.params, inputs, points)
            free = [i for i in range(len(points)) if i not in taken]
            distances = np.sum((inputs[free] - wanted) ** 2, axis=1)
            row = free[int(np.argmin(distances))]
            chosen.append(row)
            taken.add(row)
    return chosen


class _Axes:
    """The fields that vary, as integer distributions over their sorted values."""

    def __init__(self, points: Sequence[RunSpec]) -> None:
        import optuna

        self.values: dict[str, list[Any]] = {}
        for name in points[0].to_dict():
            values = set(getattr(point, name) for point in points)
            if len(values) > 1 and name not in IGNORED:
                self.values[name] = sorted(values, key=lambda v: (v is None, _order(v)))
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(0, len(values) - 1)
            if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            else optuna.distributions.CategoricalDistribution(range(len(values)))
            for name, values in self.values.items()
        }

    def params(self, spec: RunSpec) -> dict[str, int]:
        return {name: values.index(getattr(spec, name)) for name, values in self.values.items()}

    def spec_row(
        self, params: dict[str, int], inputs: np.ndarray, points: Sequence[RunSpec]
    ) -> np.ndarray:
        """Input vector of a suggestion, put together from points that share its values."""
        encoded = np.full(inputs.shape[1], 0.5)
        encoder = Encoder.of(points)
        fields = [name for name, _, _ in encoder.ordered] + [name for name, _ in encoder.choices]
        for column, name in enumerate(fields):
            value = self.values[name][params[name]]
            like = next(i for i, point in enumerate(points) if getattr(point, name) == value)
            encoded[column] = inputs[like, column]
        return encoded


def _order(value: Any) -> Any:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _sampler(name: str, seed: int, constrained: bool) -> "optuna.samplers.BaseSampler":
    from optuna import samplers

    constraints = _violations if constrained else None
    if name == "tpe":
        return samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, constraints_func=constraints
        )
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=16, constraints_func=constraints)
    return samplers.GPSampler(seed=seed, constraints_func=constraints)


def _violations(trial: "optuna.trial.FrozenTrial") -> Sequence[float]:
    found: Sequence[float] = trial.user_attrs.get("violations", (1.0,))
    return found


def _tell(
    study: "optuna.Study",
    name: str,
    axes: _Axes,
    observation: Observation,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
) -> None:
    """Add one run; NSGA-II needs its trials to pass through the sampler to know generations."""
    import optuna

    study.enqueue_trial(axes.params(observation.spec))
    trial = study.ask(axes.distributions)
    if observation.status in (RunStatus.PENDING, RunStatus.RUNNING):
        return
    values = [observation.value(o.name) for o in objectives]
    if observation.memory_bound_bytes is not None:
        trial.set_user_attr("violations", [1.0] * max(len(constraints), 1))
    else:
        trial.set_user_attr("violations", [_violation(c, observation) for c in constraints])
    if any(v is None for v in values):
        if name == "gp":
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        values = [-_WORST if o.maximise else _WORST for o in objectives]
    study.tell(trial, [float(v) for v in values if v is not None])


def _violation(constraint: Constraint, observation: Observation) -> float:
    value = observation.value(constraint.name)
    if value is None:
        return 1.0
    return max(value - constraint.at_most, constraint.at_least - value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
