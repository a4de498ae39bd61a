"""How a training run shows itself on stderr: live in a terminal, one line an epoch elsewhere.

In a terminal, one row an epoch stays, and under it the epoch at hand moves::

    epoch       step  epoch loss  samples/s       ε         up       down   node  reconnects
      1/3         23      0.8124      2,310       ∞     6.0 MB     6.0 MB   41 %           0
      2/3         31      0.3017      2,845       ∞     8.1 MB     8.1 MB   43 %           0
    ━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━  31 of 69 steps, 0:00:02 left

What stands in a row is a list of :class:`Column`; whoever has more to say of a run appends theirs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from client_side.callbacks import Callback, Control, EpochEnd, Evaluation, StepEnd, TrainState
from client_side.link import Traffic
from cloister.output import clean, progress_console, size

__all__ = ["COLUMNS", "Column", "Moment", "ProgressDisplay"]

_REFRESH_HZ: Final = 8  # smooth to the eye; drawing then takes under 1 % of a core
_GAP: Final = "  "
_BROKEN_OFF: Final = "  (the epoch is not finished)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a run stands, as a row of the display shows it.

    Attributes:
        epoch: the epoch at hand, from 1.
        epochs: epochs asked for.
        step: steps finished in the whole run.
        loss: the epoch loss: the mean over the epoch's rows so far; NaN before the first step.
        rows: the epoch's rows so far.
        seconds: since the epoch began.
        node_s: of these, how long the node computed.
        up: tensor bytes sent in the whole run.
        down: tensor bytes received in the whole run.
        reconnects: how often the link came back.
        epsilon: spent on the data set by all runs; ``None`` where nothing is accounted: all of it leaves in the clear.
    """

    epoch: int
    epochs: int
    step: int
    loss: float = float("nan")
    rows: int = 0
    seconds: float = 0.0
    node_s: float = 0.0
    up: int = 0
    down: int = 0
    reconnects: int = 0
    epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One thing that every row shows: its name, the width of its cells, and what stands in one."""

    name: str
    width: int
    cell: Callable[[Moment], str]


#: What a row shows, the most important first: where the terminal is narrow, the last ones are left out.
COLUMNS: Final = (
    Column("epoch", 7, lambda m: f"{m.epoch}/{m.epochs}"),
    Column("step", 8, lambda m: f"{m.step:,}"),
    Column("epoch loss", 10, lambda m: f"{m.loss:.4f}" if m.rows else "-"),
    Column("samples/s", 9, lambda m: f"{m.rows / m.seconds:,.0f}" if m.rows else "-"),
    Column("ε", 6, lambda m: f"{m.epsilon:.3g}" if m.epsilon is not None and math.isfinite(m.epsilon) else "∞"),
    Column("up", 9, lambda m: size(m.up)),
    Column("down", 9, lambda m: size(m.down)),
    Column("node", 5, lambda m: f"{m.node_s / m.seconds:.0%}".replace("%", " %") if m.rows else "-"),
    Column("reconnects", 10, lambda m: str(m.reconnects)),
)


class ProgressDisplay(Callback):
    """Shows a run while it trains; give it to ``Trainer(callbacks=[…])``.

    Use it as a context manager, so that an interrupted run leaves a terminal that works::

        with ProgressDisplay() as display, Trainer(cut, …, callbacks=[display]) as trainer:
            trainer.fit(loader, epochs=3)
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        columns: Sequence[Column] = COLUMNS,
        live: bool | None = None,
    ) -> None:
        """Shows nothing yet.

        Args:
            console: where to; stderr, unless said otherwise.
            columns: what a row shows.
            live: whether the display moves; in a terminal it does, unless said otherwise.
        """
        self._console = console or progress_console()
        # Asked of the stream too: a colour forced upon a log file makes rich take it for a terminal.
        self._is_live = self._console.is_interactive and sys.stderr.isatty() if live is None else live
        self._columns = columns
        self._live: Live | None = None
        self._notice = ""
        self._moment = Moment(epoch=0, epochs=0, step=0)
        self._total: int | None = None
        self._began_epoch = 0.0
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        """The display itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stops the display."""
        self.close()

    @property
    def traffic(self) -> Traffic:
        """What went over the link, as of the last step."""
        return Traffic(self._moment.up, self._moment.down, self._moment.reconnects)

    def close(self) -> None:
        """Stops what moves, and gives the terminal its cursor back; harmless when nothing moves."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """One line that stays."""
        # Never wrapped: a line is a line, for whoever reads a log.
        self._console.print(Text(clean(line)), no_wrap=True, overflow="ignore", crop=False)

    def counted(self, batches: Iterable[torch.Tensor], of: int) -> Iterator[torch.Tensor]:
        """``batches`` as they come; in a terminal, a bar moves with their rows, of which there are ``of`` in all."""
        shown = (TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"), BarColumn(), TimeRemainingColumn())
        with Progress(*shown, console=self._console, transient=True, disable=not self._is_live) as bar:
            task = bar.add_task("rows", total=of)
            for batch in batches:
                bar.advance(task, len(batch))
                yield batch

    def notify(self, text: str) -> None:
        """Says something from inside a signal handler, where printing is not safe."""
        if self._live is None:
            os.write(sys.stderr.fileno(), f"{text}\n".encode())
        else:
            self._notice = text

    def on_train_begin(self, state: TrainState, control: Control) -> None:
        """Starts to move."""
        del control
        self._first = None
        left = state.epochs - state.epoch
        self._total = None if state.steps_per_epoch is None else state.global_step + left * state.steps_per_epoch
        self._moment = dataclasses.replace(
            self._moment, epoch=state.epoch + 1, epochs=state.epochs, step=state.global_step, rows=0
        )
        if not self._is_live:
            return
        self.close()
        self._console.print(Text(self._line([c.name for c in self._fitting()]), style="bold"))
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESH_HZ,
            transient=True,
        )
        self._live.start()

    def on_epoch_begin(self, state: TrainState, control: Control) -> None:
        """A new row."""
        del control
        self._began_epoch = time.perf_counter()
        self._moment = dataclasses.replace(
            self._moment, epoch=state.epoch + 1, epochs=state.epochs, loss=float("nan"), rows=0, seconds=0.0, node_s=0.0
        )

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        """The row moves."""
        del control
        if self._first is None:  # the first step also opened the session: what is left is told from the others
            self._first = (end.step, time.perf_counter())
        before, rows = self._moment, self._moment.rows + end.rows
        known = before.loss * before.rows if before.rows else 0.0
        self._moment = dataclasses.replace(
            before,
            step=end.step,
            loss=(known + end.loss * end.rows) / rows if rows else before.loss,
            rows=rows,
            seconds=time.perf_counter() - self._began_epoch,
            node_s=before.node_s + end.node_s,
            up=end.traffic.up,
            down=end.traffic.down,
            reconnects=end.traffic.reconnects,
            epsilon=None if state.spent is None else state.spent.epsilon,
        )

    def on_epoch_end(self, state: TrainState, control: Control, end: EpochEnd) -> None:
        """The row stays."""
        del control
        is_whole = state.steps_per_epoch is None or self._moment.step >= end.epoch * state.steps_per_epoch
        done = dataclasses.replace(self._moment, epoch=end.epoch, loss=end.loss, rows=end.rows, seconds=end.seconds)
        self.say((self._row(done) if self._is_live else self._plain(done)) + _BROKEN_OFF * (not is_whole))

    def on_evaluate(self, state: TrainState, control: Control, result: Evaluation) -> None:
        """One line."""
        del state, control
        accuracy = "" if result.accuracy is None else f"  accuracy {result.accuracy:.2%}".replace("%", " %")
        self.say(f"evaluated on {result.rows:,} labels  test loss {result.loss:.4f}{accuracy}")

    def on_train_end(self, state: TrainState, control: Control) -> None:
        """Stops to move."""
        del state, control
        self.close()

    def _render(self) -> RenderableType:
        moment = self._moment
        if self._total is None:
            return Text("\n".join([self._row(moment), *self._notices()]), style="cyan")
        # A terminal writes ^C where the cursor stands: with room for two of them, the lines stay where they are.
        bar = Table.grid(padding=(0, 2))
        bar.width = max(self._console.width - 5, 1)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(ProgressBar(total=max(self._total, 1), completed=moment.step), self._remaining(moment, self._total))
        return Group(Text(self._row(moment), style="cyan"), bar, *(Text(n, style="yellow") for n in self._notices()))

    def _notices(self) -> list[str]:
        return [self._notice] if self._notice else []

    def _remaining(self, moment: Moment, total: int) -> str:
        shown = f"{moment.step:,} of {total:,} steps"
        if self._first is None:
            return f"{shown}, opening the session"
        step, at = self._first
        if moment.step == step:
            return shown
        left = (total - moment.step) * (time.perf_counter() - at) / (moment.step - step)
        return f"{shown}, {timedelta(seconds=round(left))} left"

    def _fitting(self) -> list[Column]:
        """The columns that fit into the terminal; at least one."""
        columns = list(self._columns)
        while len(columns) > 1 and sum(c.width + len(_GAP) for c in columns) - len(_GAP) > self._console.width:
            columns.pop()
        return columns

    def _line(self, cells: Sequence[str]) -> str:
        return _GAP.join(cell.rjust(column.width) for cell, column in zip(cells, self._fitting(), strict=True))

    def _row(self, moment: Moment) -> str:
        return self._line([column.cell(moment) for column in self._fitting()])

    def _plain(self, moment: Moment) -> str:
        return _GAP.join(f"{column.name} {column.cell(moment)}" for column in self._columns)
