"""How long a node waits for a peer. Its patience is shortened: the same code over real sockets, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from protos import node_pb2
from server_side import callers, keeper, service
from server_side.accounts import Limits
from server_side.node import NodeConfig, RunningNode, start_node
from tests import hostile_node
from tests.hostile_node import FORWARD, MIB, ask, batch
from tests.wire_client import Job, Pipe, WireClient, frame, new_owner
from wire import channels
from wire.identity import Identity
from wire.trust import Trust

# pytest finds a file's fixtures by their names in it.
tiny = hostile_node.tiny


@pytest.fixture
def impatient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage_identities: tuple[Identity, Identity]
) -> Iterator[tuple[RunningNode, WireClient]]:
    monkeypatch.setattr(callers, "SILENCE_S", 0.5)
    monkeypatch.setattr(service, "OPENING_S", 1.2)
    monkeypatch.setattr(service, "SNAPSHOT_S", 0.5)
    monkeypatch.setattr(keeper, "JANITOR_S", 0.05)
    monkeypatch.setattr(channels, "HANDSHAKE_TIMEOUT_S", 0.5)
    own, owner = stage_identities
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "owner.crt").write_bytes(owner.certificate_pem)
    node = start_node(
        NodeConfig(
            listen="localhost:0",
            identity=own,
            trust=Trust(tmp_path / "trusted"),
            state_dir=tmp_path / "state",
            device="cpu",
            limits=Limits(message_bytes=64 * MIB),
        ),
    )
    try:
        with WireClient(f"localhost:{node.port}#sha256:{own.fingerprint}", owner) as client:
            yield node, client
    finally:
        node.stop(0)


@pytest.fixture(scope="module")
def stage_identities() -> tuple[Identity, Identity]:
    own = dataclasses.replace(new_owner("node"), role="node")
    return own, new_owner("owner")


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def held(node: RunningNode) -> tuple[int, int]:
    """Reservations, and calls that are served."""
    return node._keeper.accounts.sessions, len(node._keeper.callers._calls)


def test_T05_an_opening_that_stalls_is_ended_and_holds_nothing_after(
    impatient: tuple[RunningNode, WireClient],
    tiny: Job,
) -> None:
    node, client = impatient
    parts = tiny.parts()

    for until in range(len(parts)):
        with Pipe(_stalling(client), *parts[:until]) as pipe:
            started = time.monotonic()
            with pytest.raises(grpc.RpcError) as ended:
                pipe.receive()
            assert ended.value.code() is grpc.StatusCode.CANCELLED
            assert time.monotonic() - started < 3
    wait_until(lambda: held(node) == (0, 0))
    assert client.close(client.open(tiny))


def _stalling(client: WireClient) -> Callable[..., Any]:
    """OpenSession as a stream of answers, so that a test may wait for its end."""
    return client.channel.stream_stream(
        "/cloister.v1.Node/OpenSession",
        node_pb2.OpenSessionRequest.SerializeToString,
        node_pb2.OpenSessionResponse.FromString,
    )


def test_T05_an_opening_byte_by_byte_ends_at_its_deadline(impatient: tuple[RunningNode, WireClient], tiny: Job) -> None:
    node, client = impatient
    parts = tiny.parts()
    state = b"".join(part.state_chunk for part in parts)

    def dribble() -> Iterator[node_pb2.OpenSessionRequest]:
        yield from (part for part in parts if not part.state_chunk)
        for byte in state:
            time.sleep(0.1)
            yield node_pb2.OpenSessionRequest(state_chunk=bytes([byte]))

    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as ended:
        client.stub.OpenSession(dribble(), timeout=20)

    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert 1 < time.monotonic() - started < 4
    wait_until(lambda: held(node) == (0, 0))


def test_T05_a_stream_that_never_attaches_is_ended(impatient: tuple[RunningNode, WireClient]) -> None:
    node, client = impatient
    for method in (client.stub.Train, client.stub.Infer):
        with Pipe(method) as pipe, pytest.raises(grpc.RpcError) as ended:
            pipe.receive()
        assert ended.value.code() is grpc.StatusCode.CANCELLED
    wait_until(lambda: held(node) == (0, 0))


def test_T05_a_snapshot_that_is_never_read_is_ended(impatient: tuple[RunningNode, WireClient]) -> None:
    node, client = impatient
    session = client.open(Job.of(nn.Linear(4000, 2500), torch.randn(4, 4000)))  # 40 MB: more than gRPC buffers
    responses = client.stub.Snapshot(node_pb2.SnapshotRequest(session_id=session), timeout=20)
    next(iter(responses))
    wait_until(lambda: held(node) == (1, 0))

    with pytest.raises(grpc.RpcError) as ended:
        list(responses)

    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert client.close(session)


def test_T05_an_attached_stream_may_be_silent_for_as_long_as_its_session_lives(
    impatient: tuple[RunningNode, WireClient],
    tiny: Job,
) -> None:
    _, client = impatient
    session = client.open(tiny)
    with client.train(session) as frames, client.infer(session) as batches:
        time.sleep(1.5)

        assert frames.ask(ask(frame(0, 0, FORWARD, torch.ones(4, 6)))).tensors
        assert batches.ask(batch(torch.ones(4, 6))).tensors
    assert client.close(session)


def test_T05_a_connection_of_one_byte_a_while_is_dropped(
    impatient: tuple[RunningNode, WireClient],
    tmp_path: Path,
    stage_identities: tuple[Identity, Identity],
) -> None:
    node, _ = impatient
    owner = stage_identities[1]
    pair = tmp_path / "pair.pem"
    pair.write_bytes(owner.certificate_pem + owner.private_key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(pair)
    started = time.monotonic()
    with context.wrap_socket(socket.create_connection(("localhost", node.port), timeout=5)) as tls:
        tls.settimeout(0.2)
        with pytest.raises((OSError, AssertionError)):  # noqa: PT012
            for byte in itertools.cycle(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[:10]):
                tls.send(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    while tls.recv(4096):
                        pass
                    raise AssertionError("hung up on")
                assert time.monotonic() - started < 10
    assert time.monotonic() - started < 5
