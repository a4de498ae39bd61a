"""A loader's records: what they are called in the ledger, and what a frozen front makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from client_side.cutting import Cut
from client_side.disk import disk_errors, write_whole
from client_side.inference import evaluation_mode
from client_side.sampling import SeededSampler
from privacy.tables import Records, ReleasedTable
from wire.errors import CheckpointError, ConfigError, StateRejectedError
from wire.state import load_state, tensor_digest

__all__ = ["collect", "data_set_of", "load_table", "repeats_no_record", "save_table", "table_loader"]

_TABLE: Final = "released.safetensors"
_BATCH: Final = 256


def data_set_of(loader: object, *, read: bool) -> str | None:
    """``sha256:…`` over the records that ``loader`` reads, in the data set's own order.

    Args:
        loader: a ``DataLoader``.
        read: whether a data set may be read through for that; tensors in memory are hashed in any case.

    Returns:
        ``None`` where that cannot be told: the data set has no order, or would have to be read.
    """
    data = getattr(loader, "dataset", None)
    digest = hashlib.sha256()
    if isinstance(data, TensorDataset):
        for tensor in data.tensors:
            digest.update(tensor_digest(tensor))
    elif read and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        for batch in _in_order(loader):
            for tensor in batch:
                digest.update(tensor_digest(tensor))
    else:
        return None
    return f"sha256:{digest.hexdigest()}"


def repeats_no_record(loader: object) -> bool:
    """Whether each record comes at most once in each pass, as far as torch's own samplers say."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return isinstance(sampler, SequentialSampler | SeededSampler)


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


def save_table(folder: Path, table: ReleasedTable) -> None:
    """Keeps a table with its run: it was paid for.

    Raises:
        CheckpointError: the disk is full, or fails.
    """
    tensors = {"rows": table.rows} | ({} if table.labels is None else {"labels": table.labels})
    write_whole(folder / _TABLE, safetensors.torch.save(tensors))


def load_table(folder: Path) -> ReleasedTable:
    """The table that the run in ``folder`` released.

    Raises:
        CheckpointError: it is damaged, or gone.
    """
    path = folder / _TABLE
    with disk_errors(path):
        data = path.read_bytes()
    try:
        tensors = load_state(data)
        return ReleasedTable(tensors["rows"], tensors.get("labels"))
    except (StateRejectedError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: start a new run; what was spent stays spent") from error


def _in_order(loader: Any) -> Iterator[Sequence[torch.Tensor]]:  # noqa: ANN401 - a DataLoader, whatever its types
    """The data set's batches in its own order; draws from no generator but one of its own."""
    yield from DataLoader(
        loader.dataset,
        batch_size=getattr(loader, "batch_size", None) or _BATCH,
        collate_fn=getattr(loader, "collate_fn", None),
        generator=torch.Generator().manual_seed(0),
    )
