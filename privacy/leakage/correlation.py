"""Distance correlation without its bias.

After Székely and Rizzo 2014, "Partial distance correlation with methods for dissimilarities", sections 2 and 3.

The usual estimate grows with the dimension: for independent noise of 10,000 dimensions and 1,000 rows it is near 1. The
U-centred one has mean 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distance_correlation"]

_FEWEST = 4  # U-centring divides by n - 3
_MOST = 1000  # rows: memory and time grow with the square
_ROUNDING = 1e-7  # of float32


def distance_correlation(a: Tensor, b: Tensor) -> float:
    """The bias-corrected squared distance correlation of the rows of ``a`` and ``b``.

    Args:
        a: [N, ...], floating.
        b: [N, ...]; of both, the first 1,000 rows are used.

    Returns:
        At most 1, which it is where one is the other up to rotation, scale and shift; 0 on average where they are
        independent, so that it may fall below; 0 where either does not vary, or of fewer than 4 rows.
    """
    if len(a) < _FEWEST:
        return 0.0
    centred_a, centred_b = _u_centred(a[:_MOST]), _u_centred(b[:_MOST])
    scale = (centred_a.square().sum() * centred_b.square().sum()).sqrt().item()
    return (centred_a * centred_b).sum().item() / scale if scale > 0 else 0.0


def _u_centred(rows: Tensor) -> Tensor:
    """Distances, less the means of row and column; equation (2.1) of the paper."""
    flat = rows.flatten(1).double()
    centred = flat - flat.mean(0)
    if centred.abs().max() <= _ROUNDING * flat.abs().max():  # rows that are all alike would correlate by rounding
        return flat.new_zeros(len(flat), len(flat))
    distances_NN = torch.cdist(centred, centred, compute_mode="use_mm_for_euclid_dist")
    distances_NN.fill_diagonal_(0.0)
    count = len(flat)
    sums_N = distances_NN.sum(1)
    distances_NN -= (sums_N[:, None] + sums_N[None, :]) / (count - 2)
    distances_NN += sums_N.sum() / ((count - 1) * (count - 2))
    return distances_NN.fill_diagonal_(0.0)
