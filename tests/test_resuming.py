"""A run that its owner interrupts is the same run: to the bit, with the same frames, and in one process at a time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors.torch
import torch

import cloister
from client_side import randomness
from client_side.checkpoints import list_checkpoints
from client_side.durability import Checkpoints, Run
from client_side.frames import SentFrame, encode_frame
from client_side.link import Link
from client_side.spawn import LocalNode
from tests import interrupted
from tests.durable import STEPS, Watch, loaders, outcome, resumed_as, undisturbed
from tests.interrupted import expected, stopped
from tests.released import released
from wire.errors import CheckpointError, ConfigError

FORKING: Final = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
# pytest finds a file's fixtures by their names in it.
a = interrupted.a


@pytest.mark.parametrize("at", [1, 4, 5, STEPS, STEPS + 1, 2 * STEPS - 1, 3 * STEPS])
def test_a_run_resumes_to_the_same_bits_wherever_its_owner_stopped(a: LocalNode, tmp_path: Path, at: int) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    before = stopped(a.address, a.owner, plan, at)
    found = outcome(a.address, a.owner, plan, resume=True, seed=99)

    assert before.losses == {step: expected().losses[step] for step in range(1, at + 1)}
    resumed_as(found, expected(), at + 1)
    assert [entry["step"] for entry in found.history] == [STEPS, 2 * STEPS, 3 * STEPS]
    means = [sum(expected().losses[s] for s in range(e * STEPS + 1, (e + 1) * STEPS + 1)) / STEPS for e in range(3)]
    assert [entry["loss"] for entry in found.history] == pytest.approx(means)


@FORKING
@pytest.mark.parametrize("at", [3, 9])
@pytest.mark.parametrize("kind", [kind for kind in loaders if kind != "plain"])
def test_a_run_resumes_to_the_same_bits_whatever_its_loader_draws_from(
    a: LocalNode, tmp_path: Path, kind: str, at: int
) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    stopped(a.address, a.owner, plan, at, kind=kind)
    found = outcome(a.address, a.owner, plan, kind=kind, resume=True, seed=99)

    resumed_as(found, expected(kind), at + 1)


def test_a_run_survives_one_interruption_after_another(a: LocalNode, tmp_path: Path) -> None:
    plan = Checkpoints(folder=tmp_path, every=3)
    for number, at in enumerate((2, 5, 5, 8, 13)):
        stopped(a.address, a.owner, plan, at, resume=True, seed=5 + number)
    found = outcome(a.address, a.owner, plan, resume=True, seed=99)

    resumed_as(found, expected(), 14)


def test_a_vanilla_run_resumes_to_the_same_bits(a: LocalNode, tmp_path: Path) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    stopped(a.address, a.owner, plan, 9, head=False)
    found = outcome(a.address, a.owner, plan, head=False, resume=True, seed=99)

    resumed_as(found, expected(head=False), 10)


def test_a_run_that_ended_resumes_to_what_it_was_and_goes_on_for_more_epochs(a: LocalNode, tmp_path: Path) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    outcome(a.address, a.owner, plan, epochs=2)
    again = outcome(a.address, a.owner, plan, epochs=2, resume=True, seed=98)
    longer = outcome(a.address, a.owner, plan, epochs=3, resume=True, seed=99)

    two = undisturbed(epochs=2)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in two.weights.items())
    assert not again.losses
    resumed_as(longer, expected(), 2 * STEPS + 1)


class Drawing(Watch):
    """A callback that draws from the generator that shuffles."""

    def on_train_begin(self, state: cloister.TrainState, control: cloister.Control) -> None:  # noqa: ARG002
        torch.rand(3)

    def on_epoch_begin(self, state: cloister.TrainState, control: cloister.Control) -> None:  # noqa: ARG002
        torch.rand(2)

    def on_epoch_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.EpochEnd) -> None:  # noqa: ARG002
        torch.rand(1)


@pytest.mark.parametrize("at", [1, 5, STEPS, STEPS + 2])
def test_what_callbacks_draw_is_drawn_as_it_was(a: LocalNode, tmp_path: Path, at: int) -> None:
    whole = outcome(a.address, a.owner, Checkpoints(folder=tmp_path / "whole", every=4), watch=Drawing())
    plan = Checkpoints(folder=tmp_path / "torn", every=4)
    stopped(a.address, a.owner, plan, at, watch=Drawing(at))
    found = outcome(a.address, a.owner, plan, resume=True, seed=99, watch=Drawing())

    resumed_as(found, whole, at + 1)


def test_a_loader_whose_workers_persist_is_refused(a: LocalNode, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(loaders, "lasting", _lasting)

    with pytest.raises(ConfigError, match="persistent_workers=True"):
        outcome(a.address, a.owner, Checkpoints(folder=tmp_path / "run"), kind="lasting")
    assert not (tmp_path / "run").exists()


def _lasting() -> Any:
    data = loaders["plain"]().dataset
    return torch.utils.data.DataLoader(data, 8, num_workers=1, persistent_workers=True)


def test_a_run_is_not_begun_where_one_is(a: LocalNode, tmp_path: Path) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    stopped(a.address, a.owner, plan, 5)

    with pytest.raises(ConfigError, match="holds a run"):
        outcome(a.address, a.owner, plan)


def test_a_resumed_run_sends_the_bytes_that_it_sent_before_and_no_others(
    a: LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    wire: dict[tuple[int, int, int], bytes] = {}
    send = Link.send

    def noted(link: Link, frame: SentFrame) -> None:
        wire[frame.place] = frame.data
        send(link, frame)

    def altered(**fields: Any) -> SentFrame:
        tensors = [None if t is None else released(t.tensor * 1.5) for t in fields.pop("tensors")]
        return encode_frame(**fields, tensors=tensors)

    monkeypatch.setattr(Link, "send", noted)
    stopped(a.address, a.owner, plan, 9)
    sent, resumed_at = dict(wire), list_checkpoints(tmp_path / "checkpoints")[0].step
    wire.clear()
    monkeypatch.setattr("client_side.steps.encode_frame", altered)
    stopped(a.address, a.owner, plan, 11, resume=True, seed=99)

    again = {place: data for place, data in wire.items() if place in sent}
    assert min(place[0] for place in again) == resumed_at
    assert len(again) == 4 * (9 - resumed_at) > 0
    assert all(data == sent[place] for place, data in again.items())
    assert len(wire) > len(again)  # steps that are new go as they are
    assert "what was sent then is sent again" in caplog.text


# --- One process at a time


_HOLDER: Final = """
import sys, time, torch.multiprocessing, pathlib
from client_side.durability import Checkpoints, Run
run = Run(Checkpoints(folder=pathlib.Path(sys.argv[1])))
worker = torch.multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
worker.start()
print(worker.pid, flush=True)
time.sleep(30)
"""


def test_a_second_process_is_refused_until_the_first_is_killed_even_if_its_workers_live_on(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        worker = int(first.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match="another process works on the run"):
                Run(Checkpoints(folder=tmp_path))
            first.kill()
            first.wait()
            os.kill(worker, 0)  # it is still there
            Run(Checkpoints(folder=tmp_path)).close()
        finally:
            first.kill()
            os.kill(worker, signal.SIGKILL)


def test_a_run_is_worked_on_once_in_a_process_too_and_lets_go_at_its_end(tmp_path: Path) -> None:
    first = Run(Checkpoints(folder=tmp_path))
    with pytest.raises(CheckpointError, match="another process"):
        Run(Checkpoints(folder=tmp_path))
    first.close()

    Run(Checkpoints(folder=tmp_path)).close()


# --- Random generators


def _draw(loader: Any) -> list[float]:
    drawn = [torch.rand(()).item(), float(np.random.rand()), np.random.normal(), random.random(), random.gauss(0, 1)]  # noqa: NPY002, S311
    return [*drawn, torch.rand((), generator=loader.generator).item()]


@pytest.mark.parametrize("warm", [0, 1], ids=["fresh", "with half a pair of normals"])
def test_every_generator_goes_on_from_where_it_was(warm: int) -> None:
    loader = loaders["own generator"]()
    for _ in range(warm):
        _draw(loader)
    state = {name: tensor.clone() for name, tensor in randomness.capture(loader).items()}
    first = [_draw(loader) for _ in range(3)]
    torch.manual_seed(1)
    other = loaders["own generator"]()
    restored = safetensors.torch.load(safetensors.torch.save(state))
    randomness.restore(restored, other)

    assert [_draw(other) for _ in range(3)] == first
    with pytest.raises(CheckpointError, match=r"generators of its own in \['loader'\], and this one has them in \[\]"):
        randomness.restore(state, loaders["plain"]())
    with pytest.raises(CheckpointError, match="cannot be restored"):
        randomness.restore({**state, "python": torch.tensor([1, 2])}, other)
