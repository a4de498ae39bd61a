"""A pseudo-client: a front of the attacker's own that behaves like the victim's.

After PCAT (Gao and Zhang 2023) and FORA (Xu et al. 2024).

The node has records of the same kind with labels, the architecture, the activations it saw and the middle. It trains a
front of its own so that its activations are distributed as the victim's are (FORA) and so that the middle and a head of
its own classify by them (PCAT). A decoder trained on that front then reconstructs the victim's inputs, and the head of
its own reads the labels that the U-shape was to hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from privacy.leakage.bench import Bench
from privacy.leakage.deadline import Deadline, descend
from privacy.leakage.decoding import trained_network
from privacy.leakage.results import Treatment
from privacy.leakage.tried import Tried
from privacy.leakage.victim import Victim, as_tensors, reinitialised

__all__ = ["imitate"]

_BATCH: Final = 64
_STEPS: Final = 1500
_RATE: Final = 1e-3
_IMITATION_SHARE: Final = 0.6  # of the time; the decoder has the rest
_BANDWIDTHS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
_CHUNK: Final = 256


def imitate(victim: Victim, bench: Bench, treatment: Treatment | None, deadline: Deadline) -> Tried:
    """Reconstructions of all attacked inputs, and their labels where there is a head to guess them with."""
    if not victim.front_trains:
        return Tried(None, note="the front is fixed, so the node may know it: the informed decoder is this attack")
    generator = torch.Generator().manual_seed(bench.settings.seed)
    front = reinitialised(victim.front, generator)
    classifier = _classifier(victim, bench, generator)
    seen = _crossing(victim, victim.front, bench.attacked, treatment, generator)
    real = torch.cat([victim.joined(part) for part in seen])
    scale = real.std().clamp_min(1e-6)

    def loss_of(step: int) -> Tensor:
        del step
        rows = torch.randint(len(bench.known), (_BATCH,), generator=generator)
        crossing, _ = victim.run(bench.known[rows], front)
        mine = victim.joined(victim.treated(crossing, treatment, generator))
        theirs = real[torch.randint(len(real), (_BATCH,), generator=generator)]
        loss = _difference(mine.flatten(1) / scale, theirs.flatten(1) / scale)
        if classifier is not None and bench.known_labels is not None:
            loss = loss + nn.functional.cross_entropy(classifier(crossing), bench.known_labels[rows])
        return loss

    parameters = [*front.parameters(), *(classifier.parameters if classifier else ())]
    descend(loss_of, parameters, steps=_STEPS, rate=_RATE, deadline=deadline.share(_IMITATION_SHARE))
    front.requires_grad_(False)
    mine = torch.cat([victim.joined(part) for part in _crossing(victim, front, bench.known, treatment, generator)])
    decode = trained_network(mine, bench.known, bench, deadline)
    labels = None
    if classifier is not None and bench.attacked_labels is not None:
        with torch.no_grad():
            found = torch.cat([classifier(part).argmax(1) for part in seen])
        labels = (found == bench.attacked_labels).float().mean().item()
    return Tried(decode(real), labels)


@torch.no_grad()
def _crossing(
    victim: Victim, front: nn.Module, x: Tensor, treatment: Treatment | None, generator: torch.Generator
) -> list[tuple[Tensor, ...]]:
    return [victim.treated(victim.run(part, front)[0], treatment, generator) for part in torch.split(x, _CHUNK)]


@dataclass(frozen=True, slots=True)
class _Classifier:
    """The victim's middle and a head of the node's own: activations to logits [B, K]."""

    middle: nn.Module
    head: nn.Module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def __call__(self, crossing: tuple[Tensor, ...]) -> Tensor:
        return as_tensors(self.head(*as_tensors(self.middle(*crossing))))[0]


def _classifier(victim: Victim, bench: Bench, generator: torch.Generator) -> _Classifier | None:
    """With a fresh head, where the model has one that classifies by the middle's outputs alone."""
    if victim.head is None or victim.middle is None or bench.known_labels is None:
        return None
    made = _Classifier(victim.middle, reinitialised(victim.head, generator))
    with torch.no_grad():
        crossing, kept = victim.run(bench.known[:2])
        if kept:  # of these the node has none
            return None
        logits = made(crossing)
    return made if logits.ndim == 2 and logits.shape[1] >= bench.classes else None  # noqa: PLR2004 -- rows and classes


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """How far two sets of rows [B, D] are apart: each unit's mean and spread, and the maximum mean discrepancy."""
    moments = (a.mean(0) - b.mean(0)).square().mean() + (a.std(0) - b.std(0)).square().mean()
    rows = torch.cat([a, b])
    distances = _squared(rows)
    typical = distances.detach().mean().clamp_min(1e-12)
    kernel = torch.stack([torch.exp(-distances / (width * typical)) for width in _BANDWIDTHS]).mean(0)
    count = len(a)
    return moments + kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2 * kernel[:count, count:].mean()


def _squared(rows: Tensor) -> Tensor:
    squares = rows.square().sum(1)
    return (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp_min(0.0)
