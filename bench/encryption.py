"""What training under encryption costs, and what it leaves of accuracy, beside the published protocols' shapes.

``python -m bench encryption --data FOLDER`` with ``mitbih/mitbih_beats_128.npz`` in it
(:func:`cloister.heartbeats.load_mitbih`); without, synthetic heart beats. Everything that a figure is compared with is
measured in the same run: training in the clear, and the published protocols (:mod:`bench.published`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from bench.blocks import tell
from bench.encrypted_runs import (
    CLEAR,
    DELTA,
    ENC_G,
    PRIVATE_BATCH,
    TO_OWNER,
    Beats,
    Cost,
    Price,
    SplitBy,
    Workplace,
    load,
    price,
)
from bench.loopback import threads
from bench.published import Published, Shape, measured
from bench.report import Chapter, Finding, Table, number
from privacy.ckks.layer import PROBES

__all__ = ["FULL", "QUICK", "Accuracy", "Beside", "Extent", "Measured", "chapter", "encryption"]

LARGE: Final = 2048
SMALL: Final = 4  # the published batch
_ACCURACY_BATCH: Final = 256
_EPOCH_S: Final = 3.0
_EPOCH_MB: Final = 30.0
_SMALL_EPOCH_S: Final = 60.0
_TIMES_LESS: Final = 1000.0
_POINTS: Final = 0.1
_SPLITS: Final[tuple[SplitBy, ...]] = ("beat", "record")

#: TenSEAL's product alone; the published ones, with the parameters of their authors' best result, and of their code.
MM: Final = Shape("TenSEAL's mm, 4096 [40, 20, 40]", 4096, (40, 20, 40), 20)
SPLIT_WAYS: Final = Shape("Split Ways' shape, 4096 [40, 20, 20]", 4096, (40, 20, 20), 21)
BY_SCALAR: Final = Shape("the same, each scalar in a ciphertext", 4096, (40, 20, 20), 21, batched=False)
SUCCESSOR: Final = Shape("its successor's, 8192 [40, 21, 21, 21, 40]", 8192, (40, 21, 21, 21, 40), 21, transposed=True)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        epochs: timed for each batch size.
        part: steps that stand for an epoch of more than that with Enc(G)Wᵀ.
        seeds: of the accuracy without privacy, and the epochs of each.
        epsilons: of joint DP-SGD, and the epochs of each.
        published: batches of each shape at batch 4; :data:`MM` also runs a whole epoch of large ones.
    """

    epochs: dict[int, int]
    part: int
    seeds: int
    accuracy_epochs: int
    epsilons: tuple[float, ...]
    private_epochs: int
    published: tuple[tuple[Shape, int], ...]


FULL: Final = Extent(
    epochs={SMALL: 1, 64: 1, 256: 3, LARGE: 5},
    part=250,
    seeds=3,
    accuracy_epochs=12,
    epsilons=(8.0, 3.0, 1.0),
    private_epochs=12,
    published=((MM, 12), (SPLIT_WAYS, 12), (BY_SCALAR, 2), (SUCCESSOR, 4)),
)
QUICK: Final = Extent(
    epochs={LARGE: 1},
    part=20,
    seeds=1,
    accuracy_epochs=1,
    epsilons=(8.0,),
    private_epochs=1,
    published=((SPLIT_WAYS, 1),),
)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percent right on one split's test side, seed by seed."""

    split: str
    clear: tuple[float, ...]
    encrypted: tuple[float, ...]

    @property
    def points(self) -> float:
        """The largest difference that encryption made."""
        return max(abs(one - other) for one, other in zip(self.clear, self.encrypted, strict=True))


@dataclass(frozen=True, slots=True)
class Beside:
    """A published shape, and what some of an epoch's batches cost under it."""

    shape: Shape
    batch: int
    of: int
    found: Published

    @property
    def cpu_s(self) -> float:
        """Of a whole epoch."""
        return self.of / self.found.batches * (self.found.compute_s + self.found.carry_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """All of it."""

    records: int
    costs: tuple[Cost, ...]
    socket_mb: float
    price: Price
    accuracies: tuple[Accuracy, ...]
    private: dict[float, float]
    beside: tuple[Beside, ...]


def encryption(extent: Extent, data: Path | None) -> Chapter:
    """The chapter of the report; ``data`` holds the real beats."""
    with threads(1), Workplace.opened() as place:
        beats = load("beat", data)
        records = len(beats.train)
        costs = tuple(_costs(place, beats, extent))
        socket_mb = place.socket_bytes(beats.train, LARGE) / 1e6
        splits: tuple[SplitBy, ...] = _SPLITS if data is not None else ("record",)
        accuracies = tuple(_accuracy(place, by, load(by, data), extent) for by in splits)
        private = {e: _private(place, beats, e, extent) for e in extent.epsilons}
    tell("encryption: what the owner pays")
    paid = price(LARGE)
    beside = [_beside(shape, SMALL, records, batches) for shape, batches in extent.published]
    if MM in dict(extent.published):
        beside.append(_beside(MM, LARGE, records, None))
    return chapter(Measured(records, costs, socket_mb, paid, accuracies, private, tuple(beside)))


# --- Measuring --------------------------------------------------------------------------------------------------------


def _costs(place: Workplace, beats: Beats, extent: Extent) -> list[Cost]:
    found = []
    for batch, epochs in extent.epochs.items():
        most = extent.part if len(beats.train) > extent.part * batch else None
        # With Enc(G)Wᵀ eight rows of a ciphertext are the owner's, who checks the node's answers by them.
        for variant, rows, at_most in (
            (TO_OWNER, batch, None),
            (ENC_G, min(batch, LARGE - PROBES), most),
            (CLEAR, batch, most),
        ):
            cost = place.cost(variant, beats.train, rows, epochs=epochs, most=at_most)
            tell(
                f"  batch {rows}, {variant}: {cost.steps} steps of {cost.of}, an epoch takes "
                f"{cost.epochs * cost.wall_s:.2f} s, {cost.cpu_s:.2f} CPU-s, {cost.megabytes:.1f} MB"
            )
            found.append(cost)
    return found


def _accuracy(place: Workplace, by: SplitBy, beats: Beats, extent: Extent) -> Accuracy:
    clear, encrypted = (
        tuple(
            place.accuracy(variant, beats, _ACCURACY_BATCH, extent.accuracy_epochs, seed)
            for seed in range(extent.seeds)
        )
        for variant in (CLEAR, TO_OWNER)
    )
    tell(f"  by {by}: {clear} in the clear, {encrypted} encrypted")
    return Accuracy(f"by {'beat' if by == 'beat' else 'patient'}", clear, encrypted)


def _private(place: Workplace, beats: Beats, epsilon: float, extent: Extent) -> float:
    percent = place.private_accuracy(beats, epsilon, extent.private_epochs)
    tell(f"  ε = {epsilon:g}: {percent:.1f} %")
    return percent


def _beside(shape: Shape, batch: int, records: int, batches: int | None) -> Beside:
    of = math.ceil(records / batch)
    tell(f"  {shape.name}, batch {batch}, {batches or of} of {of}")
    made = Beside(shape, batch, of, measured(shape, batch, batches or of))
    tell(f"  … {made.cpu_s:,.1f} CPU-s an epoch")
    return made


# --- Telling ----------------------------------------------------------------------------------------------------------


def chapter(found: Measured) -> Chapter:
    """Tables, and what they say."""
    tables = [_cost_table(found), _beside_table(found), _accuracy_table(found)]
    if found.private:
        tables.append(_private_table(found))
    return Chapter("Training under encryption", _what(found), tuple(tables), tuple(_findings(found)))


def _what(found: Measured) -> str:
    return (
        f"*Split Ways*' network on {found.records:,} heart beats: two convolutions at the owner, 256 activations, a "
        "linear layer to 5 outputs at the node. It trains through the trainer, with Adam, and a node in a process of "
        "its own, over gRPC and mutual TLS, each with one thread, beside the owner's processes that encrypt. Seconds "
        "and bytes are those of an epoch after the session was opened and a few steps were done, CPU-seconds those of "
        "all processes. The published shapes run in a process of their own, by TenSEAL's own tensors; what they do in "
        "the clear, and their sockets, are not counted. Where less than an epoch was measured, the table says how much "
        "of it, and the figures are scaled up. **Encrypting costs the owner more than computing the layer would: it "
        "buys confidentiality (of the data from the node and, with Enc(G)Wᵀ, of the weights from the owner), not "
        "compute.**"
    )


def _cost_table(found: Measured) -> Table:
    columns = ("batch", "", "measured", "wall s", "CPU-s", "owner", "its workers", "node", "MB up", "MB down")
    rows = [
        (
            str(c.batch),
            c.variant,
            f"{c.steps:,} of {c.of:,} steps",
            *(f"{c.epochs * s:.2f}" for s in (c.wall_s,)),
            f"{c.cpu_s:.2f}",
            *(f"{c.epochs * s:.2f}" for s in (c.owner_s, c.workers_s, c.node_s)),
            *(f"{c.epochs * b / 1e6:,.1f}" for b in (c.up, c.down)),
        )
        for c in found.costs
    ]
    return Table("An epoch of training", columns, tuple(rows))


def _beside_table(found: Measured) -> Table:
    columns = ("", "batch", "measured", "CPU-s", "of it encrypt, multiply, decrypt", "MB", "largest error of a logit")
    rows = [
        (
            b.shape.name,
            str(b.batch),
            f"{b.found.batches:,} of {b.of:,} batches",
            f"{b.cpu_s:,.1f}",
            f"{b.of / b.found.batches * b.found.compute_s:,.1f}",
            number(b.of / b.found.batches * b.found.nbytes / 1e6),
            f"{b.found.error:.1e}",
        )
        for b in found.beside
    ]
    return Table("An epoch of the published layer alone", columns, tuple(rows))


def _accuracy_table(found: Measured) -> Table:
    rows = [
        (a.split, said, *(f"{percent:.2f}" for percent in percents), f"{fmean(percents):.2f}")
        for a in found.accuracies
        for said, percents in ((CLEAR, a.clear), (TO_OWNER, a.encrypted))
    ]
    seeds = len(found.accuracies[0].clear)
    columns = ("split", "", *(f"seed {seed}" for seed in range(seeds)), "mean")
    return Table(f"Percent right on the test side, batch {_ACCURACY_BATCH}, the same batches", columns, tuple(rows))


def _private_table(found: Measured) -> Table:
    title = f"Joint DP-SGD over Poisson samples of {PRIVATE_BATCH}, δ = {DELTA:g}, replace-one, split by beat, one seed"
    return Table(title, ("ε", "percent right"), tuple((f"{e:g}", f"{p:.1f}") for e, p in found.private.items()))


def _findings(found: Measured) -> list[Finding]:
    made = []
    by = {(c.variant, c.batch): c for c in found.costs}
    large = by[TO_OWNER, LARGE]
    name = f"An epoch of {found.records:,} beats, batch {LARGE}, {TO_OWNER}"
    made.append(Finding(f"{name}, wall", large.epochs * large.wall_s, _EPOCH_S, " s", at_most=True))
    made.append(Finding(f"{name}, both ways", large.megabytes, _EPOCH_MB, " MB", at_most=True))
    made.append(
        Finding(f"{name}, on the socket, with TLS and framing", found.socket_mb, _EPOCH_MB, " MB", at_most=True)
    )
    if (TO_OWNER, SMALL) in by:
        small = by[TO_OWNER, SMALL]
        said = f"The same at batch {SMALL}, wall"
        made.append(Finding(said, small.epochs * small.wall_s, _SMALL_EPOCH_S, " s", at_most=True))
    for beside in found.beside:
        if beside.shape in {SPLIT_WAYS, SUCCESSOR}:
            said = f"CPU-seconds of an epoch of {beside.shape.name}, batch {beside.batch}, over ours at batch {LARGE}"
            target = _TIMES_LESS if beside.shape == SPLIT_WAYS else None
            made.append(Finding(said, beside.cpu_s / large.cpu_s, target))
        own = by.get((TO_OWNER, beside.batch))
        if own is not None:
            said = f"The same of {beside.shape.name} over ours, both at batch {beside.batch}"
            made.append(Finding(said, beside.cpu_s / own.cpu_s))
    for a in found.accuracies:
        said = f"Split {a.split}: the most that encryption changed of a seed's accuracy"
        made.append(Finding(said, a.points, _POINTS, " points", at_most=True))
    paid = found.price
    said = (
        f"CPU-seconds to encrypt {paid.rows} rows of 256 and decrypt 5 outputs, over computing the layer in the clear"
    )
    made.append(Finding(said, (paid.encrypt_s + paid.decrypt_s) / paid.layer_s))
    return made
