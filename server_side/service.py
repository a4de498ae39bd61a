"""The gRPC service: authorises every call, hands it to the sessions, and turns errors into statuses.

A stream is served by the thread that gRPC gave it, which is the session's worker while the stream lasts: a frame costs no
hand-over between threads. Back-pressure is HTTP/2's: the next frame is read when the last one is answered. Where
several micro-batches are in flight, a reader takes frames ahead into a queue of exactly that length, so that they arrive
while the session computes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import grpc
import torch

from protos import node_pb2, node_pb2_grpc
from server_side.keeper import Keeper, Stay
from server_side.opening import plan_of, read_program, read_spec, read_state
from wire.codec import payload_bytes
from wire.errors import (
    DrainingError,
    InternalError,
    MessageRejectedError,
    SessionSupersededError,
    WireError,
    status_of,
)
from wire.program import PROGRAM_VERSION
from wire.state import chunks, dump_state, sha256
from wire.trust import Trust

__all__ = ["NodeService"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_END: Final = object()


class NodeService(node_pb2_grpc.NodeServicer):
    """``cloister.v1.Node``."""

    def __init__(self, keeper: Keeper, trust: Trust, version: str) -> None:
        """Serves the sessions of ``keeper`` to whom ``trust`` lets in."""
        self._keeper, self._trust, self._version = keeper, trust, version
        self.draining = False

    def Describe(self, request: node_pb2.DescribeRequest, context: grpc.ServicerContext) -> node_pb2.DescribeResponse:
        """What this node is, offers and limits."""
        del request
        with self._telling(context):
            self._trust.authorize(context)
            return node_pb2.DescribeResponse(
                version=self._version,
                torch_version=torch.__version__,
                device=str(self._keeper.device),
                threads=torch.get_num_threads(),
                limits=self._keeper.limits.to_proto(),
                answered_at_unix_s=time.time(),
                open_sessions=len(self._keeper),
                draining=self.draining,
                program_version=PROGRAM_VERSION,
                instruction_set=torch.backends.cpu.get_cpu_capability(),
            )
        raise AssertionError  # telling() aborts

    def OpenSession(
        self,
        request_iterator: Iterator[node_pb2.OpenSessionRequest],
        context: grpc.ServicerContext,
    ) -> node_pb2.OpenSessionResponse:
        """Opens a session, or says that the very same opening did."""
        with self._telling(context):
            owner = self._trust.authorize(context)
            spec = read_spec(request_iterator, self._keeper.fingerprint)
            stay = self._keeper.existing(owner, spec)
            if stay is not None:
                return _opened(stay, already=True)
            if self.draining:
                raise DrainingError("this node is shutting down and takes no new sessions; use another")
            plan = plan_of(spec, self._keeper.limits)
            program = read_program(request_iterator, spec, self._keeper.limits)
            opening = read_state(request_iterator, spec, plan, program, owner, self._keeper.accounts)
            return _opened(self._keeper.open(owner, spec, opening), already=False)
        raise AssertionError  # telling() aborts

    def Train(
        self,
        request_iterator: Iterator[node_pb2.TrainRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[node_pb2.TrainResponse]:
        """Answers frames, in order."""
        metrics = self._keeper.metrics
        with self._telling(context), self._attached(request_iterator, context) as (stay, ended):
            depth = stay.session.max_in_flight
            for request in self._ahead(request_iterator, depth) if depth > 1 else request_iterator:
                if request.WhichOneof("part") != "frame":
                    raise MessageRejectedError("a training stream carries frames after its attachment")
                metrics.received(payload_bytes(request.frame.tensors))
                answer = stay.session.train(request.frame, metrics.frame_resent)
                if ended.is_set():
                    raise SessionSupersededError("a newer stream works on this session")
                metrics.sent(payload_bytes(answer.tensors))
                metrics.frame_answered(answer.phase, answer.compute_s)
                if answer.updated:
                    metrics.step_applied()
                yield answer

    def Infer(
        self,
        request_iterator: Iterator[node_pb2.InferRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[node_pb2.InferResponse]:
        """Answers batches in evaluation mode, in order."""
        with self._telling(context):
            owner = self._trust.authorize(context)
            stay = self._find(owner, next(request_iterator, None))
            for request in request_iterator:
                if request.WhichOneof("part") != "batch":
                    raise MessageRejectedError("an evaluation stream carries batches after its attachment")
                self._keeper.metrics.received(payload_bytes(request.batch.tensors))
                answer = stay.session.infer(request.batch)
                self._keeper.metrics.sent(payload_bytes(answer.tensors))
                yield answer

    def Snapshot(
        self,
        request: node_pb2.SnapshotRequest,
        context: grpc.ServicerContext,
    ) -> Iterator[node_pb2.SnapshotResponse]:
        """The session's tensors at a step boundary."""
        with self._telling(context):
            stay = self._keeper.find(self._trust.authorize(context), request.session_id)
            step, tensors = stay.session.snapshot(with_optimizer=request.with_optimizer)
            data = dump_state(tensors)
            header = node_pb2.SnapshotHeader(next_step=step, state_bytes=len(data), state_sha256=sha256(data))
            yield node_pb2.SnapshotResponse(header=header)
            for chunk in chunks(data):
                self._keeper.metrics.sent(len(chunk))
                yield node_pb2.SnapshotResponse(chunk=chunk)

    def CloseSession(
        self,
        request: node_pb2.CloseSessionRequest,
        context: grpc.ServicerContext,
    ) -> node_pb2.CloseSessionResponse:
        """Ends a session and frees what it holds."""
        with self._telling(context):
            owner = self._trust.authorize(context)
            return node_pb2.CloseSessionResponse(closed=self._keeper.close(owner, request.session_id))
        raise AssertionError  # telling() aborts

    def _find(self, owner: str, first: Any) -> Stay:
        if first is None or first.WhichOneof("part") != "attachment":
            raise MessageRejectedError("a stream starts with its attachment to a session")
        return self._keeper.find(owner, first.attachment.session_id)

    @contextmanager
    def _attached(
        self,
        requests: Iterator[node_pb2.TrainRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[tuple[Stay, threading.Event]]:
        stay = self._find(self._trust.authorize(context), next(requests, None))
        ended = threading.Event()

        def hang_up() -> None:
            ended.set()
            context.cancel()

        self._keeper.attach(stay, hang_up)
        try:
            yield stay, ended
        finally:
            self._keeper.detach(stay, hang_up)

    def _ahead(self, requests: Iterator[_T], depth: int) -> Iterator[_T]:
        """``requests``, up to ``depth`` of them read before they are asked for."""
        waiting: queue.Queue[Any] = queue.Queue(depth)
        stopped = threading.Event()

        def put(item: object) -> bool:
            while not stopped.is_set():
                try:
                    waiting.put(item, timeout=1.0)
                except queue.Full:
                    continue
                return True
            return False

        def read() -> None:
            try:
                for request in requests:
                    if not put(request):
                        return
            except grpc.RpcError:
                pass  # the connection ended: so does this stream, whose owner comes back with a new one
            finally:
                put(_END)

        reader = threading.Thread(target=read, name="cloister-reader", daemon=True)
        reader.start()
        try:
            while (item := waiting.get()) is not _END:
                yield item
        finally:
            stopped.set()

    @contextmanager
    def _telling(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Turns what is raised inside into a status for the peer; internal text stays in the log."""
        try:
            yield
        except WireError as error:
            self._keeper.metrics.refused(error)
            _log.info("refused: %s: %s", error.reason, error)
            context.abort_with_status(status_of(error))
        except grpc.RpcError:
            raise  # the peer is gone
        except Exception as error:
            if not context.is_active():
                return  # aborting or cancelled: gRPC raises a bare Exception to unwind the handler
            _log.exception("a defect in this node")
            told = InternalError("the node failed; its log says how")
            self._keeper.metrics.refused(told)
            context.abort_with_status(status_of(told))
            raise AssertionError from error  # abort_with_status does not return


def _opened(stay: Stay, *, already: bool) -> node_pb2.OpenSessionResponse:
    return node_pb2.OpenSessionResponse(
        already_open=already,
        next_step=stay.session.next_step,
        reserved_bytes=stay.reservation.reserved_bytes,
    )
