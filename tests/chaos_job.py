"""What the chaos test trains, and how two runs of it are compared: to the bit, by name."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from client_side.checkpoints import list_checkpoints
from client_side.snapshots import SnapshotStore

__all__ = ["EVERY", "STATE", "STEPS_PER_EPOCH", "ChaosError", "compare", "job", "loader", "model"]

BATCH: Final = 24
STEPS_PER_EPOCH: Final = 25
EVERY: Final = 10  # steps between two checkpoints
KEEP: Final = 3
STATE: Final = "state"

_LOGGED: Final = ("step", "epoch", "loss", "lr", "rows")  # of a line of metrics, what is no clock


class ChaosError(Exception):
    """The run ended otherwise than undisturbed, or not at all."""


class _Block(nn.Module):
    """A residual block with batch-norm and dropout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(0.1)
        self.short = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = torch.relu(self.norm_one(self.one(x_BCHW)))
        out: Tensor = torch.relu(self.norm_two(self.two(self.drop(inner))) + self.short(x_BCHW))
        return out


def model() -> nn.Module:
    """A ResNet [B, 3, 8, 8] to [B, 10] of ``stem``, ``body`` and ``head``, each of them with a dropout."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)),
            body=nn.Sequential(_Block(8, 16), nn.MaxPool2d(2), _Block(16, 16)),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10)),
        )
    )


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Tiny images; each is shifted and tinted anew, by torch's, numpy's and Python's generators."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self._images = torch.randn(rows, 3, 8, 8, generator=generator)
        self._labels = torch.randint(10, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._images[index].roll(random.randrange(3), 1)  # noqa: S311 - as users draw
        tint = float(np.random.uniform(0.9, 1.1))  # noqa: NPY002 - the global generator, as users draw from it
        return image * tint + 0.01 * torch.randn(3, 1, 1), self._labels[index]


def loader() -> DataLoader[tuple[Tensor, Tensor]]:
    """The last batch of an epoch is smaller, and odd. Shuffled by torch's global generator, as users do."""
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002 - as above
    return DataLoader(_Images(BATCH * STEPS_PER_EPOCH - 7), BATCH, shuffle=True)


def job(run: Path, owner: Path, addresses: Sequence[str], *, epochs: int, standby: bool) -> str:
    """The job file: AdamW under a cosine with warm-up, two micro-batches in flight, U-shaped."""
    steps = epochs * STEPS_PER_EPOCH
    return f"""
[model]
factory = "tests.chaos_job:model"
[cut]
front = "stem"
head = "head"
[data]
train = "tests.chaos_job:loader"
[train]
epochs = {epochs}
micro_batches = 2
in_flight = 2
seed = 7
threads = 1
[optimizer]
name = "adamw"
lr = 0.003
[optimizer.schedule]
decay = "cosine"
warmup_steps = {steps // 10}
total_steps = {steps}
floor = 0.05
[checkpoint]
every = {EVERY}
keep = {KEEP}
[node]
address = "{",".join(addresses)}"
identity = "{owner}"
standby = {str(standby).lower()}
[privacy]
activations = "clear"

[output]
dir = "{run}"
"""


def compare(reference: Path, run: Path) -> None:
    """Raises: ChaosError, naming the first difference."""
    one, other = _outcome(reference), _outcome(run)
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name) != other.get(name):
            raise ChaosError(f"{name} differs: {str(one.get(name))[:300]} undisturbed, {str(other.get(name))[:300]}")
    leftovers = [path.name for path in run.rglob("*.partial")]
    if leftovers:
        raise ChaosError(f"left behind: {leftovers}")


def _outcome(run: Path) -> dict[str, Any]:
    """Everything that must be equal, by name."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest, *older = list_checkpoints(run / STATE / "checkpoints")
    checkpoint = newest.read()
    middle = SnapshotStore(str(run / STATE / "snapshots")).load(checkpoint.snapshot)
    found: dict[str, Any] = {f"metrics, line {n + 1}": [line[k] for k in _LOGGED] for n, line in enumerate(lines)}
    found |= {f"checkpoint.{name}": getattr(checkpoint, name) for name in ("step", "epoch", "batch", "loss_sum")}
    found |= {"checkpoint.log_history": checkpoint.log_history, "checkpoints": 1 + len(older)}
    for part, tensors in (("owner", checkpoint.tensors), ("middle", middle)):
        # But for the hijacking alarm: which rows it looks at is no function of the run.
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("hijack/")}
        found |= {f"{part}: {name}": _bits(tensor) for name, tensor in own.items()}
    found["model.safetensors"] = (run / "model.safetensors").read_bytes()
    return found


def _bits(tensor: Tensor) -> tuple[str, list[int], bytes]:
    return str(tensor.dtype), list(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
