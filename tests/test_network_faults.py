"""A run over a network that misbehaves: it ends with the bits of an undisturbed one, or stops and can be resumed."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import cloister
from bench.relay import Relay
from client_side import stream
from client_side.durability import Checkpoints
from client_side.journal import Journal
from client_side.route import Route
from client_side.spawn import LocalNode
from tests.durable import STEPS, Outcome, Stopped, Watch, outcome, resumed_as, undisturbed
from wire.errors import CloisterError, UnreachableError
from wire.identity import create_identity

SEED: Final = 20
HEAD_BYTES: Final = 100  # of a frame: TLS record, HTTP/2 frame, gRPC prefix, and the beginning of the message


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalNode, LocalNode]]:
    """Two nodes that trust the same owner."""
    folder = tmp_path_factory.mktemp("nodes")
    create_identity(folder / "owner", role="owner", passphrase="of nobody")
    for name in ("a", "b"):
        shutil.copytree(folder / "owner", folder / name / "owner")
    with LocalNode(folder / "a", threads=1) as a, LocalNode(folder / "b", threads=1) as b:
        yield a, b


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is taken for death within a second or two, rather than half a minute."""
    monkeypatch.setattr(stream, "_WATCH_S", 0.1)
    monkeypatch.setattr(stream, "_STAYING", stream._Silence(20.0, 0.8, 2.0))
    monkeypatch.setattr(stream, "_LEAVING", stream._Silence(8.0, 0.8, 2.0))


def link_to(node: LocalNode) -> Relay:
    return Relay(node.port, rtt_s=0.0, bits_per_s=math.inf)


def over(relay: Relay, node: LocalNode) -> str:
    """The node's address by way of the relay."""
    return f"127.0.0.1:{relay.port}#{node.address.partition('#')[2]}"


@functools.cache
def expected(epochs: int = 3) -> Outcome:
    return undisturbed(epochs=epochs)


def moves(folder: Path) -> list[str]:
    journal = Journal(folder / "run.sqlite")
    try:
        return [event.text for event in journal.events() if event.kind == "moved"]
    finally:
        journal.close()


class Counting(Watch):
    """Counts how often the link came back."""

    reconnects = 0

    def on_step_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.StepEnd) -> None:
        self.reconnects = end.traffic.reconnects
        super().on_step_end(state, control, end)


# --- Cut at any byte


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_T05_a_connection_that_is_cut_at_any_byte_of_a_frame_changes_no_number(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path, *, down: bool
) -> None:
    epochs = 20
    node = nodes[0]
    draw = random.Random(SEED)  # noqa: S311 - a test's choice
    offsets = [*range(HEAD_BYTES), *(draw.randrange(HEAD_BYTES, 2500) for _ in range(epochs * STEPS - HEAD_BYTES))]
    with link_to(node) as relay:
        watch = Counting(before=lambda step: relay.cut_after(offsets[step], down=down))
        plan = Checkpoints(folder=tmp_path, every=7)
        found = outcome(over(relay, node), node.owner, plan, epochs=epochs, watch=watch)

    assert watch.reconnects >= 0.9 * len(offsets)
    assert moves(tmp_path) == []  # the node answers from memory
    resumed_as(found, expected(epochs), 1)


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_T05_a_connection_that_is_cut_while_a_session_opens_changes_no_number(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path, *, down: bool
) -> None:
    node = nodes[0]
    draw = random.Random(SEED)  # noqa: S311 - a test's choice
    for number, offset in enumerate([0, 1, *(draw.randrange(2, 16_000) for _ in range(8))]):
        with link_to(node) as relay:
            watch = Watch(before=lambda step: relay.cut_after(offset, down=down) if step == 0 else None)  # noqa: B023
            plan = Checkpoints(folder=tmp_path / str(number), every=2)
            found = outcome(over(relay, node), node.owner, plan, epochs=1, watch=watch)

        resumed_as(found, expected(1), 1)


def test_T14_cuts_while_a_session_moves_and_frames_are_replayed_change_no_number(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path
) -> None:
    a, b = nodes
    draw = random.Random(SEED)  # noqa: S311 - a test's choice
    with link_to(a) as left, link_to(b) as right:

        def disturb(step: int) -> None:
            if step % 4 == 3:  # the one is gone for a moment; on the way to the other, the link breaks as well
                here, there = (left, right) if step % 8 == 3 else (right, left)
                there.accept()
                there.cut_after(draw.randrange(12_000), down=draw.random() < 0.5)
                here.refuse()
                here.reset()
                threading.Timer(1.0, here.accept).start()

        plan = Checkpoints(folder=tmp_path, every=5)
        found = outcome(f"{over(left, a)},{over(right, b)}", a.owner, plan, watch=Watch(before=disturb))
        time.sleep(1.1)  # the last timer

    assert len(moves(tmp_path)) >= 2
    resumed_as(found, expected(), 1)


# --- A black hole


@pytest.mark.usefixtures("hasty")
def test_T05_a_black_hole_that_ends_changes_no_number(nodes: tuple[LocalNode, LocalNode], tmp_path: Path) -> None:
    node = nodes[0]
    with link_to(node) as relay:

        def swallow(step: int) -> None:
            if step in (4, 11):
                relay.stall()
                threading.Timer(3.5, relay.resume).start()

        watch = Counting(before=swallow)
        started = time.monotonic()
        found = outcome(over(relay, node), node.owner, Checkpoints(folder=tmp_path, every=5), watch=watch)

    assert time.monotonic() - started > 7
    assert watch.reconnects >= 2  # it was noticed
    resumed_as(found, expected(), 1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("when", ["in a step", "before a snapshot", "in a snapshot"])
def test_T14_a_node_in_a_black_hole_is_left_for_the_next(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    a, b = nodes
    begin = Route.begin_snapshot
    begun = 0
    with link_to(a) as relay:

        def swallow(step: int) -> None:
            if when == "in a step" and step == 8:
                relay.stall()

        def begin_swallowed(route: Route, **options: object) -> object:
            nonlocal begun
            begun += 1
            if when == "before a snapshot" and begun == 2:
                relay.stall()
            incoming = begin(route, **options)  # type: ignore[arg-type]  # as they came
            if when == "in a snapshot" and begun == 2:
                relay.stall()
            return incoming

        monkeypatch.setattr(Route, "begin_snapshot", begin_swallowed)
        plan = Checkpoints(folder=tmp_path, every=5)
        started = time.monotonic()
        found = outcome(f"{over(relay, a)},{b.address}", a.owner, plan, watch=Watch(before=swallow))
        took = time.monotonic() - started

    (moved,) = moves(tmp_path)
    assert f"to {b.address.partition('#')[0]} in" in moved
    resumed_as(found, expected(), 1)
    assert took < 20


@pytest.mark.usefixtures("hasty")
def test_T05_a_black_hole_without_end_stops_the_run_which_resumes_to_the_same_bits(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path
) -> None:
    node = nodes[0]
    plan = Checkpoints(folder=tmp_path, every=4)
    with link_to(node) as relay:
        watch = Watch(before=lambda step: relay.stall() if step == 9 else None)
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"no answer from 127\.0\.0\.1:\d+ .*: check the address"):
            outcome(over(relay, node), node.owner, plan, watch=watch, reconnect_s=2.0)
        took = time.monotonic() - started
    found = outcome(node.address, node.owner, plan, resume=True, seed=99)

    assert took < 40
    resumed_as(Outcome(watch.losses, expected().weights), Outcome(expected().losses, {}), 99)
    resumed_as(found, expected(), 10)


# --- Flapping, refusing, slow


def test_T05_a_link_that_flaps_every_tenth_of_a_second_changes_no_number(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path
) -> None:
    node = nodes[0]
    stop = threading.Event()
    with link_to(node) as relay:

        def flap() -> None:
            until = time.monotonic() + 6
            while not stop.wait(0.1) and time.monotonic() < until:
                relay.reset()

        flapping = threading.Thread(target=flap)
        watch = Counting(before=lambda step: flapping.start() if step == 2 else None)
        try:
            plan = Checkpoints(folder=tmp_path, every=4)
            found = outcome(over(relay, node), node.owner, plan, epochs=20, watch=watch)
        finally:
            stop.set()
            flapping.join()

    assert watch.reconnects >= 3
    resumed_as(found, expected(20), 1)


def test_T14_two_nodes_whose_links_flap_change_no_number(nodes: tuple[LocalNode, LocalNode], tmp_path: Path) -> None:
    a, b = nodes
    stop = threading.Event()
    with link_to(a) as left, link_to(b) as right:

        def flap() -> None:
            until = time.monotonic() + 6
            while time.monotonic() < until:
                for relay in (left, right):
                    relay.refuse()
                    relay.reset()
                    if stop.wait(0.4):
                        break
                    relay.accept()
                if stop.wait(0.1):
                    break
            left.accept()
            right.accept()

        flapping = threading.Thread(target=flap)
        try:
            plan = Checkpoints(folder=tmp_path, every=4)
            watch = Watch(before=lambda step: flapping.start() if step == 2 else None)
            found = outcome(f"{over(left, a)},{over(right, b)}", a.owner, plan, epochs=10, watch=watch, standby=True)
        finally:
            stop.set()
            flapping.join()

    resumed_as(found, expected(10), 1)


def test_T05_a_node_that_refuses_stops_the_run_with_what_to_do_and_it_resumes_to_the_same_bits(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path
) -> None:
    node = nodes[0]
    plan = Checkpoints(folder=tmp_path, every=4)
    with link_to(node) as relay:

        def leave(step: int) -> None:
            if step == 9:
                relay.refuse()
                relay.reset()

        with pytest.raises(CloisterError) as told:
            outcome(over(relay, node), node.owner, plan, watch=Watch(before=leave), reconnect_s=1.0)
    found = outcome(node.address, node.owner, plan, resume=True, seed=99)

    assert isinstance(told.value, UnreachableError)
    assert "check the address and that the node runs" in str(told.value)
    resumed_as(found, expected(), 10)


@pytest.mark.usefixtures("hasty")
def test_T14_a_straggler_is_left_for_the_second_node(nodes: tuple[LocalNode, LocalNode], tmp_path: Path) -> None:
    a, b = nodes
    pausing = threading.Event()

    def pause(step: int) -> None:
        if step == 7:
            os.kill(a.process.pid, signal.SIGSTOP)
            pausing.set()

    try:
        plan = Checkpoints(folder=tmp_path, every=5)
        found = outcome(f"{a.address},{b.address}", a.owner, plan, watch=Watch(before=pause), standby=True)
    finally:
        os.kill(a.process.pid, signal.SIGCONT)

    (moved,) = moves(tmp_path)
    assert "was silent for too long" in moved
    assert f"to {b.address.partition('#')[0]} in" in moved
    resumed_as(found, expected(), 1)


def test_T05_an_owner_who_stops_while_the_link_is_down_resumes_to_the_same_bits(
    nodes: tuple[LocalNode, LocalNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client_side.trainer._LINGER_S", 2.0)
    node = nodes[0]
    plan = Checkpoints(folder=tmp_path, every=4)
    with link_to(node) as relay:

        def leave(step: int) -> None:
            if step == 9:
                relay.stall()
                raise Stopped

        started = time.monotonic()
        with contextlib.suppress(Stopped):
            outcome(over(relay, node), node.owner, plan, watch=Watch(before=leave))
        took = time.monotonic() - started
    found = outcome(node.address, node.owner, plan, resume=True, seed=99)

    assert took < 15  # nobody waits for a goodbye
    resumed_as(found, expected(), 10)
