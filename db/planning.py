"""What the planner of a sweep asks the database, and how it ends attempts known to be gone.

A lease that runs out says for certain that a worker is gone, but a minute late. A planner that
sees that a process of its own host is dead, or that stopped its workers itself, need not wait.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from db import leases
from db.connect import parse_url, reading, translated, write_engine
from db.schema import attempts, events, run_summary, runs, sweep_runs, sweeps, utc_in
from db.spec import AttemptStatus, RunStatus

_DRAIN = "drain"
_WHERE = ("host", "pid", "versions")


@dataclass(frozen=True)
class RunningAttempt:
    """An attempt that the database believes to be running."""

    attempt_id: int
    run_key: str
    host: str | None
    pid: int | None
    versions: dict[str, str] = field(default_factory=dict)


class SweepView:
    """The state of one sweep, in short read-only transactions.

    Parameters
    ----------
    url : str
        Run database.
    sweep : str
        Name of the sweep.

    Raises
    ------
    StoreError
        From every method, when the database cannot be reached.
    """

    def __init__(self, url: str, sweep: str) -> None:
        self._url = url
        self._sweep = sweep
        self._engine: Engine = write_engine(parse_url(url))

    def statuses(self) -> dict[str, RunStatus]:
        """Status of each run by key, in the order of the grid."""
        rows = self._rows(
            self._of_sweep(sa.select(runs.c.run_key, runs.c.status)).order_by(
                sweep_runs.c.position, runs.c.id
            )
        )
        return {row.run_key: RunStatus(row.status) for row in rows}

    def running_attempts(self) -> list[RunningAttempt]:
        """Attempts that have not ended."""
        columns = [attempts.c.id, runs.c.run_key, *(attempts.c[n] for n in _WHERE)]
        rows = self._rows(
            self._of_sweep(sa.select(*columns)).where(attempts.c.status == AttemptStatus.RUNNING),
        )
        return [
            RunningAttempt(row.id, row.run_key, row.host, row.pid, json.loads(row.versions or "{}"))
            for row in rows
        ]

    def failures(self, launch_id: str) -> list[dict[str, Any]]:
        """Attempts of one launch that ended as error or lost, the oldest first.

        Each has run_key, status, error_class and error_message.
        """
        columns = [runs.c.run_key, attempts.c.status, attempts.c.error_class,
                   attempts.c.error_message]  # fmt: skip
        query = self._of_sweep(sa.select(*columns)).where(
            attempts.c.status.in_([AttemptStatus.ERROR, AttemptStatus.LOST]),
            _by(launch_id),
        )
        return [dict(row._mapping) for row in self._rows(query.order_by(attempts.c.id))]

    def cancelled_as(self, error_class: str) -> set[str]:
        """Keys of pending runs of which an attempt was cancelled with this error class."""
        query = self._of_sweep(sa.select(runs.c.run_key, attempts.c.id)).where(
            runs.c.status == RunStatus.PENDING,
            attempts.c.status == AttemptStatus.CANCELLED,
            attempts.c.error_class == error_class,
        )
        return {row.run_key for row in self._rows(query)}

    def num_attempts(self, launch_id: str) -> int:
        """Attempts of one launch, ended or not."""
        query = self._of_sweep(sa.select(sa.func.count(attempts.c.id))).where(_by(launch_id))
        return int(self._rows(query)[0][0])

    def best(self, metric: str) -> float | None:
        """Highest value of a column of `run_summary`."""
        column = sa.func.max(run_summary.c[metric])
        query = (
            sa.select(column)
            .join(sweep_runs, sweep_runs.c.run_id == run_summary.c.run_id)
            .join(sweeps, sweeps.c.id == sweep_runs.c.sweep_id)
            .where(sweeps.c.name == self._sweep)
        )
        value = self._rows(query)[0][0]
        return None if value is None else float(value)

    def out_of_memory_devices(self) -> dict[str, tuple[str, int | None]]:
        """Device class and its memory of the last attempt that ran out of memory, by run key."""
        columns = [runs.c.run_key, attempts.c.device_class, attempts.c.device_memory_bytes]
        query = self._of_sweep(sa.select(*columns)).where(
            attempts.c.status == AttemptStatus.OUT_OF_MEMORY
        )
        rows = self._rows(query.order_by(attempts.c.id))
        return {row.run_key: (row.device_class, row.device_memory_bytes) for row in rows}

    def last_event(self) -> int:
        """Number of the newest event; what comes later is news."""
        return int(self._rows(sa.select(sa.func.coalesce(sa.func.max(events.c.id), 0)))[0][0])

    def stop_requested(self, since: int) -> bool:
        """Whether somebody asked to drain this sweep after an event number."""
        query = sa.select(events.c.details).where(events.c.id > since, events.c.kind == _DRAIN)
        asked = [json.loads(row.details or "{}").get("sweep") for row in self._rows(query)]
        return self._sweep in asked

    def request_stop(self) -> None:
        """Ask every launch of the sweep to let its running runs finish and start no more."""
        with translated(self._url), self._engine.begin() as connection:
            leases.log_event(connection, _DRAIN, details={"sweep": self._sweep})

    def _of_sweep(self, query: sa.Select[Any]) -> sa.Select[Any]:
        source: sa.FromClause = runs.join(sweep_runs, sweep_runs.c.run_id == runs.c.id).join(
            sweeps, sweeps.c.id == sweep_runs.c.sweep_id
        )
        if attempts in query.get_final_froms():
            source = source.join(attempts, attempts.c.run_id == runs.c.id)
        return query.select_from(source).where(sweeps.c.name == self._sweep)

    def _rows(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        with translated(self._url), reading(self._engine) as connection:
            return list(connection.execute(query).all())


def _by(launch_id: str) -> sa.ColumnElement[bool]:
    return attempts.c.versions.contains(json.dumps(launch_id), autoescape=True)


def end_attempts(
    url: str, attempt_ids: Sequence[int], status: AttemptStatus, reason: str
) -> list[str]:
    """End running attempts from outside; their workers, should they live after all, are fenced.

    Parameters
    ----------
    url : str
        Run database.
    attempt_ids : sequence of int
        Attempts to end; those that ended meanwhile are left alone.
    status : AttemptStatus
        `lost` or `cancelled`.
    reason : str
        One line for the attempt and the event log.

    Returns
    -------
    list of str
        Keys of the runs, pending again.

    Raises
    ------
    StoreError
        The database cannot be written.
    """
    engine = write_engine(parse_url(url))
    keys = []
    for attempt_id in attempt_ids:
        with translated(url), engine.begin() as connection:
            key = _end(connection, attempt_id, status, reason)
        if key is not None:
            keys.append(key)
    return keys


def _end(connection: Connection, attempt_id: int, status: AttemptStatus, reason: str) -> str | None:
    key = connection.scalar(
        sa.select(runs.c.run_key)
        .join(attempts, attempts.c.run_id == runs.c.id)
        .where(attempts.c.id == attempt_id)
    )
    if key is None:
        return None
    run = leases.lock_run(connection, key)
    values = {
        "status": status,
        "ended_at": utc_in(),
        "lease_until": None,
        "error_class": status.value,
        "error_message": leases.clip(reason),
    }
    ended = connection.execute(
        attempts.update()
        .where(attempts.c.id == attempt_id, attempts.c.status == AttemptStatus.RUNNING)
        .values(values)
    )
    if ended.rowcount != 1:
        return None
    leases.set_run(connection, run.id, RunStatus.PENDING)
    details = {"reason": reason}
    leases.log_event(
        connection, status.value, run_id=run.id, attempt_id=attempt_id, details=details
    )
    return str(key)
