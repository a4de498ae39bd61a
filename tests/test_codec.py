"""Tensors survive the wire to the bit, and a header that lies is found out before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protos import tensor_pb2
from wire.codec import (
    DTYPES,
    FRAME_DTYPES,
    MAX_TENSOR_BYTES,
    check_finite,
    decode,
    dtype_number,
    encode,
    encode_into,
    owned,
    payload_bytes,
)
from wire.errors import LimitExceededError, NonFiniteError, TensorRejectedError

FRAMES: Final = sorted(FRAME_DTYPES, key=str)
FLOATS: Final = [torch.float32, torch.bfloat16, torch.float16]
F32: Final = tensor_pb2.D_TYPE_FLOAT32


def bits(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and bits(a) == bits(b)


def header(
    shape: tuple[int, ...] = (2,),
    data: bytes = bytes(8),
    dtype: int = F32,
    codec: int = tensor_pb2.CODEC_RAW,
) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, codec=codec, shape=shape, data=data)  # type: ignore[arg-type]  # lies too


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any shape and layout, of any dtype that a frame carries."""
    dtype = draw(st.sampled_from(FRAMES))
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    count = torch.Size(shape).numel()
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        raw = bytes(b & 1 for b in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    match draw(st.integers(0, 3)):
        case 1 if shape:
            tensor = tensor.transpose(0, len(shape) - 1)
        case 2 if shape:
            tensor = tensor[::2]
        case 3:
            tensor = tensor.unsqueeze(0).expand(2, *shape)
    return tensor


# --- The law ----------------------------------------------------------------------------------------------------------


@given(tensors())
@settings(max_examples=300, deadline=None)
def test_decoding_what_was_encoded_gives_the_same_bits(tensor: Tensor) -> None:
    sent = tensor_pb2.Tensor.FromString(encode(tensor).SerializeToString())

    assert same(decode(sent), tensor)
    assert same(owned(decode(sent)), tensor)
    assert payload_bytes([sent]) == tensor.numel() * tensor.itemsize


@pytest.mark.parametrize("dtype", FRAMES, ids=str)
def test_tensors_without_dimensions_and_without_elements_survive(dtype: torch.dtype) -> None:
    for tensor in (torch.ones((), dtype=dtype), torch.ones(0, dtype=dtype), torch.ones(3, 0, 2, dtype=dtype)):
        assert same(decode(encode(tensor)), tensor)


def test_the_payload_of_a_nan_survives() -> None:
    tensor = torch.frombuffer(
        bytearray(struct.pack("<4I", 0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000)), dtype=torch.float32
    )

    assert same(decode(encode(tensor)), tensor)


@pytest.mark.parametrize("dtype", FRAMES, ids=str)
def test_a_tensor_travels_as_little_endian_elements_in_row_order(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0], [0, 1]], dtype=dtype).t()

    message = encode(tensor)

    one = {torch.float32: "0000803f", torch.bfloat16: "803f", torch.float16: "003c"}.get(dtype)
    unit = bytes.fromhex(one) if one else (1).to_bytes(dtype.itemsize, "little")
    assert message.data == unit + bytes(2 * dtype.itemsize) + unit
    assert list(message.shape) == [2, 2]


def test_a_tensor_that_requires_a_gradient_travels_without_it() -> None:
    tensor = torch.randn(3, requires_grad=True)

    assert same(decode(encode(tensor)), tensor)


def test_filling_a_part_of_a_message_gives_the_same_as_encoding() -> None:
    tensor, part = torch.randn(2, 3), tensor_pb2.Tensor()

    encode_into(part, tensor)

    assert part == encode(tensor)


def test_decoding_copies_nothing_and_owning_copies_everything() -> None:
    message = encode(torch.zeros(2**20))

    tracemalloc.start()
    view = decode(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    mine = owned(view)
    mine.add_(1)

    assert peak < 2**20 * 4 + 100_000  # the message hands its bytes out once
    assert mine.data_ptr() != view.data_ptr()
    assert float(view.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.int16, torch.complex64], ids=str)
def test_a_dtype_that_frames_do_not_carry_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(TensorRejectedError, match=str(dtype)):
        encode(torch.zeros(2, dtype=dtype))


def test_every_number_of_a_dtype_is_its_own() -> None:
    assert [dtype_number(dtype) for dtype in DTYPES.values()] == list(DTYPES)
    with pytest.raises(TensorRejectedError, match=r"torch\.complex64"):
        dtype_number(torch.complex64)


# --- Headers that lie -------------------------------------------------------------------------------------------------

LIES: dict[str, tuple[tensor_pb2.Tensor, type[Exception], str]] = {
    "fewer_bytes_than_claimed": (header(data=bytes(7)), TensorRejectedError, "claims 8 bytes before 7"),
    "more_bytes_than_claimed": (header(data=bytes(9)), TensorRejectedError, "claims 8 bytes before 9"),
    "bytes_for_nothing": (header((0,), bytes(1)), TensorRejectedError, "claims 0 bytes before 1"),
    "nothing_for_a_scalar": (header((), b""), TensorRejectedError, "claims 4 bytes before 0"),
    "ten_gigabytes": (header((10 * 2**30,)), LimitExceededError, "the limit is"),
    "ten_gigabytes_in_two_dimensions": (header((2**17, 2**17)), LimitExceededError, "the limit is"),
    "a_product_that_overflows": (header((2**40, 2**40)), LimitExceededError, "the limit is"),
    "a_product_that_overflows_to_eight": (header((2**33, 2**31 + 1)), LimitExceededError, "the limit is"),
    "a_size_beyond_any": (header((2**40 + 1,)), TensorRejectedError, "a dimension of"),
    "the_largest_size": (header((2**64 - 1,)), TensorRejectedError, "a dimension of"),
    "the_largest_size_of_nothing": (header((0, 2**64 - 1), b""), TensorRejectedError, "a dimension of"),
    "nothing_of_an_overflowing_shape": (header((0, 2**40, 2**40), b""), TensorRejectedError, "empty tensor"),
    "nothing_of_an_overflowing_shape_before": (header((2**40, 2**40, 0), b""), TensorRejectedError, "empty tensor"),
    "nine_dimensions": (header((1,) * 9, bytes(4)), TensorRejectedError, "9 dimensions"),
    "a_million_dimensions": (header((1,) * 10**6, bytes(4)), TensorRejectedError, "1000000 dimensions"),
    "no_dtype": (header(dtype=0), TensorRejectedError, "unknown dtype 0"),
    "an_unknown_dtype": (header(dtype=99), TensorRejectedError, "unknown dtype 99"),
    "a_negative_dtype": (header(dtype=-1), TensorRejectedError, "unknown dtype -1"),
    "a_dtype_of_programs_alone": (header((1,), dtype=tensor_pb2.D_TYPE_FLOAT64), TensorRejectedError, "dtype 7"),
    "no_codec": (header(codec=0), TensorRejectedError, "unknown codec 0"),
    "an_unknown_codec": (header(codec=2), TensorRejectedError, "unknown codec 2"),
    "an_empty_message": (tensor_pb2.Tensor(), TensorRejectedError, "unknown dtype 0"),
    "a_boolean_of_two": (header((3,), b"\0\1\2", tensor_pb2.D_TYPE_BOOL), TensorRejectedError, "0 and 1"),
    "a_boolean_of_255": (header((1,), b"\xff", tensor_pb2.D_TYPE_BOOL), TensorRejectedError, "0 and 1"),
}


@pytest.mark.parametrize("name", LIES)
def test_T02_a_header_that_lies_is_refused_and_nothing_is_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message, kind, complaint = LIES[name]
    for maker in ("empty", "zeros", "frombuffer"):
        monkeypatch.setattr(torch, maker, lambda *_, **__: pytest.fail("memory was taken"))

    with pytest.raises(kind, match=complaint) as caught:
        decode(message)

    assert len(str(caught.value)) < 200


def test_T02_the_limit_is_the_callers_own() -> None:
    message = encode(torch.zeros(10))

    assert decode(message, max_bytes=40).shape == (10,)
    with pytest.raises(LimitExceededError, match="40 bytes; the limit is 39"):
        decode(message, max_bytes=39)


@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 4), max_size=10),
    st.binary(max_size=64),
    st.integers(-5, 20),
    st.integers(-1, 3),
)
@settings(max_examples=300, deadline=None)
def test_T02_T06_any_header_over_any_bytes_is_a_tensor_or_refused(
    shape: list[int], data: bytes, dtype: int, codec: int
) -> None:
    message = header(tuple(shape), data, dtype, codec)

    assert 0 <= payload_bytes([message]) <= MAX_TENSOR_BYTES
    try:
        tensor = decode(message)
    except (TensorRejectedError, LimitExceededError):
        return
    assert bits(tensor) == data
    assert list(tensor.shape) == shape


def test_T02_a_lie_counts_nothing_among_the_bytes_that_came() -> None:
    lies = [header((2**63,) * 8), header((2**63,) * 100_000), header((10 * 2**30,)), header(dtype=99)]

    assert payload_bytes([*lies, header((3,))]) == 12


# --- Poison -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("place", [0, 500, 999])
def test_T06_one_poisoned_element_is_found_wherever_it_is(dtype: torch.dtype, poison: float, place: int) -> None:
    tensor = torch.randn(1000).to(dtype)
    tensor[place] = poison

    with pytest.raises(NonFiniteError, match="smashed data: 1 of 1000 elements"):
        check_finite(tensor, "smashed data")


def test_T06_opposite_infinities_do_not_hide_each_other() -> None:
    with pytest.raises(NonFiniteError, match="2 of 2"):
        check_finite(torch.tensor([float("inf"), -float("inf")]), "gradients")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_T06_finite_numbers_whose_sum_overflows_are_accepted(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max

    check_finite(torch.full((1000,), largest, dtype=dtype), "smashed data")
    check_finite(torch.full((1000,), -largest, dtype=dtype), "smashed data")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_T06_denormals_zeros_and_nothing_at_all_are_accepted(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal

    for tensor in (torch.full((9,), smallest, dtype=dtype) / 2, torch.tensor([0.0, -0.0]).to(dtype), torch.empty(0)):
        check_finite(tensor, "smashed data")


def test_T06_integers_are_always_finite() -> None:
    for dtype in (torch.int8, torch.int64, torch.bool):
        check_finite(torch.ones(3, dtype=dtype), "labels")
