"""Batches of any size, through ciphertexts of one size: put together, cut apart, and handed out in order again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from client_side.cutting import Cut
from client_side.inference import clipped
from client_side.steps import Batch, rows_of

__all__ = ["Piece", "handed_out", "put_together", "split_outputs"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one of the caller's batches.

    Attributes:
        rows: how many.
        smashed: what crosses the cut.
        kept: what goes past the middle.
        ends_batch: whether the batch has no rows after these.
    """

    rows: int
    smashed: Batch = field(repr=False)
    kept: Batch = field(repr=False)
    ends_batch: bool


def put_together(
    cut: Cut, batches: Iterable[Batch], *, capacity: int, clip: float | None, device: torch.device
) -> Iterator[list[Piece]]:
    """The batches' smashed data, ``capacity`` rows together at most; each record's clipped, where ``clip`` says so."""
    pieces: list[Piece] = []
    rows = 0
    for piece in _pieces(cut, batches, capacity, clip, device):
        if rows + piece.rows > capacity:
            yield pieces
            pieces, rows = [], 0
        pieces.append(piece)
        rows += piece.rows
    if pieces:
        yield pieces


def split_outputs(pieces: list[Piece], outputs: list[torch.Tensor]) -> Iterator[tuple[Piece, list[torch.Tensor]]]:
    """Each piece with the middle's outputs for its rows."""
    counts = [piece.rows for piece in pieces]
    parts = zip(*(torch.split(output, counts) for output in outputs), strict=True)
    return ((piece, list(made)) for piece, made in zip(pieces, parts, strict=True))


def handed_out(cut: Cut, finished: Iterable[tuple[Piece, list[torch.Tensor]]]) -> Iterator[torch.Tensor]:
    """Whole batches' outputs of the model, from pieces that are through the middle, in order."""
    gathered: list[torch.Tensor] = []
    for piece, made in finished:
        gathered.append(made[0] if cut.head is None else cut.head(*made, *piece.kept))
        if piece.ends_batch:
            yield torch.cat(gathered) if len(gathered) > 1 else gathered[0]
            gathered = []


def _pieces(
    cut: Cut, batches: Iterable[Batch], capacity: int, clip: float | None, device: torch.device
) -> Iterator[Piece]:
    for inputs in batches:
        rows = len(inputs[0])
        slices = list(zip(*(torch.split(x, rows_of(rows, -(-rows // capacity))) for x in inputs), strict=True))
        for number, part in enumerate(slices):
            up, kept = cut.split_outputs(cut.front(*(x.to(device) for x in part)))
            if clip is not None:
                up = tuple(clipped(tensor, clip) for tensor in up)
            yield Piece(len(part[0]), up, kept, ends_batch=number == len(slices) - 1)
