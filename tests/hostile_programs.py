"""Programs written by hand, message by message, as no owner's side would write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
from torch import nn

from protos import program_pb2, tensor_pb2
from wire.interpreter import Runner, activation_bytes
from wire.program import Program, ProgramLimits, decode_program

__all__ = [
    "CANONICAL",
    "CPU",
    "F32",
    "I64",
    "LIMIT",
    "RELU",
    "SLOW_S",
    "V",
    "bounded",
    "decode",
    "op",
    "program",
    "run",
    "small",
    "tagged",
    "values",
    "warm",
]

LIMIT: Final = 16 * 2**20
CPU: Final = torch.device("cpu")
F32: Final = tensor_pb2.D_TYPE_FLOAT32
I64: Final = tensor_pb2.D_TYPE_INT64
SLOW_S: Final = 30.0  # what one example may take on a busy machine; they take milliseconds
CONTIGUOUS: Final = program_pb2.Argument(memory_format=program_pb2.MEMORY_FORMAT_CONTIGUOUS)


@dataclass(frozen=True)
class V:
    """A value by its number."""

    number: int


def fill(message: program_pb2.Argument, value: Any) -> None:
    match value:
        case program_pb2.Argument():
            message.CopyFrom(value)
        case None:
            message.none = True
        case V():
            message.value = value.number
        case bool():
            message.boolean = value
        case int():
            message.integer = value
        case float():
            message.real = value
        case str():
            message.text = value
        case list():
            message.list.SetInParent()
            for item in value:
                fill(message.list.items.add(), item)
        case _:
            raise TypeError(value)


def op(name: str, *args: Any, **kwargs: Any) -> program_pb2.Operation:
    message = program_pb2.Operation(op=name if "::" in name else f"aten::{name}")
    for value in args:
        fill(message.args.add(), value)
    for key, value in sorted(kwargs.items()):
        fill(message.kwargs.add(name=key).value, value)
    return message


def program(
    *operations: program_pb2.Operation,
    inputs: tuple[tuple[int, ...], ...] = ((4,),),
    state: tuple[tuple[int, ...], ...] = (),
    dtype: tensor_pb2.DType.ValueType = F32,
) -> program_pb2.Program:
    """State first, then inputs, then operations are numbered; the last value leaves."""
    message = program_pb2.Program(version=1)
    for number, shape in enumerate(state):
        message.state.add(
            name=f"s{number}", kind=program_pb2.STATE_KIND_PARAMETER, dtype=F32, shape=shape, requires_grad=True
        )
    for shape in inputs:
        message.inputs.add(dtype=dtype, shape=shape)
    message.train.operations.extend(operations)
    message.train.outputs.append(len(state) + len(inputs) + len(operations) - 1)
    return message


def decode(message: program_pb2.Program, limits: ProgramLimits | None = None) -> Program:
    return decode_program(message.SerializeToString(deterministic=True), limits)


def bounded(message: program_pb2.Program, rows: int = 2, limit: int = LIMIT) -> int:
    decoded = decode(message)
    return activation_bytes(decoded, decoded.train, rows, limit)


def values(decoded: Program, rows: int) -> list[torch.Tensor]:
    def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)

    state = [filled(s.shape, s.dtype) for s in decoded.state]
    state = [
        nn.Parameter(t, requires_grad=s.requires_grad) if s.kind == program_pb2.STATE_KIND_PARAMETER else t
        for t, s in zip(state, decoded.state, strict=True)
    ]
    return state + [filled((rows, *i.shape), i.dtype) for i in decoded.inputs]


def run(decoded: Program, rows: int = 2) -> list[torch.Tensor]:
    return Runner(decoded, decoded.train, CPU).run(values(decoded, rows))


RELU = op("relu.default", V(0))


def small() -> program_pb2.Program:
    """One of everything that a program can hold."""
    message = program(
        op("linear.default", V(2), V(0), V(1)),
        op("dropout.default", V(3), 0.5, True),
        op("sym_size.int", V(4), 0),
        op("cloister::floordiv", V(5), 1),
        op("view.default", V(4), [V(6), -1]),
        op("split.Tensor", V(7), 2, 1),
        op("cloister::getitem", V(8), 0),
        op("cloister::set_grad_enabled", False),
        op("relu.default", V(9)),
        op("cloister::set_grad_enabled", True),
        op("zeros.default", [2], device=program_pb2.Argument(device=program_pb2.DEVICE_SESSION),
           dtype=program_pb2.Argument(dtype=F32)),
        op("cat.default", [V(9), V(9)], 1),
        op("clone.default", V(14), memory_format=CONTIGUOUS),
        op("add_.Tensor", V(15), 1.5, alpha=2),
        op("clamp.default", V(16), None, 3.0),
        op("sum.dim_IntList", V(17), [1], True),
        state=((4, 4), (4,)),
    )  # fmt: skip
    message.eval.operations.add().CopyFrom(op("relu.default", V(2)))
    message.eval.outputs.append(3)
    return message


CANONICAL: Final = small().SerializeToString(deterministic=True)


def tagged(field: int, body: bytes) -> bytes:
    size, length = len(body), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + body


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What torch loads before the first program is bounded and run takes seconds; no test is to time that."""
    bounded(small())
    run(decode(small()))
