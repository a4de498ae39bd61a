"""Do the mechanisms protect as claimed? Each one is attacked on its worst neighbours, as it is and broken on purpose.

The *profile test*: a distinguisher whose true and false positive rates break TPR ≤ e^ε·FPR + δ(ε) at any ε of the
claimed profile, beyond chance, refutes the claim. (An empirical lower bound on ε, compared with the claimed ε, has next
to no power.) Scores are the likelihood ratio between the neighbours, and what a reused draw of noise would give away.

The *μ test*: for Gaussian mechanisms the distance of the two score distributions, in deviations, is μ itself; noise
that is a tenth too low shows there first.

Many independent worlds are attacked at once: a row, a class or a pair of classes each. In each world a record is
released twice and its value flips in between, as a front that trains may make it do. Values are three times as long as
the clip, so that a clip that is missing shows. The long form runs each honest mechanism 40 times, and every mutation::

    python -m tests.audit_dp --draws 40000 --honest 40
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.special import betaincinv

from privacy import mechanisms
from privacy.accounting import Event, Gaussian, RandomizedResponse, Relation, SampledGaussian, delta_of
from privacy.mechanisms import Noise, clip_rows, moments_sensitivity, noisy_moments, noisy_rows, noisy_sums
from wire.errors import NonFiniteError

__all__ = ["MUTATIONS", "TREATMENTS", "Breach", "Mutation", "Treatment", "World", "attack", "mu_test", "profile_test"]

Floats: TypeAlias = NDArray[np.float64]

FALSE_ALARM: Final = 1e-4  # of one profile test, at most
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
    """What is released: ``draws`` independent worlds, on one of two neighbours.

    Attributes:
        member: the record's own side; else its neighbour, by ``relation``.
        poisoned: the record holds NaN.
    """

    relation: Relation
    member: bool
    draws: int
    noise: Noise
    sampler: np.random.Generator
    poisoned: bool = False

    @property
    def sign(self) -> float:
        """Of the record's value in the first release; the second one turns it round. 0: it is not there."""
        return 1.0 if self.member else -1.0 if self.relation is Relation.REPLACE_ONE else 0.0

    @property
    def sigma(self) -> float:
        """The noise under which both releases of values clipped to ``_CLIP`` have ``_MU``."""
        distance = 2 * _CLIP if self.relation is Relation.REPLACE_ONE else _CLIP
        return distance * math.sqrt(_RELEASES) / _MU

    def records(self, turn: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The record in each world: ``[draws, *shape]``, along the diagonal."""
        value = (-1) ** turn * self.sign * _TOO_LONG / math.sqrt(math.prod(shape))
        made = torch.full((self.draws, *shape), value)
        if self.poisoned and self.member:
            made.view(self.draws, -1)[:, 0] = torch.nan
        return made


@dataclass(frozen=True, slots=True)
class Treatment:
    """A mechanism under attack.

    Attributes:
        scores: of a world's outputs, ``[S, draws]``, the likelihood ratio first.
        events: what the ledger would hold of ``count`` releases in a world.
        normal: the likelihood ratio is normal, and μ is ``_MU``.
    """

    name: str
    scores: Callable[[World], Floats]
    events: Callable[[World, int], Sequence[Event]]
    relations: tuple[Relation, ...] = (Relation.REPLACE_ONE, Relation.ADD_REMOVE)
    normal: bool = True


def _linear(world: World, outputs: Sequence[torch.Tensor], point: torch.Tensor, turned: torch.Tensor) -> Floats:
    """Scores of two outputs ``[draws, P]`` under isotropic noise, where a record moves the first by ``point``.

    It moves the second one by ``turned``; its neighbour under replace-one does so the other way round.
    """
    first, second = (output.to(torch.float64).reshape(world.draws, -1) for output in outputs)
    contrast = (first - second) @ (point - turned)
    ratio = contrast if world.relation is Relation.REPLACE_ONE else first @ point + second @ turned
    return np.stack([score.numpy() for score in (ratio, contrast, first.norm(dim=1))])


def _row_scores(world: World, shape: tuple[int, ...]) -> Floats:
    outputs = [
        noisy_rows(world.records(turn, shape), clip=_CLIP, sigma=world.sigma, noise=world.noise) for turn in (0, 1)
    ]
    point = torch.full((math.prod(shape),), _CLIP / math.sqrt(math.prod(shape)), dtype=torch.float64)
    return _linear(world, outputs, point, -point)


def _row_events(world: World, count: int) -> list[Event]:
    return [Gaussian(sensitivity=_CLIP, sensitivity_replace=2 * _CLIP, noise=world.sigma, count=count)]


def _sum_outputs(world: World, sigma: float, there: NDArray[np.bool_]) -> list[torch.Tensor]:
    """Sums of two turns, a class a world: a bystander each, and the record where it is ``there``, ``[2, draws]``."""
    worlds = torch.arange(world.draws)
    made = []
    for turn, present in enumerate(torch.from_numpy(there & bool(world.sign))):
        rows = torch.cat([torch.full((world.draws, 4), 0.3), world.records(turn, (4,))[present]])
        labels = torch.cat([worlds, worlds[present]])
        made.append(noisy_sums(rows, labels, classes=world.draws, clip=_CLIP, sigma=sigma, noise=world.noise))
    return made


def _sum_scores(world: World) -> Floats:
    outputs = _sum_outputs(world, world.sigma, np.ones((_RELEASES, world.draws), dtype=np.bool_))
    point = torch.full((4,), _CLIP / 2, dtype=torch.float64)
    return _linear(world, outputs, point, -point)


def _sampled_scores(world: World) -> Floats:
    there = world.sampler.random((_RELEASES, world.draws)) < _RATE
    outputs = _sum_outputs(world, _MULTIPLIER * _CLIP, there)
    shift = 1 / _MULTIPLIER
    bystander = 0.3 * 2  # its projection on the diagonal
    first, second = ((output.sum(1).to(torch.float64).numpy() / 2 - bystander) / _MULTIPLIER for output in outputs)

    def ratio(seen: Floats) -> Floats:
        return np.asarray(np.log1p(_RATE * np.expm1(shift * seen - shift**2 / 2)))

    score = ratio(first) + ratio(-second)
    if world.relation is Relation.REPLACE_ONE:
        score -= ratio(-first) + ratio(second)
    return np.stack([score, first - second])


def _sampled_events(_: World, count: int) -> list[Event]:
    return [SampledGaussian(rate=_RATE, noise_multiplier=_MULTIPLIER, steps=count)]


def _moment_noise(world: World) -> float:
    return moments_sensitivity(_COUNT_WEIGHT, _SECOND_WEIGHT, world.relation) * math.sqrt(_RELEASES) / _MU


def _moment_scores(world: World) -> Floats:
    """Two classes and two features a world: the record is e₁ in the one class, then e₂ in the other."""
    worlds, basis = 2 * torch.arange(world.draws), torch.eye(2)
    outputs = []
    for turn in (0, 1):
        which = turn if world.member else 1 - turn
        record = _TOO_LONG * basis[which].repeat(world.draws, 1)
        if world.poisoned and world.member:
            record[:, 0] = torch.nan
        kept = world.draws if world.sign else 0
        rows = torch.cat([torch.full((2 * world.draws, 2), 0.5), record[:kept]])
        labels = torch.cat([torch.arange(2 * world.draws), worlds[:kept] + which])
        outputs.append(_moment_vector(world, rows, labels))
    points = [torch.cat([basis[which] * _COUNT_WEIGHT, *_placed(which)]).to(torch.float64) for which in (0, 1)]
    return _linear(world, outputs, points[0], points[1])


def _moment_vector(world: World, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    made = noisy_moments(
        rows,
        labels,
        classes=2 * world.draws,
        count_weight=_COUNT_WEIGHT,
        second_weight=_SECOND_WEIGHT,
        per_class=True,
        weights=None,
        sigma=_moment_noise(world),
        noise=world.noise,
    )
    parts = (made.counts * _COUNT_WEIGHT, made.sums, made.seconds * _SECOND_WEIGHT)
    return torch.cat([part.reshape(world.draws, -1) for part in parts], dim=1)


def _placed(which: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums ``[2 * 2]`` and second moments ``[2 * 2 * 2]`` of the record as e₁ in class 0 or e₂ in class 1."""
    sums, seconds = torch.zeros(2, 2), torch.zeros(2, 2, 2)
    sums[which, which] = 1
    seconds[which, which, which] = _SECOND_WEIGHT
    return sums.flatten(), seconds.flatten()


def _moment_events(world: World, count: int) -> list[Event]:
    add, replace = (
        moments_sensitivity(_COUNT_WEIGHT, _SECOND_WEIGHT, relation)
        for relation in (Relation.ADD_REMOVE, Relation.REPLACE_ONE)
    )
    return [Gaussian(sensitivity=add, sensitivity_replace=replace, noise=_moment_noise(world), count=count)]


def _label_scores(world: World) -> Floats:
    """A label 0, then 1; on the neighbour 1, then 0."""
    first, second = (
        mechanisms.randomize_labels(
            torch.full((world.draws,), turn if world.member else 1 - turn),
            classes=_CLASSES,
            epsilon=_LABEL_EPSILON,
            noise=world.noise,
        ).numpy()
        for turn in (0, 1)
    )
    ratio = (first == 0) * 1.0 - (first == 1) + (second == 1) - (second == 0)
    step = (second - first) % _CLASSES
    return np.stack([ratio, (step == 1) * 1.0 - (step == _CLASSES - 1)])


def _label_events(_: World, count: int) -> list[Event]:
    return [RandomizedResponse(epsilon=_LABEL_EPSILON, classes=_CLASSES, count=count)]


TREATMENTS: Final = (
    Treatment("rows", lambda world: _row_scores(world, (4,)), _row_events),
    Treatment("gaussian on gradients", lambda world: _row_scores(world, (2, 3)), _row_events),
    Treatment("sums", _sum_scores, _row_events),
    Treatment("sums of a secret sample", _sampled_scores, _sampled_events, normal=False),
    Treatment("moments", _moment_scores, _moment_events),
    Treatment("randomized response", _label_scores, _label_events, (Relation.REPLACE_ONE,), normal=False),
)


# --- what is broken on purpose


class _Half(Noise):
    share: ClassVar[float] = 0.5

    def gaussian(self, shape: Sequence[int], sigma: float) -> torch.Tensor:
        return super().gaussian(shape, sigma) * self.share


class _TenthLess(_Half):
    share = 0.9


class _Reused(Noise):
    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[object, torch.Tensor] = {}

    def gaussian(self, shape: Sequence[int], sigma: float) -> torch.Tensor:
        key = (*shape, sigma)
        if key not in self._kept:
            self._kept[key] = super().gaussian(shape, sigma)
        return self._kept[key]

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        key = tuple(shape)
        if key not in self._kept:
            self._kept[key] = super().uniform(shape)
        return self._kept[key]


class _ClippedLate(Noise):
    def added_to(self, values: torch.Tensor, sigma: float) -> torch.Tensor:
        return clip_rows(super().added_to(values, sigma), _CLIP)


def _as_it_is(x: torch.Tensor, _: float) -> torch.Tensor:
    return x


def _half_chance(epsilon: float, classes: int) -> float:
    return (classes - 1) / (math.exp(epsilon) + classes - 1) / 2


@dataclass(frozen=True, slots=True)
class Mutation:
    """A defect, and how it gets into the mechanisms, the data or the claim.

    Attributes:
        noise: what noise comes from.
        broken: the function of :mod:`privacy.mechanisms` that is replaced, and by what.
        poisoned: the record holds NaN.
        counted: releases that the claim counts.
        relation: that the claim is computed for, where it is another one than the neighbours'.
        labels: it can befall randomized response.
        by_mu: the μ test is what must catch it.
    """

    name: str
    noise: type[Noise] = Noise
    broken: tuple[str, object] | None = None
    poisoned: bool = False
    counted: int = _RELEASES
    relation: Relation | None = None
    labels: bool = False
    by_mu: bool = False

    def befalls(self, treatment: Treatment, relation: Relation) -> bool:
        """Whether there is anything of this kind to break."""
        if self.by_mu and not treatment.normal:
            return False
        if treatment.name == "randomized response" and not self.labels:
            return False
        return self.relation is None or self.relation is not relation

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The mechanisms, broken."""
        with mock.patch.object(mechanisms, *self.broken) if self.broken else contextlib.nullcontext():
            yield


HONEST: Final = Mutation("none", labels=True)
MUTATIONS: Final = (
    Mutation("half the noise", _Half, ("_moving_chance", _half_chance), labels=True),
    Mutation("no clipping", broken=("clip_rows", _as_it_is)),
    Mutation("clip after noise", _ClippedLate, ("clip_rows", _as_it_is)),
    Mutation("reused noise", _Reused, labels=True),
    Mutation("C for 2C", relation=Relation.ADD_REMOVE),
    Mutation("a forgotten release", counted=1, labels=True),
    Mutation("NaN rows", broken=("_check_finite", lambda _: None), poisoned=True),
    Mutation("noise a tenth too low", _TenthLess, by_mu=True),
)


def attack(
    treatment: Treatment, relation: Relation, mutation: Mutation = HONEST, *, draws: int, seed: int | None = None
) -> tuple[Breach | None, bool]:
    """One attack: what the profile test finds, and whether the μ test does.

    Args:
        treatment: what is attacked.
        relation: of the neighbours.
        mutation: what is broken.
        draws: on each side.
        seed: for a test that must always end alike; none: the operating system's entropy.
    """
    noise = mutation.noise() if seed is None else mutation.noise._seeded(seed)
    sampler = np.random.default_rng(seed)
    sides = []
    for member in (True, False):
        world = World(
            relation=relation,
            member=member,
            draws=draws,
            noise=noise,
            sampler=sampler,
            poisoned=mutation.poisoned,
        )
        with mutation.applied():
            sides.append(treatment.scores(world))
    events = treatment.events(world, mutation.counted)
    claimed = mutation.relation or relation
    breach = profile_test(sides[0], sides[1], lambda epsilon: delta_of(events, epsilon, claimed))
    return breach, treatment.normal and not mutation.poisoned and mu_test(sides[0][0], sides[1][0], _MU)


def caught(
    treatment: Treatment, relation: Relation, mutation: Mutation, *, draws: int, seed: int | None = None
) -> bool:
    """Whether the test that must catch a mutation does; NaN must be refused besides where nothing is broken."""
    breach, far = attack(treatment, relation, mutation, draws=draws, seed=seed)
    if mutation.poisoned:
        try:
            attack(treatment, relation, Mutation("", poisoned=True), draws=10)
        except NonFiniteError:
            return breach is not None
        return False
    return far if mutation.by_mu else breach is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack everything, and print what was found.

    Returns:
        0 where no honest run was flagged and every mutation caught, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.audit_dp", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=40_000, help="on each side (%(default)s)")
    parser.add_argument("--honest", type=int, default=40, help="runs of each mechanism as it is (%(default)s)")
    options = parser.parse_args(arguments)
    table = Table("treatment", "neighbours", "false alarms", *(mutation.name for mutation in MUTATIONS))
    failed = False
    for treatment in TREATMENTS:
        for relation in treatment.relations:
            runs = [attack(treatment, relation, draws=options.draws) for _ in range(options.honest)]
            alarms = sum(breach is not None or far for breach, far in runs)
            cells = []
            for mutation in MUTATIONS:
                if not mutation.befalls(treatment, relation):
                    cells.append("–")
                    continue
                found = caught(treatment, relation, mutation, draws=options.draws)
                failed |= not found
                cells.append("caught" if found else "MISSED")
            failed |= alarms > 0
            table.add_row(treatment.name, relation.value, f"{alarms} of {options.honest}", *cells)
    Console(width=160).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
