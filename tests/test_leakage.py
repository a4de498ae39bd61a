"""The leakage audit: attacks that must find what is there, must not find what is not, and must say when they failed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cloister import digits
from examples import models
from privacy.leakage import Bench, CutLeakage, Outcome, Parts, Settings, Treatment, advise, audit, audit_cut, decoding
from privacy.leakage.correlation import distance_correlation
from privacy.leakage.deadline import Deadline
from privacy.leakage.labels import matched_accuracy
from privacy.leakage.ridge import fit_ridge
from privacy.leakage.victim import Victim
from tests import leakage_audits
from tests.leakage_audits import QUICK, parts_of
from wire.errors import ConfigError

# pytest finds a file's fixtures by their names in it.
_few_steps, scans = leakage_audits.few_steps, leakage_audits.scans
bench, stem = leakage_audits.bench, leakage_audits.stem


class Constant(nn.Module):
    """A front that tells nothing, though it is called with everything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 8), 0.3)


# --- What must be found -----------------------------------------------------------------------------------------------


def test_a_front_that_passes_everything_on_is_found_to_leak_everything(bench: Bench) -> None:
    found = audit_cut("identity", Parts(nn.Identity()), bench)

    assert found.decoder.outcome is Outcome.RECONSTRUCTS
    assert found.decoder.clear is not None
    assert found.decoder.clear.similarity > 0.99
    assert found.decoder.clear.accuracy == pytest.approx(bench.originals_accuracy, abs=0.02)
    assert found.distance_correlation == pytest.approx(1, abs=1e-6)


def test_an_untrained_convolution_is_inverted(stem: CutLeakage) -> None:
    assert stem.decoder.clear is not None
    assert stem.decoder.clear.similarity > 0.9
    assert stem.decoder.clear.similarity > stem.baselines["nearest neighbour"].similarity
    assert stem.distance_correlation > 0.8


def test_the_better_of_both_decoders_is_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ridge regression cannot undo a fifth power; a network that does is taken, one that does not is left."""
    seen = (bench.known - 0.5) ** 5
    chosen = []
    for network in (lambda z: z.sign() * z.abs() ** 0.2 + 0.5, torch.zeros_like):
        monkeypatch.setattr(decoding, "trained_network", lambda *_, network=network: network)
        chosen.append(decoding.decoder_of(seen, bench, Deadline(60))[1])

    assert chosen == ["convolutional network", "ridge regression"]


def test_a_network_learns_to_decode(bench: Bench) -> None:
    guess = decoding.trained_network(bench.known**2, bench.known, bench, Deadline(60))

    assert bench.beats_mean(guess(bench.attacked**2))


def test_T10_the_u_shapes_gradients_give_the_labels_of_an_untrained_model(stem: CutLeakage) -> None:
    guess = stem.best_guess("gradients")

    assert stem.chance is not None
    assert stem.chance < 0.15
    assert guess is not None
    assert guess.accuracy > 0.95
    assert guess.knows.startswith("nothing")


def test_signals_are_measured_by_correlation() -> None:
    torch.manual_seed(0)
    phase, labels = torch.rand(400, 1, 1) * 6.3, torch.arange(400) % 2
    signals = torch.sin(torch.linspace(0, 12, 64) + phase) * (1 + labels[:, None, None])

    found = audit(nn.Conv1d(1, 8, 5, padding=2), None, signals, labels, Settings(seconds=60, rows=400))

    assert found.measure == "correlation"
    assert found.decoder.clear is not None
    assert found.decoder.clear.similarity > 0.95
    assert abs(found.baselines["mean input"].similarity) < 0.6


def test_labels_that_are_no_classes_leave_out_what_is_about_labels() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 6)

    found = audit(nn.Linear(6, 4), None, rows, rows.sum(1), QUICK)

    assert found.chance is None
    assert found.labels == ()
    assert "no classes" in found.labels_note
    assert found.decoder.clear is not None
    assert found.decoder.clear.accuracy is None


# --- What must not be found -------------------------------------------------------------------------------------------


def test_a_front_that_tells_nothing_is_void_and_never_tight(bench: Bench) -> None:
    found = audit_cut("constant", Parts(Constant()), bench)
    advice = advise([found])

    assert found.void
    assert found.decoder.clear is not None
    assert found.decoder.clear.mse == pytest.approx(found.baselines["mean input"].mse, rel=0.02)
    assert found.distance_correlation == 0
    assert advice.cut is None
    assert "Audit failed" in advice.reasons[0]


def test_labels_that_the_data_do_not_know_are_not_guessed_from_it() -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(600, 5), torch.arange(600) % 3

    found = audit(nn.Linear(5, 5), None, rows, labels[torch.randperm(600)], QUICK)

    assert found.best_guess().accuracy < 0.45  # type: ignore[union-attr]  # there is one


def test_distance_correlation_has_no_bias_in_high_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 2000, generator=generator) for _ in range(2))

    assert abs(distance_correlation(a, b)) < 0.02
    assert distance_correlation(a, 3 * a.flip(1) + 1) == pytest.approx(1)
    assert distance_correlation(a, torch.full((200, 3), 0.1)) == 0


def test_distance_correlation_is_that_of_the_papers_formula() -> None:
    """Equations (2.1) and (2.2) of Székely and Rizzo 2014, written out row by row."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(12, 3, generator=generator)
    b = a[:, :2] ** 2 + 0.1 * torch.randn(12, 2, generator=generator)

    def centred(x: Tensor) -> list[list[float]]:
        d = [[float((p - q).norm()) for q in x.double()] for p in x.double()]
        n, row, total = len(d), [sum(r) for r in d], sum(map(sum, d))
        return [
            [0 if i == j else d[i][j] - (row[i] + row[j]) / (n - 2) + total / ((n - 1) * (n - 2)) for j in range(n)]
            for i in range(n)
        ]

    def product(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(x * y for r, s in zip(p, q, strict=True) for x, y in zip(r, s, strict=True))

    u, v = centred(a), centred(b)
    assert distance_correlation(a, b) == pytest.approx(product(u, v) / (product(u, u) * product(v, v)) ** 0.5)


# --- The void rule and treatments -------------------------------------------------------------------------------------


def test_noise_that_hides_everything_is_no_void_audit(scans: tuple[Tensor, Tensor]) -> None:
    settings = Settings(seconds=60, rows=600, treatment=Treatment(clip=0.01, noise=10_000.0))
    found = audit_cut("stem", parts_of(digits.model), Bench(*scans, settings))

    assert not found.void
    assert found.decoder.clear is not None
    assert found.decoder.clear.similarity > 0.9
    assert found.decoder.treated is not None
    assert found.decoder.treated_beats_mean is False
    assert found.decoder.seen is found.decoder.treated
    assert found.treated_distance_correlation == pytest.approx(0, abs=0.05)
    assert found.best_guess("activations").accuracy < 0.3  # type: ignore[union-attr]  # there is one


def test_a_treatment_clips_each_record_and_noises_it() -> None:
    big, small = torch.full((1, 4), 10.0), torch.full((1, 4), 0.1)
    generator = torch.Generator().manual_seed(0)

    (clipped,) = Victim.treated((torch.cat([big, small]),), Treatment(1.0, 0.0), generator)
    (noised,) = Victim.treated((torch.zeros(2000, 4),), Treatment(2.0, 0.25), generator)

    assert torch.allclose(clipped[0].norm(), torch.tensor(1.0))
    assert torch.equal(clipped[1:], small)
    assert noised.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (1.0, -0.1), (float("nan"), 1.0), (1.0, float("inf"))])
def test_a_treatment_of_impossible_numbers_is_refused(clip: float, noise: float) -> None:
    with pytest.raises(ConfigError, match="clip must be above 0"):
        Treatment(clip, noise)


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_clusters_are_named_in_the_best_way() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])

    assert matched_accuracy(np.array([2, 2, 0, 0, 1, 1]), labels, 3) == 1
    assert matched_accuracy(np.zeros(6, dtype=np.int64), labels, 3) == pytest.approx(1 / 3)


def test_ridge_regression_finds_a_linear_map_and_ignores_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, map_ = torch.randn(100, 20, generator=generator), torch.randn(20, 3, generator=generator)

    exact = fit_ridge(x, x @ map_ + 2)
    nothing = fit_ridge(x, torch.randn(100, 3, generator=generator))

    assert torch.allclose(exact(x), x @ map_ + 2, atol=1e-3)
    assert (nothing(x) - nothing.offset).std() < 0.5


def test_ridge_regression_ignores_noise_of_more_dimensions_than_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, targets = torch.randn(60, 300, generator=generator), torch.randn(60, 40, generator=generator)

    fitted = fit_ridge(wide, targets)

    unseen = torch.randn(60, 300, generator=generator)
    assert (fitted(unseen) - fitted.offset).square().mean() < 0.1


def test_several_tensors_that_cross_are_seen_as_one(bench: Bench) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, x[:, :, ::2, ::2], x.mean((2, 3))

    crossing = Victim(Parts(Two(), crossing=2), bench.known)
    everything = Victim(Parts(Two()), bench.known)

    assert crossing.shape == (2, 8, 8)
    assert everything.shape == (64 + 16 + 1,)


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (torch.zeros(100, 8, dtype=torch.int64), "put what looks them up"),
        (torch.zeros(100), "takes images"),
        (torch.zeros(10, 8), "at least 40"),
        (torch.full((100, 8), float("nan")), "NaN or infinite"),
    ],
)
def test_data_that_cannot_be_audited_are_refused(inputs: Tensor, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Bench(inputs, None, QUICK)


def test_an_example_of_two_dimensions_finds_its_middle() -> None:
    """The whole way of an example model: a head on the middle's outputs."""
    torch.manual_seed(0)
    model = models.small_cnn()
    images, labels = torch.rand(80, 1, 28, 28), torch.arange(80) % 10

    found = audit(model.stem, (model.body, model.head), images, labels, Settings(seconds=0.5, rows=80))  # type: ignore[arg-type]  # submodules

    assert {guess.source for guess in found.labels} == {"activations", "outputs", "gradients"}
    assert found.dimensions == 16 * 14 * 14
