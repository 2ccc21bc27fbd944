"""Finished runs from elsewhere, written into the run database in one transaction."""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db import packed
from db.connect import translated, write_engine
from db.leases import insert_ignore
from db.rows import Batch, insert_batch
from db.schema import (
    attempts,
    datasets,
    run_summary,
    runs,
    spec_values,
    steps,
    sweep_runs,
    sweeps,
    utc_in,
)
from db.spec import AttemptStatus, RunSpec, RunStatus, run_key
from db.store import DatasetRecord, RunStore

_KEYS_PER_QUERY = 500
_ATTEMPT_STATUS = {
    RunStatus.DONE: AttemptStatus.DONE,
    RunStatus.DIVERGED: AttemptStatus.DIVERGED,
    RunStatus.OUT_OF_MEMORY: AttemptStatus.OUT_OF_MEMORY,
    RunStatus.FAILED: AttemptStatus.ERROR,
}


@dataclass(frozen=True, kw_only=True)
class ForeignRun:
    """A finished run as another database or publication has it."""

    spec: RunSpec
    fingerprint: str
    """Of its dataset, which is imported with it or known."""
    replicate: int = 0
    source: str
    """Where it is from; becomes `runs.source`."""
    status: RunStatus = RunStatus.DONE
    device_class: str | None = None
    """None for a run without results."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Columns of `run_summary`."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Columns `reason` and `skipped_by` of `runs`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """File, row and whatever else tells where the numbers stand; kept with the attempt."""
    curve: Sequence[tuple[int, int, float | None]] = ()
    """Step, epoch and loss."""

    @property
    def key(self) -> str:
        """Identity of the run; see `db.spec.run_key`."""
        return run_key(self.spec, self.fingerprint, self.replicate)


@dataclass(frozen=True)
class ImportCounts:
    """What an import changed."""

    new: int
    known: int
    """Runs that were there already and stay as they are."""
    steps: int
    """Step rows added."""


def put_foreign(
    url: str,
    sweep: str,
    text: str,
    records: Sequence[DatasetRecord],
    foreign: Sequence[ForeignRun],
) -> ImportCounts:
    """Record finished runs from elsewhere; all of them or, on an error, none.

    Parameters
    ----------
    url : str
        Run database; a new one gets its tables.
    sweep : str
        Sweep to list them under.
    text : str
        What stands in place of the sweep's grid.
    records : sequence of DatasetRecord
        Their datasets; known ones stay as they are.
    foreign : sequence of ForeignRun
        In the order that analyses shall find them in. Known runs stay as they are, but get the
        curve they lack when it belongs to the same measurement.

    Raises
    ------
    StoreError
        The database cannot be reached or written.
    """
    store = RunStore.open(url)
    for record in records:
        store.put_dataset(record)
    by_key: dict[str, ForeignRun] = {}
    elsewhere: list[ForeignRun] = []
    for run in foreign:
        first = by_key.setdefault(run.key, run)
        if run.device_class != first.device_class:
            elsewhere.append(run)
    with translated(url), write_engine(url).begin() as connection:
        known = _run_ids(connection, by_key)
        new = {key: run for key, run in by_key.items() if key not in known}
        ids = _insert_runs(connection, new)
        tries = _insert_attempts(connection, {ids[key]: run for key, run in new.items()})
        _insert_summaries(connection, [(ids[key], run) for key, run in new.items()], tries)
        _insert_summaries(
            connection, [(ids[run.key], run) for run in elsewhere if run.key in ids], {}
        )
        packed.refresh(connection)
        curves = {tries[ids[key]]: run for key, run in new.items() if run.curve}
        curves |= _missing_curves(connection, {known[key]: by_key[key] for key in known})
        for attempt_id, run in curves.items():
            insert_batch(connection, attempt_id, _batch(run), fresh=True)
        _link(connection, sweep, text, [{**known, **ids}[key] for key in by_key])
    return ImportCounts(len(new), len(known), sum(len(run.curve) for run in curves.values()))


def _batch(run: ForeignRun) -> Batch:
    rest = (None,) * 7
    return Batch(steps=[(step, epoch, loss, *rest) for step, epoch, loss in run.curve])


def _run_ids(connection: Connection, keys: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    listed = list(keys)
    for start in range(0, len(listed), _KEYS_PER_QUERY):
        part = listed[start : start + _KEYS_PER_QUERY]
        query = sa.select(runs.c.run_key, runs.c.id).where(runs.c.run_key.in_(part))
        found |= {row.run_key: row.id for row in connection.execute(query)}
    return found


def _insert_runs(connection: Connection, new: Mapping[str, ForeignRun]) -> dict[str, int]:
    if not new:
        return {}
    query = sa.select(datasets.c.fingerprint, datasets.c.id)
    dataset_ids = {row.fingerprint: row.id for row in connection.execute(query)}
    rows = [
        {
            "run_key": key,
            "dataset_id": dataset_ids[run.fingerprint],
            **spec_values(run.spec),
            "replicate": run.replicate,
            "source": run.source,
            "status": run.status,
            "reason": run.notes.get("reason"),
            "skipped_by": run.notes.get("skipped_by"),
        }
        for key, run in new.items()
    ]
    connection.execute(runs.insert().values(created_at=utc_in(), updated_at=utc_in()), rows)
    return _run_ids(connection, new)


def _insert_attempts(connection: Connection, by_id: Mapping[int, ForeignRun]) -> dict[int, int]:
    """One attempt for every run that has results; ids by run id."""
    tried = {
        run_id: run
        for run_id, run in by_id.items()
        if run.device_class is not None and run.status in _ATTEMPT_STATUS
    }
    if not tried:
        return {}
    rows = [
        {
            "run_id": run_id,
            "number": 1,
            "status": _ATTEMPT_STATUS[run.status],
            "token": uuid.uuid4().hex,
            "lease_seconds": 0.0,
            "last_step": run.curve[-1][0] if run.curve else None,
            "device_class": run.device_class,
            "timing": run.summary.get("timing"),
            "versions": json.dumps(dict(run.provenance), sort_keys=True) or None,
            "requested_bytes": run.summary.get("requested_bytes"),
            "allocated_bytes": run.summary.get("allocated_bytes"),
            "total_bytes": run.summary.get("total_bytes"),
        }
        for run_id, run in tried.items()
    ]
    connection.execute(attempts.insert().values(started_at=utc_in(), ended_at=utc_in()), rows)
    query = sa.select(attempts.c.run_id, attempts.c.id).where(attempts.c.number == 1)
    return {row.run_id: row.id for row in connection.execute(query) if row.run_id in tried}


def _insert_summaries(
    connection: Connection, found: Sequence[tuple[int, ForeignRun]], tries: Mapping[int, int]
) -> None:
    columns = [column.name for column in run_summary.c]
    rows = []
    for run_id, run in found:
        if run.device_class is None:
            continue
        row = dict.fromkeys(columns) | dict(run.summary)
        row |= {
            "run_id": run_id,
            "device_class": run.device_class,
            "attempt_id": tries.get(run_id),
            "status": run.status,
        }
        rows.append(row)
    for dated in (True, False):
        part = [row for row in rows if (row["finished_at"] is not None) == dated]
        if not part:
            continue
        statement = run_summary.insert()
        if not dated:
            statement = statement.values(finished_at=utc_in())
            for row in part:
                del row["finished_at"]
        connection.execute(statement, part)


def _missing_curves(
    connection: Connection, known: Mapping[int, ForeignRun]
) -> dict[int, ForeignRun]:
    """Attempts of known runs that lack the curve their measurement has, by attempt id."""
    wanted = {run_id: run for run_id, run in known.items() if run.curve}
    if not wanted:
        return {}
    has_steps = sa.exists().where(steps.c.attempt_id == run_summary.c.attempt_id)
    query = sa.select(
        run_summary.c.run_id, run_summary.c.attempt_id, run_summary.c.epoch_seconds
    ).where(run_summary.c.attempt_id.is_not(None), ~has_steps)
    return {
        row.attempt_id: wanted[row.run_id]
        for row in connection.execute(query)
        if row.run_id in wanted
        and row.epoch_seconds == wanted[row.run_id].summary.get("epoch_seconds")
    }


def _link(connection: Connection, sweep: str, text: str, run_ids: Sequence[int]) -> None:
    connection.execute(
        insert_ignore(connection, sweeps).values(
            name=sweep, grid=text, created_at=utc_in(), launched_at=utc_in()
        )
    )
    query = sa.select(sweeps.c.id).where(sweeps.c.name == sweep)
    sweep_id = connection.scalars(query).one()
    rows = [
        {"sweep_id": sweep_id, "run_id": run_id, "position": position}
        for position, run_id in enumerate(run_ids)
    ]
    if rows:
        connection.execute(insert_ignore(connection, sweep_runs), rows)
