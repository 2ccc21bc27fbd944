"""Advice under a budget: which setting to train, from the runs that the database has.

For a dataset with runs of its own: surrogates of NDCG@10, memory and time over the grid that those
runs span. `sweeper.advise_new` is for a dataset without any.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

from db.errors import SearchError
from db.spec import RunSpec, RunStatus
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
from sweeper.memory_model import Shape
from sweeper.search.ask import Search
from sweeper.search.history import History
from sweeper.search.space import MEMORY, Constraint, Encoder, Objective, Observation, SearchSpace
from sweeper.search.surrogate import Surrogate, Trend, fit_surrogate, learn

MIN_RUNS: Final = 5
"""Finished runs with quality and memory below which nothing is said about a dataset."""
_Z90: Final = 1.645


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
        raise nothing_fits(budget, memory, seconds, dataset)
    front = front_rows(fits, memory, quality)
    runs = [r for r in history.runs[dataset] if r.observation.value(QUALITY) is not None]
    points = tuple(
        advised_point(specs[i], quality[i], memory[i], seconds[i] if seconds else None, runs)
        for i in front
    )
    next_runs, note = _next_runs(candidates, own, budget, related, history.shapes, num_next)
    notes = [note] if note else []
    notes += front_notes(points, len(known))
    return Advice(dataset, points, tuple(next_runs), False, len(known), tuple(notes))


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
