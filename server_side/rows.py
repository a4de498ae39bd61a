"""A table of smashed rows that a session keeps, so that frames name rows instead of carrying them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from wire.codec import check_finite
from wire.errors import StateRejectedError, TensorRejectedError
from wire.program import Program

__all__ = ["KeptRows"]

_SMASHED, _LABELS = "0", "labels"


class KeptRows:
    """Rows [N, ...] of the program's one input, and perhaps their labels [N, ...]. Nothing changes them.

    Attributes:
        tensors: by the names of :func:`wire.state.rows_of`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], program: Program, device: torch.device) -> None:
        """Takes over ``tensors``, which may be anybody's.

        Raises:
            StateRejectedError: no rows that this program takes.
            NonFiniteError: NaN or Inf among them.
        """
        if tensors.keys() - {_SMASHED, _LABELS} or _SMASHED not in tensors or len(program.inputs) != 1:
            raise StateRejectedError("a table holds the rows of a program's only input, and perhaps their labels")
        rows, spec = tensors[_SMASHED], program.inputs[0]
        if rows.dtype is not spec.dtype or rows.ndim == 0 or tuple(rows.shape[1:]) != spec.shape:
            raise StateRejectedError(f"a table of {rows.dtype} {tuple(rows.shape)[1:]}; the program takes {spec.shape}")
        labels = tensors.get(_LABELS)
        if labels is not None and (labels.ndim == 0 or len(labels) != len(rows)):
            raise StateRejectedError(f"labels of shape {tuple(labels.shape)} for {len(rows)} rows")
        for tensor in tensors.values():
            check_finite(tensor, "the table")
        self.tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

    def inputs(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """Copies of these rows, in this order.

        Raises:
            TensorRejectedError: a row that is not there.
        """
        return [self.tensors[_SMASHED][self._indices(rows)]]

    def labels(self, rows: Sequence[int]) -> torch.Tensor:
        """Their labels.

        Raises:
            TensorRejectedError: a row that is not there, or no labels at all.
        """
        if _LABELS not in self.tensors:
            raise TensorRejectedError("the session keeps no labels: send them")
        return self.tensors[_LABELS][self._indices(rows)]

    def _indices(self, rows: Sequence[int]) -> torch.Tensor:
        count = len(self.tensors[_SMASHED])
        if max(rows) >= count:
            raise TensorRejectedError(f"row {max(rows)} of {count}")
        return torch.tensor(rows, dtype=torch.int64, device=self.tensors[_SMASHED].device)
