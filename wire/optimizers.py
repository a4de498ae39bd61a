"""A part's optimizer at work, with torch's own arithmetic and its state in the open.

torch's functional optimizers compute every update, so the numbers are those of ``torch.optim.SGD``, ``Adam`` and
``AdamW`` to the bit. What torch's classes add around them (hooks, profiler records, groups) takes longer than the
update of a small part, and they name state by position; here it has the parameter's name and the slot's, which is how
it travels and how it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from wire.errors import StateRejectedError
from wire.recipe import SGD, Adam, AdamW, Optimizer

__all__ = ["PartOptimizer"]

_MOMENTUM: Final = "momentum_buffer"
_COUNT: Final = "step"  # torch counts updates in float32, on the CPU, whatever the parameter is


class PartOptimizer:
    """One part's optimizer: clips, sets the step's learning rate, updates, forgets the gradients.

    Attributes:
        parameters: by name, those that are trained.
    """

    def __init__(self, recipe: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes those of ``parameters`` that require a gradient, each once; there may be none."""
        self._recipe = recipe
        names: dict[nn.Parameter, str] = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                names.setdefault(parameter, name)
        self.parameters = {name: parameter for parameter, name in names.items()}
        self._state: dict[str, dict[str, torch.Tensor]] = {}
        # One kernel for many tensors pays on a GPU, where torch picks it itself; asking costs as much as an update.
        self._foreach = False if all(p.device.type == "cpu" for p in names) else None

    def apply(self, step: int) -> None:
        """One update with the gradients that have gathered."""
        everything = list(self.parameters.values())
        if self._recipe.clip_value:
            nn.utils.clip_grad_value_(everything, self._recipe.clip_value)
        if self._recipe.clip_norm:
            nn.utils.clip_grad_norm_(everything, self._recipe.clip_norm)
        moved = {name: p for name, p in self.parameters.items() if p.grad is not None}
        if not moved:
            return
        lr = self._recipe.lr * self._recipe.schedule.factor(step)
        gradients = [p.grad for p in moved.values() if p.grad is not None]
        with torch.no_grad():
            if isinstance(self._recipe, SGD):
                self._sgd(self._recipe, moved, gradients, lr)
            else:
                self._adam(self._recipe, moved, gradients, lr)
        for parameter in moved.values():
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What the next update depends on besides parameters and gradients: the live tensors, as ``name/slot``."""
        return {f"{name}/{slot}": value for name, slots in self._state.items() for slot, value in slots.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes copies of what :meth:`state` gave, in place of what there is; parameters without any begin anew.

        Raises:
            StateRejectedError: not the state of this optimizer over these parameters; nothing has changed.
        """
        slots = self._slots
        state: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, slot = key.rpartition("/")
            parameter = self.parameters.get(name)
            if parameter is None:
                raise StateRejectedError(f"optimizer state for {name!r}, which is not trained")
            like = torch.zeros(()) if slot == _COUNT else parameter
            if slot not in slots or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise StateRejectedError(f"optimizer state {slot!r} of {name!r} is not this optimizer's")
            state.setdefault(name, {})[slot] = tensor.detach().to(like.device, copy=True)
        for name, found in state.items():
            if missing := slots - found.keys():
                raise StateRejectedError(f"the optimizer state of {name!r} is without its {', '.join(sorted(missing))}")
        self._state = state

    @property
    def _slots(self) -> frozenset[str]:
        """What this optimizer keeps for each parameter."""
        if isinstance(self._recipe, SGD):
            return frozenset({_MOMENTUM} if self._recipe.momentum else ())
        return frozenset({_COUNT, "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self._recipe.amsgrad else ())})

    def _sgd(self, recipe: SGD, moved: dict[str, nn.Parameter], gradients: list[torch.Tensor], lr: float) -> None:
        buffers = [self._state.get(name, {}).get(_MOMENTUM) for name in moved]
        sgd(
            list(moved.values()),
            gradients,
            buffers,
            foreach=self._foreach,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            lr=lr,
            dampening=recipe.dampening,
            nesterov=recipe.nesterov,
            maximize=False,
        )
        for name, buffer in zip(moved, buffers, strict=True):
            if buffer is not None:  # torch makes the first one from the gradient
                self._state[name] = {_MOMENTUM: buffer}

    def _adam(self, recipe: Adam, moved: dict[str, nn.Parameter], gradients: list[torch.Tensor], lr: float) -> None:
        for name, parameter in moved.items():
            if name not in self._state:
                self._state[name] = {
                    slot: torch.zeros(()) if slot == _COUNT else torch.zeros_like(parameter) for slot in self._slots
                }
        state = [self._state[name] for name in moved]
        adam(
            list(moved.values()),
            gradients,
            [slots["exp_avg"] for slots in state],
            [slots["exp_avg_sq"] for slots in state],
            [slots["max_exp_avg_sq"] for slots in state] if recipe.amsgrad else [],
            [slots[_COUNT] for slots in state],
            foreach=self._foreach,
            decoupled_weight_decay=isinstance(recipe, AdamW),
            amsgrad=recipe.amsgrad,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            lr=lr,
            weight_decay=recipe.weight_decay,
            eps=recipe.eps,
            maximize=False,
        )
