"""Signed statements: canonical JSON (RFC 8785) in DSSE envelopes, signed by Ethereum keys.

DSSE (secure-systems-lab/dsse, v1) signs ``PAE(type, payload)``; the signature over it is Ethereum's ``personal_sign``
(EIP-191, version 0x45), so that an identity's keystore signs, and a hardware wallet can. An envelope has exactly one
encoding: canonical JSON around a canonical payload, base64 without slack, one signature with low s. So whoever changes
a byte changes what is signed, or leaves something that is refused here.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import rfc8785
from coincurve import PublicKey
from eth_hash.auto import keccak
from pydantic_core import from_json

from wire.errors import ProvenanceError

if TYPE_CHECKING:
    from eth_account.signers.base import BaseAccount

__all__ = ["MAX_ENVELOPE_BYTES", "Opened", "canonical", "open_envelope", "parse_json", "seal"]

MAX_ENVELOPE_BYTES: Final = 2**20  # a run's record with 10,000 checkpoints, in base64

_SIGNATURE_BYTES: Final = 65  # r, s, v
_HALF_ORDER: Final = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0  # secp256k1 (EIP-2)


@dataclass(frozen=True, slots=True)
class Opened:
    """An envelope whose signature holds.

    Attributes:
        payload: canonical JSON, parsed.
        signer: address of the key that signed, with its EIP-55 checksum.
    """

    payload: Any
    signer: str


def canonical(value: Any) -> bytes:  # noqa: ANN401 - whatever JSON can say
    """RFC 8785: the one encoding of a JSON value.

    Raises:
        ProvenanceError: it holds what JSON cannot say, such as NaN, or an integer beyond 2⁵³, which goes as a string.
    """
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, RecursionError, UnicodeEncodeError) as error:
        raise ProvenanceError(f"this has no canonical JSON: {error}") from error


def parse_json(data: bytes, what: str, *, limit: int = MAX_ENVELOPE_BYTES) -> Any:  # noqa: ANN401 - as above
    """The value of canonical JSON, which may be anybody's.

    Raises:
        ProvenanceError: more than ``limit`` bytes, no JSON, or not its canonical encoding: a member that comes twice,
            white space, a number that double precision cannot hold.
    """
    if len(data) > limit:
        raise ProvenanceError(f"{what} has {len(data)} bytes; at most {limit} are read")
    try:
        # Not the standard library's: some of Ethereum's libraries lift Python's recursion limit, and then its C code
        # runs over the end of the stack on brackets that nest deeply. This one stops at 200 of them.
        value = from_json(data, allow_inf_nan=False)
        same = rfc8785.dumps(value) == data
    except (ValueError, RecursionError) as error:  # CanonicalizationError and UnicodeError are ValueErrors
        raise ProvenanceError(f"{what} is no JSON that Cloister writes ({type(error).__name__})") from error
    if not same:
        raise ProvenanceError(f"{what} is no canonical JSON (RFC 8785): it was altered, or written by something else")
    return value


def seal(payload: Any, payload_type: str, signer: BaseAccount) -> bytes:  # noqa: ANN401 - as above
    """The envelope of a payload: canonical JSON, as it goes into the log.

    Args:
        payload: what JSON can say.
        payload_type: media type of the payload.
        signer: as :func:`wire.identity.load_signer` gives it.

    Raises:
        ProvenanceError: see :func:`canonical`; or it is too large.
    """
    from eth_account.messages import encode_defunct  # noqa: PLC0415 - takes more than a second to import

    body = canonical(payload)
    signed = signer.sign_message(encode_defunct(primitive=_message(payload_type, body)))
    envelope = canonical(
        {
            "payload": base64.b64encode(body).decode("ascii"),
            "payloadType": payload_type,
            "signatures": [{"keyid": signer.address, "sig": base64.b64encode(signed.signature).decode("ascii")}],
        }
    )
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise ProvenanceError(f"a record of {len(envelope)} bytes; at most {MAX_ENVELOPE_BYTES} are written")
    return envelope


def open_envelope(data: bytes, payload_type: str) -> Opened:
    """The payload of an envelope, which may be anybody's, once its signature holds.

    Raises:
        ProvenanceError: naming the part that is wrong.
    """
    envelope = parse_json(data, "the envelope")
    if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise ProvenanceError("the envelope is none of DSSE: payload, payloadType and signatures")
    if envelope["payloadType"] != payload_type:
        raise ProvenanceError(f"the envelope's payload is of another type than {payload_type}")
    body = _base64(envelope["payload"], "the envelope's payload")
    keyid, signature = _signature(envelope["signatures"])
    if _recovered(_message(payload_type, body), signature) != keyid:
        raise ProvenanceError(f"the envelope's signature is not of {keyid}: the payload or the signature was altered")
    return Opened(parse_json(body, "the envelope's payload"), keyid)


def _message(payload_type: str, body: bytes) -> bytes:
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def _signature(signatures: Any) -> tuple[str, bytes]:  # noqa: ANN401 - anybody's
    one = signatures[0] if isinstance(signatures, list) and len(signatures) == 1 else None
    if not isinstance(one, dict) or set(one) != {"keyid", "sig"} or not isinstance(one["keyid"], str):
        raise ProvenanceError("the envelope has no single signature with its keyid")
    signature = _base64(one["sig"], "the envelope's signature")
    # The other of the two signatures that (r, s) allows is refused, so that no envelope has a twin.
    low = int.from_bytes(signature[32:64], "big") <= _HALF_ORDER
    if len(signature) != _SIGNATURE_BYTES or signature[64] not in (27, 28) or not low:
        raise ProvenanceError("the envelope's signature is none of Ethereum's: r, low s, v")
    return one["keyid"], signature


def _base64(text: Any, what: str) -> bytes:  # noqa: ANN401 - anybody's
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (AttributeError, UnicodeError, binascii.Error) as error:
        raise ProvenanceError(f"{what} is no base64") from error
    if base64.b64encode(data).decode("ascii") != text:  # unused bits at the end
        raise ProvenanceError(f"{what} is no canonical base64")
    return data


def _recovered(message: bytes, signature: bytes) -> str:
    """Address of the key that signed, with its EIP-55 checksum; without ``eth_account``, which takes long to import."""
    digest = keccak(b"\x19Ethereum Signed Message:\n%d%b" % (len(message), message))
    compact = signature[:64] + bytes([signature[64] - 27])
    try:
        key = PublicKey.from_signature_and_message(compact, digest, hasher=None)
    except ValueError as error:
        raise ProvenanceError("the envelope's signature is no point on the curve: it was altered") from error
    address = keccak(key.format(compressed=False)[1:])[-20:].hex()
    sums = keccak(address.encode()).hex()
    return "0x" + "".join(c.upper() if s in "89abcdef" else c for c, s in zip(address, sums[:40], strict=True))
