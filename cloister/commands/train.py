"""``cloister train``: train a job's model through a node."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import nn

from client_side.callbacks import Evaluation, TrainState
from client_side.cutting import Cut
from client_side.durability import holds_run
from client_side.trainer import Trainer
from cloister.assembly import cut_model, first_inputs, greet_node, make_loader, make_model, new_trainer, owner_of
from cloister.exits import ExitCode
from cloister.jobfile import to_json, to_toml
from cloister.joboptions import IdentityOption, NodeOption, SetOption, job_from
from cloister.jobs import Job
from cloister.modelcard import model_card
from cloister.output import Format, FormatOption, print_record
from cloister.progress import ProgressDisplay
from cloister.runs import CARD_FILE, JOB_FILE, MODEL_FILE, Interruption, RunFolder, remarks
from cloister.weights import save_weights
from privacy.claims import Claim
from privacy.policy import Policy, labels_told
from wire.errors import CloisterError, ConfigError

if TYPE_CHECKING:
    from cloister.recording import Recorder

__all__ = ["TrainResult", "app", "train_job"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        epochs: finished ones.
        steps: finished ones.
        final_loss: the last epoch's mean; nothing where it is no number.
        test_loss: over ``data.test``, where there is one.
        test_accuracy: 0 to 1, where labels are classes.
        seconds: from the session's opening to the trained middle's return.
        samples_per_second: while training, from the second step on: the first opens the session.
        bytes_up: of tensors, while training.
        bytes_down: of tensors, while training, the trained middle included.
        reconnects: how often the link came back.
        model: the file.
        model_sha256: of the file.
        program_sha256: the middle's architecture.
        epsilon: spent on the data set by all runs so far, this one included; nothing where none may be claimed.
        delta: that goes with it.
        data_set: what the training data is called in the privacy ledger.
        ledger: where that ledger is.
        claim: what may be said of the data set's privacy.
        card: the model's card: what it is, what was spent on it and what that rests on.
        interrupted: whether it was stopped before its end.
    """

    epochs: int
    steps: int
    final_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    seconds: float
    samples_per_second: float | None
    bytes_up: int
    bytes_down: int
    reconnects: int
    model: Path
    model_sha256: str
    program_sha256: str
    epsilon: float | None
    delta: float | None
    data_set: str | None
    ledger: str | None
    claim: str | None
    card: Path
    interrupted: bool


@app.command()
def train(
    job_file: Annotated[
        Path | None, typer.Argument(metavar="[JOB.toml]", help="The job file; a run that is resumed has its own.")
    ] = None,
    *,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder, from its newest checkpoint.")
    ] = None,
    settings: SetOption = None,
    node: NodeOption = None,
    identity: IdentityOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; sets train.epochs.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; sets output.dir.")] = None,
    standby: Annotated[
        bool | None,
        typer.Option("--standby/--no-standby", help="A second node waits at the latest snapshot; sets node.standby."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run that the folder holds.")] = False,
    print_job: Annotated[bool, typer.Option("--print-job", help="Print the job as it would run, and stop.")] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Train a job's model through a node.

    Writes into the run's folder: model.safetensors (the whole model under its own names), model-card.md, job.json,
    metrics.jsonl (a line a step) and result.json. Variables such as CLOISTER_TRAIN__EPOCHS=3 set keys too; options win
    over them.

    The run's state is kept in RUN/state: whatever ends it, --resume goes on, and the numbers are those of a run that
    was never interrupted. With several nodes, the next one takes over when one fails.

    Ctrl-C finishes the step, writes a checkpoint and exits with 130; a second one stops at once.

    Example: [bold]cloister train examples/digits.toml --node 'gpu:7700#sha256:…' --identity owner[/]

    Example: [bold]cloister train --resume runs/digits[/]
    """
    job = _job(job_file, resume, settings, node=node, identity=identity, epochs=epochs, out=out, standby=standby)
    if print_job:
        typer.echo(to_json(job) if fmt is Format.JSON else to_toml(job).rstrip())
        return
    train_job(job, fmt, force=force, resume=resume is not None)


def train_job(job: Job, fmt: Format, *, force: bool, resume: bool) -> None:
    """Trains, prints the result, and says how to go on where it ended early.

    Raises:
        typer.Exit: interrupted.
        CloisterError: what went wrong.
    """
    with (
        ProgressDisplay() as display,
        remarks(display),
        RunFolder(job, force=force, resume=resume) as folder,
    ):
        again = f"cloister train --resume {shlex.quote(str(folder.path))}"
        try:
            result, claim = _run(job, folder, display, resume=resume)
        except (CloisterError, KeyboardInterrupt):
            if holds_run(folder.state):
                display.say(f"the run stands at its newest checkpoint; go on with `{again}`")
            raise
    print_record(result, fmt)
    for line in () if claim is None else claim.lines():
        display.say(line)
    if result.interrupted:
        display.say(f"stopped after step {result.steps}; go on with `{again}`. The model so far is in {result.model}")
        raise typer.Exit(ExitCode.INTERRUPTED)


def _job(job_file: Path | None, resume: Path | None, settings: list[str] | None, **shorthands: object) -> Job:
    if resume is None:
        if job_file is None:
            raise typer.BadParameter("name a job file, or a run to go on with: --resume RUN")
        return job_from(job_file, settings, **shorthands)
    if job_file is not None or shorthands["out"] is not None:
        raise typer.BadParameter("a run that is resumed has its own job and folder: leave out JOB.toml and --out")
    if not (resume / JOB_FILE).exists():
        raise ConfigError(f"{resume} holds no run: `cloister runs list` shows those that there are")
    # Where the folder is now, wherever it was written.
    return job_from(resume / JOB_FILE, settings, **{**shorthands, "out": resume})


def _run(job: Job, folder: RunFolder, display: ProgressDisplay, *, resume: bool) -> tuple[TrainResult, Claim | None]:
    owner = owner_of(job)
    display.say(greet_node(job, owner))
    model = make_model(job)
    recorder = _recorder(job, model)
    made = cut_model(job, model, first_inputs(job, "train"))
    display.say(_shares(made, job.privacy.policy()))
    loader = make_loader(job, "train")
    with Interruption(display) as interruption:
        callbacks = [folder, interruption, display]
        folder.begin()
        with new_trainer(job, made, owner, callbacks, job.checkpoint.plan(folder.state)) as trainer:
            began = time.perf_counter()
            trainer.fit(loader, job.train.epochs, resume=resume)
            seconds, traffic = time.perf_counter() - began, trainer.traffic
            interrupted = interruption.requested
            file = folder.path / MODEL_FILE
            digest = save_weights(made.reassemble(), file)
            tested = None if interrupted else _test(job, trainer)
            claim = trainer.guard.claim
        result = TrainResult(
            epochs=_whole_epochs(trainer.state),
            steps=trainer.state.global_step,
            final_loss=_finite(trainer.state.log_history[-1]["loss"]),
            test_loss=None if tested is None else _finite(tested.loss),
            test_accuracy=None if tested is None or tested.accuracy is None else round(tested.accuracy, 6),
            seconds=round(seconds, 3),
            samples_per_second=None if (rate := folder.samples_per_second) is None else round(rate, 1),
            bytes_up=traffic.up,
            bytes_down=traffic.down,
            reconnects=traffic.reconnects,
            model=file,
            model_sha256=digest,
            program_sha256=made.program.digest.hex(),
            epsilon=None if claim is None else _finite(claim.spent.epsilon),
            delta=None if claim is None else claim.spent.delta,
            data_set=trainer.guard.data_set,
            ledger=trainer.guard.ledger,
            claim=None if claim is None else claim.sentence,
            card=folder.path / CARD_FILE,
            interrupted=interrupted,
        )
        values = dataclasses.asdict(result)
        folder.finish(values, model_card(job, values, claim))
        if recorder is not None and not interrupted:
            # Last: the run is whole, whatever becomes of the log.
            told = recorder.finish(trainer, file, result.program_sha256, epochs=result.epochs)
            display.say(told.told())
    return result, claim


def _recorder(job: Job, model: nn.Module) -> Recorder | None:
    if not job.provenance.wanted:
        return None
    from cloister.recording import Recorder  # noqa: PLC0415 - most runs put nothing on record

    return Recorder(job, model)


def _test(job: Job, trainer: Trainer) -> Evaluation | None:
    return None if job.data.test is None else trainer.evaluate(make_loader(job, "test"))


def _whole_epochs(state: TrainState) -> int:
    """The trainer counts an epoch that was broken off; where its length is known, this does not."""
    return state.global_step // state.steps_per_epoch if state.steps_per_epoch else state.epoch


def _finite(number: float) -> float | None:
    return round(number, 6) if math.isfinite(number) else None


def _shares(made: Cut, policy: Policy) -> str:
    """Who holds how much of the model."""
    own = sum(p.numel() for p in made.owner_parameters())
    given = sum(p.numel() for p in made.middle.parameters())
    share = given / (own + given) if own + given else 0.0
    shape = f"vanilla: {labels_told(policy)}" if made.head is None else "U-shaped: labels stay here"
    return f"model {own + given:,} parameters, {share:.0%} of them on the node ({shape})".replace("%", " %")
