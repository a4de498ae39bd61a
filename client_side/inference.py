"""The whole model in evaluation mode: front here, middle on the node, head here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from client_side.answers import Answers
from client_side.cutting import Cut
from client_side.link import Query
from client_side.route import SessionLink
from client_side.steps import Batch, rows_of
from privacy.guard import Guard

__all__ = ["clipped", "evaluation_mode", "infer"]

_LEAST_NORM: Final = 1e-30


@dataclass(frozen=True, slots=True)
class _Sent:
    """A slice on its way: what stays for the head, and whether the batch ends with it."""

    kept: Batch
    rows: int
    ends_batch: bool


def clipped(smashed: torch.Tensor, clip: float) -> torch.Tensor:
    """Each row scaled down to that L2 norm, where it is longer: as a model was trained whose policy clips."""
    flat = smashed.flatten(1)
    norms = flat.norm(dim=1, keepdim=True).clamp_min(_LEAST_NORM)
    made: torch.Tensor = flat * (clip / norms * (1 - 2**-20)).clamp_max(1.0)
    return made.reshape(smashed.shape)


@contextmanager
def evaluation_mode(cut: Cut) -> Iterator[None]:
    """Front and head in evaluation mode and without gradients; their own modes again afterwards."""
    parts = [part for part in (cut.front, cut.head) if part is not None]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def infer(
    cut: Cut, link: SessionLink, guard: Guard, batches: Iterable[Batch], *, max_rows: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """The model's output for each of ``batches``, in order; several are under way at a time.

    A batch of more than ``max_rows`` rows, which the session was opened for, goes in slices. Call it inside
    :func:`evaluation_mode`.
    """
    sent: deque[_Sent] = deque()
    answers = Answers(cut.program, device)

    def smashed() -> Iterator[Query]:
        for inputs in batches:
            rows = len(inputs[0])
            count = -(-rows // max_rows)
            slices = list(zip(*(torch.split(x, rows_of(rows, count)) for x in inputs), strict=True))
            for number, part in enumerate(slices):
                up, kept = cut.split_outputs(cut.front(*(x.to(device) for x in part)))
                sent.append(_Sent(kept, len(part[0]), ends_batch=number == len(slices) - 1))
                yield Query(guard.inference(up))

    gathered: list[torch.Tensor] = []
    for answer in link.infer(smashed()):
        part = sent.popleft()
        made = answers.outputs(answer.tensors, part.rows, training=False)
        gathered.append(made[0] if cut.head is None else cut.head(*made, *part.kept))
        if part.ends_batch:
            yield torch.cat(gathered) if len(gathered) > 1 else gathered[0]
            gathered = []
