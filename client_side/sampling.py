"""An order of samples that is a function of the seed and the epoch, and can be entered anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

from wire.recipe import stream_seed

__all__ = ["SeededSampler"]


class SeededSampler(Sampler[int]):
    """Shuffles each epoch by ``seed`` and the epoch's number alone, whatever else draws random numbers.

    A run that resumes within an epoch enters the order where it stood, and reads none of the samples before. With any
    other sampler it reads them again, which is also right where samples are drawn at random as they are read (random
    augmentation): there, use a plain ``DataLoader(…, shuffle=True)``.

    Example::

        loader = DataLoader(dataset, batch_size=64, sampler=cloister.SeededSampler(dataset, seed=1))
    """

    def __init__(self, dataset: Sized, *, seed: int = 0) -> None:
        """Takes ``len(dataset)`` alone."""
        super().__init__()
        self._dataset, self._seed = dataset, seed
        self._epoch = self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of which epoch comes next; the trainer calls it."""
        self._epoch = epoch

    def start_at(self, sample: int) -> None:
        """The next pass begins so many samples into the order; the trainer calls it where a run resumes."""
        self._start = sample

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        generator = torch.Generator().manual_seed(stream_seed(self._seed, "sampler", self._epoch))
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        start, self._start = self._start, 0
        return iter(order[start:])

    def __len__(self) -> int:
        """Of the whole epoch."""
        return len(self._dataset)
