"""What advice consists of, and what advice for known and for new datasets have in common."""

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from db.errors import SearchError
from db.spec import RunSpec
from sweeper.search.acquisition import undominated
from sweeper.search.history import KnownRun

QUALITY: Final = "ndcg_at_10"
_MAX_CANDIDATES: Final = 4000
_SIZES: Final = ("batch_size", "max_seq_len", "num_negatives")


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


def front_rows(
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


def advised_point(
    spec: RunSpec,
    quality: Estimate,
    memory: Estimate,
    seconds: Estimate | None,
    runs: Sequence[KnownRun],
    *,
    measured: bool | None = None,
) -> AdvisedPoint:
    """A setting with its estimates and the three runs of its kind that are nearest to it.

    Parameters
    ----------
    spec : RunSpec
        The setting.
    quality, memory, seconds : Estimate
        What it is expected to reach and to take.
    runs : sequence of KnownRun
        Runs that the advice rests on.
    measured : bool, optional
        Whether this very setting was run; by default, whether `runs` hold its sizes.
    """
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


def front_notes(points: Sequence[AdvisedPoint], num_runs: int) -> list[str]:
    """Say where a front lies far from the runs behind it."""
    far = max((p.doublings for p in points if not p.measured), default=0.0)
    notes = []
    if far > 2 and math.isfinite(far):
        notes.append(
            f"the farthest point of the front lies {far:g} doublings from the nearest of the "
            f"{num_runs} runs: read its interval, not its value"
        )
    return notes


def nothing_fits(
    budget: Budget,
    memory: Sequence[Estimate],
    seconds: Sequence[Estimate] | None,
    dataset: str,
) -> SearchError:
    """The error for a budget that no setting keeps, with what it would take."""
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
