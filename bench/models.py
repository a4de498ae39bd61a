"""What is measured: models, where they are cut, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import nn

from bench.bare import BATCH, Topology
from client_side.cutting import Cut, cut
from examples import models
from wire.recipe import SGD, Loss

__all__ = [
    "ECG_CNN",
    "LOSS",
    "MLP",
    "OPTIMIZER",
    "RESNET18",
    "SMALL_CNN",
    "TOPOLOGIES",
    "TRANSFORMER",
    "Batches",
    "Subject",
]

TOPOLOGIES: Final[tuple[Topology, ...]] = ("u_shape", "vanilla")
Batches: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]

# Labels are random: a small rate keeps hundreds of steps on them finite, and an update costs the same at any rate.
OPTIMIZER: Final = SGD(lr=1e-4, momentum=0.9)
LOSS: Final = Loss("cross_entropy")
_DIFFERENT_BATCHES: Final = 4  # one alone would stay in the caches


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, where it is cut, and its batch.

    Attributes:
        front: the last submodule of the front.
        head: the first submodule of the head in the U-shape; in the vanilla topology it is the node's.
    """

    name: str
    make: Callable[[], nn.Module]
    example: Callable[[int], torch.Tensor]
    front: str
    head: str
    classes: int = 10
    batch: int = BATCH

    def cut(self, topology: Topology) -> Cut:
        """The model, initialised alike each time, in its parts."""
        torch.manual_seed(0)
        head = self.head if topology == "u_shape" else None
        return cut(self.make(), front=self.front, head=head, example=self.example(2))

    def batches(self) -> Batches:
        """A few batches, the same each time."""
        torch.manual_seed(1)
        numbers = range(_DIFFERENT_BATCHES)
        return [(self.example(self.batch), torch.randint(self.classes, (self.batch,))) for _ in numbers]


RESNET18: Final = Subject("ResNet-18", models.resnet18, models.resnet18_example, "layer1", "fc")
ECG_CNN: Final = Subject("ECG CNN", models.ecg_cnn, models.ecg_cnn_example, "stem", "head", classes=5)
TRANSFORMER: Final = Subject(
    "Transformer",
    partial(models.transformer, tokens=32, d_model=128, layers=4),
    partial(models.transformer_example, tokens=32),
    "embed",
    "fc",
)
MLP: Final = Subject("MLP", models.mlp, models.mlp_example, "relu1", "fc3")
SMALL_CNN: Final = Subject("small CNN", models.small_cnn, models.small_cnn_example, "stem", "head")
