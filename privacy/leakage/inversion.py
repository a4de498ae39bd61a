"""UnSplit: reconstruction without any data.

After Erdoğan, Küpçü and Çiçek 2022, "UnSplit: data-oblivious model inversion, model stealing, and label inference
attacks against split learning", algorithm 1.

The attacker knows the front's architecture. It searches for inputs and weights that together give the activations it
saw, in turns: some steps on the inputs, whose total variation is kept low, some on the weights.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from privacy.leakage.bench import Bench
from privacy.leakage.deadline import Deadline
from privacy.leakage.results import Treatment
from privacy.leakage.tried import Tried
from privacy.leakage.victim import Victim, reinitialised

__all__ = ["invert"]

_ROWS: Final = 32  # they share the weights that are searched for
_TURNS: Final = 60
_INPUT_STEPS: Final = 20
_WEIGHT_STEPS: Final = 20
_INPUT_RATE: Final = 0.05  # of the inputs' spread
_WEIGHT_RATE: Final = 1e-3
_SMOOTHNESS: Final = 0.02


def invert(victim: Victim, bench: Bench, treatment: Treatment | None, deadline: Deadline) -> Tried:
    """Inputs that give the activations of the first attacked ones.

    A front that does not train is public or fixed, and its weights count as known.
    """
    generator = torch.Generator().manual_seed(bench.settings.seed)
    rows = max(_ROWS, bench.settings.shown)
    target = victim.seen(bench.attacked[:rows], treatment, generator)
    scale = target.var(correction=0).clamp_min(1e-12)
    front = reinitialised(victim.front, generator) if victim.front_trains else victim.front
    # The middle of the range, as in the paper, is all that is known of an input.
    guess = torch.full((len(target), *bench.shape), (bench.low + bench.high) / 2)
    guess = bench.scaled(guess).requires_grad_()
    weights = list(front.parameters()) if victim.front_trains else []
    turns = [(torch.optim.Adam([guess], lr=_INPUT_RATE), _INPUT_STEPS)]
    if weights:
        turns.append((torch.optim.Adam(weights, lr=_WEIGHT_RATE), _WEIGHT_STEPS))
    for _ in range(_TURNS):
        for optimizer, steps in turns:
            for _ in range(steps):
                if deadline.left <= 0:
                    return Tried(bench.unscaled(guess.detach()))
                crossing, _ = victim.run(bench.unscaled(guess), front)
                loss = nn.functional.mse_loss(victim.joined(crossing), target) / scale + _SMOOTHNESS * _variation(guess)
                guess.grad = None
                front.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
                optimizer.step()
    return Tried(bench.unscaled(guess.detach()))


def _variation(x: Tensor) -> Tensor:
    """Mean step between neighbours along each axis of the grid; of vectors, which have no neighbours, none."""
    axes = range(2, x.ndim)
    steps = [x.diff(dim=axis).abs().mean() for axis in axes if x.shape[axis] > 1]
    return torch.stack(steps).sum() if steps else x.new_zeros(())
