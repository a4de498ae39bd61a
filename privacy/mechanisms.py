"""The mechanisms that make a release private, on tensors. What they cost is counted in :mod:`privacy.accounting`.

Noise comes from AES-256 in counter mode under a key that the operating system draws afresh for each call: never from a
training seed, nor from one that the node knows. (torch's generator on the CPU keeps 32 bits of its seed: whoever
guesses the data could try them all.) It is drawn in float64, and what is released is rounded to a multiple of
``2**(ceil(log2(σ)) - 20)``, the grid of :func:`grid_of`: the lowest bits of a floating-point sum tell of its summands
(Mironov 2012), and each point of the grid gathers some 2³² values that the sum can take. That closes the known attack;
it is no proof, as an exact sampler of the discrete Gaussian would be. A value of up to 16 σ is a float32 to the bit; a
larger one is rounded to the nearest, which is post-processing.

Every mechanism refuses NaN and infinity before it computes anything: they pass a clip and poison a sum. What it returns
knows nothing of how it was computed (no gradient flows through it).

Shapes: ``B`` records, ``K`` classes, ``D`` features, ``V = D(D+1)/2`` distinct second moments.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.accounting import Relation
from wire.errors import ConfigError, NonFiniteError

__all__ = [
    "Moments",
    "Noise",
    "clip_rows",
    "grid_of",
    "moments_sensitivity",
    "noisy_moments",
    "noisy_rows",
    "noisy_sums",
    "randomize_labels",
    "unit_rows",
]

_GRID_BITS: Final = 20  # below the noise; with 24 bits, float32 holds 16 σ of it exactly
_WORD_BITS: Final = 63  # of a random word: the most that an int64 holds without its sign
_MOST_LABEL_EPSILON: Final = 20.0  # beyond it 53 bits no longer resolve how rarely a label changes
_MOST_PRODUCTS: Final = 2**23  # of features held at once while second moments are summed: 64 MiB
_NORM_MARGIN: Final = 1e-12  # above what float64 errs in the norm of a row


class Noise:
    """Where noise comes from. It holds no state that a copy, a fork or a resumed run could draw again."""

    def __init__(self) -> None:
        self._seed: bytes | None = None
        self._drawn = 0

    @classmethod
    def _seeded(cls, seed: int) -> Noise:
        """Noise that can be drawn again, so no protection: for tests of mechanisms alone."""
        made = cls()
        made._seed = seed.to_bytes(32, "little")
        return made

    def gaussian(self, shape: Sequence[int], sigma: float) -> torch.Tensor:
        """Independent draws of N(0, sigma²), by Box and Muller's transform (1958).

        Returns:
            float64 ``shape``, on the CPU. The tails reach 9.3 sigma; what lies beyond has a probability of 10⁻²⁰.

        Raises:
            ConfigError: ``sigma`` is not finite and positive.
        """
        _check_positive("sigma", sigma)
        count = math.prod(shape)
        radius, angle = self._words(2, (count + 1) // 2).to(torch.float64)
        radius = (-2 * torch.log((radius + 1) * 2.0**-_WORD_BITS)).sqrt_().mul_(sigma)
        angle = angle.mul_(2 * math.pi * 2.0**-_WORD_BITS)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(tuple(shape))

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """Independent draws from [0, 1), multiples of 2⁻⁵³: float64 ``shape``, on the CPU."""
        return (self._words(*shape) >> (_WORD_BITS - 53)).to(torch.float64) * 2.0**-53

    def added_to(self, values: torch.Tensor, sigma: float) -> torch.Tensor:
        """``values`` under Gaussian noise, rounded to :func:`grid_of` sigma.

        Returns:
            float64, detached, on the device of ``values``.

        Raises:
            ConfigError: ``sigma`` is not finite and positive.
            NonFiniteError: a value is NaN or infinite.
        """
        _check_finite(values)
        noisy = values.detach().to("cpu", torch.float64) + self.gaussian(values.shape, sigma)
        grid = grid_of(sigma)
        return (noisy / grid).round_().mul_(grid).to(values.device)

    def _words(self, *shape: int) -> torch.Tensor:
        """Random int64 from 0 to 2⁶³ - 1."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=torch.int64)
        stream = bytearray(8 * count)
        Cipher(algorithms.AES256(self._key()), modes.CTR(bytes(16))).encryptor().update_into(bytes(8 * count), stream)
        return torch.frombuffer(stream, dtype=torch.int64).bitwise_and_(2**_WORD_BITS - 1).reshape(shape)

    def _key(self) -> bytes:
        if self._seed is None:
            return os.urandom(32)
        self._drawn += 1
        return hashlib.sha256(self._seed + self._drawn.to_bytes(8, "little")).digest()


@dataclass(frozen=True, slots=True)
class Moments:
    """What :func:`noisy_moments` released, in the units of the data.

    Attributes:
        counts: float64 ``[K]``, records (or summed weights) of each class; noise may make one negative.
        sums: float64 ``[K, D]``, of the rows of each class.
        seconds: float64 ``[K, D, D]``, or ``[1, D, D]`` where they are pooled: symmetric sums of a·aᵀ.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    seconds: torch.Tensor


def grid_of(sigma: float) -> float:
    """The grid that values under noise of ``sigma`` are rounded to: its step, a power of two, 2⁻²⁰ to 2⁻¹⁹ sigma."""
    _check_positive("sigma", sigma)
    return 2.0 ** (math.ceil(math.log2(sigma)) - _GRID_BITS)


def clip_rows(x: torch.Tensor, clip: float) -> torch.Tensor:
    """Each row shortened, where it is longer, to an L2 norm of ``clip`` over all its other dimensions.

    The law: no row of the result, in its own dtype, has a norm above ``clip``. Gradients flow through.

    Args:
        x: floating, ``[B, ...]``.
        clip: the greatest norm that leaves.

    Returns:
        ``x``'s shape; float64 stays float64, all else becomes float32.

    Raises:
        ConfigError: ``x`` is not floating or has no rows' dimension, or ``clip`` is not finite and positive.
        NonFiniteError: ``x`` holds NaN or infinity.
    """
    _check_positive("clip", clip)
    exact, norms, dtype = _normed(x)
    # Rounding to dtype may lengthen a row by half a unit in the last place of each number.
    goal = clip * (1 - _margin(dtype))
    factors = torch.where(norms > clip * (1 - _NORM_MARGIN), goal / norms.clamp_min(goal), 1.0)
    return (exact * factors).to(dtype)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Each row over its L2 norm; a row of zeros stays one.

    The law: no row of the result, in its own dtype, has a norm above 1, nor below 0.999999 unless it is 0.

    Args:
        x: floating, ``[B, ...]``.

    Returns:
        ``x``'s shape; float64 stays float64, all else becomes float32.

    Raises:
        ConfigError: ``x`` is not floating, or has no rows' dimension.
        NonFiniteError: ``x`` holds NaN or infinity.
    """
    exact, norms, dtype = _normed(x)
    return (exact * torch.where(norms > 0, (1 - _margin(dtype)) / norms, 0.0)).to(dtype)


def noisy_rows(x: torch.Tensor, *, clip: float, sigma: float, noise: Noise) -> torch.Tensor:
    """Each record's own row, clipped and under noise: what one record adds to the release is at most ``clip`` long.

    Returns:
        float32 ``[B, ...]``, on the device of ``x``.

    Raises:
        ConfigError: ``x`` is not floating, or ``clip`` or ``sigma`` not finite and positive.
        NonFiniteError: ``x`` holds NaN or infinity.
    """
    return noise.added_to(clip_rows(x.detach(), clip), sigma).to(torch.float32)


def noisy_sums(
    x: torch.Tensor, labels: torch.Tensor, *, classes: int, clip: float, sigma: float, noise: Noise
) -> torch.Tensor:
    """The sum of each class's clipped rows under noise; the sum of an empty class is noise alone.

    Args:
        x: floating, ``[B, ...]``.
        labels: int64 ``[B]``, from 0 to ``classes - 1``.
        classes: how many sums there are.
        clip: the greatest norm of a row.
        sigma: of the noise on each coordinate of each sum.
        noise: where it comes from.

    Returns:
        float32 ``[K, ...]``, on the device of ``x``.

    Raises:
        ConfigError: an argument is out of range, or ``labels`` are no labels of ``x``.
        NonFiniteError: ``x`` holds NaN or infinity.
    """
    rows = clip_rows(x.detach(), clip).to(torch.float64)
    sums = rows.new_zeros((classes, *x.shape[1:])).index_add_(0, _labels_of(labels, classes, x), rows)
    return noise.added_to(sums, sigma).to(torch.float32)


def randomize_labels(labels: torch.Tensor, *, classes: int, epsilon: float, noise: Noise) -> torch.Tensor:
    """Each label kept with probability e^ε / (e^ε + K - 1), else replaced by any of the others alike (Warner 1965).

    Args:
        labels: int64 ``[B]``, from 0 to ``classes - 1``.
        classes: K, at least 2.
        epsilon: of one report, above 0 and at most 20.
        noise: where chance comes from.

    Returns:
        int64 ``[B]``, on the device of ``labels``.

    Raises:
        ConfigError: an argument is out of range.
    """
    _check_positive("epsilon", epsilon)
    if epsilon > _MOST_LABEL_EPSILON:
        raise ConfigError(f"an ε of {epsilon} for labels protects nothing: take at most {_MOST_LABEL_EPSILON:.0f}")
    if classes <= 1:
        raise ConfigError(f"randomized response needs at least 2 classes, not {classes}")
    true = _labels_of(labels, classes, labels)
    moved, where = noise.uniform((2, len(true))).to(true.device)
    others = 1 + (where * (classes - 1)).to(torch.int64)
    return torch.where(moved < _moving_chance(epsilon, classes), (true + others) % classes, true)


def moments_sensitivity(count_weight: float, second_weight: float, relation: Relation) -> float:
    """How far one unit moves v = (c·e_y, e_y⊗a, w·vech(a·aᵀ)) at most, where |a| ≤ 1 (L2).

    Add/remove: the norm of v, √(1 + c² + w²). Replace-one, with t = a·a':

    - another class: 2c² + |a|² + |a'|² + w²(|a|⁴ + |a'|⁴ - 2t²) ≤ 2(1 + c² + w²), reached at t = 0; so too where
      second moments are kept by class, as those of two classes are orthogonal;
    - the same class: |a|² + |a'|² - 2t + w²(|a|⁴ + |a'|⁴ - 2t²), greatest for |a| = |a'| = 1, and for t = -1/(2w²)
      where that is above -1: 2 + 2w² + 1/(2w²); else for t = -1: 4.

    A unit of many records, whose weights add up to at most 1, moves within the convex hull of these v: no farther.

    Raises:
        ConfigError: a weight is not finite and positive.
    """
    _check_positive("count_weight", count_weight)
    _check_positive("second_weight", second_weight)
    second = second_weight**2
    other_class = 2 * (1 + count_weight**2 + second)
    if Relation(relation) is Relation.ADD_REMOVE:
        return math.sqrt(other_class / 2)
    same_class = 4.0 if second <= 1 / 2 else 2 + 2 * second + 1 / (2 * second)
    return math.sqrt(max(other_class, same_class))


def noisy_moments(
    x_unit: torch.Tensor,
    labels: torch.Tensor,
    *,
    classes: int,
    count_weight: float,
    second_weight: float,
    per_class: bool,
    weights: torch.Tensor | None,
    sigma: float,
    noise: Noise,
) -> Moments:
    """Counts, sums and second moments of unit rows, by one Gaussian mechanism.

    One record adds v = (c·e_y, e_y⊗a, w·vech(a·aᵀ)), where vech takes each pair of features once, off the diagonal
    times √2, so that its norm is |a|². Noise is laid on v's coordinates, and the weights c and w are divided out
    afterwards. How far v moves: :func:`moments_sensitivity`.

    Args:
        x_unit: floating ``[B, D]``, rows of norm 1 at most; longer ones are clipped to it.
        labels: int64 ``[B]``, from 0 to ``classes - 1``.
        classes: K.
        count_weight: c.
        second_weight: w.
        per_class: second moments by class; else pooled over all.
        weights: floating ``[B]`` from 0 to 1, or none for 1 each. Where a unit has m records, each weighs 1/m: the
            mechanism is private for a unit as long as its weights add up to at most 1.
        sigma: of the noise on each coordinate of v.
        noise: where it comes from.

    Raises:
        ConfigError: an argument is out of range, or the shapes do not fit each other.
        NonFiniteError: ``x_unit`` or ``weights`` hold NaN or infinity.
    """
    _check_positive("count_weight", count_weight)
    _check_positive("second_weight", second_weight)
    if x_unit.ndim != 2:  # noqa: PLR2004 -- [B, D]
        raise ConfigError(f"moments are taken of rows [B, D], not of {list(x_unit.shape)}: flatten the features")
    rows_BD = clip_rows(x_unit.detach(), 1.0).to("cpu", torch.float64)
    labels_B = _labels_of(labels, classes, x_unit).cpu()
    shares_B = _shares_of(weights, len(x_unit))
    weighed_BD = rows_BD * shares_B[:, None]
    groups_B = labels_B if per_class else torch.zeros_like(labels_B)
    seconds_GDD = _seconds(rows_BD, weighed_BD, groups_B, classes if per_class else 1)
    above, scale_V = _vech(rows_BD.shape[1])
    seconds_GV = seconds_GDD[:, above[0], above[1]] * (scale_V * second_weight)
    counts_K = shares_B.new_zeros(classes).index_add_(0, labels_B, shares_B)
    sums_KD = weighed_BD.new_zeros((classes, weighed_BD.shape[1])).index_add_(0, labels_B, weighed_BD)
    parts = [counts_K * count_weight, sums_KD, seconds_GV]

    released = noise.added_to(torch.cat([part.flatten() for part in parts]), sigma)
    counts_K, sums, seconds = torch.split_with_sizes(released, [part.numel() for part in parts])
    seconds_GV = seconds.reshape(seconds_GV.shape) / (scale_V * second_weight)
    seconds_GDD[:, above[0], above[1]] = seconds_GV
    seconds_GDD[:, above[1], above[0]] = seconds_GV
    return Moments(counts_K / count_weight, sums.reshape(sums_KD.shape), seconds_GDD)


def _seconds(rows_BD: torch.Tensor, weighed_BD: torch.Tensor, groups_B: torch.Tensor, groups: int) -> torch.Tensor:
    """The sum of w·a·aᵀ over each group's rows, ``[groups, D, D]``."""
    features = rows_BD.shape[1]
    found_GDD = rows_BD.new_zeros((groups, features, features))
    chunk = max(1, _MOST_PRODUCTS // max(1, features**2))
    for rows, weighed, which in zip(
        *(torch.split(x, chunk) for x in (rows_BD, weighed_BD, groups_B)),
        strict=True,
    ):
        found_GDD.index_add_(0, which, weighed[:, :, None] * rows[:, None, :])
    return found_GDD


def _vech(features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the distinct second moments stand, int64 ``[2, V]``, and the scale of each, ``[V]``."""
    above = torch.triu_indices(features, features)
    return above, torch.where(above[0] == above[1], 1.0, math.sqrt(2)).to(torch.float64)


def _moving_chance(epsilon: float, classes: int) -> float:
    """How often randomized response replaces a label."""
    return (classes - 1) / (math.exp(epsilon) + classes - 1)


def _normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """The rows and their norms in float64, the latter as ``[B, 1, ...]``, and the dtype that is to leave."""
    if not x.is_floating_point() or not x.ndim:
        raise ConfigError(f"rows are floating tensors [B, ...], not {x.dtype} of shape {list(x.shape)}")
    _check_finite(x)
    exact = x.to(torch.float64)
    norms = exact.reshape(len(x), math.prod(x.shape[1:])).norm(dim=1)
    return exact, norms.reshape(-1, *[1] * (x.ndim - 1)), x.dtype if x.dtype is torch.float64 else torch.float32


def _margin(dtype: torch.dtype) -> float:
    """By how much of itself a norm is kept below its bound, so that rounding does not lift it above."""
    return max(_NORM_MARGIN, 4 * torch.finfo(dtype).eps)


def _labels_of(labels: torch.Tensor, classes: int, x: torch.Tensor) -> torch.Tensor:
    if labels.dtype is not torch.int64 or labels.ndim != 1 or len(labels) != len(x):
        raise ConfigError(f"labels are int64 [{len(x)}], one for each row, not {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ConfigError(f"labels run from 0 to {classes - 1}; here from {int(labels.min())} to {int(labels.max())}")
    return labels


def _shares_of(weights: torch.Tensor | None, count: int) -> torch.Tensor:
    """Each record's weight, float64 ``[B]``."""
    if weights is None:
        return torch.ones(count, dtype=torch.float64)
    if not weights.is_floating_point() or list(weights.shape) != [count]:
        raise ConfigError(
            f"weights are floating [{count}], one for each row, not {weights.dtype} {list(weights.shape)}"
        )
    _check_finite(weights)
    if count and not 0 <= float(weights.min()) <= float(weights.max()) <= 1:
        raise ConfigError("a record weighs from 0 to 1; a unit's weights add up to at most 1")
    return weights.detach().to("cpu", torch.float64)


def _check_finite(x: torch.Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("NaN or infinity where a private release was to be made: it would pass the clip")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is finite and above 0, not {value!r}")
