"""What an owner's process and those that encrypt for it say to each other."""

from __future__ import annotations

import struct
from typing import BinaryIO, Final

__all__ = ["ANSWER", "DECRYPT", "ENCRYPT", "ENCRYPT_REAL", "PREPARE", "REQUEST", "SECRET_BYTES", "read_exactly"]

SECRET_BYTES: Final = 64  # of which SEAL makes a key
ENCRYPT: Final = 1
DECRYPT: Final = 2
ENCRYPT_REAL: Final = 3
PREPARE: Final = 4  # makes the key that comes next, and answers nothing
#: What to do, the ring's number, polynomials of each ciphertext, how many of these, the scale, and the step's secret;
#: then the array.
REQUEST: Final = struct.Struct(f"<BBBId{SECRET_BYTES}s")
#: Whether it was done, and the bytes that follow: the result, or what went wrong.
ANSWER: Final = struct.Struct("<?Q")


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """Raises: EOFError where the other side is gone."""
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data
