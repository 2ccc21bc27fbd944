"""The read side: rows and data frames; no function here can write.

pandas is imported only by the functions that return frames.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db import finished, reader
from db.errors import StoreError
from db.measures import METRICS, SELECTION_K, metric_column
from db.reader import TIMEOUT_SECONDS, connected
from db.schema import (
    SPEC_COLUMNS,
    attempts,
    datasets,
    evaluations,
    run_summary,
    steps,
    sweep_runs,
)
from db.schema import (
    runs as runs_table,
)
from db.schema import (
    sweeps as sweeps_table,
)
from db.spec import RunStatus, suggestion

if TYPE_CHECKING:
    import pandas as pd

LISTED: tuple[str, ...] = (
    "run_key", "dataset", "model", "loss", "batch_size", "max_seq_len", "num_negatives",
    "embedding_dim", "seed", "replicate", "status", "device_class", "timing", "num_attempts",
    "last_step", "num_steps", "best_step", "validation_ndcg_at_10", "ndcg_at_10",
    "coverage_at_10", "surprisal_at_10", "peak_train_memory_bytes", "memory_bound_bytes",
    "epoch_seconds", "step_seconds", "train_seconds", "tokens_per_second", "stop_reason",
    "reason", "skipped_by", "source", "finished_at",
)  # fmt: skip
"""Columns of `runs`."""


def rows(
    url: str,
    sql: str,
    params: Mapping[str, Any] | None = None,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[dict[str, Any]]:
    """Rows of one SELECT, by column name.

    Parameters
    ----------
    url : str
        Run database.
    sql : str
        One SELECT; parameters as `:name`. A repeated column name gets a number: `id`, `id_2`.
    params : mapping, optional
        Values of the parameters.
    timeout_seconds : float
        After so long the query ends with an error.

    Raises
    ------
    StoreError
        The database cannot be read, or the statement is anything but one SELECT.
    """
    with connected(url, timeout_seconds=timeout_seconds) as connection:
        return reader.select(connection, sql, params).dicts()


def frame(
    url: str,
    sql: str,
    params: Mapping[str, Any] | None = None,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> "pd.DataFrame":
    """Rows of one SELECT as a data frame; parameters and errors as in `rows`."""
    import pandas as pd

    with connected(url, timeout_seconds=timeout_seconds) as connection:
        found = reader.select(connection, sql, params)
    return pd.DataFrame.from_records(found.rows, columns=found.columns)


def runs(
    url: str,
    *,
    sweep: str | None = None,
    dataset: str | None = None,
    status: str | Sequence[str] | None = None,
    order: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Runs with their main results: one row per run and device class, columns `LISTED`.

    Parameters
    ----------
    url : str
        Run database.
    sweep, dataset : str, optional
        Only those of a sweep, of a dataset.
    status : str or sequence of str, optional
        Only those with one of these statuses.
    order : str, optional
        Column to sort by, ascending; `-ndcg_at_10` for descending. Nulls come last.
    limit : int, optional
        Most rows.

    Raises
    ------
    StoreError
        The database cannot be read; an unknown sweep, status or column.
    """
    conditions: list[sa.ColumnElement[bool]] = []
    if dataset is not None:
        conditions.append(runs_table.c.dataset == dataset)
    if status is not None:
        wanted = [status] if isinstance(status, str) else list(status)
        conditions.append(_status().in_([_checked_status(s) for s in wanted]))
    terms = _terms(order)
    with connected(url) as connection:
        if sweep is not None:
            conditions.append(_in_sweeps(connection, [sweep]))
        if order is None or limit is None:
            query = _listing().where(*conditions)
        else:
            query = _listing(_first(conditions, order, limit))
        return listed(connection, query.order_by(*terms).limit(limit))


def listed(connection: sa.Connection, query: sa.Select[Any] | None = None) -> list[dict[str, Any]]:
    """Rows of the listing on an open connection; all runs without a query."""
    found = connection.execute(_listing().order_by(runs_table.c.id) if query is None else query)
    names = list(found.keys())
    return [dict(zip(names, row, strict=True)) for row in found.all()]


def summary_frame(
    url: str,
    sweeps: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> "pd.DataFrame":
    """What an analysis starts from: one row per finished run and device class.

    Parameters
    ----------
    url : str
        Run database.
    sweeps, datasets : sequence of str, optional
        Only runs of these sweeps, of these datasets.

    Returns
    -------
    pandas.DataFrame
        `run_key`, `replicate`, dataset counts, every RunSpec field, status, the columns of
        `run_summary`, `skipped_by` and `source`. Numbers that may be missing are float64 with
        NaN. Runs that do not fit in memory have no peak but `memory_bound_bytes`.

    Raises
    ------
    StoreError
        The database cannot be read, or an unknown sweep.
    """
    import pandas as pd

    conditions: list[sa.ColumnElement[bool]] = []
    if datasets is not None:
        conditions.append(runs_table.c.dataset.in_(list(datasets)))
    with connected(url) as connection:
        if sweeps is not None:
            conditions.append(_in_sweeps(connection, sweeps))
        query = _summary().where(*conditions)
        found = finished.columns(connection, conditions)
        if found is None:
            return _typed_frame(connection.execute(query), query)
    return pd.DataFrame({column.name: found[column.name] for column in query.selected_columns})


def steps_frame(url: str, run_key: str, *, attempt: int | None = None) -> "pd.DataFrame":
    """Steps of one run with the latest validation at or before each, as in view `run_steps`.

    Parameters
    ----------
    url : str
        Run database.
    run_key : str
        Key of the run, or its first characters.
    attempt : int, optional
        Number of the attempt; the last one by default.

    Returns
    -------
    pandas.DataFrame
        Columns of `steps`, `evaluation_step`, and the metrics at 10 by column name.

    Raises
    ------
    StoreError
        The database cannot be read; no such run, an ambiguous beginning, no such attempt.
    """
    import numpy as np
    import pandas as pd

    with connected(url) as connection:
        attempt_id = _attempt_id(connection, run_key, attempt)
        measured = [column for column in steps.c if column.name != "attempt_id"]
        query = sa.select(*measured).where(steps.c.attempt_id == attempt_id).order_by(steps.c.step)
        found = _typed_frame(connection.execute(query), query)
        points = connection.execute(
            sa.select(evaluations.c.step, evaluations.c.metric, evaluations.c.value).where(
                evaluations.c.attempt_id == attempt_id,
                evaluations.c.split == "validation",
                evaluations.c.k == SELECTION_K,
            )
        ).all()
    by_step: dict[int, dict[str, float | None]] = {}
    for point in points:
        by_step.setdefault(point.step, {})[metric_column(point.metric, SELECTION_K)] = point.value
    wide = pd.DataFrame.from_dict(by_step, orient="index", dtype=float).sort_index()
    wide = wide.reindex(columns=[metric_column(metric, SELECTION_K) for metric in METRICS])
    wide.index = wide.index.astype(np.int64)
    wide = wide.rename_axis("step").reset_index()
    wide.insert(1, "evaluation_step", wide["step"].astype(float))
    return pd.merge_asof(found, wide, on="step")


def _status() -> sa.ColumnElement[str]:
    """Status on the device class of the row; that of the run where there is no result."""
    return sa.func.coalesce(run_summary.c.status, runs_table.c.status)


_RUNNING = attempts.alias("running")
_OF_RUNNING = {"last_step", "device_class", "timing"}


def _listed_columns() -> dict[str, sa.ColumnElement[Any]]:
    """Columns of the listing by name."""
    tries = (
        sa.select(sa.func.count())
        .where(attempts.c.run_id == runs_table.c.id)
        .correlate(runs_table)
        .scalar_subquery()
    )
    special: dict[str, sa.ColumnElement[Any]] = {
        "status": _status().label("status"),
        "num_attempts": tries.label("num_attempts"),
        "last_step": _RUNNING.c.last_step,
        "device_class": sa.func.coalesce(run_summary.c.device_class, _RUNNING.c.device_class).label(
            "device_class"
        ),
        "timing": sa.func.coalesce(run_summary.c.timing, _RUNNING.c.timing).label("timing"),
    }
    columns: dict[str, sa.ColumnElement[Any]] = {}
    for name in LISTED:
        table = runs_table if name in runs_table.c else run_summary
        columns[name] = special[name] if name in special else table.c[name]
    return columns


def _listing(chosen: sa.Subquery | None = None) -> sa.Select[Any]:
    """The listing; only of the runs and device classes that `_first` chose."""
    same_run = run_summary.c.run_id == runs_table.c.id
    if chosen is None:
        source = runs_table.outerjoin(run_summary, same_run)
    else:
        same_device = run_summary.c.device_class == chosen.c.device_class
        source = chosen.join(runs_table, runs_table.c.id == chosen.c.id).outerjoin(
            run_summary, sa.and_(same_run, same_device)
        )
    return sa.select(*_listed_columns().values()).select_from(_with_running(source))


def _with_running(source: sa.FromClause) -> sa.FromClause:
    is_running = _RUNNING.c.status == sa.literal_column("'running'")
    return source.outerjoin(_RUNNING, sa.and_(_RUNNING.c.run_id == runs_table.c.id, is_running))


def _first(conditions: Sequence[sa.ColumnElement[bool]], order: str, limit: int) -> sa.Subquery:
    """Run and device class of the first rows: 100,000 rows are sorted without their columns."""
    source: sa.FromClause = runs_table.outerjoin(
        run_summary, run_summary.c.run_id == runs_table.c.id
    )
    if order.removeprefix("-") in _OF_RUNNING:
        source = _with_running(source)
    return (
        sa.select(runs_table.c.id, run_summary.c.device_class)
        .select_from(source)
        .where(*conditions)
        .order_by(*_terms(order))
        .limit(limit)
        .subquery("chosen")
    )


def _terms(order: str | None) -> list[sa.ColumnElement[Any]]:
    """What to sort by."""
    if order is None:
        return [runs_table.c.id]
    name = order.removeprefix("-")
    if name not in LISTED:
        raise StoreError(f"order={order!r}: no such column{suggestion(name, LISTED)}")
    column = _listed_columns()[name]
    direction = column.desc() if order.startswith("-") else column.asc()
    return [direction.nulls_last(), runs_table.c.id]


def _checked_status(status: str) -> str:
    known = [str(s) for s in RunStatus]
    if status not in known:
        raise StoreError(f"status={str(status)!r} is unknown{suggestion(status, known)}")
    return str(status)


def _in_sweeps(connection: sa.Connection, names: Sequence[str]) -> sa.ColumnElement[bool]:
    query = sa.select(sweeps_table.c.name, sweeps_table.c.id)
    known = {row.name: row.id for row in connection.execute(query)}
    for name in names:
        if name not in known:
            raise StoreError(
                f"no sweep {name!r}{suggestion(name, known)}"
                if known
                else f"no sweep {name!r}: the database has none"
            )
    ids = [known[name] for name in names]
    return runs_table.c.id.in_(sa.select(sweep_runs.c.run_id).where(sweep_runs.c.sweep_id.in_(ids)))


def _summary() -> sa.Select[Any]:
    taken = {"run_id", "attempt_id", "status"}
    results = [column for column in run_summary.c if column.name not in taken]
    final = [str(status) for status in RunStatus if status.is_final]
    return (
        sa.select(
            runs_table.c.run_key,
            runs_table.c.replicate,
            datasets.c.num_users,
            datasets.c.num_items,
            datasets.c.num_items_filtered,
            datasets.c.num_interactions,
            *(runs_table.c[name] for name in SPEC_COLUMNS),
            _status().label("status"),
            *results,
            runs_table.c.reason,
            runs_table.c.skipped_by,
            runs_table.c.source,
        )
        .select_from(runs_table)
        .join(datasets, datasets.c.id == runs_table.c.dataset_id)
        .outerjoin(run_summary, run_summary.c.run_id == runs_table.c.id)
        .where(sa.or_(run_summary.c.run_id.is_not(None), runs_table.c.status.in_(final)))
        .order_by(runs_table.c.id, run_summary.c.device_class)
    )


def _typed_frame(found: sa.CursorResult[Any], query: sa.Select[Any]) -> "pd.DataFrame":
    """Rows as a frame whose column types do not depend on which values are missing."""
    import numpy as np
    import pandas as pd

    names = list(found.keys())
    columns = list(zip(*found.all(), strict=True)) or [()] * len(names)
    data: dict[str, Any] = {}
    for name, column, values in zip(names, query.selected_columns, columns, strict=True):
        if isinstance(column.type, sa.Boolean):
            data[name] = np.array(values, dtype=bool)
        elif isinstance(column.type, sa.Integer) and not getattr(column, "nullable", True):
            data[name] = np.array(values, dtype=np.int64)
        elif isinstance(column.type, sa.Float | sa.Integer):
            data[name] = np.array(values, dtype=np.float64)
        else:
            data[name] = list(values)
    return pd.DataFrame(data)


def _attempt_id(connection: sa.Connection, run_key: str, number: int | None) -> int:
    escaped = run_key.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    keys = connection.scalars(
        sa.select(runs_table.c.run_key)
        .where(runs_table.c.run_key.like(f"{escaped}%", escape="\\"))
        .limit(2)
    ).all()
    if not keys:
        raise StoreError(f"no run {run_key!r}; `srsweep runs` lists them")
    if len(keys) > 1 and run_key not in keys:
        raise StoreError(f"run {run_key!r} is the beginning of several keys; give more of it")
    query = (
        sa.select(attempts.c.id, attempts.c.number)
        .join(runs_table, runs_table.c.id == attempts.c.run_id)
        .where(runs_table.c.run_key == keys[0])
        .order_by(attempts.c.number.desc())
    )
    found = connection.execute(query).all()
    chosen = [row.id for row in found if number in (None, row.number)]
    if not chosen:
        which = "no attempt" if number is None else f"no attempt {number}"
        raise StoreError(f"run {keys[0][:12]} has {which} yet ({len(found)} in all)")
    return int(chosen[0])
