"""The whole model in evaluation mode, its middle on a node that sees ciphertexts alone.

The node multiplies by the weights of one linear or convolution layer at a time. What lies between two layers (bias,
activation function, pooling, normalization) is computed here: results are decrypted, checked, worked on, and encrypted
anew under a fresh key for the next layer. Nothing that was decrypted leaves in the clear (THREATS T18), and how many
messages there are depends on the program and the number of rows alone.

Rows travel at the one length that the scheme allows, whatever theirs is, and results are scaled back at home: so no
activation is too long, and the error bound of :mod:`privacy.ckks.layer` holds relative to each row's own length.

Shapes: ``R`` rows of a layer (those of a group of batches, or so many for each of them), ``F`` features of one, ``O``
outputs of one, ``P`` secret combinations of rows.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from client_side.cutting import Cut
from client_side.frames import SentCiphertexts
from client_side.link import Inferred, Query
from client_side.pieces import Piece, handed_out, put_together, split_outputs
from client_side.route import SessionLink
from client_side.steps import Batch
from privacy.ckks.layer import (
    PROBES,
    LayerBound,
    block_rows_for,
    check_combinations,
    check_probes,
    check_results,
    pack_rows,
    probes,
    unpack_rows,
)
from privacy.ckks.workers import CipherWorkers, StepKey
from privacy.guard import Guard
from privacy.policy import CkksInference
from wire.affine import AffineLayer, affine_layers, check_light
from wire.ciphertexts import RINGS, Scheme, decode
from wire.codec import MAX_TENSOR_BYTES, check_finite
from wire.errors import (
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    SpecRejectedError,
    TamperingSuspectedError,
)
from wire.interpreter import Runner

__all__ = ["EncryptedInference", "EncryptionUsed", "InferenceEvidence", "inference_scheme"]

_UNDER_WAY: Final = 4  # groups of rows between their first layer and their last
_LEAST_NORM: Final = 1e-30
_MOST_NORM: Final = 1024.0  # that rows are scaled to: beyond, errors are those of double precision
_VALUE_BITS: Final = 20
_WEIGHT_BITS: Final = 24
_TRIED_ROWS: Final = 3

_Array = npt.NDArray[np.float64]
_Walk = Generator[tuple[int, Any], torch.Tensor, list[torch.Tensor]]


def inference_scheme(cut: Cut, treatment: CkksInference) -> Scheme:
    """Scales with which no result of ``cut``'s middle, as its weights are now, can wrap around the modulus.

    Raises:
        ConfigError: the middle cannot be evaluated so, or its weights are too large; says what to do.
    """
    state = cut.middle_state()
    norm = max(_weight_norm(state[layer.weight]) for layer in _layers(cut, weights_here=treatment.send_weights))
    for ring in RINGS:
        made = Scheme(
            ring=ring,
            value_bits=_VALUE_BITS,
            weight_bits=_WEIGHT_BITS,
            row_norm=1.0,
            send_weights=treatment.send_weights,
        )
        fitting = made.largest_result * (1 - 2**-20) / max(norm, _LEAST_NORM)
        if fitting >= 1.0:  # never of weights that are not finite
            return Scheme(
                ring=ring,
                value_bits=_VALUE_BITS,
                weight_bits=_WEIGHT_BITS,
                row_norm=min(fitting, _MOST_NORM),
                send_weights=treatment.send_weights,
            )
    raise ConfigError(
        f"encrypted inference: weights of norm {norm:g} could make ciphertexts wrap; scale the layer's weights down "
        "(and what follows up), or move the cut"
    )


@dataclass(frozen=True, slots=True)
class EncryptionUsed:
    """What a middle was evaluated under.

    Attributes:
        degree: of the ring.
        modulus_bits: of its prime.
        security_bits: by the HomomorphicEncryption.org standard.
        layers: that the node evaluated.
    """

    degree: int
    modulus_bits: int
    security_bits: int
    layers: int

    def __str__(self) -> str:
        """For a result."""
        return f"CKKS, ring degree {self.degree}, modulus of {self.modulus_bits} bits"


@dataclass(frozen=True, slots=True)
class InferenceEvidence:
    """What went up and what came down, where it was not what it should have been."""

    sent: bytes = field(repr=False)
    answer: bytes = field(repr=False)

    def save(self, folder: Path) -> Path:
        """Writes both into ``folder``; returns where."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tampering-inference-sent.bin").write_bytes(self.sent)
        kept = folder / "tampering-inference-answer.bin"
        kept.write_bytes(self.answer)
        return kept


@dataclass(frozen=True, slots=True)
class _Request:
    """One layer's rows on their way, and what is needed to read the answer."""

    layer: int
    shape: tuple[int, ...]
    key: StepKey
    block: int
    norms: _Array = field(repr=False)  # [R, 1]
    rows: _Array = field(repr=False)  # [R, F], scaled
    probes: _Array | None = field(repr=False)  # [P, R]
    query: Query = field(repr=False)


@dataclass(slots=True)
class _Group:
    """Rows that go through the middle together."""

    pieces: list[Piece]
    walk: _Walk
    request: _Request | None = None
    outputs: list[torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class _Flow:
    """Groups on their way: all in order, those that have something to ask, and those that wait for an answer."""

    under_way: deque[_Group] = field(default_factory=deque)
    ready: deque[_Group] = field(default_factory=deque)
    sent: deque[_Group] = field(default_factory=deque)

    def finished(self) -> Iterator[tuple[Piece, list[torch.Tensor]]]:
        """The pieces of groups that are through, with their outputs, in order."""
        while self.under_way and self.under_way[0].outputs is not None:
            group = self.under_way.popleft()
            yield from split_outputs(group.pieces, group.outputs or [])


class EncryptedInference:
    """Runs one cut in evaluation mode over one link, its middle under encryption. For one thread.

    Attributes:
        scheme: of the session.
        evidence: of what a node did, after :class:`TamperingSuspectedError`.
    """

    def __init__(
        self,
        cut: Cut,
        link: SessionLink,
        guard: Guard,
        workers: CipherWorkers,
        scheme: Scheme,
        *,
        check_rows: int,
        clip: float | None,
        device: torch.device,
    ) -> None:
        """Takes what all batches have in common; the session on ``link`` is open, and of ``scheme``.

        Args:
            cut: the model's parts; where the scheme sends weights, with the middle's as the node has them.
            link: to the node.
            guard: the door out.
            workers: encrypt and decrypt.
            scheme: of the session.
            check_rows: of each layer's rows so many, drawn at random, are computed here and compared.
            clip: to which each record's activations are scaled down, where the model was trained so.
            device: the owner's.

        Raises:
            ConfigError: the middle cannot be evaluated so; says what to do.
        """
        self._cut, self._link, self._guard, self._workers = cut, link, guard, workers
        self.scheme, self._check_rows, self._clip, self._device = scheme, check_rows, clip, device
        self._layers = _layers(cut, weights_here=scheme.send_weights)
        self._numbers = {layer.number: index for index, layer in enumerate(self._layers)}
        self._runner = Runner(cut.program, cut.program.eval, device)
        self._state = {name: tensor.detach().to(device) for name, tensor in cut.middle_state().items()}
        self._wide = {layer.weight: self._state[layer.weight].to("cpu", torch.float64) for layer in self._layers}
        extra = 0 if scheme.send_weights else PROBES
        most = max(layer.rows_each for layer in self._layers)
        self._capacity = (scheme.ring.degree - extra) // most
        if not self._capacity:
            raise ConfigError(
                f"encrypted inference: one record has {most} rows in a layer, and a ciphertext holds "
                f"{scheme.ring.degree - extra}: move the cut so that this layer falls to the front or the head"
            )
        self._rows = 1  # of a group, at most, so far: what a node learns of how many there are
        self.evidence: InferenceEvidence | None = None
        self._refuse_mixing()
        workers.start()

    @property
    def used(self) -> EncryptionUsed:
        """For the record."""
        ring = self.scheme.ring
        return EncryptionUsed(ring.degree, ring.modulus.bit_length(), ring.security_bits, len(self._layers))

    def outputs(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """The model's output for each of ``batches``, in order.

        Batches share ciphertexts where there is room; several groups of them are under way at a time. Call it inside
        :func:`client_side.inference.evaluation_mode`.

        Raises:
            TamperingSuspectedError: what came back is not what was asked for.
            NonFiniteError: activations that are not finite.
            EncryptionError, WireError, UnreachableError: as in training.
        """
        return handed_out(self._cut, self._finished(batches))

    def _finished(self, batches: Iterable[Batch]) -> Iterator[tuple[Piece, list[torch.Tensor]]]:
        flow, groups = _Flow(), self._groups(batches)
        for answer in self._link.infer(self._queries(flow, groups)):
            group = flow.sent.popleft()
            self._advance(group, self._results(_asked(group), answer))
            if group.outputs is None:
                flow.ready.append(group)
            yield from flow.finished()

    def _queries(self, flow: _Flow, groups: Iterator[_Group]) -> Iterator[Query | None]:
        """What is to be asked next; ``None`` where that depends on an answer."""
        while True:
            if not flow.ready and len(flow.under_way) < _UNDER_WAY and (group := next(groups, None)) is not None:
                flow.under_way.append(group)
                self._advance(group, None)
                flow.ready.append(group)
            if flow.ready:
                group = flow.ready.popleft()
                flow.sent.append(group)
                yield _asked(group).query
            elif flow.sent:
                yield None
            else:
                return

    def _groups(self, batches: Iterable[Batch]) -> Iterator[_Group]:
        """The batches' smashed data, as many rows together as a ciphertext holds."""
        for pieces in put_together(self._cut, batches, capacity=self._capacity, clip=self._clip, device=self._device):
            self._rows = max(self._rows, sum(piece.rows for piece in pieces))
            smashed = [torch.cat(tensors) for tensors in zip(*(piece.smashed for piece in pieces), strict=True)]
            values = [*(self._state[spec.name] for spec in self._cut.program.state), *smashed]
            yield _Group(pieces, self._runner.walk(values, frozenset(self._numbers)))

    def _advance(self, group: _Group, results: torch.Tensor | None) -> None:
        """Computes up to the next layer, or to the end."""
        try:
            number, operand = next(group.walk) if results is None else group.walk.send(results)
        except StopIteration as done:
            group.request, group.outputs = None, done.value
            return
        group.request = self._encrypted(self._numbers[number], operand)

    def _encrypted(self, number: int, operand: torch.Tensor) -> _Request:
        layer, scheme = self._layers[number], self.scheme
        check_finite(operand, f"the input of the middle's layer {number}")
        split = operand.ndim - len(layer.shape)
        if tuple(operand.shape[split:]) != layer.shape:
            raise ConfigError(
                f"encrypted inference: layer {number} gets rows of {tuple(operand.shape[split:])}, and of "
                f"{layer.shape} in a batch of two: shapes must not depend on the batch"
            )
        rows_RF = operand.reshape(-1, layer.features).to("cpu", torch.float64).numpy()
        norms_R1 = np.linalg.norm(rows_RF, axis=1, keepdims=True)
        sent_RF = scheme.row_norm * (1 - 2**-40) * rows_RF / np.maximum(norms_R1, _LEAST_NORM)
        probes_PR = None if scheme.send_weights else probes(len(sent_RF))
        whole_RF = sent_RF if probes_PR is None else np.concatenate([sent_RF, probes_PR @ sent_RF])
        reserved = self._rows * layer.rows_each + (0 if probes_PR is None else PROBES)
        block, key = block_rows_for(reserved, scheme.ring.degree), StepKey()
        made = self._workers.encrypt(key, pack_rows(whole_RF, block, scheme.ring.degree), 2.0**scheme.value_bits)
        query = Query(ciphertexts=SentCiphertexts(block, *self._guard.encrypted_inference(made)), layer=number)
        shape = (*operand.shape[:split], *layer.made)
        return _Request(number, shape, key, block, norms_R1, sent_RF, probes_PR, query)

    def _results(self, request: _Request, answer: Inferred) -> torch.Tensor:
        """A layer's results, bias included, once they were checked."""
        layer, scheme = self._layers[request.layer], self.scheme
        bias = self._bias(layer, answer)
        if answer.ciphertexts is None:
            raise MessageRejectedError("the node's answer carries no ciphertexts")
        came = decode(
            answer.ciphertexts,
            scheme.ring,
            count=layer.outputs,
            block_rows=request.block,
            seeded=False,
            max_bytes=MAX_TENSOR_BYTES,
        )
        results_RO = unpack_rows(self._workers.decrypt(request.key, came, scheme.result_scale), request.block)
        try:
            self._check(request, results_RO)
        except TamperingSuspectedError:
            sent = b"" if request.query.ciphertexts is None else request.query.ciphertexts.message().SerializeToString()
            self.evidence = InferenceEvidence(sent, answer.ciphertexts.SerializeToString())
            raise
        scale_R1 = request.norms / (scheme.row_norm * (1 - 2**-40))
        made = torch.from_numpy(results_RO[: len(scale_R1)] * scale_R1).reshape(request.shape)
        if bias is not None:
            made += bias.to("cpu", torch.float64).reshape(-1, *[1] * (len(layer.made) - 1))
        return made.to(self._device, torch.float32)

    def _check(self, request: _Request, results_RO: _Array) -> None:
        layer, scheme = self._layers[request.layer], self.scheme
        weight = self._wide[layer.weight] if scheme.send_weights else None
        norm = scheme.largest_result / scheme.row_norm  # with longer weights a node refuses
        features = layer.features
        if weight is not None:
            norm, features = _weight_norm(weight), min(features, weight[0].numel())
        bound = LayerBound.of(scheme, features=features, weight_norm=norm, block_rows=request.block)
        rows_RF, probes_PR = request.rows, request.probes
        sent = len(rows_RF) + (0 if probes_PR is None else len(probes_PR))
        most = min(scheme.largest_result, norm * scheme.row_norm) + bound.total
        check_results(results_RO, sent, most=most, tolerance=bound.total)
        if probes_PR is not None:
            check_probes(results_RO, probes_PR, tolerance=bound.total)
        if weight is None:
            return
        drawn = [secrets.randbelow(len(rows_RF)) for _ in range(min(self._check_rows, len(rows_RF)))]
        wanted_RO = layer.apply(torch.from_numpy(rows_RF[drawn]), weight).numpy()
        if (np.abs(results_RO[drawn] - wanted_RO) > bound.total).any():
            raise TamperingSuspectedError("the node returned other products than those of the layer's weights")
        check_combinations(
            results_RO,
            rows_RF,
            lambda rows: layer.apply(torch.from_numpy(rows), weight).numpy(),
            bound=bound,
            row_norm=scheme.row_norm,
            pairs=0 if request.block == scheme.ring.degree else request.block // 2,
        )

    def _bias(self, layer: AffineLayer, answer: Inferred) -> torch.Tensor | None:
        """Raises: MessageRejectedError where the node told another bias than the layer has, or one unasked."""
        told = [] if self.scheme.send_weights or layer.bias is None else [self._state[layer.bias]]
        made = [(t.dtype, t.shape) for t in answer.tensors if t is not None]
        if made != [(t.dtype, t.shape) for t in told] or len(answer.tensors) != len(told):
            raise MessageRejectedError(f"the node told tensors of {made} with a layer's results")
        if layer.bias is None:
            return None
        return answer.tensors[0] if told else self._state[layer.bias]

    def _refuse_mixing(self) -> None:
        """Raises: ConfigError where a row's outputs depend on the rows beside it: those are others than a batch's."""
        state = [self._state[spec.name] for spec in self._cut.program.state]
        inputs = [
            (torch.rand if spec.dtype.is_floating_point else torch.zeros)(_TRIED_ROWS, *spec.shape, dtype=spec.dtype)
            for spec in self._cut.program.inputs
        ]
        with torch.random.fork_rng(), torch.no_grad():
            together = self._runner.run([*state, *(x.clone().to(self._device) for x in inputs)])
            apart = [
                self._runner.run([*state, *(x[row : row + 1].clone().to(self._device) for x in inputs)])
                for row in range(_TRIED_ROWS)
            ]
        for whole, *rows in zip(together, *apart, strict=True):
            single = torch.cat(rows) if whole.ndim else rows[0]
            if single.shape != whole.shape or not torch.allclose(single, whole, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ConfigError(
                    "encrypted inference: the middle computes with several rows of a batch together, and batches share "
                    "ciphertexts: move the cut so that this falls to the head"
                )


def _layers(cut: Cut, *, weights_here: bool) -> tuple[AffineLayer, ...]:
    try:
        layers = affine_layers(cut.program)
        check_light(cut.program, weights_here=weights_here)
    except (SpecRejectedError, LimitExceededError) as error:
        raise ConfigError(f"encrypted inference: {error}") from error
    return layers


def _weight_norm(weight: torch.Tensor) -> float:
    """The largest L2 norm of an output's weights; a convolution's outputs at an edge have fewer."""
    return float(weight.detach().to(torch.float64).flatten(1).norm(dim=1).max())


def _asked(group: _Group) -> _Request:
    if group.request is None:
        raise MessageRejectedError("the node answered what it was not asked")
    return group.request
