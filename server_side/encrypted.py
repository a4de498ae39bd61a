"""Encrypted layers: linear maps, evaluated on ciphertexts by a node that has no key and no library for them.

What comes up is an encryption of each row's activations; what goes down encrypts the same rows times a layer's
weights. A middle that is one such layer trains as well; of a deeper one each layer is evaluated by itself, and the
owner computes what lies between two of them. Ciphertexts add, and scale by integers, word by word, so a layer is a
product of matrices modulo q (:mod:`server_side.rings`), equal to the bit to what SEAL's evaluator makes of the same
integers. A convolution is lowered to its matrix. No decision depends on what the ciphertexts hold.

Packings. *Whole*: each feature has a ciphertext of its own, and weights are integers. *Shared*: a ciphertext holds
``block_rows`` rows of several features in turn, weights are polynomials whose slots repeat as often, and the owner sums
the features up after decryption. *Spread*, the other way round, where more outputs come than features: a ciphertext
holds one feature as often as it would hold several, and a result holds several outputs.

Shapes: ``C`` ciphertexts, ``F`` features of a row, ``O`` outputs, ``P`` polynomials (2), ``N`` words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from protos import encryption_pb2, program_pb2
from server_side.expansion import expand
from server_side.rings import combine, evaluations, multiply, slot_polynomials
from server_side.squares import apply_square, square_bytes
from wire.affine import ROWS_AT_ONCE, affine_layers, affine_map, bias_names, check_affine
from wire.ciphertexts import (
    MAX_CIPHERTEXTS,
    Ciphertexts,
    Ring,
    Scheme,
    Words,
    decode,
    encode_into,
    packed_counts,
    spreads,
)
from wire.errors import LimitExceededError, MessageRejectedError, SpecRejectedError
from wire.program import Program
from wire.squares import SquareMap, SquareScheme, check_square, square_map

__all__ = ["EncryptedLayers", "EncryptedSquare", "apply_matrix", "encrypted_bytes"]

_COPIES: Final = 6  # of the words, while they are multiplied: as integers, expanded, as limbs
_SQUARED: Final = 3  # polynomials of a product
_POLYNOMIALS_AT_ONCE: Final = 64  # products of words and weights: 1 MB of each intermediate at the smallest degree


class EncryptedLayers:
    """A session's linear maps on ciphertexts.

    Attributes:
        trains: whether the middle is one linear map as a whole, and can be trained.
    """

    def __init__(self, program: Program, scheme: Scheme, device: torch.device, max_bytes: int) -> None:
        """Finds the program's layers.

        Raises:
            SpecRejectedError: it has none, or one that is no linear map by its own weights.
            LimitExceededError: a matrix or its ciphertexts would be larger than the node allows.
        """
        self._layers = affine_layers(program)
        self._program, self._scheme, self._device, self._max_bytes = program, scheme, device, max_bytes
        self._matrices: dict[int, torch.Tensor] = {}
        self._step = -1
        self.trains = _is_affine(program)
        self._told = {
            spec.name
            for spec in program.state
            if self.trains
            and spec.kind == program_pb2.STATE_KIND_PARAMETER
            and (scheme.send_weights or spec.name in bias_names(program))
        }

    def infer(
        self,
        number: int,
        message: encryption_pb2.Ciphertexts,
        values: Mapping[str, torch.Tensor],
        step: int,
        into: encryption_pb2.Ciphertexts,
    ) -> list[torch.Tensor]:
        """One layer's rows times its weights, without the bias; returns the bias where the owner has no weights.

        Args:
            number: of the layer.
            message: what came up.
            values: the program's state, by name.
            step: that comes next: as long as it is the same, so are the values.
            into: the answer.

        Raises:
            MessageRejectedError: there is no such layer.
            MessageRejectedError, LimitExceededError: as for :meth:`forward`.
        """
        if number >= len(self._layers):
            raise MessageRejectedError(f"layer {number} of a middle that has {len(self._layers)}")
        layer = self._layers[number]
        if step != self._step:
            self._matrices.clear()
            self._step = step
        if number not in self._matrices:
            self._matrices[number] = layer.matrix(values[layer.weight].to(self._device))
        self._apply(message, self._matrices[number], into)
        return [] if self._scheme.send_weights or layer.bias is None else [values[layer.bias].detach()]

    def forward(
        self, message: encryption_pb2.Ciphertexts, values: Mapping[str, torch.Tensor], into: encryption_pb2.Ciphertexts
    ) -> None:
        """Encrypted activations times the weights, without the bias.

        Raises:
            MessageRejectedError, LimitExceededError: see :func:`wire.ciphertexts.decode`; or weights with which a
                result could wrap.
        """
        matrix_FO, _ = affine_map(self._program, values, self._device)
        self._apply(message, matrix_FO, into)

    def backward(
        self, message: encryption_pb2.Ciphertexts, values: Mapping[str, torch.Tensor], into: encryption_pb2.Ciphertexts
    ) -> None:
        """Encrypted output gradients times the transposed weights.

        Raises:
            MessageRejectedError, LimitExceededError: as for :meth:`forward`.
        """
        matrix_FO, _ = affine_map(self._program, values, self._device)
        self._apply(message, matrix_FO.T, into, may_spread=True)

    def told(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the owner computes with in the clear: all parameters, or only biases, in the program's order."""
        return [values[spec.name].detach() for spec in self._program.state if spec.name in self._told]

    def _apply(
        self,
        message: encryption_pb2.Ciphertexts,
        matrix_FO: torch.Tensor,
        into: encryption_pb2.Ciphertexts,
        *,
        may_spread: bool = False,
    ) -> None:
        scheme, ring = self._scheme, self._scheme.ring
        features, outputs = matrix_FO.shape
        if not torch.isfinite(matrix_FO).all():
            raise LimitExceededError("weights that are not finite: the training diverged")
        scheme.check_weights(float(matrix_FO.norm(dim=0).max()))
        block = _checked_block(message.block_rows, ring)
        each = ring.degree // block
        spread = may_spread and spreads(features, outputs, each)
        up, down = packed_counts(features, outputs, each, spread=spread)
        if 8 * 2 * ring.degree * (up + down) > self._max_bytes or down > MAX_CIPHERTEXTS:
            raise LimitExceededError(f"{up} ciphertexts up and {down} down; the limit is {self._max_bytes} bytes")
        came = decode(message, ring, count=up, block_rows=block, seeded=True, max_bytes=self._max_bytes)
        made = apply_matrix(came, matrix_FO, scheme, self._device, spread=spread)
        encode_into(into, Ciphertexts(block, None, made), ring)


class EncryptedSquare:
    """A session's linear, square, linear on ciphertexts, in one go; it never trains."""

    def __init__(self, program: Program, scheme: SquareScheme, device: torch.device, max_bytes: int) -> None:
        """Checks that the program is one.

        Raises:
            SpecRejectedError: it is not.
            LimitExceededError: a matrix or its ciphertexts would be larger than the node allows.
        """
        self._features, _, outputs = check_square(program)
        held = 8 * scheme.ring.words * (2 * self._features + _SQUARED * outputs)
        if held > max_bytes or outputs > MAX_CIPHERTEXTS:
            raise LimitExceededError(f"ciphertexts of {held} bytes up and down; the limit is {max_bytes}")
        self._program, self._scheme, self._device, self._max_bytes = program, scheme, device, max_bytes
        self._map: SquareMap | None = None
        self._step = -1

    def infer(
        self,
        number: int,
        message: encryption_pb2.Ciphertexts,
        values: Mapping[str, torch.Tensor],
        step: int,
        into: encryption_pb2.Ciphertexts,
    ) -> list[torch.Tensor]:
        """The whole middle, biases included; see :meth:`EncryptedLayers.infer`.

        Raises:
            MessageRejectedError: another layer than 0 is asked for.
            MessageRejectedError, LimitExceededError: see :func:`wire.ciphertexts.decode`; or weights with which a
                result could wrap.
        """
        if number:
            raise MessageRejectedError(f"layer {number} of a middle that is evaluated in one go")
        if self._map is None or step != self._step:
            self._map, self._step = square_map(self._program, values, self._device), step
        scheme = self._scheme
        came = decode(
            message,
            scheme.ring,
            count=self._features,
            block_rows=scheme.block_rows,
            seeded=True,
            max_bytes=self._max_bytes,
        )
        made = apply_square(came, self._map, scheme, self._device)
        encode_into(into, Ciphertexts(scheme.block_rows, None, made), scheme.ring)
        return []


def apply_matrix(
    came: Ciphertexts, matrix_FO: torch.Tensor, scheme: Scheme, device: torch.device, *, spread: bool = False
) -> Words:
    """Every output's ciphertext.

    Args:
        came: with seeds.
        matrix_FO: float64, the weights; rounded to multiples of ``2**-weight_bits``.
        scheme: the session's.
        device: computes.
        spread: whether several outputs share a ciphertext, not several features.

    Returns:
        uint64 [P, C, N], C as :func:`wire.ciphertexts.packed_counts` says.
    """
    ring = scheme.ring
    if came.seeds is None:
        raise SpecRejectedError("ciphertexts come up with seeds")
    both = np.concatenate([came.words, expand(came.seeds, ring)[None]])
    words_PCN = torch.from_numpy(both.view(np.int64)).to(device)
    if came.block_rows == ring.degree:
        weights_FO = (matrix_FO * 2.0**scheme.weight_bits).round().to(torch.int64)
        made = combine(words_PCN, weights_FO, ring)
    else:
        each = ring.degree // came.block_rows
        weights = _spread(matrix_FO, each) if spread else _shared(matrix_FO, each)
        made = _combine_periods(words_PCN, weights, scheme)
    return made.cpu().numpy().view(np.uint64)


def _shared(matrix_FO: torch.Tensor, each: int) -> torch.Tensor:
    """Of each output and ciphertext, the weights of its features in turn; [O, C, each]."""
    features, outputs = matrix_FO.shape
    count = math.ceil(features / each)
    padded = torch.zeros(outputs, count * each, dtype=torch.float64, device=matrix_FO.device)
    padded[:, :features] = matrix_FO.T
    return padded.reshape(outputs, count, each)


def _spread(matrix_FO: torch.Tensor, each: int) -> torch.Tensor:
    """Of each ciphertext of outputs and feature, the outputs' weights in turn; [R, F, each]."""
    features, outputs = matrix_FO.shape
    padded = torch.zeros(features, math.ceil(outputs / each) * each, dtype=torch.float64, device=matrix_FO.device)
    padded[:, :outputs] = matrix_FO
    return padded.reshape(features, -1, each).transpose(0, 1)


def _combine_periods(words_PCN: torch.Tensor, weights_RCf: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """``sum over C of words * the polynomials whose slots repeat their weights``, modulo q; int64 [P, R, N]."""
    ring, (results, count, period) = scheme.ring, weights_RCf.shape
    # A polynomial whose slots have a period has equal evaluations side by side: one of each is enough.
    words_PCnk = words_PCN.reshape(2, 1, count, 2 * period, -1)
    made = torch.zeros(2, results, *words_PCnk.shape[3:], dtype=torch.int64, device=words_PCN.device)
    columns = min(count, _POLYNOMIALS_AT_ONCE)  # sums of so many words stay below 2**63
    rows = max(1, _POLYNOMIALS_AT_ONCE // columns)
    for top in range(0, results, rows):
        for left in range(0, count, columns):
            at, of = slice(top, top + rows), slice(left, left + columns)
            polynomials = slot_polynomials(weights_RCf[at, of], 2.0**scheme.weight_bits).remainder_(ring.modulus)
            weights_RCn1 = evaluations(polynomials, ring)[..., None]
            for half, words_1Cnk in enumerate(words_PCnk):
                made[half, at] += multiply(words_1Cnk[:, of], weights_RCn1, ring).sum(dim=1).remainder_(ring.modulus)
    return made.remainder_(ring.modulus).reshape(2, results, ring.degree)


def encrypted_bytes(program: Program, scheme: Scheme | SquareScheme) -> int:
    """What evaluating the largest layer once may hold, and the matrices of all of them, for an owner's account.

    Raises:
        SpecRejectedError, LimitExceededError: the program is none that can be evaluated so.
    """
    if isinstance(scheme, SquareScheme):
        features, hidden, outputs = check_square(program)
        return square_bytes(scheme, features, hidden, outputs) + 8 * hidden * (features + outputs)
    layers = affine_layers(program)
    sizes = [(layer.features, layer.outputs) for layer in layers]
    sizes += [check_affine(program)] if _is_affine(program) else []
    once = max(
        _COPIES * 2 * scheme.ring.degree * (features + outputs)
        + 3 * features * outputs
        + 3 * ROWS_AT_ONCE * (features + outputs)
        for features, outputs in sizes
    )
    return 8 * (once + sum(layer.features * layer.outputs for layer in layers))


def _is_affine(program: Program) -> bool:
    try:
        check_affine(program)
    except (SpecRejectedError, LimitExceededError):
        return False
    return True


def _checked_block(block_rows: int, ring: Ring) -> int:
    """Raises: LimitExceededError for a block that is no power of two from 2 to the ring's degree."""
    if not 2 <= block_rows <= ring.degree or block_rows & (block_rows - 1):  # noqa: PLR2004 -- a slot holds two
        raise LimitExceededError(f"blocks of {block_rows} rows: a power of two, from 2 to {ring.degree}")
    return block_rows
