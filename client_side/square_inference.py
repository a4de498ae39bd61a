"""The whole model in evaluation mode, its middle of linear, square, linear on a node that gets ciphertexts once.

A batch goes up, and comes back through the whole middle: one exchange where :mod:`client_side.encrypted_inference`
takes two. It costs larger rings, and rows whose length is bounded beforehand: the square of a longer one could wrap.

What is checked of an answer stands in :mod:`privacy.ckks.square`. The owner has the weights, and compares with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from client_side.cutting import Cut
from client_side.encrypted_inference import EncryptionUsed, InferenceEvidence
from client_side.frames import SentCiphertexts
from client_side.link import Inferred, Query
from client_side.pieces import Piece, handed_out, put_together, split_outputs
from client_side.route import SessionLink
from client_side.steps import Batch
from privacy.ckks.square import SquareBatch, SquareBound, rows_at_once, square_scheme
from privacy.ckks.workers import CipherWorkers, StepKey
from privacy.guard import Guard
from privacy.policy import CkksSquare
from wire.ciphertexts import decode
from wire.codec import MAX_TENSOR_BYTES, check_finite
from wire.errors import (
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    SpecRejectedError,
    TamperingSuspectedError,
)
from wire.interpreter import output_shapes
from wire.squares import SquareMap, SquareScheme, check_square, square_map

__all__ = ["SquareInference", "square_inference_scheme"]

_POLYNOMIALS: Final = 3  # of a product of two ciphertexts
_LAYERS: Final = 2


def square_inference_scheme(cut: Cut, treatment: CkksSquare) -> SquareScheme:
    """The smallest ring, and in it the scales, for ``cut``'s middle as its weights are now.

    Raises:
        ConfigError: the middle is not linear, square, linear; or no ring does it. Says what to do.
    """
    layers = _numbers(cut)
    features, hidden = layers.first.shape
    return square_scheme(
        features=features,
        hidden=hidden,
        row_norm=treatment.row_norm,
        weight_norm=layers.weight_norm,
        bias_most=layers.bias_most,
        second_sum=layers.second_sum,
        offset_most=layers.offset_most,
        tolerance=treatment.tolerance,
    )


@dataclass(frozen=True, slots=True)
class _Request:
    """Rows on their way, and what is needed to read the answer."""

    pieces: list[Piece]
    key: StepKey
    batch: SquareBatch = field(repr=False)
    query: Query = field(repr=False)


class SquareInference:
    """Runs one cut in evaluation mode over one link, its middle under encryption in one go. For one thread.

    Attributes:
        evidence: of what a node did, after :class:`TamperingSuspectedError`.
    """

    def __init__(
        self,
        cut: Cut,
        link: SessionLink,
        guard: Guard,
        workers: CipherWorkers,
        scheme: SquareScheme,
        *,
        device: torch.device,
    ) -> None:
        """Takes what all batches have in common; the session on ``link`` is open, and of ``scheme``.

        Args:
            cut: the model's parts, with the middle's weights as the node has them.
            link: to the node.
            guard: the door out.
            workers: encrypt and decrypt.
            scheme: of the session.
            device: the owner's.
        """
        self._cut, self._link, self._guard, self._workers = cut, link, guard, workers
        self._scheme, self._device = scheme, device
        self._layers = _numbers(cut)
        features, hidden = self._layers.first.shape
        self._bound = SquareBound.of(scheme, features=features, hidden=hidden)
        self._shape = output_shapes(cut.program, cut.program.eval, 2)[0][1][1:]
        self.evidence: InferenceEvidence | None = None
        workers.start()

    @property
    def used(self) -> EncryptionUsed:
        """For the record."""
        ring = self._scheme.ring
        return EncryptionUsed(ring.degree, ring.modulus.bit_length(), ring.security_bits, _LAYERS)

    def outputs(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """The model's output for each of ``batches``, in order; several share ciphertexts where there is room.

        Call it inside :func:`client_side.inference.evaluation_mode`.

        Raises:
            ConfigError: a row is longer than the policy says.
            TamperingSuspectedError: what came back is not what was asked for.
            NonFiniteError: activations that are not finite.
            EncryptionError, WireError, UnreachableError: as in training.
        """
        return handed_out(self._cut, self._finished(batches))

    def _finished(self, batches: Iterable[Batch]) -> Iterator[tuple[Piece, list[torch.Tensor]]]:
        sent: deque[_Request] = deque()
        for answer in self._link.infer(self._queries(batches, sent)):
            request = sent.popleft()
            yield from split_outputs(request.pieces, [self._results(request, answer)])

    def _queries(self, batches: Iterable[Batch], sent: deque[_Request]) -> Iterator[Query]:
        capacity = rows_at_once(self._scheme.ring)
        for pieces in put_together(self._cut, batches, capacity=capacity, clip=None, device=self._device):
            sent.append(self._encrypted(pieces))
            yield sent[-1].query

    def _encrypted(self, pieces: list[Piece]) -> _Request:
        scheme = self._scheme
        smashed = torch.cat([piece.smashed[0] for piece in pieces])
        check_finite(smashed, "the middle's input")
        rows_BF = smashed.flatten(1).to("cpu", torch.float64).numpy()
        longest = float(np.linalg.norm(rows_BF, axis=1).max(initial=0.0))
        if longest > scheme.row_norm:
            raise ConfigError(
                f"encrypted inference: an activation of norm {longest:g}, and privacy.inference.row_norm is "
                f"{scheme.row_norm:g}: raise it, or let the front end in a layer that bounds its outputs"
            )
        batch, key = SquareBatch(rows_BF, scheme), StepKey()
        made = self._workers.encrypt(key, batch.slots, 2.0**scheme.value_bits)
        sent = SentCiphertexts(scheme.block_rows, *self._guard.encrypted_inference(made))
        return _Request(pieces, key, batch, Query(ciphertexts=sent, layer=0))

    def _results(self, request: _Request, answer: Inferred) -> torch.Tensor:
        """The middle's outputs, once they were checked."""
        scheme = self._scheme
        if answer.ciphertexts is None or answer.tensors:
            raise MessageRejectedError("the node's answer carries no ciphertexts, or tensors beside them")
        came = decode(
            answer.ciphertexts,
            scheme.ring,
            count=self._layers.second.shape[1],
            block_rows=scheme.block_rows,
            seeded=False,
            polynomials=_POLYNOMIALS,
            max_bytes=MAX_TENSOR_BYTES,
        )
        decrypted_OS = self._workers.decrypt(request.key, came, scheme.result_scale)
        try:
            results_BO = request.batch.results(decrypted_OS, self._bound, self._layers)
        except TamperingSuspectedError:
            sent = b"" if request.query.ciphertexts is None else request.query.ciphertexts.message().SerializeToString()
            self.evidence = InferenceEvidence(sent, answer.ciphertexts.SerializeToString())
            raise
        return torch.from_numpy(results_BO).reshape(-1, *self._shape).to(self._device, torch.float32)


def _numbers(cut: Cut) -> SquareMap:
    """Raises: ConfigError where the middle is not linear, square, linear."""
    try:
        check_square(cut.program)
    except (SpecRejectedError, LimitExceededError) as error:
        raise ConfigError(f"encrypted inference: {error}") from error
    return square_map(cut.program, cut.middle_state(), torch.device("cpu"))
