"""DP-SGD (Abadi et al. 2016) on a part whose loss is elsewhere, by Opacus' per-record gradients.

The gradient at the part's output comes from outside, scaled by 1 / B as that of a mean over the batch. Each record's
gradient is clipped, the sum is noised, and the optimizer gets it divided by B. The forward is computed anew when the
gradient arrives: two forwards in flight would mix up what Opacus' hooks remember.

Shapes: ``b`` rows of a micro-batch, ``B`` rows of the step's batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from privacy.mechanisms import Noise
from privacy.policy import DpSgd
from wire.errors import ConfigError, NonFiniteError

__all__ = ["DpGradients"]


class DpGradients:
    """The gradients of one part in one step after the other: gathered over micro-batches, then clipped and noised."""

    def __init__(self, part: nn.Module, treatment: DpSgd, name: str) -> None:
        """Hooks into ``part``, which stays itself.

        Raises:
            ConfigError: a layer mixes records (batch-norm), or Opacus has no per-record gradient for it.
        """
        # Late: Opacus loads all of torch.distributed, which takes seconds, and few runs need it.
        from opacus import GradSampleModule  # noqa: PLC0415
        from opacus.validators import ModuleValidator  # noqa: PLC0415

        self._treatment, self._noise = treatment, Noise()
        errors = ModuleValidator.validate(part, strict=False)
        if errors:
            raise ConfigError(
                f"privacy.{name}: dp_sgd takes layers that keep records apart, and {errors[0]} (GroupNorm in place of "
                "BatchNorm, operators out of place)"
            )
        self._hooked = GradSampleModule(part, loss_reduction="sum")
        self._hooked.disable_hooks()
        self._parameters = [p for p in part.parameters() if p.requires_grad]
        self._sums: list[Tensor] | None = None

    @property
    def treatment(self) -> DpSgd:
        """How they are clipped and noised; another one holds from the next step on."""
        return self._treatment

    @treatment.setter
    def treatment(self, treatment: DpSgd) -> None:
        self._treatment = treatment

    @contextmanager
    def per_record(self, rows: int) -> Iterator[None]:
        """Inside, a forward and its backward add one micro-batch's clipped gradients.

        Args:
            rows: of the step's whole batch, ``B``.

        Raises:
            NonFiniteError: a record's gradient is NaN or infinite; it would pass every clip.
        """
        for parameter in self._parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus' own attribute
            parameter.grad = None
        self._hooked.enable_hooks()
        try:
            with warnings.catch_warnings():
                # Inputs are data: nobody wants their gradients.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                yield
        finally:
            self._hooked.disable_hooks()
        self._gather(rows)

    def finish(self, rows: int) -> None:
        """Sets each parameter's gradient, for the optimizer's step over ``rows`` rows."""
        if self._sums is None:
            return
        sigma = self._treatment.noise * self._treatment.clip
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            noisy = self._noise.added_to(total, sigma)
            parameter.grad = (noisy / rows).to(parameter.dtype)
            parameter.grad_sample = None  # type: ignore[attr-defined]  # as above
        self._sums = None

    def _gather(self, rows: int) -> None:
        samples = [getattr(p, "grad_sample", None) for p in self._parameters]
        # A parameter that took no part has no gradient; that is the same for every record.
        found = [None if s is None else s.detach().to(torch.float64) * rows for s in samples]
        flat = [s.flatten(1) for s in found if s is not None]
        if not flat:
            return
        norms = torch.cat(flat, dim=1).norm(dim=1)
        if not torch.isfinite(norms).all():
            raise NonFiniteError("a record's gradient is not finite: the training diverged, or the node makes it up")
        factors = (self._treatment.clip / norms.clamp_min(1e-12)).clamp_max(1.0) * (1 - 2**-40)  # rounding stays inside
        sums = self._sums or [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        self._sums = [
            total if s is None else total + torch.einsum("b,b...->...", factors, s)
            for total, s in zip(sums, found, strict=True)
        ]
        for parameter in self._parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]  # as above
