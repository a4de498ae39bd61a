"""A session that goes on elsewhere: several nodes, of which one computes; when it fails, the next one takes over.

The new node gets the latest snapshot and then the frames sent since, the same bytes in the same order. Answers that the
owner has had already are thrown away; the rest come as if nothing had happened. So a move costs time and changes no
number (THREATS T14). A node that restarted and lost its sessions is moved to like any other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from client_side.frames import FrameLog, FrameMemo, SentFrame
from client_side.link import Answer, Incoming, Link, NodeAddress, Traffic
from client_side.receipts import SignedSegment
from client_side.snapshots import Snapshot
from client_side.stream import JITTER
from privacy.guard import Released
from wire.errors import (
    BusyError,
    CheckpointError,
    CloisterError,
    DrainingError,
    InternalError,
    SessionLostError,
    SessionNotFoundError,
    StateRejectedError,
    StorageError,
    UnreachableError,
)

__all__ = ["Route", "RouteNews", "SessionLink"]

_log = logging.getLogger(__name__)

#: What another node, or the same one anew, may mend.
_MOVABLE: Final = (
    UnreachableError,
    SessionLostError,
    SessionNotFoundError,
    DrainingError,
    BusyError,
    StorageError,
    InternalError,
)
#: What says that this node is there and only the session is gone.
_STILL_THERE: Final = (SessionLostError, SessionNotFoundError)

_SOON_S: Final = 0.5  # a link that breaks is dialled again for so long, where another node is ready to take over
_CONNECT_S: Final = 5.0
_FIRST_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 5.0
_STAY_S: Final = 30.0  # on a node that is about to stop, before the others are asked again
_FRUITLESS: Final = 3  # moves to each node without a single answer, before a node's own defects end the run
_WINDOW: Final = 8  # frames on their way at a time while replaying


class SessionLink(Protocol):
    """What a step needs of a session, wherever it lives."""

    @property
    def traffic(self) -> Traffic: ...  # noqa: D102
    def send(self, frame: SentFrame) -> None: ...  # noqa: D102
    def receive(self) -> Answer: ...  # noqa: D102
    def infer(self, batches: Iterable[Sequence[Released]]) -> Iterator[list[torch.Tensor | None]]: ...  # noqa: D102
    def snapshot(self, *, with_optimizer: bool = False) -> tuple[int, dict[str, torch.Tensor]]: ...  # noqa: D102
    def receipt(self) -> SignedSegment | None: ...  # noqa: D102
    def close(self, *, end_session: bool = True) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class RouteNews:
    """A move: from where to where, why, and what it took."""

    step: int
    before: str
    after: str
    why: str
    seconds: float
    replayed: int


@dataclass(slots=True)
class _Standby:
    """A session that waits at a snapshot."""

    number: int
    step: int
    link: Link


class Route:
    """One session at a time, on the first of several nodes that will have it.

    For one thread, but for :meth:`follow`.
    """

    def __init__(
        self,
        nodes: Sequence[NodeAddress],
        *,
        connect: Callable[[NodeAddress, float, bool], Link],
        open_on: Callable[[Link, Snapshot, dict[str, torch.Tensor] | None], None],
        latest: Callable[[], Snapshot],
        load: Callable[[Snapshot], dict[str, torch.Tensor]],
        log: FrameLog,
        memo: FrameMemo | None,
        reconnect_s: float,
        tell: Callable[[RouteNews], None],
    ) -> None:
        """Opens a session at the latest snapshot.

        Args:
            nodes: in the order of preference.
            connect: makes a link from an address, how long it dials a node that is gone, and whether it leaves one that
                is silent for much longer than it ever was.
            open_on: opens a session at a snapshot, whose tensors it gets unless the node keeps them.
            latest: the newest snapshot that is stored.
            load: a snapshot's tensors.
            log: the frames since.
            memo: what an earlier process sent of them.
            reconnect_s: how long all nodes may be gone.
            tell: hears of each move.

        Raises:
            UnreachableError, WireError: no node takes the session; the reason of the last one.
        """
        self._nodes, self._connect, self._open_on = list(nodes), connect, open_on
        self._latest, self._load, self._log, self._memo = latest, load, log, memo
        self._reconnect_s, self._tell = reconnect_s, tell
        self._step = self._delivered = 0
        self._boundary = latest().step  # steps finished, as far as the owner was told
        self._fruitless = 0
        self._told = False
        self._past = Traffic(0, 0, 0)
        self._lock = threading.Lock()
        self._standby: _Standby | None = None
        self._closed = False
        self._stay_until = 0.0
        self.draining = False
        self._at = 0
        self._link: Link | None = None
        self._move(None)

    @property
    def traffic(self) -> Traffic:
        """Of all sessions so far, replays included."""
        return self._past if self._link is None else self._past + self._link.traffic

    @property
    def node(self) -> str:
        """Where the session is."""
        return self._nodes[self._at].target

    @property
    def alternatives(self) -> bool:
        """Whether there is more than one node."""
        return len(self._nodes) > 1

    def send(self, frame: SentFrame) -> None:
        """Notes the frame, and sends it.

        Raises:
            CheckpointError: it cannot be noted.
        """
        if self._memo is not None:
            known = self._memo.take(frame)
            if known is not frame and not self._told:
                self._told = True
                _log.warning(
                    "step %d comes out otherwise than before the interruption (another processor or number of "
                    "threads?): what was sent then is sent again, and the run goes on from there",
                    frame.step,
                )
            frame = known
        self._log.append(frame)
        if frame.step != self._step:
            self._step, self._delivered = frame.step, 0
        self._here.send(frame)

    def receive(self) -> Answer:
        """The answer of the oldest unanswered frame, from wherever it comes.

        Raises:
            WireError: a node's reason for refusing the frame.
            UnreachableError: no node came back in time.
        """
        answer: Answer = self._staying(lambda link: link.receive())
        self._delivered += 1
        self._fruitless = 0
        if answer.updated:
            self._boundary = answer.step + 1
        self.draining = answer.draining
        return answer

    def infer(self, batches: Iterable[Sequence[Released]]) -> Iterator[list[torch.Tensor | None]]:
        """See :meth:`Link.infer`; what a lost node left unanswered is asked again."""
        waiting: deque[Sequence[Released]] = deque()
        source = iter(batches)

        def feed() -> Iterator[Sequence[Released]]:
            yield from list(waiting)
            for batch in source:
                waiting.append(batch)
                yield batch

        while True:
            try:
                for answer in self._here.infer(feed()):
                    waiting.popleft()
                    yield answer
            except _MOVABLE as error:
                self._move(error)
            else:
                return

    def snapshot(self, *, with_optimizer: bool = False) -> tuple[int, dict[str, torch.Tensor]]:
        """See :meth:`Link.snapshot`."""

        def fetch(link: Link) -> tuple[int, dict[str, torch.Tensor]]:
            step, tensors = link.snapshot(with_optimizer=with_optimizer)
            self._check_present(step)
            return step, tensors

        found: tuple[int, dict[str, torch.Tensor]] = self._staying(fetch)
        return found

    def receipt(self) -> SignedSegment | None:
        """See :meth:`Link.receipt`; after a move, it covers what was replayed."""
        signed: SignedSegment | None = self._staying(lambda link: link.receipt())
        return signed

    def begin_snapshot(self, *, known: Sequence[bytes], keep: bool) -> Incoming:
        """See :meth:`Link.begin_snapshot`."""

        def begin(link: Link) -> Incoming:
            incoming = link.begin_snapshot(known=known, keep=keep)
            self._check_present(incoming.next_step)
            return incoming

        coming: Incoming = self._staying(begin)
        return coming

    def reopen(self) -> None:
        """Opens the session anew, where it is: what ``open_on`` asks for has changed."""
        self._move(None)

    @property
    def leaving(self) -> bool:
        """Whether the node is about to stop, and it is time to look for another."""
        return self.draining and self.alternatives and time.monotonic() >= self._stay_until

    def leave(self) -> None:
        """Goes to another node, of one's own accord, if one takes the session; else stays for a while."""
        started, before, old = time.monotonic(), self.node, self._here
        for number in self._order(self._at)[:-1]:
            try:
                replayed = self._take(number)
            except CheckpointError:
                raise
            except CloisterError as error:
                _log.warning("%s does not take the session: %s", self._nodes[number].target, error)
                continue
            self._past += old.traffic
            old.close()
            took = time.monotonic() - started
            self._tell(RouteNews(self._step, before, self.node, "the node is about to stop", took, replayed))
            return
        self._stay_until = time.monotonic() + _STAY_S

    def follow(self, snapshot: Snapshot) -> None:
        """Lets a second node wait at ``snapshot``, so that a move costs a replay at most. May run in another thread.

        Raises:
            CloisterError: no other node would; there is no standby now.
        """
        with self._lock:
            old, self._standby, at = self._standby, None, self._at
        if old is not None:
            old.link.close()
        last: CloisterError = UnreachableError("there is only one node")
        for number in self._order(at)[:-1]:
            try:
                link = self._opened(number, snapshot)
            except CloisterError as error:
                last = error
                continue
            with self._lock:
                if not self._closed and self._at != number:
                    self._standby = _Standby(number, snapshot.step, link)
                    return
            link.close()
            return
        raise last

    def close(self, *, end_session: bool = True) -> None:
        """Ends the session, and the one that waits."""
        with self._lock:
            self._closed = True
            standby, self._standby = self._standby, None
        if standby is not None:
            standby.link.close(end_session=end_session)
        self._leave_link(end_session=end_session)

    def _check_present(self, step: int) -> None:
        """Raises: SessionLostError: a node that restarted gives what it had kept of an earlier step."""
        if step < self._boundary:
            raise SessionLostError(f"the node restarted and has only step {step} of {self._boundary}")

    @property
    def _here(self) -> Link:
        if self._link is None:
            raise UnreachableError("the session is closed")
        return self._link

    def _staying(self, call: Callable[[Link], Any]) -> Any:  # noqa: ANN401 - whatever ``call`` returns
        while True:
            try:
                return call(self._here)
            except _MOVABLE as error:
                self._move(error)

    def _move(self, why: CloisterError | None) -> None:
        """Opens the session on the first node that takes it, and brings it to the present.

        Raises:
            UnreachableError, WireError: as for the class.
        """
        started, before = time.monotonic(), self.node
        order = self._order(self._at)
        if why is None or isinstance(why, _STILL_THERE):
            order = [order[-1], *order[:-1]]
        if why is not None:
            _log.warning("%s: the session is gone (%s); going on from its snapshot", before, why)
            self._fruitless += 1
            if isinstance(why, InternalError) and self._fruitless > _FRUITLESS * len(order):
                raise why
        # A session that cannot be ended expires; nobody waits for that.
        self._leave_link(end_session=why is None or isinstance(why, DrainingError))
        backoff = _FIRST_BACKOFF_S
        while True:
            replayed, refusals, last = self._try(order)
            if last is None:
                if why is not None:
                    took = time.monotonic() - started
                    self._tell(RouteNews(self._step, before, self.node, str(why), took, replayed))
                return
            over = time.monotonic() - started >= self._reconnect_s
            if refusals == len(order) or (over and len(order) == 1):
                raise last
            if over:
                names = ", ".join(node.target for node in self._nodes)
                raise UnreachableError(
                    f"none of {names} took the session within {self._reconnect_s:g} s: {last}"
                ) from last
            time.sleep(backoff * JITTER.uniform(0.5, 1.5))
            backoff = min(2 * backoff, _MAX_BACKOFF_S)

    def _try(self, order: list[int]) -> tuple[int, int, CloisterError | None]:
        """One attempt at each node: frames replayed; nodes that refuse for good; the last error where none took it."""
        refusals = 0
        last: CloisterError | None = None
        for number in order:
            try:
                return self._take(number), refusals, None
            except _MOVABLE as error:
                last = error
                _log.info("%s: %s", self._nodes[number].target, error)
            except CheckpointError:
                raise
            except CloisterError as error:
                last = error
                refusals += 1
                _log.warning("%s does not take the session: %s", self._nodes[number].target, error)
        return 0, refusals, last

    def _order(self, at: int) -> list[int]:
        """All nodes, from the one after ``at`` around to it."""
        count = len(self._nodes)
        return [(at + step) % count for step in range(1, count + 1)]

    def _take(self, number: int) -> int:
        """Goes on there; returns how many frames were replayed."""
        with self._log.hold:
            replayed = self._wait_no_longer(number)
            if replayed is None:
                snapshot = self._latest()
                link = self._opened(number, snapshot)
                try:
                    replayed = self._replay(link, snapshot.step)
                except BaseException:
                    link.close(end_session=False)
                    raise
                self._link = link
        with self._lock:
            self._at = number
        self.draining = False
        return replayed

    def _wait_no_longer(self, number: int) -> int | None:
        """Takes the session that waits there, if one does; returns how many frames were replayed."""
        with self._lock:
            standby = self._standby if self._standby is not None and self._standby.number == number else None
            if standby is None:
                return None
            self._standby = None
        try:
            replayed = self._replay(standby.link, standby.step)
        except CloisterError as error:  # it failed too, or is behind the log
            _log.info("the standby on %s is of no use: %s", self._nodes[number].target, error)
            standby.link.close(end_session=False)
            return None
        self._link = standby.link
        return replayed

    def _opened(self, number: int, snapshot: Snapshot) -> Link:
        address = self._nodes[number]
        patience = min(_SOON_S, self._reconnect_s) if self.alternatives else self._reconnect_s
        link = self._connect(address, patience, self.alternatives)
        try:
            if snapshot.kept is not None and snapshot.kept.node == address.fingerprint().hex():
                try:
                    self._open_on(link, snapshot, None)
                except StateRejectedError:
                    _log.info("%s no longer keeps the snapshot of step %d; sending it", address.target, snapshot.step)
                else:
                    return link
            self._open_on(link, snapshot, self._load(snapshot))
        except BaseException:
            link.close(end_session=False)
            raise
        return link

    def _replay(self, link: Link, step: int) -> int:
        """Sends what was sent since ``step``; what was answered then is thrown away, the rest stays to be received."""
        waiting: deque[bool] = deque()
        replayed = in_step = 0
        for frame in self._log.frames(step):
            while len(waiting) >= _WINDOW and waiting[0]:
                link.receive()
                waiting.popleft()
            link.send(frame)
            replayed += 1
            in_step = in_step + 1 if frame.step == self._step else 0
            waiting.append(frame.step < self._step or in_step <= self._delivered)
        while waiting and waiting[0]:
            link.receive()
            waiting.popleft()
        return replayed

    def _leave_link(self, *, end_session: bool) -> None:
        link, self._link = self._link, None
        if link is not None:
            self._past += link.traffic
            link.close(end_session=end_session)
