"""Receipts: what a node signs of each segment it computed, and how a run's segments hang together.

A segment is the steps between two digests of the middle's state. A node that signed a receipt can be held to it:
whoever replays the segment from ``state_before`` must come to ``state_after``. A receipt proves who said so; that it
was computed so is the node's word until somebody replays it.

The signed receipts of a run are one chain: each segment begins at the step, and in the state, that the one before
ended with, on whatever node. Steps that were computed again (a node died, the owner resumed) stand in it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from provenance.envelope import canonical, open_envelope, seal
from provenance.merkle import leaf_hash, root_of
from provenance.records import Receipts
from wire.errors import ProvenanceError

if TYPE_CHECKING:
    from eth_account.signers.base import BaseAccount

__all__ = [
    "MAX_SEGMENTS",
    "RECEIPT_TYPE",
    "Receipt",
    "Segment",
    "check_chain",
    "check_receipts",
    "describe",
    "open_receipt",
    "receipts_root",
    "sign_receipt",
]

RECEIPT_TYPE: Final = "application/vnd.cloister.receipt+json"
MAX_SEGMENTS: Final = 50_000  # of one run: half of what a bundle has room for

_CONFIG: Final = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True)
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What a node says of some steps.

    Attributes:
        spec: SHA-256 of what the session was opened with: program, initial state, optimizer, seeds, segment length.
        number: of the segment in its session, from 0.
        first_step: that it covers.
        last_step: that it covers.
        leaves: RFC 9162 root over its steps' leaves, which are salted; see ``docs/reference/provenance.md``.
        state_before: digest of the middle's state before ``first_step``.
        state_after: and after ``last_step``.
        hash: by which leaves and states are hashed.
    """

    __pydantic_config__: ClassVar = _CONFIG
    spec: Hex32
    number: Count
    first_step: Count
    last_step: Count
    leaves: Hex32
    state_before: Hex32
    state_after: Hex32
    hash: Literal["sha256", "blake3"]


_SEGMENT: Final = TypeAdapter(Segment)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A signed segment.

    Attributes:
        segment: what was signed.
        node: address of the key that signed.
        envelope: the signed bytes.
    """

    segment: Segment
    node: str
    envelope: bytes


def sign_receipt(segment: Segment, signer: BaseAccount) -> bytes:
    """The receipt's envelope.

    Raises:
        ProvenanceError: a value that the format does not allow.
    """
    return seal(_SEGMENT.dump_python(_checked(canonical(_dumped(segment))), by_alias=True), RECEIPT_TYPE, signer)


def open_receipt(envelope: bytes) -> Receipt:
    """The receipt in an envelope, which may be anybody's, once its signature holds.

    Raises:
        ProvenanceError: naming what is wrong.
    """
    opened = open_envelope(envelope, RECEIPT_TYPE)
    return Receipt(_checked(canonical(opened.payload)), opened.signer, envelope)


def receipts_root(envelopes: Iterable[bytes]) -> bytes:
    """RFC 9162 root over signed receipts, byte for byte, in their order."""
    return root_of(leaf_hash(envelope) for envelope in envelopes)


def describe(receipts: Sequence[Receipt], class_digest: str) -> Receipts:
    """What a run's record says of one node's receipts.

    Args:
        receipts: in the order of their steps, all of one node and one spec; at least one.
        class_digest: SHA-256 of the node's determinism class.
    """
    first, last = receipts[0], receipts[-1]
    return Receipts(
        node=first.node,
        spec=first.segment.spec,
        root=receipts_root(receipt.envelope for receipt in receipts).hex(),
        segments=len(receipts),
        first_step=first.segment.first_step,
        last_step=last.segment.last_step,
        hash=first.segment.hash,
        class_digest=class_digest,
    )


def check_receipts(stated: Receipts, envelopes: Sequence[bytes]) -> list[Receipt]:
    """The receipts that a run's record speaks of.

    Raises:
        ProvenanceError: they are others, or not the node's, or no chain; names the first that is wrong.
    """
    if len(envelopes) != stated.segments:
        raise ProvenanceError(f"{len(envelopes)} receipts, where the run's record has {stated.segments}")
    if receipts_root(envelopes).hex() != stated.root:
        raise ProvenanceError("the receipts are not those that the run's record has the root of")
    opened = [_numbered(number, envelope) for number, envelope in enumerate(envelopes)]
    for number, receipt in enumerate(opened):
        said = receipt.segment
        if (receipt.node, said.spec, said.hash) != (stated.node, stated.spec, stated.hash):
            raise ProvenanceError(f"receipt {number} is of another node, spec or hash than the run's record says")
    check_chain(opened)
    if opened and (opened[0].segment.first_step, opened[-1].segment.last_step) != (stated.first_step, stated.last_step):
        raise ProvenanceError("the receipts cover other steps than the run's record says")
    return opened


def check_chain(receipts: Sequence[Receipt]) -> None:
    """Raises: ProvenanceError unless each segment goes on from where the one before ended."""
    for number, receipt in enumerate(receipts):
        segment = receipt.segment
        if segment.last_step < segment.first_step:
            raise ProvenanceError(f"receipt {number} ends before it begins")
        if number == 0:
            continue
        before = receipts[number - 1].segment
        if segment.first_step != before.last_step + 1:
            raise ProvenanceError(
                f"receipt {number} begins with step {segment.first_step}, the one before ended with {before.last_step}"
            )
        if segment.state_before != before.state_after:
            raise ProvenanceError(f"receipt {number} begins in another state than the one before ended in")


def _numbered(number: int, envelope: bytes) -> Receipt:
    try:
        return open_receipt(envelope)
    except ProvenanceError as error:
        raise ProvenanceError(f"receipt {number}: {error}") from error


def _dumped(segment: Segment) -> object:
    return _SEGMENT.dump_python(segment, by_alias=True, warnings=False)


def _checked(payload: bytes) -> Segment:
    try:
        return _SEGMENT.validate_json(payload)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:100] for part in found["loc"])
        raise ProvenanceError(f"the receipt is none: {where}: {found['msg'][:200]}") from error
