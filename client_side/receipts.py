"""The owner's side of receipts: every one is checked against the owner's own hashes at once, and kept.

The owner counts, for each session, what it sent and what came back. A receipt whose leaves, steps or states differ from
that stops the run (T17, T22): the node signed something that did not happen, or computed on from another state than the
one it had signed. What is kept is a chain: where steps are computed again on another node, the later receipts count.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client_side.disk import disk_errors
from client_side.frames import SentFrame
from protos import node_pb2
from provenance.receipts import Receipt, open_receipt
from provenance.records import NodeRecord, open_record
from provenance.tallies import (
    HASHES,
    SALT_BYTES,
    Tally,
    answer_digest,
    boundary_salt,
    frame_digest,
    state_digest,
    state_root,
)
from wire.errors import ProvenanceError, ReceiptError
from wire.files import replace_file

__all__ = ["SEGMENT_STEPS", "Receipts", "SessionTally", "SignedSegment"]

_log = logging.getLogger(__name__)

SEGMENT_STEPS: Final = 64  # what one dispute may have to open


@dataclass(frozen=True, slots=True)
class SignedSegment:
    """A receipt that agrees with what the owner saw.

    Attributes:
        receipt: as the node signed it.
        node_record: what the node says of itself, signed by the same key.
        model_root: over the middle's tensors after the last step.
        optimizer_root: over the optimizer's.
    """

    receipt: Receipt
    node_record: bytes
    model_root: bytes
    optimizer_root: bytes


class SessionTally:
    """One session as the owner saw it. For the link's thread."""

    def __init__(
        self, *, kind: str, salt: bytes, spec: bytes, first_step: int, node_record: bytes, fingerprint: str
    ) -> None:
        """Begins with the session.

        Raises:
            ReceiptError: the node's record is none, or another node's; or it chose a hash that was not offered.
        """
        try:
            told = open_record(node_record)
            self._tally = Tally(kind, salt, first_step)
        except ProvenanceError as error:
            raise ReceiptError(f"the node offers receipts, but not its own record: {error}") from error
        named = {subject.digest.get("sha256") for subject in told.subject}
        if not isinstance(told.predicate, NodeRecord) or told.predicate.address.lower() != told.signer.lower():
            raise ReceiptError("the node's record is none of a node, or not signed by its own key")
        if fingerprint and named != {fingerprint}:
            raise ReceiptError("the node's record is of another node than the one that is pinned")
        self._spec, self._signer, self._record = spec, told.signer, node_record
        self._sent: deque[SentFrame] = deque()
        self._hashed: deque[bytes] = deque()
        self._answers: deque[node_pb2.TrainResponse] = deque()

    @property
    def due(self) -> bool:
        """Whether there is a step without a receipt."""
        self._catch_up()
        return self._tally.next_step > self._tally.first_step

    def sent(self, frame: SentFrame) -> None:
        """Takes a frame that is on its way; hashes what waits for it, while the node computes."""
        self._sent.append(frame)
        self._catch_up()

    def received(self, answer: node_pb2.TrainResponse) -> None:
        """Takes the answer of the oldest frame without one."""
        self._answers.append(answer)

    def refused(self) -> None:
        """What was not answered was not done."""
        self._catch_up()
        self._sent.clear()
        self._hashed.clear()

    def request(self) -> SentFrame:
        """The frame that asks for a receipt."""
        frame = node_pb2.Frame(step=self._tally.next_step, phase=node_pb2.PHASE_RECEIPT)
        data = node_pb2.TrainRequest(frame=frame).SerializeToString()
        return SentFrame(frame.step, 0, node_pb2.PHASE_RECEIPT, update=False, data=data)

    def accept(self, message: node_pb2.Receipt) -> SignedSegment:
        """The receipt, once it agrees with what the owner saw.

        Raises:
            ReceiptError: naming what differs.
        """
        self._catch_up()
        tally = self._tally
        try:
            receipt = open_receipt(message.envelope)
        except ProvenanceError as error:
            raise ReceiptError(f"the node's receipt is none: {error}") from error
        said, steps = receipt.segment, (tally.first_step, tally.next_step - 1)
        after = state_digest(
            boundary_salt(tally.salt, "state", tally.next_step), message.model_root, message.optimizer_root
        )
        for what, theirs, ours in (
            ("by another key than its node's", receipt.node, self._signer),
            ("of another session", (said.spec, said.number), (self._spec.hex(), tally.number)),
            ("over other steps", (said.first_step, said.last_step), steps),
            ("by another hash", said.hash, tally.kind),
            ("over other bytes than were exchanged", said.leaves, tally.leaves().hex()),
            ("of another state than the node names", said.state_after, after.hex()),
        ):
            if theirs != ours:
                raise ReceiptError(
                    f"the node's receipt for steps {steps[0]} to {steps[1]} is {what}: stop working with this node, "
                    "and go on from the newest checkpoint with another (--resume)"
                )
        tally.close()
        return SignedSegment(receipt, self._record, message.model_root, message.optimizer_root)

    def _catch_up(self) -> None:
        while self._sent:
            parsed = node_pb2.TrainRequest.FromString(self._sent.popleft().data)
            self._hashed.append(frame_digest(parsed.frame, self._tally.kind))
        while self._answers:
            answer = self._answers.popleft()
            digest = answer_digest(answer, self._tally.kind)
            self._tally.exchanged(self._hashed.popleft(), digest, updated=answer.updated)


class Receipts:
    """A run's receipts: a chain over its steps. For one thread.

    Attributes:
        salt: of the run's receipts.
        kept: those that count, in the order of their steps.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Reads what an earlier process of the run kept in ``path``.

        Raises:
            CheckpointError: the file cannot be read or written.
        """
        self._path = path
        self.salt = secrets.token_bytes(SALT_BYTES)
        self.kept: list[SignedSegment] = []
        if path is not None and path.exists():
            self._read(path)

    @property
    def hashes(self) -> list[str]:
        """What receipts may be over, the preferred first."""
        return list(HASHES)

    def take(self, signed: SignedSegment) -> None:
        """Keeps a receipt; those of the steps that it covers, which were computed again, go.

        Raises:
            ReceiptError: it begins in another state than the one before it ended in.
            CheckpointError: it cannot be written.
        """
        said = signed.receipt.segment
        kept = [each for each in self.kept if each.receipt.segment.last_step < said.first_step]
        before = kept[-1].receipt.segment if kept else None
        goes_on = before is not None and before.last_step == said.first_step - 1
        if before is not None and goes_on and before.state_after != said.state_before:
            raise ReceiptError(f"the node began step {said.first_step} in another state than the one that was signed")
        self.kept = [*kept, signed]
        self._write()

    def check_state(self, step: int, digests: Mapping[str, bytes]) -> None:
        """Holds the tensors of a step boundary against what was signed of it, if that was.

        Args:
            step: the next one.
            digests: of the middle's tensors, by name.

        Raises:
            ReceiptError: they are others.
        """
        last = self.kept[-1] if self.kept else None
        if last is None or last.receipt.segment.last_step != step - 1:
            return
        if state_root(digests) != last.model_root:
            raise ReceiptError(f"the node returned another model than the one that it signed after step {step - 1}")

    def _write(self) -> None:
        if self._path is None:
            return
        lines = [json.dumps({"salt": self.salt.hex()})]
        for each in self.kept:
            parts = (each.receipt.envelope, each.node_record, each.model_root, each.optimizer_root)
            lines.append(json.dumps([base64.b64encode(part).decode("ascii") for part in parts]))
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, ("\n".join(lines) + "\n").encode(), private=True)

    def _read(self, path: Path) -> None:
        try:
            with disk_errors(path):
                head, *lines = path.read_text(encoding="utf-8").splitlines()
            self.salt = bytes.fromhex(json.loads(head)["salt"])
            for line in lines:
                envelope, record, model, optimizer = (base64.b64decode(part) for part in json.loads(line))
                self.kept.append(SignedSegment(open_receipt(envelope), record, model, optimizer))
        except (ValueError, KeyError, TypeError, ProvenanceError) as error:
            _log.warning("the run's receipts in %s are damaged, and begin anew: %s", path, error)
            self.salt, self.kept = secrets.token_bytes(SALT_BYTES), []
