"""The gRPC service: authorises every call, hands it to the sessions, and turns errors into statuses.

A stream is served by the thread that gRPC gave it, which is the session's worker while the stream lasts: a frame costs
no hand-over between threads. Back-pressure is HTTP/2's: the next frame is read when the last one is answered. Where
several micro-batches are in flight, a reader takes frames ahead into a queue of exactly that length, so that they
arrive while the session computes.

Every method takes its requests as a stream, also where the peer sends just one: gRPC would wait for that one in a
thread of the pool before anybody asks who is calling. On the wire the two are the same.
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
from google.protobuf.message import Message

from protos import node_pb2
from server_side.callers import Call
from server_side.keeper import Keeper, Stay, StreamKind
from server_side.opening import plan_of, read_program, read_spec, read_state
from wire.codec import payload_bytes
from wire.errors import (
    DrainingError,
    InternalError,
    MessageRejectedError,
    SessionLostError,
    SessionSupersededError,
    WireError,
    status_of,
)
from wire.program import PROGRAM_VERSION
from wire.state import STATE_PREFIX, chunks, dump_state, load_state, sha256, tensor_digest
from wire.trust import Trust

__all__ = ["NodeService"]

_log = logging.getLogger(__name__)

OPENING_S: Final = 600.0  # a state of several GB over a slow line; owners give up after as long
SNAPSHOT_S: Final = 600.0  # the same way back

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)
_END: Final = object()
_MOST_KNOWN: Final = 7000  # by 34 bytes each, a message that is small (wire.messages)
_NAMED_AT_ONCE: Final = 500  # names take some 100 bytes: small messages too
_DIGEST_BYTES: Final = 32
# A snapshot is held three times while it is made: one session's at a time.
_DUMPING: Final = threading.Lock()


class NodeService:
    """``cloister.v1.Node``; each method's requests come as an iterator."""

    def __init__(self, keeper: Keeper, trust: Trust, version: str) -> None:
        """Serves the sessions of ``keeper`` to whom ``trust`` lets in."""
        self._keeper, self._trust, self._version = keeper, trust, version
        self.draining = False

    def Describe(
        self,
        requests: Iterator[node_pb2.DescribeRequest],
        context: grpc.ServicerContext,
    ) -> node_pb2.DescribeResponse:
        """What this node is, offers and limits."""
        with self._calling(context) as call:
            _only(call, requests, node_pb2.DescribeRequest)
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
        requests: Iterator[node_pb2.OpenSessionRequest],
        context: grpc.ServicerContext,
    ) -> node_pb2.OpenSessionResponse:
        """Opens a session, or says that the very same opening did."""
        with self._calling(context) as call:
            parts = call.listen(requests, total_s=OPENING_S)
            spec = read_spec(parts, self._keeper.fingerprint)
            stay = self._keeper.existing(call.owner, spec)
            if stay is not None:
                return self._opened(stay, already=True)
            if self.draining:
                raise DrainingError("this node is shutting down and takes no new sessions; use another")
            plan = plan_of(spec, self._keeper.limits)
            program = read_program(parts, spec, self._keeper.limits)
            self._keeper.make_way(call.owner, spec.replaces)
            opening = read_state(
                parts, spec, plan, program, owner=call.owner, accounts=self._keeper.accounts, kept=self._keeper.kept
            )
            stay = self._keeper.open(call.owner, spec, opening)
            self._keeper.forget(call.owner, spec.replaces)
            return self._opened(stay, already=stay.reservation is not opening.reservation)
        raise AssertionError  # telling() aborts

    def Train(
        self,
        requests: Iterator[node_pb2.TrainRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[node_pb2.TrainResponse]:
        """Answers frames, in order."""
        metrics, most = self._keeper.metrics, self._keeper.limits.message_bytes
        with self._calling(context) as call, self._attached(call, requests, "train", context) as (stay, ended):
            depth = stay.session.max_in_flight
            for request in self._ahead(requests, depth) if depth > 1 else requests:
                if request.WhichOneof("part") != "frame":
                    raise MessageRejectedError("a training stream carries frames after its attachment")
                answer = stay.session.train(request.frame, metrics.frame_resent)
                if ended.is_set():
                    raise SessionSupersededError("a newer stream works on this session")
                answer.draining = self.draining
                try:
                    yield answer
                finally:  # an owner who hangs up now ends the generator here: its frame counts all the same
                    # After the session has checked them: counting by foreign headers could take for ever.
                    metrics.received(min(payload_bytes(request.frame.tensors), most))
                    metrics.sent(payload_bytes(answer.tensors))
                    metrics.frame_answered(answer.phase, answer.compute_s)
                    if answer.updated:
                        metrics.step_applied()
                # While the answer travels and the owner goes on.
                stay.session.settle()

    def Infer(
        self,
        requests: Iterator[node_pb2.InferRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[node_pb2.InferResponse]:
        """Answers batches in evaluation mode, in order."""
        with self._calling(context) as call, self._attached(call, requests, "infer", context) as (stay, ended):
            for request in requests:
                if request.WhichOneof("part") != "batch":
                    raise MessageRejectedError("an evaluation stream carries batches after its attachment")
                answer = stay.session.infer(request.batch)
                if ended.is_set():
                    raise SessionSupersededError("a newer stream works on this session")
                self._keeper.metrics.received(payload_bytes(request.batch.tensors))
                self._keeper.metrics.sent(payload_bytes(answer.tensors))
                yield answer

    def Snapshot(
        self,
        requests: Iterator[node_pb2.SnapshotRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[node_pb2.SnapshotResponse]:
        """The session's tensors at a step boundary; once their copy is taken, the session may train on."""
        with self._calling(context) as call:
            request = _only(call, requests, node_pb2.SnapshotRequest)
            if len(request.known) > _MOST_KNOWN or any(len(digest) != _DIGEST_BYTES for digest in request.known):
                raise MessageRejectedError(f"at most {_MOST_KNOWN} known tensors, by {_DIGEST_BYTES} bytes each")
            try:
                stay = self._keeper.find(call.owner, request.session_id)
            except SessionLostError:
                kept = self._keeper.kept.find(call.owner, session_id=request.session_id)
                if kept is None:
                    raise
                tensors = load_state(self._keeper.kept.read(kept))
                if not request.with_optimizer:
                    tensors = {name: t for name, t in tensors.items() if name.startswith(STATE_PREFIX)}
                request.keep = False  # it is
                yield from self._telling_state(call, request, kept.step, tensors)
                return
            with self._working(call, stay, "snapshot", context):
                step, tensors = stay.session.snapshot(with_optimizer=request.with_optimizer)
                yield from self._telling_state(call, request, step, tensors)

    def _telling_state(
        self, call: Call, request: node_pb2.SnapshotRequest, step: int, tensors: dict[str, torch.Tensor]
    ) -> Iterator[node_pb2.SnapshotResponse]:
        yield node_pb2.SnapshotResponse(header=node_pb2.SnapshotHeader(next_step=step))
        with _DUMPING:
            digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
            known = set(request.known)
            data = dump_state({name: tensor for name, tensor in tensors.items() if digests[name] not in known})
            last = node_pb2.SnapshotContents(state_bytes=len(data), state_sha256=sha256(data))
            if request.keep:
                whole = dump_state(tensors) if known else data
                kept = self._keeper.kept.keep(request.session_id, call.owner, step, whole)
                if kept is not None:
                    last.kept_bytes, last.kept_sha256 = len(whole), kept
                del whole
        del tensors
        call.overdue_at = time.monotonic() + SNAPSHOT_S  # what is written waits for a peer that does not read
        named = [node_pb2.TensorDigest(name=name, sha256=digest) for name, digest in digests.items()]
        for start in range(0, len(named), _NAMED_AT_ONCE):
            part = node_pb2.SnapshotContents(tensors=named[start : start + _NAMED_AT_ONCE])
            yield node_pb2.SnapshotResponse(contents=part)
        yield node_pb2.SnapshotResponse(contents=last)
        for chunk in chunks(data):
            self._keeper.metrics.sent(len(chunk))
            yield node_pb2.SnapshotResponse(chunk=chunk)

    def CloseSession(
        self,
        requests: Iterator[node_pb2.CloseSessionRequest],
        context: grpc.ServicerContext,
    ) -> node_pb2.CloseSessionResponse:
        """Ends a session and frees what it holds."""
        with self._calling(context) as call:
            request = _only(call, requests, node_pb2.CloseSessionRequest)
            return node_pb2.CloseSessionResponse(closed=self._keeper.close(call.owner, request.session_id))
        raise AssertionError  # telling() aborts

    def _opened(self, stay: Stay, *, already: bool) -> node_pb2.OpenSessionResponse:
        kind = stay.session.receipt_hash
        return node_pb2.OpenSessionResponse(
            already_open=already,
            next_step=stay.session.next_step,
            reserved_bytes=stay.reservation.reserved_bytes,
            receipt_hash=kind,
            node_record=self._keeper.signer.record if kind and self._keeper.signer is not None else b"",
        )

    @contextmanager
    def _calling(self, context: grpc.ServicerContext) -> Iterator[Call]:
        """Around every call: who it is, whether there is room for it, and what went wrong."""
        with self._telling(context):
            call = self._keeper.callers.enter(self._trust.authorize(context), context.cancel)
            try:
                yield call
            finally:
                self._keeper.callers.leave(call)

    @contextmanager
    def _attached(
        self,
        call: Call,
        requests: Iterator[Any],
        kind: StreamKind,
        context: grpc.ServicerContext,
    ) -> Iterator[tuple[Stay, threading.Event]]:
        first = next(call.listen(requests), None)
        if first is None or first.WhichOneof("part") != "attachment":
            raise MessageRejectedError("a stream starts with its attachment to a session")
        stay = self._keeper.find(call.owner, first.attachment.session_id)
        with self._working(call, stay, kind, context) as ended:
            yield stay, ended

    @contextmanager
    def _working(
        self,
        call: Call,
        stay: Stay,
        kind: StreamKind,
        context: grpc.ServicerContext,
    ) -> Iterator[threading.Event]:
        """Makes the call the one of its kind that works on ``stay``; the event tells that another one does, or none."""
        ended = threading.Event()

        def hang_up() -> None:
            ended.set()
            context.cancel()  # type: ignore[no-untyped-call]  # the stubs leave it bare

        self._keeper.attach(stay, kind, hang_up)
        self._keeper.callers.settle(call)
        try:
            yield ended
        finally:
            self._keeper.detach(stay, kind, hang_up)

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


def _only(call: Call, requests: Iterator[Any], kind: type[_M]) -> _M:
    """The one request of a call that takes one."""
    request = next(call.listen(requests), None)
    if not isinstance(request, kind):
        raise MessageRejectedError(f"not one {kind.DESCRIPTOR.name}")
    return request
