"""Do the treatments protect as claimed? Each one is attacked on its worst neighbours, as it is and broken on purpose.

What is attacked is what users run: a :class:`~privacy.guard.Guard` under a policy, and the front's DP-SGD. What is
claimed is what the ledger holds afterwards, through :func:`privacy.accounting.delta_of`.

The *profile test*: a distinguisher whose true and false positive rates break TPR ≤ e^ε·FPR + δ(ε) at any ε of the
claimed profile, beyond chance, refutes the claim. (An empirical lower bound on ε, compared with the claimed ε, has next
to no power.) Scores are the likelihood ratio between the neighbours, and what a reused draw of noise would give away.

The *μ test*: for Gaussian mechanisms the distance of the two score distributions, in deviations, is μ itself; noise
that is a tenth too low shows there first.

The *sampler test*: that each record joins each sample by a coin of its own, since the profile of a shuffled sample is
within that of a Poisson sample on most neighbours.

Many independent worlds are attacked at once: a row, a class or a pair of classes each; for DP-SGD a canary each, whose
gradients are orthogonal, half of them in and half of them out of one and the same run (Steinke, Nasr and Jagielski
2023). In each world a record is released twice, in two runs or epochs, and its value flips in between, as a front that
trains may make it do. Values are three times as long as the clip, so that a clip that is missing shows. The long form
runs each honest treatment 40 times, and every mutation; it ends with 1 where anything is missed::

    python -m tests.audit_dp --draws 40000 --honest 40
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from scipy.special import betaincinv
from torch import Tensor, nn

from privacy import mechanisms, tables
from privacy.accounting import Relation, delta_of
from privacy.dp_sgd import DpGradients
from privacy.guard import Guard, Situation
from privacy.ledger import Ledger
from privacy.mechanisms import Moments as NoisyMoments
from privacy.mechanisms import Noise, clip_rows, moments_sensitivity
from privacy.policy import CLEAR, Aggregate, DpSgd, GaussianRows, Moments, Never, Policy, RandomizedLabels, Rows
from privacy.tables import Records
from wire.errors import ConfigError, NonFiniteError, ReleaseRefusedError

__all__ = [
    "MUTATIONS",
    "SAMPLERS",
    "TREATMENTS",
    "Breach",
    "Mutation",
    "Treatment",
    "World",
    "attack",
    "caught",
    "mu_test",
    "nothing_leaves",
    "profile_test",
    "sampler_fails",
]

Floats: TypeAlias = NDArray[np.float64]
Patch: TypeAlias = tuple[object, str, Any]

FALSE_ALARM: Final = 1e-4  # of one profile test or sampler test, at most
EPSILONS: Final = np.concatenate([np.linspace(0, 4, 33), np.linspace(4.5, 12, 16)])
_LEVELS: Final = 1 / (1 + np.exp(-np.linspace(-7, 7, 65)))  # of the quantiles that serve as thresholds
_PILOT: Final = 0.1  # of the draws choose the thresholds, the rest are counted: neither sees the other
_BEYOND: Final = 1e300  # what NaN counts as: finite, so that quantiles stay so
_MU_DEVIATIONS: Final = 4.5  # chance alone exceeds them 3 times in a million

_CLIP: Final = 1.0
_TOO_LONG: Final = 3.0
_RELEASES: Final = 2
_MU: Final = 1.0  # of both releases together: where a profile test of some 10⁴ draws sees best
_COUNT_WEIGHT, _SECOND_WEIGHT = 0.6, 0.8
_RATE, _MULTIPLIER = 0.5, 1.0
_CLASSES, _LABEL_EPSILON = 4, 0.7
_CANARIES: Final = 400  # of one step of DP-SGD
_GRADIENT_SHAPES: Final = (2,), (2, 2)  # of a middle with two outputs
_RECORDS, _SAMPLES = 4000, 20  # of the sampler test: 20 samples at a rate of 1/20 are one epoch of a shuffled loader


@dataclass(frozen=True, slots=True)
class Breach:
    """A point outside the claimed profile: ``true_positive > e^epsilon · false_positive + delta``, beyond chance."""

    epsilon: float
    delta: float
    true_positive: float
    false_positive: float


def profile_test(
    scores: Floats, others: Floats, delta_at: Callable[[float], float], *, false_alarm: float = FALSE_ALARM
) -> Breach | None:
    """The worst breach of a claim that a threshold on any of ``S`` scores shows, if one does beyond chance.

    Args:
        scores: ``[S, draws]``, of outputs on one neighbour; NaN counts as what no honest output shows.
        others: ``[S, draws]``, on the other one.
        delta_at: the claim: δ as a function of ε.
        false_alarm: the chance of a breach where the claim holds, at most: Clopper and Pearson's bounds (1934) are
            taken at this level over the number of them.
    """
    allowed = np.array([delta_at(epsilon) for epsilon in EPSILONS])
    scores, others = (np.nan_to_num(x, nan=_BEYOND, posinf=_BEYOND, neginf=-_BEYOND) for x in (scores, others))
    tests = [pair for s, o in zip(scores, others, strict=True) for pair in ((s, o), (o, s), (-s, -o), (-o, -s))]
    level = false_alarm / (2 * len(tests) * len(_LEVELS))
    worst, found = 0.0, None
    for positives, negatives in tests:
        true, false = _rates(positives, negatives, level)
        excess = true[:, None] - np.exp(EPSILONS) * false[:, None] - allowed
        at, which = np.unravel_index(int(excess.argmax()), excess.shape)
        if excess[at, which] > worst:
            worst = float(excess[at, which])
            found = Breach(float(EPSILONS[which]), float(allowed[which]), float(true[at]), float(false[at]))
    return found


def _rates(positives: Floats, negatives: Floats, level: float) -> tuple[Floats, Floats]:
    """At each threshold, a lower bound of the true positive rate and an upper bound of the false one."""
    pilot = int(len(positives) * _PILOT)
    thresholds = np.quantile(np.concatenate([positives[:pilot], negatives[:pilot]]), _LEVELS, method="lower")
    draws = len(positives) - pilot
    hits = draws - np.searchsorted(np.sort(positives[pilot:]), thresholds, side="left")
    misses = draws - np.searchsorted(np.sort(negatives[pilot:]), thresholds, side="left")
    lower = np.where(hits > 0, betaincinv(np.maximum(hits, 1), draws - hits + 1, level), 0.0)
    upper = np.where(misses < draws, betaincinv(misses + 1, np.maximum(draws - misses, 1), 1 - level), 1.0)
    return lower, upper


def mu_test(scores: Floats, others: Floats, mu: float) -> bool:
    """Whether normal ``scores`` and ``others`` (``[draws]``) lie more than ``mu`` deviations apart, beyond chance."""
    spread = math.sqrt((float(scores.var(ddof=1)) + float(others.var(ddof=1))) / 2)
    apart = abs(float(scores.mean() - others.mean()))
    if not spread:  # no noise at all
        return apart > 0
    found = apart / spread
    error = math.sqrt(2 / len(scores) + found**2 / (4 * len(scores)))
    return found - _MU_DEVIATIONS * error > mu


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
        """In units of the clip: that under which both releases of clipped values have ``_MU``."""
        distance = 2 if self.relation is Relation.REPLACE_ONE else 1
        return distance * math.sqrt(_RELEASES) / _MU

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
        normal: the likelihood ratio is normal, and μ is ``_MU``.
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
    longest: float = _TOO_LONG
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
    point = torch.full((features,), _CLIP / math.sqrt(features))
    return _linear(world, outputs, point, -point)


def _in_rows(world: World, activations: Tensor, labels: Tensor, noise: float) -> tables.ReleasedTable:
    """A run's table of rows and labels."""
    policy = Policy(
        activations=Rows(clip=_CLIP, noise=noise), labels=RandomizedLabels(epsilon=_LABEL_EPSILON), classes=_CLASSES
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
    rows, gradients = Rows(clip=_CLIP, noise=world.noise, once=False), GaussianRows(clip=_CLIP, noise=world.noise)
    return Policy(activations=rows, gradients=gradients, front=DpSgd(clip=_CLIP, noise=world.noise))


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
    aggregate = Aggregate(clip=_CLIP, rate=rate, releases=1, noise=noise)
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
        noise=reach * math.sqrt(_RELEASES) / _MU,
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


# --- what is broken on purpose


_gaussian, _uniform, _added_to = Noise.gaussian, Noise.uniform, Noise.added_to


def _reduced(share: float) -> Patch:
    return Noise, "gaussian", lambda self, shape, sigma: _gaussian(self, shape, sigma) * share


def _reused() -> list[Patch]:
    """Noise that begins anew in each run or epoch, as from a seed."""
    kept: dict[object, Tensor] = {}

    def gaussian(self: Noise, shape: Sequence[int], sigma: float) -> Tensor:
        kept.setdefault(key := (*shape, sigma), _gaussian(self, shape, sigma))
        return kept[key]

    def uniform(self: Noise, shape: Sequence[int]) -> Tensor:
        kept.setdefault(key := tuple(shape), _uniform(self, shape))
        return kept[key]

    return [(Noise, "gaussian", gaussian), (Noise, "uniform", uniform)]


def _as_it_is(x: Tensor, _: float) -> Tensor:
    return x


def _no_clip() -> list[Patch]:
    """No clip, nor a look at norms before it, wherever they stand."""
    return [
        (mechanisms, "clip_rows", _as_it_is),
        (tables, "clip_rows", _as_it_is),
        (tables, "float", lambda _: 0.0),  # of the greatest norm, where moments are taken
        (torch.Tensor, "clamp_max", lambda x, _: torch.ones_like(x)),  # of the factors of DP-SGD
    ]


def _clip_late() -> list[Patch]:
    late = (Noise, "added_to", lambda self, values, sigma: clip_rows(_added_to(self, values, sigma), _CLIP))
    return [*_no_clip(), late]


def _half_chance(epsilon: float, classes: int) -> float:
    return (classes - 1) / (math.exp(epsilon) + classes - 1) / 2


def _half_noise() -> list[Patch]:
    return [_reduced(0.5), (mechanisms, "_moving_chance", _half_chance)]


def _tenth_less() -> list[Patch]:
    return [_reduced(0.9)]


def _nothing_checked() -> list[Patch]:
    return [(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """A defect, and how it gets into the code, the data or the claim.

    Attributes:
        patches: what is replaced, where, and by what.
        longest: the norm of the values, where treatments that take no long ones must be shown some.
        poisoned: the record holds NaN.
        forgetful: the ledger loses the last release.
        relation: that the claim is computed for, where it is another one than the neighbours'.
        by_mu: the μ test is what must catch it.
    """

    name: str
    patches: Callable[[], list[Patch]] = list
    longest: float = 0.0
    poisoned: bool = False
    forgetful: bool = False
    relation: Relation | None = None
    by_mu: bool = False

    def befalls(self, treatment: Treatment, relation: Relation) -> bool:
        """Whether there is anything of this kind to break."""
        if self.by_mu and not treatment.normal:
            return False
        return self.name not in treatment.immune and (self.relation is None or self.relation is not relation)

    @contextlib.contextmanager
    def applied(self, spends: int) -> Iterator[None]:
        """The code, broken; of so many ``spends`` a forgetful ledger loses the last."""
        patches, written, spend = self.patches(), itertools.count(1), Ledger.spend

        def forgets(*args: Any, **more: Any) -> object:
            return None if next(written) == spends else spend(*args, **more)

        if self.forgetful:
            patches.append((Ledger, "spend", forgets))
        with contextlib.ExitStack() as stack:
            for owner, name, new in patches:
                stack.enter_context(mock.patch.object(owner, name, new, create=name == "float"))
            yield


HONEST: Final = Mutation(name="none")
MUTATIONS: Final = (
    Mutation(name="half the noise", patches=_half_noise),
    Mutation(name="no clipping", patches=_no_clip, longest=_TOO_LONG),
    Mutation(name="clip after noise", patches=_clip_late, longest=_TOO_LONG),
    Mutation(name="reused noise", patches=_reused),
    Mutation(name="C for 2C", relation=Relation.ADD_REMOVE),
    Mutation(name="a forgotten release", forgetful=True),
    Mutation(name="NaN rows", patches=_nothing_checked, poisoned=True),
    Mutation(name="noise a tenth too low", patches=_tenth_less, by_mu=True),
)


@contextlib.contextmanager
def _entropy(seed: int | None) -> Iterator[None]:
    """Noise of the operating system's; or, for tests that must always end alike, from a seed."""
    keys = (hashlib.sha256(f"{seed} {number}".encode()).digest() for number in itertools.count())
    with contextlib.nullcontext() if seed is None else mock.patch.object(Noise, "_key", side_effect=keys):
        yield


_data_sets: Final = itertools.count()


def attack(
    treatment: Treatment,
    relation: Relation,
    mutation: Mutation = HONEST,
    *,
    draws: int,
    ledger: Ledger,
    seed: int | None = None,
) -> tuple[Breach | None, bool]:
    """One attack: what the profile test finds, and whether the μ test does.

    Args:
        treatment: what is attacked.
        relation: of the neighbours.
        mutation: what is broken.
        draws: on each side, as far as the treatment takes so many.
        ledger: in which the guards write.
        seed: for a test that must always end alike; none: the operating system's entropy.
    """
    draws = min(draws, treatment.most_draws)
    generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    sides = [torch.ones(draws, dtype=torch.bool), torch.zeros(draws, dtype=torch.bool)]
    if treatment.one_run and not mutation.poisoned:  # one NaN spoils a whole step, for all others in it too
        sides = [torch.cat(sides)[torch.randperm(2 * draws, generator=generator)]]
    found = []
    with _entropy(seed):
        for member in sides:
            world = World(
                relation=relation,
                member=member,
                longest=max(treatment.longest, mutation.longest),
                poisoned=mutation.poisoned,
                ledger=ledger,
                data_set=f"audit {next(_data_sets)}",
            )
            with mutation.applied(treatment.spends):
                found.append(treatment.scores(world))
    scores, members = np.concatenate(found, axis=1), torch.cat(sides).numpy()
    events = [entry.event for entry in ledger.entries(world.data_set) if entry.kind == treatment.kind]
    claimed = mutation.relation or relation
    ours, others = scores[:, members], scores[:, ~members]
    breach = profile_test(ours, others, lambda epsilon: delta_of(events, epsilon, claimed))
    return breach, treatment.normal and not mutation.poisoned and mu_test(ours[0], others[0], _MU)


def caught(
    treatment: Treatment,
    relation: Relation,
    mutation: Mutation,
    *,
    draws: int,
    ledger: Ledger,
    seed: int | None = None,
) -> bool:
    """Whether the test that must catch a mutation does.

    What an honest guard refuses besides (NaN, and rows too long for moments) must be refused where nothing is broken.
    """
    breach, far = attack(treatment, relation, mutation, draws=draws, ledger=ledger, seed=seed)
    if mutation.poisoned or mutation.longest > treatment.longest:
        unbroken = Mutation(name="", poisoned=mutation.poisoned, longest=mutation.longest)
        try:
            attack(treatment, relation, unbroken, draws=10, ledger=ledger)
        except (NonFiniteError, ConfigError):
            return breach is not None
        return False
    return far if mutation.by_mu else breach is not None


# --- which records join a sample


def _shuffled() -> list[Patch]:
    """Samples are parts of a shuffled epoch: each record joins one of them."""
    order: list[Tensor] = []

    def uniform(self: Noise, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if not order:
            order.extend(_uniform(self, shape).argsort().split(size // _SAMPLES))
        made = torch.ones(size, dtype=torch.float64)
        made[order.pop()] = 0.0
        return made

    return [(Noise, "uniform", uniform)]


def _of_one_size() -> list[Patch]:
    def uniform(self: Noise, shape: Sequence[int]) -> Tensor:
        return _uniform(self, shape).argsort().argsort() / math.prod(shape)

    return [(Noise, "uniform", uniform)]


def _too_often() -> list[Patch]:
    return [(Noise, "uniform", lambda self, shape: _uniform(self, shape) * 0.9)]


def _the_same_again() -> list[Patch]:
    return _reused()[1:]


SAMPLERS: Final = (
    Mutation(name="shuffled", patches=_shuffled),
    Mutation(name="of one size", patches=_of_one_size),
    Mutation(name="a tenth too often", patches=_too_often),
    Mutation(name="the same again", patches=_the_same_again),
)


def sampler_fails(mutation: Mutation = HONEST, *, ledger: Ledger, seed: int | None = None) -> bool:
    """Whether the records that join samples do so otherwise than each by its own coin, beyond chance.

    Which ones join is read off an aggregate with next to no noise, in which each record is its own class. Their number
    in each sample is binomial, and so is the number that two samples share.
    """
    aggregate = Aggregate(clip=1.0, rate=1 / _SAMPLES, releases=_SAMPLES, noise=1e-3)
    policy = Policy(activations=aggregate, classes=_RECORDS)
    situation = Situation(
        data_set=f"audit {next(_data_sets)}",
        run="audit",
        vanilla=True,
        front_learns=False,
        head_learns=False,
        once_an_epoch=True,
    )
    with _entropy(seed), mutation.applied(0):
        guard = Guard(policy, ledger)
        guard.begin(situation)
        rows = guard.table(Records(torch.ones(_RECORDS, 1), torch.arange(_RECORDS))).rows
    joins = (rows.reshape(_SAMPLES, _RECORDS) > 0.5).to(torch.float64)  # half a record
    rate = aggregate.rate
    sizes, shared = joins.sum(1), (joins @ joins.T)[*torch.triu_indices(_SAMPLES, _SAMPLES, offset=1)]
    return _not_binomial(sizes, rate) or _not_binomial(shared, rate**2)


def _not_binomial(counts: Tensor, rate: float) -> bool:
    """Whether ``counts`` of ``_RECORDS`` coins lie too far from or too near to their mean, or to one side of it."""
    deviations = ((counts - _RECORDS * rate) / math.sqrt(_RECORDS * rate * (1 - rate))).numpy()
    level = FALSE_ALARM / 4
    spread = float(stats.chi2.sf((deviations**2).sum(), len(deviations)))
    aside = float(stats.norm.sf(abs(deviations.sum()) / math.sqrt(len(deviations)))) * 2
    return spread < level or spread > 1 - level or aside < level


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack everything, and print what was found.

    Returns:
        0 where no honest run was flagged and every mutation caught, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.audit_dp", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=40_000, help="on each side (%(default)s)")
    parser.add_argument("--honest", type=int, default=40, help="runs of each treatment as it is (%(default)s)")
    names = [treatment.name for treatment in TREATMENTS]
    parser.add_argument("--treatment", choices=names, action="append", help="again and again; all unless said")
    options = parser.parse_args(arguments)
    console = Console(width=180)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(_ledger(Path(folder))) as ledger:
        table, failed = _audited(options.treatment or names, options.draws, options.honest, ledger)
        console.print(table)
        if options.treatment is None:
            samplers, misses = _samplers(options.honest, ledger)
            console.print(samplers)
            kept = nothing_leaves(ledger)
            console.print(f"never: {'nothing left' if kept else 'SOMETHING LEFT'}")
            failed |= misses or not kept
    return int(failed)


def _ledger(folder: Path) -> Ledger:
    return Ledger(f"sqlite:///{folder / 'privacy.sqlite'}")


def _audited(names: Sequence[str], draws: int, honest: int, ledger: Ledger) -> tuple[Table, bool]:
    table = Table("treatment", "neighbours", "false alarms", *(mutation.name for mutation in MUTATIONS))
    failed = False
    for treatment in TREATMENTS:
        for relation in treatment.relations if treatment.name in names else ():
            runs = [attack(treatment, relation, draws=draws, ledger=ledger) for _ in range(honest)]
            alarms = sum(breach is not None or far for breach, far in runs)
            cells = []
            for mutation in MUTATIONS:
                if not mutation.befalls(treatment, relation):
                    cells.append("–")
                    continue
                found = caught(treatment, relation, mutation, draws=draws, ledger=ledger)
                failed |= not found
                cells.append("caught" if found else "MISSED")
            failed |= alarms > 0
            table.add_row(treatment.name, relation.value, f"{alarms} of {honest}", *cells)
    return table, failed


def _samplers(honest: int, ledger: Ledger) -> tuple[Table, bool]:
    table = Table("sampler", "false alarms", *(mutation.name for mutation in SAMPLERS))
    alarms = sum(sampler_fails(ledger=ledger) for _ in range(honest))
    found = [sampler_fails(mutation, ledger=ledger) for mutation in SAMPLERS]
    table.add_row("aggregate", f"{alarms} of {honest}", *("caught" if each else "MISSED" for each in found))
    return table, alarms > 0 or not all(found)


if __name__ == "__main__":
    sys.exit(main())
