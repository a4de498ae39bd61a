"""Optimizers, schedules and losses as data: built alike on both sides, and refused alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from protos import node_pb2
from wire.errors import SpecRejectedError, TensorRejectedError
from wire.optimizers import PartOptimizer
from wire.recipe import (
    SGD,
    Adam,
    AdamW,
    Loss,
    LossName,
    Optimizer,
    Schedule,
    loss_from_proto,
    optimizer_from_proto,
    own_streams,
    seed_stream,
    stream_seed,
)

STEPS = st.integers(0, 2**53)
SHARES = st.floats(0, 1)
AMOUNTS = st.floats(0, 1e6)
BELOW_ONE = st.floats(0, 1, exclude_max=True)
LOSSES: tuple[LossName, ...] = ("cross_entropy", "mse", "l1", "smooth_l1", "bce_with_logits", "nll")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    warmup = draw(st.integers(0, 2**52))
    return Schedule(
        decay=draw(st.sampled_from(["constant", "linear", "cosine", "steps"])),
        warmup_steps=warmup,
        total_steps=draw(st.integers(warmup + 1, 2**53)),
        floor=draw(SHARES),
        milestones=tuple(sorted(draw(st.lists(STEPS, max_size=5)))),
        gamma=draw(SHARES),
    )


@st.composite
def optimizers(draw: st.DrawFn) -> Optimizer:
    common: dict[str, Any] = {
        "lr": draw(AMOUNTS),
        "schedule": draw(schedules()),
        "clip_norm": draw(AMOUNTS),
        "clip_value": draw(AMOUNTS),
        "weight_decay": draw(AMOUNTS),
    }
    if draw(st.booleans()):
        nesterov = draw(st.booleans())
        momentum = draw(st.floats(0.001, 1)) if nesterov else draw(SHARES)
        dampening = 0.0 if nesterov else draw(SHARES)
        return SGD(**common, momentum=momentum, dampening=dampening, nesterov=nesterov)
    kind = draw(st.sampled_from([Adam, AdamW]))
    return kind(**common, betas=(draw(BELOW_ONE), draw(BELOW_ONE)), eps=draw(AMOUNTS), amsgrad=draw(st.booleans()))


# --- As data ----------------------------------------------------------------------------------------------------------


@given(optimizers())
@settings(max_examples=300, deadline=None)
def test_an_optimizer_comes_back_as_it_went(optimizer: Optimizer) -> None:
    sent = node_pb2.Optimizer.FromString(optimizer.to_proto().SerializeToString())

    again = optimizer_from_proto(sent)

    assert again == optimizer
    assert type(again) is type(optimizer)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_comes_back_as_it_went(name: LossName) -> None:
    for loss in (Loss(name), Loss("cross_entropy", 0.1)):
        assert loss_from_proto(node_pb2.Loss.FromString(loss.to_proto().SerializeToString())) == loss


def sgd(**fields: Any) -> node_pb2.Optimizer:
    message = SGD(lr=0.1).to_proto()
    for name, value in fields.items():
        setattr(message.sgd, name, value)
    return message


def adam(**fields: Any) -> node_pb2.Optimizer:
    message = Adam(lr=0.1).to_proto()
    for name, value in fields.items():
        setattr(message.adam, name, value)
    return message


def scheduled(**fields: Any) -> node_pb2.Optimizer:
    message = SGD(lr=0.1, schedule=Schedule(decay="cosine", total_steps=10)).to_proto()
    for name, value in fields.items():
        if name == "milestones":
            message.schedule.milestones[:] = value
        else:
            setattr(message.schedule, name, value)
    return message


def clipped(**fields: Any) -> node_pb2.Optimizer:
    message = SGD(lr=0.1).to_proto()
    for name, value in fields.items():
        setattr(message, name, value)
    return message


NAN, INF = math.nan, math.inf
BAD: list[tuple[node_pb2.Optimizer, str]] = [
    *((sgd(lr=x), "optimizer lr") for x in (NAN, INF, -INF, -1.0, 1.1e6)),
    *((sgd(momentum=x), "optimizer momentum") for x in (NAN, INF, -0.1)),
    *((sgd(dampening=x), "optimizer dampening") for x in (NAN, -0.1)),
    *((sgd(weight_decay=x), "optimizer weight_decay") for x in (NAN, -0.1)),
    (sgd(nesterov=True), "nesterov"),
    (sgd(nesterov=True, momentum=0.9, dampening=0.1), "nesterov"),
    *((adam(lr=x), "optimizer lr") for x in (NAN, INF, -1.0)),
    *((adam(beta1=x), "optimizer betas") for x in (NAN, 1.0, -0.1, INF)),
    *((adam(beta2=x), "optimizer betas") for x in (NAN, 1.0, -0.1)),
    *((adam(eps=x), "optimizer eps") for x in (NAN, INF, -1e-9)),
    *((adam(weight_decay=x), "optimizer weight_decay") for x in (NAN, -0.1)),
    *((clipped(clip_norm=x), "optimizer clip_norm") for x in (NAN, INF, -1.0)),
    *((clipped(clip_value=x), "optimizer clip_value") for x in (NAN, INF, -1.0)),
    (scheduled(decay=0), "unknown schedule decay 0"),
    (scheduled(decay=99), "unknown schedule decay 99"),
    (scheduled(warmup_steps=2**64 - 1), "schedule warmup_steps"),
    (scheduled(total_steps=2**64 - 1), "schedule total_steps"),
    (scheduled(total_steps=0), "total_steps above warmup_steps"),
    (scheduled(warmup_steps=10), "total_steps above warmup_steps"),
    *((scheduled(floor=x), "schedule floor") for x in (NAN, -0.1, 1.1)),
    *((scheduled(gamma=x), "schedule gamma") for x in (NAN, -0.1, 1.1)),
    (scheduled(milestones=[2, 1]), "rising order"),
    (scheduled(milestones=[2**64 - 1]), "schedule milestones"),
    (scheduled(milestones=range(1001)), "at most 1000"),
    (scheduled(milestones=range(1_000_000)), "at most 1000"),
    (node_pb2.Optimizer(schedule=Schedule().to_proto()), "names no optimizer"),
    (node_pb2.Optimizer(), "unknown schedule decay 0"),
]


@pytest.mark.parametrize(("message", "complaint"), BAD, ids=[f"{i}-{c.split()[-1]}" for i, (_, c) in enumerate(BAD)])
def test_T06_each_bad_field_is_refused_and_named(message: node_pb2.Optimizer, complaint: str) -> None:
    with pytest.raises(SpecRejectedError, match=complaint):
        optimizer_from_proto(message)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Loss("hinge"), "hinge.*cross_entropy"),  # type: ignore[arg-type]
        (lambda: Loss("mse", 0.1), "for cross_entropy only"),
        (lambda: Loss("cross_entropy", 1.0), "below 1"),
        (lambda: Loss("cross_entropy", NAN), "below 1"),
        (lambda: Schedule(decay="sudden"), "sudden.*constant"),  # type: ignore[arg-type]
        (lambda: Schedule(milestones=(-1,)), "at least 0"),
        (lambda: Schedule(warmup_steps=-1), "warmup_steps"),
        (lambda: loss_from_proto(node_pb2.Loss()), "unknown loss 0"),
        (lambda: loss_from_proto(node_pb2.Loss(kind=99)), "unknown loss 99"),  # type: ignore[arg-type]
    ],
)
def test_a_mistake_says_what_would_be_right(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(SpecRejectedError, match=complaint):
        make()


# --- At work ----------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


RECIPES: dict[str, tuple[Optimizer, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd_momentum": (
        SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (
        Adam(lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, amsgrad=True),
    ),
    "adamw": (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
}


@pytest.mark.parametrize(
    "clipping", [{}, {"clip_norm": 0.05}, {"clip_value": 0.01}, {"clip_norm": 0.05, "clip_value": 0.01}]
)
@pytest.mark.parametrize("name", RECIPES)
def test_an_optimizer_equals_torchs_own_loop_to_the_bit(name: str, clipping: dict[str, float]) -> None:
    recipe, torchs_own = RECIPES[name]
    schedule = Schedule(decay="cosine", warmup_steps=3, total_steps=12, floor=0.1)
    fields = {f: getattr(recipe, f) for f in recipe.__dataclass_fields__}
    ours, theirs = model(), model()
    part = PartOptimizer(type(recipe)(**fields | {"schedule": schedule} | clipping), dict(ours.named_parameters()))
    reference = torchs_own(theirs.parameters())

    for step in range(15):
        x = torch.randn(4, 6)
        ours(x).square().mean().backward()
        part.apply(step)

        theirs(x).square().mean().backward()
        if clipping.get("clip_value"):
            nn.utils.clip_grad_value_(theirs.parameters(), clipping["clip_value"])
        if clipping.get("clip_norm"):
            nn.utils.clip_grad_norm_(theirs.parameters(), clipping["clip_norm"])
        for group in reference.param_groups:
            group["lr"] = recipe.lr * schedule.factor(step)
        reference.step()
        reference.zero_grad()

    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), model().parameters(), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_optimizers_over_parts_equal_one_over_all_to_the_bit(name: str) -> None:
    recipe, _ = RECIPES[name]
    parted, whole = model(), model()
    parts = [PartOptimizer(recipe, dict(layer.named_parameters())) for layer in parted.children()]
    one = PartOptimizer(recipe, dict(whole.named_parameters()))

    for step in range(5):
        x = torch.randn(4, 6)
        for each, optimizers in ((parted, parts), (whole, [one])):
            each(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.apply(step)

    assert all(torch.equal(a, b) for a, b in zip(parted.parameters(), whole.parameters(), strict=True))


def test_an_update_forgets_the_gradients() -> None:
    part = PartOptimizer(SGD(lr=0.1), dict((own := model()).named_parameters()))
    own(torch.randn(2, 6)).sum().backward()

    part.apply(0)

    assert all(p.grad is None for p in own.parameters())


def test_frozen_and_repeated_parameters_are_left_out() -> None:
    own = model()
    first, *rest = own.parameters()
    first.requires_grad_(False)

    part = PartOptimizer(SGD(lr=0.1), {"first": first} | {f"{n}": p for n, p in enumerate([*rest, *rest])})

    assert [id(p) for p in part.parameters.values()] == [id(p) for p in rest]


def test_a_part_without_parameters_has_nothing_to_do() -> None:
    part = PartOptimizer(SGD(lr=0.1), {})

    part.apply(0)

    assert part.state() == {}


# --- The rate by the step ---------------------------------------------------------------------------------------------


def torchs_factors(scheduler: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    made, found = scheduler(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return found


TORCHS: dict[str, tuple[Schedule, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]]] = {
    "constant": (Schedule(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": (
        Schedule(decay="cosine", total_steps=40, floor=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.1),
    ),
    "linear": (
        Schedule(decay="linear", total_steps=40, floor=0.2),
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=40),
    ),
    "steps": (
        Schedule(decay="steps", milestones=(3, 10, 10, 20), gamma=0.5),
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 10, 10, 20], gamma=0.5),
    ),
    "warmup": (
        Schedule(warmup_steps=5),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, end_factor=1.0, total_iters=4),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_a_schedule_equals_torchs_own(name: str) -> None:
    schedule, scheduler = TORCHS[name]
    steps = 41

    expected = torchs_factors(scheduler, steps)

    assert [schedule.factor(step) for step in range(steps)] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_ends_at_its_floor_and_stays_there(decay: Any) -> None:
    schedule = Schedule(decay=decay, warmup_steps=2, total_steps=10, floor=0.25)

    assert [schedule.factor(s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert [schedule.factor(s) for s in (10, 11, 2**53)] == pytest.approx([0.25] * 3, abs=1e-15)


@given(schedules(), STEPS)
@settings(max_examples=200, deadline=None)
def test_a_factor_is_between_nothing_and_one_at_any_step_of_any_schedule(schedule: Schedule, step: int) -> None:
    assert 0.0 <= schedule.factor(step) <= 1.0 + 1e-12


# --- Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_torchs_own(name: LossName) -> None:
    output = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 2]) if Loss(name).takes_classes else torch.rand(4, 3)
    module = {
        "cross_entropy": nn.CrossEntropyLoss(),
        "mse": nn.MSELoss(),
        "l1": nn.L1Loss(),
        "smooth_l1": nn.SmoothL1Loss(),
        "bce_with_logits": nn.BCEWithLogitsLoss(),
        "nll": nn.NLLLoss(),
    }[name]

    Loss(name).check(output, labels)

    assert torch.equal(Loss(name)(output, labels), module(output, labels))


def test_smoothed_labels_equal_torchs_own() -> None:
    output, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])

    smoothed = Loss("cross_entropy", 0.2)(output, labels)

    assert torch.equal(smoothed, nn.CrossEntropyLoss(label_smoothing=0.2)(output, labels))


@pytest.mark.parametrize(
    ("name", "output", "labels", "complaint"),
    [
        ("cross_entropy", (4, 3), torch.tensor([0, 1, 2, 3]), "labels from 0 to 3 for 3 classes"),
        ("cross_entropy", (4, 3), torch.tensor([0, 1, 2, -1]), "labels from -1 to 2"),
        ("nll", (4, 3), torch.tensor([0, 1, 2, 2**62]), "for 3 classes"),
        ("cross_entropy", (4, 3), torch.tensor([0, 1]), r"labels \(2,\)"),
        ("cross_entropy", (4, 3), torch.zeros(4, 3), "class numbers"),
        ("cross_entropy", (4, 3, 5), torch.zeros(4, dtype=torch.int64), r"labels \(4,\)"),
        ("cross_entropy", (4,), torch.zeros(4, dtype=torch.int64), "class numbers"),
        ("mse", (4, 3), torch.zeros(4), "wants the same of both"),
        ("mse", (4, 3), torch.zeros(4, 3, dtype=torch.int64), "wants the same of both"),
        ("bce_with_logits", (4, 3), torch.zeros(4, 1), "wants the same of both"),
    ],
)
def test_T06_labels_that_do_not_fit_are_refused_before_the_loss(
    name: LossName, output: tuple[int, ...], labels: torch.Tensor, complaint: str
) -> None:
    with pytest.raises(TensorRejectedError, match=complaint):
        Loss(name).check(torch.zeros(output), labels)


# --- Random streams ---------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_numbers_whatever_ran_before_and_leaves_no_trace() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with own_streams():
        seed_stream(1, "front", 3, 0)
        first = torch.rand(4)
    untouched = torch.get_rng_state()
    torch.rand(100)
    with own_streams():
        seed_stream(1, "head", 3, 0)
        torch.rand(9)
        seed_stream(1, "front", 3, 0)
        second = torch.rand(4)

    assert torch.equal(first, second)
    assert torch.equal(before, untouched)


def test_a_stream_that_ends_in_an_error_leaves_no_trace_either() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with own_streams():
            seed_stream(1, "front", 3, 0)
            torch.rand(4).view(5)

    with pytest.raises(RuntimeError):
        fail()

    assert torch.equal(before, torch.get_rng_state())


def test_streams_differ_by_seed_part_step_and_micro_batch() -> None:
    seeds = {
        stream_seed(seed, part, step, micro_batch)
        for seed in (0, 1, 2**63)
        for part in ("front", "middle", "head")
        for step in range(10)
        for micro_batch in range(4)
    }

    assert len(seeds) == 3 * 3 * 10 * 4


@given(st.integers(0, 2**64 - 1), st.sampled_from(["front", "middle", "head"]), STEPS, st.integers(0, 2**32 - 1))
def test_a_streams_seed_is_one_that_torch_takes(seed: int, part: str, step: int, micro_batch: int) -> None:
    assert 0 <= stream_seed(seed, part, step, micro_batch) < 2**63


def test_the_seeds_of_streams_never_change() -> None:
    # A checkpoint of last year must go on with the same numbers.
    assert stream_seed(0, "front", 0, 0) == 1530607662059700295
    assert stream_seed(7, "middle", 3, 1) == 9023412023694074918


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        copy.copy(SGD(lr=0.1)).lr = 1.0  # type: ignore[misc]
