"""``cloister runs``: what training runs there are, where they stand, and going on with them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from client_side.checkpoints import list_checkpoints
from client_side.durability import Checkpoints, Run
from client_side.journal import CheckpointEntry, Event, Journal
from cloister.commands.train import train_job
from cloister.joboptions import IdentityOption, NodeOption, SetOption, job_from
from cloister.output import Format, FormatOption, print_record, print_rows
from cloister.runs import JOB_FILE, METRICS_FILE, PROVENANCE, RESULT_FILE, RESULT_FILES, last_step, state_of
from wire.errors import CheckpointError, ConfigError

__all__ = ["RunLine", "app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]

_STYLES: Final = {"running": "green", "finished": "bold", "stopped": "yellow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run.

    Attributes:
        run: its folder.
        state: ``running``, ``finished``, or ``stopped``: then it can be resumed.
        step: the last one in its metrics.
        epochs: finished, of how many.
        loss: of that step.
        checkpoint: the newest one's step.
        mb: what its folder takes, in 10**6 bytes.
    """

    run: Path
    state: str
    step: int
    epochs: str
    loss: float | None
    checkpoint: int | None
    mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetails:
    """A run, its checkpoints and what happened to it."""

    run: RunLine
    job: dict[str, Any]
    checkpoints: list[CheckpointEntry]
    events: list[Event]


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs' folders are.")] = Path("runs"),
    fmt: FormatOption = Format.TABLE,
) -> None:
    """List the runs under a folder, the newest first.

    Example: [bold]cloister runs list[/]
    """
    found = sorted(_runs(folder), key=lambda run: -(run / JOB_FILE).stat().st_mtime)
    if not found and fmt is Format.TABLE:
        typer.echo(f"no runs in {folder}; `cloister train JOB.toml` makes one", err=True)
        return
    print_rows([_line(run) for run in found], fmt, styles=_STYLES)


@app.command()
def show(run: RunArgument, fmt: FormatOption = Format.TABLE) -> None:
    """Show where a run stands, its checkpoints, and what happened to it.

    Example: [bold]cloister runs show runs/digits[/]
    """
    job = _job_of(run)
    checkpoints, events = _journal(run)
    if fmt is Format.JSON:
        print_record(RunDetails(run=_line(run), job=job, checkpoints=checkpoints, events=events), fmt)
        return
    print_record(_line(run), fmt)
    if checkpoints:
        print_rows(checkpoints, fmt)
    if events:
        print_rows(events, fmt)


@app.command()
def resume(
    run: RunArgument,
    *,
    settings: SetOption = None,
    node: NodeOption = None,
    identity: IdentityOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, those done included.")] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Go on with a run from its newest checkpoint: the same as [bold]cloister train --resume RUN[/].

    Example: [bold]cloister runs resume runs/digits[/]
    """
    _job_of(run)
    job = job_from(run / JOB_FILE, settings, node=node, identity=identity, epochs=epochs, out=run)
    train_job(job, fmt, force=False, resume=True)


@app.command()
def rm(
    run: RunArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a run: its checkpoints, its snapshots wherever they are, its metrics and its model.

    Example: [bold]cloister runs rm runs/digits[/]
    """
    _job_of(run)
    if _is_running(run):
        raise ConfigError(f"{run} is running: stop it first")
    if not yes:
        typer.confirm(f"remove {run} and all that it holds?", abort=True, err=True)
    state = state_of(run)
    if state.exists():
        held = Run(Checkpoints(folder=state))
        try:
            held.remove_snapshots()
        finally:
            held.close()
        shutil.rmtree(state)
    shutil.rmtree(run / PROVENANCE, ignore_errors=True)
    for name in (METRICS_FILE, *RESULT_FILES, JOB_FILE):
        (run / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something of the user's own
        run.rmdir()
    typer.echo(f"removed {run}", err=True)


def _runs(folder: Path) -> Iterator[Path]:
    if (folder / JOB_FILE).exists():
        yield folder
    if folder.is_dir():
        yield from (path.parent for path in sorted(folder.glob(f"*/{JOB_FILE}")))


def _job_of(run: Path) -> dict[str, Any]:
    try:
        job: dict[str, Any] = json.loads((run / JOB_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run} holds no run: `cloister runs list` shows those that there are") from error
    return job


def _line(run: Path) -> RunLine:
    step, epoch, loss = last_step(run / METRICS_FILE)
    checkpoints = list_checkpoints(state_of(run) / "checkpoints")
    result = _result(run)
    whole = result.get("interrupted") is False
    wanted = _job_of(run).get("train", {}).get("epochs", "?")
    return RunLine(
        run=run,
        state="running" if _is_running(run) else "finished" if whole else "stopped",
        step=step,
        epochs=f"{result.get('epochs', max(0, epoch - 1))} of {wanted}",
        loss=loss,
        checkpoint=checkpoints[0].step if checkpoints else None,
        mb=round(sum(path.lstat().st_size for path in run.rglob("*") if path.is_file()) / 1e6, 1),
    )


def _result(run: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads((run / RESULT_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return read


def _journal(run: Path) -> tuple[list[CheckpointEntry], list[Event]]:
    path = state_of(run) / "run.sqlite"
    if not path.exists():
        return [], []
    try:
        journal = Journal(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    try:
        return journal.checkpoints(), journal.events()
    finally:
        journal.close()


def _is_running(run: Path) -> bool:
    """Whether a process holds the run: the kernel frees the lock of one that was killed."""
    descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
