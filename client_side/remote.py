"""A middle as an ``nn.Module`` whose forward and backward go over the wire, for training loops of one's own.

Example::

    middle = cloister.RemoteMiddle(cut, node="gpu:7700#sha256:…", optimizer=cloister.SGD(lr=0.1), max_rows=64)
    for x, y in loader:
        loss = criterion(cut.head(middle(cut.front(x))), y)
        loss.backward()
        own.step()
        own.zero_grad()
        middle.step()  # the node applies its own optimizer
    middle.fetch()     # brings the trained middle home
    middle.close()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from client_side.answers import Answers
from client_side.cutting import Cut
from client_side.frames import encode_frame
from client_side.link import RECONNECT_S, Link, NodeAddress, Query, Traffic
from client_side.opening import DEFAULT_IDENTITY, open_session, owner_identity
from privacy.guard import Guard
from privacy.policy import CLEAR, Policy
from protos import node_pb2
from wire.errors import ConfigError
from wire.identity import Identity
from wire.recipe import Loss, Optimizer
from wire.state import split_state

__all__ = ["RemoteMiddle"]


class RemoteMiddle(nn.Module):
    """The middle of a U-shaped cut, on a node. It has no parameters here: those are the node's to train.

    Every forward in training mode is one micro-batch and waits for its backward; gradients add up over several until
    :meth:`step`. In evaluation mode, or under ``torch.no_grad``, the node keeps nothing.
    """

    def __init__(
        self,
        cut: Cut,
        *,
        node: str | NodeAddress,
        policy: Policy,
        optimizer: Optimizer,
        max_rows: int,
        max_in_flight: int = 8,
        identity: Identity | Path | str = DEFAULT_IDENTITY,
        seed: int = 0,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        """Opens a session.

        Args:
            cut: with a head: the loss is yours.
            node: ``host:port#sha256:…``, or a :class:`NodeAddress`.
            policy: ``cloister.CLEAR``. A loop of one's own decides what it sends and how often, so no other policy
                could be accounted for: use :class:`Trainer` for those.
            optimizer: what the node trains the middle with.
            max_rows: the largest batch that :meth:`forward` will be given.
            max_in_flight: how many forwards may wait for their backward.
            identity: the owner's identity, or its folder.
            seed: of dropout in the middle.
            reconnect_s: how long a node that is gone is waited for.

        Raises:
            ConfigError: a cut without a head, or a policy that treats anything; use :class:`Trainer` for these.
            WireError, UnreachableError: the node refuses, or cannot be reached.
        """
        super().__init__()
        if cut.head is None:
            raise ConfigError("RemoteMiddle needs a U-shaped cut (a head): in the vanilla topology use Trainer")
        if policy != CLEAR:
            raise ConfigError(
                "RemoteMiddle sends everything in the clear (policy=cloister.CLEAR); use Trainer otherwise"
            )
        self._guard = Guard(policy, None)
        self._cut, self._step, self._forwards, self._backwards = cut, 0, 0, 0
        device = next((p.device for p in cut.owner_parameters()), torch.device("cpu"))
        self._answers = Answers(cut.program, device)
        self._wants_gradients = any(p.requires_grad for p in cut.front.parameters())
        own = owner_identity(identity)
        address = node if isinstance(node, NodeAddress) else NodeAddress.parse(node)
        self._link = Link(address, own, reconnect_s=reconnect_s)
        try:
            open_session(
                self._link,
                cut,
                self._guard,
                optimizer=optimizer,
                loss=Loss(),
                seed=seed,
                max_rows=max_rows,
                max_in_flight=max_in_flight,
            )
        except BaseException:
            self._link.close(end_session=False)
            raise

    @property
    def traffic(self) -> Traffic:
        """Bytes so far."""
        return self._link.traffic

    def forward(self, *smashed: torch.Tensor) -> Any:  # noqa: ANN401 - one tensor or several, as the middle's
        """The middle's outputs, one tensor or a tuple, as the middle itself would return.

        Raises:
            WireError, UnreachableError: see :meth:`Link.receive`.
        """
        if self.training and torch.is_grad_enabled():
            outputs = _Remote.apply(self, *smashed)  # type: ignore[no-untyped-call]  # torch's own signature
        else:
            made = next(iter(self._link.infer([Query(self._guard.inference(smashed))])))
            outputs = tuple(self._answers.outputs(made.tensors, len(smashed[0]), training=False))
        return outputs[0] if len(outputs) == 1 else outputs

    def step(self) -> None:
        """The node's optimizer takes one step with the gradients gathered since the last.

        Raises:
            ConfigError: a forward had no backward; evaluate in evaluation mode or under ``torch.no_grad``.
        """
        if self._forwards != self._backwards:
            waiting = self._forwards - self._backwards
            raise ConfigError(f"{waiting} forwards had no backward: use .eval() or torch.no_grad() where none is meant")
        self._link.send(
            encode_frame(step=self._step, micro_batch=self._forwards, phase=node_pb2.PHASE_UPDATE, update=True)
        )
        self._link.receive()
        self._step += 1
        self._forwards = self._backwards = 0

    def fetch(self) -> None:
        """Brings the middle's tensors home, into the model that was cut."""
        self._cut.load_middle(split_state(self._link.snapshot()[1])[0])

    def close(self) -> None:
        """Ends the session and the connection."""
        self._link.close()

    def _send_forward(self, smashed: tuple[torch.Tensor, ...]) -> tuple[int, list[torch.Tensor]]:
        number = self._forwards
        self._link.send(
            encode_frame(
                step=self._step,
                micro_batch=number,
                phase=node_pb2.PHASE_FORWARD,
                tensors=self._guard.activations(smashed),
            )
        )
        answer = self._link.receive()
        self._forwards += 1
        return number, self._answers.outputs(answer.tensors, len(smashed[0]), training=True)

    def _send_backward(
        self,
        number: int,
        gradients: list[torch.Tensor | None],
        smashed: list[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        self._link.send(
            encode_frame(
                step=self._step,
                micro_batch=number,
                phase=node_pb2.PHASE_BACKWARD,
                tensors=self._guard.gradients(gradients),
            )
        )
        answer = self._link.receive()
        self._backwards += 1
        return self._answers.gradients(answer.tensors, smashed) if self._wants_gradients else []


class _Remote(torch.autograd.Function):
    """One micro-batch, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, middle: RemoteMiddle, *smashed: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ANN401 - torch's
        """Sends the smashed data, returns the outputs."""
        ctx.middle = middle
        ctx.number, outputs = middle._send_forward(smashed)  # noqa: SLF001 -- one thing in two classes
        ctx.smashed = smashed
        ctx.floating = [o.is_floating_point() for o in outputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - as above
        """Sends the output gradients, returns the input gradients."""
        up = [g for g, floating in zip(gradients, ctx.floating, strict=True) if floating]
        sent = [s for s in ctx.smashed if s.is_floating_point()]
        down = iter(ctx.middle._send_backward(ctx.number, up, sent))  # noqa: SLF001 -- as above
        return (None, *(next(down, None) if s.is_floating_point() else None for s in ctx.smashed))
