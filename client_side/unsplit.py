"""The same training loop without a split: what split training must equal, to the bit.

Front, middle and head run in one process as one autograd graph, with the same micro-batches, the same random streams
and the same optimizer over all parameters. The demo, the tests and the benchmarks compare against it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from client_side.cutting import Cut, as_tuple
from client_side.steps import Batch, micro_batches
from wire.optimizers import PartOptimizer
from wire.recipe import Loss, Optimizer, own_streams, seed_stream, stream_seed

__all__ = ["UnsplitTrainer"]


class UnsplitTrainer:
    """Trains a cut model as if it had not been cut."""

    def __init__(self, cut: Cut, *, optimizer: Optimizer, loss: Loss, micro_batches: int = 1, seed: int = 0) -> None:
        """Takes the model's own tensors: they move in place."""
        self._cut, self._loss, self._count, self._seed = cut, loss, micro_batches, seed
        parts = [part for part in (cut.front, cut.middle, cut.head) if part is not None]
        parameters = [{f"{number}/{n}": p for n, p in part.named_parameters()} for number, part in enumerate(parts)]
        if not optimizer.clip_norm:  # clipping by norm is by part; everything else is element by element
            parameters = [{name: p for part in parameters for name, p in part.items()}]
        self._optimizers = [PartOptimizer(optimizer, part) for part in parameters]
        self._parts = parts
        self.step = 0

    def fit(self, loader: Iterable[tuple[torch.Tensor, torch.Tensor]], epochs: int) -> list[float]:
        """Trains for ``epochs`` passes; returns each step's mean loss."""
        for part in self._parts:
            part.train()
        losses = []
        for _ in range(epochs):
            for *inputs, labels in loader:
                losses.append(self.run(tuple(inputs), labels))
        return losses

    def run(self, inputs: Batch, labels: torch.Tensor) -> float:
        """One step; returns the batch's mean loss."""
        total = 0.0
        middle_seed = stream_seed(self._seed, "middle")
        with own_streams():
            for number, part in enumerate(micro_batches(inputs, labels, self._count)):
                seed_stream(self._seed, "front", self.step, number)
                smashed, kept = self._cut.split_outputs(self._cut.front(*part.inputs))
                seed_stream(middle_seed, "middle", self.step, number)
                made = as_tuple(self._cut.middle(*smashed))
                seed_stream(self._seed, "head", self.step, number)
                output = made[0] if self._cut.head is None else self._cut.head(*made, *kept)
                loss = self._loss(output, part.labels)
                (loss * part.weight).backward()  # type: ignore[no-untyped-call]  # torch's own signature
                total += loss.item() * part.weight
        for optimizer in self._optimizers:
            optimizer.apply(self.step)
        self.step += 1
        return total
