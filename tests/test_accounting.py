"""Accounting: every ε against an independent computation, one convention for the relations, and laws that must hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, stats

from privacy.accounting import (
    Accountant,
    Event,
    Gaussian,
    PrivacySpent,
    RandomizedResponse,
    Relation,
    SampledGaussian,
    Unbounded,
    delta_of,
    epsilon_of,
    gaussian_noise,
    sampled_noise,
)
from wire.errors import ConfigError

Floats = NDArray[np.float64]

DELTA = 1e-5
REPLACE, ADD = Relation.REPLACE_ONE, Relation.ADD_REMOVE
PLAIN = Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=1.0)
SAMPLED = SampledGaussian(rate=0.05, noise_multiplier=1.0, steps=50)
LABELS = RandomizedResponse(epsilon=1.0, classes=10)

noises = st.floats(0.3, 100)
counts = st.integers(1, 200)
deltas = st.floats(1e-12, 0.1)
gaussians = st.builds(
    Gaussian, sensitivity=st.floats(0.1, 3), sensitivity_replace=st.floats(0.1, 3), noise=noises, count=counts
)


# --- the figures that the documentation gives


@pytest.mark.parametrize(("epsilon", "once", "ten_times"), [(1, 7.46, 23.6), (4, 2.16, 6.84), (8, 1.20, 3.80)])
def test_noise_on_rows_under_replace_one_is_as_documented(epsilon: float, once: float, ten_times: float) -> None:
    assert gaussian_noise(epsilon=epsilon, delta=DELTA, sensitivity=2.0) == pytest.approx(once, abs=0.005)
    assert gaussian_noise(epsilon=epsilon, delta=DELTA, sensitivity=2.0, count=10) == pytest.approx(ten_times, abs=0.05)


def test_the_relation_that_a_claim_of_4_4_forgets_makes_it_10() -> None:
    assert epsilon_of([PLAIN], DELTA, ADD) == pytest.approx(4.377, abs=5e-4)
    assert epsilon_of([PLAIN], DELTA, REPLACE) == pytest.approx(9.997, abs=5e-4)


def test_rows_billed_as_a_secret_sample_claim_6_and_cost_62() -> None:
    batches = math.ceil(1437 / 64)
    claimed = SampledGaussian(rate=1 / batches, noise_multiplier=1.0, steps=15 * batches)
    true = Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=1.0, count=15)

    assert epsilon_of([claimed], DELTA, ADD, "rdp") == pytest.approx(6.0, abs=0.05)
    assert epsilon_of([true], DELTA) == pytest.approx(62.24, abs=0.01)


# --- the libraries' conventions


def test_dp_accounting_still_disagrees_with_itself_about_replace_one_and_we_with_neither() -> None:
    """Where this fails, dp-accounting has changed its convention: read the accounting module before anything else."""
    pld = PLDAccountant(NeighboringRelation.REPLACE_ONE).compose(dp_event.GaussianDpEvent(1.0)).get_epsilon(DELTA)
    rdp = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    rdp.compose(dp_event.GaussianDpEvent(1.0))

    assert pld == pytest.approx(9.997, abs=5e-4)
    assert rdp.get_epsilon(DELTA) == pytest.approx(4.729, abs=5e-4)
    for relation, exact in ((ADD, 4.377178), (REPLACE, 9.997256)):
        assert epsilon_of([PLAIN], DELTA, relation, "gdp") == pytest.approx(exact, rel=1e-6)
        assert epsilon_of([PLAIN], DELTA, relation, "pld") == pytest.approx(exact, rel=1e-6)
        assert exact < epsilon_of([PLAIN], DELTA, relation, "rdp") < 1.1 * exact


@pytest.mark.parametrize("mu", [0.05, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_accountants_agree_on_a_gaussian_to_a_percent(mu: float, accountant: Accountant) -> None:
    events = [Gaussian(sensitivity=mu, sensitivity_replace=2 * mu, noise=1.0)]
    exact = epsilon_of(events, DELTA, ADD, "gdp")

    assert epsilon_of(events, DELTA, ADD, accountant) == pytest.approx(exact, rel=0.01, abs=3e-3)


@pytest.mark.parametrize(("rate", "noise", "steps"), [(1 / 23, 1.0, 345), (0.01, 0.8, 1000), (0.3, 3.0, 100)])
def test_accountants_agree_on_a_secret_sample_to_a_percent(rate: float, noise: float, steps: int) -> None:
    events = [SampledGaussian(rate=rate, noise_multiplier=noise, steps=steps)]
    pld = epsilon_of(events, DELTA, ADD, "pld")

    assert epsilon_of(events, DELTA, ADD, "prv") == pytest.approx(pld, rel=0.01)
    assert pld < epsilon_of(events, DELTA, ADD, "rdp") < 1.25 * pld


# --- against direct integration


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 2.0])
def test_the_closed_form_is_the_integral(mu: float, share: float) -> None:
    epsilon = share * (mu**2 / 2 + 3 * mu)
    start = epsilon / mu - mu / 2

    def excess(t: float) -> float:
        return float(-math.expm1(-mu * t) * stats.norm.pdf(start + t))

    integral = sum(integrate.quad(excess, a, a + 1, epsabs=0, epsrel=1e-11)[0] for a in range(-40, 40) if a >= 0)
    below = integrate.quad(excess, 0, max(0.0, -start) + 12, epsabs=0, epsrel=1e-11, limit=500)[0]
    found = delta_of([Gaussian(sensitivity=mu, sensitivity_replace=mu, noise=1.0)], epsilon)

    assert found == pytest.approx(below if start < 0 else integral, rel=1e-8)


def test_the_closed_form_holds_where_floats_would_not() -> None:
    strong = [Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=1e-3)]
    weak = [Gaussian(sensitivity=1.0, sensitivity_replace=1.0, noise=1e4)]

    assert epsilon_of(strong, 1e-5) == pytest.approx(2000**2 / 2 + 2000 * stats.norm.isf(1e-5), rel=1e-6)
    assert 0 < epsilon_of(weak, 1e-12) < 1e-3
    assert epsilon_of([PLAIN], 1e-250) > epsilon_of([PLAIN], 1e-200) > 60


def _pair(rate: float, noise: float, grid: Floats) -> tuple[Floats, Floats]:
    """The densities of a sampled sum with a record at 1 and at -1, on a grid in the sum's unit."""
    none, plus, minus = (stats.norm.pdf(grid, at, noise) for at in (0, 1, -1))
    return (1 - rate) * none + rate * plus, (1 - rate) * none + rate * minus


@pytest.mark.parametrize(("rate", "noise"), [(0.05, 1.0), (0.5, 2.0), (0.01, 0.6), (0.9, 0.8)])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0, 2.5])
def test_one_sampled_step_under_replace_one_is_the_integral(rate: float, noise: float, epsilon: float) -> None:
    grid = np.linspace(-14 * noise - 1, 14 * noise + 1, 400_001)
    ours, theirs = _pair(rate, noise, grid)
    integral = float(np.trapezoid(np.maximum(0, ours - math.exp(epsilon) * theirs), grid))
    found = delta_of([SampledGaussian(rate=rate, noise_multiplier=noise, steps=1)], epsilon)

    assert found == pytest.approx(integral, rel=2e-3, abs=1e-7)
    assert found >= integral * (1 - 1e-6) - 1e-10


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.05, 1.0, 50), (0.5, 3.0, 20), (0.01, 0.7, 300)])
def test_many_sampled_steps_under_replace_one_are_the_convolution(rate: float, noise: float, steps: int) -> None:
    """Losses on a fine grid, rounded to the nearest and convolved by one FFT: nothing of dp-accounting's in it."""
    points = np.linspace(-12 * noise - 1, 12 * noise + 1, 1_000_001)
    ours, theirs = _pair(rate, noise, points)
    step, size = 2e-3, 2**16
    cells = np.rint(np.log(ours / theirs) / step).astype(int)
    mass = np.bincount(cells % size, weights=ours / ours.sum(), minlength=size)
    composed = np.fft.irfft(np.fft.rfft(mass) ** steps, size)
    losses = step * ((np.arange(size) + size // 2) % size - size // 2)

    def delta_at(epsilon: float) -> float:
        over = losses > epsilon
        return float(np.sum(composed[over] * -np.expm1(epsilon - losses[over])))

    found = epsilon_of([SampledGaussian(rate=rate, noise_multiplier=noise, steps=steps)], DELTA)
    assert delta_at(0.99 * found) > DELTA > delta_at(1.01 * found)


@pytest.mark.parametrize("angle", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 0.0), (0.3, 1.0), (0.7, 0.7)])
@pytest.mark.parametrize("epsilon", [-0.5, 0.0, 0.4, 1.5])
def test_no_replacement_in_the_plane_beats_the_opposite_one(
    angle: float, lengths: tuple[float, float], epsilon: float
) -> None:
    """The dominating pair of a sampled sum, against records of any direction and length; ε < 0 is the other side."""
    rate, noise = 0.3, 0.9
    line = np.linspace(-7, 7, 401)
    x, y = np.meshgrid(line, line)

    def density(length: float, turn: float) -> Floats:
        shift_x, shift_y = length * math.cos(turn * math.pi), length * math.sin(turn * math.pi)
        at = stats.norm.pdf(x, shift_x, noise) * stats.norm.pdf(y, shift_y, noise)
        none = stats.norm.pdf(x, 0, noise) * stats.norm.pdf(y, 0, noise)
        return np.asarray((1 - rate) * none + rate * at)

    excess = density(lengths[0], 0.0) - math.exp(epsilon) * density(lengths[1], angle)
    found = float(np.maximum(0, excess).sum()) * (line[1] - line[0]) ** 2
    event = SampledGaussian(rate=rate, noise_multiplier=noise, steps=1)
    bound = delta_of([event], abs(epsilon))
    if epsilon < 0:  # H_γ(P, Q) = 1 - γ + γ·H_1/γ(Q, P)
        bound = 1 - math.exp(epsilon) + math.exp(epsilon) * bound

    assert found <= bound * (1 + 5e-4) + 1e-6  # the grid's own error
    if angle == 1.0 and lengths == (1.0, 1.0):
        assert found == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_a_gaussian_beside_randomized_labels_is_the_exact_mixture(count: int) -> None:
    """The loss of a label has three values, so δ is a weighted mean of the closed form's."""
    epsilon, classes, mu = 0.8, 5, 0.9
    kept, moved = math.exp(epsilon), 1.0
    total = kept + (classes - 1) * moved
    one = {epsilon: kept / total, -epsilon: moved / total, 0.0: (classes - 2) / total}

    def delta_at(wanted: float) -> float:
        found = 0.0
        for losses in itertools.product(one, repeat=count):
            left = wanted - sum(losses)
            inner = stats.norm.cdf(-left / mu + mu / 2) - math.exp(left) * stats.norm.cdf(-left / mu - mu / 2)
            found += math.prod(one[loss] for loss in losses) * float(inner)
        return found

    events: list[Event] = [
        Gaussian(sensitivity=mu, sensitivity_replace=mu, noise=1.0),
        RandomizedResponse(epsilon=epsilon, classes=classes, count=count),
    ]
    for wanted in (0.5, 1.5, 3.0):
        assert delta_of(events, wanted) == pytest.approx(delta_at(wanted), rel=0.01)
        assert delta_of(events, wanted) >= delta_at(wanted) * (1 - 1e-9)


# --- laws


@given(gaussians, deltas, st.floats(1.0, 3.0), st.integers(1, 10))
def test_more_noise_costs_less_and_more_releases_cost_more(
    event: Gaussian, delta: float, factor: float, more: int
) -> None:
    def with_(noise: float, count: int) -> float:
        made = Gaussian(
            sensitivity=event.sensitivity,
            sensitivity_replace=event.sensitivity_replace,
            noise=noise,
            count=count,
        )
        return epsilon_of([made], delta)

    base = with_(event.noise, event.count)
    assert with_(event.noise * factor, event.count) <= base * (1 + 1e-9)
    assert with_(event.noise, event.count + more) >= base * (1 - 1e-9)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.6, 3), st.integers(1, 300), st.sampled_from(Relation))
def test_the_same_holds_of_a_secret_sample(noise: float, steps: int, relation: Relation) -> None:
    def with_(noise: float, steps: int) -> float:
        return epsilon_of([SampledGaussian(rate=0.04, noise_multiplier=noise, steps=steps)], DELTA, relation)

    base = with_(noise, steps)
    assert with_(noise * 1.3, steps) <= base + 1e-6
    assert with_(noise, steps + 20) >= base - 1e-6
    assert with_(noise, steps) <= epsilon_of(
        [Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=noise, count=steps)], DELTA, relation
    ) * (1 + 1e-3)


@given(st.lists(gaussians, min_size=1, max_size=6), st.randoms(use_true_random=False), st.sampled_from(Relation))
def test_the_order_of_releases_changes_nothing(events: list[Gaussian], random: object, relation: Relation) -> None:
    shuffled = list(events)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' own Random

    assert epsilon_of(events, DELTA, relation) == epsilon_of(shuffled, DELTA, relation)


def test_the_order_of_unlike_releases_changes_nothing() -> None:
    events: list[Event] = [PLAIN, SAMPLED, LABELS, SAMPLED]
    results = {epsilon_of(order, DELTA) for order in itertools.permutations(events)}

    assert len(results) == 1
    parts = [epsilon_of([event], DELTA) for event in events]
    assert max(parts) < results.pop() < sum(parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_a_count_is_as_many_single_releases(parts: list[int]) -> None:
    def of(count: int) -> Gaussian:
        return Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=9.0, count=count)

    assert epsilon_of([of(n) for n in parts], DELTA) == pytest.approx(epsilon_of([of(sum(parts))], DELTA), rel=1e-9)


@given(st.floats(0.01, 50), deltas, st.floats(1e-3, 1e3), counts)
def test_calibrated_noise_spends_what_was_asked_and_no_more(
    epsilon: float, delta: float, sensitivity: float, count: int
) -> None:
    noise = gaussian_noise(epsilon=epsilon, delta=delta, sensitivity=sensitivity, count=count)
    event = Gaussian(sensitivity=sensitivity, sensitivity_replace=sensitivity, noise=noise, count=count)

    assert 0.999999 * epsilon <= epsilon_of([event], delta) <= epsilon


@given(gaussians, st.floats(0.01, 20))
def test_delta_and_epsilon_are_each_others_inverse(event: Gaussian, epsilon: float) -> None:
    delta = delta_of([event], epsilon)
    if 1e-200 < delta < 0.999:
        assert epsilon_of([event], delta) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize(("epsilon", "rate"), [(0.5, 0.05), (6.0, 0.1), (2.0, 1.0)])
def test_calibrated_noise_of_a_secret_sample_stays_just_below(relation: Relation, epsilon: float, rate: float) -> None:
    noise = sampled_noise(epsilon=epsilon, delta=DELTA, rate=rate, steps=500, relation=relation)

    def spent(noise: float) -> float:
        return epsilon_of([SampledGaussian(rate=rate, noise_multiplier=noise, steps=500)], DELTA, relation)

    assert spent(noise / 1.003) > epsilon >= spent(noise)


def test_a_sample_of_everyone_is_no_sample() -> None:
    everyone = SampledGaussian(rate=1.0, noise_multiplier=2.0, steps=7)
    plain = Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=2.0, count=7)
    half = SampledGaussian(rate=1.0, noise_multiplier=2.0, steps=7, replace_factor=1.0)

    for relation in Relation:
        assert epsilon_of([everyone], DELTA, relation) == epsilon_of([plain], DELTA, relation)
    assert epsilon_of([half], DELTA, REPLACE) == epsilon_of([plain], DELTA, ADD)


def test_a_label_costs_its_epsilon_in_either_relation() -> None:
    for relation in Relation:
        assert epsilon_of([LABELS], 1e-9, relation) == pytest.approx(1.0, abs=2e-3)


def test_nothing_released_costs_nothing_and_an_unbounded_release_everything() -> None:
    unbounded = Unbounded(reason="activations left in the clear")

    assert (epsilon_of([], DELTA), delta_of([], 0.0)) == (0.0, 0.0)
    assert epsilon_of([PLAIN, unbounded], DELTA) == math.inf
    assert epsilon_of([unbounded], DELTA, ADD, "prv") == math.inf
    assert delta_of([PLAIN, unbounded], 50.0) == 1.0


def test_a_budget_can_be_checked_at_every_step() -> None:
    started = time.perf_counter()
    for count in range(1, 501):
        epsilon_of([Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=8.5, count=count)], DELTA)

    assert time.perf_counter() - started < 2.0  # some 0.1 ms each; the rest is for a loaded machine


# --- what is refused


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Gaussian(sensitivity=0.0, sensitivity_replace=1.0, noise=1.0), "sensitivity is finite and above 0"),
        (lambda: Gaussian(sensitivity=1.0, sensitivity_replace=math.nan, noise=1.0), "sensitivity_replace is finite"),
        (lambda: Gaussian(sensitivity=1.0, sensitivity_replace=1.0, noise=math.inf), "noise is finite and above 0"),
        (lambda: Gaussian(sensitivity=1.0, sensitivity_replace=1.0, noise=1.0, count=0), "count is a whole number"),
        (lambda: Gaussian(sensitivity=1.0, sensitivity_replace=1.0, noise=1.0, count=True), "count is a whole number"),
        (lambda: SampledGaussian(rate=1.5, noise_multiplier=1.0, steps=1), "rate is a probability"),
        (lambda: SampledGaussian(rate=0.0, noise_multiplier=1.0, steps=1), "rate is finite and above 0"),
        (lambda: SampledGaussian(rate=0.5, noise_multiplier=1.0, steps=1, replace_factor=2.1), "at most 2"),
        (lambda: RandomizedResponse(epsilon=1.0, classes=1), "at least 2 classes"),
        (lambda: RandomizedResponse(epsilon=101.0, classes=2), "protects nothing"),
        (lambda: RandomizedResponse(epsilon=-1.0, classes=2), "epsilon is finite and above 0"),
        (lambda: Unbounded(reason=" "), "needs its reason"),
        (lambda: PrivacySpent(-1.0, DELTA, REPLACE, "record"), "ε is 0 or more"),
        (lambda: PrivacySpent(math.nan, DELTA, REPLACE, "record"), "ε is 0 or more"),
        (lambda: PrivacySpent(1.0, 1.0, REPLACE, "record"), "δ lies between 0 and 1"),
        (lambda: PrivacySpent(1.0, DELTA, REPLACE, ""), "names its unit"),
        (lambda: epsilon_of([PLAIN], 0.0), "δ lies between 0 and 1"),
        (lambda: delta_of([PLAIN], -0.1), "ε is 0 or more"),
        (lambda: gaussian_noise(epsilon=0.0, delta=DELTA, sensitivity=1.0), "finite ε above 0"),
        (lambda: gaussian_noise(epsilon=1.0, delta=DELTA, sensitivity=-1.0), "sensitivity is finite and above 0"),
        (lambda: sampled_noise(epsilon=math.inf, delta=DELTA, rate=0.1, steps=1), "finite ε above 0"),
        (lambda: epsilon_of([LABELS], DELTA, accountant="gdp"), "plain Gaussians alone"),
        (lambda: epsilon_of([SAMPLED], DELTA, accountant="rdp"), "under add/remove"),
        (lambda: epsilon_of([PLAIN], DELTA, accountant="prv"), "under add/remove alone"),
        (lambda: epsilon_of([PLAIN, SAMPLED], DELTA, ADD, "prv"), "one kind of Gaussian"),
        (lambda: epsilon_of([PLAIN], DELTA, accountant="moments"), "no accountant 'moments'"),  # type: ignore[arg-type]  # that is what is tried
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()


def test_an_infinite_epsilon_is_a_true_statement() -> None:
    spent = PrivacySpent(epsilon=math.inf, delta=DELTA, relation=REPLACE, unit="patient_id")

    assert math.isinf(spent.epsilon)


def test_events_are_plain_data() -> None:
    events: list[Event] = [PLAIN, SAMPLED, LABELS, Unbounded(reason="clear")]

    for event in events:
        assert not hasattr(event, "__dict__")
        with pytest.raises(AttributeError):
            setattr(event, dataclasses.fields(event)[0].name, 3)
