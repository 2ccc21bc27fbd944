"""Retention: step rows of finished runs are thinned or removed, what they amount to stays.

Evaluations, histograms, summaries, attempts and events are never touched, nor is any row of a run
that is pending or running.
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from db import leases, migrate
from db.connect import reading, translated, write_engine
from db.errors import StoreError
from db.schema import attempts, runs, steps, sweep_runs, sweeps, utc_in
from db.spec import AttemptStatus, RunStatus

_DAY_SECONDS = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Step rows of one attempt that went, or would go."""

    run_key: str
    dataset: str
    status: str
    attempt: int
    rows: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which step rows go."""

    keep_every: int | None = None
    """Keep each step whose number is a multiple of this, and the last; None keeps none."""
    sweep: str | None = None
    """Only of this sweep's runs."""
    older_than_days: float = 0.0
    """Only of attempts that ended at least so long ago, by the database's clock."""
    superseded: bool = False
    """Only of attempts after which another was made."""

    def __post_init__(self) -> None:
        if self.keep_every is not None and self.keep_every < 2:
            raise StoreError(f"keep_every={self.keep_every} must be at least 2, or left out")
        if self.older_than_days < 0:
            raise StoreError(f"older_than_days={self.older_than_days} must not be negative")


def prune_steps(url: str, rule: Retention, *, dry_run: bool = False) -> list[Pruned]:
    """Remove the step rows that a rule gives up, one short transaction per attempt.

    Parameters
    ----------
    url : str
        Run database.
    rule : Retention
        What goes and what stays.
    dry_run : bool
        Only count.

    Returns
    -------
    list of Pruned
        Attempts that lose rows.

    Raises
    ------
    StoreError
        The database cannot be read or written, or there is no such sweep.
    """
    engine = write_engine(url)
    try:
        with translated(url):
            with reading(engine) as connection:
                migrate.check(connection)
                found = _candidates(connection, rule)
            if not dry_run:
                for attempt_id, run_id, counts in found:
                    with engine.begin() as connection:
                        _delete(connection, rule, attempt_id, run_id, counts)
    finally:
        engine.dispose()
    return [counts for _, _, counts in found]


def vacuum(url: str) -> None:
    """Give the room of removed rows back to the file system (SQLite) or to new rows.

    Raises
    ------
    StoreError
        The database cannot be written, or SQLite lacks the room for a second copy.
    """
    engine = write_engine(url)
    with translated(url), engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        if engine.dialect.name == "sqlite":
            driver.execute("VACUUM")
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        else:
            driver.autocommit = True
            driver.execute("VACUUM (ANALYZE) steps")
    engine.dispose()


def _candidates(connection: Connection, rule: Retention) -> list[tuple[int, int, Pruned]]:
    final = [str(status) for status in RunStatus if status.is_final]
    rows = sa.func.count().label("rows")
    gone = sa.func.sum(sa.case((_goes(rule), 1), else_=0)).label("gone")
    query = (
        sa.select(
            attempts.c.id, attempts.c.run_id, attempts.c.number, runs.c.run_key, runs.c.dataset,
            runs.c.status, rows, gone,
        )
        .join(runs, runs.c.id == attempts.c.run_id)
        .join(steps, steps.c.attempt_id == attempts.c.id)
        .where(runs.c.status.in_(final), attempts.c.status != AttemptStatus.RUNNING)
        .group_by(attempts.c.id, runs.c.id)
        .order_by(attempts.c.id)
    )  # fmt: skip
    if rule.older_than_days:
        query = query.where(attempts.c.ended_at < utc_in(-_DAY_SECONDS * rule.older_than_days))
    if rule.superseded:
        later = attempts.alias("later")
        query = query.where(
            sa.exists().where(
                later.c.run_id == attempts.c.run_id, later.c.number > attempts.c.number
            )
        )
    if rule.sweep is not None:
        query = query.where(runs.c.id.in_(_runs_of(connection, rule.sweep)))
    return [
        (
            row.id,
            row.run_id,
            Pruned(
                run_key=row.run_key,
                dataset=row.dataset,
                status=row.status,
                attempt=row.number,
                rows=int(row.gone),
                kept=int(row.rows) - int(row.gone),
            ),
        )
        for row in connection.execute(query)
        if row.gone
    ]


def _goes(rule: Retention) -> sa.ColumnElement[bool]:
    if rule.keep_every is None:
        return sa.true()
    last = sa.func.coalesce(attempts.c.last_step, -1)
    return sa.and_(steps.c.step % rule.keep_every != 0, steps.c.step != last)


def _runs_of(connection: Connection, sweep: str) -> sa.Select[tuple[int]]:
    known = connection.scalar(sa.select(sweeps.c.id).where(sweeps.c.name == sweep))
    if known is None:
        raise StoreError(f"no sweep {sweep!r}; `srsweep runs --sweeps` lists them")
    return sa.select(sweep_runs.c.run_id).where(sweep_runs.c.sweep_id == known)


def _delete(
    connection: Connection, rule: Retention, attempt_id: int, run_id: int, counts: Pruned
) -> None:
    condition = steps.c.attempt_id == attempt_id
    if rule.keep_every is not None:
        last = sa.select(sa.func.coalesce(attempts.c.last_step, -1)).where(
            attempts.c.id == attempt_id
        )
        condition &= (steps.c.step % rule.keep_every != 0) & (
            steps.c.step != last.scalar_subquery()
        )
    removed = connection.execute(steps.delete().where(condition)).rowcount
    details = {"rows": removed, "kept": counts.kept, "keep_every": rule.keep_every}
    leases.log_event(
        connection, "steps pruned", run_id=run_id, attempt_id=attempt_id, details=details
    )
