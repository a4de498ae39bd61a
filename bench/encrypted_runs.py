"""Trainings of the published network, under encryption and in the clear, through the real client and a real node.

The network is that of *Split Ways* (Khan, Nguyen, Frimpong and Michalas 2023): two convolutions at the owner, 256
activations, a linear layer to 5 outputs at the node.

Shapes: ``B`` rows of a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from bench.published import FEATURES, OUTPUTS
from bench.relay import Relay
from bench.runs import addressed
from cloister import heartbeats
from privacy.accounting import sampled_noise
from privacy.ckks.layer import block_rows_for, pack_rows
from privacy.ckks.workers import CipherWorkers, StepKey
from wire.ciphertexts import Ciphertexts, Scheme

__all__ = [
    "CLEAR",
    "DELTA",
    "ENC_G",
    "PRIVATE_BATCH",
    "TO_OWNER",
    "Beats",
    "Cost",
    "Price",
    "SplitBy",
    "Workplace",
    "load",
    "network",
    "price",
]

SplitBy: TypeAlias = Literal["beat", "record"]

TO_OWNER: Final = "W to the owner"
ENC_G: Final = "Enc(G)Wᵀ"
CLEAR: Final = "in the clear"
DELTA: Final = 1e-5  # below one by the number of beats
PRIVATE_BATCH: Final = 256  # expected
_CLIP: Final = 20.0  # of the activations' norm, in the clear as well
_RATE: Final = 3e-3
_WARM_UP: Final = 7  # steps
_REPEATS: Final = 8
_SIDES: Final[tuple[Literal["train", "test"], ...]] = ("train", "test")


@dataclass(frozen=True, slots=True)
class Beats:
    """Records of [1, 128] with their classes."""

    train: TensorDataset = field(repr=False)
    test: TensorDataset = field(repr=False)


def load(by: SplitBy, data: Path | None) -> Beats:
    """``mitbih/mitbih_beats_128.npz`` in ``data``; without, synthetic ones, which are split by patient."""
    sides = []
    for split in _SIDES:
        if data is None:
            made = heartbeats.synthetic(split)
        else:
            made = heartbeats.load_mitbih(data / "mitbih" / "mitbih_beats_128.npz", split, split_by=by)
        sides.append(TensorDataset(made.beats, made.labels))
    return Beats(*sides)


class _Clipped(nn.Module):
    """Rows no longer than what encryption takes, so that training in the clear sees the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norms = x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        made: torch.Tensor = x * (_CLIP * (1 - 2**-18) / norms).clamp_max(1.0)
        return made


def network(seed: int) -> nn.Module:
    """*Split Ways*' [B, 1, 128] to [B, 5]; to be cut at ``front`` and ``head``."""
    torch.manual_seed(seed)
    front = nn.Sequential(
        *(nn.Conv1d(1, 16, 7, padding=3), nn.LeakyReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(16, 8, 5, padding=2), nn.LeakyReLU(), nn.MaxPool1d(2)),
        *(nn.Flatten(), _Clipped()),
    )
    model = nn.Sequential()
    for name, part in {"front": front, "middle": nn.Linear(FEATURES, OUTPUTS), "head": nn.Identity()}.items():
        model.add_module(name, part)
    return model


@dataclass(frozen=True, slots=True)
class Cost:
    """Of some steps of an epoch that has ``of``.

    Attributes:
        variant: :data:`TO_OWNER`, :data:`ENC_G` or :data:`CLEAR`.
        owner_s: CPU-seconds of the owner's process; ``workers_s`` of those that encrypt for it; ``node_s`` of the node.
        up: payload bytes; ``down`` likewise.
    """

    variant: str
    batch: int
    steps: int
    of: int
    wall_s: float
    owner_s: float
    workers_s: float
    node_s: float
    up: float
    down: float

    @property
    def epochs(self) -> float:
        """What to multiply by for a whole one."""
        return self.of / self.steps

    @property
    def cpu_s(self) -> float:
        """Of all processes, an epoch."""
        return self.epochs * (self.owner_s + self.workers_s + self.node_s)

    @property
    def megabytes(self) -> float:
        """Both ways, an epoch."""
        return self.epochs * (self.up + self.down) / 1e6


@dataclass(frozen=True, slots=True)
class Price:
    """CPU-seconds of one batch of ``rows``: to encrypt and decrypt, and to compute the layer in the clear instead."""

    rows: int
    encrypt_s: float
    decrypt_s: float
    layer_s: float


class Workplace:
    """A node, and a ledger."""

    def __init__(self, node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
        """Both are running."""
        self._node, self._ledger = node, ledger

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[Self]:
        """A node in a process of its own, over mutual TLS; both end with the block."""
        with tempfile.TemporaryDirectory() as folder, cloister.LocalNode(Path(folder), threads=1) as node:
            books = contextlib.closing(cloister.Ledger(f"sqlite:///{Path(folder) / 'privacy.sqlite'}"))
            with books as ledger:
                yield cls(node, ledger)

    def cost(self, variant: str, records: TensorDataset, batch: int, *, epochs: int, most: int | None = None) -> Cost:
        """Of the one of ``epochs`` that took the median time, or of its first ``most`` steps, after a warm-up."""
        loader = _loader(records, batch, 0)
        meter = _Meter(self._node.process.pid)
        with self._trainer(network(0), _policy(variant), callbacks=[meter]) as trainer:
            trainer.fit(list(itertools.islice(loader, _WARM_UP)), 1)
            meter.trainer = trainer
            trainer.fit(loader if most is None else list(itertools.islice(loader, most)), epochs)
        found = sorted(meter.epochs, key=lambda e: e[1][0])[epochs // 2]
        return Cost(variant, batch, found[0], len(loader), *found[1])

    def socket_bytes(self, records: TensorDataset, batch: int) -> int:
        """Of an epoch through a relay that counts: TLS, HTTP/2 and all."""
        loader = _loader(records, batch, 0)
        with Relay(self._node.port, rtt_s=0.0, bits_per_s=math.inf) as relay:
            address = addressed(self._node, relay.port)
            with self._trainer(network(0), _policy(TO_OWNER), node=address) as trainer:
                trainer.fit(list(itertools.islice(loader, 1)), 1)
                before = relay.traffic()
                trainer.fit(loader, 1)
                after = relay.traffic()
        return after.up + after.down - before.up - before.down

    def accuracy(self, variant: str, beats: Beats, batch: int, epochs: int, seed: int) -> float:
        """Percent right on the test side, at home; of one seed, every variant has the same batches."""
        model, loader = network(seed), _loader(beats.train, batch, seed)
        optimizer = _settling(epochs * len(loader))
        with self._trainer(model, _policy(variant), seed=seed, optimizer=optimizer) as trainer:
            trainer.fit(loader, epochs)
        return _percent(model, beats.test)

    def private_accuracy(self, beats: Beats, epsilon: float, epochs: int) -> float:
        """The same after joint DP-SGD over secret Poisson samples."""
        model, loader = network(0), cloister.PoissonLoader(beats.train, expected=PRIVATE_BATCH)
        noise = sampled_noise(epsilon=epsilon, delta=DELTA, rate=loader.rate, steps=epochs * len(loader))
        policy = cloister.Policy(activations=cloister.Ckks(clip=_CLIP, noise=noise), epsilon=epsilon, delta=DELTA)
        optimizer = _settling(epochs * len(loader))
        with self._trainer(model, policy, data_set=f"beats, ε = {epsilon}", optimizer=optimizer) as trainer:
            trainer.fit(loader, epochs)
        return _percent(model, beats.test)

    def _trainer(self, model: nn.Module, policy: cloister.Policy, **more: Any) -> cloister.Trainer:  # noqa: ANN401 - the trainer's own
        cut = cloister.cut(model, front="front", head="head", example=torch.zeros(4, 1, heartbeats.LENGTH))
        settings: dict[str, Any] = {"node": self._node.address, "identity": self._node.owner, "ledger": self._ledger}
        settings |= {"data_set": "beats"}  # also what is a part of them
        return cloister.Trainer(cut, policy=policy, **{**settings, "optimizer": cloister.Adam(lr=_RATE), **more})


def price(rows: int) -> Price:
    """What an owner pays for one batch whose layer it could compute itself."""
    scheme, draws = Scheme(row_norm=_CLIP), np.random.default_rng(0)
    ring, block = scheme.ring, block_rows_for(rows, scheme.ring.degree)
    rows_BF = draws.normal(size=(rows, FEATURES))
    down = Ciphertexts(block, None, draws.integers(ring.modulus, size=(2, OUTPUTS, ring.degree), dtype=np.uint64))
    workers, key = CipherWorkers(ring, 1), StepKey()
    with contextlib.closing(workers):

        def encrypt() -> None:
            workers.encrypt(key, pack_rows(rows_BF, block, ring.degree), 2.0**scheme.value_bits)

        encrypt_s = _cpu_s(encrypt)
        decrypt_s = _cpu_s(lambda: workers.decrypt(key, down, scheme.result_scale))
    layer, rows_ = nn.Linear(FEATURES, OUTPUTS), torch.from_numpy(rows_BF).to(torch.float32)
    with torch.no_grad():
        layer_s = _cpu_s(lambda: [layer(rows_) for _ in range(100)]) / 100
    return Price(rows, encrypt_s, decrypt_s, layer_s)


class _Meter(cloister.Callback):
    """Reads clocks and counters where an epoch begins and ends, once it was given its trainer."""

    def __init__(self, node: int) -> None:
        self._node = node
        self.trainer: cloister.Trainer | None = None
        self._began: tuple[int, tuple[float, ...]] = (0, ())
        self.epochs: list[tuple[int, tuple[float, ...]]] = []

    def on_epoch_begin(self, state: cloister.TrainState, control: cloister.Control) -> None:
        del control
        self._began = state.global_step, self._read()

    def on_epoch_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.EpochEnd) -> None:
        del control, end
        if self.trainer is None:
            return
        step, began = self._began
        spent = tuple(now - then for now, then in zip(self._read(), began, strict=True))
        self.epochs.append((state.global_step - step, spent))

    def _read(self) -> tuple[float, ...]:
        """Wall, owner, workers, node; bytes up and down."""
        seconds = _children_s()
        node_s = seconds.pop(self._node)
        traffic = cloister.Traffic(0, 0, 0) if self.trainer is None else self.trainer.traffic
        return time.perf_counter(), time.process_time(), sum(seconds.values()), node_s, traffic.up, traffic.down


def _children_s() -> dict[int, float]:
    """CPU-seconds of each process that this one started."""
    return {child.pid: sum(child.cpu_times()[:2]) for child in psutil.Process().children()}


def _cpu_s(do: Any) -> float:  # noqa: ANN401 - any function
    """Of this process and those that it started."""
    do()
    before = time.process_time() + sum(_children_s().values())
    for _ in range(_REPEATS):
        do()
    return (time.process_time() + sum(_children_s().values()) - before) / _REPEATS


def _settling(steps: int) -> cloister.Adam:
    """Whose rate falls to nothing: what a run ends with then depends little on its last few batches."""
    return cloister.Adam(lr=_RATE, schedule=cloister.Schedule(decay="linear", total_steps=steps))


def _policy(variant: str) -> cloister.Policy:
    if variant == CLEAR:
        return cloister.CLEAR
    encrypted = cloister.Ckks(clip=_CLIP, send_weights=variant == TO_OWNER)
    return cloister.Policy(activations=encrypted, epsilon=math.inf)


def _loader(records: TensorDataset, batch: int, seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(records, batch, shuffle=True, generator=torch.Generator().manual_seed(seed))


def _percent(model: nn.Module, test: TensorDataset) -> float:
    beats, labels = test.tensors
    with torch.no_grad():
        told = torch.cat([model(part).argmax(1) for part in torch.split(beats, 1024)])
    return 100 * float((told == labels).double().mean())
