"""The owner's link to a node: one session, its frames, its state."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import torch

from client_side.stream import Stream, patiently
from client_side.stub import NodeStub
from protos import node_pb2, tensor_pb2
from wire.certificates import fingerprint_of, read_certificate_file
from wire.channels import connect, parse_pin, wait_ready
from wire.codec import check_finite, decode, encode, encode_into, is_absent, payload_bytes
from wire.errors import CloisterError, ConfigError, LimitExceededError, MessageRejectedError, error_from_rpc
from wire.identity import Identity
from wire.recipe import Loss, Optimizer
from wire.state import chunks, dump_state, gather, load_state, sha256

__all__ = ["RECONNECT_S", "Answer", "Link", "NodeAddress", "SessionRequest", "Traffic"]

_log = logging.getLogger(__name__)

OPEN_TIMEOUT_S: Final = 600.0  # a state of several GB over a slow line
CALL_TIMEOUT_S: Final = 30.0
_GOODBYE_S: Final = 5.0  # whoever presses Ctrl-C on a node that hangs is not kept waiting; the session expires anyway
RECONNECT_S: Final = 120.0  # a node that restarts is back within seconds; a router within two minutes
_STATE_HEADERS: Final = 16 * 2**20  # what names of tensors may add to a snapshot
_INFER_AHEAD: Final = 4  # batches sent before the first answer is read


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAddress:
    """Where a node is and how it is known: by a pin, by its certificate's file, or by a CA (exactly one)."""

    target: str
    pin: str | None = None
    certificate: Path | None = None
    ca: Path | None = None

    @classmethod
    def parse(cls, text: str) -> NodeAddress:
        """``host:port#sha256:…``, as ``cloister node`` prints it: an address and a pin in one word.

        Raises:
            ConfigError: no pin; nothing is ever sent to a node that is not known.
        """
        target, _, pin = text.partition("#")
        if not pin:
            raise ConfigError(
                f"the node {text!r} is not pinned: write host:port#sha256:… as `cloister node` prints it, or name its "
                "certificate or a CA",
            )
        return cls(target=target, pin=pin)

    def fingerprint(self) -> bytes:
        """SHA-256 of the one certificate that is meant; empty where a CA vouches for whoever answers.

        Raises:
            ConfigError, IdentityError: a pin that is none, a file that holds no certificate.
        """
        if self.pin is not None:
            return bytes.fromhex(parse_pin(self.pin))
        if self.certificate is not None:
            return bytes.fromhex(fingerprint_of(read_certificate_file(self.certificate)))
        return b""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What to open."""

    program: bytes
    program_digest: bytes
    tensors: dict[str, torch.Tensor] = field(repr=False)
    topology: node_pb2.Topology.ValueType
    loss: Loss | None
    optimizer: Optimizer
    seed: int
    max_rows: int
    max_in_flight: int
    want_input_gradients: bool
    first_step: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Tensor bytes sent and received so far, and how often the link came back."""

    up: int
    down: int
    reconnects: int

    def __add__(self, other: Traffic) -> Traffic:
        """Both together."""
        return Traffic(self.up + other.up, self.down + other.down, self.reconnects + other.reconnects)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one frame."""

    step: int
    micro_batch: int
    phase: int
    tensors: list[torch.Tensor | None] = field(repr=False)
    loss: float
    updated: bool
    compute_s: float


class Link:
    """One session on one node. For one thread."""

    def __init__(self, address: NodeAddress, identity: Identity, *, reconnect_s: float = RECONNECT_S) -> None:
        """Connects.

        Raises:
            IdentityError, UnreachableError, ConfigError: see :func:`wire.channels.connect`.
        """
        self._channel = connect(
            address.target,
            identity,
            pin=address.pin,
            certificate=address.certificate,
            ca=address.ca,
        )
        self._reconnect_s, self._target = reconnect_s, address.target
        self._fingerprint = address.fingerprint()
        self._stub = NodeStub(self._channel)
        self._session = b""
        self._up = self._down = self._most_state = 0
        self._train = Stream(
            self._channel,
            self._stub.Train,
            lambda: node_pb2.TrainRequest(attachment=node_pb2.Attachment(session_id=self._session)),
            reconnect_s=reconnect_s,
            name=f"the node {address.target}",
        )
        try:
            wait_ready(self._channel)
        except CloisterError:
            self._channel.close()
            raise

    @property
    def traffic(self) -> Traffic:
        """What went over the link so far."""
        return Traffic(self._up, self._down, self._train.reconnects)

    @property
    def unanswered(self) -> int:
        """Frames sent whose answer was not received yet."""
        return len(self._train)

    def describe(self) -> node_pb2.DescribeResponse:
        """What the node says of itself."""
        request = node_pb2.DescribeRequest()
        answer: node_pb2.DescribeResponse = patiently(
            lambda: self._stub.Describe(request, timeout=CALL_TIMEOUT_S),
            self._reconnect_s,
        )
        return answer

    def open(self, request: SessionRequest) -> int:
        """Opens a session; returns the step that its first frame carries.

        Raises:
            WireError: the node's reason for refusing.
            UnreachableError: the node cannot be reached.
        """
        state = dump_state(request.tensors)
        # The tensors, three of the optimizer's for each, and their names.
        self._most_state = 4 * len(state) + _STATE_HEADERS
        self._session = secrets.token_bytes(16)
        spec = node_pb2.SessionSpec(
            session_id=self._session,
            node_fingerprint=self._fingerprint,  # sent on to another node, it opens nothing (T04)
            program_sha256=request.program_digest,
            program_bytes=len(request.program),
            state_sha256=sha256(state),
            state_bytes=len(state),
            topology=request.topology,
            loss=None if request.loss is None else request.loss.to_proto(),
            optimizer=request.optimizer.to_proto(),
            seed=request.seed,
            max_rows=request.max_rows,
            max_in_flight=request.max_in_flight,
            want_input_gradients=request.want_input_gradients,
            first_step=request.first_step,
        )

        def parts() -> Iterator[node_pb2.OpenSessionRequest]:
            yield node_pb2.OpenSessionRequest(spec=spec)
            for piece in chunks(request.program):
                yield node_pb2.OpenSessionRequest(program_chunk=piece)
            for piece in chunks(state):
                yield node_pb2.OpenSessionRequest(state_chunk=piece)

        # Safe to repeat: the node knows the very same opening again.
        opened = patiently(lambda: self._stub.OpenSession(parts(), timeout=OPEN_TIMEOUT_S), self._reconnect_s)
        return int(opened.next_step)

    def send(
        self,
        *,
        step: int,
        micro_batch: int,
        phase: node_pb2.Phase.ValueType,
        tensors: Sequence[torch.Tensor | None] = (),
        labels: torch.Tensor | None = None,
        loss_weight: float = 0.0,
        update: bool = False,
    ) -> None:
        """Sends one frame; its answer comes from :meth:`receive`, in the order of sending.

        ``None`` among output gradients says that there is none, not even zeros.
        """
        request = node_pb2.TrainRequest()
        frame = request.frame
        frame.step, frame.micro_batch, frame.phase = step, micro_batch, phase
        frame.update, frame.loss_weight = update, loss_weight
        for tensor in tensors:
            message = frame.tensors.add()
            if tensor is not None:
                encode_into(message, tensor)
                self._up += tensor.nbytes
        if labels is not None:
            encode_into(frame.labels, labels)
            self._up += labels.nbytes
        self._train.send(request)

    def receive(self) -> Answer:
        """The answer of the oldest unanswered frame.

        Raises:
            WireError: the node's reason for refusing the frame; the session stands where it stood.
            NonFiniteError, TensorRejectedError: what came back is no good (T17).
            UnreachableError: the node did not come back in time.
        """
        request, response = self._train.receive()
        frame = request.frame
        if (response.step, response.micro_batch, response.phase) != (frame.step, frame.micro_batch, frame.phase):
            raise MessageRejectedError("the node answered another frame than the one it was sent")
        if response.updated != (frame.update or frame.phase == node_pb2.PHASE_UPDATE):
            raise MessageRejectedError("the node updated where it was not asked to, or did not where it was")
        return Answer(
            response.step,
            response.micro_batch,
            response.phase,
            self._decoded(response.tensors),
            response.loss,
            response.updated,
            response.compute_s,
        )

    def infer(self, batches: Iterable[Sequence[torch.Tensor]]) -> Iterator[list[torch.Tensor | None]]:
        """The middle's outputs in evaluation mode for each of ``batches``, in order."""
        stream = Stream(
            self._channel,
            self._stub.Infer,
            lambda: node_pb2.InferRequest(attachment=node_pb2.Attachment(session_id=self._session)),
            reconnect_s=self._reconnect_s,
            name=f"the node {self._target}",
        )
        try:
            for index, batch in enumerate(batches):
                tensors = [encode(t) for t in batch]
                self._up += payload_bytes(tensors)
                stream.send(node_pb2.InferRequest(batch=node_pb2.Batch(index=index, tensors=tensors)))
                if len(stream) >= _INFER_AHEAD:
                    yield self._inferred(stream)
            while len(stream):
                yield self._inferred(stream)
        finally:
            stream.close()

    def snapshot(self, *, with_optimizer: bool = False) -> tuple[int, dict[str, torch.Tensor]]:
        """The session's next step and its tensors, under the names of :mod:`wire.state`.

        Raises:
            StateRejectedError: bytes that differ from what the node announced.
        """

        def fetch() -> tuple[int, dict[str, torch.Tensor]]:
            request = node_pb2.SnapshotRequest(session_id=self._session, with_optimizer=with_optimizer)
            responses = iter(self._stub.Snapshot(request, timeout=OPEN_TIMEOUT_S))
            first = next(responses, None)
            if first is None or first.WhichOneof("part") != "header":
                raise MessageRejectedError("the node's snapshot does not start with its header")
            header = first.header
            if header.state_bytes > self._most_state:
                raise LimitExceededError(
                    f"the node announces {header.state_bytes} bytes of state; at most {self._most_state} can be ours"
                )
            pieces = (response.chunk for response in responses)
            data = gather(pieces, header.state_bytes, header.state_sha256, "state")
            self._down += len(data)
            return header.next_step, load_state(data)

        fetched: tuple[int, dict[str, torch.Tensor]] = patiently(fetch, self._reconnect_s)
        return fetched

    def close(self, *, end_session: bool = True) -> None:
        """Ends the session on the node (best effort: it expires there anyway) and the connection."""
        self._train.close()
        if end_session and self._session:
            try:
                self._stub.CloseSession(
                    node_pb2.CloseSessionRequest(session_id=self._session),
                    timeout=_GOODBYE_S,
                )
            except grpc.RpcError as error:
                _log.warning("the node was not told that the session ends: %s", error_from_rpc(error))
        self._channel.close()

    def _inferred(self, stream: Stream) -> list[torch.Tensor | None]:
        request, response = stream.receive()
        if response.index != request.batch.index:
            raise MessageRejectedError("the node answered another batch than the one it was sent")
        return self._decoded(response.tensors)

    def _decoded(self, messages: Iterable[tensor_pb2.Tensor]) -> list[torch.Tensor | None]:
        tensors = [None if is_absent(m) else decode(m) for m in messages]
        for tensor in tensors:
            if tensor is None:
                continue
            check_finite(tensor, "what the node returned")
            self._down += tensor.nbytes
        return tensors
