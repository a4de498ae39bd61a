"""Runs a checked program on real tensors: the same ATen calls, in the same order, as the model itself makes.

Since nothing is fused, reordered or decomposed, a program's outputs, gradients and buffer updates equal the model's to
the bit on the same build of torch with the same number of threads.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wire.codec import FRAME_DTYPES, MAX_RANK
from wire.errors import ComputeError, LimitExceededError, ProgramRejectedError, StateRejectedError
from wire.operators import SET_GRAD
from wire.operators import resolve as resolve_operator
from wire.program import SESSION_DEVICE, Argument, Graph, Operation, Program, Ref

__all__ = ["Runner", "activation_bytes", "check_state", "output_shapes", "warm_up"]

_SET_GRAD: Final = resolve_operator(SET_GRAD).function
#: The argument, by position and name, that says how a random operator draws; with False or 0.0 it does not.
_DRAWS_BY: Final = {
    "aten::dropout.default": (2, "train"),
    "aten::alpha_dropout.default": (2, "train"),
    "aten::feature_dropout.default": (2, "train"),
    "aten::scaled_dot_product_attention.default": (4, "dropout_p"),
}
_CONVOLUTIONS: Final = frozenset({torch.ops.aten.convolution.default, torch.ops.aten.convolution_overrideable.default})
_MAX_DIMENSIONS: Final = 64  # what torch's own kernels take at most
#: Fake tensors keep one cache a process, which is not made for threads and which foreign shapes would fill without end.
_FAKING: Final = threading.Lock()
_KNOWN_SHAPES: Final = 20_000  # about 40 MB

LOOK_S: Final = 30.0  # others wait for their turn meanwhile; 80 Llama layers take about 10 s on a slow core
_MAX_RESULTS: Final = 150_000  # tensors that one run makes, views included: half as many again as operations
_NO_LIMIT: Final = 2**62  # bytes: more than any machine has


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
        walk, grad = self.walk(values, frozenset(), visit), torch.is_grad_enabled()
        try:
            next(walk)
        except StopIteration as done:
            outputs: list[torch.Tensor] = done.value
            return outputs
        finally:
            torch.set_grad_enabled(grad)
        raise AssertionError("nothing was to be left out")

    def walk(
        self, values: Sequence[Any], stops: frozenset[int], visit: Callable[[Any], None] | None = None
    ) -> Generator[tuple[int, Any], torch.Tensor, list[torch.Tensor]]:
        """The same, but for the operations numbered in ``stops``, which somebody else computes.

        Yields:
            the number of such an operation and its first argument; its result is to be sent in.

        Returns:
            the graph's outputs.
        """
        environment = list(values)
        grad = torch.is_grad_enabled()
        for number, (function, resolve, dead) in enumerate(self._steps):
            args, kwargs = resolve(environment)
            if function is _SET_GRAD:  # never switched on where the caller switched it off
                args = [grad and args[0]]
            result = (yield number, args[0]) if number in stops else function(*args, **kwargs)
            if visit is not None:
                visit(result)
            environment.append(result)
            for index in dead:
                environment[index] = None
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


def warm_up() -> None:
    """Has torch load what its first look at a graph loads: two seconds that the first session need not wait for."""
    with _FAKING, _quiet(), FakeTensorMode():
        torch.empty(2, 2).matmul(torch.empty(2, 2))


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


def output_shapes(program: Program, graph: Graph, rows: int) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """The dtype and shape of each output of a run over ``rows`` rows, found without computing any.

    Raises:
        ProgramRejectedError: an operator refuses ``rows`` rows.
    """
    _, outputs = _dry_run(program, graph, rows, _NO_LIMIT)
    return tuple((output.dtype, tuple(output.shape)) for output in outputs)


def activation_bytes(program: Program, graph: Graph, rows: int, limit: int) -> int:
    """The bytes of every tensor that a run over ``rows`` rows makes, found without allocating any of them (T02).

    Also those within operators that are made of others, and those that the training graph keeps for its backward.

    Raises:
        LimitExceededError: as soon as the sum passes ``limit``.
        ProgramRejectedError: an operator refuses its arguments' shapes or dtypes, or an output cannot travel.
    """
    return _dry_run(program, graph, rows, limit)[0]


def _dry_run(program: Program, graph: Graph, rows: int, limit: int) -> tuple[int, list[torch.Tensor]]:
    counter = _Counter(rows, limit)
    training = graph is program.train
    # Fake tensors compute shapes, strides and dtypes by the operators' own rules, and hold no memory.
    with _FAKING, _quiet(), FakeTensorMode(), torch.set_grad_enabled(training):
        try:
            values = _fake_values(program, rows, training=training)
            with counter:
                outputs = Runner(program, graph, torch.device("cpu")).run(values, counter.visit)
        except LimitExceededError:
            raise
        except ComputeError as error:
            raise ProgramRejectedError(str(error)) from error
        except Exception as error:  # whatever operators raise on hostile arguments, and they raise nearly everything
            raise ProgramRejectedError(f"an operator refuses its arguments ({type(error).__name__})") from error
        finally:
            if len(FakeTensorMode.cache) > _KNOWN_SHAPES:
                FakeTensorMode.cache_clear()
    if any(output.dtype not in FRAME_DTYPES or output.ndim > MAX_RANK for output in outputs):
        raise ProgramRejectedError(f"an output that no frame carries: {[(o.dtype, o.ndim) for o in outputs][:8]}")
    return counter.total, outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging a traceback for each operator that refuses its arguments: strangers could fill a log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    del record
    return False


def _fake_values(program: Program, rows: int, *, training: bool) -> list[torch.Tensor]:
    state = [torch.empty(s.shape, dtype=s.dtype, requires_grad=training and s.requires_grad) for s in program.state]
    inputs = [torch.empty((rows, *i.shape), dtype=i.dtype) for i in program.inputs]
    if training:
        # As a session gives them: leaves in its hands, copies in the graph's.
        inputs = [x.requires_grad_(x.is_floating_point()).clone() for x in inputs]
    return state + inputs


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own signature
    """Adds up what the calls beneath it allocate."""

    def __init__(self, rows: int, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.total = 0
        self._results = 0
        self._ends = time.thread_time() + LOOK_S
        self._rows = rows
        self._limit = limit

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        held = {t.untyped_storage()._cdata for t in _tensors((args, (kwargs or {}).values()))}  # noqa: SLF001
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in held:  # noqa: SLF001 -- else a view, which holds nothing of its own
                self._add(tensor.untyped_storage().nbytes())
        if func in _CONVOLUTIONS:
            self._check(self.total + _unfolded_bytes(args, result))
        return result

    def visit(self, result: Any) -> None:
        """Looks at what one operation of the graph returns.

        More dimensions than anything needs are refused: each takes memory of its own. A view that repeats elements
        counts as if it held them all, since whatever reads it takes the time.
        """
        if time.thread_time() > self._ends:  # of this thread's own: on a busy machine it takes longer
            raise LimitExceededError(f"a graph that takes more than {LOOK_S:g} s to look over; cut it smaller")
        for tensor in _tensors(result):
            self._results += 1
            if self._results > _MAX_RESULTS:
                raise LimitExceededError(f"a graph that makes more than {_MAX_RESULTS} tensors; cut it smaller")
            if tensor.ndim > _MAX_DIMENSIONS:
                raise ComputeError(f"a tensor of more than {_MAX_DIMENSIONS} dimensions")
            repeated = tensor.numel() * tensor.itemsize - tensor.untyped_storage().nbytes()
            self._add(max(0, repeated))

    def _add(self, size: int) -> None:
        self.total += size
        self._check(self.total)

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise LimitExceededError(
                f"a micro-batch of {self._rows} rows makes more than {self._limit} bytes of activations; "
                "send smaller micro-batches",
            )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)


def _unfolded_bytes(args: tuple[Any, ...], result: torch.Tensor) -> int:
    """The patches that a convolution may lay out side by side before it multiplies them, which nothing else shows.

    One row's where the kernels of oneDNN and cuDNN work, else every row's.
    """
    x, weight, transposed = args[0], args[1], args[6]
    spread = x if transposed else result
    rows = 1 if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else spread.shape[0]
    positions = math.prod(spread.shape[2:])
    return int(rows * positions * weight[0].numel() * x.itemsize)
