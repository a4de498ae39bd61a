"""The owner's link to a node: one session, its frames, its state."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import torch

from client_side.frames import SentFrame
from client_side.receipts import Receipts, SessionTally, SignedSegment
from client_side.stream import Stream, patiently
from client_side.stub import NodeStub
from privacy.guard import Released
from protos import node_pb2, tensor_pb2
from provenance.tallies import spec_digest
from wire.certificates import fingerprint_of, read_certificate_file
from wire.channels import connect, parse_pin, wait_ready
from wire.codec import check_finite, decode, encode, is_absent, payload_bytes
from wire.errors import (
    CloisterError,
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    StateRejectedError,
    WireError,
    error_from_rpc,
)
from wire.identity import Identity
from wire.recipe import Loss, Optimizer
from wire.state import chunks, dump_state, gather, load_state, rows_of, sha256

__all__ = ["RECONNECT_S", "Answer", "Incoming", "Link", "NodeAddress", "SessionRequest", "Traffic", "addresses"]

_log = logging.getLogger(__name__)

OPEN_TIMEOUT_S: Final = 600.0  # a state of several GB over a slow line
CALL_TIMEOUT_S: Final = 30.0
_GOODBYE_S: Final = 5.0  # whoever presses Ctrl-C on a node that hangs is not kept waiting; the session expires anyway
RECONNECT_S: Final = 120.0  # a node that restarts is back within seconds; a router within two minutes
_STATE_HEADERS: Final = 16 * 2**20  # what names of tensors may add to a snapshot
_MOST_KNOWN: Final = 7000  # tensors that a node lets itself be told of
_MOST_TENSORS: Final = 2**17
_DIGEST_BYTES: Final = 32
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


def addresses(node: str | NodeAddress | Sequence[str | NodeAddress]) -> list[NodeAddress]:
    """Each of the nodes that ``node`` names, in order.

    Raises:
        ConfigError: none, one twice, or one without a pin.
    """
    named: list[str | NodeAddress] = []
    for each in [node] if isinstance(node, str | NodeAddress) else node:
        named += [each] if isinstance(each, NodeAddress) else [part for part in each.split(",") if part.strip()]
    found = [each if isinstance(each, NodeAddress) else NodeAddress.parse(each.strip()) for each in named]
    if not found or len({each.target for each in found}) != len(found):
        raise ConfigError(f"node {node!r}: name one, or several different ones")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What to open."""

    program: bytes
    program_digest: bytes
    tensors: dict[str, Released] = field(repr=False)
    topology: node_pb2.Topology.ValueType
    loss: Loss | None
    optimizer: Optimizer
    seed: int
    max_rows: int
    max_in_flight: int
    want_input_gradients: bool
    first_step: int = 0
    #: SHA-256 and size of what the node keeps: then ``tensors`` stay here.
    kept: tuple[bytes, int] | None = None
    #: An earlier session on the same node, which ends.
    replaces: bytes = b""
    #: The run's, where the node is asked for them.
    receipts: Receipts | None = None


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
    draining: bool


class Incoming:
    """A snapshot on its way. For one thread, which need not be the link's.

    Attributes:
        next_step: the boundary that it was taken at.
        node: the fingerprint of the node that it comes from; empty where a CA vouches for it.
    """

    def __init__(
        self,
        next_step: int,
        node: str,
        responses: Iterator[node_pb2.SnapshotResponse],
        most_bytes: int,
        received: Callable[[int], None],
    ) -> None:
        self.next_step, self.node = next_step, node
        self._responses, self._most_bytes, self._received = responses, most_bytes, received
        self._told: tuple[dict[str, bytes], node_pb2.SnapshotContents] | None = None

    @property
    def digests(self) -> dict[str, bytes]:
        """Of all its tensors, by name.

        Raises:
            MessageRejectedError, LimitExceededError: what the node announces is no snapshot, or too large for one.
            WireError, UnreachableError: the node failed meanwhile.
        """
        return self._contents()[0]

    @property
    def state_bytes(self) -> int:
        """How many are to come."""
        return self._contents()[1].state_bytes

    @property
    def state_sha256(self) -> bytes:
        """Of the bytes that are to come."""
        return self._contents()[1].state_sha256

    @property
    def kept(self) -> tuple[bytes, int] | None:
        """SHA-256 and size of what the node keeps on its own disk."""
        last = self._contents()[1]
        return (last.kept_sha256, last.kept_bytes) if last.kept_sha256 else None

    def _contents(self) -> tuple[dict[str, bytes], node_pb2.SnapshotContents]:
        if self._told is not None:
            return self._told
        digests: dict[str, bytes] = {}
        last = node_pb2.SnapshotContents()
        while not last.state_sha256:
            with _rpc_errors():
                part = next(self._responses, None)
            if part is None or part.WhichOneof("part") != "contents" or len(digests) > _MOST_TENSORS:
                raise MessageRejectedError("the node's snapshot does not say what it contains")
            digests |= {named.name: named.sha256 for named in part.contents.tensors}
            last = part.contents
        if any(len(digest) != _DIGEST_BYTES for digest in (*digests.values(), last.state_sha256)):
            raise MessageRejectedError(f"a digest of another length than {_DIGEST_BYTES} bytes")
        if last.state_bytes > self._most_bytes:
            raise LimitExceededError(
                f"the node announces {last.state_bytes} bytes of state; at most {self._most_bytes} can be ours"
            )
        self._told = digests, last
        return self._told

    def pieces(self) -> Iterator[bytes]:
        """The state's bytes, as they come; never more than were announced.

        Raises:
            StateRejectedError: more than that.
            WireError, UnreachableError: as for :attr:`digests`.
        """
        left = self.state_bytes
        while True:
            with _rpc_errors():
                response = next(self._responses, None)
            if response is None:
                return
            left -= len(response.chunk)
            if left < 0:
                raise StateRejectedError(f"more than the {self.state_bytes} bytes of state that were announced")
            self._received(len(response.chunk))
            yield response.chunk


@contextmanager
def _rpc_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


class Link:
    """One session on one node. For one thread.

    Attributes:
        target: the node's host and port.
    """

    def __init__(
        self,
        address: NodeAddress,
        identity: Identity,
        *,
        reconnect_s: float = RECONNECT_S,
        leave_silent: bool = False,
    ) -> None:
        """Connects; see :class:`Stream` for ``leave_silent``.

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
        self._reconnect_s, self.target = reconnect_s, address.target
        self._fingerprint = address.fingerprint()
        self._stub = NodeStub(self._channel)
        self._session = b""
        self._tally: SessionTally | None = None
        self._up = self._down = self._most_state = 0
        self._train = Stream(
            self._channel,
            self._stub.Train,
            lambda: node_pb2.TrainRequest(attachment=node_pb2.Attachment(session_id=self._session)),
            reconnect_s=reconnect_s,
            name=f"the node {address.target}",
            leave_silent=leave_silent,
        )
        try:
            wait_ready(self._channel)
        except CloisterError:
            self._channel.close()
            raise

    @property
    def session(self) -> bytes:
        """The id of its session; empty before there is one."""
        return self._session

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
            ReceiptError: what it says of its receipts is not its own.
        """
        kept = request.kept
        tensors = {name: released.tensor for name, released in request.tensors.items()}
        state = b"" if kept is not None else dump_state(tensors)
        # The tensors, three of the optimizer's for each, and their names.
        self._most_state = 4 * (len(state) if kept is None else kept[1]) + _STATE_HEADERS
        self._session = secrets.token_bytes(16)
        spec = node_pb2.SessionSpec(
            session_id=self._session,
            node_fingerprint=self._fingerprint,  # sent on to another node, it opens nothing (T04)
            program_sha256=request.program_digest,
            program_bytes=len(request.program),
            state_sha256=sha256(state) if kept is None else kept[0],
            state_bytes=len(state) if kept is None else kept[1],
            state_kept=kept is not None,
            topology=request.topology,
            loss=None if request.loss is None else request.loss.to_proto(),
            optimizer=request.optimizer.to_proto(),
            seed=request.seed,
            max_rows=request.max_rows,
            max_in_flight=request.max_in_flight,
            want_input_gradients=request.want_input_gradients,
            first_step=request.first_step,
            replaces=request.replaces,
            rows_bytes=sum(tensor.nbytes for tensor in rows_of(tensors).values()),
            receipt_hashes=[] if request.receipts is None else request.receipts.hashes,
            receipt_salt=b"" if request.receipts is None else request.receipts.salt,
        )

        def parts() -> Iterator[node_pb2.OpenSessionRequest]:
            yield node_pb2.OpenSessionRequest(spec=spec)
            for piece in chunks(request.program):
                yield node_pb2.OpenSessionRequest(program_chunk=piece)
            for piece in chunks(state):
                yield node_pb2.OpenSessionRequest(state_chunk=piece)

        # Safe to repeat: the node knows the very same opening again.
        opened = patiently(lambda: self._stub.OpenSession(parts(), timeout=OPEN_TIMEOUT_S), self._reconnect_s)
        if opened.receipt_hash:
            self._tally = SessionTally(
                kind=opened.receipt_hash,
                salt=spec.receipt_salt,
                spec=spec_digest(spec),
                first_step=request.first_step,
                node_record=opened.node_record,
                fingerprint=self._fingerprint.hex(),
            )
        return int(opened.next_step)

    def send(self, frame: SentFrame) -> None:
        """Sends one frame; its answer comes from :meth:`receive`, in the order of sending."""
        self._up += frame.tensor_bytes
        self._train.send(frame)
        if self._tally is not None:
            self._tally.sent(frame)

    def receive(self) -> Answer:
        """The answer of the oldest unanswered frame.

        Raises:
            WireError: the node's reason for refusing the frame; the session stands where it stood.
            NonFiniteError, TensorRejectedError: what came back is no good (T17).
            UnreachableError: the node did not come back in time.
        """
        try:
            frame, response = self._train.receive()
        except WireError:
            if self._tally is not None:
                self._tally.refused()
            raise
        if self._tally is not None:
            self._tally.received(response)
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
            response.draining,
        )

    def receipt(self) -> SignedSegment | None:
        """What the node signs of the steps since the last receipt; ``None`` where it signs none, or there are none.

        Only at a step boundary, with no answer outstanding.

        Raises:
            ReceiptError: it differs from what was exchanged.
        """
        if self._tally is None or not self._tally.due:
            return None
        self._train.send(self._tally.request())
        _, response = self._train.receive()
        return self._tally.accept(response.receipt)

    def infer(self, batches: Iterable[Sequence[Released]]) -> Iterator[list[torch.Tensor | None]]:
        """The middle's outputs in evaluation mode for each of ``batches``, in order."""
        stream = Stream(
            self._channel,
            self._stub.Infer,
            lambda: node_pb2.InferRequest(attachment=node_pb2.Attachment(session_id=self._session)),
            reconnect_s=self._reconnect_s,
            name=f"the node {self.target}",
        )
        try:
            for index, batch in enumerate(batches):
                tensors = [encode(released.tensor) for released in batch]
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
            coming = self._begun(with_optimizer=with_optimizer, known=(), keep=False)
            data = gather(coming.pieces(), coming.state_bytes, coming.state_sha256, "state")
            return coming.next_step, load_state(data)

        return patiently(fetch, self._reconnect_s)

    def begin_snapshot(self, *, known: Sequence[bytes] = (), keep: bool = False) -> Incoming:
        """A snapshot with the optimizer's state; when this returns the node has its copy, and training may go on.

        Args:
            known: digests of tensors that need not come again.
            keep: the node keeps the snapshot on its own disk, too.
        """
        return patiently(lambda: self._begun(with_optimizer=True, known=known, keep=keep), self._reconnect_s)

    def _begun(self, *, with_optimizer: bool, known: Sequence[bytes], keep: bool) -> Incoming:
        request = node_pb2.SnapshotRequest(
            session_id=self._session, with_optimizer=with_optimizer, known=known[:_MOST_KNOWN], keep=keep
        )
        responses = self._stub.Snapshot(request, timeout=OPEN_TIMEOUT_S)
        # Training waits for the header, which comes as soon as a step's answer would: so long, and no longer.
        silent = threading.Timer(self._train.patience_s, responses.cancel)
        silent.start()
        try:
            first = next(responses, None)
        finally:
            silent.cancel()
        if first is None or first.WhichOneof("part") != "header":
            raise MessageRejectedError("the node's snapshot does not start with its header")
        return Incoming(first.header.next_step, self._fingerprint.hex(), responses, self._most_state, self._received)

    def _received(self, count: int) -> None:
        self._down += count

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
