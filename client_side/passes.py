"""One pass over a loader, entered where an interrupted run left it.

The batches before that place are taken from the loader again, with every random generator where it stood when the pass
began; so whatever the loader draws comes out as it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch

from client_side import randomness
from client_side.checkpoints import Checkpoint
from client_side.sampling import SeededSampler
from wire.errors import CheckpointError, ConfigError

__all__ = ["Loader", "Pass", "refuse_persistent_workers"]

Loader: TypeAlias = Iterable[Sequence[torch.Tensor]]


class Pass:
    """One epoch's way through a loader.

    Attributes:
        begin: the random generators at its beginning, where a run is kept.
        over: whether the loader has no more batches.
    """

    def __init__(self) -> None:
        self.begin: dict[str, torch.Tensor] = {}
        self.over = False

    def batches(
        self, loader: Loader, epoch: int, *, done: int = 0, resumed: Checkpoint | None = None, kept: bool = False
    ) -> Iterator[Sequence[torch.Tensor]]:
        """The batches that are left after the first ``done``.

        Args:
            loader: the whole epoch's.
            epoch: its number, from 0: for loaders and samplers with ``set_epoch``, as torch's ``DistributedSampler``.
            done: batches that the run has trained on.
            resumed: the checkpoint that the run goes on from.
            kept: whether checkpoints will be taken in this pass.

        Raises:
            CheckpointError: the loader yields other data than it did.
        """
        for holder in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            if callable(set_epoch := getattr(holder, "set_epoch", None)):
                set_epoch(epoch)
        if resumed is not None:
            randomness.restore(resumed.part("epoch/"), loader)
        self.begin = randomness.capture(loader) if kept else {}
        self.over = False
        iterator = _entered(loader, done)
        if resumed is None:
            return iterator
        if resumed.over and next(iterator, None) is not None:
            raise CheckpointError(
                f"the loader goes on after {done} batches, and the run's epoch ended there: it yields other data than "
                "before"
            )
        randomness.restore(resumed.part("now/"), loader)
        return iter(()) if resumed.over else iterator

    def tensors(self, loader: Loader) -> dict[str, torch.Tensor]:
        """What a checkpoint needs to come back here."""
        found = {f"epoch/{name}": tensor for name, tensor in self.begin.items()}
        return found | {f"now/{name}": tensor for name, tensor in randomness.capture(loader).items()}


def refuse_persistent_workers(loader: Loader) -> None:
    """Raises: ConfigError where the second epoch depends on what workers drew in the first."""
    if getattr(loader, "persistent_workers", False):
        raise ConfigError(
            "the loader has persistent_workers=True, whose random generators cannot be restored: leave it out, and "
            "each epoch's workers begin with a seed of their own"
        )


def _entered(loader: Loader, done: int) -> Iterator[Sequence[torch.Tensor]]:
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if isinstance(sampler, SeededSampler) and isinstance(size, int):
        sampler.start_at(done * size)
        return iter(loader)
    iterator = iter(loader)
    for number in range(done):
        if next(iterator, None) is None:
            raise CheckpointError(
                f"the loader ends after {number} batches, and the run had done {done} of this epoch: it yields other "
                "data than before"
            )
    return iterator
