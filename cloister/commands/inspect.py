"""``cloister inspect``: where a model can be cut, and what each cut costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.factories import EXAMPLE_SUFFIX, example_inputs, load_factory, load_model, random_inputs
from cloister.output import Format, FormatOption, clean, print_record, print_rows
from wire.errors import ConfigError, CutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from client_side.survey import Candidate, Survey
    from cloister.encrypting import EncryptedCost

__all__ = ["CutCost", "Inspection", "app"]

_ROWS: Final = 4  # of the example: costs are per sample, and fake tensors take no time; export needs at least 2
_OWNER_SHARE: Final = 25.0
_RECOMMENDED: Final = "best"
_IMPOSSIBLE: Final = "no"
_IDLE: Final = "idle"

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class CutCost:
    """One possible cut, as ``--format json`` prints it; see ``cloister inspect --help`` for what is counted."""

    front: str
    possible: bool
    recommended: bool
    reason: str
    owner_parameters: int
    node_parameters: int
    owner_flops_per_sample: int
    node_flops_per_sample: int
    bytes_up_per_sample: int
    bytes_down_per_sample: int
    tensors_up: int
    link_ms_per_step: float
    encryption: EncryptedCost | None
    no_encryption: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``--format json`` prints."""

    model: str
    head: str | None
    batch: int
    records: int | None
    link_mbit: float
    recommended_front: str | None
    cuts: tuple[CutCost, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table; its fields are the headings."""

    front: str
    params: str = "-"
    work: str = "-"
    bytes: str = "-"
    tensors: str = "-"
    link_ms: str = "-"
    note: str = _IMPOSSIBLE


@dataclass(frozen=True, slots=True)
class _EncryptedRow:
    """One cut whose middle could be encrypted."""

    front: str
    layer: str
    bytes: str
    owner_ms: str
    node_ms: str
    home_ms: str
    times_home: str
    epoch: str


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="Makes the model, called without arguments.")],
    *,
    head: Annotated[
        str | None,
        typer.Option(help="Where your head begins; the last submodule with parameters, unless said."),
    ] = None,
    vanilla: Annotated[bool, typer.Option("--vanilla", help="No head: the node gets loss and labels.")] = False,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Makes inputs, called with a batch size. MODULE:FACTORY_example, unless said and if it is there.",
        ),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(help="Or: an input's shape without the batch, such as 1,28,28; again for each further input."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="With --input-shape: float32 (unless said), int64, …; once, or once for each input."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 64,
    records: Annotated[
        int | None, typer.Option(min=1, help="Samples in an epoch, to tell what encrypting one would cost.")
    ] = None,
    link_mbit: Annotated[
        float, typer.Option(min=0.001, help="Rate of the line to the node, each way, in Mbit/s.")
    ] = 100.0,
    owner_share: Annotated[
        float,
        typer.Option(min=0, max=100, help="How much of the work may stay here, in percent, for the recommended cut."),
    ] = _OWNER_SHARE,
    check: Annotated[bool, typer.Option("--check", help="Make each cut for real; takes seconds for each.")] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show where a model can be cut, and what each cut costs.

    A row is a front: everything up to and including that submodule stays here, everything from the head on too, and the
    node gets what is between. Counted are, for one sample in one training step: the work (matrix products, convolutions
    and attention, forward and backward) and the bytes that cross, up to the node and down from it (tensors and their
    gradients; with --vanilla 8 bytes for a label). The link's time is that of a whole batch, both ways one after the
    other, when nothing overlaps.

    Recommended is the cut with the least bytes among those that leave at most --owner-share of the work here; of equal
    ones the deepest, which tells the node least. Idle: the node would train nothing. What a cut reveals is another
    question.

    A middle that is one linear or convolution layer can be trained under encryption (activations = "ckks" in a job).
    What that would cost is measured here for a second or two: ms of one core for one sample, to encrypt (the owner), to
    multiply (the node, were it this machine), and to compute the layer in the clear at home.

    Example: [bold]cloister inspect examples.models:resnet18 --head fc --link-mbit 1000[/]
    """
    if head is not None and vanilla:
        raise ConfigError("--head and --vanilla: give one of them")
    made = load_model(model)
    inputs = _inputs(model, example, input_shape or [], dtype or [])
    from client_side.survey import survey  # noqa: PLC0415 - the command's errors should not wait for torch

    found = survey(made, inputs, head=head, vanilla=vanilla, check=check)
    best = found.recommended(owner_share / 100)
    costs = [
        _encryption(made, inputs, c, found.head, batch=batch, records=records, link_mbit=link_mbit)
        for c in found.candidates
    ]
    inspection = _inspection(model, found, best, costs, batch=batch, records=records, link_mbit=link_mbit)
    if fmt is Format.JSON:
        print_record(inspection, fmt)
        return
    print_rows([_row(cost) for cost in inspection.cuts], fmt, styles={_RECOMMENDED: "bold green", _IMPOSSIBLE: "dim"})
    typer.echo(clean(_legend(inspection)))
    _print_encryption(inspection)
    typer.echo(clean(_advice(inspection, best)))


def _inputs(model: str, example: str | None, shapes: list[str], dtypes: list[str]) -> tuple[torch.Tensor, ...]:
    if example is not None and (shapes or dtypes):
        raise ConfigError("--example and --input-shape: give one of them")
    if shapes:
        return random_inputs(shapes, dtypes, _ROWS)
    if dtypes:
        raise ConfigError("--dtype says what --input-shape is made of: give that too")
    if example is None:
        example = model + EXAMPLE_SUFFIX
        try:
            load_factory(example)
        except ConfigError:
            raise ConfigError(
                f"there is no {example} to make inputs with: give --input-shape, such as 3,32,32 (without the batch), "
                "or --example MODULE:FACTORY",
            ) from None
    return example_inputs(example, _ROWS)


def _encryption(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    candidate: Candidate,
    head: str | None,
    *,
    batch: int,
    records: int | None,
    link_mbit: float,
) -> tuple[EncryptedCost | None, str]:
    """What encrypting a cut's middle would cost, or why it cannot be."""
    from client_side.cutting import cut  # noqa: PLC0415 -- as above
    from cloister.encrypting import encrypted_cost  # noqa: PLC0415

    if head is None:
        return None, "without a head the node computes the loss"
    if not candidate.possible or candidate.products != 1 or candidate.tensors != 1:
        many = f"{candidate.products} layers that multiply" if candidate.products != 1 else "not one tensor crosses"
        return None, candidate.reason or many
    try:
        made = cut(model, front=candidate.front, head=head, example=inputs)
        return encrypted_cost(made, batch=batch, records=records, link_mbit=link_mbit), ""
    except (ConfigError, CutError) as error:
        return None, str(error)


def _inspection(
    model: str,
    found: Survey,
    best: Candidate | None,
    encryption: Sequence[tuple[EncryptedCost | None, str]],
    *,
    batch: int,
    records: int | None,
    link_mbit: float,
) -> Inspection:
    cuts = tuple(
        CutCost(
            front=c.front,
            possible=c.possible,
            recommended=c is best,
            reason=c.reason,
            owner_parameters=c.owner_parameters,
            node_parameters=c.node_parameters,
            owner_flops_per_sample=c.owner_flops,
            node_flops_per_sample=c.node_flops,
            bytes_up_per_sample=c.bytes_up,
            bytes_down_per_sample=c.bytes_down,
            tensors_up=c.tensors,
            link_ms_per_step=round(c.bytes_per_sample * batch * 8 / (link_mbit * 1000), 3),
            encryption=cost,
            no_encryption=why_not,
        )
        for c, (cost, why_not) in zip(found.candidates, encryption, strict=True)
    )
    return Inspection(model, found.head, batch, records, link_mbit, None if best is None else best.front, cuts)


def _row(cost: CutCost) -> _Row:
    if not cost.possible:
        return _Row(cost.front)
    return _Row(
        front=cost.front,
        params=f"{_short(cost.owner_parameters)}/{_short(cost.node_parameters)}",
        work=f"{_short(cost.owner_flops_per_sample)}/{_short(cost.node_flops_per_sample)}",
        bytes=f"{_short(cost.bytes_up_per_sample)}/{_short(cost.bytes_down_per_sample)}",
        tensors=str(cost.tensors_up),
        link_ms=f"{cost.link_ms_per_step:,.1f}",
        note=_RECOMMENDED if cost.recommended else "" if cost.node_parameters else _IDLE,
    )


def _print_encryption(inspection: Inspection) -> None:
    """The cuts whose middle could be encrypted, and what that would cost."""
    found = [(cut.front, cut.encryption) for cut in inspection.cuts if cut.encryption is not None]
    if not found:
        typer.echo(
            "Encryption: behind no front is the middle one linear or convolution layer with a head behind it (an "
            "nn.Identity() will do)."
        )
        return
    typer.echo(f"Encryption is possible. For a sample, in batches of {inspection.batch}, measured here just now:")
    print_rows([_encrypted_row(front, cost) for front, cost in found], Format.TABLE)
    front, cost = found[0]
    typer.echo(
        f"{cost.security_bits}-bit secure. Bytes: up/down; a batch has room for the {cost.capacity} rows that a secret "
        "sample may come to. Milliseconds: of one core."
    )
    if cost.times_home is None:
        typer.echo('Times are not measured: the library is missing (pip install "cloister[ckks]").')
        return
    times = f"{cost.times_home:,.0f}" if cost.times_home >= 10 else f"{cost.times_home:.1f}"  # noqa: PLR2004 -- digits
    typer.echo(
        f"Behind {front}, encrypting costs {times} times what computing the layer here would; one {times} times as "
        "wide would cost the same. It buys confidentiality, not compute."
    )


def _encrypted_row(front: str, cost: EncryptedCost) -> _EncryptedRow:
    figures = [cost.owner_ms_per_sample, cost.node_ms_per_sample, cost.home_ms_per_sample]
    owner, node, home = ("-" if ms is None else f"{ms:.3g}" for ms in figures)
    epoch = "-" if cost.bytes_per_epoch is None else f"{_short(cost.bytes_per_epoch)}B"
    if cost.seconds_per_epoch is not None:
        epoch = f"{cost.seconds_per_epoch:.1f} s, {epoch}"
    return _EncryptedRow(
        front=front,
        layer=f"{cost.features} to {cost.outputs}",
        bytes=f"{_short(cost.bytes_up_per_sample)}/{_short(cost.bytes_down_per_sample)}",
        owner_ms=owner,
        node_ms=node,
        home_ms=home,
        times_home="-" if cost.times_home is None else f"{cost.times_home:,.0f}",
        epoch=epoch,
    )


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 11.2M."""
    prefixes = ("", "k", "M", "G", "T")
    step = min(len(prefixes) - 1, max(0, math.floor(math.log10(max(1.0, number)) / 3)))
    scaled = number / 1000**step
    return f"{scaled:.{0 if not step or scaled >= 100 else 1}f}{prefixes[step]}"  # noqa: PLR2004 -- three digits


def _legend(inspection: Inspection) -> str:
    lines = [
        "Parameters, and work in operations: here/on the node. Bytes: up/down. Work and bytes: for a sample and step.",
        f"Link: a batch of {inspection.batch} at {inspection.link_mbit:g} Mbit/s.",
    ]
    lines += [f"Not behind {cost.front}: {cost.reason}" for cost in inspection.cuts if not cost.possible]
    return "\n".join(lines)


def _advice(inspection: Inspection, best: Candidate | None) -> str:
    if best is None:
        return "No front of this model leaves the node anything to train: give it three parts by hand."
    lines = [f"Recommended: {best.owner_share:.1%} of the work stays here. For a job file:", ""]
    lines += ["[model]", f'factory = "{inspection.model}"', "", "[cut]", f'front = "{best.front}"']
    return "\n".join(lines if inspection.head is None else [*lines, f'head = "{inspection.head}"'])
