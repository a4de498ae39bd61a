"""Runs a checked program on real tensors: the same ATen calls, in the same order, as the model itself makes.

Since nothing is fused, reordered or decomposed, a program's outputs, gradients and buffer updates equal the model's to
the bit on the same build of torch with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wire.errors import LimitExceededError, ProgramRejectedError, StateRejectedError, WireError
from wire.operators import SET_GRAD
from wire.operators import resolve as resolve_operator
from wire.program import SESSION_DEVICE, Argument, Graph, Operation, Program, Ref

__all__ = ["Runner", "activation_bytes", "check_state"]

_SET_GRAD: Final = resolve_operator(SET_GRAD).function
#: The argument, by position and name, that says how a random operator draws; with False or 0.0 it does not.
_DRAWS_BY: Final = {
    "aten::dropout.default": (2, "train"),
    "aten::alpha_dropout.default": (2, "train"),
    "aten::feature_dropout.default": (2, "train"),
    "aten::scaled_dot_product_attention.default": (4, "dropout_p"),
}


class Runner:
    """One graph, prepared for many runs.

    Attributes:
        random: whether a run draws from torch's default generator.
        in_place: whether a run writes to its inputs, so that they must not be leaves.
    """

    def __init__(self, program: Program, graph: Graph, device: torch.device) -> None:
        """Prepares ``graph`` for ``device``; runs nothing."""
        self._outputs = graph.outputs
        self.random = any(op.operator.random and not _stands_still(op) for op in graph.operations)
        self.in_place = any(op.operator.in_place for op in graph.operations)
        first = len(program.state) + len(program.inputs)
        dead = _last_uses(graph, first)
        self._steps = [
            (op.operator.function, _resolver(op.args, op.kwargs, device), dead[number])
            for number, op in enumerate(graph.operations)
        ]

    def run(self, values: Sequence[Any], visit: Callable[[Any], None] | None = None) -> list[torch.Tensor]:
        """The graph's outputs from ``values``: the state in the program's order, then the inputs.

        Raises:
            Whatever an operator raises; see :func:`activation_bytes` and the session for who translates it.
        """
        environment = list(values)
        grad = torch.is_grad_enabled()
        try:
            for function, resolve, dead in self._steps:
                args, kwargs = resolve(environment)
                if function is _SET_GRAD:  # never switched on where the caller switched it off
                    args = [grad and args[0]]
                result = function(*args, **kwargs)
                if visit is not None:
                    visit(result)
                environment.append(result)
                for index in dead:
                    environment[index] = None
        finally:
            torch.set_grad_enabled(grad)
        return [environment[index] for index in self._outputs]


def _stands_still(operation: Operation) -> bool:
    """Whether a random operator was captured where it draws nothing, as dropout in evaluation."""
    position, name = _DRAWS_BY.get(operation.operator.name, (0, ""))
    if not name:
        return False
    if len(operation.args) > position:
        return not operation.args[position]
    return name == "dropout_p" and not dict(operation.kwargs).get(name)


def _resolver(
    args: tuple[Argument, ...],
    kwargs: tuple[tuple[str, Argument], ...],
    device: torch.device,
) -> Callable[[list[Any]], tuple[list[Any], dict[str, Any]]]:
    def fixed(argument: Argument) -> Any:
        if argument is SESSION_DEVICE:
            return device
        return argument

    def fill(argument: Argument, environment: list[Any]) -> Any:
        if isinstance(argument, Ref):
            return environment[argument.index]
        if isinstance(argument, tuple):
            return [fill(item, environment) for item in argument]
        return fixed(argument)

    def resolve(environment: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return [fill(a, environment) for a in args], {name: fill(a, environment) for name, a in kwargs}

    return resolve


def _references(argument: Argument) -> set[int]:
    if isinstance(argument, Ref):
        return {argument.index}
    if isinstance(argument, tuple):
        return set().union(*(_references(item) for item in argument)) if argument else set()
    return set()


def _last_uses(graph: Graph, first: int) -> list[tuple[int, ...]]:
    """For each operation the values that nothing needs after it, so that their memory can go."""
    last: dict[int, int] = {}
    for number, operation in enumerate(graph.operations):
        last[first + number] = number
        for argument in (*operation.args, *(value for _, value in operation.kwargs)):
            for index in _references(argument):
                last[index] = number
    dead: list[list[int]] = [[] for _ in graph.operations]
    for index, number in last.items():
        if index not in graph.outputs:
            dead[number].append(index)
    return [tuple(indices) for indices in dead]


def check_state(program: Program, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that are not exactly the program's state.

    Raises:
        StateRejectedError: naming the first tensor that is missing, unknown, or of another dtype or shape.
    """
    wanted = {s.name: s for s in program.state}
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise StateRejectedError(f"the program has no tensor {unknown[0]!r}")
    for name, spec in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise StateRejectedError(f"the tensor {name!r} is missing")
        if tensor.dtype is not spec.dtype or tuple(tensor.shape) != spec.shape:
            raise StateRejectedError(
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}; the program says {spec.dtype} {spec.shape}",
            )


def activation_bytes(program: Program, graph: Graph, rows: int, limit: int) -> int:
    """The bytes of every tensor that a run over ``rows`` rows makes, found without allocating any of them (T02).

    Raises:
        LimitExceededError: as soon as the sum passes ``limit``.
        ProgramRejectedError: an operator refuses its arguments' shapes or dtypes.
    """
    total = 0

    def visit(result: Any) -> None:
        nonlocal total
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.itemsize
        if total > limit:
            raise LimitExceededError(
                f"a micro-batch of {rows} rows makes more than {limit} bytes of activations; send smaller micro-batches",
            )

    device = torch.device("cpu")
    # Fake tensors compute shapes, strides and dtypes by the operators' own rules, and hold no memory.
    with FakeTensorMode() as mode, torch.no_grad():
        shapes = [(s.shape, s.dtype) for s in program.state] + [((rows, *i.shape), i.dtype) for i in program.inputs]
        values = [mode.from_tensor(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in shapes]
        values = [torch.empty(v.shape, dtype=v.dtype, device=device) for v in values]
        try:
            outputs = Runner(program, graph, device).run(values, visit)
        except WireError:
            raise
        except Exception as error:  # whatever operators raise on hostile arguments, and they raise nearly everything
            raise ProgramRejectedError(f"an operator refuses its arguments ({type(error).__name__})") from error
    if any(not isinstance(output, torch.Tensor) for output in outputs):
        raise ProgramRejectedError("an output that is no tensor")
    return total

