"""Linear, square, linear in one go under encryption: the owner's part, and how far results may err.

How an owner uses it, where both sides know ``scheme = square_scheme(...)`` and ``workers`` are for ``scheme.ring``::

    bound = SquareBound.of(scheme, features=features, hidden=hidden)
    sent = SquareBatch(rows_BF, scheme)                      # at most rows_at_once(scheme.ring)
    made = workers.encrypt(key := StepKey(), sent.slots, 2.0**scheme.value_bits)
    ...                                                      # up: made.seeds, made.words, scheme.block_rows
    came = decode(answer, scheme.ring, count=outputs, block_rows=scheme.block_rows, seeded=False, polynomials=3, ...)
    results_BO = sent.results(workers.decrypt(key, came, scheme.result_scale), bound, weights)

and the node: ``apply_square(came, square_map(program, values, device), scheme, device)``.

**Errors.** A fresh ciphertext's error has N coefficients of standard deviation σ = 3.26 at most (SEAL's √(21/2), and
1/12 of the encoding), which a slot sees as a complex number whose two parts have σ√(N/2) each. Numbers go as in
:class:`wire.squares.SquareScheme`: F features of norm R, weights of norm A, hidden numbers up to H, k of them, weights
of sum S. Rounded weights are of norm A' = A + √F / 2^(weight_bits + 1) and of sum S' = S + k / 2^(second_bits + 1). A
hidden number then differs from what it should be by

- r ≤ R √F / 2^(weight_bits + 1) + 1 / 2^(hidden_bits + 1), from rounding the weights and the bias: always;
- n, of which each part is Gaussian with standard deviation A' σ √(N/2) / 2^value_bits: |n| ≤ η = :data:`TAIL` of them.

Its square differs by 2 h r + r² + 2 (h + r) n + n², and a result, for which S' adds such differences up, by

- rounding: S' (2 H r + r²) + H² k / 2^(second_bits + 1) + 1 / 2^(result_bits + 1);
- noise: S' (2 (H + r) η + 2 η²), the last for both parts of n at once;
- floating: 2^-40 of the largest result, for SEAL's transforms in doubles (some ten operations of 2^-53 each).

Encryption adds nothing else: a product of ciphertexts is exact, and s² decrypts c2 exactly. What cannot wrap is the
result, which the scheme sees to: values in between may, since modulo q only the last one counts.

**A malicious node.** What comes down is decoded into exactly three polynomials of the expected count. After decryption
every number is bounded; imaginary parts, which nobody sent, must be zero within the bound (of K times the key, which
(0, K, 0) decrypts to, they are not, nor of (0, 0, K)); slots in which nothing was sent must all agree, since an honest
node computes the same there. Where rows stand is drawn at random and secret. Where the owner has the weights, rows
drawn at random are computed in the clear. Where it has not, some pairs of rows a, b travel with u = (a + b)/2, w = (a -
b)/2 and -w: of whatever linear, square, linear (any quadratic map) f(a) + f(b) = 2 f(u) + f(w) + f(-w) - 2 f(0).

**What is not checked** where the weights stay with the node: that they are the right ones, and rows in no pair, one by
one. A node may compute another quadratic map, or spoil single results, and only by luck of the draw is that noticed.
Wrong results are then possible, but a leak of the key is not: what was decrypted goes nowhere. It must stay so: what is
handed on in full, with its low bits, to somebody who deals with the node, tells of the key (Li and Micciancio 2021).
Hand on decisions (a class), or numbers rounded to well above the bound; and never the reason why a batch was refused. A
key is of one batch and one answer, so that even a key that leaked opens one batch alone.

Shapes: ``B`` rows, ``F`` features, ``O`` outputs, ``S`` slots of a ciphertext.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from privacy.ckks.layer import TAIL
from wire.ciphertexts import SQUARE_RINGS, Ring
from wire.errors import ConfigError, TamperingSuspectedError
from wire.squares import SquareMap, SquareScheme

__all__ = ["SquareBatch", "SquareBound", "rows_at_once", "square_scheme"]

_SIGMA: Final = 3.26
_FLOATING: Final = 2.0**-40
_PAIRS: Final = 8
_EACH: Final = 3  # rows that travel for a pair
_EMPTY: Final = 8  # slots, at least
_CHECKED: Final = 32  # rows that are computed in the clear
_MOST_VALUE_BITS: Final = 36  # beyond, the encoder's doubles err as much as the noise
_MOST_WEIGHT_BITS: Final = 28  # integers of more bits take the node more products

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SquareBound:
    """How far a result may be from that in the clear: absolute.

    Attributes:
        noise: of encryption.
        rounding: of weights and biases.
        floating: of decoding in doubles.
    """

    noise: float
    rounding: float
    floating: float

    @classmethod
    def of(cls, scheme: SquareScheme, *, features: int, hidden: int) -> SquareBound:
        """For a middle of so many features and hidden numbers."""
        most, rounded = scheme.hidden_most, math.sqrt(features) / 2.0 ** (scheme.weight_bits + 1)
        weights = scheme.second_sum + hidden / 2.0 ** (scheme.second_bits + 1)
        r = scheme.row_norm * rounded + 2.0 ** -(scheme.hidden_bits + 1)
        each = _SIGMA * math.sqrt(scheme.ring.degree / 2) / 2.0**scheme.value_bits
        n = TAIL * (scheme.weight_norm + rounded) * each
        second = most**2 * hidden / 2.0 ** (scheme.second_bits + 1) + 2.0 ** -(scheme.result_bits + 1)
        return cls(
            noise=weights * (2 * (most + r) * n + 2 * n * n),
            rounding=weights * (2 * most * r + r * r) + second,
            floating=_FLOATING * scheme.result_most,
        )

    @property
    def total(self) -> float:
        """All of them."""
        return self.noise + self.rounding + self.floating


def rows_at_once(ring: Ring) -> int:
    """Rows of one batch, at most: a slot each, less those that checks need."""
    return ring.degree // 2 - _EACH * _PAIRS - _EMPTY


def square_scheme(
    *,
    features: int,
    hidden: int,
    row_norm: float,
    weight_norm: float,
    bias_most: float,
    second_sum: float,
    offset_most: float,
    tolerance: float,
) -> SquareScheme:
    """The smallest ring, and in it the scales of the smallest bound, with which results err by ``tolerance`` at most.

    Args:
        features: F.
        hidden: numbers that are squared.
        row_norm: R; rows are clipped to it.
        weight_norm: A. Where the owner has the weights, this and the next three are theirs: ``SquareMap.weight_norm``.
        bias_most: B.
        second_sum: S.
        offset_most: D.
        tolerance: absolute, of a result.

    Raises:
        ConfigError: no ring on the list does it.
    """
    result_most = second_sum * (row_norm * weight_norm + bias_most) ** 2 + offset_most
    if not 0 < result_most < math.inf:
        raise ConfigError(f"ckks: results of up to {result_most}: give norms that are finite, and not all zero")
    best = math.inf
    for ring in SQUARE_RINGS:
        bounded = []
        for value_bits, weight_bits, second_bits in _scales(ring, result_most):
            scheme = SquareScheme(
                ring=ring,
                value_bits=value_bits,
                weight_bits=weight_bits,
                second_bits=second_bits,
                row_norm=row_norm,
                weight_norm=weight_norm,
                bias_most=bias_most,
                second_sum=second_sum,
                offset_most=offset_most,
            )
            bounded.append((SquareBound.of(scheme, features=features, hidden=hidden).total, second_bits, scheme))
        if bounded:
            error, _, scheme = min(bounded, key=lambda one: one[:2])
            if error <= tolerance:
                return scheme
            best = min(best, error)
    raise ConfigError(
        f"ckks: results of up to {result_most:g} would err by up to {best:g}, more than {tolerance:g}: lower the clip "
        "or the weights, or allow more"
    )


def _scales(ring: Ring, result_most: float) -> Iterator[tuple[int, int, int]]:
    """Bits of values, weights and second weights that leave room for the result, the last as many as then fit."""
    room = math.floor(math.log2(ring.modulus / 4) - math.log2(result_most) - 2**-20)
    for value_bits in range(1, _MOST_VALUE_BITS + 1):
        for weight_bits in range(1, _MOST_WEIGHT_BITS + 1):
            second_bits = min(_MOST_WEIGHT_BITS, room - 2 * (value_bits + weight_bits))
            if second_bits >= 1:
                yield value_bits, weight_bits, second_bits


class SquareBatch:
    """A batch of rows on its way through linear, square, linear.

    Attributes:
        slots: float64 [F, S], to be encrypted, one ciphertext for each feature.
    """

    def __init__(self, rows_BF: _Array, scheme: SquareScheme) -> None:
        """Places rows, and what checks need, in slots drawn at random.

        Raises:
            ConfigError: more rows than fit, or rows longer than the scheme allows.
        """
        rows, most = len(rows_BF), rows_at_once(scheme.ring)
        if not 0 < rows <= most:
            raise ConfigError(f"ckks: {rows} rows at once; 1 to {most}: send more in several batches")
        if not np.linalg.norm(rows_BF, axis=1).max() <= scheme.row_norm * (1 + 2**-20):
            raise ConfigError(f"ckks: rows longer than {scheme.row_norm:g}: clip them first")
        self._scheme, self._rows_BF = scheme, rows_BF
        self._pairs = np.array([[secrets.randbelow(rows) for _ in range(_PAIRS)] for _ in range(2)])
        one, other = rows_BF[self._pairs]
        half, rest = (one + other) / 2, (one - other) / 2
        sent_RF = np.concatenate([rows_BF, half, rest, -rest])
        slots = scheme.block_rows
        places = secrets.SystemRandom().sample(range(slots), slots)
        self._places, self._empty = np.array(places[: len(sent_RF)]), np.array(places[len(sent_RF) :])
        self.slots = np.zeros((rows_BF.shape[1], slots))
        self.slots[:, self._places] = sent_RF.T

    def results(
        self, decrypted_OS: npt.NDArray[np.complex128], bound: SquareBound, layers: SquareMap | None = None
    ) -> _Array:
        """The rows' results, once they were checked.

        Args:
            decrypted_OS: complex128, whatever the node's ciphertexts hold.
            bound: on a result's error.
            layers: the node's weights, where the owner has them.

        Returns:
            float64 [B, O].

        Raises:
            TamperingSuspectedError: saying which test failed, and no number.
        """
        within = bound.total
        if not np.isfinite(decrypted_OS).all() or np.abs(decrypted_OS.real).max() > self._scheme.result_most + within:
            raise TamperingSuspectedError("the node returned ciphertexts of numbers larger than any it was asked for")
        if np.abs(decrypted_OS.imag).max() > within:
            raise TamperingSuspectedError("the node returned ciphertexts of numbers that are not real")
        numbers_SO: _Array = np.ascontiguousarray(decrypted_OS.real.T)
        empty: _Array = numbers_SO[self._empty]
        made: _Array = numbers_SO[self._places]
        if np.abs(empty - empty[0]).max() > 2 * within:
            raise TamperingSuspectedError("the node returned ciphertexts that differ where nothing was sent")
        rows, origin = len(self._rows_BF), empty.mean(axis=0)
        half, rest, turned = made[rows:].reshape(_EACH, _PAIRS, -1)
        one, other = made[:rows][self._pairs]
        # Eight results stand in this sum.
        if np.abs(one + other - 2 * half - rest - turned + 2 * origin).max() > 8 * within:
            raise TamperingSuspectedError("the node returned what no one middle makes of all rows")
        if layers is not None:
            self._compare(made, origin, layers, within)
        return made[:rows]

    def _compare(self, made: _Array, origin: _Array, layers: SquareMap, within: float) -> None:
        """Some rows, drawn anew, and a row of zeros, in the clear."""
        rows = len(self._rows_BF)
        drawn = [secrets.randbelow(rows) for _ in range(min(_CHECKED, rows))]
        asked = np.concatenate([self._rows_BF[drawn], np.zeros((1, self._rows_BF.shape[1]))])
        expected = layers(torch.from_numpy(asked)).numpy()
        if np.abs(np.concatenate([made[drawn], origin[None]]) - expected).max() > within:
            raise TamperingSuspectedError("the node returned other results than those of its own weights")
