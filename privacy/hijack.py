"""An alarm for a node that hijacks the front: online, from the labels and the input gradients of each micro-batch.

A front that trains on returned gradients goes where the node pushes it. In the feature-space hijacking attack
(Pasquini, Ateniese and Bernaschi 2021, "Unleashing the Tiger", section 3) the node pushes it until its activations look
like those of a network of the node's own, which the node can invert. Such gradients do not come from the labels: they
push the rows of every class the same way, towards that other network. Honest ones cannot. With p the predicted
probabilities and e_y the label's unit vector, the gradient of cross entropy at the logits is p - e_y. Whatever the
predictions are, where classes are equally large the mean cosine between rows of two classes is at most half of that
between rows of one class. What lies between logits and cut distorts that, and nothing honest that was measured made it
1: small networks with batch-norm that had fitted every row came to 0.7.

So the detector takes, from windows of rows, ``same`` and ``different``: the mean cosines between the gradients of two
rows of one class, and of two classes. It sums ``different - 0.75 * same``, half-way between honest (0.5) and blind to
the labels (1.0), as a CUSUM (Page 1954): the sum never falls below zero, and the alarm sounds where it passes 1. No
single window can bring it further than a quarter where both are near 1, windows without a common direction add next to
nothing, and honest ones take away. Cosines are what it looks at (cf. Fu et al. 2023, "Focusing on Pinocchio's Nose"),
but the *gap* of the two is no measure of its own: honest gaps fall to 0.03 as rows are fitted, and a hijacker with a
Wasserstein critic keeps 0.1.

**It is an alarm, not a protection.** What left before it sounded has left. A node that mixes little of the attack into
honest gradients, aligns means beforehand, or knows the labels and forges their structure, is not found. A frozen front
gives a hijacker nothing to steer.

Shapes: ``B`` rows of a micro-batch, ``N`` rows of a window, ``D`` coordinates looked at.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from wire.errors import CheckpointError, ConfigError, HijackSuspectedError
from wire.state import dump_state, sha256, tensor_digest

__all__ = ["HijackDetector", "HijackEvidence", "HijackSuspectedError", "HijackWindow"]

#: Rows that a window holds, and the most that one micro-batch gives: 496 pairs, some 45 of them of one of ten classes.
WINDOW_ROWS: Final = 32
#: Half-way between what honest gradients reach at the logits (0.5) and gradients that know no labels (1.0).
BLIND_RATIO: Final = 0.75
#: The sum at which the alarm sounds: four windows at least, since none adds more than 0.25.
ALARM: Final = 1.0
#: Until this step every micro-batch is looked at; from it on one in so many, by chance, for as long as the sum is zero.
#: A check takes a step of the smallest networks 5 to 9 % longer; so it is 2 %.
EARLY_STEPS: Final = 100
LATER_ONE_IN: Final = 4
_COORDINATES: Final = 1024  # a cosine over so many is off by 0.03, its mean over the pairs of a window by far less
# Pairs that each mean starts from: same-label ones at 1.0, others at 0.0. A window with few of either then says less.
_PRIOR_PAIRS: Final = 8
_SMALLEST_NORM: Final = 1e-18  # squares of smaller ones leave float32; nothing learns from them either
_KEPT_WINDOWS: Final = 128
_REFUSED: Final = "labels are not one class a row (whole numbers from 0): the alarm has nothing to compare"


@dataclass(frozen=True, slots=True)
class HijackWindow:
    """What one window showed.

    Attributes:
        step: of the micro-batch that filled it.
        rows: in it; ``pairs`` of them share a label.
        same: mean cosine between gradients of one label, drawn to 1 where pairs are few.
        different: of two labels, drawn to 0.
        score: the sum after it.
    """

    step: int
    rows: int
    pairs: int
    same: float
    different: float
    score: float


@dataclass(frozen=True, slots=True)
class HijackEvidence:
    """What the alarm goes by, as plain data.

    Attributes:
        suspected: whether ``score`` passed ``threshold``.
        since_step: where the sum began to rise for the last time; ``None`` while it is zero.
        score, threshold, ratio: the sum, where it sounds, and the ratio that honest gradients stay under.
        windows: the newest ones, oldest first.
        labels: of the newest window's rows [N].
        cosines: between its gradients [N, N], float32.
        digest: SHA-256 (hex) over all of the above.
    """

    suspected: bool
    since_step: int | None
    score: float
    threshold: float
    ratio: float
    windows: tuple[HijackWindow, ...]
    labels: tuple[int, ...]
    cosines: Tensor = field(repr=False)
    digest: str

    def save(self, folder: Path) -> Path:
        """Writes ``hijack.json`` and ``hijack.safetensors`` into ``folder``; returns the first one's path.

        They hold labels and cosines, neither data nor gradients; they are the owner's all the same.

        Raises:
            ConfigError: the folder cannot be written.
        """
        path = folder / "hijack.json"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "hijack.safetensors").write_bytes(dump_state({"cosines": self.cosines}))
            path.write_text(json.dumps(self._plain() | {"digest": self.digest}, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"the evidence cannot be written to {folder}: {error.strerror}") from error
        return path

    def digested(self) -> str:
        """What ``digest`` must be: over the values as canonical JSON, then the cosines."""
        told = json.dumps(self._plain(), sort_keys=True, separators=(",", ":")).encode()
        return sha256(told + tensor_digest(self.cosines)).hex()

    def _plain(self) -> dict[str, object]:
        names = ("suspected", "since_step", "score", "threshold", "ratio", "labels")
        return {name: getattr(self, name) for name in names} | {"windows": [asdict(w) for w in self.windows]}


class HijackDetector:
    """Watches the input gradients of one run.

    Attributes:
        active: whether it can tell anything; ``inactive_because`` says why not.
    """

    def __init__(self, *, seed: int | None = None) -> None:
        """Begins with nothing seen.

        Args:
            seed: of which rows and coordinates are looked at; from the operating system unless given, since a node
                that knew them would behave there alone.
        """
        self.inactive_because = ""
        self._generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self._columns = torch.empty(0, dtype=torch.int64)
        self._width = 0
        self._rows, self._labels = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        self._shown, self._cosines = torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
        self._score, self._since = 0.0, -1
        self._windows: deque[HijackWindow] = deque(maxlen=_KEPT_WINDOWS)

    @property
    def active(self) -> bool:
        """Whether labels are such that gradients can be told apart by them."""
        return not self.inactive_because

    @property
    def suspected(self) -> bool:
        """Whether the alarm has sounded."""
        return self._score > ALARM

    def observe(self, step: int, labels: Tensor, *gradients: Tensor) -> None:
        """Takes one micro-batch, before its gradients move anything.

        Labels of another kind than classes (whole numbers from 0, or 0.0 and 1.0) switch the detector off for good;
        negative ones, which losses ignore, are left out, and so are rows without a gradient.

        Args:
            step: its number.
            labels: one class a row [B].
            gradients: the input gradients [B, ...], one tensor for each that crosses the cut.

        Raises:
            HijackSuspectedError: the gradients steer the front; says what to do.
        """
        if not self.active or not gradients or self._looks_away(step):
            return
        classes = _classes(labels)
        if classes is None:
            self.inactive_because = _REFUSED
            return
        self._gather(classes, gradients)
        if len(self._labels) >= WINDOW_ROWS:
            self._judge(step)

    def evidence(self) -> HijackEvidence:
        """What it goes by so far."""
        bare = HijackEvidence(
            suspected=self.suspected,
            since_step=self._since if self._score else None,
            score=self._score,
            threshold=ALARM,
            ratio=BLIND_RATIO,
            windows=tuple(self._windows),
            labels=tuple(self._shown.tolist()),
            cosines=self._cosines.clone(),
            digest="",
        )
        return replace(bare, digest=bare.digested())

    def state(self) -> dict[str, Tensor]:
        """All that the next window depends on, so that an interrupted run goes on where it was."""
        return {
            "generator": self._generator.get_state(),
            "columns": self._columns,
            "rows": self._rows,
            "labels": self._labels,
            "sum": torch.tensor([self._score, self._since, self._width, not self.active], dtype=torch.float64),
            "windows": torch.tensor([astuple(w) for w in self._windows], dtype=torch.float64).reshape(-1, 6),
            "shown": self._shown,
            "cosines": self._cosines,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state` gave.

        Raises:
            CheckpointError: not a detector's state.
        """
        try:
            score, since, width, off = state["sum"].tolist()
            self._generator.set_state(state["generator"])
            self._columns, self._rows, self._labels = (state[name].clone() for name in ("columns", "rows", "labels"))
            self._shown, self._cosines = state["shown"].clone(), state["cosines"].clone()
            windows = [HijackWindow(int(w[0]), int(w[1]), int(w[2]), *w[3:]) for w in state["windows"].tolist()]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint holds no state of the hijacking alarm ({error!r})") from error
        self._score, self._since, self._width = score, int(since), int(width)
        self._windows = deque(windows, maxlen=_KEPT_WINDOWS)
        self.inactive_because = _REFUSED if off else ""

    def _looks_away(self, step: int) -> bool:
        """Whether this micro-batch is left out: by chance, so that a node cannot tell which ones are watched."""
        if step < EARLY_STEPS or self._score:
            return False
        return bool(torch.randint(LATER_ONE_IN, (1,), generator=self._generator))

    def _gather(self, classes: Tensor, gradients: Sequence[Tensor]) -> None:
        """Adds at most a window's rows of one micro-batch, scaled to length 1."""
        flat = [gradient.detach().flatten(1) for gradient in gradients]
        width = sum(part.shape[1] for part in flat)
        if width != self._width:
            self._look_elsewhere(width)
        picked = (classes >= 0).nonzero().flatten()
        picked = picked[torch.randperm(len(picked), generator=self._generator)[:WINDOW_ROWS]]
        parts, start = [], 0
        for part in flat:
            there = picked.to(part.device)
            if width > _COORDINATES:
                inside = self._columns[(self._columns >= start) & (self._columns < start + part.shape[1])] - start
                looked_at = part[there[:, None], inside.to(part.device)]
            else:
                looked_at = part[there]
            parts.append(looked_at.float().cpu())
            start += part.shape[1]
        rows = torch.cat(parts, dim=1)
        norms = rows.norm(dim=1)
        kept = (norms > _SMALLEST_NORM) & norms.isfinite()
        self._rows = torch.cat([self._rows, rows[kept] / norms[kept, None]])
        self._labels = torch.cat([self._labels, classes[picked][kept]])

    def _look_elsewhere(self, width: int) -> None:
        """Begins a window of rows of another width; wide ones are looked at in some coordinates alone."""
        drawn = torch.randint(width, (_COORDINATES,), generator=self._generator).sort().values
        self._columns, self._width = torch.arange(width) if width <= _COORDINATES else drawn, width
        self._rows, self._labels = torch.empty(0, len(self._columns)), self._labels[:0]

    def _judge(self, step: int) -> None:
        rows, labels = self._rows, self._labels
        self._rows, self._labels = rows[:0], labels[:0]
        cosines = rows @ rows.T
        alike = labels[:, None] == labels
        pairs = (int(alike.sum()) - len(rows)) / 2
        others = len(rows) * (len(rows) - 1) / 2 - pairs
        alike_sum = float((cosines * alike).sum() - len(rows)) / 2
        others_sum = float(cosines.sum() - len(rows)) / 2 - alike_sum
        same = (alike_sum + _PRIOR_PAIRS) / (pairs + _PRIOR_PAIRS)
        different = others_sum / (others + _PRIOR_PAIRS)
        if not self._score:
            self._since = step
        self._score = max(0.0, self._score + different - BLIND_RATIO * same)
        self._shown, self._cosines = labels, cosines
        self._windows.append(HijackWindow(step, len(rows), int(pairs), same, different, self._score))
        if self.suspected:
            raise HijackSuspectedError(self._complaint())

    def _complaint(self) -> str:
        last = self._windows[-1]
        return (
            f"the node may be hijacking the front: since step {self._since}, its gradients push rows of all classes "
            f"the same way (at step {last.step} the mean cosine is {last.different:.2f} between classes, "
            f"{last.same:.2f} within). This step was not applied. Do not go on with this node, nor with this front: "
            "begin again with another node, or freeze the front; see docs/how-to/detect-hijacking.md"
        )


def _classes(labels: Tensor) -> Tensor | None:
    """One class a row, int64 [B] on the CPU, or ``None`` where labels are something else."""
    flat = labels.detach().flatten().cpu()
    if flat.numel() != len(labels):
        return None
    if flat.is_floating_point() and bool(((flat != 0) & (flat != 1)).any()):
        return None
    return None if flat.is_complex() else flat.to(torch.int64)
