"""Expands the seeds of ciphertexts as SEAL does: public randomness, of which every reader makes the same words.

A symmetric ciphertext's c1 is uniform and public; its maker keeps the seed of it, and whoever computes with it expands
that again. SEAL draws 64-bit words from BLAKE2Xb (Aumasson et al. 2016) in buffers of 4096 bytes, as many as a
polynomial has, N for each prime in turn; it replaces those above the largest multiple of their prime by later ones, and
reduces them. hashlib does the keyed root hash of each buffer; its tree parameters do not reach depth 0, which the
expansion's leaves have, so their one compression each (RFC 7693, section 3.2) is done here for all of them at once. No
secret passes through it: an error would make wrong results, which their owner notices.

Shapes: ``C`` seeds, ``W`` words each: N for each prime.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from wire.ciphertexts import Ring, Words

__all__ = ["expand"]

_BUFFER: Final = 4096  # bytes that SEAL draws at a time
_LEAF: Final = 64
_ROUNDS: Final = 12
_AT_ONCE: Final = 4096  # leaves: their states stay in the second-level cache
_MOST: Final = 2**64 - 1

_IV: Final = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
# The message schedule (RFC 7693, section 2.7); rounds 10 and 11 repeat the first two.
_SIGMA: Final = tuple(
    tuple(int(digit, 16) for digit in line)
    for line in (
        "0123456789abcdef",
        "ea489fd61c02b753",
        "b8c052fdae367194",
        "7931dcbe265a40f8",
        "905724afe1bc683d",
        "2c6a0b834d75fe19",
        "c51fed4a0763928b",
        "db7ec13950f4862a",
        "6fe9b308c2d714a5",
        "a2847615fb9e3cd0",
        "0123456789abcdef",
        "ea489fd61c02b753",
    )
)
# Which words of the message each half of each G adds, and where; the rest of a leaf's block is padding, all zero.
_ADDED: Final = tuple(
    tuple(
        tuple(
            tuple((place, word) for place, word in enumerate(schedule[start + half : start + 8 : 2]) if word < 8)  # noqa: PLR2004
            for half in range(2)
        )
        for start in (0, 8)
    )
    for schedule in _SIGMA
)


def expand(seeds: npt.NDArray[np.uint8], ring: Ring) -> Words:
    """The words of ``C`` polynomials.

    Args:
        seeds: uint8 [C, 64].
        ring: how many words each, and below which primes.

    Returns:
        uint64 [C, W], uniform below the primes.
    """
    wanted = 8 * ring.words // _BUFFER
    drawn = _buffers([(seed.tobytes(), counter) for seed in seeds for counter in range(wanted)])
    words = drawn.reshape(len(seeds), ring.words)
    # As SEAL counts: the largest multiple of the prime that 64 bits hold, but for one.
    bounds = np.repeat(np.array([_MOST - _MOST % q - 1 for q in ring.moduli], dtype=np.uint64), ring.degree)
    for number in np.nonzero((words >= bounds).any(axis=1))[0]:  # once in ten thousand steps
        words[number] = _replaced(seeds[number].tobytes(), words[number], bounds, wanted)
    for part, place in ring.parts():
        words[:, place] %= np.uint64(part.modulus)
    return words


def _replaced(seed: bytes, words: Words, bounds: Words, counter: int) -> Words:
    """The words of one polynomial, those refused replaced in turn by what the generator draws next."""
    made = words.copy()
    later: list[int] = []
    for place in np.nonzero(words >= bounds)[0]:
        value = _MOST
        while value >= int(bounds[place]):
            if not later:
                later = _buffers([(seed, counter)])[0].tolist()[::-1]
                counter += 1
            value = later.pop()
        made[place] = value
    return made


def _buffers(wanted: list[tuple[bytes, int]]) -> Words:
    """Of each (seed, counter) SEAL's buffer: uint64 [len(wanted), 512]."""
    roots = b"".join(
        hashlib.blake2b(counter.to_bytes(8, "little"), key=seed, node_offset=_BUFFER << 32).digest()
        for seed, counter in wanted
    )
    leaves = _BUFFER // _LEAF
    messages = np.repeat(np.frombuffer(roots, dtype="<u8").reshape(-1, 8), leaves, axis=0)
    offsets = np.tile(np.arange(leaves, dtype=np.uint64), len(wanted))
    made = np.empty((len(messages), 8), dtype=np.uint64)
    for start in range(0, len(messages), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        made[piece] = _compressed(np.ascontiguousarray(messages[piece].T), offsets[piece]).T
    return made.reshape(len(wanted), -1)


def _compressed(message_8L: Words, offsets_L: Words) -> Words:
    """One compression of each leaf: a root of 64 bytes, hashed at its place in the expansion; uint64 [8, L]."""
    count = message_8L.shape[1]
    # Parameters of a leaf: digests of 64 bytes, fanout and depth 0, leaves of 64; its number; inner digests of 64.
    head = np.empty((8, count), dtype=np.uint64)
    head[:] = np.array(_IV, dtype=np.uint64)[:, None]
    head[0] ^= np.uint64(_LEAF | _LEAF << 32)
    head[1] ^= offsets_L | np.uint64(_BUFFER << 32)
    head[2] ^= np.uint64(_LEAF << 8)
    state = np.empty((16, count), dtype=np.uint64)
    state[:8] = head
    state[8:] = np.array(_IV, dtype=np.uint64)[:, None]
    state[12] ^= np.uint64(_LEAF)  # bytes so far
    state[14] ^= np.uint64(_MOST)  # the last block
    a, b, c, d = (state[4 * n : 4 * n + 4] for n in range(4))
    diagonal_b, diagonal_c, diagonal_d = np.empty((3, 4, count), dtype=np.uint64)
    turns = ((b, diagonal_b, 1), (c, diagonal_c, 2), (d, diagonal_d, 3))
    spare = np.empty((4, count), dtype=np.uint64)
    for columns, diagonals in _ADDED:
        _mix((a, b, c, d), columns, message_8L, spare)
        for rows, turned, by in turns:
            turned[: 4 - by], turned[4 - by :] = rows[by:], rows[:by]
        _mix((a, diagonal_b, diagonal_c, diagonal_d), diagonals, message_8L, spare)
        for rows, turned, by in turns:
            rows[by:], rows[:by] = turned[: 4 - by], turned[4 - by :]
    made: Words = head ^ state[:8] ^ state[8:]
    return made


def _mix(
    state: tuple[Words, Words, Words, Words],
    added: tuple[tuple[tuple[int, int], ...], ...],
    message_8L: Words,
    spare: Words,
) -> None:
    """The function G on four columns (or diagonals) of all states at once, in place."""
    a, b, c, d = state
    for words, first, second in ((added[0], 32, 24), (added[1], 16, 63)):
        a += b
        for place, word in words:
            a[place] += message_8L[word]
        d ^= a
        _rotate(d, first, spare)
        c += d
        b ^= c
        _rotate(b, second, spare)


def _rotate(words: Words, by: int, spare: Words) -> None:
    np.left_shift(words, np.uint64(64 - by), out=spare)
    np.right_shift(words, np.uint64(by), out=words)
    words |= spare
