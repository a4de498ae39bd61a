"""``cloister leakage``: attacks on what the node would see, cut by cut, and a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.exits import ExitCode
from cloister.factories import load_factory, load_model
from cloister.output import Format, FormatOption, clean, print_rows, progress_console
from wire.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from privacy.leakage import Advice, CutLeakage, Settings, Treatment

__all__ = ["app"]

_EXAMPLE_ROWS: Final = 4
_VOID: Final = "audit failed"
_RECOMMENDED: Final = "recommended"

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table; its fields are the headings."""

    front: str
    activations: str
    dcor2: str
    attack: str
    similarity: str
    read: str
    labels: str
    note: str


@app.command()
def leakage(
    model: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="Makes the model, called without arguments.")],
    *,
    data: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Makes a loader of (inputs, labels), called without arguments. It stays on this machine.",
        ),
    ],
    cut: Annotated[
        list[str] | None,
        typer.Option(help="Audit the cut behind this submodule; again for further ones. All, unless said."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="Where your head begins; the last submodule with parameters, unless said."),
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
            metavar="CLIP,SIGMA",
            help="Attack treated activations too: clipped to this L2 norm, plus Gaussian noise of this deviation.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, leakage.json and the pictures.")] = Path("leakage"),
    seed: Annotated[int, typer.Option(min=0, help="Fixes every draw.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that torch may use.")] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Attack what the node would see of your data, cut by cut, and write a report with pictures.

    Half of the records are the attacker's, the other half are attacked: a decoder reconstructs them from activations,
    labels are guessed from gradients, outputs and activations, and baselines show what no attack would get. Everything
    runs here, and nothing is sent. The report recommends a cut and a treatment and says why.

    An attack that fails proves nothing, and no figure is a claim of differential privacy. Where the decoder cannot beat
    the mean of all inputs, the audit of that cut has failed: the command then ends with exit code 1.

    Example: [bold]cloister leakage cloister.digits:model --data cloister.digits:train_loader --out report[/]
    """
    if head is not None and vanilla:
        raise ConfigError("--head and --vanilla: give one of them")
    treatment = None if policy_noise is None else _treatment(policy_noise)
    import torch  # noqa: PLC0415 - the command's errors should not wait for torch

    from privacy.leakage import Settings, write_report  # noqa: PLC0415 - as above

    settings = Settings(seconds=seconds_per_attack, deep=deep, seed=seed, rows=rows, treatment=treatment)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    made = load_model(model)
    if weights is not None:
        from cloister.weights import load_weights  # noqa: PLC0415 - as above

        load_weights(made, weights)
    inputs, labels = _records(data, rows)
    found = _audited(made, inputs, labels, settings, cuts=cut or [], head=head, vanilla=vanilla)
    advice = write_report(found, out, model=model, settings=settings)
    _print(found, advice, settings, model=model, fmt=fmt)
    progress_console().print(f"written: {clean(out / 'report.html')}", soft_wrap=True, markup=False)
    if any(one.void for one in found):
        raise typer.Exit(ExitCode.FAILED)


def _treatment(text: str) -> Treatment:
    from privacy.leakage import Treatment  # noqa: PLC0415 - as in the command

    try:
        clip, sigma = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--policy-noise {text}: write clip and sigma, such as 1.0,2.16") from None
    return Treatment(clip, sigma)


def _records(name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``rows`` records of the loader that ``name`` makes, and their labels."""
    import torch  # noqa: PLC0415 - as in the command

    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in _batches(name):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(map(torch.is_tensor, batch)):  # noqa: PLR2004 -- as said
            raise ConfigError(
                f"{name}: a batch must be (inputs, labels), two tensors: the audit reconstructs one input"
            )
        inputs, labels = batch
        if inputs.ndim == 0 or len(inputs) != len(labels) or (batches and inputs.shape[1:] != batches[0][0].shape[1:]):
            raise ConfigError(f"{name}: every batch needs as many labels as inputs, and inputs of one shape")
        batches.append((inputs.detach().cpu(), labels.detach().cpu()))
        if sum(len(x) for x, _ in batches) >= rows:
            break
    if not batches:
        raise ConfigError(f"{name}: the loader is empty")
    return torch.cat([x for x, _ in batches])[:rows], torch.cat([y for _, y in batches])[:rows]


def _batches(name: str) -> Iterator[Any]:
    try:
        yield from load_factory(name)()
    except ConfigError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error


def _audited(
    model: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    settings: Settings,
    *,
    cuts: Sequence[str],
    head: str | None,
    vanilla: bool,
) -> list[CutLeakage]:
    from client_side.cutting import cut as cut_behind  # noqa: PLC0415 - as in the command
    from client_side.survey import survey  # noqa: PLC0415
    from privacy.leakage import Bench, Parts, attack_names, audit_cut  # noqa: PLC0415

    example = inputs[:_EXAMPLE_ROWS]
    surveyed = survey(model, example, head=head, vanilla=vanilla)
    names = cuts or [c.front for c in surveyed.candidates if c.possible and c.node_parameters]
    if not names:
        raise ConfigError("no front of this model leaves the node anything to train: name a cut with --cut")
    made = {name: cut_behind(model, front=name, head=surveyed.head, example=example) for name in dict.fromkeys(names)}
    with _progress(len(made) * len(attack_names(settings))) as tell:
        tell("judge: a classifier")
        bench = Bench(inputs, labels, settings)
        return [
            audit_cut(
                name,
                Parts(parts.front, parts.middle, parts.head, parts.crossing),
                bench,
                lambda attack, name=name: tell(f"{name}: {attack}"),  # type: ignore[misc]  # the default binds this turn's name
            )
            for name, parts in made.items()
        ]


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


def _print(found: Sequence[CutLeakage], advice: Advice, settings: Settings, *, model: str, fmt: Format) -> None:
    if fmt is Format.JSON:
        import json  # noqa: PLC0415 - as in the command

        from privacy.leakage.report import as_record  # noqa: PLC0415

        typer.echo(json.dumps(as_record(found, advice, model=model, settings=settings), indent=2))
        return
    rows = [_row(one, recommended=one.cut == advice.cut) for one in found]
    print_rows(rows, fmt, styles={_RECOMMENDED: "bold green", _VOID: "bold red"})
    mean = found[0].baselines["mean input"].similarity
    lines = [
        (
            f"Similarity: {found[0].measure}; the mean input has {mean:.3f}. Read: classes that a classifier gets "
            "from the reconstructions. Labels: guessed from gradients."
        )
    ]
    if advice.cut is not None:
        lines.append(f"Recommended: behind {advice.cut}; {advice.treatment}.")
    typer.echo(clean("\n".join([*lines, *advice.reasons, *advice.limits])))


def _row(found: CutLeakage, *, recommended: bool) -> _Row:
    from privacy.leakage.advice import percent, strongest  # noqa: PLC0415 - as in the command

    attack, guess = strongest(found), found.best_guess("gradients")
    seen, treated = attack.seen, found.treated_distance_correlation
    return _Row(
        front=found.cut,
        activations=f"{found.dimensions:,}",
        dcor2=f"{found.distance_correlation if treated is None else treated:.3f}",
        attack=attack.name,
        similarity="-" if seen is None else f"{seen.similarity:.3f}",
        read="-" if seen is None or seen.accuracy is None else percent(seen.accuracy),
        labels="-" if guess is None else percent(guess.accuracy),
        note=_VOID if found.void else _RECOMMENDED if recommended else "",
    )
