"""How a grid is carried out, and how a launch of it ended."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from db.connect import parse_url, sqlite_path
from db.spec import RunStatus
from sweeper.grid import Resources
from sweeper.plan import (
    RetryLimits,
)
from sweeper.progress import Snapshot


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a grid is carried out; nothing here changes a result."""

    database: str = dataclasses.field(repr=False)
    data_dir: Path
    """Folder of prepared datasets."""
    address: str | None = None
    """Ray cluster; None starts a local Ray."""
    resources: Resources | None = None
    """In place of the grid's own."""
    cpus: float | None = None
    """CPU cores that a local Ray may use; None is all."""
    gpus: float | None = None
    """GPUs that a local Ray may use; None is all."""
    max_concurrent: int | None = None
    """Most runs at a time."""
    retries: RetryLimits = dataclasses.field(default_factory=RetryLimits)
    retry_failed: bool = False
    """Try failed runs again."""
    retry_out_of_memory: bool = False
    """Try runs again that did not fit, and those skipped for it: this device is larger."""
    prune: bool = True
    """Skip runs that need at least the memory of one that did not fit."""
    lease_seconds: float = 60.0
    """A worker that has not been heard of for so long is lost."""
    poll_seconds: float = 2.0
    send_datasets: bool = False
    """Send the datasets to nodes of a cluster that do not have them."""
    early_stopping: bool = True
    """Let the grid's scheduler, if it names one, cut runs short."""
    stall_seconds: float | None = 1800.0
    """A run whose training reports nothing for so long is ended and tried again."""
    reuse_workers: bool = True
    """Let a CPU worker process take one run after another; on GPUs each has its own."""
    away_seconds: float = 3600.0
    """How long the planner waits for a run database that went away."""
    spool_dir: Path | None = None
    """Where rows wait while the database is away; None is beside it or in the user's state."""
    step_rows_every: int = 1
    trainer: str = "trainer.loop:train"


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    snapshot: Snapshot
    interrupted_by: int | None = None
    """Signal that ended it."""
    drained: bool = False
    """Whether `srsweep stop` ended it."""

    @property
    def exit_code(self) -> int:
        """0 when every run is final and none failed, 128 + signal when interrupted, else 1."""
        if self.interrupted_by is not None:
            return 128 + self.interrupted_by
        unfinished = self.snapshot.final < self.snapshot.total
        return int(unfinished or bool(self.snapshot.counts.get(RunStatus.FAILED, 0)))


def default_spool_dir(database: str) -> Path:
    """Folder for rows that cannot be written: beside a SQLite file, else in the user's state.

    Each database has its own, so that rows never reach another one.
    """
    path = sqlite_path(database)
    if path is not None:
        return path.resolve().with_name(path.name + ".spool")
    url = parse_url(database)
    place = f"{url.host}:{url.port or 5432}/{url.database}"
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "srsweep" / "spool" / hashlib.sha256(place.encode()).hexdigest()[:12]
