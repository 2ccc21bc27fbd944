"""Results once more in one piece each, so that frames of many runs are read fast.

Opening the database with this srsweep fills the table.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_REDEFINED = """
replicate, dataset, model, loss, batch_size, max_seq_len, num_negatives, negative_sampler,
negatives_share, logq_correction, hits, filter_eps, filter_mode, gbce_t, sce_alpha, sce_beta,
sce_bucket_size_x, sce_bucket_size_y, sce_mix, embedding_dim, num_blocks, num_heads, dropout_rate,
mask_probability, learning_rate, optimizer, precision, max_epochs, patience, evaluate_every_steps,
max_validation_users, mask_seen, attend_padding, predict_first_item, count_padding, metric_frame,
paper_negatives, seed
"""
_OF_RESULT = (
    "DELETE FROM packed_summaries WHERE run_id = OLD.run_id AND device_class = OLD.device_class;"
)
_OF_RUN = "DELETE FROM packed_summaries WHERE run_id = OLD.id;"


def upgrade() -> None:
    """Make the table and the triggers that keep it true."""
    op.create_table(
        "packed_summaries",
        sa.Column("run_id", _ID, autoincrement=False, nullable=False),
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("layout", sa.BigInteger(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("numbers", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id", "device_class"],
            ["run_summary.run_id", "run_summary.device_class"],
            name=op.f("fk_packed_summaries_run_id_device_class_run_summary"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("run_id", "device_class", name=op.f("pk_packed_summaries")),
    )
    if op.get_bind().dialect.name == "sqlite":
        _sqlite_triggers()
    else:
        # a row of 2 kB stays in its page; in pieces elsewhere it would be read ten times slower
        op.execute("ALTER TABLE packed_summaries SET (toast_tuple_target = 8160)")
        _postgresql_triggers()


def _sqlite_triggers() -> None:
    op.execute(
        f"CREATE TRIGGER run_summary_updated BEFORE UPDATE ON run_summary BEGIN {_OF_RESULT} END"
    )
    op.execute(
        f"CREATE TRIGGER run_summary_deleted AFTER DELETE ON run_summary BEGIN {_OF_RESULT} END"
    )
    op.execute(
        f"CREATE TRIGGER runs_redefined AFTER UPDATE OF {_REDEFINED} ON runs BEGIN {_OF_RUN} END"
    )


def _postgresql_triggers() -> None:
    op.execute(
        "CREATE FUNCTION unpack_result() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {_OF_RESULT} RETURN NEW; END $$"
    )
    op.execute(
        "CREATE FUNCTION unpack_run() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {_OF_RUN} RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER run_summary_updated BEFORE UPDATE ON run_summary "
        "FOR EACH ROW EXECUTE FUNCTION unpack_result()"
    )
    op.execute(
        f"CREATE TRIGGER runs_redefined AFTER UPDATE OF {_REDEFINED} ON runs "
        "FOR EACH ROW EXECUTE FUNCTION unpack_run()"
    )
