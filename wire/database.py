"""Databases that outlive a process: SQLite in a file by default, PostgreSQL by URL; their schemas by Alembic.

A commit returns when the change is durable. Whoever opens a database brings its schema up to date; processes that start
at once wait for each other. Each part of Cloister keeps its revision in a table of its own, so that several can share a
database. A released revision is never edited.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from wire.errors import ConfigError, StorageError

__all__ = ["Schema", "Utc", "cause", "migrate", "open_database", "shown_url"]

_WAIT_S: Final = 10  # for a lock or a connection; a commit takes milliseconds, so whoever holds one longer hangs
_MIGRATION_LOCK: Final = 0x636C6F6973746572  # "cloister", among the advisory locks of a shared PostgreSQL

# Alembic's `op` and `context` are globals of the process: two threads in them would mix up their connections.
_ALEMBIC: Final = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One part's tables.

    Attributes:
        name: what errors call them: "session table".
        revisions: the folder with one file per revision, oldest first.
        version_table: where the revision stands that a database is at.
    """

    name: str
    revisions: Path
    version_table: str


class Utc(sa.TypeDecorator[datetime]):
    """A time with its zone, also in SQLite, which stores none."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: D102
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without its zone")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: D102
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


def open_database(url: str, schema: Schema) -> sa.Engine:
    """The database of that URL, its schema made or brought up to date.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql+psycopg://user@host/database``.
        schema: whose tables.

    Raises:
        ConfigError: The URL is not one of those.
        StorageError: The database cannot be opened, or a newer Cloister wrote it. The text is the operator's.
    """
    engine = _engine(url, schema.name)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE is a lock already
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            migrate(connection, schema)
    except (SQLAlchemyError, CommandError, OSError, StorageError) as error:
        engine.dispose()
        raise StorageError(f"{schema.name} {shown_url(engine.url)}: {cause(error)}") from error
    return engine


def migrate(connection: sa.Connection, schema: Schema) -> None:
    """Brings a database to this version's schema; does nothing where it is there already.

    Args:
        connection: Stands in a transaction that keeps every other migrating process out; the caller commits it.
        schema: whose tables.

    Raises:
        StorageError: A newer Cloister wrote this database.
        sqlalchemy.exc.SQLAlchemyError: The database failed.
        alembic.util.CommandError: The schema's state is not one that a revision leaves behind.
    """
    config = _config(connection, schema)
    script = ScriptDirectory.from_config(config)
    with _ALEMBIC:
        found = MigrationContext.configure(connection, opts={"version_table": schema.version_table}).get_current_heads()
        unknown = set(found) - {known.revision for known in script.walk_revisions()}
        if unknown:
            raise StorageError(
                f"written by a newer Cloister (schema {', '.join(sorted(unknown))}, this one knows up to "
                f"{script.get_current_head()}); upgrade Cloister or name another database"
            )
        if script.get_current_head() not in found:
            command.upgrade(config, "head")


def _config(connection: sa.Connection, schema: Schema) -> Config:
    config = Config(attributes={"connection": connection, "version_table": schema.version_table})
    places = {"script_location": Path(__file__).parent / "migrations", "version_locations": schema.revisions}
    for option, place in places.items():
        config.set_main_option(option, str(place).replace("%", "%%"))  # ConfigParser expands a single %
    config.set_main_option("path_separator", "newline")
    return config


def cause(error: Exception) -> str:
    """The driver's own first line; PostgreSQL goes on with the statement and the row."""
    text = str(error.orig if isinstance(error, DBAPIError) else error)
    return text.splitlines()[0] if text else type(error).__name__


def shown_url(url: sa.URL) -> str:
    """The URL without its password, which may also stand among the parameters."""
    return url.set(query={"host": url.query["host"]} if "host" in url.query else {}).render_as_string()


def _engine(url: str, name: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number
        parsed = None
    try:
        if parsed is not None and parsed.drivername in {"sqlite", "sqlite+pysqlite"}:
            return _sqlite(parsed, name)
        if parsed is not None and parsed.drivername == "postgresql+psycopg":
            return _postgresql(parsed)
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError("PostgreSQL needs its driver: pip install 'cloister[postgres]'") from error
    raise ConfigError(  # the URL is not repeated: it may hold a password
        f"the {name}'s URL must read sqlite:////path/to/file.sqlite or postgresql+psycopg://user@host/database"
    ) from None


def _sqlite(url: sa.URL, name: str) -> sa.Engine:
    path = url.database
    if not path or path == ":memory:" or url.query:
        raise ConfigError(f"the {name} must outlive the process; name a file alone: sqlite:////path/to/file.sqlite")
    try:
        # It says who trains when, and on what: for its operator's eyes only. SQLite's side files take over the mode.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise StorageError(f"{name} {shown_url(url)}: {error.strerror}; make its folder writable") from error
    # One connection: threads then wait for each other in turn, not in SQLite's sleeps. Transactions are begun below.
    engine = sa.create_engine(
        url,
        hide_parameters=True,
        pool_size=1,
        max_overflow=0,
        pool_timeout=_WAIT_S,
        connect_args={"timeout": _WAIT_S, "isolation_level": None},
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # A new file that two processes switch to WAL at once: SQLite gives up here without waiting.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    if mode != "wal":
        raise StorageError("this file system has no shared memory for SQLite's WAL; use a local disk or PostgreSQL")


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # a transaction that turns from reader to writer may not wait


def _postgresql(url: sa.URL) -> sa.Engine:
    ours = {
        "connect_timeout": _WAIT_S,
        "tcp_user_timeout": _WAIT_S * 1000,
        "options": f"-c statement_timeout={_WAIT_S * 1000}",
    }
    return sa.create_engine(
        url,
        hide_parameters=True,
        pool_pre_ping=True,  # a database that was restarted is found again
        pool_timeout=_WAIT_S,
        connect_args={name: value for name, value in ours.items() if name not in url.query},
    )
