"""The node's methods as the owner calls them: what comes back is bounded before it is parsed (THREATS T17)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from client_side.frames import SentFrame
from protos import node_pb2
from wire.errors import MessageRejectedError
from wire.messages import Rejected, parser

__all__ = ["NodeStub"]

_M = TypeVar("_M", bound=Message)
_NODE: Final = node_pb2.DESCRIPTOR.services_by_name["Node"]


class NodeStub:
    """One attribute for each method of ``cloister.v1.Node``, called as gRPC's generated stub is."""

    Describe: Callable[..., node_pb2.DescribeResponse]
    OpenSession: Callable[..., node_pb2.OpenSessionResponse]
    Train: Callable[..., Any]
    Infer: Callable[..., Any]
    Snapshot: Callable[..., Any]
    CloseSession: Callable[..., node_pb2.CloseSessionResponse]

    def __init__(self, channel: grpc.Channel) -> None:
        for method in _NODE.methods:
            up = "stream" if method.client_streaming else "unary"
            down = "stream" if method.server_streaming else "unary"
            dial = getattr(channel, f"{up}_{down}")(
                f"/{_NODE.full_name}/{method.name}",
                request_serializer=_as_bytes,
                response_deserializer=_strict(GetMessageClass(method.output_type)),
            )
            setattr(self, method.name, dial)


def _as_bytes(request: Message | SentFrame) -> bytes:
    return request.data if isinstance(request, SentFrame) else request.SerializeToString()


def _strict(kind: type[_M]) -> Callable[[bytes], _M]:
    parse = parser(kind)

    def read(data: bytes) -> _M:
        message = parse(data)
        if isinstance(message, Rejected):  # gRPC ends the call with INTERNAL
            raise MessageRejectedError("what the node answered is no message of ours")
        return message

    return read
