"""The privacy ledger: every release that left, by data set, written down before its bytes leave.

Entries are never changed or removed. Each carries the SHA-256 of the one before it, so that an altered ledger shows;
and a witness beside an SQLite file remembers the latest entry, so that a restored backup shows too. Clocks count for
nothing. What is spent on a data set is what all runs on it spent together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from privacy.accounting import (
    Event,
    Gaussian,
    PrivacySpent,
    RandomizedResponse,
    Relation,
    SampledGaussian,
    Unbounded,
    epsilon_of,
)
from privacy.migrations import SCHEMA
from wire.database import cause, open_database, shown_url
from wire.errors import BudgetSpentError, ConfigError, LedgerError, StorageError
from wire.files import replace_file

__all__ = ["Budget", "Entry", "Ledger", "Position", "Release", "default_url"]

_MAX_NAME: Final = 200
_LEDGER_LOCK: Final = 0x6C6564676572  # "ledger", among the advisory locks of a shared PostgreSQL
_GENESIS: Final = bytes(32)
_EVENTS: Final[dict[str, type[Event]]] = {
    "gaussian": Gaussian,
    "sampled_gaussian": SampledGaussian,
    "randomized_response": RandomizedResponse,
    "unbounded": Unbounded,
}

# The constraints stand in the migration, which is what makes the table.
_RELEASES: Final = sa.Table(
    "privacy_releases",
    sa.MetaData(),
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
    sa.Index("privacy_releases_by_data_set", "data_set", "number"),
)
_C: Final = _RELEASES.c
_DATA_SETS: Final = sa.Table(
    "privacy_data_sets",
    sa.MetaData(),
    sa.Column("content", sa.String(80), primary_key=True),
    sa.Column("data_set", sa.String(200), nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What is about to leave.

    Attributes:
        kind: ``activations``, ``labels``, ``gradients``, ``front``, ``head`` or ``inference``.
        treatment: by its name in the policy.
        event: what it costs.
        step: of the run, at which it begins.
    """

    kind: str
    treatment: str
    event: Event
    step: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A release as the ledger holds it; ``number`` counts from 1 over all data sets."""

    number: int
    data_set: str
    run: str
    step: int
    kind: str
    treatment: str
    unit: str
    event: Event
    at: str


@dataclass(frozen=True, slots=True)
class Position:
    """How long a ledger is, and the digest of its latest entry."""

    number: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent on a data set."""

    epsilon: float
    delta: float
    relation: Relation


def default_url() -> str:
    """``CLOISTER_LEDGER``, or a file among this user's state (XDG base directories)."""
    if url := os.environ.get("CLOISTER_LEDGER"):
        return url
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return f"sqlite:///{state / 'cloister' / 'privacy.sqlite'}"


class Ledger:
    """The releases on all data sets of one owner. Safe to use from any thread and from several processes.

    Every method raises :class:`LedgerError` where the database fails: nothing may leave then.
    """

    @classmethod
    def existing(cls, url: str | None = None) -> Ledger | None:
        """Opens a ledger; ``None`` where nobody has begun one, and none is begun."""
        path = _file_of(url or default_url())
        return None if path is not None and not path.exists() else cls(url)

    def __init__(self, url: str | None = None) -> None:
        """Opens the ledger, or begins one.

        Args:
            url: ``sqlite:////path/to/privacy.sqlite`` or ``postgresql+psycopg://user@host/database``; see
                :func:`default_url`.

        Raises:
            ConfigError: the URL is not one of those.
            LedgerError: it cannot be opened, is damaged, or knows less than its witness.
        """
        url = url or default_url()
        path = _file_of(url)
        if path is not None:
            with _failing(url, "making its folder"):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._engine = open_database(url, SCHEMA)
        except StorageError as error:
            raise LedgerError(str(error)) from error
        self.name = shown_url(self._engine.url)
        self._witness = None if path is None else path.with_name(path.name + ".witness")
        self._remembering = threading.Lock()
        try:
            with self._transaction("checking") as connection:
                self._check_witness(connection)
            self.verify()
        except BaseException:
            self.close()
            raise

    def spend(
        self,
        data_set: str,
        run: str,
        releases: Sequence[Release],
        *,
        unit: str = "record",
        budget: Budget | None = None,
        content: str | None = None,
    ) -> Position:
        """Writes down what is about to leave; when this returns it is durable, and the bytes may go.

        Args:
            data_set: its digest, or the name that it was given.
            run: which run spends.
            releases: all of them, or none, are written.
            unit: whose contribution the releases bound.
            budget: of the data set.
            content: the digest of the records, where it is known; they go by this name from now on.

        Raises:
            BudgetSpentError: together with all that was spent on this data set, it would be too much; nothing is
                written.
            ConfigError: these records go by another name.
            LedgerError: the data set's ledger is kept for another unit; or the database fails.
        """
        for name in (data_set, run):
            if not 0 < len(name) <= _MAX_NAME:
                raise ConfigError(f"the name {name[:40]!r}… of a data set or run: 1 to {_MAX_NAME} characters")
        with self._transaction("writing a release") as connection:
            if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE is a lock already
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LEDGER_LOCK)))
            self._check_witness(connection)
            _check_name(connection, data_set, content)
            before = _read(connection, data_set)
            _check_unit(before, data_set, unit)
            if budget is not None:
                _check_budget([entry.event for entry in before], releases, budget, data_set)
            position = _position(connection)
            for release in releases:
                position = _append(connection, position, release, {"data_set": data_set, "run": run, "unit": unit})
            if releases and content is not None and _name_of(connection, content) is None:
                connection.execute(sa.insert(_DATA_SETS).values(content=content, data_set=data_set))
        self._remember(position)
        return position

    def name_of(self, content: str) -> str | None:
        """By which name records of that digest stand here; ``None`` where nothing was released of them."""
        with self._transaction("reading") as connection:
            return _name_of(connection, content)

    def check_name(self, data_set: str, content: str | None) -> None:
        """Raises: ConfigError where the records of that digest go by another name: one data set has one budget."""
        with self._transaction("reading") as connection:
            _check_name(connection, data_set, content)

    def entries(self, data_set: str | None = None) -> list[Entry]:
        """All releases on one data set, or on all, oldest first."""
        with self._transaction("reading") as connection:
            return _read(connection, data_set)

    def data_sets(self) -> list[str]:
        """The data sets on which anything was released, in the order of their first release."""
        return list(dict.fromkeys(entry.data_set for entry in self.entries()))

    def spent(
        self, data_set: str, *, delta: float, relation: Relation = Relation.REPLACE_ONE, unit: str = "record"
    ) -> PrivacySpent:
        """What all runs on a data set spent together."""
        entries = self.entries(data_set)
        unit = entries[0].unit if entries else unit
        return PrivacySpent(epsilon_of([entry.event for entry in entries], delta, relation), delta, relation, unit)

    def position(self) -> Position:
        """How long the ledger is now."""
        with self._transaction("reading") as connection:
            return _position(connection)

    def check(self, known: Position) -> None:
        """Raises: LedgerError where the ledger does not hold what it held once (T11): a restored backup."""
        with self._transaction("checking") as connection:
            _check_holds(connection, known, self.name)

    def verify(self) -> int:
        """Recomputes the whole chain; returns how many entries it has.

        Raises:
            LedgerError: naming the first entry that was changed, or that is missing.
        """
        with self._transaction("verifying") as connection:
            previous, number = _GENESIS, 0
            for row in connection.execute(sa.select(_RELEASES).order_by(_C.number)):
                values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
                number += 1
                if values["number"] != number or values["previous"] != previous or values["digest"] != _digest(values):
                    raise LedgerError(f"the ledger {self.name} was altered at entry {number}: restore it from a backup")
                previous = values["digest"]
            return number

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    def _check_witness(self, connection: sa.Connection) -> None:
        if self._witness is None or not self._witness.exists():
            return
        with _failing(self.name, "reading its witness"):
            text = self._witness.read_text(encoding="ascii")[:200]
        number, _, digest = text.strip().partition(" ")
        if not number.isdecimal() or len(digest) != 64:  # noqa: PLR2004 - SHA-256 in hexadecimal
            raise LedgerError(f"{self._witness} is damaged: it should hold the number and digest of the latest entry")
        _check_holds(connection, Position(int(number), bytes.fromhex(digest)), self.name)

    def _remember(self, position: Position) -> None:
        """After the commit: a witness may lag behind (its process was killed), but never be ahead."""
        if self._witness is not None and position.number:
            with self._remembering, _failing(self.name, "writing its witness"):
                replace_file(self._witness, f"{position.number} {position.digest.hex()}\n".encode())

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(
                f"the privacy ledger {self.name}: {doing} failed ({cause(error)}); nothing leaves until it works"
            ) from error


def event_to_json(event: Event) -> str:
    """Canonical text of an event."""
    name = next(name for name, kind in _EVENTS.items() if type(event) is kind)
    return json.dumps({"mechanism": name} | dataclasses.asdict(event), sort_keys=True, allow_nan=False)


def event_from_json(text: str) -> Event:
    """The event again.

    Raises:
        LedgerError: this is no event.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        return _EVENTS[values.pop("mechanism")](**values)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise LedgerError(f"the ledger holds an entry that is no release ({type(error).__name__})") from error


def _append(connection: sa.Connection, position: Position, release: Release, names: dict[str, str]) -> Position:
    values: dict[str, Any] = {
        "number": position.number + 1,
        "step": release.step,
        "kind": release.kind,
        "treatment": release.treatment,
        "event": event_to_json(release.event),
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "previous": position.digest,
        **names,
    }
    values["digest"] = _digest(values)
    connection.execute(sa.insert(_RELEASES).values(values))
    return Position(values["number"], values["digest"])


def _digest(values: dict[str, Any]) -> bytes:
    told = [values[name] for name in ("number", "data_set", "run", "step", "kind", "treatment", "unit", "event", "at")]
    return hashlib.sha256(values["previous"] + json.dumps(told).encode()).digest()


def _position(connection: sa.Connection) -> Position:
    found = connection.execute(sa.select(_C.number, _C.digest).order_by(_C.number.desc()).limit(1)).one_or_none()
    return Position(0, _GENESIS) if found is None else Position(found.number, found.digest)


def _check_holds(connection: sa.Connection, known: Position, name: str) -> None:
    found = connection.execute(sa.select(_C.digest).where(_C.number == known.number)).scalar_one_or_none()
    if known.number and found != known.digest:
        raise LedgerError(
            f"the privacy ledger {name} has forgotten: it once held entry {known.number}, and does not now. It was "
            "restored from a backup, or replaced: bring back the newest copy; what left cannot be taken back"
        )


def _read(connection: sa.Connection, data_set: str | None) -> list[Entry]:
    query = sa.select(_RELEASES).order_by(_C.number)
    if data_set is not None:
        query = query.where(_C.data_set == data_set)
    return [
        Entry(
            row.number,
            row.data_set,
            row.run,
            row.step,
            row.kind,
            row.treatment,
            row.unit,
            event_from_json(row.event),
            row.at,
        )
        for row in connection.execute(query)
    ]


def _name_of(connection: sa.Connection, content: str) -> str | None:
    query = sa.select(_DATA_SETS.c.data_set).where(_DATA_SETS.c.content == content)
    if (name := connection.execute(query).scalar_one_or_none()) is not None:
        return str(name)
    known = connection.execute(sa.select(_C.number).where(_C.data_set == content).limit(1)).one_or_none()
    return None if known is None else content


def _check_name(connection: sa.Connection, data_set: str, content: str | None) -> None:
    name = None if content is None else _name_of(connection, content)
    if name not in (None, data_set):
        raise ConfigError(
            f"privacy: these records are in the ledger already, as {name}: by another name they would have a second "
            f'budget, and what both spend adds up in truth. Say data_set = "{name}"'
        )


def _check_unit(before: Sequence[Entry], data_set: str, unit: str) -> None:
    other = next((entry.unit for entry in before if entry.unit != unit), None)
    if other is not None:
        raise LedgerError(
            f"what was released on {data_set} is accounted per {other}; a claim per {unit} does not hold for it. "
            f'Write unit = "{other}", or give a data set of which nothing was released'
        )


def _check_budget(before: Sequence[Event], releases: Sequence[Release], budget: Budget, data_set: str) -> None:
    spent = epsilon_of(before, budget.delta, budget.relation)
    total = epsilon_of([*before, *(release.event for release in releases)], budget.delta, budget.relation)
    # Calibration ends a rounding error beside the budget; that is no release more.
    if total <= budget.epsilon * (1 + 1e-9):
        return
    unbounded = [r.event.reason for r in releases if isinstance(r.event, Unbounded)]
    unbounded = unbounded or [event.reason for event in before if isinstance(event, Unbounded)]
    why = f": {unbounded[0]}" if unbounded and math.isinf(total) else ""
    raise BudgetSpentError(
        f"privacy budget: this release would bring {data_set} from ε {spent:.4g} to {total:.4g} of "
        f"{budget.epsilon:.4g} (δ = {budget.delta:.1g}){why}. Raise privacy.epsilon, add noise, or stop here"
    )


def _file_of(url: str) -> Path | None:
    with contextlib.suppress(sa.exc.ArgumentError, ValueError):  # the database's own error says how to write it
        parsed = sa.make_url(url)
        if parsed.drivername.startswith("sqlite") and parsed.database:
            return Path(parsed.database)
    return None


@contextmanager
def _failing(name: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(f"the privacy ledger {name}: {doing} failed: {error.strerror}") from error
