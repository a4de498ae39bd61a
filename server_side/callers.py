"""Who is on the line: how many calls an owner may have at once, and for how long a call may keep the node waiting.

Every call holds a thread of the node. One that works on a session is bounded by that session (one stream of each kind,
ended with it); every other counts here, against its owner, and is hung up on when the peer keeps silent (THREATS T05).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from wire.errors import BusyError

__all__ = ["CALLS_PER_OWNER", "SILENCE_S", "Call", "Callers"]

_log = logging.getLogger(__name__)

CALLS_PER_OWNER: Final = 16  # a short call takes milliseconds; openings of several trainings may run side by side
SILENCE_S: Final = 30.0  # for the next message: a chunk of 4 MiB takes as long at 1 Mbit/s
_NEVER: Final = float("inf")

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Call:
    """One call that is served now."""

    owner: str
    hang_up: Callable[[], object]
    overdue_at: float = _NEVER

    def listen(self, requests: Iterator[_T], *, total_s: float = _NEVER) -> Iterator[_T]:
        """``requests``; while the next one is waited for, the call may become overdue."""
        ends = time.monotonic() + total_s
        while True:
            self.overdue_at = min(time.monotonic() + SILENCE_S, ends)
            try:
                request = next(requests)
            except StopIteration:
                return
            finally:
                self.overdue_at = _NEVER
            yield request


class Callers:
    """The calls of all owners. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._counted: dict[str, set[Call]] = {}

    def enter(self, owner: str, hang_up: Callable[[], object]) -> Call:
        """A new call of ``owner``; to :meth:`leave` at its end.

        Raises:
            BusyError: the owner has too many already.
        """
        call = Call(owner, hang_up)
        with self._lock:
            counted = self._counted.setdefault(owner, set())
            if len(counted) >= CALLS_PER_OWNER:
                raise BusyError(f"you have {len(counted)} calls waiting here, more than your share; let some end first")
            counted.add(call)
            self._calls.add(call)
        return call

    def settle(self, call: Call) -> None:
        """The call works on a session from now on, and counts no more by itself."""
        with self._lock:
            self._uncount(call)

    def leave(self, call: Call) -> None:
        """The call is over."""
        with self._lock:
            self._calls.discard(call)
            self._uncount(call)

    def hang_up_overdue(self) -> int:
        """Ends every call whose peer has been silent for too long; returns how many."""
        now = time.monotonic()
        with self._lock:
            overdue = [call for call in self._calls if call.overdue_at < now]
        for call in overdue:
            _log.info("hanging up on an owner who keeps the node waiting")
            call.hang_up()
        return len(overdue)

    def _uncount(self, call: Call) -> None:
        counted = self._counted.get(call.owner, set())
        counted.discard(call)
        if not counted:
            self._counted.pop(call.owner, None)
