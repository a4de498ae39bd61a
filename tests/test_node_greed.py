"""A node among peers who want too much of its memory, its connections or its time, while another owner trains on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import psutil
import pytest
import torch
from torch import nn

from protos import node_pb2, tensor_pb2
from server_side import callers
from tests import hostile_node
from tests.hostile_node import BACKWARD, FORWARD, LIMITS, MESSAGE_BYTES, METHODS, MIB, NAN, Stage, ask, batch
from tests.wire_client import Good, Job, WireClient, frame, reason_of
from wire.codec import encode
from wire.messages import SMALL_BYTES, Rejected, parser, structure_bytes

#: How much an attack may make a node grow: two of the largest messages, received and parsed.
GROWTH: Final = 2 * MESSAGE_BYTES
# pytest finds a file's fixtures by their names in it.
tiny, stage = hostile_node.tiny, hostile_node.stage
_the_other_owner_trains_on = hostile_node.the_other_owner_trains_on


@pytest.fixture(scope="module")
def wide() -> Job:
    """Makes 1 MiB an answer out of four bytes."""
    return Job.of(nn.Linear(1, 2**15, bias=False), torch.randn(4, 1))


@contextlib.contextmanager
def again_and_again(work: Callable[[], None], pause: float = 0.0) -> Iterator[None]:
    """Does ``work`` in a thread of its own for as long as the context lasts; what it raises fails the test."""
    stop, failed = threading.Event(), []

    def run() -> None:
        try:
            while not stop.wait(pause):
                work()
        except BaseException as error:  # noqa: BLE001 -- told below, by the test's own thread
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


@contextlib.contextmanager
def growth(process: psutil.Process) -> Iterator[list[int]]:
    """By how many bytes the process grew at most while it was looked at."""
    before, most = process.memory_info().rss, [0]

    def look() -> None:
        most[0] = max(most[0], process.memory_info().rss - before)

    with again_and_again(look, 0.005):
        yield most


@contextlib.contextmanager
def training(good: Good) -> Iterator[list[int]]:
    """The other owner trains on for as long as the attack lasts; gives the steps that were done."""
    steps = [0]
    good.finish()

    def step() -> None:
        good.step()
        steps[0] += 1

    try:
        with again_and_again(step):
            yield steps
    finally:
        good.begin()
    assert steps[0]


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
