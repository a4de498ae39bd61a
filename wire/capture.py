"""From an ``nn.Module`` to the bytes of a portable program.

``torch.export`` captures the module twice, in training and in evaluation mode, in its training IR: the very ATen calls
that eager mode makes, in-place ones included, before any decomposition. Regions under ``torch.no_grad`` or a disabled
autocast become what they are, a switch of gradient mode or nothing. What export adds to check itself is left out.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from protos import program_pb2
from wire.codec import FRAME_DTYPES, dtype_number
from wire.errors import CutError, LimitExceededError, ProgramRejectedError, TensorRejectedError
from wire.operators import GETITEM, SET_GRAD, SIZE_OPERATORS
from wire.operators import resolve as resolve_operator
from wire.program import PROGRAM_VERSION, Program, ProgramLimits, decode_program

__all__ = ["Captured", "capture"]

_CHECKS: Final = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_assert_async",
    },
)
_SIZE_TARGETS: Final = {getattr(operator, name): wire_name for name, wire_name in SIZE_OPERATORS.items()}
_MEMORY_FORMATS: Final = {
    torch.contiguous_format: program_pb2.MEMORY_FORMAT_CONTIGUOUS,
    torch.preserve_format: program_pb2.MEMORY_FORMAT_PRESERVE,
    torch.channels_last: program_pb2.MEMORY_FORMAT_CHANNELS_LAST,
}
#: A capture is the owner's own: only what the format cannot hold is refused here, the rest by each node's limits.
_OWN_LIMITS: Final = ProgramLimits(bytes=2**30, operations=2**20, elements=2**40)


@dataclass(frozen=True, slots=True)
class Captured:
    """A program, its bytes, and where its state lives in the module.

    Attributes:
        data: the canonical bytes.
        program: the same, decoded.
        state: the module's own tensors by the program's names (not copies).
        aliases: other names in the module's ``state_dict`` of tensors that the program holds once.
    """

    data: bytes
    program: Program
    state: dict[str, torch.Tensor]
    aliases: dict[str, str]


def capture(module: nn.Module, example: Sequence[torch.Tensor]) -> Captured:
    """The program of ``module``, called as ``module(*example)``; dimension 0 of every input is the batch.

    The module keeps its training flags, and its tensors are not copied.

    Raises:
        CutError: export refuses the module, the batch size is baked in, or the middle does what no program can.
    """
    for number, tensor in enumerate(example):
        if tensor.dtype not in FRAME_DTYPES:
            raise CutError(
                f"tensor {number} across the cut is {tensor.dtype}, which no frame carries; convert it first"
            )
    modes = {name: sub.training for name, sub in module.named_modules()}
    try:
        train = _export(module.train(), example, "training")
        evaluation = _export(module.eval(), example, "evaluation")
    finally:
        for name, sub in module.named_modules():
            sub.training = modes[name]
    try:
        return _Encoder(module, train, evaluation, example).captured()
    except (ProgramRejectedError, LimitExceededError, TensorRejectedError) as error:
        raise CutError(f"the middle cannot travel: {error}. Move the cut so that this runs on your side.") from error


def _export(module: nn.Module, example: Sequence[torch.Tensor], which: str) -> ExportedProgram:
    if any(x.ndim == 0 or x.shape[0] < 2 for x in example):  # noqa: PLR2004 -- export bakes in sizes of 0 and 1
        raise CutError("the example needs at least 2 rows in dimension 0 of every tensor that crosses the cut")
    try:
        shapes = _batched(module, example)
        with warnings.catch_warnings():
            # What RNN modules keep of their own parameters, for cuDNN alone.
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights", UserWarning)
            return torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # export raises dozens of types, its own and every operator's
        raise CutError(
            f"torch.export cannot capture the middle in {which} mode: {_first_lines(error)}\n"
            "Move the cut so that the middle avoids this, or write that part without data-dependent control flow.",
        ) from error


def _batched(module: nn.Module, example: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What export calls dynamic shapes, nested as the arguments of ``forward`` are: those of ``*inputs`` are one."""
    bound = inspect.signature(module.forward).bind(*example)
    batch = {0: Dim.DYNAMIC}
    return tuple(tuple(batch for _ in a) if isinstance(a, tuple) else batch for a in bound.arguments.values())


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:600] or type(error).__name__


class _Encoder:
    """Writes two exported programs over one state as one message."""

    def __init__(
        self,
        module: nn.Module,
        train: ExportedProgram,
        evaluation: ExportedProgram,
        example: Sequence[torch.Tensor],
    ) -> None:
        self._exported = (train, evaluation)
        self._example = example
        own: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        own |= dict(module.named_buffers(remove_duplicate=False))
        self._own = own
        self._state: dict[str, torch.Tensor] = {}
        self._kinds: dict[str, program_pb2.StateKind.ValueType] = {}
        self._names: dict[int, str] = {}
        self.aliases: dict[str, str] = {}

    def captured(self) -> Captured:
        placeholders = [self._collect(exported) for exported in self._exported]
        message = program_pb2.Program(version=PROGRAM_VERSION)
        for name, tensor in self._state.items():
            message.state.add(
                name=name,
                kind=self._kinds[name],
                dtype=dtype_number(tensor.dtype),
                shape=tensor.shape,
                requires_grad=tensor.requires_grad,
            )
        for tensor in self._example:
            message.inputs.add(dtype=dtype_number(tensor.dtype), shape=tensor.shape[1:])
        for graph, exported, names in zip(
            (message.train, message.eval),
            self._exported,
            placeholders,
            strict=True,
        ):
            self._graph(graph, exported, names)
        if message.eval == message.train:
            message.ClearField("eval")
        data = message.SerializeToString(deterministic=True)
        return Captured(data, decode_program(data, _OWN_LIMITS), self._state, self.aliases)

    def _collect(self, exported: ExportedProgram) -> dict[str, str]:
        """Notes the state that one export lifts; gives the state's name of each placeholder."""
        names: dict[str, str] = {}
        for spec in exported.graph_signature.input_specs:
            target = spec.target
            if spec.kind is InputKind.USER_INPUT:
                continue
            if spec.kind is InputKind.PARAMETER:
                names[spec.arg.name] = self._note(target, self._own[target], program_pb2.STATE_KIND_PARAMETER)
            elif spec.kind is InputKind.BUFFER and spec.persistent:
                names[spec.arg.name] = self._note(target, self._own[target], program_pb2.STATE_KIND_BUFFER)
            elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                tensor = self._own.get(target)
                if tensor is None:
                    tensor = exported.constants[target]
                names[spec.arg.name] = self._note(target, tensor, program_pb2.STATE_KIND_CONSTANT)
            else:
                raise CutError(f"the middle holds {target!r}, which is no tensor; keep it on your side of the cut")
        for output in exported.graph_signature.output_specs:
            if output.kind is not OutputKind.USER_OUTPUT:
                raise CutError(f"the middle returns {output.target!r} in a way that cannot travel ({output.kind.name})")
        return names

    def _note(self, target: str, tensor: torch.Tensor, kind: program_pb2.StateKind.ValueType) -> str:
        known = self._names.get(id(tensor))
        if known is None:
            while target in self._state:  # constants of the two exports may share a name and differ
                target += "_"
            self._names[id(tensor)] = target
            self._state[target], self._kinds[target] = tensor, kind
            return target
        if known != target:
            self.aliases[target] = known
        return known

    def _graph(self, graph: program_pb2.Graph, exported: ExportedProgram, names: dict[str, str]) -> None:
        order = list(self._state)
        values: dict[FxNode, int] = {}
        users = 0
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in names:
                    values[node] = order.index(names[node.name])
                else:
                    values[node] = len(order) + users
                    users += 1
        writer = _GraphWriter(graph, len(order) + users)
        writer.write(exported.graph_module, values)
        (results,) = next(node for node in exported.graph.nodes if node.op == "output").args
        for result in results:
            made = result.meta["val"] if isinstance(result, FxNode) else None
            if not isinstance(made, torch.Tensor) or made.dtype not in FRAME_DTYPES:
                what = made.dtype if isinstance(made, torch.Tensor) else type(result).__name__
                raise CutError(f"the middle returns {what}, which no frame carries; convert it or keep it on your side")
            graph.outputs.append(values[result])


class _GraphWriter:
    def __init__(self, graph: program_pb2.Graph, first: int) -> None:
        self._graph = graph
        self._next = first
        self._grad = True
        self._spread: dict[FxNode, list[int]] = {}

    def write(self, module: GraphModule, values: dict[FxNode, int]) -> None:
        """Appends a graph's calls; ``values`` gives and takes the numbers of fx nodes."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                self._call(module, node, values)
            elif node.op == "get_attr" and not isinstance(getattr(module, str(node.target)), GraphModule):
                raise CutError(f"the middle reads {node.target!r} past its state; make it a buffer")

    def _call(self, module: GraphModule, node: FxNode, values: dict[FxNode, int]) -> None:
        target = node.target
        if isinstance(target, HigherOrderOperator):
            self._region(module, node, values)
        elif target is operator.getitem and isinstance(node.args[0], FxNode) and node.args[0] in self._spread:
            values[node] = self._spread[node.args[0]][node.args[1]]  # type: ignore[index]  # an index by construction
        elif isinstance(target, OpOverload) and target._schema.name.split("::")[1] in _CHECKS:  # noqa: SLF001
            return
        else:
            values[node] = self._emit(_wire_name(node), node.args, node.kwargs, values)

    def _region(self, module: GraphModule, node: FxNode, values: dict[FxNode, int]) -> None:
        """Inlines what ``torch.no_grad`` or a disabled autocast wrapped."""
        name = str(node.target)
        args = list(node.args)
        if name == "wrap_with_set_grad_enabled":
            enabled, body, operands = args[0], args[1], args[2:]
        elif name == "wrap_with_autocast" and args[2] is False:
            enabled, body, operands = self._grad, args[4], args[5:]
        else:
            raise CutError(f"the middle holds a region ({name}) that cannot travel; keep it on your side of the cut")
        inner = getattr(module, str(body.target))  # type: ignore[union-attr]  # a get_attr node by construction
        within: dict[FxNode, int] = {}
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for placeholder, operand in zip(placeholders, operands, strict=True):
            within[placeholder] = values[operand]  # type: ignore[index]  # operands of a region are nodes
        around = self._grad
        if enabled is not around:
            self._emit(SET_GRAD, (enabled,), {}, values)
        self._grad = bool(enabled)
        self.write(inner, within)
        if enabled is not around:
            self._emit(SET_GRAD, (around,), {}, values)
        self._grad = around
        (results,) = next(n for n in inner.graph.nodes if n.op == "output").args
        self._spread[node] = [within[result] for result in results]

    def _emit(self, name: str, args: Any, kwargs: Any, values: dict[FxNode, int]) -> int:
        operation = self._graph.operations.add(op=name)
        for argument in args:
            _fill(operation.args.add(), argument, values)
        types = {p.name: p.type for p in resolve_operator(name).parameters} if kwargs else {}
        for key, argument in sorted(kwargs.items()):
            # The layout is strided whenever a tensor can travel at all, and pinning is the node's own affair.
            if argument is None or "Layout" in types.get(key, "") or key == "pin_memory":
                continue
            _fill(operation.kwargs.add(name=key).value, argument, values)
        number = self._next
        self._next += 1
        return number


def _wire_name(node: FxNode) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return f"{target._schema.name}.{target._overloadname}"  # noqa: SLF001 -- an overload's only names
    if target is operator.getitem:
        return GETITEM
    name = _SIZE_TARGETS.get(target)
    if name is None:
        raise CutError(f"the middle computes sizes with {target}, which cannot travel; keep it on your side of the cut")
    return name


def _fill(message: program_pb2.Argument, value: Any, values: dict[FxNode, int]) -> None:  # noqa: C901 -- one for each kind
    match value:
        case None:
            message.none = True
        case FxNode():
            message.value = values[value]
        case bool():
            message.boolean = value
        case int():
            message.integer = value
        case float():
            message.real = value
        case str():
            message.text = value
        case torch.dtype():
            message.dtype = dtype_number(value)
        case torch.memory_format() if value in _MEMORY_FORMATS:
            message.memory_format = _MEMORY_FORMATS[value]
        case torch.device():
            message.device = program_pb2.DEVICE_SESSION
        case list() | tuple():
            message.list.SetInParent()
            for item in value:
                _fill(message.list.items.add(), item, values)
        case _:
            named = value if isinstance(value, torch.memory_format) else type(value).__name__
            raise CutError(f"the middle passes {named} to an operator, which cannot travel")
