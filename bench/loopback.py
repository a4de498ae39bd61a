"""Split against unsplit on loopback, over mutual TLS: throughput, bytes and overhead, by micro-batches in flight.

The baseline is the same model trained in one process, with the same number of threads and whole batches. A split step
that overlaps owner and node may be faster than it; what micro-batching itself costs is shown by the ratio to the same
loop unsplit with the same micro-batches.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from bench.bare import Topology
from bench.blocks import Contender, Measured, race, tell
from bench.models import ECG_CNN, RESNET18, TOPOLOGIES, TRANSFORMER, Subject
from bench.report import Chapter, Finding, Table, ms, number, ratio, spread
from bench.runs import SplitRun, topology_name, unsplit
from client_side.spawn import LocalNode

__all__ = ["FULL", "QUICK", "Plan", "loopback", "threads"]

SPLIT_TARGET: Final = 0.95  # of unsplit throughput, one batch in flight
OVERLAP_TARGET: Final = 1.15  # with four micro-batches in flight at one thread a process
OVERLAPPED: Final = 4
_STRIDE: Final = 4  # a step of ResNet-18 takes a second: one block of the baseline for so many others


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        in_flight: pairs of micro-batches and how many of them fly.
        closer: rounds of what has a target, each block beside one of the baseline.
        sweep: rounds of everything else.
    """

    subjects: tuple[Subject, ...]
    threads: tuple[int, ...]
    in_flight: tuple[tuple[int, int], ...]
    closer: int
    sweep: int
    block_s: float

    def pairs(self, threads: int) -> tuple[tuple[int, int], ...]:
        """What to measure at so many threads: everything at the first count, only what has a target at others."""
        if threads == self.threads[0]:
            return self.in_flight
        return tuple((m, k) for m, k in self.in_flight if m == k and m in (1, OVERLAPPED))


FULL: Final = Plan(
    subjects=(RESNET18, ECG_CNN, TRANSFORMER),
    threads=(1, 2),
    in_flight=((1, 1), (2, 2), (4, 1), (4, 4)),
    closer=3,
    sweep=1,
    block_s=0.15,
)
QUICK: Final = Plan(subjects=(RESNET18,), threads=(1,), in_flight=((1, 1), (4, 4)), closer=1, sweep=1, block_s=0.1)


@dataclass(frozen=True, slots=True)
class _Split:
    """One way to split, and its run."""

    topology: Topology
    micro_batches: int
    in_flight: int
    run: SplitRun

    @property
    def name(self) -> str:
        shape = topology_name(self.topology)
        if self.micro_batches == 1:
            return f"{shape}, whole batches"
        return f"{shape}, {self.in_flight} of {self.micro_batches} in flight"

    @property
    def targeted(self) -> bool:
        """Whether a target stands on it."""
        return self.in_flight == self.micro_batches and self.micro_batches in (1, OVERLAPPED)


def loopback(plan: Plan) -> Chapter:
    """Measures ``plan``."""
    tables, findings = [], []
    for count in plan.threads:
        with threads(count), tempfile.TemporaryDirectory() as folder, LocalNode(Path(folder), threads=count) as node:
            for subject in plan.subjects:
                tell(f"loopback: {subject.name}, {count} thread(s) a process")
                with _splits(subject, node, plan.pairs(count)) as splits:
                    table, found = _measure(subject, count, splits, plan)
                tables.append(table)
                findings += found
    what = (
        "Owner and node are two processes on this machine, connected by gRPC over mutual TLS on loopback. Batches of "
        f"{RESNET18.batch}, float32, SGD with momentum. *Ratio* is the throughput over that of the same model in one "
        "process with as many threads and whole batches; *same slices* is the ratio to that process with the same "
        "micro-batches. *k of m in flight*: of a batch's m micro-batches, k may wait for their backward at a time. "
        "*Overhead* is a step's time beyond the unsplit step's; below zero, owner and node overlap."
    )
    return Chapter("Split against unsplit, on loopback", what, tuple(tables), tuple(findings))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch works with ``count`` threads in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _splits(subject: Subject, node: LocalNode, in_flight: Sequence[tuple[int, int]]) -> Iterator[list[_Split]]:
    with contextlib.ExitStack() as stack:
        splits = []
        for topology in TOPOLOGIES:
            cut = subject.cut(topology)  # the runs of a topology share front and head: only their speed counts
            for count, flying in in_flight:
                run = SplitRun(subject, cut, node, micro_batches=count, in_flight=flying)
                stack.callback(run.close)
                splits.append(_Split(topology, count, flying, run))
        yield splits


def _measure(subject: Subject, count: int, splits: list[_Split], plan: Plan) -> tuple[Table, list[Finding]]:
    reference = subject.cut("u_shape")
    baseline = unsplit(subject, reference)
    sliced = [unsplit(subject, reference, m) for m in sorted({s.micro_batches for s in splits} - {1})]
    targeted = [s for s in splits if s.targeted]
    others = [s for s in splits if not s.targeted]
    closer = race(baseline, _contenders(targeted), rounds=plan.closer, block_s=plan.block_s)
    rest = [*_contenders(others), *sliced]
    swept = race(baseline, rest, rounds=plan.sweep, block_s=plan.block_s, stride=_STRIDE) if rest else []
    found = {m.name: m for m in (*swept, *closer)}
    rows = [_unsplit_row(found[c.name], found[baseline.name]) for c in (baseline, *sliced)]
    rows += [_row(s, found) for s in splits]
    columns = ("", "samples/s", "ratio", "same slices", "overhead ms", "bytes up", "bytes down")
    title = f"{subject.name}, {count} thread{'s' * (count > 1)} a process"
    return Table(title, columns, tuple(rows)), [_finding(subject, count, s, found[s.name]) for s in targeted]


def _contenders(splits: list[_Split]) -> list[Contender]:
    return [s.run.contender(s.name) for s in splits]


def _unsplit_row(measured: Measured, baseline: Measured) -> tuple[str, ...]:
    own = "" if measured is baseline else ratio(measured.ratio)
    return measured.name, spread(measured.rate, 1), own, "", "", "", ""


def _row(split: _Split, found: dict[str, Measured]) -> tuple[str, ...]:
    measured = found[split.name]
    sliced = found.get(f"unsplit, {split.micro_batches} micro-batches")
    # Both were measured against the same baseline, if not in the same round: the ratio of their ratios.
    beside = "" if sliced is None else f"{measured.ratio.median / sliced.ratio.median:.2f}"
    traffic = split.run.bytes_per_step
    step = measured.rows / measured.rate.median
    return (
        split.name,
        spread(measured.rate, 1),
        ratio(measured.ratio),
        beside,
        ms(step - step * measured.ratio.median),
        number(traffic.up),
        number(traffic.down),
    )


def _finding(subject: Subject, count: int, split: _Split, measured: Measured) -> Finding:
    claim = f"{subject.name}, {split.name}, {count} thread{'s' * (count > 1)} a process, over unsplit throughput"
    return Finding(claim, measured.ratio.median, _target(subject, count, split))


def _target(subject: Subject, count: int, split: _Split) -> float | None:
    if subject is not RESNET18:
        return None
    if split.micro_batches == 1:
        return SPLIT_TARGET
    return OVERLAP_TARGET if count == 1 else None
