"""The provenance log: its entries, the complete subtrees over them, its signed heads, and the outbox to a chain.

The constraints and triggers repeat what the code promises, so that a defect, or a hand with a SQL prompt, cannot
rewrite history by accident; who means to is found by :meth:`provenance.log.Log.verify` and by any older head.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_FROZEN = ("provenance_log", "provenance_entries", "provenance_nodes", "provenance_heads")


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "provenance_log",
        sa.Column("id", sa.LargeBinary(32), primary_key=True),
        sa.CheckConstraint("length(id) = 32", name="provenance_log_id_size"),
    )
    op.create_table(
        "provenance_entries",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("leaf", sa.LargeBinary(32), nullable=False, unique=True),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("number >= 0", name="provenance_entries_number_counts"),
        sa.CheckConstraint("length(leaf) = 32", name="provenance_entries_leaf_size"),
    )
    op.create_table(
        "provenance_nodes",
        # level * 2^48 + index
        sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.CheckConstraint("length(hash) = 32", name="provenance_nodes_hash_size"),
    )
    op.create_table(
        "provenance_heads",
        sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("root", sa.LargeBinary(32), nullable=False),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("size >= 1", name="provenance_heads_size_counts"),
        sa.CheckConstraint("length(root) = 32", name="provenance_heads_root_size"),
    )
    op.create_table(
        "provenance_outbox",
        sa.Column("target", sa.String(200), primary_key=True),
        sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("root", sa.LargeBinary(32), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("nonce", sa.BigInteger),
        sa.Column("transaction", sa.LargeBinary(32)),
        sa.Column("block_number", sa.BigInteger),
        sa.Column("block_hash", sa.LargeBinary(32)),
        sa.Column("block_time", sa.BigInteger),
        sa.CheckConstraint(
            "state IN ('waiting', 'sent', 'mined', 'final', 'covered')", name="provenance_outbox_state_known"
        ),
        sa.CheckConstraint(
            "state NOT IN ('mined', 'final') OR block_number IS NOT NULL", name="provenance_outbox_mined_in_a_block"
        ),
        sa.UniqueConstraint("target", "nonce", name="provenance_outbox_one_head_a_nonce"),
    )
    op.create_table(
        "provenance_transactions",
        sa.Column("hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("nonce", sa.BigInteger, nullable=False),
        sa.Column("raw", sa.LargeBinary, nullable=False),
        sa.Column("fee", sa.Numeric(40, 0), nullable=False),
        sa.Column("tip", sa.Numeric(40, 0), nullable=False),
        sa.Column("signed_at", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(["target", "size"], ["provenance_outbox.target", "provenance_outbox.size"]),
    )
    op.create_index("provenance_transactions_of", "provenance_transactions", ["target", "size"])
    for table in _FROZEN:
        _freeze(table)


def _freeze(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'the provenance log is append-only'); END"
            )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION provenance_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the provenance log is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_frozen BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        "FOR EACH STATEMENT EXECUTE FUNCTION provenance_is_append_only()"
    )
