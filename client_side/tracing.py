"""A model's top level as a graph of whole modules.

``torch.fx`` runs the model's own ``forward`` once in training and once in evaluation, on stand-ins for its inputs.
Where the two runs differ only in a flag (``F.dropout(x, training=self.training)``), the graph reads ``training`` from
the module that it becomes. Where they differ otherwise, or a constant was drawn at random, the model is refused: a
graph would silently keep what happened to be so while tracing.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx, nn

from wire.errors import CutError

__all__ = ["trace"]

#: Makers of tensors from sizes alone; fx itself would call them on its stand-ins, and fail.
_MAKERS: Final = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.zeros,
)
_PARTS_ADVICE: Final = "Give the three parts yourself: cloister.Cut(front=…, middle=…, head=…)."
_TRAINING: Final = "training"
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def trace(model: nn.Module, names: Iterable[str], inputs: int | None = None) -> fx.GraphModule:
    """``model`` as a graph of whole modules, opened just far enough that ``names`` stand in it.

    Args:
        model: is not changed.
        names: submodules that must stand in the graph by themselves.
        inputs: how many positional arguments ``forward`` gets; the others keep their defaults. As many as have no
            default, unless said.

    Raises:
        CutError: a name is no submodule, or ``torch.fx`` cannot follow the model's ``forward``.
    """
    through = {""} | {ancestor for name in names for ancestor in _ancestors(_known(model, name))}
    _refuse_hooks(model, through)
    arguments = _arguments(model, inputs)
    before = set(model.__dict__)
    try:
        training, evaluation = (_traced(model, through, arguments, mode=mode) for mode in (True, False))
        _merge(model, training, evaluation)
        return fx.GraphModule(model, training)
    finally:
        for constant in set(model.__dict__) - before:  # fx hangs the constants that it meets on the model
            delattr(model, constant)


class _Tracer(fx.Tracer):
    """Keeps every module whole but those that must be seen through, and gives ``forward`` only the inputs there are."""

    def __init__(self, through: set[str], arguments: list[str]) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=_MAKERS)
        self._autowrap_search.append(torch)
        self._through, self._arguments = through, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m
        return module_qualified_name not in self._through

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 -- fx's own signature
        concrete_args: Any = None,  # noqa: ANN401 -- as above
    ) -> tuple[Callable[..., Any], list[Any]]:
        del is_module, concrete_args
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self._arguments)]


def _known(model: nn.Module, name: str) -> str:
    """The one name under which fx knows the submodule ``name``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        names = [known for known in modules if known]
        close = difflib.get_close_matches(name, names, n=4) or [known for known in names if "." not in known]
        raise CutError(f"the model has no submodule {name!r}; there are {', '.join(close)}")
    first = next(known for known, module in model.named_modules() if module is modules[name])
    if first != name:
        raise CutError(f"the submodule {name!r} is also called {first!r}: name it so")
    return name


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _refuse_hooks(model: nn.Module, through: set[str]) -> None:
    for name, module in model.named_modules():
        if name in through and any(getattr(module, kind, None) for kind in _HOOKS):
            raise CutError(
                f"{repr(name) if name else 'the model itself'} has hooks, which no part of a cut would run: remove them"
                + (", or name a front and a head outside of it" if name else ""),
            )


def _arguments(model: nn.Module, inputs: int | None) -> list[str]:
    signature = inspect.signature(type(model).forward)
    parameters = list(signature.parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    required = sum(p.default is p.empty for p in positional)
    count = (required or int(rest is not None)) if inputs is None else inputs
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if count < required or (count > len(positional) and rest is None) or missing:
        given = [p.name for p in positional] + ([f"*{rest}"] if rest else []) + missing
        raise CutError(f"the example gives {count} tensors; the model's forward takes ({', '.join(given)})")
    names = [p.name for p in positional][:count]
    return names + [f"{rest}_{number}" for number in range(count - len(names))]


def _traced(model: nn.Module, through: set[str], arguments: list[str], *, mode: bool) -> fx.Graph:
    try:
        with _training_flags(model, through, mode=mode):
            graph = _Tracer(through, arguments).trace(model)
    except Exception as error:  # fx runs the model's own forward, which may raise anything
        told = " ".join(str(error).split())[:200]
        raise CutError(
            f"torch.fx cannot follow this model's forward ({type(error).__name__}: {told}). {_PARTS_ADVICE}",
        ) from error
    for node in graph.nodes:
        # Else the graph's code would register the maker's dotted name with fx for good, and fx would stumble over it.
        node.meta.pop("is_wrapped", None)
    return graph


@contextmanager
def _training_flags(model: nn.Module, through: set[str], *, mode: bool) -> Iterator[None]:
    """The flags of the modules whose code is traced; the others' do not run."""
    opened = [module for name, module in model.named_modules() if name in through]
    flags = [module.training for module in opened]
    try:
        for module in opened:
            module.training = mode
        yield
    finally:
        for module, flag in zip(opened, flags, strict=True):
            module.training = flag


class _Differ(Exception):  # noqa: N818 -- never leaves this module
    """The two runs differ in more than a flag."""


def _merge(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    """Makes of ``training`` the graph of both modes."""
    if len(training.nodes) != len(evaluation.nodes):
        raise CutError(f"the model's forward takes another way in training than in evaluation. {_PARTS_ADVICE}")
    twins: dict[fx.Node, fx.Node] = {}
    flags = _Flags(training)
    for ours, theirs in zip(list(training.nodes), list(evaluation.nodes), strict=True):
        try:
            same = ours.op == theirs.op and (ours.target == theirs.target or _equal_constants(model, ours, theirs))
            if not same:
                raise _Differ  # noqa: TRY301 -- one way out
            ours.args = _merged(ours.args, theirs.args, twins, flags)
            ours.kwargs = _merged(ours.kwargs, theirs.kwargs, twins, flags)
        except _Differ:
            what = "draws or makes another constant in each run" if ours.op == "get_attr" else "differs in training"
            raise CutError(f"the model's forward {what} (at {ours.name!r}). {_PARTS_ADVICE}") from None
        twins[theirs] = ours


def _equal_constants(model: nn.Module, ours: fx.Node, theirs: fx.Node) -> bool:
    if ours.op != "get_attr":
        return False
    found = [getattr(model, str(node.target), None) for node in (ours, theirs)]
    return all(isinstance(tensor, torch.Tensor) for tensor in found) and torch.equal(*found)  # type: ignore[arg-type]  # as checked


class _Flags:
    """The graph's reads of ``training``, made when first needed."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes: dict[bool, fx.Node] = {}

    def node(self, *, plain: bool) -> fx.Node:
        """``self.training``, or ``not self.training``."""
        if plain not in self._nodes:
            first = next(iter(self._graph.nodes)) if plain else self.node(plain=True).next
            with self._graph.inserting_before(first):
                if plain:
                    self._nodes[plain] = self._graph.create_node("get_attr", _TRAINING)
                else:
                    self._nodes[plain] = self._graph.call_function(operator.not_, (self.node(plain=True),))
        return self._nodes[plain]


def _merged(ours: Any, theirs: Any, twins: dict[fx.Node, fx.Node], flags: _Flags) -> Any:  # noqa: ANN401 -- of any type
    """One argument of both modes."""
    if isinstance(ours, fx.Node):
        if twins.get(theirs) is not ours:
            raise _Differ
        return ours
    if type(ours) is not type(theirs):
        raise _Differ
    if isinstance(ours, bool):
        return ours if ours == theirs else flags.node(plain=ours)
    if isinstance(ours, (tuple, list, dict, slice)):
        return _merged_items(ours, theirs, twins, flags)
    if ours != theirs and not (isinstance(ours, float) and math.isnan(ours) and math.isnan(theirs)):
        raise _Differ
    return ours


def _merged_items(ours: Any, theirs: Any, twins: dict[fx.Node, fx.Node], flags: _Flags) -> Any:  # noqa: ANN401 -- as above
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            raise _Differ
        return {key: _merged(ours[key], theirs[key], twins, flags) for key in ours}
    if isinstance(ours, slice):
        ends = [(getattr(ours, name), getattr(theirs, name)) for name in ("start", "stop", "step")]
        return slice(*(_merged(a, b, twins, flags) for a, b in ends))
    if len(ours) != len(theirs):
        raise _Differ
    items = [_merged(a, b, twins, flags) for a, b in zip(ours, theirs, strict=True)]
    return tuple(items) if isinstance(ours, tuple) else items
