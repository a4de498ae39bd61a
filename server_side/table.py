"""The node's session table: which sessions there were, whose they are, and how they ended.

Sessions live in memory; this table outlives the process. It keeps a session id from being used twice (THREATS T04),
tells an owner whose session died with the process that it is lost (T07), and says which owner a session belongs to
(T03). SQLite in a file by default; PostgreSQL where several nodes share one database. A call returns when the change is
durable.

An id is spent for as long as its row stands, which is at least :data:`RETENTION` after the session's end; a running
session's row is never pruned.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from server_side.migrations import SCHEMA
from wire.database import Utc, cause, open_database, shown_url
from wire.errors import SessionNotFoundError, SessionReusedError, SpecRejectedError, StorageError

__all__ = ["RETENTION", "OwnerUsage", "SessionRow", "SessionState", "SessionTable"]

RETENTION: Final = timedelta(days=30)  # longer than an owner's restored backup is old; 30,000 sessions take 21 MB

_ID_BYTES: Final = 16
_DIGEST_BYTES: Final = 32
_LARGEST: Final = 2**62  # half of what both databases hold: steps that start here never count past the end

_log = logging.getLogger(__name__)


class SessionState(enum.StrEnum):
    """Where a session stands. Only ``OPEN`` is ever left."""

    OPEN = "open"
    CLOSED = "closed"
    EXPIRED = "expired"
    LOST = "lost"


@dataclasses.dataclass(frozen=True, slots=True)
class SessionRow:
    """One session. Times carry their zone and come back in UTC; fingerprints are SHA-256 in hexadecimal.

    Raises:
        SpecRejectedError: An identifier, a digest or a number does not fit the table (an owner may have sent it).
    """

    session_id: bytes
    node: str
    owner: str
    spec_sha256: bytes
    program_sha256: bytes
    next_step: int
    reserved_bytes: int
    parameters: int
    opened_at: datetime
    last_used_at: datetime
    state: SessionState = SessionState.OPEN
    ended_at: datetime | None = None

    def __post_init__(self) -> None:
        sizes = {"session_id": _ID_BYTES, "spec_sha256": _DIGEST_BYTES, "program_sha256": _DIGEST_BYTES}
        for name, size in sizes.items():
            if len(getattr(self, name)) != size:
                raise SpecRejectedError(f"{name} has {len(getattr(self, name))} bytes; it must have {size}")
        for name in ("next_step", "reserved_bytes", "parameters"):
            if not 0 <= getattr(self, name) <= _LARGEST:
                raise SpecRejectedError(f"{name} is {getattr(self, name)}; this node counts from 0 to {_LARGEST}")


@dataclasses.dataclass(frozen=True, slots=True)
class OwnerUsage:
    """What one owner holds."""

    sessions: int = 0
    reserved_bytes: int = 0
    parameters: int = 0


# The constraints stand in the migration, which is what makes the table.
_SESSIONS: Final = sa.Table(
    "node_sessions",
    sa.MetaData(),
    sa.Column("session_id", sa.LargeBinary(_ID_BYTES), primary_key=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("spec_sha256", sa.LargeBinary(_DIGEST_BYTES), nullable=False),
    sa.Column("program_sha256", sa.LargeBinary(_DIGEST_BYTES), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("next_step", sa.BigInteger, nullable=False),
    sa.Column("reserved_bytes", sa.BigInteger, nullable=False),
    sa.Column("parameters", sa.BigInteger, nullable=False),
    sa.Column("opened_at", Utc, nullable=False),
    sa.Column("last_used_at", Utc, nullable=False),
    sa.Column("ended_at", Utc, nullable=True),
    sa.Index("node_sessions_by_node", "node", "state"),
    sa.Index("node_sessions_by_owner", "owner", "state"),
    sa.Index("node_sessions_by_end", "ended_at"),
)
_C: Final = _SESSIONS.c


class SessionTable:
    """The sessions of one node, or of several that share a PostgreSQL. Safe to use from any thread.

    Every method raises :class:`StorageError` where the database fails; the log says why, the error only what to do.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql+psycopg://user@host/database``. The schema is made, or brought
            up to date, here; processes that start at once wait for each other.

    Raises:
        ConfigError: The URL is not one of those.
        StorageError: The database cannot be opened, or a newer Cloister wrote it. The text is the operator's.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_database(url, SCHEMA)
        self._name = shown_url(self._engine.url)
        self._closed = False

    def open(self, row: SessionRow) -> None:
        """Writes a new session down; its id is spent from then on.

        Raises:
            SessionReusedError: The id was used before, by whomever, however that session ended.
        """
        values = dataclasses.asdict(row)
        with self._transaction("opening a session") as connection:
            insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            statement = insert(_SESSIONS).values(values).on_conflict_do_nothing().returning(_C.session_id)
            written = connection.execute(statement).scalar_one_or_none()
        if written is None:
            raise SessionReusedError(f"session id {row.session_id.hex()} was used before; draw a new one")

    def find(self, session_id: bytes) -> SessionRow | None:
        """The session of that id, in whatever state; who may see it is the caller's to check."""
        with self._transaction("finding a session") as connection:
            found = connection.execute(sa.select(_SESSIONS).where(_C.session_id == session_id)).one_or_none()
        return None if found is None else _row(found)

    def touch(self, session_id: bytes, next_step: int, when: datetime) -> None:
        """Notes how far an open session has come; ``next_step`` never goes back, however late a call arrives.

        Raises:
            SessionNotFoundError: No open session has that id.
        """
        furthest = sa.case((_C.next_step > next_step, _C.next_step), else_=next_step)
        with self._transaction("noting a session's progress") as connection:
            where = (_C.session_id == session_id) & (_C.state == SessionState.OPEN)
            change = sa.update(_SESSIONS).where(where).values(next_step=furthest, last_used_at=when)
            touched = connection.execute(change).rowcount
        if not touched:
            raise SessionNotFoundError(f"no open session {session_id.hex()}; open a new one")

    def end(self, session_id: bytes, how: SessionState, when: datetime | None = None) -> bool:
        """Ends an open session; the first end counts.

        Returns:
            Whether it was open.
        """
        where = _C.session_id == session_id
        return self._end("ending a session", where, how, when) == 1

    def mark_lost(self, node: str, when: datetime | None = None) -> int:
        """Ends all sessions that a node's earlier process left open; called once, before the node serves.

        One process at a time serves under a node's identity: a second one on the same database ends the first one's.

        Returns:
            How many there were.
        """
        return self._end("marking lost sessions", _C.node == node, SessionState.LOST, when)

    def open_sessions(self, node: str) -> tuple[SessionRow, ...]:
        """A node's open sessions, oldest first."""
        where = (_C.node == node) & (_C.state == SessionState.OPEN)
        with self._transaction("listing sessions") as connection:
            found = connection.execute(sa.select(_SESSIONS).where(where).order_by(_C.opened_at, _C.session_id)).all()
        return tuple(_row(each) for each in found)

    def owner_usage(self, owner: str) -> OwnerUsage:
        """What an owner holds in open sessions, on all nodes that share this table."""
        sums = (sa.func.coalesce(sa.func.sum(column), 0) for column in (_C.reserved_bytes, _C.parameters))
        where = (_C.owner == owner) & (_C.state == SessionState.OPEN)
        with self._transaction("adding up an owner's sessions") as connection:
            count, reserved, parameters = connection.execute(sa.select(sa.func.count(), *sums).where(where)).one()
        return OwnerUsage(sessions=count, reserved_bytes=int(reserved), parameters=int(parameters))

    def prune(self, before: datetime) -> int:
        """Forgets sessions that ended before ``before``, and at least :data:`RETENTION` ago: their ids may come again.

        Returns:
            How many were forgotten.
        """
        bound = min(before, datetime.now(UTC) - RETENTION)
        with self._transaction("pruning") as connection:
            return connection.execute(sa.delete(_SESSIONS).where(_C.ended_at < bound)).rowcount

    def close(self) -> None:
        """Lets go of the database; any later call raises :class:`StorageError`."""
        self._closed = True
        self._engine.dispose()

    def _end(self, doing: str, where: sa.ColumnElement[bool], how: SessionState, when: datetime | None) -> int:
        if how is SessionState.OPEN:
            raise ValueError("a session ends as closed, expired or lost")
        change = sa.update(_SESSIONS).where(where & (_C.state == SessionState.OPEN))
        with self._transaction(doing) as connection:
            return connection.execute(change.values(state=how, ended_at=when or datetime.now(UTC))).rowcount

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sa.Connection]:
        if self._closed:
            raise StorageError("this node is shutting down; take another node")
        try:
            with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            _log.error("session table %s: %s failed: %s", self._name, doing, cause(error))
            raise StorageError("the node's session table fails; try again later or take another node") from error


def _row(found: sa.Row[Any]) -> SessionRow:
    values = dict(found._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
    return SessionRow(**values | {"state": SessionState(values["state"])})
