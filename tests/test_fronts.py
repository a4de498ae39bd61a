"""Fronts for private releases: frozen for good, public or accounted, and what they compute."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from client_side.cutting import cut
from client_side.fronts import (
    UnitRows,
    front_digest,
    frozen,
    load_public_front,
    private_projection,
    projection,
    scattering_1d,
    scattering_2d,
)
from privacy.accounting import Gaussian
from privacy.mechanisms import Noise
from wire.errors import ConfigError
from wire.state import dump_state


def _network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(conv=nn.Conv1d(1, 4, 5), norm=nn.BatchNorm1d(4), drop=nn.Dropout(0.5)))


def _saved(module: nn.Module, path: Path) -> str:
    data = dump_state(module.state_dict())
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


# --- Rows of norm 1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)])
def test_unit_rows_keep_their_direction_and_lose_their_length(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 7

    made = UnitRows()(x)

    torch.testing.assert_close(made.flatten(1).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(torch.cosine_similarity(made.flatten(1), x.flatten(1)), torch.ones(5))


def test_a_row_of_zeros_stays_one_and_its_gradient_is_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)

    made = UnitRows()(x)
    made.sum().backward()

    torch.testing.assert_close(made.detach(), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert x.grad is not None
    assert x.grad.abs().max() < 10


def test_unit_rows_cross_a_cut_and_a_frozen_front_may_end_with_them() -> None:
    front = nn.Sequential(frozen(nn.Linear(6, 4)), UnitRows())

    made = cut(nn.Sequential(front, nn.Linear(4, 2)), front="0", example=torch.randn(3, 6)).front(torch.randn(9, 6))

    torch.testing.assert_close(made[0].norm(dim=1) if isinstance(made, tuple) else made.norm(dim=1), torch.ones(9))


# --- Frozen -----------------------------------------------------------------------------------------------------------


def test_T10_a_frozen_front_learns_nothing_from_batches_that_pass_through_it_in_training() -> None:
    front = frozen(_network())
    head = nn.Linear(4 * 12, 2)
    model = nn.Sequential(front, nn.Flatten(), head)
    before, weights = front_digest(front), head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)

    model.train()
    model(torch.randn(8, 1, 16)).square().sum().backward()
    optimizer.step()

    assert front_digest(front) == before
    assert not torch.equal(head.weight, weights)
    assert not any(module.training for module in front.modules())
    assert not any(parameter.requires_grad for parameter in front.parameters())


def test_a_frozen_front_is_a_copy_and_lets_gradients_through_to_its_input() -> None:
    network = _network()
    front = frozen(network)
    digest = front_digest(front)
    signals = torch.randn(3, 1, 16, requires_grad=True)

    with torch.no_grad():
        network.get_parameter("conv.weight").add_(1)
    front(signals).sum().backward()

    assert front_digest(front) == digest
    assert network.get_parameter("conv.weight").requires_grad
    assert signals.grad is not None
    assert signals.grad.abs().sum() > 0


def test_a_frozen_front_stays_frozen_through_a_cut_and_trains_the_rest() -> None:
    stem = scattering_1d(64, J=3, Q=2)
    width = stem(torch.zeros(1, 1, 64)).shape[1]
    model = nn.Sequential(
        OrderedDict(stem=stem, body=nn.Sequential(nn.Linear(width, 8), nn.ReLU()), head=nn.Linear(8, 2))
    )
    signals = torch.randn(4, 1, 64)

    parts = cut(model, front="stem", head="head", example=signals)
    model.train()

    assert torch.equal(parts.split_outputs(parts.front(signals))[0][0], stem(signals))
    assert {p.requires_grad for p in parts.owner_parameters()} == {True}
    assert set(parts.middle_state()) == {"body.0.weight", "body.0.bias"}


# --- Its digest -------------------------------------------------------------------------------------------------------


def test_a_fronts_digest_does_not_depend_on_freezing_or_on_the_order_of_registration() -> None:
    one, other = nn.Module(), nn.Module()
    for module, order in ((one, "ab"), (other, "ba")):
        for name in order:
            module.register_buffer(name, torch.full((2,), float(ord(name))))

    assert front_digest(one) == front_digest(other) == front_digest(frozen(frozen(one)))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv.weight.data.view(-1)[0].nextafter_(torch.tensor(9.0)),
        lambda m: m.norm.running_mean.add_(1),
        lambda m: setattr(m, "norm", m.norm.double()),
        lambda m: setattr(m.conv, "bias", nn.Parameter(m.conv.bias.detach()[None])),
        lambda m: m.register_buffer("more", torch.zeros(0)),
        lambda m: m.register_buffer("more", torch.zeros(1), persistent=False),
    ],
)
def test_any_change_of_a_fronts_tensors_changes_its_digest(change: object) -> None:
    network = _network()
    before = front_digest(network)

    with torch.no_grad():
        change(network)  # type: ignore[operator]  # one of the functions above

    assert front_digest(network) != before


# --- Public fronts from files -----------------------------------------------------------------------------------------


def test_a_public_front_comes_from_its_file_frozen_and_the_given_module_stays_as_it_was(tmp_path: Path) -> None:
    published, mine = _network(1), _network(2)
    sha256 = _saved(published, tmp_path / "front.safetensors")
    before = front_digest(mine)

    front = load_public_front(mine, tmp_path / "front.safetensors", sha256=sha256.upper())

    assert front_digest(front) == front_digest(published) != before
    assert front_digest(mine) == before
    assert not front.train().get_submodule("module").training


def test_T10_a_front_whose_file_hashes_to_something_else_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = tmp_path / "front.safetensors"
    sha256 = _saved(_network(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()

    with pytest.raises(ConfigError, match=f"has the SHA-256 {found}, and {sha256} was expected"):
        load_public_front(_network(), path, sha256=sha256)


def _without(module: nn.Module) -> None:
    del module.norm


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_without, "lacks 'norm.bias': these are the weights of another front"),
        (lambda m: m.register_buffer("more", torch.zeros(1)), "also holds 'more': these are"),
        (lambda m: m.conv.double(), r"'conv.(bias|weight)' is float64 \[.*, the front's is float32 \["),
        (lambda m: setattr(m, "conv", nn.Conv1d(1, 4, 3)), r"is float32 \[4, 1, 3\], the front's is float32 \[4, 1, 5"),
    ],
)
def test_weights_of_another_front_are_refused_by_name(tmp_path: Path, change: object, complaint: str) -> None:
    other = _network()
    change(other)  # type: ignore[operator]  # as above
    sha256 = _saved(other, tmp_path / "f")

    with pytest.raises(ConfigError, match=complaint):
        load_public_front(_network(), tmp_path / "f", sha256=sha256)


def test_a_file_that_is_no_front_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\x80\x04no pickle is read here")
    sha256 = hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()

    with pytest.raises(ConfigError, match="is no safetensors file"):
        load_public_front(_network(), tmp_path / "f", sha256=sha256)
    with pytest.raises(ConfigError, match=r"cannot read .*missing: No such file or directory; download"):
        load_public_front(_network(), tmp_path / "missing", sha256=sha256)


def test_T02_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = _saved(_network(), tmp_path / "f")
    monkeypatch.setattr("client_side.fronts.MAX_FRONT_BYTES", 100)

    with pytest.raises(ConfigError, match="is larger than 100 bytes"):
        load_public_front(_network(), tmp_path / "f", sha256=sha256)


# --- Scattering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_scattering_of_signals_is_flat_deterministic_and_row_by_row(batch: int, channels: int) -> None:
    signals = torch.randn(batch, channels, 128, generator=torch.Generator().manual_seed(0))

    made = scattering_1d(128, J=3, Q=4)(signals)

    assert made.dtype is torch.float32
    assert made.shape == (batch, channels * 256)
    assert torch.equal(made, scattering_1d(128, J=3, Q=4)(signals))
    assert torch.allclose(made[:1], scattering_1d(128, J=3, Q=4)(signals[:1]), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_scattering_of_images_is_flat_deterministic_and_takes_strided_batches(batch: int) -> None:
    images = torch.rand(batch, 28, 28, 2, generator=torch.Generator().manual_seed(0)).movedim(3, 1)
    front = scattering_2d(28, 28, J=2, L=4)

    made = front(images)

    assert made.dtype is torch.float32
    assert made.shape == (batch, 2 * 25 * 7 * 7)
    assert torch.equal(made, front(images.contiguous()))


def test_scattering_hardly_moves_where_the_signal_shifts_and_moves_where_it_changes() -> None:
    t = torch.arange(128.0)
    slow, shifted, fast = (torch.sin(t / period + phase)[None, None] for period, phase in ((4, 0), (4, 0.5), (2, 0)))
    front = scattering_1d(128, J=4, Q=2)

    moved, changed = (front(other) - front(slow) for other in (shifted, fast))

    assert moved.norm() < 0.3 * changed.norm()


def test_the_logarithm_tells_weak_coefficients_apart() -> None:
    signals = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))

    plain, logarithm = (scattering_1d(64, J=3, Q=1, log=log)(signals) for log in (False, True))

    assert torch.allclose(logarithm, torch.log(plain.clamp_min(0) + 1e-3), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: scattering_1d(128, J=8, Q=1), "J is 8: for signals of 128 samples it lies between 1 and 7"),
        (lambda: scattering_1d(128, J=0, Q=1), "J is 0"),
        (lambda: scattering_1d(128, J=3, Q=0), "Q is the number of wavelets"),
        (lambda: scattering_2d(28, 8, J=4), "J is 4: for images of 28x8 pixels it lies between 1 and 3"),
        (lambda: scattering_2d(8, 8, J=2, L=0), "L is the number of the wavelets' angles"),
        (lambda: scattering_1d(64, J=3, Q=1)(torch.zeros(2, 1, 65)), r"this front takes \[B, C, 64\], not \[2, 1, 65"),
        (lambda: scattering_2d(8, 8, J=2)(torch.zeros(2, 8, 8)), r"this front takes \[B, C, 8, 8\], not \[2, 8, 8\]"),
    ],
)
def test_a_scattering_that_cannot_be_is_refused_in_words(make: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()  # type: ignore[operator]  # as above


# --- Projections ------------------------------------------------------------------------------------------------------


def _features(rows: int = 300, seed: int = 0) -> torch.Tensor:
    """Rows with most of their variance in the first three of ten directions, away from the origin."""
    drawn = torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor([5.0, 3.0, 2.0] + [0.1] * 7) + 1.0


def _matrix(projected: nn.Module) -> torch.Tensor:
    return projected.get_buffer("module.matrix")


def test_principal_components_keep_the_variance_of_the_public_rows() -> None:
    features = _features()

    made = projection(features, 3)(features)

    assert torch.allclose(made.mean(0), torch.zeros(3), atol=1e-5)
    assert made.var(0, correction=0).sum() > 0.99 * features.var(0, correction=0).sum()
    assert torch.allclose(torch.corrcoef(made.T), torch.eye(3), atol=1e-3)


def test_random_directions_are_orthonormal_and_follow_their_seed() -> None:
    features = _features()

    maps = [_matrix(projection(features, 4, kind="random", seed=seed)) for seed in (0, 0, 1)]

    assert torch.allclose(maps[0] @ maps[0].T, torch.eye(4), atol=1e-5)
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2], atol=0.01)


def test_whitening_by_halves_gives_the_root_of_the_spread() -> None:
    features = _features()

    plain, half = (projection(features, 3, whiten=whiten)(features).std(0) for whiten in (0.0, 0.5))

    assert torch.allclose(half, plain.sqrt(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["pca", "random"])
def test_whitening_gives_unit_variance(kind: str) -> None:
    features = _features()

    made = projection(features, 3, kind=kind, whiten=1.0)(features)  # type: ignore[arg-type]  # both are allowed

    assert torch.allclose(made.var(0, correction=0), torch.ones(3), atol=1e-4)


def test_a_private_projection_finds_the_directions_when_the_noise_is_small_beside_the_rows() -> None:
    features = _features(2000)

    made, _ = private_projection(features, 3, sigma=5.0, noise=Noise._seeded(0), centre_D=torch.ones(10))

    assert torch.linalg.matrix_norm(_matrix(made)[:, :3]) > 0.99 * math.sqrt(3)
    assert torch.allclose(made(torch.ones(2, 10)), torch.zeros(2, 3), atol=1e-6)


def test_T10_a_private_projection_costs_one_gaussian_release() -> None:
    _, event = private_projection(_features(), 3, sigma=2.5, noise=Noise())

    assert event == Gaussian(sensitivity=1.0, sensitivity_replace=math.sqrt(2), noise=2.5)


class _Recorder(Noise):
    """Tells what is released, before the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.values = torch.empty(0)

    def added_to(self, values: torch.Tensor, sigma: float) -> torch.Tensor:
        self.values = values.clone()
        return super().added_to(values, sigma)


def _released(features: torch.Tensor) -> torch.Tensor:
    recorder = _Recorder()
    private_projection(features, 2, sigma=1.0, noise=recorder)
    return recorder.values


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_T10_no_record_moves_what_a_private_projection_releases_further_than_its_event_says(scale: float) -> None:
    features = _features(20)
    replaced = features.clone()
    features[0] = torch.eye(10)[0] * scale
    replaced[0] = torch.eye(10)[1] * scale

    added = (_released(features) - _released(features[1:])).norm()
    changed = (_released(features) - _released(replaced)).norm()

    assert 1 - 1e-6 < added <= 1
    assert math.sqrt(2) - 1e-6 < changed <= math.sqrt(2)


def test_T10_the_released_second_moments_alone_decide_a_private_projection() -> None:
    features = _features(20)

    maps = [private_projection(rows, 3, sigma=1.0, noise=Noise._seeded(1))[0] for rows in (features, -features)]

    assert front_digest(maps[0]) == front_digest(maps[1])


@pytest.mark.parametrize(
    ("features", "dims", "complaint"),
    [
        (torch.zeros(4), 1, r"a float matrix \[N, D\], not float32 \[4\]"),
        (torch.zeros(4, 3, dtype=torch.int64), 1, r"not int64 \[4, 3\]"),
        (torch.full((4, 3), math.nan), 1, "hold NaN or infinity"),
        (torch.zeros(4, 3), 4, r"4 directions of features \[4, 3\]: ask for 1 to 3"),
        (torch.zeros(4, 3), 0, "0 directions"),
    ],
)
def test_features_that_no_projection_can_be_fitted_on_are_refused(
    features: torch.Tensor, dims: int, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        projection(features, dims)
    with pytest.raises(ConfigError, match=complaint):
        private_projection(features, dims, sigma=1.0, noise=Noise())


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_private_projection_without_noise_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="without noise the directions are the data's"):
        private_projection(_features(), 2, sigma=sigma, noise=Noise())
