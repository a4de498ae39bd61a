"""Where a model can be cut, and what each cut costs: for choosing a front.

The model runs a few times on fake tensors, which have shapes and no memory, so that a survey takes about a second for
any size of model. Work is counted in floating-point operations of matrix products, convolutions and attention, forward
and backward, by ``torch.utils.flop_counter``; what is left out (sums, activations) is a few per cent.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from client_side.cutting import checked_example, cut, faking, grown, refuse_shared, trace, undisturbed
from client_side.division import Division, Part, Runs, run_nodes
from client_side.splitting import Leaf, crossing_leaves, refuse_changed, refuse_raw, share_memory
from wire.errors import CutError

__all__ = ["CLASS_LABEL_BYTES", "Candidate", "Survey", "survey"]

CLASS_LABEL_BYTES: Final = 8  # what a label of the vanilla topology counts as: a class, int64


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place to cut.

    Attributes:
        front: what to give as ``front``.
        possible: whether the model can be cut there.
        reason: why not.
        owner_parameters: elements of the parameters of front and head.
        node_parameters: elements of the middle's.
        owner_flops: floating-point operations of front and head for one sample in one training step.
        node_flops: the middle's.
        bytes_up: what one sample sends to the node in one training step.
        bytes_down: what it gets back.
        tensors: how many tensors cross from the front to the middle.
        products: how many matrix products, convolutions and the like the middle computes.
    """

    front: str
    possible: bool
    reason: str
    owner_parameters: int
    node_parameters: int
    owner_flops: int
    node_flops: int
    bytes_up: int
    bytes_down: int
    tensors: int
    products: int

    @property
    def bytes_per_sample(self) -> int:
        """Both ways."""
        return self.bytes_up + self.bytes_down

    @property
    def owner_share(self) -> float:
        """The owner's part of the work, 0 to 1."""
        return self.owner_flops / max(1, self.owner_flops + self.node_flops)


@dataclass(frozen=True, slots=True)
class Survey:
    """All places to cut before one head.

    Attributes:
        head: the submodule that the head begins with; ``None`` for the vanilla topology.
        candidates: in the order in which the model runs.
    """

    head: str | None
    candidates: tuple[Candidate, ...]

    def recommended(self, owner_share: float) -> Candidate | None:
        """The cut with the least bytes among those whose front and head do at most ``owner_share`` of the work.

        Of several the deepest, since that tells the node least. If none does so little, the one that does the least.
        """
        possible = [c for c in self.candidates if c.possible and c.node_parameters]
        light = [c for c in possible if c.owner_share <= owner_share]
        if light:
            return min(reversed(light), key=lambda c: c.bytes_per_sample)
        return min(reversed(possible), key=lambda c: c.owner_flops, default=None)


def survey(
    model: nn.Module,
    example: torch.Tensor | Sequence[torch.Tensor],
    *,
    head: str | None = None,
    vanilla: bool = False,
    check: bool = False,
) -> Survey:
    """Measures every cut of ``model`` behind a submodule of its top level, or of a ``Sequential`` there.

    Args:
        model: is not changed.
        example: one batch of inputs, at least 2 rows.
        head: where the head begins; the last submodule of the top level that has parameters, unless said.
        vanilla: without a head.
        check: makes each possible cut for real, which takes seconds for each and finds the rest of what may forbid it.

    Raises:
        CutError: ``torch.fx`` cannot follow the model, or ``head`` is no submodule.
    """
    inputs = checked_example(example)
    top = [str(n.target) for n in trace(model, [], len(inputs)).graph.nodes if n.op == "call_module"]
    chosen = None if vanilla else head or _last_with_parameters(model, top)
    opened = [name for target in dict.fromkeys(top) for name in _opened(model, target)]
    traced = trace(model, [*opened, *([chosen] if chosen and chosen not in top else [])], len(inputs))
    measured = _Measured(traced, inputs)
    calls = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    first = next((name for name in calls if name == chosen or name.startswith(f"{chosen}.")), None)
    if chosen and first is None:
        raise CutError(f"the submodule {chosen!r} is never called by the model's forward; name one that is")
    before = calls[:-1] if first is None else calls[: calls.index(first)]
    later = set(calls[len(before) :])
    # A module that is called again ends the front with its last call.
    names = [name for name in reversed(dict.fromkeys(reversed(before))) if name not in later]
    ends = {opened[-1]: target for target in top if (opened := _opened(model, target))}
    if before and _runs_up_to(traced, names[-1], first):
        names.pop()
    found = [measured.candidate(name, ends.get(name, name), first) for name in names]
    if check:
        found = [_checked(model, inputs, candidate, chosen) for candidate in found]
    return Survey(chosen, tuple(found))


def _last_with_parameters(model: nn.Module, names: Iterable[str]) -> str:
    found = [name for name in names if next(model.get_submodule(name).parameters(), None) is not None]
    if not found:
        raise CutError("no submodule that the model calls has parameters: name a head, or survey it without one")
    return found[-1]


def _runs_up_to(traced: fx.GraphModule, front: str, head: str | None) -> bool:
    """Whether nothing at all is left between ``front`` and ``head``."""
    try:
        Division(traced, front, head)
    except CutError:
        return True
    return False


def _opened(model: nn.Module, name: str) -> list[str]:
    """The children of a plain ``Sequential``, in the order in which they run."""
    module = model.get_submodule(name)
    plain = type(module).forward is nn.Sequential.forward and not (module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001 -- torch tells of no other way
    return [f"{name}.{child}" for child, _ in module.named_children()] if plain else []


def _checked(model: nn.Module, inputs: tuple[torch.Tensor, ...], candidate: Candidate, head: str | None) -> Candidate:
    if not candidate.possible:
        return candidate
    try:
        cut(model, front=candidate.front, head=head, example=inputs)
    except CutError as error:
        return _replaced(candidate, error)
    return candidate


def _replaced(candidate: Candidate, error: CutError) -> Candidate:
    values = {name: getattr(candidate, name) for name in Candidate.__slots__}
    return Candidate(**(values | {"possible": False, "reason": str(error)}))


class _Measured:
    """One model's results, work and changes in place, by call."""

    def __init__(self, traced: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
        self._traced = traced
        placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
        calls = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        batches = (inputs, grown(inputs))
        self._flops: dict[fx.Node, int] = {}
        self._changes: dict[fx.Node, list[torch.Tensor]] = {}
        known: list[dict[fx.Node, Any]] = []
        with undisturbed(traced, training=True), faking() as mode:
            for batch in batches:
                known.append(dict(zip(placeholders, (mode.from_tensor(x) for x in batch), strict=True)))
                for node in calls:
                    self._note_changes(node, known[-1])
            with _countable(), torch.enable_grad():
                self._count(calls, known[0])
        self._runs = Runs((len(inputs[0]), len(batches[1][0])), (known[0], known[1]))
        self._inputs = [known[0][n] for n in placeholders]

    def candidate(self, front: str, shown: str, head: str | None) -> Candidate:
        """What a cut behind ``front`` costs."""
        reason, up, down = "", list[Leaf](), list[Leaf]()
        division = Division(self._traced, front, head)
        for part in (Part.FRONT, Part.MIDDLE):
            division.settle(part, self._runs)
        own, middle = self._tensors(division, (Part.FRONT, Part.HEAD)), self._tensors(division, (Part.MIDDLE,))
        try:
            up, down, kept = crossing_leaves(division, self._runs)
            refuse_raw(up, self._inputs)
            refuse_changed(up, kept, self._changed(division, up))
            refuse_shared(own.items(), middle.items())
        except CutError as error:
            reason = str(error)
        wants = any(p.requires_grad for p in self._tensors(division, (Part.FRONT,)).values())
        back_up = _row_bytes(down, floating=True) if head else CLASS_LABEL_BYTES
        back_down = _row_bytes(up, floating=True) if wants else 0
        return Candidate(
            front=shown,
            possible=not reason,
            reason=reason,
            owner_parameters=_elements(own),
            node_parameters=_elements(middle),
            owner_flops=self._work(division, (Part.FRONT, Part.HEAD)),
            node_flops=self._work(division, (Part.MIDDLE,)),
            bytes_up=_row_bytes(up) + back_up if up else 0,
            bytes_down=(_row_bytes(down) if head else 0) + back_down if up else 0,
            tensors=len(up),
            products=sum(1 for node in division.of(Part.MIDDLE) if self._flops.get(node)),
        )

    def _note_changes(self, node: fx.Node, known: dict[fx.Node, Any]) -> None:
        """Runs one call, and keeps the tensors that it changes in place."""
        given = [t for n in node.all_input_nodes for t in tree_leaves(known.get(n)) if isinstance(t, torch.Tensor)]
        before = [t._version for t in given]  # noqa: SLF001 -- the only trace of a change in place
        run_nodes(self._traced, [node], known)
        self._changes[node] = [t for t, version in zip(given, before, strict=True) if t._version != version]  # noqa: SLF001 -- as above

    def _changed(self, division: Division, up: Sequence[Leaf]) -> list[torch.Tensor]:
        changes = [t for node in division.of(Part.MIDDLE) for t in self._changes.get(node, [])]
        tensors = [t for leaf in up for t in leaf.values]
        return [t for t in tensors if any(share_memory(t, changed) for changed in changes)]

    def _count(self, calls: Iterable[fx.Node], known: dict[fx.Node, Any]) -> None:
        """Counts each call by itself, forward and backward; a gradient flows where one does in the whole model."""
        flowing: set[fx.Node] = set()
        for node in calls:
            leaves = [t for t in self._own(node).values() if t.requires_grad]
            given = {}
            for source in node.all_input_nodes:
                if source in known:
                    fresh = partial(_fresh, leaves if source in flowing else None)
                    given[source] = tree_map_only(torch.Tensor, fresh, known[source])
            with _Counter() as counter:
                run_nodes(self._traced, [node], given)
                made = [t for t in tree_leaves(given[node]) if isinstance(t, torch.Tensor) and t.requires_grad]
                if made:
                    torch.autograd.grad(made, leaves, [torch.ones_like(t) for t in made], allow_unused=True)
                    flowing.add(node)
            self._flops[node] = counter.total

    def _work(self, division: Division, parts: Iterable[Part]) -> int:
        total = sum(self._flops.get(node, 0) for part in parts for node in division.of(part))
        return round(total / self._runs.rows[0])

    def _tensors(self, division: Division, parts: Iterable[Part]) -> dict[str, torch.Tensor]:
        own: dict[str, torch.Tensor] = {}
        for part in parts:
            for node in division.of(part):
                own |= self._own(node)
        return own

    def _own(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """The model's own tensors that a call reads, by name."""
        found: dict[str, torch.Tensor] = {}
        if node.op == "call_module":
            module, name = self._traced.get_submodule(str(node.target)), str(node.target)
            for named in (module.named_parameters, module.named_buffers):
                found |= {f"{name}.{key}": tensor for key, tensor in named(remove_duplicate=False)}
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                value = operator.attrgetter(str(source.target))(self._traced)
                found |= {str(source.target): value} if isinstance(value, torch.Tensor) else {}
        return found


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own signature
    """Adds up the floating-point operations of what runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 -- torch's own signature
        types: Any,  # noqa: ANN401 -- as above
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 -- as above
        del types
        made = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)  # noqa: SLF001 -- the registry's keys
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


@contextmanager
def _countable() -> Iterator[None]:
    """Inside, recurrent layers and attention become products, which the registry knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)  # for asking at all
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield


def _fresh(leaves: list[torch.Tensor] | None, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the start of a graph of its own, noted in ``leaves`` where a gradient flows to it."""
    start = tensor.detach().clone()
    if leaves is None or not start.is_floating_point():
        return start
    leaves.append(start.requires_grad_())
    return start.clone()  # a leaf must not be changed in place


def _elements(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in {id(t): t for t in tensors.values() if isinstance(t, nn.Parameter)}.values())


def _row_bytes(leaves: Iterable[Leaf], *, floating: bool = False) -> int:
    """Bytes of one sample; ``floating``: of its gradients."""
    tensors = [leaf.values[0] for leaf in leaves]
    return sum(t.numel() * t.itemsize // len(t) for t in tensors if t.is_floating_point() or not floating)
