"""A training run's folder, its end by Ctrl-C, and its remarks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Final, Self, TextIO

from client_side.callbacks import Callback, Control, EpochEnd, StepEnd, TrainState
from cloister.jobfile import to_json
from cloister.jobs import Job
from cloister.progress import ProgressDisplay
from cloister.weights import write_whole
from wire.errors import ConfigError

__all__ = ["MODEL_FILE", "Interruption", "RunFolder", "remarks"]

MODEL_FILE: Final = "model.safetensors"
RESULT_FILE: Final = "result.json"
_JOB_FILE: Final = "job.json"
_METRICS_FILE: Final = "metrics.jsonl"


class RunFolder(Callback):
    """``output.dir``: a line of metrics a step; in the end the model and the result.

    ``result.json`` comes last: where it stands, the run is whole.
    """

    def __init__(self, job: Job, *, force: bool) -> None:
        """Checks that the folder can be written and holds no other run; nothing is changed before the first step.

        Raises:
            ConfigError: it holds a run, and ``force`` is not given; another run is writing to it; it cannot be written.
        """
        self._job, self.path = job, job.output.dir.expanduser()
        self._metrics: TextIO | None = None
        self._rows, self._seconds = 0, 0.0
        self._first = (0, 0.0)
        old = [name for name in (RESULT_FILE, MODEL_FILE, _METRICS_FILE, _JOB_FILE) if (self.path / name).exists()]
        if old and not force:
            raise ConfigError(f"{self.path} holds a run already ({', '.join(old)}): give --out FOLDER, or --force")
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

    def __enter__(self) -> Self:
        """The folder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Lets others write to the folder."""
        if self._metrics is not None:
            self._metrics.close()
        else:
            with contextlib.suppress(OSError):  # not empty, or not ours to remove: somebody else's
                self.path.rmdir()  # a run that never began leaves nothing
        os.close(self._lock)

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        """One line."""
        del control
        if self._metrics is None:
            self._begin()
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

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result: the run is whole."""
        write_whole(self.path / RESULT_FILE, (json.dumps(result, indent=2, default=str) + "\n").encode())

    def _begin(self) -> None:
        try:
            for name in (RESULT_FILE, MODEL_FILE):  # of the run that --force replaces
                (self.path / name).unlink(missing_ok=True)
            write_whole(self.path / _JOB_FILE, (to_json(self._job) + "\n").encode())
            # Line by line, so that `tail -f` shows a run at work.
            self._metrics = (self.path / _METRICS_FILE).open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; give --out FOLDER") from error

    def _write(self, line: str) -> None:
        try:
            if self._metrics is not None:
                self._metrics.write(line)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path / _METRICS_FILE}: {error.strerror}") from error


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
        self._display.notify("finishing this step, then saving what is trained; Ctrl-C again stops at once")


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
