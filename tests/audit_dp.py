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

What is attacked, and on which neighbours, is in :mod:`tests.audited`. The long form runs each honest treatment 40
times, and every mutation; it ends with 1 where anything is missed::

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
from rich.console import Console
from rich.table import Table
from scipy import stats
from scipy.special import betaincinv
from torch import Tensor

from privacy import mechanisms, tables
from privacy.accounting import Relation, delta_of
from privacy.guard import Guard, Situation
from privacy.ledger import Ledger
from privacy.mechanisms import Noise, clip_rows
from privacy.policy import Aggregate, Policy
from privacy.tables import Records
from tests.audited import CLIP, MU, TOO_LONG, TREATMENTS, Floats, Treatment, World, nothing_leaves
from wire.errors import ConfigError, NonFiniteError

__all__ = [
    "MUTATIONS",
    "SAMPLERS",
    "Breach",
    "Mutation",
    "attack",
    "caught",
    "main",
    "mu_test",
    "profile_test",
    "sampler_fails",
]

Patch: TypeAlias = tuple[object, str, Any]

FALSE_ALARM: Final = 1e-4  # of one profile test or sampler test, at most
EPSILONS: Final = np.concatenate([np.linspace(0, 4, 33), np.linspace(4.5, 12, 16)])
_LEVELS: Final = 1 / (1 + np.exp(-np.linspace(-7, 7, 65)))  # of the quantiles that serve as thresholds
_PILOT: Final = 0.1  # of the draws choose the thresholds, the rest are counted: neither sees the other
_BEYOND: Final = 1e300  # what NaN counts as: finite, so that quantiles stay so
_MU_DEVIATIONS: Final = 4.5  # chance alone exceeds them 3 times in a million

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
    late = (Noise, "added_to", lambda self, values, sigma: clip_rows(_added_to(self, values, sigma), CLIP))
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
    Mutation(name="no clipping", patches=_no_clip, longest=TOO_LONG),
    Mutation(name="clip after noise", patches=_clip_late, longest=TOO_LONG),
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
    return breach, treatment.normal and not mutation.poisoned and mu_test(ours[0], others[0], MU)


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
