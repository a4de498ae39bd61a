"""Where a lineage's data sets, runs and models stand in a drawing: columns from what was first to what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from provenance.lineage import Graph, Vertex

__all__ = ["Box", "Drawing", "Line", "drawing"]

_MOST: Final = 60  # boxes: more are a table, not a drawing
_WIDTH: Final = 180
_HEIGHT: Final = 56
_GAP_X: Final = 44
_GAP_Y: Final = 20
_LETTERS: Final = 19  # of a name that fit a box


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A vertex and the upper left corner of its box, in pixels."""

    vertex: Vertex
    label: str
    x: int
    y: int
    width: int = _WIDTH
    height: int = _HEIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """From the right side of one box to the left side of another."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Boxes, lines and the size of it all."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    width: int
    height: int


def drawing(graph: Graph) -> Drawing | None:
    """Lays a graph out; none where it is empty or has too many vertices to be read."""
    if not 0 < len(graph.vertices) <= _MOST:
        return None
    column = {vertex.id: 0 for vertex in graph.vertices}
    for _ in graph.vertices:  # a longest path has no more steps; a circle, which no honest lineage has, ends here too
        for edge in graph.edges:
            column[edge.target] = min(len(column), max(column[edge.target], column[edge.source] + 1))
    for vertex in graph.vertices:  # what nothing came before stands beside what came of it
        after = [column[edge.target] for edge in graph.edges if edge.source == vertex.id]
        if after and column[vertex.id] == 0:
            column[vertex.id] = max(0, min(after) - 1)
    ranks = {rank: place for place, rank in enumerate(sorted(set(column.values())))}
    filled: dict[int, int] = {}
    boxes: dict[str, Box] = {}
    for vertex in graph.vertices:
        place = ranks[column[vertex.id]]
        row = filled.get(place, 0)
        filled[place] = row + 1
        label = vertex.name if len(vertex.name) <= _LETTERS else vertex.name[: _LETTERS - 1] + "…"
        x, y = 10 + place * (_WIDTH + _GAP_X), 10 + row * (_HEIGHT + _GAP_Y)
        boxes[vertex.id] = Box(vertex=vertex, label=label, x=x, y=y)
    lines = tuple(_line(boxes[edge.source], boxes[edge.target]) for edge in graph.edges)
    width = 20 + len(ranks) * (_WIDTH + _GAP_X) - _GAP_X
    return Drawing(
        boxes=tuple(boxes.values()),
        lines=lines,
        width=width,
        height=20 + max(filled.values()) * (_HEIGHT + _GAP_Y) - _GAP_Y,
    )


def _line(source: Box, target: Box) -> Line:
    half = _HEIGHT // 2
    return Line(x1=source.x + source.width, y1=source.y + half, x2=target.x - 4, y2=target.y + half)
