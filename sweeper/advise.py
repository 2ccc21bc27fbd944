"""Advice under a budget: which setting to train, from the runs that the database has.

For a dataset with runs of its own, surrogates of NDCG@10, memory and time over the grid that those
runs span. For a new one, what the other datasets agree on: quality relative to the best of each
dataset, memory by the analytic model calibrated on all of them.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from db.errors import SearchError
from db.spec import RunSpec, RunStatus
from sweeper.memory_model import MemoryModel, Shape, calibrate
from sweeper.search.acquisition import undominated
from sweeper.search.ask import Search
from sweeper.search.history import History, KnownRun
from sweeper.search.space import MEMORY, Constraint, Encoder, Objective, Observation, SearchSpace
from sweeper.search.surrogate import Surrogate, Trend, fit_surrogate, learn

Array = NDArray[np.float64]

QUALITY: Final = "ndcg_at_10"
MIN_RUNS: Final = 5
"""Finished runs with quality and memory below which nothing is said about a dataset."""
MIN_DATASETS: Final = 2
"""Datasets with enough runs below which nothing is said about a new one."""
_MIN_SOURCE_RUNS: Final = 8
LEAST_CHANCE: Final = 0.5
"""Chance to fit below which a setting on a dataset without runs is not shown."""
_MAX_CANDIDATES: Final = 4000
_FARTHEST: Final = 10.0
"""Factor beyond the sizes of the known datasets at which advice is refused."""
_SIZES: Final = ("batch_size", "max_seq_len", "num_negatives")
_Z90: Final = 1.645
_RIDGE: Final = 1e-3
"""Pull towards 0 of each term of the quality that datasets have in common."""


@dataclass(frozen=True)
class Budget:
    """What a training run may take."""

    memory_bytes: float
    seconds: float | None = None
    """Training time of the whole run."""

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory_bytes), ("time", self.seconds)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SearchError(f"a {name} budget of {value:g} fits nothing; give more than 0")


@dataclass(frozen=True)
class Estimate:
    """A value with its 90 % interval; the ends meet where it was measured."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AdvisedPoint:
    """One setting of the front under the budget."""

    spec: RunSpec
    quality: Estimate
    """NDCG@10; relative to the best of the dataset if the advice is for a new one."""
    memory: Estimate
    """Peak training memory, bytes."""
    seconds: Estimate | None
    """Training time; None where it is not known."""
    measured: bool
    """Whether this very setting was run."""
    rests_on: tuple[str, ...]
    """Keys of the nearest runs."""
    doublings: float
    """Distance to the nearest run: sum over batch size, length and negatives of |log2 ratio|."""
    extrapolates: tuple[str, ...] = ()
    """Sizes outside the range of the runs."""
    fits: float = 1.0
    """Probability that the memory stays within the budget."""


@dataclass(frozen=True)
class Advice:
    """The front under a budget, cheapest first, and what to do next."""

    dataset: str
    points: tuple[AdvisedPoint, ...]
    next_runs: tuple[RunSpec, ...]
    """Runs whose outcome would move the front most."""
    relative: bool
    """Whether quality is a share of the dataset's best."""
    num_runs: int
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> AdvisedPoint:
        """The point whose quality times its chance to fit is greatest."""
        return max(self.points, key=lambda point: point.quality.value * point.fits)


def advise(history: History, dataset: str, budget: Budget, *, num_next: int = 3) -> Advice:
    """Advise on a dataset with runs of its own.

    Parameters
    ----------
    history : History
        Runs of one device class.
    dataset : str
        Name of the dataset.
    budget : Budget
        Memory, and time if it matters.
    num_next : int
        Runs to suggest.

    Raises
    ------
    SearchError
        Too few runs, or none that fits the budget.
    """
    own = history.observations(dataset)
    known = [o for o in own if o.value(QUALITY) is not None and o.value(MEMORY) is not None]
    if len(known) < MIN_RUNS:
        raise SearchError(
            f"{len(known)} finished runs on {dataset!r} with {QUALITY} and memory cannot support "
            f"advice, it takes {MIN_RUNS}; run more points, or ask by --num-items and "
            "--mean-length for what other datasets say"
        )
    candidates = completed_grid([o.spec for o in known])
    specs = [*candidates, *(o.spec for o in own if o.spec not in set(candidates))]
    related = {d: history.observations(d) for d in history.runs if d != dataset}
    models = _surrogates(specs, own, dataset, related, history.shapes)
    timed = [o for o in known if _seconds(o) is not None]
    if budget.seconds is not None and len(timed) < MIN_RUNS:
        raise SearchError(
            f"training time was measured on {len(timed)} runs on {dataset!r}, advice under --time "
            f"takes {MIN_RUNS}; leave --time out or run more points"
        )
    quality = _estimates(models[QUALITY], specs, own, QUALITY)
    memory = _estimates(models[MEMORY], specs, own, MEMORY)
    seconds = (
        _times(specs, own, dataset, related, history.shapes) if len(timed) >= MIN_RUNS else None
    )
    fits = [
        i for i in range(len(specs))
        if memory[i].high <= budget.memory_bytes
        and (budget.seconds is None or (seconds is not None and seconds[i].high <= budget.seconds))
        and not _failed(specs[i], own)
    ]  # fmt: skip
    if not fits:
        raise _nothing_fits(budget, memory, seconds, dataset)
    front = _front(fits, memory, quality)
    runs = [r for r in history.runs[dataset] if r.observation.value(QUALITY) is not None]
    points = tuple(
        _point(specs[i], quality[i], memory[i], seconds[i] if seconds else None, runs)
        for i in front
    )
    next_runs, note = _next_runs(candidates, own, budget, related, history.shapes, num_next)
    notes = [note] if note else []
    notes += _notes(points, len(known))
    return Advice(dataset, points, tuple(next_runs), False, len(known), tuple(notes))


def advise_new(
    history: History,
    shape: Shape,
    budget: Budget,
    *,
    name: str = "new",
    candidates: Sequence[RunSpec] | None = None,
) -> Advice:
    """Advise on a dataset without runs, from the runs on others.

    Parameters
    ----------
    history : History
        Runs of one device class.
    shape : Shape
        Sizes of the new dataset.
    budget : Budget
        Memory only; time depends on the number of users and is refused.
    name : str
        Name of the new dataset.
    candidates : sequence of RunSpec, optional
        Settings to choose from; all that the other datasets span by default.

    Raises
    ------
    SearchError
        Too few datasets, one too far from all of them, a time budget, or nothing that fits.
    """
    if budget.seconds is not None:
        raise SearchError(
            "training time on a dataset without runs cannot be predicted from other datasets; "
            "run one point on it and ask again, or leave --time out"
        )
    sources = datasets_with_runs(history, name)
    notes = _distance_notes(shape, {d: history.shapes[d] for d in sources})
    if candidates is None:
        found = completed_grid([o.spec for runs in sources.values() for o in runs])
        candidates = list(dict.fromkeys(dataclasses.replace(s, dataset=name) for s in found))
    candidates = [s for s in candidates if (s.num_negatives or 0) < shape.num_items]
    padded = _is_padded(history)
    model, errors = memory_across(sources, history.shapes, padded=padded)
    memory = [_widened(model.predict(spec, shape).bytes, errors) for spec in candidates]
    quality = _relative_quality(candidates, sources)
    chances = [chance_to_fit(estimate.value, errors, budget.memory_bytes) for estimate in memory]
    fits = [i for i in range(len(candidates)) if chances[i] >= LEAST_CHANCE]
    if not fits:
        raise _nothing_fits(budget, memory, None, name)
    runs = [r for d in sources for r in history.runs[d] if r.observation.value(QUALITY) is not None]
    points = tuple(
        dataclasses.replace(
            _point(candidates[i], quality[i], memory[i], None, runs, measured=False),
            fits=chances[i],
        )
        for i in _front(fits, memory, quality)
    )
    num_runs = sum(len(runs) for runs in sources.values())
    notes = [*notes, *_notes(points, num_runs)]
    advice = Advice(name, points, (), True, num_runs, tuple(notes))
    return dataclasses.replace(advice, next_runs=(advice.best.spec,))


def completed_grid(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """Settings that runs span: for each loss and model, the product of their sizes.

    Parameters
    ----------
    specs : sequence of RunSpec
        Runs; seeds are told apart no further.
    """
    kinds: dict[RunSpec, list[RunSpec]] = {}
    for spec in specs:
        kinds.setdefault(_kind(spec), []).append(spec)
    found: dict[RunSpec, None] = {}
    for kind, members in kinds.items():
        axes = [
            sorted({getattr(m, name) for m in members}, key=lambda v: v or 0) for name in _SIZES
        ]
        seed = Counter(m.seed for m in members).most_common(1)[0][0]
        for values in itertools.product(*axes):
            sizes = dict(zip(_SIZES, values, strict=True))
            found[dataclasses.replace(kind, **sizes, seed=seed)] = None
    if len(found) > _MAX_CANDIDATES:
        raise SearchError(
            f"the runs span {len(found):,} settings, more than the {_MAX_CANDIDATES:,} that advice "
            "compares; ask about one sweep's loss or width at a time"
        )
    return list(found)


def _kind(spec: RunSpec) -> RunSpec:
    """The specification with its sizes taken out."""
    negatives = 1 if spec.num_negatives is not None else None
    return dataclasses.replace(spec, batch_size=1, max_seq_len=1, num_negatives=negatives, seed=0)


_kind_fields: Final = operator.attrgetter(
    *(f.name for f in dataclasses.fields(RunSpec) if f.name not in {*_SIZES, "seed", "dataset"})
)


@functools.lru_cache(maxsize=1 << 16)
def _kind_values(spec: RunSpec) -> tuple[object, ...]:
    """What tells kinds apart, datasets aside; far cheaper than a specification checked anew."""
    values: tuple[object, ...] = _kind_fields(spec)
    return (*values, spec.num_negatives is None)


def _surrogates(
    specs: Sequence[RunSpec],
    own: Sequence[Observation],
    dataset: str,
    related: Mapping[str, Sequence[Observation]],
    shapes: Mapping[str, Shape],
    names: Sequence[str] = (QUALITY, MEMORY),
) -> dict[str, Surrogate]:
    encoder = Encoder.of(specs)
    inputs = encoder.encode(specs)
    by_spec = {o.spec: o for o in own}
    known = [by_spec.get(spec) for spec in specs]
    found = {}
    for name in names:
        transfer = learn(name, encoder, specs, related, shapes)
        trend = Trend.of(name, specs, shapes.get(dataset), transfer)
        found[name] = fit_surrogate(name, trend.table(specs, inputs), known, transfer)
    return found


def _estimates(
    model: Surrogate, specs: Sequence[RunSpec], own: Sequence[Observation], name: str
) -> list[Estimate]:
    """Predictions for all points; a measured one keeps its value, with the spread of runs."""
    mean, deviation = model.predict()
    spread = math.sqrt(model.posterior.noise_variance) * _Z90
    measured = {o.spec: o.value(name) for o in own}
    ends = [model.scale.backward(mean + shift * _Z90 * deviation) for shift in (-1, 0, 1)]
    found = []
    for i, spec in enumerate(specs):
        value = measured.get(spec)
        low, middle, high = sorted(float(end[i]) for end in ends)
        if value is not None:
            middle = value
            if name == QUALITY:
                around = spread * model.scale.spread
                low, high = max(value - around, 0.0), value + around
            else:
                low = high = value
        elif name == QUALITY:
            low, middle = max(low, 0.0), max(middle, 0.0)
        found.append(Estimate(middle, low, high))
    return found


def _seconds(observation: Observation) -> float | None:
    """Training time of a run; published ones give the mean epoch only."""
    found = observation.value("train_seconds")
    if found is not None:
        return found
    epoch = observation.value("epoch_seconds")
    return None if epoch is None else epoch * observation.spec.max_epochs


def _times(
    specs: Sequence[RunSpec],
    own: Sequence[Observation],
    dataset: str,
    related: Mapping[str, Sequence[Observation]],
    shapes: Mapping[str, Shape],
) -> list[Estimate]:
    def timed(observations: Sequence[Observation]) -> list[Observation]:
        return [
            dataclasses.replace(o, values={"train_seconds": _seconds(o)}, memory_bound_bytes=None)
            for o in observations
        ]

    own = timed(own)
    others = {d: timed(o) for d, o in related.items()}
    models = _surrogates(specs, own, dataset, others, shapes, ["train_seconds"])
    return _estimates(models["train_seconds"], specs, own, "train_seconds")


def _failed(spec: RunSpec, own: Sequence[Observation]) -> bool:
    bad = (RunStatus.OUT_OF_MEMORY, RunStatus.SKIPPED, RunStatus.DIVERGED, RunStatus.FAILED)
    return any(o.spec == spec and o.status in bad for o in own)


def _front(
    rows: Sequence[int], memory: Sequence[Estimate], quality: Sequence[Estimate]
) -> list[int]:
    """Undominated rows, the smallest memory first."""
    table = np.array([[memory[i].value, -quality[i].value] for i in rows])
    kept = [row for row, keep in zip(rows, undominated(table), strict=True) if keep]
    return sorted(kept, key=lambda i: memory[i].value)


def _doublings(left: RunSpec, right: RunSpec) -> float:
    total = 0.0
    for name in _SIZES:
        a, b = getattr(left, name), getattr(right, name)
        if (a is None) != (b is None):
            return math.inf
        total += abs(math.log2(a / b)) if a is not None else 0.0
    return total


def _point(
    spec: RunSpec,
    quality: Estimate,
    memory: Estimate,
    seconds: Estimate | None,
    runs: Sequence[KnownRun],
    *,
    measured: bool | None = None,
) -> AdvisedPoint:
    kind = _kind_values(spec)
    alike = [r for r in runs if _kind_values(r.observation.spec) == kind]
    near = sorted(alike, key=lambda r: _doublings(spec, r.observation.spec))[:3]
    outside = []
    for name in _SIZES:
        values = [getattr(r.observation.spec, name) for r in alike]
        value = getattr(spec, name)
        if value is not None and values and not min(values) <= value <= max(values):
            outside.append(f"{name}={value} (runs have {min(values)} to {max(values)})")
    distance = _doublings(spec, near[0].observation.spec) if near else math.inf
    return AdvisedPoint(
        spec, quality, memory, seconds, distance == 0 if measured is None else measured,
        tuple(r.run_key for r in near), distance, tuple(outside),
    )  # fmt: skip


def _next_runs(
    candidates: Sequence[RunSpec],
    own: Sequence[Observation],
    budget: Budget,
    related: Mapping[str, Sequence[Observation]],
    shapes: Mapping[str, Shape],
    count: int,
) -> tuple[list[RunSpec], str | None]:
    if len(candidates) < 2 or count < 1:
        return [], None
    search = Search(
        SearchSpace(tuple(candidates)), (Objective(QUALITY), Objective(MEMORY)),
        (Constraint(MEMORY, at_most=budget.memory_bytes),), related=related, shapes=shapes,
    )  # fmt: skip
    try:
        found = search.propose(own, count)
    except SearchError as error:
        return [], f"no next runs: {error}"
    return found, None if found else "every setting of the grid that the runs span was run"


def _notes(points: Sequence[AdvisedPoint], num_runs: int) -> list[str]:
    far = max((p.doublings for p in points if not p.measured), default=0.0)
    notes = []
    if far > 2 and math.isfinite(far):
        notes.append(
            f"the farthest point of the front lies {far:g} doublings from the nearest of the "
            f"{num_runs} runs: read its interval, not its value"
        )
    return notes


def _nothing_fits(
    budget: Budget,
    memory: Sequence[Estimate],
    seconds: Sequence[Estimate] | None,
    dataset: str,
) -> SearchError:
    smallest = min(estimate.high for estimate in memory)
    if smallest > budget.memory_bytes:
        return SearchError(
            f"no setting on {dataset!r} fits {budget.memory_bytes / 2**30:.2f} GiB: the smallest "
            f"needs {smallest / 2**30:.2f} GiB; raise --memory or run smaller sizes"
        )
    fastest = min((e.high for e in seconds or ()), default=math.nan)
    return SearchError(
        f"no setting on {dataset!r} that fits {budget.memory_bytes / 2**30:.2f} GiB trains within "
        f"{budget.seconds or 0:.0f} s (the fastest of all settings takes {fastest:.0f} s); raise "
        "--time or --memory"
    )


def datasets_with_runs(history: History, name: str) -> dict[str, list[Observation]]:
    """Finished runs of the datasets other than `name` that advice can rest on.

    Raises
    ------
    SearchError
        Fewer than two of them.
    """
    found = {}
    for dataset in history.runs:
        runs = [
            o for o in history.observations(dataset)
            if o.value(QUALITY) is not None and o.value(MEMORY) is not None
        ]  # fmt: skip
        if dataset != name and dataset in history.shapes and len(runs) >= _MIN_SOURCE_RUNS:
            found[dataset] = runs
    if len(found) < MIN_DATASETS:
        raise SearchError(
            f"advice for a dataset without runs takes {MIN_DATASETS} other datasets with "
            f"{_MIN_SOURCE_RUNS} finished runs each, on one device; the database has {len(found)}. "
            "Run a small sweep on the dataset itself, or import published runs"
        )
    return found


def _distance_notes(shape: Shape, shapes: Mapping[str, Shape]) -> list[str]:
    """Say where the new dataset's sizes leave the range of the known ones; refuse far beyond."""
    notes = []
    for name, value, known in (
        ("num_items", shape.num_items, [s.num_items for s in shapes.values()]),
        ("mean_length", shape.mean_length, [s.mean_length for s in shapes.values()]),
    ):
        factor = max(min(known) / value, value / max(known))
        text = (
            f"{name}={value:g} lies outside the known datasets ({min(known):g} to {max(known):g})"
        )
        if factor > _FARTHEST:
            raise SearchError(
                f"{text} by a factor of {factor:.0f}: the database cannot support advice so far "
                "away; run a small sweep on the dataset itself"
            )
        if factor > 1:
            notes.append(f"{text}: the advice extrapolates by a factor of {factor:.1f}")
    return notes


def _is_padded(history: History) -> bool:
    sources = {r.memory_source for runs in history.runs.values() for r in runs}
    return sources - {None} == {"published_mixed"}


def memory_across(
    sources: Mapping[str, Sequence[Observation]], shapes: Mapping[str, Shape], *, padded: bool
) -> tuple[MemoryModel, Array]:
    """Model calibrated on all datasets, and its log errors on each one left out."""

    def fitted(datasets: Sequence[str]) -> MemoryModel:
        runs = [(d, o) for d in datasets for o in sources[d]]
        return calibrate(
            [o.spec for _, o in runs], [shapes[d] for d, _ in runs],
            [o.value(MEMORY) or 0.0 for _, o in runs], padded=padded, with_errors=False,
        )  # fmt: skip

    errors = []
    for left_out in sources:
        model = fitted([d for d in sources if d != left_out])
        errors += [
            math.log((o.value(MEMORY) or 0.0) / model.predict(o.spec, shapes[left_out]).bytes)
            for o in sources[left_out]
        ]
    return fitted(list(sources)), np.array(errors)


def chance_to_fit(value: float, errors: Array, budget: float) -> float:
    """Share of the log errors, on datasets left out, with which the prediction fits."""
    return float(np.mean(value * np.exp(errors) <= budget))


def _widened(value: float, errors: Array) -> Estimate:
    low, high = np.quantile(errors, [0.05, 0.95])
    return Estimate(value, value * math.exp(min(low, 0.0)), value * math.exp(max(high, 0.0)))


def _relative_quality(
    candidates: Sequence[RunSpec], sources: Mapping[str, Sequence[Observation]]
) -> list[Estimate]:
    """Quality as a share of the dataset's best, by what all datasets have in common.

    One additive quadratic in the log sizes is fitted to every dataset's shares, each dataset with
    a level of its own and the same weight: with so few datasets, whatever bends more follows single
    ones. Intervals come from the errors on each dataset in turn, left out.
    """
    encoder = Encoder.of([*candidates, *(o.spec for runs in sources.values() for o in runs)])
    shares = {}
    for dataset, runs in sources.items():
        values = np.array([o.value(QUALITY) or 0.0 for o in runs])
        inputs = encoder.encode([o.spec for o in runs])
        shares[dataset] = (_bends(inputs), values / max(float(values.max()), 1e-12))
    mean = _common_shares(_bends(encoder.encode(candidates)), shares)
    errors = [
        share - _common_shares(terms, {d: s for d, s in shares.items() if d != dataset})
        for dataset, (terms, share) in shares.items()
    ]
    low, high = np.quantile(np.concatenate(errors), [0.05, 0.95])
    table = np.clip(mean[:, None] + [0.0, min(low, 0.0), max(high, 0.0)], 0.0, 1.0)
    return [Estimate(*map(float, row)) for row in table]


def _bends(inputs: Array) -> Array:
    """Linear and quadratic terms of encoded settings, shape (n, 2 d)."""
    middle = inputs - 0.5
    return np.column_stack([middle, middle**2])


def _common_shares(terms: Array, shares: Mapping[str, tuple[Array, Array]]) -> Array:
    """Expected share of the best at some terms, given terms and shares of datasets; (n,)."""
    rows, targets = [], []
    for index, (known, share) in enumerate(shares.values()):
        level = np.zeros((len(known), len(shares)))
        level[:, index] = 1.0
        weight = 1 / math.sqrt(len(known))
        rows.append(weight * np.column_stack([level, known]))
        targets.append(weight * share)
    # a term that no run varies gets no weight
    ridge = _RIDGE * np.eye(terms.shape[1], len(shares) + terms.shape[1], k=len(shares))
    design = np.vstack([*rows, ridge])
    solution = np.linalg.lstsq(design, np.concatenate([*targets, np.zeros(len(ridge))]))[0]
    levels, slopes = solution[: len(shares)], solution[len(shares) :]
    expected: Array = terms @ slopes + levels.mean()
    return expected


def dissimilarity(left: Shape, right: Shape) -> float:
    """Distance of two datasets: log ratios of catalog and mean length, Euclidean."""
    return math.hypot(
        math.log(left.num_items / right.num_items), math.log(left.mean_length / right.mean_length)
    )
