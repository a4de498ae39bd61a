"""The portable program: the middle of a cut model as data.

A program is two graphs (training, evaluation) of allow-listed operators over one set of named parameters, buffers and
constants. This module decodes it from foreign bytes, strictly, into plain frozen data: sizes are checked before
anything is built from them, every operator and every argument against its schema, and every value is used after it is
made, so that a graph has no cycles by construction. Nothing is executed here; :mod:`wire.interpreter` runs what passed.

The bytes are canonical: decoding refuses any bytes that encoding would not have written, so that a program has one
digest (SHA-256 behind a domain prefix) and the digest names the architecture.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from google.protobuf.message import DecodeError

from protos import program_pb2
from wire import operators
from wire.codec import DTYPES, FRAME_DTYPES, MAX_RANK
from wire.errors import LimitExceededError, ProgramRejectedError
from wire.operators import Operator, Parameter, ValueKind

__all__ = [
    "PROGRAM_VERSION",
    "SESSION_DEVICE",
    "Argument",
    "Graph",
    "Input",
    "Operation",
    "Program",
    "ProgramLimits",
    "Ref",
    "State",
    "decode_program",
    "program_digest",
]

PROGRAM_VERSION: Final = 1

_MAX_STATE: Final = 20_000  # tensors; Llama-405B has 1,137
_MAX_INPUTS: Final = 64  # tensors that cross one cut; a U-Net of 10 levels crosses 11
_MAX_ARGUMENTS: Final = 64  # of one operator; lstm.input has 9
_MAX_LIST: Final = 4096  # items: a concatenation of every layer's output, a split into single steps
_MAX_DIMENSIONS: Final = 64  # items of a list that has one for each dimension; no kernel takes more
_LONG: Final = ("tensors", "split_size", "indices", "params")  # what the parameters of longer lists are called
_MAX_NESTING: Final = 2  # a list in an argument; no schema nests deeper
_MAX_TEXT: Final = 32  # "zeros", "reflect", "tanh": all the texts that operators take
_NAME: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_NAME: Final = 512  # the longest names are of deep Hugging Face models, about 120

_MEMORY_FORMATS: Final = {
    program_pb2.MEMORY_FORMAT_CONTIGUOUS: torch.contiguous_format,
    program_pb2.MEMORY_FORMAT_PRESERVE: torch.preserve_format,
    program_pb2.MEMORY_FORMAT_CHANNELS_LAST: torch.channels_last,
}


class _SessionDevice:
    """Stands for the device that the session lives on."""


SESSION_DEVICE: Final = _SessionDevice()


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """What a decoder accepts before it builds anything."""

    bytes: int = 8 * 2**20  # 20,000 operations of 60 bytes, several times over
    operations: int = 20_000  # in each graph; 80 Llama layers make about 6,000
    elements: int = 2**31  # over all state tensors: 8 GiB in fp32


@dataclass(frozen=True, slots=True)
class Ref:
    """A value by its number: state entries first, then inputs, then operations' results."""

    index: int


Argument: TypeAlias = (
    "Ref | int | float | bool | str | torch.dtype | torch.memory_format | _SessionDevice | tuple[Argument, ...] | None"
)


@dataclass(frozen=True, slots=True)
class State:
    """A named tensor of the program: a parameter, a buffer, or a constant that no state_dict shows."""

    name: str
    kind: program_pb2.StateKind.ValueType
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that crosses the cut into the middle: ``[batch, *shape]``."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operator."""

    operator: Operator
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """Operations in the order they run, and the values that leave."""

    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A checked program."""

    state: tuple[State, ...]
    inputs: tuple[Input, ...]
    train: Graph
    eval: Graph
    digest: bytes

    @property
    def parameter_count(self) -> int:
        """Elements over all parameters."""
        return sum(math.prod(s.shape) for s in self.state if s.kind == program_pb2.STATE_KIND_PARAMETER)

    @property
    def state_bytes(self) -> int:
        """Bytes over all state."""
        return sum(s.nbytes for s in self.state)


def program_digest(data: bytes) -> bytes:
    """The 32 bytes that name a program's architecture in every record."""
    return hashlib.sha256(b"cloister.program.v1\0" + data).digest()


def decode_program(data: bytes, limits: ProgramLimits | None = None) -> Program:
    """The program of ``data``, checked throughout.

    Raises:
        ProgramRejectedError: not a program; says the first thing wrong.
        LimitExceededError: larger than ``limits``.
    """
    limits = limits or ProgramLimits()
    if len(data) > limits.bytes:
        raise LimitExceededError(f"a program of {len(data)} bytes; the limit is {limits.bytes}")
    message = program_pb2.Program()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ProgramRejectedError("the bytes are not a program") from error
    if message.version != PROGRAM_VERSION:
        raise ProgramRejectedError(f"program version {message.version}; this side reads {PROGRAM_VERSION}")
    _check_counts(message, limits)
    state = _state(message, limits)
    inputs = tuple(_input(i, limits) for i in message.inputs)
    if not inputs:
        raise ProgramRejectedError("a program without inputs")
    before = len(state) + len(inputs)
    train = _graph(message.train, before, "train")
    evaluation = _graph(message.eval, before, "eval") if message.HasField("eval") else train
    if len(train.outputs) != len(evaluation.outputs):
        raise ProgramRejectedError("the two graphs differ in their number of outputs")
    _check_canonical(message, data)
    return Program(state, inputs, train, evaluation, program_digest(data))


def _check_canonical(message: program_pb2.Program, data: bytes) -> None:
    """Refuses bytes that encoding would not have written: the same architecture would have two digests."""
    if message.HasField("eval") and message.eval == message.train:
        raise ProgramRejectedError("the bytes are not canonical: two graphs that are one")
    message.DiscardUnknownFields()  # else they would be written again
    if message.SerializeToString(deterministic=True) != data:
        raise ProgramRejectedError("the bytes are not canonical")


def _check_counts(message: program_pb2.Program, limits: ProgramLimits) -> None:
    operations = max(len(message.train.operations), len(message.eval.operations))
    if operations > limits.operations:
        raise LimitExceededError(f"a graph of {operations} operations; the limit is {limits.operations}")
    if len(message.state) > _MAX_STATE:
        raise LimitExceededError(f"{len(message.state)} state tensors; the limit is {_MAX_STATE}")
    if len(message.inputs) > _MAX_INPUTS:
        raise LimitExceededError(f"{len(message.inputs)} inputs; the limit is {_MAX_INPUTS}")


def _state(message: program_pb2.Program, limits: ProgramLimits) -> tuple[State, ...]:
    state, names, elements = [], set(), 0
    for entry in message.state:
        name = entry.name
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            raise ProgramRejectedError(f"a state entry called {name[:40]!r}")
        if name in names:
            raise ProgramRejectedError(f"two state entries called {name!r}")
        names.add(name)
        if entry.kind not in program_pb2.StateKind.values() or not entry.kind:
            raise ProgramRejectedError(f"{name}: unknown kind of state {entry.kind}")
        dtype, shape = _dtype(entry.dtype), _shape(entry.shape, limits)
        is_parameter = entry.kind == program_pb2.STATE_KIND_PARAMETER
        if entry.requires_grad and not (is_parameter and dtype.is_floating_point):
            raise ProgramRejectedError(f"{name}: only parameters of floating point take gradients")
        elements += math.prod(shape)
        if elements > limits.elements:
            raise LimitExceededError(f"state of more than {limits.elements} elements")
        state.append(State(name, entry.kind, dtype, shape, entry.requires_grad))
    return tuple(state)


def _input(message: program_pb2.Input, limits: ProgramLimits) -> Input:
    dtype = _dtype(message.dtype)
    if dtype not in FRAME_DTYPES:
        raise ProgramRejectedError(f"an input of {dtype}, which no frame carries")
    return Input(dtype, _shape(message.shape, limits))


def _dtype(number: int) -> torch.dtype:
    dtype = DTYPES.get(number)
    if dtype is None:
        raise ProgramRejectedError(f"unknown dtype {number}")
    return dtype


def _shape(sizes: Any, limits: ProgramLimits) -> tuple[int, ...]:
    if len(sizes) > MAX_RANK:
        raise ProgramRejectedError(f"a tensor of {len(sizes)} dimensions; at most {MAX_RANK}")
    shape = tuple(sizes)
    # An empty tensor has strides all the same, which torch counts in 64 bits: they are bounded as elements are.
    if math.prod(max(size, 1) for size in shape) > limits.elements:
        raise LimitExceededError(f"a tensor of shape {shape}; at most {limits.elements} elements")
    return shape


def _graph(message: program_pb2.Graph, before: int, which: str) -> Graph:
    kinds: list[ValueKind] = ["tensor"] * before
    operations = []
    for number, entry in enumerate(message.operations):
        try:
            operation = _operation(entry, kinds)
        except ProgramRejectedError as error:
            raise ProgramRejectedError(f"{which} graph, operation {number}: {error}") from error
        operations.append(operation)
        kinds.append(operation.operator.returns)
    outputs = tuple(message.outputs)
    if not 0 < len(outputs) <= _MAX_INPUTS:
        raise ProgramRejectedError(f"{which} graph: {len(outputs)} outputs; 1 to {_MAX_INPUTS}")
    if len(set(outputs)) != len(outputs):
        raise ProgramRejectedError(f"{which} graph: the same output twice")
    if any(index >= len(kinds) or kinds[index] != "tensor" for index in outputs):
        raise ProgramRejectedError(f"{which} graph: an output that is no tensor of the graph")
    return Graph(tuple(operations), outputs)


def _operation(message: program_pb2.Operation, kinds: list[ValueKind]) -> Operation:
    operator = operators.resolve(message.op)
    if len(message.args) + len(message.kwargs) > _MAX_ARGUMENTS:
        raise ProgramRejectedError(f"{operator.name}: more than {_MAX_ARGUMENTS} arguments")
    positional = [p for p in operator.parameters if not p.keyword_only]
    if len(message.args) > len(positional):
        raise ProgramRejectedError(f"{operator.name}: {len(message.args)} positional arguments")
    bound: set[str] = set()
    args = []
    for parameter, argument in zip(positional, message.args, strict=False):
        args.append(_argument(operator, parameter, argument, kinds))
        bound.add(parameter.name)
    by_name = {p.name: p for p in operator.parameters}
    kwargs = []
    if [named.name for named in message.kwargs] != sorted(named.name for named in message.kwargs):
        raise ProgramRejectedError(f"{operator.name}: named arguments out of alphabetical order")
    for named in message.kwargs:
        if named.name not in by_name or named.name in bound:
            raise ProgramRejectedError(f"{operator.name}: no argument {named.name[:_MAX_TEXT]!r} to give here")
        kwargs.append((named.name, _argument(operator, by_name[named.name], named.value, kinds)))
        bound.add(named.name)
    missing = [p.name for p in operator.parameters if p.required and p.name not in bound]
    if missing:
        raise ProgramRejectedError(f"{operator.name}: without its {', '.join(missing)}")
    return Operation(operator, tuple(args), tuple(kwargs))


def _argument(
    operator: Operator,
    parameter: Parameter,
    message: program_pb2.Argument,
    kinds: list[ValueKind],
) -> Argument:
    value = _value(message, len(kinds), 0)
    if isinstance(value, tuple) and len(value) > _MAX_DIMENSIONS and not parameter.name.startswith(_LONG):
        raise ProgramRejectedError(f"{operator.name}: its {parameter.name} is of more than {_MAX_DIMENSIONS} items")
    if not _fits(value, parameter.type, kinds):
        raise ProgramRejectedError(f"{operator.name}: its {parameter.name} takes {parameter.type}")
    return value


def _value(message: program_pb2.Argument, known: int, depth: int) -> Argument:  # noqa: C901, PLR0911 -- one for each kind
    kind = message.WhichOneof("kind")
    match kind:
        case "none" if message.none:
            return None
        case "value":
            if message.value >= known:
                raise ProgramRejectedError(f"value {message.value} before it is made")
            return Ref(message.value)
        case "integer" | "real" | "boolean":
            number: int | float | bool = getattr(message, kind)
            return number
        case "text":
            if len(message.text) > _MAX_TEXT or not message.text.isascii():
                raise ProgramRejectedError("a text that no operator takes")
            return message.text
        case "dtype":
            return _dtype(message.dtype)
        case "memory_format" if message.memory_format in _MEMORY_FORMATS:
            return _MEMORY_FORMATS[message.memory_format]
        case "device" if message.device == program_pb2.DEVICE_SESSION:
            return SESSION_DEVICE
        case "list":
            if depth >= _MAX_NESTING or len(message.list.items) > _MAX_LIST:
                raise ProgramRejectedError("a list nested too deep or too long")
            return tuple(_value(item, known, depth + 1) for item in message.list.items)
        case _:
            raise ProgramRejectedError("an argument of no known kind")


def _fits(value: Argument, spelling: str, kinds: list[ValueKind]) -> bool:  # noqa: C901, PLR0911, PLR0912 -- one for each type
    """Whether ``value`` may stand where a schema says ``spelling``."""
    if spelling.startswith("Optional["):
        return value is None or _fits(value, spelling[len("Optional[") : -1], kinds)
    if spelling.startswith("List["):
        inner = spelling[len("List[") : -1]
        if isinstance(value, tuple):
            return all(_fits(item, inner, kinds) for item in value)
        if isinstance(value, Ref):
            return inner == "Tensor" and kinds[value.index] == "tensors"
        # ATen takes one integer for a list of equal ones.
        return inner in ("int", "SymInt") and _fits(value, inner, kinds)
    if isinstance(value, Ref):
        if spelling == "Tensor":  # a size stands for a tensor of no dimensions, as any number does
            return kinds[value.index] in ("tensor", "size")
        wanted = {"tensors": "tensors", "SymInt": "size", "int": "size", "number": "size"}
        return wanted.get(spelling) == kinds[value.index]
    match spelling:
        case "SymInt" | "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number" | "Tensor":  # a bare number stands for a tensor of no dimensions, as in eager mode
            return isinstance(value, (int, float, bool))
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "ScalarType":
            return isinstance(value, torch.dtype)
        case "Device":
            return value is SESSION_DEVICE
        case "MemoryFormat":
            return isinstance(value, torch.memory_format)
        case _:  # Layout and Generator: only the default
            return False
