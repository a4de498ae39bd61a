"""The mechanisms: what they keep, what they refuse, and that an attack tells each from its broken variants.

The long form of the last part is ``python -m tests.audit_dp``.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privacy.accounting import Gaussian, Relation, delta_of
from privacy.ledger import Ledger
from privacy.mechanisms import (
    Moments,
    Noise,
    clip_rows,
    grid_of,
    moments_sensitivity,
    noisy_moments,
    noisy_rows,
    noisy_sums,
    randomize_labels,
    unit_rows,
)
from tests.audit_dp import (
    MUTATIONS,
    SAMPLERS,
    Mutation,
    attack,
    caught,
    main,
    mu_test,
    profile_test,
    sampler_fails,
)
from tests.audited import TREATMENTS, Treatment, nothing_leaves
from wire.errors import ConfigError, NonFiniteError

DRAWS = 5000  # of the short attacks; the long form takes 40,000
TINY = 1e-9  # noise that hides nothing, so that what it is laid on shows

widths = st.floats(-(2.0**100), 2.0**100, width=32)
matrices = st.integers(1, 5).flatmap(
    lambda d: st.lists(st.lists(widths, min_size=d, max_size=d), min_size=1, max_size=4)
)


def moments(
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    classes: int = 3,
    per_class: bool = True,
    weights: torch.Tensor | None = None,
    sigma: float = TINY,
    seed: int = 0,
) -> Moments:
    return noisy_moments(
        rows,
        labels,
        classes=classes,
        count_weight=0.5,
        second_weight=0.7,
        per_class=per_class,
        weights=weights,
        sigma=sigma,
        noise=Noise._seeded(seed),
    )


# --- noise


def test_noise_is_normal_and_independent() -> None:
    drawn = Noise._seeded(1).gaussian((200_001,), 3.0)

    assert stats.kstest(drawn.numpy() / 3, "norm").pvalue > 1e-3
    half = len(drawn) // 2
    for lag in (1, half, half + 1):  # the two halves come of the same pairs of random words
        assert abs(float(torch.corrcoef(torch.stack([drawn[:-lag], drawn[lag:]]))[0, 1])) < 0.02
        assert abs(float(torch.corrcoef(torch.stack([drawn[:-lag], drawn[lag:]]) ** 2)[0, 1])) < 0.02
    assert drawn.dtype is torch.float64
    assert torch.isfinite(drawn).all()


def test_uniform_draws_fill_the_interval() -> None:
    drawn = Noise._seeded(1).uniform((3, 50_000))

    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1


def test_no_seed_copy_or_fork_brings_noise_back() -> None:
    noise = Noise()
    torch.manual_seed(7)
    drawn = [noise.gaussian((8,), 1.0), Noise().gaussian((8,), 1.0)]
    torch.manual_seed(7)
    drawn += [noise.gaussian((8,), 1.0), copy.deepcopy(noise).gaussian((8,), 1.0), copy.copy(noise).gaussian((8,), 1.0)]

    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the child ends at once, whatever threads there are
def test_a_forked_process_draws_its_own_noise() -> None:
    noise = Noise()
    reading, writing = os.pipe()
    if not (child := os.fork()):
        left = 1
        try:
            os.write(writing, np.asarray(noise.gaussian((8,), 1.0)).tobytes())
            left = 0
        finally:
            os._exit(left)
    os.close(writing)
    drawn = os.read(reading, 65)
    os.close(reading)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(drawn) == 64
    assert not np.array_equal(np.frombuffer(drawn), noise.gaussian((8,), 1.0).numpy())


def test_seeded_noise_is_for_tests_and_repeats() -> None:
    one, same, other = Noise._seeded(3), Noise._seeded(3), Noise._seeded(4)
    first = one.gaussian((5,), 1.0)

    assert torch.equal(first, same.gaussian((5,), 1.0))
    assert not torch.equal(first, one.gaussian((5,), 1.0))
    assert not torch.equal(first, other.gaussian((5,), 1.0))


@given(st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_what_is_released_lies_on_the_grid_and_is_a_float32(sigma: float, seed: int) -> None:
    grid = grid_of(sigma)
    released = Noise._seeded(seed).added_to(torch.linspace(-3, 3, 50) * sigma, sigma)

    assert math.frexp(grid)[0] == 0.5
    assert 2**-20 * sigma <= grid < 2**-19 * sigma
    assert torch.equal(torch.round(released / grid) * grid, released)
    assert torch.equal(released.to(torch.float32).to(torch.float64), released)


def test_noise_is_added_to_the_value_and_not_only_rounded() -> None:
    values = torch.linspace(-5, 5, 1000)
    released = Noise._seeded(5).added_to(values, 0.25)
    drawn = Noise._seeded(5).gaussian((1000,), 0.25)

    assert torch.allclose(released, values.to(torch.float64) + drawn, rtol=0, atol=grid_of(0.25))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_noise_without_a_finite_deviation_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma is finite and above 0"):
        Noise().gaussian((2,), sigma)


# --- rows


@given(matrices, st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_no_row_leaves_longer_than_the_clip(values: list[list[float]], clip: float, dtype: torch.dtype) -> None:
    rows = torch.tensor(values).to(dtype)
    if not torch.isfinite(rows).all():  # bfloat16 rounds up
        return
    clipped = clip_rows(rows, clip)

    assert clipped.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    for row, result in zip(rows.tolist(), clipped.tolist(), strict=True):
        assert math.hypot(*result) <= clip
        if math.hypot(*row) < clip * (1 - 1e-9):
            assert result == row
        else:
            assert math.hypot(*result) >= clip * (1 - 1e-5)


def test_the_clip_counts_all_dimensions_of_a_row() -> None:
    rows = torch.ones(2, 3, 4, 5)
    clipped = clip_rows(rows, 2.0)

    assert torch.allclose(clipped.flatten(1).norm(dim=1), torch.tensor(2.0))
    assert clipped.shape == rows.shape
    assert clip_rows(torch.tensor([3.0, -3.0, 0.5]), 1.0).tolist() == pytest.approx([1.0, -1.0, 0.5])
    assert clip_rows(torch.empty(0, 3), 1.0).shape == (0, 3)


def test_a_gradient_flows_through_the_clip_but_not_out_of_a_release() -> None:
    rows = torch.full((2, 4), 3.0, requires_grad=True)
    clip_rows(rows, 1.0).sum().backward()

    assert rows.grad is not None
    assert not noisy_rows(rows, clip=1.0, sigma=1.0, noise=Noise()).requires_grad


@given(matrices)
def test_unit_rows_have_norm_one_or_zero(values: list[list[float]]) -> None:
    units = unit_rows(torch.tensor(values))

    for row, result in zip(torch.tensor(values).tolist(), units.tolist(), strict=True):
        assert math.hypot(*result) <= 1
        assert math.hypot(*result) >= (0.999999 if any(row) else 0)


def test_noisy_rows_are_the_clipped_rows_plus_fresh_noise_of_the_deviation_asked_for() -> None:
    rows = 5 * torch.ones(4000, 2, 8)
    released = noisy_rows(rows, clip=1.0, sigma=0.5, noise=Noise._seeded(2))
    left = released - clip_rows(rows, 1.0)

    assert released.dtype is torch.float32
    assert float(left.mean()) == pytest.approx(0, abs=0.01)
    assert float(left.std()) == pytest.approx(0.5, rel=0.02)
    assert len(left.flatten().unique()) > 60_000


# --- sums


def test_noisy_sums_are_the_sums_of_clipped_rows_by_class() -> None:
    rows, labels = torch.randn(50, 2, 3, dtype=torch.float64), torch.arange(50) % 3
    released = noisy_sums(rows, labels, classes=4, clip=1.0, sigma=TINY, noise=Noise())

    for label in range(4):
        expected = clip_rows(rows, 1.0)[labels == label].sum(0).to(torch.float32)
        assert torch.allclose(released[label], expected, atol=1e-6)


def test_an_empty_class_is_noise_alone_and_no_records_still_make_a_release() -> None:
    released = noisy_sums(
        torch.empty(0, 3000), torch.empty(0, dtype=torch.int64), classes=5, clip=1.0, sigma=2.0, noise=Noise._seeded(1)
    )

    assert released.shape == (5, 3000)
    assert torch.allclose(released.std(dim=1), torch.tensor(2.0), rtol=0.06)
    assert len(released.unique()) > 14_000


# --- labels


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 0.5), (10, 2.0), (5, 8.0)])
def test_labels_are_kept_and_moved_as_often_as_randomized_response_says(classes: int, epsilon: float) -> None:
    labels = torch.arange(60_000) % classes
    released = randomize_labels(labels, classes=classes, epsilon=epsilon, noise=Noise._seeded(9))

    total = math.exp(epsilon) + classes - 1
    expected = np.array([math.exp(epsilon) / total] + [1 / total] * (classes - 1)) * len(labels)
    moved = torch.bincount((released - labels) % classes, minlength=classes)
    assert stats.chisquare(moved.numpy(), expected).pvalue > 1e-3
    assert released.dtype is torch.int64
    assert 0 <= int(released.min()) <= int(released.max()) < classes


# --- moments


@pytest.mark.parametrize("per_class", [True, False])
def test_moments_are_counts_sums_and_second_moments(per_class: bool) -> None:  # noqa: FBT001 - a parameter of the test
    rows, labels = unit_rows(torch.randn(200, 6, dtype=torch.float64)), torch.arange(200) % 2
    made = moments(rows, labels, per_class=per_class)

    members = [rows[labels == label] for label in range(3)]
    assert torch.allclose(made.counts, torch.tensor([100.0, 100.0, 0.0], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(made.sums, torch.stack([x.sum(0) for x in members]), atol=1e-6)
    whole = torch.stack([x.T @ x for x in (members if per_class else [rows])])
    assert torch.allclose(made.seconds, whole, atol=1e-6)
    assert torch.equal(made.seconds, made.seconds.mT)


def test_a_units_records_weigh_what_one_record_weighs() -> None:
    rows, labels = unit_rows(torch.randn(7, 4, dtype=torch.float64)), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    weights = torch.tensor([1 / 3] * 3 + [1 / 4] * 4)
    made = moments(rows, labels, classes=2, weights=weights)

    assert torch.allclose(made.counts, torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(made.sums[1], rows[3:].mean(0), atol=1e-6)
    assert torch.allclose(made.seconds[0], rows[:3].T @ rows[:3] / 3, atol=1e-6)


def test_rows_longer_than_one_do_not_count_for_more() -> None:
    made = moments(torch.tensor([[30.0, 40.0]]), torch.tensor([1]))

    assert torch.allclose(made.sums[1], torch.tensor([0.6, 0.8], dtype=torch.float64), atol=1e-5)
    assert float(made.seconds[1].trace()) == pytest.approx(1, abs=1e-5)


def test_noise_lies_on_the_coordinates_that_the_sensitivity_is_of() -> None:
    made = [moments(torch.zeros(0, 30), torch.zeros(0, dtype=torch.int64), sigma=2.0, seed=seed) for seed in range(40)]
    counts, sums, seconds = (torch.stack([getattr(m, name) for m in made]) for name in ("counts", "sums", "seconds"))
    above = torch.triu_indices(30, 30, offset=1)

    assert float(counts.std()) == pytest.approx(2 / 0.5, rel=0.2)
    assert float(sums.std()) == pytest.approx(2, rel=0.05)
    assert float(seconds.diagonal(dim1=2, dim2=3).std()) == pytest.approx(2 / 0.7, rel=0.05)
    assert float(seconds[:, :, above[0], above[1]].std()) == pytest.approx(2 / 0.7 / math.sqrt(2), rel=0.02)


def _vectors(rows: torch.Tensor, label: int, c: float, w: float, *, per_class: bool) -> torch.Tensor:
    """v of each row ``[B, 2]`` in one of two classes, written out: second moments as whole matrices, of equal norm."""
    seconds = torch.zeros(len(rows), 2, 2, 2, dtype=torch.float64)
    seconds[:, label if per_class else 0] = w * rows[:, :, None] * rows[:, None, :]
    firsts = torch.zeros(len(rows), 2, 3, dtype=torch.float64)
    firsts[:, label] = torch.cat([torch.full((len(rows), 1), c), rows], dim=1)
    return torch.cat([firsts.flatten(1), seconds.flatten(1)], dim=1)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("c", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("w", [0.1, 0.6, 0.7072, 1.0, 3.0])
def test_no_two_records_move_the_moments_farther_than_their_sensitivity(
    c: float,
    w: float,
    per_class: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    turns = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
    circle = torch.stack([turns.cos(), turns.sin()], dim=1)
    disc = torch.cat([length * circle for length in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)])
    here, there = (_vectors(disc, label, c, w, per_class=per_class) for label in (0, 1))
    farthest = max(float(torch.cdist(here, here).max()), float(torch.cdist(here, there).max()))

    assert farthest == pytest.approx(moments_sensitivity(c, w, Relation.REPLACE_ONE), rel=1e-3)
    assert farthest <= moments_sensitivity(c, w, Relation.REPLACE_ONE) * (1 + 1e-9)
    assert float(here.norm(dim=1).max()) == pytest.approx(moments_sensitivity(c, w, Relation.ADD_REMOVE), rel=1e-9)


# --- what is refused


ROWS, LABELS = torch.ones(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "release",
    [
        lambda x: clip_rows(x, 1.0),
        unit_rows,
        lambda x: noisy_rows(x, clip=1.0, sigma=1.0, noise=Noise()),
        lambda x: noisy_sums(x, LABELS, classes=3, clip=1.0, sigma=1.0, noise=Noise()),
        lambda x: moments(x, LABELS),
        lambda x: Noise().added_to(x, 1.0),
    ],
)
def test_T10_what_is_not_finite_never_leaves(release: Callable[[torch.Tensor], object], poison: float) -> None:
    rows = ROWS.clone()
    rows[1, 1] = poison

    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        release(rows)


def _sums(labels: torch.Tensor) -> object:
    return noisy_sums(ROWS, labels, classes=3, clip=1.0, sigma=1.0, noise=Noise())


def _weighed(weights: torch.Tensor) -> object:
    return noisy_moments(
        ROWS,
        LABELS,
        classes=3,
        count_weight=1.0,
        second_weight=1.0,
        per_class=True,
        weights=weights,
        sigma=1.0,
        noise=Noise(),
    )


@pytest.mark.parametrize(
    ("release", "complaint"),
    [
        (lambda: clip_rows(ROWS, 0.0), "clip is finite and above 0"),
        (lambda: clip_rows(LABELS, 1.0), "rows are floating tensors"),
        (lambda: clip_rows(torch.tensor(1.0), 1.0), "rows are floating tensors"),
        (lambda: noisy_rows(ROWS, clip=1.0, sigma=0.0, noise=Noise()), "sigma is finite and above 0"),
        (lambda: _sums(torch.tensor([0, 1, 3])), "labels run from 0 to 2"),
        (lambda: _sums(torch.tensor([-1, 1, 2])), "labels run from 0 to 2"),
        (lambda: _sums(torch.tensor([0, 1])), r"labels are int64 \[3\]"),
        (lambda: _sums(torch.ones(3)), r"labels are int64 \[3\]"),
        (lambda: randomize_labels(LABELS, classes=3, epsilon=21.0, noise=Noise()), "protects nothing"),
        (lambda: randomize_labels(LABELS, classes=3, epsilon=0.0, noise=Noise()), "epsilon is finite and above 0"),
        (lambda: randomize_labels(LABELS * 0, classes=1, epsilon=1.0, noise=Noise()), "at least 2 classes"),
        (lambda: randomize_labels(LABELS, classes=2, epsilon=1.0, noise=Noise()), "labels run from 0 to 1"),
        (lambda: moments(torch.ones(3, 2, 2), LABELS), "flatten the features"),
        (lambda: moments_sensitivity(0.0, 1.0, Relation.ADD_REMOVE), "count_weight is finite and above 0"),
        (lambda: moments_sensitivity(1.0, math.inf, Relation.ADD_REMOVE), "second_weight is finite and above 0"),
        (lambda: _weighed(torch.tensor([0.5, 0.5, 1.1])), "weighs from 0 to 1"),
        (lambda: _weighed(torch.tensor([0.5, 0.5])), r"weights are floating \[3\]"),
    ],
)
def test_what_makes_no_sense_is_refused(release: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        release()


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        _weighed(torch.tensor([0.5, math.nan, 1.0]))


# --- attacks


NEIGHBOURS = [(treatment, relation) for treatment in TREATMENTS for relation in treatment.relations]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    with contextlib.closing(Ledger(f"sqlite:///{tmp_path_factory.mktemp('audit') / 'privacy.sqlite'}")) as opened:
        yield opened


@pytest.mark.parametrize(("treatment", "relation"), NEIGHBOURS, ids=lambda x: getattr(x, "name", None))
def test_T10_a_treatment_keeps_its_claim(treatment: Treatment, relation: Relation, ledger: Ledger) -> None:
    assert attack(treatment, relation, draws=DRAWS, ledger=ledger, seed=11) == (None, False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_T10_a_broken_treatment_is_caught(mutation: Mutation, ledger: Ledger) -> None:
    befallen = [(t, relation) for t, relation in NEIGHBOURS if mutation.befalls(t, relation)]

    assert befallen
    for treatment, relation in befallen:
        assert caught(treatment, relation, mutation, draws=DRAWS, ledger=ledger, seed=12), (treatment.name, relation)


def test_T10_records_join_a_sample_each_by_its_own_coin(ledger: Ledger) -> None:
    assert not sampler_fails(ledger=ledger, seed=13)


@pytest.mark.parametrize("mutation", SAMPLERS, ids=lambda mutation: mutation.name)
def test_T10_a_sampler_that_is_no_coin_is_caught(mutation: Mutation, ledger: Ledger) -> None:
    assert sampler_fails(mutation, ledger=ledger, seed=14)


def test_T10_what_never_leaves_does_not_leave(ledger: Ledger) -> None:
    assert nothing_leaves(ledger)


def test_the_profile_test_tells_a_claim_that_holds_from_one_that_does_not() -> None:
    random = np.random.default_rng(3)
    scores, others = random.normal(1.0, 1, (1, 20_000)), random.normal(0, 1, (1, 20_000))

    def claim(mu: float) -> Callable[[float], float]:
        return lambda epsilon: delta_of([Gaussian(sensitivity=mu, sensitivity_replace=mu, noise=1.0)], epsilon)

    assert profile_test(scores, others, claim(1.0)) is None
    assert profile_test(scores, scores + 0, claim(1e-3)) is None
    breach = profile_test(scores, others, claim(0.8))
    assert breach is not None
    assert breach.true_positive > math.exp(breach.epsilon) * breach.false_positive + breach.delta
    assert profile_test(-scores, -others, claim(0.8)) is not None
    assert profile_test(others, scores, claim(0.8)) is not None


def test_the_mu_test_measures_the_distance_and_allows_for_chance() -> None:
    random = np.random.default_rng(4)
    scores, others = random.normal(5.0, 2, 20_000), random.normal(0, 2, 20_000)

    assert mu_test(scores, others, 2.4)
    assert mu_test(others, scores, 2.4)
    assert not mu_test(scores, others, 2.5)


def test_the_audit_says_what_it_found_and_fails_on_a_miss(capsys: pytest.CaptureFixture[str]) -> None:
    sixty, many = (
        main(["--draws", draws, "--honest", "1", "--treatment", "randomized_response"]) for draws in ("60", str(DRAWS))
    )

    shown = capsys.readouterr().out
    assert (sixty, many) == (1, 0)  # sixty draws prove nothing
    assert "MISSED" in shown
    assert "0 of 1" in shown
