"""The prepared datasets of a grid, and their rows in the run database."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from db.errors import DataError
from db.spec import RunSpec
from db.store import DatasetRecord


def open_datasets(points: Sequence[RunSpec], data_dir: Path) -> dict[str, Any]:
    """Open the prepared dataset of every point by name.

    Raises
    ------
    DataError
        One is not there; the text says what to type.
    """
    from trainer.data.dataset import load_dataset

    found = {}
    for name in dict.fromkeys(spec.dataset for spec in points):
        folder = data_dir / name
        if not folder.is_dir():
            raise DataError(
                f"dataset {name!r} is not prepared: there is no folder {folder}; make it with "
                f"'srsweep prepare --source ... --out {folder}' (or 'srsweep generate --out "
                f"{folder}'), or give --data-dir"
            )
        found[name] = load_dataset(folder)
    return found


def dataset_record(dataset: Any) -> DatasetRecord:
    """Row of `datasets` for a prepared dataset."""
    counts = dataset.meta["counts"]
    return DatasetRecord(
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        num_users=dataset.num_users,
        num_items=dataset.num_items,
        num_items_filtered=counts.get("num_items_filtered"),
        num_interactions=counts.get("num_rows"),
        details=dataset.meta,
    )
