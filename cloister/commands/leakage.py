"""``cloister leakage``: attacks on what the node would see, cut by cut, and a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.exits import ExitCode
from cloister.factories import load_factory, load_model
from cloister.joboptions import SetOption, job_from
from cloister.output import Format, FormatOption, clean, print_error, print_rows, progress_console
from wire.errors import CloisterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from cloister.jobs import Job
    from privacy.leakage import Advice, CutLeakage, Parts, Settings, Treatment

__all__ = ["app"]

_EXAMPLE_ROWS: Final = 4
_JOB_SUFFIXES: Final = (".toml", ".json")
_VOID: Final = "failed"
_RECOMMENDED: Final = "best"

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table; its fields are the headings."""

    front: str
    numbers: str
    dcor2: str
    similar: str
    read: str
    labels: str
    note: str


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is audited.

    Attributes:
        name: for the report.
        model: the whole.
        batches: of (inputs, labels).
        head: where the head begins; ``None``: as the survey finds it, or none at all (vanilla).
        vanilla: without a head.
        treatment: that the job names for activations.
        front: where the job cuts.
        seed: that the job names.
    """

    name: str
    model: nn.Module
    batches: Iterator[Any]
    head: str | None
    vanilla: bool
    treatment: Treatment | None = None
    front: str | None = None
    seed: int = 0


@dataclass(slots=True)
class _Audited:
    """What came out of the cuts so far.

    Attributes:
        found: of the cuts that are done.
        left_out: the others, and why.
        interrupted: whether somebody did not want to wait.
    """

    found: list[CutLeakage] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


@app.command()
def leakage(
    what: Annotated[
        str,
        typer.Argument(
            metavar="JOB.toml|MODULE:FACTORY", help="A job file; or what makes the model, called without arguments."
        ),
    ],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Makes a loader of (inputs, labels), called without arguments; a job's own data.train, unless said.",
        ),
    ] = None,
    job_settings: SetOption = None,
    cut: Annotated[
        list[str] | None,
        typer.Option(help="Audit the cut behind this submodule; again for further ones. All, unless said."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="Where your head begins; as in the job, or the last submodule with parameters."),
    ] = None,
    vanilla: Annotated[bool, typer.Option("--vanilla", help="No head: the node gets loss and labels.")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="The model's weights (safetensors); as the factory made them, unless said.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also UnSplit, a pseudo-client and FSHA: minutes for each cut.")
    ] = False,
    seconds_per_attack: Annotated[
        float, typer.Option(min=0.1, help="The most that one attack may take on a cut; twice that with --policy-noise.")
    ] = 60.0,
    rows: Annotated[int, typer.Option(min=40, help="Records used; the attacker knows half of them.")] = 4000,
    policy_noise: Annotated[
        str | None,
        typer.Option(
            metavar="CLIP,NOISE",
            help="Attack activations under the treatment rows too: clipped to this L2 norm, plus Gaussian noise in "
            "units of it. What the job says, where its policy names rows.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, leakage.json and the pictures.")] = Path("leakage"),
    seed: Annotated[int | None, typer.Option(min=0, help="Fixes every draw; train.seed of a job, or 0.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that torch may use.")] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Attack what the node would see of your data, cut by cut, and write a report with pictures.

    Half of the records are the attacker's, the other half are attacked: a decoder reconstructs them from activations,
    labels are guessed from gradients, outputs and activations, and baselines show what no attack would get. Everything
    runs here, and nothing is sent. The report recommends a cut and a treatment and says why. Ctrl-C writes it for the
    cuts that are done.

    An attack that fails proves nothing, and no figure is a claim of differential privacy. Where the decoder cannot beat
    the mean of all inputs, the audit of that cut has failed: the command then ends with exit code 1.

    Example: [bold]cloister leakage examples/digits.toml --out report[/]

    Example: [bold]cloister leakage cloister.digits:model --data cloister.digits:train_loader --cut stem[/]
    """
    if head is not None and vanilla:
        raise ConfigError("--head and --vanilla: give one of them")
    given = None if policy_noise is None else _clip_and_noise(policy_noise)
    _make(out)
    import torch  # noqa: PLC0415 - the command's errors should not wait for torch

    if threads is not None:
        torch.set_num_threads(threads)
    subject = _subject(what, data, job_settings, head=head, vanilla=vanilla, seed=seed or 0)
    if threads is not None:  # a job has its own
        torch.set_num_threads(threads)
    if weights is not None:
        from cloister.weights import load_weights  # noqa: PLC0415 - as above

        load_weights(subject.model, weights)
    _refuse_unknown(subject, cut or [])
    inputs, labels = _records(data or what, subject.batches, rows)
    fronts = _fronts(subject, inputs[:_EXAMPLE_ROWS], cut or [])
    from privacy.leakage import Settings, Treatment, write_report  # noqa: PLC0415 - as above

    settings = Settings(
        seconds=seconds_per_attack,
        deep=deep,
        seed=subject.seed if seed is None else seed,
        rows=rows,
        treatment=subject.treatment if given is None else Treatment(*given),
    )
    audited = _audited(fronts, inputs, labels, settings)
    advice = write_report(audited.found, out, model=subject.name, settings=settings, left_out=audited.left_out)
    _print(audited, advice, settings, model=subject.name, job_front=subject.front, fmt=fmt)
    progress_console().print(f"written: {clean(out / 'report.html')}", soft_wrap=True, markup=False)
    if audited.interrupted:
        print_error(f"interrupted: {len(audited.found)} of {len(fronts)} cuts are in the report")
        raise typer.Exit(ExitCode.INTERRUPTED)
    if audited.left_out or any(one.void for one in audited.found):
        raise typer.Exit(ExitCode.FAILED)


def _clip_and_noise(text: str) -> tuple[float, float]:
    try:
        clip, noise = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--policy-noise {text}: write clip and noise, such as 1.0,2.16") from None
    return clip, noise


def _make(folder: Path) -> None:
    """Before minutes are spent on what could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: the report cannot be written there: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {folder}: the report cannot be written there: you have no right to")


# --- What is audited --------------------------------------------------------------------------------------------------


def _subject(
    what: str, data: str | None, job_settings: list[str] | None, *, head: str | None, vanilla: bool, seed: int
) -> _Subject:
    if what.endswith(_JOB_SUFFIXES) or Path(what).is_file():
        return _of_job(job_from(Path(what), job_settings), what, data, head=head, vanilla=vanilla)
    if job_settings:
        raise ConfigError(f"--set changes a job, and {what} is none: name a job file, such as examples/digits.toml")
    if data is None:
        raise ConfigError(
            f"{what}: name its data too, such as --data my_data:train_loader; or name a job file instead of a model"
        )
    import torch  # noqa: PLC0415 - as in the command

    torch.manual_seed(seed)
    return _Subject(what, load_model(what), _batches(data, load_factory(data)), head, vanilla, seed=seed)


def _of_job(job: Job, name: str, data: str | None, *, head: str | None, vanilla: bool) -> _Subject:
    from cloister.assembly import make_loader, make_model  # noqa: PLC0415 - as in the command

    model = make_model(job)
    if data is None:
        batches = _batches(job.data.train, partial(make_loader, job, "train"))
    else:
        batches = _batches(data, load_factory(data))
    chosen = None if vanilla else head or job.cut.head
    return _Subject(
        name,
        model,
        batches,
        chosen,
        vanilla=chosen is None,
        treatment=_treatment_of(job),
        front=job.cut.front,
        seed=job.train.seed,
    )


def _treatment_of(job: Job) -> Treatment | None:
    """Where the job's policy lets rows leave, clipped and noised; nothing, where it names something else."""
    from privacy.leakage import Treatment  # noqa: PLC0415 - as in the command
    from privacy.ledger import Budget  # noqa: PLC0415
    from privacy.policy import Rows  # noqa: PLC0415
    from privacy.tables import plan_table  # noqa: PLC0415

    policy = job.privacy.policy()
    rows = policy.activations
    if isinstance(rows, Rows) and rows.noise is None and policy.table is not None:
        rows = plan_table(policy, Budget(policy.epsilon, policy.delta, policy.relation)).treatment
    if not isinstance(rows, Rows) or rows.noise is None:
        return None
    return Treatment(rows.clip, rows.noise)


def _batches(name: str, make: Callable[[], Any]) -> Iterator[Any]:
    """The loader's own, which may fail at any of them."""
    try:
        yield from make()
    except CloisterError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error


def _refuse_unknown(subject: _Subject, cuts: Sequence[str]) -> None:
    """Before the data are read, which may take minutes.

    Raises:
        CutError: a cut or the head is no submodule of the model.
    """
    from client_side.tracing import trace  # noqa: PLC0415 - as in the command

    names = [*cuts, *([subject.head] if subject.head else [])]
    if names:
        trace(subject.model, names, 1)


def _records(name: str, loader: Iterator[Any], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``rows`` records of a loader, and their labels."""
    import torch  # noqa: PLC0415 - as in the command

    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(map(torch.is_tensor, batch)):  # noqa: PLR2004 -- as said
            raise ConfigError(
                f"{name}: a batch must be (inputs, labels), two tensors: the audit reconstructs one input"
            )
        inputs, labels = batch
        if inputs.ndim == 0 or labels.ndim == 0 or len(inputs) != len(labels):
            raise ConfigError(f"{name}: every batch needs as many labels as inputs, rows first in both")
        if batches and inputs.shape[1:] != batches[0][0].shape[1:]:
            raise ConfigError(
                f"{name}: inputs of {list(batches[0][0].shape[1:])} and of {list(inputs.shape[1:])}: the audit needs "
                "one shape; resize or pad them"
            )
        batches.append((inputs.detach().cpu(), labels.detach().cpu()))
        if sum(len(x) for x, _ in batches) >= rows:
            break
    if not batches:
        raise ConfigError(f"{name}: the loader is empty")
    return torch.cat([x for x, _ in batches])[:rows], torch.cat([y for _, y in batches])[:rows]


def _fronts(subject: _Subject, example: torch.Tensor, cuts: Sequence[str]) -> dict[str, Parts]:
    """The model cut at each place, in the order in which it runs where none is named."""
    from client_side.cutting import cut as cut_behind  # noqa: PLC0415 - as in the command
    from client_side.cutting import undisturbed  # noqa: PLC0415
    from client_side.survey import survey  # noqa: PLC0415
    from privacy.leakage import Parts  # noqa: PLC0415

    model = subject.model
    try:
        with undisturbed(model, training=False):
            model(example)
        surveyed = survey(model, example, head=subject.head, vanilla=subject.vanilla)
        names = cuts or [c.front for c in surveyed.candidates if c.possible and c.node_parameters]
        made = {n: cut_behind(model, front=n, head=surveyed.head, example=example) for n in dict.fromkeys(names)}
    except CloisterError:
        raise
    except Exception as error:  # the model's own forward may raise anything
        shape = f"{str(example.dtype).removeprefix('torch.')} {list(example.shape)}"
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise ConfigError(f"the model does not take inputs of {shape} ({told}); rows come first") from error
    if not made:
        raise ConfigError("no front of this model leaves the node anything to train: name a cut with --cut")
    return {name: Parts(one.front, one.middle, one.head, one.crossing) for name, one in made.items()}


# --- The audit --------------------------------------------------------------------------------------------------------


def _audited(fronts: Mapping[str, Parts], inputs: torch.Tensor, labels: torch.Tensor, settings: Settings) -> _Audited:
    """All cuts; where one cannot be audited, or somebody interrupts, the others that are done.

    Raises:
        ConfigError: data that cannot be audited, or no cut that can.
        KeyboardInterrupt: before the first cut was done.
    """
    from privacy.leakage import Bench, attack_names, audit_cut  # noqa: PLC0415 - as in the command

    made = _Audited()
    with _progress(len(fronts) * len(attack_names(settings))) as tell:
        try:
            tell("judge: a classifier")
            bench = Bench(inputs, labels, settings)
            for name, parts in fronts.items():
                try:
                    made.found.append(audit_cut(name, parts, bench, partial(_tell, tell, name)))
                except ConfigError as error:
                    made.left_out[name] = str(error)
        except KeyboardInterrupt:
            if not made.found:
                raise
            made.interrupted = True
            done = {one.cut for one in made.found} | made.left_out.keys()
            made.left_out |= {name: "interrupted" for name in fronts if name not in done}
    if not made.found:
        raise ConfigError("; ".join(f"{name}: {why}" for name, why in made.left_out.items()))
    return made


def _tell(tell: Callable[[str], None], name: str, attack: str) -> None:
    tell(f"{name}: {attack}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar in a terminal, a line for each attack elsewhere; gives what is called when the next one starts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = progress_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bar:
        task = bar.add_task("", total=total)
        started = -1  # the judge comes first, and is no attack

        def tell(what: str) -> None:
            nonlocal started
            bar.update(task, description=clean(what), completed=max(0, started))
            started += 1
            if not console.is_interactive:
                console.print(clean(what), markup=False, soft_wrap=True)

        yield tell


def _print(
    audited: _Audited, advice: Advice, settings: Settings, *, model: str, job_front: str | None, fmt: Format
) -> None:
    found = audited.found
    if fmt is Format.JSON:
        import json  # noqa: PLC0415 - as in the command

        from privacy.leakage.report import as_record  # noqa: PLC0415

        record = as_record(found, advice, model=model, settings=settings, left_out=audited.left_out)
        typer.echo(json.dumps(record, indent=2))
        return
    rows = [_row(one, recommended=one.cut == advice.cut) for one in found]
    print_rows(rows, fmt, styles={_RECOMMENDED: "bold green", _VOID: "bold red"})
    mean = found[0].baselines["mean input"].similarity
    lines = [
        (
            f"Numbers: activations a record. Dcor2: distance correlation of inputs and activations, squared. Similar: "
            f"{found[0].measure} of the best reconstructions; the mean input has {mean:.3f}. Read: classes that a "
            "classifier gets from them. Labels: guessed from gradients."
        )
    ]
    if advice.cut is not None:
        lines.append(f"Recommended: behind {advice.cut}; {advice.treatment}.")
    if job_front is not None:
        lines.append(f"The job cuts behind {job_front}.")
    lines += [f"Not audited: {cut} ({why})." for cut, why in audited.left_out.items()]
    typer.echo(clean("\n".join([*lines, *advice.reasons, *advice.limits])))


def _row(found: CutLeakage, *, recommended: bool) -> _Row:
    from privacy.leakage.advice import percent, strongest  # noqa: PLC0415 - as in the command

    attack, guess = strongest(found), found.best_guess("gradients")
    seen, treated = attack.seen, found.treated_distance_correlation
    return _Row(
        front=found.cut,
        numbers=f"{found.dimensions:,}",
        dcor2=f"{found.distance_correlation if treated is None else treated:.3f}",
        similar="-" if seen is None else f"{seen.similarity:.3f}",
        read="-" if seen is None or seen.accuracy is None else percent(seen.accuracy),
        labels="-" if guess is None else percent(guess.accuracy),
        note=_VOID if found.void else _RECOMMENDED if recommended else "",
    )
