"""``cloister verify``: every claim of a bundle, its verdict, and whether it is proven or stated by whom."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.exits import ExitCode
from cloister.output import Format, FormatOption, print_record, print_rows
from wire.errors import ConfigError

if TYPE_CHECKING:
    from provenance.evidence import Witness

__all__ = ["app", "open_witness"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_STYLES: Final = {"holds": "green", "fails": "bold red", "revoked": "bold red", "unknown": "yellow", "proven": "bold"}
_DEV: Final = "dev:"


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `cloister bundle` wrote.")],
    *,
    model: Annotated[Path | None, typer.Option(help="A .safetensors file that should be the run's model.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data that the run should have consumed: as for `dataset`.")
    ] = None,
    commitment: Annotated[
        Path | None, typer.Option(help="The commitment's folder, whose seed hashes --dataset again.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The column that names a CSV or Parquet file's rows.")] = None,
    rpc: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The chain: https://… (several endpoints with commas), or dev:FILE."),
    ] = None,
    confirmations: Annotated[int, typer.Option(min=0, help="Blocks on top before an anchor is final.")] = 12,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="BUNDLE", help="More evidence, such as a later bundle; repeatable."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="What nothing here decides fails, too.")] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Verify a bundle without the data, and without trusting who made it.

    Exit code 0: no claim fails. 1: one fails, or something was revoked, or the file is no bundle. With --strict, also
    1 where a claim is unknown.

    Example: [bold]cloister verify bundle.zip --model model.safetensors --rpc https://rpc.example[/]
    """
    from provenance.bundle import load_bundle  # noqa: PLC0415 - `--help` is quicker without
    from provenance.verification import verify as check  # noqa: PLC0415

    first, more = load_bundle(bundle), [load_bundle(path) for path in others or []]
    with ExitStack() as stack:
        report = check(
            first,
            more,
            model=model,
            dataset_root=None if dataset is None else _root(dataset, commitment, key),
            witness=None if rpc is None else open_witness(rpc, stack),
            confirmations=confirmations,
        )
    if fmt is Format.JSON:
        print_record(report, fmt)
    else:
        print_rows(report.claims, fmt, styles=_STYLES)
        typer.echo(f"{bundle.name}: {report.verdict}")
    bad = {"fails", "revoked", "unknown"} if strict else {"fails", "revoked"}
    if report.verdict in bad:
        raise typer.Exit(ExitCode.FAILED)


def _root(dataset: str, commitment: Path | None, key: str | None) -> str:
    from provenance.commitments import recommit  # noqa: PLC0415 - numpy takes a while to import
    from provenance.sources import source_of  # noqa: PLC0415

    if commitment is None:
        raise ConfigError("--dataset needs --commitment FOLDER: without its seed the data has no root to compare")
    return recommit(source_of(Path(dataset), key=key), commitment).root


def open_witness(rpc: str, stack: ExitStack) -> Witness:
    """The chain that ``--rpc`` names, open as long as the stack is.

    Raises:
        ConfigError: it names none.
    """
    from provenance.chain import connect  # noqa: PLC0415 - web3 takes a second to import
    from provenance.witness import ChainWitness  # noqa: PLC0415

    if not rpc.startswith(_DEV):
        return ChainWitness(connect(rpc.split(",")))
    from provenance.devchain import DevChain  # noqa: PLC0415 - as above

    file = Path(rpc.removeprefix(_DEV))
    if not file.is_file():
        raise ConfigError(f"there is no development chain {file}")
    return ChainWitness(stack.enter_context(DevChain(file)).chain, independent=False)
