"""Opening a session for a cut: what the trainer and a loop of one's own have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from client_side.cutting import Cut
from client_side.link import Link, SessionRequest
from client_side.receipts import Receipts
from privacy.guard import Guard
from protos import node_pb2
from wire.errors import IdentityError
from wire.identity import Identity, load_identity
from wire.recipe import Loss, Optimizer, stream_seed
from wire.state import ROWS_PREFIX, STATE_PREFIX

__all__ = ["DEFAULT_IDENTITY", "initial_state", "open_session", "owner_identity"]

DEFAULT_IDENTITY: Final = Path("~/.config/cloister/owner")


def owner_identity(identity: Identity | Path | str) -> Identity:
    """The owner's identity: itself, or what stands in that folder.

    Raises:
        IdentityError: there is none, it is damaged, or it is a node's.
    """
    own = identity if isinstance(identity, Identity) else load_identity(Path(identity).expanduser())
    if own.role != "owner":
        raise IdentityError("this identity is a node's: make your own with `cloister keys init --role owner --out DIR`")
    return own


def initial_state(cut: Cut, guard: Guard) -> dict[str, torch.Tensor]:
    """What a session begins with: the middle's tensors as they are, and the table that was released, if any."""
    state = {STATE_PREFIX + name: tensor for name, tensor in cut.middle_state().items()}
    return state | {ROWS_PREFIX + name: tensor for name, tensor in guard.kept_rows().items()}


def open_session(
    link: Link,
    cut: Cut,
    guard: Guard,
    *,
    optimizer: Optimizer,
    loss: Loss,
    seed: int,
    max_rows: int,
    max_in_flight: int,
    first_step: int = 0,
    tensors: dict[str, torch.Tensor] | None = None,
    kept: tuple[bytes, int] | None = None,
    replaces: bytes = b"",
    receipts: Receipts | None = None,
) -> None:
    """Opens a session for ``cut`` on ``link``.

    With the middle's tensors as they are now, or with ``tensors`` of a snapshot, or with what the node ``kept`` of one
    (SHA-256 and bytes). ``replaces`` is an earlier session there, which ends. With ``receipts``, the node is asked for
    some.
    """
    link.open(
        SessionRequest(
            program=cut.captured.data,
            program_digest=cut.program.digest,
            tensors=guard.weights(tensors or initial_state(cut, guard)),
            topology=node_pb2.TOPOLOGY_VANILLA if cut.head is None else node_pb2.TOPOLOGY_U_SHAPE,
            loss=loss if cut.head is None else None,
            optimizer=optimizer,
            seed=stream_seed(seed, "middle"),
            max_rows=max_rows,
            max_in_flight=max_in_flight,
            want_input_gradients=any(p.requires_grad for p in cut.front.parameters()),
            first_step=first_step,
            kept=kept,
            replaces=replaces,
            receipts=receipts,
        ),
    )
