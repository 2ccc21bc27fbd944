"""Results kept from one report to the next, so that what did not change is not computed twice."""

import hashlib
import importlib.metadata
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd

Result = TypeVar("Result")
_LIBRARIES = ("numpy", "pandas", "scipy", "scikit-learn", "optuna", "moocore", "matplotlib")


class ResultCache:
    """Pickled results by what they were computed from.

    The key is the content of the frames, the options, the source of the analysis package and
    the versions of the libraries it computes with: a change of any of them computes anew.

    Parameters
    ----------
    folder : Path or None
        Where results are kept; None keeps nothing. The folder must be the user's own: a pickle
        is code.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.computed: list[str] = []
        """Names of what had to be computed, in order."""
        self._used: set[Path] = set()

    def get(self, name: str, inputs: tuple[object, ...], compute: Callable[[], Result]) -> Result:
        """The result of `compute`, from an earlier report where the inputs are the same."""
        if self.folder is None:
            self.computed.append(name)
            return compute()
        path = self.folder / f"{name}-{content_key(*inputs)[:32]}.pickle"
        self._used.add(path)
        if path.exists():
            try:
                kept: Result = pickle.loads(path.read_bytes())
            except (pickle.UnpicklingError, EOFError, AttributeError, ImportError):
                path.unlink()
            else:
                return kept
        self.computed.append(name)
        result = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(result))
        partial.replace(path)
        return result

    def prune(self) -> None:
        """Delete results that this report did not ask for."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.glob("*.pickle"):
                if path not in self._used:
                    path.unlink()


def content_key(*inputs: object) -> str:
    """SHA-256 of frames by content and of anything else by its text, with the code's version."""
    digest = hashlib.sha256(code_version().encode())
    for item in inputs:
        if isinstance(item, pd.DataFrame):
            digest.update("|".join(map(str, item.columns)).encode())
            digest.update(
                pd.util.hash_pandas_object(_plain(item), index=False).to_numpy().tobytes()
            )
        else:
            digest.update(repr(item).encode())
    return digest.hexdigest()


def code_version() -> str:
    """SHA-256 of the sources of this package and of the versions of its libraries."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in {".py", ".j2", ".csv", ".js", ".css"}:
            digest.update(path.read_bytes())
    for name in _LIBRARIES:
        digest.update(f"{name}={importlib.metadata.version(name)}".encode())
    return digest.hexdigest()


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that hash: anything but numbers as text."""
    columns = [frame.iloc[:, place] for place in range(frame.shape[1])]
    numeric = pd.api.types.is_numeric_dtype
    return pd.DataFrame(
        {
            place: column if numeric(column.dtype) else column.astype(str).astype(object)
            for place, column in enumerate(columns)
        }
    )
