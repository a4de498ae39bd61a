"""A client that says anything: it speaks the wire without any of the owner's care, for tests of the node."""

from __future__ import annotations

import dataclasses
import queue
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import torch
from torch import nn

from protos import node_pb2, node_pb2_grpc
from server_side.session import Session, SessionPlan
from wire.capture import capture
from wire.certificates import NODE_NAME, alternative_names, fingerprint_of, new_certificate
from wire.channels import channel_options, connect, fetch_certificate
from wire.codec import encode
from wire.errors import WireError, error_from_rpc
from wire.identity import Identity
from wire.program import decode_program
from wire.recipe import SGD, Loss, Optimizer
from wire.state import OPTIMIZER_PREFIX, STATE_PREFIX, chunks, dump_state, gather, load_state, sha256

__all__ = ["Good", "Job", "Pipe", "WireClient", "frame", "new_owner", "plan_of_job", "reason_of"]

CALL_S: Final = 30.0


def new_owner(name: str = "stranger", *, days: int = 30) -> Identity:
    """An owner's identity less its keystore, which takes seconds to make."""
    pem, key = new_certificate(f"cloister {name}", alternative_names(()), days=days)
    return Identity("owner", "0x" + "0" * 40, pem, key, fingerprint_of(pem), Path("/nonexistent"))


def reason_of(call: Callable[[], object]) -> str:
    """The stable reason that the node refuses ``call`` with; the status' name where it told none of ours."""
    try:
        call()
    except grpc.RpcError as error:
        told = error_from_rpc(error)
        if isinstance(told, WireError) and told.reason != "INTERNAL":
            return told.reason
        return str(error.code().name)
    raise AssertionError("the node took it")


def frame(
    step: int,
    micro_batch: int,
    phase: node_pb2.Phase.ValueType,
    *tensors: torch.Tensor,
    labels: torch.Tensor | None = None,
    weight: float = 1.0,
    update: bool = False,
) -> node_pb2.Frame:
    """A frame of real tensors."""
    return node_pb2.Frame(
        step=step,
        micro_batch=micro_batch,
        phase=phase,
        update=update,
        tensors=[encode(t) for t in tensors],
        labels=None if labels is None else encode(labels),
        loss_weight=0.0 if labels is None else weight,
    )


@dataclass(frozen=True, slots=True)
class Job:
    """A middle ready to be opened."""

    program: bytes
    digest: bytes
    state: dict[str, torch.Tensor] = field(repr=False)
    optimizer: Optimizer = field(default_factory=lambda: SGD(lr=0.1, momentum=0.9))
    loss: Loss | None = None
    max_rows: int = 8
    max_in_flight: int = 4
    seed: int = 7
    first_step: int = 0
    want_input_gradients: bool = True

    @classmethod
    def of(cls, module: nn.Module, *example: torch.Tensor, **wishes: Any) -> Job:
        """The job of training ``module`` as a middle."""
        captured = capture(_Tupled(module), example)
        state = {name: tensor.detach().clone() for name, tensor in captured.state.items()}
        return cls(captured.data, captured.program.digest, state, **wishes)

    def resumed(self, step: int, tensors: dict[str, torch.Tensor]) -> Job:
        """The same job from a snapshot on."""
        return dataclasses.replace(self, first_step=step, state=tensors)

    def state_bytes(self) -> bytes:
        """As it travels; names of a snapshot have their prefixes already."""
        known = (STATE_PREFIX, OPTIMIZER_PREFIX)
        return dump_state({n if n.startswith(known) else STATE_PREFIX + n: t for n, t in self.state.items()})

    def spec(self, state: bytes, **changes: Any) -> node_pb2.SessionSpec:
        """The opening's first message, with whatever ``changes``."""
        values: dict[str, Any] = {
            "session_id": secrets.token_bytes(16),
            "program_sha256": self.digest,
            "program_bytes": len(self.program),
            "state_sha256": sha256(state),
            "state_bytes": len(state),
            "topology": node_pb2.TOPOLOGY_U_SHAPE if self.loss is None else node_pb2.TOPOLOGY_VANILLA,
            "loss": None if self.loss is None else self.loss.to_proto(),
            "optimizer": self.optimizer.to_proto(),
            "seed": self.seed,
            "max_rows": self.max_rows,
            "max_in_flight": self.max_in_flight,
            "first_step": self.first_step,
            "want_input_gradients": self.want_input_gradients,
        }
        return node_pb2.SessionSpec(**values | changes)

    def parts(self, **changes: Any) -> list[node_pb2.OpenSessionRequest]:
        """A whole opening."""
        state = self.state_bytes()
        return [
            node_pb2.OpenSessionRequest(spec=self.spec(state, **changes)),
            *(node_pb2.OpenSessionRequest(program_chunk=piece) for piece in chunks(self.program)),
            *(node_pb2.OpenSessionRequest(state_chunk=piece) for piece in chunks(state)),
        ]


class _Tupled(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = part._parameters, part._buffers, part._modules
        self._part: Any
        object.__setattr__(self, "_part", part)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self._part(*inputs)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def plan_of_job(job: Job, *, tensor_bytes: int = 2**20, activation_bytes: int = 2**24) -> SessionPlan:
    """The job as a session takes it, without a node."""
    vanilla = job.loss is not None
    return SessionPlan(
        session_id=b"s" * 16,
        topology=node_pb2.TOPOLOGY_VANILLA if vanilla else node_pb2.TOPOLOGY_U_SHAPE,
        loss=job.loss,
        optimizer=job.optimizer,
        seed=job.seed,
        max_rows=job.max_rows,
        max_in_flight=job.max_in_flight,
        first_step=job.first_step,
        want_input_gradients=job.want_input_gradients,
        activation_bytes_per_micro_batch=activation_bytes,
        tensor_bytes=tensor_bytes,
    )


class Pipe:
    """One open stream of requests: whatever is put into it is sent, answers are read when asked for."""

    def __init__(self, call: Callable[..., Any], *first: Any, timeout: float = CALL_S) -> None:
        self._box: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in first:
            self._box.put(message)
        self.call = call(iter(self._box.get, None), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.cancel()

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._box.put(message)

    def receive(self) -> Any:
        return next(self.call)

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def end(self) -> None:
        """Says that nothing more comes."""
        self._box.put(None)

    def cancel(self) -> None:
        self.call.cancel()
        self.end()


class WireClient:
    """Calls a node's methods with whatever it is told to."""

    def __init__(self, address: str, identity: Identity, *, options: Sequence[tuple[str, Any]] = ()) -> None:
        target, _, pin = address.partition("#")
        self.target = target
        self.channel = connect(target, identity, pin=pin) if not options else _custom(target, identity, pin, options)
        self.stub = node_pb2_grpc.NodeStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.channel.close()

    def describe(self) -> node_pb2.DescribeResponse:
        answer: node_pb2.DescribeResponse = self.stub.Describe(node_pb2.DescribeRequest(), timeout=CALL_S)
        return answer

    def open(self, job: Job, **changes: Any) -> bytes:
        """Opens a session; returns its id."""
        parts = job.parts(**changes)
        self.stub.OpenSession(iter(parts), timeout=CALL_S)
        return bytes(parts[0].spec.session_id)

    def send_opening(self, parts: Sequence[node_pb2.OpenSessionRequest]) -> node_pb2.OpenSessionResponse:
        answer: node_pb2.OpenSessionResponse = self.stub.OpenSession(iter(parts), timeout=CALL_S)
        return answer

    def train(self, session: bytes, timeout: float = CALL_S) -> Pipe:
        """A training stream attached to ``session``."""
        attachment = node_pb2.Attachment(session_id=session)
        return Pipe(self.stub.Train, node_pb2.TrainRequest(attachment=attachment), timeout=timeout)

    def infer(self, session: bytes, timeout: float = CALL_S) -> Pipe:
        """An evaluation stream attached to ``session``."""
        attachment = node_pb2.Attachment(session_id=session)
        return Pipe(self.stub.Infer, node_pb2.InferRequest(attachment=attachment), timeout=timeout)

    def answer(self, session: bytes, *frames: node_pb2.Frame) -> list[node_pb2.TrainResponse]:
        """The answers of ``frames``, over a stream of their own."""
        with self.train(session) as pipe:
            return [pipe.ask(node_pb2.TrainRequest(frame=each)) for each in frames]

    def snapshot(self, session: bytes, *, with_optimizer: bool = True) -> tuple[int, dict[str, torch.Tensor]]:
        request = node_pb2.SnapshotRequest(session_id=session, with_optimizer=with_optimizer)
        responses = iter(self.stub.Snapshot(request, timeout=CALL_S))
        header = next(responses).header
        contents = node_pb2.SnapshotContents()
        while not contents.state_sha256:
            contents = next(responses).contents
        data = gather((r.chunk for r in responses), contents.state_bytes, contents.state_sha256, "state")
        return header.next_step, load_state(data)

    def close(self, session: bytes) -> bool:
        return bool(self.stub.CloseSession(node_pb2.CloseSessionRequest(session_id=session), timeout=CALL_S).closed)

    def raw(self, method: str, *messages: bytes, timeout: float = CALL_S) -> list[bytes]:
        """What the node answers to these very bytes."""
        call = self.channel.stream_stream(f"/cloister.v1.Node/{method}", None, None)
        return list(call(iter(messages), timeout=timeout))


def _custom(target: str, identity: Identity, pin: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    roots = fetch_certificate(target)
    assert fingerprint_of(roots) == pin.removeprefix("sha256:")
    credentials = grpc.ssl_channel_credentials(roots, identity.private_key_pem, identity.certificate_pem)
    base = {**dict(channel_options()), "grpc.ssl_target_name_override": NODE_NAME, **dict(options)}
    return grpc.secure_channel(target, credentials, options=list(base.items()))


class Good:
    """An owner who trains as one should, step by step, beside a twin that nobody can disturb.

    ``step`` compares every answer with the twin's to the bit; ``check`` compares all that is left on the node.
    """

    def __init__(self, client: WireClient, job: Job) -> None:
        self.client, self.job = client, job
        self.session = client.open(job)
        plan, tensors = plan_of_job(job, tensor_bytes=2**26, activation_bytes=2**30), load_state(job.state_bytes())
        self._twin = Session(plan, decode_program(job.program), tensors, torch.device("cpu"))
        self._rows, self._shapes = min(4, job.max_rows), [i.shape for i in self._twin._program.inputs]

    @property
    def at(self) -> int:
        """The step that comes next."""
        return self._twin.next_step

    def frames(self, step: int) -> list[node_pb2.Frame]:
        """Two micro-batches, both in flight."""
        generator = torch.Generator().manual_seed(step)
        x = [torch.randn(self._rows, *shape, generator=generator) for shape in self._shapes]
        y = self._twin.infer(node_pb2.Batch(tensors=[encode(each) for each in x])).tensors
        g = [torch.randn(tuple(each.shape), generator=generator) for each in y]
        forward, backward = node_pb2.PHASE_FORWARD, node_pb2.PHASE_BACKWARD
        return [
            frame(step, 0, forward, *x),
            frame(step, 1, forward, *x),
            frame(step, 0, backward, *g),
            frame(step, 1, backward, *g, update=True),
        ]

    def step(self, count: int = 1) -> None:
        """Whole steps, over a stream of their own."""
        with self.client.train(self.session) as pipe:
            for _ in range(count):
                for each in self.frames(self.at):
                    self._compare(pipe, each)

    def begin(self) -> None:
        """The first half of a step; ``finish`` is the other."""
        with self.client.train(self.session) as pipe:
            for each in self.frames(self.at)[:3]:
                self._compare(pipe, each)

    def finish(self) -> None:
        with self.client.train(self.session) as pipe:
            self._compare(pipe, self.frames(self.at)[3])

    def check(self) -> None:
        """The node's state is the twin's, the optimizer's included."""
        step, tensors = self.client.snapshot(self.session)
        wanted_step, wanted = self._twin.snapshot(with_optimizer=True)
        assert (step, sorted(tensors)) == (wanted_step, sorted(wanted))
        for name, tensor in wanted.items():
            assert torch.equal(tensors[name], tensor), name

    def _compare(self, pipe: Pipe, message: node_pb2.Frame) -> None:
        answer, wanted = pipe.ask(node_pb2.TrainRequest(frame=message)), self._twin.train(message)
        assert list(answer.tensors) == list(wanted.tensors)
        assert answer.updated == wanted.updated
