"""What the benchmarks found: tables, and sentences whose every claim is computed from them."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from bench.blocks import Spread

__all__ = [
    "Chapter",
    "Finding",
    "Table",
    "as_json",
    "as_markdown",
    "machine",
    "merged",
    "ms",
    "number",
    "ratio",
    "spread",
    "us",
]

_HEADING: Final = "## "
_CPUINFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title, already as text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A measured number beside what was wanted of it; without a target it is only told.

    Attributes:
        claim: what the number is of; it opens the sentence.
        measured: the number, in ``unit``.
        target: what it was to reach, or at most to be where ``at_most`` says so.
    """

    claim: str
    measured: float
    target: float | None = None
    unit: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; ``None`` where there is none."""
        if self.target is None:
            return None
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    @property
    def sentence(self) -> str:
        """As a line of text."""
        told = f"{self.claim}: {self.measured:.2f}{self.unit}"
        if self.target is None:
            return f"{told}."
        wanted = f"wanted: {'at most' if self.at_most else 'at least'} {self.target:g}{self.unit}"
        return f"{told} ({wanted}; **{'met' if self.met else 'not met'}**)."


@dataclass(frozen=True, slots=True)
class Chapter:
    """One benchmark's outcome.

    Attributes:
        what: how it was measured, for readers of the tables.
    """

    title: str
    what: str
    tables: tuple[Table, ...]
    findings: tuple[Finding, ...]


def machine() -> str:
    """This machine and torch, in a line."""
    names = [line.partition(":")[2].strip() for line in _lines(_CPUINFO) if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    cores = len(names) or 1
    system = f"{processor}, {cores} cores, {platform.system()} {platform.release()}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{system}; Python {platform.python_version()}, torch {torch.__version__} ({instructions})"


def as_markdown(chapters: Sequence[Chapter], command: str, took_s: float) -> str:
    """All chapters as the text of ``RESULTS.md``."""
    lines = ["# Results", ""]
    lines += ["Figures are medians over interleaved blocks, with the smallest and the largest in brackets.", ""]
    for chapter in chapters:
        lines += [f"{_HEADING}{chapter.title}", "", chapter.what, ""]
        lines += [f"Repeat with `{command}` (it took {took_s / 60:.1f} minutes). Measured on: {machine()}.", ""]
        for table in chapter.tables:
            lines += [f"**{table.title}**", "", *_grid(table), ""]
        lines += [f"- {finding.sentence}" for finding in chapter.findings]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def merged(old: str, new: str) -> str:
    """The text ``new``, and before its chapters those of ``old`` that it does not measure anew."""
    head, *fresh = new.split(f"\n{_HEADING}")
    _, *before = old.split(f"\n{_HEADING}")
    titles = {chapter.partition("\n")[0] for chapter in fresh}
    kept = [chapter for chapter in before if chapter.partition("\n")[0] not in titles]
    return f"\n{_HEADING}".join([head, *(chapter.rstrip() + "\n" for chapter in kept), *fresh])


def as_json(chapters: Sequence[Chapter], command: str, took_s: float) -> str:
    """All chapters as one JSON object."""
    told = [dataclasses.asdict(chapter) for chapter in chapters]
    for chapter, plain in zip(chapters, told, strict=True):
        for finding, fields in zip(chapter.findings, plain["findings"], strict=True):
            fields["met"] = finding.met
    whole = {"machine": machine(), "command": command, "took_s": round(took_s, 1), "chapters": told}
    return json.dumps(whole, indent=2, ensure_ascii=False)


def spread(values: Spread, digits: int = 0) -> str:
    """``median (low–high)``."""
    return f"{values.median:,.{digits}f} ({values.low:,.{digits}f}–{values.high:,.{digits}f})"


def ratio(values: Spread) -> str:
    """A ratio's spread."""
    return spread(values, 2)


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1e3:,.1f}"


def us(seconds: float) -> str:
    """Seconds as microseconds."""
    return f"{seconds * 1e6:,.0f}"


def number(value: float) -> str:
    """With separators, without decimals."""
    return f"{value:,.0f}"


def _grid(table: Table) -> list[str]:
    rows = [table.columns, tuple("---" if column == 0 else "---:" for column in range(len(table.columns))), *table.rows]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # a system without it
        return []
