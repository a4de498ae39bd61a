"""Middles of linear, square, linear: what both sides compute by, and what such a program's numbers are.

With a ciphertext for each feature and real numbers in its slots, both linear maps are products of matrices of integers,
and the square is a product of polynomials, slot by slot: y = W2ᵀ (W1ᵀ x + b1)² + b2, all of it on ciphertexts, in one
go and without any evaluation key (:mod:`server_side.squares`). The price is that scales multiply: a result is scaled by
``2**(2 * (value_bits + weight_bits) + second_bits)``, for which q is a product of primes.

Nothing may wrap around q, so the scheme says how large everything may be. With rows of norm R at most, an L2 norm of A
of each first-layer output's weights, biases of B, second-layer weights of an absolute sum of S to each output and a
bias of D, a hidden number is at most H = R A + B, and a result at most S H² + D.

Shapes: ``F`` features of a row, ``H`` hidden numbers, ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from protos import encryption_pb2
from wire.affine import affine_map, check_affine
from wire.ciphertexts import SQUARE_RINGS, Ring, check_ring, ring_from_proto
from wire.errors import ConfigError, LimitExceededError, SpecRejectedError
from wire.interpreter import output_shapes
from wire.program import Argument, Graph, Input, Operation, Program, Ref

__all__ = ["SquareMap", "SquareScheme", "check_square", "square_from_proto", "square_map"]

_MAX_SCALE_BITS: Final = 40
_MAX_NORM: Final = 2.0**20
_ROOM: Final = 4  # q is so many times the largest result: a factor of 2 for its sign, and one for noise
_SLACK: Final = 1 + 2**-20  # of norms that were summed up in another order, or came as float32


@dataclass(frozen=True, slots=True, kw_only=True)
class SquareScheme:
    """What both sides of a session of linear, square, linear compute by.

    Attributes:
        ring: one of :data:`wire.ciphertexts.SQUARE_RINGS`.
        value_bits: what comes up is scaled by ``2**value_bits``.
        weight_bits: the same for the first layer's weights.
        second_bits: the same for the second layer's weights.
        row_norm: R, the L2 norm of each row that comes up, at most.
        weight_norm: A, the L2 norm of the weights of a first-layer output, at most.
        bias_most: B, the absolute bias of the first layer, at most.
        second_sum: S, the sum of absolute weights of a second-layer output, at most.
        offset_most: D, the absolute bias of the second layer, at most.
    """

    ring: Ring
    value_bits: int
    weight_bits: int
    second_bits: int
    row_norm: float
    weight_norm: float
    bias_most: float
    second_sum: float
    offset_most: float

    def __post_init__(self) -> None:
        """Refuses what would not be secure, or could wrap.

        Raises:
            ConfigError: says which.
        """
        check_ring(self.ring, SQUARE_RINGS)
        for bits in (self.value_bits, self.weight_bits, self.second_bits):
            if not 1 <= bits <= _MAX_SCALE_BITS:
                raise ConfigError(f"a scale of 2**{bits}: 1 to {_MAX_SCALE_BITS} bits")
        for positive in (self.row_norm, self.weight_norm, self.second_sum):
            if not 0 < positive <= _MAX_NORM:
                raise ConfigError(f"a norm of {positive}: above 0, at most {_MAX_NORM:g}")
        for bias in (self.bias_most, self.offset_most):
            if not 0 <= bias <= _MAX_NORM:
                raise ConfigError(f"biases of up to {bias}: from 0 to {_MAX_NORM:g}")
        if not self.result_most * _ROOM * 2.0**self.result_bits <= self.ring.modulus:
            raise ConfigError(
                f"results of up to {self.result_most:g} at a scale of 2**{self.result_bits} could wrap around a "
                f"modulus of {self.ring.modulus.bit_length()} bits: lower the scales or the clip, or take a larger ring"
            )

    @property
    def hidden_bits(self) -> int:
        """A hidden number is scaled by ``2**hidden_bits``."""
        return self.value_bits + self.weight_bits

    @property
    def result_bits(self) -> int:
        """A result is scaled by ``2**result_bits``."""
        return 2 * self.hidden_bits + self.second_bits

    @property
    def result_scale(self) -> float:
        """What a result is scaled by."""
        return 2.0**self.result_bits

    @property
    def hidden_most(self) -> float:
        """H: no hidden number is larger."""
        return self.row_norm * self.weight_norm + self.bias_most

    @property
    def result_most(self) -> float:
        """No result is larger."""
        return self.second_sum * self.hidden_most**2 + self.offset_most

    @property
    def block_rows(self) -> int:
        """Rows that a ciphertext holds: one in each slot, since squares of complex numbers mix two."""
        return self.ring.degree // 2

    def check_weights(self, layers: SquareMap) -> None:
        """Refuses weights with which a result could wrap, or be larger than the owner expects.

        Raises:
            LimitExceededError: says which.
        """
        for what, found, most in (
            ("weights of norm", layers.weight_norm, self.weight_norm),
            ("biases of up to", layers.bias_most, self.bias_most),
            ("second weights of sum", layers.second_sum, self.second_sum),
            ("second biases of up to", layers.offset_most, self.offset_most),
        ):
            if not found <= most * _SLACK:
                raise LimitExceededError(f"{what} {found:g}; the session allows {most:g}, beyond which results wrap")

    def to_proto(self) -> encryption_pb2.Encryption:
        """As a message."""
        return encryption_pb2.Encryption(
            ring_degree=self.ring.degree,
            moduli=self.ring.moduli,
            reserved=self.ring.reserved,
            value_bits=self.value_bits,
            weight_bits=self.weight_bits,
            row_norm=self.row_norm,
            square=encryption_pb2.Square(
                second_bits=self.second_bits,
                weight_norm=self.weight_norm,
                bias_most=self.bias_most,
                second_sum=self.second_sum,
                offset_most=self.offset_most,
            ),
        )


def square_from_proto(message: encryption_pb2.Encryption) -> SquareScheme:
    """Raises: SpecRejectedError for parameters that are not on the list, or could wrap."""
    if not message.HasField("square") or message.send_weights:
        raise SpecRejectedError("parameters of one layer, where linear, square, linear is asked for")
    square = message.square
    try:
        return SquareScheme(
            ring=ring_from_proto(message),
            value_bits=message.value_bits,
            weight_bits=message.weight_bits,
            second_bits=square.second_bits,
            row_norm=message.row_norm,
            weight_norm=square.weight_norm,
            bias_most=square.bias_most,
            second_sum=square.second_sum,
            offset_most=square.offset_most,
        )
    except ConfigError as error:
        raise SpecRejectedError(str(error)) from error


@dataclass(frozen=True, slots=True, eq=False)
class SquareMap:
    """The numbers of linear, square, linear: ``second.T @ (first.T @ x + bias)**2 + offset``.

    Attributes:
        first: float64 [F, H].
        bias: float64 [H].
        second: float64 [H, O].
        offset: float64 [O].
    """

    first: torch.Tensor
    bias: torch.Tensor
    second: torch.Tensor
    offset: torch.Tensor

    @property
    def weight_norm(self) -> float:
        """The largest L2 norm of a hidden number's weights."""
        return float(self.first.norm(dim=0).max())

    @property
    def bias_most(self) -> float:
        """The largest absolute bias."""
        return float(self.bias.abs().max())

    @property
    def second_sum(self) -> float:
        """The largest sum of an output's absolute weights."""
        return float(self.second.abs().sum(dim=0).max())

    @property
    def offset_most(self) -> float:
        """The largest absolute bias of an output."""
        return float(self.offset.abs().max())

    def __call__(self, rows_BF: torch.Tensor) -> torch.Tensor:
        """In the clear: float64 [B, O]."""
        return (rows_BF @ self.first + self.bias).square() @ self.second + self.offset


def check_square(program: Program) -> tuple[int, int, int]:
    """Features, hidden numbers and outputs of one row.

    Raises:
        SpecRejectedError: the program is not linear, square, linear.
        LimitExceededError: a matrix of it would be larger than :data:`wire.affine.MAX_MATRIX`.
    """
    first, second = _halves(program)
    features, hidden = check_affine(first)
    _, outputs = check_affine(second)
    return features, hidden, outputs


def square_map(program: Program, values: Mapping[str, torch.Tensor], device: torch.device) -> SquareMap:
    """The numbers of a program that :func:`check_square` took; made once for weights that stay.

    Args:
        program: the middle.
        values: its state, by name.
        device: computes.
    """
    first, second = _halves(program)
    return SquareMap(*affine_map(first, values, device), *affine_map(second, values, device))


def _halves(program: Program) -> tuple[Program, Program]:
    """The programs before and after the square.

    Raises:
        SpecRejectedError: there is not exactly one square, or something goes past it.
    """
    first = replace(program, train=_before(program, program.train), eval=_before(program, program.eval))
    if len(program.inputs) != 1:
        raise SpecRejectedError("an encrypted middle takes one tensor of float32")
    check_affine(first)  # before anything of it runs
    ((dtype, shape),) = output_shapes(first, first.train, 2)
    second = replace(
        program,
        inputs=(Input(dtype, tuple(shape[1:])),),
        train=_after(program, program.train),
        eval=_after(program, program.eval),
    )
    return first, second


def _before(program: Program, graph: Graph) -> Graph:
    number, squared = _square_of(program, graph)
    return Graph(graph.operations[:number], (squared,))


def _after(program: Program, graph: Graph) -> Graph:
    """What follows the square, its result numbered as an input."""
    number, _ = _square_of(program, graph)
    known = len(program.state)
    skipped = number + 1  # operations; their results are no longer numbered

    def moved(index: int) -> int:
        if index < known:
            return index
        if index < known + skipped:
            raise SpecRejectedError("an encrypted middle of linear, square, linear lets nothing go past its square")
        return index - skipped

    def renumbered(argument: Argument) -> Argument:
        if isinstance(argument, Ref):
            return Ref(moved(argument.index))
        return tuple(map(renumbered, argument)) if isinstance(argument, tuple) else argument

    operations = tuple(
        Operation(o.operator, tuple(map(renumbered, o.args)), tuple((name, renumbered(a)) for name, a in o.kwargs))
        for o in graph.operations[skipped:]
    )
    return Graph(operations, tuple(map(moved, graph.outputs)))


def _square_of(program: Program, graph: Graph) -> tuple[int, int]:
    """The number of the one operation that squares, and of the value that it squares.

    Raises:
        SpecRejectedError: none does, or several do.
    """
    found = [(number, squared) for number, o in enumerate(graph.operations) if (squared := _squared(o)) is not None]
    if len(found) != 1 or found[0][1] < len(program.state):
        raise SpecRejectedError(
            "evaluated in one go under encryption is a middle of a linear or convolution layer, one square (x * x, "
            f"x ** 2 or torch.square), and a linear or convolution layer; this one has {len(found)} squares"
        )
    return found[0]


def _squared(operation: Operation) -> int | None:
    """The number of the value that an operation squares, if it does."""
    name, args = operation.operator.name, operation.args
    squares = (
        name == "aten::square.default"
        or (name == "aten::pow.Tensor_Scalar" and len(args) > 1 and args[1] in (2, 2.0))
        or (name == "aten::mul.Tensor" and len(args) > 1 and args[0] == args[1])
    )
    return args[0].index if squares and isinstance(args[0], Ref) else None
