"""What crosses between the parts of a divided model, and the parts as modules.

Tensors cross as they are. Other values do not travel: each becomes a constant of the part that reads it, or the batch
size times a whole number, found by running the model at two batch sizes; the front checks on each run that it still
holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from client_side.division import Division, Part, Runs, shown
from wire.errors import CutError

__all__ = [
    "Divided",
    "Leaf",
    "crossing_leaves",
    "divide",
    "refuse_changed",
    "refuse_inputs",
    "refuse_raw",
    "refuse_without_rows",
    "share_memory",
]

_CONSTANTS: Final = (bool, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, slice, type(None))


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that crosses: the call that makes it, where in its result it stands, and its values."""

    node: fx.Node
    path: tuple[Any, ...]
    values: tuple[torch.Tensor, torch.Tensor]

    @property
    def name(self) -> str:
        """As messages call it."""
        node, path = self.node, list(self.path)
        while (
            node.target is operator.getitem
            and isinstance(node.args[0], fx.Node)
            and isinstance(node.args[1], int | str)
        ):
            node, path = node.args[0], [node.args[1], *path]
        return repr(shown(node) + "".join(f"[{key}]" for key in path))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A size that is the batch size times ``factor``."""

    factor: int


@dataclass(frozen=True, slots=True)
class Divided:
    """The three parts as modules.

    Attributes:
        front: returns the leaves of ``up``, then those of ``kept``.
        middle: takes ``up``, returns ``down``.
        head: takes ``down`` and ``kept``, returns the model's result; ``None`` in the vanilla topology.
        up: what crosses into the middle.
        down: what the middle returns.
        kept: what goes from the front past the middle.
    """

    front: fx.GraphModule
    middle: fx.GraphModule
    head: fx.GraphModule | None
    up: tuple[Leaf, ...]
    down: tuple[Leaf, ...]
    kept: tuple[Leaf, ...]


def leaves(division: Division, source: Part, target: Part, runs: Runs) -> list[Leaf]:
    """The tensors that cross from ``source`` to ``target``.

    Raises:
        CutError: a value that is neither tensors nor a size.
    """
    found: list[Leaf] = []
    for node in division.crossing(source, target):
        _outline(node, (), runs[node], runs.rows, found.append)
    return found


def _outline(
    node: fx.Node,
    path: tuple[Any, ...],
    values: tuple[Any, Any],
    rows: tuple[int, int],
    note: Callable[[Leaf], None],
) -> Any:  # noqa: ANN401 -- a structure of leaves, sizes and constants
    """The structure of one value, its tensors noted as leaves."""
    one, other = values
    if isinstance(one, torch.Tensor):
        leaf = Leaf(node, path, (one, other))
        note(leaf)
        return leaf
    if type(one) is type(other):
        if isinstance(one, (tuple, list)) and len(one) == len(other):
            return tuple(
                _outline(node, (*path, i), pair, rows, note) for i, pair in enumerate(zip(one, other, strict=True))
            )
        if isinstance(one, dict) and one.keys() == other.keys():
            return {key: _outline(node, (*path, key), (one[key], other[key]), rows, note) for key in one}
        if isinstance(one, _CONSTANTS) and one == other:
            return one
        if isinstance(one, int) and not isinstance(one, bool):
            return _size(node, one, other, rows)
    raise CutError(
        f"{shown(node)!r} is {type(one).__name__} on one side of a cut and needed on the other: only tensors, tuples "
        "of them and sizes can cross. Move the cut so that both fall on one side.",
    )


def _size(node: fx.Node, one: int, other: int, rows: tuple[int, int]) -> int | _Rows:
    if one == other:
        return one
    if one % rows[0] == 0 and one * rows[1] == other * rows[0]:
        return _Rows(one // rows[0])
    raise CutError(
        f"the size {shown(node)!r} is {one} for {rows[0]} rows and {other} for {rows[1]}: only sizes that are fixed or "
        "a multiple of the batch size can cross a cut. Move the cut so that it is used where it is made.",
    )


def divide(division: Division, runs: Runs) -> Divided:
    """Builds the parts of a division that is settled for front and middle.

    Raises:
        CutError: naming what cannot cross, and what to do.
    """
    up, down, kept = crossing_leaves(division, runs)
    builder = _Builder(division, runs)
    front = builder.front(up, kept)
    middle = builder.part(Part.MIDDLE, ((Part.FRONT, up),), down)
    head = None if division.head is None else builder.part(Part.HEAD, ((Part.MIDDLE, down), (Part.FRONT, kept)), None)
    return Divided(front, middle, head, tuple(up), tuple(down), tuple(kept))


def crossing_leaves(division: Division, runs: Runs) -> tuple[list[Leaf], list[Leaf], list[Leaf]]:
    """What goes up to the middle, what comes down from it, and what is kept for the head.

    Raises:
        CutError: naming what cannot cross, and what to do.
    """
    refuse_inputs(division)
    up = leaves(division, Part.FRONT, Part.MIDDLE, runs)
    if not up:
        raise CutError(f"nothing that {division.front!r} makes reaches the middle")
    for leaf in up:
        refuse_without_rows(leaf.name, leaf.values, runs.rows)
    if division.head is None:
        return up, [_only_output(division, runs)], []
    down = leaves(division, Part.MIDDLE, Part.HEAD, runs)
    if not down:
        raise CutError(f"nothing that the middle makes reaches {division.head!r}")
    return up, down, leaves(division, Part.FRONT, Part.HEAD, runs)


def _only_output(division: Division, runs: Runs) -> Leaf:
    result = division.result
    if isinstance(result, fx.Node) and division.part(result) is Part.MIDDLE:
        values = runs[result]
        if isinstance(values[0], torch.Tensor):
            return Leaf(result, (), values)
    raise CutError("without a head the middle must return the model's output, one tensor: name a head")


def refuse_inputs(division: Division) -> None:
    """Refuses a middle that reads the model's inputs.

    Raises:
        CutError: naming the input and who reads it.
    """
    for node in division.crossing(Part.FRONT, Part.MIDDLE):
        if node in division.inputs:
            user = next(user for user in node.users if division.part(user) is Part.MIDDLE)
            raise CutError(
                f"the middle reads the input {shown(node)!r} itself (at {shown(user)!r}): your raw data would leave. "
                f"Choose a front behind {division.front!r} that takes it in, or a head that starts at {shown(user)!r}.",
            )


def refuse_without_rows(name: str, values: Sequence[torch.Tensor], rows: Sequence[int]) -> None:
    """Refuses a tensor that crosses and is not made of rows, one for each of the batch.

    Raises:
        CutError: naming it.
    """
    for tensor, count in zip(values, rows, strict=True):
        if tensor.ndim == 0 or tensor.shape[0] != count:
            raise CutError(
                f"the tensor {name} crosses the cut with shape {tuple(tensor.shape)} for {count} rows: every tensor "
                "that crosses needs the batch as its dimension 0. Move the cut so that it is used where it is made, or "
                "let it be made on the other side (from a buffer of its own).",
            )


def refuse_raw(up: Iterable[Leaf], inputs: Sequence[torch.Tensor]) -> None:
    """Refuses to send what is nothing but an input.

    Raises:
        CutError: naming it.
    """
    for leaf in up:
        if any(share_memory(leaf.values[0], x) for x in inputs):
            raise CutError(
                f"the tensor {leaf.name} that crosses the cut is an input itself, at most reshaped: your raw data "
                "would leave. Choose a front that takes it in.",
            )


def refuse_changed(up: Sequence[Leaf], kept: Sequence[Leaf], changed: Iterable[torch.Tensor]) -> None:
    """Refuses a middle that changes what is also needed elsewhere: a node changes a copy of its own.

    Args:
        up: what crosses.
        kept: what the head reads.
        changed: those tensors of ``up`` that the middle changes in place.

    Raises:
        CutError: naming it.
    """
    for tensor in changed:
        for leaf in (*kept, *(leaf for leaf in up if leaf.values[0] is not tensor)):
            if share_memory(leaf.values[0], tensor):
                raise CutError(
                    f"the middle changes the tensor {leaf.name} in place, and it is also needed elsewhere: use the "
                    "operator that is not in place (such as nn.ReLU(inplace=False)), or move the cut.",
                )


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one is a view of the other, or both are of a third; fake tensors have memory too, in this respect."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)  # noqa: SLF001 -- the storage's identity


def hold_size(now: int, factor: int, size: int, batch: torch.Tensor, name: str) -> None:
    """Refuses a size that is not what it was when the model was cut (the middle, or the head, has it built in).

    Raises:
        CutError: it differs.
    """
    expected = factor * batch.shape[0] if factor else size
    if now != expected:
        raise CutError(f"the size {name!r} is {now}, but {expected} when the model was cut: cut it for each such size")


class _Builder:
    """Copies nodes into graphs over the model's own submodules."""

    def __init__(self, division: Division, runs: Runs) -> None:
        self._division, self._runs = division, runs

    def front(self, up: list[Leaf], kept: list[Leaf]) -> fx.GraphModule:
        """The front as a module: takes the model's inputs, returns ``up`` and ``kept``."""
        division, graph = self._division, fx.Graph()
        copies: dict[fx.Node, Any] = {n: graph.placeholder(n.name) for n in division.inputs}
        self._copy(graph, division.of(Part.FRONT), copies)
        outputs = [_taken_out(graph, copies[leaf.node], leaf.path) for leaf in (*up, *kept)]
        self._hold_sizes(graph, copies, outputs[0])
        graph.output(_bare(outputs))
        return fx.GraphModule(division.traced, graph)

    def part(
        self,
        part: Part,
        sources: Iterable[tuple[Part, list[Leaf]]],
        results: list[Leaf] | None,
    ) -> fx.GraphModule:
        """``part`` as a module: takes the leaves of ``sources``, returns ``results``, or what the model returns."""
        division, graph = self._division, fx.Graph()
        taken: dict[tuple[fx.Node, tuple[Any, ...]], fx.Node] = {}
        batch: fx.Node | None = None
        for _, found in sources:
            for leaf in found:
                # Several leaves may be of one call, and an argument's name stands once.
                node = taken[leaf.node, leaf.path] = graph.placeholder(f"{leaf.node.name}_{len(taken)}")
                if batch is None and self._has_rows(leaf):
                    batch = node
        copies: dict[fx.Node, Any] = {}
        for source, _ in sources:
            for node in division.crossing(source, part):
                copies[node] = _filled(self._outline(node), graph, taken, batch)
        self._copy(graph, division.of(part), copies)
        if results is None:
            self._copy_reads(graph, _nodes_in(division.result), copies)
            graph.output(fx.map_arg(division.result, lambda n: copies[n]))
        else:
            graph.output(_bare([_taken_out(graph, copies[leaf.node], leaf.path) for leaf in results]))
        return fx.GraphModule(division.traced, graph)

    def _outline(self, node: fx.Node) -> Any:  # noqa: ANN401 -- as the function's
        return _outline(node, (), self._runs[node], self._runs.rows, lambda _: None)

    def _has_rows(self, leaf: Leaf) -> bool:
        return all(t.ndim and t.shape[0] == count for t, count in zip(leaf.values, self._runs.rows, strict=True))

    def _copy(self, graph: fx.Graph, nodes: Iterable[fx.Node], copies: dict[fx.Node, Any]) -> None:
        for node in nodes:
            self._copy_reads(graph, node.all_input_nodes, copies)
            copies[node] = graph.node_copy(node, lambda n: copies[n])

    def _copy_reads(self, graph: fx.Graph, nodes: Iterable[fx.Node], copies: dict[fx.Node, Any]) -> None:
        for node in nodes:
            if node not in copies:
                self._copy_reads(graph, node.all_input_nodes, copies)
                copies[node] = graph.node_copy(node, lambda n: copies[n])

    def _hold_sizes(self, graph: fx.Graph, copies: dict[fx.Node, Any], batch: fx.Node) -> None:
        """Lets the front check the sizes that other parts have built in."""
        division = self._division
        crossing = [*division.crossing(Part.FRONT, Part.MIDDLE), *division.crossing(Part.FRONT, Part.HEAD)]
        for node in dict.fromkeys(crossing):
            for path, size in _sizes(self._outline(node), ()):
                now = _taken_out(graph, copies[node], path)
                factor, constant = (size.factor, 0) if isinstance(size, _Rows) else (0, size)
                graph.call_function(hold_size, (now, factor, constant, batch, node.name))


def _taken_out(graph: fx.Graph, node: fx.Node, path: tuple[Any, ...]) -> fx.Node:
    """Writes the calls that take what stands at ``path`` out of a result."""
    for key in path:
        node = graph.call_function(operator.getitem, (node, key))
    return node


def _nodes_in(result: Any) -> list[fx.Node]:  # noqa: ANN401 -- a structure
    found: list[fx.Node] = []
    fx.map_arg(result, found.append)
    return found


def _filled(outline: Any, graph: fx.Graph, taken: dict[Any, fx.Node], batch: fx.Node | None) -> Any:  # noqa: ANN401 -- as above
    """A structure with its placeholders in it, as an argument of other nodes."""
    if isinstance(outline, Leaf):
        return taken[outline.node, outline.path]
    if isinstance(outline, tuple):
        return tuple(_filled(item, graph, taken, batch) for item in outline)
    if isinstance(outline, dict):
        return {key: _filled(item, graph, taken, batch) for key, item in outline.items()}
    if isinstance(outline, _Rows):
        if batch is None:
            raise CutError("a multiple of the batch size crosses the cut, but no tensor of that many rows")
        rows = graph.call_method("size", (batch, 0))
        return rows if outline.factor == 1 else graph.call_function(operator.mul, (rows, outline.factor))
    return outline


def _sizes(outline: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], int | _Rows]]:  # noqa: ANN401 -- as above
    if isinstance(outline, _Rows) or (isinstance(outline, int) and not isinstance(outline, bool)):
        return [(path, outline)]
    if isinstance(outline, (tuple, dict)):
        items = outline.items() if isinstance(outline, dict) else enumerate(outline)
        return [found for key, item in items for found in _sizes(item, (*path, key))]
    return []


def _bare(outputs: list[fx.Node]) -> fx.Node | tuple[fx.Node, ...]:
    """One tensor is a tensor, so that the parts can be called one after the other by hand."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
