"""Random programs, arguments and weights: each is run, or refused by the documented error, and nothing else happens.

``CLOISTER_FUZZ=20000 pytest tests/test_program_fuzz.py`` fuzzes for as many examples (each operator: a fiftieth).
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import program_pb2
from tests import hostile_programs
from tests.hostile_programs import CANONICAL, CPU, LIMIT, SLOW_S, small, values
from wire import operators
from wire.errors import ComputeError, LimitExceededError, ProgramRejectedError, WireError
from wire.interpreter import Runner, activation_bytes
from wire.program import ProgramLimits, decode_program
from wire.state import load_state

FUZZ: Final = int(os.environ.get("CLOISTER_FUZZ", "0"))
REFUSALS: Final = (ProgramRejectedError, LimitExceededError, ComputeError)
ROOT: Final = Path(__file__).parent.parent
# pytest finds a file's fixtures by their names in it.
_warm = hostile_programs.warm


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
