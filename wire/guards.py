"""What ATen itself does not check about its arguments, checked before it sees them (THREATS T01, T02, T06).

An operator must answer hostile arguments by raising. Some do not, in torch 2.13: recurrent layers and max-pooling read
or write past their buffers, integer division raises a processor's exception, lists of a billion empty tensors are made,
and on a GPU an index out of range ends every session of the process. Each guard here stands before such an operator, on
every run, and raises :class:`~wire.errors.ComputeError` instead. ``tests/test_program_fuzz.py`` calls every operator
of the allow-list with random arguments to find those that need one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from wire.errors import ComputeError

__all__ = ["guarded"]

_MAX_RESULTS: Final = 4096  # tensors that one operator returns: a split of a long sequence into single steps
_MAX_SCALE: Final = 2**20  # no picture grows or shrinks more; times a size, still an index of 64 bits
_MAX_MESHED: Final = 16  # dimensions of a mesh; each of its results has all of them
_GATES: Final = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

Arguments = dict[str, Any]


def _few_results(count: Callable[[Arguments], int]) -> Callable[[Arguments], None]:
    def check(given: Arguments) -> None:
        if count(given) > _MAX_RESULTS:
            raise ComputeError(f"an operator that returns more than {_MAX_RESULTS} tensors")

    return check


def _size(tensor: object, dim: int) -> int:
    """Of one dimension; 0 where there is none, which the operator itself refuses."""
    if not isinstance(tensor, torch.Tensor) or not -tensor.ndim <= dim < tensor.ndim:
        return 0
    return int(tensor.shape[dim])


def _split_count(given: Arguments) -> int:
    piece: int = max(1, given["split_size"])
    return -(-_size(given["self"], given["dim"]) // piece)


def _meshed(given: Arguments) -> None:
    if len(given["tensors"]) > _MAX_MESHED:
        raise ComputeError(f"a mesh of more than {_MAX_MESHED} dimensions")


def _division(given: Arguments) -> None:
    """The smallest integer divided by -1 ends the process (SIGFPE)."""
    operands = [given["self"], given["other"]]
    floating = any(o.is_floating_point() if isinstance(o, torch.Tensor) else isinstance(o, float) for o in operands)
    if given["rounding_mode"] == "trunc" and not floating:
        raise ComputeError("integer division that rounds towards zero; round it down")


def _pooling(given: Arguments) -> None:
    """A window that lies in the padding alone has no maximum: its gradient is written out of bounds."""
    sizes = given["self"].shape[2:] if given["self"].ndim > len(given["kernel_size"]) + 1 else given["self"].shape[1:]
    padding, dilation = given["padding"], given["dilation"]
    for number, size in enumerate(sizes):
        if _item(padding, number) > 0 and _item(dilation, number) > size:
            raise ComputeError("max-pooling with a dilation wider than its input")


def _item(sizes: int | Sequence[int], number: int) -> int:
    """One of a list that may be a single number for all."""
    if isinstance(sizes, int):
        return sizes
    return sizes[number] if number < len(sizes) else sizes[-1] if sizes else 0


def _embedding(given: Arguments) -> None:
    if given["sparse"]:
        raise ComputeError("sparse gradients")
    _in_range(given["indices"], 0, _size(given["weight"], 0))


def _indexed(given: Arguments) -> None:
    if given.get("sparse_grad"):
        raise ComputeError("sparse gradients")
    size = _size(given["self"], given["dim"]) if given["dim"] is not None else math.prod(given["self"].shape)
    _in_range(given["indices" if "indices" in given else "index"], 0, size)


def _one_hot(given: Arguments) -> None:
    _in_range(given["self"], 0, given["num_classes"])


def _advanced(given: Arguments) -> None:
    for dim, index in enumerate(given["indices"]):
        if index is None:
            continue
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.int64, torch.int32):
            raise ComputeError("indices that are not integers: their result's size depends on data")
        size = _size(given["self"], dim)
        _in_range(index, -size, size)


def _in_range(index: object, low: int, high: int) -> None:
    """On the CPU operators check this themselves; on a GPU the whole process would be lost."""
    if not isinstance(index, torch.Tensor) or index.device.type == "cpu" or index.numel() == 0:
        return
    smallest, largest = torch.aminmax(index)
    if int(smallest) < low or int(largest) >= high:
        raise ComputeError(f"an index from {int(smallest)} to {int(largest)}; {low} to {high - 1} are there")


def _recurrent(kind: str) -> Callable[[Arguments], None]:
    """Every shape must be what the layers make of it: the kernels believe them all."""

    def check(given: Arguments) -> None:
        x = given["input"]
        states = list(given["hx"]) if kind == "lstm" else [given["hx"]]
        tensors = [x, *states, *given["params"]]
        if not all(isinstance(t, torch.Tensor) and t.dtype == x.dtype and t.numel() for t in tensors):
            raise ComputeError(f"{kind}: tensors of one dtype, none of them empty")
        if not x.is_floating_point() or x.ndim != 3 or len(states) != (2 if kind == "lstm" else 1):  # noqa: PLR2004
            raise ComputeError(f"{kind}: an input [batch, time, features] of floating point, and a state")
        if not 0.0 <= given["dropout"] <= 1.0:
            raise ComputeError(f"{kind}: a dropout of {given['dropout']}")
        expected = _recurrent_shapes(given, _GATES[kind], [tuple(s.shape) for s in states])
        if [tuple(t.shape) for t in (*states, *given["params"])] != expected:
            raise ComputeError(f"{kind}: states and weights that do not fit the input and each other")

    return check


def _recurrent_shapes(given: Arguments, gates: int, states: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of the states and the weights, as the input, the number of layers and the last dimensions of the states ask."""
    rows = _size(given["input"], 0 if given["batch_first"] else 1)
    directions = 2 if given["bidirectional"] else 1
    output, hidden = states[0][-1:], states[-1][-1:]  # they differ where an LSTM projects its output
    if not output or not hidden or not 1 <= given["num_layers"] <= _MAX_RESULTS:
        return []
    layers = given["num_layers"] * directions
    found: list[tuple[int, ...]] = [(layers, rows, *last) for last in (output, hidden)][: len(states)]
    for layer in range(layers):
        features = _size(given["input"], 2) if layer < directions else output[0] * directions
        rows_of_gates = gates * hidden[0]
        found += [(rows_of_gates, features), (rows_of_gates, *output)]
        found += [(rows_of_gates,), (rows_of_gates,)] if given["has_biases"] else []
        found += [(*output, *hidden)] if output != hidden else []
    return found


def _recurrent_sizes(kind: str, given: Arguments) -> tuple[torch.Tensor, ...]:
    """What a recurrent layer would return, and what it keeps for its backward, on tensors that hold no memory.

    The operator itself would loop over the time steps, which takes minutes for long sequences.
    """
    x, states = given["input"], list(given["hx"]) if kind == "lstm" else [given["hx"]]
    rows, steps = x.shape[:2] if given["batch_first"] else (x.shape[1], x.shape[0])
    directions = 2 if given["bidirectional"] else 1
    cells = rows * steps * states[0].shape[0] * states[-1].shape[-1]
    # The gates, sums and states of every cell, and their copies one per step: measured, an LSTM keeps 19 a cell.
    x.new_empty((cells, 4 * _GATES[kind] + 8))
    output = x.new_empty((*x.shape[:2], directions * states[0].shape[-1]))
    return (output, *(torch.empty_like(s) for s in states))


def _scaled(given: Arguments) -> None:
    """A scale whose inverse overflows makes an index of its own, far outside the tensor (SIGSEGV)."""
    for name, value in given.items():
        if not name.startswith("scale") or value is None:
            continue
        for scale in value if isinstance(value, (list, tuple)) else (value,):
            if scale is not None and not 1 / _MAX_SCALE <= float(scale) <= _MAX_SCALE:
                raise ComputeError(f"a scale of {scale}; from 1/{_MAX_SCALE} to {_MAX_SCALE}")


_UPSAMPLE: Final = ("bicubic2d", "bilinear2d", "linear1d", "nearest1d", "nearest2d", "nearest3d", "trilinear3d")

_CHECKS: Final[dict[str, Callable[[Arguments], None]]] = {
    "chunk": _few_results(lambda given: given["chunks"]),
    "unsafe_chunk": _few_results(lambda given: given["chunks"]),
    "tensor_split.sections": _few_results(lambda given: given["sections"]),
    "unbind.int": _few_results(lambda given: _size(given["self"], given["dim"])),
    "split.Tensor": _few_results(_split_count),
    "unsafe_split.Tensor": _few_results(_split_count),
    "meshgrid": _meshed,
    "meshgrid.indexing": _meshed,
    "div.Tensor_mode": _division,
    "div.Scalar_mode": _division,
    "div_.Tensor_mode": _division,
    "div_.Scalar_mode": _division,
    "divide.Tensor_mode": _division,
    "divide.Scalar_mode": _division,
    "max_pool1d": _pooling,
    "max_pool2d": _pooling,
    "max_pool2d_with_indices": _pooling,
    "max_pool3d": _pooling,
    "embedding": _embedding,
    "gather": _indexed,
    "index_select": _indexed,
    "index_add": _indexed,
    "index_add_": _indexed,
    "scatter.src": _indexed,
    "scatter.value": _indexed,
    "scatter.reduce": _indexed,
    "scatter.value_reduce": _indexed,
    "scatter_.src": _indexed,
    "scatter_.value": _indexed,
    "scatter_.reduce": _indexed,
    "scatter_.value_reduce": _indexed,
    "scatter_add": _indexed,
    "take_along_dim": _indexed,
    "index.Tensor": _advanced,
    "one_hot": _one_hot,
    **{f"upsample_{kind}{overload}": _scaled for kind in _UPSAMPLE for overload in ("", ".vec")},
    **{f"{kind}.input": _recurrent(kind) for kind in _GATES},
}


def guarded(name: str, function: torch._ops.OpOverload) -> Callable[..., Any]:
    """``function``, behind the guard of the operator called ``name`` (without ``aten::``) where it has one."""
    check = _CHECKS.get(name)
    if check is None:
        return function
    arguments = function._schema.arguments  # noqa: SLF001 -- the only way to an operator's types
    kind = name.removesuffix(".input")

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever the operator takes
        given = {a.name: a.default_value for a in arguments}
        given |= {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        try:
            check(given)
        except (AttributeError, IndexError, TypeError) as error:  # a bare number where a tensor belongs, and the like
            raise ComputeError(f"aten::{name} cannot take these arguments") from error
        if kind in _GATES and isinstance(given["input"], FakeTensor):
            return _recurrent_sizes(kind, given)
        return function(*args, **kwargs)

    return call
