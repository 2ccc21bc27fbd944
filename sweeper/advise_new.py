"""Advice for a dataset without runs: what the other datasets agree on.

Quality is relative to the best of each dataset, memory goes by the analytic model calibrated on
all of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from db.errors import SearchError
from db.spec import RunSpec
from sweeper.advice import (
    QUALITY,
    Advice,
    Budget,
    Estimate,
    advised_point,
    completed_grid,
    front_notes,
    front_rows,
    nothing_fits,
)
from sweeper.memory_model import MemoryModel, Shape, calibrate
from sweeper.search.history import History
from sweeper.search.space import MEMORY, Encoder, Observation

Array = NDArray[np.float64]

MIN_DATASETS: Final = 2
"""Datasets with enough runs below which nothing is said about a new one."""
_MIN_SOURCE_RUNS: Final = 8
LEAST_CHANCE: Final = 0.5
"""Chance to fit below which a setting on a dataset without runs is not shown."""
_FARTHEST: Final = 10.0
"""Factor beyond the sizes of the known datasets at which advice is refused."""
_RIDGE: Final = 1e-3
"""Pull towards 0 of each term of the quality that datasets have in common."""


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
        raise nothing_fits(budget, memory, None, name)
    runs = [r for d in sources for r in history.runs[d] if r.observation.value(QUALITY) is not None]
    points = tuple(
        dataclasses.replace(
            advised_point(candidates[i], quality[i], memory[i], None, runs, measured=False),
            fits=chances[i],
        )
        for i in front_rows(fits, memory, quality)
    )
    num_runs = sum(len(runs) for runs in sources.values())
    notes = [*notes, *front_notes(points, num_runs)]
    advice = Advice(name, points, (), True, num_runs, tuple(notes))
    return dataclasses.replace(advice, next_runs=(advice.best.spec,))


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
