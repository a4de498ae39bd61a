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

    def outputs(self, tensors: Sequence[torch.Tensor | None], rows: int, *, training: bool) -> list[torch.Tensor]:
        """Copies, on the owner's device, of the middle's outputs for ``rows`` rows.

        Raises:
            MessageRejectedError: another number of tensors, another dtype or shape than the program makes.
        """
        key = (training, rows)
        if key not in self._shapes:
            graph = self._program.train if training else self._program.eval
            self._shapes[key] = output_shapes(self._program, graph, rows)
        present = [t for t in tensors if t is not None]
        made = tuple((t.dtype, tuple(t.shape)) for t in present)
        if made != self._shapes[key]:
            raise MessageRejectedError(f"the node's outputs are {made}; for {rows} rows they are {self._shapes[key]}")
        return [self._own(t) for t in present]

    def gradients(
        self,
        tensors: Sequence[torch.Tensor | None],
        smashed: Sequence[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        """Copies, on the owner's device, of the input gradients of ``smashed``, all of floating point.

        ``None`` where the middle does not depend on a tensor: no gradient, not even zeros.

        Raises:
            MessageRejectedError: another number of tensors, another dtype or shape than what was sent.
        """
        sent = [(t.dtype, tuple(t.shape)) for t in smashed]
        made = [s if t is None else (t.dtype, tuple(t.shape)) for t, s in zip(tensors, sent, strict=False)]
        if made != sent or len(tensors) != len(sent):
            raise MessageRejectedError(f"the node's input gradients are {made}; the smashed data was {sent}")
        return [None if t is None else self._own(t) for t in tensors]

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        # Copied: kernels may choose by alignment, and the message's bytes have none to speak of.
        return tensor.to(self._device, copy=True)
