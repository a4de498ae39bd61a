"""What an encrypted layer may return: how rows are packed, how far results may err, and what cannot be right.

Errors, for a ring of degree N and results scaled by ``2**(value_bits + weight_bits)``. A fresh ciphertext's error has
N coefficients of standard deviation 3.25 at most (SEAL's noise and the rounding of the encoding), which each real slot
sees as a Gaussian of √(N/2) times that; a layer adds them up by its weights. Weights are rounded: as integers by half a
unit each; where features share ciphertexts, as polynomials of n coefficients, n twice as many as the features of each,
whose rounding each slot sees as a Gaussian (or less) of √(n/24) for its own number and as much for the other of the
pair. A bound here is the worst case of the first rounding, and :data:`TAIL` standard deviations of what is Gaussian.

Shapes: ``B`` rows, ``F`` features of each, ``C`` ciphertexts, ``O`` outputs, ``N`` the ring's degree.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from wire.ciphertexts import Scheme
from wire.errors import ConfigError, TamperingSuspectedError

__all__ = [
    "PROBES",
    "TAIL",
    "LayerBound",
    "block_rows_for",
    "check_combinations",
    "check_probes",
    "check_products",
    "check_results",
    "pack_rows",
    "probes",
    "unpack_rows",
]

#: Beyond so many standard deviations a Gaussian goes once in 10¹¹ draws.
TAIL: Final = 7.0
PROBES: Final = 8  # rows; a result that is changed in any of them is found out
_SIGMA: Final = 3.25  # of a coefficient: SEAL's √(21/2), and 1/12 of the encoding
_LEAST_BLOCK: Final = 2  # rows: a complex slot holds two

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerBound:
    """How far a result of one layer may be from the product in the clear.

    Attributes:
        noise: of encryption, times the weights: absolute.
        rounding: of the weights, times the row: absolute.
    """

    noise: float
    rounding: float

    @classmethod
    def of(cls, scheme: Scheme, *, features: int, weight_norm: float, block_rows: int) -> LayerBound:
        """For a layer whose outputs' weights have at most that L2 norm, and rows as long as the scheme allows."""
        degree = scheme.ring.degree
        noise = TAIL * weight_norm * _SIGMA * math.sqrt(degree / 2) / 2.0**scheme.value_bits
        unit = scheme.row_norm / 2.0**scheme.weight_bits
        if block_rows == degree:
            return cls(noise, unit * math.sqrt(features) / 2)
        return cls(noise, TAIL * unit * math.sqrt(degree // block_rows / 6))

    @property
    def total(self) -> float:
        """Both."""
        return self.noise + self.rounding


def block_rows_for(capacity: int, degree: int) -> int:
    """Rows of each feature in a ciphertext, for batches of at most ``capacity`` rows: a power of two, or all of it.

    Raises:
        ConfigError: more rows than a ciphertext holds.
    """
    if not 0 < capacity <= degree:
        raise ConfigError(f"ckks: batches of up to {capacity} rows; a ciphertext holds {degree}: take smaller batches")
    block = max(_LEAST_BLOCK, 1 << (capacity - 1).bit_length())
    return block if 4 * block <= degree else degree  # two features in one save little, and cost the node transforms


def pack_rows(rows_BF: _Array, block_rows: int, degree: int, *, spread: bool = False) -> npt.NDArray[np.complex128]:
    """The slots of the ciphertexts that hold ``rows_BF``; complex128 [C, N / 2], unused slots zero.

    A slot holds two rows of a feature. The features that share a ciphertext take turns from slot to slot, so that what
    they are multiplied by repeats itself; with ``spread`` each has one for itself, and takes every turn.

    The law: ``unpack_rows(pack_rows(r, b, n), b)``, summed over features, is ``r.sum(1)``.
    """
    rows, features = rows_BF.shape
    each, half = degree // block_rows, block_rows // 2
    count = features if spread else math.ceil(features / each)
    padded = np.zeros((features if spread else count * each, block_rows))
    padded[:features, :rows] = rows_BF.T
    slots = padded[:, :half] + 1j * padded[:, half:]
    if spread:
        return np.repeat(slots, each, axis=1)
    return np.ascontiguousarray(slots.reshape(count, each, half).transpose(0, 2, 1)).reshape(count, -1)


def unpack_rows(slots_CS: npt.NDArray[np.complex128], block_rows: int, *, spread: bool = False) -> _Array:
    """The sum over a ciphertext's features of each row's numbers, float64 [block_rows, C].

    With ``spread``, each row's outputs one by one, the zeros after the last one too: float64 [block_rows, C * 2N / B].
    """
    turns = slots_CS.reshape(len(slots_CS), block_rows // 2, -1)
    found = turns.transpose(0, 2, 1).reshape(-1, block_rows // 2) if spread else turns.sum(axis=2)
    return np.ascontiguousarray(np.concatenate([found.real, found.imag], axis=1).T)


def check_results(results_RO: _Array, rows: int, *, most: float, tolerance: float, outputs: int | None = None) -> None:
    """Refuses results that no honest node returns; what they are is told to nobody.

    Args:
        results_RO: all that was decrypted, float64 [block_rows, O].
        rows: that were sent; those after them held zeros.
        most: what no result exceeds.
        tolerance: of a result that should be zero.
        outputs: of the layer, where results hold others after them, which have no weights.

    Raises:
        TamperingSuspectedError: saying which test failed, and no number.
    """
    if not np.isfinite(results_RO).all() or (np.abs(results_RO) > most).any():
        raise TamperingSuspectedError("the node returned ciphertexts of numbers larger than any that it was asked for")
    left = [results_RO[rows:]] + ([] if outputs is None else [results_RO[:, outputs:]])
    if any((np.abs(part) > tolerance).any() for part in left):
        raise TamperingSuspectedError("the node returned ciphertexts that are not zero where nothing was sent")


def check_products(results_RO: _Array, rows_BF: _Array, matrix_FO: _Array, *, tolerance: float, checked: int) -> None:
    """Computes some rows in the clear, drawn anew for each call, and compares.

    Raises:
        TamperingSuspectedError: they differ by more than ``tolerance``.
    """
    drawn = [secrets.randbelow(len(rows_BF)) for _ in range(min(checked, len(rows_BF)))]
    if (np.abs(results_RO[drawn] - rows_BF[drawn] @ matrix_FO) > tolerance).any():
        raise TamperingSuspectedError("the node returned other products than those of its own weights")


def check_combinations(
    results_RO: _Array,
    rows_RF: _Array,
    product: Callable[[_Array], _Array],
    *,
    bound: LayerBound,
    row_norm: float,
    pairs: int = 0,
) -> None:
    """Computes secret combinations of all rows in the clear, and compares (Freivalds 1977): no row goes unseen.

    The combinations' coefficients have an L2 norm of 1. Noise is uncorrelated between slots, so that a combination's is
    as large as a row's; the rounding of the weights is the same for all rows, and grows with the combination's length,
    or that of the same combination of the rows beside them in their slots.

    Args:
        results_RO: what came back.
        rows_RF: what was sent.
        product: of rows and the layer's weights, in the clear.
        bound: of one result.
        row_norm: of the rows, for which ``bound`` holds.
        pairs: slots of a feature where features share ciphertexts: row r is beside row r + pairs. Otherwise 0.

    Raises:
        TamperingSuspectedError: they differ by more than both errors explain.
    """
    signs_PR = probes(len(rows_RF)) * math.sqrt(len(rows_RF))
    combined_PF = signs_PR @ rows_RF
    lengths_P1 = np.linalg.norm(combined_PF, axis=1, keepdims=True)
    if pairs:
        beside_RF = np.zeros((2 * pairs, rows_RF.shape[1]))
        beside_RF[: len(rows_RF)] = rows_RF
        beside_RF = np.roll(beside_RF, pairs, axis=0)[: len(rows_RF)]
        lengths_P1 = np.maximum(lengths_P1, np.linalg.norm(signs_PR @ beside_RF, axis=1, keepdims=True))
    lengths_P1 = np.maximum(lengths_P1 / row_norm, 1.0)
    differing = np.abs(signs_PR @ results_RO[: len(rows_RF)] - product(combined_PF))
    if (differing > bound.noise + bound.rounding * lengths_P1).any():
        raise TamperingSuspectedError("the node returned other products than those of its own weights for some rows")


def probes(rows: int) -> _Array:
    """Secret combinations of a batch's rows, no longer than the longest of them; float64 [PROBES, rows]."""
    signs = np.frombuffer(secrets.token_bytes(PROBES * rows), dtype=np.uint8).reshape(PROBES, rows) & 1
    return (2.0 * signs - 1.0) / rows


def check_probes(results_RO: _Array, probes_PB: _Array, *, tolerance: float) -> None:
    """Compares the results of probes, which follow the batch's rows, with the same combinations of its results.

    For layers whose weights stay with the node: whatever it computes must be one linear map of all rows.

    Raises:
        TamperingSuspectedError: they differ by more than twice ``tolerance``.
    """
    count, rows = probes_PB.shape
    if (np.abs(results_RO[rows : rows + count] - probes_PB @ results_RO[:rows]) > 2 * tolerance).any():
        raise TamperingSuspectedError("the node returned what no one layer makes of all rows")
