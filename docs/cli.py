"""Writes the command line's reference, `docs/cli.md`, from the commands themselves: ``python -m docs.cli FILE``."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Final

import typer
from typer.cli import get_docs_for_click

from cloister import exits
from cloister.main import COMMANDS

HEADER: Final = """\
# The command line

Written by `make docs` from the commands themselves.

## Exit codes

"""


def main() -> None:
    """Writes the file that the command line names."""
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The whole reference as Markdown: the exit codes, then each command with its arguments and options."""
    codes = "\n".join(_exit_codes())
    commands = "\n\n".join(_command(name).strip() for name in COMMANDS)
    return f"{HEADER}{codes}\n\n{commands}\n"


def _exit_codes() -> list[str]:
    """The rows of the table in the docstring of `cloister.exits`, as Markdown."""
    table = (exits.__doc__ or "").split("\n\n")[1].splitlines()
    rows = [line.replace("``", "`").split(maxsplit=1) for line in table if not line.startswith("=")]
    return [f"| {code} | {meaning} |" for code, meaning in [rows[0], ["---", "---"], *rows[1:]]]


def _command(name: str) -> str:
    command = typer.main.get_command(importlib.import_module(f"cloister.commands.{name}").app)
    context = typer.Context(command, info_name=f"cloister {name}")
    text = get_docs_for_click(obj=command, ctx=context, name=f"cloister {name}", indent=1)
    return re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", text)


if __name__ == "__main__":
    main()
