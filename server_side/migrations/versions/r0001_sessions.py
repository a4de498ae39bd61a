"""The session table.

The constraints repeat what the code promises, so that a defect, or a hand with a SQL prompt, cannot store nonsense.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "node_sessions",
        sa.Column("session_id", sa.LargeBinary(16), primary_key=True),
        sa.Column("node", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("spec_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("program_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("next_step", sa.BigInteger, nullable=False),
        sa.Column("reserved_bytes", sa.BigInteger, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("length(session_id) = 16", name="node_sessions_session_id_size"),
        sa.CheckConstraint("length(node) = 64", name="node_sessions_node_size"),
        sa.CheckConstraint("length(owner) = 64", name="node_sessions_owner_size"),
        sa.CheckConstraint("length(spec_sha256) = 32", name="node_sessions_spec_size"),
        sa.CheckConstraint("length(program_sha256) = 32", name="node_sessions_program_size"),
        sa.CheckConstraint("state IN ('open', 'closed', 'expired', 'lost')", name="node_sessions_state_known"),
        sa.CheckConstraint("(state = 'open') = (ended_at IS NULL)", name="node_sessions_ended_once"),
        sa.CheckConstraint("next_step >= 0", name="node_sessions_next_step_counts"),
        sa.CheckConstraint("reserved_bytes >= 0", name="node_sessions_reserved_bytes_counts"),
        sa.CheckConstraint("parameters >= 0", name="node_sessions_parameters_counts"),
        # No constraint orders the times: a clock that is set back must not keep a session from ending.
    )
    op.create_index("node_sessions_by_node", "node_sessions", ["node", "state"])
    op.create_index("node_sessions_by_owner", "node_sessions", ["owner", "state"])
    op.create_index("node_sessions_by_end", "node_sessions", ["ended_at"])
