"""First schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_METRICS = ("ndcg", "hit_rate", "recall", "precision", "mrr", "map", "coverage", "surprisal")
_KS = (1, 5, 10, 20, 100)
_RUN_STATUSES = "'pending', 'running', 'done', 'diverged', 'failed', 'out_of_memory', 'skipped'"
_ATTEMPT_STATUSES = "'running', 'done', 'diverged', 'out_of_memory', 'error', 'lost', 'cancelled'"
_RUN_STEPS = """
SELECT runs.run_key, runs.dataset, runs.model, runs.loss AS loss_function,
runs.batch_size, runs.max_seq_len, runs.num_negatives, runs.seed,
attempts.id AS attempt_id, attempts.number AS attempt, attempts.device_class,
steps.step, steps.epoch, steps.loss, steps.gradient_norm, steps.learning_rate,
  steps.step_seconds, steps.tokens, steps.allocated_bytes, steps.reserved_bytes,
  steps.peak_bytes,
ndcg_row.step AS evaluation_step,
ndcg_row.value AS ndcg_at_10,
hit_rate_row.value AS hit_rate_at_10,
recall_row.value AS recall_at_10,
precision_row.value AS precision_at_10,
mrr_row.value AS mrr_at_10,
map_row.value AS map_at_10,
coverage_row.value AS coverage_at_10,
surprisal_row.value AS surprisal_at_10
FROM runs
JOIN attempts ON attempts.run_id = runs.id
JOIN steps ON steps.attempt_id = attempts.id
LEFT JOIN evaluations AS ndcg_row ON ndcg_row.attempt_id = steps.attempt_id AND ndcg_row.split =
  'validation' AND ndcg_row.metric = 'ndcg' AND ndcg_row.k = 10
AND ndcg_row.step = (SELECT earlier.step FROM evaluations AS earlier
WHERE earlier.attempt_id = steps.attempt_id AND earlier.split = 'validation' AND earlier.metric
  = 'ndcg' AND earlier.k = 10
AND earlier.step <= steps.step ORDER BY earlier.step DESC LIMIT 1)
LEFT JOIN evaluations AS hit_rate_row ON hit_rate_row.attempt_id = steps.attempt_id AND
  hit_rate_row.split = 'validation' AND hit_rate_row.metric = 'hit_rate' AND hit_rate_row.k = 10
  AND hit_rate_row.step = ndcg_row.step
LEFT JOIN evaluations AS recall_row ON recall_row.attempt_id = steps.attempt_id AND
  recall_row.split = 'validation' AND recall_row.metric = 'recall' AND recall_row.k = 10 AND
  recall_row.step = ndcg_row.step
LEFT JOIN evaluations AS precision_row ON precision_row.attempt_id = steps.attempt_id AND
  precision_row.split = 'validation' AND precision_row.metric = 'precision' AND precision_row.k
  = 10 AND precision_row.step = ndcg_row.step
LEFT JOIN evaluations AS mrr_row ON mrr_row.attempt_id = steps.attempt_id AND mrr_row.split =
  'validation' AND mrr_row.metric = 'mrr' AND mrr_row.k = 10 AND mrr_row.step = ndcg_row.step
LEFT JOIN evaluations AS map_row ON map_row.attempt_id = steps.attempt_id AND map_row.split =
  'validation' AND map_row.metric = 'map' AND map_row.k = 10 AND map_row.step = ndcg_row.step
LEFT JOIN evaluations AS coverage_row ON coverage_row.attempt_id = steps.attempt_id AND
  coverage_row.split = 'validation' AND coverage_row.metric = 'coverage' AND coverage_row.k = 10
  AND coverage_row.step = ndcg_row.step
LEFT JOIN evaluations AS surprisal_row ON surprisal_row.attempt_id = steps.attempt_id AND
  surprisal_row.split = 'validation' AND surprisal_row.metric = 'surprisal' AND surprisal_row.k
  = 10 AND surprisal_row.step = ndcg_row.step
WHERE NOT EXISTS (SELECT 1 FROM attempts AS later
WHERE later.run_id = attempts.run_id AND later.number > attempts.number)
"""


def _metric_columns() -> list[sa.Column[float]]:
    return [
        sa.Column(f"{prefix}{metric}_at_{k}{suffix}", sa.Double())
        for prefix in ("", "validation_")
        for metric in _METRICS
        for k in _KS
        for suffix in ("", "_se")
    ]


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("num_users", sa.BigInteger(), nullable=True),
        sa.Column("num_items", sa.BigInteger(), nullable=True),
        sa.Column("num_items_filtered", sa.BigInteger(), nullable=True),
        sa.Column("num_interactions", sa.BigInteger(), nullable=True),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_datasets_fingerprint")),
    )
    op.create_table(
        "evaluations",
        sa.Column("attempt_id", _ID, autoincrement=False, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("k", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("standard_error", sa.Double(), nullable=True),
        sa.Column("num_users", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint(
            "attempt_id", "split", "metric", "k", "step", name=op.f("pk_evaluations")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "histograms",
        sa.Column("attempt_id", _ID, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("edges", sa.Text(), nullable=False),
        sa.Column("counts", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("attempt_id", "name", "step", name=op.f("pk_histograms")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "steps",
        sa.Column("attempt_id", _ID, autoincrement=False, nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("gradient_norm", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("step_seconds", sa.Double(), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.Column("allocated_bytes", sa.BigInteger(), nullable=True),
        sa.Column("reserved_bytes", sa.BigInteger(), nullable=True),
        sa.Column("peak_bytes", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("attempt_id", "step", name=op.f("pk_steps")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sweeps",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("grid", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("launched_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
        sa.UniqueConstraint("name", name=op.f("uq_sweeps_name")),
    )
    op.create_table(
        "runs",
        sa.Column("id", _ID, nullable=False),
        sa.Column("run_key", sa.Text(), nullable=False),
        sa.Column("dataset_id", _ID, nullable=False),
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("loss", sa.Text(), nullable=False),
        sa.Column("batch_size", sa.BigInteger(), nullable=False),
        sa.Column("max_seq_len", sa.BigInteger(), nullable=False),
        sa.Column("num_negatives", sa.BigInteger(), nullable=True),
        sa.Column("negative_sampler", sa.Text(), nullable=False),
        sa.Column("negatives_share", sa.Text(), nullable=False),
        sa.Column("logq_correction", sa.Boolean(), nullable=False),
        sa.Column("hits", sa.Text(), nullable=False),
        sa.Column("filter_eps", sa.Double(), nullable=True),
        sa.Column("filter_mode", sa.Text(), nullable=False),
        sa.Column("gbce_t", sa.Double(), nullable=False),
        sa.Column("sce_alpha", sa.Double(), nullable=False),
        sa.Column("sce_beta", sa.Double(), nullable=False),
        sa.Column("sce_bucket_size_x", sa.BigInteger(), nullable=True),
        sa.Column("sce_bucket_size_y", sa.BigInteger(), nullable=False),
        sa.Column("sce_mix", sa.Boolean(), nullable=False),
        sa.Column("embedding_dim", sa.BigInteger(), nullable=False),
        sa.Column("num_blocks", sa.BigInteger(), nullable=False),
        sa.Column("num_heads", sa.BigInteger(), nullable=False),
        sa.Column("dropout_rate", sa.Double(), nullable=False),
        sa.Column("mask_probability", sa.Double(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("optimizer", sa.Text(), nullable=False),
        sa.Column("precision", sa.Text(), nullable=False),
        sa.Column("max_epochs", sa.BigInteger(), nullable=False),
        sa.Column("patience", sa.BigInteger(), nullable=False),
        sa.Column("evaluate_every_steps", sa.BigInteger(), nullable=True),
        sa.Column("max_validation_users", sa.BigInteger(), nullable=True),
        sa.Column("mask_seen", sa.Boolean(), nullable=False),
        sa.Column("attend_padding", sa.Boolean(), nullable=False),
        sa.Column("predict_first_item", sa.Boolean(), nullable=False),
        sa.Column("count_padding", sa.Boolean(), nullable=False),
        sa.Column("metric_frame", sa.Text(), nullable=False),
        sa.Column("paper_negatives", sa.Boolean(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("replicate", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("skipped_by", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            f"status IN ({_RUN_STATUSES})",
            name=op.f("ck_runs_status"),
        ),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name=op.f("fk_runs_dataset_id_datasets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("run_key", name=op.f("uq_runs_run_key")),
    )
    op.create_index(op.f("ix_runs_dataset_id"), "runs", ["dataset_id"], unique=False)
    op.create_index(op.f("ix_runs_status"), "runs", ["status"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("id", _ID, nullable=False),
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("lease_seconds", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_step", sa.Integer(), nullable=True),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("pid", sa.BigInteger(), nullable=True),
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("device_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("timing", sa.Text(), nullable=True),
        sa.Column("versions", sa.Text(), nullable=True),
        sa.Column("git_commit", sa.Text(), nullable=True),
        sa.Column("error_class", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("requested_bytes", sa.BigInteger(), nullable=True),
        sa.Column("allocated_bytes", sa.BigInteger(), nullable=True),
        sa.Column("total_bytes", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            f"status IN ({_ATTEMPT_STATUSES})",
            name=op.f("ck_attempts_status"),
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_attempts_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("run_id", "number", name=op.f("uq_attempts_run_id_number")),
    )
    op.create_index(
        "ix_attempts_status_lease_until", "attempts", ["status", "lease_until"], unique=False
    )
    op.create_index(
        "uq_attempts_running",
        "attempts",
        ["run_id"],
        unique=True,
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_table(
        "sweep_runs",
        sa.Column("sweep_id", _ID, nullable=False),
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_sweep_runs_run_id_runs")),
        sa.ForeignKeyConstraint(
            ["sweep_id"], ["sweeps.id"], name=op.f("fk_sweep_runs_sweep_id_sweeps")
        ),
        sa.PrimaryKeyConstraint("sweep_id", "run_id", name=op.f("pk_sweep_runs")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_sweep_runs_run_id"), "sweep_runs", ["run_id"], unique=False)
    op.create_table(
        "events",
        sa.Column("id", _ID, nullable=False),
        sa.Column("run_id", _ID, nullable=True),
        sa.Column("attempt_id", _ID, nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("details", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.id"], name=op.f("fk_events_attempt_id_attempts")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_events_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_attempt_id"), "events", ["attempt_id"], unique=False)
    op.create_index(op.f("ix_events_run_id"), "events", ["run_id"], unique=False)
    op.create_table(
        "run_summary",
        sa.Column("run_id", _ID, autoincrement=False, nullable=False),
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("attempt_id", _ID, nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("timing", sa.Text(), nullable=True),
        sa.Column("memory_source", sa.Text(), nullable=True),
        sa.Column("time_source", sa.Text(), nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("num_steps", sa.BigInteger(), nullable=True),
        sa.Column("num_epochs", sa.BigInteger(), nullable=True),
        sa.Column("best_step", sa.BigInteger(), nullable=True),
        sa.Column("num_parameters", sa.BigInteger(), nullable=True),
        sa.Column("final_loss", sa.Double(), nullable=True),
        sa.Column("peak_train_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("peak_eval_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("memory_bound_bytes", sa.BigInteger(), nullable=True),
        sa.Column("requested_bytes", sa.BigInteger(), nullable=True),
        sa.Column("allocated_bytes", sa.BigInteger(), nullable=True),
        sa.Column("total_bytes", sa.BigInteger(), nullable=True),
        sa.Column("epoch_seconds", sa.Double(), nullable=True),
        sa.Column("evaluation_seconds", sa.Double(), nullable=True),
        sa.Column("step_seconds", sa.Double(), nullable=True),
        sa.Column("train_seconds", sa.Double(), nullable=True),
        sa.Column("tokens_per_second", sa.Double(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        *_metric_columns(),
        sa.CheckConstraint(
            f"status IN ({_RUN_STATUSES})",
            name=op.f("ck_run_summary_status"),
        ),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.id"], name=op.f("fk_run_summary_attempt_id_attempts")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_summary_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "device_class", name=op.f("pk_run_summary")),
    )
    op.create_index(op.f("ix_run_summary_attempt_id"), "run_summary", ["attempt_id"], unique=False)
    op.execute(f"CREATE VIEW run_steps AS {_RUN_STEPS}")
