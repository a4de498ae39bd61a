"""``cloister dataset``: commit to a data set without showing it, and open single records later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cloister.factories import load_factory
from cloister.output import Format, FormatOption, print_record, progress_console
from provenance.commitments import (
    Absence,
    Membership,
    commit,
    load_commitment,
    open_proof,
    proof_bytes,
    prove_absence,
    prove_membership,
)
from provenance.sources import Files, Items, Source, source_of
from wire.errors import ConfigError, ProvenanceError

__all__ = ["CommitmentLine", "ProofLine", "app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="A folder, a .csv, .parquet or .npz file, or module:function.")
]
CommitmentOption = Annotated[
    Path,
    typer.Option("--commitment", help="The folder that `cloister dataset commit` wrote; it holds the secret seed."),
]
KeyOption = Annotated[str | None, typer.Option("--key", help="The column that names a CSV or Parquet file's rows.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where the proof goes.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitmentLine:
    """A commitment.

    Attributes:
        root: what may be published.
        records: how many.
        kind: what they are.
        order: whether absence can be proven (``name``).
        folder: where seed and leaves are kept.
    """

    root: str
    records: int
    kind: str
    order: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofLine:
    """A proof.

    Attributes:
        proof: of what.
        record: name or number.
        root: of the commitment that it belongs to.
        out: where it is.
    """

    proof: str
    record: str
    root: str
    out: Path | None


@app.command("commit")
def commit_command(
    data: DataArgument,
    *,
    out: Annotated[Path, typer.Option(help="A new folder for what proofs need; keep it as secret as the data.")],
    key: KeyOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Commit to a data set: one root over salted hashes, from which nobody can guess a record.

    The folder [bold]--out[/] holds the seed of the salts: who has it and a guess can test the guess, and without it
    nothing can be proven.

    Example: [bold]cloister dataset commit scans/ --out scans.commitment[/]
    """
    from rich.progress import (  # noqa: PLC0415 - `cloister --help` is quicker without
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("hashing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=progress_console()
    )
    with bar:
        task = bar.add_task("hashing", total=None)
        source = _source(data, key, lambda count: bar.advance(task, count))
        if not isinstance(source, Files):
            bar.columns = (TextColumn("hashing"), BarColumn(), MofNCompleteColumn(), TextColumn("records"))
            made = commit(source, out, on_record=lambda: bar.advance(task))
        else:
            bar.update(task, total=_bytes(Path(data)))
            made = commit(source, out)
    line = CommitmentLine(root=made.root, records=made.records, kind=made.kind, order=made.order, folder=out)
    print_record(line, fmt)


@app.command()
def prove(
    data: DataArgument,
    record: Annotated[
        str,
        typer.Argument(
            metavar="RECORD", help="Its name (a file's path, a row's key); its number, from 0, if it has none."
        ),
    ],
    *,
    commitment: CommitmentOption,
    out: OutOption,
    key: KeyOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Open one record: prove that it is in the data set, and tell nothing of any other.

    Hand on the proof, and the record itself in the way you like.

    Example: [bold]cloister dataset prove scans/ a/0017.png --commitment scans.commitment --out 0017.proof[/]
    """
    source = _source(data, key)
    which = int(record) if record.isascii() and record.isdecimal() and not _has_names(commitment) else record
    proof, _ = prove_membership(source, commitment, which)
    _write(out, proof)
    print_record(_line(proof, load_commitment(commitment).root, out), fmt)


@app.command("prove-absent")
def prove_absent(
    data: DataArgument,
    name: Annotated[str, typer.Argument(help="A name that is not in the data set.")],
    *,
    commitment: CommitmentOption,
    out: OutOption,
    key: KeyOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Prove that no record has this name, where names are in order; it shows the names of its two neighbours.

    Example: [bold]cloister dataset prove-absent scans/ a/0018.png --commitment scans.commitment --out none.proof[/]
    """
    proof = prove_absence(_source(data, key), commitment, name)
    _write(out, proof)
    print_record(_line(proof, load_commitment(commitment).root, out), fmt)


@app.command("check")
def check_command(
    proof: Annotated[Path, typer.Argument(help="A proof.")],
    *,
    commitment: Annotated[Path, typer.Option(help="The commitment's public file, commitment.json, or its folder.")],
    record: Annotated[
        Path | None, typer.Option(help="The opened record's content: needed for a proof of membership.")
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Check a proof; needs no seed and no data but the opened record.

    Example: [bold]cloister dataset check 0017.proof --commitment commitment.json --record 0017.png[/]
    """
    public = load_commitment(commitment if commitment.is_dir() else commitment.parent)
    try:
        with proof.open("rb") as file:
            opened = open_proof(file.read(2**20).rstrip(b"\n"))
    except OSError as error:
        raise ConfigError(f"cannot read {proof}: {error.strerror}") from error
    if isinstance(opened, Absence):
        opened.check(public)
    elif record is None:
        raise ProvenanceError("a proof of membership goes with its record: give --record FILE")
    else:
        ((_, content),) = Files(record).records()
        opened.check(public, content)
    print_record(_line(opened, public.root, None), fmt)


def _source(data: str, key: str | None, on_bytes: Callable[[int], None] = lambda _count: None) -> Source:
    path = Path(data)
    if not path.exists() and ":" in data:
        if key is not None:
            raise ConfigError("--key names the rows of a CSV or Parquet file, not a dataset's items")
        return Items(_dataset(data))
    source = source_of(path, key=key)
    return Files(path, on_bytes) if isinstance(source, Files) else source


def _dataset(name: str) -> object:
    function = load_factory(name)
    try:
        made: object = function()
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
    return getattr(made, "dataset", made)  # a loader's own dataset: its order, not a shuffled one


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _has_names(folder: Path) -> bool:
    return load_commitment(folder).order == "name"


def _write(out: Path, proof: Membership | Absence) -> None:
    try:
        out.write_bytes(proof_bytes(proof) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error


def _line(proof: Membership | Absence, root: str, out: Path | None) -> ProofLine:
    if isinstance(proof, Absence):
        return ProofLine(proof="absence", record=proof.name, root=root, out=out)
    name = proof.opening.name or str(proof.opening.index)
    return ProofLine(proof="membership", record=name, root=root, out=out)
