"""Signed tree heads, and the proofs into and between them; see :mod:`provenance.log`, which makes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from provenance.envelope import open_envelope
from provenance.merkle import MAX_LEAVES, check_consistency, check_inclusion, leaf_hash
from wire.errors import ProvenanceError

__all__ = ["HEAD_TYPE", "Consistency", "Inclusion", "TreeHead", "open_head"]

HEAD_TYPE: Final = "application/vnd.cloister.tree-head+json"

_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")
_HEX32: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeHead:
    """A log at one size.

    Attributes:
        log: 32 random bytes that name the log.
        size: records.
        root: over them.
        signed_at: by the signer's clock, RFC 3339 in UTC.
        signer: address of the key that signed.
        envelope: the signed bytes.
    """

    log: bytes
    size: int
    root: bytes
    signed_at: str
    signer: str
    envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Inclusion:
    """Proof that a record is number ``index`` of the first ``size``."""

    index: int
    size: int
    path: tuple[bytes, ...]

    def check(self, envelope: bytes, root: bytes) -> None:
        """Raises: ProvenanceError unless it proves that ``envelope`` is under ``root``."""
        check_inclusion(leaf_hash(envelope), self.index, self.size, self.path, root)


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """Proof that the log of ``first`` records begins that of ``second``."""

    first: int
    second: int
    path: tuple[bytes, ...]

    def check(self, old: bytes, new: bytes) -> None:
        """Raises: ProvenanceError unless it proves that ``old`` begins ``new``."""
        check_consistency(self.first, old, self.second, new, self.path)


def open_head(envelope: bytes) -> TreeHead:
    """The tree head in an envelope, which may be anybody's, once its signature holds.

    Raises:
        ProvenanceError: naming what is wrong.
    """
    opened = open_envelope(envelope, HEAD_TYPE)
    head = opened.payload
    if not isinstance(head, dict) or set(head) != {"log", "size", "root", "signedAt"}:
        raise ProvenanceError("the tree head names something else than log, size, root and signedAt")
    hexes = all(isinstance(head[name], str) and _HEX32.fullmatch(head[name]) for name in ("log", "root"))
    size, at = head["size"], head["signedAt"]
    if not hexes or type(size) is not int or not 0 < size <= MAX_LEAVES:
        raise ProvenanceError("the tree head's log, root or size is none")
    if not isinstance(at, str) or not _TIME.fullmatch(at):
        raise ProvenanceError("the tree head's time is none: RFC 3339 in UTC")
    return TreeHead(
        log=bytes.fromhex(head["log"]),
        size=size,
        root=bytes.fromhex(head["root"]),
        signed_at=at,
        signer=opened.signer,
        envelope=envelope,
    )
