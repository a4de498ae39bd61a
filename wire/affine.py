"""Middles that are one linear map and a bias: what can be evaluated on ciphertexts of depth one.

A program is affine where its graph is one linear or convolution operator and nothing else but operators that rearrange.
Its matrix is read off by running it, in float64, on the rows of an identity: the same for a convolution as for a
linear layer, and exact, because each result is one weight (or 0) plus zeros.

Shapes: ``F`` features of a row, ``O`` outputs of a row; both in the order of their flattened tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from protos import program_pb2
from wire.ciphertexts import MAX_CIPHERTEXTS
from wire.errors import LimitExceededError, SpecRejectedError
from wire.interpreter import Runner, output_shapes
from wire.program import Graph, Operation, Program, Ref

__all__ = ["MAX_MATRIX", "ROWS_AT_ONCE", "affine_map", "bias_names", "check_affine"]

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
ROWS_AT_ONCE: Final = 256  # of the identity: 32 MB for the widest layer


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
