"""A session without a network: what follows what, what comes again, and an update that fails."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import nn

from server_side import session as session_module
from server_side.session import Session
from tests.session_frames import (
    BACKWARD,
    FORWARD,
    MOMENTUM,
    NAN,
    UPDATE,
    backward,
    begun,
    bits,
    data,
    feed,
    forward,
    job,
    loss_frame,
    middle,
    open_session,
    trace_of,
    whole_step,
)
from tests.wire_client import frame
from wire.codec import decode
from wire.errors import ComputeError, NonFiniteError, SessionLostError, StepOutOfOrderError
from wire.recipe import AdamW, Loss, Optimizer
from wire.state import STATE_PREFIX

PLAIN = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def count_runs(session: Session) -> list[int]:
    """Gathers one entry for each time that the session computes a forward."""
    runs: list[int] = []
    real = session._train.run

    def run(values: Any) -> list[torch.Tensor]:
        runs.append(session._step)
        return real(values)

    session._train.run = run  # type: ignore[method-assign, assignment]  # the real one, counted
    return runs


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
