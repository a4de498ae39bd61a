"""A node that lies, breaks or falls silent (THREATS T14, T17): the owner stops with an error, or goes on rightly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn

import cloister
from client_side import stream as stream_module
from client_side.frames import encode_frame
from client_side.link import Link, NodeAddress
from protos import node_pb2, node_pb2_grpc, tensor_pb2
from tests.released import released
from wire import errors
from wire.channels import server_credentials, server_options
from wire.codec import encode
from wire.state import STATE_PREFIX, dump_state, sha256
from wire.trust import Trust

ROWS, FEATURES = 4, 6


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> tuple[cloister.Identity, cloister.Identity]:
    folder = tmp_path_factory.mktemp("keys")
    return (
        cloister.create_identity(folder / "owner", role="owner", passphrase="a long passphrase"),
        cloister.create_identity(folder / "node", role="node", passphrase="a long passphrase"),
    )


class LyingNode(node_pb2_grpc.NodeServicer):
    """Answers truly but for what a test replaces."""

    def __init__(self) -> None:
        self.answer: Callable[[node_pb2.Frame], node_pb2.TrainResponse] = honest
        self.snapshot: Callable[[], Iterator[node_pb2.SnapshotResponse]] = lambda: iter(())
        self.infer: Callable[[node_pb2.Batch], node_pb2.InferResponse] = lambda b: node_pb2.InferResponse(index=b.index)
        self.frames = 0
        self.streams = 0
        self.specs: list[node_pb2.SessionSpec] = []

    def Describe(self, request: Any, context: Any) -> node_pb2.DescribeResponse:  # noqa: ARG002
        return node_pb2.DescribeResponse()

    def OpenSession(self, request_iterator: Any, context: Any) -> node_pb2.OpenSessionResponse:  # noqa: ARG002
        self.specs += [request.spec for request in request_iterator if request.WhichOneof("part") == "spec"]
        return node_pb2.OpenSessionResponse()

    def Train(self, request_iterator: Any, context: Any) -> Any:
        self.streams += 1
        self.context = context
        for request in request_iterator:
            if request.WhichOneof("part") == "frame":
                self.frames += 1
                yield self.answer(request.frame)

    def Infer(self, request_iterator: Any, context: Any) -> Any:  # noqa: ARG002
        for request in request_iterator:
            if request.WhichOneof("part") == "batch":
                yield self.infer(request.batch)

    def Snapshot(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return self.snapshot()

    def CloseSession(self, request: Any, context: Any) -> node_pb2.CloseSessionResponse:  # noqa: ARG002
        return node_pb2.CloseSessionResponse(closed=True)


def honest(frame: node_pb2.Frame) -> node_pb2.TrainResponse:
    """The right answer's shape: outputs and gradients as large as what came."""
    return node_pb2.TrainResponse(
        step=frame.step,
        micro_batch=frame.micro_batch,
        phase=frame.phase,
        updated=frame.update,
        tensors=[encode(torch.ones(ROWS, FEATURES))],
    )


def but(**changes: Any) -> Callable[[node_pb2.Frame], node_pb2.TrainResponse]:
    def answer(frame: node_pb2.Frame) -> node_pb2.TrainResponse:
        response = honest(frame)
        for name, value in changes.items():
            if name == "tensors":
                del response.tensors[:]
                response.tensors.extend(value)
            else:
                setattr(response, name, value)
        return response

    return answer


@contextmanager
def lying_node(
    identities: tuple[cloister.Identity, cloister.Identity], tmp_path: Path
) -> Iterator[tuple[LyingNode, NodeAddress]]:
    owner, node = identities
    (tmp_path / "owner.crt").write_bytes(owner.certificate_pem)
    server = grpc.server(ThreadPoolExecutor(4), options=server_options())
    servicer = LyingNode()
    node_pb2_grpc.add_NodeServicer_to_server(servicer, server)
    port = server.add_secure_port("localhost:0", server_credentials(node, Trust(tmp_path)))
    server.start()
    try:
        yield servicer, NodeAddress(target=f"localhost:{port}", pin=node.fingerprint)
    finally:
        server.stop(0).wait()


@pytest.fixture
def lying(
    identities: tuple[cloister.Identity, cloister.Identity], tmp_path: Path
) -> Iterator[tuple[LyingNode, NodeAddress]]:
    with lying_node(identities, tmp_path) as made:
        yield made


@pytest.fixture
def cut() -> cloister.Cut:
    torch.manual_seed(0)
    front, middle, head = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
    return cloister.Cut(front=front, middle=middle, head=head, example=torch.zeros(ROWS, FEATURES))


def trainer(cut: cloister.Cut, address: NodeAddress, owner: cloister.Identity, **options: Any) -> cloister.Trainer:
    return cloister.Trainer(
        cut, policy=cloister.CLEAR, node=address, identity=owner, optimizer=cloister.SGD(lr=0.1), loss="mse", **options
    )


BATCHES = [(torch.ones(ROWS, FEATURES), torch.zeros(ROWS, FEATURES))]


def tensor(**changes: Any) -> tensor_pb2.Tensor:
    message = encode(torch.ones(ROWS, FEATURES))
    for name, value in changes.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)
        else:
            setattr(message, name, value)
    return message


LIES = {
    "another step": (but(step=7), errors.MessageRejectedError, "another frame"),
    "another micro-batch": (but(micro_batch=3), errors.MessageRejectedError, "another frame"),
    "another phase": (but(phase=node_pb2.PHASE_UPDATE), errors.MessageRejectedError, "another frame"),
    "an update unasked": (but(updated=True), errors.MessageRejectedError, "updated"),
    "a header that lies": (but(tensors=[tensor(shape=[ROWS, 10**6])]), errors.TensorRejectedError, "claims"),
    "a claim of 10 GB": (but(tensors=[tensor(shape=[10**10])]), errors.LimitExceededError, "limit"),
    "an unknown dtype": (but(tensors=[tensor(dtype=99)]), errors.TensorRejectedError, "dtype"),
    "NaN": (but(tensors=[encode(torch.full((ROWS, FEATURES), torch.nan))]), errors.NonFiniteError, "NaN or Inf"),
    "no tensor at all": (but(tensors=[]), errors.MessageRejectedError, "outputs are"),
    "more tensors": (but(tensors=[tensor(), tensor()]), errors.MessageRejectedError, "outputs are"),
    "rows that were not asked for": (
        but(tensors=[encode(torch.ones(ROWS + 1, FEATURES))]),
        errors.MessageRejectedError,
        "outputs are",
    ),
}


@pytest.mark.parametrize("known_by", ["pin", "certificate"])
def test_T04_an_opening_names_the_one_node_that_it_is_meant_for(
    lying: tuple[LyingNode, NodeAddress],
    identities: tuple[cloister.Identity, cloister.Identity],
    cut: cloister.Cut,
    known_by: str,
) -> None:
    servicer, address = lying
    if known_by == "certificate":
        address = NodeAddress(target=address.target, certificate=identities[1].folder / "tls.crt")

    with trainer(cut, address, identities[0]) as trained:
        trained._open(ROWS)

    assert [spec.node_fingerprint.hex() for spec in servicer.specs] == [identities[1].fingerprint]


@pytest.mark.parametrize("lie", LIES)
def test_T17_an_answer_that_lies_stops_the_training(
    lying: tuple[LyingNode, NodeAddress],
    identities: tuple[cloister.Identity, cloister.Identity],
    cut: cloister.Cut,
    lie: str,
) -> None:
    servicer, address = lying
    servicer.answer, expected, said = LIES[lie]
    before = [p.clone() for p in cut.owner_parameters()]

    with trainer(cut, address, identities[0]) as doomed, pytest.raises(expected, match=said):
        doomed.fit(BATCHES, 1)

    assert all(torch.equal(a, b) for a, b in zip(before, cut.owner_parameters(), strict=True))


def test_T17_an_input_gradient_of_another_shape_stops_the_training(
    lying: tuple[LyingNode, NodeAddress], identities: tuple[cloister.Identity, cloister.Identity], cut: cloister.Cut
) -> None:
    servicer, address = lying
    servicer.answer = lambda frame: (
        honest(frame) if frame.phase == node_pb2.PHASE_FORWARD else but(tensors=[encode(torch.ones(2, 2))])(frame)
    )

    with trainer(cut, address, identities[0]) as doomed, pytest.raises(errors.MessageRejectedError, match="gradient"):
        doomed.fit(BATCHES, 1)


def snapshot_of(tensors: dict[str, torch.Tensor], **changes: Any) -> Callable[[], Iterator[node_pb2.SnapshotResponse]]:
    data = dump_state({STATE_PREFIX + name: t for name, t in tensors.items()})
    contents = {"state_bytes": len(data), "state_sha256": sha256(data), **changes}

    def send() -> Iterator[node_pb2.SnapshotResponse]:
        yield node_pb2.SnapshotResponse(header=node_pb2.SnapshotHeader(next_step=1))
        yield node_pb2.SnapshotResponse(contents=node_pb2.SnapshotContents(**contents))
        yield node_pb2.SnapshotResponse(chunk=data)

    return send


def endless() -> Iterator[node_pb2.SnapshotResponse]:
    yield node_pb2.SnapshotResponse(header=node_pb2.SnapshotHeader())
    yield node_pb2.SnapshotResponse(contents=node_pb2.SnapshotContents(state_bytes=1000, state_sha256=b"\0" * 32))
    while True:
        yield node_pb2.SnapshotResponse(chunk=b"\0" * 2**20)


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (lambda good: snapshot_of(good, state_sha256=b"\0" * 32), "hash"),
        (lambda good: snapshot_of(good, state_bytes=10), "more than the 10 bytes"),
        (lambda good: snapshot_of(good, state_bytes=2**50), "announces 1125899906842624 bytes"),
        (lambda good: snapshot_of({**good, "weight": good["weight"][:1]}), "weight"),
        (lambda good: snapshot_of({"weight": good["weight"]}), "bias"),
        (lambda good: snapshot_of({**good, "more": good["bias"]}), "more"),
        (lambda good: snapshot_of({**good, "bias": good["bias"].double()}), "bias"),
        (lambda _: endless, "more than the 1000 bytes"),
        (lambda _: lambda: iter(()), "does not start with its header"),
    ],
    ids=["digest", "too short", "2**50 bytes", "shape", "missing", "unknown", "dtype", "endless", "nothing"],
)
def test_T17_a_snapshot_that_lies_leaves_the_model_as_it_was(
    lying: tuple[LyingNode, NodeAddress],
    identities: tuple[cloister.Identity, cloister.Identity],
    cut: cloister.Cut,
    snapshot: Any,
    said: str,
) -> None:
    servicer, address = lying
    good = {name: t.detach().clone() + 1 for name, t in cut.middle_state().items()}
    servicer.snapshot = snapshot(good)
    before = {name: t.detach().clone() for name, t in cut.middle_state().items()}

    with trainer(cut, address, identities[0]) as doomed, pytest.raises(errors.WireError, match=said):
        doomed.fit(BATCHES, 1)

    assert all(torch.equal(before[name], t) for name, t in cut.middle_state().items())


def test_T17_an_evaluation_that_lies_is_refused(
    lying: tuple[LyingNode, NodeAddress], identities: tuple[cloister.Identity, cloister.Identity], cut: cloister.Cut
) -> None:
    servicer, address = lying
    servicer.infer = lambda batch: node_pb2.InferResponse(index=batch.index + 1)

    with trainer(cut, address, identities[0]) as doomed, pytest.raises(errors.MessageRejectedError, match="batch"):
        doomed.predict(torch.ones(ROWS, FEATURES))


def test_T14_a_node_that_falls_silent_is_hung_up_on_and_asked_again(
    lying: tuple[LyingNode, NodeAddress],
    identities: tuple[cloister.Identity, cloister.Identity],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "_STAYING", stream_module._Silence(factor=1.0, least_s=0.3, first_s=0.3))
    monkeypatch.setattr(stream_module, "_WATCH_S", 0.05)
    servicer, address = lying

    def silent_at_first(frame: node_pb2.Frame) -> node_pb2.TrainResponse:
        if servicer.streams == 1:
            time.sleep(2.0)
        return honest(frame)

    servicer.answer = silent_at_first
    link = Link(address, identities[0])
    link.send(
        encode_frame(
            step=0, micro_batch=0, phase=node_pb2.PHASE_FORWARD, tensors=[released(torch.ones(ROWS, FEATURES))]
        )
    )
    started = time.monotonic()
    answer = link.receive()
    link.close()

    assert answer.micro_batch == 0
    assert link.traffic.reconnects >= 1
    assert time.monotonic() - started < 2.0


def test_T14_a_node_that_is_gone_for_good_ends_with_what_to_check(
    identities: tuple[cloister.Identity, cloister.Identity], tmp_path: Path
) -> None:
    with lying_node(identities, tmp_path) as (_, address):
        link = Link(address, identities[0], reconnect_s=1.0)
        link.send(
            encode_frame(
                step=0, micro_batch=0, phase=node_pb2.PHASE_FORWARD, tensors=[released(torch.ones(ROWS, FEATURES))]
            )
        )
        link.receive()
    link.send(
        encode_frame(
            step=0, micro_batch=0, phase=node_pb2.PHASE_BACKWARD, tensors=[released(torch.ones(ROWS, FEATURES))]
        )
    )

    with pytest.raises(errors.UnreachableError, match="did not come back within 1 s"):
        link.receive()
    link.close()
