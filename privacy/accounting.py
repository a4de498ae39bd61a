"""How much privacy a run has spent: total ε at a given δ, over all that left the owner, never per step or per epoch.

A release is described by an *event*, plain data that the ledger keeps. :func:`epsilon_of` composes events:

- A Gaussian mechanism that moves by at most Δ between neighbours, under noise σ, is μ-GDP with μ = Δ/σ; releases
  compose adaptively as μ = √Σμᵢ², and δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2) (Balle and Wang 2018, Theorem 8; Dong,
  Roth and Su 2022, Corollaries 2.13 and 3.3). Closed form, exact.
- Whatever else is in the mix goes through privacy loss distributions (``dp-accounting``), rounded pessimistically:
  never below the truth, and above it by some 10⁻³.

One convention, set here and nowhere else: an event carries the distance between its own neighbours, and a library is
handed a noise multiplier that already holds it. ``dp-accounting`` 0.6.0 does not agree with itself on this point: under
``REPLACE_ONE`` its PLD accountant doubles a Gaussian's sensitivity (noise 1: ε 9.997), its RDP accountant does not
(4.729). So a plain Gaussian is never given to it as anything but ``ADD_OR_REMOVE_ONE``, whatever our relation.

The Poisson-sampled Gaussian under replace-one. Let a record add a (its twin: b) to a sum, with probability q, where
|a|, |b| ≤ c, and let γ = e^ε ≥ 1. For any set A, with N_m for N(m, σ²I) and N_0(A) = Φ(z), the Neyman-Pearson lemma
gives N_a(A) ≤ Φ(z + c/σ) and N_b(A) ≥ Φ(z - c/σ), so P(A) - γQ(A) = (1-q)(1-γ)N_0(A) + q(N_a(A) - γN_b(A)) is at most
(1-q)(1-γ)Φ(z) + q(Φ(z + c/σ) - γΦ(z - c/σ)): what b = -a with |a| = c attains on a half-space. As that pair is its own
mirror image, γ < 1 follows. So ``(1-q)N(0) + qN(c)`` against ``(1-q)N(0) + qN(-c)`` dominates all others, and
dominating pairs compose (Zhu, Dong and Wang 2022, Theorem 10). It is what ``dp-accounting`` computes under
``REPLACE_ONE`` where ``sensitivity`` is add/remove's. Other records' samples are mixed into both sides alike, which
adds nothing: the divergence is jointly convex.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias

from scipy.special import erfcx, log_ndtr

from wire.errors import ConfigError

__all__ = [
    "Accountant",
    "Event",
    "Gaussian",
    "PrivacySpent",
    "RandomizedResponse",
    "Relation",
    "SampledGaussian",
    "Unbounded",
    "delta_of",
    "epsilon_of",
    "gaussian_noise",
    "sampled_noise",
]

Accountant: TypeAlias = Literal["auto", "gdp", "pld", "rdp", "prv"]

# Loss distributions live on a grid of powers of two, so that equal steps are computed once. Connect-the-dots errs by
# some 0.3 · steps · step² in ε (measured): below 0.003 up to the steps given here.
_FINEST_EXPONENT: Final = -10
_STEPS_AT_FINEST: Final = 10_000
_MOST_POINTS: Final = 2**17  # of one distribution before it is composed: half a second
_TAILS: Final = 21.0  # in noise deviations: dp-accounting cuts at e^-50 on either side
_NOISE_PRECISION: Final = 1e-3  # of a calibrated noise multiplier
_PRV_EPSILON_ERROR: Final = 2e-3
_MOST_RESPONSE_EPSILON: Final = 100.0  # far beyond any use, and e^ε still fits a float
_MOST_REPLACE: Final = 2.0  # by the triangle inequality: a replacement is a removal and an addition


class Relation(enum.StrEnum):
    """Which data sets are neighbours, and so what ε protects.

    ``REPLACE_ONE``: one unit's data against any other data in its place; the node may see that the unit takes part. The
    default and the headline.

    ``ADD_REMOVE``: one unit present against absent. Where presence is visible, such as rows or noised labels, it is
    read as *zero-out*: a unit against an all-zero one. A randomized label costs its full ε in both readings.
    """

    REPLACE_ONE = "replace_one"
    ADD_REMOVE = "add_remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """``count`` fresh releases of a value under independent Gaussian noise.

    Attributes:
        sensitivity: the farthest that one unit moves the value (L2), add/remove or zero-out.
        sensitivity_replace: the same, replace-one.
        noise: standard deviation of each coordinate's noise, in the unit of the sensitivities.
        count: of releases, each with fresh noise; a cached or resent one counts 0.
    """

    sensitivity: float
    sensitivity_replace: float
    noise: float
    count: int = 1

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ConfigError: one is not finite and positive.
        """
        _check_positive(self, "sensitivity", "sensitivity_replace", "noise")
        _check_counts(self, "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledGaussian:
    """``steps`` noised sums, each over a Poisson sample of the records that nobody outside sees.

    Attributes:
        rate: with which each record takes part in a step, independently of all others.
        noise_multiplier: noise over the add/remove sensitivity.
        steps: of noised sums, empty ones included.
        replace_factor: replace-one sensitivity over add/remove's. Below 2 and with a rate below 1 it counts as 2.
    """

    rate: float
    noise_multiplier: float
    steps: int
    replace_factor: float = _MOST_REPLACE

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ConfigError: one is not finite and positive, the rate above 1 or the factor above 2.
        """
        _check_positive(self, "rate", "noise_multiplier", "replace_factor")
        _check_counts(self, "steps")
        if self.rate > 1:
            raise ConfigError(f"rate is a probability, at most 1, not {self.rate}")
        if self.replace_factor > _MOST_REPLACE:
            raise ConfigError(f"replace_factor is at most 2, a removal and an addition, not {self.replace_factor}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomizedResponse:
    """``count`` fresh reports of one label among ``classes``, each under k-ary randomized response with ``epsilon``."""

    epsilon: float
    classes: int
    count: int = 1

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ConfigError: ε is not between 0 and 100, or there are fewer than two classes.
        """
        _check_positive(self, "epsilon")
        _check_counts(self, "classes", "count")
        if self.classes == 1:
            raise ConfigError("randomized response needs at least 2 classes; a label of 1 class says nothing")
        if self.epsilon > _MOST_RESPONSE_EPSILON:
            raise ConfigError(f"ε {self.epsilon} for a label protects nothing: record the release as unbounded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unbounded:
    """``count`` releases that no ε covers, and why."""

    reason: str
    count: int = 1

    def __post_init__(self) -> None:
        """Check the reason.

        Raises:
            ConfigError: there is none.
        """
        _check_counts(self, "count")
        if not self.reason.strip():
            raise ConfigError("an unbounded release needs its reason, for whoever reads ε = ∞")


Event: TypeAlias = Gaussian | SampledGaussian | RandomizedResponse | Unbounded


@dataclass(frozen=True, slots=True)
class PrivacySpent:
    """What a run may claim: (``epsilon``, ``delta``) for each ``unit`` under ``relation``; ε may be infinite."""

    epsilon: float
    delta: float
    relation: Relation
    unit: str

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            ConfigError: ε is negative or no number, δ not between 0 and 1, or the unit unnamed.
        """
        _check_epsilon(self.epsilon)
        _check_delta(self.delta)
        if not self.unit.strip():
            raise ConfigError("a claim names its unit, such as 'record' or 'patient_id'")


def epsilon_of(
    events: Iterable[Event],
    delta: float,
    relation: Relation = Relation.REPLACE_ONE,
    accountant: Accountant = "auto",
) -> float:
    """Total ε of all ``events`` together, at ``delta``.

    Args:
        events: all that left; their order does not matter.
        delta: below 1, and below 1/n to mean anything.
        relation: what ε protects.
        accountant: ``auto`` takes the closed form for Gaussians alone, PLD for all else. The others are cross-checks:
            ``rdp`` is an upper bound, looser; ``prv`` is Opacus', for one kind of Gaussian under add/remove.

    Returns:
        0 for no events; infinity where one is :class:`Unbounded`.

    Raises:
        ConfigError: δ is not between 0 and 1, or the accountant cannot compose these events.
    """
    _check_delta(delta)
    total = _Total.of(events, relation)
    if total.unbounded:
        return math.inf
    if total.empty:
        return 0.0
    if accountant == "auto":
        accountant = "gdp" if total.plain else "pld"
    if accountant not in _ACCOUNTANTS:
        raise ConfigError(f"no accountant {accountant!r}; there are auto, {', '.join(_ACCOUNTANTS)}")
    return _ACCOUNTANTS[accountant](total, delta)


def delta_of(events: Iterable[Event], epsilon: float, relation: Relation = Relation.REPLACE_ONE) -> float:
    """The smallest δ that goes with ``epsilon`` for all ``events`` together: 0 for none, 1 for an unbounded one.

    Raises:
        ConfigError: ε is negative or no number.
    """
    _check_epsilon(epsilon)
    total = _Total.of(events, relation)
    if total.unbounded:
        return 1.0
    if total.empty or math.isinf(epsilon):
        return 0.0
    if total.plain:
        return math.exp(_gaussian_log_delta(total.mu, epsilon))
    return float(_loss(total).get_delta_for_epsilon(epsilon))


def gaussian_noise(*, epsilon: float, delta: float, sensitivity: float, count: int = 1) -> float:
    """The least σ under which ``count`` fresh releases of this ``sensitivity`` together stay within (ε, δ).

    The law: ``epsilon_of`` of them is at most ``epsilon``, and above ``0.999999 * epsilon``.

    Raises:
        ConfigError: a figure is not finite and positive, or δ not below 1.
    """
    _check_target(epsilon, delta)
    event = Gaussian(sensitivity=sensitivity, sensitivity_replace=sensitivity, noise=1.0, count=count)
    return event.sensitivity * math.sqrt(event.count) / _gaussian_mu(epsilon, delta)


def sampled_noise(
    *, epsilon: float, delta: float, rate: float, steps: int, relation: Relation = Relation.REPLACE_ONE
) -> float:
    """The noise multiplier under which ``steps`` Poisson-sampled sums stay within (ε, δ).

    The law: ``epsilon_of`` of them is at most ``epsilon``; the multiplier is at most 0.2 % above the least that does.

    Raises:
        ConfigError: a figure is not finite and positive, the rate above 1, or δ not below 1.
    """
    _check_target(epsilon, delta)

    def excess(noise: float) -> float:
        event = SampledGaussian(rate=rate, noise_multiplier=noise, steps=steps)
        return epsilon_of([event], delta, relation) - epsilon

    low = high = _guessed_noise(epsilon, delta, SampledGaussian(rate=rate, noise_multiplier=1.0, steps=steps), relation)
    while excess(high) > 0:
        low, high = high, high * 1.3
    while low == high or excess(low) <= 0:
        low, high = low / 1.3, low
    noise = float(_root(excess, low, high, xtol=low * _NOISE_PRECISION / 2))
    while excess(noise) > 0:
        noise *= 1 + _NOISE_PRECISION / 2
    return noise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Total:
    """What is left of events once equal ones are counted together: hashable, and independent of their order.

    Attributes:
        mu: of all plain Gaussians.
        sampled: (rate, noise multiplier) → steps, of rates below 1.
        responses: (ε, classes) → count.
    """

    relation: Relation
    mu: float = 0.0
    sampled: tuple[tuple[tuple[float, float], int], ...] = ()
    responses: tuple[tuple[tuple[float, int], int], ...] = ()
    unbounded: bool = False

    @classmethod
    def of(cls, events: Iterable[Event], relation: Relation) -> _Total:
        relation = Relation(relation)
        replace = relation is Relation.REPLACE_ONE
        squares: list[float] = []
        sampled: Counter[tuple[float, float]] = Counter()
        responses: Counter[tuple[float, int]] = Counter()
        unbounded = False
        for event in events:
            match event:
                case Gaussian():
                    distance = event.sensitivity_replace if replace else event.sensitivity
                    squares.append(event.count * (distance / event.noise) ** 2)
                case SampledGaussian(rate=1.0):
                    distance = event.replace_factor if replace else 1.0
                    squares.append(event.steps * (distance / event.noise_multiplier) ** 2)
                case SampledGaussian():
                    sampled[event.rate, event.noise_multiplier] += event.steps
                case RandomizedResponse():
                    responses[event.epsilon, event.classes] += event.count
                case Unbounded():
                    unbounded = True
        return cls(
            relation=relation,
            mu=math.sqrt(math.fsum(squares)),
            sampled=tuple(sorted(sampled.items())),
            responses=tuple(sorted(responses.items())),
            unbounded=unbounded,
        )

    @property
    def plain(self) -> bool:
        """Nothing but Gaussians, or nothing at all."""
        return not self.sampled and not self.responses

    @property
    def empty(self) -> bool:
        return self.plain and not self.mu

    @property
    def grid(self) -> float:
        """The step of the loss distributions' grid."""
        widths = [_TAILS * self.mu, *(_TAILS / noise + noise**-2 for (_, noise), _ in self.sampled)]
        coarse = math.log2(max(1.0, *widths) / _MOST_POINTS)
        steps = sum(count for _, count in self.sampled)
        fine = _FINEST_EXPONENT - max(0.0, math.log(max(1, steps) / _STEPS_AT_FINEST, 4))
        return 2.0 ** max(math.floor(fine), math.ceil(coarse))


# --- the Gaussian mechanism, in closed form


def _gaussian_log_delta(mu: float, epsilon: float) -> float:
    """The logarithm of δ(ε), without cancellation or underflow.

    With x = ε/μ - μ/2 and y = x + μ, y² - x² = 2ε, so for x > 0 both terms share the factor e^(-x²/2).
    """
    near = epsilon / mu - mu / 2
    far = near + mu
    if near > 0:
        difference = float(erfcx(near / math.sqrt(2)) - erfcx(far / math.sqrt(2))) / 2
        return math.log(max(difference, 1e-300)) - near**2 / 2
    log_left = float(log_ndtr(-near))
    log_right = epsilon + float(log_ndtr(-far))
    return log_left + math.log(max(-math.expm1(log_right - log_left), 1e-300))


@lru_cache(maxsize=4096)
def _root(function: Callable[[float], float], low: float, high: float, **tolerances: float) -> float:
    """Where ``function`` changes its sign between ``low`` and ``high`` (Brent 1973)."""
    from scipy.optimize import brentq  # noqa: PLC0415 - takes as long to load as all of SQLAlchemy

    return float(brentq(function, low, high, **tolerances))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """The least ε of a μ-GDP mechanism at δ, rounded up by 10⁻⁹ of itself."""
    target = math.log(delta)
    if _gaussian_log_delta(mu, 0.0) <= target:
        return 0.0
    # Φ(-x) ≤ e^(-x²/2) at x = √(2 ln 1/δ): enough, and it is not far off
    enough = mu**2 / 2 + mu * math.sqrt(-2 * target)
    found = _root(lambda epsilon: _gaussian_log_delta(mu, epsilon) - target, 0.0, enough, xtol=1e-15, rtol=1e-12)
    return float(found) * (1 + 1e-9)


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """The greatest μ within (ε, δ), rounded down by 10⁻⁸ of itself."""
    target = math.log(delta)
    # the bound of _gaussian_epsilon, solved for μ: √(2(ε + ln 1/δ)) - √(2 ln 1/δ), without its cancellation
    low = 2 * epsilon / (math.sqrt(2 * (epsilon - target)) + math.sqrt(-2 * target))
    high = 2 * low
    while _gaussian_log_delta(high, epsilon) <= target:
        high *= 2
    found = _root(lambda mu: _gaussian_log_delta(mu, epsilon) - target, low, high, xtol=1e-15, rtol=1e-12)
    return float(found) * (1 - 1e-8)


def _guessed_noise(epsilon: float, delta: float, event: SampledGaussian, relation: Relation) -> float:
    """A first guess by the central limit theorem for GDP: μ = q·√(T(e^(1/z²) - 1)) (Bu, Dong, Long and Su 2020)."""
    mu = _gaussian_mu(epsilon, delta)
    if relation == Relation.REPLACE_ONE:
        mu /= 2
    return 1 / math.sqrt(math.log1p((mu / event.rate) ** 2 / event.steps))


# --- everything else, through libraries; imported where they are used, as that takes seconds


@lru_cache(maxsize=128)
def _loss(total: _Total) -> Any:  # noqa: ANN401 -- dp-accounting ships no types
    """The privacy loss distribution of a total (a ``PrivacyLossDistribution``, pessimistic)."""
    from dp_accounting.pld import privacy_loss_distribution as pld  # noqa: PLC0415 -- as above

    loss = pld.identity(total.grid)
    if total.mu:
        loss = loss.compose(pld.from_gaussian_mechanism(1 / total.mu, value_discretization_interval=total.grid))
    for (rate, noise), steps in total.sampled:
        loss = loss.compose(_sampled_loss(rate, noise, total.relation, total.grid).self_compose(steps))
    for (epsilon, classes), count in total.responses:
        one = pld.from_randomized_response(
            _uniform_share(epsilon, classes), classes, value_discretization_interval=total.grid
        )
        loss = loss.compose(one.self_compose(count))
    return loss


@lru_cache(maxsize=64)
def _sampled_loss(rate: float, noise: float, relation: Relation, grid: float) -> Any:  # noqa: ANN401 -- as above
    """The privacy loss distribution of one step; under replace-one, of the pair that the module's docstring derives."""
    from dp_accounting import NeighboringRelation  # noqa: PLC0415 -- as above
    from dp_accounting.pld import privacy_loss_distribution as pld  # noqa: PLC0415 -- as above

    replace = relation is Relation.REPLACE_ONE
    return pld.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=grid,
        neighboring_relation=NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _uniform_share(epsilon: float, classes: int) -> float:
    """How often a label is drawn from all classes alike, and not kept: dp-accounting's noise parameter."""
    return classes / (math.exp(epsilon) + classes - 1)


def _gdp_epsilon(total: _Total, delta: float) -> float:
    if not total.plain:
        raise ConfigError("the gdp accountant composes plain Gaussians alone; take auto, or pld")
    return _gaussian_epsilon(total.mu, delta)


def _pld_epsilon(total: _Total, delta: float) -> float:
    return float(_loss(total).get_epsilon_for_delta(delta))


def _rdp_epsilon(total: _Total, delta: float) -> float:
    from dp_accounting import NeighboringRelation, dp_event  # noqa: PLC0415 -- as above
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415 -- as above

    if total.sampled and (total.responses or total.relation is Relation.REPLACE_ONE):
        raise ConfigError(
            "the rdp accountant takes sampled Gaussians under add/remove and without randomized labels alone"
        )
    relation = NeighboringRelation.REPLACE_ONE if total.responses else NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = RdpAccountant(neighboring_relation=relation)
    if total.mu:
        accountant.compose(dp_event.GaussianDpEvent(1 / total.mu))  # never doubled: μ holds the distance
    for (rate, noise), steps in total.sampled:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    for (epsilon, classes), count in total.responses:
        event = dp_event.RandomizedResponseDpEvent(_uniform_share(epsilon, classes), classes)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def _prv_epsilon(total: _Total, delta: float) -> float:
    import numpy as np  # noqa: PLC0415 -- for Opacus alone
    from opacus.accountants import PRVAccountant  # noqa: PLC0415 -- as above

    kinds = len(total.sampled) + bool(total.mu)
    if total.relation is not Relation.ADD_REMOVE or total.responses or kinds != 1:
        raise ConfigError("the prv accountant takes one kind of Gaussian, sampled or plain, under add/remove alone")
    (rate, noise), steps = total.sampled[0] if total.sampled else ((1.0, 1 / total.mu), 1)
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # log(1 - rate) at rate 1
        warnings.simplefilter("ignore", UserWarning)  # of a first bound that only sizes its grid
        return float(accountant.get_epsilon(delta, eps_error=_PRV_EPSILON_ERROR))


_ACCOUNTANTS: Final[dict[str, Callable[[_Total, float], float]]] = {
    "gdp": _gdp_epsilon,
    "pld": _pld_epsilon,
    "rdp": _rdp_epsilon,
    "prv": _prv_epsilon,
}


# --- what is refused


def _check_positive(event: object, *names: str) -> None:
    for name in names:
        value = getattr(event, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{type(event).__name__}: {name} is finite and above 0, not {value!r}")


def _check_counts(event: object, *names: str) -> None:
    for name in names:
        value = getattr(event, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{type(event).__name__}: {name} is a whole number of at least 1, not {value!r}")


def _check_epsilon(epsilon: float) -> None:
    if not epsilon >= 0:
        raise ConfigError(f"ε is 0 or more, not {epsilon!r}")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"δ lies between 0 and 1, below one over the number of records; not at {delta!r}")


def _check_target(epsilon: float, delta: float) -> None:
    _check_epsilon(epsilon)
    _check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"noise is calibrated for a finite ε above 0, not {epsilon!r}")
