"""Cutting a model into front, middle and head, and putting it together again.

:func:`cut` traces a model's top level with ``torch.fx``, its modules kept whole, and divides the calls by execution
order: everything up to and including ``front``, everything from ``head`` on, and the rest between. Front and head keep
the model's own ``nn.Module`` objects (so that hooks, Opacus and optimizers work on them as ever); the middle becomes a
portable program (:mod:`wire.program`). Tensors may cross the cuts in any number; those that go from the front to the
head past the middle never leave the owner.

:class:`Cut` takes the three parts as modules, for models that ``torch.fx`` cannot trace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from client_side.division import Division, Part, Runs, run_nodes
from client_side.splitting import Divided, divide, refuse_changed, refuse_inputs, refuse_raw, refuse_without_rows
from client_side.tracing import trace
from wire.capture import Captured, capture
from wire.errors import CutError, StateRejectedError
from wire.program import Program

__all__ = ["Cut", "as_tuple", "checked_example", "cut", "faking", "grown", "refuse_shared", "trace", "undisturbed"]


def cut(
    model: nn.Module,
    *,
    front: str,
    head: str | None = None,
    example: torch.Tensor | Sequence[torch.Tensor],
) -> Cut:
    """Cuts ``model`` behind the submodule ``front`` and, U-shaped, before the submodule ``head``.

    Training the parts equals training the model to the bit, with one exception: where the head reads one of the very
    tensors that go up, and the middle reads it more than once, its gradient is summed in another order.

    Args:
        model: any ``nn.Module`` that ``torch.fx`` can trace at its top level. It is not changed.
        front: everything up to and including this submodule stays with the owner.
        head: everything from this submodule on stays with the owner; ``None`` (vanilla) leaves the rest, the loss and
            so the labels to the node.
        example: one batch of inputs, at least 2 rows; only shapes and dtypes matter.

    Raises:
        CutError: naming the tensor, parameter or operator that forbids this cut, and what to do.
    """
    inputs = checked_example(example)
    traced = trace(model, [front] if head is None else [front, head], len(inputs))
    division = Division(traced, front, head)
    return Cut._of(model, _divided(division, inputs))  # noqa: SLF001 -- the class's second constructor


def _divided(division: Division, inputs: tuple[torch.Tensor, ...]) -> Divided:
    """Runs front and middle at two batch sizes (the middle on fake tensors: only shapes matter), then divides."""
    batches = (inputs, grown(inputs))
    runs = Runs(
        (len(inputs[0]), len(batches[1][0])),
        (dict(zip(division.inputs, batches[0], strict=True)), dict(zip(division.inputs, batches[1], strict=True))),
    )
    with undisturbed(division.traced, training=False):
        for known in runs.known:
            run_nodes(division.traced, division.of(Part.FRONT), known)
    division.settle(Part.FRONT, runs)
    refuse_inputs(division)
    changed = _run_middle(division, runs)
    division.settle(Part.MIDDLE, runs)
    divided = divide(division, runs)
    refuse_raw(divided.up, inputs)
    refuse_changed(divided.up, divided.kept, changed)
    return divided


def _run_middle(division: Division, runs: Runs) -> list[torch.Tensor]:
    """Completes ``runs`` by the middle's results, on fake tensors; returns the inputs that it changes in place."""
    changed = []
    # In training: that is where the most happens in place.
    with undisturbed(division.traced, training=True), faking() as mode:
        for known in runs.known:
            made: list[tuple[torch.Tensor, torch.Tensor, int]] = []

            def fake(tensor: torch.Tensor, made: list[tuple[torch.Tensor, torch.Tensor, int]] = made) -> torch.Tensor:
                twin = mode.from_tensor(tensor)
                made.append((tensor, twin, twin._version))  # noqa: SLF001 -- the only trace of a change in place
                return twin

            crossing = division.crossing(Part.FRONT, Part.MIDDLE)
            within = {node: tree_map_only(torch.Tensor, fake, known[node]) for node in crossing}
            run_nodes(division.traced, division.of(Part.MIDDLE), within)
            known.update({node: within[node] for node in division.of(Part.MIDDLE)})
            changed += [t for t, twin, version in made if twin._version != version]  # noqa: SLF001 -- as above
    return changed


def checked_example(example: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The model's inputs: one batch of at least 2 rows.

    Raises:
        CutError: it is no such batch.
    """
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise CutError("the example is one tensor, or one for each input of the model")
    if len({x.shape[:1] for x in inputs}) > 1 or inputs[0].ndim == 0 or len(inputs[0]) < 2:  # noqa: PLR2004 -- export's
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise CutError(
            f"the example needs the batch, at least 2 rows, as dimension 0 of every input; here are {shapes}"
        )
    return inputs


def grown(inputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same batch and one row more."""
    return tuple(torch.cat([x, x[:1]]) for x in inputs)


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
        for name, part in (("front", front), ("middle", middle), ("head", head)):
            if not isinstance(part, nn.Module) and (name != "head" or part is not None):
                raise CutError(f"{name} is a {type(part).__name__}: give an nn.Module (wrap a function in one)")
        inputs = checked_example(example)
        batches = (inputs, grown(inputs))
        with undisturbed(front, training=False):
            made = [as_tuple(front(*batch)) for batch in batches]
        for number, values in enumerate(zip(*made, strict=True)):
            refuse_without_rows(f"number {number} of the front's", values, [len(batch[0]) for batch in batches])
        self._assemble(_Whole(front, middle, head), (front, middle, head), made[0], len(made[0]))

    @classmethod
    def _of(cls, model: nn.Module, parts: Divided) -> Cut:
        made = cls.__new__(cls)
        smashed = [leaf.values[0] for leaf in parts.up]
        made._assemble(model, (parts.front, parts.middle, parts.head), smashed, len(smashed))  # noqa: SLF001 -- its own
        return made

    def _assemble(
        self,
        whole: nn.Module,
        parts: tuple[nn.Module, nn.Module, nn.Module | None],
        smashed: Sequence[torch.Tensor],
        crossing: int,
    ) -> None:
        _refuse_shared(*parts)
        self.front, self._middle, self.head = parts
        self._whole, self.crossing = whole, crossing
        mode = self._middle.training
        self.captured: Captured = capture(_Tupled(self._middle), smashed)
        self._middle.training = mode

    @property
    def program(self) -> Program:
        """The middle's checked program."""
        return self.captured.program

    @property
    def middle(self) -> nn.Module:
        """The middle as it was before any training: the module itself, for inspection and for unsplit reference."""
        return self._middle

    def split_outputs(
        self,
        made: Any,  # noqa: ANN401 -- whatever the front returned
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
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
            odd = min(tensors.keys() ^ state.keys())
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


class _Whole(nn.Module):
    """Three parts that run one after the other."""

    def __init__(self, front: nn.Module, middle: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.front, self.middle, self.head = front, middle, head

    def forward(self, *inputs: torch.Tensor) -> Any:  # noqa: ANN401 -- whatever the head returns
        made = self.middle(*as_tuple(self.front(*inputs)))
        return made if self.head is None else self.head(*as_tuple(made))


class _Tupled(nn.Module):
    """Gives a part that takes and returns tensors the one form that a program has, under the part's own names."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        # Not registered as a child: its tensors must keep their names, without a prefix.
        self._part: nn.Module
        object.__setattr__(self, "_part", part)
        self._parameters = part._parameters  # noqa: SLF001
        self._buffers = part._buffers  # noqa: SLF001
        self._modules = part._modules  # noqa: SLF001

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 -- torch's own signature
        """Sets the mode of the part too: its own code may ask for it, and it is no child."""
        self._part.train(mode)
        return super().train(mode)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return as_tuple(self._part(*inputs))


def as_tuple(made: Any) -> tuple[torch.Tensor, ...]:  # noqa: ANN401 -- whatever a part returned
    """``made`` as the tensors that it is.

    Raises:
        CutError: it is something else, such as a dictionary.
    """
    tensors = tuple(made) if isinstance(made, (list, tuple)) else (made,)
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        kinds = ", ".join(sorted({type(t).__name__ for t in tensors}))
        raise CutError(f"parts of a cut exchange tensors or tuples of them, not {kinds}")
    return tensors


@contextmanager
def faking() -> Iterator[FakeTensorMode]:
    """Inside, tensors have shapes and no memory; what fails there is told by its exception alone."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        log.disabled = before


@contextmanager
def undisturbed(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, ``module`` runs in that mode and without gradients; afterwards nothing of it has changed."""
    flags = [(sub, sub.training) for sub in module.modules()]
    buffers = [
        (sub, name, buffer, buffer.clone())
        for sub in module.modules()
        for name, buffer in sub._buffers.items()  # noqa: SLF001 -- torch tells of no other way to put one back
        if buffer is not None
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]  # torch's
    try:
        module.train(training)
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for sub, flag in flags:
            sub.training = flag
        with torch.no_grad():
            for sub, name, buffer, value in buffers:
                sub._buffers[name] = buffer.copy_(value)  # noqa: SLF001 -- as above


def _refuse_shared(front: nn.Module, middle: nn.Module, head: nn.Module | None) -> None:
    own = [named for part in (front, head) if part is not None for named in _named_tensors(part)]
    refuse_shared(own, _named_tensors(middle))


def refuse_shared(own: Iterable[tuple[str, torch.Tensor]], middle: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses tensors that both sides hold, by object or by memory.

    Raises:
        CutError: naming both.
    """
    owners: dict[int, str] = {}
    for name, tensor in own:
        owners |= dict.fromkeys(_identities(tensor), name)
    for name, tensor in middle:
        shared = next((owners[key] for key in _identities(tensor) if key in owners), None)
        if shared is not None:
            raise CutError(
                f"the tensor {shared!r} on your side is also {name!r} of the middle: a shared parameter or buffer "
                "cannot be trained on both sides. Move the cut so that all uses fall on one side, or untie them.",
            )


def _identities(tensor: torch.Tensor) -> set[int]:
    """The object itself, and where its memory begins: two parameters may be made of the same."""
    memory = tensor.data_ptr() if tensor.numel() and tensor.layout is torch.strided else 0
    return {id(tensor), memory} - {0}


def _named_tensors(part: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from part.named_parameters(remove_duplicate=False)
    yield from part.named_buffers(remove_duplicate=False)
