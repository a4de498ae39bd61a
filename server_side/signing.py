"""What a node signs: who it is, and a receipt for each segment of a session that it computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from protos import node_pb2
from provenance.receipts import Segment, sign_receipt
from provenance.records import NodeRecord, Subject, sign_record
from provenance.tallies import (
    Tally,
    answer_digest,
    boundary_salt,
    class_digest,
    frame_digest,
    state_digest,
    state_root,
)
from wire.state import tensor_digest

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

__all__ = ["NodeSigner", "ReceiptPlan", "Witness"]


@dataclass(frozen=True, slots=True)
class ReceiptPlan:
    """What an owner's receipts are over: the hash of wire bytes, the salt, SHA-256 of the session's spec."""

    kind: Literal["sha256", "blake3"]
    salt: bytes = field(repr=False)
    spec: bytes


class NodeSigner:
    """A node's signing key, and its own record."""

    def __init__(self, account: LocalAccount, *, fingerprint: str, device: torch.device, version: str) -> None:
        """Signs what the node is.

        Args:
            account: the identity's key.
            fingerprint: SHA-256 of its TLS certificate.
            device: what it computes on.
            version: of Cloister.
        """
        self.account = account
        of_class = class_digest(
            torch=torch.__version__,
            device=device.type,
            threads=torch.get_num_threads(),
            instruction_set=torch.backends.cpu.get_cpu_capability(),
        )
        self.record = sign_record(
            Subject(name="TLS certificate", digest={"sha256": fingerprint}),
            NodeRecord(
                address=account.address,
                device=str(device),
                class_digest=of_class,
                software={"cloister": version or "0", "torch": torch.__version__},
            ),
            account,
        )


class Witness:
    """Keeps what one session exchanged, and signs it when the owner asks. Under the session's lock."""

    def __init__(
        self,
        plan: ReceiptPlan,
        signer: NodeSigner,
        first_step: int,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
    ) -> None:
        """Begins with the state that the session begins with."""
        self._plan, self._signer = plan, signer
        self._tally = Tally(plan.kind, plan.salt, first_step)
        self._unhashed: list[tuple[node_pb2.Frame, node_pb2.TrainResponse]] = []
        self._before, _, _ = self._state(model, optimizer)

    @property
    def kind(self) -> Literal["sha256", "blake3"]:
        """The hash of wire bytes."""
        return self._plan.kind

    @property
    def due(self) -> bool:
        """Whether there is a step without a receipt."""
        return self._tally.next_step > self._tally.first_step

    def saw(self, frame: node_pb2.Frame, answer: node_pb2.TrainResponse) -> None:
        """Takes an exchange, to be hashed when there is time."""
        self._unhashed.append((frame, answer))

    def tally(self) -> None:
        """Hashes what waits for it."""
        waiting, self._unhashed = self._unhashed, []
        for frame, answer in waiting:
            digests = frame_digest(frame, self.kind), answer_digest(answer, self.kind)
            self._tally.exchanged(*digests, updated=answer.updated)

    def receipt(self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]) -> node_pb2.Receipt:
        """Signs the steps since the last receipt, which end in this state."""
        tally = self._tally
        after, model_root, optimizer_root = self._state(model, optimizer)
        segment = Segment(
            spec=self._plan.spec.hex(),
            number=tally.number,
            first_step=tally.first_step,
            last_step=tally.next_step - 1,
            leaves=tally.leaves().hex(),
            state_before=self._before.hex(),
            state_after=after.hex(),
            hash=self.kind,
        )
        envelope = sign_receipt(segment, self._signer.account)
        tally.close()
        self._before = after
        return node_pb2.Receipt(envelope=envelope, model_root=model_root, optimizer_root=optimizer_root)

    def _state(
        self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> tuple[bytes, bytes, bytes]:
        digests = [{name: tensor_digest(t.detach()) for name, t in part.items()} for part in (model, optimizer)]
        roots = [state_root(part) for part in digests]
        salt = boundary_salt(self._plan.salt, "state", self._tally.next_step)
        return state_digest(salt, *roots), roots[0], roots[1]
