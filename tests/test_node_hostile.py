"""A node among strangers, forgers and poisoners: real processes, real sockets, and another owner who trains on."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import secrets
import threading
from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client_side.spawn import LocalNode
from protos import node_pb2, node_pb2_grpc
from server_side import service
from server_side.handlers import node_handler
from tests import hostile_node
from tests.hostile_node import BACKWARD, FORWARD, METHODS, MIB, NAN, Stage, ask, batch
from tests.wire_client import Good, Pipe, WireClient, frame, new_owner, reason_of
from wire.certificates import NODE_NAME
from wire.channels import fetch_certificate
from wire.recipe import Loss

# pytest finds a file's fixtures by their names in it.
tiny, stage = hostile_node.tiny, hostile_node.stage
_the_other_owner_trains_on = hostile_node.the_other_owner_trains_on


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


# --- the contract


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
