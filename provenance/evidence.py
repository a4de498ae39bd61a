"""What of a bundle's parts holds by itself: signatures, schemas, places in logs, heads, anchors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from provenance.bundle import AnchorPoint, Bundle, LogPart
from provenance.claims import SHORT, Claim, Claims
from provenance.heads import Consistency, Inclusion, TreeHead, open_head
from provenance.records import Record, open_record
from wire.errors import AnchorError, ProvenanceError

__all__ = ["Evidence", "Placed", "Seen", "Witness", "gather"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A record whose signature, schema and place in a log hold.

    Attributes:
        digest: SHA-256 of its envelope.
        record: what it says.
        log: id of the log.
        index: its number there.
    """

    digest: str
    record: Record
    log: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An anchor as a chain shows it.

    Attributes:
        confirmations: blocks on top of its own.
        revoked: whether the log's key may anchor no more.
        independent: whether the log's owner could not rewrite the chain alone.
    """

    confirmations: int
    revoked: bool
    independent: bool


class Witness(Protocol):
    """A chain that can be asked."""

    def look(self, log: bytes, point: AnchorPoint) -> Seen | None:
        """How the chain shows an anchor; none where it is on another chain.

        Raises:
            AnchorError: the chain does not answer, or its endpoints contradict each other.
            ProvenanceError: it says something else than the bundle.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What holds by itself.

    Attributes:
        records: by their digest.
        about: the records that speak of a digest as their own subject's, by that digest.
        receipts: signed receipts by their root; nothing of them is checked yet.
        claims: about all of it.
    """

    records: dict[str, Placed]
    about: dict[str, list[Placed]]
    receipts: dict[str, tuple[bytes, ...]]
    claims: Claims


def gather(bundles: Iterable[Bundle], witness: Witness | None = None, confirmations: int = 12) -> Evidence:
    """Checks what bundles hold; what does not hold is claimed to fail, and counts no more."""
    whole, claims = list(bundles), Claims()
    found = Evidence(records={}, about={}, receipts={}, claims=claims)
    opened = _opened(whole, claims)
    heads: dict[str, TreeHead] = {}
    for bundle in whole:
        found.receipts.update({root: tuple(lines) for root, lines in bundle.receipts.items()})
        for name, part in bundle.logs.items():
            head = _head(name, part, heads, claims)
            if head is not None:
                _place(head, part, opened, found)
                _anchors(head, part, witness, confirmations, claims)
    for digest in opened.keys() - found.records.keys():
        claims.fails(f"record {digest[:SHORT]}", "it stands in none of the bundle's logs", "inclusion proofs")
    for placed in found.records.values():
        for value in {value for subject in placed.record.subject for value in subject.digest.values()}:
            found.about.setdefault(value, []).append(placed)
    return found


def _opened(bundles: list[Bundle], claims: Claims) -> dict[str, tuple[Record, bytes]]:
    opened: dict[str, tuple[Record, bytes]] = {}
    for digest, envelope in itertools.chain.from_iterable(bundle.records.items() for bundle in bundles):
        try:
            if digest not in opened:
                opened[digest] = (open_record(envelope), envelope)
        except ProvenanceError as error:
            claims.fails(f"record {digest[:SHORT]}", str(error), "its envelope")
    if opened:
        claims.proven("records", f"{len(opened)} records are as signed, and fit their schemas", "their signatures")
    return opened


def _head(name: str, part: LogPart, heads: dict[str, TreeHead], claims: Claims) -> TreeHead | None:
    where = f"log {name[:SHORT]}"
    try:
        head = open_head(part.head)
    except ProvenanceError as error:
        claims.fails(where, f"its head: {error}", "the signed head")
        return None
    if head.log.hex() != name:
        claims.fails(where, "its head is of another log", "the signed head")
        return None
    other = heads.setdefault(name, head)
    if other.size == head.size and other.root != head.root:
        claims.fails(where, f"two signed heads of {head.size} records differ: the log was rewritten", "both heads")
    if other.signer != head.signer:
        claims.stated(where, f"its heads are signed by two keys, {other.signer} and this one", head.signer, "unknown")
    claims.stated(where, f"its head of {head.size} records was signed at {head.signed_at}", head.signer)
    return head


def _place(head: TreeHead, part: LogPart, opened: dict[str, tuple[Record, bytes]], found: Evidence) -> None:
    name, good = head.log.hex(), 0
    where = f"log {name[:SHORT]}"
    for place in part.proofs.places:
        record, envelope = opened.get(place.record, (None, b""))
        if record is None:
            claim = f"{where} has a place for it, and the bundle lacks it or holds it altered"
            found.claims.fails(f"record {place.record[:SHORT]}", claim, "the bundle")
            continue
        path = tuple(bytes.fromhex(node) for node in place.path)
        try:
            Inclusion(index=place.index, size=head.size, path=path).check(envelope, head.root)
        except ProvenanceError as error:
            found.claims.fails(f"record {place.record[:SHORT]}", f"its place in {where}: {error}", "inclusion proof")
            continue
        good += 1
        found.records.setdefault(place.record, Placed(digest=place.record, record=record, log=name, index=place.index))
    found.claims.proven(where, f"{good} of its {head.size} records are here, unaltered", "inclusion proofs")


def _anchors(head: TreeHead, part: LogPart, witness: Witness | None, confirmations: int, claims: Claims) -> None:
    where = f"log {head.log.hex()[:SHORT]}"
    if not part.proofs.anchors:
        claims.stated(where, "no chain shows when its records were there", "nobody", "unknown")
    for point in part.proofs.anchors:
        time = datetime.fromtimestamp(min(point.block_time, 2**35), UTC)
        claim = (
            f"its first {point.size} records were on chain {point.chain_id} by {time:%Y-%m-%d %H:%M:%S} UTC "
            f"(block {point.block}, registry {point.registry})"
        )
        path = tuple(bytes.fromhex(node) for node in point.path)
        try:
            root = bytes.fromhex(point.root)
            Consistency(first=point.size, second=head.size, path=path).check(root, head.root)
            seen = None if witness is None else witness.look(head.log, point)
        except AnchorError as error:
            claims.stated(where, f"{claim}: {error}", "the bundle", "unknown")
        except ProvenanceError as error:
            claims.fails(where, f"{claim}: {error}", "the chain" if "chain" in str(error) else "consistency proof")
        else:
            _seen(where, claim, seen, confirmations, claims)


def _seen(where: str, claim: str, seen: Seen | None, confirmations: int, claims: Claims) -> None:
    if seen is None:
        claims.stated(where, f"{claim}; no such chain was asked (--rpc URL)", "the bundle", "unknown")
    elif not seen.independent:
        claims.stated(where, f"{claim}; a development chain, which its owner can rewrite", "the chain's owner")
    elif seen.confirmations < confirmations:
        few = f"{seen.confirmations} of {confirmations} confirmations: not final yet"
        claims.stated(where, f"{claim}; {few}", "the chain", "unknown")
    else:
        claims.proven(where, f"{claim}, {seen.confirmations} confirmations", "the chain")
    if seen is not None and seen.revoked:
        said = "the log's key was revoked on chain: no head after the last one there counts"
        claims.append(Claim(part=where, claim=said, verdict="revoked", basis="proven", by="the chain"))
