"""A run whose node restarts, drains or is lost is the same run: what nodes keep, and moves between them."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client_side.durability import Checkpoints, Run
from client_side.journal import Journal
from client_side.link import Link, NodeAddress, SessionRequest
from client_side.route import Route
from client_side.snapshots import Snapshot
from client_side.spawn import LocalNode
from protos import node_pb2
from server_side.kept import KeptSnapshots
from tests.durable import OPTIMIZER, STEPS, Stopped, Watch, cut, model, outcome, resumed_as
from tests.interrupted import events, expected, flip, stopped
from tests.wire_client import new_owner
from wire.errors import StateRejectedError
from wire.identity import create_identity
from wire.recipe import stream_seed
from wire.state import sha256


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


# --- What the node keeps


def kept_by(node: Fragile) -> Path:
    """The snapshot that a node keeps, once nothing is under way: it is written while training goes on."""
    deadline, since, before = time.monotonic() + 60, time.monotonic(), node.snapshots()
    while len(before) != 1 or time.monotonic() - since < 2:
        assert time.monotonic() < deadline, f"more than one snapshot, or ever new ones: {before}"
        time.sleep(0.02)
        if (now := node.snapshots()) != before:
            since, before = time.monotonic(), now
    return before[0]


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
            kept_by(b)
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
            kept = kept_by(b)
            b.kill()
            flip(kept)
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
            kept_by(b)
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
