"""Tables and views of the run database, the same on SQLite and PostgreSQL.

Typed columns for every field of RunSpec are derived from `db.spec`, those of the metrics from
`db.measures`; nothing is listed twice. Times are timezone-aware UTC by the database's clock.
"""

import datetime
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

from db.errors import StoreError
from db.measures import METRIC_COLUMNS, METRICS, SELECTION_K, SELECTION_METRIC, metric_column
from db.spec import AttemptStatus, RunSpec, RunStatus, field_types

SCHEMA_VERSION = "0005"
"""Revision of the newest migration; what this srsweep reads and writes."""

OWN = "own"
"""`runs.source` of runs trained here; imported runs carry the name of where they are from."""


class UtcDateTime(TypeDecorator[datetime.datetime]):
    """A timezone-aware UTC time; SQLite keeps it as text that sorts by time."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        """Convert to UTC."""
        return None if value is None else value.astimezone(datetime.UTC)

    def process_result_value(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        """Attach or convert to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            return value.replace(tzinfo=datetime.UTC)
        return value.astimezone(datetime.UTC)


class utc_in(FunctionElement[datetime.datetime]):
    """The database's clock plus a number of seconds, read when the statement runs."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(sa.literal(float(seconds), sa.Double()))


@compiles(utc_in, "sqlite")
def _utc_in_sqlite(element: utc_in, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    # %f has milliseconds; SQLAlchemy reads the digits after the point as microseconds
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds} || ' seconds')"


@compiles(utc_in, "postgresql")
def _utc_in_postgresql(element: utc_in, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(clock_timestamp() + make_interval(secs => CAST({seconds} AS double precision)))"


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _options(kind: Any) -> tuple[Any, ...]:
    """Alternatives of a union annotation, or the annotation alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _is_mixed(name: str) -> bool:
    """Whether a field takes numbers and words alike (`negatives_share`); stored as text."""
    options = _options(field_types()[name])
    return int in options and any(typing.get_origin(o) is Literal for o in options)


def _spec_column(name: str) -> sa.Column[Any]:
    options = _options(field_types()[name])
    kinds: dict[Any, sa.types.TypeEngine[Any]] = {
        bool: sa.Boolean(),
        int: sa.BigInteger(),
        float: sa.Double(),
    }
    found = [kinds[option] for option in options if option in kinds]
    column_type = sa.Text() if _is_mixed(name) or not found else found[0]
    # a stored run's precision is resolved, so only the annotation allows null
    nullable = types.NoneType in options and name != "precision"
    return sa.Column(name, column_type, nullable=nullable)


def _one_of(column: str, values: type[RunStatus] | type[AttemptStatus]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


SPEC_COLUMNS: tuple[str, ...] = tuple(field_types())
"""Columns of `runs` that are fields of RunSpec, in its order."""

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False, unique=True),
    sa.Column("num_users", sa.BigInteger),
    sa.Column("num_items", sa.BigInteger),
    sa.Column("num_items_filtered", sa.BigInteger),
    sa.Column("num_interactions", sa.BigInteger),
    sa.Column("details", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("grid", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("launched_at", UtcDateTime, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("run_key", sa.Text, nullable=False, unique=True),
    sa.Column("dataset_id", _ID, sa.ForeignKey("datasets.id"), nullable=False, index=True),
    *(_spec_column(name) for name in SPEC_COLUMNS),
    sa.Column("replicate", sa.Integer, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("reason", sa.Text),
    sa.Column("skipped_by", sa.Text),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    _one_of("status", RunStatus),
)

sweep_runs = sa.Table(
    "sweep_runs",
    metadata,
    sa.Column("sweep_id", _ID, sa.ForeignKey("sweeps.id"), primary_key=True),
    sa.Column("run_id", _ID, sa.ForeignKey("runs.id"), primary_key=True, index=True),
    sa.Column("position", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("run_id", _ID, sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("lease_seconds", sa.Double, nullable=False),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("heartbeat_at", UtcDateTime),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime),
    sa.Column("last_step", sa.Integer),
    sa.Column("host", sa.Text),
    sa.Column("pid", sa.BigInteger),
    sa.Column("device_class", sa.Text, nullable=False),
    sa.Column("device_memory_bytes", sa.BigInteger),
    sa.Column("timing", sa.Text),
    sa.Column("versions", sa.Text),
    sa.Column("git_commit", sa.Text),
    sa.Column("error_class", sa.Text),
    sa.Column("error_message", sa.Text),
    sa.Column("requested_bytes", sa.BigInteger),
    sa.Column("allocated_bytes", sa.BigInteger),
    sa.Column("total_bytes", sa.BigInteger),
    sa.UniqueConstraint("run_id", "number"),
    _one_of("status", AttemptStatus),
    sa.Index("ix_attempts_status_lease_until", "status", "lease_until"),
    # the claim is the insert: two workers can never hold one run
    sa.Index(
        "uq_attempts_running",
        "run_id",
        unique=True,
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    ),
)

# No foreign keys on the three big tables: every insert happens in the transaction that has just
# updated the attempt's row (the fence), which proves that it exists once for all rows.
steps = sa.Table(
    "steps",
    metadata,
    sa.Column("attempt_id", _ID, primary_key=True, autoincrement=False),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("loss", sa.Double),
    sa.Column("gradient_norm", sa.Double),
    sa.Column("learning_rate", sa.Double),
    sa.Column("step_seconds", sa.Double),
    sa.Column("tokens", sa.BigInteger),
    sa.Column("allocated_bytes", sa.BigInteger),
    sa.Column("reserved_bytes", sa.BigInteger),
    sa.Column("peak_bytes", sa.BigInteger),
    sqlite_with_rowid=False,
)

evaluations = sa.Table(
    "evaluations",
    metadata,
    # the step comes last, so that the curve of one metric lies in one place
    sa.Column("attempt_id", _ID, primary_key=True, autoincrement=False),
    sa.Column("split", sa.Text, primary_key=True),
    sa.Column("metric", sa.Text, primary_key=True),
    sa.Column("k", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("standard_error", sa.Double),
    sa.Column("num_users", sa.BigInteger),
    sqlite_with_rowid=False,
)

histograms = sa.Table(
    "histograms",
    metadata,
    sa.Column("attempt_id", _ID, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("edges", sa.Text, nullable=False),
    sa.Column("counts", sa.Text, nullable=False),
    sqlite_with_rowid=False,
)

METRIC_SUMMARY_COLUMNS: tuple[str, ...] = tuple(
    f"{prefix}{column}{suffix}"
    for prefix in ("", "validation_")
    for column in METRIC_COLUMNS
    for suffix in ("", "_se")
)
"""Columns of `run_summary` for metrics: test and best validation values and standard errors."""

run_summary = sa.Table(
    "run_summary",
    metadata,
    sa.Column("run_id", _ID, sa.ForeignKey("runs.id"), primary_key=True, autoincrement=False),
    sa.Column("device_class", sa.Text, primary_key=True),
    sa.Column("attempt_id", _ID, sa.ForeignKey("attempts.id"), index=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("timing", sa.Text),
    sa.Column("memory_source", sa.Text),
    sa.Column("time_source", sa.Text),
    sa.Column("stop_reason", sa.Text),
    sa.Column("num_steps", sa.BigInteger),
    sa.Column("num_epochs", sa.BigInteger),
    sa.Column("best_step", sa.BigInteger),
    sa.Column("num_parameters", sa.BigInteger),
    sa.Column("final_loss", sa.Double),
    sa.Column("peak_train_memory_bytes", sa.BigInteger),
    sa.Column("peak_eval_memory_bytes", sa.BigInteger),
    sa.Column("memory_bound_bytes", sa.BigInteger),
    sa.Column("requested_bytes", sa.BigInteger),
    sa.Column("allocated_bytes", sa.BigInteger),
    sa.Column("total_bytes", sa.BigInteger),
    sa.Column("epoch_seconds", sa.Double),
    sa.Column("evaluation_seconds", sa.Double),
    sa.Column("step_seconds", sa.Double),
    sa.Column("train_seconds", sa.Double),
    sa.Column("tokens_per_second", sa.Double),
    sa.Column("error", sa.Text),
    sa.Column("finished_at", UtcDateTime, nullable=False),
    *(sa.Column(name, sa.Double) for name in METRIC_SUMMARY_COLUMNS),
    _one_of("status", RunStatus),
)

packed_summaries = sa.Table(
    "packed_summaries",
    metadata,
    sa.Column("run_id", _ID, primary_key=True, autoincrement=False),
    sa.Column("device_class", sa.Text, primary_key=True),
    sa.Column("layout", sa.BigInteger, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("numbers", sa.LargeBinary, nullable=False),
    sa.ForeignKeyConstraint(
        ["run_id", "device_class"],
        ["run_summary.run_id", "run_summary.device_class"],
        ondelete="CASCADE",
    ),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("run_id", _ID, sa.ForeignKey("runs.id"), index=True),
    sa.Column("attempt_id", _ID, sa.ForeignKey("attempts.id"), index=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("details", sa.Text),
)


def _evaluation_rows(alias: str, metric: str) -> str:
    return (
        f"{alias}.attempt_id = steps.attempt_id AND {alias}.split = 'validation' "
        f"AND {alias}.metric = '{metric}' AND {alias}.k = {SELECTION_K}"
    )


def _run_steps() -> str:
    """Step rows of each run's last attempt with its latest validation at or before the step.

    One left join per metric on the whole primary key: both databases leave out the joins whose
    columns a query does not name.
    """
    others = [metric for metric in METRICS if metric != SELECTION_METRIC]
    values = [
        f"{metric}_row.value AS {metric_column(metric, SELECTION_K)}"
        for metric in (SELECTION_METRIC, *others)
    ]
    first = f"{SELECTION_METRIC}_row"
    lines = [
        "SELECT runs.run_key, runs.dataset, runs.model, runs.loss AS loss_function,",
        "runs.batch_size, runs.max_seq_len, runs.num_negatives, runs.seed,",
        "attempts.id AS attempt_id, attempts.number AS attempt, attempts.device_class,",
        ", ".join(f"steps.{column.name}" for column in list(steps.c)[1:]) + ",",
        f"{first}.step AS evaluation_step,",
        ",\n".join(values),
        "FROM runs",
        "JOIN attempts ON attempts.run_id = runs.id",
        "JOIN steps ON steps.attempt_id = attempts.id",
        f"LEFT JOIN evaluations AS {first} ON {_evaluation_rows(first, SELECTION_METRIC)}",
        f"AND {first}.step = (SELECT earlier.step FROM evaluations AS earlier",
        f"WHERE {_evaluation_rows('earlier', SELECTION_METRIC)}",
        "AND earlier.step <= steps.step ORDER BY earlier.step DESC LIMIT 1)",
        *(
            f"LEFT JOIN evaluations AS {metric}_row ON "
            f"{_evaluation_rows(f'{metric}_row', metric)} AND {metric}_row.step = {first}.step"
            for metric in others
        ),
        "WHERE NOT EXISTS (SELECT 1 FROM attempts AS later",
        "WHERE later.run_id = attempts.run_id AND later.number > attempts.number)",
    ]
    return "\n".join(lines)


VIEWS: dict[str, str] = {"run_steps": _run_steps()}
"""SELECT statement of each view by name; the same text serves both databases."""


def spec_values(spec: RunSpec) -> dict[str, Any]:
    """Column values of a run specification.

    Raises
    ------
    StoreError
        An integer beyond 64 bits.
    """
    values = spec.to_dict()
    for name, value in values.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise StoreError(f"{name}={value} does not fit a 64-bit column; lower it")
        if _is_mixed(name) and value is not None:
            values[name] = str(value)
    return values


def spec_from_values(values: Mapping[str, Any]) -> RunSpec:
    """The run specification of a row of `runs`; columns that are no fields are left alone."""
    fields = {name: values[name] for name in SPEC_COLUMNS}
    for name, value in fields.items():
        if _is_mixed(name) and value is not None and value.isdecimal():
            fields[name] = int(value)
        elif bool in _options(field_types()[name]) and value is not None:
            fields[name] = bool(value)
    return RunSpec(**fields)
