"""The owner's part of a run as plain data: what tells the run from others, and the tensors that stay here."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import nn

from client_side.checkpoints import Checkpoint
from client_side.cutting import Cut
from privacy.policy import Policy
from wire.optimizers import PartOptimizer
from wire.recipe import Loss, Optimizer

__all__ = ["describe_run", "owner_tensors", "restore_owner"]


def describe_run(
    cut: Cut, optimizer: Optimizer, loss: Loss, policy: Policy, *, data_set: str | None, micro_batches: int, seed: int
) -> dict[str, object]:
    """What makes a run this one, by names that people read: a checkpoint of any other is refused."""
    return {
        "middle": cut.program.digest.hex(),
        "topology": "vanilla" if cut.head is None else "U-shaped",
        **{name: _shapes(part) for name, part in _parts(cut).items()},
        "optimizer": str(optimizer),
        "loss": str(loss),
        "privacy": json.dumps(policy.to_json(), sort_keys=True),
        "data_set": data_set,
        "micro_batches": micro_batches,
        "seed": seed,
    }


def owner_tensors(cut: Cut, optimizers: Sequence[PartOptimizer]) -> dict[str, torch.Tensor]:
    """Copies of front, head and their optimizers' state, by name."""
    named = [(f"{part}/{name}", t) for part, module in _parts(cut).items() for name, t in module.state_dict().items()]
    for number, optimizer in enumerate(optimizers):
        named += [(f"optimizer/{number}/{key}", value) for key, value in optimizer.state().items()]
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named}


def restore_owner(cut: Cut, optimizers: Sequence[PartOptimizer], checkpoint: Checkpoint) -> None:
    """Puts back what :func:`owner_tensors` gave.

    Raises:
        StateRejectedError: the optimizers' state is another optimizer's.
    """
    for name, part in _parts(cut).items():
        part.load_state_dict(checkpoint.part(f"{name}/"))
    for number, optimizer in enumerate(optimizers):
        optimizer.restore(checkpoint.part(f"optimizer/{number}/"))


def _parts(cut: Cut) -> dict[str, nn.Module]:
    return {"front": cut.front} if cut.head is None else {"front": cut.front, "head": cut.head}


def _shapes(part: nn.Module) -> dict[str, str]:
    frozen = {name for name, p in part.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {
        name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}{' frozen' if name in frozen else ''}"
        for name, t in part.state_dict().items()
    }
