"""A run that outlives its processes: checkpoints of the owner, snapshots of the middle, frames since, under one lock.

The folder of a run::

    lock            held by the one process that works on the run; the kernel frees it whatever ends that process
    run.sqlite      the journal
    checkpoints/    the owner's part at a step boundary, the newest few
    snapshots/      the middle at the same boundaries (or elsewhere: ``snapshots=`` takes a URL)
    frames/         what was sent since the last of them

A checkpoint is taken at a step boundary and written in a thread of its own while training goes on. It counts once the
snapshot is stored, then the owner's file renamed into place, in this order; only then are older ones removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from client_side.checkpoints import Checkpoint, CheckpointFile, check_same_run, list_checkpoints, write_checkpoint
from client_side.disk import disk_errors
from client_side.frames import FrameLog, FrameMemo
from client_side.journal import CheckpointEntry, Journal, now
from client_side.link import Incoming
from client_side.snapshots import Kept, Snapshot, SnapshotStore, StoreFailedError
from wire.errors import CheckpointError, CloisterError, ConfigError

__all__ = ["Checkpoints", "Run", "holds_run"]

_log = logging.getLogger(__name__)

_CHECKPOINTS: Final = "checkpoints"
_SNAPSHOTS: Final = "snapshots"
_FRAMES: Final = "frames"
_JOURNAL: Final = "run.sqlite"
_LOCK: Final = "lock"
_LOCKS: Final[set[int]] = set()  # descriptors of the locks that this process holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """What a :class:`Trainer` keeps, and where, so that nothing but the step in flight is ever lost.

    Attributes:
        folder: the run's own, on this machine.
        every: steps between two checkpoints; each epoch ends with one as well.
        keep: the newest so many stay.
        snapshots: an fsspec URL (``s3://bucket/path``) for the middle's snapshots; ``None`` is in ``folder``.
        log_bytes: what the frames since the last checkpoint may take on disk; at more, one is taken early.
        keep_on_node: the node keeps its latest snapshot on its own disk too, so that coming back to it needs no upload.
    """

    folder: Path | str
    every: int = 50
    keep: int = 2
    snapshots: str | None = None
    log_bytes: int = 16 * 2**30
    keep_on_node: bool = True

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        if self.every < 1 or self.keep < 1 or self.log_bytes < 1:
            raise ConfigError("checkpoints: every, keep and log_bytes are 1 or more")


def holds_run(folder: Path | str) -> bool:
    """Whether a run that can be resumed lives in ``folder``."""
    checkpoints = Path(folder).expanduser() / _CHECKPOINTS
    return checkpoints.is_dir() and bool(list_checkpoints(checkpoints))


class Run:
    """A run's folder at work. For one thread, which does not wait for the disk of another."""

    def __init__(self, plan: Checkpoints) -> None:
        """Takes the folder.

        Raises:
            CheckpointError: another process works on this run, or the folder cannot be written.
            ConfigError: the snapshots' URL is none.
        """
        self.plan = plan
        self._folder = Path(plan.folder).expanduser()
        with disk_errors(self._folder):
            (self._folder / _CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._folder)
        try:
            self.journal = Journal(self._folder / _JOURNAL)
            self._at = "" if plan.snapshots is None else f"{plan.snapshots.rstrip('/')}/{secrets.token_hex(8)}"
            self._store = self._opened(self._at)
        except BaseException:
            _unlock(self._lock)
            raise
        self._latest: Checkpoint | None = None
        self._snapshots: dict[str, Snapshot] = {}
        self._writer: threading.Thread | None = None
        self._follower: threading.Thread | None = None
        self._failed: CheckpointError | None = None
        self._log: FrameLog | None = None
        self._memo: FrameMemo | None = None
        self.follow: Callable[[Snapshot], None] | None = None

    @property
    def log(self) -> FrameLog:
        """The frames since the latest checkpoint that counts.

        Raises:
            CheckpointError: nothing was begun yet.
        """
        if self._log is None:
            raise CheckpointError("the run has not begun")
        return self._log

    @property
    def memo(self) -> FrameMemo | None:
        """What an earlier process sent of the steps that are computed anew."""
        return self._memo

    @property
    def latest(self) -> Checkpoint:
        """The newest checkpoint that counts.

        Raises:
            CheckpointError: there is none.
        """
        if self._latest is None:
            raise CheckpointError("the run has no checkpoint yet")
        return self._latest

    def load(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """The tensors of a snapshot.

        Raises:
            CheckpointError: see :meth:`SnapshotStore.load`.
        """
        return self._store.load(snapshot)

    def recover(self, run: Mapping[str, Any]) -> Checkpoint | None:
        """The newest checkpoint that is whole, with its snapshot; ``None`` where there is none at all.

        Raises:
            CheckpointError: all are damaged; or the newest whole one is not of this run, or of another version of the
                format, and what differs.
        """
        files = list_checkpoints(self._folder / _CHECKPOINTS, tidy=True)
        for file in files:
            try:
                data = file.data()
            except CheckpointError as error:
                self._skip(file, error)
                continue
            checkpoint = file.parse(data)  # whole, but not ours to read: passing it over would remove it
            check_same_run(checkpoint, run)
            try:
                store = self._opened(checkpoint.store)
                store.load(checkpoint.snapshot)
            except StoreFailedError:
                raise  # it may be whole, and what is passed over is removed
            except CheckpointError as error:
                self._skip(file, error)
                continue
            self._store, self._at = store, checkpoint.store
            self._resume(checkpoint, files)
            return checkpoint
        if files:
            raise CheckpointError(f"none of the {len(files)} checkpoints in {self._folder} is whole; start a new run")
        return None

    def begin(self, checkpoint: Checkpoint, middle: Mapping[str, torch.Tensor]) -> None:
        """Writes the first checkpoint of all.

        Raises:
            CheckpointError: the disk or the store fails.
        """
        self._memo, self._log = None, FrameLog(self._folder / _FRAMES)
        self._log.begin(checkpoint.step)
        started = time.monotonic()
        snapshot = self._store.put(checkpoint.step, middle)
        self._commit(_with(checkpoint, snapshot, self._at), started)
        self.journal.happened(checkpoint.step, "began", "")

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer is not None and self._writer.is_alive()

    def known(self) -> list[bytes]:
        """Digests of the tensors that need not come again."""
        return list({stored.digest for stored in self.latest.snapshot.tensors.values()})

    def save(self, checkpoint: Checkpoint, incoming: Incoming) -> None:
        """Writes a checkpoint while training goes on; one at a time.

        Raises:
            CheckpointError: the disk failed while an earlier one was written.
        """
        self.wait()
        self.log.begin(checkpoint.step)
        before = self.latest.snapshot
        self._writer = threading.Thread(
            target=self._write, args=(checkpoint, incoming, before), name="cloister-checkpoint", daemon=True
        )
        self._writer.start()

    def check(self) -> None:
        """Raises: CheckpointError where the disk failed while a checkpoint was written."""
        if self._failed is not None:
            raise self._failed

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: as for :meth:`check`.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def remove_snapshots(self) -> None:
        """Removes what the checkpoints' stores hold.

        Raises:
            CheckpointError: a store fails.
        """
        places = set()
        for file in list_checkpoints(self._folder / _CHECKPOINTS):
            with contextlib.suppress(CheckpointError):  # damaged: where its snapshot is, nobody knows
                places.add(file.read().store)
        for place in places:
            self._opened(place).remove()

    def linger(self, seconds: float) -> None:
        """Until nothing is being written, or so long at most: a node may be gone that still owes a snapshot."""
        if self._writer is not None:
            self._writer.join(seconds)

    def close(self) -> None:
        """Lets others work on the run; what is being written is finished first."""
        if self._writer is not None:
            self._writer.join()
        if self._log is not None:
            self._log.close()
        self.journal.close()
        _unlock(self._lock)

    def _skip(self, file: CheckpointFile, error: CheckpointError) -> None:
        _log.warning("%s; trying the one before it", error)
        self.journal.happened(file.step, "skipped", str(error))

    def _resume(self, checkpoint: Checkpoint, files: list[CheckpointFile]) -> None:
        # What came after it is of no use to anybody: it is damaged.
        for file in files:
            if file.step > checkpoint.step:
                file.remove()
        self._memo = FrameMemo(self._folder / _FRAMES, checkpoint.step)
        self._log = FrameLog(self._folder / _FRAMES)
        self._log.begin(checkpoint.step)
        self._latest = checkpoint
        self.journal.happened(checkpoint.step, "resumed", f"{len(self._memo)} frames of it were sent before")

    def _write(self, checkpoint: Checkpoint, incoming: Incoming, before: Snapshot) -> None:
        started = time.monotonic()
        try:
            kept = None if incoming.kept is None else Kept(incoming.node, *incoming.kept)
            snapshot = self._store.receive(
                checkpoint.step,
                incoming.pieces(),
                digest=incoming.state_sha256,
                digests=incoming.digests,
                before=before,
                kept=kept,
            )
            self._commit(_with(checkpoint, snapshot, self._at), started)
        except CheckpointError as error:
            self._failed = error
        except CloisterError as error:  # the node is gone: training notices, and the next checkpoint does better
            _log.warning("the checkpoint of step %d was given up: %s", checkpoint.step, error)

    def _commit(self, checkpoint: Checkpoint, started: float) -> None:
        file = write_checkpoint(self._folder / _CHECKPOINTS, checkpoint)
        self._snapshots[file.path.name] = checkpoint.snapshot
        self._latest = checkpoint
        if self.follow is not None and (self._follower is None or not self._follower.is_alive()):
            # In its own time: a second node that hangs must not hold up checkpoints.
            self._follower = threading.Thread(
                target=self._stand_by, args=(self.follow,), name="cloister-standby", daemon=True
            )
            self._follower.start()
        self.log.drop(checkpoint.step)
        if self._memo is not None:
            self._memo.drop(checkpoint.step)
        kept = self._prune()
        entry = CheckpointEntry(
            step=checkpoint.step,
            file=file.path.name,
            bytes=file.path.stat().st_size,
            sent_bytes=checkpoint.snapshot.sent_bytes,
            seconds=round(time.monotonic() - started, 3),
            at=now(),
        )
        self.journal.checkpointed(entry, kept)

    def _stand_by(self, follow: Callable[[Snapshot], None]) -> None:
        """Until the second node is where the newest checkpoint is; from an older one nothing could be replayed."""
        at = -1
        while at != self.latest.step:
            snapshot = self.latest.snapshot
            try:
                follow(snapshot)
            except CloisterError as error:
                _log.warning("nobody stands by: %s", error)
                return
            at = snapshot.step

    def _prune(self) -> list[int]:
        """Removes all but the newest checkpoints, and what only they needed; returns the steps that stay."""
        files = list_checkpoints(self._folder / _CHECKPOINTS)
        stay, go = files[: self.plan.keep], files[self.plan.keep :]
        for file in go:
            file.remove()
        known, self._snapshots = self._snapshots, {}
        for file in stay:
            with contextlib.suppress(CheckpointError):  # damaged: nothing is kept for it
                self._snapshots[file.path.name] = known.get(file.path.name) or file.read().snapshot
        self._store.prune(self._snapshots.values())
        return [file.step for file in stay]

    def _opened(self, at: str) -> SnapshotStore:
        return SnapshotStore(at or str((self._folder / _SNAPSHOTS).absolute()))


def _with(checkpoint: Checkpoint, snapshot: Snapshot, store: str) -> Checkpoint:
    return dataclasses.replace(checkpoint, snapshot=snapshot, store=store)


def _locked(folder: Path) -> int:
    with disk_errors(folder):
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(f"another process works on the run in {folder}: wait for it, or stop it") from error
    _LOCKS.add(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    _LOCKS.discard(descriptor)
    os.close(descriptor)


def _let_go() -> None:
    """In a forked child (a loader's worker): the lock is its parent's, and must not outlive it."""
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_let_go)
