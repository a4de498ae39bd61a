"""What one side tells the other of its errors: complete, bounded, and believed only where it adds up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from wire import errors
from wire.errors import (
    BusyError,
    CloisterError,
    ComputeError,
    InternalError,
    LimitExceededError,
    TensorRejectedError,
    UnreachableError,
    WireError,
    error_from_rpc,
    status_of,
)

#: A second implementation, or an auditor's script, may know these by heart: change none.
REASONS = {
    "MessageRejectedError": ("INVALID_ARGUMENT", "MESSAGE_REJECTED"),
    "TensorRejectedError": ("INVALID_ARGUMENT", "TENSOR_REJECTED"),
    "ProgramRejectedError": ("INVALID_ARGUMENT", "PROGRAM_REJECTED"),
    "StateRejectedError": ("INVALID_ARGUMENT", "STATE_REJECTED"),
    "SpecRejectedError": ("INVALID_ARGUMENT", "SPEC_REJECTED"),
    "LimitExceededError": ("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"),
    "BusyError": ("RESOURCE_EXHAUSTED", "BUSY"),
    "StorageError": ("UNAVAILABLE", "STORAGE_FAILED"),
    "DrainingError": ("UNAVAILABLE", "DRAINING"),
    "NotAuthorizedError": ("PERMISSION_DENIED", "NOT_AUTHORIZED"),
    "SessionNotFoundError": ("NOT_FOUND", "SESSION_NOT_FOUND"),
    "SessionLostError": ("DATA_LOSS", "SESSION_LOST"),
    "SessionReusedError": ("ALREADY_EXISTS", "SESSION_REUSED"),
    "SessionSupersededError": ("ABORTED", "SESSION_SUPERSEDED"),
    "StepOutOfOrderError": ("FAILED_PRECONDITION", "STEP_OUT_OF_ORDER"),
    "NonFiniteError": ("FAILED_PRECONDITION", "NON_FINITE"),
    "ComputeError": ("FAILED_PRECONDITION", "COMPUTE_FAILED"),
    "InternalError": ("INTERNAL", "INTERNAL"),
}


def below(cls: type[CloisterError]) -> list[type[CloisterError]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *below(sub))]


WIRE_ERRORS = [cls for cls in below(WireError) if cls.__module__ == errors.__name__ and issubclass(cls, WireError)]


class Failing(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs alone
    """A server whose every method fails as ``self.fail`` says."""

    fail: Callable[[grpc.ServicerContext], Any]

    def service(self, handler_call_details: Any) -> Any:
        del handler_call_details
        return grpc.unary_unary_rpc_method_handler(lambda _request, context: self.fail(context))


class Peer:
    """Both ends of a real connection."""

    def __init__(self, handler: Failing, channel: grpc.Channel) -> None:
        self._handler = handler
        self._call = channel.unary_unary("/cloister.v1.Node/Anything", None, None)

    def error(self, fail: Callable[[grpc.ServicerContext], Any]) -> CloisterError:
        """What the caller makes of it when the peer fails so."""
        self._handler.fail = fail
        with pytest.raises(grpc.RpcError) as caught:
            self._call(b"", timeout=10)
        return error_from_rpc(caught.value)

    def raised(self, error: WireError) -> CloisterError:
        return self.error(lambda context: context.abort_with_status(status_of(error)))


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    handler = Failing()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Peer(handler, channel)
    server.stop(0).wait()


def made_up(code: int, reason: str, domain: str, message: str = "told") -> Any:
    status = status_pb2.Status(code=code, message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    return rpc_status.to_status(status)


def test_every_wire_error_has_its_status_and_its_reason_and_they_never_change() -> None:
    found = {cls.__name__: (cls.status.name, cls.reason) for cls in WIRE_ERRORS}

    assert found == REASONS


def test_no_two_wire_errors_share_a_reason() -> None:
    reasons = [cls.reason for cls in WIRE_ERRORS]

    assert len(set(reasons)) == len(reasons)
    assert all(cls.__dict__.get("reason") for cls in WIRE_ERRORS)


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+Error) +.*?([A-Z_]{5,})?\n", errors.__doc__ or ""))
    crossing = {name: status for name, status in drawn.items() if name in REASONS}

    assert set(drawn) == {cls.__name__ for cls in below(CloisterError) if cls.__module__ == errors.__name__}
    assert crossing == {name: status for name, (status, _) in REASONS.items()}
    assert set(errors.__all__) == {*drawn, "CloisterError", "DOMAIN", "error_from_rpc", "status_of"}


@pytest.mark.parametrize("cls", WIRE_ERRORS, ids=lambda cls: cls.__name__)
def test_every_wire_error_arrives_as_itself(peer: Peer, cls: type[WireError]) -> None:
    arrived = peer.raised(cls("step 812: ε 4.01 of 4.00"))

    assert type(arrived) is cls
    assert str(arrived) == "step 812: ε 4.01 of 4.00"


@pytest.mark.parametrize("cls", WIRE_ERRORS, ids=lambda cls: cls.__name__)
def test_an_error_without_a_word_arrives_with_one(peer: Peer, cls: type[WireError]) -> None:
    arrived = peer.raised(cls(""))

    assert type(arrived) is cls
    assert "gave no reason" in str(arrived)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_failed_call_that_says_nothing_is_told_with_its_code(peer: Peer, code: grpc.StatusCode) -> None:
    arrived = peer.error(lambda context: context.abort(code, " "))

    assert code.name in str(arrived)
    assert "gave no reason; its log may, and `cloister doctor` checks the way to it" in str(arrived)


def test_only_a_busy_node_may_be_asked_the_same_again() -> None:
    assert [cls for cls in WIRE_ERRORS if cls.retryable] == [BusyError]


@pytest.mark.parametrize(
    ("code", "reason", "domain"),
    [
        (code_pb2.INVALID_ARGUMENT, "MADE_UP", "cloister.v1"),
        (code_pb2.INVALID_ARGUMENT, "TENSOR_REJECTED", "example.com"),
        (code_pb2.NOT_FOUND, "TENSOR_REJECTED", "cloister.v1"),
        (code_pb2.INVALID_ARGUMENT, "", ""),
    ],
)
def test_a_reason_that_is_made_up_foreign_or_under_another_status_is_not_believed(
    peer: Peer, code: int, reason: str, domain: str
) -> None:
    arrived = peer.error(lambda context: context.abort_with_status(made_up(code, reason, domain)))

    assert type(arrived) is InternalError


def test_details_that_are_no_error_info_are_passed_over(peer: Peer) -> None:
    def fail(context: grpc.ServicerContext) -> Any:
        status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="told")
        status.details.append(Packed(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff"))
        status.details.append(Packed(type_url="type.googleapis.com/nothing.Known", value=b"\x08\x01"))
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="TENSOR_REJECTED", domain="cloister.v1"))
        context.abort_with_status(rpc_status.to_status(status))

    arrived = peer.error(fail)

    assert isinstance(arrived, (TensorRejectedError, InternalError))


def test_trailing_bytes_that_are_no_status_are_not_believed(peer: Peer) -> None:
    def fail(context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "told")

    assert type(peer.error(fail)) is InternalError


def test_an_unexpected_exception_of_the_peer_is_an_internal_error(peer: Peer) -> None:
    def fail(_context: grpc.ServicerContext) -> Any:
        raise KeyError("a secret")

    assert type(peer.error(fail)) is InternalError


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_connection_that_fails_is_a_node_out_of_reach(peer: Peer, code: grpc.StatusCode) -> None:
    assert type(peer.error(lambda context: context.abort(code, "gone"))) is UnreachableError


def test_a_node_that_is_not_there_is_out_of_reach() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/cloister.v1.Node/Anything", None, None)(b"", timeout=10)

    assert type(error_from_rpc(caught.value)) is UnreachableError


def test_a_message_above_the_limit_of_the_transport_is_above_a_limit(peer: Peer) -> None:
    arrived = peer.error(lambda context: context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"))

    assert type(arrived) is LimitExceededError


@pytest.mark.parametrize("text", ["x", "→", "😀", "%", "a\n", "\x00", "\ud800"], ids=ascii)
def test_T02_a_long_message_of_any_characters_arrives_cut_and_as_the_error_it_is(peer: Peer, text: str) -> None:
    arrived = peer.raised(ComputeError(text * 100_000))

    assert type(arrived) is ComputeError
    assert 300 < len(str(arrived)) < 2000
    assert set(str(arrived)) == (set(text) if text != "\ud800" else {"?"})


def test_T02_a_long_message_of_a_hostile_peer_is_cut_on_arrival(peer: Peer) -> None:
    arrived = peer.error(lambda context: context.abort(grpc.StatusCode.NOT_FOUND, "x" * 6000))

    assert len(str(arrived)) < 2000
