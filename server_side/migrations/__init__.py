"""The node's database schema: Alembic revisions that ship with the package and run when the database is opened.

Nobody runs a migration by hand. ``versions`` holds one file per revision, oldest first; a released one is never edited.
The revision stands in a table of the node's own, so that other parts of Cloister can share the database.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from wire.errors import StorageError

__all__ = ["VERSION_TABLE", "migrate"]

VERSION_TABLE: Final = "node_schema_version"

# Alembic's `op` and `context` are globals of the process: two threads in them would mix up their connections.
_ALEMBIC: Final = threading.Lock()


def migrate(connection: Connection) -> None:
    """Brings a database to this version's schema; does nothing where it is there already.

    Args:
        connection: Stands in a transaction that keeps every other migrating process out; the caller commits it.

    Raises:
        StorageError: A newer Cloister wrote this database.
        sqlalchemy.exc.SQLAlchemyError: The database failed.
        alembic.util.CommandError: The schema's state is not one that a revision leaves behind.
    """
    config = _config(connection)
    script = ScriptDirectory.from_config(config)
    with _ALEMBIC:
        found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_heads()
        unknown = set(found) - {known.revision for known in script.walk_revisions()}
        if unknown:
            raise StorageError(
                f"written by a newer Cloister (schema {', '.join(sorted(unknown))}, this one knows up to "
                f"{script.get_current_head()}); upgrade Cloister or name another database"
            )
        if script.get_current_head() not in found:
            command.upgrade(config, "head")


def _config(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection})
    here = str(Path(__file__).parent)
    config.set_main_option("script_location", here.replace("%", "%%"))  # ConfigParser expands a single %
    return config
