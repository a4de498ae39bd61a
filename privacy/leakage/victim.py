"""A cut model as the node sees it: the activations that cross, treated or not, and what lies behind them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from privacy.leakage.results import Treatment
from wire.errors import ConfigError

__all__ = ["Parts", "Victim", "as_tensors", "reinitialised"]

_CHUNK: Final = 256  # rows in a forward pass


@dataclass(frozen=True, slots=True)
class Parts:
    """A model in parts that run one after the other.

    Attributes:
        front: takes a batch of inputs; returns a tensor, or several.
        middle: takes what crosses; ``None`` where only the front is known.
        head: takes what the middle returns, then what the front kept for it; ``None`` (vanilla) without one.
        crossing: how many of the front's tensors cross; the others it keeps for the head. ``None``: all.
    """

    front: nn.Module
    middle: nn.Module | None = None
    head: nn.Module | None = None
    crossing: int | None = None


class Victim:
    """Runs a copy of the parts in evaluation mode: without dropout, which would only blur what an attacker sees."""

    def __init__(self, parts: Parts, sample: Tensor) -> None:
        """Copies the parts.

        Args:
            parts: are not changed.
            sample: some inputs, to tell shapes from.

        Raises:
            ConfigError: the front makes nothing that can be audited.
        """
        self.front_trains = any(p.requires_grad for p in parts.front.parameters())
        self.front = copy.deepcopy(parts.front).eval()
        self.middle = None if parts.middle is None else copy.deepcopy(parts.middle).eval()
        self.head = None if parts.head is None else copy.deepcopy(parts.head).eval()
        self._crossing = parts.crossing
        self._rank = sample.ndim - 2
        for part in (self.front, self.middle, self.head):
            if part is not None:
                part.requires_grad_(False)
        with torch.no_grad():
            crossing, _ = self.run(sample[:2])
        if not crossing or any(len(t) != len(sample[:2]) for t in crossing):
            raise ConfigError("the front's activations need the batch as dimension 0; audit another cut")
        self.dimensions = sum(t[0].numel() for t in crossing)
        self.shape = tuple(self.joined(crossing).shape[1:])

    def run(self, x: Tensor, front: nn.Module | None = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What ``front`` (the victim's own, unless said) sends to the node, and what it keeps for the head."""
        made = as_tensors((front or self.front)(x))
        return made[: self._crossing], made[self._crossing :] if self._crossing is not None else ()

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """What crosses as one floating tensor, a grid where all of it lies on one like the inputs' own, else flat."""
        floating = [t.float() for t in tensors]
        if self._rank > 0 and all(t.ndim == self._rank + 2 for t in floating):
            size = max((t.shape[2:] for t in floating), key=lambda shape: shape.numel())
            return torch.cat(
                [t if t.shape[2:] == size else nn.functional.interpolate(t, size=tuple(size)) for t in floating], 1
            )
        return torch.cat([t.flatten(1) for t in floating], 1)

    @torch.no_grad()
    def seen(self, x: Tensor, treatment: Treatment | None, generator: torch.Generator) -> Tensor:
        """What the node sees of ``x``, joined; the noise is drawn once for each row."""
        return torch.cat(
            [self.joined(self.treated(self.run(part)[0], treatment, generator)) for part in torch.split(x, _CHUNK)]
        )

    @staticmethod
    def treated(
        tensors: Sequence[Tensor], treatment: Treatment | None, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """``tensors`` clipped, row by row over all of them, and noised."""
        if treatment is None:
            return tuple(tensors)
        flat = torch.cat([t.float().flatten(1) for t in tensors], 1)
        flat = flat * (treatment.clip / flat.norm(dim=1, keepdim=True).clamp_min(treatment.clip))
        flat = flat + treatment.noise * treatment.clip * torch.randn(flat.shape, generator=generator)
        parts = torch.split(flat, [t[0].numel() for t in tensors], 1)
        return tuple(part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True))


def as_tensors(made: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 -- whatever a part returned
    """``made`` as the tensors that it is.

    Raises:
        ConfigError: it is something else.
    """
    tensors = tuple(made) if isinstance(made, (list, tuple)) else (made,)
    if not all(isinstance(t, Tensor) for t in tensors):
        kinds = ", ".join(sorted({type(t).__name__ for t in tensors}))
        raise ConfigError(f"a part of the model returned {kinds}: it must return a tensor, or a tuple of tensors")
    return tensors


def reinitialised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with fresh weights: of an attacker who knows the architecture alone.

    Modules draw as they would when made; parameters that no module knows how to draw get noise of their own spread.
    """
    fresh = copy.deepcopy(module).eval().requires_grad_(True)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        for part in fresh.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in part.parameters(recurse=False):
                parameter.normal_(0.0, max(parameter.std(correction=0).item(), 1e-3))
    return fresh
