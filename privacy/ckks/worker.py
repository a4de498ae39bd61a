"""A process that encrypts and decrypts for its parent: ``python -m privacy.ckks.worker``, over its own pipes.

Requests and answers are of one parent alone; their form is a fixed header and raw arrays. The process ends with its
parent's end of the pipe.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import BinaryIO, Final

import numpy as np

from privacy.ckks.pipes import ANSWER, DECRYPT, ENCRYPT, ENCRYPT_REAL, PREPARE, REQUEST, read_exactly
from privacy.ckks.seal import Key
from wire.ciphertexts import RINGS, SQUARE_RINGS, Ring, pack

__all__ = ["main"]


_KEYS: Final = 6  # those of answers that are waited for, and the one that comes next


def _answered(stream: BinaryIO, keys: dict[bytes, Key]) -> bytes | None:
    kind, number, polynomials, count, scale, secret = REQUEST.unpack(read_exactly(stream, REQUEST.size))
    ring = (*RINGS, *SQUARE_RINGS)[number]
    # All of a request is read before anything can fail: the next one begins behind it.
    each = {ENCRYPT: 8 * ring.degree, ENCRYPT_REAL: 4 * ring.degree, DECRYPT: 8 * polynomials * ring.words, PREPARE: 0}
    data = read_exactly(stream, count * each[kind])
    if kind == PREPARE:
        with contextlib.suppress(RuntimeError, ValueError):  # told where the key is used, and fails again
            _key_of(ring, secret, keys)
        return None
    key = _key_of(ring, secret, keys)
    if kind == DECRYPT:
        words = np.frombuffer(data, dtype=np.uint64)
        return key.decrypt(words.reshape(polynomials, count, ring.words), scale).tobytes()
    values = np.frombuffer(data, dtype=np.float64).reshape(count, -1)
    seeds, made = key.encrypt(values if kind == ENCRYPT_REAL else values.view(np.complex128), scale)
    return seeds.tobytes() + pack(made, ring).tobytes()


def _key_of(ring: Ring, secret: bytes, keys: dict[bytes, Key]) -> Key:
    if secret not in keys:
        while len(keys) >= _KEYS:
            keys.pop(next(iter(keys)))
        keys[secret] = Key(ring, secret)
    return keys[secret]


def main() -> None:
    """Answers until the parent hangs up."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    keys: dict[bytes, Key] = {}  # by their secrets, the oldest first
    while True:
        try:
            done, data = True, _answered(requests, keys)
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 -- told to the parent, which raises it
            done, data = False, f"{type(error).__name__}: {error}".encode()
        if data is None:
            continue
        answers.write(ANSWER.pack(done, len(data)))
        answers.write(data)
        answers.flush()


if __name__ == "__main__":
    main()
    sys.exit(0)
