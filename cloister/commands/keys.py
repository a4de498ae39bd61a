"""``cloister keys``: make an identity, show it, and trust a peer's certificate."""

from __future__ import annotations

import datetime as dt
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from cloister.output import Format, FormatOption, print_record
from wire.certificates import CertificateFacts, facts_of, first_certificate, read_certificate_file
from wire.errors import ConfigError, IdentityError
from wire.files import write_private
from wire.identity import CERTIFICATE_FILE, Identity, create_identity, load_identity
from wire.trust import check_pinnable

__all__ = ["PASSPHRASE_VARIABLE", "PassphraseFileOption", "app", "read_passphrase"]

PASSPHRASE_VARIABLE: Final = "CLOISTER_PASSPHRASE"  # noqa: S105 - its name, not its value
MAX_PASSPHRASE_BYTES: Final = 1024

PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(help=f"File with the passphrase, mode 0600. Else {PASSPHRASE_VARIABLE} is read, else you are asked."),
]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _keys() -> None:
    """Make, show and trust identities.

    An identity is a folder: a signing key (encrypted by a passphrase) and a TLS certificate with its key. Owner and
    node each make one, and each gives its [bold]tls.crt[/] to the other.
    """


@dataclass(frozen=True, slots=True)
class _Shown:
    """What ``keys init`` and ``keys show`` print."""

    role: str
    fingerprint: str
    address: str
    valid_until: dt.datetime
    expired: bool
    names: tuple[str, ...]
    certificate: Path


@dataclass(frozen=True, slots=True)
class _Pinned:
    """What ``keys trust`` prints."""

    fingerprint: str
    subject: str
    valid_until: dt.datetime
    file: Path
    already_there: bool


@app.command()
def init(
    *,
    role: Annotated[Literal["owner", "node"], typer.Option(help="Owners dial out; nodes serve.")],
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist yet, or be empty.")],
    name: Annotated[
        list[str] | None, typer.Option(help="DNS name or IP address of the node, for peers that check it by a CA.")
    ] = None,
    passphrase_file: PassphraseFileOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Make a new identity.

    Example: [bold]cloister keys init --role node --out node --name gpu1.example.org[/]
    """
    passphrase = read_passphrase(passphrase_file, confirm=True)
    print_record(_describe(create_identity(out, role=role, passphrase=passphrase, names=name or ())), fmt)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An identity's folder.")],
    *,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show an identity's fingerprint, address, expiry and names; no passphrase is needed.

    Example: [bold]cloister keys show node[/] prints the fingerprint that owners give as --pin.
    """
    print_record(_describe(load_identity(folder, check_dates=False)), fmt)


@app.command()
def trust(
    peer_cert: Annotated[Path, typer.Argument(help="The peer's tls.crt. Never its key.")],
    *,
    into: Annotated[Path, typer.Option(help="The folder of trusted certificates; made if it is missing.")],
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Trust a peer's certificate: a running node lets this owner in from the next connection on.

    Compare the fingerprint with what the peer reads to you from [bold]cloister keys show[/]: a file may be swapped on
    its way. Deleting the file from the folder ends the trust.

    Example: [bold]cloister keys trust owner/tls.crt --into node-trust[/]
    """
    pem = first_certificate(read_certificate_file(peer_cert))
    check_pinnable(pem, str(peer_cert))
    facts = facts_of(pem, str(peer_cert))
    if facts.valid_until < dt.datetime.now(dt.UTC):
        raise IdentityError(
            f"{peer_cert} expired on {facts.valid_until:%Y-%m-%d}: ask the peer for its new certificate"
        )
    file = into / f"{facts.fingerprint}.pem"
    print_record(
        _Pinned(f"sha256:{facts.fingerprint}", facts.subject, facts.valid_until, file, not _add(file, pem)), fmt
    )


def read_passphrase(file: Path | None, *, confirm: bool = False) -> str:
    """The passphrase from ``file``, else from the environment, else from the person at the terminal.

    Args:
        file: Its first line is the passphrase; nobody else may be able to read it.
        confirm: Ask twice, as for a new one.

    Raises:
        ConfigError: There is none of the three, or the file is unfit.
    """
    if file is not None:
        return _passphrase_in(file)
    if given := os.environ.get(PASSPHRASE_VARIABLE):
        return given
    if not sys.stdin.isatty():
        raise ConfigError(f"no passphrase: give --passphrase-file, or set {PASSPHRASE_VARIABLE}, or run in a terminal")
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def _passphrase_in(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(MAX_PASSPHRASE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if os.name == "posix" and stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(f"{file} can be read by others (mode {mode & 0o777:04o}): run `chmod 600 {file}`")
    try:
        first_line = content.decode().split("\n", 1)[0].removesuffix("\r")
    except UnicodeDecodeError:
        first_line = ""
    if not first_line or len(content) > MAX_PASSPHRASE_BYTES:
        raise ConfigError(f"{file} holds no passphrase: it is the first line, in UTF-8, of at most 1 KiB")
    return first_line


def _describe(identity: Identity) -> _Shown:
    facts: CertificateFacts = facts_of(identity.certificate_pem)
    return _Shown(
        role=identity.role,
        fingerprint=f"sha256:{identity.fingerprint}",
        address=identity.address,
        valid_until=facts.valid_until,
        expired=facts.valid_until < dt.datetime.now(dt.UTC),
        names=facts.names,
        certificate=identity.folder / CERTIFICATE_FILE,
    )


def _add(file: Path, pem: bytes) -> bool:
    """Whether the file is new; a node that watches the folder sees it whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            return False
        write_private(partial, pem)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise IdentityError(f"cannot write {file}: {error.strerror}; choose a folder that you can write") from error
    return True
