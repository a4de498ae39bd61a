"""Pictures of what an audit found, as PNG files in memory.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart; lines differ in marker and stroke as well,
so that they can be told apart in print.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from privacy.leakage.advice import strongest
from privacy.leakage.results import CutLeakage, Exhibit

__all__ = ["curves_png", "exhibits_png"]

_DPI: Final = 110
_MOST_SIDE: Final = 4  # channels of a signal that are drawn
_IMAGE: Final = 4  # dimensions of [rows, channels, height, width]
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#555555")
_MARKERS: Final = ("o", "s", "^", "")
_STROKES: Final = ("-", "-", "-", "--")
_MOST_NAME: Final = 24


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    value: Callable[[CutLeakage], float | None]


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    unit: str
    lines: tuple[_Line, ...]


def exhibits_png(leakage: CutLeakage) -> bytes:
    """Originals in the first row, and beneath each what baselines and attacks made of it."""
    rows, count = leakage.exhibits, max(len(e.values) for e in leakage.exhibits)
    is_image = rows[0].values.ndim == _IMAGE
    figure = Figure(figsize=(1.9 + 0.95 * count, 0.98 * len(rows)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    low, high = float(rows[0].values.min()), float(rows[0].values.max())
    for number, exhibit in enumerate(rows):
        for column, axes in enumerate(grid[number]):
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_color("#bbbbbb")
            if column < len(exhibit.values):
                _draw(axes, exhibit.values[column], low, high, is_image=is_image)
        first = grid[number][0]
        first.set_ylabel(_caption(exhibit), rotation=0, ha="right", va="center", labelpad=8, parse_math=False)
    return _png(figure)


def _caption(exhibit: Exhibit) -> str:
    return exhibit.title.replace(", ", ",\n").replace("informed ", "informed\n").replace("nearest ", "nearest\n")


def _draw(axes: Axes, values: NDArray[np.float32], low: float, high: float, *, is_image: bool) -> None:
    if not is_image:
        axes.plot(np.atleast_2d(values)[:_MOST_SIDE].T, linewidth=0.8)
        margin = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        return
    scaled = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    if len(values) in (3, 4):
        axes.imshow(scaled[:3].transpose(1, 2, 0), interpolation="nearest")
    else:
        axes.imshow(scaled.mean(0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def curves_png(found: Sequence[CutLeakage]) -> bytes:
    """Reconstruction, distance correlation and label inference, each over the cuts in their order."""
    shown = [p for p in _panels(found[0].measure) if any(x.value(c) is not None for x in p.lines for c in found)]
    figure = Figure(figsize=(4.1 * len(shown), 3.9), dpi=_DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw_panel(axes, panel, found)
    return _png(figure)


def _panels(measure: str) -> tuple[_Panel, ...]:
    return (
        _Panel(
            "reconstruction",
            f"{measure} to the originals (1: the original)",
            (
                _Line("strongest attack", lambda c: seen.similarity if (seen := strongest(c).seen) else None),
                _Line("nearest neighbour", lambda c: _baseline(c, "nearest neighbour")),
                _Line("class mean", lambda c: _baseline(c, "class mean")),
                _Line("mean input", lambda c: _baseline(c, "mean input")),
            ),
        ),
        _Panel(
            "distance correlation of inputs and activations",
            "squared, bias-corrected (0: independent)",
            (
                _Line("clear activations", lambda c: c.distance_correlation),
                _Line("treated", lambda c: c.treated_distance_correlation),
            ),
        ),
        _Panel(
            "label inference, best attack",
            "share of labels guessed",
            (
                _Line("from gradients", lambda c: _guess(c, "gradients")),
                _Line("from activations", lambda c: _guess(c, "activations")),
                _Line("from outputs", lambda c: _guess(c, "outputs")),
                _Line("commonest label", lambda c: c.chance),
            ),
        ),
    )


def _draw_panel(axes: Axes, panel: _Panel, found: Sequence[CutLeakage]) -> None:
    places = np.arange(len(found))
    for number, line in enumerate(panel.lines):
        values = [np.nan if (v := line.value(c)) is None else v for c in found]
        if np.isnan(values).all():
            continue
        # A single cut has no line to see: everything gets a marker then.
        marker = _MARKERS[number] or ("_" if len(found) == 1 else "")
        axes.plot(
            places,
            values,
            label=line.name,
            color=_COLOURS[number],
            linestyle=_STROKES[number],
            marker=marker,
            markersize=6,
        )
    for place, leakage in zip(places, found, strict=True):
        if leakage.void:
            axes.axvspan(place - 0.3, place + 0.3, color="#cccccc", alpha=0.5, label="_void")
            axes.text(float(place), 0.5, "void", rotation=90, ha="center", va="center", color="#333333")
    axes.set_xticks(places, [_short(c.cut) for c in found], rotation=30 if len(found) > 1 else 0, parse_math=False)
    for label in axes.get_xticklabels() if len(found) > 1 else ():
        label.set_horizontalalignment("right")
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
    axes.set_xlabel("cut behind, in the model's order", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_title(panel.title, fontsize=11)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(fontsize=8, loc="best", framealpha=0.85)


def _baseline(leakage: CutLeakage, name: str) -> float | None:
    return leakage.baselines[name].similarity if name in leakage.baselines else None


def _guess(leakage: CutLeakage, source: str) -> float | None:
    found = leakage.best_guess(source)
    return None if found is None else found.accuracy


def _short(name: str) -> str:
    return name if len(name) <= _MOST_NAME else name[: _MOST_NAME - 1] + "…"


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)  # type: ignore[no-untyped-call]  # matplotlib's own signature
    return out.getvalue()
