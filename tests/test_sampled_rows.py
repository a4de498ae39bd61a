"""Rows that are sampled from noised moments: what the noise did to the estimates is taken out again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from privacy.mechanisms import Moments, Noise, noisy_moments, unit_rows
from privacy.tables import _covariances, sample_rows

CLASSES, FEATURES, EACH = 4, 10, 2000
WEIGHT = 0.7


def records(each: tuple[int, ...] = (EACH,) * CLASSES) -> tuple[Tensor, Tensor]:
    """Unit rows around four directions; each class spreads along directions of its own."""
    generator = torch.Generator().manual_seed(0)
    rows, labels = [], []
    for number, count in enumerate(each):
        spread = torch.full((FEATURES,), 0.02)
        spread[number + CLASSES] = 0.4
        rows.append(torch.eye(FEATURES)[number] + spread * torch.randn(count, FEATURES, generator=generator))
        labels.append(torch.full((count,), number))
    return unit_rows(torch.cat(rows)), torch.cat(labels)


def noised(sigma: float, *, per_class: bool, each: tuple[int, ...] = (EACH,) * CLASSES, seed: int = 0) -> Moments:
    rows, labels = records(each)
    return noisy_moments(
        rows,
        labels,
        classes=CLASSES,
        count_weight=WEIGHT,
        second_weight=WEIGHT,
        per_class=per_class,
        weights=None,
        sigma=sigma,
        noise=Noise._seeded(seed),
    )


def covariances(moments: Moments, sigma: float) -> list[Tensor]:
    shares = moments.counts.clamp_min(1.0)
    return _covariances(moments.seconds, shares, moments.sums / shares[:, None], sigma, sigma / WEIGHT)


@pytest.mark.parametrize("per_class", [False, True])
def test_with_next_to_no_noise_rows_have_the_means_and_spreads_of_the_records(*, per_class: bool) -> None:
    rows, labels = records()
    made, classes = sample_rows(
        noised(1e-3, per_class=per_class), 40_000, Noise._seeded(1), sigma=1e-3, second_weight=WEIGHT
    )

    for number in range(CLASSES):
        torch.testing.assert_close(made[classes == number].mean(0), rows[labels == number].mean(0), atol=0.01, rtol=0)
    own = made[classes == 0].var(0)
    assert own[CLASSES] > (10 if per_class else 0.5) * own[CLASSES + 1]


def test_the_variance_within_classes_is_neither_swollen_nor_shrunk_by_noise() -> None:
    true = covariances(noised(1e-3, per_class=False), 1e-3)[0].trace()
    found = torch.stack([covariances(noised(15.0, per_class=False, seed=s), 15.0)[0].trace() for s in range(20)]).mean()

    assert float(found / true) == pytest.approx(1.0, abs=0.1)


def test_directions_that_noise_drowns_share_one_variance_and_no_covariance_is_flat() -> None:
    sigma = 400.0
    (found,) = covariances(noised(sigma, per_class=False), sigma)
    values = torch.linalg.eigvalsh(found)

    # Noise alone spreads the eigenvalues over twice this.
    edge = sigma / WEIGHT / (CLASSES * EACH) * math.sqrt(2 * FEATURES)
    assert float(values.min()) > 0
    assert float(values[:-2].max() - values[:-2].min()) < 0.05 * edge


def test_a_class_with_few_records_falls_back_to_the_pooled_covariance() -> None:
    each = (EACH, EACH, EACH, 20)
    first, *_, few = covariances(noised(8.0, per_class=True, each=each), 8.0)
    (pooled,) = covariances(noised(8.0, per_class=False, each=each), 8.0)

    assert float((few - pooled).norm() / pooled.norm()) < 0.5
    assert float((first - pooled).norm() / pooled.norm()) > 0.5


def test_classes_come_as_often_as_the_noisy_counts_say() -> None:
    moments = noised(1e-3, per_class=False, each=(300, 100, 500, 100))
    _, classes = sample_rows(moments, 1000, Noise._seeded(1), sigma=1e-3, second_weight=WEIGHT)

    assert torch.bincount(classes).tolist() == pytest.approx([300, 100, 500, 100], abs=1)


@pytest.mark.parametrize("per_class", [False, True])
def test_noise_far_above_the_data_still_gives_finite_rows(*, per_class: bool) -> None:
    made, classes = sample_rows(
        noised(1e6, per_class=per_class), 500, Noise._seeded(1), sigma=1e6, second_weight=WEIGHT
    )

    assert bool(torch.isfinite(made).all())
    assert made.shape == (500, FEATURES)
    assert len(classes) == 500
