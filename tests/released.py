"""Tensors that may leave, for tests that speak to a node without a trainer."""

from __future__ import annotations

import torch

from privacy.guard import Guard, Released
from privacy.policy import CLEAR

__all__ = ["released"]


def released(tensor: torch.Tensor) -> Released:
    """``tensor``, in the clear."""
    return Guard(CLEAR, None).activations([tensor])[0]
