"""What commands print: results on stdout, as a table for people or as JSON for programs; all else on stderr.

Strings that a peer, a file or a user supplied are shown as text: markup in them is not obeyed, and control characters
(which a terminal would obey) are replaced.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from _typeshed import DataclassInstance
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "ABSENT",
    "HEADING",
    "Format",
    "FormatOption",
    "clean",
    "print_error",
    "print_record",
    "print_rows",
    "progress_console",
    "size",
]

#: Keys of a dataclass field's metadata: what a table calls it, where that is not its name; and what stands for ``None``
#: there, where that is not ``-`` (which is for what does not apply).
HEADING: Final = "heading"
ABSENT: Final = "absent"
_GAP: Final = 3  # between two columns of a table
_EDGES: Final = 2  # left and right of it
_WIDE: Final = 100_000  # columns: a pipe has no edge at which to fold


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


def size(count: float) -> str:
    """So many bytes, for people: ``1.5 kB``, ``2.0 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:  # noqa: PLR2004 - SI units, as links are sold
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def print_record(record: DataclassInstance, fmt: Format, *, leave_out: Collection[str] = ()) -> None:
    """One result: a line for each field (never wrapped, so that it can be copied), or a JSON object.

    Args:
        record: Any dataclass.
        fmt: Lines or JSON.
        leave_out: Fields that have no line: the caller says them otherwise. JSON has them all.
    """
    if fmt is Format.JSON:
        _print_json(_plain(record))
        return
    _print("\n".join(_lines({name: cell for key, name, cell in _cells(record) if key not in leave_out})))


def print_rows(rows: Sequence[DataclassInstance], fmt: Format, *, styles: Mapping[str, str] | None = None) -> None:
    """Several results of one kind: a table with a column for each field, or a JSON array.

    Nothing but prose is folded, so that names and digests can be copied: in a terminal too narrow for that, each result
    is told line by line, as :func:`print_record` does.

    Args:
        rows: Dataclasses of one class.
        fmt: Table or JSON.
        styles: The rich style of a cell with this exact text, such as ``{"fail": "red"}``.
    """
    if fmt is Format.JSON:
        _print_json([_plain(row) for row in rows])
        return
    from rich.console import Console  # noqa: PLC0415 - `cloister --help` is quicker without
    from rich.text import Text  # noqa: PLC0415

    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    told = [[(name, cell) for _, name, cell in _cells(row)] for row in rows]
    if _fits(console, told):
        console.print(_table(told, styles or {}))
        return
    for row in told:
        for line, (_, cell) in zip(_lines(dict(row)), row, strict=True):
            console.print(Text(line, style=(styles or {}).get(cell, "")), soft_wrap=True)
        console.print()


def _fits(console: Console, rows: Sequence[Sequence[tuple[str, str]]]) -> bool:
    """Whether a table of these rows breaks no word."""
    from rich.cells import cell_len  # noqa: PLC0415 - as in print_rows

    columns = list(zip(*rows, strict=True))
    prose = [[cell for _, cell in column] for column in columns if _is_prose(column)]
    widths = [max(cell_len(text) for named in column for text in named) for column in columns]
    room = console.width - _EDGES - sum(widths) - _GAP * (len(columns) - 1)
    longest = [max(cell_len(word) for cell in cells for word in cell.split() or [""]) for cells in prose]
    given = sum(max(map(cell_len, cells)) for cells in prose)
    # Where it must, rich narrows the columns of prose until they are alike.
    return room >= 0 or (bool(prose) and room + given >= len(prose) * max(longest))


def _is_prose(column: Sequence[tuple[str, str]]) -> bool:
    return any(" " in cell for _, cell in column)


def _table(rows: Sequence[Sequence[tuple[str, str]]], styles: Mapping[str, str]) -> Table:
    """Rows of (heading, cell); a column in which no cell is prose is never folded."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - as in print_rows
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in zip(*rows, strict=True):
        table.add_column(column[0][0], no_wrap=not _is_prose(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for _, cell in row))
    return table


def progress_console() -> Console:
    """Where progress and remarks go: stderr, so that stdout holds results alone."""
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=True, highlight=False)


def _cells(record: DataclassInstance) -> list[tuple[str, str, str]]:
    """Each field: its name, what people call it, and its value for them."""
    return [
        (f.name, f.metadata.get(HEADING, f.name.replace("_", " ")), _cell(f, getattr(record, f.name)))
        for f in dataclasses.fields(record)
    ]


def _lines(fields: Mapping[str, str]) -> list[str]:
    width = max(len(name) for name in fields)
    return [f"{name:<{width}}  {cell}" for name, cell in fields.items()]


def _cell(field: dataclasses.Field[Any], value: object) -> str:
    if value is None:
        return str(field.metadata.get(ABSENT, "-"))
    if isinstance(value, int) and "bytes" in field.name.split("_"):
        return size(value)
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, dt.datetime):
        return f"{value:%Y-%m-%d %H:%M} UTC"
    if isinstance(value, tuple | list):
        return ", ".join(clean(item) for item in value)
    return clean(value)


def _plain(record: DataclassInstance) -> dict[str, Any]:
    return {name: _finite(value) for name, value in dataclasses.asdict(record).items()}


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever a record holds
    """JSON has no infinity."""
    if isinstance(value, float) and math.isinf(value):
        return "infinite"
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


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
