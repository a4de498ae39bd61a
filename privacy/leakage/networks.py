"""The attackers' networks: from activations to inputs, from inputs to classes, and a critic of activations.

Inputs are images [C, H, W], signals [C, L] or vectors [F]; the layers are those of as many dimensions.

Shapes: ``B`` batch, ``C`` channels, ``H`` height, ``W`` width, ``L`` samples of a signal, ``F`` features.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["Classifier", "Critic", "Decoder"]

_WIDTH: Final = 32
_HIDDEN: Final = 512
_MOST_CHANNELS: Final = 128
_MOST_WEIGHTS: Final = 2**24  # of the layer that opens a decoder; beyond, activations are projected first
_PROJECTED: Final = 1024

_CONV: Final = {1: nn.Conv1d, 2: nn.Conv2d}
_MODE: Final = {1: "linear", 2: "bilinear"}


class Decoder(nn.Module):
    """Activations [B, ...] to inputs [B, *shape]."""

    def __init__(self, seen: tuple[int, ...], shape: tuple[int, ...], width: int = _WIDTH) -> None:
        super().__init__()
        self._shape, rank = shape, len(shape) - 1
        if rank == 0:
            self._stages = nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(seen), _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU()
            )
            self._last: nn.Module = nn.Linear(_HIDDEN, shape[0])
            return
        goal = shape[1:]
        # A row of channels without a place in it says nothing of where: it starts as a small grid of its own.
        on_grid = len(seen) == len(shape) and math.prod(seen[1:]) > 1
        start = tuple(seen[1:]) if on_grid else tuple(max(1, math.ceil(size / 4)) for size in goal)
        channels = min(_MOST_CHANNELS, max(width, seen[0])) if on_grid else 2 * width
        stages: list[nn.Module] = [
            _CONV[rank](seen[0], channels, 3, padding=1) if on_grid else _Entry(math.prod(seen), channels, start),
            nn.ReLU(),
        ]
        size = start
        while size[0] < goal[0] or size[-1] < goal[-1]:
            size = tuple(min(2 * at, to) if at < to else at for at, to in zip(size, goal, strict=True))
            narrower = max(width, channels // 2)
            stages += [_Resize(size), _CONV[rank](channels, narrower, 3, padding=1), nn.ReLU()]
            channels = narrower
        stages += [_Resize(goal)] if size != goal else []
        stages += [_CONV[rank](channels, width, 3, padding=1), nn.ReLU()]
        self._stages = nn.Sequential(*stages)
        self._last = _CONV[rank](width, shape[0], 3, padding=1)

    def forward(self, seen: Tensor) -> Tensor:
        """[B, ...]."""
        made: Tensor = self._last(self._stages(seen))
        return made


class _Entry(nn.Module):
    """Flat activations onto a small grid."""

    def __init__(self, dimensions: int, channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        outputs = channels * math.prod(size)
        self._shape = (channels, *size)
        narrow = dimensions * outputs > _MOST_WEIGHTS
        self._linear = nn.Sequential(
            *([nn.Linear(dimensions, _PROJECTED)] if narrow else []),
            nn.Linear(_PROJECTED if narrow else dimensions, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self._linear(x.flatten(1))
        return made.reshape(len(x), *self._shape)


class _Resize(nn.Module):
    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self._size = size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, size=self._size, mode=_MODE[len(self._size)], align_corners=False)


class Classifier(nn.Module):
    """Inputs [B, *shape] to logits [B, K]: stands for whoever would read the reconstructions."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self._layers = _pooled(shape, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K]."""
        logits_BK: Tensor = self._layers(x)
        return logits_BK


class Critic(nn.Module):
    """Activations [B, *seen] to a score [B, 1]: above 0 for one source, below for the other."""

    def __init__(self, seen: tuple[int, ...]) -> None:
        super().__init__()
        self._layers = _pooled(seen, 1, slope=0.2)

    def forward(self, seen: Tensor) -> Tensor:
        """[B, 1]."""
        score_B1: Tensor = self._layers(seen)
        return score_B1


def _pooled(shape: tuple[int, ...], outputs: int, slope: float = 0.0) -> nn.Sequential:
    """Convolutions that halve the grid twice where there is one, then two linear layers."""
    rank = len(shape) - 1
    layers: list[nn.Module] = []
    if rank in _CONV and min(shape[1:]) >= 4:  # noqa: PLR2004 -- two halvings leave one
        channels = shape[0]
        for width in (_WIDTH, 2 * _WIDTH):
            layers += [_CONV[rank](channels, width, 3, stride=2, padding=1), nn.LeakyReLU(slope)]
            channels = width
    layers.append(nn.Flatten())
    with torch.no_grad():
        flat = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(flat, 128), nn.LeakyReLU(slope), nn.Linear(128, outputs))
