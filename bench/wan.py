"""Split training over an emulated wide-area link (:mod:`bench.relay`), against what physics allows.

No step can be shorter than its computing, nor than its bytes take in the busier direction (the link carries both ways
at once), so::

    bound = max(compute, max(bytes up, bytes down) / rate)

where *compute* is the same step, with the same micro-batches, without the link: measured on loopback, in turns with the
blocks over the link. Synchronous training cannot hide all latency either: the last micro-batch of a step goes there and
back once (vanilla: smashed data up, input gradient down) or twice (U-shaped: the output and its gradient in between)
before the next step may begin. ``bound + round trips`` counts those too.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.bare import Topology
from bench.blocks import Measured, Spread, race, tell
from bench.loopback import threads
from bench.models import ECG_CNN, RESNET18, TOPOLOGIES, TRANSFORMER, Subject
from bench.relay import Relay
from bench.report import Chapter, Finding, Table, ms, number, ratio
from bench.runs import SplitRun, addressed, topology_name
from client_side.link import Traffic
from client_side.spawn import LocalNode

__all__ = ["FULL", "QUICK", "Crossing", "Plan", "Wire", "bound_s", "wan"]

TARGET: Final = 0.85  # of the bound, on the slow link
ROUND_TRIPS: Final[dict[Topology, int]] = {"vanilla": 1, "u_shape": 2}
IN_FLIGHT: Final = 8  # what a node allows unless told otherwise
THREADS: Final = 1  # owner, node and relay share this machine's cores


@dataclass(frozen=True, slots=True)
class Wire:
    """A link to emulate."""

    rtt_s: float
    bits_per_s: float

    @property
    def name(self) -> str:
        """As people write it."""
        return f"{self.rtt_s * 1e3:g} ms, {self.bits_per_s / 1e6:,.0f} Mbit/s"


SLOW: Final = Wire(0.05, 100e6)
FAST: Final = Wire(0.01, 1e9)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        micro_batches: counts of them; the fastest over the link is reported.
    """

    links: tuple[Wire, ...]
    subjects: tuple[Subject, ...]
    topologies: tuple[Topology, ...]
    micro_batches: tuple[int, ...]
    rounds: int
    block_s: float


FULL: Final = Plan(
    links=(SLOW, FAST),
    subjects=(RESNET18, ECG_CNN, TRANSFORMER),
    topologies=TOPOLOGIES,
    micro_batches=(8, 16, 32),
    rounds=2,
    block_s=0.5,
)
QUICK: Final = Plan(
    links=(SLOW,), subjects=(ECG_CNN,), topologies=("u_shape",), micro_batches=(8,), rounds=1, block_s=0.3
)


@dataclass(frozen=True, slots=True)
class Crossing:
    """One setting's steps over the link and without it, round by round."""

    wire: Wire
    topology: Topology
    micro_batches: int
    direct: Measured
    over: Measured
    traffic: Traffic

    @property
    def latency_s(self) -> float:
        """Round trips that no step can hide."""
        return ROUND_TRIPS[self.topology] * self.wire.rtt_s

    @property
    def share(self) -> Spread:
        """The bound over the step, round by round."""
        return self._share(0.0)

    @property
    def share_with_latency(self) -> Spread:
        """The same with the round trips counted into the bound."""
        return self._share(self.latency_s)

    @property
    def bound_s(self) -> float:
        """The bound by the median compute."""
        return bound_s(Spread.of(self.direct.step_s).median, self.traffic, self.wire)

    def _share(self, more_s: float) -> Spread:
        pairs = zip(self.direct.step_s, self.over.step_s, strict=True)
        return Spread.of((bound_s(direct, self.traffic, self.wire) + more_s) / over for direct, over in pairs)


def bound_s(compute_s: float, traffic: Traffic, wire: Wire) -> float:
    """The least seconds of a step: ``max(compute, bytes of the busier direction / rate)``."""
    return max(compute_s, 8 * max(traffic.up, traffic.down) / wire.bits_per_s)


def wan(plan: Plan) -> Chapter:
    """Measures ``plan``."""
    tables, findings = [], []
    with threads(THREADS), tempfile.TemporaryDirectory() as folder, LocalNode(Path(folder), threads=THREADS) as node:
        for wire in plan.links:
            best = []
            with Relay(node.port, wire.rtt_s, wire.bits_per_s) as relay:
                for subject, topology in _settings(plan):
                    tell(f"wan: {wire.name}: {subject.name}, {topology_name(topology)}")
                    tried = _crossings(plan, subject, topology, wire, _Way(node, relay.port))
                    best.append((subject, min(tried, key=lambda crossing: Spread.of(crossing.over.step_s).median)))
            rows = [_row(subject, crossing) for subject, crossing in best]
            findings += [finding for subject, crossing in best for finding in _findings(subject, crossing)]
            tables.append(Table(f"{wire.name}, {THREADS} thread a process", _COLUMNS, tuple(rows)))
    counts = ", ".join(map(str, plan.micro_batches))
    what = (
        "The owner reaches the node through a relay that delays and shapes (round trip, rate of each direction); TLS "
        "and the pin are as on any link. Bound = max(*compute*, bytes of the busier direction / rate), where *compute* "
        "is the same step without the relay, measured in turns with it. A step also waits for round trips that no "
        "schedule can hide, 1 in the vanilla topology and 2 in the U-shape; the last column counts them in. "
        f"Of the micro-batch counts {counts} (at most {IN_FLIGHT} in flight), the fastest over the link is shown."
    )
    return Chapter("Over an emulated wide-area link", what, tuple(tables), tuple(findings))


_COLUMNS: Final = (
    "",
    "micro-batches",
    "step ms",
    "compute ms",
    "bytes up",
    "bytes down",
    "transfer ms",
    "bound ms",
    "of the bound",
    "of bound + round trips",
)


def _settings(plan: Plan) -> Iterator[tuple[Subject, Topology]]:
    for subject in plan.subjects:
        for topology in plan.topologies:
            yield subject, topology


@dataclass(frozen=True, slots=True)
class _Way:
    """A node, and the relay's port in front of it."""

    node: LocalNode
    port: int


def _crossings(plan: Plan, subject: Subject, topology: Topology, wire: Wire, way: _Way) -> Iterator[Crossing]:
    """One for each of the micro-batch counts."""
    cut = subject.cut(topology)
    # More slices than this pay where bytes are what is waited for: the last one's way is then short.
    counts = plan.micro_batches if wire == SLOW and subject is RESNET18 else plan.micro_batches[:1]
    for count in counts:
        flying, address = min(count, IN_FLIGHT), addressed(way.node, way.port)
        direct = SplitRun(subject, cut, way.node, micro_batches=count, in_flight=flying)
        over = SplitRun(subject, cut, way.node, micro_batches=count, in_flight=flying, address=address)
        with contextlib.closing(direct), contextlib.closing(over):
            contender = over.contender("over the link")
            baseline = direct.contender("direct")
            direct_s, over_s = race(baseline, [contender], rounds=plan.rounds, block_s=plan.block_s)
            yield Crossing(wire, topology, count, direct_s, over_s, over.bytes_per_step)


def _row(subject: Subject, crossing: Crossing) -> tuple[str, ...]:
    traffic, rate = crossing.traffic, crossing.wire.bits_per_s
    return (
        f"{subject.name}, {topology_name(crossing.topology)}",
        str(crossing.micro_batches),
        ms(Spread.of(crossing.over.step_s).median),
        ms(Spread.of(crossing.direct.step_s).median),
        number(traffic.up),
        number(traffic.down),
        ms(8 * max(traffic.up, traffic.down) / rate),
        ms(crossing.bound_s),
        ratio(crossing.share),
        ratio(crossing.share_with_latency),
    )


def _findings(subject: Subject, crossing: Crossing) -> list[Finding]:
    claim = f"{crossing.wire.name}: {subject.name}, {topology_name(crossing.topology)}"
    target = TARGET if crossing.wire == SLOW else None
    return [
        Finding(f"{claim}, bound over step", crossing.share.median, target),
        Finding(f"{claim}, bound with its round trips over step", crossing.share_with_latency.median),
    ]
