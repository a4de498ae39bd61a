"""An order of samples that is a function of the seed and the epoch, and can be entered anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, Final

import torch
from torch.utils.data import Sampler, TensorDataset, default_collate

from privacy.mechanisms import Noise
from wire.errors import ConfigError
from wire.recipe import stream_seed

__all__ = ["PoissonLoader", "SeededSampler"]

_LEAST_EXPECTED: Final = 32  # an empty batch then comes once in 10¹⁴
_DEVIATIONS: Final = 8.0  # that a batch may exceed what is expected: once in 10¹⁵


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


class PoissonLoader:
    """Batches that each record joins by itself, with the same probability, and nobody can tell which did.

    What differential privacy by sampling rests on. The draws come from the operating system's generator, never from a
    seed, so that a run that is resumed draws anew (and pays anew); the number of batches in a pass is fixed, and their
    sizes vary.

    Example::

        loader = cloister.PoissonLoader(dataset, expected=1024)

    Attributes:
        dataset: the records.
        rate: the probability.
        expected: rows of a batch, on average.
        capacity: rows that no batch exceeds, but for once in 10¹⁵.
    """

    def __init__(self, dataset: Any, *, expected: int) -> None:  # noqa: ANN401 - a map-style data set, whatever its types
        """Over ``dataset``, which has a length.

        Raises:
            ConfigError: fewer than 32 rows are expected, or more than there are.
        """
        if not isinstance(dataset, Sized) or not _LEAST_EXPECTED <= expected <= len(dataset):
            raise ConfigError(f"PoissonLoader: expected = {expected}; at least {_LEAST_EXPECTED}, at most all records")
        self.dataset: Any = dataset
        self.expected = expected
        self._count = len(dataset)
        self.rate = expected / self._count
        spread = math.sqrt(expected * (1 - self.rate))
        self.capacity = min(self._count, expected + math.ceil(_DEVIATIONS * spread))
        self._noise = Noise()

    def __len__(self) -> int:
        """Batches of one pass."""
        return max(1, round(1 / self.rate))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """One pass."""
        for _ in range(len(self)):
            chosen = torch.nonzero(self._noise.uniform([self._count]) < self.rate).flatten()
            if isinstance(self.dataset, TensorDataset):
                yield tuple(tensor[chosen] for tensor in self.dataset.tensors)
            else:
                records = [self.dataset[i] for i in chosen.tolist()]
                yield tuple(default_collate(records))
