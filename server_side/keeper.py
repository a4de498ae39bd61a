"""Who has which session: opening, attaching, expiring, closing; the table, the accounts and the metrics kept true.

A session belongs to the certificate that opened it; for everybody else it does not exist (T03). One stream of each kind
at a time works on it: a newer one of the same owner takes over, since the older one's connection is likely dead.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import torch

from protos import node_pb2
from provenance.tallies import spec_digest
from server_side.accounts import Accounts, Limits, Reservation
from server_side.callers import Callers
from server_side.kept import KeptSnapshots
from server_side.memory import give_back
from server_side.metrics import Metrics
from server_side.opening import Opening
from server_side.session import Session
from server_side.signing import NodeSigner
from server_side.table import SessionRow, SessionState, SessionTable
from wire.errors import SessionLostError, SessionNotFoundError, SessionReusedError, StorageError

__all__ = ["Keeper", "Stay", "StreamKind"]

_log = logging.getLogger(__name__)

RETENTION: Final = dt.timedelta(days=400)  # ended sessions are kept so long: longer than a certificate's usual year
JANITOR_S: Final = 5.0  # how late an idle session or a silent call may end

StreamKind: TypeAlias = Literal["train", "infer", "snapshot"]


@dataclass(slots=True, eq=False)
class Stay:
    """A live session in its owner's name."""

    session: Session
    owner: str
    spec_sha256: bytes
    reservation: Reservation
    #: Ends the streams that work on the session now, at most one of each kind.
    streams: dict[StreamKind, Callable[[], object]] = field(default_factory=dict)


class Keeper:
    """All sessions of this node."""

    def __init__(
        self,
        *,
        fingerprint: str,
        table: SessionTable,
        kept: KeptSnapshots,
        limits: Limits,
        metrics: Metrics,
        device: torch.device,
        idle_s: float,
        signer: NodeSigner | None = None,
    ) -> None:
        """Marks what an earlier process of this node left open as lost, then starts to expire idle sessions."""
        self.fingerprint, self.limits, self.metrics, self.device = fingerprint, limits, metrics, device
        self.signer = signer
        self.accounts = Accounts(limits)
        self.kept, self._table, self._idle_s = kept, table, idle_s
        self.callers = Callers()
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._stays: dict[bytes, Stay] = {}
        lost = table.mark_lost(fingerprint)
        if lost:
            metrics.sessions_found_lost(lost)
            _log.warning("%d sessions of an earlier process are lost", lost)
        self._stop, self._ended = threading.Event(), threading.Event()
        self._janitor = threading.Thread(target=self._keep_house, name="cloister-janitor", daemon=True)
        self._janitor.start()

    def __len__(self) -> int:
        """Live sessions."""
        with self._lock:
            return len(self._stays)

    def existing(self, owner: str, spec: node_pb2.SessionSpec) -> Stay | None:
        """The live session that the very same opening made before, or ``None`` for a new one.

        Raises:
            SessionReusedError: that id was used, for something else or by an earlier session.
        """
        with self._opening:  # a twin that opens now is in the table a moment before it lives
            return self._existing(owner, spec)

    def _existing(self, owner: str, spec: node_pb2.SessionSpec) -> Stay | None:
        digest = spec_digest(spec)
        with self._lock:
            stay = self._stays.get(spec.session_id)
        if stay is not None and stay.owner == owner and stay.spec_sha256 == digest:
            return stay
        if stay is not None or self._table.find(spec.session_id) is not None:
            raise SessionReusedError("this session id was used before; every opening takes a new one")
        return None

    def open(self, owner: str, spec: node_pb2.SessionSpec, opening: Opening) -> Stay:
        """Makes the session live; from here on its reservation is released by its end.

        Where the very same opening came twice side by side, both get the session of the first.

        Raises:
            StateRejectedError, ProgramRejectedError, LimitExceededError: see :class:`Session`.
            SessionReusedError, StorageError: see :class:`SessionTable`.
        """
        try:
            session = Session(opening.plan, opening.program, opening.tensors, self.device, self.signer)
            now = dt.datetime.now(dt.UTC)
            stay = Stay(session, owner, spec_digest(spec), opening.reservation)
            row = SessionRow(
                session_id=spec.session_id,
                node=self.fingerprint,
                owner=owner,
                spec_sha256=stay.spec_sha256,
                program_sha256=opening.program.digest,
                next_step=spec.first_step,
                reserved_bytes=opening.reservation.reserved_bytes,
                parameters=opening.reservation.parameters,
                opened_at=now,
                last_used_at=now,
            )
            with self._opening:
                twin = self._existing(owner, spec)
                if twin is None:
                    self._table.open(row)
                    with self._lock:
                        self._stays[spec.session_id] = stay
        except BaseException:
            opening.reservation.release()
            raise
        if twin is not None:
            opening.reservation.release()
            return twin
        self.metrics.session_opened()
        _log.info("session %s opened", spec.session_id.hex())
        return stay

    def find(self, owner: str, session_id: bytes) -> Stay:
        """The owner's live session.

        Raises:
            SessionLostError: it was live in an earlier process of this node, or expired.
            SessionNotFoundError: there is no such session for this owner.
        """
        with self._lock:
            stay = self._stays.get(session_id)
        if stay is not None and stay.owner == owner:
            return stay
        row = self._table.find(session_id) if stay is None and len(session_id) == 16 else None  # noqa: PLR2004
        if row is not None and row.owner == owner and row.state is SessionState.LOST:
            raise SessionLostError("the node restarted and the session's state is gone; open a new session")
        if row is not None and row.owner == owner and row.state is SessionState.EXPIRED:
            raise SessionLostError(f"the session was idle for {self._idle_s:g} s and expired; open a new session")
        raise SessionNotFoundError("no such session")

    def attach(self, stay: Stay, kind: StreamKind, hang_up: Callable[[], object]) -> None:
        """Makes a stream the one of its kind that works on ``stay``; the one before is ended.

        Raises:
            SessionNotFoundError: the session has ended meanwhile.
        """
        with self._lock:
            if self._stays.get(stay.session.session_id) is not stay:
                raise SessionNotFoundError("no such session")
            before = stay.streams.get(kind)
            stay.streams[kind] = hang_up
        if before is not None:
            before()

    def detach(self, stay: Stay, kind: StreamKind, hang_up: Callable[[], object]) -> None:
        """Forgets a stream that ended by itself."""
        with self._lock:
            if stay.streams.get(kind) is hang_up:
                del stay.streams[kind]

    def close(self, owner: str, session_id: bytes) -> bool:
        """Ends the owner's session; false where it was not live."""
        with self._lock:
            stay = self._stays.get(session_id)
        if stay is None or stay.owner != owner:
            return False
        return self._end(session_id, SessionState.CLOSED)

    def make_way(self, owner: str, session_id: bytes) -> None:
        """Ends the owner's session that a new one replaces; what is kept of it may be what the new one begins with."""
        with self._lock:
            stay = self._stays.get(session_id)
        if stay is not None and stay.owner == owner:
            self._end(session_id, SessionState.CLOSED, forget=False)

    def forget(self, owner: str, session_id: bytes) -> None:
        """Removes what is kept of the owner's replaced session."""
        if self.kept.find(owner, session_id=session_id) is not None:
            self.kept.forget(session_id)

    def stop(self) -> None:
        """Ends every session as lost: their state dies with the process."""
        self._stop.set()
        self._janitor.join()
        with self._lock:
            ids = list(self._stays)
        for session_id in ids:
            self._end(session_id, SessionState.LOST)

    def _end(self, session_id: bytes, how: SessionState, *, forget: bool = True) -> bool:
        with self._lock:
            stay = self._stays.pop(session_id, None)
            streams = [] if stay is None else list(stay.streams.values())
        if stay is None:
            return False
        for hang_up in streams:
            hang_up()
        stay.reservation.release()
        self.metrics.session_ended(how)
        if forget and how is SessionState.CLOSED:
            self.kept.forget(session_id)
        try:
            self._table.touch(session_id, stay.session.next_step, dt.datetime.now(dt.UTC))
            self._table.end(session_id, how)
        except (StorageError, SessionNotFoundError):
            # The memory is free either way; a row that is found open at the next start is marked lost.
            _log.exception("session %s ended as %s, which could not be written", session_id.hex(), how.value)
        _log.info("session %s %s", session_id.hex(), how.value)
        self._ended.set()
        return True

    def _keep_house(self) -> None:
        pruned, worked = float("-inf"), False
        while not self._stop.wait(min(JANITOR_S, self._idle_s / 4)):
            now = time.monotonic()
            self.callers.hang_up_overdue()
            with self._lock:
                idle_s = {i: s.session.idle_for(now) for i, s in self._stays.items()}
            idle = [i for i, seconds in idle_s.items() if seconds > self._idle_s]
            working = any(seconds < JANITOR_S for seconds in idle_s.values())
            # Not while sessions work: what they free they need again at once.
            if (worked or self._ended.is_set()) and not working:
                self._ended.clear()
                give_back()
            worked = working
            for session_id in idle:
                self._end(session_id, SessionState.EXPIRED)
            if now - pruned > dt.timedelta(days=1).total_seconds():
                pruned = now
                try:
                    self._table.prune(dt.datetime.now(dt.UTC) - RETENTION)
                except StorageError:
                    _log.exception("old sessions could not be pruned; trying again tomorrow")
