"""Ask for the next runs: a pure function of the space, what was answered, and a seed.

Nothing is kept between calls, so a search that was killed goes on from the run database alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from db.errors import SearchError
from db.spec import RunSpec, RunStatus, suggestion
from sweeper.memory_model import Shape
from sweeper.search.acquisition import expected_improvement, hypervolume
from sweeper.search.samplers import grid_order, optuna_points, random_order
from sweeper.search.settings import SAMPLERS, Sampler
from sweeper.search.space import (
    MEMORY,
    Constraint,
    Encoder,
    Objective,
    Observation,
    SearchSpace,
    combine,
)
from sweeper.search.surrogate import Surrogate, Transfer, Trend, fit_surrogate, learn

Array = NDArray[np.float64]

REFERENCE: Final = 1.05
"""Reference point of the hypervolume, objectives spanning [0, 1] over the space."""
_HOPELESS: Final = 0.02
"""Probability of keeping all constraints below which no point is worth a run."""
_MIN_EVIDENCE: Final = 4
"""Finished runs before a search may say that nothing fits."""


@dataclass(frozen=True)
class Search:
    """What is searched and what for.

    Attributes
    ----------
    space : SearchSpace
        Points that may be asked for.
    objectives : tuple of Objective
        One or more measures.
    constraints : tuple of Constraint
        Bounds that the runs of interest keep.
    sampler : str
        `srsweep` (Gaussian processes with expected hypervolume improvement), `grid` (file order),
        `random`, or Optuna's `tpe`, `nsga2`, `gp`.
    seed : int
        Decides ties and random choices.
    related : mapping of str to sequence of Observation
        Runs to learn from (`srsweep` only), by dataset: those on other datasets, and those on
        this one that differ in what the space does not vary, such as the number of epochs.
    shapes : mapping of str to Shape
        Sizes of the datasets, where known.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    sampler: Sampler = "srsweep"
    seed: int = 42
    related: Mapping[str, Sequence[Observation]] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    _transfers: dict[str, Transfer | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.objectives:
            raise SearchError("a search needs at least one objective, such as ndcg_at_10")
        names = [objective.name for objective in self.objectives]
        if len(set(names)) < len(names):
            raise SearchError(f"objective {max(names, key=names.count)!r} stands twice; keep one")
        if len(names) > 4:
            raise SearchError(f"{len(names)} objectives are too many; name at most 4")
        if self.sampler not in SAMPLERS:
            raise SearchError(
                f"sampler {self.sampler!r} is unknown{suggestion(self.sampler, SAMPLERS)}"
            )
        if len(self.space.points) == 1:
            raise SearchError(
                "the search space has one point only: there is nothing to choose; add values, or "
                "launch it without 'search'"
            )
        object.__setattr__(self, "constraints", combine(self.constraints))

    def propose(self, observations: Sequence[Observation], count: int = 1) -> list[RunSpec]:
        """Choose the next runs.

        Parameters
        ----------
        observations : sequence of Observation
            Every run on the space's dataset that was asked for, finished or not, in the order of
            asking.
        count : int
            Most points to return.

        Returns
        -------
        list of RunSpec
            Distinct points never asked for; fewer than `count`, or none, when the space is used up.

        Raises
        ------
        SearchError
            An objective that no finished run has, or constraints that no point seems to keep.
        """
        return _Question(self, observations).answer(count)

    def with_seed(self, seed: int) -> Self:
        """The same search with other random choices; what was learned is shared."""
        other = dataclasses.replace(self, seed=seed)
        object.__setattr__(other, "_transfers", self._transfers)
        return other

    def transfer(self, name: str, encoder: Encoder) -> Transfer | None:
        """What related runs say about a measure, learned once per search."""
        if name not in self._transfers:
            others = {
                dataset: [o for o in runs if not self.space.comparable(o.spec)]
                for dataset, runs in self.related.items()
            }
            self._transfers[name] = learn(name, encoder, self.space.points, others, self.shapes)
        return self._transfers[name]


def propose(
    space: SearchSpace,
    observations: Sequence[Observation],
    objectives: Sequence[Objective],
    *,
    constraints: Sequence[Constraint] = (),
    sampler: Sampler = "srsweep",
    count: int = 1,
    seed: int = 42,
    related: Mapping[str, Sequence[Observation]] | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> list[RunSpec]:
    """Choose the next runs of a search (see `Search` and `Search.propose`)."""
    search = Search(
        space, tuple(objectives), tuple(constraints), sampler, seed, related or {}, shapes or {}
    )
    return search.propose(observations, count)


class _Question:
    """One call: all points in a row (those of the space first), and what is known of each."""

    def __init__(self, search: Search, observations: Sequence[Observation]) -> None:
        self._search = search
        self._by_spec = {o.spec: o for o in observations}
        candidates = search.space.points
        inside = set(candidates)
        own = [o.spec for o in self._by_spec.values() if o.spec not in inside]
        self._specs = (*candidates, *(s for s in own if search.space.comparable(s)))
        self._num_candidates = len(candidates)
        self._known = [self._by_spec.get(spec) for spec in self._specs]
        self._free = [i for i in range(self._num_candidates) if self._known[i] is None]
        self._asked = self._num_candidates - len(self._free)
        self._rng = np.random.default_rng([search.seed, self._asked])

    def answer(self, count: int) -> list[RunSpec]:
        """Points to run next."""
        search, count = self._search, min(count, len(self._free))
        if count <= 0:
            return []
        self._check_measured()
        if search.sampler == "grid":
            rows = grid_order(self._free)[:count]
        elif search.sampler == "random":
            rows = random_order(self._free, self._num_candidates, search.seed)[:count]
        elif search.sampler == "srsweep":
            rows = self._model_rows(count)
        else:
            rows = optuna_points(
                search.sampler, self._specs[: self._num_candidates],
                [o for o in self._by_spec.values() if o.spec in set(search.space.points)],
                search.objectives, search.constraints, count, search.seed,
            )  # fmt: skip
        return [self._specs[row] for row in rows]

    def _check_measured(self) -> None:
        done = [o for o in self._known if o is not None and o.status is RunStatus.DONE]
        names = [o.name for o in self._search.objectives]
        names += [constraint.name for constraint in self._search.constraints]
        for name in names:
            if len(done) >= 1 and all(o.value(name) is None for o in done):
                raise SearchError(
                    f"{name!r} was measured in none of the {len(done)} finished runs on "
                    f"{self._search.space.dataset!r}; choose a measure that they have"
                )

    def _model_rows(self, count: int) -> list[int]:
        encoder = Encoder.of(self._search.space.points)
        inputs = encoder.encode(self._specs)
        names = self._modelled()
        transfers = {name: self._search.transfer(name, encoder) for name in names}
        done = sum(o is not None and o.status is RunStatus.DONE for o in self._known)
        warm = all(transfers[o.name] is not None for o in self._search.objectives)
        first = self._initial(inputs, transfers, count, done, warm)
        if first or done == 0:
            return first
        surrogates = {name: self._surrogate(name, inputs, transfers[name]) for name in names}
        return self._improving_rows(surrogates, count)

    def _modelled(self) -> list[str]:
        names = [o.name for o in self._search.objectives]
        names += [c.name for c in self._limits()]
        return list(dict.fromkeys(names))

    def _limits(self) -> tuple[Constraint, ...]:
        """The constraints asked for, and the device's memory as soon as a run did not fit."""
        bounds = [
            o.memory_bound_bytes for o in self._known
            if o is not None and o.memory_bound_bytes is not None
        ]  # fmt: skip
        measured = any(o is not None and o.value(MEMORY) is not None for o in self._known)
        device = [Constraint(MEMORY, at_most=min(bounds))] if bounds and measured else []
        return combine([*self._search.constraints, *device])

    def _surrogate(self, name: str, inputs: Array, transfer: Transfer | None) -> Surrogate:
        search = self._search
        shape = search.shapes.get(search.space.dataset)
        trend = Trend.of(name, search.space.points, shape, transfer)
        return fit_surrogate(name, trend.table(self._specs, inputs), self._known, transfer)

    def _initial(
        self,
        inputs: Array,
        transfers: Mapping[str, Transfer | None],
        count: int,
        done: int,
        warm: bool,
    ) -> list[int]:
        """Points of the first design, while there are too few answers for a model."""
        needed = 1 if warm else max(4, inputs.shape[1] + 1)
        missing = max(needed - self._asked, count if done == 0 else 0)
        if missing <= 0:
            return []
        chosen: list[int] = []
        asked = [i for i in range(self._num_candidates) if self._known[i] is not None]
        expected = self._expected(inputs, transfers) if warm else None
        for _ in range(min(count, missing)):
            free = [i for i in self._free if i not in chosen]
            if expected is not None:
                chosen.append(self._promising(expected, [*asked, *chosen], free))
            else:
                chosen.append(self._spread(inputs, [*asked, *chosen], free))
        return chosen

    def _expected(self, inputs: Array, transfers: Mapping[str, Transfer | None]) -> Array:
        """Objectives as the related datasets have them, spanning [0, 1]."""
        columns = []
        for objective in self._search.objectives:
            transfer = transfers[objective.name]
            assert transfer is not None
            learned = transfer.features(self._specs, inputs).mean(axis=1)
            low, high = learned.min(), learned.max()
            columns.append((learned - low) / max(high - low, 1e-12))
        return np.column_stack(columns)

    def _promising(self, expected: Array, asked: list[int], free: list[int]) -> int:
        noise = self._rng.normal(0, 0.05, expected.shape)
        noisy = np.maximum(expected + noise, -0.05)
        reference = np.full(expected.shape[1], REFERENCE)
        gains = [hypervolume(noisy[[*asked, i]], reference) for i in free]
        return free[int(np.argmax(gains))]

    def _spread(self, inputs: Array, asked: list[int], free: list[int]) -> int:
        """The smallest point first, then the largest, then those far from all others."""
        noise = self._rng.random(len(free))
        sizes = inputs[free].sum(axis=1)
        if not asked:
            return free[int(np.argmin(sizes + 1e-6 * noise))]
        if len(asked) == 1:
            return free[int(np.argmax(inputs[free, :2].sum(axis=1) + 0.3 * noise))]
        distances = np.linalg.norm(inputs[free][:, None] - inputs[asked][None], axis=-1).min(axis=1)
        return free[int(np.argmax(distances**2 * (0.7 + 0.3 * noise)))]

    def _improving_rows(self, surrogates: Mapping[str, Surrogate], count: int) -> list[int]:
        pending = [
            i for i, o in enumerate(self._known)
            if o is not None and o.status in (RunStatus.PENDING, RunStatus.RUNNING)
        ]  # fmt: skip
        models = {name: model.believe(pending) for name, model in surrogates.items()}
        chosen: list[int] = []
        while len(chosen) < count:
            free = [i for i in self._free if i not in chosen]
            gain = self._gain(models, free, warn=not chosen)
            best = free[int(np.argmax(gain))]
            chosen.append(best)
            models = {name: model.believe([best]) for name, model in models.items()}
        return chosen

    def _gain(self, models: Mapping[str, Surrogate], free: list[int], *, warn: bool) -> Array:
        """Expected growth of the feasible hypervolume by each free point."""
        feasible = np.ones(len(self._specs))
        for limit in self._limits():
            feasible *= models[limit.name].probability(limit)
        if warn:
            self._check_feasible(feasible[free])
        named = [models[o.name] for o in self._search.objectives]
        predictions = [model.predict() for model in named]
        mean = np.column_stack([p[0] for p in predictions])
        deviation = np.column_stack([p[1] for p in predictions])
        reached = self._reached(named, models)
        within = np.concatenate([mean[: self._num_candidates][feasible[: self._num_candidates]
                                 > 0.5], reached])  # fmt: skip
        span = within if len(within) > 1 else mean
        low, high = span.min(axis=0), span.max(axis=0)
        width = np.maximum(high - low, 1e-9)
        reference = np.full(mean.shape[1], REFERENCE)
        gain = expected_improvement(
            (mean[free] - low) / width, deviation[free] / width, (reached - low) / width, reference
        )
        # a point whose gain underflows still ranks by its chance to fit
        result: Array = (gain + 1e-300) * feasible[free]
        return result

    def _reached(self, named: Sequence[Surrogate], models: Mapping[str, Surrogate]) -> Array:
        """Standardised objectives of the runs, real or believed, that keep every constraint."""
        tables = [
            {int(r): t for r, t, b in zip(m.rows, m.targets, m.bounds, strict=True) if not b}
            for m in named
        ]
        allowed = set.intersection(*(set(table) for table in tables))
        for limit in self._limits():
            model = models[limit.name]
            low, high = model.scale.window(limit)
            allowed &= {
                int(r) for r, t, b in zip(model.rows, model.targets, model.bounds, strict=True)
                if not b and low <= t <= high
            }  # fmt: skip
        rows = sorted(allowed)
        return np.array([[table[row] for table in tables] for row in rows]).reshape(
            len(rows), len(named)
        )

    def _check_feasible(self, probability: Array) -> None:
        done = [o for o in self._known if o is not None and o.status is RunStatus.DONE]
        if len(done) < _MIN_EVIDENCE or probability.max() >= _HOPELESS:
            return
        for o in done:
            values = [(c, o.value(c.name)) for c in self._search.constraints]
            if all(v is not None and c.allows(v) for c, v in values):
                return
        texts = " and ".join(_constraint_text(c, done) for c in self._search.constraints)
        raise SearchError(
            f"no point of the search seems to keep {texts or 'the memory of the device'}; relax "
            "it or add smaller sizes"
        )


def _constraint_text(constraint: Constraint, done: Sequence[Observation]) -> str:
    values = [v for v in (o.value(constraint.name) for o in done) if v is not None]
    low = "" if np.isinf(constraint.at_least) else f"{constraint.at_least:.4g} <= "
    high = "" if np.isinf(constraint.at_most) else f" <= {constraint.at_most:.4g}"
    return (
        f"{low}{constraint.name}{high} (the {len(values)} finished runs have {min(values):.4g} to "
        f"{max(values):.4g})"
    )
