"""The benchmarks: ``python -m bench [loopback|…|encryption|all]``; ``make bench`` writes RESULTS.md."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bench import durability, encryption, loopback, memory, privacy, small, wan
from bench.blocks import tell
from bench.report import Chapter, as_json, as_markdown, merged

__all__ = ["main"]

RESULTS: Final = Path(__file__).with_name("RESULTS.md")
PICTURE: Final = Path(__file__).parent.parent / "docs" / "images" / "privacy.png"

#: Each in its full extent, or in its quick one, in the order of the report.
_BENCHMARKS: Final[dict[str, Callable[[argparse.Namespace], Chapter]]] = {
    "loopback": lambda asked: loopback.loopback(loopback.QUICK if asked.quick else loopback.FULL),
    "small": lambda asked: small.small(small.QUICK if asked.quick else small.FULL),
    "wan": lambda asked: wan.wan(wan.QUICK if asked.quick else wan.FULL),
    "durability": lambda asked: durability.durability(durability.QUICK if asked.quick else durability.FULL),
    "memory": lambda asked: memory.memory(memory.QUICK if asked.quick else memory.FULL),
    "privacy": lambda asked: privacy.privacy(
        privacy.QUICK if asked.quick else privacy.FULL, asked.data, PICTURE if asked.write and asked.data else None
    ),
    "encryption": lambda asked: encryption.encryption(encryption.QUICK if asked.quick else encryption.FULL, asked.data),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes where asked; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    # Leaves by the way of an exception, so that nodes, relays and folders go too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    names = list(_BENCHMARKS) if options.what == "all" else [options.what]
    command = _command(options.what, quick=options.quick, data=options.data is not None)
    chapters: list[Chapter] = []
    for name in names:
        chapters.append(_BENCHMARKS[name](options))
        if options.write:  # after each: what is measured stays measured
            old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
            RESULTS.write_text(merged(old, as_markdown(chapters, command, time.monotonic() - started)), "utf-8")
            tell(f"wrote {RESULTS}")
    took_s = time.monotonic() - started
    shown = as_json if options.format == "json" else as_markdown
    print(shown(chapters, command, took_s))  # noqa: T201 -- results go to stdout
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Cloister measured, in ratios of one run.")
    parser.add_argument("what", nargs="?", default="all", choices=[*_BENCHMARKS, "all"], help="one benchmark, or all")
    parser.add_argument("--quick", action="store_true", help="about a minute: the figures are rough")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="for privacy and encryption: mitbih/mitbih_beats_128.npz, and mnist10k/*.gz (MNIST's test set) for the "
        "first; without, synthetic beats",
    )
    parser.add_argument("--format", default="table", choices=["table", "json"], help="for people, or for programs")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS.name}, and the plot of privacy")
    return parser


def _command(what: str, *, quick: bool, data: bool = False) -> str:
    words = ["python", "-m", "bench", what] + (["--quick"] if quick else []) + (["--data", "FOLDER"] if data else [])
    return "make bench" if words[3:] == ["all"] else " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
