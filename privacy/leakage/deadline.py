"""The time that an attack may take, and a descent that keeps to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["Deadline", "descend"]

_TRIED_STEPS = 5  # what a step takes is told from these
_FULL_SHARE = 0.9  # of the time left, so that what comes after the last step fits too


class Deadline:
    """Some seconds from now."""

    def __init__(self, seconds: float) -> None:
        """Starts to run."""
        self._began = time.monotonic()
        self._seconds = seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds left; never below 0."""
        return max(0.0, self._seconds - self.spent)

    def share(self, part: float) -> Deadline:
        """A deadline for ``part`` (0 to 1) of what is left."""
        return Deadline(self.left * part)


def descend(
    loss_of: Callable[[int], Tensor],
    parameters: Iterable[Tensor],
    *,
    steps: int,
    rate: float,
    deadline: Deadline,
) -> int:
    """Minimises by Adam, its rate falling to 0 along a cosine: after ``steps``, or sooner where the time is short.

    How many steps fit is told from the first few, so that the rate comes down in time. Where ``steps`` fit, the result
    does not depend on the clock.

    Args:
        loss_of: the loss of a step by its number; draws its own batch.
        parameters: what is changed.
        steps: at most.
        rate: the first learning rate.
        deadline: is kept to within a step.

    Returns:
        How many steps were made.
    """
    optimizer = torch.optim.Adam(list(parameters), lr=rate)
    began, total, step = deadline.spent, steps, 0
    while step < total and (step == 0 or deadline.left > 0):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
        optimizer.zero_grad()
        loss_of(step).backward()  # type: ignore[no-untyped-call]  # torch's own signature
        optimizer.step()
        step += 1
        if step == _TRIED_STEPS:
            each = (deadline.spent - began) / step
            total = min(steps, step + int(_FULL_SHARE * deadline.left / each))
    return step
