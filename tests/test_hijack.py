"""The alarm for a node that hijacks the front: against the attack over the wire, and where it must stay silent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import cloister
from cloister import digits
from privacy.hijack import EARLY_STEPS, WINDOW_ROWS, HijackDetector, HijackEvidence
from tests.fsha import Attack, Hijacker, HijackingNode, Setting, train
from wire.errors import CheckpointError, ConfigError, HijackSuspectedError

CLASSES: Final = 10


@pytest.fixture(scope="module")
def hijacking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HijackingNode]:
    with HijackingNode(tmp_path_factory.mktemp("hijacking"), "digits", Attack()) as node:
        yield node


class Local:
    """The digits' training loop in one process; what would come back over the wire is in the open."""

    def __init__(self, seed: int = 0, batch: int = 64, attack: Attack | None = None) -> None:
        torch.manual_seed(seed)
        self.model, self.attack = digits.model(), attack
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self._batches = self._forever(batch, seed)
        self.hijacker: Hijacker | None = None

    def _forever(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from digits.train_loader(batch, seed)

    def step(self) -> tuple[Tensor, Tensor]:
        """The labels and the gradients that came back."""
        images, labels = next(self._batches)
        smashed = self.model.get_submodule("stem")(images)
        received = smashed.detach().requires_grad_()
        output = self.model.get_submodule("head")(self.model.get_submodule("body")(received))
        functional.cross_entropy(output, labels).backward()
        returned = received.grad
        assert returned is not None
        if self.attack is not None:
            if self.hijacker is None:
                self.hijacker = Hijacker(self.attack, digits.load("test").tensors[0], smashed.shape[1:])
            returned = self.hijacker.gradients(smashed.detach(), returned)
        smashed.backward(returned)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return labels, returned


def honest_like(labels: Tensor, width: int = 40) -> Tensor:
    """Gradients [B, width] that follow the labels and nothing else."""
    directions = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(1))
    return directions[labels] + 0.3 * torch.randn(len(labels), width)


def steering(labels: Tensor, width: int = 40) -> Tensor:
    """Gradients [B, width] that push every row the same way."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    return direction + 0.3 * torch.randn(len(labels), width)


def some_labels(rows: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (rows,))


def watch(detector: HijackDetector, run: Local, steps: int) -> int | None:
    """At which step of ``run`` the alarm sounds."""
    for step in range(steps):
        try:
            detector.observe(step, *run.step())
        except HijackSuspectedError:
            return step
    return None


def alarm_of(detector: HijackDetector, labels: Tensor, gradients: Tensor, rows: int = 64, first: int = 0) -> int | None:
    """At which step of ``rows`` rows each the alarm sounds."""
    for number, (some, returned) in enumerate(zip(labels.split(rows), gradients.split(rows), strict=True), first):
        try:
            detector.observe(number, some, returned)
        except HijackSuspectedError:
            return number
    return None


# --- Over the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(vanilla=True, optimizer=cloister.SGD(lr=0.02, momentum=0.9), micro_batches=4),
    ],
    ids=["u-shape", "vanilla"],
)
def test_T12_a_hijacking_node_is_stopped_long_before_step_100(hijacking: HijackingNode, setting: Setting) -> None:
    verdict = train(hijacking, "digits", 0, setting=setting)

    assert verdict.alarm is not None
    assert verdict.alarm <= 20
    assert verdict.evidence is not None
    told = json.loads(verdict.evidence.read_text())
    assert told["suspected"] is True
    assert told["score"] == verdict.highest


# --- The attack and honest training, in one process -------------------------------------------------------------------


def test_T12_honest_training_past_the_last_fitted_row_raises_no_alarm() -> None:
    detector = HijackDetector(seed=0)

    alarm = watch(detector, Local(), 150)

    assert alarm is None
    windows = detector.evidence().windows
    assert 100 <= len(windows) <= 128  # every step at first, then some of them
    assert max(window.score for window in windows) < 0.2


@pytest.mark.parametrize(
    "attack", [Attack("bce"), Attack(mix=0.7)], ids=["another critic", "mixed with honest gradients"]
)
def test_T12_variants_of_the_attack_are_found(attack: Attack) -> None:
    alarm = watch(HijackDetector(seed=0), Local(attack=attack), 100)

    assert alarm is not None


def test_T12_a_node_that_is_honest_at_first_is_found_once_it_attacks() -> None:
    detector = HijackDetector(seed=0)

    alarm = watch(detector, Local(attack=Attack(first_step=40)), 100)

    assert alarm is not None
    assert 40 <= (detector.evidence().since_step or 0) <= alarm


def test_T12_an_attack_late_in_a_run_is_found_though_not_every_step_is_looked_at() -> None:
    detector, labels = HijackDetector(seed=0), some_labels(64)

    for step in range(400):
        detector.observe(step, labels, honest_like(labels))

    looked_at = [window.step for window in detector.evidence().windows if window.step >= EARLY_STEPS]
    assert 40 <= len(looked_at) <= 110  # one in four of 300, by chance
    alarm = alarm_of(detector, some_labels(6400), steering(some_labels(6400)), first=400)
    assert alarm is not None
    assert alarm < 440


def test_T12_once_the_sum_rises_every_step_is_looked_at_again() -> None:
    detector, labels = HijackDetector(seed=0), some_labels(64)
    detector.observe(0, labels, steering(labels))

    for step in range(1000, 1003):
        detector.observe(step, labels, steering(labels))

    assert [window.step for window in detector.evidence().windows] == [0, 1000, 1001, 1002]


# --- What it goes by --------------------------------------------------------------------------------------------------


def test_cross_entropy_keeps_classes_half_as_alike_as_rows_of_one_class_whatever_is_predicted() -> None:
    labels = torch.arange(400) % CLASSES
    alike = labels[:, None] == labels
    others = ~alike
    alike.fill_diagonal_(fill_value=False)

    for sharpness in (0.1, 1.0, 10.0):
        for bias in (0.0, 5.0):  # a bias: one class is predicted for everything
            logits = sharpness * torch.randn(400, CLASSES)
            logits[:, 3] += bias
            logits.requires_grad_()
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            rows = functional.normalize(logits.grad, dim=1) if logits.grad is not None else logits
            cosines = rows @ rows.T

            assert cosines[others].mean() <= 0.5 * cosines[alike].mean() + 0.01


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 256])
def test_rows_of_several_micro_batches_make_a_window(rows: int) -> None:
    labels = some_labels(8 * max(rows, WINDOW_ROWS))

    assert alarm_of(HijackDetector(), labels, honest_like(labels), rows) is None
    alarm = alarm_of(HijackDetector(), labels, steering(labels), rows)
    assert alarm is not None
    assert alarm <= 8 * max(1, WINDOW_ROWS // rows)


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_any_number_of_classes_may_be_trained(classes: int) -> None:
    labels = some_labels(2048, classes)
    directions = torch.randn(classes, 40)
    detector = HijackDetector()

    assert alarm_of(detector, labels, directions[labels] + 0.3 * torch.randn(2048, 40)) is None
    assert (alarm_of(HijackDetector(), labels, steering(labels)) is None) == (classes == 1)


def test_a_class_with_nearly_all_rows_raises_no_alarm_and_hides_no_attack() -> None:
    torch.manual_seed(0)
    labels = torch.where(torch.rand(20_480) < 0.95, torch.zeros(20_480, dtype=torch.int64), some_labels(20_480))

    assert alarm_of(HijackDetector(), labels, honest_like(labels)) is None
    assert alarm_of(HijackDetector(), labels, steering(labels)) is not None


def test_gradients_of_every_size_count_and_missing_or_broken_ones_do_not() -> None:
    labels = some_labels(4096)
    gradients = steering(labels) * 10.0 ** torch.randint(-14, 4, (4096, 1))
    gradients[::3] = 0.0
    gradients[1::3, 5] = torch.nan

    assert alarm_of(HijackDetector(), labels, gradients) is not None
    nothing = HijackDetector()
    assert alarm_of(nothing, labels, torch.zeros(4096, 40)) is None
    assert nothing.evidence().windows == ()


def test_rows_that_the_loss_ignores_are_left_out() -> None:
    detector, labels = HijackDetector(), torch.full((64,), -100)

    detector.observe(0, labels, steering(labels))

    assert detector.active
    assert detector.evidence().windows == ()


def test_several_tensors_at_the_cut_count_together_and_wide_ones_in_part() -> None:
    labels = some_labels(1024)
    wide = torch.randn(70_000, generator=torch.Generator().manual_seed(2)) + 0.1 * torch.randn(64, 1)
    detector = HijackDetector()

    for step, some in enumerate(labels.split(64)):
        with suppress(HijackSuspectedError):
            detector.observe(step, some, wide.view(64, 70, 1000), steering(some).half())

    assert detector.suspected
    assert detector.state()["rows"].shape[1] <= 1024


@pytest.mark.parametrize(
    "labels",
    [torch.rand(64), torch.randint(9, (64, 5)), torch.rand(64, 3) > 0.5],
    ids=["regression", "a class for each token", "several classes a row"],
)
def test_labels_that_are_not_one_class_a_row_switch_it_off_and_it_says_so(labels: Tensor) -> None:
    detector = HijackDetector()

    for step in range(10):
        detector.observe(step, labels, steering(some_labels(64)))

    assert not detector.active
    assert "one class a row" in detector.inactive_because
    assert not detector.evidence().suspected


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_floats_that_are_0_or_1_are_two_classes(shape: tuple[int, ...]) -> None:
    labels = some_labels(1024, 2)

    assert alarm_of(HijackDetector(), labels.float().view(shape), steering(labels)) is not None


def test_T12_the_node_cannot_know_which_rows_are_looked_at() -> None:
    labels = some_labels(4 * WINDOW_ROWS)
    detectors = HijackDetector(), HijackDetector()

    for detector in detectors:
        detector.observe(0, labels, honest_like(labels))

    assert len(detectors[0].evidence().labels) == WINDOW_ROWS
    assert detectors[0].evidence().labels != detectors[1].evidence().labels


# --- What is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evidence() -> HijackEvidence:
    torch.manual_seed(0)
    detector, labels = HijackDetector(), some_labels(1024)
    assert alarm_of(detector, labels, steering(labels)) is not None
    return detector.evidence()


def test_the_complaint_names_the_steps_and_says_what_to_do() -> None:
    labels = some_labels(64)
    detector = HijackDetector()
    complaint = r"since step 7, .*at step 1\d the mean cosine is 0\.\d\d between classes, .* another node, or freeze"

    def go_on() -> None:
        for step in range(7, 20):
            detector.observe(step, labels, steering(labels))

    with pytest.raises(HijackSuspectedError, match=complaint):
        go_on()


def test_the_evidence_is_written_as_it_is(evidence: HijackEvidence, tmp_path: Path) -> None:
    path = evidence.save(tmp_path / "new" / "folder")

    told = json.loads(path.read_text())
    assert told["suspected"] is True
    assert told["score"] == evidence.score > told["threshold"]
    assert [window["score"] for window in told["windows"]] == [window.score for window in evidence.windows]
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["cosines"], evidence.cosines)
    assert evidence.cosines.shape == (len(told["labels"]),) * 2
    assert told["digest"] == evidence.digested()


def test_the_digest_covers_the_cosines_too(evidence: HijackEvidence) -> None:
    evidence.cosines[0, 1] += 0.01

    assert evidence.digest != evidence.digested()


def test_a_folder_that_cannot_be_written_is_said(evidence: HijackEvidence, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"evidence cannot be written to .*file"):
        evidence.save(tmp_path / "file")


def test_a_restored_detector_goes_on_to_the_bit() -> None:
    torch.manual_seed(0)
    labels = some_labels(600)
    gradients = 0.4 * steering(labels, 1500) + honest_like(labels, 1500)
    parts = list(zip(labels.split(20), gradients.split(20), strict=True))
    whole, first, second = HijackDetector(), HijackDetector(seed=1), HijackDetector()
    first.restore(whole.state())

    for step, (some, returned) in enumerate(parts):
        whole.observe(step, some, returned)
        (first if step < 11 else second).observe(step, some, returned)
        if step == 10:
            second.restore({name: tensor.clone() for name, tensor in first.state().items()})

    assert second.evidence().digest == whole.evidence().digest
    assert len(whole.evidence().windows) > 10


def test_one_that_was_off_stays_off_when_it_is_restored() -> None:
    off, restored = HijackDetector(), HijackDetector()
    off.observe(0, torch.rand(4), torch.rand(4, 3))

    restored.restore(off.state())

    assert not restored.active


def test_a_checkpoint_without_its_state_is_refused() -> None:
    state = HijackDetector().state()
    del state["generator"]

    with pytest.raises(CheckpointError, match="generator"):
        HijackDetector().restore(state)


def test_a_frozen_front_needs_no_alarm() -> None:
    detector = HijackDetector()

    detector.observe(0, some_labels(64))

    assert detector.evidence().windows == ()
