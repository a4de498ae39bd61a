"""Small models against a bare gRPC loop (:mod:`bench.bare`), and where a step's time goes.

A small model's step is mostly transport, so this is where Cloister's own work shows: headers, checks of shapes and of
NaN, bounds, step numbers, answers kept for resending, the portable program.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from unittest import mock

import torch

from bench.bare import BareLoop, Topology
from bench.blocks import Contender, Measured, race, tell
from bench.loopback import threads
from bench.models import MLP, SMALL_CNN, TOPOLOGIES, Subject
from bench.report import Chapter, Finding, Table, number, ratio, spread, us
from bench.runs import SplitRun, topology_name, unsplit
from client_side import steps as steps_of_owner
from client_side.cutting import Cut
from client_side.frames import encode_frame
from client_side.link import Answer, Link
from client_side.spawn import LocalNode
from client_side.stream import Stream
from wire.optimizers import PartOptimizer

__all__ = ["FULL", "QUICK", "Plan", "Spans", "small"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

TARGET: Final = 0.9  # of the bare loop's throughput
_BARE: Final = {MLP.name: "mlp", SMALL_CNN.name: "cnn"}
_ENCODE: Final = "encode and hand to gRPC"
_BACKWARD: Final = "backward (front and head)"
_WAIT: Final = "waiting: the wire and the node"
_NODE: Final = "the node's own work, by its clock"
_SPANS: Final = (
    "front, forward",
    _ENCODE,
    _WAIT,
    "decode and check",
    "head, forward",
    _BACKWARD,
    "optimizers",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; ``steps`` are those of the breakdown."""

    subjects: tuple[Subject, ...]
    threads: tuple[int, ...]
    rounds: int
    block_s: float
    steps: int


FULL: Final = Plan(subjects=(MLP, SMALL_CNN), threads=(1, 2), rounds=7, block_s=0.2, steps=300)
QUICK: Final = Plan(subjects=(MLP, SMALL_CNN), threads=(1,), rounds=2, block_s=0.1, steps=30)


def small(plan: Plan) -> Chapter:
    """Measures ``plan``."""
    rows, findings, breakdowns = [], [], []
    for count in plan.threads:
        with threads(count), tempfile.TemporaryDirectory() as folder, LocalNode(Path(folder), threads=count) as node:
            for subject in plan.subjects:
                for topology in TOPOLOGIES:
                    tell(f"small: {subject.name}, {topology_name(topology)}, {count} thread(s) a process")
                    measured, spans = _measure(subject, topology, node, count, plan)
                    rows.append(_row(subject, topology, count, measured))
                    findings.append(_finding(subject, topology, count, measured[1]))
                    breakdowns.append((f"{subject.name}, {topology_name(topology)}, {count} thr.", spans))
    columns = ("", "Cloister samples/s", "bare loop", "unsplit", "Cloister / bare", "Cloister / unsplit")
    what = (
        "The bare loop carries the same tensors through the same parts with the same arithmetic, as raw bytes on one "
        f"gRPC stream over mutual TLS, and checks nothing. Batches of {MLP.batch}, one in flight. The second table "
        "shows where a step's microseconds go, measured with timers around the owner's calls in a run of its own (they "
        "cost a little). The last row is what the node says it computed: most of it within the wait, but its update "
        "happens while the owner goes on. *Everything else* holds the loss, callbacks, and waits for Python's lock, "
        "which gRPC's threads share."
    )
    tables = (Table("Samples per second", columns, tuple(rows)), _breakdown_table(breakdowns))
    return Chapter("Small models against a bare gRPC loop", what, tables, tuple(findings))


def _measure(
    subject: Subject, topology: Topology, node: LocalNode, count: int, plan: Plan
) -> tuple[list[Measured], dict[str, float]]:
    cut = subject.cut(topology)
    run = SplitRun(subject, cut, node)
    with contextlib.closing(run), BareLoop(_BARE[subject.name], topology, count) as bare:
        loop = Contender("bare", lambda steps: steps * subject.batch / bare.run(steps), subject.batch)
        whole = unsplit(subject, subject.cut(topology))
        measured = race(loop, [run.contender("cloister"), whole], rounds=plan.rounds, block_s=plan.block_s)
        return measured, _breakdown(run, cut, plan.steps)


def _row(subject: Subject, topology: Topology, count: int, measured: list[Measured]) -> tuple[str, ...]:
    bare, cloister, whole = measured
    return (
        f"{subject.name}, {topology_name(topology)}, {count} thread{'s' * (count > 1)}",
        spread(cloister.rate),
        spread(bare.rate),
        spread(whole.rate),
        ratio(cloister.ratio),
        ratio(cloister.against(whole)),
    )


def _finding(subject: Subject, topology: Topology, count: int, cloister: Measured) -> Finding:
    setting = f"{subject.name}, {topology_name(topology)}, {count} thread{'s' * (count > 1)} a process"
    return Finding(f"{setting}, over the bare loop", cloister.ratio.median, TARGET)


def _breakdown_table(breakdowns: list[tuple[str, dict[str, float]]]) -> Table:
    names = (*_SPANS, "everything else", "a step", _NODE)
    rows = tuple((name, *(us(spans.get(name, 0.0)) for _, spans in breakdowns)) for name in names)
    title = f"Where a step goes, in microseconds ({number(len(breakdowns))} settings)"
    return Table(title, ("", *(name for name, _ in breakdowns)), rows)


@dataclass(slots=True)
class Spans:
    """Seconds by what they were spent on; a span inside another one is taken out of it."""

    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        started = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - started
            inner = self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - inner
            if self._open:
                self._open[-1] += whole

    def around(self, name: str, function: Callable[_P, _T]) -> Callable[_P, _T]:
        """``function``, timed."""

        def timed(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with self.span(name):
                return function(*args, **kwargs)

        return timed


def _breakdown(run: SplitRun, cut: Cut, steps: int) -> dict[str, float]:
    """Seconds of a step by what they are spent on."""
    spans, receive, node_s = Spans(), Link.receive, 0.0

    def received(link: Link) -> Answer:
        nonlocal node_s
        with spans.span("decode and check"):
            answer = receive(link)
        node_s += answer.compute_s
        return answer

    patches: list[contextlib.AbstractContextManager[object]] = [
        mock.patch.object(Link, "receive", received),
        mock.patch.object(steps_of_owner, "encode_frame", spans.around(_ENCODE, encode_frame)),
        mock.patch.object(Link, "send", spans.around(_ENCODE, Link.send)),
        mock.patch.object(Stream, "receive", spans.around(_WAIT, Stream.receive)),
        mock.patch.object(PartOptimizer, "apply", spans.around("optimizers", PartOptimizer.apply)),
        mock.patch.object(torch.autograd, "backward", spans.around(_BACKWARD, torch.autograd.backward)),
        mock.patch.object(cut.front, "forward", spans.around("front, forward", cut.front.forward)),
    ]
    if cut.head is not None:
        patches.append(mock.patch.object(cut.head, "forward", spans.around("head, forward", cut.head.forward)))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        step_s = run.run(steps) / steps
    found = {name: seconds / steps for name, seconds in spans.seconds.items()}
    rest = {"everything else": step_s - sum(found.values()), "a step": step_s, _NODE: node_s / steps}
    return found | rest
