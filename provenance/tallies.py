"""What receipts are over: a leaf for each step's wire bytes, and digests of the middle's state, on both sides alike.

Owner and node hash what they send and what they receive, each for itself, and come to the same leaves. Everything is
salted with 32 bytes that the two share: whoever has only the receipts can test no guess of what travelled (T21).
The bytes stand in ``docs/reference/provenance.md``.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from provenance.envelope import canonical
from provenance.merkle import EMPTY_ROOT, Frontier, leaf_hash
from provenance.models import tensors_root
from wire.errors import ProvenanceError

if TYPE_CHECKING:
    from protos import node_pb2, tensor_pb2

__all__ = [
    "HASHES",
    "SALT_BYTES",
    "Tally",
    "answer_digest",
    "boundary_salt",
    "class_digest",
    "frame_digest",
    "spec_digest",
    "state_digest",
    "state_root",
]

SALT_BYTES: Final = 32

_FRAME: Final = b"cloister frame v1\x00"
_ANSWER: Final = b"cloister answer v1\x00"
_STEP: Final = b"cloister step v1\x00"
_STATE: Final = b"cloister state v1\x00"
_FRAME_HEAD: Final = struct.Struct(">QIB?dII")
_ANSWER_HEAD: Final = struct.Struct(">QIB?dI")
_TENSOR_HEAD: Final = struct.Struct(">IIB")


def _hashes() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    try:
        from blake3 import blake3  # noqa: PLC0415 - three times as fast, where its wheel is there
    except ImportError:
        pass  # then SHA-256 is what this side offers
    else:
        found["blake3"] = blake3
    return found | {"sha256": hashlib.sha256}


#: Hashes of wire bytes that this side has, the fastest first.
HASHES: Final = _hashes()


def frame_digest(frame: node_pb2.Frame, kind: str) -> bytes:
    """32 bytes over all that an owner's frame says."""
    digest = HASHES[kind]()
    head = (frame.step, frame.micro_batch, frame.phase, frame.update, frame.loss_weight)
    digest.update(_FRAME + _FRAME_HEAD.pack(*head, len(frame.rows), len(frame.tensors)))
    digest.update(struct.pack(f">{len(frame.rows)}I", *frame.rows))
    _feed(digest, [*frame.tensors, *([frame.labels] if frame.HasField("labels") else [])])
    return bytes(digest.digest())


def answer_digest(answer: node_pb2.TrainResponse, kind: str) -> bytes:
    """32 bytes over what a node's answer says of the training: not how long it took, nor whether the node drains."""
    digest = HASHES[kind]()
    head = (answer.step, answer.micro_batch, answer.phase, answer.updated, answer.loss, len(answer.tensors))
    digest.update(_ANSWER + _ANSWER_HEAD.pack(*head))
    _feed(digest, answer.tensors)
    return bytes(digest.digest())


def _feed(digest: Any, tensors: Iterable[tensor_pb2.Tensor]) -> None:  # noqa: ANN401 - a hash of any library
    for tensor in tensors:
        shape, data = tensor.shape, tensor.data
        digest.update(_TENSOR_HEAD.pack(tensor.dtype, tensor.codec, min(len(shape), 255)))
        digest.update(struct.pack(f">{len(shape)}QQ", *shape, len(data)))
        digest.update(data)


class Tally:
    """One session's exchanges as one side saw them, step by step, until a receipt is due. For one thread."""

    def __init__(self, kind: str, salt: bytes, first_step: int) -> None:
        """Begins before ``first_step``.

        Raises:
            ProvenanceError: a salt of another length, or a hash that this side has not.
        """
        if len(salt) != SALT_BYTES or kind not in HASHES:
            raise ProvenanceError(f"receipts take a salt of {SALT_BYTES} bytes, and one of {', '.join(HASHES)}")
        self.kind, self.salt, self.first_step = kind, salt, first_step
        self.number = 0
        self._steps = Frontier()
        self._digests: list[bytes] = []

    @property
    def next_step(self) -> int:
        """The step after the last whole one."""
        return self.first_step + self._steps.size

    def exchanged(self, frame: bytes, answer: bytes, *, updated: bool) -> None:
        """Takes the digests of one frame and its answer, in the order of the frames."""
        self._digests += (frame, answer)
        if updated:
            head = _STEP + boundary_salt(self.salt, "step", self.next_step) + struct.pack(">Q", self.next_step)
            self._steps.append(leaf_hash(head + b"".join(self._digests)))
            self._digests = []

    def leaves(self) -> bytes:
        """The root over the steps since the last receipt.

        Raises:
            ProvenanceError: there is none, or the last one is not over.
        """
        if not self._steps.size or self._digests:
            raise ProvenanceError("a receipt is given at the end of a step, and over one at least")
        return self._steps.root()

    def close(self) -> None:
        """The segment ends here; the next one begins."""
        self.first_step, self.number, self._steps = self.next_step, self.number + 1, Frontier()


def boundary_salt(salt: bytes, what: str, step: int) -> bytes:
    """The salt of one step's leaf, or of the state before that step: opening one opens no other."""
    return hmac.new(salt, f"{what} {step}".encode(), hashlib.sha256).digest()


def state_root(digests: Mapping[str, bytes]) -> bytes:
    """RFC 9162 root over tensors' digests, as a model's; of none, the empty tree's."""
    return tensors_root(dict(digests)) if digests else EMPTY_ROOT


def state_digest(salt: bytes, model_root: bytes, optimizer_root: bytes) -> bytes:
    """Digest of a middle's state before a step, of :func:`boundary_salt` and the roots over its tensors."""
    return hashlib.sha256(_STATE + salt + model_root + optimizer_root).digest()


def class_digest(*, torch: str, device: str, threads: int, instruction_set: str) -> str:
    """SHA-256 of a determinism class: nodes of one class must agree to the bit."""
    named = {"device": device, "instructionSet": instruction_set, "threads": threads, "torch": torch}
    return hashlib.sha256(canonical(named)).hexdigest()


def spec_digest(spec: node_pb2.SessionSpec) -> bytes:
    """SHA-256 of what a session was opened with."""
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).digest()
