"""A run's journal in SQL: its checkpoints, and what happened to it. ``cloister runs`` reads it.

Nothing that a resume needs stands here alone: files tell themselves whether they are whole, so a damaged journal is put
aside and begun anew.
"""

from __future__ import annotations

import datetime as dt
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from wire.errors import CheckpointError

__all__ = ["CheckpointEntry", "Event", "Journal"]

_log = logging.getLogger(__name__)

_VERSION: Final = 1  # PRAGMA user_version
_MOST_EVENTS: Final = 1000  # a link that flaps for days must not fill a disk
_WAIT_S: Final = 10  # for `cloister runs`, which reads for milliseconds
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: another schema

_METADATA: Final = sa.MetaData()
_CHECKPOINTS: Final = sa.Table(
    "checkpoints",
    _METADATA,
    sa.Column("step", sa.BigInteger, primary_key=True),
    sa.Column("file", sa.String(200), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sent_bytes", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
_EVENTS: Final = sa.Table(
    "events",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("text", sa.String(2000), nullable=False),
)
_SESSIONS: Final = sa.Table(
    "sessions",
    _METADATA,
    sa.Column("node", sa.String(300), primary_key=True),
    sa.Column("session_id", sa.LargeBinary(16), nullable=False),
)


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One checkpoint: its file, its bytes, what of its snapshot came over the wire, and how long it took."""

    step: int
    file: str
    bytes: int
    sent_bytes: int
    seconds: float
    at: str


@dataclass(frozen=True, slots=True)
class Event:
    """What happened: ``began``, ``resumed``, ``moved``, ``skipped`` (a damaged checkpoint), ``stopped``, ``ended``."""

    at: str
    step: int
    kind: str
    text: str


class Journal:
    """One run's ``run.sqlite``. Safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        """Opens it, or makes it; a damaged one is put aside.

        Raises:
            CheckpointError: it cannot be made, or a newer Cloister wrote it.
        """
        self._path = path
        try:
            self._engine = _opened(path)
        except SQLAlchemyError as error:
            if not _is_damage(error):  # a full disk, or somebody else's lock: what stands there is good
                raise CheckpointError(f"cannot open {path}: {_cause(error)}; mend that and resume the run") from error
            aside = path.with_name(f"{path.name}.damaged")
            _log.warning("the journal %s is damaged: it is now %s, and a new one begins", path, aside.name)
            try:
                for suffix in ("-journal", "-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
                path.replace(aside)
                self._engine = _opened(path)
            except (OSError, SQLAlchemyError) as error:
                raise CheckpointError(f"cannot write {path}: {_cause(error)}") from error

    def checkpointed(self, entry: CheckpointEntry, keep: list[int]) -> None:
        """Notes a checkpoint; those of other steps than ``keep`` are gone.

        Raises:
            CheckpointError: the disk fails.
        """
        values = {name: getattr(entry, name) for name in CheckpointEntry.__slots__}
        with self._transaction() as connection:
            connection.execute(sa.delete(_CHECKPOINTS).where(_CHECKPOINTS.c.step.not_in([*keep])))
            connection.execute(sa.delete(_CHECKPOINTS).where(_CHECKPOINTS.c.step == entry.step))
            connection.execute(sa.insert(_CHECKPOINTS).values(values))

    def happened(self, step: int, kind: str, text: str) -> None:
        """Notes an event; of very many, the oldest are forgotten.

        Raises:
            CheckpointError: the disk fails.
        """
        with self._transaction() as connection:
            connection.execute(sa.insert(_EVENTS).values(at=now(), step=step, kind=kind, text=text[:2000]))
            newest = sa.select(_EVENTS.c.id).order_by(_EVENTS.c.id.desc()).limit(_MOST_EVENTS)
            connection.execute(sa.delete(_EVENTS).where(_EVENTS.c.id.not_in(newest)))

    def opened(self, node: str, session_id: bytes) -> None:
        """Notes the session that the run has on a node, so that a later process can replace it.

        Raises:
            CheckpointError: the disk fails.
        """
        with self._transaction() as connection:
            connection.execute(sa.delete(_SESSIONS).where(_SESSIONS.c.node == node))
            connection.execute(sa.insert(_SESSIONS).values(node=node, session_id=session_id))

    def session_on(self, node: str) -> bytes:
        """The session that the run had there last; empty for none."""
        with self._transaction() as connection:
            found = connection.execute(sa.select(_SESSIONS.c.session_id).where(_SESSIONS.c.node == node))
            return found.scalar_one_or_none() or b""

    def checkpoints(self) -> list[CheckpointEntry]:
        """The newest first."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(_CHECKPOINTS).order_by(_CHECKPOINTS.c.step.desc())).all()
        return [CheckpointEntry(**row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's public name for it

    def events(self) -> list[Event]:
        """The oldest first."""
        columns = [_EVENTS.c[name] for name in Event.__slots__]
        with self._transaction() as connection:
            rows = connection.execute(sa.select(*columns).order_by(_EVENTS.c.id)).all()
        return [Event(**row._mapping) for row in rows]  # noqa: SLF001 - as above

    def close(self) -> None:
        """Lets go of the file."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise CheckpointError(f"the journal {self._path}: {_cause(error)}; mend that and resume the run") from error


def now() -> str:
    """This moment in UTC, as ISO 8601."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _opened(path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": _WAIT_S})
    try:
        with engine.begin() as connection:
            _check(connection, path)
            _METADATA.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {_VERSION}")
    except BaseException:
        engine.dispose()
        raise
    return engine


def _check(connection: sa.Connection, path: Path) -> None:
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version > _VERSION:
        raise CheckpointError(f"a newer Cloister wrote {path}: resume with that one")
    sound = connection.exec_driver_sql("PRAGMA quick_check").scalar_one()
    if sound != "ok":
        raise sa.exc.DatabaseError("quick_check", None, ValueError(sound))


def _is_damage(error: SQLAlchemyError) -> bool:
    """Whether the file itself is no good; else what happened to it may pass."""
    inner = getattr(error, "orig", None)
    if not isinstance(inner, sqlite3.Error):
        return True  # what quick_check found
    return inner.sqlite_errorcode & 0xFF in _DAMAGE  # the rest of an extended code says where it was noticed


def _cause(error: Exception) -> str:
    inner = getattr(error, "orig", None) or error
    return getattr(inner, "strerror", None) or str(inner)
