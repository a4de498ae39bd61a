"""A middle's tensors as bytes: safetensors, never pickle, under names that tell state from optimizer state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from wire.codec import raw_bytes
from wire.errors import StateRejectedError

__all__ = [
    "CHUNK_BYTES",
    "MAX_HEADER_BYTES",
    "OPTIMIZER_PREFIX",
    "ROWS_PREFIX",
    "STATE_PREFIX",
    "chunks",
    "dump_state",
    "gather",
    "load_state",
    "rows_of",
    "sha256",
    "split_state",
    "tensor_digest",
]

STATE_PREFIX: Final = "state/"
OPTIMIZER_PREFIX: Final = "optimizer/"
ROWS_PREFIX: Final = "rows/"  # a table that frames name rows of
# A tensor takes some 100 bytes of the header and some 1,300 of memory, even an empty one; safetensors reads 100 MB.
MAX_HEADER_BYTES: Final = 4 * 2**20
_LENGTH_BYTES: Final = 8
CHUNK_BYTES: Final = 4 * 2**20  # large enough to fill a fast link, small enough to share it


def dump_state(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """``tensors`` as safetensors bytes."""
    return safetensors.torch.save({name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()})


def load_state(data: bytes, *, header_bytes: int = MAX_HEADER_BYTES) -> dict[str, torch.Tensor]:
    """The tensors of ``data``, which may be anybody's; the caller has bounded its length.

    Args:
        data: a safetensors file: its header's length in 8 bytes, the header, the tensors' own bytes.
        header_bytes: the longest header that is read, where the caller knows which tensors there should be.

    Raises:
        StateRejectedError: not safetensors, a longer header, or a boolean that is neither 0 nor 1.
    """
    announced = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if announced > header_bytes:
        raise StateRejectedError(f"the state's header holds {announced} bytes; at most {header_bytes} are read")
    try:
        # Unlike torch's own files nothing in these can run: a JSON header, bounded above, and raw bytes, whose places
        # the library checks against the file's length before it makes a tensor.
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise StateRejectedError("the state's bytes are not safetensors") from error
    for name, tensor in tensors.items():
        # Kernels may do anything with another byte.
        if tensor.dtype is torch.bool and tensor.view(torch.uint8).gt(1).any():
            raise StateRejectedError(f"{name[:80]!r} holds bytes other than 0 and 1 as booleans")
    return tensors


def split_state(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The middle's own tensors and its optimizer's, without their prefixes; :func:`rows_of` gives a table's.

    Raises:
        StateRejectedError: a name under no prefix of these.
    """
    state, optimizer = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(STATE_PREFIX):
            state[name.removeprefix(STATE_PREFIX)] = tensor
        elif name.startswith(OPTIMIZER_PREFIX):
            optimizer[name.removeprefix(OPTIMIZER_PREFIX)] = tensor
        elif not name.startswith(ROWS_PREFIX):
            raise StateRejectedError(f"a tensor called {name[:80]!r}, which is no state")
    return state, optimizer


def rows_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The table's tensors among a session's, without their prefix: ``"0"`` and perhaps ``"labels"``."""
    return {n.removeprefix(ROWS_PREFIX): t for n, t in tensors.items() if n.startswith(ROWS_PREFIX)}


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """32 bytes: SHA-256 over dtype, shape and little-endian content, as ``TensorDigest`` in the wire contract says."""
    shape = ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
    digest.update(raw_bytes(tensor))
    return digest.digest()


def sha256(data: bytes) -> bytes:
    """32 bytes."""
    return hashlib.sha256(data).digest()


def chunks(data: bytes, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """``data`` in pieces of at most ``size`` bytes."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def gather(pieces: Iterable[bytes], size: int, digest: bytes, what: str) -> bytes:
    """The bytes of ``pieces``, which must be ``size`` long and hash to ``digest``; stops at the first byte too many.

    Raises:
        StateRejectedError: saying what came instead.
    """
    whole = bytearray()
    for piece in pieces:
        if len(whole) + len(piece) > size:
            raise StateRejectedError(f"more than the {size} bytes of {what} that were announced")
        whole += piece
    if len(whole) != size:
        raise StateRejectedError(f"{len(whole)} bytes of {what} where {size} were announced")
    data = bytes(whole)
    if sha256(data) != digest:
        raise StateRejectedError(f"the bytes of {what} do not hash to what was announced")
    return data
