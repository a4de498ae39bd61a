"""Calls every operator of the allow-list with random, well-typed, hostile arguments, and tells which end the process.

Run as ``python tests/operator_fuzz.py EXAMPLES [PATTERN]``: for each operator whose name contains PATTERN so many
calls, each as a node makes them: first on fake tensors, which must neither crash nor take long, and, where those accept
it, for real, backward included. Inputs end at a page that nobody may read, so that reading past them is a crash. Prints
one line for each call that ended its process or took more than ``SLOW_S``, and exits with 1 if there was any.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wire import operators
from wire.operators import Operator

SLOW_S: Final = 20.0
LARGEST: Final = 64 * 2**20  # bytes; what a node's limit on activations would be
MEMORY: Final = 24 * 2**30  # of address space: an allocation beyond it fails instead of filling the machine
PAGE: Final = mmap.PAGESIZE
LIBC: Final = ctypes.CDLL(None)

DTYPES: Final = [torch.float32] * 8 + [
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int64, torch.int32, torch.uint8, torch.int8,
    torch.bool, torch.int16,
]  # fmt: skip
INTEGERS: Final = [-2, -1, 0, 1, 1, 2, 2, 3, 4, 5, 7, 100]
EXTREMES: Final = [2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1, -(2**63), 2**40, 65536]
REALS: Final = [0.0, 1.0, 0.5, 0.1, -1.0, 2.0, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300, 1e-45, 1e10]
TEXTS: Final = [
    "none", "mean", "sum", "zeros", "reflect", "constant", "replicate", "circular", "same", "valid", "floor", "trunc",
    "tanh", "add", "multiply", "ij", "xy", "ij,jk->ik", "i,i->", "i,j", "...", "ii->i", "bij,bjk->bik", "a,b,c,d->", "",
]  # fmt: skip


class Calls:
    """Random arguments; equal seeds give equal ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 -- arguments, no secrets
        torch.manual_seed(seed & 0xFFFF)
        self._seen: list[torch.Tensor] = []

    def of(self, operator: Operator) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for ``operator``: of its types alone, or nearly right."""
        valid = nearly(operator.name)
        if valid is not None and self._chance(0.75):
            return self._spoiled(operator, valid(self)), {}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in operator.parameters:
            if "Generator" in parameter.type or "Layout" in parameter.type:
                if not parameter.keyword_only:
                    break
            elif not parameter.keyword_only:
                if not parameter.required and self._chance(0.4):
                    break
                args.append(self.value(parameter.type))
            elif parameter.required or self._chance(0.4):
                kwargs[parameter.name] = self.value(parameter.type)
        return args, kwargs

    def value(self, spelling: str) -> Any:  # noqa: C901, PLR0911 -- one for each type
        """One argument of a schema's type."""
        if spelling.startswith("Optional["):
            return None if self._chance(0.35) else self.value(spelling[9:-1])
        if spelling.startswith("List["):
            inner = spelling[5:-1]
            if inner in ("int", "SymInt") and self._chance(0.1):
                return self.value(inner)
            return [self.value(inner) for _ in range(self._random.choice([0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 8]))]
        match spelling:
            case "Tensor":
                return self._random.choice([1, 0, -1, 2.5, True, 2**63 - 1]) if self._chance(0.07) else self._tensor()
            case "int" | "SymInt":
                return self._random.choice(EXTREMES if self._chance(0.15) else INTEGERS)
            case "number":
                return self.value("int") if self._chance(0.4) else self._random.choice(REALS)
            case "float":
                return self._random.choice(REALS)
            case "bool":
                return self._chance(0.5)
            case "str":
                return self._random.choice(TEXTS)
            case "ScalarType":
                return self._random.choice(DTYPES)
            case "Device":
                return torch.device("cpu")
            case "MemoryFormat":
                return self._random.choice([torch.contiguous_format, torch.preserve_format, torch.channels_last])
        raise KeyError(spelling)

    def real(self, *shape: int) -> torch.Tensor:
        """A tensor of normal numbers."""
        return fenced(torch.randn(shape))

    def index(self, below: int, *shape: int) -> torch.Tensor:
        """A tensor of integers."""
        return fenced(torch.randint(0, below, shape))

    def either(self, *values: Any) -> Any:
        """One of ``values``."""
        return self._random.choice(values)

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _tensor(self) -> torch.Tensor:
        shape = [
            self._random.choice([1, 2, 2, 3, 4, 4, 5, 8, 0]) for _ in range(self._random.choice([0, 1, 2, 3, 4, 5]))
        ]
        dtype = self._random.choice(DTYPES)
        if self._seen and self._chance(0.5):
            like = self._random.choice(self._seen)
            shape, dtype = list(like.shape), like.dtype
            if shape and self._chance(0.4):
                shape[self._random.randrange(len(shape))] = self._random.choice([0, 1, 2, 3, 4])
        made = self._filled(shape, dtype)
        self._seen.append(made)
        return made

    def _filled(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            made = torch.randn(shape).to(dtype)
            if made.numel() and self._chance(0.2):
                made.view(-1)[self._random.randrange(made.numel())] = self._random.choice(REALS)
        elif dtype is torch.bool:
            made = torch.rand(shape) > 0.5
        else:
            info = torch.iinfo(dtype)
            edge = torch.tensor([info.min, -1 if info.min else 1, 0, 1, 2, 3, info.max], dtype=dtype)
            made = edge[torch.randint(0, len(edge), shape)]
        made = fenced(made)
        return made.transpose(0, -1) if made.ndim > 1 and self._chance(0.2) else made

    def _spoiled(self, operator: Operator, args: list[Any]) -> list[Any]:
        self._seen = [a for a in args if isinstance(a, torch.Tensor)]
        for _ in range(self._random.choice([0, 1, 1, 1, 2, 3])):
            place = self._random.randrange(len(args))
            args[place] = self._other(args[place], operator.parameters[place].type)
        return args

    def _other(self, value: Any, spelling: str) -> Any:
        if isinstance(value, torch.Tensor) and self._chance(0.7):
            shape = list(value.shape)
            if shape:
                shape[self._random.randrange(len(shape))] = self._random.choice([0, 1, 2, 3, 4, 5, 7])
            if self._chance(0.3):
                shape = shape[1:] if self._chance(0.5) else [1, *shape]
            return self._filled(shape, value.dtype if self._chance(0.75) else self._random.choice(DTYPES))
        if isinstance(value, list) and value and self._chance(0.7):
            inner = spelling.rpartition("List[")[2].rstrip("]")
            changed, place = list(value), self._random.randrange(len(value))
            if self._chance(0.25):
                del changed[place]
            else:
                changed[place] = self._other(value[place], inner)
            return changed
        return self.value(spelling)


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, ending where the next page may not be read."""
    size = tensor.numel() * tensor.itemsize
    if not size:
        return tensor
    whole = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + PAGE)
    LIBC.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole), PAGE, 0)
    made = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size).reshape(tensor.shape)
    return made.copy_(tensor)


def nearly(name: str) -> Callable[[Calls], list[Any]] | None:  # noqa: PLR0911 -- one for each family
    """Right arguments, to be spoiled, for operators that random ones hardly ever fit."""
    word = name.removeprefix("aten::").removesuffix(".default")
    base = word.partition(".")[0]
    d = int(base[-2]) if base[-1:] == "d" and base[-2:-1].isdigit() else 0
    if base.startswith("conv_transpose"):
        return lambda c: [c.real(2, 4, *[6] * d), c.real(4, 2, *[3] * d), None, [2] * d, [1] * d, [1] * d, 1, [1] * d]
    if base.startswith("conv") and d:
        same = [1] * d if not word.endswith("padding") else "same"
        return lambda c: [c.real(2, 4, *[6] * d), c.real(4, 4, *[3] * d), c.real(4), [1] * d, same, [1] * d, 1]
    if base.startswith("adaptive"):
        return lambda c: [c.real(2, 3, *[6] * d), [3] * d]
    if "pool" in base:
        rest: list[Any] = [[1] * d, False] if base.startswith("max") else [False, True]
        return lambda c: [c.real(2, 3, *[6] * d), [2] * d, [2] * d, [1] * d, *rest]
    if base.startswith("upsample"):
        corners = [] if "nearest" in base else [False]
        if word.endswith("vec"):
            return lambda c: [c.real(2, 3, *[4] * d), None, *corners, [2.0] * d]
        return lambda c: [c.real(2, 3, *[4] * d), [8] * d, *corners, *[2.0] * d]
    if base in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return lambda c: _recurrent(c, base)
    if base in ("batch_norm", "instance_norm"):
        return lambda c: [c.real(2, 3, 4), *(c.real(3) for _ in range(4)), c.either(True, False), 0.1, 1e-5, True]
    return _NEARLY.get(base)


def _recurrent(calls: Calls, kind: str) -> list[Any]:
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    layers, directions = calls.either(1, 2), calls.either(1, 2)
    weights = []
    for layer in range(layers * directions):
        features = 3 if layer < directions else 4 * directions
        weights += [calls.real(gates * 4, features), calls.real(gates * 4, 4), *(calls.real(gates * 4),) * 2]
    states = [calls.real(layers * directions, 2, 4) for _ in range(2)]
    state = states if kind == "lstm" else states[0]
    training = calls.either(True, False)
    return [calls.real(2, 5, 3), state, weights, True, layers, 0.5, training, directions == 2, True]


_NEARLY: Final[dict[str, Callable[[Calls], list[Any]]]] = {
    "group_norm": lambda c: [c.real(2, 4, 4), 2, c.real(4), c.real(4), 1e-5, True],
    "layer_norm": lambda c: [c.real(2, 3, 4), [4], c.real(4), c.real(4), 1e-5, True],
    "rms_norm": lambda c: [c.real(2, 3, 4), [4], c.real(4), 1e-5],
    "scaled_dot_product_attention": lambda c: [
        c.real(2, 4, 5, 8), c.real(2, 2, 5, 8), c.real(2, 2, 5, 8), c.either(None, c.real(5, 5)), c.either(0.0, 0.5),
        c.either(True, False),
    ],
    "embedding": lambda c: [c.real(5, 4), c.index(5, 2, 3), -1, c.either(True, False), False],
    "gather": lambda c: [c.real(3, 4), 1, c.index(4, 3, 2)],
    "index": lambda c: [c.real(5, 4), [c.index(5, 3)]],
    "index_add": lambda c: [c.real(4, 3), 0, c.index(4, 2), c.real(2, 3)],
    "index_add_": lambda c: [c.real(4, 3), 0, c.index(4, 2), c.real(2, 3)],
    "index_select": lambda c: [c.real(4, 3), 0, c.index(4, 2)],
    "scatter_add": lambda c: [c.real(3, 4), 1, c.index(4, 3, 2), c.real(3, 2)],
    "scatter": lambda c: [c.real(3, 4), 1, c.index(4, 3, 2), c.either(c.real(3, 2), 1.5)],
    "scatter_": lambda c: [c.real(3, 4), 1, c.index(4, 3, 2), c.either(c.real(3, 2), 1.5)],
    "take_along_dim": lambda c: [c.real(3, 4), c.index(4, 3, 2), 1],
    "one_hot": lambda c: [c.index(4, 3), 4],
    "pad": lambda c: [c.real(2, 3, 5, 5), [1, 1, 1, 1], c.either("constant", "reflect", "replicate", "circular"), None],
    "constant_pad_nd": lambda c: [c.real(2, 3, 5), [1, 1], 0],
    "reflection_pad1d": lambda c: [c.real(2, 3, 5), [1, 1]],
    "reflection_pad2d": lambda c: [c.real(2, 3, 5, 5), [1, 1, 1, 1]],
    "replication_pad1d": lambda c: [c.real(2, 3, 5), [1, 1]],
    "replication_pad2d": lambda c: [c.real(2, 3, 5, 5), [1, 1, 1, 1]],
    "pixel_shuffle": lambda c: [c.real(2, 4, 3, 3), 2],
    "pixel_unshuffle": lambda c: [c.real(2, 1, 4, 4), 2],
    "channel_shuffle": lambda c: [c.real(2, 4, 3, 3), 2],
    "addmm": lambda c: [c.real(3, 5), c.real(3, 4), c.real(4, 5)],
    "baddbmm": lambda c: [c.real(2, 3, 5), c.real(2, 3, 4), c.real(2, 4, 5)],
    "bmm": lambda c: [c.real(2, 3, 4), c.real(2, 4, 5)],
    "mm": lambda c: [c.real(3, 4), c.real(4, 5)],
    "matmul": lambda c: [c.real(2, 3, 4), c.real(4, 5)],
    "linear": lambda c: [c.real(2, 3, 4), c.real(5, 4), c.real(5)],
    "prelu": lambda c: [c.real(2, 3, 4), c.real(3)],
    "cross": lambda c: [c.real(2, 3), c.real(2, 3), -1],
    "topk": lambda c: [c.real(3, 4), 2, -1, True, True],
    "unfold": lambda c: [c.real(3, 6), 1, 2, 2],
    "view": lambda c: [c.real(3, 4), [2, 6]],
    "unflatten": lambda c: [c.real(3, 4), 1, [2, 2]],
    "diag_embed": lambda c: [c.real(3, 4), 0, -2, -1],
    "glu": lambda c: [c.real(3, 4), -1],
    "chunk": lambda c: [c.real(5, 4), 2, 0],
    "repeat_interleave": lambda c: [c.real(3, 4), 2, 0],
    "roll": lambda c: [c.real(3, 4), [1], [0]],
    "rot90": lambda c: [c.real(3, 4), 1, [0, 1]],
    "div": lambda c: [c.index(4, 3) - 2**63, c.either(-1, c.index(1, 3) - 1)],
}  # fmt: skip


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [mapped(function, item) for item in value]
    return value


def call(operator: Operator, seed: int) -> None:
    """One call as a node makes it."""
    args, kwargs = Calls(seed).of(operator)
    with FakeTensorMode(), torch.no_grad():
        fake = mapped(lambda t: torch.empty(t.shape, dtype=t.dtype), args)
        made = operator.function(
            *fake, **{k: mapped(lambda t: torch.empty(t.shape, dtype=t.dtype), v) for k, v in kwargs.items()}
        )
        found = [t for t in (made if isinstance(made, (list, tuple)) else [made]) if isinstance(t, torch.Tensor)]
        if sum(t.numel() * t.itemsize for t in found) > LARGEST:
            return
    training = bool(seed % 2)
    if training:
        args = mapped(lambda t: t.requires_grad_(t.is_floating_point()), args)
        if operator.in_place:
            args[0] = mapped(torch.clone, args[0])
    with torch.set_grad_enabled(training):
        made = operator.function(*args, **kwargs)
    found = [t for t in (made if isinstance(made, (list, tuple)) else [made]) if isinstance(t, torch.Tensor)]
    if wanted := [t for t in found if t.requires_grad]:
        torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])


def work(names: list[str], examples: int, start: int, place: int) -> None:
    """Every call from number ``start`` on; notes each before it is made."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(start, len(names) * examples):
        os.pwrite(place, number.to_bytes(8, "little"), 0)
        try:
            call(operators.resolve(names[number // examples]), number % examples)
        except Exception:  # noqa: BLE001, S112 -- raising is what an operator should do
            continue


def crashes(names: list[str], examples: int) -> list[str]:
    """What ended its process or took too long."""
    place, found, start = os.memfd_create("place"), [], 0
    while start < len(names) * examples:
        os.pwrite(place, start.to_bytes(8, "little"), 0)
        child = os.fork()
        if child == 0:
            try:
                work(names, examples, start, place)
            finally:
                os._exit(0)
        ended = _watched(child, place)
        if not ended:
            break
        number = int.from_bytes(os.pread(place, 8, 0), "little")
        found.append(f"{names[number // examples]} with seed {number % examples}: {ended}")
        start = number + 1
    return found


def _watched(child: int, place: int) -> str:
    last, since = b"", time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
        now = os.pread(place, 8, 0)
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > SLOW_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"more than {SLOW_S:g} s"
        time.sleep(0.02)


def main() -> int:
    """Prints what was found."""
    examples, pattern = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    words = sorted(operators._PURE | operators._IN_PLACE)
    names = [f"aten::{word}" if "." in word else f"aten::{word}.default" for word in words]
    found = crashes([name for name in names if pattern in name], examples)
    print("\n".join(found))  # noqa: T201 -- a script's result
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
