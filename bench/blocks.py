"""Measuring ratios on a machine that drifts: contenders run in turns, block by block, and are compared block by block.

A block is so many steps as fill a set time, two at least. In every round each contender has one block, with blocks of
the baseline between them (A B A C A ...), and every other round runs backwards; a contender's ratio in a round is taken
against the baseline's blocks just before and just after it. Warm-up blocks are not counted. What is reported is the
median over the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

__all__ = ["Contender", "Measured", "Spread", "race", "tell"]

_MOST_STEPS: Final = 500  # of one block
#: The first step after another contender's block finds every cache cold, which no training does but once.
_LEAST_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of at least one value."""
        numbers = list(values)
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that trains: ``run(steps)`` does so and returns the seconds that it took.

    Attributes:
        rows: of one step.
    """

    name: str
    run: Callable[[int], float] = field(repr=False)
    rows: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What one contender did in all rounds.

    Attributes:
        step_s: seconds of a step, in each round.
        ratios: its throughput over the baseline's, in each round.
    """

    name: str
    rows: int
    step_s: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def rate(self) -> Spread:
        """Samples per second."""
        return Spread.of(self.rows / s for s in self.step_s)

    @property
    def ratio(self) -> Spread:
        """Of its throughput to the baseline's."""
        return Spread.of(self.ratios)

    def against(self, other: Measured) -> Spread:
        """The ratio of its throughput to that of ``other``, round by round."""
        return Spread.of(theirs / own for own, theirs in zip(self.step_s, other.step_s, strict=True))


def race(
    baseline: Contender,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    block_s: float,
    stride: int = 1,
) -> list[Measured]:
    """Runs all of them in turns.

    Args:
        baseline: what the others are compared with.
        contenders: the others.
        rounds: blocks of each contender that count.
        block_s: how long a block should take; it has one step at least.
        stride: contenders between two blocks of the baseline.

    Returns:
        The baseline, then the contenders, in their order.
    """
    steps = {c.name: _warmed_up(c, block_s) for c in (baseline, *contenders)}

    def step_s(contender: Contender) -> float:
        return contender.run(steps[contender.name]) / steps[contender.name]

    own: list[float] = []
    took: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        tell(f"  round {number + 1} of {rounds}")
        order = contenders if number % 2 == 0 else list(reversed(contenders))
        before, blocks = step_s(baseline), []
        blocks.append(before)
        for first in range(0, len(order), stride):
            group = order[first : first + stride]
            each = [step_s(contender) for contender in group]
            after = step_s(baseline)
            blocks.append(after)
            for contender, seconds in zip(group, each, strict=True):
                took[contender.name].append((seconds, (before + after) / 2))
            before = after
        own.append(statistics.median(blocks))
    measured = [Measured(baseline.name, baseline.rows, tuple(own), (1.0,) * rounds)]
    for contender in contenders:
        pairs = took[contender.name]
        # A contender may train another number of rows a step than the baseline.
        share = contender.rows / baseline.rows
        ratios = tuple(share * base / seconds for seconds, base in pairs)
        measured.append(Measured(contender.name, contender.rows, tuple(s for s, _ in pairs), ratios))
    return measured


def _warmed_up(contender: Contender, block_s: float) -> int:
    """Runs an uncounted block; returns how many steps fill ``block_s``."""
    contender.run(1)
    alone = contender.run(1)
    steps = max(_LEAST_STEPS, min(_MOST_STEPS, round(block_s / max(alone, 1e-9))))
    if steps == _LEAST_STEPS:
        return steps
    # A single step is slower than one among many: what the first ones say is corrected once.
    return max(_LEAST_STEPS, min(_MOST_STEPS, round(block_s / max(contender.run(steps) / steps, 1e-9))))


def tell(line: str) -> None:
    """Progress, on stderr: results alone go to stdout."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 -- a program's progress
