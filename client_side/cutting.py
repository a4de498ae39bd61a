"""Cutting a model into front, middle and head, and putting it together again.

:func:`cut` traces a model's top level with ``torch.fx``, its modules kept whole, and divides the calls by execution
order: everything up to and including ``front``, everything from ``head`` on, and the rest between. Front and head keep
the model's own ``nn.Module`` objects (so that hooks, Opacus and optimizers work on them as ever); the middle becomes a
portable program (:mod:`wire.program`). Tensors may cross the cuts in any number; those that go from the front to the
head past the middle never leave the owner.

:class:`Cut` takes the three parts as modules, for models that ``torch.fx`` cannot trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from wire.capture import Captured, capture
from wire.errors import CutError, StateRejectedError
from wire.program import Program

__all__ = ["Cut", "as_tuple", "cut", "trace"]


class _PathTracer(fx.Tracer):
    """Keeps every module whole but the ancestors of the named ones, which must be seen through."""

    def __init__(self, through: set[str]) -> None:
        super().__init__()
        self._through = through

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m
        return module_qualified_name not in self._through


def trace(model: nn.Module, names: Iterable[str]) -> fx.GraphModule:
    """``model`` as a graph of whole modules, opened just far enough that ``names`` stand in it.

    Raises:
        CutError: a name is no submodule, or ``torch.fx`` cannot follow the model's ``forward``.
    """
    known = dict(model.named_modules())
    through = set()
    for name in names:
        if name not in known or not name:
            close = [n for n in known if n and "." not in n]
            raise CutError(f"the model has no submodule {name!r}; at its top level stand {', '.join(close)}")
        parts = name.split(".")
        through |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    tracer = _PathTracer(through)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # fx runs the model's own forward, which may raise anything
        raise CutError(
            f"torch.fx cannot follow this model's forward ({type(error).__name__}: {str(error)[:200]}). "
            "Give the three parts yourself: cloister.Cut(front=…, middle=…, head=…).",
        ) from error
    return fx.GraphModule(model, graph)


def cut(
    model: nn.Module,
    *,
    front: str,
    head: str | None = None,
    example: torch.Tensor | Sequence[torch.Tensor],
) -> Cut:
    """Cuts ``model`` behind the submodule ``front`` and, U-shaped, before the submodule ``head``.

    Args:
        model: any ``nn.Module`` that ``torch.fx`` can trace at its top level.
        front: everything up to and including this submodule stays with the owner.
        head: everything from this submodule on stays with the owner; ``None`` (vanilla) leaves the rest, the loss and
            so the labels to the node.
        example: one batch of inputs, at least 2 rows; only shapes and dtypes matter.

    Raises:
        CutError: naming the tensor, parameter or operator that forbids this cut, and what to do.
    """
    traced = trace(model, [front] if head is None else [front, head])
    order = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    last = _position(order, front, first=False)
    first = len(order) if head is None else _position(order, head, first=True)
    if last >= first:
        raise CutError(f"{head!r} runs before {front!r}: name a front that comes before the head")
    if first - last == 1:
        raise CutError(f"nothing runs between {front!r} and {head!r}: there is no middle to give away")
    parts = (order[: last + 1], order[last + 1 : first], order[first:])
    split = _Split(traced, parts, front, head)
    return Cut._of(model, split, (example,) if isinstance(example, torch.Tensor) else tuple(example))


def _position(order: list[fx.Node], name: str, *, first: bool) -> int:
    calls = [i for i, n in enumerate(order) if n.op == "call_module" and n.target == name]
    if not calls:
        raise CutError(f"the submodule {name!r} is never called by the model's forward; name one that is")
    return calls[0] if first else calls[-1]


class _Split:
    """The three parts of a traced model, and what crosses between them."""

    def __init__(
        self,
        traced: fx.GraphModule,
        parts: tuple[list[fx.Node], list[fx.Node], list[fx.Node]],
        front: str,
        head: str | None,
    ) -> None:
        front_nodes, middle_nodes, head_nodes = (set(part) for part in parts)
        placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
        (result,) = next(n for n in traced.graph.nodes if n.op == "output").args
        _refuse_inputs(placeholders, middle_nodes, front)
        up = [n for n in parts[0] if any(user in middle_nodes for user in n.users)]
        down = [n for n in parts[1] if any(user in head_nodes or user.op == "output" for user in n.users)]
        kept = [
            n
            for n in (*placeholders, *parts[0])
            if any(user in head_nodes for user in n.users)
        ]
        if not up:
            raise CutError(f"nothing that {front!r} makes reaches the middle")
        if head is None and (len(down) != 1 or result is not down[0]):
            raise CutError("without a head the middle must return the model's output, one tensor; name a head")
        self.front = _part(traced, parts[0], placeholders, (*up, *kept))
        self.middle = _part(traced, parts[1], up, tuple(down))
        self.head = None if head is None else _part(traced, parts[2], (*down, *kept), result)
        self.crossing = len(up)


def _refuse_inputs(placeholders: list[fx.Node], middle: set[fx.Node], front: str) -> None:
    for node in placeholders:
        if any(user in middle for user in node.users):
            user = next(user for user in node.users if user in middle)
            raise CutError(
                f"the middle reads the input {node.name!r} itself (at {user.name!r}): your raw data would leave. "
                f"Choose a front behind {front!r} that takes it in, or a head that starts at {user.name!r}.",
            )


def _part(
    traced: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    result: Any,
) -> fx.GraphModule:
    """A graph module of ``nodes`` over the model's own submodules."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(n.name) for n in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    if isinstance(result, tuple) and len(result) == 1:
        (result,) = result  # one tensor is a tensor, so that parts can be called one after the other by hand
    graph.output(fx.map_arg(result, lambda n: copies[n]))
    return fx.GraphModule(traced, graph)


class Cut:
    """A model in three parts.

    Attributes:
        front: the owner's first layers; called with the model's inputs, returns the tensors that cross, then those that
            the head gets past the middle.
        head: the owner's last layers, or ``None`` (vanilla).
        program: the middle as the node will see it; ``captured`` holds its bytes and tensors.
    """

    def __init__(
        self,
        *,
        front: nn.Module,
        middle: nn.Module,
        head: nn.Module | None = None,
        example: torch.Tensor | Sequence[torch.Tensor],
    ) -> None:
        """Takes three modules that run one after the other: ``head(middle(front(x)))``.

        A part that returns several tensors returns a tuple, which becomes the next part's arguments.

        Raises:
            CutError: naming the parameter that two parts share, or what keeps the middle from travelling.
        """
        whole = nn.ModuleDict({"front": front, "middle": middle})
        if head is not None:
            whole["head"] = head
        inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example)
        self._assemble(whole, front, middle, head, None, inputs)

    @classmethod
    def _of(cls, model: nn.Module, split: _Split, example: Sequence[torch.Tensor]) -> Cut:
        made = cls.__new__(cls)
        made._assemble(model, split.front, split.middle, split.head, split.crossing, example)
        return made

    def _assemble(  # noqa: PLR0913 -- both constructors' common end
        self,
        whole: nn.Module,
        front: nn.Module,
        middle: nn.Module,
        head: nn.Module | None,
        crossing: int | None,
        example: Sequence[torch.Tensor],
    ) -> None:
        _refuse_shared(front, middle, head)
        self.front, self.head = front, head
        self._middle, self._whole = middle, whole
        with torch.no_grad():
            made = as_tuple(_in_evaluation(front, example))
        self.crossing = len(made) if crossing is None else crossing
        smashed = made[: self.crossing]
        for number, tensor in enumerate(smashed):
            if tensor.ndim == 0 or tensor.shape[0] != example[0].shape[0]:
                raise CutError(
                    f"tensor {number} across the cut has shape {tuple(tensor.shape)}: every tensor that crosses needs the "
                    "batch as its dimension 0",
                )
        self.captured: Captured = capture(_Tupled(middle), smashed)

    @property
    def program(self) -> Program:
        """The middle's checked program ."""
        return self.captured.program

    @property
    def middle(self) -> nn.Module:
        """The middle as it was before any training: the module itself, for inspection and for unsplit reference."""
        return self._middle

    def split_outputs(self, made: Any) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What the front returned: the tensors that cross, and those that stay for the head."""
        everything = as_tuple(made)
        return everything[: self.crossing], everything[self.crossing :]

    def owner_parameters(self) -> list[nn.Parameter]:
        """Parameters of front and head, each once, in the model's order."""
        parts = [self.front] if self.head is None else [self.front, self.head]
        return list(dict.fromkeys(p for part in parts for p in part.parameters()))

    def middle_state(self) -> dict[str, torch.Tensor]:
        """The middle's tensors by the program's names: the model's own, not copies."""
        return dict(self.captured.state)

    def load_middle(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes the middle's tensors, as a node returned them, into the model.

        Raises:
            StateRejectedError: a tensor is missing, unknown, or of another dtype or shape.
        """
        state = self.captured.state
        if tensors.keys() != state.keys():
            odd = sorted(tensors.keys() ^ state.keys())[0]
            raise StateRejectedError(f"the node's state and the middle differ in {odd!r}")
        for name, own in state.items():
            if tensors[name].shape != own.shape or tensors[name].dtype != own.dtype:
                raise StateRejectedError(f"the node's {name!r} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
        with torch.no_grad():
            for name, own in state.items():
                own.copy_(tensors[name])

    def reassemble(self) -> nn.Module:
        """The whole model again, under its original names; front and head are the same objects as before the cut.

        After training, call :meth:`Trainer.fetch` (or :meth:`load_middle`) first: until then the middle's tensors are
        those from before.
        """
        return self._whole


class _Tupled(nn.Module):
    """Gives a part that takes and returns tensors the one form that a program has, under the part's own names."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        # Not registered as a child: its tensors must keep their names, without a prefix.
        object.__setattr__(self, "_part", part)
        self._parameters = part._parameters  # noqa: SLF001
        self._buffers = part._buffers  # noqa: SLF001
        self._modules = part._modules  # noqa: SLF001

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return as_tuple(self._part(*inputs))


def as_tuple(made: Any) -> tuple[torch.Tensor, ...]:
    """``made`` as the tensors that it is.

    Raises:
        CutError: it is something else, such as a dictionary.
    """
    tensors = tuple(made) if isinstance(made, (list, tuple)) else (made,)
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        kinds = ", ".join(sorted({type(t).__name__ for t in tensors}))
        raise CutError(f"parts of a cut exchange tensors or tuples of them, not {kinds}")
    return tensors


def _in_evaluation(front: nn.Module, example: Sequence[torch.Tensor]) -> Any:
    """One run that leaves no trace: in evaluation mode, so that no buffer moves, on the modes restored after."""
    modes = {name: module.training for name, module in front.named_modules()}
    try:
        return front.eval()(*example)
    finally:
        for name, module in front.named_modules():
            module.training = modes[name]


def _refuse_shared(front: nn.Module, middle: nn.Module, head: nn.Module | None) -> None:
    owners = {}
    for part in (front, head):
        if part is not None:
            owners |= {id(t): name for name, t in _named_tensors(part)}
    for name, tensor in _named_tensors(middle):
        if id(tensor) in owners:
            raise CutError(
                f"the tensor {owners[id(tensor)]!r} on your side is also {name!r} of the middle: a shared parameter "
                "cannot be trained on both sides. Move the cut so that both uses fall on one side, or untie them.",
            )


def _named_tensors(part: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from part.named_parameters(remove_duplicate=False)
    yield from part.named_buffers(remove_duplicate=False)
