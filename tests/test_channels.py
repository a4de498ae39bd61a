"""TLS channels and who is let in: a real gRPC server, real sockets, real certificates."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import socket
import ssl
import threading
import time
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from wire import channels
from wire.certificates import alternative_names, fingerprint_of, new_certificate
from wire.channels import Trust, connect, fetch_certificate, peer_fingerprint, server_credentials, wait_ready
from wire.errors import ConfigError, IdentityError, NotAuthorizedError, UnreachableError
from wire.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHORT_S = 0.6  # long enough for several attempts on loopback, where one takes 10 ms


def identity(role: Literal["owner", "node"] = "owner", *, days: int = 30) -> Identity:
    """An identity as create_identity makes it, less the keystore, which takes seconds."""
    address = "0x" + "0" * 40
    pem, key = new_certificate(f"cloister {role} {address}", alternative_names(()), days=days)
    return Identity(role, address, pem, key, fingerprint_of(pem), Path("/nonexistent"))


def issue(
    issuer: Identity | None, name: str, *, authority: bool = False, names: tuple[str, ...] = ("a.example",)
) -> Identity:
    """A certificate signed by ``issuer``'s key, whether it may sign or not (by its own where there is no issuer)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    parent = x509.load_pem_x509_certificate(issuer.certificate_pem) if issuer else None
    signer = load_pem_private_key(issuer.private_key_pem, None) if issuer else key
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    carried = [each for each in alternative_names(names) if str(each.value) in names]
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(parent.subject if parent else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(carried), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity("owner", name, pem, private, fingerprint_of(pem), Path("/nonexistent"))


def expired(role: Literal["owner", "node"]) -> Identity:
    """Of half an hour ago: new ones are valid from an hour before they are made."""
    address = "0x" + "0" * 40
    pem, key = new_certificate("late", alternative_names(()), days=-0.02)  # type: ignore[arg-type]  # half an hour
    return Identity(role, address, pem, key, fingerprint_of(pem), Path("/nonexistent"))


class WhoAmI(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs alone
    """Answers each call with the caller's fingerprint; ``/strict`` asks the trust again."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        ask: Callable[[grpc.ServicerContext], str] = peer_fingerprint
        if details.method == "/cloister.Test/Strict":
            ask = self.trust.authorize
        return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(ask, request, context))


def answer(ask: Callable[[grpc.ServicerContext], str], request: bytes, context: grpc.ServicerContext) -> bytes:
    try:
        return ask(context).encode() + request[:0]
    except NotAuthorizedError as error:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))


@dataclass(frozen=True, slots=True)
class Running:
    target: str
    node: Identity
    trust: Trust


@contextlib.contextmanager
def serve(node: Identity, trust: Trust) -> Iterator[Running]:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=channels.server_options())
    server.add_generic_rpc_handlers((WhoAmI(trust),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(node, trust))
    server.start()
    try:
        yield Running(f"127.0.0.1:{port}", node, trust)
    finally:
        server.stop(None).wait()


def who_am_i(channel: grpc.Channel, method: str = "Loose") -> str:
    call = channel.unary_unary(f"/cloister.Test/{method}", bytes, bytes)
    return bytes(call(b"", timeout=20)).decode()


def ask(running: Running, caller: Identity, *, within_s: float = 20.0, **known_by: str | Path) -> str:
    with connect(running.target, caller, **(known_by or {"pin": running.node.fingerprint})) as channel:  # type: ignore[arg-type]  # one of three
        wait_ready(channel, within_s)
        return who_am_i(channel, "Strict")


def refusal(running: Running, caller: Identity, **known_by: str | Path) -> str:
    with pytest.raises(UnreachableError) as refused:
        ask(running, caller, within_s=SHORT_S, **known_by)
    return str(refused.value)


def store(folder: Path, *identities: Identity) -> Path:
    folder.mkdir(exist_ok=True)
    for each in identities:
        (folder / f"{each.fingerprint}.pem").write_bytes(each.certificate_pem)
    return folder


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def owner() -> Identity:
    return identity()


@pytest.fixture(scope="module")
def node() -> Identity:
    return identity("node")


@pytest.fixture
def running(tmp_path: Path, node: Identity, owner: Identity) -> Iterator[Running]:
    with serve(node, Trust(store(tmp_path / "trust", owner))) as it:
        yield it


@pytest.mark.parametrize("style", ["{}", "sha256:{}", "SHA256:{}"])
def test_a_pinned_owner_and_a_pinned_node_accept_each_other(running: Running, owner: Identity, style: str) -> None:
    assert ask(running, owner, pin=style.format(running.node.fingerprint)) == owner.fingerprint


def test_a_certificate_file_pins_as_well_as_its_fingerprint(running: Running, owner: Identity, tmp_path: Path) -> None:
    file = write(tmp_path / "node.crt", running.node.certificate_pem)

    assert ask(running, owner, certificate=file) == owner.fingerprint


def test_T03_a_client_without_a_certificate_gets_nowhere(running: Running) -> None:
    credentials = grpc.ssl_channel_credentials(running.node.certificate_pem)
    options = [*channels.channel_options(), ("grpc.ssl_target_name_override", "cloister-node")]

    with grpc.secure_channel(running.target, credentials, options) as channel, pytest.raises(UnreachableError):
        wait_ready(channel, SHORT_S)


def test_T16_a_client_without_tls_gets_nowhere(running: Running) -> None:
    with grpc.insecure_channel(running.target, channels.channel_options()) as channel, pytest.raises(UnreachableError):
        wait_ready(channel, SHORT_S)


def test_T03_a_stranger_with_a_certificate_of_the_same_name_is_refused(running: Running) -> None:
    assert "does not trust your certificate" in refusal(running, identity())


def test_T03_an_expired_owner_is_refused_though_pinned(tmp_path: Path, node: Identity) -> None:
    late = expired("owner")

    with serve(node, Trust(store(tmp_path / "trust", late))) as running:
        assert "does not trust your certificate" in refusal(running, late)


def test_an_expired_node_is_refused_though_pinned(tmp_path: Path, owner: Identity) -> None:
    late = expired("node")

    with serve(late, Trust(store(tmp_path / "trust", owner))) as running:
        assert "has expired" in refusal(running, owner)


def test_T03_a_certificate_signed_by_a_pinned_owners_key_is_refused(running: Running, owner: Identity) -> None:
    assert "does not trust your certificate" in refusal(running, issue(owner, "a stranger with a friend"))


def test_T03_a_pinned_authority_vouches_for_nobody_not_even_itself(tmp_path: Path, node: Identity) -> None:
    authority = issue(None, "an owner of its own making", authority=True)
    trust = Trust(store(tmp_path / "trust", authority))

    with serve(node, trust) as running:
        for caller in (authority, issue(authority, "its child")):
            assert "does not trust your certificate" in refusal(running, caller)

    assert trust.fingerprints() == frozenset()


def test_T03_an_empty_trust_lets_nobody_in_and_does_not_fail(tmp_path: Path, node: Identity, owner: Identity) -> None:
    for trust in (Trust(), Trust(tmp_path / "absent"), Trust(store(tmp_path / "empty")), Trust(ca=tmp_path / "no-ca")):
        with serve(node, trust) as running:
            assert "does not trust your certificate" in refusal(running, owner)
        assert not trust.allows(owner.fingerprint)


def test_an_owner_added_while_the_node_runs_is_let_in_by_the_next_connection(
    tmp_path: Path, node: Identity, owner: Identity
) -> None:
    folder = store(tmp_path / "trust")

    with serve(node, Trust(folder)) as running, connect(running.target, owner, pin=node.fingerprint) as channel:
        with pytest.raises(UnreachableError):
            wait_ready(channel, SHORT_S)
        store(folder, owner)
        wait_ready(channel, 20)  # the same channel: the owner need not start anew either

        assert who_am_i(channel, "Strict") == owner.fingerprint


def test_T03_an_owner_removed_while_connected_is_refused_by_the_next_call(
    tmp_path: Path, node: Identity, owner: Identity
) -> None:
    folder = store(tmp_path / "trust", owner)
    trust = Trust(folder)

    with serve(node, trust) as running, connect(running.target, owner, pin=node.fingerprint) as channel:
        assert who_am_i(channel, "Strict") == owner.fingerprint
        (folder / f"{owner.fingerprint}.pem").unlink()

        with pytest.raises(grpc.RpcError) as refused:
            who_am_i(channel, "Strict")
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert not trust.allows(owner.fingerprint)
        assert "does not trust your certificate" in refusal(running, owner)


def test_with_a_ca_its_owners_are_let_in_beside_the_pinned_ones(
    tmp_path: Path, node: Identity, owner: Identity
) -> None:
    authority = issue(None, "the hospital's CA", authority=True)
    member, ca = issue(authority, "radiology"), write(tmp_path / "ca.pem", authority.certificate_pem)
    trust = Trust(store(tmp_path / "trust", owner), ca=ca)

    with serve(node, trust) as running:
        assert ask(running, member) == member.fingerprint
        assert ask(running, owner) == owner.fingerprint
        assert trust.allows(member.fingerprint)
        for stranger in (identity(), issue(owner, "vouched for by an owner"), issue(member, "vouched for by a member")):
            assert "does not trust your certificate" in refusal(running, stranger)


def test_T03_with_a_ca_an_owner_whose_pin_was_removed_is_not_mistaken_for_its_member(
    tmp_path: Path, node: Identity, owner: Identity
) -> None:
    ca = write(tmp_path / "ca.pem", issue(None, "a CA", authority=True).certificate_pem)
    folder = store(tmp_path / "trust", owner)
    trust = Trust(folder, ca=ca)

    with serve(node, trust) as running, connect(running.target, owner, pin=node.fingerprint) as channel:
        assert who_am_i(channel, "Strict") == owner.fingerprint
        (folder / f"{owner.fingerprint}.pem").unlink()

        with pytest.raises(grpc.RpcError, match="does not trust"):
            who_am_i(channel, "Strict")
        assert not trust.allows(owner.fingerprint)


def test_T03_when_the_ca_is_replaced_its_old_members_are_refused_by_the_next_call(
    tmp_path: Path, node: Identity
) -> None:
    authority = issue(None, "the old CA", authority=True)
    member, ca = issue(authority, "radiology"), write(tmp_path / "ca.pem", authority.certificate_pem)

    with serve(node, Trust(ca=ca)) as running, connect(running.target, member, pin=node.fingerprint) as channel:
        assert who_am_i(channel, "Strict") == member.fingerprint
        ca.write_bytes(issue(None, "the new CA", authority=True).certificate_pem)

        with pytest.raises(grpc.RpcError, match="does not trust"):
            who_am_i(channel, "Strict")


@pytest.mark.parametrize(("name", "accepted"), [("127.0.0.1", True), ("elsewhere.example", False)])
def test_with_a_ca_the_owner_checks_the_nodes_host_name(
    tmp_path: Path, owner: Identity, name: str, *, accepted: bool
) -> None:
    authority = issue(None, "the operator's CA", authority=True)
    ca = write(tmp_path / "ca.pem", authority.certificate_pem)

    with serve(issue(authority, "n", names=(name,)), Trust(store(tmp_path / "trust", owner))) as running:
        if accepted:
            assert ask(running, owner, ca=ca) == owner.fingerprint
        else:
            assert "does not carry this host's name" in refusal(running, owner, ca=ca)


def test_a_pinned_certificate_that_a_ca_issued_works_without_the_ca(tmp_path: Path, node: Identity) -> None:
    member = issue(issue(None, "a CA", authority=True), "radiology")

    with serve(node, Trust(store(tmp_path / "trust", member))) as running:
        assert ask(running, member) == member.fingerprint


def test_a_wrong_pin_is_refused_before_anything_is_sent(running: Running, owner: Identity) -> None:
    with pytest.raises(
        IdentityError, match=f"shows the certificate sha256:{running.node.fingerprint}.*nothing was sent"
    ):
        ask(running, owner, pin=owner.fingerprint)


def test_a_wrong_certificate_file_is_refused_by_tls(running: Running, owner: Identity, tmp_path: Path) -> None:
    file = write(tmp_path / "other.crt", identity("node").certificate_pem)

    assert "another certificate than the one you gave" in refusal(running, owner, certificate=file)


def test_T03_an_authority_cannot_be_pinned_as_a_node(tmp_path: Path, owner: Identity) -> None:
    authority = issue(None, "a node of its own making", authority=True)
    file = write(tmp_path / "authority.crt", authority.certificate_pem)

    with serve(authority, Trust(store(tmp_path / "trust", owner))) as running:
        for known_by in ({"pin": authority.fingerprint}, {"certificate": file}):
            with pytest.raises(IdentityError, match="is the certificate of an authority, which cannot be pinned"):
                ask(running, owner, **known_by)


def test_a_certificate_slipped_in_behind_the_pinned_one_is_not_trusted(
    running: Running, owner: Identity, tmp_path: Path
) -> None:
    file = write(tmp_path / "two.crt", identity("node").certificate_pem + running.node.certificate_pem)

    assert "another certificate than the one you gave" in refusal(running, owner, certificate=file)


def test_asking_for_the_nodes_certificate_shows_ours_to_nobody(node: Identity, tmp_path: Path) -> None:
    """A TLS server of Python's, which can tell whether the client showed a certificate; it may, but need not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        write(tmp_path / "c", node.certificate_pem + node.private_key_pem), write(tmp_path / "k", node.private_key_pem)
    )
    context.verify_mode = ssl.CERT_OPTIONAL
    shown: list[bytes | None] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            raw, _ = listener.accept()
            with raw, context.wrap_socket(raw, server_side=True) as tls:
                shown.append(tls.getpeercert(binary_form=True))

        thread = threading.Thread(target=accept)
        thread.start()
        pem = fetch_certificate(f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join(5)

    assert (fingerprint_of(pem), shown) == (node.fingerprint, [None])


def test_the_known_by_arguments_exclude_each_other(owner: Identity, tmp_path: Path) -> None:
    for known_by in ({}, {"pin": "0" * 64, "ca": tmp_path / "ca"}, {"certificate": tmp_path / "c", "ca": tmp_path}):
        with pytest.raises(ConfigError, match="exactly one of its pin"):
            connect("localhost:1", owner, **known_by)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "localhost",
        "localhost:",
        ":7443",
        "localhost:0",
        "localhost:65536",
        "unix:/tmp/x",
        "dns:///a:1",
        "a b:1",
        "::1:7443",
    ],
)
def test_what_is_no_address_is_refused_by_name(target: str, owner: Identity) -> None:
    with pytest.raises(ConfigError, match="is no address of a node: write host:port"):
        connect(target, owner, pin="0" * 64)


@pytest.mark.parametrize("target", ["localhost:7443", "10.0.0.1:1", "[::1]:65535", "gpu-1.example.org:7443"])
def test_addresses_are_taken_apart(target: str) -> None:
    host, port = channels.parse_target(target)

    assert target in (f"{host}:{port}", f"[{host}]:{port}")


@pytest.mark.parametrize("pin", ["", "sha256:", "0" * 63, "g" * 64, "md5:" + "0" * 64, "0" * 65])
def test_what_is_no_pin_is_refused(pin: str, owner: Identity) -> None:
    with pytest.raises(ConfigError, match="a pin is sha256: and 64 hex digits"):
        connect("localhost:1", owner, pin=pin)


def test_a_pin_may_be_written_as_openssl_prints_it(node: Identity) -> None:
    colons = ":".join(node.fingerprint[i : i + 2].upper() for i in range(0, 64, 2))

    assert channels.parse_pin(f" sha256:{colons}\n") == node.fingerprint


def test_where_nobody_listens_the_error_says_so(owner: Identity, node: Identity, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{reserved.getsockname()[1]}"

        with pytest.raises(UnreachableError, match=r"no answer from 127\.0\.0\.1:\d+ .*check the address"):
            connect(target, owner, pin="0" * 64)
        file = write(tmp_path / "node.crt", node.certificate_pem)
        with (
            connect(target, owner, certificate=file) as channel,
            pytest.raises(UnreachableError, match="nothing listens there"),
        ):
            wait_ready(channel, SHORT_S)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 64])
def test_garbage_at_the_port_is_told_from_a_node(says: bytes, owner: Identity) -> None:
    with garbage_server(says) as target, pytest.raises(UnreachableError, match=r"does not speak TLS|no answer"):
        connect(target, owner, pin="0" * 64, timeout_s=2)


def test_T05_a_server_that_never_answers_costs_no_more_than_the_timeout(owner: Identity) -> None:
    began = time.monotonic()

    with garbage_server(None) as target, pytest.raises(UnreachableError, match="no answer"):
        connect(target, owner, pin="0" * 64, timeout_s=0.3)
    assert time.monotonic() - began < 2


def test_T05_a_server_that_drips_one_byte_at_a_time_costs_no_more_than_the_timeout(owner: Identity) -> None:
    began = time.monotonic()

    with (
        garbage_server(b"\x16\x03\x03\x40\x00" + b"\x02" * 200, every_s=0.1) as target,
        pytest.raises(UnreachableError),
    ):
        connect(target, owner, pin="0" * 64, timeout_s=0.5)
    assert time.monotonic() - began < 2


def test_T05_garbage_sent_to_the_node_leaves_it_serving_others(running: Running, owner: Identity) -> None:
    host, port = channels.parse_target(running.target)
    for garbage in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + b"\x00" * 70000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=20) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(garbage)

    assert ask(running, owner) == owner.fingerprint


def test_T02_a_message_above_the_limit_is_refused_by_the_node(tmp_path: Path, node: Identity, owner: Identity) -> None:
    trust = Trust(store(tmp_path / "trust", owner))
    server = grpc.server(futures.ThreadPoolExecutor(2), options=channels.server_options(max_message_bytes=1000))
    server.add_generic_rpc_handlers((WhoAmI(trust),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(node, trust))
    server.start()

    try:
        with connect(f"127.0.0.1:{port}", owner, pin=node.fingerprint) as channel:
            call = channel.unary_unary("/cloister.Test/Loose", bytes, bytes)
            with pytest.raises(grpc.RpcError) as refused:
                call(b"x" * 1001, timeout=20)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert call(b"x" * 1000, timeout=20)
    finally:
        server.stop(None).wait()


def test_a_damaged_file_in_the_trust_folder_hides_no_other(
    tmp_path: Path, node: Identity, owner: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    folder = store(tmp_path / "trust", owner)
    write(folder / "bad.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    write(folder / "key.pem", owner.private_key_pem)
    write(folder / "notes.txt", b"not looked at")

    with caplog.at_level(logging.ERROR), serve(node, Trust(folder)) as running:
        assert ask(running, owner) == owner.fingerprint
    assert "bad.pem is no certificate" in caplog.text
    assert "key.pem contains a private key" in caplog.text
    assert "notes.txt" not in caplog.text


def test_one_file_may_hold_all_the_owners(tmp_path: Path, owner: Identity) -> None:
    other = identity()
    trust = Trust(write(tmp_path / "owners.pem", owner.certificate_pem + other.certificate_pem))

    assert trust.fingerprints() == {owner.fingerprint, other.fingerprint}
    assert trust.allows(other.fingerprint)


def test_a_trust_file_rewritten_in_place_is_read_again(tmp_path: Path, owner: Identity) -> None:
    file = write(tmp_path / "owners.pem", owner.certificate_pem)
    trust = Trust(file)
    assert trust.allows(owner.fingerprint)
    other = identity()

    file.write_bytes(other.certificate_pem)

    assert (trust.allows(owner.fingerprint), trust.allows(other.fingerprint)) == (False, True)


def test_a_certificate_that_is_no_authority_is_no_ca(tmp_path: Path, owner: Identity) -> None:
    trust = Trust(ca=write(tmp_path / "ca.pem", owner.certificate_pem))

    assert not trust.allows(owner.fingerprint)


def test_a_caller_without_a_certificate_has_no_fingerprint() -> None:
    class Anonymous:
        def auth_context(self) -> dict[str, list[bytes]]:
            return {}

    with pytest.raises(NotAuthorizedError, match="shows no client certificate"):
        peer_fingerprint(Anonymous())  # type: ignore[arg-type]  # all that it asks of a context


@contextlib.contextmanager
def garbage_server(says: bytes | None, every_s: float = 0.0) -> Iterator[str]:
    """Answers each connection with ``says`` and hangs up, or with silence."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    for byte in [says[i : i + 1] for i in range(len(says))] if says and every_s else [says or b""]:
                        connection.sendall(byte)
                        if done.wait(every_s):
                            return
                    if says is None:
                        done.wait(10)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join(5)
