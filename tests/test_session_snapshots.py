"""Evaluation in a session, its snapshots, and the sessions that begin from one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from protos import node_pb2
from tests.session_frames import (
    MOMENTUM,
    NAN,
    Double,
    Single,
    backward,
    begun,
    bits,
    feed,
    job,
    middle,
    open_session,
    trace_of,
    whole_step,
    x42,
)
from tests.wire_client import Job
from wire.codec import decode, encode
from wire.errors import (
    LimitExceededError,
    NonFiniteError,
    StateRejectedError,
    StepOutOfOrderError,
    TensorRejectedError,
    WireError,
)
from wire.recipe import SGD, Adam, AdamW, Optimizer
from wire.state import STATE_PREFIX


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
    of = job(nn.Sequential(Double(), nn.Linear(3, 2).double(), Single()), optimizer=Adam(lr=0.01))
    whole = open_session(of)
    feed(whole, whole_step(0))
    restored = open_session(of.resumed(*whole.snapshot(with_optimizer=True)))

    feed(whole, whole_step(1))
    feed(restored, whole_step(1))

    assert trace_of(restored) == trace_of(whole)


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
