"""A process that encrypts and decrypts for its parent: ``python -m privacy.ckks.worker``, over its own pipes.

Requests and answers are of one parent alone; their form is a fixed header and raw arrays. The process ends with its
parent's end of the pipe.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import numpy as np

from privacy.ckks.pipes import ANSWER, DECRYPT, ENCRYPT_REAL, REQUEST, read_exactly
from privacy.ckks.seal import Key
from wire.ciphertexts import RINGS, SQUARE_RINGS, pack

__all__ = ["main"]


def _answered(stream: BinaryIO, keys: dict[bytes, Key]) -> bytes:
    kind, number, polynomials, count, scale, secret = REQUEST.unpack(read_exactly(stream, REQUEST.size))
    ring = (*RINGS, *SQUARE_RINGS)[number]
    if secret not in keys:
        for old in list(keys):
            keys.pop(old).close()
        keys[secret] = Key(ring, secret)
    key = keys[secret]
    if kind == DECRYPT:
        words = np.frombuffer(read_exactly(stream, 8 * polynomials * ring.words * count), dtype=np.uint64)
        return key.decrypt(words.reshape(polynomials, count, ring.words), scale).tobytes()
    dtype = np.dtype(np.float64 if kind == ENCRYPT_REAL else np.complex128)
    slots = np.frombuffer(read_exactly(stream, dtype.itemsize * ring.degree // 2 * count), dtype=dtype)
    seeds, made = key.encrypt(slots.reshape(count, -1), scale)
    return seeds.tobytes() + pack(made, ring).tobytes()


def main() -> None:
    """Answers until the parent hangs up."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    keys: dict[bytes, Key] = {}  # of the step at hand, and no other
    while True:
        try:
            done, data = True, _answered(requests, keys)
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 -- told to the parent, which raises it
            done, data = False, f"{type(error).__name__}: {error}".encode()
        answers.write(ANSWER.pack(done, len(data)))
        answers.write(data)
        answers.flush()


if __name__ == "__main__":
    main()
    sys.exit(0)
