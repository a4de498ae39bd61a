"""A session without a network: what follows what, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from protos import node_pb2, program_pb2, tensor_pb2
from server_side import session as session_module
from server_side.session import Session
from tests.wire_client import Job, frame, plan_of_job
from wire.codec import decode, encode
from wire.errors import (
    ComputeError,
    LimitExceededError,
    MessageRejectedError,
    NonFiniteError,
    ProgramRejectedError,
    SessionLostError,
    StateRejectedError,
    StepOutOfOrderError,
    TensorRejectedError,
    WireError,
)
from wire.program import decode_program
from wire.recipe import SGD, Adam, AdamW, Loss, Optimizer
from wire.state import STATE_PREFIX, load_state

FORWARD, BACKWARD = node_pb2.PHASE_FORWARD, node_pb2.PHASE_BACKWARD
LOSS, UPDATE = node_pb2.PHASE_LOSS, node_pb2.PHASE_UPDATE
UNKNOWN: Any = 99
MOMENTUM = SGD(lr=0.1, momentum=0.9, weight_decay=0.01)
PLAIN = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def middle(seed: int = 0, *, dropout: float = 0.0) -> nn.Sequential:
    """``[B, 3]`` to ``[B, 2]``, with batch statistics that a refused frame might move."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()]
    return nn.Sequential(*parts, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(4, 2))


@functools.cache
def captured(dropout: float) -> Job:
    """Capturing takes most of a second, and does not depend on what a job wishes."""
    return Job.of(middle(dropout=dropout), torch.randn(4, 3))


def job(module: nn.Module | None = None, *, dropout: float = 0.0, **wishes: Any) -> Job:
    base = captured(dropout) if module is None else Job.of(module, torch.randn(4, 3))
    return dataclasses.replace(base, **{"optimizer": MOMENTUM, **wishes})


def open_session(of: Job, *, tensor_bytes: int = 2**20, activation_bytes: int = 2**24) -> Session:
    plan = plan_of_job(of, tensor_bytes=tensor_bytes, activation_bytes=activation_bytes)
    return Session(plan, decode_program(of.program), load_state(of.state_bytes()), CPU)


def bits(tensor: torch.Tensor | None) -> bytes:
    return b"none" if tensor is None else tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def trace_of(session: Session) -> list[object]:
    """Everything that frames may move, to the bit."""
    session.settle()
    found: list[object] = [session._step, session._forwards, session._backwards, sorted(session._pending)]
    found += [(bits(value), bits(value.grad)) for value in session._values]
    found.append({key: bits(value) for key, value in sorted(session._optimizer.state().items())})
    return found


def data(step: int, micro_batch: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Smashed data and output gradients of one micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)


def forward(step: int, micro_batch: int, rows: int = 4) -> node_pb2.Frame:
    return frame(step, micro_batch, FORWARD, data(step, micro_batch, rows)[0])


def backward(step: int, micro_batch: int, rows: int = 4, *, update: bool = False) -> node_pb2.Frame:
    return frame(step, micro_batch, BACKWARD, data(step, micro_batch, rows)[1], update=update)


def loss_frame(step: int, micro_batch: int, count: int = 1, *, update: bool = False) -> node_pb2.Frame:
    labels = torch.arange(4) % 2
    x = data(step, micro_batch)[0]
    return frame(step, micro_batch, LOSS, x, labels=labels, weight=1 / count, update=update)


def whole_step(step: int, count: int = 1) -> list[node_pb2.Frame]:
    """A step of ``count`` micro-batches, all in flight."""
    up = [forward(step, number) for number in range(count)]
    return [*up, *(backward(step, number, update=number == count - 1) for number in range(count))]


def feed(session: Session, frames: Iterable[node_pb2.Frame]) -> list[node_pb2.TrainResponse]:
    return [session.train(each) for each in frames]


def count_runs(session: Session) -> list[int]:
    """Gathers one entry for each time that the session computes a forward."""
    runs: list[int] = []
    real = session._train.run

    def run(values: Any) -> list[torch.Tensor]:
        runs.append(session._step)
        return real(values)

    session._train.run = run  # type: ignore[method-assign, assignment]  # the real one, counted
    return runs


def begun(of: Job | None = None) -> Session:
    """A session in the middle of step 1: micro-batch 0 is done, 1 waits for its backward."""
    session = open_session(of or job())
    feed(session, [*whole_step(0), forward(1, 0), backward(1, 0), forward(1, 1)])
    return session


# --- what follows what


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("optimizer", "plainly"),
    [(MOMENTUM, PLAIN), (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01))],
    ids=["sgd", "adamw"],
)
def test_steps_equal_plain_torch_to_the_bit(count: int, optimizer: Optimizer, plainly: Any) -> None:
    module = middle()
    session = open_session(job(optimizer=optimizer))
    plain = plainly(module.parameters())

    for step in range(3):
        answers = feed(session, whole_step(step, count))
        for number in range(count):
            x, gradient = data(step, number)
            x.requires_grad_()
            out = module(x)
            out.backward(gradient)
            assert torch.equal(decode(answers[number].tensors[0]), out)
            assert torch.equal(decode(answers[count + number].tensors[0]), x.grad)  # type: ignore[arg-type]  # it has one
        plain.step()
        plain.zero_grad()

    _, tensors = session.snapshot(with_optimizer=False)
    for name, value in module.state_dict().items():
        assert bits(tensors[STATE_PREFIX + name]) == bits(value), name


def test_a_vanilla_step_equals_plain_torch_to_the_bit() -> None:
    module = middle()
    session = open_session(job(loss=Loss("cross_entropy")))
    plain = PLAIN(module.parameters())

    for step in range(3):
        answers = feed(session, [loss_frame(step, 0, 2), loss_frame(step, 1, 2, update=True)])
        for number in range(2):
            x = data(step, number)[0].requires_grad_()
            loss = nn.functional.cross_entropy(module(x), torch.arange(4) % 2)
            (loss * 0.5).backward()
            assert answers[number].loss == loss.item()
            assert torch.equal(decode(answers[number].tensors[0]), x.grad)  # type: ignore[arg-type]  # it has one
        plain.step()
        plain.zero_grad()

    _, tensors = session.snapshot(with_optimizer=False)
    for name, value in module.state_dict().items():
        assert bits(tensors[STATE_PREFIX + name]) == bits(value), name


def test_the_update_flag_and_an_explicit_update_are_the_same() -> None:
    flagged, explicit = open_session(job()), open_session(job())

    feed(flagged, whole_step(0, 2))
    answers = feed(explicit, [forward(0, 0), forward(0, 1), backward(0, 0), backward(0, 1), frame(0, 2, UPDATE)])

    assert [answer.updated for answer in answers] == [False] * 4 + [True]
    assert trace_of(explicit) == trace_of(flagged)


def test_the_answer_says_what_it_answers_and_that_the_step_is_over() -> None:
    session = open_session(job())

    answers = feed(session, whole_step(0))

    assert [(a.step, a.micro_batch, a.phase, a.updated) for a in answers] == [
        (0, 0, FORWARD, False),
        (0, 0, BACKWARD, True),
    ]
    assert session.next_step == 1


def test_backwards_may_come_in_any_order_once_their_forwards_did() -> None:
    session = open_session(job())

    feed(session, [forward(0, 0), forward(0, 1), forward(0, 2), backward(0, 2), backward(0, 0)])
    feed(session, [backward(0, 1, update=True)])

    assert session.next_step == 1


def test_a_frozen_front_gets_no_input_gradients() -> None:
    session = open_session(job(want_input_gradients=False))

    answers = feed(session, whole_step(0))

    assert [len(a.tensors) for a in answers] == [1, 0]


def test_batches_of_other_sizes_are_taken_up_to_the_largest() -> None:
    session = open_session(job())

    feed(
        session, [forward(0, 0, rows=8), forward(0, 1, rows=2), backward(0, 0, rows=8), backward(0, 1, 2, update=True)]
    )

    assert session.next_step == 1


def test_a_batch_too_small_for_batch_statistics_is_refused_and_changes_nothing() -> None:
    session = begun()
    before = trace_of(session)

    with pytest.raises(ComputeError, match="an operator refuses a micro-batch of 1 rows; send more rows"):
        session.train(forward(1, 2, rows=1))

    assert trace_of(session) == before


def test_a_middle_without_parameters_can_be_trained_through() -> None:
    session = open_session(job(nn.Tanh()))
    x = data(0, 0)[0]

    answers = feed(session, [frame(0, 0, FORWARD, x), frame(0, 0, BACKWARD, torch.ones(4, 3), update=True)])

    assert torch.equal(decode(answers[0].tensors[0]), torch.tanh(x))
    assert session.next_step == 1
    assert session.snapshot(with_optimizer=True) == (1, {})


# --- what comes again


def test_a_resent_frame_is_answered_from_memory() -> None:
    session, resent = open_session(job()), []
    runs = count_runs(session)
    first = session.train(forward(0, 0)).SerializeToString()
    before = trace_of(session)

    again = session.train(forward(0, 0), lambda: resent.append(1)).SerializeToString()

    assert again == first
    assert (runs, resent) == ([0], [1])
    assert trace_of(session) == before


def test_a_step_resent_a_hundred_times_is_applied_once() -> None:
    session, once = open_session(job()), open_session(job())
    runs = count_runs(session)
    feed(once, whole_step(0, 3))
    answers = [a.SerializeToString() for a in feed(session, whole_step(0, 3))]

    for _ in range(100):
        assert [a.SerializeToString() for a in feed(session, whole_step(0, 3))] == answers

    assert runs == [0, 0, 0]
    assert trace_of(session) == trace_of(once)


def test_a_second_backward_adds_no_second_gradient() -> None:
    session = begun()
    first, before = session.train(backward(1, 0)), trace_of(session)

    again = session.train(frame(1, 0, BACKWARD, torch.full((4, 2), 1e6)))

    assert again == first
    assert trace_of(session) == before


def test_the_last_step_can_be_resent_after_its_update_and_is_refused_once_the_next_began() -> None:
    session = open_session(job())
    first = feed(session, whole_step(0))
    assert feed(session, whole_step(0)) == first
    session.train(forward(1, 0))
    before = trace_of(session)

    with pytest.raises(StepOutOfOrderError, match="step 0; expected 1"):
        session.train(forward(0, 0))

    assert trace_of(session) == before


def test_a_refused_frame_of_the_next_step_forgets_no_answer() -> None:
    session = open_session(job())
    first = feed(session, whole_step(0))

    with pytest.raises(NonFiniteError):
        session.train(frame(1, 0, FORWARD, torch.full((4, 3), NAN)))

    assert feed(session, whole_step(0)) == first


def test_a_frame_that_came_twice_at_once_is_computed_once() -> None:
    session = open_session(job())
    runs = count_runs(session)
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(session.train(forward(0, 0)).SerializeToString()))
        for _ in range(8)
    ]

    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert runs == [0]
    assert len(set(answers)) == 1
    assert len(answers) == 8


def test_T02_the_answers_of_an_endless_step_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ANSWERS_BYTES", 200)
    session = open_session(job(max_in_flight=2))

    for number in range(50):
        feed(session, [forward(0, number), backward(0, number)])

    assert len(session._answers) == 4
    assert session._answers_bytes == sum(len(t.data) for a in session._answers.values() for t in a.tensors)
    session.train(backward(0, 49))
    before = trace_of(session)
    with pytest.raises(StepOutOfOrderError):
        session.train(forward(0, 3))
    assert trace_of(session) == before


# --- what is refused, and changes nothing


def lying(**changes: Any) -> node_pb2.Frame:
    message = encode(data(1, 2)[0])
    for name, value in changes.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)
        else:
            setattr(message, name, value)
    return node_pb2.Frame(step=1, micro_batch=2, phase=FORWARD, tensors=[message])


x42, g42 = data(1, 2)
REFUSED: dict[str, tuple[Callable[[], node_pb2.Frame], type[WireError], str]] = {
    "another shape": (lambda: frame(1, 2, FORWARD, torch.ones(4, 5)), TensorRejectedError, r"takes .* \(batch, 3\)"),
    "another rank": (lambda: frame(1, 2, FORWARD, torch.ones(4, 3, 1)), TensorRejectedError, "takes"),
    "no dimensions": (lambda: frame(1, 2, FORWARD, torch.tensor(1.0)), TensorRejectedError, "takes"),
    "NaN": (lambda: frame(1, 2, FORWARD, x42.clone().fill_(NAN)), NonFiniteError, "smashed data: 12 of 12"),
    "Inf": (lambda: frame(1, 2, FORWARD, torch.tensor([[1.0, INF, 0.0]])), NonFiniteError, "1 of 3"),
    "Inf and minus Inf": (lambda: frame(1, 2, FORWARD, torch.tensor([[-INF, INF, 0.0]])), NonFiniteError, "2 of 3"),
    "half precision": (lambda: frame(1, 2, FORWARD, x42.half()), TensorRejectedError, "float16"),
    "integers": (lambda: frame(1, 2, FORWARD, x42.long()), TensorRejectedError, "int64"),
    "no tensor": (lambda: frame(1, 2, FORWARD), TensorRejectedError, "0 tensors where 1"),
    "two tensors": (lambda: frame(1, 2, FORWARD, x42, x42), TensorRejectedError, "2 tensors where 1"),
    "no rows": (lambda: frame(1, 2, FORWARD, torch.ones(0, 3)), TensorRejectedError, "0"),
    "too many rows": (lambda: frame(1, 2, FORWARD, torch.ones(9, 3)), LimitExceededError, "9 rows; .* 8"),
    "an unknown dtype": (lambda: lying(dtype=77), TensorRejectedError, "unknown dtype 77"),
    "no dtype": (lambda: lying(dtype=0), TensorRejectedError, "unknown dtype"),
    "a dtype that never travels in frames": (
        lambda: lying(dtype=tensor_pb2.D_TYPE_FLOAT64),
        TensorRejectedError,
        "dtype",
    ),
    "an unknown codec": (lambda: lying(codec=9), TensorRejectedError, "unknown codec 9"),
    "a header above its data": (lambda: lying(shape=[5, 3]), TensorRejectedError, "claims 60 bytes before 48"),
    "a header below its data": (lambda: lying(shape=[3, 3]), TensorRejectedError, "claims 36 bytes before 48"),
    "a claim of 10 GB": (lambda: lying(shape=[10 * 2**30 // 12, 3]), LimitExceededError, "the limit is"),
    "a claim past 64 bits": (lambda: lying(shape=[2**39] * 8), LimitExceededError, "the limit is"),
    "an endless rank": (lambda: lying(shape=[1] * 9), TensorRejectedError, "9 dimensions"),
    "a skipped step": (lambda: forward(2, 0), StepOutOfOrderError, "step 2; expected 1"),
    "an older step": (lambda: forward(0, 1), StepOutOfOrderError, "step 0; expected 1"),
    "the last step number there is": (
        lambda: node_pb2.Frame(step=2**64 - 1, phase=FORWARD),
        StepOutOfOrderError,
        "expected 1",
    ),
    "a skipped micro-batch": (lambda: forward(1, 3), StepOutOfOrderError, "forward of micro-batch 3 after 2"),
    "a backward before its forward": (lambda: backward(1, 2), StepOutOfOrderError, "backward of micro-batch 2"),
    "an update with another number": (
        lambda: frame(1, 0, UPDATE),
        StepOutOfOrderError,
        "update of micro-batch 0",
    ),
    "a phase of the other topology": (
        lambda: frame(1, 2, LOSS, x42, labels=torch.zeros(4, dtype=torch.int64)),
        MessageRejectedError,
        "topology",
    ),
    "no phase": (lambda: frame(1, 2, node_pb2.PHASE_UNSPECIFIED, x42), MessageRejectedError, "topology"),
    "an unknown phase": (
        lambda: node_pb2.Frame(step=1, micro_batch=2, phase=UNKNOWN),
        MessageRejectedError,
        "phase 99",
    ),
    "an update while one waits": (lambda: frame(1, 2, UPDATE), StepOutOfOrderError, "update of micro-batch 2"),
    "a forward that updates": (lambda: frame(1, 2, FORWARD, x42, update=True), StepOutOfOrderError, "an update while"),
    "an output gradient of NaN": (
        lambda: frame(1, 1, BACKWARD, g42.clone().fill_(NAN), update=True),
        NonFiniteError,
        "output gradient",
    ),
    "an output gradient of another shape": (
        lambda: frame(1, 1, BACKWARD, torch.ones(3, 2), update=True),
        TensorRejectedError,
        r"\(3, 2\) for an output of torch.float32 \(4, 2\)",
    ),
    "an output gradient of another dtype": (
        lambda: frame(1, 1, BACKWARD, g42.bfloat16(), update=True),
        TensorRejectedError,
        "bfloat16",
    ),
    "no output gradient": (lambda: frame(1, 1, BACKWARD, update=True), TensorRejectedError, "0 output gradients for 1"),
    "two output gradients": (lambda: frame(1, 1, BACKWARD, g42, g42), TensorRejectedError, "2 output gradients for 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_T06_a_refused_frame_changes_nothing(what: str) -> None:
    make, error, text = REFUSED[what]
    session, good = begun(), begun()
    before = trace_of(session)

    with pytest.raises(error, match=text):
        session.train(make())

    assert trace_of(session) == before
    rest = [forward(1, 2), backward(1, 1), backward(1, 2, update=True), *whole_step(2, 2)]
    feed(session, rest)
    feed(good, rest)
    assert trace_of(session) == trace_of(good)


def test_more_micro_batches_in_flight_than_agreed_are_refused() -> None:
    session = open_session(job(max_in_flight=2))
    feed(session, [forward(0, 0), forward(0, 1)])
    before = trace_of(session)

    with pytest.raises(LimitExceededError, match="2 micro-batches wait for their backward; the session allows 2"):
        session.train(forward(0, 2))

    assert trace_of(session) == before
    feed(session, [backward(0, 0), forward(0, 2), backward(0, 1), backward(0, 2, update=True)])
    assert session.next_step == 1


def test_an_update_of_nothing_is_refused() -> None:
    session = open_session(job())

    with pytest.raises(StepOutOfOrderError):
        session.train(frame(0, 0, UPDATE))

    assert session.next_step == 0


def test_an_update_flag_while_another_micro_batch_waits_is_refused() -> None:
    session = open_session(job())
    feed(session, [forward(0, 0), forward(0, 1)])
    before = trace_of(session)

    with pytest.raises(StepOutOfOrderError, match="an update while other micro-batches wait"):
        session.train(backward(0, 0, update=True))

    assert trace_of(session) == before


def vanilla(labels: torch.Tensor | None, weight: float = 1.0, x: torch.Tensor | None = None) -> node_pb2.Frame:
    return frame(1, 0, LOSS, data(1, 0)[0] if x is None else x, labels=labels, weight=weight, update=True)


RIGHT = torch.arange(4) % 2
REFUSED_LOSSES: dict[str, tuple[Callable[[], node_pb2.Frame], type[WireError], str]] = {
    "a label above": (lambda: vanilla(RIGHT + 1), TensorRejectedError, "labels from 1 to 2 for 2 classes"),
    "a label below": (lambda: vanilla(RIGHT - 1), TensorRejectedError, "labels from -1 to 0"),
    "the label that torch ignores": (lambda: vanilla(RIGHT - 100), TensorRejectedError, "labels from -100"),
    "labels of bytes": (lambda: vanilla(RIGHT.to(torch.int8)), TensorRejectedError, "int64"),
    "labels of floats": (lambda: vanilla(RIGHT.float()), TensorRejectedError, "int64"),
    "too few labels": (lambda: vanilla(RIGHT[:3]), TensorRejectedError, r"labels \(3,\) for an output \(4, 2\)"),
    "labels of another rank": (lambda: vanilla(RIGHT.reshape(4, 1)), TensorRejectedError, "labels"),
    "no labels": (
        lambda: node_pb2.Frame(step=1, phase=LOSS, tensors=[encode(x42)], loss_weight=1.0),
        TensorRejectedError,
        "unknown dtype 0",
    ),
    "no weight": (lambda: vanilla(RIGHT, 0.0), MessageRejectedError, "loss weight"),
    "too much weight": (lambda: vanilla(RIGHT, 1.5), MessageRejectedError, "loss weight"),
    "a negative weight": (lambda: vanilla(RIGHT, -0.5), MessageRejectedError, "loss weight"),
    "a weight of NaN": (lambda: vanilla(RIGHT, NAN), MessageRejectedError, "loss weight"),
    "numbers that overflow on the way": (
        lambda: vanilla(RIGHT, x=x42.sign() * 3e38),
        NonFiniteError,
        "the loss: 1 of 1",
    ),
    "a phase of the other topology": (lambda: forward(1, 0), MessageRejectedError, "topology"),
}


@pytest.mark.parametrize("what", REFUSED_LOSSES)
def test_T06_a_refused_loss_changes_nothing(what: str) -> None:
    make, error, text = REFUSED_LOSSES[what]
    of = job(loss=Loss("cross_entropy"))
    session, good = open_session(of), open_session(of)
    for each in (session, good):
        feed(each, [loss_frame(0, 0, update=True)])
    before = trace_of(session)

    with pytest.raises(error, match=text):
        session.train(make())

    assert trace_of(session) == before
    for each in (session, good):
        feed(each, [loss_frame(1, 0, update=True)])
    assert trace_of(session) == trace_of(good)


class _Lookup(nn.Module):
    """Moves batch statistics before it looks something up, which may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.table = nn.BatchNorm1d(3), nn.Embedding(5, 3)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.norm(x) + self.table(index)
        return made


def test_T06_what_an_operator_refuses_late_leaves_the_batch_statistics_alone() -> None:
    x, index = torch.randn(4, 3), torch.arange(4)
    session = open_session(Job.of(_Lookup(), x, index))
    before = trace_of(session)

    with pytest.raises(ComputeError, match="refuses this micro-batch"):
        session.train(frame(0, 0, FORWARD, x, index + 5))

    assert trace_of(session) == before
    answers = feed(session, [frame(0, 0, FORWARD, x, index), frame(0, 0, BACKWARD, torch.ones(4, 3), update=True)])
    assert len(answers[1].tensors) == 1  # integers have no gradient


def test_T06_inputs_of_different_row_counts_are_refused() -> None:
    session = open_session(Job.of(_Lookup(), torch.randn(4, 3), torch.arange(4)))

    with pytest.raises(TensorRejectedError, match=r"\[3, 4\] rows"):
        session.train(frame(0, 0, FORWARD, torch.randn(4, 3), torch.arange(3)))


class _Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_a_middle_whose_output_cannot_travel_is_refused() -> None:
    of = job(nn.Sequential(_Double(), nn.Linear(3, 2).double(), _Single()))
    program = program_pb2.Program.FromString(of.program)
    for graph in (program.train, program.eval):
        if graph.outputs:
            graph.outputs[0] -= 1  # what came before the conversion back
    widened = program.SerializeToString(deterministic=True)

    with pytest.raises(ProgramRejectedError, match="an output that no frame carries"):
        open_session(dataclasses.replace(of, program=widened))


class _Widens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 100)


def test_T02_an_answer_above_the_limit_of_a_tensor_is_refused() -> None:
    session = open_session(job(_Widens()), tensor_bytes=1000)

    with pytest.raises(LimitExceededError, match="4800 bytes in one tensor; the limit is 1000"):
        session.train(forward(0, 0))

    assert session._forwards == 0


class _Grows(nn.Module):
    """Makes the more, the fewer rows there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.new_zeros(1, 2**16 // x.shape[0])
        return x + wide.sum()


def test_T02_fewer_rows_that_make_more_activations_are_refused_before_they_are_made() -> None:
    session = open_session(Job.of(_Grows(), torch.randn(4, 3), max_rows=64), activation_bytes=2**14)
    session.train(frame(0, 0, FORWARD, torch.randn(64, 3)))
    before = trace_of(session)

    with pytest.raises(LimitExceededError, match="a micro-batch of 2 rows makes more than 16384 bytes"):
        session.train(frame(0, 1, FORWARD, torch.randn(2, 3)))

    assert trace_of(session) == before


def test_T02_a_graph_is_not_looked_over_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_LOOKED_OVER", 1)
    of = job(max_rows=64)
    session = open_session(of)

    with pytest.raises(LimitExceededError, match="too many different sizes"):  # noqa: PT012
        for number in range(64):
            feed(session, [forward(0, number, number + 2), backward(0, number, number + 2)])

    assert 4 <= session._forwards < 10
    session.train(forward(0, session._forwards, 2))


# --- a session that broke


def test_T07_an_update_that_fails_half_way_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(job())
    first = session.train(forward(0, 0))

    def fail(step: int) -> None:
        raise RuntimeError(f"out of memory in step {step}: secret")

    monkeypatch.setattr(session._optimizer, "apply", fail)

    assert session.train(backward(0, 0, update=True)).updated
    with pytest.raises(SessionLostError, match=r"the update of step 0 failed \(RuntimeError\); open a new session"):
        session.settle()
    with pytest.raises(SessionLostError):
        session.train(forward(0, 1))
    with pytest.raises(SessionLostError):
        session.snapshot(with_optimizer=True)
    assert session.train(forward(0, 0)) == first


# --- evaluation and snapshots


def test_inference_changes_nothing_even_in_the_middle_of_a_step() -> None:
    session, good = begun(), begun()
    before = trace_of(session)

    answer = session.infer(node_pb2.Batch(index=5, tensors=[encode(x42)]))

    assert answer.index == 5
    assert trace_of(session) == before
    for each in (session, good):
        feed(each, [backward(1, 1, update=True)])
    assert trace_of(session) == trace_of(good)


def test_inference_runs_in_evaluation_mode() -> None:
    module = middle(dropout=0.5)
    session = open_session(job(dropout=0.5))

    answer = session.infer(node_pb2.Batch(tensors=[encode(x42)]))

    assert torch.equal(decode(answer.tensors[0]), module.eval()(x42))


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ([torch.full((4, 3), NAN)], NonFiniteError),
        ([torch.ones(4, 2)], TensorRejectedError),
        ([torch.ones(9, 3)], LimitExceededError),
        ([], TensorRejectedError),
    ],
)
def test_T06_a_refused_batch_changes_nothing(tensors: list[torch.Tensor], error: type[WireError]) -> None:
    session = begun()
    before = trace_of(session)

    with pytest.raises(error):
        session.infer(node_pb2.Batch(tensors=[encode(t) for t in tensors]))

    assert trace_of(session) == before


def test_a_snapshot_in_the_middle_of_a_step_is_refused() -> None:
    with pytest.raises(StepOutOfOrderError, match="step 1 is under way; finish it"):
        begun().snapshot(with_optimizer=True)


def test_a_snapshot_does_not_move_with_the_training_that_goes_on() -> None:
    session = open_session(job())
    feed(session, whole_step(0))
    _, tensors = session.snapshot(with_optimizer=True)
    before = {name: bits(tensor) for name, tensor in tensors.items()}

    feed(session, whole_step(1))

    assert {name: bits(tensor) for name, tensor in tensors.items()} == before


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(lr=0.1),
    "sgd momentum": MOMENTUM,
    "nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adam": Adam(lr=0.01),
    "adamw amsgrad": AdamW(lr=0.01, amsgrad=True, weight_decay=0.1, clip_norm=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_T07_a_session_restored_from_a_snapshot_goes_on_to_the_bit(name: str) -> None:
    of = job(dropout=0.3, optimizer=OPTIMIZERS[name])
    whole = open_session(of)
    for step in range(3):
        feed(whole, whole_step(step, 2))
    restored = open_session(of.resumed(*whole.snapshot(with_optimizer=True)))
    assert restored.next_step == 3

    for step in range(3, 6):
        assert [a.tensors for a in feed(restored, whole_step(step, 2))] == [
            a.tensors for a in feed(whole, whole_step(step, 2))
        ]

    assert trace_of(restored) == trace_of(whole)


def test_a_snapshot_of_double_precision_goes_on_to_the_bit() -> None:
    of = job(nn.Sequential(_Double(), nn.Linear(3, 2).double(), _Single()), optimizer=Adam(lr=0.01))
    whole = open_session(of)
    feed(whole, whole_step(0))
    restored = open_session(of.resumed(*whole.snapshot(with_optimizer=True)))

    feed(whole, whole_step(1))
    feed(restored, whole_step(1))

    assert trace_of(restored) == trace_of(whole)


class _Single(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_without_the_optimizers_state_a_session_goes_on_as_if_its_optimizer_were_new() -> None:
    of = job()
    whole = open_session(of)
    feed(whole, whole_step(0))

    step, tensors = whole.snapshot(with_optimizer=False)

    assert step == 1
    assert sorted(tensors) == sorted(STATE_PREFIX + name for name in of.state)


def snapshot_of(optimizer: Optimizer) -> tuple[Job, dict[str, torch.Tensor]]:
    of = job(optimizer=optimizer)
    session = open_session(of)
    feed(session, whole_step(0))
    return of, session.snapshot(with_optimizer=True)[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("optimizer/0.weight/exp_avg"), "'0.weight' is without its exp_avg"),
        (lambda t: t.pop("optimizer/0.weight/step"), "without its step"),
        (lambda t: t.update({"optimizer/0.weight/exp_avg": torch.ones(3)}), "'exp_avg' of '0.weight' is not"),
        (lambda t: t.update({"optimizer/0.weight/exp_avg": torch.ones(4, 3).double()}), "is not this optimizer's"),
        (lambda t: t.update({"optimizer/0.weight/step": torch.ones(1)}), "'step' of '0.weight' is not"),
        (lambda t: t.update({"optimizer/0.weight/momentum_buffer": torch.ones(4, 3)}), "is not this optimizer's"),
        (lambda t: t.update({"optimizer/0.weight/max_exp_avg_sq": torch.ones(4, 3)}), "is not this optimizer's"),
        (lambda t: t.update({"optimizer/nobody/exp_avg": torch.ones(1)}), "'nobody', which is not trained"),
        (lambda t: t.update({"optimizer/1.running_mean/exp_avg": torch.ones(4)}), "which is not trained"),
        (lambda t: t.update({"weights": torch.ones(4)}), "'weights'"),
        (lambda t: t.pop("state/0.weight"), "'0.weight' is missing"),
        (lambda t: t.update({"state/more": torch.ones(4)}), "no tensor 'more'"),
        (lambda t: t.update({"state/0.weight": torch.ones(3, 4)}), "the program says"),
        (lambda t: t.update({"state/0.weight": torch.ones(4, 3).half()}), "the program says"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: Callable[[dict[str, torch.Tensor]], object], text: str) -> None:
    of, tensors = snapshot_of(Adam(lr=0.01))
    change(tensors)

    with pytest.raises(StateRejectedError, match=text):
        open_session(of.resumed(1, tensors))


def test_T02_a_middle_that_makes_too_much_of_its_largest_micro_batch_is_refused() -> None:
    with pytest.raises(LimitExceededError, match="8 rows makes more than 100 bytes"):
        open_session(job(), activation_bytes=100)


def test_a_program_whose_operators_refuse_its_own_shapes_is_refused() -> None:
    of = job(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    other = job(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    broken = of.program.replace(b"\x18\x01\x22\x02\x04\x03", b"\x18\x01\x22\x02\x04\x05")
    assert broken != of.program

    with pytest.raises((ProgramRejectedError, StateRejectedError)):
        open_session(Job(broken, b"", {**of.state, "0.weight": torch.ones(4, 5)}, max_rows=8))
    open_session(other)


# --- any order of good, bad and repeated frames

BAD: list[Callable[[int, int], node_pb2.Frame]] = [
    lambda step, number: frame(step, number, FORWARD, torch.full((4, 3), INF)),
    lambda step, number: frame(step, number, FORWARD, torch.ones(4, 5)),
    lambda step, number: frame(step, number, FORWARD, torch.ones(9, 3)),
    lambda step, number: frame(step, number + 5, FORWARD, torch.ones(4, 3)),
    lambda step, number: frame(step + 1, number, FORWARD, torch.ones(4, 3)),
    lambda step, number: frame(step, number + 7, BACKWARD, torch.ones(4, 2), update=True),
    lambda step, number: frame(step, number + 9, UPDATE),
    lambda step, number: frame(step, number, LOSS, torch.ones(4, 3), labels=RIGHT),
    lambda step, number: frame(step, number, FORWARD, torch.ones(4, 3), update=True),
    lambda step, number: node_pb2.Frame(step=step, micro_batch=number, phase=UNKNOWN),
]


@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    noise=st.lists(st.one_of(st.integers(0, len(BAD) - 1), st.just(-1)), max_size=20),
    places=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_noise_among_good_frames_gives_the_state_of_the_good_ones_alone(
    counts: list[int],
    noise: list[int],
    places: Any,
) -> None:
    good = [each for step, count in enumerate(counts) for each in whole_step(step, count)]
    at = sorted((places.randrange(len(good) + 1), each) for each in noise)
    clean, noisy = open_session(_SHARED), open_session(_SHARED)
    answers = feed(clean, good)

    for position in range(len(good) + 1):
        for kind in (kind for where, kind in at if where == position):
            next_step = good[position].step if position < len(good) else len(counts)
            if kind >= 0:
                with pytest.raises(WireError):
                    noisy.train(BAD[kind](next_step, 50))
            elif position:
                again = noisy.train(good[position - 1])
                assert again.tensors == answers[position - 1].tensors
        if position < len(good):
            assert noisy.train(good[position]).tensors == answers[position].tensors

    assert trace_of(noisy) == trace_of(clean)


_SHARED = job()
