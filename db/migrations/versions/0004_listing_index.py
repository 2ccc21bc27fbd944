"""Index of what listings of runs filter and sort by."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the index."""
    op.create_index(
        op.f("ix_run_summary_listed"),
        "run_summary",
        [
            "run_id",
            "device_class",
            "status",
            "timing",
            "num_steps",
            "best_step",
            "validation_ndcg_at_10",
            "ndcg_at_10",
            "coverage_at_10",
            "surprisal_at_10",
            "peak_train_memory_bytes",
            "memory_bound_bytes",
            "epoch_seconds",
            "step_seconds",
            "train_seconds",
            "tokens_per_second",
            "finished_at",
        ],
    )
