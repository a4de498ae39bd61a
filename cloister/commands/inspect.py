"""``cloister inspect``: where a model can be cut, and what each cut costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.factories import EXAMPLE_SUFFIX, example_inputs, load_factory, load_model, random_inputs
from cloister.output import Format, FormatOption, clean, print_record, print_rows
from wire.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from client_side.survey import Candidate, Survey

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


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``--format json`` prints."""

    model: str
    head: str | None
    batch: int
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

    Example: [bold]cloister inspect examples.models:resnet18 --head fc --link-mbit 1000[/]
    """
    if head is not None and vanilla:
        raise ConfigError("--head and --vanilla: give one of them")
    made = load_model(model)
    inputs = _inputs(model, example, input_shape or [], dtype or [])
    from client_side.survey import survey  # noqa: PLC0415 - the command's errors should not wait for torch

    found = survey(made, inputs, head=head, vanilla=vanilla, check=check)
    best = found.recommended(owner_share / 100)
    inspection = _inspection(model, found, best, batch, link_mbit)
    if fmt is Format.JSON:
        print_record(inspection, fmt)
        return
    print_rows([_row(cost) for cost in inspection.cuts], fmt, styles={_RECOMMENDED: "bold green", _IMPOSSIBLE: "dim"})
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


def _inspection(model: str, found: Survey, best: Candidate | None, batch: int, link_mbit: float) -> Inspection:
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
        )
        for c in found.candidates
    )
    return Inspection(model, found.head, batch, link_mbit, None if best is None else best.front, cuts)


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


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 11.2M."""
    prefixes = ("", "k", "M", "G", "T")
    step = min(len(prefixes) - 1, max(0, math.floor(math.log10(max(1.0, number)) / 3)))
    scaled = number / 1000**step
    return f"{scaled:.{0 if not step or scaled >= 100 else 1}f}{prefixes[step]}"  # noqa: PLR2004 -- three digits


def _advice(inspection: Inspection, best: Candidate | None) -> str:
    lines = [
        "Parameters, and work in operations: here/on the node. Bytes: up/down. Work and bytes: for a sample and step.",
        f"Link: a batch of {inspection.batch} at {inspection.link_mbit:g} Mbit/s.",
    ]
    lines += [f"Not behind {cost.front}: {cost.reason}" for cost in inspection.cuts if not cost.possible]
    if best is None:
        return "\n".join(
            [*lines, "No front of this model leaves the node anything to train: give it three parts by hand."]
        )
    lines += [f"Recommended: {best.owner_share:.1%} of the work stays here. For a job file:", ""]
    lines += ["[model]", f'factory = "{inspection.model}"', "", "[cut]", f'front = "{best.front}"']
    return "\n".join(lines if inspection.head is None else [*lines, f'head = "{inspection.head}"'])
