"""Binds the node's methods, and the standard health check, to gRPC.

Built from the service's descriptor, so that a method of the ``.proto`` cannot be forgotten. Health is bound here as
well, since gRPC's own binding would wait for the request in a thread of the pool for as long as a peer likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2

from protos import node_pb2
from server_side.callers import Callers
from server_side.service import NodeService
from wire.errors import MessageRejectedError, WireError, status_of
from wire.messages import parser
from wire.trust import peer_fingerprint

__all__ = ["health_handler", "node_handler"]

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_NODE = node_pb2.DESCRIPTOR.services_by_name["Node"]


def node_handler(service: NodeService) -> grpc.GenericRpcHandler[Any, Any]:
    """All methods of ``cloister.v1.Node``, each as a stream of requests."""
    handlers = {}
    for method in _NODE.methods:
        bind = (
            grpc.stream_stream_rpc_method_handler if method.server_streaming else grpc.stream_unary_rpc_method_handler
        )
        handlers[method.name] = bind(
            getattr(service, method.name),
            request_deserializer=parser(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(_NODE.full_name, handlers)


def health_handler(servicer: health.HealthServicer, callers: Callers) -> grpc.GenericRpcHandler[Any, Any]:
    """``grpc.health.v1.Health/Check``; the other methods hold a thread for each that asks, and are left out."""

    def check(requests: Iterator[Any], context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        try:
            call = callers.enter(peer_fingerprint(context), context.cancel)
            try:
                request = next(call.listen(requests), None)
                if not isinstance(request, health_pb2.HealthCheckRequest):
                    raise MessageRejectedError("not one HealthCheckRequest")
                answer: health_pb2.HealthCheckResponse = servicer.Check(request, context)
                return answer
            finally:
                callers.leave(call)
        except WireError as error:
            context.abort_with_status(status_of(error))
            raise AssertionError from error  # abort_with_status does not return

    handler = grpc.stream_unary_rpc_method_handler(
        check,
        request_deserializer=parser(health_pb2.HealthCheckRequest),
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(_HEALTH.full_name, {"Check": handler})
