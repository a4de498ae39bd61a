"""``cloister doctor``: checks this machine, an identity and a node, and says what to do about what it finds."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from cloister.exits import ExitCode
from cloister.output import Format, FormatOption, print_rows
from wire.certificates import facts_of
from wire.channels import connect, parse_pin, parse_target, wait_ready
from wire.errors import CloisterError, ConfigError, error_from_rpc
from wire.identity import Identity, load_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc

    from protos.node_pb2 import DescribeResponse

__all__ = ["Check", "app"]

TORCH_NEEDED: Final = (2, 13)
SKEW_WARN_S: Final = 2.0  # records and certificates of both sides are read side by side; more than this confuses people
SKEW_FAIL_S: Final = 60.0  # a certificate made now would not be valid yet for a peer that is further behind
DISK_WARN_BYTES: Final = 5 * 2**30  # a few snapshots of a middle of 100 M parameters with Adam's state
DISK_FAIL_BYTES: Final = 2**28  # not even one of them
EXPIRY_WARN: Final = dt.timedelta(days=30)
NODE_TIMEOUT_S: Final = 5.0

Status = Literal["ok", "warn", "fail"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what was looked at, how it stands, what was found, and what to do."""

    check: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class _NodeAsked:
    """The node to check, and how to know it."""

    target: str
    pin: str | None
    certificate: Path | None
    ca: Path | None


@app.command()
def doctor(
    *,
    identity: Annotated[Path | None, typer.Option(help="An identity's folder; needed to check a node.")] = None,
    node: Annotated[
        str | None, typer.Option(metavar="HOST:PORT[#PIN]", help="A node to reach, as `cloister node` prints it.")
    ] = None,
    pin: Annotated[str | None, typer.Option(help="The fingerprint of the node's certificate.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Or the file of it.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Or the file of a CA that vouches for it.")] = None,
    state_dir: Annotated[Path, typer.Option(help="Where runs or sessions are kept: its disk is checked.")] = Path(),
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Check this machine, an identity and a node, and say what to do. Ends with 1 if a check fails.

    Example: [bold]cloister doctor --identity owner --node gpu1.example.org:7700#sha256:1f2e…[/]
    """
    asked = _asked_node(node, pin, certificate, ca, identity)
    checks = list(_all_checks(identity, asked, state_dir))
    print_rows(checks, fmt, styles={"ok": "green", "warn": "yellow", "fail": "bold red"})
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(ExitCode.FAILED)


def _asked_node(
    node: str | None, pin: str | None, certificate: Path | None, ca: Path | None, identity: Path | None
) -> _NodeAsked | None:
    if node is not None and pin is None and "#" in node:
        node, _, pin = node.partition("#")  # as `cloister node` prints it
    ways = sum(way is not None for way in (pin, certificate, ca))
    if node is None:
        if ways:
            raise ConfigError("--pin, --certificate and --ca say how to know a node: give --node HOST:PORT too")
        return None
    parse_target(node)
    if pin is not None:
        parse_pin(pin)
    if ways != 1 or identity is None:
        raise ConfigError("--node needs --identity, and exactly one of --pin, --certificate and --ca")
    return _NodeAsked(node, pin, certificate, ca)


def _all_checks(identity: Path | None, asked: _NodeAsked | None, state_dir: Path) -> Iterator[Check]:
    yield _python()
    yield from _torch()
    yield _disk(state_dir)
    loaded: Identity | None = None
    if identity is not None:
        try:
            loaded = load_identity(identity)
        except CloisterError as error:
            yield _failed("identity", error)
        else:
            yield _expiry(loaded)
    if asked is not None:
        yield from _node(asked, loaded)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "ok", found)


def _torch() -> Iterator[Check]:
    try:
        import torch  # noqa: PLC0415 - takes seconds, and only this check needs it
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        yield Check("torch", "fail", str(error), "run `make setup`, or pip install 'cloister[train]'")
        return
    found = f"{torch.__version__}, {'CUDA' if torch.cuda.is_available() else 'CPU only'}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_NEEDED:
        yield Check("torch", "fail", found, "install torch 2.13 or newer")
    else:
        yield Check("torch", "ok", found)
    threads, cores = torch.get_num_threads(), _cores()
    if threads > cores:
        yield Check(
            "threads", "warn", f"{threads} on {cores} cores", f"set OMP_NUM_THREADS={cores}: more only get in the way"
        )
    else:
        yield Check("threads", "ok", f"{threads} on {cores} cores")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _disk(folder: Path) -> Check:
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("disk", "fail", f"{place}: {error.strerror}", "choose another --state-dir")
    found = f"{free / 2**30:.1f} GiB free in {place}"
    if not os.access(place, os.W_OK):
        return Check("disk", "fail", f"{place} cannot be written", "choose another --state-dir, or change its rights")
    if free < DISK_FAIL_BYTES:
        return Check("disk", "fail", found, "free some space: not even one snapshot fits")
    if free < DISK_WARN_BYTES:
        return Check("disk", "warn", found, "free some space: snapshots of a large middle take several GiB")
    return Check("disk", "ok", found)


def _expiry(identity: Identity) -> Check:
    until = facts_of(identity.certificate_pem).valid_until
    found = f"{identity.role} sha256:{identity.fingerprint}, until {until:%Y-%m-%d}"
    if until - dt.datetime.now(dt.UTC) < EXPIRY_WARN:
        return Check("identity", "warn", found, "make a new identity soon, and give its certificate to your peers")
    return Check("identity", "ok", found)


def _node(asked: _NodeAsked, identity: Identity | None) -> Iterator[Check]:
    try:
        with socket.create_connection(parse_target(asked.target), timeout=NODE_TIMEOUT_S):
            pass
    except (OSError, UnicodeError) as error:
        yield Check(
            "reach node", "fail", f"{asked.target}: {error}", "check host, port and firewall, and that the node runs"
        )
        return
    yield Check("reach node", "ok", asked.target)
    if identity is None:
        yield Check("TLS", "fail", "no usable identity", "see the row above")
        return
    try:
        channel = connect(
            asked.target, identity, pin=asked.pin, certificate=asked.certificate, ca=asked.ca, timeout_s=NODE_TIMEOUT_S
        )
        with channel:
            wait_ready(channel, NODE_TIMEOUT_S)
            yield Check("TLS", "ok", "both sides accept each other")
            yield from _describe(channel)
    except CloisterError as error:
        yield _failed("TLS", error)


def _describe(channel: grpc.Channel) -> Iterator[Check]:
    import grpc  # noqa: PLC0415 - a command that asks no node needs none of it

    from protos.node_pb2 import DescribeRequest  # noqa: PLC0415
    from protos.node_pb2_grpc import NodeStub  # noqa: PLC0415

    stub = NodeStub(channel)
    try:
        asked_at = time.time()
        stub.Describe(DescribeRequest(), timeout=NODE_TIMEOUT_S)  # the first call also pays for what connects lazily
        asked_at = time.time()
        answer = stub.Describe(DescribeRequest(), timeout=NODE_TIMEOUT_S)
        answered_at = time.time()
    except grpc.RpcError as error:
        yield _failed("describe", error_from_rpc(error))
        return
    yield _described(answer)
    yield _clock(answer.answered_at_unix_s, asked_at, answered_at)


def _described(answer: DescribeResponse) -> Check:
    found = f"cloister {answer.version}, torch {answer.torch_version}, {answer.device}, {answer.open_sessions} sessions"
    if answer.draining:
        return Check("describe", "warn", found, "the node is about to stop and takes no new sessions: use another one")
    return Check("describe", "ok", found)


def _clock(answered_at_node: float, asked_at: float, answered_at: float) -> Check:
    """The node answered somewhere between; half the round trip is what cannot be known."""
    skew = answered_at_node - (asked_at + answered_at) / 2
    surely = abs(skew) - (answered_at - asked_at) / 2
    direction = "ahead" if skew > 0 else "behind"
    found = f"the node's is {abs(skew):.3f} s {direction}, round trip {answered_at - asked_at:.3f} s"
    if not surely <= SKEW_FAIL_S:  # also when the node claims a time that is no number
        return Check("clock", "fail", found, "set both clocks by NTP: certificates and records carry times")
    if surely > SKEW_WARN_S:
        return Check("clock", "warn", found, "set both clocks by NTP")
    return Check("clock", "ok", found)


def _failed(check: str, error: CloisterError) -> Check:
    """A row from one of our errors, which say what is wrong, a colon, and what to do."""
    found, _, advice = str(error).rpartition(": ")
    return Check(check, "fail", found or advice, advice if found else "")
