"""Accuracy against ε: every treatment on real data, through the real client and a real node.

``python -m bench privacy --data FOLDER`` with ``mnist10k/`` and ``mitbih/`` in it (see the README's list of data sets);
without, the digits that scikit-learn ships and the synthetic heart beats of :mod:`cloister.heartbeats`.

A front is applied once, because it is frozen: the records that a trainer sees are its features. All else is as users
have it: policy, ledger, table, node, and evaluation at home on clean test data.

Shapes: ``N`` records, ``D`` features, ``K`` classes.
"""

from __future__ import annotations

import contextlib
import gzip
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from bench.blocks import tell
from bench.report import Chapter, Finding, Table
from client_side.fronts import UnitRows, projection, scattering_2d
from cloister import digits, heartbeats

__all__ = ["FULL", "QUICK", "Extent", "privacy"]

DELTA: Final = 1e-5
EPSILONS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
_BATCH: Final = 128
_MNIST_TRAIN: Final = 8000


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured."""

    epsilons: tuple[float, ...] = EPSILONS
    seeds: int = 3
    epochs: int = 20


FULL: Final = Extent()
QUICK: Final = Extent(epsilons=(1.0, 8.0), seeds=1, epochs=5)


@dataclass(frozen=True, slots=True)
class Subject:
    """Features of a data set by a frozen public front: train [N, D], test, labels, and whose each record is."""

    name: str
    classes: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    units: Tensor | None
    unit: str
    note: str


def privacy(extent: Extent, data: Path | None) -> Chapter:
    """The chapter of the report; ``data`` holds the real data sets."""
    tables, findings, notes = [], [], []
    with tempfile.TemporaryDirectory() as folder, cloister.LocalNode(Path(folder), threads=1) as node:
        for subject in _subjects(data):
            found = {name: _row(subject, treatment, extent, node) for name, treatment in TREATMENTS.items()}
            clear = _accuracy(subject, None, extent, node)
            rows = [(name, *(_cell(values) for values in row)) for name, row in found.items()]
            rows.append(("no DP", *([_cell(clear)] * len(extent.epsilons))))
            columns = ("treatment", *(f"ε = {e:g}" for e in extent.epsilons))
            tables.append(Table(f"{subject.name}, per {subject.unit}, {subject.note}", columns, tuple(rows)))
            notes.append(f"{subject.name}: {subject.note}")
            best = {e: max(found, key=lambda n, i=i: fmean(found[n][i])) for i, e in enumerate(extent.epsilons)}
            for i, epsilon in enumerate(extent.epsilons):
                name = best[epsilon]
                findings.append(
                    Finding(
                        f"{subject.name}, per {subject.unit}, ε = {epsilon:g}: best is {name}, points below no DP",
                        round(fmean(clear) - fmean(found[name][i]), 2),
                    )
                )
    return Chapter(
        title="Accuracy against ε",
        intro="Percent right on clean test data, mean (and spread) over seeds; relation replace-one, δ = 1e-5, for the "
        "whole run and the whole ledger.",
        tables=tuple(tables),
        findings=tuple(findings),
    )


def _rows(epsilon: float, subject: Subject, more: dict[str, Any]) -> cloister.Policy:
    # Labels take a third of what little there is.
    labels = cloister.RandomizedLabels(epsilon=epsilon / 3)
    return cloister.Policy(activations=cloister.Rows(clip=1.0), labels=labels, epsilon=epsilon, **more)


def _aggregate(epsilon: float, subject: Subject, more: dict[str, Any]) -> cloister.Policy:
    members = len(subject.train[0]) if subject.units is None else len(subject.units.unique())
    rate = min(1.0, max(64 / members, 0.02))
    return cloister.Policy(activations=cloister.Aggregate(clip=1.0, rate=rate, releases=200), epsilon=epsilon, **more)


def _moments(epsilon: float, subject: Subject, more: dict[str, Any], **changes: Any) -> cloister.Policy:
    rows = None if subject.units is None else len(subject.train[0])
    return cloister.Policy(activations=cloister.Moments(rows=rows, **changes), epsilon=epsilon, **more)


def _per_class(epsilon: float, subject: Subject, more: dict[str, Any]) -> cloister.Policy:
    return _moments(epsilon, subject, more, per_class=True)


TREATMENTS: Final[dict[str, Callable[[float, Subject, dict[str, Any]], cloister.Policy]]] = {
    "rows, once": _rows,
    "aggregate": _aggregate,
    "moments": _moments,
    "moments, a covariance a class": _per_class,
}


def _row(subject: Subject, treatment: Any, extent: Extent, node: cloister.LocalNode) -> list[list[float]]:
    return [_accuracy(subject, (treatment, epsilon), extent, node) for epsilon in extent.epsilons]


def _accuracy(subject: Subject, treated: Any, extent: Extent, node: cloister.LocalNode) -> list[float]:
    """Per seed, in percent."""
    more: dict[str, Any] = {"classes": subject.classes, "delta": DELTA, "unit": subject.unit}
    if treated is None:
        policy = cloister.CLEAR
    else:
        if subject.units is not None and treated[0] is _rows:
            more["records_per_unit"] = 32
        policy = treated[0](treated[1], subject, more)
    found = []
    for seed in range(extent.seeds):
        with contextlib.closing(_ledger()) as ledger, _trainer(subject, policy, ledger, node, seed) as trainer:
            generator = torch.Generator().manual_seed(seed)
            loader = DataLoader(TensorDataset(*subject.train), _BATCH, shuffle=True, generator=generator)
            trainer.fit(loader, extent.epochs)
            result = trainer.evaluate(DataLoader(TensorDataset(*subject.test), 1000))
            spent = trainer.guard.spent
        if treated is not None and (spent is None or spent.epsilon > treated[1] * 1.001):
            raise RuntimeError(f"{subject.name}: {spent} was spent of ε {treated[1]}")
        found.append(100 * (result.accuracy or 0.0))
    tell(f"  {subject.name}: {treated and (treated[0].__name__, treated[1])} {fmean(found):.1f}")
    return found


def _trainer(
    subject: Subject, policy: cloister.Policy, ledger: cloister.Ledger, node: cloister.LocalNode, seed: int
) -> cloister.Trainer:
    torch.manual_seed(seed)
    width = subject.train[0].shape[1]
    front = UnitRows()
    middle = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, subject.classes))
    cut = cloister.Cut(front=front, middle=middle, example=torch.zeros(4, width) + 1)
    return cloister.Trainer(
        cut,
        node=node.address,
        identity=node.owner,
        policy=policy,
        ledger=ledger,
        data_set=subject.name,
        units=subject.units,
        optimizer=cloister.AdamW(lr=2e-3, weight_decay=1e-3),
        seed=seed,
    )


def _ledger() -> cloister.Ledger:
    return cloister.Ledger(f"sqlite:///{Path(tempfile.mkdtemp()) / 'privacy.sqlite'}")


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


# --- data -------------------------------------------------------------------------------------------------------------


def _subjects(data: Path | None) -> Iterator[Subject]:
    if data is None:
        yield _synthetic_beats()
        return
    yield _mnist(data / "mnist10k")
    for by in ("beat", "record"):
        yield _mitbih(data / "mitbih" / "mitbih_beats_128.npz", by)


def _digits_as_mnist() -> Tensor:
    """Scikit-learn's digits [N, 1, 28, 28]: other writers, another scanner; public here."""
    images = torch.cat([digits.load(split).tensors[0] for split in ("train", "test")])
    larger = nn.functional.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return nn.functional.pad(larger, (4, 4, 4, 4))


def _mnist(folder: Path) -> Subject:
    images = _idx(next(folder.glob("*images*")), 3).to(torch.float32).unsqueeze(1) / 255
    labels = _idx(next(folder.glob("*labels*")), 1).to(torch.int64)
    scattering = scattering_2d(28, 28, J=2)
    public = _batched(scattering, _digits_as_mnist())
    front = projection(public, 48, whiten=0.25)
    features = front(_batched(scattering, images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:_MNIST_TRAIN], order[_MNIST_TRAIN:]
    return Subject(
        "MNIST-10k",
        10,
        (features[train], labels[train]),
        (features[test], labels[test]),
        None,
        "record",
        "scattering and 48 principal components of other digits",
    )


def _mitbih(path: Path, by: Any) -> Subject:
    front = heartbeats.public_front("pca")
    sides = {split: heartbeats.load_mitbih(path, split, split_by=by) for split in ("train", "test")}
    train, test = sides["train"], sides["test"]
    return Subject(
        f"MIT-BIH, split by {by}",
        5,
        (front(train.beats), train.labels),
        (front(test.beats), test.labels),
        None if by == "beat" else train.patients,
        "beat" if by == "beat" else "patient",
        "principal components of synthetic beats",
    )


def _synthetic_beats() -> Subject:
    front = heartbeats.public_front("pca")
    train, test = (heartbeats.synthetic(split) for split in ("train", "test"))
    return Subject(
        "synthetic beats",
        5,
        (front(train.beats), train.labels),
        (front(test.beats), test.labels),
        train.patients,
        "patient",
        "principal components of other patients' beats",
    )


def _batched(front: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([front(part) for part in x.split(256)])


def _idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file (LeCun), gzipped, of bytes."""
    with gzip.open(path, "rb") as file:
        head = file.read(4 + 4 * dimensions)
        zero, kind, count, *shape = struct.unpack(f">HBB{dimensions}I", head)
        if zero or kind != 8 or count != dimensions:  # noqa: PLR2004 - bytes
            raise ValueError(f"{path} is no IDX file of bytes with {dimensions} dimensions")
        size = int(np.prod(shape))
        return torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8).reshape(shape)
