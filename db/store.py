"""RunStore: the write side of the run database, for planners and workers alike.

Every method is one short transaction and may be repeated without harm.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db import leases, migrate, replay
from db.connect import parse_url, reading, shown, translated, write_engine
from db.errors import StoreError
from db.leases import Claim, WorkerInfo
from db.records import (
    DatasetRecord,
    PlannedRun,
    StoredAttempt,
    StoredRun,
    StoredSweep,
    SweepCounts,
    source_fingerprint,
)
from db.schema import (
    OWN,
    attempts,
    datasets,
    run_summary,
    runs,
    spec_from_values,
    spec_values,
    sweep_runs,
    sweeps,
    utc_in,
)
from db.spec import AttemptStatus, RunStatus
from db.writer import RunWriter

__all__ = [
    "Claim",
    "DatasetRecord",
    "PlannedRun",
    "RunStore",
    "StoredAttempt",
    "StoredRun",
    "StoredSweep",
    "SweepCounts",
    "WorkerInfo",
    "source_fingerprint",
]

_KEYS_PER_QUERY = 500


class RunStore:
    """The run database, opened for writing; holds no connection between calls.

    Raises
    ------
    StoreError
        From every method, when the database cannot be reached or written.
    """

    def __init__(self, url: str) -> None:
        self.url = str(url)
        self._engine = write_engine(parse_url(url))

    def __repr__(self) -> str:
        return f"RunStore({shown(self.url)!r})"

    @classmethod
    def open(cls, url: str, *, upgrade: bool = False) -> Self:
        """Open a run database; a new or empty one gets its tables.

        Parameters
        ----------
        url : str
            `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/DATABASE`.
        upgrade : bool
            Bring an older schema up to date.

        Raises
        ------
        SchemaVersionError
            An older schema (without `upgrade`) or a newer one.
        StoreError
            The database cannot be reached or written.
        """
        store = cls(url)
        with translated(url):
            migrate.ensure(store._engine, upgrade=upgrade)
        return store

    def put_dataset(self, record: DatasetRecord) -> None:
        """Make a dataset known; one with the same fingerprint stays as it is."""
        values = {
            "name": record.name,
            "fingerprint": record.fingerprint,
            "num_users": record.num_users,
            "num_items": record.num_items,
            "num_items_filtered": record.num_items_filtered,
            "num_interactions": record.num_interactions,
            "details": json.dumps(dict(record.details), sort_keys=True, allow_nan=False),
            "created_at": utc_in(),
        }
        with translated(self.url), self._engine.begin() as connection:
            connection.execute(leases.insert_ignore(connection, datasets).values(values))

    def put_sweep(self, name: str, grid_text: str, planned: Sequence[PlannedRun]) -> SweepCounts:
        """Record a sweep and its runs; runs of other sweeps with the same key are shared.

        Parameters
        ----------
        name : str
            A known name gets the new grid text, and the runs in addition to those it has.
        grid_text : str
            The grid as the user wrote it.
        planned : sequence of PlannedRun
            Repeated keys count once.

        Raises
        ------
        StoreError
            A dataset was not put before.
        """
        by_key = {run.key: run for run in planned}
        with translated(self.url), self._engine.begin() as connection:
            before = _statuses(connection, list(by_key))
            _insert_runs(connection, by_key)
            sweep_id = _put_sweep_row(connection, name, grid_text)
            _link(connection, sweep_id, list(by_key))
            final = sum(RunStatus(status).is_final for status in before.values())
        return SweepCounts(new=len(by_key) - len(before), known=len(before) - final, final=final)

    def sweeps(self) -> list[StoredSweep]:
        """All sweeps, the last launched first."""
        counted = (
            sa.select(sweep_runs.c.sweep_id, runs.c.status, sa.func.count().label("num"))
            .join(runs, runs.c.id == sweep_runs.c.run_id)
            .group_by(sweep_runs.c.sweep_id, runs.c.status)
        )
        with translated(self.url), reading(self._engine) as connection:
            counts: dict[int, dict[RunStatus, int]] = {}
            for row in connection.execute(counted):
                counts.setdefault(row.sweep_id, {})[RunStatus(row.status)] = row.num
            rows = connection.execute(
                sa.select(sweeps).order_by(sweeps.c.launched_at.desc(), sweeps.c.id)
            ).all()
        return [
            StoredSweep(
                name=row.name,
                grid=row.grid,
                created_at=row.created_at,
                launched_at=row.launched_at,
                counts=counts.get(row.id, {}),
            )
            for row in rows
        ]

    def sweep_runs(
        self, sweep: str, statuses: Sequence[RunStatus] | None = None
    ) -> list[StoredRun]:
        """Runs of a sweep in the order of its grid.

        Raises
        ------
        StoreError
            There is no such sweep.
        """
        query = (
            _stored_runs()
            .join(sweep_runs, sweep_runs.c.run_id == runs.c.id)
            .join(sweeps, sweeps.c.id == sweep_runs.c.sweep_id)
            .where(sweeps.c.name == sweep)
            .order_by(sweep_runs.c.position, runs.c.id)
        )
        if statuses is not None:
            query = query.where(runs.c.status.in_([RunStatus(s) for s in statuses]))
        with translated(self.url), reading(self._engine) as connection:
            found = connection.execute(query).all()
            names = list(connection.scalars(sa.select(sweeps.c.name)))
        if sweep not in names:
            raise StoreError(f"no sweep {sweep!r}; known are {', '.join(sorted(names)) or 'none'}")
        return [_stored_run(row) for row in found]

    def run(self, key: str) -> StoredRun:
        """One run.

        Raises
        ------
        StoreError
            There is no such run.
        """
        with translated(self.url), reading(self._engine) as connection:
            row = connection.execute(_stored_runs().where(runs.c.run_key == key)).one_or_none()
        if row is None:
            raise StoreError(f"no run {key!r} in {shown(self.url)}; `srsweep runs` lists them")
        return _stored_run(row)

    def attempts(self, key: str) -> list[StoredAttempt]:
        """All attempts at a run, the first first."""
        names = list(StoredAttempt.__dataclass_fields__)
        query = (
            sa.select(*(attempts.c[name] for name in names))
            .join(runs, runs.c.id == attempts.c.run_id)
            .where(runs.c.run_key == key)
            .order_by(attempts.c.number)
        )
        with translated(self.url), reading(self._engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [StoredAttempt(**{**row, "status": AttemptStatus(row["status"])}) for row in rows]

    def claim(self, key: str, worker: WorkerInfo, *, lease_seconds: float = 60.0) -> Claim | None:
        """Begin an attempt; None when the run is final or running elsewhere.

        Raises
        ------
        StoreError
            There is no such run.
        """
        with translated(self.url), self._engine.begin() as connection:
            return leases.claim(connection, key, worker, lease_seconds)

    def expire_leases(self) -> list[str]:
        """End attempts whose lease ran out by the database's clock; keys of their runs.

        Replay the spools at hand first: a worker that finished while the database was away has
        left its result there.
        """
        with translated(self.url), self._engine.begin() as connection:
            return leases.expire(connection)

    def reset(self, key: str) -> None:
        """Make a run pending again, for another attempt or a larger device.

        Raises
        ------
        StoreError
            The run is done, which is immutable, or running.
        """
        with translated(self.url), self._engine.begin() as connection:
            run = leases.lock_run(connection, key)
            if run.status in (RunStatus.DONE, RunStatus.RUNNING):
                raise StoreError(
                    f"run {key[:12]} is {run.status}; only runs that did not end well are reset"
                )
            if run.status != RunStatus.PENDING:
                leases.set_run(connection, run.id, RunStatus.PENDING)
                leases.log_event(connection, "reset", run_id=run.id, details={"from": run.status})

    def give_up(
        self, key: str, status: RunStatus, reason: str, *, proven_by: str | None = None
    ) -> None:
        """Close a pending run without a result: `failed`, or `skipped` by the run that proves it.

        Parameters
        ----------
        key : str
            The run.
        status : RunStatus
            `failed` or `skipped`.
        reason : str
            One line for the user.
        proven_by : str, optional
            Key of the run that ran out of memory and is dominated by this one; its bound on the
            memory becomes this run's.

        Raises
        ------
        StoreError
            Another status, a skipped run without proof, or a run that is running or has a result.
        """
        if status not in (RunStatus.FAILED, RunStatus.SKIPPED):
            raise StoreError(f"give_up with status={status.value!r}; use 'failed' or 'skipped'")
        if (status is RunStatus.SKIPPED) != (proven_by is not None):
            raise StoreError("a skipped run names the run that proves it (proven_by), others none")
        with translated(self.url), self._engine.begin() as connection:
            run = leases.lock_run(connection, key)
            if run.status == status:
                return
            if run.status != RunStatus.PENDING:
                raise StoreError(f"run {key[:12]} is {run.status}; only pending runs are given up")
            text = leases.clip(reason)
            leases.set_run(connection, run.id, status, reason=text, skipped_by=proven_by)
            leases.log_event(connection, status.value, run_id=run.id, details={"reason": text})
            if proven_by is not None:
                _inherit_bound(connection, run.id, proven_by)

    def inherit_steps(self, held: Claim, before_step: int) -> int:
        """Copy the rows below a step from the attempt before, for training that resumes there.

        Replay the spools at hand first. Returns the step rows that the attempt has below
        `before_step`: fewer than the training took mean that it must start anew.

        Raises
        ------
        LostLeaseError
            The attempt is no longer this worker's.
        """
        with translated(self.url), self._engine.begin() as connection:
            return leases.inherit(connection, held, before_step)

    def writer(
        self,
        held: Claim,
        *,
        spool_dir: Path | str,
        flush_seconds: float = 1.0,
        patience_seconds: float = 60.0,
    ) -> RunWriter:
        """Recorder for the attempt of a claim; see `db.writer.RunWriter`."""
        return RunWriter(
            self.url,
            held,
            spool_dir=Path(spool_dir),
            flush_seconds=flush_seconds,
            patience_seconds=patience_seconds,
        )

    def replay_spools(self, spool_dir: Path | str) -> replay.ReplayCounts:
        """Write what workers on this host could not; spools of living workers are left alone.

        Raises
        ------
        StoreError
            The database is still away, or a spool is damaged; nothing of it is lost.
        """
        with translated(self.url):
            return replay.replay_folder(self._engine, Path(spool_dir))


def _statuses(connection: Connection, keys: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        chunk = keys[start : start + _KEYS_PER_QUERY]
        query = sa.select(runs.c.run_key, runs.c.status).where(runs.c.run_key.in_(chunk))
        found.update((row.run_key, row.status) for row in connection.execute(query))
    return found


def _ids(connection: Connection, keys: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        chunk = keys[start : start + _KEYS_PER_QUERY]
        query = sa.select(runs.c.run_key, runs.c.id).where(runs.c.run_key.in_(chunk))
        found.update((row.run_key, row.id) for row in connection.execute(query))
    return found


def _insert_runs(connection: Connection, by_key: Mapping[str, PlannedRun]) -> None:
    if not by_key:
        return
    fingerprints = {run.fingerprint: run.spec.dataset for run in by_key.values()}
    query = sa.select(datasets.c.fingerprint, datasets.c.id).where(
        datasets.c.fingerprint.in_(list(fingerprints))
    )
    ids = {row.fingerprint: row.id for row in connection.execute(query)}
    for fingerprint, name in fingerprints.items():
        if fingerprint not in ids:
            raise StoreError(
                f"dataset {name!r} ({fingerprint[:12]}) is not in the database; put it first"
            )
    rows = [
        {
            "run_key": key,
            "dataset_id": ids[run.fingerprint],
            **spec_values(run.spec),
            "replicate": run.replicate,
        }
        for key, run in by_key.items()
    ]
    statement = leases.insert_ignore(connection, runs).values(
        source=OWN, status=RunStatus.PENDING, created_at=utc_in(), updated_at=utc_in()
    )
    connection.execute(statement, rows)


def _put_sweep_row(connection: Connection, name: str, grid_text: str) -> int:
    connection.execute(
        leases.insert_ignore(connection, sweeps).values(
            name=name, grid=grid_text, created_at=utc_in(), launched_at=utc_in()
        )
    )
    connection.execute(
        sweeps.update().where(sweeps.c.name == name).values(grid=grid_text, launched_at=utc_in())
    )
    return int(connection.scalars(sa.select(sweeps.c.id).where(sweeps.c.name == name)).one())


def _link(connection: Connection, sweep_id: int, keys: list[str]) -> None:
    ids = _ids(connection, keys)
    if keys:
        connection.execute(
            leases.insert_ignore(connection, sweep_runs),
            [
                {"sweep_id": sweep_id, "run_id": ids[key], "position": position}
                for position, key in enumerate(keys)
            ],
        )


def _inherit_bound(connection: Connection, run_id: int, proven_by: str) -> None:
    """Give a skipped run the memory bounds of the run that proves it infeasible."""
    proofs = connection.execute(
        sa.select(run_summary.c.device_class, run_summary.c.memory_bound_bytes,
                  run_summary.c.memory_source, run_summary.c.timing)
        .join(runs, runs.c.id == run_summary.c.run_id)
        .where(runs.c.run_key == proven_by, run_summary.c.memory_bound_bytes.is_not(None))
    ).all()  # fmt: skip
    if not proofs:
        raise StoreError(f"run {proven_by[:12]} proves nothing: it did not run out of memory")
    for proof in proofs:
        leases.put_summary(
            connection,
            {
                "run_id": run_id,
                "status": RunStatus.SKIPPED,
                "finished_at": utc_in(),
                **proof._mapping,
            },
        )


def _stored_runs() -> sa.Select[Any]:
    counted = (
        sa.select(
            attempts.c.run_id,
            sa.func.count().label("num_attempts"),
            sa.func.max(attempts.c.number).label("last_number"),
        )
        .group_by(attempts.c.run_id)
        .subquery("counted")
    )
    last = attempts.alias("last_attempt")
    return (
        sa.select(
            runs,
            sa.func.coalesce(counted.c.num_attempts, 0).label("num_attempts"),
            last.c.status.label("last_attempt_status"),
            last.c.error_class.label("last_error_class"),
            last.c.error_message.label("last_error_message"),
            last.c.device_class.label("last_device_class"),
        )
        .outerjoin(counted, counted.c.run_id == runs.c.id)
        .outerjoin(
            last, sa.and_(last.c.run_id == runs.c.id, last.c.number == counted.c.last_number)
        )
    )


def _stored_run(row: sa.Row[Any]) -> StoredRun:
    last = row.last_attempt_status
    return StoredRun(
        key=row.run_key,
        spec=spec_from_values(dict(row._mapping)),
        replicate=row.replicate,
        status=RunStatus(row.status),
        reason=row.reason,
        skipped_by=row.skipped_by,
        num_attempts=row.num_attempts,
        last_attempt_status=None if last is None else AttemptStatus(last),
        last_error_class=row.last_error_class,
        last_error_message=row.last_error_message,
        last_device_class=row.last_device_class,
    )
