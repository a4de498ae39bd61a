"""Runs that stop, and what is read and harmed in their folders before they go on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client_side.durability import Checkpoints
from client_side.journal import Journal
from client_side.spawn import LocalNode
from tests.durable import Outcome, Stopped, Watch, outcome, undisturbed
from wire.identity import Identity

__all__ = ["a", "events", "expected", "flip", "stopped"]


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    """A node that no test harms."""
    with LocalNode(tmp_path_factory.mktemp("a"), threads=1) as running:
        yield running


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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
