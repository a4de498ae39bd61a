"""A run that is interrupted is the same run: checkpoints, snapshots, the frame log and moves, over real nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pytest
import safetensors.torch
import sqlalchemy as sa
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cloister
from client_side import durability, randomness
from client_side.checkpoints import list_checkpoints
from client_side.durability import Checkpoints, Run
from client_side.frames import FrameLog, FrameMemo, SentFrame, encode_frame, read_frames
from client_side.journal import Journal
from client_side.link import Link, NodeAddress, SessionRequest
from client_side.route import Route
from client_side.snapshots import Snapshot, SnapshotStore
from client_side.spawn import LocalNode
from protos import node_pb2
from server_side.kept import KeptSnapshots
from tests.durable import (
    CLASSES,
    FEATURES,
    OPTIMIZER,
    STEPS,
    Outcome,
    Stopped,
    Watch,
    cut,
    loaders,
    model,
    outcome,
    resumed_as,
    undisturbed,
)
from tests.released import released
from tests.wire_client import new_owner
from wire.codec import encode
from wire.errors import CheckpointError, ConfigError, StateRejectedError
from wire.identity import Identity, create_identity
from wire.recipe import stream_seed
from wire.state import STATE_PREFIX, dump_state, load_state, sha256

FORKING: Final = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One owner, and two nodes that trust it."""
    folder = tmp_path_factory.mktemp("identities")
    create_identity(folder / "owner", role="owner", passphrase="of nobody")
    for name in ("a", "b"):
        create_identity(folder / name / "node", role="node", passphrase="of nobody")
        shutil.copytree(folder / "owner", folder / name / "owner")
    return folder


@pytest.fixture(scope="module")
def a(identities: Path) -> Iterator[LocalNode]:
    """A node that no test harms."""
    with LocalNode(identities / "a", threads=1) as running:
        yield running


class Fragile:
    """A node that is killed, and comes back with its disk, at the same address."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.node = LocalNode(folder, threads=1, options=options)
        self.address, self.owner = self.node.address, self.node.owner

    def kill(self) -> None:
        self.node.kill()

    def revive(self) -> None:
        self.node.stop()
        self.node = LocalNode(self._folder, threads=1, listen=f"localhost:{self.node.port}", options=self._options)

    def snapshots(self) -> list[Path]:
        return sorted((self._folder / "state" / "snapshots").iterdir())


@pytest.fixture
def b(identities: Path) -> Iterator[Fragile]:
    """A node that a test may kill."""
    shutil.rmtree(identities / "b" / "state", ignore_errors=True)
    fragile = Fragile(identities / "b", "--drain-seconds", "60")
    yield fragile
    fragile.kill()


@functools.cache
def expected(kind: str = "plain", micro_batches: int = 2, *, head: bool = True) -> Outcome:
    return undisturbed(kind, micro_batches=micro_batches, head=head)


def stopped(node: Any, owner: Identity, plan: Checkpoints, at: int, **options: Any) -> Outcome:
    """A process of the run that ends after so many steps, without a word."""
    watch = options.pop("watch", None) or Watch(at)
    with contextlib.suppress(Stopped):
        outcome(node, owner, plan, watch=watch, **options)
    return Outcome(watch.losses, {})


def events(folder: Path, kind: str) -> list[str]:
    journal = Journal(folder / "run.sqlite")
    try:
        return [event.text for event in journal.events() if event.kind == kind]
    finally:
        journal.close()


# --- The owner stops, and goes on


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


# --- Another run's checkpoint


def _wider() -> nn.Module:
    whole = model()
    whole.get_submodule("0").register_module("0", nn.Linear(FEATURES, 16, bias=False))
    return whole


def _deeper() -> nn.Module:
    whole = model()
    assert isinstance(whole, nn.Sequential)
    whole[2] = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    return whole


def _frozen() -> nn.Module:
    whole = model()
    whole.get_parameter("0.0.weight").requires_grad = False
    return whole


OTHERS: Final[dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]]] = {
    "front": (_wider, {}, r"front\.0\.0\.bias was float32 \[16\] and is absent"),
    "middle": (_deeper, {}, r"middle was [0-9a-f]{60}… and is"),
    "frozen": (_frozen, {}, r"front\.0\.0\.weight was float32 \[16, 6\] and is float32 \[16, 6\] frozen"),
    "optimizer": (model, {"optimizer": cloister.SGD(lr=0.1)}, r"optimizer was AdamW.* and is SGD"),
    "rate": (model, {"optimizer": dataclasses.replace(OPTIMIZER, lr=2e-2)}, "optimizer was"),
    "loss": (model, {"loss": "mse"}, "loss was Loss.*cross_entropy.* and is Loss.*mse"),
    "micro_batches": (model, {"micro_batches": 4}, "micro_batches was 2 and is 4"),
    "seed": (model, {"seed": 8}, "seed was 7 and is 8"),
}


@pytest.fixture(scope="module")
def begun(a: LocalNode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped, to be copied."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    stopped(a.address, a.owner, Checkpoints(folder=folder, every=4), 9)
    return folder


@pytest.fixture
def torn(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_told_apart(a: LocalNode, torn: Path, what: str) -> None:
    make, changes, said = OTHERS[what]
    before = sorted(path.name for path in (torn / "checkpoints").iterdir())
    settings: dict[str, Any] = {"optimizer": OPTIMIZER, "micro_batches": 2, "seed": 7, **changes}
    other = cloister.Trainer(
        cut(make()),
        policy=cloister.CLEAR,
        node=a.address,
        identity=a.owner,
        checkpoints=Checkpoints(folder=torn),
        **settings,
    )

    with pytest.raises(CheckpointError, match=f"belongs to another run: .*{said}"):
        other.fit(loaders["plain"](), 3, resume=True)
    assert sorted(path.name for path in (torn / "checkpoints").iterdir()) == before
    Run(Checkpoints(folder=torn)).close()  # it is not held on to


def test_a_checkpoint_of_another_cut_is_refused(a: LocalNode, torn: Path) -> None:
    with pytest.raises(CheckpointError, match=r"topology was U-shaped and is vanilla; .*head"):
        outcome(a.address, a.owner, Checkpoints(folder=torn), resume=True, head=False)


def test_a_checkpoint_of_another_version_is_refused_and_stays(
    a: LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)
    with monkeypatch.context() as newer:
        newer.setattr("client_side.checkpoints.CHECKPOINT_VERSION", 3)
        stopped(a.address, a.owner, plan, 5)
    files = list_checkpoints(tmp_path / "checkpoints")

    with pytest.raises(CheckpointError, match=r"has version 3 of the format, and this Cloister reads 2: resume with"):
        outcome(a.address, a.owner, plan, resume=True)
    assert list_checkpoints(tmp_path / "checkpoints") == files != []


# --- Damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: Final[dict[str, Callable[[Path], None]]] = {
    "flipped": _flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_T07_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    a: LocalNode, torn: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = list_checkpoints(torn / "checkpoints")
    DAMAGES[damage](newest.path)
    with caplog.at_level(logging.WARNING):
        found = outcome(a.address, a.owner, Checkpoints(folder=torn, every=4), resume=True, seed=99)

    assert f"{newest.path} is damaged" in caplog.text
    assert min(found.losses) == older.step + 1
    resumed_as(found, expected(), 10)
    assert "damaged" in events(torn, "skipped")[0]


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_T07_a_damaged_snapshot_sends_back_to_the_checkpoint_before_it(
    a: LocalNode, torn: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = list_checkpoints(torn / "checkpoints")
    (only_its,) = newest.read().snapshot.objects - older.read().snapshot.objects
    DAMAGES.get(damage, Path.unlink)(torn / "snapshots" / f"{only_its.hex()}.safetensors")
    with caplog.at_level(logging.WARNING):
        found = outcome(a.address, a.owner, Checkpoints(folder=torn, every=4), resume=True, seed=99)

    assert f"the snapshot of step {newest.step} is" in caplog.text
    assert min(found.losses) == older.step + 1
    resumed_as(found, expected(), 10)


def test_T07_a_store_that_does_not_answer_is_not_taken_for_a_damaged_snapshot(
    a: LocalNode, torn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in (torn / "checkpoints").iterdir())

    def unreachable(*_: Any) -> bytes:
        raise OSError(110, "Connection timed out")

    with monkeypatch.context() as patched:
        patched.setattr("fsspec.implementations.local.LocalFileSystem.cat_file", unreachable)
        with pytest.raises(CheckpointError, match="Connection timed out; mend that and resume"):
            outcome(a.address, a.owner, Checkpoints(folder=torn, every=4), resume=True, seed=99)

    assert sorted(path.name for path in (torn / "checkpoints").iterdir()) == before
    resumed_as(outcome(a.address, a.owner, Checkpoints(folder=torn, every=4), resume=True, seed=99), expected(), 14)


def test_T07_a_run_whose_checkpoints_are_all_damaged_says_so(a: LocalNode, torn: Path) -> None:
    for file in list_checkpoints(torn / "checkpoints"):
        _flip(file.path)

    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole; start a new run"):
        outcome(a.address, a.owner, Checkpoints(folder=torn), resume=True)


def test_T07_a_damaged_journal_is_put_aside_and_the_run_goes_on(a: LocalNode, torn: Path) -> None:
    (torn / "run.sqlite").write_bytes(b"no database" * 100)
    found = outcome(a.address, a.owner, Checkpoints(folder=torn, every=4), resume=True, seed=99)

    resumed_as(found, expected(), 10)
    assert (torn / "run.sqlite.damaged").exists()


def test_T07_damaged_frames_of_an_earlier_process_are_computed_anew(a: LocalNode, torn: Path) -> None:
    for segment in (torn / "frames").glob("*.frames"):
        data = bytearray(segment.read_bytes())
        for at in range(100, len(data), 200):
            data[at] ^= 1
        segment.write_bytes(data[:-7])
    found = outcome(a.address, a.owner, Checkpoints(folder=torn, every=4), resume=True, seed=99)

    resumed_as(found, expected(), 10)


# --- Snapshots: where, what, and how much


def test_snapshots_live_behind_any_url_and_are_removed_with_the_run(a: LocalNode, tmp_path: Path) -> None:
    plan = Checkpoints(folder=tmp_path, every=4, snapshots="memory://bucket/runs")
    stopped(a.address, a.owner, plan, 9)
    memory = fsspec.filesystem("memory")
    stored = memory.find("/bucket/runs")
    found = outcome(a.address, a.owner, plan, resume=True, seed=99)
    run = Run(plan)
    run.remove_snapshots()
    run.close()

    assert len(stored) == 2
    assert not (tmp_path / "snapshots").exists()
    resumed_as(found, expected(), 10)
    assert memory.find("/bucket/runs") == []


def test_an_url_that_is_none_is_refused_before_anything_begins(a: LocalNode, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"snapshots = 'carrier-pigeon://"):
        outcome(a.address, a.owner, Checkpoints(folder=tmp_path, snapshots="carrier-pigeon://loft"))


def _with_frozen_middle() -> nn.Module:
    whole = model()
    assert isinstance(whole, nn.Sequential)
    whole[2] = nn.Linear(16, 1600)
    whole[3] = nn.Linear(1600, CLASSES)
    for p in whole[2].parameters():
        p.requires_grad = False
    return whole


def test_layers_that_do_not_change_are_neither_sent_nor_stored_again(
    a: LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.durable.model", _with_frozen_middle)
    plan = Checkpoints(folder=tmp_path, every=4, keep=3)
    frozen_bytes = 4 * (16 * 1600 + 1600)
    whole = undisturbed(epochs=1)
    stopped(a.address, a.owner, plan, 5, epochs=1)
    found = outcome(a.address, a.owner, plan, epochs=1, resume=True, seed=99)
    newest, *_, first = list_checkpoints(tmp_path / "checkpoints")

    resumed_as(found, whole, 6)
    snapshot = newest.read().snapshot
    assert 0 < snapshot.sent_bytes < frozen_bytes // 4
    assert snapshot.tensors["state/2.weight"].object in first.read().snapshot.objects
    sizes = sorted(path.stat().st_size for path in (tmp_path / "snapshots").iterdir())
    assert [size > frozen_bytes for size in sizes].count(True) == 1


def test_T15_snapshots_hold_the_middle_and_nothing_else(a: LocalNode, tmp_path: Path) -> None:
    kept_now: list[bytes] = []

    def look(step: int) -> None:
        if step == 3 * STEPS - 1:
            folder = a.folder / "state" / "snapshots"
            kept_now.extend(path.read_bytes() for path in folder.glob("*.safetensors"))

    found = outcome(a.address, a.owner, Checkpoints(folder=tmp_path, every=4), watch=Watch(before=look))
    middle = {f"{STATE_PREFIX}{name}" for name in cut(model()).middle_state()}
    objects = [path.read_bytes() for path in (tmp_path / "snapshots").iterdir()]

    assert len(kept_now) == 1
    assert len(objects) == 2
    owners = [tensor for name, tensor in found.weights.items() if name.startswith(("0.", "3."))]
    assert len(owners) == 4
    for data in (*kept_now, *objects):
        tensors = load_state(data)
        assert middle <= {name for name in tensors if name.startswith(STATE_PREFIX)}
        assert all(name.startswith((STATE_PREFIX, "optimizer/1.", "optimizer/2.")) for name in tensors)
        assert not any(torch.equal(own, t) for own in owners for t in tensors.values())


def test_nothing_grows_in_three_hundred_steps(a: LocalNode, tmp_path: Path) -> None:
    sizes: list[tuple[int, ...]] = []

    def measure(step: int) -> None:
        if step and step % 60 == 0:
            engine = sa.create_engine(f"sqlite:///{tmp_path / 'run.sqlite'}")
            with engine.connect() as connection:
                rows = [
                    connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()  # noqa: S608 - these three
                    for table in ("checkpoints", "events", "sessions")
                ]
            engine.dispose()
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            kept = list((a.folder / "state" / "snapshots").iterdir())
            sizes.append((len(files), len(kept), sum(path.stat().st_size for path in files), *rows))

    plan = Checkpoints(folder=tmp_path, every=5)
    outcome(a.address, a.owner, plan, epochs=50, micro_batches=1, watch=Watch(before=measure))

    files, kept, size, *rows = zip(*sizes, strict=True)
    assert len(files) == 4
    assert max(files) <= 2 + 2 + 3 + 3  # lock and journal, checkpoints, snapshots, segments: one more while writing
    assert max(kept) <= 2  # the old one while the new one is written
    assert max(size) < 1.5 * min(size)
    assert [max(count) for count in rows] == [2, 1, 1]


# --- What the node keeps


def test_T07_a_node_that_restarts_goes_on_from_what_it_kept_without_an_upload(
    b: Fragile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    load = Run.load

    def counted(run: Run, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        loaded.append(snapshot.step)
        return load(run, snapshot)

    def restart(step: int) -> None:
        if step == 10:
            b.kill()
            b.revive()
            loaded.clear()

    monkeypatch.setattr(Run, "load", counted)
    found = outcome(b.address, b.owner, Checkpoints(folder=tmp_path, every=4), watch=Watch(before=restart))

    resumed_as(found, expected(), 1)
    assert loaded == [3 * STEPS]  # the middle that is brought home at the end
    assert "frames replayed" in events(tmp_path, "moved")[0]
    assert b.snapshots() == []  # the session was closed


def test_T07_a_damaged_kept_snapshot_is_refused_and_the_state_sent(
    b: Fragile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def restart(step: int) -> None:
        if step == 10:
            b.kill()
            (kept,) = b.snapshots()
            _flip(kept)
            b.revive()

    with caplog.at_level(logging.INFO, logger="client_side.route"):
        found = outcome(b.address, b.owner, Checkpoints(folder=tmp_path, every=4), watch=Watch(before=restart))

    resumed_as(found, expected(), 1)
    assert "no longer keeps the snapshot" in caplog.text


def test_T07_what_a_restarted_node_kept_is_not_taken_for_the_present(
    b: Fragile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, fetch, save = Route.begin_snapshot, Route.snapshot, Run.save
    begun = 0

    def restarted_begin(route: Route, **options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == 2:
            b.kill()
            b.revive()
        return begin(route, **options)

    monkeypatch.setattr(Route, "begin_snapshot", restarted_begin)
    found = outcome(b.address, b.owner, Checkpoints(folder=tmp_path / "one", every=4), watch=Watch())

    resumed_as(found, expected(), 1)

    def restarted_fetch(route: Route, **options: Any) -> Any:
        b.kill()
        b.revive()
        return fetch(route, **options)

    def save_but_the_last(run: Run, checkpoint: Any, incoming: Any) -> None:
        if checkpoint.step < 3 * STEPS:
            save(run, checkpoint, incoming)
        else:
            list(incoming.pieces())

    monkeypatch.setattr(Route, "begin_snapshot", begin)
    monkeypatch.setattr(Route, "snapshot", restarted_fetch)
    monkeypatch.setattr(Run, "save", save_but_the_last)
    plan = Checkpoints(folder=tmp_path / "two", every=4, keep_on_node=True)
    found = outcome(b.address, b.owner, plan, watch=Watch())

    resumed_as(found, expected(), 1)


def test_T03_what_a_node_keeps_is_its_owners_alone(b: Fragile, identities: Path, tmp_path: Path) -> None:
    stranger = new_owner()
    (identities / "b" / "trusted" / "stranger.crt").write_bytes(stranger.certificate_pem)

    def vanish(step: int) -> None:
        if step == 9:
            b.kill()
            raise Stopped

    stopped(b.address, b.owner, Checkpoints(folder=tmp_path, every=4), 9, watch=Watch(before=vanish))
    b.revive()
    (kept,) = b.snapshots()
    session, _, step, digest, _ = kept.name.split(".")
    whole = cut(model())
    request = SessionRequest(
        program=whole.captured.data,
        program_digest=whole.program.digest,
        tensors={},
        topology=node_pb2.TOPOLOGY_U_SHAPE,
        loss=None,
        optimizer=OPTIMIZER,
        seed=stream_seed(7, "middle"),
        max_rows=8,
        max_in_flight=2,
        want_input_gradients=True,
        first_step=int(step),
        kept=(bytes.fromhex(digest), kept.stat().st_size),
        replaces=bytes.fromhex(session),
    )
    theirs = Link(NodeAddress.parse(b.address), stranger, reconnect_s=5)
    ours = Link(NodeAddress.parse(b.address), b.owner, reconnect_s=5)
    try:
        with pytest.raises(StateRejectedError, match="no longer keeps that state"):
            theirs.open(request)
        assert kept.exists()
        assert ours.open(request) == int(step)
    finally:
        theirs.close()
        ours.close()


def test_T02_a_nodes_disk_is_shared_among_owners_and_the_oldest_give_way(tmp_path: Path) -> None:
    kept = KeptSnapshots(tmp_path / "snapshots", most_bytes=4000)
    alice, bob = "a" * 64, "b" * 64
    names = [bytes([number]) * 16 for number in range(6)]
    for number, name in enumerate(names[:3]):
        assert kept.keep(name, alice, number, bytes([number]) * 450) == sha256(bytes([number]) * 450)
        time.sleep(0.02)
    kept.keep(names[3], bob, 0, bytes(900))
    kept.keep(names[3], bob, 1, bytes(901))

    assert kept.keep(names[4], bob, 1, bytes(1001)) is None  # more than an owner's share
    assert kept.find(alice, session_id=names[0]) is None  # the oldest of three that are too many
    assert kept.find(alice, session_id=names[2]) is not None
    found = kept.find(bob, session_id=names[3])
    assert found is not None
    assert (found.step, kept.read(found)) == (1, bytes(901))
    assert kept.find(bob, digest=sha256(bytes([2]) * 450)) is None
    kept.forget(names[3])
    assert kept.find(bob) is None
    (tmp_path / "snapshots" / "x.partial").write_bytes(b"half")
    KeptSnapshots(tmp_path / "snapshots")
    assert not (tmp_path / "snapshots" / "x.partial").exists()


# --- Moves


def test_T14_a_draining_node_is_left_at_a_step_boundary_with_nothing_to_replay(
    a: LocalNode, b: Fragile, tmp_path: Path
) -> None:
    def drain(step: int) -> None:
        if step == 5:
            b.node.process.send_signal(signal.SIGTERM)

    found = outcome(
        f"{b.address},{a.address}", a.owner, Checkpoints(folder=tmp_path, every=50), watch=Watch(before=drain)
    )

    resumed_as(found, expected(), 1)
    (moved,) = events(tmp_path, "moved")
    assert f"from {b.address.partition('#')[0]} to {a.address.partition('#')[0]}" in moved
    assert ", 0 frames replayed: the node is about to stop" in moved
    assert b.node.process.wait(10) == 0  # nothing keeps it


def test_T14_the_node_that_stands_by_takes_over_without_an_upload(
    a: LocalNode, b: Fragile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_at: list[int] = []
    runs: list[Run] = []
    opened, save = Route._opened, Run.save

    def noted(run: Run, *what: Any) -> None:
        runs[:] = [run]
        save(run, *what)

    def counted(route: Route, number: int, snapshot: Snapshot) -> Link:
        opened_at.append(number)
        return opened(route, number, snapshot)

    def kill(step: int) -> None:
        if step == 11:
            runs[0].wait()
            assert runs[0]._follower
            runs[0]._follower.join()  # whoever stands by, stands
            assert opened_at[1:]
            opened_at.clear()
            b.kill()
        if step == 12:
            assert 1 not in opened_at

    monkeypatch.setattr(Run, "save", noted)
    monkeypatch.setattr(Route, "_opened", counted)
    plan = Checkpoints(folder=tmp_path, every=4)
    found = outcome(f"{b.address},{a.address}", a.owner, plan, watch=Watch(before=kill), standby=True)

    resumed_as(found, expected(), 1)
    (moved,) = events(tmp_path, "moved")
    assert f"to {a.address.partition('#')[0]} in" in moved


def test_T14_a_session_that_is_lost_is_opened_anew_where_it_was(a: LocalNode, b: Fragile, tmp_path: Path) -> None:
    plan = Checkpoints(folder=tmp_path, every=4)

    def lose(step: int) -> None:
        if step == 7:
            journal = Journal(tmp_path / "run.sqlite")
            session = journal.session_on(b.address.partition("#")[0])
            journal.close()
            link = Link(NodeAddress.parse(b.address), b.owner)
            assert link._stub.CloseSession(node_pb2.CloseSessionRequest(session_id=session), timeout=5).closed
            link.close()

    found = outcome(f"{b.address},{a.address}", a.owner, plan, watch=Watch(before=lose))

    resumed_as(found, expected(), 1)
    (moved,) = events(tmp_path, "moved")
    here = b.address.partition("#")[0]
    assert moved.startswith(f"from {here} to {here} in")


# --- The frame log


def a_frame(step: int, micro_batch: int = 0, size: int = 100) -> SentFrame:
    filler = torch.full((size,), float(step))
    return encode_frame(step=step, micro_batch=micro_batch, phase=node_pb2.PHASE_FORWARD, tensors=[released(filler)])


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.frames"))


def test_the_log_gives_back_the_very_frames_from_a_step_on(tmp_path: Path) -> None:
    log = FrameLog(tmp_path)
    sent = [a_frame(step, micro_batch) for step in range(6) for micro_batch in range(2)]
    for frame in sent:
        if (frame.step % 2, frame.micro_batch) == (0, 0):
            log.begin(frame.step)
        log.append(frame)

    found = list(log.frames(3))
    assert [frame.data for frame in found] == [frame.data for frame in sent if frame.step >= 3]
    assert [frame.place for frame in found] == [frame.place for frame in sent if frame.step >= 3]
    log.drop(3)
    assert segments(tmp_path) == ["000000000002.frames", "000000000004.frames"]
    assert log.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="frames of step 1 are no longer kept"):
        next(log.frames(1))
    log.close()


def test_nothing_is_dropped_while_frames_are_replayed(tmp_path: Path) -> None:
    import threading  # noqa: PLC0415

    log = FrameLog(tmp_path)
    for step in range(3):
        log.begin(step)
        log.append(a_frame(step))
    dropping = threading.Thread(target=log.drop, args=(2,))
    with log.hold:
        dropping.start()
        dropping.join(0.2)
        assert [frame.step for frame in log.frames(0)] == [0, 1, 2]
    dropping.join(5)

    assert segments(tmp_path) == ["000000000002.frames"]
    log.close()


def test_T07_a_torn_or_damaged_segment_is_read_up_to_there(tmp_path: Path) -> None:
    log = FrameLog(tmp_path)
    log.begin(0)
    for step in range(1, 4):
        log.append(a_frame(step, size=20))
    log.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    record = len(whole) // 3

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert len(list(read_frames(path))) == size // record
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        assert len(list(read_frames(path))) == at // record
    with pytest.raises(CheckpointError, match="is damaged: "):
        list(log.frames(0))


def test_what_was_sent_first_is_what_is_sent_again(tmp_path: Path) -> None:
    log = FrameLog(tmp_path)
    log.begin(4)
    first = [a_frame(step) for step in (4, 5, 6)]
    for frame in first:
        log.append(frame)
    log.close()
    memo = FrameMemo(tmp_path, 5)
    again = FrameLog(tmp_path)
    again.begin(5)
    again.append(dataclasses.replace(first[1], data=b"otherwise"))
    again.close()
    later = FrameMemo(tmp_path, 5)

    assert len(memo) == 2
    other = dataclasses.replace(first[2], data=first[2].data[::-1])
    assert memo.take(other).data == first[2].data
    assert memo.take(other) is other  # once
    assert memo.take(first[1]) is first[1]
    assert later.take(dataclasses.replace(first[1], data=b"a third")).data == first[1].data
    new = a_frame(9)
    assert later.take(new) is new
    later.drop(7)
    assert len(later) == 0
    assert segments(tmp_path / "old") == []


def test_frames_may_be_asked_for_while_others_are_dropped(tmp_path: Path) -> None:
    import threading  # noqa: PLC0415

    log = FrameLog(tmp_path)
    log.begin(0)
    for step in range(3000):
        log.append(SentFrame(step, 0, 1, update=False, data=b"x"))
    log.close()
    memo = FrameMemo(tmp_path, 0)
    failed: list[BaseException] = []

    def drop() -> None:
        try:
            for step in range(0, 3000, 10):
                memo.drop(step)
        except BaseException as error:  # noqa: BLE001 - the test tells it
            failed.append(error)

    dropping = threading.Thread(target=drop)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        dropping.start()
        for step in reversed(range(3000)):
            memo.take(SentFrame(step, 0, 1, update=False, data=b"y"))
        dropping.join()
    finally:
        sys.setswitchinterval(before)

    assert not failed


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


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]))
    whole = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=torch.Generator().manual_seed(1))
    made = whole.to(dtype)
    return made.t() if made.ndim == 2 and draw(st.booleans()) else made


@given(
    step=st.integers(0, 2**53),
    micro_batch=st.integers(0, 2**32 - 1),
    phase=st.sampled_from([1, 2, 3, 4]),
    update=st.booleans(),
    weight=st.floats(allow_nan=False),
    sent=st.lists(st.none() | tensors(), max_size=3),
    labels=st.none() | tensors(),
)
def test_a_frame_is_encoded_as_protobuf_itself_encodes_it(  # noqa: PLR0917 - Hypothesis names them
    step: int,
    micro_batch: int,
    phase: Any,
    update: bool,  # noqa: FBT001
    weight: float,
    sent: list[torch.Tensor | None],
    labels: torch.Tensor | None,
) -> None:
    made = encode_frame(
        step=step,
        micro_batch=micro_batch,
        phase=phase,
        update=update,
        loss_weight=weight,
        tensors=[None if t is None else released(t) for t in sent],
        labels=None if labels is None else released(labels),
    )
    from protos import tensor_pb2  # noqa: PLC0415

    meant = node_pb2.TrainRequest(
        frame=node_pb2.Frame(
            step=step,
            micro_batch=micro_batch,
            phase=phase,
            update=update,
            loss_weight=weight,
            tensors=[tensor_pb2.Tensor() if t is None else encode(t) for t in sent],
            labels=None if labels is None else encode(labels),
        )
    )

    assert node_pb2.TrainRequest.FromString(made.data) == meant
    assert made.tensor_bytes == sum(t.nbytes for t in (*sent, labels) if t is not None)
    assert made.place == (step, micro_batch, phase)


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


# --- The store


def test_T17_a_snapshot_that_is_not_what_was_announced_is_not_stored(tmp_path: Path) -> None:
    store = SnapshotStore(str(tmp_path))
    whole = {"state/w": torch.arange(4.0), "optimizer/w/m": torch.zeros(4)}
    first = store.put(0, whole)
    data = dump_state(whole)
    digests = {name: stored.digest for name, stored in first.tensors.items()}

    with pytest.raises(StateRejectedError, match="do not hash to what was announced"):
        store.receive(1, [data[:-1], b"\xff"], digest=sha256(data), digests=digests, before=first, kept=None)
    with pytest.raises(StateRejectedError, match="lacks tensors that it names"):
        store.receive(1, [data], digest=sha256(data), digests={"state/w": bytes(32)}, before=first, kept=None)
    assert [path.name for path in tmp_path.iterdir()] == [f"{sha256(data).hex()}.safetensors"]
    assert all(torch.equal(store.load(first)[name], tensor) for name, tensor in whole.items())
    store.prune([])
    with pytest.raises(CheckpointError, match="the snapshot of step 0 is gone"):
        store.load(first)


def test_the_plan_of_checkpoints_makes_sense(tmp_path: Path) -> None:
    wrongs: list[dict[str, Any]] = [{"every": 0}, {"keep": 0}, {"log_bytes": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="every, keep and log_bytes are 1 or more"):
            Checkpoints(folder=tmp_path, **wrong)
    assert not durability.holds_run(tmp_path)
