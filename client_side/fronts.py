"""Fronts fit for private releases: frozen, and made without a look at the private data.

A front that trains carries every record into all later activations, so no noise on the activations alone gives a finite
ε for the run. The fronts here cannot do that: scattering is fixed mathematics (Bruna and Mallat 2013, "Invariant
Scattering Convolution Networks"; Andén and Mallat 2014, "Deep Scattering Spectrum", for signals), a public front was
trained by somebody on other data, and a projection is fitted on public data or, accounted, under differential privacy
(:func:`private_projection`; Dwork, Talwar, Thakurta and Zhang 2014, "Analyze Gauss").

Each is an ``nn.Module`` whose parameters ask for no gradient and that :meth:`~torch.nn.Module.train` does not move out
of evaluation. Compose them with ``nn.Sequential``: ``scattering_1d`` and then ``projection`` of what it makes of public
signals is a whole front.

Shapes: ``B`` batch, ``C`` channels, ``L`` samples of a signal, ``H`` height, ``W`` width, ``N`` rows to fit on, ``D``
features in, ``F`` features out.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from pathlib import Path
from typing import Final, Literal, Self

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from privacy.accounting import Gaussian
from privacy.mechanisms import Noise, unit_rows
from wire.errors import ConfigError, IdentityError, StateRejectedError
from wire.files import read_bounded
from wire.state import load_state, tensor_digest

__all__ = [
    "UnitRows",
    "front_digest",
    "frozen",
    "load_public_front",
    "private_projection",
    "projection",
    "scattering_1d",
    "scattering_2d",
]

MAX_FRONT_BYTES: Final = 512 * 2**20  # a whole ViT-B in float32 takes 344 MB, and a front is less than that

_LOG_FLOOR: Final = 1e-3  # of signals and images of unit scale: what is smaller is noise of the transform's padding


# --- Frozen modules ---------------------------------------------------------------------------------------------------


class _Frozen(nn.Module):
    """Keeps a module in evaluation for good, whatever the model around it is set to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002, FBT001, FBT002 -- torch's own signature
        """Stays in evaluation: batch-norm that went on would learn from the private data."""
        return super().train(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        made: Tensor = self.module(*inputs)
        return made


class UnitRows(nn.Module):
    """Scales each row [B, ...] to an L2 norm of 1; a row of zeros stays one. It has nothing to learn.

    The end of a front whose activations the treatment ``moments`` releases: training and prediction then see the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Rows of ``x``'s own shape and dtype; gradients flow through."""
        norms_B = x.flatten(1).norm(dim=1)
        norms_B = norms_B.where(norms_B > 0, 1.0)  # not a small number: the gradient of a row of zeros stays finite
        unit: Tensor = x / norms_B.reshape(-1, *[1] * (x.ndim - 1))
        return unit


def frozen(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that no training changes: in evaluation for good, and no parameter asks for a gradient.

    Gradients still flow through it to its input. What happens to ``module`` later does not reach the copy.
    """
    return _Frozen(copy.deepcopy(module).requires_grad_(False))


def front_digest(module: nn.Module) -> str:
    """SHA-256 in hexadecimal over names, dtypes, shapes and bytes of all parameters and buffers of ``module``.

    It names the front in a privacy claim. The order of registration does not matter, nor whether it is frozen:
    ``front_digest(frozen(m)) == front_digest(m)``. What has no tensors (an activation function) does not count.
    """
    while isinstance(module, _Frozen):
        module = module.module
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda named: named[0]):
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(4, "big") + encoded + tensor_digest(tensor.detach()))
    return digest.hexdigest()


def load_public_front(module: nn.Module, path: Path | str, *, sha256: str) -> nn.Module:
    """``module`` with the weights in ``path``, frozen; the argument itself stays as it is.

    Args:
        module: the architecture; its weights do not matter.
        path: safetensors under the names of ``module.state_dict()``, all of them and no others.
        sha256: of the file, in hexadecimal, from whoever published it. A front that was trained on the private data,
            by mistake or by an attacker's hand, would break the claim; the digest says that it is the one you meant.

    Raises:
        ConfigError: the file cannot be read or is above 512 MiB, hashes to something else, is not safetensors, or
            belongs to another module; says what differs.
    """
    path = Path(path)
    try:
        data = read_bounded(path, limit=MAX_FRONT_BYTES, remedy="download the front again")
    except IdentityError as error:
        raise ConfigError(str(error)) from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.strip().lower():
        raise ConfigError(
            f"{path} has the SHA-256 {found}, and {sha256} was expected: it is another front. Download it again, or "
            "give the digest of this file if you trust where it comes from"
        )
    try:
        tensors = load_state(data)
    except StateRejectedError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error
    loaded = copy.deepcopy(module)
    _refuse_other(loaded.state_dict(), tensors, path)
    loaded.load_state_dict(tensors)
    return frozen(loaded)


def _refuse_other(own: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    if own.keys() != found.keys():
        name = min(own.keys() ^ found.keys())
        said = "lacks" if name in own else "also holds"
        raise ConfigError(f"{path} {said} {name[:80]!r}: these are the weights of another front")
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise ConfigError(f"{path}: {name!r} is {_kind(tensor)}, the front's is {_kind(own[name])}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# --- Scattering -------------------------------------------------------------------------------------------------------


class _Scattering(nn.Module):
    def __init__(self, transform: nn.Module, size: tuple[int, ...], *, log: bool) -> None:
        super().__init__()
        self.transform = transform
        self._size = size
        self._log = log

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != len(self._size) + 2 or tuple(x.shape[2:]) != self._size:
            raise ConfigError(f"this front takes [B, C, {', '.join(map(str, self._size))}], not {list(x.shape)}")
        scattered: Tensor = self.transform(x.to(torch.float32).contiguous())
        scattered_BD = scattered.flatten(1)
        return torch.log(scattered_BD.clamp_min(0) + _LOG_FLOOR) if self._log else scattered_BD


def scattering_1d(length: int, *, J: int, Q: int, order: Literal[1, 2] = 2, log: bool = False) -> nn.Module:
    """The scattering transform of signals, frozen: [B, C, L] to flat float32 [B, D].

    Args:
        length: L, of every signal.
        J: averages over 2^J samples; 2^J is at most L.
        Q: wavelets per octave.
        order: how deep.
        log: the logarithm of the coefficients, which tells weak ones apart.

    Raises:
        ConfigError: J, Q or L does not allow a transform; so does a batch of another length when it comes.
    """
    # Imported from its own file, and late: kymatio.torch also loads the 3-D transform, which fails on scipy >= 1.17.
    from kymatio.scattering1d.frontend.torch_frontend import ScatteringTorch1D  # noqa: PLC0415

    _refuse_scale(J, length, f"signals of {length} samples")
    if Q < 1:
        raise ConfigError(f"Q is the number of wavelets per octave, at least 1, not {Q}")
    with warnings.catch_warnings():
        # The widest wavelets of a short signal see its mirrored ends; the transform is as fixed as ever.
        warnings.filterwarnings("ignore", message="Signal support is too small", category=UserWarning)
        transform = ScatteringTorch1D(J=J, shape=(length,), Q=Q, max_order=order)
    return frozen(_Scattering(transform, (length,), log=log))


def scattering_2d(
    height: int, width: int, *, J: int, L: int = 8, order: Literal[1, 2] = 2, log: bool = False
) -> nn.Module:
    """The scattering transform of images, frozen: [B, C, H, W] to flat float32 [B, D].

    Args:
        height: H, of every image.
        width: W, of every image.
        J: averages over 2^J x 2^J pixels; 2^J is at most H and W.
        L: angles of the wavelets.
        order: how deep.
        log: the logarithm of the coefficients, which tells weak ones apart.

    Raises:
        ConfigError: J, L, H or W does not allow a transform; so does a batch of another size when it comes.
    """
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D  # noqa: PLC0415 -- as above

    _refuse_scale(J, min(height, width), f"images of {height}x{width} pixels")
    if L < 1:
        raise ConfigError(f"L is the number of the wavelets' angles, at least 1, not {L}")
    transform = ScatteringTorch2D(J=J, shape=(height, width), L=L, max_order=order)
    return frozen(_Scattering(transform, (height, width), log=log))


def _refuse_scale(J: int, size: int, what: str) -> None:
    most = max(size, 1).bit_length() - 1
    if not 1 <= J <= most:
        raise ConfigError(f"J is {J}: for {what} it lies between 1 and {most}, since 2^J samples are averaged")


# --- Projections ------------------------------------------------------------------------------------------------------


class _Projection(nn.Module):
    """``(features - mean) @ matrix.T``, its two tensors as buffers: nothing here can be trained."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean_D: Tensor, matrix_FD: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean_D.to(torch.float32).clone())
        self.register_buffer("matrix", matrix_FD.to(torch.float32).clone())

    def forward(self, features_BD: Tensor) -> Tensor:
        return (features_BD - self.mean) @ self.matrix.T


def projection(
    features_ND: Tensor, dims: int, *, kind: Literal["pca", "random"] = "pca", whiten: float = 0.0, seed: int = 0
) -> nn.Module:
    """A frozen linear map [B, D] to [B, ``dims``] that is fitted on **public** features.

    Args:
        features_ND: rows of public data, as the layer before makes them. Private rows here break every claim: use
            :func:`private_projection` for those.
        dims: F, how many directions are kept, at most the smaller of N and D.
        kind: ``pca``, the directions of the largest variance; or ``random``, orthonormal ones, for which the rows
            give the mean alone.
        whiten: each direction is divided by its standard deviation on the given rows to this power: 0 leaves it, 1
            gives unit variance. Between them, a private release spends its noise better: the weak directions, which
            tell classes apart as well, are not drowned, and those that are noise alone are not blown up.
        seed: fixes the random directions, and the solver of a large PCA.

    Raises:
        ConfigError: the features are no matrix of finite numbers, or too few for ``dims`` directions.
    """
    _refuse_features(features_ND, dims, min(features_ND.shape, default=0))
    rows_ND = features_ND.detach().to("cpu", torch.float64)
    mean_D = rows_ND.mean(0)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn_DF = torch.randn(rows_ND.shape[1], dims, generator=generator, dtype=torch.float64)
        matrix_FD = torch.linalg.qr(drawn_DF).Q.T
    else:
        fitted = PCA(dims, random_state=seed).fit(rows_ND.numpy())
        matrix_FD = torch.from_numpy(fitted.components_)
    spread_F = ((rows_ND - mean_D) @ matrix_FD.T).std(0, correction=0)
    matrix_FD = matrix_FD / spread_F.clamp_min(torch.finfo(torch.float32).eps).pow(whiten).unsqueeze(1)
    return frozen(_Projection(mean_D, matrix_FD))


def private_projection(
    features_ND: Tensor, dims: int, *, sigma: float, noise: Noise, centre_D: Tensor | None = None
) -> tuple[nn.Module, Gaussian]:
    """Principal directions of **private** features, fitted under differential privacy: a frozen map and its cost.

    One Gaussian mechanism on the sum of ``a aᵀ`` over rows scaled to unit length ("Analyze Gauss", algorithm 1): a
    record moves the sum by at most 1 in the Frobenius norm when it comes or goes, by √2 when it is replaced. The
    directions are those of the noisy sum; the map itself applies to rows of any length.

    Args:
        features_ND: a row of each record, and no record in two rows.
        dims: F, how many directions are kept, at most D.
        sigma: standard deviation of the noise; the sum's scale is N, its noise per direction about ``sigma * √D``.
        noise: draws it.
        centre_D: a **public** point to measure from, such as the mean of public features; the origin by default.

    Returns:
        The map [B, D] to [B, ``dims``], and the event to enter into the ledger before the map is used.

    Raises:
        ConfigError: the features are no matrix of finite numbers, ``dims`` is above D, or ``sigma`` is not positive.
    """
    _refuse_features(features_ND, dims, features_ND.shape[-1] if features_ND.ndim else 0)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"sigma is {sigma}: without noise the directions are the data's; give a positive one")
    size = features_ND.shape[1]
    centre = torch.zeros(size, dtype=torch.float64) if centre_D is None else centre_D.detach().to("cpu", torch.float64)
    unit_ND = unit_rows(features_ND.detach().to("cpu", torch.float64) - centre)
    above = torch.triu_indices(size, size)
    # Off the diagonal an entry stands twice in the Frobenius norm, but is released once.
    scale_V = torch.where(above[0] == above[1], 1.0, math.sqrt(2)).to(torch.float64)
    released_V = noise.added_to((unit_ND.T @ unit_ND)[*above] * scale_V, sigma) / scale_V
    noisy_DD = torch.zeros(size, size, dtype=torch.float64)
    noisy_DD[*above] = released_V
    noisy_DD[*above.flip(0)] = released_V
    matrix_FD = torch.linalg.eigh(noisy_DD).eigenvectors.flip(1)[:, :dims].T
    event = Gaussian(sensitivity=1.0, sensitivity_replace=math.sqrt(2), noise=sigma)
    return frozen(_Projection(centre, matrix_FD)), event


def _refuse_features(features_ND: Tensor, dims: int, most: int) -> None:
    if features_ND.ndim != 2 or not features_ND.is_floating_point():  # noqa: PLR2004 -- a matrix has two dimensions
        raise ConfigError(f"features to fit on are a float matrix [N, D], not {_kind(features_ND)}")
    if not bool(torch.isfinite(features_ND).all()):
        raise ConfigError("the features to fit on hold NaN or infinity: leave those rows out")
    if not 1 <= dims <= most:
        raise ConfigError(f"{dims} directions of features {list(features_ND.shape)}: ask for 1 to {most}")
