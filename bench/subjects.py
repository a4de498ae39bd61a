"""What ``bench privacy`` trains on: data sets, seen through frozen fronts that were made without them.

Shapes: ``N`` records, ``C`` channels, ``H`` height, ``W`` width, ``D`` features, ``K`` classes.
"""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor, nn

from bench.blocks import tell
from client_side.fronts import frozen, projection, scattering_1d, scattering_2d
from cloister import digits, heartbeats
from wire.errors import ConfigError

__all__ = ["Features", "Subject", "learn", "subjects"]

_MNIST_TRAIN: Final = 8000  # of 10,000
_BATCH: Final = 64
_RATE: Final = 2e-3
_PUBLIC_WIDTH: Final = 16
_PUBLIC_STEPS: Final = 800
_IDX_BYTES: Final = 8  # the type's number in an IDX file
_MAX_IDX_BYTES: Final = 2**26  # MNIST's largest file has 47 MB
_SPLITS: Final[tuple[Literal["beat", "record"], ...]] = ("beat", "record")
_PUBLIC_PATIENTS: Final = 64
_PUBLIC_SEED: Final = 2**31 + 1  # of no synthetic data set that is trained on


@dataclass(frozen=True, slots=True)
class Features:
    """Records as a frozen public front makes them: [N, D], to train on and to test with."""

    front: str
    train: Tensor = field(repr=False)
    test: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True)
class Subject:
    """A data set.

    Attributes:
        features: by front; the first is the one that every treatment is measured on.
        labels: int64 [N] to train on, and to test with.
        units: whose each record to train on is, int64 [N]; ``None`` where it is its own.
        unit: what a unit is.
        whole: the same records [N, C, ...], and what learns from them without a cut and without privacy.
    """

    name: str
    classes: int
    features: tuple[Features, ...]
    labels: tuple[Tensor, Tensor] = field(repr=False)
    units: Tensor | None = field(repr=False)
    unit: str
    records: tuple[Tensor, Tensor] = field(repr=False)
    whole: Callable[[], nn.Module] = field(repr=False)


def subjects(data: Path | None) -> Iterator[Subject]:
    """Real data in ``data``: ``mnist10k/`` and ``mitbih/mitbih_beats_128.npz``; without, synthetic beats alone.

    Raises:
        ConfigError: a file is missing, or something else.
    """
    if data is None:
        sides = heartbeats.synthetic("train"), heartbeats.synthetic("test")
        yield _beats("synthetic beats", sides, "patient", learnt=False)
        return
    yield from _handwriting(data / "mnist10k")
    for by in _SPLITS:
        path = data / "mitbih" / "mitbih_beats_128.npz"
        mitbih = heartbeats.load_mitbih(path, "train", split_by=by), heartbeats.load_mitbih(path, "test", split_by=by)
        yield _beats(f"MIT-BIH by {by}", mitbih, "patient" if by == "record" else "beat", learnt=True)


# --- Handwriting ------------------------------------------------------------------------------------------------------


def _handwriting(folder: Path) -> Iterator[Subject]:
    """Scikit-learn's digits and MNIST: other writers, another scanner, so that each is public data to the other."""
    tell("  fronts for digits and MNIST")
    sides = [digits.load(split).tensors for split in ("train", "test")]
    small = torch.cat([images for images, _ in sides])
    small_labels = torch.cat([labels for _, labels in sides])
    large, large_labels = _idx(folder, "images", 3).to(torch.float32).unsqueeze(1) / 255, _idx(folder, "labels", 1)
    scattering = scattering_2d(28, 28, J=2)
    of_small, of_large = _batched(scattering, _enlarged(small)), _batched(scattering, large)

    cut = len(sides[0][0])
    learnt = _batched(_public(_image_network, _reduced(large), large_labels, _drawn_again), small)
    components = projection(of_large, 32, whiten=0.5)(of_small)
    yield Subject(
        "digits",
        10,
        (
            Features("network, 16", learnt[:cut], learnt[cut:]),
            Features("scattering, 32", components[:cut], components[cut:]),
        ),
        (small_labels[:cut], small_labels[cut:]),
        None,
        "record",
        (small[:cut], small[cut:]),
        digits.model,
    )
    order = torch.randperm(len(large), generator=torch.Generator().manual_seed(0))
    train, test = order[:_MNIST_TRAIN], order[_MNIST_TRAIN:]
    fronts = {dims: projection(of_small, dims, whiten=0.5)(of_large) for dims in (48, 80)}
    yield Subject(
        "MNIST-10k",
        10,
        tuple(Features(f"scattering, {n}", z[train], z[test]) for n, z in fronts.items()),
        (large_labels[train], large_labels[test]),
        None,
        "record",
        (large[train], large[test]),
        _mnist_network,
    )


def _enlarged(images: Tensor) -> Tensor:
    """8x8 as MNIST has them: 20x20 within 28x28."""
    larger = nn.functional.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return nn.functional.pad(larger, (4, 4, 4, 4))


def _reduced(images: Tensor) -> Tensor:
    """28x28 as scikit-learn's digits have them: 8x8, the brightest pixel 1."""
    smaller = nn.functional.adaptive_avg_pool2d(images[:, :, 4:24, 4:24], 8)
    return smaller / smaller.amax((2, 3), keepdim=True).clamp_min(1e-6)


def _drawn_again(images: Tensor) -> Tensor:
    """Scaled, sheared and shifted a little, with another pen: what a network must not mind in other people's hands."""
    affine = torch.zeros(len(images), 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = 1 + 0.15 * torch.randn(2, len(images))
    affine[:, 0, 1] = 0.15 * torch.randn(len(images))
    affine[:, :, 2] = 0.12 * torch.randn(len(images), 2)
    grid = nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    pen = torch.empty(len(images), 1, 1, 1).uniform_(0.4, 1.6)
    return moved.clamp_min(0) ** pen + 0.05 * torch.randn_like(moved)


def _image_network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, _PUBLIC_WIDTH), nn.Tanh()),
    )


def _mnist_network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def _idx(folder: Path, what: str, dimensions: int) -> Tensor:
    """MNIST's format: images uint8 [N, H, W], or labels int64 [N].

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    path = next(iter(sorted(folder.glob(f"*{what}*.gz"))), None)
    if path is None:
        raise ConfigError(f"{folder} holds no *{what}*.gz: put MNIST's test images and labels there")
    try:
        with gzip.open(path, "rb") as file:
            zero, kind, count = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{count}I", file.read(4 * count)) if count == dimensions else ()
            size = math.prod(shape)
            content = file.read(size) if size <= _MAX_IDX_BYTES else b""
    except (OSError, EOFError, struct.error) as error:
        raise ConfigError(f"{path} cannot be read as a gzipped IDX file: {error}") from error
    if zero or kind != _IDX_BYTES or count != dimensions or len(content) != size:
        raise ConfigError(f"{path} is no whole IDX file of bytes in {dimensions} dimensions")
    found = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)
    return found.to(torch.int64) if dimensions == 1 else found


# --- Heart beats ------------------------------------------------------------------------------------------------------


def _beats(
    name: str, sides: tuple[heartbeats.Heartbeats, heartbeats.Heartbeats], unit: str, *, learnt: bool
) -> Subject:
    """Every front here is made of the synthetic beats of invented patients."""
    tell(f"  fronts for {name}")
    public = heartbeats.synthetic("train", _PUBLIC_PATIENTS, _PUBLIC_SEED)
    scattering = scattering_1d(heartbeats.LENGTH, J=3, Q=1)
    fronts = [
        ("components, 24", heartbeats.public_front("pca", 24)),
        (
            "scattering, 48",
            nn.Sequential(scattering, projection(_batched(scattering, public.beats[::4]), 48, whiten=0.5)),
        ),
    ]
    if learnt:
        network = _public(_beat_network, public.beats, public.labels)
        features = projection(_batched(network, public.beats[::4]), 16, whiten=0.25)
        fronts.append(("network, 16", nn.Sequential(network, features)))
    train, test = sides
    return Subject(
        name,
        len(heartbeats.CLASSES),
        tuple(Features(said, _batched(front, train.beats), _batched(front, test.beats)) for said, front in fronts),
        (train.labels, test.labels),
        train.patients if unit == "patient" else None,
        unit,
        (train.beats, test.beats),
        heartbeats.model,
    )


def _beat_network() -> nn.Module:
    def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv1d(inputs, outputs, 7, padding=3), nn.GroupNorm(4, outputs), nn.ReLU(), nn.MaxPool1d(4)

    layers = (*block(1, 16), *block(16, 32), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32 * heartbeats.LENGTH // 16, _PUBLIC_WIDTH), nn.Tanh())


# --- Both -------------------------------------------------------------------------------------------------------------


def learn(
    network: nn.Module, records: Tensor, labels: Tensor, *, steps: int, varied: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Trains ``network`` [B, C, ...] to [B, K] here, without a node and without privacy."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * _RATE, total_steps=steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(records), (_BATCH,))
        seen = records[rows] if varied is None else varied(records[rows])
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(network(seen), labels[rows]))
        optimizer.step()
        schedule.step()
    network.eval()


def _public(
    network: Callable[[], nn.Module], records: Tensor, labels: Tensor, varied: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """``network`` [B, C, ...] to [B, 16] after it learnt public labels under a linear layer, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = network()
        whole = nn.Sequential(made, nn.Linear(_PUBLIC_WIDTH, int(labels.max()) + 1))
        learn(whole, records, labels, steps=_PUBLIC_STEPS, varied=varied)
    return frozen(made)


def _batched(front: nn.Module, records: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([front(part) for part in torch.split(records, 256)])
