"""Advice for a dataset that was never run, tested on the published runs: leave one dataset out.

Regret: how much of the best published NDCG@10 within the budget the advised point misses. Beside
it two habits: copy the best point of the most similar dataset, and take the largest batch size
that fits. A point that turns out not to fit counts as a regret of 1.
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
from sweeper.advise import Budget, advise_new, dissimilarity
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
    "largest batch size that fits": largest_batch,
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
                    rows.append({**row, "regret": 1.0, "point": f"refused: {error}"[:80]})
                    continue
                answer = target.answers[dataclasses.replace(spec)]
                over = (answer.value(MEMORY) or 0) > budget
                regret = 1.0 if over else 1 - (answer.value(QUALITY) or 0) / best
                point = f"{spec.batch_size}/{spec.max_seq_len}/{spec.num_negatives}"
                rows.append({**row, "regret": regret, "over_budget": int(over), "point": point})
    return rows


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
    totals = []
    for name in CHOICES:
        mine = [r for r in rows if r["choice"] == name]
        regrets = [float(str(r["regret"])) for r in mine]
        over = sum(int(str(r.get("over_budget", 0))) for r in mine)
        totals.append(
            {
                "choice": name, "cases": len(mine), "mean_regret": mean(regrets),
                "median_regret": median(regrets), "worst": max(regrets), "over_budget": over,
            }
        )  # fmt: skip
    print(measure.table(totals))
    if options.save:
        measure.save("advise", rows)
    return 0
