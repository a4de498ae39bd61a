"""What a session refuses, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from protos import node_pb2, program_pb2, tensor_pb2
from server_side import session as session_module
from tests.session_frames import (
    BACKWARD,
    FORWARD,
    INF,
    LOSS,
    NAN,
    UNKNOWN,
    UPDATE,
    Double,
    Single,
    backward,
    begun,
    data,
    feed,
    forward,
    g42,
    job,
    loss_frame,
    open_session,
    trace_of,
    whole_step,
    x42,
)
from tests.wire_client import Job, frame
from wire.codec import encode
from wire.errors import (
    ComputeError,
    LimitExceededError,
    MessageRejectedError,
    NonFiniteError,
    ProgramRejectedError,
    StateRejectedError,
    StepOutOfOrderError,
    TensorRejectedError,
    WireError,
)
from wire.recipe import Loss


def lying(**changes: Any) -> node_pb2.Frame:
    message = encode(data(1, 2)[0])
    for name, value in changes.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)
        else:
            setattr(message, name, value)
    return node_pb2.Frame(step=1, micro_batch=2, phase=FORWARD, tensors=[message])


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


# --- what never becomes a session


def test_a_middle_whose_output_cannot_travel_is_refused() -> None:
    of = job(nn.Sequential(Double(), nn.Linear(3, 2).double(), Single()))
    program = program_pb2.Program.FromString(of.program)
    for graph in (program.train, program.eval):
        if graph.outputs:
            graph.outputs[0] -= 1  # what came before the conversion back
    widened = program.SerializeToString(deterministic=True)

    with pytest.raises(ProgramRejectedError, match="an output that no frame carries"):
        open_session(dataclasses.replace(of, program=widened))


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
