"""The runs that the paper published: `experiments.csv` and `data.xlsx` of its repository.

Both hold one row per run; the workbook adds loss curves and runs that the CSV leaves out. Runs
without a number of negatives are the full cross-entropy.
"""

import csv
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.errors import SpecError, TransferError
from db.imported import ForeignRun, ImportCounts, put_foreign
from db.measures import KS, METRICS, metric_column
from db.spec import RunSpec, paper_profile
from db.store import DatasetRecord, source_fingerprint

SOURCE = "paper"
"""`runs.source` of the paper's runs, and first part of its datasets' fingerprints."""
DEVICE_CLASS = "NVIDIA A100 (as published)"
CURVE_SPACING = 50
"""Optimizer steps from one point of a published loss curve to the next."""
GIB = 2**30

_REQUIRED = (
    "dataset", "model", "batch_size", "loss_sample_count", "max_seq_len", "seed", "exp_name",
    "run_training_epoch", "run_training_batch", "max_allocated_memory",
)  # fmt: skip
_METRIC_NAMES = {
    "ndcg": "NDCG", "hit_rate": "HitRate", "recall": "Recall", "precision": "Precision",
    "mrr": "MRR", "map": "MAP", "coverage": "Coverage", "surprisal": "Surprisal",
}  # fmt: skip
_METRIC_COLUMNS = {
    metric_column(metric, k): f"{_METRIC_NAMES[metric]}_{k}_test" for metric in METRICS for k in KS
}
_LOSSES = {"ce": "ce", "cem": "ce_minus", "cce": "cce", "ccem": "cce_minus", "bce": "bce",
           "sce": "sce"}  # fmt: skip
_TABLE_2: dict[str, tuple[int, int, int]] = {
    "movielens_20m": (15_000, 138_000, 12_181_000),
    "beauty": (176_000, 674_000, 5_028_000),
    "gowalla": (309_000, 85_000, 4_661_000),
    "zvuk": (893_000, 371_000, 243_412_000),
    "30music": (909_000, 44_000, 25_639_000),
    "megamarket": (1_661_000, 350_000, 114_846_000),
}
"""Items, users and interactions as Table 2 of the paper prints them, in thousands."""


@dataclass(frozen=True)
class PublishedRuns:
    """What a published file holds."""

    runs: tuple[ForeignRun, ...]
    datasets: tuple[DatasetRecord, ...]
    notes: tuple[str, ...]
    """What was odd about the file."""
    sha256: str


def import_paper(
    url: str, path: Path, *, sweep: str | None = None
) -> tuple[ImportCounts, PublishedRuns]:
    """Read a published file into the run database; importing it again changes nothing.

    Parameters
    ----------
    url : str
        Run database.
    path : Path
        `experiments.csv` or `data.xlsx`.
    sweep : str, optional
        Sweep to list the runs under; `paper:<file name>` by default.

    Raises
    ------
    TransferError
        Not such a file; the text names row and column.
    StoreError
        The database cannot be written.
    """
    found = read_paper(path)
    counts = put_foreign(
        url,
        sweep or f"{SOURCE}:{path.name}",
        f"imported from {path.name}, SHA-256 {found.sha256}",
        found.datasets,
        found.runs,
    )
    return counts, found


def read_paper(path: Path) -> PublishedRuns:
    """Read a published file.

    Repeated points become replicates 0, 1, ... in the order of the file. Memory is the peak over
    training and evaluation together and time includes evaluation: both are named
    `published_mixed`.

    Raises
    ------
    TransferError
        Not such a file; the text names row and column.
    """
    digest = _sha256(path)
    runs: list[ForeignRun] = []
    seen: Counter[tuple[str, str]] = Counter()
    for number, row in _rows(path):
        place = f"{path.name}, row {number}"
        spec = _spec(row, place)
        fingerprint = source_fingerprint(SOURCE, spec.dataset)
        point = (fingerprint, repr(spec))
        runs.append(
            ForeignRun(
                spec=spec,
                fingerprint=fingerprint,
                replicate=seen[point],
                source=SOURCE,
                device_class=DEVICE_CLASS,
                summary=_summary(row, place),
                provenance={
                    "file": path.name, "sha256": digest, "row": number,
                    "exp_name": row["exp_name"],
                },
                curve=_curve(row, place),
            )
        )  # fmt: skip
        seen[point] += 1
    if not runs:
        raise TransferError(f"{path.name} holds no run below its header")
    repeats = sum(run.replicate > 0 for run in runs)
    notes = [f"{repeats} rows repeat a point and are kept as replicates."] if repeats else []
    renamed = sum(
        run.spec.num_negatives is None and str(run.provenance["exp_name"]).endswith("m")
        for run in runs
    )
    if renamed:
        notes.append(
            f"{renamed} rows named as a sampled loss have no number of negatives and count as the "
            "full loss."
        )
    return PublishedRuns(tuple(runs), _datasets(runs, path.name, digest), tuple(notes), digest)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}; give the published file") from None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of each row in the file, from 2 below the header, and its cells by column."""
    lines = _workbook_lines(path) if path.suffix.lower() == ".xlsx" else _csv_lines(path)
    header = [str(name) if name is not None else "" for name in next(lines, [])]
    missing = [name for name in (*_REQUIRED, *_METRIC_COLUMNS.values()) if name not in header]
    if missing:
        raise TransferError(
            f"{path.name} lacks the columns {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}; 'import paper' reads "
            "experiments.csv and data.xlsx, other files go through 'srsweep import csv'"
        )
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header):
            raise TransferError(
                f"{path.name}, row {number}: {len(cells)} cells under {len(header)} columns"
            )
        yield number, dict(zip(header, cells, strict=True))


def _csv_lines(path: Path) -> Iterator[Sequence[Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.reader(file)


def _workbook_lines(path: Path) -> Iterator[Sequence[Any]]:
    import zipfile

    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise TransferError(f"{path.name} is not a readable workbook ({error})") from None
    try:
        yield from book.worksheets[0].iter_rows(values_only=True)
    finally:
        book.close()


def _spec(row: Mapping[str, Any], place: str) -> RunSpec:
    negatives = _number(row, "loss_sample_count", place, missing_ok=True)
    if negatives is not None and math.isinf(negatives):
        negatives = None
    model = str(row["model"])
    word = str(row["exp_name"]).rsplit("_", 1)[-1]
    loss = _LOSSES.get(word)
    if negatives is None and loss in {"ce_minus", "cce_minus"}:
        loss = loss.removesuffix(
            "_minus"
        )  # Gowalla's full-catalog runs are named like sampled ones
    if loss is None:
        raise TransferError(
            f"{place}, column exp_name: {row['exp_name']!r} ends in none of "
            f"{', '.join('_' + name for name in _LOSSES)}"
        )
    values = {
        "dataset": str(row["dataset"]),
        "model": model,
        "loss": loss,
        "batch_size": _whole(row, "batch_size", place),
        "max_seq_len": _whole(row, "max_seq_len", place),
        "num_negatives": None if negatives is None else int(negatives),
        "seed": _whole(row, "seed", place),
        "precision": "fp16",
        **paper_profile(model, loss),
    }
    if loss == "ce" and negatives is not None:
        raise TransferError(
            f"{place}, column loss_sample_count: {negatives:g} negatives with the full "
            "cross-entropy of exp_name"
        )
    try:
        return RunSpec.from_mapping(values)
    except SpecError as error:
        raise TransferError(f"{place}: {error}") from None


def _summary(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    memory = _number(row, "max_allocated_memory", place)
    if not 1e-3 <= memory < 1e4:
        raise TransferError(
            f"{place}, column max_allocated_memory: {memory:g} is no number of GiB that a GPU has; "
            "the published files give GiB"
        )
    epochs = _numbers(row, "train_loss_epoch_val", place)
    return {
        "memory_source": "published_mixed",
        "time_source": "published_mixed",
        "timing": None,
        "peak_train_memory_bytes": round(memory * GIB),
        "epoch_seconds": _number(row, "run_training_epoch", place),
        "step_seconds": _number(row, "run_training_batch", place),
        "num_epochs": len(epochs) or None,
        "final_loss": epochs[-1] if epochs else None,
        **{
            ours: _finite(_number(row, theirs, place, missing_ok=True))
            for ours, theirs in _METRIC_COLUMNS.items()
        },
    }


def _curve(row: Mapping[str, Any], place: str) -> list[tuple[int, int, float | None]]:
    """Loss at every fiftieth optimizer step; epochs divide the curve evenly.

    The file does not say where an epoch ends. The logger wrote after steps 50, 100, ...: the
    first point is step 49 counted from 0.
    """
    losses = _numbers(row, "train_loss_step_val", place)
    epochs = max(1, len(_numbers(row, "train_loss_epoch_val", place)))
    return [
        ((number + 1) * CURVE_SPACING - 1, number * epochs // len(losses), _finite(loss))
        for number, loss in enumerate(losses)
    ]


def _numbers(row: Mapping[str, Any], column: str, place: str) -> list[float]:
    text = row.get(column)
    if text is None or text == "":
        return []
    try:
        return [float(word) for word in str(text).split()]
    except ValueError as error:
        word = re.search(r"'(.*)'", str(error))
        raise TransferError(
            f"{place}, column {column}: {word.group(1) if word else text!r} is not a number"
        ) from None


def _number(row: Mapping[str, Any], column: str, place: str, *, missing_ok: bool = False) -> Any:
    value = row[column]
    if value is None or value == "":
        if missing_ok:
            return None
        raise TransferError(f"{place}, column {column}: the number is missing")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TransferError(f"{place}, column {column}: {value!r} is not a number") from None
    if not missing_ok and not math.isfinite(number):
        raise TransferError(f"{place}, column {column}: {number} is not a finite number")
    return number


def _whole(row: Mapping[str, Any], column: str, place: str) -> int:
    number = _number(row, column, place)
    if number != int(number):
        raise TransferError(f"{place}, column {column}: {number:g} is not a whole number")
    return int(number)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _datasets(runs: Sequence[ForeignRun], file: str, digest: str) -> tuple[DatasetRecord, ...]:
    records = []
    for name in dict.fromkeys(run.spec.dataset for run in runs):
        items, users, interactions = _TABLE_2.get(name, (None, None, None))
        records.append(
            DatasetRecord(
                name=name,
                fingerprint=source_fingerprint(SOURCE, name),
                num_users=users,
                num_items=items,
                num_interactions=interactions,
                details={
                    "source": SOURCE,
                    "file": file,
                    "sha256": digest,
                    "counts": "rounded to thousands, as the paper's Table 2 prints them",
                },
            )
        )
    return tuple(records)
