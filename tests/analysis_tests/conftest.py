"""Frames shaped as `db.query.summary_frame`, and the paper's runs read from the reference data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SweepFrame = Callable[..., pd.DataFrame]


def make_sweep(
    *,
    datasets: tuple[str, ...] = ("demo",),
    batch_sizes: tuple[int, ...] = (32, 128, 512),
    lengths: tuple[int, ...] = (16, 64),
    negatives: tuple[int | None, ...] = (8, 64, 512, None),
    seeds: tuple[int, ...] = (42,),
    quality: Callable[[int, int, float], float] | None = None,
    noise: float = 0.0005,
) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    quality = quality or (
        lambda bs, sl, ns: 0.01 + 0.004 * np.log2(bs) + 0.002 * np.log2(sl) + 0.001 * np.log2(ns)
    )
    rows = []
    for dataset in datasets:
        for bs in batch_sizes:
            for sl in lengths:
                for ns in negatives:
                    for seed in seeds:
                        value = quality(bs, sl, ns or 5000) + rng.normal(0, noise)
                        rows.append(
                            {
                                "run_key": f"{len(rows):064x}",
                                "dataset": dataset,
                                "model": "sasrec",
                                "loss": "ce_minus" if ns else "ce",
                                "batch_size": bs,
                                "max_seq_len": sl,
                                "num_negatives": float("nan") if ns is None else float(ns),
                                "seed": seed,
                                "replicate": 0,
                                "status": "done",
                                "source": "own",
                                "device_class": "cpu",
                                "memory_source": "resident",
                                "time_source": "training_only",
                                "num_items": 5000.0,
                                "peak_train_memory_bytes": 3e8 + 40.0 * bs * sl * (ns or 5000),
                                "epoch_seconds": 1 + bs * sl / 1e4,
                                "ndcg_at_10": value,
                                "coverage_at_10": 3 * value + rng.normal(0, noise),
                                "surprisal_at_10": 0.3 + value + rng.normal(0, noise),
                            }
                        )
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def sweep_frame() -> SweepFrame:
    """Builder of a generated sweep with a known law of quality."""
    return make_sweep


@pytest.fixture(scope="session")
def paper_frame(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The paper's 1,557 runs, imported into a database without their curves and read back."""
    from db.imported import put_foreign
    from db.query import summary_frame
    from db.transfer_paper import read_paper

    found = read_paper(shared / "paper" / "data.xlsx")
    url = f"sqlite:///{tmp_path_factory.mktemp('paper')}/paper.db"
    runs = [replace(run, curve=()) for run in found.runs]
    put_foreign(url, "paper", "test", found.datasets, runs)
    return summary_frame(url)
