"""The privacy ledger's schema: Alembic revisions that ship with the package; :mod:`wire.database` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from wire.database import Schema

__all__ = ["SCHEMA"]

SCHEMA: Final = Schema(
    name="privacy ledger",
    revisions=Path(__file__).parent / "versions",
    version_table="privacy_schema_version",
)
