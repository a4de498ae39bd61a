"""``cloister audit``: the auditor's page."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from cloister.commands.verify import open_witness

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _audit() -> None:
    """Verify bundles on a page in the browser."""


@app.command()
def serve(
    folder: Annotated[Path | None, typer.Argument(help="Bundles (.zip) that can be looked up by digest.")] = None,
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7780,
    name: Annotated[
        list[str] | None, typer.Option(help="A host name that the page answers to, besides localhost; repeatable.")
    ] = None,
    rpc: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The chain: https://… (several endpoints with commas), or dev:FILE."),
    ] = None,
    confirmations: Annotated[int, typer.Option(min=0, help="Blocks on top before an anchor is final.")] = 12,
) -> None:
    """Serve the auditor's page: drop a bundle or a model file, or look up a digest. It needs no secrets.

    Example: [bold]cloister audit serve bundles/[/]
    """
    import uvicorn  # noqa: PLC0415 - `--help` is quicker without

    from cloister.auditpage import audit_app  # noqa: PLC0415

    with ExitStack() as stack:
        witness = None if rpc is None else open_witness(rpc, stack)
        hosts = ("localhost", "127.0.0.1", "[::1]", host, *(name or []))
        made = audit_app(folder, witness=witness, confirmations=confirmations, hosts=hosts)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{shown}:{port}/ (Ctrl-C stops it)", err=True)
        uvicorn.run(made, host=host, port=port, log_level="warning", server_header=False, limit_concurrency=64)
