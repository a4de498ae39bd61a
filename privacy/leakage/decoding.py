"""The informed decoder, the strongest of the simple attacks: it has pairs of inputs and activations.

A node gets such pairs by running a stolen or public front on data of its own. Two decoders are trained, ridge
regression and a convolutional network, and the one that does better on pairs kept aside is used: an audit that trains
a network badly would call a leaking cut tight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from privacy.leakage.bench import Bench
from privacy.leakage.deadline import Deadline, descend
from privacy.leakage.networks import Decoder
from privacy.leakage.ridge import fit_ridge, ridge_rows

__all__ = ["Guesser", "decoder_of", "nearest", "trained_network"]

#: From activations [B, ...] to inputs [B, ...].
Guesser: TypeAlias = Callable[[Tensor], Tensor]

_ASIDE: Final = 0.1
_BATCH: Final = 64
_EPOCHS: Final = 40
_FEWEST_STEPS: Final = 300
_MOST_STEPS: Final = 2500
_RATE: Final = 2e-3
_CHUNK: Final = 256


def decoder_of(seen: Tensor, bench: Bench, deadline: Deadline) -> tuple[Guesser, str]:
    """The better of two decoders, and its name.

    Args:
        seen: the activations [A, ...] of ``bench.known``, treated as the attacked ones will be.
        bench: the records.
        deadline: for both.
    """
    inputs = bench.known
    aside = max(1, int(_ASIDE * len(inputs)))
    linear = _linear(seen[aside:], inputs[aside:], bench)
    network = trained_network(seen[aside:], inputs[aside:], bench, deadline)
    errors = [(guess(seen[:aside]) - inputs[:aside]).square().mean().item() for guess in (linear, network)]
    return (linear, "ridge regression") if errors[0] <= errors[1] else (network, "convolutional network")


def _linear(seen: Tensor, inputs: Tensor, bench: Bench) -> Guesser:
    rows = ridge_rows(seen[0].numel(), bench.settings.seconds)
    fitted = fit_ridge(seen[:rows].flatten(1), bench.scaled(inputs[:rows]).flatten(1))
    return lambda x: bench.unscaled(fitted(x.flatten(1))).reshape(len(x), *bench.shape)


def trained_network(seen: Tensor, inputs: Tensor, bench: Bench, deadline: Deadline) -> Guesser:
    """A network that maps ``seen`` [A, ...] to ``inputs`` [A, ...], trained until the deadline at most."""
    centre, spread = seen.mean(), seen.std().clamp_min(1e-6)
    with torch.random.fork_rng([]):
        torch.manual_seed(bench.settings.seed)
        network = Decoder(tuple(seen.shape[1:]), bench.shape)
    x, y = (seen - centre) / spread, bench.scaled(inputs)
    generator = torch.Generator().manual_seed(bench.settings.seed)

    def loss_of(step: int) -> Tensor:
        del step
        rows = torch.randint(len(x), (_BATCH,), generator=generator)
        return nn.functional.mse_loss(network(x[rows]), y[rows])

    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _EPOCHS * len(x) // _BATCH))
    descend(loss_of, network.parameters(), steps=steps, rate=_RATE, deadline=deadline)
    network.eval().requires_grad_(False)
    return lambda z: bench.unscaled(_in_chunks(network, (z - centre) / spread))


def _in_chunks(network: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([network(part) for part in torch.split(x, _CHUNK)])


def nearest(known: Tensor, seen: Tensor) -> Tensor:
    """For each row of ``seen`` the number of the row of ``known`` whose activations are nearest."""
    flat = known.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).argmin(1) for part in torch.split(seen, _CHUNK)])
