"""``cloister card``: a finished run's claims as a section of its model's card, in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from cloister.runs import CARD_FILE, MODEL_FILE
from cloister.weights import write_whole
from wire.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_BEGIN: Final = "<!-- cloister: claims -->"
_MARKS: Final = frozenset("&<>|`[]*_!\\")
_END: Final = "<!-- cloister: end of claims -->"


@app.command()
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    *,
    bundle: Annotated[Path | None, typer.Option(help="The bundle; RUN/bundle.zip if not said.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Into RUN/model-card.md, in place of an earlier one.")] = False,
) -> None:
    """Print what a bundle proves of a run's model, and what it only repeats, as Markdown for the model's card.

    Example: [bold]cloister card runs/digits --write[/]
    """
    from provenance.bundle import load_bundle  # noqa: PLC0415 - `--help` is quicker without
    from provenance.verification import verify  # noqa: PLC0415

    path = run / "bundle.zip" if bundle is None else bundle
    if not path.exists():
        raise ConfigError(f"there is no bundle {path}: `cloister bundle {run}` writes it")
    model = run / MODEL_FILE
    report = verify(load_bundle(path), model=model if model.exists() else None)
    lines = [_BEGIN, "## Provenance", ""]
    lines += [f"Verdict over all claims without asking a chain: **{report.verdict}**. Record `{report.subject}`;"]
    lines += [f"`cloister verify {path.name} --model {MODEL_FILE} --rpc URL` checks it again.", ""]
    lines += ["| about | claim | verdict | basis | by |", "|---|---|---|---|---|"]
    lines += [
        "| " + " | ".join(_cell(text) for text in (c.part, c.claim, c.verdict, c.basis, c.by)) + " |"
        for c in report.claims
    ]
    section = "\n".join([*lines, "", _END, ""])
    if write:
        write_whole(run / CARD_FILE, _placed(run / CARD_FILE, section).encode())
        typer.echo(f"wrote {run / CARD_FILE}", err=True)
    else:
        typer.echo(section, nl=False)


def _cell(text: str) -> str:
    """Foreign text, inert in Markdown and HTML."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return "".join(f"&#{ord(c)};" if c in _MARKS else c for c in shown)


def _placed(file: Path, section: str) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return section
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    before, begin, rest = text.partition(_BEGIN)
    return before + section + rest.partition(_END)[2].lstrip("\n") if begin else f"{text.rstrip()}\n\n{section}"
