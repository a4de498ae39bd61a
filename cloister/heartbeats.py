"""Single heart beats in five classes, synthetic or real, with the patient that each comes from.

The synthetic ones run everywhere and are nobody's. A beat is a sum of Gaussian waves (McSharry, Clifford, Tarassenko
and Smith 2003, "A dynamical model for generating synthetic electrocardiogram signals"), with the shapes that textbooks
give for the classes:

= =================================== ==================================================================================
N normal                              P, a narrow QRS, T
L left bundle branch block            P, a wide and notched R, T against it
R right bundle branch block           P, a narrow R and a wide, slurred S
A atrial premature                    early: the T before it is in sight, its P small, inverted, or lost in that T
V premature ventricular contraction   early, no P, a wide QRS up or down, T against it
= =================================== ==================================================================================

Every patient has amplitudes, widths, delays, noise and baseline wander of one's own, up to two sites from which V beats
come, one way of conduction (N, L or R), and more or fewer beats, A and V among them: so a record is easily told by its
patient, and the patient is the unit that privacy should count by. Both splits hold different patients.

The real ones are those of the MIT-BIH Arrhythmia Database (Moody and Mark 2001), given as a file: :func:`load_mitbih`.

The cut to use is ``front="stem", head="head"``. On the 48 patients of :func:`synthetic`, five epochs in batches of 64
with ``AdamW(lr=1e-3)`` bring the network of :func:`model` to an accuracy of 0.89 to 0.90 (initial weights from seeds 0
to 2) on the patients that it was not trained on; the commonest class alone would give 0.39.

Shapes: ``B`` batch, ``N`` beats, ``W`` waves of a beat, ``T`` samples of a beat, ``F`` features, ``K`` classes.
"""

from __future__ import annotations

import functools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from client_side.fronts import UnitRows, frozen, projection, scattering_1d
from wire.errors import ConfigError

__all__ = [
    "CLASSES",
    "LENGTH",
    "Heartbeats",
    "load",
    "load_mitbih",
    "model",
    "patients",
    "public_front",
    "synthetic",
    "test_loader",
    "train_loader",
    "train_units",
]

#: The classes by their label, as MIT-BIH's annotations call them.
CLASSES: Final = "NLRAV"
LENGTH: Final = 128  # samples of a beat, the R peak in the middle

_RATE: Final = 180  # samples a second: MIT-BIH's 360, every second one
_N, _L, _R, _A, _V = range(len(CLASSES))

Split = Literal["train", "test"]
SplitBy = Literal["record", "beat"]
_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """Beats, and whose they are.

    Attributes:
        beats: float32 [N, 1, 128], each of mean 0 and variance 1, the R peak in the middle.
        labels: int64 [N], an index into :data:`CLASSES`.
        patients: int64 [N], the unit of privacy: all beats of one patient have the same number.
    """

    beats: Tensor
    labels: Tensor
    patients: Tensor


# --- Synthetic beats --------------------------------------------------------------------------------------------------

# Waves as (amplitude in mV, seconds after the R peak, width in seconds): P, Q, R, S, a second R or slur, T.
_SHAPES: Final[dict[int, tuple[tuple[float, float, float], ...]]] = {
    _N: ((0.12, -0.17, 0.022), (-0.1, -0.03, 0.009), (1.1, 0.0, 0.012), (-0.2, 0.03, 0.011), (0.0, 0.05, 0.02), (0.25, 0.25, 0.045)),  # noqa: E501 -- a table
    _L: ((0.12, -0.19, 0.024), (0.0, -0.04, 0.01), (0.9, 0.0, 0.026), (-0.1, 0.08, 0.02), (0.55, -0.045, 0.022), (-0.3, 0.27, 0.055)),  # noqa: E501 -- a table
    _R: ((0.12, -0.17, 0.022), (-0.08, -0.03, 0.009), (1.0, 0.0, 0.013), (-0.45, 0.045, 0.022), (-0.25, 0.085, 0.026), (0.25, 0.27, 0.045)),  # noqa: E501 -- a table
    _V: ((0.0, -0.17, 0.022), (-0.15, -0.07, 0.02), (1.3, 0.0, 0.036), (-0.6, 0.1, 0.04), (0.2, -0.05, 0.03), (-0.4, 0.26, 0.06)),  # noqa: E501 -- a table
}  # fmt: skip
_P, _T = 0, 5
_CONDUCTION: Final = (_N, _L, _N, _R)  # patients take turns
_FOLDS: Final = 4  # of four turns, the last goes into the test split
_LEAST_PATIENTS: Final = len(_CONDUCTION) * _FOLDS
_BEATS: Final = (200, 0.5, 60, 600)  # of a patient: median, spread of the logarithm, least, most


def synthetic(split: Split, count: int = 48, seed: int = 0, *, most: int = _BEATS[3]) -> Heartbeats:
    """Beats of invented patients.

    Args:
        split: three quarters of the patients to train on, or the others.
        count: of patients in both splits together, at least 16, so that each split has every way of conduction. A
            patient's beats do not depend on how many others there are.
        seed: another one gives other patients.
        most: beats of one patient at most.

    Raises:
        ConfigError: too few patients.
    """
    if count < _LEAST_PATIENTS:
        raise ConfigError(f"{count} patients do not fill both splits with every class: ask for {_LEAST_PATIENTS}")
    made = [_patient(seed, number, most) for number in range(count) if _split_of(number) == split]
    return Heartbeats(
        torch.from_numpy(np.concatenate([beats for beats, _, _ in made]).astype(np.float32)).unsqueeze(1),
        torch.from_numpy(np.concatenate([labels for _, labels, _ in made])),
        torch.from_numpy(np.concatenate([np.full(len(labels), number) for _, labels, number in made])),
    )


def load(split: Split, count: int = 48, seed: int = 0, *, most: int = _BEATS[3]) -> TensorDataset:
    """The beats float32 [N, 1, 128] and labels int64 [N] of :func:`synthetic`."""
    made = synthetic(split, count, seed, most=most)
    return TensorDataset(made.beats, made.labels)


def patients(split: Split, count: int = 48, seed: int = 0, *, most: int = _BEATS[3]) -> Tensor:
    """Whose the beats of :func:`load` are, in the same order: int64 [N]."""
    return synthetic(split, count, seed, most=most).patients


def _split_of(number: int) -> Split:
    return "test" if number // len(_CONDUCTION) % _FOLDS == _FOLDS - 1 else "train"


def _patient(seed: int, number: int, most: int) -> tuple[_Array, NDArray[np.int64], int]:
    rng = default_rng(SeedSequence(seed, spawn_key=(number,)))
    conduction = _CONDUCTION[number % len(_CONDUCTION)]
    median, spread, least, largest = _BEATS
    count = min(most, int(np.clip(median * np.exp(spread * rng.standard_normal()), least, largest)))
    early, ectopic = rng.beta(0.5, 4), rng.beta(0.7, 3)  # shares of A and V beats: most patients have few
    labels_N = rng.choice([conduction, _A, _V], count, p=[(1 - ectopic) * (1 - early), (1 - ectopic) * early, ectopic])
    waves_NW3 = _waves(rng, labels_N, conduction)
    times_T = (np.arange(LENGTH) - LENGTH // 2) / _RATE
    signal_NT = _drawn(waves_NW3, times_T) + _disturbance(rng, count, times_T)
    centred_NT = signal_NT - signal_NT.mean(1, keepdims=True)
    return centred_NT / centred_NT.std(1, keepdims=True), labels_N.astype(np.int64), number


def _waves(rng: Generator, labels_N: NDArray[np.int64], conduction: int) -> _Array:
    """The waves of each beat [N, W, 3]: those of its class, as this patient has them, and the T of the beat before."""
    usual_W3 = _varied(rng, np.array(_SHAPES[conduction]), 0.35, 0.15, 0.012)
    habits_HW3 = np.stack([usual_W3, _early(rng, usual_W3), _focus(rng), _focus(rng)])
    site_N = rng.integers(2, 4, size=len(labels_N))
    habit_N = np.select([labels_N == _A, labels_N == _V], [1, site_N], 0)
    waves_NW3 = _varied(rng, habits_HW3[habit_N], 0.08, 0.05, 0.003)
    return np.concatenate([waves_NW3, _previous(rng, labels_N, usual_W3[_T])], axis=1)


def _focus(rng: Generator) -> _Array:
    """A ventricular site: its beats point up or down, and are wide to its own degree."""
    shape_W3 = _varied(rng, np.array(_SHAPES[_V]), 0.4, 0.2, 0.012)
    shape_W3[:, 0] *= rng.choice([1, 1, -1])
    return shape_W3


def _early(rng: Generator, usual_W3: _Array) -> _Array:
    """The patient's usual beat with the P of another atrial site."""
    shape_W3 = usual_W3.copy()
    shape_W3[_P] = _varied(rng, shape_W3[_P], 0.3, 0.15, 0.02) * [rng.choice([-1.0, 0.4, 1.0]), 1, 1]
    return shape_W3


def _varied(rng: Generator, shape: _Array, amplitude: float, width: float, delay: float) -> _Array:
    """``shape`` [..., 3] with lognormal amplitudes and widths, and delays in seconds; R stays in the middle."""
    drawn = rng.standard_normal(shape.shape)
    moved = shape[..., 1] + delay * drawn[..., 1] * (shape[..., 1] != 0)
    return np.stack(
        [shape[..., 0] * np.exp(amplitude * drawn[..., 0]), moved, shape[..., 2] * np.exp(width * drawn[..., 2])], -1
    )


def _previous(rng: Generator, labels_N: NDArray[np.int64], t_wave: _Array) -> _Array:
    """The T wave of the beat before [N, 1, 3]; in sight where this one came early."""
    usual, coupling = rng.uniform(0.65, 1.0), rng.uniform(0.4, 0.58, size=2)  # seconds from beat to beat
    interval_N = np.select([labels_N == _A, labels_N == _V], [coupling[0], coupling[1]], usual)
    interval_N = interval_N * np.exp(0.04 * rng.standard_normal(len(labels_N)))
    return np.stack(np.broadcast_arrays(t_wave[0], t_wave[1] - interval_N, t_wave[2]), -1)[:, None]


def _drawn(waves_NW3: _Array, times_T: _Array) -> _Array:
    amplitude, centre, width = (waves_NW3[..., part, None] for part in range(3))
    total_NT: _Array = (amplitude * np.exp(-0.5 * ((times_T - centre) / width) ** 2)).sum(1)
    return total_NT


def _disturbance(rng: Generator, count: int, times_T: _Array) -> _Array:
    """What breathing, muscles and electrodes add, as strong as this patient's are."""
    wander, noise = np.array([0.06, 0.015]) * np.exp(0.6 * rng.standard_normal(2))
    slope_N2 = wander * rng.standard_normal((count, 2))
    hertz_N, phase_N = rng.uniform(0.3, 1.5, count), rng.uniform(0, 2 * np.pi, count)
    swing_NT = slope_N2[:, :1] * np.sin(2 * np.pi * hertz_N[:, None] * times_T + phase_N[:, None])
    total_NT: _Array = swing_NT + slope_N2[:, 1:] * times_T + noise * rng.standard_normal((count, len(times_T)))
    return total_NT


# --- MIT-BIH ----------------------------------------------------------------------------------------------------------

# DS1 and DS2 of de Chazal, O'Dwyer and Reilly 2004, "Automatic classification of heartbeats using ECG morphology and
# heartbeat interval features": both hold all five classes. The four records with pacemakers (102, 104, 107, 217) are
# left out, as there. One difference: 201 and 202 are of the same man, so 202 goes to training, and both are one unit.
_TRAIN_RECORDS: Final = (
    101, 106, 108, 109, 112, 114, 115, 116, 118, 119, 122, 124,
    201, 202, 203, 205, 207, 208, 209, 215, 220, 223, 230,
)  # fmt: skip
_TEST_RECORDS: Final = (
    100, 103, 105, 111, 113, 117, 121, 123, 200, 210, 212, 213, 214, 219, 221, 222, 228, 231, 232, 233, 234,
)  # fmt: skip
_SAME_PATIENT: Final = (201, 202)
_MAX_MITBIH_BYTES: Final = 2**30  # unpacked; all 110,000 beats of the database would take 60 MB


def load_mitbih(path: Path | str, split: Split, *, split_by: SplitBy = "record") -> Heartbeats:
    """Beats of the MIT-BIH Arrhythmia Database, its records as patients.

    Args:
        path: an ``.npz`` of ``x_train`` float32 [N, 1, 128], ``y_train`` int64 [N] in 0 to 4 (:data:`CLASSES`),
            ``rec_train`` int64 [N], the number of the record, and the same for ``_test``.
        split: which side.
        split_by: ``record``: no patient is on both sides, as in use; whatever the file's own split is, the records
            divide as in de Chazal 2004, without the four of pacemakers. ``beat``: the file's own split, in which
            every patient may be on both sides; many papers report this, and it flatters.

    Raises:
        ConfigError: the file cannot be read, or holds something else; says what.
    """
    arrays = _arrays(Path(path))
    sides = [_checked(arrays, side, Path(path)) for side in ("train", "test")]
    if split_by == "beat":
        return sides[("train", "test").index(split)]
    whole = Heartbeats(*(torch.cat(parts) for parts in zip(*map(_parts, sides), strict=True)))
    records = _TRAIN_RECORDS if split == "train" else _TEST_RECORDS
    rows = torch.isin(whole.patients, torch.tensor(records))
    if not rows.any():
        raise ConfigError(f"{path} holds none of the records {', '.join(map(str, records))}: split it by beat")
    return Heartbeats(*(part[rows] for part in _parts(whole)))


def _parts(beats: Heartbeats) -> tuple[Tensor, Tensor, Tensor]:
    return beats.beats, beats.labels, beats.patients


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MAX_MITBIH_BYTES:
            raise ConfigError(f"{path} unpacks to {size} bytes, more than the {_MAX_MITBIH_BYTES} of any such file")
        with np.load(path, allow_pickle=False) as archive_of_arrays:
            return {name: archive_of_arrays[name] for name in archive_of_arrays.files}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, TypeError, NotImplementedError, MemoryError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no .npz file of numbers ({error}): write it with numpy.savez") from error


def _checked(arrays: dict[str, NDArray[np.generic]], side: str, path: Path) -> Heartbeats:
    kinds = {"x": (np.float32, (1, LENGTH)), "y": (np.int64, ()), "rec": (np.int64, ())}
    rows = len(arrays[f"y_{side}"]) if f"y_{side}" in arrays and arrays[f"y_{side}"].ndim else 0
    found = []
    for kind, (dtype, shape) in kinds.items():
        array = arrays.get(f"{kind}_{side}")
        if array is None or array.dtype != dtype or array.shape != (rows, *shape) or not rows:
            said = "lacks it" if array is None else f"has {array.dtype} {list(array.shape)}"
            wanted = ["N", *shape]
            raise ConfigError(f"{path}: {kind}_{side} must be {np.dtype(dtype)} {wanted}, N alike; the file {said}")
        found.append(torch.from_numpy(array.copy()))
    beats, labels, records = found
    if not bool(torch.isfinite(beats).all()) or not bool(((labels >= 0) & (labels < len(CLASSES))).all()):
        raise ConfigError(f"{path}: x_{side} holds NaN or infinity, or y_{side} more than 0 to {len(CLASSES) - 1}")
    return Heartbeats(beats, labels, torch.where(records == _SAME_PATIENT[1], _SAME_PATIENT[0], records))


# --- For job files ----------------------------------------------------------------------------------------------------


def train_loader(
    batch_size: int = 64,
    seed: int = 0,
    *,
    mitbih: str | None = None,
    split_by: SplitBy = "record",
    count: int = 48,
    most: int = _BEATS[3],
) -> DataLoader[tuple[Tensor, ...]]:
    """The training split in batches, shuffled anew each epoch: that of the file ``mitbih``, or of invented patients.

    Args:
        batch_size: beats in a batch.
        seed: of the order, and of the patients.
        mitbih: see :func:`load_mitbih`.
        split_by: the same.
        count: of invented patients; see :func:`synthetic`.
        most: beats of each of them.
    """
    made = _beats("train", seed, mitbih=mitbih, split_by=split_by, count=count, most=most)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(made.beats, made.labels), batch_size, shuffle=True, generator=generator)


def test_loader(  # a loader of the test split, not a test
    batch_size: int = 256,  # noqa: PT028
    seed: int = 0,  # noqa: PT028
    *,
    mitbih: str | None = None,  # noqa: PT028
    split_by: SplitBy = "record",  # noqa: PT028
    count: int = 48,  # noqa: PT028
    most: int = _BEATS[3],  # noqa: PT028
) -> DataLoader[tuple[Tensor, ...]]:
    """The test split in batches, in a fixed order; arguments as for :func:`train_loader`."""
    made = _beats("test", seed, mitbih=mitbih, split_by=split_by, count=count, most=most)
    # Its own generator, so that evaluating draws nothing from torch's global one (see cloister.digits).
    return DataLoader(TensorDataset(made.beats, made.labels), batch_size, generator=torch.Generator().manual_seed(seed))


def train_units(
    batch_size: int = 64,  # noqa: ARG001 - a job's data.args go to all of its functions
    seed: int = 0,
    *,
    mitbih: str | None = None,
    split_by: SplitBy = "record",
    count: int = 48,
    most: int = _BEATS[3],
) -> Tensor:
    """Whose each beat of :func:`train_loader` is, in the data set's order: for ``privacy.units``."""
    return _beats("train", seed, mitbih=mitbih, split_by=split_by, count=count, most=most).patients


@functools.lru_cache(maxsize=2)  # a job asks for the beats, and then for whose they are
def _beats(split: Split, seed: int, *, mitbih: str | None, split_by: SplitBy, count: int, most: int) -> Heartbeats:
    if mitbih is None:
        return synthetic(split, count, seed, most=most)
    return load_mitbih(mitbih, split, split_by=split_by)


# --- Networks ---------------------------------------------------------------------------------------------------------

_WIDTH: Final = 128
_PUBLIC_SEED: Final = 2**31  # its patients stand for a public data set: no other seed gives them
_PUBLIC_PATIENTS: Final = 64
_PUBLIC_STEP: Final = 4  # some 3,000 beats fix the components as well as 12,000 do


def public_front(kind: Literal["pca", "scattering"] = "pca", dims: int = 32, whiten: float = 0.25) -> nn.Module:
    """A frozen front [B, 1, 128] to [B, ``dims``] that never saw the data: fitted on synthetic beats of other patients.

    For synthetic data this is optimistic, since the public beats come from the same generator; for real data it is what
    an owner without public data can have.

    Args:
        kind: principal components of the beats themselves, which the R peak aligns, or of their scattering transform.
        dims: F, how many components.
        whiten: see :func:`client_side.fronts.projection`.
    """
    beats_BCT = synthetic("train", _PUBLIC_PATIENTS, _PUBLIC_SEED).beats[::_PUBLIC_STEP]
    first = scattering_1d(LENGTH, J=3, Q=1) if kind == "scattering" else nn.Flatten()
    return frozen(nn.Sequential(first, projection(first(beats_BCT), dims, whiten=whiten)))


def model(front: Literal["conv", "pca", "scattering"] = "conv") -> nn.Module:
    """A network [B, 1, 128] to [B, 5] of ``stem``, ``body`` and ``head``, freshly initialised.

    The weights come from torch's global generator: call ``torch.manual_seed`` first.

    Args:
        front: what ``stem`` is: ``conv`` trains with the rest; ``pca`` and ``scattering`` are frozen, as the private
            releases need it (:func:`public_front`).
    """
    head = nn.Linear(_WIDTH, len(CLASSES))
    if front == "conv":
        stem = nn.Sequential(*_conv(1, 16), nn.MaxPool1d(4))
        body = nn.Sequential(*_conv(16, 32), nn.MaxPool1d(2), *_conv(32, 64), nn.MaxPool1d(2), nn.Flatten())
        return nn.Sequential(OrderedDict(stem=stem, body=body.extend(_dense(64 * LENGTH // 16)), head=head))
    public = nn.Sequential(public_front(front), UnitRows())
    dims = public(torch.zeros(1, 1, LENGTH)).shape[1]
    body = nn.Sequential(*_dense(dims), *_dense(_WIDTH))
    return nn.Sequential(OrderedDict(stem=public, body=body, head=head))


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv1d(inputs, outputs, 7, padding=3, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()


def _dense(inputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, _WIDTH), nn.ReLU()
