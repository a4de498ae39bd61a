"""The slower attacks on a cut, and the time that they take."""

from __future__ import annotations

import time
from typing import Final

import pytest
import torch
from torch import Tensor, nn

from cloister import digits
from privacy.leakage import (
    Attack,
    Bench,
    CutLeakage,
    Outcome,
    Parts,
    Settings,
    audit,
    audit_cut,
    decoding,
    hijack,
    inversion,
    pseudo,
)
from privacy.leakage.deadline import Deadline, descend
from privacy.leakage.victim import Victim, reinitialised
from tests import leakage_audits
from tests.leakage_audits import parts_of

PSEUDO_STEPS: Final = 200
FSHA_STEPS: Final = 400
# pytest finds a file's fixtures by their names in it.
_few_steps, scans, bench = leakage_audits.few_steps, leakage_audits.scans, leakage_audits.bench


# --- The slower attacks -----------------------------------------------------------------------------------------------


def trained() -> Parts:
    """A small convolutional network after 200 steps of training: what a node sees late in a run."""
    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    middle = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU()
    )
    head = nn.Linear(32, 10)
    whole = nn.Sequential(front, middle, head)
    images, labels = digits.load("train").tensors
    optimizer = torch.optim.Adam(whole.parameters(), lr=3e-3)
    for rows in torch.randint(len(images), (200, 64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(images[rows]), labels[rows]).backward()
        optimizer.step()
    return Parts(front, middle, head)


def attack_of(found: CutLeakage, name: str) -> Attack:
    return next(attack for attack in found.attacks if attack.name == name)


def test_T12_a_front_that_trains_is_hijacked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    monkeypatch.setattr("privacy.leakage.networks._WIDTH", 8)
    monkeypatch.setattr(hijack, "_WIDTH", 8)
    monkeypatch.setattr(hijack, "_ALONE", 100)
    monkeypatch.setattr(hijack, "_STEPS", FSHA_STEPS)

    tried = hijack.hijack(Victim(Parts(front), bench.known), bench, None, Deadline(300))

    assert tried.note == f"{FSHA_STEPS:,} hijacked steps"
    assert tried.guessed is not None
    assert bench.beats_mean(tried.guessed)


def test_T12_a_frozen_front_gives_a_hijacker_and_an_imitator_no_channel(scans: tuple[Tensor, Tensor]) -> None:
    frozen = parts_of(digits.model)
    frozen.front.requires_grad_(False)

    found = audit_cut("stem", frozen, Bench(*scans, Settings(seconds=0.3, rows=100, deep=True)))

    assert not found.front_trains
    assert attack_of(found, "FSHA").outcome is Outcome.NO_CHANNEL
    assert attack_of(found, "pseudo-client").outcome is Outcome.NO_CHANNEL


def test_T10_a_pseudo_client_reads_labels_that_the_u_shape_was_to_hide_and_reconstructs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.leakage.networks._WIDTH", 8)
    monkeypatch.setattr(decoding, "_FEWEST_STEPS", 150)
    monkeypatch.setattr(pseudo, "_STEPS", PSEUDO_STEPS)

    tried = pseudo.imitate(Victim(trained(), bench.known), bench, None, Deadline(300))

    assert tried.labels is not None
    assert tried.labels > 0.7
    assert tried.guessed is not None
    assert bench.beats_mean(tried.guessed)


def test_known_weights_are_inverted_without_any_data(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    front = nn.Conv2d(1, 8, 3, padding=1).requires_grad_(False)
    monkeypatch.setattr(inversion, "_TURNS", 12)

    tried = inversion.invert(Victim(Parts(front), bench.known), bench, None, Deadline(300))

    assert tried.guessed is not None
    assert bench.beats_mean(tried.guessed)
    assert bench.score(tried.guessed).similarity > 0.8


def test_an_audit_changes_neither_model_nor_data_nor_the_callers_draws(scans: tuple[Tensor, Tensor]) -> None:
    parts = parts_of(digits.model)
    before = {name: tensor.clone() for name, tensor in parts.front.state_dict().items()}
    images = scans[0].clone()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)

    audit_cut("stem", parts, Bench(*scans, Settings(seconds=0.3, rows=100, deep=True)))

    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.front.state_dict().items())
    assert parts.front.training
    assert all(p.requires_grad and p.grad is None for p in parts.front.parameters())
    assert torch.equal(scans[0], images)


def test_an_attacker_who_knows_the_architecture_alone_has_other_weights() -> None:
    front = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    fresh = reinitialised(front, torch.Generator().manual_seed(0))

    assert fresh.state_dict().keys() == front.state_dict().keys()
    assert not torch.equal(fresh.get_parameter("0.weight"), front.get_parameter("0.weight"))


# --- Time -------------------------------------------------------------------------------------------------------------


def test_each_attack_keeps_to_its_time(scans: tuple[Tensor, Tensor]) -> None:
    settings = Settings(seconds=0.5, rows=1400, deep=True)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))

    found = audit_cut("wide", Parts(wide), Bench(*scans, settings))

    # A step, a fit in closed form and the reading of all records come on top.
    assert {attack.name: attack.seconds for attack in found.attacks if attack.seconds > settings.seconds + 10} == {}


def test_a_descent_stops_when_its_time_is_over_and_its_rate_comes_down_by_then() -> None:
    x = torch.ones(1, requires_grad=True)

    def slow(step: int) -> Tensor:
        del step
        time.sleep(0.01)
        return x.square().sum()

    began = time.monotonic()
    steps = descend(slow, [x], steps=10_000, rate=0.1, deadline=Deadline(0.4))

    assert time.monotonic() - began < 5
    assert 5 <= steps <= 40


def test_the_same_seed_gives_the_same_figures(scans: tuple[Tensor, Tensor]) -> None:
    settings = Settings(seconds=30, rows=100)

    torch.manual_seed(3)
    front = nn.Linear(64, 8)
    first, second = (audit(front, None, scans[0].flatten(1), scans[1], settings) for _ in range(2))

    assert first.attacks[0].clear == second.attacks[0].clear
    assert first.labels == second.labels
