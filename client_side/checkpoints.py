"""The owner's part of a run at a step boundary, as one file of safetensors that says itself whether it is whole.

A checkpoint holds front, head, their optimizers and every random generator; the middle's snapshot of the same step is
named by its digests. The file's name carries its step and the SHA-256 of its bytes, so a torn, truncated or altered one
is recognised without asking anything else, and passed over for the one before it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch

from client_side.disk import disk_errors, write_whole
from client_side.snapshots import Snapshot
from privacy.ledger import Position
from wire.errors import CheckpointError, StateRejectedError
from wire.state import load_state, sha256

__all__ = [
    "CHECKPOINT_VERSION",
    "Checkpoint",
    "CheckpointFile",
    "check_same_run",
    "list_checkpoints",
    "write_checkpoint",
]

_log = logging.getLogger(__name__)

CHECKPOINT_VERSION: Final = 2
_NAME: Final = re.compile(r"step-(\d{12})\.([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A step boundary.

    Attributes:
        step: steps finished.
        epoch: epochs finished.
        batch: batches of the next epoch that are done.
        over: the loader was found to have no more of them, and may have drawn from its generator for that.
        loss_sum: of these batches, each loss times its rows.
        rows: of these batches.
        log_history: see :class:`TrainState`.
        run: what makes it this run and no other, as plain data by names that people read.
        snapshot: the middle at the same step.
        store: the URL that holds it; empty for the run's own folder, wherever that has been carried.
        ledger: the privacy ledger's position: it must hold that entry when the run is resumed.
        tensors: ``front/…``, ``head/…``, ``optimizer/0/…``, ``now/…`` and ``epoch/…`` (random generators).
    """

    step: int
    epoch: int
    batch: int
    over: bool
    loss_sum: float
    rows: int
    log_history: list[dict[str, float]]
    run: Mapping[str, Any]
    snapshot: Snapshot
    store: str
    ledger: Position | None
    tensors: Mapping[str, torch.Tensor] = field(repr=False)

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under ``prefix``, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint on disk, by its name."""

    path: Path
    step: int
    sha256: bytes

    def read(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            CheckpointError: gone, damaged, or written by another version.
        """
        return self.parse(self.data())

    def data(self) -> bytes:
        """Its bytes, whole.

        Raises:
            CheckpointError: gone, or damaged.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        if sha256(data) != self.sha256:
            raise CheckpointError(f"{self.path} is damaged: its bytes do not hash to its name")
        return data

    def parse(self, data: bytes) -> Checkpoint:
        """The checkpoint that whole bytes hold: what is wrong with them now was so when they were written.

        Raises:
            CheckpointError: written by another version, or by something else.
        """
        try:
            tensors = load_state(data)
            fields = json.loads(_metadata(data)["cloister"])
            version = fields["version"]
            if version != CHECKPOINT_VERSION:
                raise CheckpointError(
                    f"{self.path} has version {version} of the format, and this Cloister reads {CHECKPOINT_VERSION}: "
                    "resume with the Cloister that wrote it"
                )
            return Checkpoint(
                step=int(fields["step"]),
                epoch=int(fields["epoch"]),
                batch=int(fields["batch"]),
                over=bool(fields["over"]),
                loss_sum=float(fields["loss_sum"]),
                rows=int(fields["rows"]),
                log_history=[{str(k): float(v) for k, v in entry.items()} for entry in fields["log_history"]],
                run=dict(fields["run"]),
                snapshot=Snapshot.from_json(fields["snapshot"]),
                store=str(fields["store"]),
                ledger=_position(fields["ledger"]),
                tensors=tensors,
            )
        except (StateRejectedError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is no checkpoint of ours ({type(error).__name__}: {error})") from error

    def remove(self) -> None:
        """Deletes it.

        Raises:
            CheckpointError: the disk fails.
        """
        with disk_errors(self.path.parent):
            self.path.unlink(missing_ok=True)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> CheckpointFile:
    """Writes it, durably and whole.

    Raises:
        CheckpointError: the disk is full, or fails.
    """
    fields = {
        "version": CHECKPOINT_VERSION,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "batch": checkpoint.batch,
        "over": checkpoint.over,
        "loss_sum": checkpoint.loss_sum,
        "rows": checkpoint.rows,
        "log_history": checkpoint.log_history,
        "run": checkpoint.run,
        "snapshot": checkpoint.snapshot.to_json(),
        "store": checkpoint.store,
        "ledger": checkpoint.ledger
        and {
            "number": checkpoint.ledger.number,
            "digest": checkpoint.ledger.digest.hex(),
        },
    }
    data = safetensors.torch.save(dict(checkpoint.tensors), {"cloister": json.dumps(fields)})
    digest = sha256(data)
    file = CheckpointFile(folder / f"step-{checkpoint.step:012d}.{digest.hex()}.safetensors", checkpoint.step, digest)
    write_whole(file.path, data)
    return file


def list_checkpoints(folder: Path, *, tidy: bool = False) -> list[CheckpointFile]:
    """What stands in ``folder``, the newest first; to ``tidy`` removes what was left half-written."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                found.append(CheckpointFile(path, int(match.group(1)), bytes.fromhex(match.group(2))))
            elif tidy and path.name.endswith(".partial"):
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda file: (-file.step, file.path.name))


def check_same_run(checkpoint: Checkpoint, run: Mapping[str, Any]) -> None:
    """Refuses to go on with a checkpoint of something else.

    Raises:
        CheckpointError: naming what differs, and how.
    """
    differences = [
        f"{name} was {_short(before)} and is {_short(now)}" for name, before, now in _differences(checkpoint.run, run)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} belongs to another run: {'; '.join(differences)}. Take back the "
            "change, or start a new run in another folder"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in [*before, *(n for n in now if n not in before)]:
        one, other = before.get(name), now.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from ((f"{name}.{inner}", a, b) for inner, a, b in _differences(one, other))
        else:
            yield name, one, other


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"  # noqa: PLR2004 - a line's share


def _position(told: Any) -> Position | None:  # noqa: ANN401 - as JSON gives it
    return None if told is None else Position(int(told["number"]), bytes.fromhex(told["digest"]))


def _metadata(data: bytes) -> dict[str, str]:
    """The header's entry: safetensors itself gives metadata only of files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found: dict[str, str] = header["__metadata__"]
    return found
