"""A small session without a network, the frames that it takes, and all that frames may move in it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from protos import node_pb2
from server_side.session import Session
from tests.wire_client import Job, frame, plan_of_job
from wire.program import decode_program
from wire.recipe import SGD
from wire.state import load_state

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INF",
    "LOSS",
    "MOMENTUM",
    "NAN",
    "UNKNOWN",
    "UPDATE",
    "Double",
    "Single",
    "backward",
    "begun",
    "bits",
    "data",
    "feed",
    "forward",
    "g42",
    "job",
    "loss_frame",
    "middle",
    "open_session",
    "trace_of",
    "whole_step",
    "x42",
]

FORWARD, BACKWARD = node_pb2.PHASE_FORWARD, node_pb2.PHASE_BACKWARD
LOSS, UPDATE = node_pb2.PHASE_LOSS, node_pb2.PHASE_UPDATE
UNKNOWN: Any = 99
MOMENTUM = SGD(lr=0.1, momentum=0.9, weight_decay=0.01)
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


def begun(of: Job | None = None) -> Session:
    """A session in the middle of step 1: micro-batch 0 is done, 1 waits for its backward."""
    session = open_session(of or job())
    feed(session, [*whole_step(0), forward(1, 0), backward(1, 0), forward(1, 1)])
    return session


x42, g42 = data(1, 2)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class Single(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()
