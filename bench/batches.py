"""Milliseconds per training batch gathered from the items of the whole dataset.

`python -m bench batches` gathers batches of random users at the shapes of `bench trainer`, next to
slicing user by user, and prints figures only if both give the same batch.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from bench.measure import save, spread, table
from bench.trainer import SHAPES, make_sequences
from trainer.data.batches import IntArray


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench batches", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES][:2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="append to bench/results/batches.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for name in options.shapes for row in measure(name, options)]
    print(table(rows))
    if options.save:
        print(f"appended to {save('batches', rows)}")
    return 0


def measure(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one shape, a variant each.

    Raises
    ------
    SystemExit
        The variants give different batches.
    """
    sequences, spans, items = make_sequences(SHAPES[name], "sasrec", options.device)
    slices = _Slices(items, spans.starts, spans.ends, SHAPES[name].max_seq_len)
    generator = np.random.default_rng(11)
    users = [
        generator.choice(len(sequences), options.batch_size, replace=False)
        for _ in range(options.rounds)
    ]
    batch = sequences.batch(users[0])
    for found, wanted in zip((batch.items, batch.targets), slices(batch.users), strict=True):
        if found.tolist() != wanted.tolist():
            raise SystemExit(f"{name}: the batch is not that of slicing: no figures")
    variants: dict[str, Callable[[IntArray], object]] = {
        "gathered": sequences.batch,
        "sliced user by user": slices,
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for chosen in users:
        for variant, call in variants.items():
            begin = time.perf_counter()
            call(chosen)
            if options.device != "cpu":
                torch.cuda.synchronize()
            seconds[variant].append(time.perf_counter() - begin)
    tokens = median(int(sequences.lengths[chosen].sum()) for chosen in users)
    return [
        {
            "shape": name,
            "variant": variant,
            "users": options.batch_size,
            "tokens": tokens,
            "rounds": options.rounds,
            "milliseconds": 1e3 * median(taken),
            "milliseconds_20": 1e3 * spread(taken)[0],
            "milliseconds_least": 1e3 * min(taken),
        }
        for variant, taken in seconds.items()
    ]


class _Slices:
    """Inputs and targets of some users, from a slice of the items each."""

    def __init__(
        self, items: torch.Tensor, starts: IntArray, ends: IntArray, max_seq_len: int
    ) -> None:
        self._items, self._starts, self._ends = items, starts, ends
        self._max_seq_len = max_seq_len

    def __call__(self, users: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        kept = []
        for user in users:
            end = int(self._ends[user])
            begin = max(int(self._starts[user]), end - self._max_seq_len - 1)
            kept.append(self._items[begin:end])
        return torch.cat([k[:-1] for k in kept]).long(), torch.cat([k[1:] for k in kept]).long()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
