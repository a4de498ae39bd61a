"""A middle's tensors as bytes: safetensors alone, whole or refused, and never a pickle."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.errors import StateRejectedError
from wire.state import (
    MAX_HEADER_BYTES,
    OPTIMIZER_PREFIX,
    STATE_PREFIX,
    chunks,
    dump_state,
    gather,
    load_state,
    sha256,
    split_state,
)


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("code in a job ran",)


# --- There and back ---------------------------------------------------------------------------------------------------


def test_tensors_of_every_dtype_shape_and_layout_survive() -> None:
    tensors = {
        "float": torch.randn(2, 3),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "nothing": torch.empty(0, 3),
        "turned": torch.randn(3, 4).t(),
        "nan": torch.tensor([float("nan"), float("-inf")]),
    }

    again = load_state(dump_state(tensors))

    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype is tensor.dtype
        assert torch.equal(again[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def test_tensors_that_share_memory_survive_apart() -> None:
    whole = torch.randn(4)

    again = load_state(dump_state({"whole": whole, "part": whole[:2], "again": whole}))

    assert torch.equal(again["part"], whole[:2])
    assert again["again"].data_ptr() != again["whole"].data_ptr()


def test_nothing_survives_as_nothing() -> None:
    assert load_state(dump_state({})) == {}


def test_the_same_tensors_give_the_same_bytes() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}

    assert dump_state(tensors) == dump_state(dict(reversed(tensors.items())))


# --- From strangers ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "a_byte": b"\1",
    "a_header_of_exabytes": struct.pack("<Q", 2**63),
    "a_header_longer_than_the_file": struct.pack("<Q", 100) + b"{}",
    "no_json": packed(b"{{{"),
    "a_list": packed([]),
    "deep_json": packed(b"[" * 100_000),
    "text_that_is_no_utf8": packed(b'{"\xff":{}}'),
    "an_unknown_dtype": packed({"a": entry("Q8")}, bytes(8)),
    "a_dtype_of_this_library_alone": packed({"a": entry("F8_E8M0", (8,))}, bytes(8)),
    "another_size_than_the_shape": packed({"a": entry(shape=(3,))}, bytes(8)),
    "a_shape_that_overflows": packed({"a": entry(shape=(2**62, 4))}, bytes(8)),
    "an_empty_shape_that_overflows": packed({"a": entry(shape=(0, 2**62, 2**62), end=0)}),
    "a_size_beyond_any": packed({"a": entry(shape=(0, 2**64 - 1), end=0)}),
    "a_negative_size": packed({"a": entry(shape=(-2,))}, bytes(8)),
    "offsets_beyond_the_end": packed({"a": entry(shape=(4,), end=16)}, bytes(8)),
    "offsets_that_overlap": packed({"a": entry(), "b": entry()}, bytes(8)),
    "bytes_behind_the_end": packed({"a": entry()}, bytes(9)),
    "one_name_twice": packed(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "a_boolean_of_two": packed({"a": entry("BOOL", (2,), 2)}, b"\2\1"),
    "a_pickle": pickle.dumps(Payload()),
    "a_pickle_behind_a_header": packed(pickle.dumps(Payload())),
    "a_zip_as_torch_saves_it": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", REFUSED)
def test_T01_T02_bytes_that_are_no_tensors_are_refused(name: str) -> None:
    with pytest.raises(StateRejectedError):
        load_state(REFUSED[name])


def test_T02_a_header_is_bounded_before_it_is_read() -> None:
    """Empty tensors weigh nothing in the file and more than a kilobyte each in memory."""
    many = packed({f"{number}": entry(shape=(0,), end=0) for number in range(90_000)})
    few = packed({"a": entry()}, bytes(8))

    with pytest.raises(StateRejectedError, match=f"the state's header holds .* at most {MAX_HEADER_BYTES} are read"):
        load_state(many)
    with pytest.raises(StateRejectedError, match="at most 16 are read"):
        load_state(few, header_bytes=16)
    assert torch.equal(load_state(few, header_bytes=200)["a"], torch.zeros(2))


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_T01_T02_changed_bytes_are_tensors_or_refused(place: int, change: bytes) -> None:
    data = bytearray(dump_state({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bool)}))
    place %= len(data)
    data[place : place + len(change)] = change

    try:
        found = load_state(bytes(data))
    except StateRejectedError:
        return
    assert sum(t.numel() * t.itemsize for t in found.values()) <= len(data)


def test_names_tell_state_from_optimizer_state() -> None:
    tensors = {STATE_PREFIX + "fc.weight": torch.ones(1), OPTIMIZER_PREFIX + "fc.weight/step": torch.zeros(1)}

    state, optimizer = split_state(tensors)

    assert list(state) == ["fc.weight"]
    assert list(optimizer) == ["fc.weight/step"]


@pytest.mark.parametrize("name", ["fc.weight", "", "State/a", "optimizer", "x" * 10_000])
def test_a_name_under_no_prefix_is_refused_and_named(name: str) -> None:
    with pytest.raises(StateRejectedError, match="which is no state") as caught:
        split_state({name: torch.ones(1)})

    assert len(str(caught.value)) < 200


# --- In pieces --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.integers(1, 50))
def test_the_pieces_of_bytes_are_the_bytes_again(data: bytes, size: int) -> None:
    pieces = list(chunks(data, size))

    assert all(0 < len(piece) <= size for piece in pieces)
    assert gather(pieces, len(data), sha256(data), "state") == data


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([b"abc"], "3 bytes of state where 6"),
        ([b"abc", b"defg"], "more than the 6 bytes"),
        ([b"abc", b"dex"], "do not hash"),
        ([], "0 bytes of state where 6"),
    ],
)
def test_T02_other_bytes_than_announced_are_refused(pieces: list[bytes], complaint: str) -> None:
    with pytest.raises(StateRejectedError, match=complaint):
        gather(pieces, 6, sha256(b"abcdef"), "state")


def test_T02_a_stream_that_never_ends_is_left_at_the_first_byte_too_many() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield b"abc"

    with pytest.raises(StateRejectedError):
        gather(endless(), 6, sha256(b"abcabc"), "state")

    assert taken == 3
