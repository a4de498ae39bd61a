"""Linear maps and biases: what can be evaluated on ciphertexts of depth one, in a middle and as a whole middle.

A program is affine where its graph is one linear or convolution operator and nothing else but operators that rearrange:
such a middle can be trained under encryption. Any program whose evaluation graph has linear or convolution operators by
weights of its own can be evaluated, layer by layer (:func:`affine_layers`): a node has those, the owner all between.
A matrix is read off by running an operator, in float64, on the rows of an identity: the same for a convolution as for a
linear layer, and exact, because each result is one weight (or 0) plus zeros.

Shapes: ``R`` rows of a layer, ``F`` features of a row, ``O`` outputs of a row; both in the order of their flattened
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from protos import program_pb2
from wire.ciphertexts import MAX_CIPHERTEXTS
from wire.errors import LimitExceededError, SpecRejectedError
from wire.interpreter import Runner, output_shapes
from wire.program import Graph, Operation, Program, Ref

__all__ = [
    "MAX_LAYERS",
    "MAX_MATRIX",
    "ROWS_AT_ONCE",
    "AffineLayer",
    "affine_layers",
    "affine_map",
    "bias_names",
    "check_affine",
    "check_light",
]

_LINEAR: Final = frozenset(
    f"aten::{name}"
    for name in ("linear.default", "conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding")
)
_REARRANGING: Final = frozenset(
    f"aten::{name}"
    for name in (
        "alias.default",
        "contiguous.default",
        "flatten.using_ints",
        "permute.default",
        "reshape.default",
        "squeeze.default",
        "squeeze.dim",
        "transpose.int",
        "unflatten.int",
        "unsqueeze.default",
        "view.default",
    )
)
_BIAS: Final = 2  # its place among the arguments of each linear operator
MAX_MATRIX: Final = 2**26  # weights: 512 MB; a convolution's matrix is much larger than its kernel
MAX_LAYERS: Final = 256  # of one middle; a ResNet-152 has 155
ROWS_AT_ONCE: Final = 256  # of the identity: 32 MB for the widest layer
#: What an owner computes between two layers: a few operations a number, whatever the size; by name, in any overload.
_LIGHT: Final = frozenset(
    """
    abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add addcdiv
    addcmul alias amax amin asin asinh atan atanh avg_pool1d avg_pool2d batch_norm cat celu chunk clamp clamp_max
    clamp_min clone constant_pad_nd contiguous cos cosh detach div divide dropout elu eq erf erfc exp exp2 expand
    expm1 feature_dropout flatten full ge gelu glu greater group_norm gt hardshrink hardsigmoid hardswish hardtanh
    instance_norm layer_norm le leaky_relu lerp less lift_fresh_copy log log1p log_sigmoid log_softmax logical_and
    logical_not logical_or logsumexp lt masked_fill max_pool1d max_pool2d maximum mean minimum mish mul multiply
    narrow ne neg negative norm ones pad permute pow prelu reciprocal reflection_pad1d reflection_pad2d relu relu6
    reshape rms_norm rsqrt rsub scalar_tensor select selu sigmoid sign silu sin sinh slice softmax softplus
    softshrink split split_with_sizes sqrt square squeeze stack sub subtract sum sym_size tan tanh threshold to
    transpose trunc unbind unflatten unsqueeze view where zeros
    """.split(),  # noqa: SIM905 -- read, and diffed, as words
)


def check_affine(program: Program) -> tuple[int, int]:
    """Features and outputs of one row.

    Raises:
        SpecRejectedError: the program is not one linear map of one tensor of float32.
        LimitExceededError: its matrix would be larger than :data:`MAX_MATRIX`.
    """
    if len(program.inputs) != 1 or program.inputs[0].dtype is not torch.float32:
        raise SpecRejectedError("an encrypted middle takes one tensor of float32")
    for graph in (program.train, program.eval):
        _linear_operation(program, graph)
    shapes = output_shapes(program, program.train, 2)
    if len(shapes) != 1 or len(shapes[0][1]) < 2 or shapes[0][1][0] != 2:  # noqa: PLR2004 -- [rows, …]
        raise SpecRejectedError("an encrypted middle makes one tensor, with a row for each of the batch")
    features, outputs = math.prod(program.inputs[0].shape), math.prod(shapes[0][1][1:])
    if not 0 < features * outputs <= MAX_MATRIX or max(features, outputs) > MAX_CIPHERTEXTS:
        raise LimitExceededError(
            f"a matrix of {features} by {outputs}; at most {MAX_MATRIX} weights, and {MAX_CIPHERTEXTS} on a side"
        )
    return features, outputs


def bias_names(program: Program) -> frozenset[str]:
    """Of the parameters, those that are added and not multiplied."""
    operation = _linear_operation(program, program.train)
    bias = operation.args[_BIAS] if len(operation.args) > _BIAS else dict(operation.kwargs).get("bias")
    return frozenset({program.state[bias.index].name} if isinstance(bias, Ref) else ())


def affine_map(
    program: Program, values: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix and the bias of a program that :func:`check_affine` took.

    Args:
        program: the middle.
        values: its state, by name.
        device: computes.

    Returns:
        float64 [F, O] and [O].
    """
    features = math.prod(program.inputs[0].shape)
    wide = [values[spec.name].detach().to(device, torch.float64) for spec in program.state]
    biases = bias_names(program)
    linear = [
        torch.zeros_like(value) if spec.name in biases else value
        for spec, value in zip(program.state, wide, strict=True)
    ]
    runner = Runner(program, program.eval, device)
    pieces = []
    with torch.no_grad():
        for start in range(0, features, ROWS_AT_ONCE):
            rows = torch.zeros(min(ROWS_AT_ONCE, features - start), features, dtype=torch.float64, device=device)
            rows.diagonal(start).fill_(1.0)
            (piece,) = runner.run([*linear, rows.reshape(-1, *program.inputs[0].shape)])
            pieces.append(piece.reshape(len(rows), -1))
        (bias,) = runner.run([*wide, torch.zeros(1, *program.inputs[0].shape, dtype=torch.float64, device=device)])
    return torch.cat(pieces), bias.reshape(-1)


@dataclass(frozen=True, slots=True)
class AffineLayer:
    """One linear or convolution operator of an evaluation graph, without its bias.

    Attributes:
        number: of its operation in the graph.
        operation: the operator, with all that is not a tensor.
        weight: the name of its weights among the program's state.
        bias: of its bias, if it has one.
        shape: of one row of its operand.
        made: of one row of its result.
        rows_each: how many rows of its own each row of the batch becomes.
    """

    number: int
    operation: Operation = field(repr=False)
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    made: tuple[int, ...]
    rows_each: int

    @property
    def features(self) -> int:
        """F."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.made)

    def apply(self, rows_RF: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The results of rows in the clear, [R, O]; in the weight's dtype."""
        operation = self.operation
        kwargs = {name: value for name, value in operation.kwargs if name != "bias"}
        rows = rows_RF.reshape(-1, *self.shape)
        made: torch.Tensor = operation.operator.function(rows, weight, None, *operation.args[_BIAS + 1 :], **kwargs)
        return made.reshape(len(rows), -1)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer as one matrix; float64 [F, O], on the weight's device."""
        wide = weight.detach().to(torch.float64)
        if len(self.shape) == 1:
            return wide.T.contiguous()
        pieces = []
        with torch.no_grad():
            for start in range(0, self.features, ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, self.features - start)
                rows = torch.zeros(count, self.features, dtype=torch.float64, device=wide.device)
                rows.diagonal(start).fill_(1.0)
                pieces.append(self.apply(rows, wide))
        return torch.cat(pieces)


def affine_layers(program: Program) -> tuple[AffineLayer, ...]:
    """The linear and convolution operators of a program's evaluation graph, in the order in which they run.

    Raises:
        SpecRejectedError: there is none, or one that multiplies by something else than weights of the program.
        LimitExceededError: more than :data:`MAX_LAYERS`, or larger ones than can be evaluated.
    """
    found = [(n, o) for n, o in enumerate(program.eval.operations) if o.operator.name in _LINEAR]
    if not found:
        raise SpecRejectedError("an encrypted middle has a linear or convolution layer, which the node evaluates")
    if len(found) > MAX_LAYERS:
        raise LimitExceededError(f"{len(found)} layers; an encrypted middle has at most {MAX_LAYERS}: cut it smaller")
    before = len(program.state) + len(program.inputs)
    values = [index for n, o in found for index in (_operand(program, o), before + n)]
    shapes = [shape for _, shape in output_shapes(program, Graph(program.eval.operations, tuple(values)), 2)]
    layers = [_layer(program, n, o, *shapes[2 * i : 2 * i + 2]) for i, (n, o) in enumerate(found)]
    if sum(layer.features * layer.outputs for layer in layers) > MAX_MATRIX:
        raise LimitExceededError(
            f"layers of more than {MAX_MATRIX} weights, convolutions counted as matrices: cut the middle smaller"
        )
    return tuple(layers)


def check_light(program: Program, *, weights_here: bool) -> None:
    """Refuses a program that asks too much of whoever computes what lies between its layers.

    Args:
        program: one that :func:`affine_layers` took.
        weights_here: whether its tensors are known where that is computed.

    Raises:
        SpecRejectedError: naming the operator.
    """
    for operation in program.eval.operations:
        name = operation.operator.name
        word = name.removeprefix("aten::").partition(".")[0].removesuffix("_")
        if name in _LINEAR or name.startswith("cloister::"):
            continue
        if word not in _LIGHT:
            raise SpecRejectedError(
                f"{name} is neither a layer that a node evaluates on ciphertexts (linear, conv1d, conv2d) nor one that "
                "you compute between two of them: move the cut so that it falls to the front or the head"
            )
        if not weights_here and any(index < len(program.state) for index in _indices(operation)):
            raise SpecRejectedError(f"{name} takes weights that stay with the node: let it send them (send_weights)")


def _operand(program: Program, operation: Operation) -> int:
    """Raises: SpecRejectedError where something else is multiplied than what comes up, by weights."""
    operand, *parameters = operation.args
    known = len(program.state)
    if not isinstance(operand, Ref) or operand.index < known:
        raise SpecRejectedError("an encrypted layer multiplies what comes up by its weights")
    if (
        not parameters
        or not isinstance(parameters[0], Ref)
        or any(
            isinstance(value, Ref) and value.index >= known
            for value in (*parameters, *(value for _, value in operation.kwargs))
        )
    ):
        raise SpecRejectedError("an encrypted layer multiplies by weights as they are: nothing computes them anew")
    return operand.index


def _layer(
    program: Program, number: int, operation: Operation, came: tuple[int, ...], made: tuple[int, ...]
) -> AffineLayer:
    weight, *rest = operation.args[1:]
    bias = rest[0] if rest else dict(operation.kwargs).get("bias")
    spec = program.state[weight.index] if isinstance(weight, Ref) else None
    if spec is None or spec.dtype is not torch.float32 or any(isinstance(value, Ref) for value in rest[1:]):
        raise SpecRejectedError("an encrypted layer has weights of float32, and sizes that do not depend on the batch")
    linear = operation.operator.name == "aten::linear.default"
    if len(came) < 2 or (not linear and len(came) != len(spec.shape)):  # noqa: PLR2004 -- [rows, …]
        raise SpecRejectedError("an encrypted layer takes a batch, rows first")
    split = len(came) - 1 if linear else 1
    rows_each, odd = divmod(math.prod(came[:split]), 2)
    layer = AffineLayer(
        number,
        operation,
        spec.name,
        program.state[bias.index].name if isinstance(bias, Ref) else None,
        came[split:],
        made[split:],
        rows_each,
    )
    if odd or not rows_each or not layer.features * layer.outputs:
        raise SpecRejectedError("an encrypted layer has rows, features and outputs")
    if layer.features * layer.outputs > MAX_MATRIX or max(layer.features, layer.outputs) > MAX_CIPHERTEXTS:
        raise LimitExceededError(
            f"a layer of {layer.features} by {layer.outputs}, as a matrix; at most {MAX_MATRIX} weights, and "
            f"{MAX_CIPHERTEXTS} on a side: move the cut so that it falls to the front or the head"
        )
    return layer


def _indices(operation: Operation) -> list[int]:
    arguments = [*operation.args, *(value for _, value in operation.kwargs)]
    nested = [item for a in arguments for item in (a if isinstance(a, tuple) else (a,))]
    return [item.index for item in nested if isinstance(item, Ref)]


def _linear_operation(program: Program, graph: Graph) -> Operation:
    """The one operator that multiplies.

    Raises:
        SpecRejectedError: there is another than one, or one that does more.
    """
    found = [operation for operation in graph.operations if operation.operator.name in _LINEAR]
    others = [o.operator.name for o in graph.operations if o.operator.name not in _LINEAR | _REARRANGING]
    if len(found) != 1 or others:
        raise SpecRejectedError(
            "an encrypted middle is one linear or convolution layer (flattened, at most): move the cut so that "
            f"{others[0] if others else 'what else it multiplies by'} falls to the front or the head"
        )
    made_by_input, *parameters = found[0].args
    if not isinstance(made_by_input, Ref) or made_by_input.index < len(program.state):
        raise SpecRejectedError("an encrypted middle multiplies what comes up by its weights")
    for argument in (*parameters, *(value for _, value in found[0].kwargs)):
        if isinstance(argument, Ref) and not _is_parameter(program, argument):
            raise SpecRejectedError("an encrypted middle multiplies by parameters of its own alone")
    return found[0]


def _is_parameter(program: Program, ref: Ref) -> bool:
    return ref.index < len(program.state) and program.state[ref.index].kind == program_pb2.STATE_KIND_PARAMETER
