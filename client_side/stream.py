"""A bidirectional stream that comes back: what was not answered is sent again, the same bytes in the same order.

When the connection breaks, or the peer says nothing for much longer than it ever took, the stream is dialled again with
exponential back-off and jitter. The node answers from memory what it had computed, so a break at any byte changes
nothing in the numbers.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from wire.channels import wait_ready
from wire.errors import CloisterError, SessionSupersededError, StorageError, UnreachableError, error_from_rpc

__all__ = ["JITTER", "Stream", "patiently"]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: Of its own: from Python's global generator the user's data may be drawn, and a link that breaks changes no number.
JITTER: Final = random.Random()  # noqa: S311 - no secret

_FIRST_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Silence:
    """A peer that says nothing for ``factor`` times its longest answer so far is taken for dead, or too slow.

    But never sooner than after ``least_s``, and before its first answer (it warms up) after ``first_s``.
    """

    factor: float
    least_s: float
    first_s: float


_STAYING: Final = _Silence(20.0, 30.0, 300.0)
_LEAVING: Final = _Silence(8.0, 5.0, 60.0)  # somebody else is ready to take over
_WATCH_S: Final = 1.0

#: What a new attempt may mend.
_PASSING: Final = (UnreachableError, SessionSupersededError, StorageError)


class Stream:
    """Requests up, one answer each, in order. For one thread."""

    def __init__(
        self,
        channel: grpc.Channel,
        call: Callable[[Any], Any],
        attachment: Callable[[], Any],
        *,
        reconnect_s: float,
        name: str,
        leave_silent: bool = False,
    ) -> None:
        """Does nothing yet: the first :meth:`send` dials.

        Args:
            channel: what ``call`` runs over.
            call: the stub's stream-stream method.
            attachment: makes the first message of every new stream.
            reconnect_s: for how long a broken stream is dialled before :class:`UnreachableError`.
            name: what messages call the peer.
            leave_silent: a peer that says nothing for much longer than it ever took is given up, not dialled again.
        """
        self._silence = _LEAVING if leave_silent else _STAYING
        self._silent = False
        self._channel, self._dial, self._attachment = channel, call, attachment
        self._reconnect_s, self._name = reconnect_s, name
        self._unanswered: deque[Any] = deque()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call: Any = None
        self._waiting_since: float | None = None
        self._longest_s = 0.0
        self._broken_since: float | None = None
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self.reconnects = 0

    def __len__(self) -> int:
        """Requests without an answer."""
        return len(self._unanswered)

    @property
    def patience_s(self) -> float:
        """How long the peer may be silent."""
        if not self._longest_s:
            return self._silence.first_s
        return max(self._silence.factor * self._longest_s, self._silence.least_s)

    def send(self, request: Any) -> None:  # noqa: ANN401 - a message of whatever service
        """Sends ``request`` when the peer takes it; never waits."""
        if self._call is None:
            self._attach()
        if not self._unanswered:
            self._waiting_since = time.monotonic()
        self._unanswered.append(request)
        self._outbox.put(request)

    def receive(self) -> tuple[Any, Any]:
        """The oldest unanswered request and its answer.

        Raises:
            WireError: the peer's reason for refusing it; everything unanswered is dropped.
            UnreachableError: the peer is gone for good.
        """
        while True:
            try:
                answer = next(self._call)
                break
            except StopIteration:
                self._come_back(UnreachableError("the node ended the stream"))
            except grpc.RpcError as error:
                told = error_from_rpc(error)
                if not isinstance(told, _PASSING):
                    self.drop()
                    raise told from error
                self._come_back(told)
        now = time.monotonic()
        if self._waiting_since is not None:
            self._longest_s = max(self._longest_s, now - self._waiting_since)
        self._broken_since = None
        request = self._unanswered.popleft()
        self._waiting_since = now if self._unanswered else None
        return request, answer

    def drop(self) -> None:
        """Forgets what is unanswered and hangs up; the next :meth:`send` dials anew."""
        self._unanswered.clear()
        self._hang_up()

    def close(self) -> None:
        """Hangs up for good."""
        self._closed.set()
        self.drop()

    def _attach(self) -> None:
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        outbox.put(self._attachment())
        for request in self._unanswered:
            outbox.put(request)
        self._outbox = outbox
        self._call = self._dial(iter(outbox.get, None))
        self._waiting_since = time.monotonic() if self._unanswered else None
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="cloister-watch", daemon=True)
            self._watcher.start()

    def _hang_up(self) -> None:
        self._outbox.put(None)
        call, self._call, self._waiting_since = self._call, None, None
        if call is not None:
            call.cancel()

    def _come_back(self, why: CloisterError) -> None:
        """Dials until a stream stands again."""
        self._hang_up()
        if self._silent:
            raise UnreachableError(f"{self._name} was silent for too long") from why
        now = time.monotonic()
        if self._broken_since is None:
            self._broken_since = now
            _log.warning("the link to %s broke (%s); dialling again", self._name, why)
        backoff = _FIRST_BACKOFF_S
        while time.monotonic() - self._broken_since < self._reconnect_s:
            time.sleep(backoff * JITTER.uniform(0.5, 1.5))
            backoff = min(2 * backoff, _MAX_BACKOFF_S)
            try:
                wait_ready(self._channel, timeout=min(_MAX_BACKOFF_S, max(self._reconnect_s, _FIRST_BACKOFF_S)))
            except UnreachableError as error:
                why = error
                continue
            self.reconnects += 1
            self._attach()
            return
        raise UnreachableError(f"{self._name} did not come back within {self._reconnect_s:g} s: {why}") from why

    def _watch(self) -> None:
        """Hangs up on a peer that is silent for too long; :meth:`receive` then dials again."""
        while not self._closed.wait(_WATCH_S):
            since, call = self._waiting_since, self._call
            if since is None or call is None:
                continue
            patience = self.patience_s
            if time.monotonic() - since > patience:
                _log.warning("%s has been silent for %.0f s; hanging up", self._name, patience)
                self._silent = self._silence is _LEAVING
                call.cancel()


def patiently(call: Callable[[], _T], reconnect_s: float) -> _T:
    """``call()`` until it succeeds or fails for good; only for what is safe to repeat.

    Raises:
        WireError: the peer's reason.
        UnreachableError: for ``reconnect_s`` nobody answered.
    """
    started, backoff = time.monotonic(), _FIRST_BACKOFF_S
    while True:
        try:
            return call()
        except (grpc.RpcError, UnreachableError) as error:
            told = error_from_rpc(error) if isinstance(error, grpc.RpcError) else error
            if not isinstance(told, UnreachableError) or time.monotonic() - started > reconnect_s:
                raise told from error
        time.sleep(backoff * JITTER.uniform(0.5, 1.5))
        backoff = min(2 * backoff, _MAX_BACKOFF_S)
