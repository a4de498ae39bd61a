"""A training run's folder, its end by Ctrl-C, and its remarks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self, TextIO

from client_side.callbacks import Callback, Control, EpochEnd, StepEnd, TrainState
from cloister.jobfile import to_json
from cloister.jobs import Job
from cloister.progress import ProgressDisplay
from cloister.weights import write_whole
from wire.errors import ConfigError

__all__ = [
    "CARD_FILE",
    "JOB_FILE",
    "METRICS_FILE",
    "MODEL_FILE",
    "PROVENANCE",
    "RESULT_FILE",
    "RESULT_FILES",
    "Interruption",
    "RunFolder",
    "last_step",
    "remarks",
    "state_of",
    "steps_so_far",
]

MODEL_FILE: Final = "model.safetensors"
RESULT_FILE: Final = "result.json"
JOB_FILE: Final = "job.json"
METRICS_FILE: Final = "metrics.jsonl"
CARD_FILE: Final = "model-card.md"
PROVENANCE: Final = "provenance"
RESULT_FILES: Final = (RESULT_FILE, CARD_FILE, MODEL_FILE)  # what a run's end leaves
_TAIL_BYTES: Final = 4096  # some lines of metrics


class RunFolder(Callback):
    """``output.dir``: a line of metrics a step; in the end the model and the result.

    ``result.json`` comes last: where it stands, the run is whole. In ``state`` is what it takes to resume one that is
    not; see :mod:`client_side.durability`.
    """

    def __init__(self, job: Job, *, force: bool, resume: bool = False) -> None:
        """Checks that the folder can be written and holds no other run; nothing is changed before the first step.

        Raises:
            ConfigError: it holds a run, and neither ``force`` nor ``resume`` is given; another run is writing to it; it
                cannot be written.
        """
        self._resume = resume
        self._job, self.path = job, job.output.dir.expanduser()
        self._metrics: TextIO | None = None
        self._rows, self._seconds = 0, 0.0
        self._first = (0, 0.0)
        old = [name for name in (*RESULT_FILES, METRICS_FILE, JOB_FILE) if (self.path / name).exists()]
        if old and not force and not resume:
            raise ConfigError(
                f"{self.path} holds a run already ({', '.join(old)}): go on with it by `cloister train --resume "
                f"{self.path}`, or give --out FOLDER, or --force"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; give --out FOLDER") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"another run is writing to {self.path}: wait for it, or give --out FOLDER") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            self.close()
            raise ConfigError(f"cannot write to {self.path}: it is not yours to write; give --out FOLDER")
        self._force = force

    @property
    def state(self) -> Path:
        """Where the run's checkpoints are."""
        return state_of(self.path)

    def begin(self) -> None:
        """Writes the job down, from when on the run can be resumed; what ``--force`` replaces goes.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            if self._force:
                shutil.rmtree(self.state, ignore_errors=True)
                (self.path / METRICS_FILE).unlink(missing_ok=True)
            for partial in self.path.glob(".*.partial"):  # what a killed process left half-written
                partial.unlink()
            # Of the run that is replaced, or of this one before it was resumed.
            for name in RESULT_FILES:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / PROVENANCE, ignore_errors=True)
            write_whole(self.path / JOB_FILE, (to_json(self._job) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; give --out FOLDER") from error

    def on_train_begin(self, state: TrainState, control: Control) -> None:
        """Keeps the lines of the steps that count; those after the checkpoint are computed, and written, again."""
        del control
        file = self.path / METRICS_FILE
        kept = steps_so_far(file, state.global_step) if self._resume else []
        try:
            write_whole(file, "".join(line + "\n" for line in kept).encode())
            # Line by line, so that `tail -f` shows a run at work.
            self._metrics = file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; give --out FOLDER") from error

    def __enter__(self) -> Self:
        """The folder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Lets others write to the folder."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # the disk is full, as was said when the line was written
                self._metrics.close()
        else:
            with contextlib.suppress(OSError):  # not empty, or not ours to remove: somebody else's
                self.path.rmdir()  # a run that never began leaves nothing
        os.close(self._lock)

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        """One line."""
        del control
        if not self._first[0]:
            self._first = (end.rows, end.seconds)
        optimizer = self._job.optimizer.recipe()
        line = {
            "step": end.step,
            "epoch": state.epoch + 1,
            "loss": end.loss if math.isfinite(end.loss) else None,
            "lr": optimizer.lr * optimizer.schedule.factor(end.step - 1),
            "rows": end.rows,
            "seconds": round(end.seconds, 6),
            "node_seconds": round(end.node_s, 6),
            "bytes_up": end.traffic.up,
            "bytes_down": end.traffic.down,
            "reconnects": end.traffic.reconnects,
        }
        self._write(json.dumps(line) + "\n")

    def on_epoch_end(self, state: TrainState, control: Control, end: EpochEnd) -> None:
        """Counts."""
        del state, control
        self._rows += end.rows
        self._seconds += end.seconds

    @property
    def samples_per_second(self) -> float | None:
        """While training; the first step, which opens the session, does not count."""
        rows, seconds = self._rows - self._first[0], self._seconds - self._first[1]
        return rows / seconds if rows and seconds else None

    def finish(self, result: dict[str, Any], card: str) -> None:
        """Writes the model's card and the result: the run is whole."""
        write_whole(self.path / CARD_FILE, card.encode())
        write_whole(self.path / RESULT_FILE, (json.dumps(result, indent=2, default=str) + "\n").encode())

    def _write(self, line: str) -> None:
        try:
            if self._metrics is not None:
                self._metrics.write(line)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path / METRICS_FILE}: {error.strerror}") from error


def state_of(folder: Path) -> Path:
    """Where a run's folder keeps its checkpoints."""
    return folder / "state"


def steps_so_far(file: Path, step: int) -> list[str]:
    """The lines of metrics of the first ``step`` steps; what a killed process left half-written is no line."""
    kept: list[str] = []
    with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                number = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith("\n") or number != len(kept) + 1 or number > step:
                break
            kept.append(line.rstrip("\n"))
    return kept


def last_step(file: Path) -> tuple[int, int, float | None]:
    """The last whole line of metrics: its step, epoch and loss; zeros before the first."""
    found: tuple[int, int, float | None] = (0, 0, None)
    with contextlib.suppress(FileNotFoundError), file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                read = json.loads(line)
                found = int(read["step"]), int(read["epoch"]), read["loss"]
    return found


class Interruption(Callback):
    """The first Ctrl-C (or SIGTERM) ends the run after the step at hand; the second stops at once."""

    def __init__(self, display: ProgressDisplay) -> None:
        """Takes the display that says so."""
        self._display = display
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """From here on, signals are heard."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Signals do what they did before."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        """Ends the run, if that was asked for."""
        del state, end
        control.should_training_stop |= self.requested

    def _heard(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._display.notify("finishing this step, then writing a checkpoint; Ctrl-C again stops at once")


@contextlib.contextmanager
def remarks(display: ProgressDisplay) -> Iterator[None]:
    """Inside, warnings of this process (a link that broke) are shown among the display's lines."""
    handler = _Remarks(display)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Remarks(logging.Handler):
    def __init__(self, display: ProgressDisplay) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(f"{record.levelname.lower()}: {record.getMessage()}")
