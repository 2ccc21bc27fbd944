"""What a search chooses from and what it has been answered: points, objectives, observations."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from db.errors import SearchError
from db.measures import MEASURES
from db.spec import RunSpec, RunStatus, field_types, suggestion

Array = NDArray[np.float64]

MEMORY: Final = "peak_train_memory_bytes"
"""The measure that an out-of-memory run bounds from below."""
IGNORED: Final = frozenset({"dataset", "seed"})
"""Fields that tell runs apart without being a choice to learn about."""


@dataclass(frozen=True)
class Objective:
    """A measure to improve; its direction comes from `db.measures`.

    Raises
    ------
    SearchError
        No such measure.
    """

    name: str

    def __post_init__(self) -> None:
        _check_measure(self.name, "objective")

    @property
    def maximise(self) -> bool:
        """Whether more is better."""
        return MEASURES[self.name].maximise


@dataclass(frozen=True)
class Constraint:
    """Bounds of a measure, in its SI unit; infinite where there is none.

    Raises
    ------
    SearchError
        No such measure, a bound that is not positive, or a lower above the upper bound.
    """

    name: str
    at_most: float = math.inf
    at_least: float = -math.inf

    def __post_init__(self) -> None:
        _check_measure(self.name, "constraint")
        if math.isnan(self.at_most) or math.isnan(self.at_least) or self.at_most <= 0:
            raise SearchError(
                f"constraint {self.name} <= {self.at_most:g} can hold for no run; give a bound "
                "above 0"
            )
        if self.at_least > self.at_most:
            raise SearchError(
                f"the constraints on {self.name} contradict each other: at least "
                f"{self.at_least:g} and at most {self.at_most:g}; relax one of them"
            )

    def allows(self, value: float) -> bool:
        """Whether a measured value keeps both bounds."""
        return self.at_least <= value <= self.at_most


def combine(constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """One constraint per measure, as tight as all of them together.

    Raises
    ------
    SearchError
        Two of them contradict each other.
    """
    found: dict[str, Constraint] = {}
    for new in constraints:
        old = found.get(new.name, new)
        found[new.name] = Constraint(
            new.name, min(old.at_most, new.at_most), max(old.at_least, new.at_least)
        )
    return tuple(found.values())


@dataclass(frozen=True)
class Observation:
    """A run that was asked for, and what is known of it.

    Pending and running runs have no values yet; an out-of-memory or skipped run has none either,
    and its memory is at least `memory_bound_bytes`. A diverged run counts as one of the worst.
    """

    spec: RunSpec
    status: RunStatus
    values: Mapping[str, float | None] = field(default_factory=dict)
    """Measures by column name, SI units."""
    memory_bound_bytes: float | None = None
    """What the run needs at least, where it did not fit."""

    def value(self, name: str) -> float | None:
        """The measure if the run is done and it is a finite number."""
        found = self.values.get(name) if self.status is RunStatus.DONE else None
        return float(found) if found is not None and math.isfinite(found) else None


def fixed_values(points: Sequence[RunSpec]) -> Callable[[RunSpec], tuple[object, ...]]:
    """Reader of the fields that all points share, dataset and seed aside."""
    fields = [field_.name for field_ in dataclasses.fields(RunSpec) if field_.name not in IGNORED]
    shared = [name for name in fields if len({getattr(point, name) for point in points}) == 1]
    return lambda spec: tuple(getattr(spec, name) for name in shared)


@dataclass(frozen=True)
class SearchSpace:
    """The distinct points of a grid, of one dataset.

    Raises
    ------
    SearchError
        No points, or points of several datasets.
    """

    points: tuple[RunSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(dict.fromkeys(self.points)))
        datasets = sorted({point.dataset for point in self.points})
        if not datasets:
            raise SearchError("the search space is empty; give at least two points")
        if len(datasets) > 1:
            raise SearchError(
                f"the search space mixes datasets ({', '.join(datasets)}): their metrics cannot "
                "be compared; search each one on its own"
            )

    def comparable(self, spec: RunSpec) -> bool:
        """Whether a run differs from the points only in fields that they vary, or in its seed.

        One with another width or fewer epochs answers another question: it is learned from like a
        run on another dataset.
        """
        return spec.dataset == self.dataset and self._fixed(spec) == self._fixed(self.points[0])

    @functools.cached_property
    def _fixed(self) -> Callable[[RunSpec], tuple[object, ...]]:
        return fixed_values(self.points)

    @property
    def dataset(self) -> str:
        """Name of the dataset that every point trains on."""
        return self.points[0].dataset


@dataclass(frozen=True)
class Encoder:
    """Maps specifications to vectors: log2 of ordered sizes, one-hot for the rest.

    Attributes
    ----------
    ordered : tuple of (str, float, float)
        Field, lowest value and width of the space on the axis's own scale.
    choices : tuple of (str, value)
        Field and one of its values, for each one-hot column.
    """

    ordered: tuple[tuple[str, float, float], ...]
    choices: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, specs: Sequence[RunSpec]) -> Self:
        """Encoder whose inputs span [0, 1] over the given specifications.

        A field that follows another one, such as a learning rate set by batch size, adds none.
        """
        ordered, choices = [], []
        kept_fields: list[str] = []
        for field_ in dataclasses.fields(RunSpec):
            name = field_.name
            values = list(dict.fromkeys(getattr(spec, name) for spec in specs))
            if name in IGNORED or len(values) < 2:
                continue
            if any(_follows(name, other, specs) for other in kept_fields):
                continue
            kept_fields.append(name)
            numbers = [v for v in values if _is_number(v)]
            if len(numbers) > 1:
                scaled = [_scaled(name, v) for v in numbers]
                ordered.append((name, min(scaled), max(scaled) - min(scaled)))
            if len(numbers) < len(values):
                rest = [v for v in values if not _is_number(v)]
                kept = rest if numbers or len(rest) > 2 else rest[:1]
                choices += [(name, v) for v in kept]
        return cls(tuple(ordered), tuple(choices))

    def encode(self, specs: Sequence[RunSpec]) -> Array:
        """Inputs of the surrogates, shape (n, d); a null size sits in the middle of its axis."""
        columns = []
        for name, low, width in self.ordered:
            values = [getattr(spec, name) for spec in specs]
            columns.append([(_scaled(name, v) - low) / width if _is_number(v) else 0.5
                            for v in values])  # fmt: skip
        for name, choice in self.choices:
            columns.append([float(getattr(spec, name) == choice) for spec in specs])
        if not columns:
            return np.zeros((len(specs), 1))
        return np.array(columns, float).T


def _follows(name: str, other: str, specs: Sequence[RunSpec]) -> bool:
    """Whether each value of one field goes with a single value of another."""
    pairs = {(getattr(spec, other), getattr(spec, name)) for spec in specs}
    return len(pairs) == len({value for value, _ in pairs})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scaled(name: str, value: float) -> float:
    """Sizes and rates on a log2 scale; probabilities and calibrations as they are."""
    linear = name in {"dropout_rate", "mask_probability", "gbce_t"}
    if linear or value <= 0:
        return float(value)
    return math.log2(value)


def _check_measure(name: str, what: str) -> None:
    if name in MEASURES:
        return
    if name in field_types():
        raise SearchError(f"{what} {name!r} is a setting of a run, not something measured")
    raise SearchError(f"{what} {name!r} is not a measure{suggestion(name, MEASURES)}")
