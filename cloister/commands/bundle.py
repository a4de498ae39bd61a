"""``cloister bundle``: one file with all that an auditor needs of a run, and nothing of its data or weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cloister.output import Format, FormatOption, print_record
from wire.errors import ConfigError

__all__ = ["BundleLine", "app"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLine:
    """A bundle that was written.

    Attributes:
        bundle: the file.
        subject: SHA-256 of the record that it is about.
        records: how many it holds.
        receipts: how many.
        anchors: how many heads of logs it finds on chains.
        bytes: of the file.
    """

    bundle: Path
    subject: str
    records: int
    receipts: int
    anchors: int
    bytes: int


@app.command()
def bundle(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A finished run's folder.")] = None,
    *,
    record: Annotated[
        int | None, typer.Option(min=0, help="Instead of a run: the number of a record in the log.")
    ] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="BUNDLE", help="Another owner's bundle that this run builds on; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file; RUN/bundle.zip if not said.")] = None,
    log: Annotated[
        str | None,
        typer.Option("--log", metavar="URL", help="sqlite:////… or postgresql+psycopg://…; or CLOISTER_LOG."),
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Write one file from which anybody can verify a run: records, proofs, receipts, anchors. No data, no weights.

    Example: [bold]cloister bundle runs/digits[/]
    """
    from provenance.bundle import load_bundle, save_bundle  # noqa: PLC0415 - `--help` is quicker without
    from provenance.bundling import collect, read_run  # noqa: PLC0415
    from provenance.log import Log  # noqa: PLC0415

    if (run is None) == (record is None) or (run is None and out is None):
        raise ConfigError("name a run's folder, or --record NUMBER with --out FILE")
    book = Log(log)
    envelope, receipts = (book.entry(record or 0), {}) if run is None else read_run(run)
    made = collect(book, envelope, receipts, [load_bundle(path) for path in others or []])
    path = out if out is not None else (run or Path()) / "bundle.zip"
    line = BundleLine(
        bundle=path,
        subject=made.subject,
        records=len(made.records),
        receipts=sum(len(lines) for lines in made.receipts.values()),
        anchors=sum(len(part.proofs.anchors) for part in made.logs.values()),
        bytes=save_bundle(made, path),
    )
    print_record(line, fmt)
