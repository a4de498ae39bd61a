"""Releases of whole tables: rows, and their labels, that leave once and are then trained on for any number of epochs.

Whatever is computed from a table afterwards, here or on the node, tells nothing more (post-processing). What each table
costs stands in :func:`plan_table`, beside the mechanism that makes it in :func:`make_table`.

Shapes: ``N`` records, ``D`` features of one record's activation (any shape ``...`` flattened), ``K`` classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from privacy.accounting import (
    Event,
    Gaussian,
    RandomizedResponse,
    Relation,
    SampledGaussian,
    epsilon_of,
    gaussian_noise,
    sampled_noise,
)
from privacy.ledger import Budget, Release
from privacy.mechanisms import Moments as NoisyMoments
from privacy.mechanisms import (
    Noise,
    clip_rows,
    moments_sensitivity,
    noisy_moments,
    noisy_rows,
    noisy_sums,
    randomize_labels,
)
from privacy.policy import Aggregate, Moments, Policy, RandomizedLabels, Rows
from wire.codec import check_finite
from wire.errors import BudgetSpentError, ConfigError

__all__ = [
    "Records",
    "ReleasedTable",
    "TablePlan",
    "check_labels",
    "check_records",
    "label_releases",
    "make_labels",
    "make_table",
    "plan_table",
    "sums_noise",
]

_LEAST_LEFT: Final = 0.01  # of a budget: with less, a release would be noise alone
_FLOOR: Final = 0.02  # of a covariance's eigenvalues, relative to their mean: what is below is noise
_RIDGE: Final = 0.05  # of the mean variance, in every direction: no Gaussian of a class is as flat as it looks


@dataclass(frozen=True, slots=True)
class Records:
    """What a front makes of a data set: activations [N, ...], labels [N], and whose each record is, [N]."""

    activations: Tensor = dataclasses.field(repr=False)
    labels: Tensor = dataclasses.field(repr=False)
    units: Tensor | None = dataclasses.field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ReleasedTable:
    """Rows [M, ...] and labels [M] (none, where they stay) that may leave, as often as one likes."""

    rows: Tensor = dataclasses.field(repr=False)
    labels: Tensor | None = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A table's treatment with its noise settled, and what it costs."""

    treatment: Rows | Aggregate | Moments
    releases: tuple[Release, ...]


def plan_table(policy: Policy, budget: Budget, before: tuple[Event, ...] = ()) -> TablePlan:
    """Settles the noise that the budget asks for, where the policy leaves it open.

    Args:
        policy: names a treatment that releases a table.
        budget: what may be spent.
        before: what was spent on this data set already.

    Raises:
        BudgetSpentError: nothing is left to calibrate to.
        ConfigError: no budget, and no noise either.
    """
    labels = label_releases(policy)
    spent = [*before, *(release.event for release in labels)]
    treatment = policy.table
    if isinstance(treatment, Rows):
        settled = dataclasses.replace(treatment, noise=treatment.noise or _rows_noise(policy, budget, spent))
        return TablePlan(settled, (_release("rows", _rows_event(settled, policy)), *labels))
    if isinstance(treatment, Aggregate):
        noise = treatment.noise or sums_noise(rate=treatment.rate, steps=treatment.releases, budget=budget, spent=spent)
        sums = dataclasses.replace(treatment, noise=noise)
        cost = SampledGaussian(rate=sums.rate, noise_multiplier=noise, steps=sums.releases)
        return TablePlan(sums, (_release("aggregate", cost), *labels))
    if isinstance(treatment, Moments):
        noise = treatment.noise or _moments_noise(treatment, budget, spent)
        moments = dataclasses.replace(treatment, noise=noise)
        return TablePlan(moments, (_release("moments", _moments_event(moments)), *labels))
    raise ConfigError("privacy.activations: this treatment releases no table")


def label_releases(policy: Policy) -> list[Release]:
    """What randomizing the labels costs, once; nothing, where they are not."""
    if not isinstance(policy.labels, RandomizedLabels) or policy.classes is None:
        return []
    event = RandomizedResponse(epsilon=policy.labels.epsilon, classes=policy.classes, count=policy.records_per_unit)
    return [Release(kind="labels", treatment="randomized_response", event=event)]


def make_labels(policy: Policy, labels: Tensor, noise: Noise | None = None) -> Tensor:
    """Draws the labels [N] of a policy that randomizes them; their cost must be in the ledger before.

    Raises:
        ConfigError: they are no classes, or the policy does not randomize them.
    """
    if not isinstance(policy.labels, RandomizedLabels):
        raise ConfigError("privacy.labels: this treatment draws no labels")
    check_labels(policy, labels)
    return randomize_labels(labels, classes=policy.classes or 0, epsilon=policy.labels.epsilon, noise=noise or Noise())


def make_table(policy: Policy, plan: TablePlan, records: Records, noise: Noise | None = None) -> ReleasedTable:
    """Draws the table; its cost must be in the ledger before.

    Raises:
        ConfigError: labels that are no classes; no unit ids where the policy's unit is not the record.
        NonFiniteError: an activation is NaN or infinite.
    """
    noise = noise or Noise()
    check_records(policy, plan, records)
    shape = records.activations.shape[1:]
    flat = records.activations.detach().flatten(1)
    if isinstance(plan.treatment, Rows):
        return _rows(policy, plan.treatment, records, noise)
    if isinstance(plan.treatment, Aggregate):
        rows, labels = _sums(policy, plan.treatment, flat, records, noise)
    else:
        rows, labels = _sampled(policy, plan.treatment, flat, records, noise)
    return ReleasedTable(rows.reshape(len(rows), *shape), labels)


def unit_weights(units: Tensor) -> Tensor:
    """[N]: each record's share of its unit, so that a unit contributes an average of its records."""
    _, which, counts = torch.unique(units, return_inverse=True, return_counts=True)
    shares: Tensor = counts[which].to(torch.float64).reciprocal()
    return shares


def sample_rows(
    moments: NoisyMoments, count: int, noise: Noise, *, sigma: float, second_weight: float
) -> tuple[Tensor, Tensor]:
    """``count`` rows [M, D] and their classes [M], drawn from a Gaussian for each class: post-processing.

    The noise's own strength is no secret, so the estimates are corrected for it:

    - A class mean is no longer than the records that it averages, and the squares of its noise are taken out of what
      lies between the classes.
    - Of the pooled covariance, eigenvalues below the edge of the noise's spectrum, 2s√D for off-diagonal noise s
      (Füredi and Komlós 1981, "The eigenvalues of random symmetric matrices"), tell nothing one by one: they become
      their mean, so that the trace, which is known well, stays. Without that, the directions in which noise came out
      lowest look the surest, and the trunk relies on them. An eigenvalue v over the mean of those loses what the noise
      lengthened it by: √(v² - 4s²D) (Donoho, Gavish and Johnstone 2018, "Optimal Shrinkage of Eigenvalues in the
      Spiked Covariance Model", on Wigner noise).
    - Covariances by class move towards the pooled one as far as the noise explains their difference (James and Stein
      1961; the pooled target is that of Friedman 1989, "Regularized Discriminant Analysis"). So a class with few
      records falls back to the pooled covariance, and no choice is made on the data in the clear.

    Args:
        moments: what was released.
        count: M.
        noise: draws the rows.
        sigma: of the noise in ``moments``, on the vector of :func:`~privacy.mechanisms.noisy_moments`.
        second_weight: of the second moments in that vector.
    """
    shares = moments.counts.clamp_min(1.0)
    means = moments.sums / shares[:, None]
    means = means / means.norm(dim=1, keepdim=True).clamp_min(1.0)
    roots = [_root(c) for c in _covariances(moments.seconds, shares, means, sigma, sigma / second_weight)]
    rows, labels = [], []
    for number, (mean, taken) in enumerate(zip(means, _apportion(shares / shares.sum(), count), strict=True)):
        rows.append(mean + noise.gaussian((taken, len(mean)), 1.0) @ roots[number % len(roots)])
        labels.append(torch.full((taken,), number, dtype=torch.int64))
    return torch.cat(rows).to(torch.float32), torch.cat(labels)


def _covariances(seconds: Tensor, shares: Tensor, means: Tensor, of_sums: float, of_seconds: float) -> list[Tensor]:
    """[D, D] of each class, or one for all: positive definite; the noise is that of one coordinate of each."""
    total, size = float(shares.sum()), means.shape[1]
    one = torch.eye(size, dtype=means.dtype)
    # Of a mean's square, so much is noise, by direction; no more than there is.
    noise_K = torch.minimum((of_sums / shares).square(), means.square().mean(1))
    between = (means.T * shares) @ means - float((shares * noise_K).sum()) * one
    pooled_noise = of_seconds * math.sqrt(len(seconds)) / total
    pooled = _cleaned((seconds.sum(0) - between) / total, pooled_noise * math.sqrt(2 * size))
    if len(seconds) == 1:
        return [_ridged(pooled)]
    found = []
    for second, share, mean, in_mean in zip(seconds, shares.tolist(), means, noise_K.tolist(), strict=True):
        own = second / share - torch.outer(mean, mean) + in_mean * one
        apart = float((own - pooled).square().sum())
        trust = max(0.0, 1 - _expected(of_seconds / share, of_sums / share, size) / max(apart, _FLOOR**2))
        found.append(_ridged(_floored(pooled + trust * (own - pooled), float(pooled.trace()) / size)))
    return found


def _release(treatment: str, event: Event) -> Release:
    return Release(kind="activations", treatment=treatment, event=event)


def _rows_event(rows: Rows, policy: Policy) -> Gaussian:
    reach = math.sqrt(policy.records_per_unit)
    return Gaussian(sensitivity=reach, sensitivity_replace=2 * reach, noise=rows.noise or 0.0)


def _moments_event(moments: Moments) -> Gaussian:
    c, w = moments.count_weight, moments.second_weight
    return Gaussian(
        sensitivity=moments_sensitivity(c, w, Relation.ADD_REMOVE),
        sensitivity_replace=moments_sensitivity(c, w, Relation.REPLACE_ONE),
        noise=moments.noise or 0.0,
    )


def _rows_noise(policy: Policy, budget: Budget, spent: list[Event]) -> float:
    unit = _rows_event(Rows(clip=1.0, noise=1.0), policy)
    return _gaussian(unit, budget, spent)


def _moments_noise(moments: Moments, budget: Budget, spent: list[Event]) -> float:
    return _gaussian(_moments_event(dataclasses.replace(moments, noise=1.0)), budget, spent)


def _gaussian(unit: Gaussian, budget: Budget, spent: list[Event]) -> float:
    """The noise at which ``unit`` uses up what is left of the budget."""
    _check_left(budget, spent)
    reach = unit.sensitivity if budget.relation is Relation.ADD_REMOVE else unit.sensitivity_replace
    alone = gaussian_noise(epsilon=budget.epsilon, delta=budget.delta, sensitivity=reach)
    if not spent:
        return alone

    def fits(noise: float) -> bool:
        event = dataclasses.replace(unit, noise=noise)
        return epsilon_of([*spent, event], budget.delta, budget.relation) <= budget.epsilon

    return _smallest(fits, alone)


def sums_noise(*, rate: float, steps: int, budget: Budget, spent: Sequence[Event]) -> float:
    """The noise multiplier at which so many noised sums over secret Poisson samples use up what is left of the budget.

    Raises:
        BudgetSpentError: nothing is left to calibrate to.
        ConfigError: there is no budget.
    """
    _check_left(budget, spent)
    alone = sampled_noise(epsilon=budget.epsilon, delta=budget.delta, rate=rate, steps=steps, relation=budget.relation)
    if not spent:
        return alone

    def fits(noise: float) -> bool:
        event = SampledGaussian(rate=rate, noise_multiplier=noise, steps=steps)
        return epsilon_of([*spent, event], budget.delta, budget.relation) <= budget.epsilon

    return _smallest(fits, alone)


def _smallest(fits: Callable[[float], bool], start: float) -> float:
    """The least noise that fits, to 0.1 %, from one that would be enough if nothing had been spent."""
    low, high = start, start
    while not fits(high):
        low, high = high, 2 * high
        if high > start * 2**20:
            raise BudgetSpentError("privacy budget: too little is left for any release; raise privacy.epsilon")
    while high / low > 1.001:  # noqa: PLR2004 - finer makes no difference
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _check_left(budget: Budget, spent: Sequence[Event]) -> None:
    if math.isinf(budget.epsilon):
        raise ConfigError(
            "privacy: give a budget to calibrate to (epsilon = 1.0), or the treatment's own noise; "
            "`cloister privacy plan` shows what they come to"
        )
    already = epsilon_of(spent, budget.delta, budget.relation)
    if already >= budget.epsilon * (1 - _LEAST_LEFT):
        raise BudgetSpentError(
            f"privacy budget: ε {already:.4g} of {budget.epsilon:.4g} is spent on this data set; raise "
            "privacy.epsilon, or stop here"
        )


def check_records(policy: Policy, plan: TablePlan, records: Records) -> None:
    """Whether a table can be made of them: looked at before it is paid for.

    Raises:
        ConfigError, NonFiniteError: see :func:`make_table`.
    """
    check_finite(records.activations, "an activation")
    if policy.unit != "record" and records.units is None:
        raise ConfigError(
            f'privacy.unit = "{policy.unit}": say whose each record is (units = "module:function" in [privacy], or '
            "units=… of the Trainer); without, a claim would hold per record only"
        )
    if records.units is not None and (
        records.units.shape != records.labels.shape[:1] or records.units.is_floating_point()
    ):
        raise ConfigError(
            f"privacy.units: {list(records.units.shape)} unit ids for {len(records.labels)} records; one integer for "
            "each of them, in the data set's order"
        )
    if isinstance(policy.activations, Aggregate | Moments) or isinstance(policy.labels, RandomizedLabels):
        check_labels(policy, records.labels)
    if isinstance(plan.treatment, Moments):
        _check_moments(plan.treatment, records)


def check_labels(policy: Policy, labels: Tensor) -> None:
    """Raises: ConfigError where ``labels`` are not one class of the policy's for each record."""
    if (
        labels.ndim != 1
        or labels.dtype != torch.int64
        or not int(labels.min()) >= 0
        or int(labels.max()) >= (policy.classes or 0)
    ):
        raise ConfigError(
            f"privacy: this treatment takes labels from 0 to {(policy.classes or 0) - 1} (classes = {policy.classes}) "
            f"as int64, one a record; these are {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}, up to "
            f"{float(labels.max()):g}"
        )


def _check_moments(plan: Moments, records: Records) -> None:
    longest = float(records.activations.detach().flatten(1).norm(dim=1).max())
    if longest > 1.001:  # noqa: PLR2004 - rounding ends below
        raise ConfigError(
            f"moments: the front's activations have norms up to {longest:.3g}, and this treatment takes at most 1: end "
            "the front with cloister.UnitRows(), so that training and inference see the same"
        )
    if plan.rows is None and records.units is not None:
        raise ConfigError("moments: say how many rows to sample (rows = 20000): the number of records tells of a unit")


def _rows(policy: Policy, rows: Rows, records: Records, noise: Noise) -> ReleasedTable:
    activations, labels = records.activations.detach(), records.labels
    if records.units is not None:
        kept = _bounded(records.units, policy.records_per_unit)
        activations, labels = activations[kept], labels[kept]
    made = noisy_rows(activations, clip=rows.clip, sigma=rows.clip * (rows.noise or 0.0), noise=noise)
    if isinstance(policy.labels, RandomizedLabels):
        labels = make_labels(policy, labels, noise)
    return ReleasedTable(made, labels)


def _bounded(units: Tensor, most: int) -> Tensor:
    """Indices of at most ``most`` records of each unit, the first ones, in the records' order."""
    order = torch.argsort(units, stable=True)
    ordered = units[order]
    starts = torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    first = torch.cummax(torch.where(starts, torch.arange(len(units)), 0), 0).values
    return order[torch.arange(len(units)) - first < most].sort().values


def _sums(policy: Policy, plan: Aggregate, flat: Tensor, records: Records, noise: Noise) -> tuple[Tensor, Tensor]:
    """[T*K, D] sums of secret Poisson samples, each divided by how many records a class gives on average."""
    classes, sigma = policy.classes or 0, plan.clip * (plan.noise or 0.0)
    rows = clip_rows(flat, plan.clip).to(torch.float64)
    who = torch.arange(len(flat))
    if records.units is not None:  # a unit joins with all of its records, and gives their average
        who = torch.unique(records.units, return_inverse=True)[1]
        rows = rows * unit_weights(records.units)[:, None]
    members = int(who.max()) + 1
    expected = max(1.0, plan.rate * members / classes)
    made = []
    for _ in range(plan.releases):
        joins = (noise.uniform((members,)) < plan.rate)[who]
        sums = noisy_sums(rows[joins], records.labels[joins], classes=classes, clip=plan.clip, sigma=sigma, noise=noise)
        made.append(sums)
    table = torch.cat(made)
    # Where a neighbour has one record more, how many there are is a secret: the rows' own length must do.
    scale = expected if policy.relation is Relation.REPLACE_ONE else float(table.norm(dim=1).mean()) / plan.clip
    return (table / scale).to(torch.float32), torch.arange(classes).repeat(plan.releases)


def _sampled(policy: Policy, plan: Moments, flat: Tensor, records: Records, noise: Noise) -> tuple[Tensor, Tensor]:
    weights = None if records.units is None else unit_weights(records.units)
    found = noisy_moments(
        clip_rows(flat, 1.0),
        records.labels,
        classes=policy.classes or 0,
        count_weight=plan.count_weight,
        second_weight=plan.second_weight,
        per_class=plan.per_class,
        weights=weights,
        sigma=plan.noise or 0.0,
        noise=noise,
    )
    # How many records there are is no secret where a neighbour replaces one; otherwise the noisy count must do.
    counted = len(flat) if policy.relation is Relation.REPLACE_ONE else max(1, round(float(found.counts.sum())))
    return sample_rows(found, plan.rows or counted, noise, sigma=plan.noise or 0.0, second_weight=plan.second_weight)


def _expected(of_second: float, of_mean: float, size: int) -> float:
    """How far noise alone takes a class's covariance, squared: a mean of norm 1, and two standard deviations more."""
    free = size * (size + 1) / 2
    outer = of_mean**2 * 2 * (size + 1) + of_mean**4 * size * (size + 1)
    return (1 + 2 * math.sqrt(2 / free)) * (of_second**2 * free + outer)


def _cleaned(covariance: Tensor, edge: float) -> Tensor:
    """Eigenvalues within the noise's spectrum become their mean, and those above lose what noise added to them."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    drowned = values <= edge
    least = _FLOOR * float(values.sum().clamp_min(1e-6)) / len(values)
    level = max(least, float(values[drowned].mean())) if bool(drowned.any()) else least
    above = ((values - level).square() - edge**2).clamp_min(0.0).sqrt()
    cleaned: Tensor = (vectors * (level + above.where(values - level > edge, 0.0))) @ vectors.T
    return cleaned


def _floored(covariance: Tensor, mean: float) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    floored: Tensor = (vectors * values.clamp_min(_FLOOR * mean)) @ vectors.T
    return floored


def _ridged(covariance: Tensor) -> Tensor:
    """A little of the mean variance in every direction."""
    level = covariance.trace() / len(covariance)
    return (1 - _RIDGE) * covariance + _RIDGE * level * torch.eye(len(covariance), dtype=covariance.dtype)


def _root(covariance: Tensor) -> Tensor:
    """[D, D]: R with RᵀR the covariance, which is positive definite."""
    root: Tensor = torch.linalg.cholesky(covariance, upper=True)
    return root


def _apportion(shares: Tensor, count: int) -> list[int]:
    """``count`` in proportion to ``shares``, by largest remainders."""
    exact = (shares * count).tolist()
    given = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: exact[i] - given[i], reverse=True)
    for number in by_rest[: count - sum(given)]:
        given[number] += 1
    return given
