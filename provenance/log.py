"""The log that holds all records: an RFC 9162 tree in a database, append-only, with signed tree heads.

An entry is a record's envelope, byte for byte; the tree's leaves are over these bytes. The complete subtrees are kept,
so that a proof reads a few dozen hashes, whatever the log's size. Nothing is ever changed or removed, and what was once
signed as a head can be held against the log for ever: a rewritten log has no consistency proof from it.

The log's owner could keep two logs. That is what anchoring is for: see :mod:`provenance.anchors`.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from provenance.envelope import seal
from provenance.heads import HEAD_TYPE, Consistency, Inclusion, TreeHead, open_head
from provenance.merkle import (
    EMPTY_ROOT,
    Frontier,
    Range,
    check_consistency,
    consistency_ranges,
    cover,
    inclusion_ranges,
    leaf_hash,
    range_root,
)
from provenance.migrations import SCHEMA
from wire.database import cause, open_database, shown_url
from wire.errors import ProvenanceError, StorageError

if TYPE_CHECKING:
    from eth_account.signers.base import BaseAccount

__all__ = ["HEAD_TYPE", "Consistency", "Inclusion", "Log", "TreeHead", "default_url", "open_head"]

_LOCK: Final = 0x70726F76656E  # "proven", among the advisory locks of a shared PostgreSQL
_LEVEL: Final = 2**48
_CACHED: Final = 100_000  # hashes in memory, of those that proofs share: some 20 MB
_FEW: Final = 500  # values in one IN (...): SQLite takes 32,766, and plans them one by one

# The constraints stand in the migration, which is what makes the tables.
_META: Final = sa.MetaData()
_LOG: Final = sa.Table("provenance_log", _META, sa.Column("id", sa.LargeBinary(32), primary_key=True))
_ENTRIES: Final = sa.Table(
    "provenance_entries",
    _META,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("leaf", sa.LargeBinary(32), nullable=False, unique=True),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
)
_NODES: Final = sa.Table(
    "provenance_nodes",
    _META,
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
)
_HEADS: Final = sa.Table(
    "provenance_heads",
    _META,
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("root", sa.LargeBinary(32), nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
)


def default_url() -> str:
    """``CLOISTER_LOG``, or a file of the user's own, beside the privacy ledger."""
    said = os.environ.get("CLOISTER_LOG")
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return said or f"sqlite:///{home / 'cloister' / 'provenance.sqlite'}"


class Log:
    """A provenance log in a database; any number of processes may hold it open."""

    def __init__(self, url: str | None = None) -> None:
        """Opens the log, and makes it if there is none.

        Args:
            url: ``sqlite:////absolute/path`` or ``postgresql+psycopg://…``; :func:`default_url` if not said.

        Raises:
            ConfigError: the URL is none of those.
            ProvenanceError: the database cannot be opened.
        """
        url = url or default_url()
        try:
            if url.startswith("sqlite:///"):
                Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.engine = open_database(url, SCHEMA)
        except (StorageError, OSError) as error:
            raise ProvenanceError(str(error)) from error
        self.name = shown_url(self.engine.url)
        self._known_hashes: dict[tuple[int, int], bytes] = {}  # they never change
        self._seen = 0  # records: there are at least so many
        with self.transaction("opening") as connection:
            found = connection.execute(sa.select(_LOG.c.id)).scalar_one_or_none()
            if found is None:
                found = secrets.token_bytes(32)
                connection.execute(sa.insert(_LOG).values(id=found))
            self.id: bytes = found

    def append(self, envelopes: Sequence[bytes]) -> list[int]:
        """Appends records, all or none; durable when it returns.

        Returns:
            Each one's number. A record that is in the log already keeps the number it has.

        Raises:
            ProvenanceError: the database fails.
        """
        leaves = [leaf_hash(envelope) for envelope in envelopes]
        with self.transaction("appending") as connection:
            numbers = _numbers(connection, leaves)
            entries: list[dict[str, Any]] = []
            nodes: list[dict[str, Any]] = []
            frontier = _frontier(connection, nodes)
            for leaf, envelope in zip(leaves, envelopes, strict=True):
                if leaf not in numbers:
                    numbers[leaf] = frontier.size
                    entries.append({"number": frontier.size, "leaf": leaf, "envelope": envelope})
                    frontier.append(leaf)
            if entries:
                connection.execute(sa.insert(_ENTRIES), entries)
            if nodes:
                connection.execute(sa.insert(_NODES), nodes)
        return [numbers[leaf] for leaf in leaves]

    def size(self) -> int:
        """How many records there are."""
        with self.transaction("reading") as connection:
            return _size(connection)

    def root(self, size: int | None = None) -> bytes:
        """The tree's root over the first ``size`` records, or all."""
        with self.transaction("reading") as connection:
            return self._root(connection, size)

    def entry(self, number: int) -> bytes:
        """A record's envelope.

        Raises:
            ProvenanceError: there is no such record.
        """
        with self.transaction("reading") as connection:
            query = sa.select(_ENTRIES.c.envelope).where(_ENTRIES.c.number == number)
            found: bytes | None = connection.execute(query).scalar_one_or_none()
        if found is None:
            raise ProvenanceError(f"the log {self.name} has no record {number}")
        return found

    def entries(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """All records from number ``start`` on, in pages: a long log is never in memory."""
        while True:
            with self.transaction("reading") as connection:
                query = sa.select(_ENTRIES.c.number, _ENTRIES.c.envelope).where(_ENTRIES.c.number >= start)
                page = connection.execute(query.order_by(_ENTRIES.c.number).limit(_FEW)).all()
            if not page:
                return
            yield from ((row.number, row.envelope) for row in page)
            start = page[-1].number + 1

    def find(self, envelope: bytes) -> int | None:
        """The number of a record, if it is in the log."""
        leaf = leaf_hash(envelope)
        with self.transaction("reading") as connection:
            return _numbers(connection, [leaf]).get(leaf)

    def inclusion(self, index: int, size: int | None = None) -> Inclusion:
        """Proof that record ``index`` is among the first ``size``, or all.

        Raises:
            ProvenanceError: it is not.
        """
        with self.transaction("proving") as connection:
            size = self._known(connection, size)
            path = self._roots(connection, inclusion_ranges(index, size))
        return Inclusion(index=index, size=size, path=path)

    def consistency(self, first: int, second: int | None = None) -> Consistency:
        """Proof that the log of ``first`` records begins that of ``second``, or all.

        Raises:
            ProvenanceError: the log was never that long.
        """
        with self.transaction("proving") as connection:
            second = self._known(connection, second)
            path = self._roots(connection, consistency_ranges(first, second))
        return Consistency(first=first, second=second, path=path)

    def sign_head(self, signer: BaseAccount) -> TreeHead:
        """The signed head of all records; where this size was signed already, the one that there is.

        Raises:
            ProvenanceError: the log is empty, or does not go on from the last head that was signed.
        """
        with self.transaction("signing a head") as connection:
            size = _size(connection)
            if size == 0:
                raise ProvenanceError(f"the log {self.name} is empty: append a record, then sign its head")
            root = self._root(connection, size)
            last = _last_head(connection)
            if last is not None:
                path = self._roots(connection, consistency_ranges(last.size, size)) if last.size <= size else ()
                check_consistency(last.size, last.root, size, root, path)
                if last.size == size:
                    return open_head(last.envelope)
            now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            payload = {"log": self.id.hex(), "size": size, "root": root.hex(), "signedAt": now}
            head = open_head(seal(payload, HEAD_TYPE, signer))
            connection.execute(sa.insert(_HEADS).values(size=size, root=root, envelope=head.envelope))
        return head

    def heads(self) -> list[TreeHead]:
        """All heads that were signed, the smallest first."""
        with self.transaction("reading") as connection:
            found = connection.execute(sa.select(_HEADS.c.envelope).order_by(_HEADS.c.size)).scalars().all()
        return [open_head(envelope) for envelope in found]

    def verify(self) -> int:
        """Recomputes every leaf, node and head from the records; returns how many records there are.

        Raises:
            ProvenanceError: naming the first thing that was changed, or is missing (T20).
        """
        heads = {head.size: head for head in self.heads()}
        made: list[dict[str, Any]] = []
        frontier = _fresh(made)
        for number, envelope in self.entries():
            if number != frontier.size:
                raise ProvenanceError(f"the log {self.name} lacks record {frontier.size}: restore it from a backup")
            frontier.append(leaf_hash(envelope))
            head = heads.pop(frontier.size, None)
            if head is not None and (head.root != frontier.root() or head.log != self.id):
                raise ProvenanceError(f"the log {self.name} was altered before record {head.size}: its head differs")
            if len(made) >= _FEW:
                self._check_nodes(made)
        self._check_nodes(made)
        if heads:
            raise ProvenanceError(f"the log {self.name} was cut off: it once had {max(heads)} records")
        with self.transaction("verifying") as connection:
            stored = connection.execute(sa.select(sa.func.count()).select_from(_NODES)).scalar_one()
            if _size(connection) != frontier.size or stored != frontier.size - frontier.size.bit_count():
                raise ProvenanceError(f"the log {self.name} holds hashes that belong to no record: restore a backup")
        return frontier.size

    def close(self) -> None:
        """Lets go of the database."""
        self.engine.dispose()

    @contextmanager
    def transaction(self, doing: str) -> Iterator[sa.Connection]:
        """A transaction that no other process writes beside."""
        try:
            with self.engine.begin() as connection:
                if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE is a lock already
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise ProvenanceError(f"the provenance log {self.name}: {doing} failed ({cause(error)})") from error

    def _known(self, connection: sa.Connection, size: int | None) -> int:
        if size is not None and 0 <= size <= self._seen:
            return size
        self._seen = _size(connection)
        if size is None:
            return self._seen
        if not 0 <= size <= self._seen:
            raise ProvenanceError(f"the log {self.name} has {self._seen} records, not {size}")
        return size

    def _roots(self, connection: sa.Connection, spans: Sequence[Range]) -> tuple[bytes, ...]:
        known = self._known_hashes
        missing = [place for span in spans for place in cover(span) if place not in known]
        if missing:
            if len(known) > _CACHED:
                known.clear()
            known.update(_hashes(connection, missing))
        # What was just read may have pushed out what was known: rare, and then all is read.
        whole = (
            known
            if all(place in known for span in spans for place in cover(span))
            else _hashes(connection, [place for span in spans for place in cover(span)])
        )
        return tuple(range_root(span, lambda level, index: whole[level, index]) for span in spans)

    def _root(self, connection: sa.Connection, size: int | None) -> bytes:
        size = self._known(connection, size)
        return self._roots(connection, [(0, size)])[0] if size else EMPTY_ROOT

    def _check_nodes(self, made: list[dict[str, Any]]) -> None:
        """Compares recomputed nodes with the stored ones, and forgets them."""
        with self.transaction("verifying") as connection:
            for start in range(0, len(made), _FEW):
                part = made[start : start + _FEW]
                query = sa.select(_NODES.c.place, _NODES.c.hash).where(
                    _NODES.c.place.in_([node["place"] for node in part])
                )
                stored = {row.place: row.hash for row in connection.execute(query)}
                wrong = next((node for node in part if stored.get(node["place"]) != node["hash"]), None)
                if wrong is not None:
                    level, index = divmod(wrong["place"], _LEVEL)
                    raise ProvenanceError(
                        f"the log {self.name} was altered: the hash over records {index << level} to "
                        f"{((index + 1) << level) - 1} is not theirs"
                    )
        made.clear()


def _size(connection: sa.Connection) -> int:
    last: int | None = connection.execute(sa.select(sa.func.max(_ENTRIES.c.number))).scalar_one_or_none()
    return 0 if last is None else last + 1


def _numbers(connection: sa.Connection, leaves: Sequence[bytes]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for start in range(0, len(leaves), _FEW):
        query = sa.select(_ENTRIES.c.leaf, _ENTRIES.c.number).where(_ENTRIES.c.leaf.in_(leaves[start : start + _FEW]))
        found.update({row.leaf: row.number for row in connection.execute(query)})
    return found


def _fresh(nodes: list[dict[str, Any]], size: int = 0, roots: Sequence[bytes] = ()) -> Frontier:
    """A frontier that lists the nodes above the leaves which come to be."""

    def keep(level: int, index: int, node: bytes) -> None:
        if level:
            nodes.append({"place": level * _LEVEL + index, "hash": node})

    return Frontier(size, roots, keep)


def _frontier(connection: sa.Connection, nodes: list[dict[str, Any]]) -> Frontier:
    size = _size(connection)
    places = cover((0, size))
    known = _hashes(connection, places)
    return _fresh(nodes, size, [known[place] for place in places])


def _hashes(connection: sa.Connection, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    leaves = [index for level, index in places if level == 0]
    above = [level * _LEVEL + index for level, index in places if level]
    known: dict[tuple[int, int], bytes] = {}
    if leaves:
        query = sa.select(_ENTRIES.c.number, _ENTRIES.c.leaf).where(_ENTRIES.c.number.in_(leaves))
        known.update({(0, row.number): row.leaf for row in connection.execute(query)})
    if above:
        found = sa.select(_NODES.c.place, _NODES.c.hash).where(_NODES.c.place.in_(above))
        known.update({divmod(row.place, _LEVEL): row.hash for row in connection.execute(found)})
    missing = next((place for place in places if place not in known), None)
    if missing is not None:
        raise ProvenanceError(f"the provenance log lacks the hash {missing}: restore it from a backup")
    return known


def _last_head(connection: sa.Connection) -> sa.Row[Any] | None:
    query = sa.select(_HEADS.c.size, _HEADS.c.root, _HEADS.c.envelope).order_by(_HEADS.c.size.desc()).limit(1)
    row: Any = connection.execute(query).one_or_none()  # SQLAlchemy 2.1 types rows by column
    return cast("sa.Row[Any] | None", row)
