"""What could not be written yet: one fsynced, append-only JSONL file per attempt on local disk.

The first line is the claim, each further one a batch of rows or the end of the attempt. A writer
holds a lock on its file for as long as it lives, so a replay by another process leaves it alone.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from db.errors import StoreError
from db.leases import Claim
from db.rows import Batch
from db.spec import RunSpec

SUFFIX = ".spool"
FENCED_SUFFIX = ".fenced"
_CHUNK_ROWS = 5000


class Spool:
    """Spool of one attempt; the file is made by the first append.

    Parameters
    ----------
    folder : pathlib.Path
        On a local disk; made when needed.
    held : Claim
        The attempt; its token goes into the file, which only its owner may read.
    """

    def __init__(self, folder: Path, held: Claim) -> None:
        self.path = folder / f"{held.attempt_id}-{held.token}{SUFFIX}"
        self._held = held
        self._file: IO[bytes] | None = None

    def __bool__(self) -> bool:
        """Whether anything waits here."""
        return self._file is not None

    def append(self, batch: Batch) -> None:
        """Add rows; they are on disk when this returns.

        Raises
        ------
        OSError
            The disk is full or gone; the file is as before, and the rows stay with the caller.
        """
        for start in range(0, max(len(batch.steps), 1), _CHUNK_ROWS):
            line: dict[str, Any] = {"steps": batch.steps[start : start + _CHUNK_ROWS]}
            if start == 0:
                line |= {"evaluations": batch.evaluations, "histograms": batch.histograms}
            self._write({"rows": line})

    def append_end(self, kind: str, content: Mapping[str, Any]) -> None:
        """Add how the attempt ended (`finish`, `fail`, `cancel`), after its last rows.

        Raises
        ------
        OSError
            The disk is full or gone.
        """
        self._write({kind: dict(content)})

    def batches(self) -> Iterator[Batch]:
        """Rows in the order they were added."""
        if self._file is not None:
            for line in read_lines(self.path):
                if "rows" in line:
                    yield batch_of(line["rows"])

    def discard(self) -> None:
        """Remove the file: everything in it is in the database."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self.close()

    def fenced(self) -> None:
        """Set the file aside: the attempt was lost, and none of this may enter the database."""
        if self._file is not None:
            set_aside(self.path)
            self.close()

    def close(self) -> None:
        """Release the file; what is in it waits for a replay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        file = self._file or self._open()
        good = file.tell()
        data = json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            # half a line must not stand before the next one
            file.seek(good)
            file.truncate(good)
            raise

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        # unbuffered: a failed write leaves nothing behind that a later flush would try again
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            try:
                self._write({"attempt": dataclasses.asdict(self._held)})
            except OSError:
                self.path.unlink(missing_ok=True)
                self.close()
                raise
        return self._file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a spool; a last line torn by a crash is left out.

    Raises
    ------
    StoreError
        A damaged line before the last.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise StoreError(
                    f"{path.name}, line {number}: not a spool line; move the file away to go on"
                ) from None


def batch_of(rows: Mapping[str, Any]) -> Batch:
    """Rows of one spool line."""
    return Batch(
        steps=[tuple(row) for row in rows.get("steps", ())],
        evaluations=[tuple(row) for row in rows.get("evaluations", ())],
        histograms=[tuple(row) for row in rows.get("histograms", ())],
    )


def claim_of(line: Mapping[str, Any]) -> Claim:
    """The claim in the first line of a spool."""
    values = dict(line["attempt"])
    return Claim(**{**values, "spec": RunSpec(**values["spec"])})


def waiting(folder: Path) -> list[Path]:
    """Spools of a folder that nobody writes, oldest first."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
        found.append(path)
    return found


def set_aside(path: Path) -> Path:
    """Rename a spool whose attempt was lost, for a person to look at."""
    return path.rename(path.with_suffix(FENCED_SUFFIX))
