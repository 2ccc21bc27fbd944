"""Replays published grids: how much of their hypervolume a sampler finds with how few runs.

The grid is a table: asking for a point answers with its published memory and NDCG@10. Objectives
are log memory and NDCG@10, each spanning [0, 1] over the full grid, reference 1.05.
"""

import argparse
import csv
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any, Protocol, Self

import numpy as np

from bench import _botorch, measure
from db.spec import RunSpec, RunStatus
from sweeper.memory_model import Shape
from sweeper.search.acquisition import hypervolume
from sweeper.search.ask import REFERENCE, Search
from sweeper.search.space import MEMORY, Objective, Observation, SearchSpace

Row = dict[str, Any]
Key = tuple[str, str, int, int, float]
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


class Asker(Protocol):
    """What is replayed: a search of ours, or another library's beside it."""

    def propose(self, observations: Sequence[Observation], count: int = 1) -> list[RunSpec]:
        """Choose the next runs."""

    def with_seed(self, seed: int) -> Self:
        """The same search with other random choices."""


def replay_search(
    replay: Replay, related: Mapping[str, Sequence[Observation]], sampler: str
) -> Asker:
    """Search over a published grid; `with_seed` makes the others of a bench."""
    other = sampler == "botorch"
    search = Search(
        SearchSpace(replay.points), OBJECTIVES,
        sampler="srsweep" if other else sampler,  # type: ignore[arg-type]
        related=related, shapes=SHAPES,
    )  # fmt: skip
    return _botorch.BotorchSearch(search) if other else search


def replay_order(replay: Replay, search: Asker, *, batch: int, budget: int) -> list[RunSpec]:
    """Points in the order in which a search asks for them, `batch` at a time."""
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
    replays: Sequence[Replay], label: str, seeds: Sequence[int], batch: int, share: float,
    keep: Callable[[list[Row]], None], known: frozenset[Key] = frozenset(),
) -> None:  # fmt: skip
    """Rows of one sampler: hypervolume fraction and CPU seconds per proposal, by grid and seed.

    Parameters
    ----------
    replays : sequence of Replay
    label : str
        Sampler; `srsweep_warm` is the default one with the other grids known.
    seeds : sequence of int
    batch : int
    share : float
        Share of the runs to spend.
    keep : callable
        Takes the rows of each replay as soon as it is through.
    known : set of (sampler, dataset, batch, seed, share)
        Rows kept before; a replay that has them all is not repeated.
    """
    shares = [at for at in SHARES if at <= share]
    for replay in replays:
        others = {r.name: list(r.answers.values()) for r in replays if r is not replay}
        related = others if label.endswith("_warm") else {}
        search = replay_search(replay, related, label.removesuffix("_warm"))
        budget = math.ceil(share * len(replay.answers))
        for seed in seeds:
            missing = [at for at in shares if (label, replay.name, batch, seed, at) not in known]
            if not missing:
                continue
            begin = time.process_time()
            order = replay_order(replay, search.with_seed(seed), batch=batch, budget=budget)
            seconds = (time.process_time() - begin) / budget
            keep(
                [
                    {
                        "sampler": label, "dataset": replay.name, "batch": batch, "seed": seed,
                        "share": at, "fraction": fraction(replay, order, at),
                        "cpu_seconds_per_run": seconds,
                    }
                    for at in missing
                ]
            )  # fmt: skip


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean, spread and worst fraction over the seeds, per sampler, batch, share and grid."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["sampler"], row["batch"], row["share"], row["dataset"])
        groups.setdefault(key, []).append(row)
    table = []
    for (sampler, batch, share, dataset), mine in sorted(groups.items()):
        fractions = [row["fraction"] for row in mine]
        table.append(
            {
                "sampler": sampler, "batch": batch, "share": share, "dataset": dataset,
                "seeds": len(mine), "mean": mean(fractions), "stdev": pstdev(fractions),
                "worst": min(fractions),
                "cpu_s_per_run": median(row["cpu_seconds_per_run"] for row in mine),
            }
        )  # fmt: skip
    return table


def overview(table: Sequence[Row]) -> list[Row]:
    """One line per sampler, batch and share: the mean of each grid, and over all."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in table:
        key = (row["share"], row["batch"], row["sampler"])
        line = lines.setdefault(
            key, {"sampler": key[2], "batch": key[1], "share": key[0], "seeds": row["seeds"]}
        )
        line["seeds"] = min(line["seeds"], row["seeds"])
        line[row["dataset"]] = round(row["mean"], 3)
    for (share, batch, sampler), line in lines.items():
        means = [
            row["mean"] for row in table
            if (row["share"], row["batch"], row["sampler"]) == (share, batch, sampler)
        ]  # fmt: skip
        line |= {"mean": round(mean(means), 4), "worst_grid": round(min(means), 3)}
    return [lines[key] for key in sorted(lines)]


def draw(table: Sequence[Row], path: Path) -> None:
    """Figure of every sampler: fraction against the share of runs, one panel per batch size."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in table})
    num_grids = len({row["dataset"] for row in table})
    figure = Figure(figsize=(4.2 * len(batches), 3.4), layout="constrained")
    axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for sampler, (marker, color) in _LOOKS.items():
            means: dict[float, list[float]] = {}
            for row in table:
                if (row["sampler"], row["batch"]) == (sampler, batch):
                    means.setdefault(row["share"], []).append(row["mean"])
            # a sampler that was not measured on every grid yet has no mean over them
            means = {share: found for share, found in means.items() if len(found) == num_grids}
            if means:
                shares = sorted(means)
                axis.plot(
                    [100 * share for share in shares], [mean(means[share]) for share in shares],
                    marker=marker, color=color, label=sampler, linewidth=1.2, markersize=4,
                )  # fmt: skip
        axis.set_title(f"{batch} at a time", fontsize=9)
        axis.set_xlabel("runs spent, % of the grid")
        axis.set_xticks([100 * share for share in SHARES])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the full grid's hypervolume")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


_LOOKS = {
    "srsweep": ("o", "#b2182b"), "srsweep_warm": ("D", "#ef8a62"), "botorch": ("P", "#762a83"),
    "gp": ("s", "#2166ac"), "tpe": ("^", "#67a9cf"), "nsga2": ("v", "#7fbf7b"),
    "random": ("x", "#777777"), "grid": ("+", "#bbbbbb"),
}  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """Rows kept by an earlier, perhaps broken off, bench."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _runnable(labels: Sequence[str]) -> list[str]:
    """The samplers named, less BoTorch where it is not installed."""
    found = [label for label in labels if label]
    if "botorch" in found and not _botorch.is_installed():
        print("botorch is skipped: it takes the packages botorch and gpytorch, which are missing")
        found.remove("botorch")
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench search", description=__doc__)
    parser.add_argument(
        "--samplers", default="srsweep,srsweep_warm,grid,random,tpe,nsga2,gp,botorch",
        help="comma-separated; srsweep_warm knows the other grids, botorch is BoTorch's qLogNEHVI; "
        "empty only shows what is kept",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--share", type=float, default=0.4, help="share of the runs to spend")
    parser.add_argument(
        "--rows", type=Path, default=None, help="file of single rows, to go on from when broken off"
    )
    parser.add_argument("--figure", type=Path, default=None, help="draw what is known")
    parser.add_argument("--save", action="store_true", help="write bench/results/search.csv anew")
    options = parser.parse_args(list(arguments))
    folder = os.environ.get("SRSWEEP_SHARED")
    if not folder:
        print("SRSWEEP_SHARED is unset: the published grids are not on this machine")
        return 2
    replays = load_replays(Path(folder) / "paper" / "experiments.csv")
    rows = read_rows(options.rows) if options.rows else []
    known = frozenset((r["sampler"], r["dataset"], r["batch"], r["seed"], r["share"]) for r in rows)

    def keep(new: list[Row]) -> None:
        rows.extend(new)
        if options.rows:
            with options.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    labels = _runnable(options.samplers.split(","))
    for batch in map(int, options.batches.split(",")):
        for label in labels:
            mine = seeds[:1] if label == "grid" else seeds
            measure_sampler(replays, label, mine, batch, options.share, keep, known)
    table = summary(rows)
    print(measure.table(overview(table)))
    if options.figure:
        draw(table, options.figure)
    if options.save:
        (measure.RESULTS / "search.csv").unlink(missing_ok=True)
        measure.save("search", table)
    return 0
