"""Feature-space hijacking, simulated on a copy of the front: a node that sends gradients of its own choice.

After Pasquini, Ateniese and Bernaschi 2021, "Unleashing the tiger: inference attacks on split learning", section 3.

The node trains an encoder and a decoder on records of the same kind, and a critic that tells the encoder's activations
from the front's. The gradients that it returns teach the front to fool the critic: its activations move into the space
that the decoder inverts. Here the front obeys for as long as the time lasts, and nobody looks at the gradients.
"""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn

from privacy.leakage.bench import Bench
from privacy.leakage.deadline import Deadline
from privacy.leakage.networks import Critic, Decoder
from privacy.leakage.results import Treatment
from privacy.leakage.tried import Tried
from privacy.leakage.victim import Victim, reinitialised

__all__ = ["hijack"]

_BATCH: Final = 64
_WIDTH: Final = 16  # of the decoder: a wider one has fewer steps in the same time
_STEPS: Final = 3000
_ALONE: Final = 200  # steps that encoder and decoder have before the front is steered
_RATE: Final = 1e-3
_CRITIC_RATE: Final = 5e-4
_FRONT_RATE: Final = 1e-3
_PENALTY: Final = 10.0
_CHUNK: Final = 256


def hijack(victim: Victim, bench: Bench, treatment: Treatment | None, deadline: Deadline) -> Tried:
    """Reconstructions of all attacked inputs after the front was steered."""
    if not victim.front_trains:
        return Tried(None, note="the front is frozen: gradients do not reach it")
    game = _Game(victim, bench, treatment)
    step = 0
    while step < _STEPS and (step == 0 or deadline.left > 0):
        game.play(steering=step >= _ALONE)
        step += 1
    return Tried(game.guessed(), note=f"{step:,} hijacked steps")


class _Game:
    """The node's three networks against one front."""

    def __init__(self, victim: Victim, bench: Bench, treatment: Treatment | None) -> None:
        self._victim, self._bench, self._treatment = victim, bench, treatment
        self._generator = torch.Generator().manual_seed(bench.settings.seed)
        self._front = copy.deepcopy(victim.front).requires_grad_(True)
        # Of the front's own kind, so that the front can become it: one that ends in a ReLU never makes what is below 0.
        self._encoder = reinitialised(victim.front, self._generator)
        self._decoder, self._critic = Decoder(victim.shape, bench.shape, _WIDTH), Critic(victim.shape)
        own = [*self._encoder.parameters(), *self._decoder.parameters()]
        self._own = torch.optim.Adam(own, lr=_RATE)
        self._judge = torch.optim.Adam(self._critic.parameters(), lr=_CRITIC_RATE, betas=(0.5, 0.9))
        self._steered = torch.optim.Adam(self._front.parameters(), lr=_FRONT_RATE, betas=(0.5, 0.9))

    def play(self, *, steering: bool) -> None:
        """One step of the owner's, and all that the node does in it."""
        public = self._drawn(self._bench.known)
        mine = self._activations(public, self._encoder)
        _apply(self._own, nn.functional.mse_loss(self._decoder(mine), self._bench.scaled(public)))
        if not steering:
            return
        mine, theirs = mine.detach(), self._activations(self._drawn(self._bench.attacked), self._front)
        other = theirs.detach()
        loss = self._critic(other).mean() - self._critic(mine).mean() + _PENALTY * self._roughness(mine, other)
        _apply(self._judge, loss)
        # This is the gradient that goes back to the owner.
        _apply(self._steered, -self._critic(theirs).mean())

    @torch.no_grad()
    def guessed(self) -> Tensor:
        """What the decoder makes of the activations of all attacked inputs."""
        parts = [self._decoder(self._activations(x, self._front)) for x in torch.split(self._bench.attacked, _CHUNK)]
        return self._bench.unscaled(torch.cat(parts))

    def _drawn(self, rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (_BATCH,), generator=self._generator)]

    def _activations(self, x: Tensor, front: nn.Module) -> Tensor:
        crossing, _ = self._victim.run(x, front)
        return self._victim.joined(self._victim.treated(crossing, self._treatment, self._generator))

    def _roughness(self, a: Tensor, b: Tensor) -> Tensor:
        """How far the critic's slope between the two is from 1 (Gulrajani et al. 2017, section 4)."""
        share = torch.rand(len(a), *([1] * (a.ndim - 1)), generator=self._generator)
        between = (share * a + (1 - share) * b).requires_grad_()
        (slope,) = torch.autograd.grad(self._critic(between).sum(), between, create_graph=True)
        roughness: Tensor = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return roughness


def _apply(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
    optimizer.step()
