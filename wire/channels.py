"""Channels between an owner and a node: gRPC over mutual TLS, and who is let in.

Peers know each other by certificate: *pinned* (exactly this certificate, by its SHA-256 or its file) or vouched for by
a CA whose file is given. A pinned certificate is the only root that TLS is told about, and it must not be an authority,
so its key cannot vouch for a second one. The node reads its trust anew whenever the files change.

The retries of gRPC are off: a step is resent by the link, which knows what is safe to send twice. Keepalive notices a
peer that is gone within :data:`KEEPALIVE_S` + :data:`KEEPALIVE_TIMEOUT_S` seconds.
"""

from __future__ import annotations

import hmac
import re
import socket
import ssl
from typing import TYPE_CHECKING, Final, cast

import grpc

from wire.certificates import NODE_NAME, facts_of, fingerprint_of, first_certificate, read_certificate_file
from wire.errors import ConfigError, IdentityError, UnreachableError
from wire.trust import Trust, check_pinnable, peer_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wire.identity import Identity

__all__ = [
    "CONNECT_TIMEOUT_S",
    "KEEPALIVE_S",
    "KEEPALIVE_TIMEOUT_S",
    "MAX_MESSAGE_BYTES",
    "Trust",
    "channel_options",
    "connect",
    "fetch_certificate",
    "parse_pin",
    "parse_target",
    "peer_fingerprint",
    "server_credentials",
    "server_options",
    "wait_ready",
]

MAX_MESSAGE_BYTES: Final = 512 * 2**20  # two of the largest tensors (256 MiB), as a skip connection across a cut needs
CONNECT_TIMEOUT_S: Final = 10.0  # a TLS handshake takes two round trips, a satellite's round trip 0.6 s
KEEPALIVE_S: Final = 20.0  # with the timeout, a peer that is gone is noticed within half a minute
KEEPALIVE_TIMEOUT_S: Final = 10.0  # a 16 MiB frame ahead of the ping takes 1.3 s on a 100 Mbit/s link
MIN_PING_INTERVAL_S: Final = 10.0  # half of what owners send: jitter never counts as abuse
HANDSHAKE_TIMEOUT_S: Final = 20.0  # a stranger who opens a connection and says nothing is dropped after this
RECONNECT_FIRST_S: Final = 0.1
RECONNECT_MAX_S: Final = 5.0
MAX_STREAMS: Final = 64  # of one connection; an owner has a few sessions, each with one stream

# No option for HTTP/2 windows, frames or buffers: gRPC opens the window for each message that is awaited, and reached
# 0.92 of the physical bound over 50 ms and 100 Mbit/s, streamed or one 2 MiB message at a time, with and without them.

Options = list[tuple[str, int | str]]

_SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}")
_TARGET: Final = re.compile(r"(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")


def channel_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    """The gRPC options of the owner's side."""
    return [
        *_common_options(max_message_bytes),
        ("grpc.http2.max_pings_without_data", 0),  # 0 is no limit: a long step is silent, and pings keep it alive
        ("grpc.enable_retries", 0),
        (
            "grpc.use_local_subchannel_pool",
            1,
        ),  # channels never share a connection: each has its own pin and its own fate
        ("grpc.initial_reconnect_backoff_ms", _ms(RECONNECT_FIRST_S)),
        ("grpc.min_reconnect_backoff_ms", _ms(CONNECT_TIMEOUT_S)),  # despite its name: the limit of one attempt
        ("grpc.max_reconnect_backoff_ms", _ms(RECONNECT_MAX_S)),
    ]


def server_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    """The gRPC options of the node's side."""
    return [
        *_common_options(max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(MIN_PING_INTERVAL_S)),
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_TIMEOUT_S)),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.so_reuseport", 0),  # a second node on the same port is an error, not a silent sharing
        # Nothing compressed is taken: gRPC would inflate 1 MB to 1 GB before it looks at the size (THREATS T02).
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
    ]


def connect(
    target: str,
    identity: Identity,
    *,
    pin: str | None = None,
    certificate: Path | None = None,
    ca: Path | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.Channel:
    """Opens a channel to the node at ``target``; with ``pin`` alone this asks the node for its certificate first.

    Args:
        target: ``host:port``, or ``[address]:port`` for IPv6.
        identity: Whom the node sees.
        pin: SHA-256 of the node's certificate in hex, with or without ``sha256:`` and colons.
        certificate: The file of the node's certificate.
        ca: The file of a CA that vouches for the node; the node's host name is then checked as browsers do.
        timeout_s: How long asking for the certificate may take.
        max_message_bytes: The largest message in either direction.

    Raises:
        ConfigError: The target is malformed, or not exactly one of ``pin``, ``certificate`` and ``ca`` is given.
        IdentityError: The node shows another certificate than the pinned one, or a file is not a certificate.
        UnreachableError: Nobody answers (only with ``pin``; else see :func:`wait_ready`).
    """
    parse_target(target)
    if sum(way is not None for way in (pin, certificate, ca)) != 1:
        raise ConfigError("say how to know the node: exactly one of its pin, its certificate file, or a CA file")
    options = channel_options(max_message_bytes=max_message_bytes)
    if ca is not None:
        roots = _read_authorities(ca)
    else:
        roots = _read_pinned(certificate) if certificate else _fetch_pinned(target, parse_pin(pin or ""), timeout_s)
        options.append(("grpc.ssl_target_name_override", _name_in(roots)))
    credentials = grpc.ssl_channel_credentials(roots, identity.private_key_pem, identity.certificate_pem)
    return grpc.secure_channel(target, credentials, options=options)


def wait_ready(channel: grpc.Channel, timeout: float = CONNECT_TIMEOUT_S) -> None:
    """Returns once both sides have accepted each other; a node that is still starting up is waited for.

    Raises:
        UnreachableError: Not within ``timeout`` seconds; says what to check.
    """
    ready = grpc.channel_ready_future(channel)
    try:
        ready.result(timeout=timeout)
    except grpc.FutureTimeoutError as error:
        ready.cancel()
        why = _why(channel)
        raise UnreachableError(f"no connection within {timeout:g} s ({why}): {_advice(why)}") from error


def fetch_certificate(target: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> bytes:
    """The certificate (PEM) that whoever answers at ``target`` shows; proves nothing until it is compared with a pin.

    TLS 1.3 shows the server's certificate before it asks for ours, so ours is not shown to a stranger here.

    Raises:
        UnreachableError: Nobody answers in time, or not in TLS.
    """
    host, port = parse_target(target)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the pin decides
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as raw,
            context.wrap_socket(raw, server_hostname=NODE_NAME) as tls,
        ):
            der = tls.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise UnreachableError(
            f"what answers at {target} does not speak TLS 1.3 as a node does: check the port"
        ) from error
    except (OSError, UnicodeError) as error:
        raise UnreachableError(
            f"no answer from {target} ({error}): check the address and that the node runs"
        ) from error
    return ssl.DER_cert_to_PEM_cert(der or b"").encode()


def parse_pin(text: str) -> str:
    """A fingerprint as 64 lowercase hex digits, from any of the ways people write it.

    Raises:
        ConfigError: It is not a SHA-256.
    """
    digits = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if not _SHA256_HEX.fullmatch(digits):
        raise ConfigError("a pin is sha256: and 64 hex digits; the node's owner sees it with `cloister keys show DIR`")
    return digits


def parse_target(target: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[address]:port``.

    Raises:
        ConfigError: It is neither.
    """
    match = _TARGET.fullmatch(target)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ConfigError(f"{target!r} is no address of a node: write host:port, or [address]:port for IPv6")
    return match[1].strip("[]"), int(match[2])


def server_credentials(identity: Identity, trust: Trust) -> grpc.ServerCredentials:
    """Credentials of one listening port; every handshake asks ``trust`` anew who is let in."""
    pair = (identity.private_key_pem, identity.certificate_pem)
    served = trust.roots()

    def configuration(roots: bytes) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        roots = trust.roots()
        if roots == served:
            return None
        served = roots
        return configuration(roots)

    # The stubs forget that a fetcher may answer "no change".
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
    return grpc.dynamic_ssl_server_credentials(configuration(served), fetcher, require_client_authentication=True)


def _common_options(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_S)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _fetch_pinned(target: str, pin: str, timeout_s: float) -> bytes:
    pem = fetch_certificate(target, timeout_s=timeout_s)
    shown = fingerprint_of(pem)
    if not hmac.compare_digest(shown, pin):
        raise IdentityError(
            f"{target} shows the certificate sha256:{shown}, but sha256:{pin} is pinned: nothing was sent; ask the "
            "node's operator whether its certificate was renewed, and do not go on if nobody renewed it"
        )
    check_pinnable(pem, f"the certificate of {target}")
    return pem


def _read_pinned(file: Path) -> bytes:
    pem = first_certificate(read_certificate_file(file))
    check_pinnable(pem, str(file))
    return pem


def _read_authorities(file: Path) -> bytes:
    pem = read_certificate_file(file)
    facts_of(pem, str(file))  # gRPC itself would only say that nobody is reachable
    return pem


def _name_in(pem: bytes) -> str:
    """A name that the pinned certificate carries, for TLS to find there: the pin itself says who it is."""
    names = facts_of(pem).names
    if not names:
        raise IdentityError(
            "the node's certificate carries no name for TLS to check: make one with `cloister keys init`"
        )
    return NODE_NAME if NODE_NAME in names else names[0]


def _why(channel: grpc.Channel) -> str:
    """Why the last attempt failed, in words of gRPC: only a call is told them."""
    probe = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
    try:
        probe(b"", timeout=1.0)
    except grpc.RpcError as error:
        return " ".join((error.details() or "no answer").split())[:300]
    return "it became ready this moment"


def _advice(why: str) -> str:
    if "has expired" in why:
        return "the node's certificate has expired; its operator makes a new identity, and you pin that one"
    if "CERTIFICATE_VERIFY_FAILED" in why:
        return "the node shows another certificate than the one you gave; compare with `cloister keys show` at the node"
    if "Hostname Verification" in why:
        return (
            "the node's certificate does not carry this host's name; its operator has one issued that does, or pin it"
        )
    if "refused" in why:
        return "nothing listens there, or not at all addresses of that name; start the node, or check host and port"
    if "Socket closed" in why or "reset" in why:
        return (
            "something is there but hangs up, as a node does that does not trust your certificate; at the node run "
            "`cloister keys trust YOUR_CERTIFICATE --into TRUST_FOLDER`, or check the port"
        )
    return "check the address, that the node runs, its pin or certificate, and that it trusts your certificate"
