"""What is put into the run database and read back from it, as plain values."""

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from db.spec import AttemptStatus, RunSpec, RunStatus, run_key


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """A prepared or published dataset."""

    name: str
    fingerprint: str
    """64 hex digits; of imported datasets `source_fingerprint`."""
    num_users: int | None = None
    num_items: int | None = None
    """Catalog V: the items of the training events."""
    num_items_filtered: int | None = None
    """Items after filtering, those without a training event included."""
    num_interactions: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """Content of `dataset.json`."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A point that is asked for."""

    spec: RunSpec
    """With a resolved precision."""
    fingerprint: str
    """Of the dataset, which the database already knows."""
    replicate: int = 0

    @property
    def key(self) -> str:
        """Identity of the run; see `db.spec.run_key`."""
        return run_key(self.spec, self.fingerprint, self.replicate)


@dataclass(frozen=True, kw_only=True)
class SweepCounts:
    """What `put_sweep` found: new runs, known ones still to do, and those with a final status."""

    new: int
    known: int
    final: int

    @property
    def total(self) -> int:
        """Runs of the grid, each counted once."""
        return self.new + self.known + self.final


@dataclass(frozen=True, kw_only=True)
class StoredSweep:
    """A sweep and how many of its runs have each status."""

    name: str
    grid: str
    created_at: datetime.datetime
    launched_at: datetime.datetime
    counts: Mapping[RunStatus, int]


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as the database knows it, with its last attempt."""

    key: str
    spec: RunSpec
    replicate: int
    status: RunStatus
    reason: str | None
    skipped_by: str | None
    num_attempts: int
    last_attempt_status: AttemptStatus | None
    last_error_class: str | None
    last_error_message: str | None
    last_device_class: str | None


@dataclass(frozen=True, kw_only=True)
class StoredAttempt:
    """One try at a run."""

    number: int
    status: AttemptStatus
    device_class: str
    timing: str | None
    host: str | None
    pid: int | None
    started_at: datetime.datetime
    heartbeat_at: datetime.datetime | None
    lease_until: datetime.datetime | None
    ended_at: datetime.datetime | None
    last_step: int | None
    error_class: str | None
    error_message: str | None
    requested_bytes: int | None
    allocated_bytes: int | None
    total_bytes: int | None


def source_fingerprint(source: str, dataset: str) -> str:
    """Fingerprint of a dataset known only by its name in a source: SHA-256 of `source:name`."""
    return hashlib.sha256(f"{source}:{dataset}".encode()).hexdigest()
