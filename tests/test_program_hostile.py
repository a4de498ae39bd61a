"""Programs from strangers: each is run as it says, or refused by the documented error, and nothing else happens.

``CLOISTER_FUZZ=20000 pytest tests/test_program_hostile.py`` fuzzes for as many examples (each operator: a fiftieth).
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from protos import program_pb2, tensor_pb2
from wire import operators
from wire.errors import ComputeError, LimitExceededError, ProgramRejectedError, WireError
from wire.interpreter import Runner, activation_bytes
from wire.program import Program, ProgramLimits, decode_program
from wire.state import load_state

FUZZ: Final = int(os.environ.get("CLOISTER_FUZZ", "0"))
LIMIT: Final = 16 * 2**20
CPU: Final = torch.device("cpu")
F32: Final = tensor_pb2.D_TYPE_FLOAT32
I64: Final = tensor_pb2.D_TYPE_INT64
SLOW_S: Final = 30.0  # what one example may take on a busy machine; they take milliseconds
CONTIGUOUS: Final = program_pb2.Argument(memory_format=program_pb2.MEMORY_FORMAT_CONTIGUOUS)
REFUSALS: Final = (ProgramRejectedError, LimitExceededError, ComputeError)


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


# --- T01: code in a job -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "aten::from_file.default",
        "aten::set_.source_Tensor",
        "aten::as_strided.default",
        "aten::resize_.default",
        "aten::empty.memory_format",
        "aten::empty_like.default",
        "aten::view.dtype",
        "aten::nonzero.default",
        "aten::item.default",
        "aten::_local_scalar_dense.default",
        "aten::unsqueeze_.default",
        "aten::squeeze_.default",
        "aten::transpose_.default",
        "aten::t_.default",
        "aten::swapdims_.default",
        "aten::bernoulli.default",
        "aten::rand.default",
        "aten::add.int",
        "aten::add.t",
        "aten::mul.left_t",
        "aten::pow.int_to_int",
        "aten::split.str",
        "aten::to.prim_Device",
        "aten::copy_.int",
        "aten::repeat_interleave.Tensor",
        "aten::narrow.Tensor",
        "aten::where.default",
        "aten::lstm.data",
        "aten::Int.Tensor",
        "aten::print.default",
        "aten::format.default",
        "aten::save.default",
        "aten::warn.default",
        "prim::Print.default",
        "prim::device.default",
        "prims::add.default",
        "profiler::_record_function_enter_new.default",
        "cloister::unknown",
        "cloister::add.default",
        "cloister::",
        "os::system",
        "builtins.eval",
        "aten::__class__.default",
        "aten::add.__class__",
        "aten::__init__.__globals__",
        "aten::relu",
        "aten::relu.",
        "relu.default",
        "aten::relu.default.default",
        "aten::add.Tensor.default",
        "aten::Relu.default",
        "aten::relu.default ",
        "aten::relu.default\0",
        "aten::relu.unknown",
        "",
        "::",
        "." * 79,
        "a" * 100_000,
    ],
    ids=lambda name: ascii(name[:40]),
)
def test_T01_an_operator_that_is_not_on_the_list_is_refused_by_name(name: str) -> None:
    message = program(RELU)
    message.train.operations[0].op = name

    with pytest.raises(ProgramRejectedError) as caught:
        decode(message)

    assert "allow-list" in str(caught.value) or "has no operator" in str(caught.value)
    assert repr(name[:20])[1:-1] in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("base", sorted({w.partition(".")[0] for w in operators._PURE | operators._IN_PLACE}))
def test_T01_no_variant_that_writes_to_an_out_is_on_the_list(base: str) -> None:
    for overload in getattr(torch.ops.aten, base).overloads():
        function = getattr(getattr(torch.ops.aten, base), overload)
        written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written and (written != ["self"] or not base.endswith("_")):
            with pytest.raises(ProgramRejectedError):
                operators.resolve(f"aten::{base}.{overload}")


def test_T01_every_operator_on_the_list_exists_and_takes_what_a_program_can_hold() -> None:
    words = operators._PURE | operators._IN_PLACE

    found = {operators.resolve(f"aten::{w}" if "." in w else f"aten::{w}.default").name for w in words}

    assert len(found) == len(words)


def test_T01_nothing_on_the_list_gives_back_memory_that_nobody_wrote() -> None:
    words = operators._PURE | operators._IN_PLACE

    assert not [w for w in words if "empty" in w or "resize" in w or "strided" in w or "file" in w or w == "set_"]


def test_T01_a_pickle_or_a_zip_or_torch_script_is_no_program() -> None:
    for data in (b"\x80\x04\x95\x1e\x00\x00\x00", b"PK\x03\x04" + bytes(60), b"cposix\nsystem\n(S'true'\ntR.", b"{}"):
        with pytest.raises(ProgramRejectedError):
            decode_program(data)


# --- Structure --------------------------------------------------------------------------------------------------------


def _loop() -> program_pb2.Program:
    return program(op("add.Tensor", V(0), V(2)), op("add.Tensor", V(1), V(0)))


def _changed(change: Callable[[program_pb2.Program], Any]) -> program_pb2.Program:
    message = program(RELU, state=((4,),))
    change(message)
    return message


def _state(change: Callable[[program_pb2.State], Any]) -> program_pb2.Program:
    return _changed(lambda m: change(m.state[0]))


def _nested(depth: int) -> program_pb2.Argument:
    argument = program_pb2.Argument(integer=1)
    for _ in range(depth):
        outer = program_pb2.Argument()
        outer.list.items.append(argument)
        argument = outer
    return argument


def _set(message: Any, name: str, value: Any) -> None:
    setattr(message, name, value)


def _out_of_order() -> program_pb2.Operation:
    message = op("zeros.default", [2], dtype=program_pb2.Argument(dtype=F32), pin_memory=False)
    message.kwargs.reverse()
    return message


REJECTED: dict[str, tuple[program_pb2.Program, str]] = {
    "a_value_used_before_it_is_made": (program(op("relu.default", V(2)), RELU), "before it is made"),
    "a_value_used_by_its_own_operation": (program(op("relu.default", V(1))), "before it is made"),
    "a_cycle": (_loop(), "before it is made"),
    "a_value_that_is_never_made": (program(op("relu.default", V(2**32 - 1))), "before it is made"),
    "an_output_that_is_never_made": (_changed(lambda m: m.train.outputs.append(9)), "no tensor of the graph"),
    "an_output_that_is_a_size": (program(op("sym_size.int", V(0), 0)), "no tensor of the graph"),
    "an_output_that_is_a_list": (program(op("chunk.default", V(0), 2)), "no tensor of the graph"),
    "an_output_that_is_nothing": (program(op("cloister::set_grad_enabled", True)), "no tensor of the graph"),
    "no_outputs": (_changed(lambda m: m.train.ClearField("outputs")), "0 outputs"),
    "too_many_outputs": (_changed(lambda m: m.train.outputs.extend([0] * 64)), "65 outputs"),
    "no_inputs": (_changed(lambda m: m.ClearField("inputs")), "without inputs"),
    "no_graph": (_changed(lambda m: m.ClearField("train")), "0 outputs"),
    "graphs_of_different_outputs": (_changed(lambda m: m.eval.outputs.extend([0, 1])), "differ"),
    "another_version": (_changed(lambda m: _set(m, "version", 2)), "version 2"),
    "no_version": (_changed(lambda m: m.ClearField("version")), "version 0"),
    "an_unknown_dtype": (_state(lambda s: _set(s, "dtype", 99)), "unknown dtype 99"),
    "no_dtype": (_state(lambda s: s.ClearField("dtype")), "unknown dtype 0"),
    "an_input_of_a_dtype_that_no_frame_carries": (program(RELU, dtype=tensor_pb2.D_TYPE_FLOAT64), "no frame carries"),
    "an_unknown_kind_of_state": (_state(lambda s: _set(s, "kind", 9)), "unknown kind"),
    "no_kind_of_state": (_state(lambda s: s.ClearField("kind")), "unknown kind"),
    "an_integer_that_takes_gradients": (_state(lambda s: _set(s, "dtype", I64)), "take gradients"),
    "a_buffer_that_takes_gradients": (_state(lambda s: _set(s, "kind", 2)), "take gradients"),
    "nine_dimensions": (_state(lambda s: s.shape.extend([1] * 8)), "9 dimensions"),
    "nine_dimensions_of_an_input": (_changed(lambda m: m.inputs[0].shape.extend([1] * 8)), "9 dimensions"),
    "a_million_dimensions": (_state(lambda s: s.shape.extend([1] * 1_000_000)), "1000001 dimensions"),
    "two_state_entries_of_one_name": (_changed(lambda m: m.state.append(m.state[0])), "two state entries"),
    "an_unknown_named_argument": (program(op("relu.default", V(0), inplace=True)), "no argument 'inplace'"),
    "a_named_argument_given_already": (program(op("add.Tensor", V(0), V(0), other=V(0))), "no argument 'other'"),
    "an_argument_too_many": (program(op("relu.default", V(0), V(0))), "2 positional"),
    "a_keyword_by_position": (program(op("add.Tensor", V(0), V(0), 1.0)), "3 positional"),
    "a_missing_argument": (program(op("add.Tensor", V(0))), "without its other"),
    "no_arguments": (program(op("conv2d.default")), "without its input, weight"),
    "a_text_for_a_tensor": (program(op("relu.default", "x")), "its self takes Tensor"),
    "nothing_for_a_tensor": (program(op("relu.default", None)), "its self takes Tensor"),
    "a_list_for_a_tensor": (program(op("relu.default", [V(0)])), "its self takes Tensor"),
    "a_tensor_for_a_size": (program(op("select.int", V(0), 0, V(0))), "its index takes int"),
    "a_real_for_a_size": (program(op("select.int", V(0), 0, 1.0)), "its index takes int"),
    "a_boolean_for_a_size": (program(op("select.int", V(0), 0, True)), "its index takes int"),
    "an_integer_for_a_boolean": (program(op("dropout.default", V(0), 0.5, 1)), "its train takes bool"),
    "a_list_for_a_tensor_by_number": (program(op("chunk.default", V(0), 2), op("relu.default", V(1))), "takes Tensor"),
    "nothing_as_a_tensor": (program(op("cloister::set_grad_enabled", True), op("relu.default", V(1))), "takes Tensor"),
    "an_item_of_a_tensor": (program(op("cloister::getitem", V(0), 0)), "its items takes tensors"),
    "an_item_by_a_text": (program(op("chunk.default", V(0), 2), op("cloister::getitem", V(1), "x")), "index takes int"),
    "a_foreign_generator": (program(op("rrelu.default", V(0), 0.1, 0.2, True, 7)), "takes Optional[Generator]"),
    "a_layout": (program(op("zeros.default", [2], layout=7)), "takes Optional[Layout]"),
    "a_device_by_name": (program(op("zeros.default", [2], device="cuda:7")), "takes Optional[Device]"),
    "a_tensor_in_a_list_of_sizes": (program(op("view.default", V(0), [V(0)])), "takes List[int]"),
    "a_real_in_a_list_of_sizes": (program(op("view.default", V(0), [1.5])), "takes List[int]"),
    "a_text_in_a_list_of_tensors": (program(op("cat.default", ["x"])), "takes List[Tensor]"),
    "arithmetic_on_a_tensor": (program(op("cloister::add", V(0), 1)), "takes SymInt"),
    "arithmetic_on_a_real": (program(op("cloister::add", 0.5, 1)), "takes SymInt"),
    "named_arguments_out_of_order": (
        _changed(lambda m: m.train.operations[0].CopyFrom(_out_of_order())),
        "alphabetical",
    ),
    "a_long_text": (program(op("gelu.default", V(0), approximate="x" * 33)), "a text that no operator takes"),
    "a_huge_text": (program(op("gelu.default", V(0), approximate="x" * 2**20)), "a text that no operator takes"),
    "a_text_of_another_script": (program(op("gelu.default", V(0), approximate="tánh")), "a text that no operator"),
    "a_size_of_65_dimensions": (program(op("zeros.default", [1] * 65)), "its size is of more than 64 items"),
    "a_long_list": (program(op("cat.default", [V(0)] * 4097)), "too deep or too long"),
    "a_nested_list": (program(op("cat.default", _nested(3))), "too deep or too long"),
    "many_arguments": (program(op("add.Tensor", *[V(0)] * 65)), "more than 64 arguments"),
    "an_argument_of_no_kind": (program(op("relu.default", program_pb2.Argument())), "no known kind"),
    "a_false_nothing": (program(op("dropout.default", program_pb2.Argument(none=False))), "no known kind"),
    "an_unknown_memory_format": (program(op("clone.default", V(0), memory_format=program_pb2.Argument(
        memory_format=9))), "no known kind"),  # type: ignore[arg-type]  # a number that the enum lacks
    "an_unknown_device": (program(op("zeros.default", [2], device=program_pb2.Argument(
        device=9))), "no known kind"),  # type: ignore[arg-type]  # as above
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_T01_what_is_no_program_is_refused_with_its_complaint(name: str) -> None:
    message, complaint = REJECTED[name]

    with pytest.raises(ProgramRejectedError) as caught:
        decode(message)

    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "a..b", ".a", "a.", "a/b", "a\\b", "a b", "ä", "a\0b", "a\nb", "x" * 513, "a" * 10**6],
)
def test_T01_a_state_entry_by_a_name_that_is_no_modules_is_refused(name: str) -> None:
    with pytest.raises(ProgramRejectedError, match="a state entry called") as caught:
        decode(_state(lambda s: _set(s, "name", name)))

    assert len(str(caught.value)) < 200


# --- Bytes ------------------------------------------------------------------------------------------------------------


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


def test_one_of_everything_decodes_and_runs() -> None:
    decoded = decode_program(CANONICAL)

    assert run(decoded)[0].shape == (2, 1)
    assert activation_bytes(decoded, decoded.train, 2, LIMIT) < 1000


def test_T01_a_program_cut_short_at_any_byte_is_refused() -> None:
    without_evaluation = small()
    without_evaluation.ClearField("eval")
    whole = len(without_evaluation.SerializeToString(deterministic=True))

    for length in range(len(CANONICAL)):
        if length != whole:  # another program, by another digest
            with pytest.raises(ProgramRejectedError):
                decode_program(CANONICAL[:length])
    assert decode_program(CANONICAL[:whole]).digest != decode_program(CANONICAL).digest


@pytest.mark.parametrize(
    "data",
    [
        CANONICAL + b"\xa2\x06\x00",
        CANONICAL + b"\xa0\x06\x01",
        CANONICAL + b"\x08\x01",
        b"\x08\x01" + CANONICAL,
        b"\x08\x81\x00" + CANONICAL[2:],
        CANONICAL[2:] + CANONICAL[:2],
        CANONICAL + CANONICAL,
        CANONICAL + tagged(4, b""),
    ],
    ids=[
        "an_unknown_field",
        "an_unknown_number",
        "a_field_twice",
        "a_field_twice_in_front",
        "a_number_in_more_bytes_than_it_needs",
        "fields_in_another_order",
        "twice_the_same",
        "an_empty_graph_behind",
    ],
)
def test_T01_bytes_that_encoding_would_not_have_written_are_refused(data: bytes) -> None:
    with pytest.raises(ProgramRejectedError):
        decode_program(data)


def test_T01_an_unknown_field_deep_inside_is_refused() -> None:
    operation = small().train.operations[0].SerializeToString() + b"\xa2\x06\x03abc"
    message = small()
    message.train.operations[0].ParseFromString(operation)

    with pytest.raises(ProgramRejectedError, match="canonical"):
        decode(message)


def test_T01_an_evaluation_graph_that_repeats_the_training_graph_is_refused() -> None:
    message = program(RELU)
    message.eval.CopyFrom(message.train)

    with pytest.raises(ProgramRejectedError, match="canonical"):
        decode(message)


def test_T01_text_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(ProgramRejectedError):
        decode_program(CANONICAL.replace(b"aten::linear.default", b"aten::linear.defaul\xff"))


def test_T02_lists_nested_ten_thousand_deep_are_refused() -> None:
    body = b"\x18\x01"
    for _ in range(10_000):
        body = tagged(10, tagged(1, body))
    data = (
        b"\x08\x01" + tagged(3, b"\x08\x01") + tagged(4, tagged(1, tagged(1, b"aten::cat.default") + tagged(2, body)))
    )

    with pytest.raises(ProgramRejectedError):
        decode_program(data)


# --- T02: sizes -------------------------------------------------------------------------------------------------------

EXCEEDING: dict[str, program_pb2.Program] = {
    "a_parameter_of_billions": program(RELU, state=((2**31 + 1,),)),
    "a_parameter_of_billions_in_two_dimensions": program(RELU, state=((2**16, 2**16),)),
    "a_shape_whose_product_overflows": program(RELU, state=((2**32, 2**32),)),
    "a_shape_whose_product_overflows_to_nothing": program(RELU, state=((2**32, 2**32, 2**32),)),
    "the_largest_shape_there_is": program(RELU, state=((2**64 - 1,) * 8,)),
    "an_empty_parameter_of_an_overflowing_shape": program(RELU, state=((0, 2**40, 2**40),)),
    "an_input_of_billions": program(RELU, inputs=((2**40,),)),
    "an_empty_input_of_an_overflowing_shape": program(RELU, inputs=((2**40, 0, 2**40),)),
    "billions_over_many_parameters": program(RELU, state=((2**30,),) * 3),
    "more_state_than_any_model": program(RELU, state=((),) * 20_001),
    "more_inputs_than_any_cut": program(RELU, inputs=((),) * 65),
    "a_graph_of_20001_operations": program(*[RELU] * 20_001),
}


@pytest.mark.parametrize("name", EXCEEDING)
def test_T02_what_is_larger_than_the_limits_is_refused_at_once(name: str) -> None:
    started = time.monotonic()

    with pytest.raises(LimitExceededError, match=r"limit is|at most|more than") as caught:
        decode(EXCEEDING[name])

    assert time.monotonic() - started < SLOW_S
    assert len(str(caught.value)) < 400


def test_T02_a_graph_of_a_million_operations_is_refused() -> None:
    data = b"\x08\x01" + tagged(3, b"\x08\x01") + tagged(4, tagged(1, RELU.SerializeToString()) * 1_000_000)

    with pytest.raises(LimitExceededError, match="bytes"):
        decode_program(data)
    with pytest.raises(LimitExceededError, match="1000000 operations"):
        decode_program(data, ProgramLimits(bytes=2**30))


def test_T02_the_limits_are_the_nodes_own() -> None:
    data = program(RELU, RELU, state=((100,),)).SerializeToString(deterministic=True)

    decode_program(data, ProgramLimits(bytes=len(data), operations=2, elements=100))
    for limits in (
        ProgramLimits(bytes=len(data) - 1),
        ProgramLimits(operations=1),
        ProgramLimits(elements=99),
    ):
        with pytest.raises(LimitExceededError):
            decode_program(data, limits)


def _squared(times: int) -> list[program_pb2.Operation]:
    return [op("cloister::mul", V(number), V(number)) for number in range(1, 1 + times)]


def _grown(*operations: program_pb2.Operation, **options: Any) -> program_pb2.Program:
    return program(*operations, **options)


#: Each would take gigabytes to billions of them, some within one operator.
BOMBS: dict[str, program_pb2.Program] = {
    "zeros": _grown(op("zeros.default", [2**30])),
    "ones": _grown(op("ones.default", [2**20, 2**20])),
    "full": _grown(op("full.default", [2**40], 1.0)),
    "arange": _grown(op("arange.default", 2**45)),
    "arange_in_small_steps": _grown(op("arange.start_step", 0, 1, 1e-15)),
    "linspace": _grown(op("linspace.default", 0, 1, 2**40)),
    "new_zeros": _grown(op("new_zeros.default", V(0), [2**40])),
    "repeat": _grown(op("repeat.default", V(0), [2**20, 2**20])),
    "tile": _grown(op("tile.default", V(0), [2**20, 2**20])),
    "repeat_interleave": _grown(op("repeat_interleave.self_int", V(0), 2**40)),
    "expand": _grown(op("expand.default", V(0), [2**30, 2, 4])),
    "expand_and_clone": _grown(op("expand.default", V(0), [2**30, 2, 4]), op("clone.default", V(1))),
    "expand_and_sum": _grown(op("expand.default", V(0), [2**50, 2, 4]), op("sum.default", V(1))),
    "outer": _grown(op("outer.default", V(0), V(0)), state=((2**16,),)),
    "matmul": _grown(op("matmul.default", V(0), V(1)), state=((2**20, 1), (1, 2**20))),
    "einsum": _grown(op("einsum.default", "ia,ja,ka,la->ijkl", [V(0)] * 4), state=((2**10, 1),)),
    "einsum_within": _grown(
        op("einsum.default", "ab,cd,ac,bd->", [V(0)] * 4), op("add.Tensor", V(2), V(1)), state=((128, 128),)
    ),
    "padding": _grown(op("constant_pad_nd.default", V(0), [2**40, 2**40])),
    "pad": _grown(op("pad.default", V(0), [0, 2**40])),
    "upsampling": _grown(op("upsample_nearest1d.default", V(0), [2**40]), inputs=((1, 4),)),
    "adaptive_pooling": _grown(op("adaptive_avg_pool1d.default", V(0), [2**40]), inputs=((1, 4),)),
    "a_convolution_that_pads": _grown(
        op("conv1d.default", V(1), V(0), None, [1], [2**40]), state=((1, 1, 1),), inputs=((1, 4),)
    ),
    "a_convolution_laid_out": _grown(
        op("to.dtype", V(0), program_pb2.Argument(dtype=tensor_pb2.D_TYPE_FLOAT64)),
        op("to.dtype", V(1), program_pb2.Argument(dtype=tensor_pb2.D_TYPE_FLOAT64)),
        op("conv2d.default", V(3), V(2)), op("to.dtype", V(4), program_pb2.Argument(dtype=F32)),
        state=((1, 1, 300, 300),), inputs=((1, 600, 600),),
    ),
    "one_hot": _grown(op("one_hot.default", V(0), 2**40), dtype=I64),
    "diag_embed": _grown(op("diag_embed.default", V(0)), state=((2**20,),)),
    "meshgrid": _grown(op("meshgrid.default", [V(0)] * 4), op("cloister::getitem", V(2), 0), state=((2**12,),)),
    "meshgrid_of_many": _grown(op("meshgrid.default", [V(0)] * 4096), op("cloister::getitem", V(2), 0), state=((1,),)),
    "a_view_of_many_dimensions": _grown(op("view.default", V(0), [2, 4] + [1] * 62), op("unsqueeze.default", V(1), 0)),
    "unfold": _grown(op("unfold.default", V(0), 0, 2**19, 1), op("clone.default", V(2)), state=((2**20,),)),
    "cumulative_by_steps": _grown(*[op("add.Tensor", V(n), 1.0) for n in range(1000)], inputs=((2**12,),)),
    "an_lstm_within": _grown(
        op("zeros.default", [2, 2, 1024]),
        op("lstm.input", V(4), [V(5), V(5)], [V(0), V(1), V(2), V(3)], False, 2, 0.0, True, False, True),
        op("cloister::getitem", V(6), 0), op("select.int", V(7), 1, 0),
        state=((4096, 1), (4096, 1024), (4096, 1024), (4096, 1024)), inputs=((500, 1),),
    ),
    "a_billion_empty_chunks": _grown(
        op("chunk.default", V(0), 2**31), op("cloister::getitem", V(1), 0), inputs=((0,),)
    ),
    "empty_sections": _grown(
        op("tensor_split.sections", V(0), 2**31), op("cloister::getitem", V(1), 0), inputs=((0,),)
    ),
    "a_billion_empty_rows": _grown(
        op("zeros.default", [2**40, 0]), op("unbind.int", V(1)), op("cloister::getitem", V(2), 0)
    ),
    "a_billion_empty_splits": _grown(
        op("zeros.default", [2**40, 0]), op("split.Tensor", V(1), 1), op("cloister::getitem", V(2), 0)
    ),
    "empty_but_overflowing": _grown(op("zeros.default", [0, 2**62, 2**62])),
    "a_negative_size": _grown(op("zeros.default", [-5])),
    "squared_sizes": _grown(op("sym_size.int", V(0), 1), *_squared(4), op("zeros.default", [V(5)])),
    "sizes_squared_without_end": _grown(op("sym_size.int", V(0), 1), *_squared(60), RELU),
    "a_size_divided_by_nothing": _grown(op("cloister::floordiv", 1, 0), RELU),
    "a_size_modulo_nothing": _grown(op("cloister::mod", 1, 0), RELU),
    "a_long_power": _grown(op("pow.Scalar", 2, V(0)), op("expand.default", V(1), [2**40, 2, 4])),
}  # fmt: skip


#: What is refused before any memory is counted, and why.
UNCOUNTED: Final = {
    "meshgrid_of_many": "a mesh of more than 16",
    "a_view_of_many_dimensions": "more than 64 dimensions",
    "a_billion_empty_chunks": "more than 4096 tensors",
    "empty_sections": "more than 4096 tensors",
    "a_billion_empty_rows": "more than 4096 tensors",
    "a_billion_empty_splits": "more than 4096 tensors",
    "empty_but_overflowing": "RuntimeError",
    "a_negative_size": "RuntimeError",
    "sizes_squared_without_end": "beyond 2**53",
    "a_size_divided_by_nothing": "ZeroDivisionError",
    "a_size_modulo_nothing": "ZeroDivisionError",
}


def _refused_without_memory(name: str) -> None:
    with pytest.raises(ProgramRejectedError if name in UNCOUNTED else LimitExceededError) as caught:
        bounded(BOMBS[name])

    assert UNCOUNTED.get(name, "bytes of activations") in str(caught.value)


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_T02_an_activation_bomb_is_refused_within_the_time_of_a_look(name: str) -> None:
    started = time.monotonic()

    _refused_without_memory(name)

    assert time.monotonic() - started < SLOW_S


def test_T02_all_activation_bombs_together_take_no_memory() -> None:
    # In a process of its own: the peak of this one has been anything.
    code = (
        "import resource, runpy, sys\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        f"hostile = runpy.run_path({__file__!r})\n"
        "hostile['bounded'](hostile['program'](hostile['RELU']))\n"
        "before = peak()\n"
        "for name in hostile['BOMBS']:\n"
        "    hostile['_refused_without_memory'](name)\n"
        "print(peak() - before)\n"
    )

    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)

    assert int(ran.stdout.split()[-1]) < 100


def test_T02_a_graph_that_grows_as_rows_shrink_is_bounded_at_each_count() -> None:
    message = program(
        op("sym_size.int", V(0), 0),
        op("cloister::floordiv", 2**24, V(1)),
        op("zeros.default", [V(2)]),
    )

    assert bounded(message, rows=2**22) == 4 * 4
    with pytest.raises(LimitExceededError, match="a micro-batch of 1 rows"):
        bounded(message, rows=1)


def test_T02_sizes_end_at_what_a_double_holds() -> None:
    assert bounded(program(op("cloister::mul", 2**26, 2**27), RELU)) == 2 * 4 * 4
    for name, a, b in (("add", 2**53, 1), ("sub", -(2**53), 1), ("mul", 2**27, 2**27), ("floordiv", -(2**63), -1)):
        with pytest.raises(ProgramRejectedError, match=r"beyond 2\*\*53"):
            bounded(program(op(f"cloister::{name}", a, b), RELU))


def test_T02_what_operators_make_within_counts() -> None:
    message = program(op("einsum.default", "a,b,ab->", [V(0), V(0), V(1)]), state=((1000,), (1000, 1000)))

    assert bounded(message) >= 1000 * 1000 * 4


@pytest.mark.parametrize(
    "message",
    [
        program(op("to.dtype", V(0), program_pb2.Argument(dtype=tensor_pb2.D_TYPE_FLOAT64))),
        program(op("to.dtype", V(0), program_pb2.Argument(dtype=tensor_pb2.D_TYPE_INT32))),
        program(op("view.default", V(0), [2, 4, 1, 1, 1, 1, 1, 1, 1])),
    ],
    ids=["double", "int32", "nine_dimensions"],
)
def test_an_output_that_no_frame_carries_is_refused_when_the_session_opens(message: program_pb2.Program) -> None:
    with pytest.raises(ProgramRejectedError, match="no frame carries"):
        bounded(message)


def test_a_parameter_that_is_written_to_is_refused_when_the_session_opens() -> None:
    message = program(op("mul_.Tensor", V(0), 2.0), op("add.Tensor", V(0), V(1)), state=((4,),))

    with pytest.raises(ProgramRejectedError, match="refuses its arguments"):
        bounded(message)


def test_an_operator_that_refuses_says_nothing_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    message = program(op("bitwise_and.Tensor", V(0), V(1)), state=((7,),))

    with pytest.raises(ProgramRejectedError):
        bounded(message)

    assert not caplog.records


def test_one_program_bounded_in_many_threads_at_once_gives_one_answer() -> None:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 -- of this test alone

    decoded = decode_program(CANONICAL)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: activation_bytes(decoded, decoded.train, 2, LIMIT), range(40)))

    assert len(found) == 1


# --- Arguments that operators do not check themselves -----------------------------------------------------------------

FATAL: dict[str, tuple[program_pb2.Program, dict[int, torch.Tensor]]] = {
    "the_smallest_integer_by_minus_one": (
        program(op("div.Tensor_mode", V(0), -1, rounding_mode="trunc"), dtype=I64),
        {0: torch.full((2, 4), -(2**63))},
    ),
    "the_smallest_integer_by_minus_one_in_place": (
        program(op("div_.Scalar_mode", V(0), -1, rounding_mode="trunc"), dtype=I64),
        {0: torch.full((2, 4), -(2**63))},
    ),
    "a_window_in_the_padding": (
        program(op("max_pool2d.default", V(0), [2, 2], [2, 2], [1, 1], [7, 1]), inputs=((3, 6, 6),)),
        {},
    ),
    "an_lstm_of_another_batch": (
        program(
            op("zeros.default", [1, 7, 4]),
            op("lstm.input", V(2), [V(3), V(3)], [V(0), V(1)], False, 1, 0.0, True, False, True),
            op("cloister::getitem", V(4), 0),
            inputs=((5, 3),),
            state=((16, 3), (16, 4)),
        ),
        {},
    ),
    "an_lstm_with_too_few_weights": (
        program(
            op("zeros.default", [2, 2, 4]),
            op("lstm.input", V(2), [V(3), V(3)], [V(0), V(1)], True, 2, 0.0, True, False, True),
            op("cloister::getitem", V(4), 0),
            inputs=((5, 3),),
            state=((16, 3), (16, 4)),
        ),
        {},
    ),
    "a_gradient_that_is_sparse": (
        program(op("embedding.default", V(0), V(1), -1, False, True), state=((4, 4),), dtype=I64),
        {},
    ),
    "a_mask_for_an_index": (
        program(op("isnan.default", V(0)), op("index.Tensor", V(0), [V(1)])),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FATAL)
def test_T06_what_would_end_the_process_is_refused_before_and_during_a_run(name: str) -> None:
    message, given_values = FATAL[name]
    decoded = decode(message)

    with pytest.raises(ProgramRejectedError):
        activation_bytes(decoded, decoded.train, 2, LIMIT)
    fed = values(decoded, 2)
    for number, tensor in given_values.items():
        fed[number] = tensor
    with pytest.raises(ComputeError):
        Runner(decoded, decoded.train, CPU).run(fed)


def test_T06_an_index_out_of_range_raises() -> None:
    decoded = decode(program(op("embedding.default", V(0), V(1)), state=((3, 4),), dtype=I64))
    fed = [*values(decoded, 2)[:1], torch.full((2, 4), 3)]

    with pytest.raises(IndexError):
        Runner(decoded, decoded.train, CPU).run(fed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: only there is it fatal")
@pytest.mark.parametrize(
    "operation",
    [
        op("embedding.default", V(0), V(1)),
        op("index_select.default", V(0), 0, V(2)),
        op("gather.default", V(0), 0, V(1)),
        op("index.Tensor", V(0), [V(1)]),
        op("one_hot.default", V(1), 3),
    ],
    ids=lambda operation: operation.op,
)
def test_T06_an_index_out_of_range_on_a_gpu_raises_and_the_next_run_works(operation: program_pb2.Operation) -> None:
    decoded = decode(program(op("select.int", V(1), 0, 0), operation, state=((3, 4),), dtype=I64))
    runner = Runner(decoded, decoded.train, torch.device("cuda"))
    table = torch.randn(3, 4, device="cuda")

    with pytest.raises(ComputeError, match="index from"):
        runner.run([table, torch.full((2, 4), 3, device="cuda")])

    assert runner.run([table, torch.full((2, 4), 1, device="cuda")])[0].numel()


# --- Fuzz -------------------------------------------------------------------------------------------------------------

ROOT: Final = Path(__file__).parent.parent


def examples(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(max_examples=FUZZ or default, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def offer(data: bytes, rows: int = 2) -> None:
    """What a node does with a program; whatever is wrong is told by the documented errors."""
    started = time.monotonic()
    try:
        decoded = decode_program(data, ProgramLimits(elements=2**20))
    except REFUSALS:
        return
    for graph in (decoded.train, decoded.eval):
        try:
            activation_bytes(decoded, graph, rows, LIMIT)
        except REFUSALS:
            continue
        torch.manual_seed(0)
        try:
            outputs = Runner(decoded, graph, CPU).run(values(decoded, rows))
            wanted = [o for o in outputs if o.requires_grad]
            torch.autograd.backward(wanted, [torch.ones_like(o) for o in wanted])
        except Exception:  # noqa: BLE001, S112 -- the session translates whatever operators raise
            continue
    assert torch.is_grad_enabled()
    assert time.monotonic() - started < SLOW_S


@given(st.data())
@examples(150)
def test_T01_T02_programs_with_changed_bytes_are_run_or_refused(data: st.DataObject) -> None:
    changed = bytearray(CANONICAL)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                changed[place] = data.draw(st.integers(0, 255))
            case 1:
                changed[place] ^= 1 << data.draw(st.integers(0, 7))
            case 2:
                del changed[place : place + data.draw(st.integers(1, 8))]
            case _:
                changed[place:place] = data.draw(st.binary(min_size=1, max_size=8))

    offer(bytes(changed))


@given(st.integers(0, 2**64 - 1))
@examples(150)
def test_T01_T02_programs_with_changed_fields_are_run_or_refused(seed: int) -> None:
    message, chosen = small(), random.Random(seed)  # noqa: S311 -- a test's choices
    for _ in range(chosen.randint(1, 5)):
        spoil(message, chosen)

    offer(message.SerializeToString(deterministic=True), rows=chosen.choice([1, 2, 3]))


@given(st.binary(max_size=300))
@examples(100)
def test_T01_random_bytes_are_refused(data: bytes) -> None:
    for candidate in (data, b"\x08\x01" + data, CANONICAL[: len(CANONICAL) // 2] + data):
        offer(candidate)


NAMES: Final = sorted(operators._PURE | operators._IN_PLACE)
SIZES: Final = [-(2**63), -1, 0, 1, 2, 3, 4, 5, 8, 2**20, 2**31, 2**53, 2**63 - 1]


def spoil(message: program_pb2.Program, chosen: random.Random) -> None:  # noqa: C901 -- one for each change
    """One change to one field, anywhere."""
    graph = chosen.choice([message.train, message.eval])
    match chosen.randint(0, 9):
        case 0 | 1 | 2 if graph.operations:
            operation = chosen.choice(graph.operations)
            arguments = [*operation.args, *(named.value for named in operation.kwargs)]
            if arguments:
                chosen.choice(arguments).CopyFrom(argument(chosen, len(graph.operations) + 3))
        case 3 if graph.operations:
            word = chosen.choice(NAMES)
            chosen.choice(graph.operations).op = f"aten::{word}" if "." in word else f"aten::{word}.default"
        case 4 if graph.operations:
            graph.operations.add().CopyFrom(chosen.choice(graph.operations))
            graph.outputs[:] = [chosen.randint(0, len(graph.operations) + 3)]
        case 5 if graph.operations:
            del graph.operations[chosen.randrange(len(graph.operations))]
        case 6:
            graph.outputs[:] = [chosen.randint(0, len(graph.operations) + 3) for _ in range(len(graph.outputs))]
        case 7:
            entry: Any = chosen.choice([*message.state, *message.inputs])
            entry.shape[:] = [abs(chosen.choice(SIZES)) for _ in range(chosen.randint(0, 4))]
        case 8:
            typed: Any = chosen.choice([*message.state, *message.inputs])
            typed.dtype = chosen.randint(0, 11)
        case _ if graph.operations:
            word = chosen.choice(NAMES)
            resolved = operators.resolve(f"aten::{word}" if "." in word else f"aten::{word}.default")
            added = graph.operations.add(op=resolved.name)
            for parameter in resolved.parameters:
                if not parameter.keyword_only and (parameter.required or chosen.random() < 0.3):
                    added.args.add().CopyFrom(argument(chosen, len(graph.operations) + 2, parameter.type))
            graph.outputs[:] = [len(graph.operations) + 2]


def argument(  # noqa: C901, PLR0912 -- one for each type
    chosen: random.Random, known: int, spelling: str = ""
) -> program_pb2.Argument:
    """A random argument, mostly of the type that a schema asks for."""
    made = program_pb2.Argument()
    if not spelling or chosen.random() < 0.1:
        spelling = chosen.choice(["Tensor", "int", "number", "bool", "str", "List[Tensor]", "List[int]", "ScalarType"])
    if spelling.startswith("Optional["):
        spelling = spelling[9:-1] if chosen.random() < 0.6 else "none"
    if spelling.startswith("List["):
        made.list.SetInParent()
        for _ in range(chosen.randint(0, 4)):
            made.list.items.append(argument(chosen, known, spelling[5:-1]))
        return made
    match spelling:
        case "Tensor" | "tensors":
            made.value = chosen.randint(0, known)
        case "int" | "SymInt":
            made.integer = chosen.choice(SIZES)
        case "number" | "float":
            made.real = chosen.choice(
                [0.0, 0.5, -1.0, 1e300, 1e-300, float("nan"), float("inf"), *struct.unpack("<d", chosen.randbytes(8))]
            )
        case "bool":
            made.boolean = chosen.random() < 0.5
        case "str":
            made.text = chosen.choice(["none", "tanh", "reflect", "same", "floor", "trunc", "ij,jk->ik", "sum", "x"])
        case "ScalarType":
            made.dtype = chosen.randint(0, 11)  # type: ignore[assignment]
        case "MemoryFormat":
            made.memory_format = chosen.randint(0, 4)  # type: ignore[assignment]
        case "Device":
            made.device = chosen.randint(0, 2)  # type: ignore[assignment]
        case _:
            made.none = True
    return made


def test_T01_T06_no_operator_on_the_list_ends_the_process_whatever_its_arguments() -> None:
    each = max(FUZZ // 50, 3)
    script = Path(__file__).with_name("operator_fuzz.py")

    ran = subprocess.run([sys.executable, script, str(each)], check=False, capture_output=True, text=True, cwd=ROOT)

    assert not ran.stdout.strip()
    assert ran.returncode == 0, ran.stderr[-2000:]


@given(st.binary(max_size=200), st.binary(max_size=40))
@examples(100)
def test_T01_T02_random_weights_are_refused_or_tensors(header: bytes, body: bytes) -> None:
    for data in (header, struct.pack("<Q", len(header)) + header + body):
        try:
            assert isinstance(load_state(data), dict)
        except WireError:
            continue
