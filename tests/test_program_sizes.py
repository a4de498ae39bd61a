"""Programs that would take more memory or time than they may: each is refused before it takes any."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import pytest

from protos import program_pb2, tensor_pb2
from tests import hostile_programs
from tests.hostile_programs import CANONICAL, F32, I64, LIMIT, RELU, SLOW_S, V, bounded, decode, op, program, tagged
from wire.errors import LimitExceededError, ProgramRejectedError
from wire.interpreter import activation_bytes
from wire.program import ProgramLimits, decode_program

ROOT: Final = Path(__file__).parent.parent
# pytest finds a file's fixtures by their names in it.
_warm = hostile_programs.warm


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
