"""``cloister node``: serve middles to trusted owners."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from cloister import __version__
from cloister.commands.keys import PassphraseFileOption, read_passphrase
from cloister.logs import LogFormat, configure_logs
from cloister.output import Format, FormatOption, print_record
from server_side.accounts import Limits
from server_side.memory import hold_on
from server_side.node import NodeConfig, start_node
from wire.errors import ConfigError
from wire.identity import load_identity, load_signer
from wire.trust import Trust

__all__ = ["app"]

_log = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class _Ready:
    """What is printed once the node serves: owners need the address."""

    address: str
    device: str
    owners_trusted: int
    state_dir: Path
    metrics: str


@app.command()
def node(
    *,
    identity: Annotated[Path, typer.Option(help="The node's identity folder, from `cloister keys init --role node`.")],
    trust: Annotated[
        Path | None,
        typer.Option(help="Folder (or file) of trusted owners' certificates; read again whenever it changes."),
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificates of a CA that issues owners' certificates.")] = None,
    listen: Annotated[str, typer.Option(help="host:port to serve on; port 0 takes a free one.")] = "0.0.0.0:7700",
    state_dir: Annotated[Path, typer.Option(help="The node's own folder: its session table.")] = Path("cloister-node"),
    database: Annotated[
        str | None,
        typer.Option(
            help="SQLAlchemy URL of the session table, if not SQLite in the state folder.", envvar="CLOISTER_DATABASE"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N: one node process for each GPU.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch on the CPU; all cores, unless said.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="host:port for Prometheus (/metrics, /healthz), plain HTTP: bind it to a private address."),
    ] = None,
    idle_seconds: Annotated[float, typer.Option(min=1, help="A session that hears nothing for so long ends.")] = 3600.0,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="On SIGTERM, how long sessions may go on; a second signal stops at once."),
    ] = 30.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="NAME=NUMBER, again and again: what one owner may use. `--limit help=1` lists the names."),
    ] = None,
    passphrase_file: PassphraseFileOption = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Logs on stderr for people, or one JSON object a line.")
    ] = LogFormat.TEXT,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Serve middles to trusted owners: run this on the GPU machine.

    Prints the address to give to owners, with the pin that names this node:

        cloister keys init --role node --out node
        cloister keys trust owner.crt --into trusted
        cloister node --identity node --trust trusted --listen 0.0.0.0:7700

    Nobody is let in without a certificate from the trust folder or the CA. Stop it with Ctrl-C or SIGTERM: it takes no
    new sessions, lets those that live go on for the drain time, then ends.

    With --passphrase-file it signs what it computes: owners get receipts.
    """
    configure_logs(log_format)
    own = load_identity(identity)
    if trust is None and ca is None:
        raise ConfigError("nobody could connect: give --trust FOLDER with owners' certificates, or --ca FILE")
    trusted = Trust(trust, ca=ca)
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    hold_on()
    running = start_node(
        NodeConfig(
            listen=listen,
            identity=own,
            trust=trusted,
            state_dir=state_dir,
            database=database,
            device=device,
            threads=threads,
            limits=_limits(limit or []),
            idle_s=idle_seconds,
            metrics=metrics,
            version=__version__,
            signer=None if passphrase_file is None else load_signer(identity, read_passphrase(passphrase_file)),
        ),
    )
    host = listen.rpartition(":")[0]
    shown = "localhost" if host in ("0.0.0.0", "[::]", "") else host  # noqa: S104 -- compared, not bound
    serving = (
        "" if running.metrics_server is None else f"{(metrics or '').rpartition(':')[0]}:{running.metrics_server.port}"
    )
    print_record(
        _Ready(
            address=f"{shown}:{running.port}#sha256:{own.fingerprint}",
            device=str(running.device),
            owners_trusted=len(trusted.fingerprints()),
            state_dir=state_dir,
            metrics=serving or "off (--metrics host:port)",
        ),
        fmt,
    )
    stop.wait()
    _log.info("draining: no new sessions; %d live", running.sessions)
    running.drain(drain_seconds, hurry)
    running.stop()
    _log.info("stopped")


def _limits(pairs: list[str]) -> Limits:
    names = [f.name for f in dataclasses.fields(Limits)]
    given: dict[str, int] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in names or not number.isdecimal():
            defaults = ", ".join(f"{n}={getattr(Limits(), n)}" for n in names)
            raise ConfigError(f"--limit {pair}: NAME=NUMBER with one of (defaults) {defaults}")
        given[name] = int(number)
    return Limits(**given)
