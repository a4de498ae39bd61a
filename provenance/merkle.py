"""Merkle trees of RFC 9162 (section 2.1): roots while streaming, inclusion and consistency proofs.

SHA-256, leaves and nodes in domains of their own, shaped by position alone. OpenZeppelin's ``MerkleProof`` is another
tree. A proof is a list of 32-byte hashes, from the leaf upwards; what it names are whole ranges of leaves, and each
range is covered by complete subtrees, so that whoever keeps the complete subtrees can prove anything about any size.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from wire.errors import ProvenanceError

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "MAX_LEAVES",
    "Frontier",
    "Range",
    "check_consistency",
    "check_inclusion",
    "consistency_ranges",
    "cover",
    "inclusion_ranges",
    "leaf_hash",
    "node_hash",
    "range_root",
    "root_of",
]

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
MAX_LEAVES: Final = 2**48 - 1  # what the contract's head has room for

Range = tuple[int, int]
"""Leaves from the first to before the second."""


def leaf_hash(entry: bytes) -> bytes:
    """Hash of a leaf."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of a node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """The roots of the complete subtrees that cover all leaves so far: log n hashes, whatever n.

    ``on_node`` is told every complete subtree once, as ``(level, index, hash)``: level 0 are the leaves.
    """

    def __init__(
        self,
        size: int = 0,
        roots: Iterable[bytes] = (),
        on_node: Callable[[int, int, bytes], None] | None = None,
    ) -> None:
        """Goes on from ``size`` leaves, whose ``roots`` are in the order of :func:`cover`."""
        self.size = size
        self._roots = list(roots)
        self._on_node = on_node
        if len(self._roots) != size.bit_count():
            raise ProvenanceError(f"{len(self._roots)} subtrees do not cover {size} leaves")

    def append(self, leaf: bytes) -> None:
        """Takes the next leaf's hash."""
        if self.size >= MAX_LEAVES:
            raise ProvenanceError(f"a tree of more than {MAX_LEAVES} leaves")
        level, index, node = 0, self.size, leaf
        if self._on_node is not None:
            self._on_node(0, index, leaf)
        while index & 1:
            level, index, node = level + 1, index >> 1, node_hash(self._roots.pop(), node)
            if self._on_node is not None:
                self._on_node(level, index, node)
        self._roots.append(node)
        self.size += 1

    def root(self) -> bytes:
        """The tree's root."""
        return _fold(self._roots)


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The root over leaves' hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def cover(span: Range) -> list[tuple[int, int]]:
    """The complete subtrees, as ``(level, index)``, that cover a range which one proof names, the largest first."""
    found, (start, end) = [], span
    while start < end:
        level = (end - start).bit_length() - 1
        found.append((level, start >> level))
        start += 1 << level
    return found


def range_root(span: Range, node: Callable[[int, int], bytes]) -> bytes:
    """The root of a range, of the complete subtrees that ``node(level, index)`` gives."""
    return _fold([node(level, index) for level, index in cover(span)])


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """The ranges whose roots prove that a leaf is in the tree of ``size`` leaves (RFC 9162, 2.1.3.1)."""
    if not 0 <= index < size:
        raise ProvenanceError(f"no leaf {index} in a tree of {size}")
    found: list[Range] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            found.append((middle, end))
            end = middle
        else:
            found.append((start, middle))
            start = middle
    return found[::-1]


def consistency_ranges(first: int, second: int) -> list[Range]:
    """The ranges whose roots prove that the tree of ``first`` leaves begins that of ``second`` (2.1.4.1)."""
    if not 0 < first <= second:
        raise ProvenanceError(f"a tree of {first} leaves does not begin one of {second}")
    found: list[Range] = []
    start, end, whole = 0, second, True
    while first != end:
        middle = start + _split(end - start)
        if first <= middle:
            found.append((middle, end))
            end = middle
        else:
            found.append((start, middle))
            start, whole = middle, False
    if not whole:
        found.append((start, end))
    return found[::-1]


def check_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Raises: ProvenanceError unless ``path`` proves ``leaf`` to be number ``index`` under ``root`` (2.1.3.2)."""
    _check_hashes(path, "inclusion")
    if not 0 <= index < size <= MAX_LEAVES:
        raise ProvenanceError(f"an inclusion proof for leaf {index} of {size}")
    place, last, node = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise ProvenanceError("the inclusion proof is too long")
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    if last != 0 or not hmac.compare_digest(node, root):
        raise ProvenanceError(f"the inclusion proof of leaf {index} does not lead to the root of {size} leaves")


def check_consistency(  # noqa: C901 - the RFC's own steps, in its order
    first: int, old: bytes, second: int, new: bytes, path: Sequence[bytes]
) -> None:
    """Raises: ProvenanceError unless ``path`` proves that the older tree begins the newer one (2.1.4.2)."""
    _check_hashes(path, "consistency")
    if not 0 < first <= second <= MAX_LEAVES:
        raise ProvenanceError(f"a consistency proof from {first} to {second} leaves")
    if first == second:
        if path or old != new:
            raise ProvenanceError(f"two heads of {first} leaves have different roots: the log was rewritten")
        return
    steps = [old, *path] if first & (first - 1) == 0 else list(path)
    place, last = first - 1, second - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    if not steps:
        raise ProvenanceError("the consistency proof is empty")
    was = now = steps[0]
    for node in steps[1:]:
        if last == 0:
            raise ProvenanceError("the consistency proof is too long")
        if place & 1 or place == last:
            was, now = node_hash(node, was), node_hash(node, now)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            now = node_hash(now, node)
        place, last = place >> 1, last >> 1
    if last != 0 or was != old or now != new:
        raise ProvenanceError(f"the head of {second} leaves does not go on from that of {first}: the log was rewritten")


def _split(size: int) -> int:
    """The largest power of two below ``size``."""
    return 1 << ((size - 1).bit_length() - 1)


def _fold(roots: Sequence[bytes]) -> bytes:
    if not roots:
        return EMPTY_ROOT
    return functools.reduce(lambda right, left: node_hash(left, right), reversed(roots))


def _check_hashes(path: Sequence[bytes], what: str) -> None:
    most = 2 * MAX_LEAVES.bit_length()
    if len(path) > most or any(len(node) != HASH_BYTES for node in path):
        raise ProvenanceError(f"the {what} proof is no list of at most {most} hashes")
