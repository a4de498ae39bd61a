"""What the audit attacks: every treatment on its worst neighbours, in many independent worlds at once.

A world is a row, a class or a pair of classes; for DP-SGD a canary, whose gradients are orthogonal, half of them in and
half of them out of one and the same run (Steinke, Nasr and Jagielski 2023). In each world a record is released twice,
in two runs or epochs, and its value flips in between, as a front that trains may make it do. Values are three times as
long as the clip, so that a clip that is missing shows. Everything leaves through a :class:`~privacy.guard.Guard`, as in
a run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy import tables
from privacy.accounting import Relation
from privacy.dp_sgd import DpGradients
from privacy.guard import Guard, Situation
from privacy.ledger import Ledger
from privacy.mechanisms import Moments as NoisyMoments
from privacy.mechanisms import moments_sensitivity
from privacy.policy import CLEAR, Aggregate, DpSgd, GaussianRows, Moments, Never, Policy, RandomizedLabels, Rows
from privacy.tables import Records
from wire.errors import ReleaseRefusedError

__all__ = ["CLIP", "MU", "TOO_LONG", "TREATMENTS", "Floats", "Treatment", "World", "nothing_leaves"]

Floats: TypeAlias = NDArray[np.float64]

CLIP: Final = 1.0
TOO_LONG: Final = 3.0
MU: Final = 1.0  # of both releases together: where a profile test of some 10⁴ draws sees best

_RELEASES: Final = 2
_COUNT_WEIGHT, _SECOND_WEIGHT = 0.6, 0.8
_RATE, _MULTIPLIER = 0.5, 1.0
_CLASSES, _LABEL_EPSILON = 4, 0.7
_CANARIES: Final = 400  # of one step of DP-SGD
_GRADIENT_SHAPES: Final = (2,), (2, 2)  # of a middle with two outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is released: ``W`` independent worlds, each on one of two neighbours.

    Attributes:
        member: [W], whether a world holds the record itself; else its neighbour, by ``relation``.
        longest: the norm of the record's value.
        poisoned: the record holds NaN.
        ledger: where the guards write what they release, under ``data_set``.
    """

    relation: Relation
    member: Tensor
    longest: float
    poisoned: bool
    ledger: Ledger
    data_set: str

    @property
    def sign(self) -> Tensor:
        """[W], of the record's value in the first release; the second one turns it round. 0: it is not there."""
        other = -1.0 if self.relation is Relation.REPLACE_ONE else 0.0
        sign: Tensor = torch.where(self.member, 1.0, other)
        return sign

    @property
    def noise(self) -> float:
        """In units of the clip: that under which both releases of clipped values have ``MU``."""
        distance = 2 if self.relation is Relation.REPLACE_ONE else 1
        return distance * math.sqrt(_RELEASES) / MU

    def records(self, turn: int, features: int) -> Tensor:
        """The record in each world: ``[W, features]``, along the diagonal."""
        value = self.longest / math.sqrt(features) * (-1 if turn else 1)
        made = (value * self.sign)[:, None].repeat(1, features)
        if self.poisoned:
            made[self.member, 0] = torch.nan
        return made

    def guard(self, policy: Policy, *, vanilla: bool = False, front_learns: bool = False) -> Guard:
        """A run's own."""
        made = Guard(policy, self.ledger)
        made.begin(
            Situation(
                data_set=self.data_set,
                run="audit",
                vanilla=vanilla,
                front_learns=front_learns,
                head_learns=False,
                once_an_epoch=True,
            )
        )
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """What is attacked.

    Attributes:
        scores: of a world's outputs, ``[S, W]``, the likelihood ratio first.
        kind: of the releases in the ledger that the claim is made of.
        spends: how often a guard writes to the ledger.
        normal: the likelihood ratio is normal, and μ is ``MU``.
        longest: the norm of the values that an honest guard takes.
        one_run: both neighbours are in one run, by a coin for each world.
        most_draws: on each side, where a draw is dear.
        immune: names of mutations of which it has nothing to break.
    """

    name: str
    scores: Callable[[World], Floats]
    kind: str = "activations"
    relations: tuple[Relation, ...] = (Relation.REPLACE_ONE, Relation.ADD_REMOVE)
    spends: int = _RELEASES
    normal: bool = True
    longest: float = TOO_LONG
    one_run: bool = False
    most_draws: int = 10**9
    immune: frozenset[str] = frozenset()


def _linear(world: World, outputs: Sequence[Tensor], point: Tensor, turned: Tensor) -> Floats:
    """Scores of two outputs ``[W, P]`` under isotropic noise, where a record moves the first by ``point``.

    It moves the second one by ``turned``; its neighbour under replace-one does so the other way round.
    """
    first, second = (output.to(torch.float64).reshape(len(world.member), -1) for output in outputs)
    point, turned = point.to(torch.float64), turned.to(torch.float64)
    contrast = (first - second) @ (point - turned)
    ratio = contrast if world.relation is Relation.REPLACE_ONE else first @ point + second @ turned
    return np.stack([score.numpy() for score in (ratio, contrast, first.norm(dim=1))])


def _diagonal(world: World, outputs: Sequence[Tensor]) -> Floats:
    """The same, where the record is along the diagonal."""
    features = outputs[0][0].numel()
    point = torch.full((features,), CLIP / math.sqrt(features))
    return _linear(world, outputs, point, -point)


def _in_rows(world: World, activations: Tensor, labels: Tensor, noise: float) -> tables.ReleasedTable:
    """A run's table of rows and labels."""
    policy = Policy(
        activations=Rows(clip=CLIP, noise=noise), labels=RandomizedLabels(epsilon=_LABEL_EPSILON), classes=_CLASSES
    )
    return world.guard(policy, vanilla=True).table(Records(activations, labels))


def _rows_once(world: World) -> Floats:
    labels = torch.zeros(len(world.member), dtype=torch.int64)
    return _diagonal(world, [_in_rows(world, world.records(turn, 4), labels, world.noise).rows for turn in (0, 1)])


def _labels(world: World) -> Floats:
    """A label 0, then 1; on the neighbour 1, then 0."""
    found = []
    for turn in (0, 1):
        labels = torch.where(world.member, turn, 1 - turn)
        released = _in_rows(world, torch.zeros(len(labels), 4), labels, world.noise).labels
        assert released is not None
        found.append(released.numpy())
    first, second = found
    ratio = (first == 0) * 1.0 - (first == 1) + (second == 1) - (second == 0)
    step = (second - first) % _CLASSES
    return np.stack([ratio, (step == 1) * 1.0 - (step == _CLASSES - 1)])


def _fresh_policy(world: World) -> Policy:
    rows, gradients = Rows(clip=CLIP, noise=world.noise, once=False), GaussianRows(clip=CLIP, noise=world.noise)
    return Policy(activations=rows, gradients=gradients, front=DpSgd(clip=CLIP, noise=world.noise))


def _rows_fresh(world: World) -> Floats:
    guard, outputs = world.guard(_fresh_policy(world)), []
    for epoch in (0, 1):
        guard.begin_pass(epoch)
        outputs.append(guard.activations([world.records(epoch, 4)])[0].tensor)
    return _diagonal(world, outputs)


def _gradients(world: World) -> Floats:
    """Two tensors of one record, which are clipped together."""
    guard, outputs = world.guard(_fresh_policy(world)), []
    sizes = [math.prod(shape) for shape in _GRADIENT_SHAPES]
    for epoch in (0, 1):
        guard.begin_pass(epoch)
        parts = world.records(epoch, sum(sizes)).split_with_sizes(sizes, dim=1)
        given = [part.reshape(-1, *shape) for part, shape in zip(parts, _GRADIENT_SHAPES, strict=True)]
        released = [found.tensor.flatten(1) for found in guard.gradients(given) if found is not None]
        outputs.append(torch.cat(released, dim=1))
    return _diagonal(world, outputs)


def _front(world: World) -> Floats:
    """Epochs of DP-SGD; whoever sees the front move sees the noised gradient of each step."""
    policy = _fresh_policy(world)
    guard, front = world.guard(policy, front_learns=True), nn.Linear(_CANARIES, 1, bias=False)
    assert isinstance(policy.front, DpSgd)
    private, outputs = DpGradients(front, policy.front, "front"), []
    for epoch in (0, 1):
        guard.begin_pass(epoch)
        canaries = world.records(epoch, 1).split(_CANARIES)
        outputs.append(torch.cat([_one_step(front, private, some) for some in canaries]))
    return _diagonal(world, outputs)


def _one_step(front: nn.Linear, private: DpGradients, canaries_B1: Tensor) -> Tensor:
    """[B, 1]: the noised sum of per-record gradients, of which each canary has a coordinate of its own."""
    rows = len(canaries_B1)
    inputs = canaries_B1 * torch.eye(rows, _CANARIES)
    for micro_batch in inputs.split(max(1, rows // 2)):
        with private.per_record(rows):
            output = front(micro_batch)
            output.backward(torch.full_like(output, 1 / rows))
    private.finish(rows)
    assert front.weight.grad is not None
    return front.weight.grad[0, :rows, None] * rows


def _sums(world: World, rate: float, noise: float) -> list[Tensor]:
    """Sums ``[W, 4]`` of two runs, a class a world: a bystander of zeros each, and the record where it is there."""
    there = world.sign != 0
    worlds, found = torch.arange(len(there)), []
    labels = torch.cat([worlds, worlds[there]])
    aggregate = Aggregate(clip=CLIP, rate=rate, releases=1, noise=noise)
    policy = Policy(activations=aggregate, classes=max(2, len(there)))
    for turn in (0, 1):
        rows = torch.cat([torch.zeros(len(there), 4), world.records(turn, 4)[there]])
        table = world.guard(policy, vanilla=True).table(Records(rows, labels))
        found.append(table.rows[: len(there)] * max(1.0, rate * len(rows) / len(there)))
    return found


def _all_sums(world: World) -> Floats:
    return _diagonal(world, _sums(world, 1.0, world.noise))


def _sampled_sums(world: World) -> Floats:
    shift = 1 / _MULTIPLIER
    first, second = (
        sums.sum(1).to(torch.float64).numpy() / 2 / _MULTIPLIER for sums in _sums(world, _RATE, _MULTIPLIER)
    )

    def ratio(seen: Floats) -> Floats:
        return np.asarray(np.log1p(_RATE * np.expm1(shift * seen - shift**2 / 2)))

    score = ratio(first) + ratio(-second)
    if world.relation is Relation.REPLACE_ONE:
        score -= ratio(-first) + ratio(second)
    return np.stack([score, first - second])


def _moments(world: World) -> Floats:
    """Two classes and two features a world: the record is e₁ in the one class, then e₂ in the other.

    Rows are sampled from what is noised: that is what an attacker could know at best.
    """
    count, basis, outputs = len(world.member), torch.eye(2), []
    for turn in (0, 1):
        which = torch.where(world.member, turn, 1 - turn)
        record = world.longest * basis[which]
        if world.poisoned:
            record[world.member, 0] = torch.nan
        there = world.sign != 0
        rows = torch.cat([torch.full((2 * count, 2), 0.5), record[there]])
        labels = torch.cat([torch.arange(2 * count), (2 * torch.arange(count) + which)[there]])
        outputs.append(_moment_vector(world, Records(rows, labels)))
    points = [torch.cat([basis[which] * _COUNT_WEIGHT, *_placed(which)]) for which in (0, 1)]
    return _linear(world, outputs, points[0], points[1])


def _moment_vector(world: World, records: Records) -> Tensor:
    reach = moments_sensitivity(_COUNT_WEIGHT, _SECOND_WEIGHT, world.relation)
    plan = Moments(
        noise=reach * math.sqrt(_RELEASES) / MU,
        count_weight=_COUNT_WEIGHT,
        second_weight=_SECOND_WEIGHT,
        per_class=True,
        rows=2,
    )
    found: list[NoisyMoments] = []

    def tapped(moments: NoisyMoments, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        found.append(moments)
        return torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)

    with mock.patch.object(tables, "sample_rows", tapped):
        world.guard(Policy(activations=plan, classes=2 * len(world.member)), vanilla=True).table(records)
    (made,) = found
    parts = (made.counts * _COUNT_WEIGHT, made.sums, made.seconds * _SECOND_WEIGHT)
    return torch.cat([part.reshape(len(world.member), -1) for part in parts], dim=1)


def _placed(which: int) -> tuple[Tensor, Tensor]:
    """The sums ``[2 * 2]`` and second moments ``[2 * 2 * 2]`` of the record as e₁ in class 0 or e₂ in class 1."""
    sums, seconds = torch.zeros(2, 2), torch.zeros(2, 2, 2)
    sums[which, which] = 1
    seconds[which, which, which] = _SECOND_WEIGHT
    return sums.flatten(), seconds.flatten()


def _clear(world: World) -> Floats:
    """Nothing is claimed; so there is nothing to refute."""
    guard = world.guard(CLEAR)
    return guard.activations([world.records(0, 1)])[0].tensor.T.to(torch.float64).numpy()


_NOTHING_CLIPPED: Final = frozenset({"no clipping", "clip after noise", "NaN rows"})
_BOUNDED_ONLY: Final = _NOTHING_CLIPPED | {"half the noise", "reused noise", "C for 2C"}
TREATMENTS: Final = (
    Treatment(name="clear", scores=_clear, spends=1, normal=False, immune=_BOUNDED_ONLY),
    Treatment(name="rows, once", scores=_rows_once),
    Treatment(name="rows, fresh", scores=_rows_fresh),
    Treatment(name="aggregate", scores=_sampled_sums, normal=False),
    Treatment(name="aggregate, all records", scores=_all_sums),
    Treatment(name="moments", scores=_moments, longest=1.0),
    Treatment(name="dp_sgd on the front", scores=_front, kind="front", one_run=True, most_draws=10_000),
    Treatment(name="gaussian on gradients", scores=_gradients, kind="gradients"),
    Treatment(
        name="randomized_response",
        scores=_labels,
        kind="labels",
        relations=(Relation.REPLACE_ONE,),  # the other one costs a label as much
        normal=False,
        immune=_NOTHING_CLIPPED | {"C for 2C"},
    ),
)


def nothing_leaves(ledger: Ledger) -> bool:
    """Whether a guard with ``never`` refuses labels, predictions, and activations that are no table."""
    policy = Policy(activations=Rows(clip=1.0, noise=1.0), labels=Never(), inference=Never())
    guard, some = Guard(policy, ledger), torch.ones(2, 2)
    doors: tuple[Callable[[], object], ...] = (
        lambda: guard.labels(torch.zeros(2, dtype=torch.int64)),
        lambda: guard.inference([some]),
        lambda: guard.activations([some]),
        lambda: guard.gradients([some]),
    )
    for door in doors:
        with contextlib.suppress(ReleaseRefusedError):
            door()
            return False
    return not guard.sent
