"""The privacy ledger: a chain of releases.

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
        "privacy_releases",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("data_set", sa.String(200), nullable=False),
        sa.Column("run", sa.String(200), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("treatment", sa.String(30), nullable=False),
        sa.Column("unit", sa.String(40), nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("previous", sa.LargeBinary(32), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False, unique=True),
        sa.CheckConstraint("number >= 1", name="privacy_releases_number_counts"),
        sa.CheckConstraint("length(previous) = 32", name="privacy_releases_previous_size"),
        sa.CheckConstraint("length(digest) = 32", name="privacy_releases_digest_size"),
        # No constraint orders the times: the clock may be set back, and counts for nothing.
    )
    op.create_index("privacy_releases_by_data_set", "privacy_releases", ["data_set", "number"])
