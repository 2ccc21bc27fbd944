"""The memory model against measured training steps, and against the published runs.

Our own: every loss and model on prepared datasets, a few optimizer steps each, peak memory as the
trainer's probe reports it; each figure is predicted with its own configuration left out. Published:
calibrated on the other runs of the dataset, and on the other datasets.
"""

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench import measure
from bench.search import SHAPES, load_replays
from db.measures import EvaluationRecord, HistogramRecord, StepRecord
from db.spec import FULL_LOSSES, RunSpec
from sweeper.memory_model import MemoryModel, Shape, calibrate
from sweeper.search.history import read_history
from sweeper.search.space import MEMORY
from trainer.data.dataset import Dataset, load_dataset
from trainer.loop import TrainingInterrupted, TrainOptions, train

STEPS = 6


class _Peaks:
    """Recorder that keeps the peak of every step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def step(self, record: StepRecord) -> None:
        self.bytes.append(record.peak_bytes or 0)

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        pass

    def histogram(self, record: HistogramRecord) -> None:
        pass


def shape_of(dataset: Dataset) -> Shape:
    """Sizes of a prepared dataset."""
    quantiles = dataset.meta["train_sequence_length"]["quantiles"]
    return Shape.from_quantiles(dataset.num_items, quantiles)


def specs(dataset: str, model: str, losses: Sequence[str]) -> Iterator[RunSpec]:
    """Small and large settings of every loss."""
    sizes = itertools.product((64, 256), (32, 128), (64, 256))
    for (batch_size, max_seq_len, width), loss in itertools.product(sizes, losses):
        for negatives in (None,) if loss in (*FULL_LOSSES, "sce") else (1,) if loss == "bce" else (
            16, 256,
        ):  # fmt: skip
            yield RunSpec(
                dataset=dataset, model=model, loss=loss, batch_size=batch_size,  # type: ignore[arg-type]
                max_seq_len=max_seq_len, embedding_dim=width, num_negatives=negatives,
                precision="fp32", max_epochs=1,
            )  # fmt: skip


def peak_bytes(spec: RunSpec, dataset: Dataset, device: str) -> int:
    """Peak training memory over the first steps of a run."""
    peaks = _Peaks()
    options = TrainOptions(should_stop=lambda: len(peaks.bytes) >= STEPS)
    try:
        result = train(spec, dataset, peaks, device, options=options)
    except TrainingInterrupted:
        return max(peaks.bytes)
    return result.peak_train_memory_bytes or max(peaks.bytes)


def published_rows(path: Path) -> list[dict[str, object]]:
    """Relative errors on the published runs, by dataset."""
    replays = load_replays(path)
    rows: list[dict[str, object]] = []
    for replay in replays:
        inside = calibrate(*_columns([replay]), padded=True)
        others = calibrate(*_columns([r for r in replays if r is not replay]), padded=True)
        points, shapes, peaks = _columns([replay])
        away = [
            others.predict(p, s).bytes / y - 1
            for p, s, y in zip(points, shapes, peaks, strict=True)
        ]
        rows.append(_row(replay.name, "same dataset, run left out", inside.relative_errors))
        rows.append(_row(replay.name, "other datasets only", away))
    return rows


def _columns(replays: Sequence[object]) -> tuple[list[RunSpec], list[Shape], list[float]]:
    points, shapes, peaks = [], [], []
    for replay in replays:
        for spec, answer in replay.answers.items():  # type: ignore[attr-defined]
            points.append(spec)
            shapes.append(SHAPES[spec.dataset])
            peaks.append(float(answer.values[MEMORY]))
    return points, shapes, peaks


def _row(runs: str, calibrated_on: str, errors: Sequence[float]) -> dict[str, object]:
    sizes = np.abs(errors)
    return {
        "runs": runs, "calibrated_on": calibrated_on, "num_runs": len(errors),
        "median_error": float(np.median(sizes)), "p90_error": float(np.quantile(sizes, 0.9)),
        "median_bias": float(np.median(errors)),
    }  # fmt: skip


def own_rows(
    folders: Sequence[Path], models: Sequence[str], losses: Sequence[str], device: str
) -> tuple[list[dict[str, object]], MemoryModel]:
    """Relative errors on steps measured now, by loss and over all."""
    points, shapes, peaks = [], [], []
    for folder in folders:
        dataset = load_dataset(folder)
        for model in models:
            for spec in specs(dataset.name, model, losses):
                points.append(spec)
                shapes.append(shape_of(dataset))
                peaks.append(float(peak_bytes(spec, dataset, device)))
                print(json.dumps({**spec.non_default(), "peak_bytes": peaks[-1]}), flush=True)
    rows = []
    for model, loss in itertools.product(models, losses):
        chosen = [i for i, p in enumerate(points) if p.loss == loss and p.model == model]
        fitted = calibrate(
            [points[i] for i in chosen], [shapes[i] for i in chosen], [peaks[i] for i in chosen]
        )
        rows.append(_row(f"{model} {loss}", "same loss, run left out", fitted.relative_errors))
    fitted = calibrate(points, shapes, peaks)
    rows.append(_row("all", "all losses, run left out", fitted.relative_errors))
    return rows, fitted


def database_rows(url: str) -> list[dict[str, object]]:
    """Relative errors on the finished runs of a database, seeds averaged, by loss and over all."""
    history = read_history(url).on_device(None)
    peaks: dict[RunSpec, list[float]] = {}
    for runs in history.runs.values():
        for observation in (run.observation for run in runs):
            value = observation.value(MEMORY)
            if value is not None and observation.spec.dataset in history.shapes:
                spec = dataclasses.replace(observation.spec, seed=0)
                peaks.setdefault(spec, []).append(value)
    found = list(peaks)
    rows = []
    for loss in (*sorted({spec.loss for spec in found}), None):
        chosen = [spec for spec in found if loss in (None, spec.loss)]
        fitted = calibrate(
            chosen,
            [history.shapes[spec.dataset] for spec in chosen],
            [float(np.mean(peaks[spec])) for spec in chosen],
        )
        rows.append(
            _row(f"own {loss or 'all'}", "point left out, seeds averaged", fitted.relative_errors)
        )
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--data", default="data/demo,data/movietweetings", help="prepared datasets")
    parser.add_argument("--models", default="sasrec,bert4rec")
    parser.add_argument("--losses", default="bce,bce_plus,gbce,ce,ce_minus,cce,cce_minus,sce")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--published", action="store_true", help="only the published runs")
    parser.add_argument("--database", default=None, help="finished runs instead of new steps")
    parser.add_argument("--save", action="store_true", help="append to bench/results/memory.csv")
    options = parser.parse_args(list(arguments))
    rows: list[dict[str, object]] = []
    if os.environ.get("SRSWEEP_SHARED"):
        rows += published_rows(Path(os.environ["SRSWEEP_SHARED"]) / "paper" / "experiments.csv")
    if options.database:
        rows += database_rows(options.database)
    elif not options.published:
        folders = [Path(name) for name in options.data.split(",")]
        own, fitted = own_rows(
            folders, options.models.split(","), options.losses.split(","), options.device
        )
        rows += own
        print({name: round(factor, 3) for name, factor in fitted.factors.items()})
    print(measure.table(rows))
    if options.save:
        measure.save("memory", rows)
    return 0
