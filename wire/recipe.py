"""Optimizers, learning-rate schedules, clipping and losses as data, and the random streams of a step's parts.

The owner trains front and head, the node the middle, each with an optimizer of its own over its own parameters; since
every update is element by element, that equals one optimizer over all of them, to the bit. The learning rate is a pure
function of the step's number, so that both sides agree without a word and after any restart. Clipping by norm is by
part (front, middle, head): a norm over all parts would cost a round trip and tell the node a function of the front.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import torch
from torch import nn

from protos import node_pb2
from wire.errors import SpecRejectedError, TensorRejectedError

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Loss",
    "LossName",
    "Optimizer",
    "Schedule",
    "loss_from_proto",
    "optimizer_from_proto",
    "own_streams",
    "seed_stream",
    "stream_seed",
]

LossName: TypeAlias = Literal["cross_entropy", "mse", "l1", "smooth_l1", "bce_with_logits", "nll"]
DecayName: TypeAlias = Literal["constant", "linear", "cosine", "steps"]

_MAX_MILESTONES: Final = 1000  # one a step would be a schedule of another kind
_MAX_STEP: Final = 2**53  # the largest count that survives a trip through a double
_MAX_HYPERPARAMETER: Final = 1e6  # no optimizer has any use for more; keeps products finite

_DECAYS: Final[dict[DecayName, node_pb2.Decay.ValueType]] = {
    "constant": node_pb2.DECAY_CONSTANT,
    "linear": node_pb2.DECAY_LINEAR,
    "cosine": node_pb2.DECAY_COSINE,
    "steps": node_pb2.DECAY_STEPS,
}
_DECAY_NAMES: Final = {number: name for name, number in _DECAYS.items()}
_LOSSES: Final[dict[LossName, node_pb2.LossKind.ValueType]] = {
    "cross_entropy": node_pb2.LOSS_KIND_CROSS_ENTROPY,
    "mse": node_pb2.LOSS_KIND_MSE,
    "l1": node_pb2.LOSS_KIND_L1,
    "smooth_l1": node_pb2.LOSS_KIND_SMOOTH_L1,
    "bce_with_logits": node_pb2.LOSS_KIND_BCE_WITH_LOGITS,
    "nll": node_pb2.LOSS_KIND_NLL,
}
_LOSS_NAMES: Final = {number: name for name, number in _LOSSES.items()}


def stream_seed(seed: int, part: str, step: int = 0, micro_batch: int = 0) -> int:
    """The seed (63 bits) of one part's random stream in one micro-batch.

    Dropout in the front, the middle and the head draws from streams of their own, so that a micro-batch's numbers
    depend on nothing that ran before it: not on how many are in flight, nor on a replay. A hash keeps the node, which
    knows the middle's seed, from computing another part's.
    """
    text = f"cloister.stream.v1|{seed}|{part}|{step}|{micro_batch}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_stream(seed: int, part: str, step: int, micro_batch: int) -> None:
    """Puts torch's default generators at the beginning of that stream; see :func:`own_streams`."""
    number = stream_seed(seed, part, step, micro_batch)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # asking for more would start CUDA
        torch.cuda.manual_seed_all(number)


@contextmanager
def own_streams() -> Iterator[None]:
    """Around the parts of a step: afterwards torch's default generators stand where they stood."""
    cpu = torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate's factor by step: a linear warm-up, then a decay.

    Attributes:
        decay: ``constant``; ``linear`` or ``cosine`` down to ``floor`` at ``total_steps``; ``steps``: times ``gamma``
            at each of ``milestones``.
        warmup_steps: the factor rises linearly over so many steps; step 0 already moves.
        floor: the smallest factor of ``linear`` and ``cosine``, 0 to 1.
    """

    decay: DecayName = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    floor: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        """Refuses what no step could be scheduled by.

        Raises:
            SpecRejectedError: says which field, and what it must be.
        """
        if self.decay not in _DECAYS:
            raise SpecRejectedError(f"schedule decay {self.decay!r}: use one of {', '.join(_DECAYS)}")
        _require(0 <= self.warmup_steps <= _MAX_STEP, "schedule warmup_steps: at least 0")
        _require(0 <= self.total_steps <= _MAX_STEP, "schedule total_steps: at least 0")
        if self.decay in ("linear", "cosine"):
            _require(self.total_steps > self.warmup_steps, f"schedule {self.decay}: total_steps above warmup_steps")
        _require(0.0 <= self.floor <= 1.0, "schedule floor: 0 to 1")
        _require(0.0 <= self.gamma <= 1.0, "schedule gamma: 0 to 1")
        _require(len(self.milestones) <= _MAX_MILESTONES, f"schedule milestones: at most {_MAX_MILESTONES}")
        _require(list(self.milestones) == sorted(self.milestones), "schedule milestones: in rising order")
        _require(all(0 <= m <= _MAX_STEP for m in self.milestones), "schedule milestones: at least 0")

    def factor(self, step: int) -> float:
        """What the base learning rate is multiplied by at ``step`` (counted from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "steps":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        share = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (1.0 - self.floor) * share

    def to_proto(self) -> node_pb2.Schedule:
        """As a message."""
        return node_pb2.Schedule(
            decay=_DECAYS[self.decay],
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            floor=self.floor,
            milestones=self.milestones,
            gamma=self.gamma,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    """What every optimizer takes: the rate's schedule, and clipping of each part's gradients (0 means none)."""

    lr: float
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 0.0
    clip_value: float = 0.0

    def _check(self, **numbers: float) -> None:
        everything = {"lr": self.lr, "clip_norm": self.clip_norm, "clip_value": self.clip_value, **numbers}
        for name, number in everything.items():
            _require(
                math.isfinite(number) and 0.0 <= number <= _MAX_HYPERPARAMETER,
                f"optimizer {name} = {number}: a finite number from 0 to {_MAX_HYPERPARAMETER:g}",
            )

    def _wrap(self, **kind: node_pb2.Sgd | node_pb2.Adam) -> node_pb2.Optimizer:
        return node_pb2.Optimizer(
            schedule=self.schedule.to_proto(),
            clip_norm=self.clip_norm,
            clip_value=self.clip_value,
            **kind,  # type: ignore[arg-type]  # one of the oneof's fields by name
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD(_Common):
    """Stochastic gradient descent, as ``torch.optim.SGD``."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Raises: SpecRejectedError for a number out of range."""
        self._check(momentum=self.momentum, dampening=self.dampening, weight_decay=self.weight_decay)
        if self.nesterov:
            _require(self.momentum > 0 and self.dampening == 0, "nesterov: needs momentum and no dampening")

    def to_proto(self) -> node_pb2.Optimizer:
        """As a message."""
        return self._wrap(
            sgd=node_pb2.Sgd(
                lr=self.lr,
                momentum=self.momentum,
                dampening=self.dampening,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(_Common):
    """Adam (Kingma and Ba 2015), as ``torch.optim.Adam``."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        """Raises: SpecRejectedError for a number out of range."""
        self._check(eps=self.eps, weight_decay=self.weight_decay)
        _require(all(0.0 <= beta < 1.0 for beta in self.betas), "optimizer betas: each from 0 to below 1")

    def _message(self) -> node_pb2.Adam:
        return node_pb2.Adam(
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )

    def to_proto(self) -> node_pb2.Optimizer:
        """As a message."""
        return self._wrap(adam=self._message())


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``."""

    weight_decay: float = 0.01

    def to_proto(self) -> node_pb2.Optimizer:
        """As a message."""
        return self._wrap(adamw=self._message())


Optimizer: TypeAlias = SGD | Adam | AdamW


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss by name, averaged over the batch."""

    name: LossName = "cross_entropy"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raises: SpecRejectedError for an unknown name or a smoothing out of range."""
        if self.name not in _LOSSES:
            raise SpecRejectedError(f"loss {self.name!r}: use one of {', '.join(_LOSSES)}")
        _require(0.0 <= self.label_smoothing < 1.0, "loss label_smoothing: from 0 to below 1")
        if self.label_smoothing:
            _require(self.name == "cross_entropy", "loss label_smoothing: for cross_entropy only")

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss, a scalar."""
        functions: dict[str, Callable[..., torch.Tensor]] = {
            "mse": nn.functional.mse_loss,
            "l1": nn.functional.l1_loss,
            "smooth_l1": nn.functional.smooth_l1_loss,
            "bce_with_logits": nn.functional.binary_cross_entropy_with_logits,
            "nll": nn.functional.nll_loss,
        }
        if self.name == "cross_entropy":
            return nn.functional.cross_entropy(output, labels, label_smoothing=self.label_smoothing)
        return functions[self.name](output, labels)

    def check(self, output: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuses labels that an operator would refuse late, or on a GPU fatally.

        Raises:
            TensorRejectedError: says what the labels are, and what they must be.
        """
        if not self.takes_classes:
            if labels.shape != output.shape or labels.dtype != output.dtype:
                raise TensorRejectedError(
                    f"labels {labels.dtype} {tuple(labels.shape)} for an output {output.dtype} {tuple(output.shape)}; "
                    f"{self.name} wants the same of both",
                )
            return
        if output.ndim < 2 or labels.dtype != torch.int64:  # noqa: PLR2004 -- [batch, classes, ...]
            raise TensorRejectedError(
                f"labels of {labels.dtype} for an output {tuple(output.shape)}; {self.name} takes class numbers as "
                "int64 for an output [batch, classes, ...]",
            )
        if labels.shape != (output.shape[0], *output.shape[2:]):
            raise TensorRejectedError(f"labels {tuple(labels.shape)} for an output {tuple(output.shape)}")
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= output.shape[1]:
            raise TensorRejectedError(f"labels from {low} to {high} for {output.shape[1]} classes")

    @property
    def takes_classes(self) -> bool:
        """Whether labels are class numbers (int64) rather than values of the output's shape."""
        return self.name in ("cross_entropy", "nll")

    def to_proto(self) -> node_pb2.Loss:
        """As a message."""
        return node_pb2.Loss(kind=_LOSSES[self.name], label_smoothing=self.label_smoothing)


def loss_from_proto(message: node_pb2.Loss) -> Loss:
    """Raises: SpecRejectedError for a loss that is not on the list."""
    name = _LOSS_NAMES.get(message.kind)
    if name is None:
        raise SpecRejectedError(f"unknown loss {message.kind}")
    return Loss(name, message.label_smoothing)


def optimizer_from_proto(message: node_pb2.Optimizer) -> Optimizer:
    """Raises: SpecRejectedError for an optimizer or schedule that is not on the list, or a number out of range."""
    schedule = _schedule_from_proto(message.schedule)
    clip_norm, clip_value = message.clip_norm, message.clip_value
    kind = message.WhichOneof("kind")
    if kind == "sgd":
        sgd = message.sgd
        return SGD(
            lr=sgd.lr,
            momentum=sgd.momentum,
            dampening=sgd.dampening,
            weight_decay=sgd.weight_decay,
            nesterov=sgd.nesterov,
            schedule=schedule,
            clip_norm=clip_norm,
            clip_value=clip_value,
        )
    if kind is None:
        raise SpecRejectedError("the spec names no optimizer")
    cls, adam = (Adam, message.adam) if kind == "adam" else (AdamW, message.adamw)
    return cls(
        lr=adam.lr,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        amsgrad=adam.amsgrad,
        schedule=schedule,
        clip_norm=clip_norm,
        clip_value=clip_value,
    )


def _schedule_from_proto(message: node_pb2.Schedule) -> Schedule:
    decay = _DECAY_NAMES.get(message.decay)
    if decay is None:
        raise SpecRejectedError(f"unknown schedule decay {message.decay}")
    return Schedule(
        decay=decay,
        warmup_steps=message.warmup_steps,
        total_steps=message.total_steps,
        floor=message.floor,
        milestones=tuple(message.milestones[: _MAX_MILESTONES + 1]),
        gamma=message.gamma,
    )


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 -- a condition is a condition
    if not condition:
        raise SpecRejectedError(message)
