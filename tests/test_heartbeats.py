"""Synthetic beats that repeat, patients that differ, and real beats read from files that may be anything."""

from __future__ import annotations

import re
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from client_side.cutting import cut
from client_side.fronts import front_digest
from cloister import heartbeats
from cloister.heartbeats import Heartbeats, Split, load_mitbih, model, public_front
from wire.errors import ConfigError


@cache
def _synthetic(split: Split = "train", count: int = 32, seed: int = 0) -> Heartbeats:
    return heartbeats.synthetic(split, count, seed)


# --- Synthetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_synthetic_beats_look_like_decimated_ones_of_mitbih(split: Split) -> None:
    made = _synthetic(split)

    assert made.beats.dtype is torch.float32
    assert made.beats.shape == (len(made.labels), 1, 128)
    assert torch.allclose(made.beats.mean(2), torch.zeros(1), atol=1e-5)
    assert torch.allclose(made.beats.std(2, correction=0), torch.ones(1), atol=1e-4)
    assert made.labels.dtype is made.patients.dtype is torch.int64
    assert torch.bincount(made.labels, minlength=5).min() > 50


def test_the_same_seed_gives_the_same_beats_and_another_seed_other_patients() -> None:
    again, other = heartbeats.synthetic("test", 32), heartbeats.synthetic("test", 32, seed=1)

    assert torch.equal(again.beats, _synthetic("test").beats)
    assert torch.equal(again.labels, _synthetic("test").labels)
    assert not torch.equal(other.beats[:50], again.beats[:50])


def test_no_patient_is_in_both_splits_and_none_depends_on_how_many_others_there_are() -> None:
    train, test, more = _synthetic("train"), _synthetic("test"), _synthetic("train", 48)
    first = train.patients == train.patients[0]

    assert not set(train.patients.tolist()) & set(test.patients.tolist())
    assert len(set(train.patients.tolist()) | set(test.patients.tolist())) == 32
    assert torch.equal(more.beats[more.patients == train.patients[0]], train.beats[first])


def test_patients_have_unequal_numbers_of_beats_and_unequal_mixes_of_classes() -> None:
    made = _synthetic("train")
    mixes = torch.stack(
        [torch.bincount(made.labels[made.patients == patient], minlength=5) for patient in made.patients.unique()]
    ).double()

    numbers = mixes.sum(1)
    shares = mixes / numbers[:, None]

    assert numbers.max() > 3 * numbers.min()
    assert shares[:, 4].max() > 0.25
    assert shares[:, 4].min() < 0.02
    assert ((mixes[:, :3] > 0).sum(1) == 1).all()  # one way of conduction each


def test_loading_gives_beats_and_labels_and_the_patients_in_the_same_order() -> None:
    beats, labels = heartbeats.load("test", 32).tensors

    assert torch.equal(beats, _synthetic("test").beats)
    assert torch.equal(labels, _synthetic("test").labels)
    assert torch.equal(heartbeats.patients("test", 32), _synthetic("test").patients)


def test_the_beats_of_one_patient_are_more_alike_than_those_of_one_class() -> None:
    made = _synthetic("train")
    normal = made.labels == 0
    beats, patients = made.beats[normal, 0], made.patients[normal]
    within = torch.stack([beats[patients == patient].var(0).sum() for patient in patients.unique()]).mean()

    assert within < 0.8 * beats.var(0).sum()


def test_a_linear_rule_finds_most_classes_of_unknown_patients_and_not_all() -> None:
    train, test = _synthetic("train"), _synthetic("test")

    rule = LinearDiscriminantAnalysis().fit(train.beats[:, 0].numpy(), train.labels.numpy())
    right = (rule.predict(test.beats[:, 0].numpy()) == test.labels.numpy()).mean()

    assert 0.6 < right < 0.97


def test_too_few_patients_for_two_splits_are_refused() -> None:
    with pytest.raises(ConfigError, match="15 patients do not fill both splits with every class: ask for 16"):
        heartbeats.synthetic("train", 15)


# --- Loaders and networks ---------------------------------------------------------------------------------------------


def test_loaders_repeat_their_order_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()

    first, again = (next(iter(heartbeats.train_loader(seed=3))) for _ in range(2))
    next(iter(heartbeats.test_loader(seed=3)))

    assert torch.equal(first[0], again[0])
    assert first[0].shape == (64, 1, 128)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("front", ["conv", "pca", "scattering"])
def test_every_network_can_be_cut_between_stem_and_head(front: Any) -> None:
    torch.manual_seed(0)
    network = model(front)
    beats = _synthetic("test").beats[:4]

    parts = cut(network, front="stem", head="head", example=beats)
    smashed, _ = parts.split_outputs(parts.front(beats))
    network.eval()

    assert network(beats).shape == (4, 5)
    assert all(name.startswith("body.") for name in parts.middle_state())
    assert len(smashed) == 1
    assert any(p.requires_grad for p in network.get_submodule("stem").parameters()) == (front == "conv")


@pytest.mark.parametrize("kind", ["pca", "scattering"])
def test_a_public_front_is_the_same_each_time_and_makes_flat_rows(kind: Any) -> None:
    fronts = [public_front(kind, dims=8) for _ in range(2)]

    assert front_digest(fronts[0]) == front_digest(fronts[1])
    assert fronts[0](torch.randn(3, 1, 128)).shape == (3, 8)
    assert not fronts[0].train().training


def test_T10_a_public_front_is_fitted_on_patients_that_no_seed_up_to_its_own_gives() -> None:
    public = heartbeats.synthetic("train", 16, heartbeats._PUBLIC_SEED)
    known = {beat.numpy().tobytes() for beat in _synthetic("train").beats}

    assert not known & {beat.numpy().tobytes() for beat in public.beats}


def test_a_network_learns_the_classes_of_unknown_patients() -> None:
    torch.manual_seed(0)
    network = model("pca")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    test = _synthetic("test")

    for beats, labels in heartbeats.train_loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(beats), labels).backward()
        optimizer.step()
    right = (network(test.beats).argmax(1) == test.labels).double().mean()

    assert right > 0.75


def test_five_epochs_reach_what_the_module_says_on_unknown_patients() -> None:
    torch.manual_seed(0)
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loader, test = heartbeats.train_loader(), heartbeats.synthetic("test")

    for _ in range(5):
        for beats, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(beats), labels).backward()
            optimizer.step()
    with torch.no_grad():
        right = (network.eval()(test.beats).argmax(1) == test.labels).double().mean()

    low, high = map(float, re.findall(r"0\.\d+", str(heartbeats.__doc__))[-3:-1])
    assert low - 0.01 < right < high + 0.01


# --- MIT-BIH ----------------------------------------------------------------------------------------------------------


def _arrays(rows: int = 40) -> dict[str, Any]:
    """What a file of MIT-BIH's beats holds; records 101 and 100 are of different splits, 201 and 202 of one patient."""
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for side in ("train", "test"):
        made[f"x_{side}"] = rng.standard_normal((rows, 1, 128)).astype(np.float32)
        made[f"y_{side}"] = rng.integers(0, 5, rows)
        made[f"rec_{side}"] = rng.choice([100, 101, 102, 201, 202], rows)
    return made


def _written(arrays: dict[str, Any], folder: Path) -> Path:
    np.savez(folder / "beats.npz", **arrays)
    return folder / "beats.npz"


def test_split_by_record_no_patient_is_on_both_sides_and_paced_records_are_left_out(tmp_path: Path) -> None:
    arrays = _arrays()
    path = _written(arrays, tmp_path)

    train, test = load_mitbih(path, "train"), load_mitbih(path, "test")

    assert set(train.patients.tolist()) == {101, 201}
    assert set(test.patients.tolist()) == {100}
    records = np.concatenate([arrays["rec_train"], arrays["rec_test"]])
    assert len(train.labels) == np.isin(records, [101, 201, 202]).sum()
    assert len(test.labels) == (records == 100).sum()


def test_the_records_of_both_sides_are_those_of_the_paper_but_for_one_patient() -> None:
    train, test = set(heartbeats._TRAIN_RECORDS), set(heartbeats._TEST_RECORDS)

    assert (len(train), len(test)) == (23, 21)
    assert not train & test
    assert not (train | test) & {102, 104, 107, 217}
    assert {201, 202} <= train


def test_split_by_beat_the_files_own_split_stands(tmp_path: Path) -> None:
    arrays = _arrays()
    path = _written(arrays, tmp_path)

    test = load_mitbih(path, "test", split_by="beat")

    assert np.array_equal(test.beats.numpy(), arrays["x_test"])
    assert np.array_equal(test.labels.numpy(), arrays["y_test"])
    assert set(test.patients.tolist()) == {100, 101, 102, 201}


def test_a_job_file_names_the_file_and_trains_on_its_beats(tmp_path: Path) -> None:
    path = str(_written(_arrays(), tmp_path))

    beats, labels = next(iter(heartbeats.train_loader(mitbih=path, split_by="beat")))

    assert beats.shape == (40, 1, 128)
    assert labels.shape == (40,)
    assert len(next(iter(heartbeats.test_loader(mitbih=path)))[0]) == len(load_mitbih(path, "test").labels)


def _without(arrays: dict[str, Any]) -> None:
    del arrays["rec_test"]


def _objects(arrays: dict[str, Any]) -> None:
    arrays["y_train"] = np.array([{}] * 40, dtype=object)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_without, r"rec_test must be int64 \['N'\], N alike; the file lacks it"),
        (_objects, "is no .npz file of numbers"),
        (lambda a: a.update(x_train=a["x_train"][:, 0]), r"x_train must be float32 .*has float32 \[40, 128\]"),
        (lambda a: a.update(x_train=a["x_train"][:39]), r"x_train must be float32 .*has float32 \[39, 1, 128\]"),
        (lambda a: a.update(x_train=a["x_train"].astype(np.float64)), "has float64"),
        (lambda a: a.update(y_test=a["y_test"].astype(np.float32)), r"y_test must be int64 .*has float32 \[40\]"),
        (lambda a: a.update(y_test=np.int64(3)), r"must be .*has"),
        (lambda a: a["y_test"].__setitem__(0, 5), "or y_test more than 0 to 4"),
        (lambda a: a["y_train"].__setitem__(0, -1), "or y_train more than 0 to 4"),
        (lambda a: a["x_test"].__setitem__((0, 0, 0), np.nan), "x_test holds NaN or infinity"),
        (lambda a: [a[f"rec_{side}"].fill(102) for side in ("train", "test")], "holds none of the records 101, 106"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_in_words(tmp_path: Path, change: Any, complaint: str) -> None:
    arrays = _arrays()
    change(arrays)

    with pytest.raises(ConfigError, match=complaint):
        load_mitbih(_written(arrays, tmp_path), "train")


def test_what_is_no_archive_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("beats")

    with pytest.raises(ConfigError, match=r"text\.npz is no \.npz file of numbers"):
        load_mitbih(tmp_path / "text.npz", "train")
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.npz: No such file"):
        load_mitbih(tmp_path / "missing.npz", "train")


def test_T02_an_archive_that_unpacks_to_more_than_any_such_file_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", bytes(2**20))
    monkeypatch.setattr(heartbeats, "_MAX_MITBIH_BYTES", 2**20 - 1)

    with pytest.raises(ConfigError, match="unpacks to 1048576 bytes, more than"):
        load_mitbih(tmp_path / "bomb.npz", "train")


def test_T02_an_array_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 1, 128), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)

    with pytest.raises(ConfigError, match=r"liar\.npz is no \.npz file of numbers"):
        load_mitbih(tmp_path / "liar.npz", "train")
