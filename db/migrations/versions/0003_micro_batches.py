"""Size of the micro-batches of a run."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_REDEFINED = """
replicate, dataset, model, loss, batch_size, micro_batch_size, max_seq_len, num_negatives,
negative_sampler, negatives_share, logq_correction, hits, filter_eps, filter_mode, gbce_t,
sce_alpha, sce_beta, sce_bucket_size_x, sce_bucket_size_y, sce_mix, embedding_dim, num_blocks,
num_heads, dropout_rate, mask_probability, learning_rate, optimizer, precision, max_epochs,
patience, evaluate_every_steps, max_validation_users, mask_seen, attend_padding, predict_first_item,
count_padding, metric_frame, paper_negatives, seed
"""


def upgrade() -> None:
    """Add the column, and let the trigger of packed results see it."""
    op.add_column("runs", sa.Column("micro_batch_size", sa.BigInteger(), nullable=True))
    trigger = f"CREATE TRIGGER runs_redefined AFTER UPDATE OF {_REDEFINED} ON runs "
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER runs_redefined")
        action = "DELETE FROM packed_summaries WHERE run_id = OLD.id;"
        op.execute(f"{trigger} BEGIN {action} END")
    else:
        op.execute("DROP TRIGGER runs_redefined ON runs")
        op.execute(f"{trigger} FOR EACH ROW EXECUTE FUNCTION unpack_run()")
