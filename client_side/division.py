"""Which part each call of a traced model runs in.

Calls belong to parts by execution order, with three exceptions. What reads a parameter, a buffer or the training flag
does so in each part that needs it. What depends on no input (positions from a buffer) runs where its result is used.
What only takes another call's result apart (``[0]`` of a tuple, ``.shape`` of a tensor) runs where that result is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import torch
from torch import fx

from wire.errors import CutError

__all__ = ["Division", "Part", "Runs", "run_nodes", "shown"]

_SHAPE_ATTRIBUTES: Final = frozenset({"shape", "dtype", "device", "ndim"})
_SHAPE_METHODS: Final = frozenset({"size", "dim", "numel", "ndimension", "nelement"})


class Part(IntEnum):
    """Where a call runs; the inputs count as the front's."""

    FRONT = 0
    MIDDLE = 1
    HEAD = 2


@dataclass(frozen=True, slots=True)
class Runs:
    """What the model's calls returned, by node, in two runs.

    Attributes:
        rows: the two batch sizes.
        known: the results of each run.
    """

    rows: tuple[int, int]
    known: tuple[dict[fx.Node, Any], dict[fx.Node, Any]]

    def __contains__(self, node: object) -> bool:
        """Whether ``node`` ran."""
        return all(node in known for known in self.known)

    def __getitem__(self, node: fx.Node) -> tuple[Any, Any]:
        """What ``node`` returned in the two runs."""
        return self.known[0][node], self.known[1][node]


class Division:
    """Which part each call of a traced model runs in.

    Attributes:
        traced: the model.
        front: the submodule that the front ends with.
        head: the submodule that the head begins with, or ``None`` (vanilla).
        inputs: the model's inputs.
        result: what the model returns: nodes in a structure.
    """

    def __init__(self, traced: fx.GraphModule, front: str, head: str | None) -> None:
        """Divides by execution order; :meth:`settle` completes it.

        Raises:
            CutError: the two do not stand in an order that leaves a middle between them.
        """
        self.traced, self.front, self.head = traced, front, head
        nodes = list(traced.graph.nodes)
        self.inputs = [n for n in nodes if n.op == "placeholder"]
        (self.result,) = next(n for n in nodes if n.op == "output").args
        everywhere = _everywhere(nodes)
        self._calls = [n for n in nodes if n.op not in ("placeholder", "output") and n not in everywhere]
        self._parts = self._by_order(front, head)
        self._place_free(everywhere)
        list(self._pull(_reads_shape))

    def of(self, part: Part) -> list[fx.Node]:
        """The calls of ``part`` in order."""
        return [n for n in self._calls if self._parts[n] is part]

    def settle(self, part: Part, runs: Runs) -> None:
        """Moves into ``part`` what takes its results apart, now that they are known; completes ``runs``."""

        def takes_apart(node: fx.Node) -> bool:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source not in runs or self.part(source) is not part:
                return False
            if isinstance(runs[source][0], torch.Tensor) or node.target not in (operator.getitem, getattr):
                return False
            return all(not isinstance(arg, fx.Node) for arg in node.args[1:])

        for node in self._pull(takes_apart):
            for known in runs.known:
                run_nodes(self.traced, [node], known)

    def part(self, node: fx.Node) -> Part | None:
        """Where ``node`` runs; ``None`` for what runs in every part that needs it."""
        return Part.FRONT if node in self.inputs else self._parts.get(node)

    def crossing(self, source: Part, target: Part) -> list[fx.Node]:
        """What ``source`` makes and ``target`` reads; the model's result counts as read by the head."""
        made = [*(self.inputs if source is Part.FRONT else ()), *self.of(source)]
        return [n for n in made if any((Part.HEAD if u.op == "output" else self.part(u)) is target for u in n.users)]

    def _by_order(self, front: str, head: str | None) -> dict[fx.Node, Part]:
        last = self._position(front, first=False)
        first = len(self._calls) if head is None else self._position(str(head), first=True)
        if front == head:
            raise CutError(f"front and head are both {front!r}: name a head behind it, with a middle between them")
        if last >= first:
            raise CutError(f"{head!r} runs before {front!r}: name a front that comes before the head")
        if first - last == 1:
            raise CutError(f"nothing runs between {front!r} and {head or 'the end'!r}: there is no middle to give away")
        return {
            node: Part.FRONT if index <= last else Part.MIDDLE if index < first else Part.HEAD
            for index, node in enumerate(self._calls)
        }

    def _position(self, name: str, *, first: bool) -> int:
        places = [i for i, n in enumerate(self._calls) if n.op == "call_module" and n.target == name]
        if not places:
            within = [n for n in self._calls if n.op == "call_module" and str(n.target).startswith(f"{name}.")]
            if within:
                raise CutError(f"front {self.front!r} and head {self.head!r}: one stands inside the other")
            raise CutError(f"the submodule {name!r} is never called by the model's forward; name one that is")
        return places[0] if first else places[-1]

    def _place_free(self, everywhere: set[fx.Node]) -> None:
        """Moves what depends on no input to the one part that uses it."""
        free: set[fx.Node] = set()
        for node in self._calls:
            if all(n in free or n in everywhere for n in node.all_input_nodes):
                free.add(node)
        for node in reversed(self._calls):
            users = {self._parts.get(user) for user in node.users}
            if node in free and len(users) == 1 and None not in users:
                (part,) = users
                self._parts[node] = part or Part.FRONT

    def _pull(self, wanted: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Moves ``wanted`` calls to where their first argument is made, and yields each before it looks at the next."""
        for node in self._calls:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or not wanted(node):
                continue
            part = self.part(source)
            if part is not None:
                self._parts[node] = part
                yield node


def _everywhere(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Reads of the model's own attributes, which each part does for itself."""
    found: set[fx.Node] = set()
    for node in nodes:
        negates = node.op == "call_function" and node.target is operator.not_
        if node.op == "get_attr" or (negates and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS and len(node.all_input_nodes) == 1
    return node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES


def run_nodes(traced: fx.GraphModule, nodes: Iterable[fx.Node], known: dict[fx.Node, Any]) -> None:
    """Calls ``nodes`` in order and adds what they return to ``known``.

    Raises:
        CutError: a call fails; names it.
    """
    interpreter = fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.env = known
    for node in nodes:
        for needed in _missing(node, known):
            known[needed] = interpreter.run_node(needed)
        try:
            known[node] = interpreter.run_node(node)
        except Exception as error:  # the model's own code, which may raise anything
            told = " ".join(str(error).split())[:300]
            raise CutError(f"{shown(node)!r} fails on the example ({type(error).__name__}: {told})") from error


def _missing(node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """What ``node`` reads of the model's own attributes, in order, as far as ``known`` lacks it."""
    missing: list[fx.Node] = []
    for source in node.all_input_nodes:
        if source not in known:
            missing += [*_missing(source, known), source]
    return missing


def shown(node: fx.Node) -> str:
    """What messages call a node: a submodule or an input by its own name, anything else by that of its function."""
    return str(node.target) if node.op in ("call_module", "placeholder", "get_attr") else node.name
