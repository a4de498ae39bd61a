"""Functions of the user's own, named as ``module:function``: models and loaders that a command is told by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wire.errors import ConfigError

__all__ = ["load_factory"]


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
