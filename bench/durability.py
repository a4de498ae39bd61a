"""What it costs that nothing is lost, and how soon training goes on after a node is killed."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import psutil

from bench.blocks import Spread, tell
from bench.loopback import threads
from bench.models import LOSS, MLP, OPTIMIZER, RESNET18, SMALL_CNN, Subject
from bench.report import Chapter, Finding, Table, number, ratio, spread
from client_side.callbacks import Callback, Control, StepEnd, TrainState
from client_side.durability import Checkpoints
from client_side.frames import FrameLog
from client_side.route import Route
from client_side.spawn import LocalNode
from client_side.trainer import Trainer
from privacy.policy import CLEAR

__all__ = ["FULL", "QUICK", "Plan", "durability"]

EVERY: Final = 50
COST_TARGET: Final = 0.95  # of the throughput without
BACK_TARGET_S: Final = 2.0  # from the kill to the next step, without the replay
GROWTH_TARGET: Final = 1.25  # memory breathes, and the frames since the last checkpoint come and go
_SETTLED_S: Final = 1.0
_MIB: Final = 2**20
_WARM_S: Final = 4.0  # a node that starts loads what its first session needs
_KILLED_AT: Final = 40  # steps after a checkpoint
_BACK_AT: Final = 45


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: blocks of :data:`EVERY` steps each, so that each has one checkpoint in it, for the small model.
        large: the same for ResNet-18, where a block has ``large_every`` steps.
        large_every: steps between two checkpoints there; what one costs is scaled to :data:`EVERY`.
        kills: of a node, while it trains.
        steps: of the long run.
    """

    rounds: int
    large: int
    large_every: int
    kills: int
    steps: int


FULL: Final = Plan(rounds=5, large=2, large_every=10, kills=5, steps=10_000)
QUICK: Final = Plan(rounds=1, large=0, large_every=10, kills=1, steps=1000)


def durability(plan: Plan) -> Chapter:
    """Measures ``plan``."""
    rows, findings = [], []
    with threads(1), tempfile.TemporaryDirectory() as folder, LocalNode(Path(folder), threads=1) as node:
        for subject, rounds, every in ((SMALL_CNN, plan.rounds, EVERY), (RESNET18, plan.large, plan.large_every)):
            if not rounds:
                continue
            tell(f"durability: {subject.name}, a checkpoint every {every} steps")
            with tempfile.TemporaryDirectory() as run:
                row, finding = _cost(subject, node, Path(run), rounds, every)
            rows.append(row)
            findings.append(finding)
    columns = (
        "",
        "samples/s without",
        "samples/s with",
        "with / without",
        "bytes logged a step",
        "bytes of a checkpoint",
        "its seconds",
    )
    tables = [Table("What it costs", columns, tuple(rows))]
    tell(f"durability: {plan.kills} kills")
    table, finding = _kills(plan.kills)
    tables.append(table)
    findings.append(finding)
    tell(f"durability: a run of {plan.steps} steps")
    table, finding = _long(plan.steps)
    tables.append(table)
    findings.append(finding)
    what = (
        "Two runs train the same model, U-shaped, through the same node; one also logs every frame and takes a "
        f"checkpoint every {EVERY} steps (ResNet-18: every {plan.large_every}, which costs more). Blocks of so many "
        "steps take turns, and the time of a block ends when its checkpoint is on the disk, although training would go "
        "on meanwhile. Then nodes are killed (SIGKILL) in the middle of training, the small CNN's, and a second one "
        "takes over: *back after* is the time from the kill to the end of the next step, *replay* is how much faster "
        "than live the frames since the last snapshot are computed again. The long run trains the MLP and reads memory "
        "(of both processes, resident), disk and rows at several steps."
    )
    return Chapter("What durability costs", what, tuple(tables), tuple(findings))


class _Killer(Callback):
    """Kills the node at work in the middle between two checkpoints, and starts it again some steps later."""

    def __init__(self, nodes: list[LocalNode]) -> None:
        self._nodes, self._turn = nodes, 0
        self.backs: list[float] = []
        self.steps_s: list[float] = []
        self._killed = self._last = 0.0

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        del control, end
        now, place = time.perf_counter(), state.global_step % EVERY
        if self._killed:
            self.backs.append(now - self._killed)
            self._killed = 0.0
        elif self._last:
            self.steps_s.append(now - self._last)
        self._last = time.perf_counter()
        if place == _KILLED_AT:
            self._nodes[self._turn % 2].kill()
            self._killed = time.perf_counter()
        elif place == _BACK_AT:
            old = self._nodes[self._turn % 2]
            self._nodes[self._turn % 2] = LocalNode(old.folder, threads=1, listen=f"localhost:{old.port}")
            self._turn += 1
            time.sleep(_WARM_S)
            self._last = 0.0


class _Steps(Trainer):
    """A trainer that leaves the middle where it is."""

    def fetch(self) -> None:
        """Does nothing."""


def _trainer(subject: Subject, local: LocalNode, **options: Any) -> Trainer:  # noqa: ANN401 - the trainer's own
    settings: dict[str, Any] = {"node": local.address, "identity": local.owner, **options}
    return _Steps(subject.cut("u_shape"), policy=CLEAR, optimizer=OPTIMIZER, loss=LOSS, **settings)


def _cost(subject: Subject, node: LocalNode, folder: Path, rounds: int, every: int) -> tuple[tuple[str, ...], Finding]:
    batches = subject.batches()
    block = [batches[n % len(batches)] for n in range(every)]
    written: list[FrameLog] = []

    def seconds(trainer: Trainer) -> float:
        started = time.perf_counter()
        trainer.fit(block, 1)
        return time.perf_counter() - started

    checkpoints = Checkpoints(folder=folder, every=every)
    with _trainer(subject, node) as plain, _trainer(subject, node, checkpoints=checkpoints) as kept:
        for trainer in (plain, kept):
            trainer.fit(block[:2], 1)
        if kept.run is not None:
            written.append(kept.run.log)
        before = written[0].written
        took = [(seconds(plain), seconds(kept), seconds(plain)) for _ in range(rounds)]
        frames = (written[0].written - before) / (rounds * every)
        entries = [] if kept.run is None else kept.run.journal.checkpoints()
    without = Spread.of(subject.batch * every * 2 / (a + c) for a, _, c in took)
    with_ = Spread.of(subject.batch * every / b for _, b, _ in took)
    share = Spread.of((a + c) / 2 / b for a, b, c in took)
    newest = entries[0]
    row = (
        f"{subject.name}, a checkpoint every {every} steps",
        spread(without, 1),
        spread(with_, 1),
        ratio(share),
        number(frames),
        number(newest.bytes + newest.sent_bytes),
        f"{newest.seconds:.2f}",
    )
    target = COST_TARGET if subject is RESNET18 else None  # a small model's step is over before its frame is written
    return row, Finding(f"{row[0]}: throughput over that without", share.median, target)


def _kills(count: int) -> tuple[Table, Finding]:
    """Two nodes that are killed in turns, under one run."""
    replays: list[tuple[int, float]] = []
    replay = Route._replay  # noqa: SLF001 - to time it

    def timed(route: Route, link: Any, step: int) -> int:  # noqa: ANN401 - as there
        started = time.perf_counter()
        frames = replay(route, link, step)
        replays.append((frames, time.perf_counter() - started))
        return frames

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(threads(1))
        (folder / "b").mkdir(parents=True)
        nodes = [LocalNode(folder / "a", threads=1)]
        stack.callback(lambda: [node.stop() for node in nodes])
        shutil.copytree(folder / "a" / "owner", folder / "b" / "owner")
        nodes.append(LocalNode(folder / "b", threads=1))
        stack.enter_context(mock.patch.object(Route, "_replay", timed))
        both = ",".join(node.address for node in nodes)
        killer = _Killer(nodes)
        checkpoints = Checkpoints(folder=folder / "run", every=EVERY)
        batches = SMALL_CNN.batches()
        with _trainer(SMALL_CNN, nodes[0], node=both, checkpoints=checkpoints, callbacks=[killer]) as trainer:
            trainer.fit([batches[n % len(batches)] for n in range(count * EVERY)], 1)
    taken = [each for each in replays if each[0]][-count:]
    net = Spread.of(back - seconds for back, (_, seconds) in zip(killer.backs, taken, strict=True))
    live_s = statistics.median(killer.steps_s) / 2  # of a frame: two make a step
    rows = (
        ("kills", number(count)),
        ("back after, s", spread(Spread.of(killer.backs), 2)),
        ("of it without the replay, s", spread(net, 2)),
        ("frames replayed", spread(Spread.of(float(frames) for frames, _ in taken))),
        ("replay over live training", ratio(Spread.of(frames * live_s / seconds for frames, seconds in taken))),
    )
    finding = Finding(
        "Seconds from a kill to the next step, without the replay", net.median, BACK_TARGET_S, at_most=True
    )
    return Table("After a kill", ("", ""), rows), finding


class _Gauge(Callback):
    """Memory, disk and rows at some steps."""

    def __init__(self, steps: list[int], node: LocalNode, folder: Path) -> None:
        self._steps, self._node, self._folder = set(steps), psutil.Process(node.process.pid), folder
        self._kept = node.folder / "state"
        self.read: list[tuple[int, int, int, int, int, int]] = []

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        del control, end
        if state.global_step not in self._steps:
            return
        time.sleep(_SETTLED_S)  # a checkpoint that is being written is whole
        with contextlib.closing(sqlite3.connect(self._folder / "run.sqlite")) as journal:
            counts = [journal.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("checkpoints", "events")]  # noqa: S608 - ours
        self.read.append(
            (
                state.global_step,
                psutil.Process().memory_info().rss,
                self._node.memory_info().rss,
                _size(self._folder),
                _size(self._kept),
                sum(counts),
            )
        )


def _long(steps: int) -> tuple[Table, Finding]:
    marks = [steps // 10, steps // 4, steps // 2, steps]
    with threads(1), tempfile.TemporaryDirectory() as at, LocalNode(Path(at), threads=1) as node:
        folder = Path(at) / "run"
        gauge = _Gauge(marks, node, folder)
        batches = MLP.batches()
        checkpoints = Checkpoints(folder=folder, every=EVERY)
        with _trainer(MLP, node, checkpoints=checkpoints, callbacks=[gauge]) as trainer:
            trainer.fit([batches[n % len(batches)] for n in range(steps)], 1)
    columns = ("after steps", "owner, MiB", "node, MiB", "run's folder, MiB", "node's folder, MiB", "SQL rows")
    rows = tuple(
        (number(step), *(f"{size / _MIB:,.1f}" for size in sizes), number(count)) for step, *sizes, count in gauge.read
    )
    first, last = gauge.read[0], gauge.read[-1]
    grown = max(after / before for before, after in zip(first[1:], last[1:], strict=True))
    claim = f"The most that anything grew from step {number(first[0])} to {number(last[0])}, as a ratio"
    return Table("A long run", columns, rows), Finding(claim, grown, GROWTH_TARGET, at_most=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
