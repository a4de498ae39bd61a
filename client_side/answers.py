"""What a node's answer must look like: checked before anything is computed with it (THREATS T17)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wire.errors import MessageRejectedError
from wire.interpreter import output_shapes
from wire.program import Program

__all__ = ["Answers"]


class Answers:
    """Checks and takes over tensors that a node returned for one program."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program, self._device = program, device
        self._shapes: dict[tuple[bool, int], tuple[tuple[torch.dtype, tuple[int, ...]], ...]] = {}

    def outputs(self, tensors: Sequence[torch.Tensor], rows: int, *, training: bool) -> list[torch.Tensor]:
        """Copies, on the owner's device, of the middle's outputs for ``rows`` rows.

        Raises:
            MessageRejectedError: another number of tensors, another dtype or shape than the program makes.
        """
        key = (training, rows)
        if key not in self._shapes:
            graph = self._program.train if training else self._program.eval
            self._shapes[key] = output_shapes(self._program, graph, rows)
        made = tuple((t.dtype, tuple(t.shape)) for t in tensors)
        if made != self._shapes[key]:
            raise MessageRejectedError(f"the node's outputs are {made}; for {rows} rows they are {self._shapes[key]}")
        return self._own(tensors)

    def gradients(self, tensors: Sequence[torch.Tensor], smashed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies, on the owner's device, of the input gradients of ``smashed``, all of floating point.

        Raises:
            MessageRejectedError: another number of tensors, another dtype or shape than what was sent.
        """
        made = [(t.dtype, tuple(t.shape)) for t in tensors]
        sent = [(t.dtype, tuple(t.shape)) for t in smashed]
        if made != sent:
            raise MessageRejectedError(f"the node's input gradients are {made}; the smashed data was {sent}")
        return self._own(tensors)

    def _own(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Copied: kernels may choose by alignment, and the message's bytes have none to speak of.
        return [t.to(self._device, copy=True) for t in tensors]
