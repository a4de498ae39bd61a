"""One session: a middle, its optimizer and its place in the training, with no network in sight.

A session is a state machine over frames. Within a step, forwards come in the order of their micro-batches, and
backwards in any order, each after its forward (gradients add up in that order); the frame marked ``update`` ends the
step. A frame that was answered before is answered from memory (nothing is computed twice); one that cannot follow is
refused and changes nothing. The update itself may run while its answer travels, and before anything else does
(:meth:`Session.settle`). Answers are kept until the first new frame of the step after theirs, since an owner sends that
only when it has them all; of a step that makes very many, the oldest are forgotten sooner.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import nn

from protos import node_pb2, program_pb2, tensor_pb2
from server_side.rows import KeptRows
from server_side.signing import NodeSigner, ReceiptPlan, Witness
from wire.codec import check_finite, decode, encode, encode_into, is_absent, owned, payload_bytes
from wire.errors import (
    ComputeError,
    LimitExceededError,
    MessageRejectedError,
    ProgramRejectedError,
    SessionLostError,
    StepOutOfOrderError,
    TensorRejectedError,
    WireError,
)
from wire.interpreter import Runner, activation_bytes, check_state
from wire.optimizers import PartOptimizer
from wire.program import Graph, Program, State
from wire.recipe import Loss, Optimizer, stream_seed
from wire.state import OPTIMIZER_PREFIX, ROWS_PREFIX, STATE_PREFIX, rows_of, split_state

__all__ = ["ANSWERS_BYTES", "Session", "SessionPlan", "run_bytes"]

#: Answers that a session keeps of its step, beyond the newest two for each micro-batch in flight.
ANSWER_SLACK_BYTES: Final = 16 * 2**20  # what small tensors may add to the largest one in an answer
ANSWERS_BYTES: Final = 64 * 2**20

_T = TypeVar("_T")

# Looking a graph over for one more batch size takes 0.2 ms an operation, in which no other session's is looked over. A
# ResNet-18 may come in 3,700 sizes, 80 layers of a Llama in 43; training has two, evaluation a third.
_LOOKED_OVER: Final = 2**18
_KNOWN_RUNS: Final = 4096

# Operators draw from torch's one default generator a process, so sessions whose programs draw take turns.
_DRAWING: Final = threading.Lock()
# Fake tensors keep process-wide caches that are not made for threads.
_ADMITTING: Final = threading.Lock()
_RUNS: Final[dict[tuple[bytes, bool, int], int]] = {}


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What a session's spec asks for, checked."""

    session_id: bytes
    topology: node_pb2.Topology.ValueType
    loss: Loss | None
    optimizer: Optimizer
    seed: int
    max_rows: int
    max_in_flight: int
    first_step: int
    want_input_gradients: bool
    activation_bytes_per_micro_batch: int
    tensor_bytes: int
    receipts: ReceiptPlan | None = None


@dataclass(frozen=True, slots=True)
class _Pending:
    """A micro-batch between its forward and its backward."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Session:
    """A middle at work. Every method takes the session's lock; frames of one session never run side by side."""

    def __init__(
        self,
        plan: SessionPlan,
        program: Program,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        signer: NodeSigner | None = None,
    ) -> None:
        """Takes over ``tensors``: the program's state and, where a snapshot is restored, the optimizer's.

        Raises:
            StateRejectedError: tensors that do not fit the program or the optimizer.
            LimitExceededError: the largest micro-batch would hold more than the node allows.
            ProgramRejectedError: an operator refuses the shapes that it would get.
        """
        self._plan = plan
        self._program = program
        self._device = device
        self._lock = threading.Lock()
        state, optimizer_state = split_state(tensors)
        check_state(program, state)
        self._train = Runner(program, program.train, device)
        self._eval = Runner(program, program.eval, device)
        self._admitted: set[tuple[bool, int]] = set()
        self._looks = max(_LOOKED_OVER, 8 * len(program.train.operations), 8 * len(program.eval.operations))
        for training in (True, False):
            self._admit(training, plan.max_rows)
        self._values = [_place(spec, state[spec.name], device) for spec in program.state]
        self._parameters = {
            spec.name: value
            for spec, value in zip(program.state, self._values, strict=True)
            if isinstance(value, nn.Parameter) and spec.requires_grad
        }
        self._buffers = [v for v in self._values if not isinstance(v, nn.Parameter)]
        self._optimizer = PartOptimizer(plan.optimizer, self._parameters)
        self._optimizer.restore(optimizer_state)
        rows = rows_of(tensors)
        self._rows = KeptRows(rows, program, device) if rows else None
        self._step = plan.first_step
        self._pending: dict[int, _Pending] = {}
        self._forwards = self._backwards = 0
        self._answers: dict[tuple[int, int, int], node_pb2.TrainResponse] = {}
        self._answers_step, self._answers_bytes = plan.first_step, 0
        self._broken = ""
        self._due: int | None = None
        self._settled_s = 0.0
        self._witness: Witness | None = None
        if signer is not None and plan.receipts is not None:
            self._witness = Witness(plan.receipts, signer, plan.first_step, *self._tensors())
        self.last_used = time.monotonic()

    @property
    def receipt_hash(self) -> str:
        """Of the wire bytes, in receipts; empty where none are given."""
        return "" if self._witness is None else self._witness.kind

    @property
    def session_id(self) -> bytes:
        """Its name, which the owner chose."""
        return self._plan.session_id

    @property
    def max_in_flight(self) -> int:
        """Micro-batches that may wait for their backward."""
        return self._plan.max_in_flight

    @property
    def next_step(self) -> int:
        """The step that the next new frame belongs to."""
        return self._step

    def idle_for(self, now: float) -> float:
        """Seconds of ``time.monotonic()`` without a word from the owner; a session that computes is not idle."""
        return 0.0 if self._lock.locked() else now - self.last_used

    def train(self, frame: node_pb2.Frame, resent: Callable[[], None] | None = None) -> node_pb2.TrainResponse:
        """Answers one frame; calls ``resent`` where the answer came from memory.

        Raises:
            StepOutOfOrderError: the frame cannot follow the last one. Nothing was applied.
            TensorRejectedError, LimitExceededError, NonFiniteError, ComputeError: its tensors. Nothing was applied.
            SessionLostError: an update failed half-way before; the session can only be closed.
        """
        with self._lock:
            self._settle()
            self.last_used = time.monotonic()
            known = self._answers.get((frame.step, frame.micro_batch, frame.phase))
            if known is not None:
                if resent is not None:
                    resent()
                return known
            if self._broken:
                raise SessionLostError(self._broken)
            self._check_order(frame)
            started = time.perf_counter()
            answer = self._phase(frame)
            answer.step, answer.micro_batch, answer.phase = frame.step, frame.micro_batch, frame.phase
            if frame.update or frame.phase == node_pb2.PHASE_UPDATE:
                self._due = self._step
                self._step += 1
                self._forwards = self._backwards = 0
                answer.updated = True
            answer.compute_s = time.perf_counter() - started + self._settled_s
            self._settled_s = 0.0
            self._remember(frame, answer)
            if self._witness is not None and frame.phase != node_pb2.PHASE_RECEIPT:
                self._witness.saw(frame, answer)
            self.last_used = time.monotonic()
            return answer

    def settle(self) -> None:
        """Applies the update that the last answer announced, so that it need not wait for the next frame.

        Raises:
            SessionLostError: the update failed half-way; the session can only be closed.
        """
        with self._lock:
            self._settle()

    def infer(self, batch: node_pb2.Batch) -> node_pb2.InferResponse:
        """The middle's outputs in evaluation mode; changes nothing.

        Raises:
            TensorRejectedError, LimitExceededError, NonFiniteError, ComputeError: the batch's tensors.
        """
        with self._lock:
            self._settle()
            self.last_used = time.monotonic()
            inputs = self._inputs(batch.tensors, training=False)
            with torch.no_grad(), self._computing(training=False):
                outputs = self._eval.run([*self._values, *inputs])
                self._check_outputs(outputs)
            return node_pb2.InferResponse(index=batch.index, tensors=[encode(o) for o in outputs])

    def snapshot(self, *, with_optimizer: bool) -> tuple[int, dict[str, torch.Tensor]]:
        """The next step and copies of all tensors, at a step boundary.

        Raises:
            StepOutOfOrderError: in the middle of a step.
            SessionLostError: an update failed half-way before.
        """
        with self._lock:
            self._settle()
            self.last_used = time.monotonic()
            if self._broken:
                raise SessionLostError(self._broken)
            if self._forwards:
                raise StepOutOfOrderError(f"step {self._step} is under way; finish it, then take the snapshot")
            names = [spec.name for spec in self._program.state]
            # What travels must not share memory with what goes on training.
            tensors = {
                STATE_PREFIX + name: value.detach().to("cpu", copy=True)
                for name, value in zip(names, self._values, strict=True)
            }
            if with_optimizer:
                for key, value in self._optimizer.state().items():
                    tensors[OPTIMIZER_PREFIX + key] = value.to("cpu", copy=True)
                # Not copied: nothing changes them.
                for key, value in ({} if self._rows is None else self._rows.tensors).items():
                    tensors[ROWS_PREFIX + key] = value.to("cpu")
            return self._step, tensors

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The middle's own, and its optimizer's: live ones."""
        names = (spec.name for spec in self._program.state)
        return dict(zip(names, self._values, strict=True)), self._optimizer.state()

    def _check_order(self, frame: node_pb2.Frame) -> None:
        if frame.step != self._step:
            raise StepOutOfOrderError(f"step {frame.step}; expected {self._step}")
        vanilla = self._plan.topology == node_pb2.TOPOLOGY_VANILLA
        micro_batch, phase = frame.micro_batch, frame.phase
        expected: int | None
        if phase == node_pb2.PHASE_FORWARD and not vanilla:
            expected = self._forwards
            if len(self._pending) >= self._plan.max_in_flight:
                raise LimitExceededError(
                    f"{len(self._pending)} micro-batches wait for their backward; the session allows "
                    f"{self._plan.max_in_flight}",
                )
        elif phase == node_pb2.PHASE_LOSS and vanilla:
            expected = self._forwards
        elif phase == node_pb2.PHASE_BACKWARD and not vanilla:
            expected = micro_batch if micro_batch in self._pending else None
        elif phase == node_pb2.PHASE_RECEIPT and self._witness is not None:
            expected = 0 if not self._forwards and self._witness.due else None
        elif phase == node_pb2.PHASE_UPDATE:
            expected = self._forwards if 0 < self._forwards == self._backwards else None
        else:
            raise MessageRejectedError(f"phase {phase} has no place in this session's topology")
        if micro_batch != expected:
            name = node_pb2.Phase.Name(phase).removeprefix("PHASE_").lower()
            raise StepOutOfOrderError(
                f"step {self._step}: {name} of micro-batch {micro_batch} after {self._forwards} forwards and "
                f"{self._backwards} backwards",
            )
        if frame.update and (phase in (node_pb2.PHASE_FORWARD, node_pb2.PHASE_RECEIPT) or len(self._pending) > 1):
            raise StepOutOfOrderError(f"step {self._step}: an update while other micro-batches wait for their backward")

    def _phase(self, frame: node_pb2.Frame) -> node_pb2.TrainResponse:
        if frame.phase == node_pb2.PHASE_FORWARD:
            return self._forward(frame)
        if frame.phase == node_pb2.PHASE_BACKWARD:
            return self._backward(frame)
        if frame.phase == node_pb2.PHASE_LOSS:
            return self._loss(frame)
        if frame.phase == node_pb2.PHASE_RECEIPT and self._witness is not None:
            return node_pb2.TrainResponse(receipt=self._witness.receipt(*self._tensors()))
        return node_pb2.TrainResponse()

    def _forward(self, frame: node_pb2.Frame) -> node_pb2.TrainResponse:
        pending, answer = self._run(frame, _answer_of)
        self._pending[frame.micro_batch] = pending
        self._forwards += 1
        return answer

    def _backward(self, frame: node_pb2.Frame) -> node_pb2.TrainResponse:
        pending = self._pending[frame.micro_batch]
        outputs = [o for o in pending.outputs if o.is_floating_point()]
        if len(frame.tensors) != len(outputs):
            raise TensorRejectedError(f"{len(frame.tensors)} output gradients for {len(outputs)} outputs")
        gradients = [None if is_absent(m) else self._receive(m, "output gradient") for m in frame.tensors]
        for gradient, output in zip(gradients, outputs, strict=True):
            if gradient is not None and (gradient.shape != output.shape or gradient.dtype != output.dtype):
                raise TensorRejectedError(
                    f"an output gradient of {gradient.dtype} {tuple(gradient.shape)} for an output of "
                    f"{output.dtype} {tuple(output.shape)}",
                )
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        with self._applying("backward", frame.step):
            if pairs:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        del self._pending[frame.micro_batch]
        self._backwards += 1
        return _answer_of(self._input_gradients(pending))

    def _loss(self, frame: node_pb2.Frame) -> node_pb2.TrainResponse:
        function = self._plan.loss
        if function is None:
            raise MessageRejectedError("the session's spec names no loss")
        if not 0.0 < frame.loss_weight <= 1.0:
            raise MessageRejectedError(f"a loss weight of {frame.loss_weight}; above 0, at most 1")
        if frame.rows and not frame.HasField("labels"):
            labels = self._table().labels(self._named(frame))
        else:
            labels = self._receive(frame.labels, "labels")

        def judge(outputs: list[torch.Tensor]) -> torch.Tensor:
            if len(outputs) != 1 or not outputs[0].is_floating_point():
                raise MessageRejectedError("the node's loss takes a middle with one output of floating point")
            function.check(outputs[0], labels)
            loss = function(outputs[0], labels)
            check_finite(loss.detach(), "the loss")
            return loss

        pending, loss = self._run(frame, judge)
        with self._applying("loss", frame.step):
            # A whole batch weighs 1.0: its product is the loss itself, to the bit.
            weighted = loss if frame.loss_weight == 1.0 else loss * frame.loss_weight
            weighted.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        self._forwards += 1
        self._backwards += 1
        answer = _answer_of(self._input_gradients(pending))
        answer.loss = loss.item()
        return answer

    def _run(self, frame: node_pb2.Frame, then: Callable[[list[torch.Tensor]], _T]) -> tuple[_Pending, _T]:
        """A forward, and ``then`` on its outputs; if either refuses, nothing has changed."""
        inputs = self._admitted_rows(frame) if frame.rows else self._inputs(frame.tensors, training=True)
        before = [buffer.clone() for buffer in self._buffers]
        try:
            with self._computing(training=True):
                if self._train.random:
                    torch.manual_seed(stream_seed(self._plan.seed, "middle", frame.step, frame.micro_batch))
                fed = [x.clone() for x in inputs] if self._train.in_place else inputs
                outputs = self._train.run([*self._values, *fed])
                self._check_outputs(outputs)
                self._check_sum(outputs)
                return _Pending(inputs, outputs), then(outputs)
        except WireError:
            # Batch statistics may have moved before an operator refused: a refused frame changes nothing.
            with torch.no_grad():
                for buffer, value in zip(self._buffers, before, strict=True):
                    buffer.copy_(value)
            raise

    def _check_outputs(self, outputs: list[torch.Tensor]) -> None:
        """Refuses what could not travel back; dtypes were checked when the size of the micro-batch was."""
        for output in outputs:
            if output.nbytes > self._plan.tensor_bytes:
                raise LimitExceededError(
                    f"the middle returns {output.nbytes} bytes in one tensor; the limit is {self._plan.tensor_bytes}",
                )

    def _inputs(self, messages: Sequence[Any], *, training: bool) -> list[torch.Tensor]:
        specs = self._program.inputs
        if len(messages) != len(specs):
            raise TensorRejectedError(f"{len(messages)} tensors where {len(specs)} cross the cut")
        return self._checked([self._receive(message, "smashed data") for message in messages], training=training)

    def _admitted_rows(self, frame: node_pb2.Frame) -> list[torch.Tensor]:
        """The smashed data that a frame names."""
        if frame.tensors:
            raise TensorRejectedError("a frame carries rows, or names them")
        return self._checked(self._table().inputs(self._named(frame)), training=True)

    def _named(self, frame: node_pb2.Frame) -> Sequence[int]:
        if len(frame.rows) > self._plan.max_rows:  # before anything is gathered
            raise LimitExceededError(
                f"a micro-batch of {len(frame.rows)} rows; the session allows {self._plan.max_rows}"
            )
        return frame.rows

    def _table(self) -> KeptRows:
        if self._rows is None:
            raise TensorRejectedError("rows of a table, and the session was opened without one")
        return self._rows

    def _checked(self, inputs: list[torch.Tensor], *, training: bool) -> list[torch.Tensor]:
        specs = self._program.inputs
        for tensor, spec in zip(inputs, specs, strict=True):
            if tensor.dtype is not spec.dtype or tensor.ndim == 0 or tuple(tensor.shape[1:]) != spec.shape:
                raise TensorRejectedError(
                    f"smashed data of {tensor.dtype} {tuple(tensor.shape)}; the program takes {spec.dtype} "
                    f"(batch, {', '.join(map(str, spec.shape))})",
                )
        rows = {tensor.shape[0] for tensor in inputs}
        if len(rows) != 1 or 0 in rows:
            raise TensorRejectedError(f"smashed data of {sorted(rows)} rows; one count of at least 1")
        (count,) = rows
        if count > self._plan.max_rows:
            raise LimitExceededError(f"a micro-batch of {count} rows; the session allows {self._plan.max_rows}")
        try:
            self._admit(training, count)
        except ProgramRejectedError as error:  # the program was taken for its largest batch; it is this one's size
            raise ComputeError(f"an operator refuses a micro-batch of {count} rows; send more rows") from error
        if training:
            for tensor in inputs:
                tensor.requires_grad_(tensor.is_floating_point())
        return inputs

    def _receive(self, message: tensor_pb2.Tensor, what: str) -> torch.Tensor:
        tensor = decode(message, max_bytes=self._plan.tensor_bytes)
        check_finite(tensor, what)
        return owned(tensor, self._device)

    def _admit(self, training: bool, rows: int) -> None:  # noqa: FBT001 -- a key of what was admitted
        """Bounds what a run over ``rows`` rows allocates, once for each count: hostile graphs grow as rows shrink."""
        if (training, rows) in self._admitted:
            return
        graph = self._program.train if training else self._program.eval
        self._looks -= len(graph.operations)
        if self._looks < 0:
            raise LimitExceededError("micro-batches of too many different sizes for so large a middle; use a few sizes")
        run_bytes(self._program, graph, rows, self._plan.activation_bytes_per_micro_batch)
        self._admitted.add((training, rows))

    def _check_sum(self, outputs: list[torch.Tensor]) -> None:
        """Refuses an answer that no message holds, before it is made."""
        total, limit = sum(o.nbytes for o in outputs), self._plan.tensor_bytes + ANSWER_SLACK_BYTES
        if total > limit:
            raise LimitExceededError(f"outputs of {total} bytes together; one answer carries {limit}")

    def _input_gradients(self, pending: _Pending) -> list[torch.Tensor | None]:
        if not self._plan.want_input_gradients:
            return []
        leaves = [x for x in pending.inputs if x.is_floating_point()]
        return [x.grad for x in leaves]

    @contextmanager
    def _computing(self, *, training: bool) -> Iterator[None]:
        runner = self._train if training else self._eval
        if runner.random:
            _DRAWING.acquire()
        try:
            yield
        except WireError:
            raise
        except Exception as error:  # operators raise nearly every type there is
            raise ComputeError(f"an operator refuses this micro-batch ({type(error).__name__})") from error
        finally:
            if runner.random:
                _DRAWING.release()

    @contextmanager
    def _applying(self, what: str, step: int) -> Iterator[None]:
        """Around what cannot be taken back: a failure inside leaves gradients half-added, so the session ends."""
        try:
            yield
        except Exception as error:
            self._broken = f"the {what} of step {step} failed ({type(error).__name__}); open a new session"
            raise SessionLostError(self._broken) from error

    def _settle(self) -> None:
        """The update that is due: applied once its step's last answer is made, before anything else happens."""
        if self._witness is not None:
            self._witness.tally()  # while the answer travels
        if self._due is None:
            return
        started, due, self._due = time.perf_counter(), self._due, None
        with self._applying("update", due):
            self._optimizer.apply(due)
        self._settled_s = time.perf_counter() - started

    def _remember(self, frame: node_pb2.Frame, answer: node_pb2.TrainResponse) -> None:
        if self._answers_step != frame.step:
            self._answers.clear()
            self._answers_step, self._answers_bytes = frame.step, 0
        self._answers[frame.step, frame.micro_batch, frame.phase] = answer
        self._answers_bytes += payload_bytes(answer.tensors)
        # What is in flight is unanswered, each micro-batch with one frame; the rest is for owners that start over.
        while self._answers_bytes > ANSWERS_BYTES and len(self._answers) > 2 * self._plan.max_in_flight:
            oldest = self._answers.pop(next(iter(self._answers)))
            self._answers_bytes -= payload_bytes(oldest.tensors)


def run_bytes(program: Program, graph: Graph, rows: int, limit: int) -> int:
    """:func:`activation_bytes`, for one thread at a time, and once for all sessions of one program.

    Raises:
        LimitExceededError, ProgramRejectedError: as there.
    """
    key = (program.digest, graph is program.train, rows)
    with _ADMITTING:
        known = _RUNS.get(key)
        if known is None or known > limit:
            known = activation_bytes(program, graph, rows, limit)
            if len(_RUNS) >= _KNOWN_RUNS:
                _RUNS.clear()
            _RUNS[key] = known
        return known


def _answer_of(tensors: Sequence[torch.Tensor | None]) -> node_pb2.TrainResponse:
    answer = node_pb2.TrainResponse()
    for tensor in tensors:
        message = answer.tensors.add()
        if tensor is not None:
            encode_into(message, tensor)
    return answer


def _place(spec: State, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    own = tensor.to(device, copy=True)
    if spec.kind == program_pb2.STATE_KIND_PARAMETER:
        return nn.Parameter(own, requires_grad=spec.requires_grad)
    return own
