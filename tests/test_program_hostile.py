"""Programs from strangers: each is run as it says, or refused by the documented error, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from protos import program_pb2, tensor_pb2
from tests.hostile_programs import (
    CANONICAL,
    CPU,
    F32,
    I64,
    LIMIT,
    RELU,
    V,
    decode,
    op,
    program,
    run,
    small,
    tagged,
    values,
)
from wire import operators
from wire.errors import ComputeError, ProgramRejectedError
from wire.interpreter import Runner, activation_bytes
from wire.program import decode_program

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
