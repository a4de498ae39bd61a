"""Ciphertexts as both sides read and write them: words of ring elements behind a shape of our own, strictly.

A ciphertext (c0, c1) of the RLWE encryption that CKKS uses (Cheon, Kim, Kim and Song 2017) is two elements of
Z_q[X]/(X^N + 1), here always in the order of evaluations (NTT); a product of two ciphertexts is three. q is one prime,
or the product of several: then a polynomial is kept modulo each of them, one after the other. Whoever holds the key
makes c1 from a seed of 64 bytes, which then travels in its place. No scale travels: both sides derive it from the
session's :class:`Scheme` (or :class:`wire.squares.SquareScheme`), so that a peer cannot change it. The law is
``decode(encode(c)) == c``, and what :func:`decode` accepts has exactly the count, the block and the number of bytes
that were expected, and every word below its prime.

Nothing here is secret, and nothing here can decrypt.

Shapes: ``C`` ciphertexts, ``P`` polynomials of each, ``W`` words of a polynomial: N for each prime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from protos import encryption_pb2
from wire.errors import ConfigError, LimitExceededError, MessageRejectedError, SpecRejectedError

__all__ = [
    "MAX_CIPHERTEXTS",
    "RINGS",
    "SEED_BYTES",
    "SQUARE_RINGS",
    "Ciphertexts",
    "Ring",
    "Scheme",
    "Words",
    "check_ring",
    "decode",
    "encode_into",
    "expected_bytes",
    "pack",
    "packed_counts",
    "ring_from_proto",
    "scheme_from_proto",
    "security_bits",
    "spreads",
    "unpack",
]

Words: TypeAlias = npt.NDArray[np.uint64]

SEED_BYTES: Final = 64  # of SEAL's generator
MAX_CIPHERTEXTS: Final = 2**14  # features of one layer: 450 MB at the smallest ring, above what any message may hold
_GROUP: Final = 64  # words that are packed together, so that they end on a word
_LEAST_SECURITY: Final = 128
_MAX_SCALE_BITS: Final = 40
_MOST_PRIMES: Final = 4  # of a ring on the lists
_MAX_ROW_NORM: Final = 2.0**20

#: The largest modulus, in bits, by the ring's degree and the security level: classical attacks, ternary secrets
#: (Albrecht et al. 2018, the HomomorphicEncryption.org standard, table 1).
_STANDARD: Final[dict[int, dict[int, int]]] = {
    1024: {27: 128, 19: 192, 14: 256},
    2048: {54: 128, 37: 192, 29: 256},
    4096: {109: 128, 75: 192, 58: 256},
    8192: {218: 128, 152: 192, 118: 256},
}


def security_bits(degree: int, modulus_bits: int) -> int:
    """The security level that the standard's table gives a ring; 0 below 128 bits, or where it has no such degree."""
    levels = [level for bits, level in _STANDARD.get(degree, {}).items() if modulus_bits <= bits]
    return max(levels, default=0)


@dataclass(frozen=True, slots=True)
class Ring:
    """Z_q[X]/(X^N + 1), for a q that is a prime, or a product of primes; each prime is 1 modulo 2N.

    Attributes:
        degree: N, a power of two.
        moduli: the primes, of equally many bits and below 2**57: a product modulo one is computed in 64 bits and a
            double.
        reserved: one prime more where SEAL keeps one back for evaluation keys, which are never made here; else 1.
            Security is counted as if it were used.
    """

    degree: int
    moduli: tuple[int, ...]
    reserved: int = 1

    @property
    def modulus(self) -> int:
        """The whole modulus, q."""
        return math.prod(self.moduli)

    @property
    def bits(self) -> int:
        """Of one word on the wire."""
        return self.moduli[0].bit_length()

    @property
    def words(self) -> int:
        """Of one polynomial: N for each prime."""
        return self.degree * len(self.moduli)

    @property
    def polynomial_bytes(self) -> int:
        """Of one polynomial on the wire."""
        return self.words * self.bits // 8

    @property
    def security_bits(self) -> int:
        """By the standard's table; 0 below 128."""
        return security_bits(self.degree, (self.modulus * self.reserved).bit_length())

    def parts(self) -> list[tuple[Ring, slice]]:
        """For each prime a ring of it alone, and which words of a polynomial are modulo it."""
        return [
            (Ring(self.degree, (prime,)), slice(self.degree * place, self.degree * (place + 1)))
            for place, prime in enumerate(self.moduli)
        ]


#: The rings that a session of one layer may name, smallest first: 54 bits of modulus for layers of some hundred inputs,
#: 56 for wider ones. Each is at least 128-bit secure by the standard's table.
RINGS: Final = (Ring(2048, (18014398509404161,)), Ring(4096, (72057594037641217,)))

#: The same for sessions of linear, square, linear (:mod:`wire.squares`), whose scales multiply: cheapest first.
SQUARE_RINGS: Final = (
    Ring(4096, (70368743587841, 70368743669761), 114689),
    Ring(8192, (72057594037370881, 72057594037616641), 114689),
    Ring(8192, (281474976317441, 281474976546817, 281474976694273), 114689),
    Ring(8192, (1125899905351681, 1125899905744897, 1125899906629633, 1125899906826241), 114689),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What both sides of an encrypted session compute by.

    Attributes:
        ring: one of :data:`RINGS`.
        value_bits: what comes up is scaled by ``2**value_bits``.
        weight_bits: the same for the layer's weights.
        row_norm: L2 norm of each row that comes up, at most.
        send_weights: whether the layer's parameters go down with each forward.
    """

    ring: Ring = RINGS[0]
    value_bits: int = 23
    weight_bits: int = 20
    row_norm: float
    send_weights: bool = True

    def __post_init__(self) -> None:
        """Refuses what would not be secure, or cannot work.

        Raises:
            ConfigError: fewer than 128 bits of security, a ring that is not on the list, or scales that leave no room.
        """
        check_ring(self.ring, RINGS)
        if not 1 <= self.value_bits <= _MAX_SCALE_BITS or not 1 <= self.weight_bits <= _MAX_SCALE_BITS:
            raise ConfigError(f"scales of 2**{self.value_bits} and 2**{self.weight_bits}: 1 to {_MAX_SCALE_BITS} bits")
        if not 0 < self.row_norm <= _MAX_ROW_NORM:
            raise ConfigError(f"rows of norm {self.row_norm}: above 0, at most {_MAX_ROW_NORM:g}")
        if self.largest_result < 1:
            raise ConfigError(
                f"scales of 2**{self.value_bits} and 2**{self.weight_bits} leave no room below a modulus of "
                f"{self.ring.bits} bits: lower one"
            )

    @property
    def result_scale(self) -> float:
        """What a result is scaled by."""
        return 2.0 ** (self.value_bits + self.weight_bits)

    @property
    def largest_result(self) -> float:
        """A result of a row, at most so large, cannot wrap around the modulus.

        A coefficient of the plaintext is at most the largest complex slot, √2 of the largest number; one bit more is
        for the noise, which :class:`privacy.ckks.bounds.LayerBound` bounds far below.
        """
        return self.ring.modulus / (4 * math.sqrt(2) * self.result_scale)

    def check_weights(self, norm: float) -> None:
        """Refuses a layer whose results could wrap.

        Args:
            norm: the largest L2 norm of an output's weights.

        Raises:
            LimitExceededError: says by how much.
        """
        if not norm * self.row_norm <= self.largest_result:
            raise LimitExceededError(
                f"rows of norm {self.row_norm:g} by weights of norm {norm:g} could exceed {self.largest_result:g}, "
                "where ciphertexts wrap: lower the clip, the scales or the learning rate, or take a larger ring"
            )

    def to_proto(self) -> encryption_pb2.Encryption:
        """As a message."""
        return encryption_pb2.Encryption(
            ring_degree=self.ring.degree,
            moduli=self.ring.moduli,
            value_bits=self.value_bits,
            weight_bits=self.weight_bits,
            row_norm=self.row_norm,
            send_weights=self.send_weights,
        )


def check_ring(ring: Ring, known: tuple[Ring, ...]) -> None:
    """Refuses a ring that is not one of ``known``.

    Raises:
        ConfigError: says so where it is because fewer than 128 bits of security are left.
    """
    if ring.security_bits < _LEAST_SECURITY:
        raise ConfigError(
            f"a modulus of {(ring.modulus * ring.reserved).bit_length()} bits at ring degree {ring.degree} is less "
            f"than {_LEAST_SECURITY}-bit secure: take one of wire.ciphertexts.RINGS or SQUARE_RINGS"
        )
    if ring not in known:
        raise ConfigError(f"the ring {ring} is not on the list: {', '.join(map(str, known))}")


def ring_from_proto(message: encryption_pb2.Encryption) -> Ring:
    """The ring that a session names; nothing of it was checked yet.

    Raises:
        SpecRejectedError: without a modulus, or with more than any ring has.
    """
    moduli = tuple(message.moduli[: _MOST_PRIMES + 1])
    if not 0 < len(moduli) <= _MOST_PRIMES:
        raise SpecRejectedError(f"a ring of {len(message.moduli)} primes: 1 to {_MOST_PRIMES}")
    return Ring(message.ring_degree, moduli, message.reserved or 1)


def scheme_from_proto(message: encryption_pb2.Encryption) -> Scheme:
    """Raises: SpecRejectedError for parameters that are not on the list, or leave no room."""
    if message.HasField("square"):
        raise SpecRejectedError("parameters of linear, square, linear: see wire.squares")
    try:
        return Scheme(
            ring=ring_from_proto(message),
            value_bits=message.value_bits,
            weight_bits=message.weight_bits,
            row_norm=message.row_norm,
            send_weights=message.send_weights,
        )
    except ConfigError as error:
        raise SpecRejectedError(str(error)) from error


@dataclass(frozen=True, slots=True, eq=False)
class Ciphertexts:
    """Several ciphertexts under one key.

    Attributes:
        block_rows: rows of the batch that each feature takes of a ciphertext; N where it has one for itself.
        seeds: uint8 [C, 64], or ``None`` where c1 is in ``words``.
        words: uint64 [1, C, W] with seeds, [P, C, W] without.
    """

    block_rows: int
    seeds: npt.NDArray[np.uint8] | None = field(repr=False)
    words: Words = field(repr=False)

    @property
    def count(self) -> int:
        """C."""
        return int(self.words.shape[1])

    @property
    def nbytes(self) -> int:
        """In memory."""
        return self.words.nbytes + (0 if self.seeds is None else self.seeds.nbytes)


def expected_bytes(ring: Ring, count: int, *, seeded: bool) -> int:
    """Of ``count`` ciphertexts on the wire."""
    return count * (ring.polynomial_bytes + (SEED_BYTES if seeded else ring.polynomial_bytes))


def packed_counts(features: int, outputs: int, each: int, *, spread: bool) -> tuple[int, int]:
    """How many ciphertexts go up, and how many come down.

    Args:
        features: of the layer.
        outputs: likewise.
        each: numbers of a row that share a ciphertext.
        spread: whether those are outputs; otherwise features.
    """
    return (features, math.ceil(outputs / each)) if spread else (math.ceil(features / each), outputs)


def spreads(features: int, outputs: int, each: int) -> bool:
    """Whether it is cheaper that outputs share ciphertexts; what comes down has no seeds, and counts double."""
    (up, down), (shared_up, shared_down) = (packed_counts(features, outputs, each, spread=s) for s in (True, False))
    return up + 2 * down < shared_up + 2 * shared_down


def encode_into(message: encryption_pb2.Ciphertexts, ciphertexts: Ciphertexts, ring: Ring) -> None:
    """Fills ``message``, an empty part of a larger one."""
    message.count, message.block_rows = ciphertexts.count, ciphertexts.block_rows
    message.seeds = b"" if ciphertexts.seeds is None else ciphertexts.seeds.tobytes()
    message.words = pack(ciphertexts.words, ring).tobytes()


def decode(
    message: encryption_pb2.Ciphertexts,
    ring: Ring,
    *,
    count: int,
    block_rows: int,
    seeded: bool,
    max_bytes: int,
    polynomials: int = 2,
) -> Ciphertexts:
    """The ciphertexts of ``message``, which are exactly as many and as large as expected.

    Args:
        message: foreign.
        ring: of the session.
        count: C.
        block_rows: rows of the batch that each feature takes of a ciphertext.
        seeded: whether seeds stand for c1.
        max_bytes: in memory, at most.
        polynomials: P, without seeds: 3 for products.

    Raises:
        MessageRejectedError: another shape, another number of bytes, a word that is not below its prime, or a
            ciphertext that anybody can read (modulo one of the primes all is zero but c0).
        LimitExceededError: more than ``max_bytes`` in memory.
    """
    if message.count != count or message.block_rows != block_rows:
        raise MessageRejectedError(
            f"{message.count} ciphertexts in blocks of {message.block_rows} rows; expected {count} and {block_rows}"
        )
    polynomials = 1 if seeded else polynomials
    size = 8 * polynomials * count * ring.words
    if not 0 < count <= MAX_CIPHERTEXTS or size > max_bytes:
        raise LimitExceededError(f"{count} ciphertexts of {size} bytes; the limit is {max_bytes}")
    if len(message.seeds) != (SEED_BYTES * count if seeded else 0):
        raise MessageRejectedError(f"{len(message.seeds)} bytes of seeds for {count} ciphertexts")
    if len(message.words) != polynomials * count * ring.polynomial_bytes:
        raise MessageRejectedError(f"{len(message.words)} bytes of words for {count} ciphertexts of {polynomials}")
    packed = np.frombuffer(message.words, dtype="<u8").reshape(polynomials, count, -1)
    words = unpack(packed, ring)
    by_prime = words.reshape(polynomials, count, len(ring.moduli), ring.degree)
    if (by_prime.max(axis=(0, 1, 3)) >= np.array(ring.moduli, dtype=np.uint64)).any():
        raise MessageRejectedError("a word of a ciphertext that is not below the modulus")
    if not seeded and not by_prime[1:].any(axis=(0, 3)).all():
        raise MessageRejectedError("a transparent ciphertext: its c1 is zero, and anybody reads it")
    seeds = np.frombuffer(message.seeds, dtype=np.uint8).reshape(count, SEED_BYTES) if seeded else None
    return Ciphertexts(block_rows, seeds, words)


def pack(words: Words, ring: Ring) -> Words:
    """``[..., W]`` words of as many bits as each prime, one after the other: ``[..., W * bits / 64]``.

    The law: ``unpack(pack(w)) == w`` for words below ``2**bits``.
    """
    bits = ring.bits
    groups = np.ascontiguousarray(words.reshape(-1, _GROUP).T)  # one row a place in its group: long vectors
    made = np.zeros((bits, groups.shape[1]), dtype=np.uint64)
    for number, word in enumerate(groups):
        place, shift = divmod(number * bits, 64)
        made[place] |= word << np.uint64(shift)
        if shift + bits > 64:  # noqa: PLR2004 -- a word's bits
            made[place + 1] |= word >> np.uint64(64 - shift)
    return np.ascontiguousarray(made.T).reshape(*words.shape[:-1], -1)


def unpack(packed: Words, ring: Ring) -> Words:
    """What :func:`pack` packed; ``[..., W]``, each below ``2**bits``."""
    bits = ring.bits
    groups = np.ascontiguousarray(packed.reshape(-1, bits).T)
    made = np.empty((_GROUP, groups.shape[1]), dtype=np.uint64)
    for number in range(_GROUP):
        word = made[number]
        place, shift = divmod(number * bits, 64)
        np.right_shift(groups[place], np.uint64(shift), out=word)
        if shift + bits > 64:  # noqa: PLR2004 -- as above
            word |= groups[place + 1] << np.uint64(64 - shift)
        word &= np.uint64(2**bits - 1)
    return np.ascontiguousarray(made.T).reshape(*packed.shape[:-1], -1)
