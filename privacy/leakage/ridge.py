"""Ridge regression in closed form, its penalty chosen by leaving one row out: the attack that needs no tuning.

A front that is nearly linear is inverted by this at once, and classes that a plane parts are parted. In its dual form
the cost is that of the rows, not of the dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["Ridge", "fit_ridge", "ridge_rows"]

#: Penalties to choose from, as shares of the sum of all eigenvalues.
_PENALTIES: Final = tuple(10.0**power for power in range(-7, 3))
_MOST_ROWS: Final = 2000  # a decomposition of 2000x2000 takes about 2 s on one core
_OPERATIONS_PER_SECOND: Final = 5e9  # that one slow core makes of a product
_TIME_SHARE: Final = 0.1
_TRIED_TARGETS: Final = 32


@dataclass(frozen=True, slots=True)
class Ridge:
    """``(x - mean) @ weights + offset``, of mean [D], weights [D, T] and offset [T]."""

    mean: Tensor
    weights: Tensor
    offset: Tensor

    def __call__(self, x_BD: Tensor) -> Tensor:
        """[B, T]."""
        return (x_BD - self.mean) @ self.weights + self.offset


def ridge_rows(dimensions: int, seconds: float) -> int:
    """How many rows a fit can use in a tenth of ``seconds``: by arithmetic, not by the clock, so that it repeats."""
    fitting = (_OPERATIONS_PER_SECOND * seconds * _TIME_SHARE / (2 * dimensions)) ** 0.5
    return max(2, min(_MOST_ROWS, int(fitting)))


def fit_ridge(x_ND: Tensor, y_NT: Tensor) -> Ridge:
    """The ridge regression from ``x`` to ``y``; where ``x`` does not vary, the mean of ``y``."""
    mean_D, offset_T = x_ND.mean(0), y_NT.mean(0)
    centred_ND, wanted_NT = x_ND - mean_D, (y_NT - offset_T).double()
    gram_NN = (centred_ND @ centred_ND.T).double()
    total = gram_NN.trace().item()
    if total <= 0:
        return Ridge(mean_D, x_ND.new_zeros(x_ND.shape[1], y_NT.shape[1]), offset_T)
    # Centred rows leave the direction of all ones empty, and what is left out of it would always seem to fit: with
    # fewer rows than dimensions the least penalty would win on mere noise. An eigenvalue of its own closes it.
    values_N, vectors_NN = torch.linalg.eigh(gram_NN + total / len(gram_NN))
    values_N = values_N.clamp_min(0.0)
    turned_NT = vectors_NN.T @ wanted_NT
    # Every penalty is tried on few targets: on each of a picture's pixels it would take longer than all the rest.
    few = turned_NT @ _directions(turned_NT.shape[1])
    best = min(_PENALTIES, key=lambda p: _left_out(values_N, vectors_NN, few, p * total))
    duals_NT = vectors_NN @ (turned_NT / (values_N + best * total)[:, None])
    return Ridge(mean_D, centred_ND.T @ duals_NT.to(x_ND.dtype), offset_T)


def _directions(targets: int) -> Tensor:
    """Orthonormal or random directions [T, 32 at most] among the targets, the same in each run."""
    if targets <= _TRIED_TARGETS:
        return torch.eye(targets, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(targets, _TRIED_TARGETS, dtype=torch.float64, generator=generator)


def _left_out(values_N: Tensor, vectors_NN: Tensor, turned_NT: Tensor, penalty: float) -> float:
    """Squared error on each row when it is left out of the fit (Allen's PRESS)."""
    inverse_N = 1 / (values_N + penalty)
    duals_NT = vectors_NN @ (turned_NT * inverse_N[:, None])
    own_N = (vectors_NN.square() * inverse_N).sum(1)
    return (duals_NT / own_N[:, None]).square().sum().item()
