"""Advice for a dataset that was never run, tested on the published runs: leave one dataset out.

Regret: how much of the best published NDCG@10 within the budget the advised point misses. Beside
it two habits: copy the best point of the most similar dataset, and take the largest batch size
that is predicted to fit. A point that turns out not to fit counts as a regret of 1; a dataset that
the advice refuses is counted apart and left out of all means. Last, as a bound that nobody can
reach in advance, the largest batch size among the points that really fitted.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median

from bench import measure
from bench.search import SHAPES, Replay, load_replays
from db.errors import SearchError
from db.spec import RunSpec
from sweeper.advice import Budget
from sweeper.advise_new import (
    LEAST_CHANCE,
    advise_new,
    chance_to_fit,
    datasets_with_runs,
    dissimilarity,
    memory_across,
)
from sweeper.search.history import History, KnownRun
from sweeper.search.space import MEMORY

BUDGETS = (5, 10, 20, 40)
"""GB of 10^9 bytes."""
QUALITY = "ndcg_at_10"


def history_of(replays: Sequence[Replay]) -> History:
    """Published grids as a run database would hold them."""
    runs = {
        replay.name: [
            KnownRun(f"{replay.name}:{i}", observation, "published", "published_mixed")
            for i, observation in enumerate(replay.answers.values())
        ]
        for replay in replays
    }
    return History(runs, {replay.name: SHAPES[replay.name] for replay in replays})


def advised(target: Replay, others: Sequence[Replay], budget: float) -> RunSpec:
    """Point that our advice puts first."""
    found = advise_new(
        history_of(others), SHAPES[target.name], Budget(budget), name=target.name,
        candidates=target.points,
    )  # fmt: skip
    return found.best.spec


def copied(target: Replay, others: Sequence[Replay], budget: float) -> RunSpec:
    """Best point within the budget on the most similar dataset, or the nearest one published."""
    like = min(others, key=lambda r: dissimilarity(SHAPES[r.name], SHAPES[target.name]))
    fits = [o for o in like.answers.values() if (o.value(MEMORY) or 0) <= budget]
    if not fits:
        return min(target.points, key=lambda spec: spec.batch_size * spec.max_seq_len)
    best = max(fits, key=lambda o: o.value(QUALITY) or 0).spec
    return min(target.points, key=lambda spec: _steps(spec, best))


def largest_predicted(target: Replay, others: Sequence[Replay], budget: float) -> RunSpec:
    """Largest batch size predicted to fit, then the largest rest."""
    history = history_of(others)
    sources = datasets_with_runs(history, target.name)
    model, errors = memory_across(sources, history.shapes, padded=True)
    shape = SHAPES[target.name]
    fits = [
        spec for spec in target.points
        if chance_to_fit(model.predict(spec, shape).bytes, errors, budget) >= LEAST_CHANCE
    ] or list(target.points[:1])  # fmt: skip
    return max(fits, key=lambda s: (s.batch_size, s.max_seq_len * (s.num_negatives or 0)))


def largest_batch(target: Replay, others: Sequence[Replay], budget: float) -> RunSpec:
    """Largest batch size that really fits (its memory is given away), then the largest rest."""
    fits = [s for s, o in target.answers.items() if (o.value(MEMORY) or 0) <= budget]
    return max(fits, key=lambda s: (s.batch_size, s.max_seq_len * (s.num_negatives or 0)))


def _steps(left: RunSpec, right: RunSpec) -> float:
    from math import log2

    pairs = [
        (left.batch_size, right.batch_size),
        (left.max_seq_len, right.max_seq_len),
        (left.num_negatives or 1, right.num_negatives or 1),
    ]
    return sum(abs(log2(a / b)) for a, b in pairs)


CHOICES: Mapping[str, Callable[[Replay, Sequence[Replay], float], RunSpec]] = {
    "srsweep advise": advised,
    "copy the most similar dataset": copied,
    "largest batch size predicted to fit": largest_predicted,
    "largest batch size that really fits": largest_batch,
}


def regret_rows(replays: Sequence[Replay]) -> list[dict[str, object]]:
    """Regret of every choice, dataset and budget."""
    rows: list[dict[str, object]] = []
    for target in replays:
        others = [r for r in replays if r is not target]
        for gigabytes in BUDGETS:
            budget = gigabytes * 1e9
            fits = [o for o in target.answers.values() if (o.value(MEMORY) or 0) <= budget]
            if not fits:
                continue
            best = max(o.value(QUALITY) or 0 for o in fits)
            for name, choose in CHOICES.items():
                row = {"choice": name, "dataset": target.name, "budget_gb": gigabytes}
                try:
                    spec = choose(target, others, budget)
                except SearchError as error:
                    rows.append({**row, "regret": None, "point": f"refused: {error}"[:80]})
                    continue
                answer = target.answers[dataclasses.replace(spec)]
                over = (answer.value(MEMORY) or 0) > budget
                regret = 1.0 if over else 1 - (answer.value(QUALITY) or 0) / best
                point = f"{spec.batch_size}/{spec.max_seq_len}/{spec.num_negatives}"
                rows.append({**row, "regret": regret, "over_budget": int(over), "point": point})
    return rows


def summary(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """One line per choice over the cases that none of them refused."""
    refused = {(r["dataset"], r["budget_gb"]) for r in rows if r["regret"] is None}
    totals: list[dict[str, object]] = []
    for name in CHOICES:
        mine = [
            r for r in rows
            if r["choice"] == name and (r["dataset"], r["budget_gb"]) not in refused
        ]  # fmt: skip
        regrets = [float(str(r["regret"])) for r in mine]
        kept = [float(str(r["regret"])) for r in mine if not r.get("over_budget")]
        totals.append(
            {
                "choice": name, "cases": len(mine), "refused": len(refused),
                "mean_regret": mean(regrets), "median_regret": median(regrets),
                "over_budget": len(mine) - len(kept),
                "mean_regret_if_it_fits": mean(kept) if kept else 1.0,
            }
        )  # fmt: skip
    return totals


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench advise", description=__doc__)
    parser.add_argument("--save", action="store_true", help="append to bench/results/advise.csv")
    options = parser.parse_args(list(arguments))
    folder = os.environ.get("SRSWEEP_SHARED")
    if not folder:
        print("SRSWEEP_SHARED is unset: the published grids are not on this machine")
        return 2
    rows = regret_rows(load_replays(Path(folder) / "paper" / "experiments.csv"))
    print(measure.table(rows))
    totals = summary(rows)
    print(measure.table(totals))
    if options.save:
        measure.save("advise", rows)
    return 0
