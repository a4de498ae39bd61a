"""Under which name the records of a data set stand in the ledger.

It catches a mistake, the same records by another name; the chain of releases does not cover it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "privacy_data_sets",
        sa.Column("content", sa.String(80), primary_key=True),
        sa.Column("data_set", sa.String(200), nullable=False),
    )
