"""What commands print: results on stdout, as a table for people or as JSON for programs; all else on stderr.

Strings that a peer, a file or a user supplied are shown as text: markup in them is not obeyed, and control characters
(which a terminal would obey) are replaced.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from _typeshed import DataclassInstance
    from rich.console import Console

__all__ = ["Format", "FormatOption", "clean", "print_error", "print_record", "print_rows", "progress_console"]


class Format(enum.StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="Print results for people, or for programs.")]


def clean(text: object) -> str:
    """``text`` without what a terminal would obey: control characters and escape sequences become ``�``."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in str(text))


def print_error(message: str) -> None:
    """One line on stderr: ``error: …``."""
    print(f"error: {clean(message)}", file=sys.stderr, flush=True)  # noqa: T201 - the one place that prints errors


def print_record(record: DataclassInstance, fmt: Format) -> None:
    """One result: a line for each field (never wrapped, so that it can be copied), or a JSON object."""
    if fmt is Format.JSON:
        _print_json(_plain(record))
        return
    fields = {f.name.replace("_", " "): getattr(record, f.name) for f in dataclasses.fields(record)}
    width = max(len(name) for name in fields)
    _print("\n".join(f"{name:<{width}}  {_cell(value)}" for name, value in fields.items()))


def print_rows(rows: Sequence[DataclassInstance], fmt: Format, *, styles: Mapping[str, str] | None = None) -> None:
    """Several results of one kind: a table with a column for each field, or a JSON array.

    Args:
        rows: Dataclasses of one class.
        fmt: Table or JSON.
        styles: The rich style of a cell with this exact text, such as ``{"fail": "red"}``.
    """
    if fmt is Format.JSON:
        _print_json([_plain(row) for row in rows])
        return
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - `cloister --help` is quicker without
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for f in dataclasses.fields(rows[0]) if rows else ():
        table.add_column(f.name.replace("_", " "), overflow="fold")
    for row in rows:
        cells = [_cell(getattr(row, f.name)) for f in dataclasses.fields(row)]
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in cells))
    Console().print(table)


def progress_console() -> Console:
    """Where progress and remarks go: stderr, so that stdout holds results alone."""
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=True, highlight=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dt.datetime):
        return f"{value:%Y-%m-%d %H:%M} UTC"
    if isinstance(value, tuple | list):
        return ", ".join(clean(item) for item in value)
    return clean(value)


def _plain(record: DataclassInstance) -> dict[str, Any]:
    return dataclasses.asdict(record)


def _print_json(value: object) -> None:
    _print(json.dumps(value, indent=2, default=_jsonable))


def _jsonable(value: object) -> str:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form here: give it one in cloister.output")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
