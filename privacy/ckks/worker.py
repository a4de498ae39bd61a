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

from privacy.ckks.pipes import ANSWER, DECRYPT, ENCRYPT, PREPARE, REQUEST, read_exactly
from privacy.ckks.seal import Key
from wire.ciphertexts import RINGS, Ring, pack

__all__ = ["main"]


_KEYS: Final = 2  # the one at work, and the one that comes next


def _answered(stream: BinaryIO, keys: dict[bytes, Key]) -> bytes | None:
    kind, number, count, scale, secret = REQUEST.unpack(read_exactly(stream, REQUEST.size))
    ring = RINGS[number]
    # All of a request is read before anything can fail: the next one begins behind it.
    data = read_exactly(stream, count * {ENCRYPT: 8, DECRYPT: 16, PREPARE: 0}[kind] * ring.degree)
    if kind == PREPARE:
        with contextlib.suppress(RuntimeError, ValueError):  # told where the key is used, and fails again
            _key_of(ring, secret, keys)
        return None
    key = _key_of(ring, secret, keys)
    if kind == ENCRYPT:
        seeds, words = key.encrypt(np.frombuffer(data, dtype=np.complex128).reshape(count, -1), scale)
        return seeds.tobytes() + pack(words, ring).tobytes()
    return key.decrypt(np.frombuffer(data, dtype=np.uint64).reshape(2, count, ring.degree), scale).tobytes()


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
