"""Exact arithmetic modulo one prime, as dense tensor operations: on the CPU, and on a GPU where there is one.

Products of a matrix of words by a matrix of small integers run in float64, whose sums below 2**53 are exact in any
order: the words are cut into limbs narrow enough for that. Products of words by words take the low 64 bits from the
integers and the quotient from a double, which errs by less than 2**5 multiples of a modulus below 2**57.

Shapes: ``P`` polynomials of a ciphertext, ``F`` ciphertexts that came, ``O`` results, ``N`` words of a polynomial.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import torch

from wire.ciphertexts import Ring
from wire.errors import LimitExceededError

__all__ = ["combine", "evaluations", "multiply", "slot_polynomials"]

_EXACT_BITS: Final = 53  # of a double
_MOST_LIMBS: Final = 6
_SLOT_GENERATOR: Final = 3  # of the order in which CKKS numbers its slots, as SEAL does


def combine(words_PFN: torch.Tensor, weights_FO: torch.Tensor, ring: Ring) -> torch.Tensor:
    """``sum over F of words * weights`` modulo q, exact.

    Args:
        words_PFN: int64, each from 0 to q - 1.
        weights_FO: int64, of either sign.
        ring: whose modulus.

    Returns:
        int64 [P, O, N], each from 0 to q - 1.

    Raises:
        LimitExceededError: weights so large that no limb is left for the words.
    """
    polynomials, features, degree = words_PFN.shape
    largest = int(weights_FO.abs().max()) if weights_FO.numel() else 0
    width = _EXACT_BITS - largest.bit_length() - math.ceil(math.log2(max(features, 2)))
    limbs = -(-ring.bits // max(width, 1))
    if limbs > _MOST_LIMBS:
        raise LimitExceededError(f"weights of up to {largest} for {features} ciphertexts are too large to be exact")
    width = -(-ring.bits // limbs)
    matrix_OF = weights_FO.T.to(torch.float64).contiguous()
    made = torch.zeros(polynomials, matrix_OF.shape[0], degree, dtype=torch.int64, device=words_PFN.device)
    for number in range(limbs):
        limb = ((words_PFN >> (number * width)) & (2**width - 1)).to(torch.float64)
        exact = torch.matmul(matrix_OF, limb).to(torch.int64).remainder_(ring.modulus)
        if number:
            exact = multiply(exact, torch.tensor(2 ** (number * width) % ring.modulus, device=exact.device), ring)
        made += exact
    return made.remainder_(ring.modulus)


def multiply(one: torch.Tensor, other: torch.Tensor, ring: Ring) -> torch.Tensor:
    """``one * other`` modulo q, element by element; int64, each from 0 to q - 1, as are the factors."""
    quotient = (one.to(torch.float64) * other.to(torch.float64)).mul_(1 / ring.modulus).to(torch.int64)
    # Both products wrap around 64 bits, and their difference does not: it is a few multiples of q at most.
    return (one * other).sub_(quotient.mul_(ring.modulus)).remainder_(ring.modulus)


def evaluations(coefficients_N: torch.Tensor, ring: Ring) -> torch.Tensor:
    """The negacyclic number-theoretic transform, in SEAL's order (bits reversed).

    Cooley and Tukey's butterflies, as Longa and Naehrig (2016, algorithm 1) merge them with the powers of a 2N-th root.

    Args:
        coefficients_N: int64 [..., n], each from 0 to q - 1: all N of them; or, of a polynomial in X**(N / n), those
            that are not zero, n a power of two.
        ring: which.

    Returns:
        int64 of the same shape, each from 0 to q - 1: of N / n evaluations that follow each other, and are equal, one.
    """
    degree = coefficients_N.shape[-1]
    values = coefficients_N.reshape(-1, degree).clone()
    roots = _roots(ring).to(values.device)
    parts, width = 1, degree
    while parts < degree:
        width //= 2
        pairs = values.view(-1, parts, 2, width)
        even = pairs[:, :, 0].clone()
        odd = multiply(pairs[:, :, 1], roots[parts : 2 * parts, None], ring)
        pairs[:, :, 0] = (even + odd).remainder_(ring.modulus)
        pairs[:, :, 1] = (even - odd).remainder_(ring.modulus)
        parts *= 2
    return values.reshape(coefficients_N.shape)


def slot_polynomials(slots: torch.Tensor, scale: float) -> torch.Tensor:
    """The integer polynomials whose complex slots hold ``slots`` times ``scale``: CKKS' encoding of real numbers.

    Args:
        slots: float64 [..., n / 2]: all N / 2 of them; or, where they repeat themselves, one period of a power of two.
        scale: by which they are multiplied before they are rounded.

    Returns:
        int64 [..., n], of either sign: the coefficients of the powers of X**(N / n), and the others are zero.
    """
    degree = 2 * slots.shape[-1]
    places, mirrored = _slot_places(degree)
    odd_powers = torch.zeros(*slots.shape[:-1], degree, dtype=torch.complex128, device=slots.device)
    odd_powers[..., places.to(slots.device)] = slots.to(torch.complex128)
    odd_powers[..., mirrored.to(slots.device)] = slots.to(torch.complex128)
    turn = torch.arange(degree, dtype=torch.float64, device=slots.device) * (-math.pi / degree)
    made = torch.fft.fft(odd_powers) * torch.polar(torch.ones_like(turn), turn)
    rounded: torch.Tensor = (made.real * (scale / degree)).round_().to(torch.int64)
    return rounded


@lru_cache(maxsize=16)
def _slot_places(degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which odd power of the 2N-th root of unity a slot is the value at, and which its conjugate."""
    power, found = 1, []
    for _ in range(degree // 2):
        found.append((power - 1) // 2)
        power = power * _SLOT_GENERATOR % (2 * degree)
    places = torch.tensor(found)
    return places, degree - 1 - places


@lru_cache(maxsize=4)
def _roots(ring: Ring) -> torch.Tensor:
    """Powers of the smallest primitive 2N-th root of unity modulo q, by reversed bits; int64 [N]."""
    order, q = 2 * ring.degree, ring.modulus
    candidate = 2
    while pow(candidate, (q - 1) // 2, q) == 1:  # a square: its power would have a smaller order
        candidate += 1
    root = pow(candidate, (q - 1) // order, q)
    square, smallest, power = root * root % q, root, root
    for _ in range(ring.degree - 1):
        power = power * square % q
        smallest = min(smallest, power)
    powers = [1]
    for _ in range(ring.degree - 1):
        powers.append(powers[-1] * smallest % q)
    bits = ring.degree.bit_length() - 1
    return torch.tensor([powers[int(f"{place:0{bits}b}"[::-1], 2)] for place in range(ring.degree)])
