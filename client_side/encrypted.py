"""One training step whose middle is evaluated under encryption: the owner's part.

Up: each row's activations, clipped and encrypted under a key of this step alone. Down: the same rows times the node's
weights, encrypted, and the weights themselves (or, where these stay with the node, the front's gradients after the
output gradients went up encrypted). Bias, head, loss and labels are here. Then, in the clear, one gradient of the
layer's parameters: each record's clipped together with those of front and head, and noised. Nothing else that depends
on what was decrypted ever leaves (THREATS T18).

Shapes: ``B`` rows, ``F`` features of each, ``O`` outputs of each, both flattened.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client_side.cutting import Cut
from client_side.frames import SentCiphertexts, SentFrame, encode_frame
from client_side.link import Answer
from client_side.route import SessionLink
from client_side.steps import MicroBatch
from privacy.ckks.layer import (
    PROBES,
    LayerBound,
    block_rows_for,
    check_probes,
    check_products,
    check_results,
    pack_rows,
    probes,
    unpack_rows,
)
from privacy.ckks.settings import EncryptionSettings
from privacy.ckks.workers import CipherWorkers, StepKey
from privacy.dp_sgd import DpGradients
from privacy.guard import Guard
from privacy.hijack import HijackDetector
from privacy.policy import Ckks, DpSgd
from protos import node_pb2
from wire.affine import affine_map, bias_names, check_affine
from wire.ciphertexts import Scheme, decode, packed_counts, spreads
from wire.codec import MAX_TENSOR_BYTES
from wire.errors import (
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    SpecRejectedError,
    TamperingSuspectedError,
)
from wire.interpreter import output_shapes
from wire.optimizers import PartOptimizer
from wire.recipe import Loss, own_streams, seed_stream

__all__ = ["EncryptedPart", "EncryptedRunner"]

_LEAST_NORM: Final = 1e-30

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What went up and what came down, where it was not what it should have been."""

    sent: SentFrame = field(repr=False)
    answer: bytes = field(repr=False)

    def save(self, folder: Path) -> Path:
        """Writes both into ``folder``; returns where."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"tampering-{self.sent.step}-sent.bin").write_bytes(self.sent.data)
        kept = folder / f"tampering-{self.sent.step}-answer.bin"
        kept.write_bytes(self.answer)
        return kept


class EncryptedPart:
    """What all steps of one trainer have in common: the layer's twin, the joint gradients, and who encrypts."""

    def __init__(self, cut: Cut, treatment: Ckks, workers: int | None = None) -> None:
        """Checks that the cut fits.

        Raises:
            ConfigError: something else crosses than one tensor, or the middle is not one linear layer.
        """
        if cut.crossing != 1 or cut.head is None:
            raise ConfigError("privacy: ckks takes a cut with a head (nn.Identity() will do), that one tensor crosses")
        try:
            self.features, self.outputs = check_affine(cut.program)
        except (SpecRejectedError, LimitExceededError) as error:
            raise ConfigError(f"privacy: ckks: {error}") from error
        self.treatment, self._cut = treatment, cut
        self.layer = copy.deepcopy(cut.middle).train()
        named = dict(self.layer.named_parameters())
        if any(spec.name not in named for spec in cut.program.state):
            raise ConfigError("privacy: ckks takes a middle whose tensors are parameters")
        self.parameters = [named[s.name] for s in cut.program.state if s.requires_grad]
        self.scheme = Scheme(row_norm=max(treatment.clip, 1.0), send_weights=treatment.send_weights)
        matrix_FO, _ = affine_map(cut.program, cut.middle_state(), torch.device("cpu"))
        try:
            self.scheme.check_weights(float(max(matrix_FO.norm(dim=0).max(), matrix_FO.norm(dim=1).max())))
        except LimitExceededError as error:
            raise ConfigError(f"privacy: ckks: {error}") from error
        self._joint = nn.ModuleDict({"front": cut.front, "layer": self.layer, "head": cut.head}).train()
        self.private: DpGradients | None = None
        self.settle(treatment)
        self.workers = CipherWorkers(self.scheme.ring, workers)

    def settle(self, treatment: Ckks) -> None:
        """Takes the noise that a budget came to, where the policy leaves it open.

        Raises:
            ConfigError: a layer mixes records, or has no gradient of each record.
        """
        self.settings = EncryptionSettings.of(self.scheme, treatment)
        if treatment.noise is None:
            return
        noised = DpSgd(clip=treatment.gradient_clip, noise=treatment.noise)
        if self.private is None:
            self.private = DpGradients(self._joint, noised, "activations")
        self.private.treatment = noised

    def close(self) -> None:
        """Ends the processes that encrypt."""
        self.workers.close()

    def block_rows(self, capacity: int) -> int:
        """Of each feature in a ciphertext, for batches of at most ``capacity`` rows.

        Raises:
            ConfigError: more rows than a ciphertext holds.
        """
        extra = 0 if self.treatment.send_weights else PROBES
        return block_rows_for(capacity + extra, self.scheme.ring.degree)

    def take(self, told: Sequence[torch.Tensor | None]) -> tuple[_Array, _Array]:
        """The parameters that the node told, into the layer's twin: its matrix (zeros where it was not told) and bias.

        Raises:
            MessageRejectedError: other tensors than the program has.
        """
        biases, named = bias_names(self._cut.program), dict(self.layer.named_parameters())
        wanted = [named[s.name] for s in self._cut.program.state if self.treatment.send_weights or s.name in biases]
        made = [(t.dtype, t.shape) for t in told if t is not None]
        if made != [(p.dtype, p.shape) for p in wanted]:
            raise MessageRejectedError(f"the node told parameters {made}; the layer's are others")
        with torch.no_grad():
            for name, parameter in named.items():
                if not self.treatment.send_weights and name not in biases:
                    parameter.zero_()
            for parameter, tensor in zip(wanted, told, strict=True):
                if tensor is not None:
                    parameter.copy_(tensor)
        matrix_FO, bias_O = affine_map(self._cut.program, named, torch.device("cpu"))
        if self.treatment.send_weights:
            self.scheme.check_weights(float(matrix_FO.norm(dim=0).max()))
        return matrix_FO.numpy(), bias_O.numpy()


class EncryptedRunner:
    """Runs steps of one cut over one link, its middle under encryption.

    Attributes:
        node_s: seconds that the node computed.
        evidence: of what a node did, after :class:`TamperingSuspectedError`.
    """

    def __init__(
        self,
        part: EncryptedPart,
        cut: Cut,
        link: SessionLink,
        guard: Guard,
        *,
        loss: Loss,
        optimizers: Sequence[PartOptimizer],
        capacity: int,
        expected: int | None,
        seed: int,
        device: torch.device,
        hijack: HijackDetector | None = None,
    ) -> None:
        """Takes what one step needs; the session on ``link`` is open.

        Args:
            part: of the trainer.
            cut: the model's parts.
            link: to the node.
            guard: the door out.
            loss: at the head's output.
            optimizers: of front and head.
            capacity: rows of a batch, at most; what the node sees of a batch's size.
            expected: by which noised sums are divided; ``None`` divides by the batch's own rows.
            seed: of dropout and its like.
            device: the owner's.
            hijack: watches gradients that come from the node.
        """
        self._part, self._cut, self._link, self._guard, self._loss = part, cut, link, guard, loss
        self._optimizers, self._seed, self._device, self._hijack = optimizers, seed, device, hijack
        self._capacity, self._expected = capacity, expected
        self._block = part.block_rows(capacity)
        self._shape = output_shapes(cut.program, cut.program.train, 2)[0][1][1:]
        self.node_s = 0.0
        self.evidence: _Evidence | None = None
        self._next_key = StepKey()
        part.workers.start()

    def run(self, step: int, batch: list[MicroBatch]) -> float:
        """One step; returns the batch's mean loss, which nobody else gets to know.

        Raises:
            TamperingSuspectedError: what came back is not what was asked for.
            EncryptionError: a process that encrypts failed.
            WireError, UnreachableError: see :meth:`Link.receive`.
        """
        (whole,) = batch
        if len(whole.labels) > self._capacity:
            raise ConfigError(f"ckks: a batch of {len(whole.labels)} rows; the run was opened for {self._capacity}")
        with own_streams():
            return self._run(step, whole)

    def _run(self, step: int, batch: MicroBatch) -> float:
        part, rows = self._part, len(batch.labels)
        private = part.private
        with torch.set_grad_enabled(private is None):  # with it, the front runs again when its gradient is known
            smashed, kept = self._front(step, batch)
        rows_BF = smashed.detach().to("cpu", torch.float64).numpy()
        outputs_BO, told = self._product(step, node_pb2.PHASE_ENCRYPTED_FORWARD, rows_BF, part.outputs)
        _, bias_O = told
        with contextlib.nullcontext() if private is None else private.per_record(rows):
            outputs = torch.from_numpy(outputs_BO + bias_O).to(self._device, torch.float32)
            loss, gradients = self._head(step, batch, outputs.reshape(rows, *self._shape), kept)
            if private is not None:
                smashed, _ = self._front(step, batch)
            self._backward(step, batch, smashed, gradients)
        released = self._guard.update(private, self._expected or rows, part.parameters)
        self._link.send(
            encode_frame(
                step=step,
                micro_batch=0,
                phase=node_pb2.PHASE_PARAMETER_GRADIENTS,
                tensors=released,
                update=True,
            )
        )
        for parameter in part.parameters:
            parameter.grad = None
        for optimizer in self._optimizers:
            optimizer.apply(step)
        self.node_s += self._link.receive().compute_s
        return loss

    def _front(self, step: int, batch: MicroBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Each row's activations, flat and clipped, and what goes past the middle."""
        seed_stream(self._seed, "front", step, 0)
        made = self._cut.front(*(x.to(self._device) for x in batch.inputs))
        (smashed,), kept = self._cut.split_outputs(made)
        flat = smashed.flatten(1)
        norms = flat.norm(dim=1, keepdim=True).clamp_min(_LEAST_NORM)
        return flat * (self._part.treatment.clip / norms * (1 - 2**-20)).clamp_max(1.0), kept

    def _head(
        self, step: int, batch: MicroBatch, outputs: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> tuple[float, torch.Tensor]:
        """The loss, and its gradient at the layer's outputs; the head's own is gathered."""
        if self._cut.head is None:
            raise ConfigError("privacy: ckks takes a cut with a head")
        if kept:
            raise ConfigError("privacy: ckks takes a cut that nothing passes by the middle")
        outputs.requires_grad_()
        labels = batch.labels.to(self._device)
        seed_stream(self._seed, "head", step, 0)
        made = self._cut.head(outputs.clone())
        self._loss.check(made, labels)
        loss = self._loss(made, labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        gradients = outputs.grad
        return loss.item(), torch.zeros_like(outputs) if gradients is None else gradients

    def _backward(self, step: int, batch: MicroBatch, smashed: torch.Tensor, gradients: torch.Tensor) -> None:
        """The layer's gradients from the rows that are here anyway, and the front's."""
        part, (spec,) = self._part, self._cut.program.inputs
        leaf = smashed.detach().requires_grad_()
        made = part.layer(leaf.reshape(len(leaf), *spec.shape))
        made = made[0] if isinstance(made, tuple) else made
        made.backward(gradients)
        if not smashed.requires_grad:
            return
        returned = leaf.grad
        if not part.treatment.send_weights:
            returned = self._input_gradients(step, gradients)
            if self._hijack is not None:
                self._hijack.observe(step, batch.labels, returned)
        smashed.backward(returned)  # type: ignore[no-untyped-call]  # torch's own signature

    def _input_gradients(self, step: int, gradients: torch.Tensor) -> torch.Tensor:
        """Output gradients times the weights that only the node knows.

        Rows travel at the length that the scheme allows, whatever theirs is, and are scaled back afterwards.
        """
        flat = gradients.detach().flatten(1).to("cpu", torch.float64).numpy()
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        unit = self._part.scheme.row_norm * flat / np.maximum(norms, _LEAST_NORM)
        made, _ = self._product(step, node_pb2.PHASE_ENCRYPTED_BACKWARD, unit, self._part.features, told=False)
        return torch.from_numpy(made * norms / self._part.scheme.row_norm).to(self._device, torch.float32)

    def _product(
        self,
        step: int,
        phase: node_pb2.Phase.ValueType,
        rows_BF: _Array,
        outputs: int,
        *,
        told: bool = True,
    ) -> tuple[_Array, tuple[_Array, _Array]]:
        """What the node makes of rows, once it was checked; and the weights and bias that it told.

        One key decrypts one answer alone; the next is made while this process does something else.
        """
        part, block, key = self._part, self._block, self._next_key
        self._next_key = StepKey()
        scheme, rows = part.scheme, len(rows_BF)
        probes_PB = None if part.treatment.send_weights else probes(rows)
        sent_BF = rows_BF if probes_PB is None else np.concatenate([rows_BF, probes_PB @ rows_BF])
        features, each = rows_BF.shape[1], scheme.ring.degree // block
        spread = phase == node_pb2.PHASE_ENCRYPTED_BACKWARD and spreads(features, outputs, each)
        slots = pack_rows(sent_BF, block, scheme.ring.degree, spread=spread)
        seeds, words = self._guard.encrypted(part.workers.encrypt(key, slots, 2.0**scheme.value_bits))
        frame = encode_frame(step=step, micro_batch=0, phase=phase, ciphertexts=SentCiphertexts(block, seeds, words))
        self._link.send(frame)
        answer = self._link.receive()
        self.node_s += answer.compute_s
        matrix_FO, bias_O = part.take(answer.tensors) if told else (np.zeros((1, 1)), np.zeros(1))
        _, down = packed_counts(features, outputs, each, spread=spread)
        results_RO = self._decrypted(key, answer, down, spread=spread)
        part.workers.prepare(self._next_key, len(slots))
        try:
            norm = float(np.linalg.norm(matrix_FO, axis=0).max()) if part.treatment.send_weights else self._most_norm
            bound = LayerBound.of(scheme, features=features, weight_norm=norm, block_rows=block)
            most = min(scheme.largest_result, norm * scheme.row_norm) + bound.total
            check_results(results_RO, len(sent_BF), most=most, tolerance=bound.total, outputs=outputs)
            if probes_PB is None:
                check_products(results_RO, rows_BF, matrix_FO, tolerance=bound.total, checked=part.treatment.check_rows)
            else:
                check_probes(results_RO, probes_PB, tolerance=bound.total)
        except TamperingSuspectedError:
            told_bytes = b"" if answer.ciphertexts is None else answer.ciphertexts.SerializeToString()
            self.evidence = _Evidence(frame, told_bytes)
            raise
        return results_RO[:rows, :outputs], (matrix_FO, bias_O)

    @property
    def _most_norm(self) -> float:
        """Of weights that the node keeps to itself: with longer ones it refuses."""
        scheme = self._part.scheme
        return scheme.largest_result / scheme.row_norm

    def _decrypted(self, key: StepKey, answer: Answer, ciphertexts: int, *, spread: bool) -> _Array:
        scheme = self._part.scheme
        if answer.ciphertexts is None:
            raise MessageRejectedError("the node's answer carries no ciphertexts")
        came = decode(
            answer.ciphertexts,
            scheme.ring,
            count=ciphertexts,
            block_rows=self._block,
            seeded=False,
            max_bytes=MAX_TENSOR_BYTES,
        )
        slots = self._part.workers.decrypt(key, came, scheme.result_scale)
        return unpack_rows(slots, self._block, spread=spread)
