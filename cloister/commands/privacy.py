"""``cloister privacy``: what was spent on each data set, what a job would spend, and the history of releases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from client_side.cutting import Cut
from client_side.encrypted import EncryptedPart
from client_side.passes import Loader
from client_side.records import collect, data_set_of, labels_of
from client_side.sampling import PoissonLoader
from cloister.assembly import cut_model, first_inputs, make_loader, make_model, units_of
from cloister.exits import ExitCode
from cloister.joboptions import JobArgument, SetOption, job_from
from cloister.jobs import Job
from cloister.output import Format, FormatOption, print_record, print_rows, progress_console
from privacy.accounting import Event, Gaussian, Relation, SampledGaussian, epsilon_of
from privacy.claims import claim_of, told
from privacy.guard import fresh_releases
from privacy.ledger import Budget, Entry, Ledger, Release, default_url
from privacy.policy import Aggregate, Ckks, Moments, Policy, holes
from privacy.tables import check_labels, check_records, label_releases, plan_table, sums_noise
from wire.errors import ConfigError

__all__ = ["HistoryLine", "PlanLine", "StatusLine", "app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_DROWNED: Final = 0.01  # of signal to noise: ten classes are then guessed little better than by chance

LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="URL",
        help="sqlite:////… or postgresql+psycopg://…; CLOISTER_LEDGER, or your own, if not said.",
    ),
]
DeltaOption = Annotated[float, typer.Option(help="δ at which ε is told; below 1 over the number of records.")]
RelationOption = Annotated[Relation, typer.Option(help="Which data sets count as neighbours.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusLine:
    """One data set.

    Attributes:
        data_set: its digest, or its name.
        unit: whose contribution is bounded.
        runs: that released anything.
        releases: entries in the ledger.
        epsilon: spent, under the relation asked for.
        other_epsilon: under the other one.
        left: of the budget asked about.
    """

    data_set: str
    unit: str
    runs: int
    releases: int
    epsilon: float
    other_epsilon: float
    left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryLine:
    """One release, and what was spent with it."""

    number: int
    at: str
    run: str
    step: int
    kind: str
    treatment: str
    event: str
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLine:
    """One release that a job would make.

    Attributes:
        kind: of what.
        treatment: how.
        noise: standard deviation, in the unit of the clip (``moments``: of the vector of unit-norm moments).
        times: how often it happens in the whole run.
        epsilon: of this release alone, in the whole run.
        signal_to_noise: of what a node learns from: one row's norm, one class mean's, or that of a sum of gradients
            that are all alike, over its noise's.
    """

    kind: str
    treatment: str
    noise: float | None
    times: int
    epsilon: float
    signal_to_noise: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Summary:
    """What a job would spend, in all.

    Attributes:
        data_set: its digest, or its name.
        records: in it.
        unit: whose contribution is bounded.
        units: how many there are.
        relation: which data sets count as neighbours.
        delta: at which ε is told.
        spent_before: ε, by all runs so far.
        spent_after: with this job.
        budget: ε that may be spent.
        fits: whether the job stays within it.
        ledger: in which all that is written down.
    """

    data_set: str
    records: int
    unit: str
    units: int
    relation: str
    delta: float
    spent_before: float
    spent_after: float
    budget: float
    fits: bool
    ledger: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(_Summary):
    """The same, release by release, and why no finite ε would hold, if so."""

    releases: list[PlanLine]
    holes: list[str]


@app.command()
def status(
    *,
    data_set: Annotated[
        str | None, typer.Option(help="One data set alone, with the sentence that may be claimed.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget, to tell what is left of it.")] = None,
    delta: DeltaOption = 1e-5,
    relation: RelationOption = Relation.REPLACE_ONE,
    ledger: LedgerOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show what was spent on each data set, by all runs together.

    epsilon is told under --relation, other epsilon under the other relation: two ways to say what was spent, which
    never add up. ε is ∞ where something left in the clear. left is what is left of --epsilon.

    Example: [bold]cloister privacy status --epsilon 4[/]
    """
    if epsilon is not None and not epsilon > 0:  # nor NaN
        raise ConfigError(f"--epsilon {epsilon:g}: a budget is above 0, such as 4")
    book = _opened(ledger)
    names = book.data_sets()
    if data_set is not None:
        if data_set not in names:
            raise _unknown(book, data_set)
        names = [data_set]
    lines = [_status(book.entries(name), name, epsilon, delta, relation) for name in names]
    if not lines and fmt is Format.TABLE:
        typer.echo(f"nothing was released yet (ledger {book.name})", err=True)
        return
    print_rows(lines, fmt)
    if data_set is not None and fmt is Format.TABLE:
        claim = claim_of(book.entries(data_set), delta=delta, relation=relation)
        typer.echo("\n".join(claim.lines()))


@app.command()
def history(
    data_set: Annotated[str, typer.Argument(metavar="DATA_SET", help="Its digest or name, as status shows it.")],
    *,
    delta: DeltaOption = 1e-5,
    relation: RelationOption = Relation.REPLACE_ONE,
    plot: Annotated[Path | None, typer.Option(help="Also draw ε over the releases into this PNG.")] = None,
    ledger: LedgerOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show every release on a data set, and how ε grew.

    event is what a release counts as: how far one unit can move it (sensitivity), the standard deviation of the noise
    on it (noise), and how often it was made (count); or the rate, noise multiplier and steps of sums over secret
    samples; or the reason why no ε covers it. docs/how-to/train-privately.md explains each word.

    Example: [bold]cloister privacy history cohort-2024 --plot spent.png[/]
    """
    book = _opened(ledger)
    book.verify()
    entries = book.entries(data_set)
    if not entries:
        raise _unknown(book, data_set)
    totals = [epsilon_of([e.event for e in entries[: n + 1]], delta, relation) for n in range(len(entries))]
    print_rows([_history(entry, total) for entry, total in zip(entries, totals, strict=True)], fmt)
    if plot is not None:
        _draw(plot, data_set, totals, delta, relation)
        progress_console().print(f"drawn into {plot}", soft_wrap=True)


@app.command()
def plan(
    job_file: JobArgument,
    *,
    settings: SetOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show what a job would spend, and how much noise that means, before anything leaves.

    Reads the data to name and check it, makes the model to count what crosses the cut; asks no node. Exits with 8 where
    an ε is asked for that would not hold, or is not there to spend.

    Example: [bold]cloister privacy plan job.toml --set privacy.epsilon=1.0[/]
    """
    job = job_from(job_file, settings)
    found = planned(job)
    if fmt is Format.JSON:
        print_record(found, fmt)
    else:
        _print(found)
    if job.privacy.epsilon is not None and not found.fits:
        raise typer.Exit(ExitCode.PRIVACY)


def _print(found: Plan) -> None:
    fmt = Format.TABLE
    print_record(_Summary(**{f.name: getattr(found, f.name) for f in dataclasses.fields(_Summary)}), fmt)
    if found.releases:
        print_rows(found.releases, fmt)
    for hole in found.holes:
        typer.echo(f"no finite ε: {hole}")
    signals = [line.signal_to_noise for line in found.releases if line.signal_to_noise is not None]
    if signals and min(signals) < _DROWNED:
        typer.echo(
            f"The signal is {min(signals):g} of the noise: expect a model that guesses. A larger ε helps, a front with "
            "fewer outputs, or a treatment that noises sums over many records (moments, aggregate)."
        )


def _opened(url: str | None) -> Ledger:
    """The ledger that is there: looking must not begin one, which would say that nothing was released."""
    if (book := Ledger.existing(url)) is None:
        raise ConfigError(
            f"there is no privacy ledger {url or default_url()}: nothing was released through it. Training begins it; "
            "another one is named by --ledger, or CLOISTER_LEDGER"
        )
    return book


def _unknown(book: Ledger, data_set: str) -> ConfigError:
    return ConfigError(f"the ledger {book.name} knows no data set {data_set}: `cloister privacy status` shows all")


def planned(job: Job) -> Plan:
    """What ``job`` would spend.

    Raises:
        ConfigError: the job's data cannot be named, or a treatment lacks its noise and a budget.
        BudgetSpentError: nothing is left.
    """
    policy, loader = job.privacy.policy(), make_loader(job, "train")
    made = cut_model(job, make_model(job), first_inputs(job, "train"))
    name = job.privacy.data_set or data_set_of(loader, read=True)
    if name is None:
        raise ConfigError('privacy: this loader has no data set that could be named by its digest: set data_set = "…"')
    records = len(data) if isinstance(data := getattr(loader, "dataset", None), Sized) else 0
    whose = units_of(job)
    if policy.table is not None and policy.unit != "record" and whose is None:
        raise ConfigError(f'privacy: unit = "{policy.unit}"; say whose each record is (units = "my_data:patients")')
    units = records if whose is None else len(set(whose.tolist()))
    width = sum(math.prod(spec.shape) for spec in made.program.inputs)
    book = Ledger.existing(job.privacy.ledger)
    if book is not None:
        book.check_name(name, data_set_of(loader, read=False))
    before = [] if book is None else [entry.event for entry in book.entries(name)]
    gaps = holes(
        policy,
        vanilla=made.head is None,
        front_learns=any(p.requires_grad for p in made.front.parameters()),
        head_learns=made.head is not None and any(p.requires_grad for p in made.head.parameters()),
    )
    if isinstance(policy.activations, Ckks):
        width = _learning(made, policy.activations, loader)
    releases = _releases(policy, loader, before, job.train.epochs, vanilla=made.head is None)
    if policy.table is not None and not gaps:  # what training would refuse is refused now
        check_records(policy, plan_table(policy, _budget(policy), tuple(before)), collect(made, loader, whose))
    if policy.labels_apart and made.head is None:
        check_labels(policy, labels_of(loader))
    after = math.inf if gaps else epsilon_of([*before, *(r.event for r in releases)], policy.delta, policy.relation)
    return Plan(
        data_set=name,
        records=records,
        unit=policy.unit,
        units=units,
        relation=str(policy.relation),
        delta=policy.delta,
        spent_before=_shown(epsilon_of(before, policy.delta, policy.relation)),
        spent_after=_shown(after),
        budget=_shown(policy.epsilon),
        fits=after <= policy.epsilon * (1 + 1e-9),
        releases=[_plan_line(release, policy, units, width) for release in releases],
        holes=gaps,
        ledger=(job.privacy.ledger or default_url()) if book is None else book.name,
    )


def _learning(made: Cut, treatment: Ckks, loader: Loader) -> int:
    """How many numbers learn under encryption; what training would refuse is refused now."""
    part = EncryptedPart(made, treatment)
    try:
        if isinstance(loader, PoissonLoader):
            part.block_rows(loader.capacity)
    finally:
        part.close()
    return sum(p.numel() for p in (*made.owner_parameters(), *made.middle.parameters()) if p.requires_grad)


def _releases(policy: Policy, loader: Loader, before: Sequence[Event], epochs: int, *, vanilla: bool) -> list[Release]:
    treatment = policy.activations
    if isinstance(treatment, Ckks):
        if not isinstance(loader, PoissonLoader):  # and then no ε is claimed
            return []
        rate, steps = loader.rate, epochs * len(loader)
        noise = treatment.noise or sums_noise(rate=rate, steps=steps, budget=_budget(policy), spent=before)
        event = SampledGaussian(rate=rate, noise_multiplier=noise, steps=steps)
        return [Release(kind="update", treatment="ckks", event=event)]
    once = label_releases(policy) if vanilla else []
    if policy.table is not None:
        once = list(plan_table(policy, _budget(policy), tuple(before)).releases)
    return [*once, *fresh_releases(policy, epochs=epochs)]


def _budget(policy: Policy) -> Budget:
    return Budget(policy.epsilon, policy.delta, policy.relation)


def _plan_line(release: Release, policy: Policy, units: int, width: int) -> PlanLine:
    event = release.event
    noise = event.noise if isinstance(event, Gaussian) else None
    times = event.count if isinstance(event, Gaussian) else 1
    if isinstance(event, SampledGaussian):
        noise, times = event.noise_multiplier, event.steps
    ratio = None
    if noise is not None:
        per_class = units / (policy.classes or 1)  # a unit's records weigh as much together as one
        rate = event.rate if isinstance(event, SampledGaussian) else 1.0
        summed = {Aggregate: per_class * rate, Moments: per_class, Ckks: units * rate}
        ratio = summed.get(type(policy.activations), 1.0) / (noise * math.sqrt(width))
    return PlanLine(
        kind=release.kind,
        treatment=release.treatment,
        noise=None if noise is None else round(noise, 4),
        times=times,
        epsilon=_shown(epsilon_of([event], policy.delta, policy.relation)),
        signal_to_noise=None if ratio is None else round(ratio, 4),
    )


def _status(entries: Sequence[Entry], name: str, budget: float | None, delta: float, relation: Relation) -> StatusLine:
    claim = claim_of(entries, delta=delta, relation=relation)
    left = None if budget is None else max(0.0, budget - claim.spent.epsilon)
    return StatusLine(
        data_set=name,
        unit=claim.spent.unit,
        runs=len({entry.run for entry in entries}),
        releases=claim.releases,
        epsilon=_shown(claim.spent.epsilon),
        other_epsilon=_shown(claim.other),
        left=None if left is None else _shown(left),
    )


def _history(entry: Entry, total: float) -> HistoryLine:
    return HistoryLine(
        number=entry.number,
        at=entry.at,
        run=entry.run,
        step=entry.step,
        kind=entry.kind,
        treatment=entry.treatment,
        event=told(entry.event),
        epsilon=_shown(total),
    )


def _shown(epsilon: float) -> float:
    return round(epsilon, 4)


def _draw(path: Path, data_set: str, totals: Sequence[float], delta: float, relation: Relation) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes half a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    finite = [total for total in totals if math.isfinite(total)]
    axes.step(range(1, len(finite) + 1), finite, where="post", color="#1f5fa8", linewidth=2)
    if len(finite) < len(totals):
        axes.axvline(len(finite) + 1, color="#b03030", linestyle="--", label="in the clear from here: ε = ∞")
        axes.legend()
    axes.set(xlabel="release", ylabel="ε spent", ylim=(0, None), title=f"{data_set[:40]}  (δ = {delta:g}, {relation})")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
