"""Checkpoints and snapshots: which a run resumes from, which it refuses, and what damage costs."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import fsspec
import pytest
import sqlalchemy as sa
import torch
from torch import nn

import cloister
from client_side import durability
from client_side.checkpoints import list_checkpoints
from client_side.durability import Checkpoints, Run
from client_side.snapshots import SnapshotStore
from client_side.spawn import LocalNode
from tests import interrupted
from tests.durable import (
    CLASSES,
    FEATURES,
    OPTIMIZER,
    STEPS,
    Watch,
    cut,
    loaders,
    model,
    outcome,
    resumed_as,
    undisturbed,
)
from tests.interrupted import events, expected, flip, stopped
from wire.errors import CheckpointError, ConfigError, StateRejectedError
from wire.state import STATE_PREFIX, dump_state, load_state, sha256

# pytest finds a file's fixtures by their names in it.
a = interrupted.a


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


DAMAGES: Final[dict[str, Callable[[Path], None]]] = {
    "flipped": flip,
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
        flip(file.path)

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
