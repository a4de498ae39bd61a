"""One training step of the owner, micro-batch by micro-batch, with several in flight.

The order of every sum is fixed: fronts run forward, heads run, and fronts run backward, each in the order of the
micro-batches, whatever the timing. So the numbers do not depend on how many are in flight, only on how the batch is
cut into micro-batches.

Shapes: a batch ``x`` is a tuple of tensors ``[B, ...]``; its ``B`` rows become ``m`` micro-batches of ``B // m`` rows,
or one more.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch

from client_side.answers import Answers
from client_side.cutting import Cut
from client_side.frames import encode_frame
from client_side.link import Answer
from client_side.route import SessionLink
from privacy.dp_sgd import DpGradients
from privacy.guard import Guard, Released
from privacy.hijack import HijackDetector
from protos import node_pb2
from wire.errors import ConfigError, MessageRejectedError, NonFiniteError
from wire.optimizers import PartOptimizer
from wire.recipe import Loss, own_streams, seed_stream

__all__ = ["Batch", "MicroBatch", "StepRunner", "micro_batches", "rows_of"]

Batch: TypeAlias = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A slice of a batch, and its share of the batch's mean loss."""

    inputs: Batch
    labels: torch.Tensor
    weight: float


@dataclass(slots=True)
class _Flying:
    """A micro-batch whose backward is not done."""

    number: int
    inputs: Batch
    smashed: Batch
    kept: Batch
    kept_leaves: Batch
    labels: torch.Tensor
    weight: float
    tied_gradients: list[torch.Tensor | None]


def rows_of(batch: int, count: int) -> list[int]:
    """How ``batch`` rows are divided into ``count`` micro-batches: never an empty one.

    The law: ``sum(rows_of(b, m)) == b``, and the sizes differ by at most one.
    """
    count = min(count, batch)
    return [batch // count + (number < batch % count) for number in range(count)]


def micro_batches(inputs: Batch, labels: torch.Tensor, count: int) -> list[MicroBatch]:
    """The slices of one batch, in order.

    Raises:
        ConfigError: a loader's batch is not ``(inputs…, labels)``, tensors of equally many rows, at least one.
    """
    everything: tuple[object, ...] = (*inputs, labels)  # whatever the user's loader yields
    if not inputs or any(not isinstance(x, torch.Tensor) or not x.ndim for x in everything):
        kinds = ", ".join(type(x).__name__ for x in everything)
        raise ConfigError(f"a loader yields (inputs…, labels), each a tensor with rows; this batch holds: {kinds}")
    counts = {len(x) for x in (*inputs, labels)}
    if len(counts) != 1 or 0 in counts:
        raise ConfigError(f"the tensors of a batch have equally many rows, at least one; here {sorted(counts)}")
    if count == 1:
        return [MicroBatch(inputs, labels, 1.0)]
    rows = rows_of(labels.shape[0], count)
    parts = zip(*(torch.split(x, rows) for x in inputs), strict=True)
    return [
        MicroBatch(part, label, label.shape[0] / labels.shape[0])
        for part, label in zip(parts, torch.split(labels, rows), strict=True)
    ]


class StepRunner:
    """Runs steps of one cut over one link."""

    def __init__(
        self,
        cut: Cut,
        link: SessionLink,
        guard: Guard,
        loss: Loss,
        optimizers: Sequence[PartOptimizer],
        *,
        seed: int,
        in_flight: int,
        device: torch.device,
        dp_front: DpGradients | None = None,
        dp_head: DpGradients | None = None,
        hijack: HijackDetector | None = None,
    ) -> None:
        """Takes what one step needs; the session on ``link`` is open.

        ``dp_front`` and ``dp_head`` gather the gradients of parts that learn by DP-SGD; ``hijack`` watches what comes
        back for the front.

        Raises:
            ConfigError: DP-SGD on parts that share a parameter.
        """
        self._cut, self._link, self._guard, self._loss, self._optimizers = cut, link, guard, loss, optimizers
        self._seed, self._in_flight, self._device = seed, in_flight, device
        self._answers = Answers(cut.program, device)
        self._flying: deque[_Flying] = deque()
        head = set() if cut.head is None else set(cut.head.parameters())
        self._tied = [p for p in cut.front.parameters() if p in head and p.requires_grad]
        # A parameter that front and head share moves once both have added their gradients.
        self._head_first = cut.head is not None and not self._tied
        self._dp_front, self._dp_head, self._hijack = dp_front, dp_head, hijack
        if self._tied and (dp_front is not None or dp_head is not None):
            raise ConfigError("privacy: dp_sgd takes front and head that share no parameter: untie them")
        self._rows = 0
        self.node_s = 0.0

    def run(self, step: int, batch: list[MicroBatch]) -> float:
        """One step: every micro-batch forward and backward, then all optimizers; returns the batch's mean loss.

        Raises:
            WireError, UnreachableError: see :meth:`Link.receive`.
        """
        with own_streams():
            return self._run(step, batch)

    def _run(self, step: int, batch: list[MicroBatch]) -> float:
        self._flying.clear()
        self._rows = sum(len(micro_batch.labels) for micro_batch in batch)
        total, sent, done = 0.0, 0, 0
        while done < len(batch):
            while sent < len(batch) and len(self._flying) < self._in_flight:
                self._forward(step, sent, batch[sent], last=sent == len(batch) - 1)
                sent += 1
            answer = self._link.receive()
            self.node_s += answer.compute_s
            if answer.phase == node_pb2.PHASE_FORWARD:
                last = answer.micro_batch == len(batch) - 1
                total += self._head(step, answer, last=last)
                if last and self._head_first:
                    self._update(1, step)  # the head has all its gradients: while the node goes backward
                continue
            if answer.phase == node_pb2.PHASE_LOSS:
                if not math.isfinite(answer.loss):
                    raise NonFiniteError(f"the node's loss is {answer.loss}: the training diverged, or it makes it up")
                total += answer.loss * self._flying[0].weight
            self._backward(answer)
            done += 1
        for number in range(1 if self._head_first else len(self._optimizers)):
            self._update(number, step)
        return total

    def _update(self, number: int, step: int) -> None:
        private = (self._dp_front, self._dp_head)[number]
        if private is not None:
            private.finish(self._rows)
        self._optimizers[number].apply(step)

    def _forward(self, step: int, number: int, micro_batch: MicroBatch, *, last: bool) -> None:
        seed_stream(self._seed, "front", step, number)
        smashed, kept, rows = self._smashed(micro_batch)
        vanilla = self._cut.head is None
        labels = self._guard.labels(micro_batch.labels) if vanilla and rows is None else None
        self._link.send(
            encode_frame(
                step=step,
                micro_batch=number,
                phase=node_pb2.PHASE_LOSS if vanilla else node_pb2.PHASE_FORWARD,
                tensors=smashed,
                labels=labels,
                rows=rows,
                loss_weight=micro_batch.weight if vanilla else 0.0,
                update=vanilla and last,
            )
        )
        again = self._dp_front is not None
        leaves = tuple(k.detach().requires_grad_(k.requires_grad or (again and k.is_floating_point())) for k in kept)
        nothing: list[torch.Tensor | None] = [None] * len(self._tied)
        sent = tuple(released.tensor for released in smashed)
        known = (micro_batch.labels if labels is None else labels.tensor).to(self._device)
        flying = _Flying(number, micro_batch.inputs, sent, kept, leaves, known, micro_batch.weight, nothing)
        self._flying.append(flying)

    def _smashed(self, micro_batch: MicroBatch) -> tuple[Sequence[Released], Batch, Released | None]:
        """What goes up, what stays for the head, and in place of both the rows of a table that the node keeps."""
        if self._guard.tabled:
            return (), (), self._guard.rows(micro_batch.inputs[0])
        with torch.set_grad_enabled(self._dp_front is None):  # or else it runs again when its gradient comes
            made = self._cut.front(*(x.to(self._device) for x in micro_batch.inputs))
        smashed, kept = self._cut.split_outputs(made)
        return self._guard.activations(smashed), kept, None

    def _head(self, step: int, answer: Answer, *, last: bool) -> float:
        flying = next(f for f in self._flying if f.number == answer.micro_batch)
        outputs = self._answers.outputs(answer.tensors, len(flying.labels), training=True)
        for output in outputs:
            output.requires_grad_(output.is_floating_point())
        if self._cut.head is None:
            raise MessageRejectedError("the node answered a forward that was never sent")
        # Copies, because a head may begin with an operator in place, which autograd refuses on leaves.
        received = [t.clone() if t.requires_grad else t for t in (*outputs, *flying.kept_leaves)]
        seed_stream(self._seed, "head", step, flying.number)
        private = contextlib.nullcontext() if self._dp_head is None else self._dp_head.per_record(self._rows)
        with private, self._tied_apart(flying):
            output = self._cut.head(*received)
            self._loss.check(output, flying.labels)
            loss = self._loss(output, flying.labels)
            # A whole batch weighs 1.0: its product is the loss itself, to the bit.
            weighted = loss if flying.weight == 1.0 else loss * flying.weight
            weighted.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        self._link.send(
            encode_frame(
                step=step,
                micro_batch=flying.number,
                phase=node_pb2.PHASE_BACKWARD,
                # An output that the loss does not depend on has no gradient, and its parameters do not move.
                tensors=self._guard.gradients([o.grad for o in outputs if o.is_floating_point()]),
                update=last,
            )
        )
        return loss.item() * flying.weight

    def _backward(self, answer: Answer) -> None:
        flying = self._flying.popleft()
        if flying.number != answer.micro_batch:
            raise MessageRejectedError("the node answered another micro-batch than the oldest")
        tensors = [s for s in flying.smashed if s.is_floating_point()]
        if self._dp_front is not None:
            returned = self._returned(answer, flying, tensors)
            self._front_again(answer.step, flying, returned, self._dp_front)
            return
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        if any(s.requires_grad for s in tensors):
            returned = self._returned(answer, flying, tensors)
            pairs += [(t, gradient) for t, gradient in zip(tensors, returned, strict=True) if gradient is not None]
        stayed = zip(flying.kept, flying.kept_leaves, strict=True)
        pairs += [(tensor, leaf.grad) for tensor, leaf in stayed if leaf.grad is not None]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        gathered = [p.grad for p in self._tied]
        for parameter, from_head in zip(self._tied, flying.tied_gradients, strict=True):
            parameter.grad = from_head
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        for parameter, before in zip(self._tied, gathered, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)

    def _returned(self, answer: Answer, flying: _Flying, smashed: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The node's input gradients, once they look like those of somebody who trains (THREATS T12)."""
        returned = self._answers.gradients(answer.tensors, smashed)
        if self._hijack is not None:
            self._hijack.observe(answer.step, flying.labels, *(g for g in returned if g is not None))
        return returned

    def _front_again(
        self, step: int, flying: _Flying, returned: Sequence[torch.Tensor | None], private: DpGradients
    ) -> None:
        """The front's forward once more, with the same draws, and its backward record by record."""
        seed_stream(self._seed, "front", step, flying.number)
        with private.per_record(self._rows):
            made = self._cut.front(*(x.to(self._device) for x in flying.inputs))
            smashed, kept = self._cut.split_outputs(made)
            floating = [s for s in smashed if s.is_floating_point()]
            pairs = [(s, g) for s, g in zip(floating, returned, strict=True) if g is not None and s.requires_grad]
            stayed = zip(kept, flying.kept_leaves, strict=True)
            pairs += [(k, leaf.grad) for k, leaf in stayed if leaf.grad is not None and k.requires_grad]
            if pairs:
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])

    @contextmanager
    def _tied_apart(self, flying: _Flying) -> Iterator[None]:
        """Keeps the head's gradients of parameters that are also the front's until the front's own are there.

        Without a cut, one backward adds the two up before they join those of earlier micro-batches.
        """
        gathered = [p.grad for p in self._tied]
        for parameter in self._tied:
            parameter.grad = None
        yield
        flying.tied_gradients = [p.grad for p in self._tied]
        for parameter, before in zip(self._tied, gathered, strict=True):
            parameter.grad = before
