"""Tensors to bytes and back, strictly.

A :class:`~protos.tensor_pb2.Tensor` is a typed header (dtype, codec, shape) and raw little-endian bytes, element after
element in C order. The law is ``decode(encode(t)) == t`` to the bit, NaN payloads included.

Decoding copies nothing: the tensor reads the message's own bytes, so it must not be written to. Its memory need not be
aligned to more than 16 bytes, and kernels may pick another path (and other last bits) by alignment; whoever computes
with it for numbers that must repeat takes :func:`owned` of it first, one copy into torch's own memory.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Final

import torch

from protos import tensor_pb2
from wire.errors import LimitExceededError, NonFiniteError, TensorRejectedError
from wire.messages import delimited

__all__ = [
    "DTYPES",
    "FRAME_DTYPES",
    "MAX_RANK",
    "MAX_TENSOR_BYTES",
    "check_finite",
    "decode",
    "dtype_number",
    "encode",
    "encode_into",
    "encode_parts",
    "is_absent",
    "owned",
    "payload_bytes",
    "raw_bytes",
]

if sys.byteorder != "little":
    raise ImportError("cloister reads and writes little-endian tensors in place; this machine is big-endian")

MAX_TENSOR_BYTES: Final = 256 * 2**20  # the largest ViT-H cut at batch 64 in fp32, doubled
MAX_RANK: Final = 8  # video batches have 5 dimensions, attention scores with groups 6
_MAX_SIZE: Final = 2**40  # any larger dimension is a lie whatever its dtype

DTYPES: Final[dict[int, torch.dtype]] = {
    tensor_pb2.D_TYPE_FLOAT32: torch.float32,
    tensor_pb2.D_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.D_TYPE_FLOAT16: torch.float16,
    tensor_pb2.D_TYPE_INT8: torch.int8,
    tensor_pb2.D_TYPE_INT64: torch.int64,
    tensor_pb2.D_TYPE_BOOL: torch.bool,
    tensor_pb2.D_TYPE_FLOAT64: torch.float64,
    tensor_pb2.D_TYPE_INT32: torch.int32,
    tensor_pb2.D_TYPE_UINT8: torch.uint8,
    tensor_pb2.D_TYPE_INT16: torch.int16,
}
#: What a frame may carry; the rest stands in programs and weights only.
FRAME_DTYPES: Final = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool},
)
_NUMBERS: Final = {dtype: number for number, dtype in DTYPES.items()}

with warnings.catch_warnings():
    # torch warns once a process that the buffer is read-only, which is the point: let that once be now.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def dtype_number(dtype: torch.dtype) -> tensor_pb2.DType.ValueType:
    """The wire's number of ``dtype``.

    Raises:
        TensorRejectedError: the wire has no such dtype.
    """
    number = _NUMBERS.get(dtype)
    if number is None:
        raise TensorRejectedError(f"tensors of {dtype} do not travel; use one of {sorted(map(str, _NUMBERS))}")
    return number  # type: ignore[return-value]  # the stubs type enum constants as a NewType over int


def encode(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """``tensor``, from whatever device and layout, as a message.

    Raises:
        TensorRejectedError: its dtype does not travel in frames.
    """
    message = tensor_pb2.Tensor()
    encode_into(message, tensor)
    return message


def encode_into(message: tensor_pb2.Tensor, tensor: torch.Tensor) -> None:
    """Fills ``message``, an empty part of a larger one, with ``tensor``: a message that is put into another is copied.

    Raises:
        TensorRejectedError: its dtype does not travel in frames.
    """
    message.data = bytes(_fill_header(message, tensor))


def encode_parts(tensor: torch.Tensor) -> list[bytes | memoryview]:
    """The message of ``tensor`` as pieces to be joined; the last one is the tensor's own memory, if it is on the CPU.

    Raises:
        TensorRejectedError: its dtype does not travel in frames.
    """
    header = tensor_pb2.Tensor()
    data = _fill_header(header, tensor)
    return [header.SerializeToString(), *delimited(tensor_pb2.Tensor.DATA_FIELD_NUMBER, [data])]


def _fill_header(message: tensor_pb2.Tensor, tensor: torch.Tensor) -> memoryview:
    """Everything but the data, which is returned."""
    dtype = tensor.dtype
    if dtype not in FRAME_DTYPES:
        raise TensorRejectedError(f"frames carry no {dtype}; use one of {sorted(map(str, FRAME_DTYPES))}")
    message.dtype = _NUMBERS[dtype]  # type: ignore[assignment]  # as above
    message.codec = tensor_pb2.CODEC_RAW
    message.shape.extend(tensor.shape)
    return raw_bytes(tensor)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of ``tensor`` one after another in C order, little-endian; its own memory, if that is such."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    if plain.numel() == 1:  # contiguous whatever its stride, but seen as bytes only with a stride of 1
        plain = plain.clone(memory_format=torch.contiguous_format)
    data: memoryview = plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")
    return data


def is_absent(message: tensor_pb2.Tensor) -> bool:
    """Whether ``message`` stands for no gradient at all."""
    return not (message.dtype or message.codec or message.shape or message.data)


def decode(message: tensor_pb2.Tensor, *, max_bytes: int = MAX_TENSOR_BYTES) -> torch.Tensor:
    """The tensor of ``message``, reading the message's bytes in place; never write to it.

    Raises:
        TensorRejectedError: the header is not one of ours, or its claim differs from the bytes that came.
        LimitExceededError: the header claims more than ``max_bytes``.
    """
    dtype = DTYPES.get(message.dtype)
    if dtype is None or dtype not in FRAME_DTYPES:
        raise TensorRejectedError(f"unknown dtype {message.dtype} in a tensor's header")
    if message.codec != tensor_pb2.CODEC_RAW:
        raise TensorRejectedError(f"unknown codec {message.codec} in a tensor's header")
    shape = tuple(message.shape)
    if len(shape) > MAX_RANK:
        raise TensorRejectedError(f"a tensor of {len(shape)} dimensions; at most {MAX_RANK}")
    if any(size > _MAX_SIZE for size in shape):
        raise TensorRejectedError(f"a dimension of {max(shape)}; at most {_MAX_SIZE}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > max_bytes:
        raise LimitExceededError(f"a tensor of {claimed} bytes; the limit is {max_bytes}")
    data = message.data
    if claimed != len(data):
        raise TensorRejectedError(f"a header that claims {claimed} bytes before {len(data)} bytes of data")
    if claimed == 0:
        # Strides are products of the other dimensions, and torch counts them in 64 bits.
        if math.prod(max(size, 1) for size in shape) > _MAX_SIZE:
            raise TensorRejectedError(f"an empty tensor whose other dimensions multiply to more than {_MAX_SIZE}")
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool and data.translate(None, b"\0\1"):
        raise TensorRejectedError("a boolean tensor with bytes other than 0 and 1")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def owned(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A copy of a decoded tensor in memory of torch's own (aligned, writable), on ``device``."""
    if device is not None and device.type != "cpu":
        return tensor.to(device)
    return tensor.clone()


def payload_bytes(messages: Iterable[tensor_pb2.Tensor]) -> int:
    """The bytes of data in ``messages``, by their headers: asking the messages themselves would copy them.

    A header that :func:`decode` refuses for its claim counts nothing.
    """
    return sum(_claimed_bytes(m) for m in messages)


def _claimed_bytes(message: tensor_pb2.Tensor) -> int:
    dtype = DTYPES.get(message.dtype)
    if dtype is None or len(message.shape) > MAX_RANK:
        return 0
    claimed = math.prod(message.shape) * dtype.itemsize
    return claimed if claimed <= MAX_TENSOR_BYTES else 0


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Refuses NaN and Inf (T06).

    Raises:
        NonFiniteError: naming ``what`` and how many elements.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # A finite sum proves finite terms, and is several times cheaper than looking at each; the sum alone may overflow.
    if math.isfinite(tensor.sum(dtype=torch.float32 if tensor.itemsize < 4 else None).item()):  # noqa: PLR2004
        return
    bad = int((~torch.isfinite(tensor)).sum().item())
    if bad:
        raise NonFiniteError(
            f"{what}: {bad} of {tensor.numel()} elements are NaN or Inf; the training diverged "
            "(lower the learning rate, clip gradients), the data held NaN, or the peer sends poison",
        )
