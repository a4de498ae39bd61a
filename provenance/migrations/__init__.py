"""The provenance log's schema: Alembic revisions that ship with the package; :mod:`wire.database` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from wire.database import Schema

__all__ = ["SCHEMA"]

SCHEMA: Final = Schema(
    name="provenance log",
    revisions=Path(__file__).parent / "versions",
    version_table="provenance_schema_version",
)
