"""A loader's records: what they are called in the ledger, and what a frozen front makes of them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import safetensors.torch
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from client_side.cutting import Cut
from client_side.disk import disk_errors, write_whole
from client_side.inference import evaluation_mode
from client_side.sampling import PoissonLoader, SeededSampler
from privacy.tables import Records, ReleasedTable
from wire.errors import CheckpointError, ConfigError, StateRejectedError
from wire.state import load_state

__all__ = [
    "by_chance",
    "collect",
    "data_set_of",
    "labels_of",
    "load_released",
    "mixing",
    "numbered",
    "repeats_no_record",
    "save_released",
    "table_loader",
]

_RELEASED: Final = "released.safetensors"
_BATCH: Final = 256


def data_set_of(loader: object, *, read: bool) -> str | None:
    """``sha256:…`` over the records that ``loader`` reads, in the data set's own order; the batches do not matter.

    Args:
        loader: a ``DataLoader``.
        read: whether a data set may be read through for that; tensors in memory are hashed in any case.

    Returns:
        ``None`` where that cannot be told: the data set has no order, or would have to be read.

    Raises:
        ConfigError: its records are not alike, so that no digest goes without the batches.
    """
    data = getattr(loader, "dataset", None)
    if isinstance(data, TensorDataset):
        batches: Iterable[Sequence[torch.Tensor]] = [data.tensors]
    elif read and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        batches = _in_order(loader)
    else:
        return None
    columns: dict[tuple[int, torch.dtype, torch.Size], Any] = {}
    for batch in batches:
        for number, tensor in enumerate(batch):
            digest = columns.setdefault((number, tensor.dtype, tensor.shape[1:]), hashlib.sha256())
            digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    if len({number for number, *_ in columns}) != len(columns):
        raise ConfigError('privacy: the records are not of one shape and dtype: name the data set (data_set = "…")')
    whole = hashlib.sha256()
    for (number, dtype, shape), digest in columns.items():
        whole.update(f"{number} {dtype} {list(shape)} {digest.hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def repeats_no_record(loader: object) -> bool:
    """Whether each record comes at most once in each pass, as far as torch's own samplers say."""
    batches, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    if type(batches) is not BatchSampler or batches.sampler is not sampler:  # which a batch_sampler= goes past
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return type(sampler) in {SequentialSampler, SeededSampler}


def by_chance(loader: object) -> PoissonLoader:
    """Secret Poisson samples of what ``loader`` reads, as large as its batches on average.

    Raises:
        ConfigError: it is no plain ``DataLoader`` over a data set with a length, or its batches are too small.
    """
    if isinstance(loader, PoissonLoader):
        return loader
    plain = isinstance(loader, DataLoader) and loader.collate_fn is default_collate and repeats_no_record(loader)
    if not plain or not isinstance(loader, DataLoader) or loader.batch_size is None:
        raise ConfigError(
            "ckks with noise trains on secret Poisson samples, which are drawn in place of batches: return a plain "
            "DataLoader (its batch_size becomes the expected one), or a cloister.PoissonLoader"
        )
    return PoissonLoader(loader.dataset, expected=min(loader.batch_size, len(loader.dataset)))  # type: ignore[arg-type]  # a sampler went over it


def mixing(cut: Cut, loader: object, *, training: bool) -> str:
    """Why one record's activation, or what the front remembers, depends on other records; empty where it does not.

    The first records are passed through a copy of the front twice: as they are, and with all but the first replaced.

    Args:
        cut: its front is tried, and its head looked over.
        loader: of the records.
        training: whether the front runs in training mode, as it does where activations are released anew.
    """
    mixers = [name for name, part in cut.head.named_modules() if isinstance(part, _BatchNorm)] if cut.head else []
    if training and mixers:
        return f"the head's {mixers[0] or 'batch-norm'} mixes the records of a batch: take GroupNorm"
    *inputs, _ = next(iter(_in_order(loader) if hasattr(loader, "dataset") else cast("Iterable[Any]", loader)))
    if len(inputs[0]) < 2:  # noqa: PLR2004 - one record mixes with none
        return ""
    device = next((p.device for p in cut.owner_parameters()), torch.device("cpu"))
    here = [x.to(device) for x in inputs]
    (first, left), (other, right) = (
        _passed(cut, made, training=training) for made in (here, [x[:1].expand_as(x).contiguous() for x in here])
    )
    same = all(
        torch.allclose(a[0], b[0], rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in zip(first, other, strict=True)
    )
    if same and all(torch.equal(left[name], right[name]) for name in left):
        return ""
    return "the front mixes the records of a batch (batch-norm?): take GroupNorm, or cloister.frozen(front)"


def _passed(
    cut: Cut, inputs: Sequence[torch.Tensor], *, training: bool
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """What a copy of the front makes of ``inputs``, and its buffers afterwards."""
    front = copy.deepcopy(cut.front).train(training)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        smashed, _ = cut.split_outputs(front(*inputs))
    return tuple(smashed), dict(front.named_buffers())


def collect(cut: Cut, loader: object, units: torch.Tensor | None) -> Records:
    """Each record's activation, as the front makes it in evaluation mode, in the data set's order.

    Raises:
        ConfigError: the loader has no data set with an order, or the cut no single tensor to release.
    """
    if not hasattr(getattr(loader, "dataset", None), "__len__"):
        raise ConfigError("privacy: this treatment reads the records in order: give a DataLoader over a data set")
    made: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    device = next((p.device for p in cut.owner_parameters()), torch.device("cpu"))
    with evaluation_mode(cut):
        for *inputs, label in _in_order(loader):
            smashed, kept = cut.split_outputs(cut.front(*(x.to(device) for x in inputs)))
            if len(smashed) != 1 or kept:
                raise ConfigError(
                    "privacy: this treatment takes a cut that one tensor crosses, and none that goes past the middle; "
                    "`cloister inspect` shows what crosses where"
                )
            made.append(smashed[0].cpu())
            labels.append(label.cpu())
    if not made:
        raise ConfigError("privacy: the loader's data set is empty")
    return Records(torch.cat(made), torch.cat(labels), units)


def table_loader(table: ReleasedTable, loader: object, seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of (indices, labels) of a released table, shuffled by ``seed``, as large as those of ``loader``."""
    count = len(table.rows)
    labels = torch.zeros(count, dtype=torch.int64) if table.labels is None else table.labels
    data = TensorDataset(torch.arange(count), labels)
    return DataLoader(
        data, batch_size=getattr(loader, "batch_size", None) or _BATCH, sampler=SeededSampler(data, seed=seed)
    )


class _Numbered(Dataset[tuple[Any, ...]]):
    """The records of another data set, each with its number in place of its label."""

    def __init__(self, data: Any) -> None:  # noqa: ANN401 - a map-style data set, whatever its types
        self._data = data

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        *inputs, label = self._data[number]
        return (*inputs, torch.tensor(number) if isinstance(label, torch.Tensor) else number)

    def __len__(self) -> int:
        return len(self._data)


def numbered(loader: Any) -> DataLoader[tuple[Any, ...]]:  # noqa: ANN401 - a DataLoader, whatever its types
    """``loader``, with each record's number in the data set's order in place of its label.

    Raises:
        ConfigError: it is not one of torch's own, or has a ``batch_sampler``.
    """
    batches = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or type(batches) is not BatchSampler or batches.sampler is not loader.sampler:
        raise ConfigError(
            "privacy: labels that are randomized once are told apart by their records: give a DataLoader over a data "
            "set that can be read in order, without a batch_sampler"
        )
    return DataLoader(
        _Numbered(loader.dataset),
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def labels_of(loader: object) -> torch.Tensor:
    """Each record's label, in the data set's order; reads all of it."""
    return torch.cat([batch[-1].cpu() for batch in _in_order(loader)])


def save_released(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keeps with a run what it released once: it was paid for.

    Raises:
        CheckpointError: the disk is full, or fails.
    """
    write_whole(folder / _RELEASED, safetensors.torch.save(dict(tensors)))


def load_released(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What the run in ``folder`` released once; ``name`` is among it.

    Raises:
        CheckpointError: it is damaged, or gone.
    """
    path = folder / _RELEASED
    with disk_errors(path):
        data = path.read_bytes()
    with contextlib.suppress(StateRejectedError):
        tensors = load_state(data)
        if name in tensors:
            return tensors
    raise CheckpointError(f"{path} is damaged: start a new run; what was spent stays spent")


def _in_order(loader: Any) -> Iterator[Sequence[torch.Tensor]]:  # noqa: ANN401 - a DataLoader, whatever its types
    """The data set's batches in its own order; draws from no generator but one of its own."""
    yield from DataLoader(
        loader.dataset,
        batch_size=getattr(loader, "batch_size", None) or _BATCH,
        collate_fn=getattr(loader, "collate_fn", None),
        generator=torch.Generator().manual_seed(0),
    )
