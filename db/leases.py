"""Leases: who may write for a run. Statements of one transaction each, by the database's clock.

A lease is lost only when `expire` says so; a worker that comes back late but before that renews
it. Every transition of a run locks its row in `runs` first, then its attempts, so two of them
never wait for each other.
"""

import dataclasses
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from db import packed
from db.connect import redact
from db.errors import LostLeaseError, StoreError
from db.measures import RunResult
from db.rows import real, whole
from db.schema import (
    attempts,
    evaluations,
    events,
    histograms,
    run_summary,
    runs,
    spec_from_values,
    steps,
    utc_in,
)
from db.spec import AttemptStatus, RunSpec, RunStatus

MAX_ERROR_CHARACTERS = 4000


@dataclass(frozen=True)
class WorkerInfo:
    """Where an attempt runs and with what."""

    host: str
    pid: int
    device_class: str
    """Name and memory of the device; memory and time compare only within one."""
    device_memory_bytes: int | None = None
    timing: Literal["exclusive", "shared"] = "exclusive"
    """Whether the run had its device to itself."""
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True)
class Claim:
    """The right to run one attempt, until it ends or its lease is lost."""

    run_key: str
    spec: RunSpec
    replicate: int
    run_id: int
    attempt_id: int
    number: int
    """1 for the first attempt at the run."""
    token: str = field(repr=False)
    lease_seconds: float = 60.0


def insert_ignore(connection: Connection, table: sa.Table) -> Any:
    """INSERT of a table that leaves rows already there as they are."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    return postgresql.insert(table).on_conflict_do_nothing()


def log_event(
    connection: Connection,
    kind: str,
    *,
    run_id: int | None = None,
    attempt_id: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Append to `events`."""
    text = None if details is None else json.dumps(details, sort_keys=True, allow_nan=False)
    connection.execute(
        events.insert().values(
            run_id=run_id, attempt_id=attempt_id, at=utc_in(), kind=kind, details=text
        )
    )


def lock_run(connection: Connection, run_key: str) -> sa.Row[Any]:
    """The run's row, locked against other transitions until the transaction ends.

    Raises
    ------
    StoreError
        There is no such run.
    """
    query = sa.select(runs).where(runs.c.run_key == run_key).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        raise StoreError(f"run {run_key[:12]} is not in the database; put its sweep first")
    return row


def claim(
    connection: Connection, run_key: str, worker: WorkerInfo, lease_seconds: float
) -> Claim | None:
    """Begin an attempt; None when the run is final or running elsewhere.

    Raises
    ------
    StoreError
        There is no such run, or the lease is not positive.
    """
    if not lease_seconds > 0:
        raise StoreError(f"lease_seconds={lease_seconds} must be above 0")
    run = lock_run(connection, run_key)
    if RunStatus(run.status).is_final:
        return None
    before = connection.execute(
        sa.select(attempts.c.number, attempts.c.status).where(attempts.c.run_id == run.id)
    ).all()
    if any(row.status == AttemptStatus.RUNNING for row in before):
        return None
    token = uuid.uuid4().hex
    number = 1 + max((row.number for row in before), default=0)
    made = connection.execute(
        insert_ignore(connection, attempts)
        .values(
            run_id=run.id,
            number=number,
            status=AttemptStatus.RUNNING,
            token=token,
            lease_seconds=lease_seconds,
            lease_until=utc_in(lease_seconds),
            heartbeat_at=utc_in(),
            started_at=utc_in(),
            host=worker.host,
            pid=worker.pid,
            device_class=worker.device_class,
            device_memory_bytes=worker.device_memory_bytes,
            timing=worker.timing,
            versions=json.dumps(dict(worker.versions), sort_keys=True),
            git_commit=worker.git_commit,
        )
        .returning(attempts.c.id)
    ).one_or_none()
    if made is None:
        return None
    _set_run(connection, run.id, RunStatus.RUNNING)
    return Claim(
        run_key=run_key,
        spec=spec_from_values(dict(run._mapping)),
        replicate=run.replicate,
        run_id=run.id,
        attempt_id=made.id,
        number=number,
        token=token,
        lease_seconds=lease_seconds,
    )


def fence(connection: Connection, held: Claim, last_step: int | None = None) -> None:
    """Renew the lease; nothing may be written in a transaction that did not pass this.

    Raises
    ------
    LostLeaseError
        The attempt is no longer this worker's.
    """
    values: dict[str, Any] = {"lease_until": utc_in(held.lease_seconds), "heartbeat_at": utc_in()}
    if last_step is not None:
        known = sa.func.coalesce(attempts.c.last_step, -1)
        values["last_step"] = sa.case((known > last_step, known), else_=last_step)
    _update_mine(connection, held, values)


def _update_mine(connection: Connection, held: Claim, values: Mapping[str, Any]) -> None:
    mine = (
        attempts.update()
        .where(
            attempts.c.id == held.attempt_id,
            attempts.c.token == held.token,
            attempts.c.status == AttemptStatus.RUNNING,
        )
        .values(values)
    )
    if connection.execute(mine).rowcount != 1:
        raise LostLeaseError(
            f"attempt {held.number} at run {held.run_key[:12]} is no longer this worker's; "
            "it was ended or its lease ran out, so the worker stops"
        )


def finish(connection: Connection, held: Claim, result: RunResult) -> None:
    """End an attempt with a result: attempt, run and `run_summary` together.

    Raises
    ------
    LostLeaseError
        The attempt is no longer this worker's; nothing was written.
    StoreError
        As in `summary_values`.
    """
    lock_run(connection, held.run_key)
    _update_mine(
        connection,
        held,
        {
            "status": AttemptStatus(result.status.value),
            "ended_at": utc_in(),
            "lease_until": None,
            "error_class": _error_class(result),
            "error_message": clip(result.error),
            "requested_bytes": whole(result.requested_bytes),
            "allocated_bytes": whole(result.allocated_bytes),
            "total_bytes": whole(result.total_bytes),
        },
    )
    row = connection.execute(
        sa.select(attempts.c.device_class, attempts.c.timing).where(
            attempts.c.id == held.attempt_id
        )
    ).one()
    put_summary(
        connection,
        {
            "run_id": held.run_id,
            "device_class": row.device_class,
            "attempt_id": held.attempt_id,
            "timing": row.timing,
            "finished_at": utc_in(),
            **summary_values(result),
        },
    )
    _set_run(connection, held.run_id, result.status)


def put_summary(connection: Connection, values: Mapping[str, Any]) -> None:
    """Write the row of a run and device class, in place of an older one (an earlier result)."""
    connection.execute(
        run_summary.delete().where(
            run_summary.c.run_id == values["run_id"],
            run_summary.c.device_class == values["device_class"],
        )
    )
    connection.execute(run_summary.insert().values(dict(values)))
    packed.refresh(connection, values["run_id"])


def _error_class(result: RunResult) -> str | None:
    return None if result.status is RunStatus.DONE else result.status.value


def end(
    connection: Connection,
    held: Claim,
    status: AttemptStatus,
    error_class: str | None = None,
    message: str | None = None,
) -> None:
    """End an attempt without a result; its run is pending again until the planner decides.

    Why it was cancelled is the run's reason too, until its next attempt.

    Raises
    ------
    LostLeaseError
        The attempt is no longer this worker's.
    """
    lock_run(connection, held.run_key)
    _update_mine(
        connection,
        held,
        {
            "status": status,
            "ended_at": utc_in(),
            "lease_until": None,
            "error_class": error_class,
            "error_message": clip(message),
        },
    )
    reason = clip(message) if status is AttemptStatus.CANCELLED else None
    _set_run(connection, held.run_id, RunStatus.PENDING, reason=reason)


def inherit(connection: Connection, held: Claim, before_step: int) -> int:
    """Copy the rows below a step from the attempt before, for training that resumes there.

    Parameters
    ----------
    connection : sqlalchemy.engine.Connection
        In a transaction.
    held : Claim
        The resuming attempt.
    before_step : int
        First step that the resumed training takes itself.

    Returns
    -------
    int
        Step rows below `before_step` that the attempt has now.

    Raises
    ------
    LostLeaseError
        The attempt is no longer this worker's.
    """
    fence(connection, held)
    earlier = connection.scalars(
        sa.select(attempts.c.id)
        .where(attempts.c.run_id == held.run_id, attempts.c.number < held.number)
        .order_by(sa.func.coalesce(attempts.c.last_step, -1).desc(), attempts.c.number.desc())
        .limit(1)
    ).one_or_none()
    for table in (steps, evaluations, histograms):
        # an evaluation at step n ran after n steps, so it belongs to what came before
        limit = before_step if table is steps else before_step + 1
        columns = [column for column in table.c if column.name != "attempt_id"]
        rows = sa.select(sa.literal(held.attempt_id, sa.BigInteger()), *columns).where(
            table.c.attempt_id == earlier, table.c.step < limit
        )
        names = ["attempt_id", *(column.name for column in columns)]
        connection.execute(insert_ignore(connection, table).from_select(names, rows))
    return connection.scalars(
        sa.select(sa.func.count())
        .select_from(steps)
        .where(steps.c.attempt_id == held.attempt_id, steps.c.step < before_step)
    ).one()


def has_ended(connection: Connection, held: Claim, status: AttemptStatus) -> bool:
    """Whether the attempt has just this end, reached with this token."""
    found = connection.scalars(
        sa.select(attempts.c.status).where(
            attempts.c.id == held.attempt_id, attempts.c.token == held.token
        )
    ).one_or_none()
    return found == status


def expire(connection: Connection) -> list[str]:
    """End every running attempt whose lease ran out as lost; keys of their runs.

    After a restart of a PostgreSQL server every worker has one whole lease to report back:
    while the server was away nobody could renew.
    """
    overdue = sa.and_(attempts.c.status == AttemptStatus.RUNNING, attempts.c.lease_until < utc_in())
    if connection.dialect.name == "postgresql":
        started: sa.ColumnElement[float] = sa.literal_column(
            "extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())"
        )
        overdue = sa.and_(overdue, attempts.c.lease_seconds < started)
    found = connection.execute(
        sa.select(runs.c.id, runs.c.run_key)
        .where(runs.c.id.in_(sa.select(attempts.c.run_id).where(overdue)))
        .order_by(runs.c.id)
        .with_for_update(skip_locked=True)
    ).all()
    lost = []
    for run in found:
        ended = connection.execute(
            attempts.update()
            .where(attempts.c.run_id == run.id, overdue)
            .values(status=AttemptStatus.LOST, ended_at=utc_in(), error_class="lost")
            .returning(attempts.c.id)
        ).one_or_none()
        if ended is not None:
            _set_run(connection, run.id, RunStatus.PENDING)
            log_event(connection, "lost", run_id=run.id, attempt_id=ended.id)
            lost.append(run.run_key)
    return lost


def set_run(
    connection: Connection,
    run_id: int,
    status: RunStatus,
    *,
    reason: str | None = None,
    skipped_by: str | None = None,
) -> None:
    """Set the status of a run and why."""
    _set_run(connection, run_id, status, reason=reason, skipped_by=skipped_by)


def _set_run(connection: Connection, run_id: int, status: RunStatus, **values: Any) -> None:
    values = {"reason": None, "skipped_by": None, **values}
    connection.execute(
        runs.update()
        .where(runs.c.id == run_id)
        .values(status=status, updated_at=utc_in(), **values)
    )


def summary_values(result: RunResult) -> dict[str, Any]:
    """Columns of `run_summary` that a result fills.

    The peak of a run that ran out of memory is unknown; what it asked for bounds it from below
    (`memory_bound_bytes`).

    Raises
    ------
    StoreError
        A status that is no result, or a metric that is no column.
    """
    if result.status not in (RunStatus.DONE, RunStatus.DIVERGED, RunStatus.OUT_OF_MEMORY):
        raise StoreError(f"status={result.status.value!r} is no result of a run; end it with fail")
    values: dict[str, Any] = {}
    for column in run_summary.c:
        if hasattr(result, column.name):
            cast = real if isinstance(column.type, sa.Double) else whole
            value = getattr(result, column.name)
            values[column.name] = value if isinstance(column.type, sa.Text) else cast(value)
    for prefix, metrics in (("", result.test), ("validation_", result.validation)):
        for name, value in metrics.items():
            if f"{prefix}{name}" not in run_summary.c:
                raise StoreError(f"metric {name!r} is no column of run_summary; see db.measures")
            values[f"{prefix}{name}"] = real(value)
    values["status"] = result.status
    values["error"] = clip(result.error)
    if result.status is RunStatus.OUT_OF_MEMORY:
        values["peak_train_memory_bytes"] = None
        values["memory_bound_bytes"] = _memory_bound(result)
    return values


def _memory_bound(result: RunResult) -> int | None:
    if result.requested_bytes is not None and result.allocated_bytes is not None:
        return whole(result.requested_bytes + result.allocated_bytes)
    return whole(result.total_bytes)


def clip(text: str | None) -> str | None:
    """An error text fit for storing: no passwords, no NUL, bounded length."""
    return None if text is None else redact(text).replace("\x00", "")[:MAX_ERROR_CHARACTERS]


def result_from_dict(values: Mapping[str, Any]) -> RunResult:
    """Inverse of `dataclasses.asdict` for a RunResult that went through JSON."""
    return RunResult(**{**values, "status": RunStatus(values["status"])})


def result_to_dict(result: RunResult) -> dict[str, Any]:
    """Plain values of a result, NaN and infinities replaced by None."""
    values = dataclasses.asdict(result)
    for name, value in values.items():
        if isinstance(value, float):
            values[name] = real(value)
    values["test"] = {name: real(value) for name, value in result.test.items()}
    values["validation"] = {name: real(value) for name, value in result.validation.items()}
    return values
