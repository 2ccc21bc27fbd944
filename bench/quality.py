"""Quality of our SASRec beside replay-rec's, trained on the identical split.

Both see the same prepared arrays, sizes, learning rate, dropout, patience and seeds; network,
initialisation and order of the users are each library's own. The peer runs in an environment that
has `replay-rec[torch]`.
"""

import argparse
import functools
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench.measure import save, table
from db.measures import EvaluationRecord, HistogramRecord, StepRecord
from db.spec import RunSpec
from trainer.data.dataset import load_dataset
from trainer.loop import train

_OPTIONS = (
    "batch_size", "max_seq_len", "embedding_dim", "dropout_rate", "learning_rate", "max_epochs",
    "patience",
)  # fmt: skip
"""Fields of a run that the command line sets."""
_DEFAULTS = ("num_blocks", "num_heads")
"""Fields that the peer is told besides."""


def main(arguments: Sequence[str] = ()) -> int:
    """Train, print a row per library and seed, and save them."""
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared dataset")
    parser.add_argument("--peer-python", help="interpreter that has replay-rec[torch]")
    parser.add_argument("--losses", nargs="*", default=["cce"], help="of ours, without negatives")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-seq-len", type=int, default=50)
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--dropout-rate", type=float, default=0.3)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--max-epochs", type=int, default=30)
    parser.add_argument("--patience", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="append to bench/results/quality.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for seed in options.seeds:
        base = {name: getattr(options, name) for name in _OPTIONS} | {"seed": seed}
        jobs: list[Callable[[], dict[str, object]]] = [
            functools.partial(ours, options.data, loss, base) for loss in options.losses
        ]
        if options.peer_python:
            jobs.append(functools.partial(theirs, options, base))
        for job in jobs:
            row = job()
            print(f"seed {seed}: {row}", flush=True)
            rows.append({"dataset": options.data.name, **base, **row})
    print(table(summary(rows)))
    if options.save:
        print(f"saved to {save('quality', rows)}")
    return 0


def ours(folder: Path, loss: str, base: dict[str, Any]) -> dict[str, object]:
    """Test metrics of a run of ours."""
    dataset = load_dataset(folder)
    result = train(RunSpec(dataset=dataset.name, loss=loss, **base), dataset, _Nothing())
    return {
        "library": "srsweep",
        "loss": loss,
        "ndcg_at_10": result.test["ndcg_at_10"],
        "ndcg_at_10_se": result.test["ndcg_at_10_se"],
        "hit_rate_at_10": result.test["hit_rate_at_10"],
    }


def theirs(options: argparse.Namespace, base: dict[str, Any]) -> dict[str, object]:
    """Test metrics of replay-rec's network, the best of its validations.

    Raises
    ------
    SystemExit
        The peer's process failed.
    """
    spec = RunSpec(dataset=options.data.name, loss="ce", **base)
    job = base | {name: getattr(spec, name) for name in _DEFAULTS} | {
        "threads": options.threads, "loss": "ce", "num_negatives": None,
    }  # fmt: skip
    program = Path(__file__).with_name("_peer_quality.py")
    done = subprocess.run(
        [options.peer_python, str(program), str(options.data), json.dumps(job)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    test = json.loads(done.stdout.splitlines()[-1])
    return {
        "library": "replay-rec",
        "loss": "ce",
        "ndcg_at_10": test["ndcg"],
        "ndcg_at_10_se": test["ndcg_se"],
        "hit_rate_at_10": test["hit_rate"],
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """Mean over the seeds of each library and loss, with the spread of the seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["library"], row["loss"]), []).append(row)
    return [
        {
            "library": library,
            "loss": loss,
            "seeds": len(found),
            "ndcg_at_10": mean(r["ndcg_at_10"] for r in found),
            "over_users_se": mean(r["ndcg_at_10_se"] for r in found),
            "over_seeds_sd": stdev(r["ndcg_at_10"] for r in found) if len(found) > 1 else None,
            "hit_rate_at_10": mean(r["hit_rate_at_10"] for r in found),
        }
        for (library, loss), found in groups.items()
    ]


class _Nothing:
    """Takes rows and keeps none."""

    def step(self, record: StepRecord) -> None:
        """Forget a step."""

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        """Forget an evaluation."""

    def histogram(self, record: HistogramRecord) -> None:
        """Forget a histogram."""
