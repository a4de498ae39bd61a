"""The audit as files: one HTML page that needs nothing else, PNGs, and JSON.

The page is built as a tree of elements and serialised at the end, so that no name of the user's can become markup. It
has no scripts and loads nothing; pictures stand in it as data.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from privacy.leakage.advice import LIMITS, Advice, advise, explained, percent, strongest
from privacy.leakage.pictures import curves_png, exhibits_png
from privacy.leakage.results import Attack, CutLeakage, Outcome, Score, Settings
from wire.errors import ConfigError

__all__ = ["as_record", "write_report"]

FORMAT: Final = "cloister.leakage/1"
_MOST_NAME: Final = 40

_STYLE: Final = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin-top: 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.75rem 0; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { font-size: 0.9rem; color: #444; }
.note { border-left: 4px solid #0072b2; background: #f1f6fa; padding: 0.5rem 1rem; }
.void { border-left: 4px solid #b33a00; background: #fdf3ee; padding: 0.5rem 1rem; }
code { font-size: 0.95em; overflow-wrap: anywhere; }
@media print {
  body { margin: 0; max-width: none; font-size: 10.5pt; }
  figure, table, .note, .void { break-inside: avoid; } h2, h3 { break-after: avoid; } .wide { overflow: visible; }
}
"""


def write_report(
    found: Sequence[CutLeakage],
    folder: Path,
    *,
    model: str,
    settings: Settings,
    left_out: Mapping[str, str] | None = None,
) -> Advice:
    """Writes ``report.html``, ``leakage.json``, ``curves.png`` and a PNG for each cut into ``folder``.

    Args:
        found: at least one cut, in the order in which the model runs.
        folder: is made where it is missing; files of these names are replaced.
        model: its name, for the title.
        settings: how the audit ran.
        left_out: cuts that should have been audited and were not, each with the reason.

    Returns:
        The advice that stands in the report.

    Raises:
        ConfigError: the folder cannot be written.
    """
    advice = advise(found)
    curves, pictures = curves_png(found), [exhibits_png(leakage) for leakage in found]
    missing = dict(left_out or {})
    record = as_record(found, advice, model=model, settings=settings, left_out=missing)
    page = _page(found, advice, curves, pictures, model=model, settings=settings, left_out=missing)
    files = {f"cut-{n:02}-{_file_name(c.cut)}.png": p for n, (c, p) in enumerate(zip(found, pictures, strict=True), 1)}
    files |= {"curves.png": curves, "leakage.json": (json.dumps(record, indent=2) + "\n").encode()}
    files |= {"report.html": page.encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written: {error.strerror}") from error
    return advice


def as_record(
    found: Sequence[CutLeakage],
    advice: Advice,
    *,
    model: str,
    settings: Settings,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything but the pictures, as JSON takes it."""
    cuts = []
    for leakage in found:
        # Not asdict of the whole: it would copy every picture.
        plain = {f.name: getattr(leakage, f.name) for f in dataclasses.fields(leakage) if f.name != "exhibits"}
        plain |= {name: _plain(value) for name, value in plain.items()}
        cuts.append(plain | {"void": leakage.void, "explained": explained(strongest(leakage), leakage)})
    return {
        "format": FORMAT,
        "model": model,
        "settings": _plain(settings),
        "advice": _plain(advice),
        "cuts": cuts,
        "left_out": dict(left_out or {}),
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 -- any field of the results
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _file_name(cut: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", cut)[:_MOST_NAME].strip("._") or "cut"


# --- The page ---------------------------------------------------------------------------------------------------------


def _page(
    found: Sequence[CutLeakage],
    advice: Advice,
    curves: bytes,
    pictures: Sequence[bytes],
    *,
    model: str,
    settings: Settings,
    left_out: Mapping[str, str],
) -> str:
    html = ET.Element("html", lang="en")
    head = _add(html, "head")
    _add(head, "meta", charset="utf-8")
    _add(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _add(head, "title", f"Leakage audit of {model}")
    _add(head, "style", _STYLE)
    main = _add(_add(html, "body"), "main")
    _add(main, "h1", f"Leakage audit of {model}")
    _add(main, "p", _setting(found[0], settings))
    _summary(main, advice, left_out)
    _add(main, "h2", "The cuts compared")
    _table_of_cuts(main, found, advice)
    _figure(
        main, curves, "Reconstruction, distance correlation and label inference over the cuts; figures stand above."
    )
    for leakage, picture in zip(found, pictures, strict=True):
        _cut_section(main, leakage, picture)
    _how_to_read(main, found[0], settings)
    # Its own text alone may hold the angle brackets of a style; everything else is escaped by the serialiser.
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def _setting(first: CutLeakage, settings: Settings) -> str:
    treatment = settings.treatment
    seen = (
        "clear activations"
        if treatment is None
        else f"activations clipped to an L2 norm of {treatment.clip:g} and noised with σ = {treatment.noise:g} of it"
    )
    return (
        f"The attacker knows {first.known:,} records and attacks {first.attacked:,} others, by what a node would see: "
        f"{seen}. Each attack had at most {settings.seconds:g} seconds. Seed {settings.seed}."
    )


def _summary(parent: ET.Element, advice: Advice, left_out: Mapping[str, str]) -> None:
    _add(parent, "h2", "What to do")
    box = _add(parent, "div", None, **{"class": "note" if advice.cut else "void"})
    if advice.cut is None:
        _add(box, "p", "The audit failed. Its figures say nothing about what these cuts reveal.")
    else:
        line = _add(box, "p", "Recommended cut: behind ")
        _tail(_add(line, "code", advice.cut), f". Treatment: {advice.treatment}.")
    reasons = _add(box, "ul")
    for reason in advice.reasons:
        _add(reasons, "li", reason)
    for cut, why in left_out.items():
        _add(reasons, "li", f"Not audited, so nothing is known of it: {cut} ({why}).")
    limits = _add(parent, "p")
    _add(limits, "strong", " ".join(advice.limits))


def _table_of_cuts(parent: ET.Element, found: Sequence[CutLeakage], advice: Advice) -> None:
    measure = found[0].measure
    heads = ("cut", "activations", "distance correlation²", f"strongest attack, {measure}", "read by a classifier")
    rows = []
    for leakage in found:
        seen, guess = strongest(leakage).seen, leakage.best_guess("gradients", "outputs", "activations")
        treated = leakage.treated_distance_correlation
        rows.append(
            (
                leakage.cut
                + (" (recommended)" if leakage.cut == advice.cut else "")
                + (" (void)" if leakage.void else ""),
                f"{leakage.dimensions:,}",
                f"{leakage.distance_correlation if treated is None else treated:.3f}",
                "-" if seen is None else f"{seen.similarity:.3f}",
                "-" if seen is None or seen.accuracy is None else percent(seen.accuracy),
                "-" if guess is None else f"{percent(guess.accuracy)} ({guess.source}, {guess.method})",
            )
        )
    mean = found[0].baselines["mean input"]
    caption = f"Each cut, on what the node would see. The mean input has a similarity of {mean.similarity:.3f}."
    _table(parent, caption, (*heads, "labels guessed, best attack"), rows, numbers=(1, 2, 3, 4))


def _cut_section(parent: ET.Element, leakage: CutLeakage, picture: bytes) -> None:
    heading = _add(parent, "h2", "Behind ")
    _add(heading, "code", leakage.cut)
    trains = "trains" if leakage.front_trains else "is fixed"
    _add(
        parent,
        "p",
        f"{leakage.dimensions:,} activations for {leakage.input_dimensions:,} numbers of an input. The front {trains}.",
    )
    if leakage.void:
        box = _add(parent, "p", None, **{"class": "void"})
        _add(box, "strong", "Audit failed. ")
        box[-1].tail = (
            "The informed decoder does not beat the mean input on clear activations. This says nothing about what the "
            "cut reveals: give more records (--rows), more time (--seconds-per-attack), or look for a fault in the "
            "data."
        )
    titles = ", ".join(exhibit.title for exhibit in leakage.exhibits[1:])
    _figure(
        parent, picture, f"Originals in the first row; beneath them, each made from what the node would see: {titles}."
    )
    _reconstructions(parent, leakage)
    _label_table(parent, leakage)


def _reconstructions(parent: ET.Element, leakage: CutLeakage) -> None:
    original = ("(the original)", "", "", "0", "1.000", _share(leakage.originals_accuracy), "", "")
    rows: list[tuple[str, ...]] = [original]
    for name, score in leakage.baselines.items():
        rows.append((name, "baseline", "", *_cells(score), "", ""))
    for attack in leakage.attacks:
        rows += list(_attack_rows(attack))
    heads = (
        "method",
        "outcome",
        "on",
        "MSE",
        leakage.measure,
        "read by a classifier",
        "labels",
        "seconds",
    )
    _table(parent, "Reconstruction", heads, rows, numbers=(3, 4, 5, 6, 7))
    notes = _add(parent, "ul")
    for attack in leakage.attacks:
        _add(notes, "li", f"{attack.name} knows {attack.knows}" + (f"; {attack.note}." if attack.note else "."))


def _attack_rows(attack: Attack) -> Iterable[tuple[str, ...]]:
    outcome = "audit failed (void)" if attack.outcome is Outcome.VOID else str(attack.outcome)
    seconds = f"{attack.seconds:.0f}"
    labels = "" if attack.labels is None else percent(attack.labels)
    if attack.clear is None:
        yield (attack.name, outcome, "", "-", "-", "-", "", seconds)
        return
    clear_labels = labels if attack.treated is None else ""
    yield (
        attack.name,
        outcome,
        "clear",
        *_cells(attack.clear),
        clear_labels,
        seconds if attack.treated is None else "",
    )
    if attack.treated is not None:
        nearer = "beats the mean input" if attack.treated_beats_mean else "no nearer than the mean input"
        yield (attack.name, nearer, "treated", *_cells(attack.treated), labels, seconds)


def _cells(score: Score) -> tuple[str, str, str]:
    return f"{score.mse:.4g}", f"{score.similarity:.3f}", _share(score.accuracy)


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _label_table(parent: ET.Element, leakage: CutLeakage) -> None:
    if leakage.labels and leakage.chance is not None:
        rows = [(guess.source, guess.method, guess.knows, percent(guess.accuracy)) for guess in leakage.labels]
        caption = f"Label inference; the commonest label alone gets {percent(leakage.chance)}"
        _table(parent, caption, ("from", "method", "the attacker knows", "labels guessed"), rows, numbers=(3,))
    if leakage.labels_note:
        _add(parent, "p", f"Labels: {leakage.labels_note}.")


def _how_to_read(parent: ET.Element, first: CutLeakage, settings: Settings) -> None:
    _add(parent, "h2", "How to read this")
    notes = _add(parent, "ul")
    for line in (
        (
            f"Similarity is {first.measure}: 1 is the original. Compare it with the mean input, which needs no "
            "attack at all, and with the mean of the right class, which tells no more than the label."
        ),
        (
            "A low similarity does not mean that nothing can be read: see what the classifier reads, and look at the "
            "pictures."
        ),
        (
            "Distance correlation is the bias-corrected square (Székely and Rizzo 2014): 0 on average for "
            "independent data, 1 where activations are the input up to rotation and scale."
        ),
        (
            "Void: the decoder does not beat the mean input on clear activations by three standard errors. The audit "
            "of that cut failed; it has not found the cut to be tight."
        ),
        (
            "Activations are those of evaluation, without dropout. Gradients are those of the cross-entropy of each "
            "record, as the model was given: its weights decide, so audit it trained as well as fresh."
        ),
        *(
            ()
            if settings.deep
            else ("UnSplit, the pseudo-client and FSHA were not tried: --deep runs them, and they take minutes.",)
        ),
        *LIMITS,
    ):
        _add(notes, "li", line)


# --- Elements ---------------------------------------------------------------------------------------------------------


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, {name: _visible(value) for name, value in attributes.items()})
    child.text = None if text is None else _visible(text)
    return child


def _tail(element: ET.Element, text: str) -> None:
    element.tail = _visible(text)


def _visible(text: str) -> str:
    """``text`` without control characters, which no page may hold, and lone surrogates, which no file can."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _table(
    parent: ET.Element,
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int],
) -> None:
    table = _add(_add(parent, "div", None, **{"class": "wide"}), "table")
    _add(table, "caption", caption)
    line = _add(_add(table, "thead"), "tr")
    for head in heads:
        _add(line, "th", head, scope="col")
    body = _add(table, "tbody")
    for row in rows:
        line = _add(body, "tr")
        _add(line, "th", row[0], scope="row")
        for column, cell in enumerate(row[1:], 1):
            _add(line, "td", cell, **({"class": "n"} if column in numbers else {}))


def _figure(parent: ET.Element, png: bytes, caption: str) -> None:
    figure = _add(parent, "figure")
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    _add(figure, "img", None, src=source, alt=caption)
    _add(figure, "figcaption", caption)
