"""The pictures of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Curve", "Panel", "draw"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line: (ε, percent) by rising ε, and the standard deviation of each."""

    name: str
    points: tuple[tuple[float, float], ...]
    spread: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves on one data set, and the percent without any privacy."""

    title: str
    curves: tuple[Curve, ...]
    level: float


def draw(panels: list[Panel], path: Path) -> None:
    """Accuracy against ε, side by side, under one legend; overwrites ``path``, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, and only for pictures
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(3.4 * len(panels) + 0.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        epsilons = sorted({epsilon for curve in panel.curves for epsilon, _ in curve.points})
        for number, curve in enumerate(panel.curves):
            where, height = zip(*curve.points, strict=True)
            axis.errorbar(
                where,
                height,
                curve.spread,
                label=curve.name,
                marker="os^vDP"[number % 6],
                color=f"C{number}",
                capsize=2,
                lw=1.6,
                ms=5,
            )
        axis.axhline(panel.level, color="0.25", ls="--", lw=1.2, label="no DP, same front")
        axis.set_xscale("log", base=2)
        axis.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("ε (replace-one, δ = 1e-5)")
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right on test data, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
