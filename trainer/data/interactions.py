"""Interactions on their way from a source to a prepared dataset: chunks, id codes, the log."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Interactions:
    """Events in memory, one row each, in any order."""

    users: Int64Array
    """User of each event, shape (n,)."""
    items: Int64Array
    """Item of each event, shape (n,)."""
    timestamps: Int64Array
    """Time of each event, shape (n,)."""

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Chunk:
    """Some consecutive valid rows of a source."""

    users: Any
    """User ids: pyarrow array of int64 or string, shape (n,)."""
    items: Any
    """Item ids: pyarrow array of int64 or string, shape (n,)."""
    timestamps: Int64Array
    """Time of each row, shape (n,)."""

    def __len__(self) -> int:
        return len(self.timestamps)


@dataclass
class ReadReport:
    """What a source saw while it was read; complete once its chunks are exhausted."""

    file: str = "the input"
    """Name of the file for messages."""
    id_type: Literal["auto", "int", "string"] = "string"
    """`auto`: text ids become whole numbers if all of them are."""
    num_raw_rows: int = 0
    """Rows of the file, headers apart."""
    num_bad_rows: int = 0
    """Rows that could not be used."""
    bad_rows: list[str] = field(default_factory=list)
    """The first bad rows in words, with their line numbers."""
    num_selected_rows: int = 0
    """Valid rows that passed the source's selection (a rating threshold, a kind of event)."""
    time_unit: str = "unknown"
    """Unit of the timestamps: s, ms, us, ns or unknown."""
    warnings: list[str] = field(default_factory=list)
    """What a user should know about the data."""


class Source(Protocol):
    """Where interactions come from."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `dataset.json` records about the source."""
        ...

    def chunks(self) -> tuple[Iterator[Chunk], ReadReport]:
        """Rows in order, and the report that fills while they are read."""
        ...


@dataclass(frozen=True)
class InteractionsSource:
    """Interactions that are in memory already, as a source."""

    interactions: Interactions
    """The events."""
    settings: dict[str, Any] = field(default_factory=lambda: {"source": "memory"})
    """What `dataset.json` records about them."""
    chunk_rows: int = 1 << 22
    """Rows per chunk."""

    def chunks(self) -> tuple[Iterator[Chunk], ReadReport]:
        """Rows in order, and the report that fills while they are read."""
        report = ReadReport()
        return self._iterate(report), report

    def _iterate(self, report: ReadReport) -> Iterator[Chunk]:
        events = self.interactions
        for start in range(0, len(events), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            chunk = Chunk(
                pa.array(events.users[rows]),
                pa.array(events.items[rows]),
                np.asarray(events.timestamps[rows], dtype=np.int64),
            )
            report.num_raw_rows += len(chunk)
            report.num_selected_rows += len(chunk)
            yield chunk


LOOKUP_LIMIT = 1 << 26
"""Whole-number ids below it are numbered through a table of at most 256 MiB, others by hashing."""


class IdEncoder:
    """Numbers ids 0, 1, ... in order of first appearance, chunk by chunk."""

    def __init__(self) -> None:
        self._tables: list[Any] = []
        self._size = 0
        self._lookup: Int32Array | None = np.full(1024, -1, dtype=np.int32)

    def __len__(self) -> int:
        return self._size

    def encode(self, ids: Any) -> Int32Array:
        """Codes of some rows; ids not seen before get the next numbers.

        Parameters
        ----------
        ids : pyarrow.Array, shape (n,)
            int64 or string without nulls, the same type in every call.

        Returns
        -------
        ndarray, shape (n,), int32
        """
        if self._lookup is not None and len(ids):
            if pa.types.is_integer(ids.type):
                numbers = ids.to_numpy(zero_copy_only=False)
                if numbers.min() >= 0 and numbers.max() < LOOKUP_LIMIT:
                    return self._look_up(numbers)
            self._lookup = None
        encoded = pc.dictionary_encode(ids)
        distinct = encoded.dictionary
        known = self.table()
        if known is None:
            codes = np.full(len(distinct), -1, dtype=np.int32)
        else:
            found = pc.index_in(distinct, value_set=known)
            codes = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int32)
        new = np.flatnonzero(codes < 0)
        codes[new] = self._add(distinct.take(pa.array(new)))
        result: Int32Array = codes[encoded.indices.to_numpy(zero_copy_only=False)]
        return result

    def table(self) -> Any:
        """The ids by code: pyarrow array of int64 or string, None before the first row."""
        if len(self._tables) > 1:
            self._tables = [pa.concat_arrays(self._tables)]
        return self._tables[0] if self._tables else None

    def _look_up(self, numbers: Int64Array) -> Int32Array:
        lookup = self._lookup
        assert lookup is not None
        if numbers.max() >= len(lookup):
            size = min(LOOKUP_LIMIT, 2 * int(numbers.max()) + 1)
            lookup = np.concatenate([lookup, np.full(size - len(lookup), -1, dtype=np.int32)])
            self._lookup = lookup
        codes: Int32Array = lookup[numbers]
        new = np.flatnonzero(codes < 0)
        if len(new):
            unseen = numbers[new]
            places = np.arange(len(unseen), dtype=np.int32)
            # Of several assignments to one place the last one holds: go backwards.
            lookup[unseen[::-1]] = places[::-1]
            distinct = unseen[lookup[unseen] == places]
            lookup[distinct] = self._add(pa.array(distinct))
            codes[new] = lookup[unseen]
        return codes

    def _add(self, ids: Any) -> Int32Array:
        """The next codes, given to distinct ids not seen before."""
        if len(ids):
            self._tables.append(ids)
        self._size += len(ids)
        return np.arange(self._size - len(ids), self._size, dtype=np.int32)


BLOCK_ROWS = 1 << 21
"""Rows worked on at a time: small enough for caches, large enough for vectors."""

_COLUMNS: tuple[tuple[str, type[np.generic]], ...] = (
    ("users", np.int32),
    ("items", np.int32),
    ("times", np.int64),
)

Block = tuple[Int32Array, Int32Array, Int64Array]


class InteractionLog:
    """Rows of (user code, item code, time) in order: in memory, or in files past a limit.

    Parameters
    ----------
    folder : Path
        Where rows go that memory must not hold; made when first needed.
    memory_rows : int
        Rows kept in memory; beyond them all go to files.
    in_files : bool
        Whether rows go to files from the first one on.
    """

    def __init__(self, folder: Path, memory_rows: int, *, in_files: bool = False) -> None:
        self._folder = folder
        self._memory_rows = memory_rows
        self._chunks: list[Block] = []
        self._spilled = in_files
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def spilled(self) -> bool:
        """Whether the rows are in files."""
        return self._spilled

    def append(self, users: Int32Array, items: Int32Array, times: Int64Array) -> None:
        """Add rows after those that are there."""
        self._size += len(users)
        self._chunks.append((users, items, times))
        if self._spilled or self._size > self._memory_rows:
            self._spill()

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Number of the first row, and the columns, of consecutive blocks of rows."""
        if not self._spilled:
            start = 0
            for block in self._chunks:
                yield start, block
                start += len(block[0])
            return
        size = min(self._memory_rows, BLOCK_ROWS)
        for start in range(0, self._size, size):
            count = min(size, self._size - start)
            users, items, times = (
                # Read, not mapped: touched pages of a mapping would count as resident memory.
                np.fromfile(self._folder / name, dtype, count, offset=start * dtype().itemsize)
                for name, dtype in _COLUMNS
            )
            yield start, (users, items, times)

    def clear(self) -> None:
        """Forget all rows and remove their files."""
        self._chunks = []
        self._size = 0
        if self._spilled and self._folder.exists():
            for name, _ in _COLUMNS:
                (self._folder / name).unlink()
            self._folder.rmdir()

    def _spill(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for block in self._chunks:
            for (name, dtype), column in zip(_COLUMNS, block, strict=True):
                with (self._folder / name).open("ab") as file:
                    np.ascontiguousarray(column, dtype=dtype).tofile(file)
        self._chunks = []
        self._spilled = True
