"""The command line: the list of commands, each imported only when it is called, so that ``--help`` is instant."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from cloister import __version__
from cloister.exits import run

__all__ = ["COMMANDS", "app"]

COMMANDS: Final = {
    "demo": "Train a real model through a real node on this machine, and prove that the cut changes nothing.",
    "node": "Serve middles: run on the GPU machine.",
    "train": "Train a job's model through a node.",
    "runs": "List, show, resume and remove training runs.",
    "eval": "Evaluate a trained model through a node.",
    "predict": "Predict with a trained model through a node.",
    "inspect": "Show where a model can be cut, and what each cut costs.",
    "privacy": "Plan, show and explain what was spent on each data set.",
    "dataset": "Commit to a data set without showing it; open single records, or prove their absence.",
    "anchor": "Put the provenance log's head on a chain, and see where heads stand.",
    "bundle": "Write one file from which anybody can verify a run, without its data.",
    "card": "Write a run's claims as a section of its model's card.",
    "verify": "Verify a bundle: each claim, its verdict, and who stands behind it.",
    "audit": "Verify bundles on a page in the browser.",
    "leakage": "Measure what activations and gradients give away, cut by cut.",
    "keys": "Make, show and trust identities.",
    "doctor": "Check this machine, an identity and a node, and say what to do.",
}


class _Commands(TyperGroup):
    """A group whose commands stand in by their line of help until one of them is called."""

    def __init__(self, **attrs: Any) -> None:  # noqa: ANN401 - typer's own
        super().__init__(**attrs)
        shipped = {name: line for name, line in COMMANDS.items() if importlib.util.find_spec(_module(name))}
        self.commands.update({name: TyperCommand(name, help=line) for name, line in shipped.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:  # noqa: ANN401 - as above
        if args and args[0] in self.commands:
            self.commands[args[0]] = typer.main.get_command(importlib.import_module(_module(args[0])).app)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as above
        return run(lambda: super(_Commands, self).invoke(ctx))


def _module(command: str) -> str:
    return f"cloister.commands.{command}"


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"cloister {__version__}")
        raise typer.Exit


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def _cloister(
    *,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train on rented GPUs that never see the data.

    Start with [bold]cloister demo[/]. Then, on your machine: [bold]cloister keys init --role owner --out owner[/]
    """
