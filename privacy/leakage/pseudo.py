"""A pseudo-client: a front of the attacker's own that behaves like the victim's.

After PCAT (Gao and Zhang 2023) and FORA (Xu et al. 2024).

The node has records of the same kind with labels, the architecture, the activations it saw and the middle. It trains a
front of its own so that its activations are distributed as the victim's are (FORA) and so that the middle and a head of
its own classify by them (PCAT). A decoder trained on that front then reconstructs the victim's inputs, and the head of
its own reads the labels that the U-shape was to hide.

The distance between the distributions must lead: to classify alone, a front may send each class wherever the middle
has room for one, and every label that is then read is that of another class. It is the sliced Wasserstein distance
(Bonneel et al. 2015), which still has a slope where two distributions do not overlap, unlike a kernel's.

It finds fronts that weigh few numbers against many activations, as convolutions do. A dense front can send the classes
anywhere at nearly the same distance: there it mostly fails, which proves nothing.
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

_BATCH: Final = 128
_STEPS: Final = 1000
_RATE: Final = 2e-2
_IMITATION_SHARE: Final = 0.6  # of the time; the decoder has the rest
_DIRECTIONS: Final = 64  # along which distributions are compared, drawn anew in each step
_BEHIND: Final = 0.5  # what the distance behind the middle weighs against that at the cut
_CLASSES: Final = 0.2  # and what classifying weighs: more of it, and the classes change places
_CHUNK: Final = 256


def imitate(victim: Victim, bench: Bench, treatment: Treatment | None, deadline: Deadline) -> Tried:
    """Reconstructions of all attacked inputs, and their labels where there is a head to guess them with."""
    if not victim.front_trains:
        return Tried(None, note="the front is fixed, so the node may know it: the informed decoder is this attack")
    generator = torch.Generator().manual_seed(bench.settings.seed)
    front, rest = reinitialised(victim.front, generator), _rest(victim, bench, generator)
    seen = _crossing(victim, victim.front, bench.attacked, treatment, generator)
    real, behind = _joined(victim, seen), None if rest is None else torch.cat([_flat(rest.outputs(s)) for s in seen])

    def loss_of(step: int) -> Tensor:
        del step
        rows = torch.randint(len(bench.known), (_BATCH,), generator=generator)
        others = torch.randint(len(real), (_BATCH,), generator=generator)
        crossing = victim.treated(victim.run(bench.known[rows], front)[0], treatment, generator)
        loss = _apart(victim.joined(crossing).flatten(1), real[others].flatten(1), generator)
        if rest is None or behind is None or bench.known_labels is None:
            return loss
        outputs = rest.outputs(crossing)
        wrong = nn.functional.cross_entropy(rest.logits(outputs), bench.known_labels[rows])
        return loss + _BEHIND * _apart(_flat(outputs), behind[others], generator) + _CLASSES * wrong

    parameters = [*front.parameters(), *(rest.head.parameters() if rest else ())]
    descend(loss_of, parameters, steps=_STEPS, rate=_RATE, deadline=deadline.share(_IMITATION_SHARE))
    front.requires_grad_(False)
    mine = _joined(victim, _crossing(victim, front, bench.known, treatment, generator))
    decode = trained_network(mine, bench.known, bench, deadline)
    labels = None
    if rest is not None and bench.attacked_labels is not None:
        with torch.no_grad():
            found = torch.cat([rest.logits(rest.outputs(part)).argmax(1) for part in seen])
        labels = (found == bench.attacked_labels).float().mean().item()
    return Tried(decode(real), labels)


@torch.no_grad()
def _crossing(
    victim: Victim, front: nn.Module, x: Tensor, treatment: Treatment | None, generator: torch.Generator
) -> list[tuple[Tensor, ...]]:
    return [victim.treated(victim.run(part, front)[0], treatment, generator) for part in torch.split(x, _CHUNK)]


def _joined(victim: Victim, parts: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([victim.joined(part) for part in parts])


@dataclass(frozen=True, slots=True)
class _Rest:
    """The victim's middle and a head of the node's own."""

    middle: nn.Module
    head: nn.Module

    def outputs(self, crossing: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return as_tensors(self.middle(*crossing))

    def logits(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """[B, K]."""
        return as_tensors(self.head(*outputs))[0]


def _rest(victim: Victim, bench: Bench, generator: torch.Generator) -> _Rest | None:
    """With a fresh head, where the model has one that classifies by the middle's outputs alone."""
    if victim.head is None or victim.middle is None or bench.known_labels is None:
        return None
    made = _Rest(victim.middle, reinitialised(victim.head, generator))
    with torch.no_grad():
        crossing, kept = victim.run(bench.known[:2])
        if kept:  # of these the node has none
            return None
        logits = made.logits(made.outputs(crossing))
    return made if logits.ndim == 2 and logits.shape[1] >= bench.classes else None  # noqa: PLR2004 -- rows and classes


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.float().flatten(1) for t in tensors], 1)


def _apart(mine: Tensor, theirs: Tensor, generator: torch.Generator) -> Tensor:
    """How far two sets of as many rows [B, D] are apart, in units of the spread of ``theirs``.

    The squared sliced Wasserstein distance, and that of each unit's mean: of many units, random directions see little
    of any single one.
    """
    directions = torch.randn(mine.shape[1], _DIRECTIONS, generator=generator)
    along, others = (rows @ directions for rows in (mine, theirs))
    moved = (along.sort(0).values - others.sort(0).values) / others.std(0).clamp_min(1e-6)
    means = (mine.mean(0) - theirs.mean(0)) / theirs.std().clamp_min(1e-6)
    return moved.square().mean() + means.square().mean()
