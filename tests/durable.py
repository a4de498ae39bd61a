"""A small run to interrupt: a model with batch-norm and dropout, its data, and what an undisturbed run gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cloister

__all__ = ["Outcome", "Stopped", "Watch", "loaders", "model", "outcome", "resumed_as", "seed_everything", "undisturbed"]

FEATURES, WIDTH, CLASSES = 6, 16, 3
ROWS, BATCH = 48, 8
STEPS: Final = ROWS // BATCH  # an epoch's
OPTIMIZER: Final = cloister.AdamW(lr=1e-2, schedule=cloister.Schedule(decay="cosine", total_steps=400))


class Stopped(Exception):  # noqa: N818 - no error: the owner's process ends here
    """The owner is gone."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Dropout(0.1)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, CLASSES),
    )


def cut(whole: nn.Module, *, head: bool = True) -> cloister.Cut:
    return cloister.cut(whole, front="0", head="3" if head else None, example=torch.zeros(4, FEATURES))


def seed_everything(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - users' data sets draw from it
    random.seed(number)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (ROWS,), generator=generator)


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from every generator that users draw from."""

    def __init__(self) -> None:
        self.x, self.y = _data()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = np.random.normal() + random.gauss(0, 1) + torch.rand(()).item()  # noqa: NPY002 - as above
        return self.x[index] + noise, self.y[index]


def _plain(workers: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*_data()), BATCH, shuffle=True, num_workers=workers, **options)


#: Each as a user writes it; made anew for each process.
loaders: Final[dict[str, Callable[[], DataLoader[Any]]]] = {
    "plain": _plain,
    "workers": lambda: _plain(2),
    "own generator": lambda: _plain(generator=torch.Generator().manual_seed(8)),
    "uneven": lambda: DataLoader(TensorDataset(*_data()), 10, shuffle=True, generator=torch.Generator().manual_seed(8)),
    "augmented": lambda: DataLoader(Augmented(), BATCH, shuffle=True),
    "augmented in workers": lambda: DataLoader(Augmented(), BATCH, shuffle=True, num_workers=2),
}


@dataclass
class Outcome:
    """What a run came to."""

    losses: dict[int, float]
    weights: dict[str, torch.Tensor] = field(repr=False)
    history: list[dict[str, float]] = field(default_factory=list)


class Watch(cloister.Callback):
    """Notes the losses by step; does something before a step; ends the owner after one."""

    def __init__(self, stop_at: int | None = None, before: Callable[[int], object] = lambda _: None) -> None:
        self.losses: dict[int, float] = {}
        self._stop_at, self._before = stop_at, before

    def on_step_begin(self, state: cloister.TrainState, control: cloister.Control) -> None:  # noqa: ARG002
        self._before(state.global_step)

    def on_step_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.StepEnd) -> None:  # noqa: ARG002
        self.losses[end.step] = end.loss
        if end.step == self._stop_at:
            raise Stopped


def undisturbed(kind: str = "plain", epochs: int = 3, micro_batches: int = 2, *, head: bool = True) -> Outcome:
    """The numbers of the same loop without a node, a cut or an interruption."""
    whole = model()
    trainer = cloister.UnsplitTrainer(
        cut(whole, head=head), optimizer=OPTIMIZER, loss=cloister.Loss(), micro_batches=micro_batches, seed=7
    )
    seed_everything(5)
    losses = trainer.fit(loaders[kind](), epochs)
    return Outcome(dict(enumerate(losses, 1)), whole.state_dict())


def outcome(
    node: Any,
    owner: cloister.Identity,
    plan: cloister.Checkpoints | None,
    *,
    kind: str = "plain",
    epochs: int = 3,
    watch: Watch | None = None,
    resume: bool = False,
    seed: int = 5,
    head: bool = True,
    **options: Any,
) -> Outcome:
    """One process of the run, up to its end or to where ``watch`` stops it."""
    whole = model()
    noted = watch or Watch()
    settings: dict[str, Any] = {"optimizer": OPTIMIZER, "micro_batches": 2, "seed": 7, "reconnect_s": 30.0, **options}
    trainer = cloister.Trainer(
        cut(whole, head=head),
        policy=cloister.CLEAR,
        node=node,
        identity=owner,
        checkpoints=plan,
        callbacks=[noted],
        **settings,
    )
    seed_everything(seed)
    with trainer:
        trainer.fit(loaders[kind](), epochs, resume=resume)
    return Outcome(noted.losses, whole.state_dict(), trainer.state.log_history)


def resumed_as(found: Outcome, expected: Outcome, first: int) -> None:
    """Holds ``found``, whose process began with the step ``first`` or earlier, to the bits of ``expected``."""
    assert set(range(first, len(expected.losses) + 1)) <= found.losses.keys()
    assert found.losses == {step: expected.losses[step] for step in found.losses}
    differing = [name for name, t in expected.weights.items() if not torch.equal(t, found.weights[name])]
    assert not differing
