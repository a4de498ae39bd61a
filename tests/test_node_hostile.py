"""A node among hostile owners and strangers: real processes, real sockets, and another owner who goes on training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

from client_side.spawn import LocalNode
from protos import node_pb2, node_pb2_grpc, tensor_pb2
from server_side import callers, keeper, service
from server_side.accounts import Limits
from server_side.handlers import node_handler
from server_side.node import NodeConfig, RunningNode, start_node
from tests.wire_client import Good, Job, Pipe, WireClient, frame, new_owner, reason_of
from wire import channels
from wire.certificates import NODE_NAME
from wire.channels import fetch_certificate
from wire.codec import encode
from wire.identity import Identity
from wire.messages import SMALL_BYTES, Rejected, parser, structure_bytes
from wire.recipe import Loss
from wire.trust import Trust

MIB: Final = 2**20
MESSAGE_BYTES: Final = 32 * MIB
#: How much an attack may make a node grow: two of the largest messages, received and parsed.
GROWTH: Final = 2 * MESSAGE_BYTES
METHODS: Final = [method.name for method in node_pb2.DESCRIPTOR.services_by_name["Node"].methods]
FORWARD, BACKWARD = node_pb2.PHASE_FORWARD, node_pb2.PHASE_BACKWARD
NAN: Final = float("nan")
LIMITS: Final = {
    "message_bytes": MESSAGE_BYTES,
    "tensor_bytes": 16 * MIB,
    "sessions_per_owner": 40,
    "bytes_per_owner": 8 * 2**30,
    "parameters_per_session": 1_000_000,
    "activation_bytes_per_micro_batch": 64 * MIB,
    "micro_batches_in_flight": 4,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A node, a hostile owner and a good one."""

    node: LocalNode
    process: psutil.Process
    foe: WireClient
    friend: WireClient
    friend_identity: Identity
    tiny: Job
    good: Good


@pytest.fixture(scope="module")
def tiny() -> Job:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return Job.of(middle, torch.randn(4, 6))


@pytest.fixture(scope="module")
def wide() -> Job:
    """Makes 1 MiB an answer out of four bytes."""
    return Job.of(nn.Linear(1, 2**15, bias=False), torch.randn(4, 1))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny: Job) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("hostile")
    options = [word for name, number in LIMITS.items() for word in ("--limit", f"{name}={number}")]
    friend = new_owner("friend")
    with LocalNode(folder, threads=1, options=options) as node:
        (folder / "trusted" / "friend.crt").write_bytes(friend.certificate_pem)
        with WireClient(node.address, node.owner) as foe, WireClient(node.address, friend) as ours:
            process = psutil.Process(node.process.pid)
            yield Stage(node, process, foe, ours, friend, tiny, Good(ours, tiny))
        assert node.process.poll() is None
        said = node.log.read_text()
        for word in ("Traceback", "a defect in this node", "Exception calling", "Exception iterating"):
            assert word not in said, said[said.index(word) - 500 :][:3000]


@pytest.fixture(autouse=True)
def _the_other_owner_trains_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around each attack on the shared node another owner is in the middle of a step, and ends it right."""
    if "stage" not in request.fixturenames:
        yield
        return
    good: Good = request.getfixturevalue("stage").good
    good.begin()
    yield
    good.finish()
    good.step()
    good.check()


@contextlib.contextmanager
def growth(process: psutil.Process) -> Iterator[list[int]]:
    """By how many bytes the process grew at most while it was looked at."""
    before, most, stop = process.memory_info().rss, [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def training(good: Good) -> Iterator[list[int]]:
    """The other owner trains on for as long as the attack lasts; gives the steps that were done."""
    steps, stop, failed = [0], threading.Event(), []
    good.finish()

    def work() -> None:
        try:
            while not stop.is_set():
                good.step()
                steps[0] += 1
        except BaseException as error:  # noqa: BLE001 -- told below, by the test's own thread
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield steps
    finally:
        stop.set()
        thread.join()
        good.begin()
    assert not failed, failed
    assert steps[0]


def ask(frame_: node_pb2.Frame) -> node_pb2.TrainRequest:
    return node_pb2.TrainRequest(frame=frame_)


def batch(*tensors: torch.Tensor) -> node_pb2.InferRequest:
    return node_pb2.InferRequest(batch=node_pb2.Batch(tensors=[encode(t) for t in tensors]))


def every_method(session: bytes) -> dict[str, Callable[[node_pb2_grpc.NodeStub], object]]:
    """One call of each method, about ``session``."""
    attachment = node_pb2.Attachment(session_id=session)
    parts = [node_pb2.OpenSessionRequest(spec=node_pb2.SessionSpec(session_id=session))]
    return {
        "Describe": lambda stub: stub.Describe(node_pb2.DescribeRequest(), timeout=10),
        "OpenSession": lambda stub: stub.OpenSession(iter(parts), timeout=10),
        "Train": lambda stub: list(stub.Train(iter([node_pb2.TrainRequest(attachment=attachment)]), timeout=10)),
        "Infer": lambda stub: list(stub.Infer(iter([node_pb2.InferRequest(attachment=attachment)]), timeout=10)),
        "Snapshot": lambda stub: list(stub.Snapshot(node_pb2.SnapshotRequest(session_id=session), timeout=10)),
        "CloseSession": lambda stub: stub.CloseSession(node_pb2.CloseSessionRequest(session_id=session), timeout=10),
    }


# --- T03: strangers


def stranger(node: LocalNode, kind: str) -> grpc.Channel:
    roots = fetch_certificate(node.address.partition("#")[0])
    options = [("grpc.ssl_target_name_override", NODE_NAME)]
    if kind == "in plain text":
        return grpc.insecure_channel(f"localhost:{node.port}")
    if kind == "without a certificate":
        return grpc.secure_channel(f"localhost:{node.port}", grpc.ssl_channel_credentials(roots), options)
    other = new_owner()
    credentials = grpc.ssl_channel_credentials(roots, other.private_key_pem, other.certificate_pem)
    return grpc.secure_channel(f"localhost:{node.port}", credentials, options)


@pytest.mark.parametrize("kind", ["in plain text", "without a certificate", "with a strange certificate"])
def test_T03_a_stranger_is_not_even_connected(stage: Stage, kind: str) -> None:
    calls = every_method(stage.good.session)
    assert sorted(calls) == sorted(METHODS)

    with stranger(stage.node, kind) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        for call in calls.values():
            assert reason_of(lambda call=call: call(stub)) == "UNAVAILABLE"  # type: ignore[misc]  # bound at once
        with pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


def test_T03_no_method_but_health_answers_who_is_no_longer_trusted(stage: Stage) -> None:
    leaver = new_owner("leaver")
    file = stage.node.folder / "trusted" / "leaver.crt"
    file.write_bytes(leaver.certificate_pem)
    with WireClient(stage.node.address, leaver) as client:
        client.describe()
        file.unlink()

        reasons = {name: reason_of(lambda c=c: c(client.stub)) for name, c in every_method(b"s" * 16).items()}  # type: ignore[misc]  # bound at once

        assert reasons == dict.fromkeys(METHODS, "NOT_AUTHORIZED")
        health = health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_T03_another_owners_session_does_not_exist(stage: Stage) -> None:
    session = stage.good.session
    calls = every_method(session)

    for name in ("Train", "Infer", "Snapshot"):
        assert reason_of(lambda name=name: calls[name](stage.foe.stub)) == "SESSION_NOT_FOUND"  # type: ignore[misc]
    assert stage.foe.close(session) is False
    with pytest.raises(grpc.RpcError, match="no such session"):
        stage.foe.answer(session, *stage.good.frames(stage.good.at))
    assert reason_of(lambda: stage.foe.open(stage.tiny, session_id=session)) == "SESSION_REUSED"


# --- T04: replays and forgeries


def test_T04_a_recorded_opening_opens_nothing_a_second_time(stage: Stage) -> None:
    parts = stage.tiny.parts()
    session = parts[0].spec.session_id
    assert not stage.foe.send_opening(parts).already_open
    stage.foe.answer(
        session, frame(0, 0, FORWARD, torch.ones(4, 6)), frame(0, 0, BACKWARD, torch.ones(4, 4), update=True)
    )
    before = stage.foe.snapshot(session)

    again = stage.foe.send_opening(parts)

    assert (again.already_open, again.next_step) == (True, 1)
    after = stage.foe.snapshot(session)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items())
    assert reason_of(lambda: stage.friend.send_opening(parts)) == "SESSION_REUSED"
    changed = stage.tiny.parts(session_id=session, seed=8)
    assert reason_of(lambda: stage.foe.send_opening(changed)) == "SESSION_REUSED"
    assert stage.foe.close(session)
    assert reason_of(lambda: stage.foe.send_opening(parts)) == "SESSION_REUSED"
    assert reason_of(lambda: stage.foe.snapshot(session)) == "SESSION_NOT_FOUND"


def test_T04_the_same_opening_twice_at_once_is_one_session(stage: Stage) -> None:
    parts = stage.tiny.parts()
    held = stage.foe.describe().open_sessions
    answers: list[node_pb2.OpenSessionResponse] = []
    threads = [threading.Thread(target=lambda: answers.append(stage.foe.send_opening(parts))) for _ in range(4)]

    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert sorted(a.already_open for a in answers) == [False, True, True, True]
    assert stage.foe.describe().open_sessions == held + 1
    assert stage.foe.close(parts[0].spec.session_id)
    assert stage.foe.describe().open_sessions == held


def test_T04_an_opening_made_for_another_node_is_refused(stage: Stage) -> None:
    own = bytes.fromhex(stage.node.identity.fingerprint)

    assert reason_of(lambda: stage.foe.open(stage.tiny, node_fingerprint=secrets.token_bytes(32))) == "SPEC_REJECTED"
    assert reason_of(lambda: stage.foe.open(stage.tiny, node_fingerprint=own[:31])) == "SPEC_REJECTED"
    assert stage.foe.close(stage.foe.open(stage.tiny, node_fingerprint=own))


def test_T04_frames_of_one_session_do_nothing_in_another(stage: Stage) -> None:
    first, second = stage.foe.open(stage.tiny), stage.foe.open(stage.tiny)
    x, g = torch.ones(4, 6), torch.ones(4, 4)
    recorded = [frame(s, 0, p, t, update=p == BACKWARD) for s in range(2) for p, t in ((FORWARD, x), (BACKWARD, g))]
    stage.foe.answer(first, *recorded)
    before = stage.foe.snapshot(second)[1]

    for message in recorded[1:]:
        assert reason_of(lambda m=message: stage.foe.answer(second, m)) == "STEP_OUT_OF_ORDER"  # type: ignore[misc]

    after = stage.foe.snapshot(second)
    assert after[0] == 0
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before.items())
    assert stage.foe.close(first)
    assert stage.foe.close(second)


# --- T02: bombs


def varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


CLAIMS: Final[list[tuple[dict[str, Any], str]]] = [
    ({"program_bytes": 10 * 2**30}, "LIMIT_EXCEEDED"),
    ({"program_bytes": 2**64 - 1}, "LIMIT_EXCEEDED"),
    ({"state_bytes": 10 * 2**30}, "SPEC_REJECTED"),
    ({"state_bytes": 2**64 - 1}, "SPEC_REJECTED"),
    ({"max_rows": 2**32 - 1}, "SPEC_REJECTED"),
    ({"max_rows": 2**20}, "LIMIT_EXCEEDED"),
    ({"max_rows": 0}, "SPEC_REJECTED"),
    ({"max_in_flight": 2**32 - 1}, "LIMIT_EXCEEDED"),
    ({"max_in_flight": 0}, "SPEC_REJECTED"),
    ({"first_step": 2**64 - 1}, "SPEC_REJECTED"),
    ({"session_id": bytes(MIB)}, "SPEC_REJECTED"),
    ({"session_id": b""}, "SPEC_REJECTED"),
    ({"program_sha256": b""}, "SPEC_REJECTED"),
    ({"program_sha256": bytes(32)}, "PROGRAM_REJECTED"),
    ({"state_sha256": bytes(32)}, "STATE_REJECTED"),
    ({"topology": 9}, "SPEC_REJECTED"),
    ({"topology": node_pb2.TOPOLOGY_VANILLA}, "SPEC_REJECTED"),
    ({"optimizer": None}, "SPEC_REJECTED"),
    ({"optimizer": node_pb2.Optimizer(sgd=node_pb2.Sgd(lr=NAN))}, "SPEC_REJECTED"),
]


@pytest.mark.parametrize(("changes", "reason"), CLAIMS, ids=[str(c)[:50] for c, _ in CLAIMS])
def test_T02_a_spec_that_claims_too_much_is_refused_before_anything_is_made(
    stage: Stage,
    changes: dict[str, Any],
    reason: str,
) -> None:
    held = stage.foe.describe().open_sessions

    with growth(stage.process) as grown:
        assert reason_of(lambda: stage.foe.open(stage.tiny, **changes)) == reason

    assert grown[0] < GROWTH
    assert stage.foe.describe().open_sessions == held


def header(shape: list[int], data: bytes = b"", dtype: int = tensor_pb2.D_TYPE_FLOAT32) -> bytes:
    return tensor_pb2.Tensor(dtype=dtype, codec=1, shape=shape, data=data).SerializeToString()  # type: ignore[arg-type]


BOMBS: Final[dict[str, tuple[Callable[[], bytes], set[str]]]] = {
    "a header of 10 GB": (lambda: field(5, header([10 * 2**28])), {"LIMIT_EXCEEDED"}),
    "a header past 64 bits": (lambda: field(5, header([2**40] * 8)), {"LIMIT_EXCEEDED"}),
    "a header past all bounds": (lambda: field(5, header([2**64 - 1] * 8)), {"TENSOR_REJECTED"}),
    "6,000 dimensions": (lambda: field(5, header([2**63] * 6000)), {"TENSOR_REJECTED"}),
    "10 million dimensions": (lambda: field(5, field(3, b"\1" * 10**7)), {"MESSAGE_REJECTED"}),
    "10 million tensors": (lambda: b"\x2a\0" * 10**7, {"MESSAGE_REJECTED"}),
    "10,000 tensors": (lambda: b"\x2a\0" * 10**4, {"TENSOR_REJECTED"}),
    "an unknown field of 20 MB": (lambda: field(99, bytes(2 * 10**7)), {"MESSAGE_REJECTED"}),
    "a group": (lambda: b"\x2b" * 10**6, {"MESSAGE_REJECTED"}),
    "above the limit of a message": (lambda: field(5, field(4, bytes(40 * MIB))), {"LIMIT_EXCEEDED"}),
    "30 MB of data behind no header": (lambda: field(5, field(4, bytes(30 * MIB))), {"TENSOR_REJECTED"}),
}


@pytest.mark.parametrize("what", BOMBS)
def test_T02_a_frame_that_would_grow_is_refused(stage: Stage, what: str) -> None:
    make, reasons = BOMBS[what]
    session = stage.foe.open(stage.tiny)
    attachment = node_pb2.TrainRequest(attachment=node_pb2.Attachment(session_id=session)).SerializeToString()
    bomb = field(2, b"\x18\x01" + make())  # a frame of step 0, micro-batch 0, phase forward

    started = time.monotonic()
    with growth(stage.process) as grown:
        assert reason_of(lambda: stage.foe.raw("Train", attachment, bomb)) in reasons

    assert time.monotonic() - started < 5
    assert grown[0] < GROWTH + (2 * len(bomb) if len(bomb) <= MESSAGE_BYTES else 0)
    assert stage.foe.snapshot(session)[0] == 0
    assert stage.foe.close(session)


def test_T02_a_spec_of_ten_million_milestones_is_refused(stage: Stage) -> None:
    optimizer = field(10, field(4, field(5, b"\1" * 10**7)))

    with growth(stage.process) as grown:
        assert reason_of(lambda: stage.foe.raw("OpenSession", field(1, optimizer))) == "MESSAGE_REJECTED"

    assert grown[0] < GROWTH


def test_T02_nothing_compressed_is_inflated(stage: Stage) -> None:
    call = stage.foe.channel.stream_unary("/cloister.v1.Node/OpenSession", None, None)
    bomb = field(3, bytes(400 * MIB))  # 0.4 MB on the wire

    with growth(stage.process) as grown:
        told = reason_of(lambda: call(iter([bomb]), timeout=60, compression=grpc.Compression.Gzip))

    assert told == "UNIMPLEMENTED"
    assert grown[0] < GROWTH


def test_T02_one_owners_greed_for_sessions_does_not_stop_another(stage: Stage) -> None:
    held = [stage.foe.open(stage.tiny) for _ in range(LIMITS["sessions_per_owner"])]

    assert reason_of(lambda: stage.foe.open(stage.tiny)) == "BUSY"
    assert stage.friend.close(stage.friend.open(stage.tiny))
    for session in held:
        assert stage.foe.close(session)
    assert stage.foe.close(stage.foe.open(stage.tiny))


def test_T02_one_owners_greed_for_bytes_does_not_stop_another(stage: Stage) -> None:
    job = dataclasses.replace(stage.tiny, max_rows=2**20 // 2, max_in_flight=4)
    held = []
    with pytest.raises(grpc.RpcError, match=r"you hold .* bytes here, this session takes") as refused:  # noqa: PT012
        for _ in range(LIMITS["sessions_per_owner"]):
            held.append(stage.foe.open(job))  # noqa: PERF401 -- what was opened before the refusal is closed below

    assert 2 <= len(held) < LIMITS["sessions_per_owner"] - 1
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stage.friend.close(stage.friend.open(job))
    for session in held:
        assert stage.foe.close(session)


def test_T02_too_many_parameters_are_refused(stage: Stage) -> None:
    job = Job.of(nn.Linear(1001, 1000), torch.randn(4, 1001))

    with growth(stage.process) as grown:
        assert reason_of(lambda: stage.foe.open(job)) == "LIMIT_EXCEEDED"

    assert grown[0] < GROWTH


def test_T02_streams_do_not_keep_a_session_that_was_closed(stage: Stage) -> None:
    job = Job.of(nn.Linear(900, 900), torch.randn(4, 900))  # 3.2 MB of state
    stage.foe.close(stage.foe.open(job))

    with growth(stage.process) as grown:
        for _ in range(60):
            session = stage.foe.open(job)
            pipes = [stage.foe.infer(session), stage.foe.train(session)]
            pipes[0].ask(batch(torch.ones(1, 900)))
            assert stage.foe.close(session)
            for pipe in pipes:
                with pytest.raises(grpc.RpcError):
                    pipe.receive()

    assert grown[0] < GROWTH + GROWTH // 2  # all of them would be 195 MB


# --- T05: slow and silent peers


def h2_socket(stage: Stage) -> ssl.SSLSocket:
    """A TLS connection of the hostile owner's, with nothing said on it."""
    folder = stage.node.folder / "owner"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    pair = folder / "pair.pem"
    pair.write_bytes(stage.node.owner.certificate_pem + stage.node.owner.private_key_pem)
    context.load_cert_chain(pair)
    return context.wrap_socket(socket.create_connection(("localhost", stage.node.port), timeout=10))


def test_T05_two_hundred_silent_connections_stop_nobody(stage: Stage) -> None:
    threads = stage.process.num_threads()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("localhost", stage.node.port), timeout=10))
        for _ in range(100):
            stack.enter_context(h2_socket(stage))

        with growth(stage.process) as grown, training(stage.good) as steps:
            time.sleep(0.5)
        with WireClient(stage.node.address, stage.friend_identity) as late:
            late.describe()

        assert steps[0] >= 5
        assert grown[0] < GROWTH
        assert stage.process.num_threads() < threads + 20


def test_T05_a_client_that_never_reads_is_bounded_and_stops_nobody(stage: Stage, wide: Job) -> None:
    trainer, asker = stage.foe.open(wide), stage.foe.open(wide)
    x = torch.ones(8, 1)
    with (
        growth(stage.process) as grown,
        training(stage.good) as steps,
        stage.foe.train(trainer) as frames,
        stage.foe.infer(asker) as batches,
    ):
        frames.send(*itertools.repeat(ask(frame(0, 0, FORWARD, x)), 2000))
        batches.send(*itertools.repeat(batch(x), 2000))
        time.sleep(1.5)

    assert steps[0] >= 5
    assert grown[0] < GROWTH
    assert stage.foe.close(trainer)
    assert stage.foe.close(asker)


def test_T05_calls_without_a_word_are_limited_for_each_owner(stage: Stage) -> None:
    """A unary method is called with a stream that never brings its request: gRPC itself would wait for it."""
    silence = threading.Event()

    def nothing() -> Iterator[bytes]:
        silence.wait(30)
        yield from ()

    identity = stage.node.owner
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WireClient(stage.node.address, identity)) for _ in range(4)]
        stack.callback(silence.set)
        paths = [*(f"/cloister.v1.Node/{name}" for name in METHODS), "/grpc.health.v1.Health/Check"]
        calls: list[Any] = [
            client.channel.stream_stream(paths[number % len(paths)], None, None)(nothing(), timeout=30)
            for client in clients
            for number in range(50)
        ]
        with training(stage.good) as steps:
            deadline = time.monotonic() + 10
            while sum(call.done() for call in calls) < 200 - callers.CALLS_PER_OWNER and time.monotonic() < deadline:
                time.sleep(0.02)
            waiting = [call for call in calls if not call.done()]
            reasons = {call.code() for call in calls if call.done()}
            time.sleep(0.3)

        assert len(waiting) == callers.CALLS_PER_OWNER
        assert reasons == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert steps[0] >= 3
        assert reason_of(stage.foe.describe) == "BUSY"
        for call in calls:
            call.cancel()
    for _ in range(100):
        with contextlib.suppress(grpc.RpcError):
            stage.foe.describe()
            break
        time.sleep(0.05)
    stage.foe.describe()


def test_T05_a_newer_stream_takes_over_from_one_whose_owner_is_gone(stage: Stage) -> None:
    session = stage.foe.open(stage.tiny)
    x = torch.ones(4, 6)
    with stage.foe.train(session) as old:
        answer = old.ask(ask(frame(0, 0, FORWARD, x)))
        with stage.foe.train(session) as new:
            assert new.ask(ask(frame(0, 0, FORWARD, x))).tensors == answer.tensors

            with pytest.raises(grpc.RpcError) as ended:
                old.receive()

            assert ended.value.code() is grpc.StatusCode.CANCELLED
            assert new.ask(ask(frame(0, 0, BACKWARD, torch.ones(4, 4), update=True))).updated
    assert stage.foe.close(session)


# The node's patience, shortened: the same code over real sockets, in this process.


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


# --- T06: poison and garbage


POISON: Final[dict[str, tuple[Callable[[], torch.Tensor], str]]] = {
    "NaN": (lambda: torch.full((4, 6), NAN), "NON_FINITE"),
    "Inf": (lambda: torch.full((4, 6), float("inf")), "NON_FINITE"),
    "another shape": (lambda: torch.ones(4, 7), "TENSOR_REJECTED"),
    "another dtype": (lambda: torch.ones(4, 6, dtype=torch.int64), "TENSOR_REJECTED"),
    "too many rows": (lambda: torch.ones(9, 6), "LIMIT_EXCEEDED"),
    "no rows": (lambda: torch.ones(0, 6), "TENSOR_REJECTED"),
    "one row, for batch statistics": (lambda: torch.ones(1, 6), "COMPUTE_FAILED"),
}


@pytest.mark.parametrize("what", POISON)
def test_T06_poison_is_refused_and_the_session_stands_where_it_stood(stage: Stage, what: str) -> None:
    make, reason = POISON[what]
    victim = Good(stage.foe, stage.tiny)
    victim.step()
    victim.begin()

    assert reason_of(lambda: stage.foe.answer(victim.session, frame(1, 2, FORWARD, make()))) == reason
    if "row, for" not in what:
        assert reason_of(lambda: ask_once(stage.foe.infer(victim.session), batch(make()))) == reason

    victim.finish()
    victim.step()
    victim.check()
    assert stage.foe.close(victim.session)


def ask_once(pipe: Pipe, message: Any) -> Any:
    with pipe:
        return pipe.ask(message)


def test_T06_labels_out_of_range_are_refused(stage: Stage) -> None:
    job = dataclasses.replace(stage.tiny, loss=Loss("cross_entropy"))
    session = stage.foe.open(job)
    before = stage.foe.snapshot(session)[1]

    for label in (-1, 4, -100, 2**62):
        message = frame(0, 0, node_pb2.PHASE_LOSS, torch.ones(4, 6), labels=torch.full((4,), label), update=True)
        assert reason_of(lambda m=message: stage.foe.answer(session, m)) == "TENSOR_REJECTED"  # type: ignore[misc]

    after = stage.foe.snapshot(session)
    assert after[0] == 0
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before.items())
    assert stage.foe.close(session)


OUT_OF_ORDER: Final = {
    "a skipped step": frame(5, 0, FORWARD, torch.ones(4, 6)),
    "an older step": frame(0, 1, FORWARD, torch.ones(4, 6)),
    "a skipped micro-batch": frame(1, 7, FORWARD, torch.ones(4, 6)),
    "a backward before its forward": frame(1, 7, BACKWARD, torch.ones(4, 4), update=True),
    "an update while one waits": frame(1, 2, node_pb2.PHASE_UPDATE),
}


@pytest.mark.parametrize("what", OUT_OF_ORDER)
def test_T06_a_frame_out_of_order_is_refused_and_applies_nothing(stage: Stage, what: str) -> None:
    victim = Good(stage.foe, stage.tiny)
    victim.step()
    victim.begin()

    assert reason_of(lambda: stage.foe.answer(victim.session, OUT_OF_ORDER[what])) == "STEP_OUT_OF_ORDER"

    victim.finish()
    victim.step()
    victim.check()
    assert stage.foe.close(victim.session)


def test_T04_a_step_resent_a_hundred_times_is_applied_once(stage: Stage) -> None:
    victim = Good(stage.foe, stage.tiny)
    victim.step(2)
    with stage.foe.train(victim.session) as pipe:
        frames = victim.frames(1)
        first = [pipe.ask(ask(each)) for each in frames]
        for _ in range(100):
            pipe.send(*(ask(each) for each in frames))
            for wanted in first:
                assert pipe.receive() == wanted
    for _ in range(10):
        assert stage.foe.answer(victim.session, *frames) == first

    victim.check()
    victim.step()
    victim.check()
    assert stage.foe.close(victim.session)


GARBAGE: Final = {
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an endless length": b"\x0a\xff\xff\xff\xff\x0f",
    "a length that lies": b"\x0a\x7f" + bytes(8),
    "much of nothing": bytes(MIB),
    "much noise": random.Random(1).randbytes(MIB),  # noqa: S311 -- noise, not a secret
    **{f"noise {n}": random.Random(n).randbytes(n) for n in range(2, 60, 7)},  # noqa: S311 -- as above
}


@pytest.mark.parametrize("method", METHODS)
def test_T06_garbage_is_told_to_be_none_of_ours(stage: Stage, method: str) -> None:
    for what, data in GARBAGE.items():
        reason = reason_of(lambda data=data: stage.foe.raw(method, data))  # type: ignore[misc]  # bound at once
        # A few bytes may happen to be a message, of an opening or about a session that is none.
        assert reason in {"MESSAGE_REJECTED", "SPEC_REJECTED", "SESSION_NOT_FOUND"}, what
    if method not in {"Describe", "CloseSession", "Snapshot"}:
        assert reason_of(lambda: stage.foe.raw(method)) == "MESSAGE_REJECTED"
        assert reason_of(lambda: stage.foe.raw(method, b"")) == "MESSAGE_REJECTED"


def test_T06_garbage_among_frames_ends_the_stream_and_not_the_session(stage: Stage) -> None:
    victim = Good(stage.foe, stage.tiny)
    victim.begin()
    attachment = node_pb2.TrainRequest(attachment=node_pb2.Attachment(session_id=victim.session)).SerializeToString()

    for data in (*GARBAGE.values(), attachment, b""):
        assert reason_of(lambda d=data: stage.foe.raw("Train", attachment, d)) == "MESSAGE_REJECTED"  # type: ignore[misc]

    victim.finish()
    victim.step()
    victim.check()
    assert stage.foe.close(victim.session)


def test_T06_mutated_frames_get_a_documented_refusal_or_are_honest_frames(stage: Stage) -> None:
    victim = stage.foe.open(stage.tiny)
    attachment = node_pb2.TrainRequest(attachment=node_pb2.Attachment(session_id=victim)).SerializeToString()
    honest = ask(frame(0, 1, FORWARD, torch.ones(4, 6))).SerializeToString()
    dice = random.Random(6)  # noqa: S311 -- noise, not a secret
    documented = {
        "MESSAGE_REJECTED",
        "TENSOR_REJECTED",
        "LIMIT_EXCEEDED",
        "NON_FINITE",
        "STEP_OUT_OF_ORDER",
        "COMPUTE_FAILED",
    }

    for _ in range(150):
        data = bytearray(honest)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(16 if dice.random() < 0.8 else len(data))] = dice.randrange(256)
        with contextlib.suppress(AssertionError):  # an honest frame after all
            assert reason_of(lambda d=bytes(data): stage.foe.raw("Train", attachment, d)) in documented  # type: ignore[misc]

    assert stage.foe.close(victim)


# --- how messages are read


def test_T02_what_is_counted_of_a_message_is_all_but_the_content_of_its_bytes() -> None:
    tensor = encode(torch.ones(100_000))
    request = ask(node_pb2.Frame(tensors=[tensor, tensor], labels=tensor, step=9))
    data = request.SerializeToString()
    parse = parser(node_pb2.TrainRequest)

    assert structure_bytes(data, node_pb2.TrainRequest.DESCRIPTOR) == len(data) - 3 * 400_000
    assert parse(data) == request
    assert isinstance(parse(data[:-1]), Rejected)
    assert isinstance(parse(field(2, b"\x2a\0" * SMALL_BYTES)), Rejected)


def test_every_method_of_the_contract_is_bound() -> None:
    class Recorder(service.NodeService):
        def __init__(self) -> None:
            pass

    handler = node_handler(Recorder())

    @dataclasses.dataclass
    class Details:
        method: str
        invocation_metadata: tuple[()] = ()

    for method in METHODS:
        bound = handler.service(Details(f"/cloister.v1.Node/{method}"))  # type: ignore[arg-type]  # as gRPC's own has it
        assert bound is not None
        assert bound.request_streaming
