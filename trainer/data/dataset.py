"""A prepared dataset: memory-mapped arrays that open in milliseconds and every run shares."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from db.errors import DataError

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

FORMAT_VERSION = 1
"""Layout of a prepared folder; another number asks for a new `srsweep prepare`."""

META_FILE = "dataset.json"

FINGERPRINTED = (
    "items",
    "offsets",
    "train",
    "validation",
    "test",
    "item_users",
    "test_history_item_users",
)
"""Arrays that training and evaluation see, in the order in which the fingerprint takes them."""

ARRAYS = (*FINGERPRINTED, "item_counts", "timestamps")
"""Every array file of a prepared folder, without the suffix `.npy`."""


@dataclass(frozen=True)
class SequenceSet:
    """Slices of `Dataset.items`, one per user, oldest item first."""

    users: Int64Array
    """Encoded users, shape (n,)."""
    starts: Int64Array
    """Position of each user's first item in `Dataset.items`, shape (n,)."""
    ends: Int64Array
    """Position after each user's last item, shape (n,); greater than the start."""

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> Int64Array:
        """Items of each user, shape (n,)."""
        return self.ends - self.starts


@dataclass(frozen=True)
class EvaluationSet(SequenceSet):
    """Histories to rank from, and the one held-out item of each user."""

    targets: Int64Array
    """Held-out item of each user, shape (n,)."""


@dataclass(frozen=True)
class Dataset:
    """Encoded interactions with their split, as `prepare` wrote them.

    Each user's items stand oldest first in `items[offsets[u]:offsets[u + 1]]`, restricted to the
    catalog; training, validation and test are slices of that array, so no row is stored twice.
    """

    name: str
    """Name under which runs refer to the dataset."""
    path: Path
    """Folder that holds the arrays."""
    fingerprint: str
    """SHA-256 over everything that training and evaluation see, 64 hex digits."""
    meta: dict[str, Any]
    """Contents of `dataset.json`."""
    num_items: int
    """Catalog V: items of the training events, numbered 0 to V-1 by first appearance."""
    num_users: int
    """Users that have at least one event on a catalog item."""
    num_train_users: int
    """Users of the training events."""
    items: Int32Array
    """Items of all users, one user after the other, shape (N,), memory-mapped."""
    offsets: Int64Array
    """User u owns `items[offsets[u]:offsets[u + 1]]`, shape (U + 1,)."""
    timestamps: Int64Array
    """Time of each row of `items` in the unit `meta["time_unit"]`, shape (N,), memory-mapped."""
    train: SequenceSet
    """Training sequences."""
    validation: EvaluationSet
    """Histories and targets of the validation users."""
    test: EvaluationSet
    """Histories and targets of the test users."""
    item_counts: Int64Array
    """Training rows of each item, shape (V,)."""
    item_users: Int64Array
    """Distinct training users of each item, shape (V,); none is zero."""
    num_test_history_users: int
    """Users whose histories form the paper's frame of Coverage and Surprisal."""
    test_history_item_users: Int64Array
    """Distinct users of each item in those histories, shape (V,)."""

    @functools.cached_property
    def item_ids(self) -> npt.NDArray[Any]:
        """Original id of each item, shape (V,), int64 or strings; read at first use."""
        return _load_ids(self.path, "item_ids", self.num_items)

    @functools.cached_property
    def user_ids(self) -> npt.NDArray[Any]:
        """Original id of each user, shape (U,), int64 or strings; read at first use."""
        return _load_ids(self.path, "user_ids", self.num_users)


def load_dataset(path: str | Path) -> Dataset:
    """Open a prepared folder; arrays are mapped, not read, so this takes milliseconds.

    Parameters
    ----------
    path : str or Path
        Folder that `srsweep prepare` wrote.

    Raises
    ------
    DataError
        The folder is missing, incomplete, damaged or of another format version.
    """
    folder = Path(path)
    meta = _load_meta(folder)
    counts = meta["counts"]
    num_items, num_users, num_rows = counts["num_items"], counts["num_users"], counts["num_rows"]
    arrays = {
        name: _map_array(folder, name, shape)
        for name, shape in {
            "items": (num_rows,),
            "timestamps": (num_rows,),
            "offsets": (num_users + 1,),
            "train": (3, counts["num_train_users"]),
            "validation": (4, counts["num_validation_users"]),
            "test": (4, counts["num_test_users"]),
            "item_counts": (num_items,),
            "item_users": (num_items,),
            "test_history_item_users": (num_items,),
        }.items()
    }
    return Dataset(
        name=meta["name"],
        path=folder,
        fingerprint=meta["fingerprint"],
        meta=meta,
        num_items=num_items,
        num_users=num_users,
        num_train_users=counts["num_train_users"],
        items=arrays["items"],
        offsets=arrays["offsets"],
        timestamps=arrays["timestamps"],
        train=SequenceSet(*arrays["train"]),
        validation=EvaluationSet(*arrays["validation"]),
        test=EvaluationSet(*arrays["test"]),
        item_counts=arrays["item_counts"],
        item_users=arrays["item_users"],
        num_test_history_users=counts["num_test_history_users"],
        test_history_item_users=arrays["test_history_item_users"],
    )


def compute_fingerprint(folder: Path, num_test_history_users: int) -> str:
    """SHA-256 over the arrays that training and evaluation see, read in blocks.

    Parameters
    ----------
    folder : Path
        Prepared folder.
    num_test_history_users : int
        The one scalar of evaluation that no array holds.
    """
    digest = hashlib.sha256(f"srsweep dataset {FORMAT_VERSION}".encode())
    digest.update(f" {num_test_history_users}".encode())
    for name in FINGERPRINTED:
        digest.update(f" {name} ".encode())
        with (folder / f"{name}.npy").open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def check_dataset(dataset: Dataset) -> None:
    """Read every array of a dataset and compare its fingerprint with the recorded one.

    Raises
    ------
    DataError
        The arrays are not those that `prepare` wrote.
    """
    found = compute_fingerprint(dataset.path, dataset.num_test_history_users)
    if found != dataset.fingerprint:
        raise DataError(
            f"dataset {dataset.name!r} in {dataset.path} has changed since it was prepared: "
            f"fingerprint {found[:12]}, {META_FILE} says {dataset.fingerprint[:12]}; "
            "prepare it again"
        )


def _load_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(
            f"no prepared dataset at {folder}; make one with 'srsweep prepare --out {folder}'"
        )
    path = folder / META_FILE
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a prepared dataset ({META_FILE} is missing); "
            "give the folder that 'srsweep prepare --out' wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the dataset again") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder} was prepared in format {version}, this srsweep reads {FORMAT_VERSION}; "
            "prepare it again"
        )
    return meta


def _map_array(folder: Path, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    # An empty file cannot be mapped; such an array is read instead.
    mode: Literal["r"] | None = None if 0 in shape else "r"
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; prepare the dataset again") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the dataset again") from None
    if array.shape != shape:
        raise DataError(
            f"{path} has shape {array.shape}, {META_FILE} says {shape}; prepare the dataset again"
        )
    # Plain ndarrays: a memmap's indexing pays for its subclass on every batch.
    return array.view(np.ndarray)


def _load_ids(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    if (folder / f"{name}.npy").exists():
        return _map_array(folder, name, (size,))
    path = folder / f"{name}.json"
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the dataset again") from None
    if len(texts) != size:
        raise DataError(f"{path} has {len(texts)} ids, not {size}; prepare the dataset again")
    return np.array(texts, dtype=np.dtypes.StringDType())
