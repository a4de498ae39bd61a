"""Linear, square, linear on ciphertexts, in one go, by a node that has no key of any kind and no library for them.

Ciphertexts add, and scale by integers, word by word: both linear maps are products of matrices modulo each prime. In
the order of evaluations polynomials multiply word by word, so the square of (c0, c1) is (c0², 2 c0 c1, c1²): what it
encrypts are the squares of the slots, under 1, s and s². Nothing is relinearized (which takes a key) and nothing is
rescaled: the second map runs on three polynomials, and the owner decrypts three. A bias is a constant polynomial, whose
N evaluations are all that constant. Everything is equal to the bit to what SEAL's evaluator makes of the same integers.

Shapes: ``P`` polynomials, ``F`` features, ``H`` hidden numbers, ``O`` outputs, ``W`` words of a polynomial: N for each
prime.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from server_side.expansion import expand
from server_side.rings import combine, multiply
from wire.ciphertexts import MAX_CIPHERTEXTS, Ciphertexts, Ring, Words
from wire.errors import LimitExceededError, SpecRejectedError
from wire.squares import SquareMap, SquareScheme

__all__ = ["apply_square", "square_bytes"]

_COPIES: Final = 6  # of what one prime's part of the ciphertexts takes, while it is multiplied


def apply_square(came: Ciphertexts, layers: SquareMap, scheme: SquareScheme, device: torch.device) -> Words:
    """Every output's ciphertext, of three polynomials.

    Args:
        came: one ciphertext for each feature, with seeds.
        layers: the weights; each is rounded to a multiple of its scale's inverse.
        scheme: the session's.
        device: computes.

    Returns:
        uint64 [3, O, W].

    Raises:
        SpecRejectedError: ciphertexts without seeds, or as many as there are no features.
        LimitExceededError: weights that are no numbers, or with which a result could wrap.
    """
    features, outputs = len(layers.first), layers.second.shape[1]
    if came.seeds is None or came.count != features:
        raise SpecRejectedError(f"{came.count} ciphertexts come up; expected are {features}, with seeds")
    if outputs > MAX_CIPHERTEXTS:
        raise LimitExceededError(f"{outputs} ciphertexts down; the limit is {MAX_CIPHERTEXTS}")
    scheme.check_weights(layers)
    first_FH, second_HO = (
        (weights * 2.0**bits).round().to(device, torch.int64)
        for weights, bits in ((layers.first, scheme.weight_bits), (layers.second, scheme.second_bits))
    )
    both_PFW = np.stack([came.words[0], expand(came.seeds, scheme.ring)]).view(np.int64)
    made_POW = np.empty((3, outputs, scheme.ring.words), dtype=np.uint64)
    for part, place in scheme.ring.parts():
        words_PFN = torch.from_numpy(np.ascontiguousarray(both_PFW[..., place])).to(device)
        hidden_PHN = combine(words_PFN, first_FH, part)
        _add_constants(hidden_PHN, layers.bias, scheme.hidden_bits, part)
        results_PON = combine(_squared(hidden_PHN, part), second_HO, part)
        _add_constants(results_PON, layers.offset, scheme.result_bits, part)
        made_POW[..., place] = results_PON.cpu().numpy().view(np.uint64)
    return made_POW


def square_bytes(scheme: SquareScheme, features: int, hidden: int, outputs: int) -> int:
    """What evaluating a batch may hold, for an owner's account."""
    words = scheme.ring.words * (2 * features + 3 * outputs)
    part = scheme.ring.degree * (2 * features + 5 * hidden + 3 * outputs)
    return 8 * (3 * words + _COPIES * part + 3 * (features + outputs) * hidden)


def _squared(words_PHN: torch.Tensor, ring: Ring) -> torch.Tensor:
    """(c0², 2 c0 c1, c1²); int64 [3, H, N]."""
    zero, one = words_PHN
    mixed = multiply(zero, one, ring).mul_(2).remainder_(ring.modulus)
    return torch.stack([multiply(zero, zero, ring), mixed, multiply(one, one, ring)])


def _add_constants(words_PON: torch.Tensor, values_O: torch.Tensor, bits: int, ring: Ring) -> None:
    """Adds to each ciphertext a number that all its slots share, in place: exact, whatever its scale."""
    scaled = [round(math.ldexp(value, bits)) % ring.modulus for value in values_O.tolist()]
    words_PON[0] += torch.tensor(scaled, device=words_PON.device)[:, None]
    words_PON[0].remainder_(ring.modulus)
