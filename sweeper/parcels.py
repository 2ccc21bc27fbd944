"""Prepared datasets for nodes that do not have them, through Ray's object store.

The driver puts each file in pieces; the first worker of a node that needs the dataset writes them
to a folder of that node, checks them, and renames the folder into place. The others find it there.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.errors import DataError

PIECE_BYTES = 64 * 2**20
_KEPT = 32
"""Characters of a fingerprint that name a folder."""


@dataclass(frozen=True)
class File:
    """One file of a prepared folder."""

    name: str
    sha256: str
    pieces: tuple[Any, ...]
    """References to its bytes, in order."""


@dataclass(frozen=True)
class Parcel:
    """A prepared dataset in the object store."""

    fingerprint: str
    files: tuple[File, ...]


def send(folder: Path, fingerprint: str, put: Callable[[bytes], Any] | None = None) -> Parcel:
    """Put a prepared dataset into the object store.

    Parameters
    ----------
    folder : Path
        Folder that `srsweep prepare` wrote.
    fingerprint : str
        Of the dataset.
    put : callable, optional
        Stores bytes and returns a reference; `ray.put` by default.
    """
    put = put or _ray().put
    files = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest, pieces = hashlib.sha256(), []
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                pieces.append(put(piece))
        files.append(File(path.name, digest.hexdigest(), tuple(pieces)))
    return Parcel(fingerprint, tuple(files))


def receive(
    parcel: Parcel, cache: Path | None = None, get: Callable[[Any], bytes] | None = None
) -> Path:
    """Folder of this node with the dataset of a parcel, written by whoever comes first.

    Parameters
    ----------
    parcel : Parcel
        What the driver sent.
    cache : Path, optional
        Folder of this node for datasets; `default_cache()` by default.
    get : callable, optional
        Returns the bytes of a reference; `ray.get` by default.

    Raises
    ------
    DataError
        What arrived is not what was sent, or cannot be written; nothing is left of it.
    """
    cache = cache or default_cache()
    target = cache / parcel.fingerprint[:_KEPT]
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _write(parcel, target, get or _ray().get)
    except OSError as error:
        raise DataError(
            f"the dataset that the launch sent cannot be written to {cache}: {error.strerror}; "
            "make room there, or set XDG_CACHE_HOME on this node"
        ) from error
    return target


def default_cache() -> Path:
    """The user's cache of datasets on this node."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "srsweep" / "datasets"


def is_here(path: str, fingerprint: str) -> bool:
    """Whether a folder of this node holds a dataset."""
    from trainer.data.dataset import load_dataset

    try:
        return load_dataset(path).fingerprint == fingerprint
    except DataError:
        return False


def _write(parcel: Parcel, target: Path, get: Callable[[Any], bytes]) -> None:
    from trainer.data.dataset import check_dataset, load_dataset

    prefix = f".{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)  # of a worker that was killed while it wrote
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        for file in parcel.files:
            if Path(file.name).name != file.name:
                raise DataError(f"{file.name!r} is no name of a file in a prepared dataset")
            _write_file(partial / file.name, file.sha256, map(get, file.pieces))
        dataset = load_dataset(partial)
        check_dataset(dataset)
        if dataset.fingerprint != parcel.fingerprint:
            raise DataError(
                f"dataset {dataset.name!r} arrived with fingerprint {dataset.fingerprint[:12]}, "
                f"{parcel.fingerprint[:12]} was sent; launch again"
            )
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_file(path: Path, sha256: str, pieces: Iterable[bytes]) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != sha256:
        raise DataError(f"{path.name} of a dataset was damaged on its way here; launch again")


def _ray() -> Any:
    import ray

    return ray
