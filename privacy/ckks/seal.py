"""SEAL through TenSEAL's ``sealapi``: one ring, one key, and the bytes of ciphertexts, in memory alone.

A ring of several primes has a last one beside them, which SEAL keeps for evaluation keys and takes away from what it
encrypts. No such key is ever made, so that one is as small as it may be, and only counts in the security level.

``tenseal``'s own vectors and tensors are never used: they read foreign bytes past their buffers, and their contexts
need a chain of primes where one is enough. SEAL's classes read and write files; here those are anonymous memory.

A key is a function of a step's secret: each worker process makes the same one, and none of them is ever written.
Encryption itself draws from the operating system's generator: only the key's own context is seeded.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal
import zstandard

from privacy.ckks.pipes import SECRET_BYTES
from wire.ciphertexts import SEED_BYTES, Ring, Words

__all__ = ["Key", "Slots"]

Slots: TypeAlias = npt.NDArray[np.complex128] | npt.NDArray[np.float64]

# A saved ciphertext, uncompressed: parms_id, NTT form, sizes, scale, correction factor; then an array with a header.
_SIZE_AT: Final = 33
_SCALE_AT: Final = 57
_ARRAY_AT: Final = 81  # the array's bytes, with its header; then how many words
_ARRAY_HEADER: Final = 24
_PREFIX: Final = 97
_SEED_TRAILER: Final = 81  # a generator's type and seed, with a header of its own
_HEADER: Final = struct.Struct("<HBBBBHQ")  # magic, its own size, version (2), compression, reserved, whole size
_MAX_FILE: Final = 2**20  # two polynomials of the largest ring, twice


class Key:
    """One secret key of one ring, at work. For one thread."""

    def __init__(self, ring: Ring, secret: bytes) -> None:
        """Derives the key from ``secret`` (64 random bytes).

        Raises:
            RuntimeError: this build of SEAL has other primes, or writes another format than this module reads.
        """
        self._ring = ring
        context, self._encoder, self._file = _shared(ring)
        self._context = context
        key = seal.KeyGenerator(_context(ring, secret)).secret_key()
        self._encryptor, self._decryptor = seal.Encryptor(context, key), seal.Decryptor(context, key)
        self._plain, self._cipher = seal.Plaintext(), seal.Ciphertext()
        self._path = f"/proc/self/fd/{self._file}"
        if ring not in _TEMPLATES:
            _TEMPLATES[ring] = self._made_template()
        self._template = _TEMPLATES[ring]

    def encrypt(self, slots: Slots, scale: float) -> tuple[npt.NDArray[np.uint8], Words]:
        """Encrypts each row under the key; symmetric, with seeds.

        Args:
            slots: complex128 or float64 [C, N / 2].
            scale: by which they are multiplied before they are rounded.

        Returns:
            The seeds, uint8 [C, 64], and c0, uint64 [C, W].
        """
        seeds = np.empty((len(slots), SEED_BYTES), dtype=np.uint8)
        words = np.empty((len(slots), self._ring.words), dtype=np.uint64)
        for number, row in enumerate(slots):
            self._encoder.encode(row.tolist(), scale, self._plain)
            self._encryptor.encrypt_symmetric(self._plain).save(self._path)
            raw = self._raw(_PREFIX + words[number].nbytes + _SEED_TRAILER)
            words[number] = np.frombuffer(raw, dtype="<u8", count=self._ring.words, offset=_PREFIX)
            seeds[number] = np.frombuffer(raw, dtype=np.uint8, offset=len(raw) - SEED_BYTES)
        return seeds, words

    def decrypt(self, words: Words, scale: float) -> npt.NDArray[np.complex128]:
        """What ciphertexts hold; nobody knows yet who made them.

        Args:
            words: uint64 [P, C, W], each below its prime; P is 2, or 3 for products.
            scale: of what they hold.

        Returns:
            complex128 [C, N / 2].
        """
        made = np.empty((words.shape[1], self._ring.degree // 2), dtype=np.complex128)
        template = self._header_of(len(words), scale)
        for number in range(words.shape[1]):
            data = np.ascontiguousarray(words[:, number], dtype="<u8").tobytes()
            os.ftruncate(self._file, 0)
            os.pwritev(self._file, [template, data], 0)
            self._cipher.load(self._context, self._path)
            self._decryptor.decrypt(self._cipher, self._plain)
            made[number] = self._encoder.decode_complex(self._plain)
        return made

    def _header_of(self, polynomials: int, scale: float) -> bytearray:
        """What stands before the words of a ciphertext of as many polynomials."""
        made, words = bytearray(self._template), polynomials * self._ring.words
        size = len(made) + 8 * words
        made[: _HEADER.size] = _HEADER.pack(*_HEADER.unpack_from(made)[:-1], size)
        struct.pack_into("<Q", made, _HEADER.size + _SIZE_AT, polynomials)
        struct.pack_into("<d", made, _HEADER.size + _SCALE_AT, scale)
        struct.pack_into("<QQ", made, _HEADER.size + _ARRAY_AT, _ARRAY_HEADER + 8 * words, words)
        return made

    def _made_template(self) -> bytes:
        """Header and prefix of an uncompressed ciphertext of two polynomials, as this build of SEAL writes them."""
        self._encoder.encode(0.5, 1.0, self._plain)
        self._encryptor.encrypt_symmetric(self._plain, self._cipher)
        self._cipher.save(self._path)
        size = _PREFIX + 16 * self._ring.words
        raw, header = self._raw(size), _HEADER.unpack(os.pread(self._file, _HEADER.size, 0))
        return _HEADER.pack(*header[:4], 0, 0, _HEADER.size + size) + raw[:_PREFIX]

    def _raw(self, size: int) -> bytes:
        """What was saved last, without compression."""
        saved = os.pread(self._file, _MAX_FILE, 0)
        raw = zstandard.ZstdDecompressor().decompress(saved[_HEADER.size :], max_output_size=size)
        if len(raw) != size:
            raise RuntimeError(f"SEAL wrote {len(raw)} bytes where {size} were expected: another version of tenseal?")
        return raw


_TEMPLATES: Final[dict[Ring, bytes]] = {}


@cache  # there are a few rings; a file would stay open
def _shared(ring: Ring) -> tuple[Any, Any, int]:
    """What all keys of a ring have in common, made once: a context, its encoder, and a file of memory."""
    context = _context(ring)
    return context, seal.CKKSEncoder(context), os.memfd_create("cloister-ckks", os.MFD_CLOEXEC)


def _context(ring: Ring, secret: bytes | None = None) -> Any:  # noqa: ANN401 -- a class without types
    """SEAL's context; with ``secret``, one whose generator is seeded, which only makes the key."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(ring.degree)
    expected = [*ring.moduli, *([ring.reserved] if ring.reserved > 1 else [])]
    primes = seal.CoeffModulus.Create(ring.degree, [prime.bit_length() for prime in expected])
    parameters.set_coeff_modulus(primes)
    if secret is not None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes; {SECRET_BYTES}")
        parameters.set_random_generator(seal.Blake2xbPRNGFactory(list(struct.unpack("<8Q", secret))))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if [prime.value() for prime in primes] != expected or not context.parameters_set():
        raise RuntimeError("this build of SEAL has other primes, or refuses these parameters")
    return context
