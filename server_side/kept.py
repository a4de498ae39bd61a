"""Snapshots on the node's own disk: the latest of each session that asked for it, for as long as there is room.

They outlive the process: an owner whose node restarted takes its session up again without sending the state anew, or
fetches what it had not fetched yet (THREATS T07). They belong to the certificate that opened the session (T03), hold
nothing but the middle (T15), and their names tell all that is known of them, so that there is nothing to get out of
step with the files.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wire.errors import StateRejectedError, StorageError
from wire.files import replace_file
from wire.state import sha256

__all__ = ["KEPT_BYTES", "Kept", "KeptSnapshots"]

_log = logging.getLogger(__name__)

KEPT_BYTES: Final = 64 * 2**30  # of all owners together
_SHARES: Final = 4  # no owner takes more than this part of it from the others

_NAME: Final = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{64})\.(\d{1,16})\.([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, slots=True)
class Kept:
    """One file, by its name."""

    path: Path
    session_id: bytes
    owner: str
    step: int
    sha256: bytes


class KeptSnapshots:
    """A folder of snapshots. Safe to use from any thread of one process."""

    def __init__(self, folder: Path, most_bytes: int = KEPT_BYTES) -> None:
        """Makes the folder, and removes what an earlier process left half-written.

        Raises:
            StorageError: it cannot be made or read.
        """
        self._folder, self._most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for partial in folder.glob("*.partial"):
                partial.unlink()
        except OSError as error:
            raise StorageError(f"the snapshot folder {folder} cannot be used: {error.strerror}") from error

    def keep(self, session_id: bytes, owner: str, step: int, data: bytes) -> bytes | None:
        """Writes a session's snapshot in place of its earlier one.

        Returns:
            The SHA-256 of ``data``, or ``None`` where there was no room or the disk failed: training goes on without.
        """
        if len(data) > self._most_bytes // _SHARES:
            return None
        digest = sha256(data)
        name = f"{session_id.hex()}.{owner}.{step}.{digest.hex()}.safetensors"
        with self._lock:
            try:
                self._make_room(len(data), session_id, owner)
                replace_file(self._folder / name, data)
            except OSError:
                _log.exception("a snapshot could not be kept")
                return None
            for old in self._of(session_id):
                if old.path.name != name:
                    self._remove(old)
        return digest

    def find(self, owner: str, *, session_id: bytes | None = None, digest: bytes | None = None) -> Kept | None:
        """An owner's snapshot: of a session, or with that content."""
        for kept in self._all():
            if kept.owner == owner and session_id in (None, kept.session_id) and digest in (None, kept.sha256):
                return kept
        return None

    def read(self, kept: Kept) -> bytes:
        """The snapshot's bytes.

        Raises:
            StateRejectedError: it is gone, or damaged: then it is removed.
        """
        try:
            data = kept.path.read_bytes()
        except OSError as error:
            raise StateRejectedError("this node no longer keeps that state; send it") from error
        if sha256(data) != kept.sha256:
            _log.error("the kept snapshot %s is damaged; removing it", kept.path)
            self._remove(kept)
            raise StateRejectedError("this node no longer keeps that state; send it")
        return data

    def forget(self, session_id: bytes) -> None:
        """Removes what is kept of a session whose owner is done with it."""
        with self._lock:
            for kept in self._of(session_id):
                self._remove(kept)

    def _make_room(self, size: int, session_id: bytes, owner: str) -> None:
        """Removes the oldest until ``size`` bytes fit: first the owner's own; the session's earlier one goes later."""
        everything = {kept: kept.path.stat() for kept in self._all()}
        by_age = sorted(everything, key=lambda kept: everything[kept].st_mtime)
        for room, among in (
            (self._most_bytes // _SHARES, [kept for kept in by_age if kept.owner == owner]),
            (self._most_bytes, by_age),
        ):
            held = sum(everything[kept].st_size for kept in among if kept in everything)
            for kept in among:
                if held + size > room and kept.session_id != session_id and kept in everything:
                    self._remove(kept)
                    held -= everything.pop(kept).st_size

    def _all(self) -> list[Kept]:
        found = []
        for path in self._folder.glob("*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match is not None:
                session, owner, step, digest = match.groups()
                found.append(Kept(path, bytes.fromhex(session), owner, int(step), bytes.fromhex(digest)))
        return found

    def _of(self, session_id: bytes) -> list[Kept]:
        return [kept for kept in self._all() if kept.session_id == session_id]

    def _remove(self, kept: Kept) -> None:
        with contextlib.suppress(FileNotFoundError):
            kept.path.unlink()
