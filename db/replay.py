"""Bringing spools that workers left behind into the database."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection, Engine

from db import leases, spool
from db.errors import LostLeaseError, StoreError
from db.leases import Claim
from db.rows import insert_batch
from db.spec import AttemptStatus


@dataclass(frozen=True)
class ReplayCounts:
    """What became of the spools of a folder."""

    replayed: int = 0
    """Spools now in the database, and removed."""
    fenced: int = 0
    """Spools of attempts that were lost meanwhile; set aside as `*.fenced`, never written."""
    rows: int = 0


def replay_folder(engine: Engine, folder: Path) -> ReplayCounts:
    """Write every spool of a folder that no living writer holds, and remove it.

    Raises
    ------
    sqlalchemy.exc.SQLAlchemyError, StoreError
        The database is away or a spool damaged; it stays where it is.
    """
    replayed = fenced = rows = 0
    for path in spool.waiting(folder):
        try:
            rows += _replay(engine, path)
        except LostLeaseError:
            spool.set_aside(path)
            fenced += 1
        else:
            path.unlink()
            replayed += 1
    return ReplayCounts(replayed, fenced, rows)


def _replay(engine: Engine, path: Path) -> int:
    lines = spool.read_lines(path)
    first = next(lines, None)
    if first is None:
        return 0
    if "attempt" not in first:
        raise StoreError(f"{path.name}, line 1: not a spool; move the file away to go on")
    held = spool.claim_of(first)
    count, last = 0, first
    with engine.connect() as connection:
        try:
            for last in lines:
                with connection.begin():
                    count += _replay_line(connection, held, last)
        except LostLeaseError:
            *_, last = (last, *lines)
            # a replay that broke off between the last commit and the removal of the file
            status = _end_status(last)
            with connection.begin():
                if status is None or not leases.has_ended(connection, held, status):
                    raise
    return count


def _replay_line(connection: Connection, held: Claim, line: Mapping[str, Any]) -> int:
    if "rows" in line:
        batch = spool.batch_of(line["rows"])
        leases.fence(connection, held, batch.last_step())
        insert_batch(connection, held.attempt_id, batch, fresh=False)
        return len(batch)
    if "finish" in line:
        leases.finish(connection, held, leases.result_from_dict(line["finish"]["result"]))
    elif "fail" in line:
        end = line["fail"]
        leases.end(connection, held, AttemptStatus.ERROR, end["error_class"], end["message"])
    elif "cancel" in line:
        end = line["cancel"]
        kind = end.get("error_class", "cancelled")  # older spools do not say
        leases.end(connection, held, AttemptStatus.CANCELLED, kind, end["message"])
    else:
        raise StoreError(f"a spool of attempt {held.attempt_id} has a line of unknown kind")
    return 0


def _end_status(line: Mapping[str, Any]) -> AttemptStatus | None:
    if "finish" in line:
        return AttemptStatus(line["finish"]["result"]["status"])
    ends = {"fail": AttemptStatus.ERROR, "cancel": AttemptStatus.CANCELLED}
    return ends.get(next(iter(line)))
