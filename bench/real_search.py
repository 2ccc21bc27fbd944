"""A search on real runs of our own, against the full grid that was trained first.

With the full grid's database alone: replays it, each sampler with a few runs over many seeds. With
the database of a search that trained beside it: the share of the grid's hypervolume that it
reached, and the training time that it spent. Objectives are log peak training memory and NDCG@10,
each spanning [0, 1] over the full grid, reference 1.05; one training seed, as a search has.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import mean, pstdev

import numpy as np

from bench import measure
from bench.search import OBJECTIVES, Replay, replay_order
from db.spec import RunSpec
from sweeper.memory_model import Shape
from sweeper.search.acquisition import hypervolume
from sweeper.search.ask import REFERENCE, Search
from sweeper.search.history import read_history
from sweeper.search.space import MEMORY, Observation, SearchSpace

SAMPLERS = ("srsweep", "tpe", "nsga2", "gp", "random", "grid")


def read_replay(url: str, dataset: str | None = None) -> tuple[Replay, Shape | None, float]:
    """Finished runs of one dataset and the commonest seed, and seconds of all seeds together.

    Parameters
    ----------
    url : str
        Run database.
    dataset : str, optional
        The one with most runs if left out.
    """
    history = read_history(url)
    name = dataset or max(history.runs, key=lambda d: len(history.runs[d]))
    done = [
        run.observation for run in history.only(name).on_device(None).runs[name]
        if all(run.observation.value(o.name) is not None for o in OBJECTIVES)
    ]  # fmt: skip
    seed = Counter(o.spec.seed for o in done).most_common(1)[0][0]
    answers = {o.spec: o for o in done if o.spec.seed == seed}
    return Replay(name, answers), history.shapes.get(name), seconds(done)


def seconds(runs: Iterable[Observation]) -> float:
    """Training time of some runs."""
    return sum(o.value("train_seconds") or 0.0 for o in runs)


def share_of(full: Replay, runs: Iterable[Observation]) -> float:
    """Share of the full grid's hypervolume that some runs reach, each measured by itself."""
    table = np.array([_objectives(o) for o in full.answers.values()])
    low, width = table.min(axis=0), np.ptp(table, axis=0)
    reached = (np.array([_objectives(o) for o in runs]) - low) / width
    reference = np.full(2, REFERENCE)
    whole = hypervolume((table - low) / width, reference)
    return hypervolume(reached, reference) / whole


def _objectives(observation: Observation) -> tuple[float, float]:
    memory, quality = observation.value(MEMORY), observation.value("ndcg_at_10")
    return float(np.log(memory or np.nan)), -(quality or 0.0)


def replay_rows(
    full: Replay, shape: Shape | None, all_seconds: float, samplers: Sequence[str], runs: int,
    batch: int, seeds: int,
) -> list[dict[str, object]]:  # fmt: skip
    """One row per sampler: share of the hypervolume and of the training time."""
    rows: list[dict[str, object]] = []
    shapes = {full.name: shape} if shape else {}
    for sampler in samplers:
        search = Search(SearchSpace(full.points), OBJECTIVES, sampler=sampler, shapes=shapes)  # type: ignore[arg-type]
        shares, spent = [], []
        for seed in range(1 if sampler == "grid" else seeds):
            order: list[RunSpec] = replay_order(
                full, search.with_seed(seed), batch=batch, budget=runs
            )
            found = [full.answers[spec] for spec in order]
            shares.append(share_of(full, found))
            spent.append(seconds(found))
        one_seed = seconds(full.answers.values())
        rows.append(
            {
                "sampler": sampler, "dataset": full.name, "points": len(full.points),
                "runs": runs, "batch": batch, "seeds": len(shares), "mean": mean(shares),
                "stdev": pstdev(shares), "worst": min(shares),
                "time_saved_one_seed": 1 - mean(spent) / one_seed,
                "time_saved_all_seeds": 1 - mean(spent) / all_seconds,
            }
        )  # fmt: skip
    return rows


def compared(full: Replay, all_seconds: float, searched: Replay) -> dict[str, object]:
    """What a search that trained reached of the full grid, and what it saved.

    A search measures its own memory and quality, so that its share may exceed 1 by their noise;
    `share_by_the_grids_figures` looks its points up in the full grid instead.
    """
    own = list(searched.answers.values())
    plain = {_point(spec): o for spec, o in full.answers.items()}
    known = [plain[_point(o.spec)] for o in own if _point(o.spec) in plain]
    return {
        "dataset": full.name, "points": len(full.points), "runs": len(own),
        "share": share_of(full, own),
        "share_by_the_grids_figures": share_of(full, known) if known else float("nan"),
        "train_seconds": seconds(own),
        "time_saved_one_seed": 1 - seconds(own) / seconds(full.answers.values()),
        "time_saved_all_seeds": 1 - seconds(own) / all_seconds,
    }  # fmt: skip


def _point(spec: RunSpec) -> RunSpec:
    return dataclasses.replace(spec, seed=0)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench real_search", description=__doc__)
    parser.add_argument("--full", required=True, help="database of the full grid")
    parser.add_argument("--search", default=None, help="database of a search that trained")
    parser.add_argument("--dataset", default=None)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args(list(arguments))
    full, shape, all_seconds = read_replay(options.full, options.dataset)
    if options.search:
        rows = [compared(full, all_seconds, read_replay(options.search, full.name)[0])]
    else:
        rows = replay_rows(
            full, shape, all_seconds, options.samplers.split(","), options.runs, options.batch,
            options.seeds,
        )  # fmt: skip
    print(measure.table(rows))
    if options.save:
        measure.save("real_search", rows)
    return 0
