"""``cloister anchor``: put the provenance log's head where nobody can rewrite it, and see where heads stand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from cloister.anchoring import Anchoring
from cloister.commands.keys import PassphraseFileOption, read_passphrase
from cloister.exits import ExitCode
from cloister.output import Format, FormatOption, print_rows
from provenance.log import Log

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

LogOption = Annotated[
    str | None,
    typer.Option("--log", metavar="URL", help="sqlite:////… or postgresql+psycopg://…; CLOISTER_LOG, or your own."),
]

_STYLES: Final = {"final": "green", "mined": "cyan", "waiting": "yellow", "sent": "yellow"}


@app.command()
def status(log: LogOption = None, fmt: FormatOption = Format.TABLE) -> None:
    """Show every head on its way: waiting, sent, mined, final, or covered by a larger one. Asks no chain.

    Example: [bold]cloister anchor status[/]
    """
    from provenance.anchors import anchored  # noqa: PLC0415 - web3 takes a second to import

    book = Log(log)
    lines = anchored(book)
    if not lines and fmt is Format.TABLE:
        typer.echo(f"nothing was anchored yet (log {book.name}): `cloister anchor push` does", err=True)
        return
    print_rows(lines, fmt, styles=_STYLES)


@app.command()
def push(
    *,
    identity: Annotated[Path, typer.Option(help="The identity folder whose key signs, and pays.")],
    to: Annotated[
        str,
        typer.Option(
            help="log (signed heads alone), dev (a chain in a file), or https://… (several endpoints with commas)."
        ),
    ] = "dev",
    registry: Annotated[str | None, typer.Option(help="The registry's address; `dev` has its own.")] = None,
    chain_id: Annotated[int | None, typer.Option(help="EIP-155's id of the chain; another one is refused.")] = None,
    chain_file: Annotated[Path | None, typer.Option(help="Where the dev chain is kept, if not beside the log.")] = None,
    confirmations: Annotated[int, typer.Option(min=0, help="Blocks on top before a head is final.")] = 12,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is final.")] = 600,
    passphrase_file: PassphraseFileOption = None,
    log: LogOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Sign the log's head, anchor it, and wait until it is final. Stop it at any point; the next call goes on.

    Example: [bold]cloister anchor push --identity owner[/]
    """
    from wire.identity import load_signer  # noqa: PLC0415 - takes more than a second to import

    book = Log(log)
    where = Anchoring(to, registry, chain_id, chain_file, confirmations, timeout)
    where.check()
    lines, settled = where.push(book, load_signer(identity, read_passphrase(passphrase_file)))
    print_rows(lines, fmt, styles=_STYLES)
    if not settled:
        typer.echo(f"not final after {timeout:g} s: the same command goes on from here", err=True)
        raise typer.Exit(ExitCode.TRY_LATER)
