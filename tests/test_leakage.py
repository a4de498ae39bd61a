"""The leakage audit: attacks that must find what is there, must not find what is not, and must say when they failed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cloister import digits
from cloister.exits import ExitCode
from cloister.main import app
from examples import models
from privacy.leakage import (
    Attack,
    Bench,
    CutLeakage,
    Exhibit,
    LabelGuess,
    Outcome,
    Parts,
    Score,
    Settings,
    Treatment,
    advise,
    audit,
    audit_cut,
    decoding,
    hijack,
    inversion,
    pseudo,
    write_report,
)
from privacy.leakage.correlation import distance_correlation
from privacy.leakage.deadline import Deadline, descend
from privacy.leakage.labels import matched_accuracy
from privacy.leakage.ridge import fit_ridge
from privacy.leakage.victim import Victim, reinitialised
from wire.errors import ConfigError

ROOT: Final = Path(__file__).resolve().parents[1]
# Attacks end after some steps here, not by the clock: a busy machine must not change what they find.
QUICK: Final = Settings(seconds=60, rows=600)
PSEUDO_STEPS: Final = 200
FSHA_STEPS: Final = 400


class Constant(nn.Module):
    """A front that tells nothing, though it is called with everything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 8), 0.3)


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_FEWEST_STEPS", 40)
        patch.setattr(decoding, "_EPOCHS", 2)
        patch.setattr("privacy.leakage.bench._EPOCHS", 2)
        yield


@pytest.fixture(scope="module")
def scans() -> tuple[Tensor, Tensor]:
    images, labels = digits.load("train").tensors
    return images, labels


@pytest.fixture(scope="module")
def bench(scans: tuple[Tensor, Tensor]) -> Bench:
    return Bench(*scans, QUICK)


@pytest.fixture(scope="module")
def stem(bench: Bench) -> CutLeakage:
    """The demo's cut, freshly initialised."""
    return audit_cut("stem", parts_of(digits.model), bench)


def parts_of(make: Any) -> Parts:
    torch.manual_seed(0)
    model = make()
    return Parts(model.stem, model.body, model.head)


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


# --- Advice and report ------------------------------------------------------------------------------------------------


def leakage_of(cut: str, mse: float, *, works: bool = True, trains: bool = True) -> CutLeakage:
    """A finding with these figures; the mean input's error is 1."""
    score = Score(mse, 1 - mse, 0.9)
    outcome = Outcome.RECONSTRUCTS if works else Outcome.VOID
    pictures = np.zeros((2, 1, 8, 8), dtype=np.float32)
    return CutLeakage(
        cut=cut,
        dimensions=64,
        input_dimensions=64,
        measure="SSIM",
        known=100,
        attacked=100,
        front_trains=trains,
        treatment=None,
        distance_correlation=0.5,
        treated_distance_correlation=None,
        chance=0.1,
        baselines={"mean input": Score(1.0, 0.1, 0.1), "nearest neighbour": Score(0.9, 0.2, 0.5)},
        originals_accuracy=0.97,
        attacks=(Attack("informed decoder", "100 pairs", outcome, clear=score),),
        labels=(LabelGuess("gradients", "k-means", "nothing", 0.99),),
        labels_note="",
        exhibits=(Exhibit("originals", pictures), Exhibit("informed decoder", pictures)),
    )


def test_the_cut_that_gives_attacks_the_least_is_recommended_and_the_first_of_equals() -> None:
    advice = advise(
        [leakage_of("a", 0.1), leakage_of("b", 0.62), leakage_of("c", 0.64), leakage_of("d", 0.9, works=False)]
    )

    assert advice.cut == "b"
    assert "38.0 % of what varies" in advice.reasons[0]
    assert "the least is 36.0 %, behind c" in advice.reasons[1]
    assert "leaves less work here" in advice.reasons[1]
    assert any("does not hide labels" in reason for reason in advice.reasons)
    assert any("Audit failed" in reason and ": d." in reason for reason in advice.reasons)
    assert any("proves nothing" in limit for limit in advice.limits)
    assert any("no claim of differential privacy" in limit for limit in advice.limits)


def test_noise_that_hides_is_recommended_with_a_frozen_front_alone() -> None:
    noised = Score(1.1, 0.1, 0.1)
    found = leakage_of("a", 0.1)
    attack = dataclasses.replace(found.attacks[0], treated=noised, treated_beats_mean=False)
    found = dataclasses.replace(found, treatment=Treatment(1, 3), attacks=(attack,))

    trains, frozen = advise([found]), advise([dataclasses.replace(found, front_trains=False)])

    assert frozen.treatment == "rows, clip 1, noise 3 (in units of the clip)"
    assert trains.treatment == f"freeze the front; then {frozen.treatment}"
    assert any("can steer it" in reason for reason in trains.reasons)
    assert all(any("not this" in reason for reason in one.reasons) for one in (trains, frozen))


def test_cuts_that_all_give_nearly_everything_away_are_called_so() -> None:
    leaky, tight = (
        advise([leakage_of("a", 0.01), leakage_of("b", 0.02)]),
        advise([leakage_of("a", 0.01), leakage_of("b", 0.7)]),
    )

    assert any("choosing among them protects nothing" in reason for reason in leaky.reasons)
    assert not any("choosing among them" in reason for reason in tight.reasons)


def test_a_front_that_trains_gets_another_treatment_than_a_frozen_one() -> None:
    assert "ckks" in advise([leakage_of("a", 0.5)]).treatment
    assert advise([leakage_of("a", 0.5, trains=False)]).treatment == "moments or aggregate"


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE: Final = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>$\\frac{&amp;\x1b[31m\x00../../etc"


def test_T26_hostile_names_become_text_in_the_report_and_harmless_in_files(tmp_path: Path) -> None:
    write_report([leakage_of(HOSTILE, 0.5)], tmp_path / "out", model=HOSTILE, settings=QUICK)

    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert "<script>alert(1)</script>" in "".join(page.texts)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert all(str(a["src"]).startswith("data:image/png;base64,") and a["alt"] for t, a in page.tags if t == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x1b" not in text
    assert "\x00" not in text
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert [re.sub(r"cut-01-[\w.-]{1,40}\.png", "cut", name) for name in written] == [
        "out/curves.png",
        "out/cut",
        "out/leakage.json",
        "out/report.html",
    ]


def test_the_report_needs_nothing_else_and_is_readable_by_a_screen_reader(stem: CutLeakage, tmp_path: Path) -> None:
    write_report([stem], tmp_path, model="m:f", settings=QUICK)

    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    assert names.count("h1") == names.count("main") == 1
    assert names.count("table") == names.count("caption") == 3
    assert all(a.get("scope") in ("row", "col") for t, a in page.tags if t == "th")
    assert not re.search(r"(?:https?:)?//|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert "@media print" in text


def test_no_report_calls_a_cut_by_words_that_nothing_here_can_prove(stem: CutLeakage, tmp_path: Path) -> None:
    noised = Settings(treatment=Treatment(1, 1))
    cases = [[stem], [leakage_of("a", 0.99)], [leakage_of("a", 0.99, works=False)]]
    for number, found in enumerate(cases):
        write_report(found, tmp_path / str(number), model="m:f", settings=noised if number else QUICK)

        for name in ("report.html", "leakage.json"):
            text = re.sub(r"base64,[^\"]+", "", (tmp_path / str(number) / name).read_text()).lower()
            assert not re.search(r"\bsafe|no leakage|\bsecure|\bprivate\b", text)
            assert "an attack that fails proves nothing" in text
            assert "no claim of differential privacy" in text


def test_the_json_holds_every_figure_and_no_picture(stem: CutLeakage, tmp_path: Path) -> None:
    write_report([stem], tmp_path, model="m:f", settings=QUICK)

    record = json.loads((tmp_path / "leakage.json").read_text())
    (cut,) = record["cuts"]
    assert record["format"] == "cloister.leakage/1"
    assert record["settings"]["rows"] == QUICK.rows
    assert record["left_out"] == {}
    assert record["advice"]["cut"] == cut["cut"] == "stem"
    assert cut["void"] is False
    assert cut["attacks"][0]["clear"]["similarity"] == stem.decoder.clear.similarity  # type: ignore[union-attr]  # it has one
    assert {guess["source"] for guess in cut["labels"]} == {"activations", "outputs", "gradients"}
    assert "exhibits" not in cut


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"file: the report cannot be written"):
        write_report([leakage_of("a", 0.5)], tmp_path / "file", model="m:f", settings=QUICK)


# --- The command ------------------------------------------------------------------------------------------------------

MINE: Final = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits

def model():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

class Mute(nn.Linear):
    def forward(self, x):
        return super().forward(0 * x)

def mute():
    return nn.Sequential(Mute(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

def loader():
    x, y = load_digits(return_X_y=True)
    return DataLoader(TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)), 100)

def unlabelled():
    return [torch.zeros(100, 64)]

def ragged():
    return [(torch.zeros(50, 64), torch.zeros(50)), (torch.zeros(50, 32), torch.zeros(50))]

def wider():
    return [(torch.zeros(50, 65), torch.zeros(50))]

def few():
    return [(torch.rand(30, 64), torch.zeros(30))]

def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))

def sentences():
    return [(torch.zeros(50, 5, dtype=torch.int64), torch.zeros(50, dtype=torch.int64))]

def broken():
    raise RuntimeError("the disk is gone")
"""

JOB: Final = """
[model]
factory = "mine:model"

[cut]
front = "1"
head = "4"

[data]
train = "mine:loader"

[train]
epochs = 1

[optimizer]
name = "sgd"
lr = 0.1

[node]
address = "localhost:7700"
certificate = "tls.crt"
identity = "owner"

[privacy]
activations = {treatment = "rows", clip = 1.0, noise = 3.0}

[output]
dir = "run"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's module in it, where the command runs."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def leaked(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["leakage", *arguments], env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.mark.timeout(200)
def test_the_command_audits_each_cut_and_writes_the_report(mine: Path) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "cloister", "leakage", "mine:model", "--data", "mine:loader", "--rows", "200"),
            *("--seconds-per-attack", "1", "--out", "r", "--cut", "0", "--cut", "1", "--policy-noise", "1.0,0.1"),
            *("--threads", "1", "--format", "json"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=190,
        check=False,
    )

    assert (ran.returncode, ran.stderr.count("error")) == (ExitCode.OK, 0), ran.stderr
    record = json.loads(ran.stdout)
    assert [cut["cut"] for cut in record["cuts"]] == ["0", "1"]
    assert record == json.loads((mine / "r/leakage.json").read_text())
    assert record["settings"]["treatment"] == {"clip": 1.0, "noise": 0.1}
    assert "0: informed decoder" in ran.stderr
    assert {path.name for path in (mine / "r").iterdir()} == {
        "report.html", "leakage.json", "curves.png", "cut-01-0.png", "cut-02-1.png",
    }  # fmt: skip


def test_a_void_audit_ends_with_exit_code_1_and_says_so(mine: Path) -> None:
    ran = leaked("mine:mute", "--data", "mine:loader", "--rows", "200", "--seconds-per-attack", "0.5", "--cut", "0")

    assert ran.exit_code == ExitCode.FAILED, ran.stderr
    assert "failed" in ran.stdout
    assert "No cut can be recommended" in ran.stdout
    assert (mine / "leakage/report.html").exists()


def test_a_job_names_model_data_cut_and_noise(mine: Path) -> None:
    (mine / "job.toml").write_text(JOB)

    ran = leaked("job.toml", "--set", "train.seed=5", "--rows", "100", "--seconds-per-attack", "0.3", "--cut", "1")

    assert ran.exit_code in (ExitCode.OK, ExitCode.FAILED), ran.stderr
    record = json.loads((mine / "leakage/leakage.json").read_text())
    assert record["settings"]["treatment"] == {"clip": 1.0, "noise": 3.0}
    assert record["settings"]["seed"] == 5
    assert {guess["source"] for guess in record["cuts"][0]["labels"]} == {"activations", "outputs", "gradients"}
    assert "The job cuts behind 1." in ran.stdout


def test_a_real_sigint_keeps_the_cuts_that_are_done_and_ends_with_130(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops_at(monkeypatch, "1", lambda: signal.raise_signal(signal.SIGINT))

    ran = leaked("mine:model", "--data", "mine:loader", "--rows", "100", "--seconds-per-attack", "0.3")

    assert ran.exit_code == 130
    assert "1 of 2 cuts" in ran.stderr
    record = json.loads((mine / "leakage/leakage.json").read_text())
    assert [cut["cut"] for cut in record["cuts"]] == ["0"]
    assert record["left_out"] == {"1": "interrupted"}
    assert "nothing is known of it: 1 (interrupted)" in (mine / "leakage/report.html").read_text()


def test_a_cut_that_cannot_be_audited_does_not_cost_the_others(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise ConfigError("the activations at 0 are NaN")

    stops_at(monkeypatch, "0", refused)

    ran = leaked(
        "mine:model", "--data", "mine:loader", "--rows", "100", "--seconds-per-attack", "0.3", "--cut", "0",
        "--cut", "1",
    )  # fmt: skip

    assert ran.exit_code == ExitCode.FAILED
    assert "Not audited: 0 (the activations at 0 are NaN)." in ran.stdout
    assert [cut["cut"] for cut in json.loads((mine / "leakage/leakage.json").read_text())["cuts"]] == ["1"]


def stops_at(monkeypatch: pytest.MonkeyPatch, cut: str, stop: Callable[[], None]) -> None:
    def audited(name: str, *rest: Any) -> CutLeakage:
        if name == cut:
            stop()
        return audit_cut(name, *rest)

    monkeypatch.setattr("privacy.leakage.audit_cut", audited)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("mine:model",), "name its data too, such as --data"),
        (("mine:model", "--data", "mine:nothing"), "mine has no nothing"),
        (("mine:model", "--data", "mine:unlabelled"), "a batch must be (inputs, labels)"),
        (("mine:model", "--data", "mine:ragged"), "resize or pad them"),
        (("mine:model", "--data", "mine:broken"), "mine:broken failed: RuntimeError: the disk is gone"),
        (("mine:model", "--data", "mine:wider"), "the model does not take inputs of float32 [4, 65]"),
        (("mine:model", "--data", "mine:few"), "30 records: an audit needs at least 40"),
        (("mine:model", "--data", "mine:loader", "--policy-noise", "1"), "write clip and noise"),
        (("mine:model", "--data", "mine:loader", "--policy-noise", "0,1"), "clip must be above 0"),
        (("mine:model", "--data", "mine:loader", "--head", "4", "--vanilla"), "give one of them"),
        (("mine:model", "--data", "mine:loader", "--set", "train.seed=1"), "name a job file"),
        (("mine:model", "--data", "mine:loader", "--out", "mine.py"), "the report cannot be written there"),
        (("gone.toml",), "cannot read the job file gone.toml"),
        (("mine:words", "--data", "mine:sentences"), "put what looks them up"),
    ],
)
def test_the_command_says_what_is_wrong(mine: Path, arguments: tuple[str, ...], complaint: str) -> None:
    ran = leaked(*arguments)

    assert (ran.exit_code, ran.stdout) == (ExitCode.CONFIG, ""), mine
    assert complaint in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("wrong", [("--cut", "9"), ("--cut", "0", "--cut", "9"), ("--head", "9")])
def test_a_cut_that_does_not_exist_is_refused_before_data_are_read(mine: Path, wrong: tuple[str, ...]) -> None:
    ran = leaked("mine:model", "--data", "mine:broken", *wrong)

    assert ran.exit_code == ExitCode.CONFIG, mine
    assert "no submodule '9'; there are 0, 1, 2, 3, 4" in ran.stderr
    assert "the disk is gone" not in ran.stderr


@pytest.mark.timeout(200)
def test_the_package_opens_no_socket_and_knows_no_node() -> None:
    code = (
        "import sys; before = set(sys.modules); import privacy.leakage\n"
        "ours = ('client_side', 'cloister', 'server_side')\n"
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in ours))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=190, check=True
    )

    assert ran.stdout.strip() == "[]"


def test_an_example_of_two_dimensions_finds_its_middle() -> None:
    """The whole way of an example model: a head on the middle's outputs."""
    torch.manual_seed(0)
    model = models.small_cnn()
    images, labels = torch.rand(80, 1, 28, 28), torch.arange(80) % 10

    found = audit(model.stem, (model.body, model.head), images, labels, Settings(seconds=0.5, rows=80))  # type: ignore[arg-type]  # submodules

    assert {guess.source for guess in found.labels} == {"activations", "outputs", "gradients"}
    assert found.dimensions == 16 * 14 * 14
