"""Snapshots of the middle, kept where the owner says: a folder, or any URL that fsspec knows (``s3://…``).

A snapshot is a step and the digests of its tensors; the tensors stand in objects, files of safetensors named by their
SHA-256. An object holds what had changed since the snapshot before, so a frozen layer is stored, and sent, once. What
no kept snapshot names is removed. Objects hold only the middle (THREATS T15), and are believed by their digest alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from client_side.disk import disk_errors
from wire.errors import CheckpointError, ConfigError, StateRejectedError
from wire.files import sync_folder
from wire.state import chunks, dump_state, load_state, sha256, tensor_digest

__all__ = ["Kept", "Snapshot", "SnapshotStore", "StoreFailedError", "Stored"]

_SUFFIX: Final = ".safetensors"
_DIGEST_BYTES: Final = 32


class StoreFailedError(CheckpointError):
    """The store does not answer: what it holds may be whole all the same."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: its digest, and the object that holds it."""

    digest: bytes
    object: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """The same snapshot on a node's own disk: which node, and what its opening names."""

    node: str
    sha256: bytes
    bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The middle at the boundary before ``step``.

    Attributes:
        tensors: by the names of :mod:`wire.state`.
        kept: where a node keeps it too.
        sent_bytes: what of it came over the wire; the rest was stored already.
    """

    step: int
    tensors: Mapping[str, Stored] = field(repr=False)
    kept: Kept | None = None
    sent_bytes: int = 0

    @property
    def objects(self) -> set[bytes]:
        """The digests of the objects that hold it."""
        return {stored.object for stored in self.tensors.values()}

    def to_json(self) -> dict[str, Any]:
        """As plain data; digests in hexadecimal."""
        return {
            "step": self.step,
            "tensors": {name: [t.digest.hex(), t.object.hex()] for name, t in self.tensors.items()},
            "kept": None if self.kept is None else [self.kept.node, self.kept.sha256.hex(), self.kept.bytes],
            "sent_bytes": self.sent_bytes,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Snapshot:
        """What :meth:`to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: anything else.
        """
        kept = data["kept"]
        return cls(
            step=int(data["step"]),
            tensors={n: Stored(bytes.fromhex(d), bytes.fromhex(o)) for n, (d, o) in data["tensors"].items()},
            kept=None if kept is None else Kept(str(kept[0]), bytes.fromhex(kept[1]), int(kept[2])),
            sent_bytes=int(data["sent_bytes"]),
        )


class SnapshotStore:
    """The objects under one URL, which belong to one run."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet.

        Raises:
            ConfigError: fsspec does not know such URLs, or lacks a package for them.
        """
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"snapshots = {url!r}: {error}") from error
        self._url = url
        self._local = isinstance(self._files, LocalFileSystem)

    def put(self, step: int, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """Stores ``tensors`` as they are.

        Raises:
            CheckpointError: the store fails.
        """
        data = dump_state(tensors)
        digest = sha256(data)
        self._write(digest, chunks(data))
        return Snapshot(step, {name: Stored(tensor_digest(t), digest) for name, t in tensors.items()})

    def receive(
        self,
        step: int,
        pieces: Iterable[bytes],
        *,
        digest: bytes,
        digests: Mapping[str, bytes],
        before: Snapshot | None,
        kept: Kept | None,
    ) -> Snapshot:
        """Stores what comes over the wire, piece by piece.

        Args:
            step: of the boundary.
            pieces: an object with the tensors that ``before`` does not hold.
            digest: the SHA-256 of all pieces.
            digests: of all tensors, by name.
            before: the snapshot whose tensors were said to be known.
            kept: where the node keeps it.

        Raises:
            StateRejectedError: other bytes, or other tensors, than announced.
            CheckpointError: the store fails.
        """
        known = {} if before is None else {t.digest: t.object for t in before.tensors.values()}
        sent = self._write(digest, pieces)
        tensors = {name: Stored(d, known.get(d, digest)) for name, d in digests.items()}
        snapshot = Snapshot(step, tensors, kept, sent)
        try:
            self.load(snapshot)  # what cannot be restored is no snapshot; better known now than when it is needed
        except StoreFailedError:
            raise
        except CheckpointError as error:
            raise StateRejectedError(f"the node's snapshot is not what it says: {error}") from error
        return snapshot

    def load(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """The tensors of ``snapshot``.

        Raises:
            CheckpointError: an object is gone, damaged, or lacks a tensor.
            StoreFailedError: the store does not answer.
        """
        found: dict[bytes, torch.Tensor] = {}
        for digest in snapshot.objects:
            path = self._path(digest)
            try:
                data: bytes = self._files.cat_file(path)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"the snapshot of step {snapshot.step} is gone: no {self._shown(digest)}"
                ) from error
            except OSError as error:
                raise StoreFailedError(
                    f"cannot read {self._shown(digest)}: {error.strerror or error}; mend that and resume the run"
                ) from error
            if sha256(data) != digest:
                raise CheckpointError(f"the snapshot of step {snapshot.step} is damaged: {self._shown(digest)}")
            try:
                found |= {tensor_digest(tensor): tensor for tensor in load_state(data).values()}
            except StateRejectedError as error:
                raise CheckpointError(f"{self._shown(digest)} is no snapshot: {error}") from error
        try:
            return {name: found[stored.digest] for name, stored in snapshot.tensors.items()}
        except KeyError:
            raise CheckpointError(f"the snapshot of step {snapshot.step} lacks tensors that it names") from None

    def prune(self, keep: Iterable[Snapshot]) -> None:
        """Removes the objects that none of ``keep`` names.

        Raises:
            CheckpointError: the store fails.
        """
        wanted = {digest.hex() for snapshot in keep for digest in snapshot.objects}
        with disk_errors(self._url):
            if not self._files.exists(self._root):
                return
            for path in self._files.ls(self._root, detail=False):
                name = str(path).rpartition("/")[2]
                if name.removesuffix(_SUFFIX) not in wanted:
                    self._files.rm_file(path)

    def remove(self) -> None:
        """Removes everything.

        Raises:
            CheckpointError: the store fails.
        """
        with disk_errors(self._url), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._root, recursive=True)

    def _write(self, digest: bytes, pieces: Iterable[bytes]) -> int:
        size, seen = 0, hashlib.sha256()

        def checked() -> Iterator[bytes]:
            nonlocal size
            for piece in pieces:
                seen.update(piece)
                size += len(piece)
                yield piece

        with disk_errors(self._url):
            self._files.makedirs(self._root, exist_ok=True)
            # An object store shows an object when it is closed; a folder, when it is renamed.
            path = self._path(digest)
            target = f"{path}.partial" if self._local else path
            with self._files.open(target, "wb") as file:
                for piece in checked():
                    file.write(piece)
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())
            if seen.digest() != digest:
                self._files.rm_file(target)
                raise StateRejectedError("the bytes of a snapshot do not hash to what was announced")
            if self._local:
                Path(target).replace(path)
                sync_folder(Path(self._root))
        return size

    def _path(self, digest: bytes) -> str:
        return f"{self._root}/{digest.hex()}{_SUFFIX}"

    def _shown(self, digest: bytes) -> str:
        return f"{self._url.rstrip('/')}/{digest.hex()}{_SUFFIX}"
