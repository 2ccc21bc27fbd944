"""Replays published grids: how much of their hypervolume a sampler finds with how few runs.

The grid is a table: asking for a point answers with its published memory and NDCG@10. Objectives
are log memory and NDCG@10, each spanning [0, 1] over the full grid, reference 1.05.
"""

import argparse
import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np

from bench import measure
from db.spec import RunSpec, RunStatus
from sweeper.memory_model import Shape
from sweeper.search.acquisition import hypervolume
from sweeper.search.ask import REFERENCE, Search
from sweeper.search.space import MEMORY, Objective, Observation, SearchSpace

SHARES = (0.1, 0.2, 0.4)
OBJECTIVES = (Objective("ndcg_at_10"), Objective(MEMORY))
SHAPES = {
    "30music": Shape(909_000, 583.0),
    "beauty": Shape(176_450, 7.46),
    "gowalla": Shape(309_000, 54.8),
    "megamarket": Shape(1_661_327, 327.88),
    "movielens_20m": Shape(15_405, 88.22),
    "zvuk": Shape(893_022, 656.93),
}
"""Catalog and mean length of the published datasets after their filter (Table 2 of the paper)."""


@dataclass(frozen=True)
class Replay:
    """One published grid as a table of answers."""

    name: str
    answers: Mapping[RunSpec, Observation]

    @property
    def points(self) -> tuple[RunSpec, ...]:
        """All points, sorted by size."""
        return tuple(self.answers)

    def normalised(self) -> dict[RunSpec, np.ndarray]:
        """Objectives of every point, minimised, spanning [0, 1]."""
        table = np.array(
            [
                [math.log(o.values[MEMORY] or 0), -(o.values["ndcg_at_10"] or 0)]
                for o in self.answers.values()
            ]
        )
        low, high = table.min(axis=0), table.max(axis=0)
        return dict(zip(self.answers, (table - low) / (high - low), strict=True))


def load_replays(path: Path) -> list[Replay]:
    """Published CE- rows by dataset; repeats of a point are averaged.

    Parameters
    ----------
    path : Path
        The paper's `experiments.csv`.
    """
    found: dict[str, dict[tuple[int, int, int], list[dict[str, float]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            negatives = float(row["loss_sample_count"] or "inf")
            if not math.isfinite(negatives):
                continue
            key = (int(float(row["batch_size"])), int(float(row["max_seq_len"])), int(negatives))
            values = {
                "ndcg_at_10": float(row["NDCG_10_test"]),
                MEMORY: float(row["max_allocated_memory"]) * 2**30,
                "epoch_seconds": float(row["run_training_epoch"]),
            }
            found.setdefault(row["dataset"], {}).setdefault(key, []).append(values)
    return [Replay(name, _answers(name, points)) for name, points in sorted(found.items())]


def _answers(
    name: str, points: Mapping[tuple[int, int, int], Sequence[Mapping[str, float]]]
) -> dict[RunSpec, Observation]:
    answers = {}
    for (batch_size, max_seq_len, negatives), repeats in sorted(points.items()):
        spec = RunSpec(
            dataset=name, loss="ce_minus", batch_size=batch_size, max_seq_len=max_seq_len,
            num_negatives=negatives, precision="fp16",
        )  # fmt: skip
        values = {key: mean(repeat[key] for repeat in repeats) for key in repeats[0]}
        answers[spec] = Observation(spec, RunStatus.DONE, values)
    return answers


def replay_order(
    replay: Replay, related: Mapping[str, Sequence[Observation]], sampler: str, seed: int,
    *, batch: int, budget: int,
) -> list[RunSpec]:  # fmt: skip
    """Points in the order in which a sampler asks for them, `batch` at a time."""
    search = Search(
        SearchSpace(replay.points), OBJECTIVES, sampler=sampler, seed=seed,  # type: ignore[arg-type]
        related=related, shapes=SHAPES,
    )  # fmt: skip
    known: list[Observation] = []
    while len(known) < budget:
        specs = search.propose(known, min(batch, budget - len(known)))
        known += [replay.answers[spec] for spec in specs]
    return [observation.spec for observation in known]


def fraction(replay: Replay, order: Sequence[RunSpec], share: float) -> float:
    """Share of the full grid's hypervolume that the first runs of an order reach."""
    points = replay.normalised()
    reference = np.full(2, REFERENCE)
    count = math.ceil(share * len(points))
    reached = hypervolume(np.array([points[spec] for spec in order[:count]]), reference)
    return reached / hypervolume(np.array(list(points.values())), reference)


def measure_sampler(
    replays: Sequence[Replay], label: str, seeds: Sequence[int], batch: int, share: float
) -> list[dict[str, object]]:
    """Rows of one sampler: hypervolume fraction and seconds per proposal, by grid and seed.

    `srsweep_warm` is the default sampler with the other grids known.
    """
    rows: list[dict[str, object]] = []
    for replay in replays:
        others = {r.name: list(r.answers.values()) for r in replays if r is not replay}
        related = others if label == "srsweep_warm" else {}
        for seed in seeds:
            begin = time.process_time()
            budget = math.ceil(share * len(replay.answers))
            sampler = label.removesuffix("_warm")
            order = replay_order(replay, related, sampler, seed, batch=batch, budget=budget)
            seconds = (time.process_time() - begin) / budget
            for at in SHARES:
                if at <= share:
                    rows.append(
                        {
                            "sampler": label, "dataset": replay.name, "batch": batch, "seed": seed,
                            "share": at, "fraction": fraction(replay, order, at),
                            "cpu_seconds_per_run": seconds,
                        }
                    )  # fmt: skip
    return rows


def summary(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Mean fraction per sampler, batch and share: by grid, over all, and the worst grid."""
    table: list[dict[str, object]] = []
    keys = dict.fromkeys((r["sampler"], r["batch"], r["share"]) for r in rows)
    for sampler, batch, share in keys:
        mine = [
            r for r in rows if (r["sampler"], r["batch"], r["share"]) == (sampler, batch, share)
        ]
        by_grid: dict[str, list[float]] = {}
        for r in mine:
            by_grid.setdefault(str(r["dataset"]), []).append(float(str(r["fraction"])))
        means = {name: mean(values) for name, values in by_grid.items()}
        table.append(
            {
                "sampler": sampler, "batch": batch, "share": share,
                "seeds": len({r["seed"] for r in mine}), **means,
                "mean": mean(means.values()), "worst_grid": min(means.values()),
                "cpu_s_per_run": median(float(str(r["cpu_seconds_per_run"])) for r in mine),
            }
        )  # fmt: skip
    return table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench search", description=__doc__)
    parser.add_argument(
        "--samplers", default="srsweep,srsweep_warm,grid,random,tpe,nsga2,gp",
        help="comma-separated; srsweep_warm knows the other grids",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--share", type=float, default=0.4, help="share of the runs to spend")
    parser.add_argument("--save", action="store_true", help="append to bench/results/search.csv")
    options = parser.parse_args(list(arguments))
    folder = os.environ.get("SRSWEEP_SHARED")
    if not folder:
        print("SRSWEEP_SHARED is unset: the published grids are not on this machine")
        return 2
    replays = load_replays(Path(folder) / "paper" / "experiments.csv")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for batch in map(int, options.batches.split(",")):
        for label in options.samplers.split(","):
            count = 1 if label == "grid" else len(seeds)
            rows = measure_sampler(replays, label, seeds[:count], batch, options.share)
            print(measure.table(summary(rows)), flush=True)
            if options.save:
                measure.save("search", rows)
    return 0
