"""Functions of the user's own, named as ``module:function``: models, examples of inputs, loaders.

This is the owner's own code, run on the owner's own machine because the owner named it on the command line or in a job
file. No such name ever comes from a node, a record or a model file.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wire.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["DTYPES", "EXAMPLE_SUFFIX", "example_inputs", "load_factory", "load_model", "random_inputs"]

#: What an input that is given by its shape may be made of.
DTYPES: Final = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "bool")
#: A model ``module:name`` finds its own example at ``module:name_example``, called with the batch size.
EXAMPLE_SUFFIX: Final = "_example"

_MOST_ELEMENTS: Final = 2**28  # an input of 1 GiB in float32; more is a typing error


def load_factory(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, from what is installed or from the folder the command runs in.

    Raises:
        ConfigError: there is no such module or function, or importing it fails; says which.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigError(f"{name!r} names no function: write module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise ConfigError(f"{name}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{name}: {module_name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name}: is a {type(found).__name__}, not a function")
    factory: Callable[..., Any] = found
    return factory


def load_model(name: str) -> nn.Module:
    """What the factory ``name`` makes, called without arguments.

    Raises:
        ConfigError: see :func:`load_factory`; or it fails, or makes something else.
    """
    from torch import nn  # noqa: PLC0415 - naming a function needs no torch

    model = _called(name, load_factory(name))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}: it must return an nn.Module")
    return model


def example_inputs(name: str, rows: int) -> tuple[torch.Tensor, ...]:
    """What the factory ``name`` makes of a batch size: one tensor, or one for each input of a model.

    Raises:
        ConfigError: see :func:`load_factory`; or it fails, or makes something else.
    """
    import torch  # noqa: PLC0415 - as above

    made = _called(name, load_factory(name), rows)
    inputs = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
        raise ConfigError(f"{name} returned {kinds}: it must return a tensor [rows, ...], or one for each input")
    if any(x.shape[:1] != (rows,) for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ConfigError(f"{name} was asked for {rows} rows and returned {shapes}: the batch is dimension 0")
    return inputs


def random_inputs(shapes: Sequence[str], dtypes: Sequence[str], rows: int) -> tuple[torch.Tensor, ...]:
    """Inputs by their shapes without the batch, such as ``3,32,32``: noise, or zeros where the dtype is of integers.

    Args:
        shapes: one for each input.
        dtypes: one for each input, or one for all, or none for float32.
        rows: the batch size.

    Raises:
        ConfigError: a shape or dtype that is none, or not as many dtypes as shapes.
    """
    import torch  # noqa: PLC0415 - as above

    if len(dtypes) not in (0, 1, len(shapes)):
        raise ConfigError(f"{len(dtypes)} dtypes for {len(shapes)} inputs: give one for each, or one for all")
    named = list(dtypes) * (len(shapes) if len(dtypes) == 1 else 1) or ["float32"] * len(shapes)
    unknown = next((dtype for dtype in named if dtype not in DTYPES), None)
    if unknown is not None:
        raise ConfigError(f"the dtype {unknown!r} is none of {', '.join(DTYPES)}")
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for text, dtype in zip(shapes, named, strict=True):
        made = torch.zeros((rows, *_shape(text)), dtype=getattr(torch, dtype))
        inputs.append(made.normal_(generator=generator) if made.is_floating_point() else made)
    return tuple(inputs)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace(" ", "").strip(",").split(",")
    if not all(size.isdecimal() and size.isascii() and int(size) > 0 for size in sizes):
        raise ConfigError(f"the input shape {text!r} is no list of sizes: write it without the batch, such as 3,32,32")
    shape = tuple(int(size) for size in sizes)
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ConfigError(f"the input shape {text!r} has more than {_MOST_ELEMENTS} elements a row")
    return shape


def _called(name: str, factory: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - whatever it makes
    try:
        return factory(*arguments)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
