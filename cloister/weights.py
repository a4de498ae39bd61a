"""A model's weights as a file: safetensors under the model's own names, never pickle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from wire.errors import ConfigError
from wire.files import replace_file

__all__ = ["load_weights", "save_weights", "weights_of", "write_whole"]

#: One key alone: safetensors writes several in any order, and then the same model would not hash the same twice.
_METADATA: Final = {"format": "pt"}
_MAX_NAMED: Final = 3


def save_weights(model: nn.Module, file: Path) -> str:
    """Writes the ``state_dict`` of ``model`` whole or not at all; the law: loading it changes no bit.

    Of tensors that are one (tied weights), safetensors holds the first name only; :func:`load_weights` and
    ``safetensors.torch.load_model`` both know how to read that.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        ConfigError: the file cannot be written.
    """
    # Copied, so that views into one buffer become tensors of their own.
    tensors = {name: tensor.to("cpu").contiguous().clone() for name, tensor in weights_of(model).items()}
    data = safetensors.torch.save(tensors, _METADATA)
    write_whole(file, data)
    return hashlib.sha256(data).hexdigest()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is saved of ``model``: of tensors that are one, the first name's."""
    kept: dict[tuple[object, ...], str] = {}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if kept.setdefault(_place(tensor, name), name) == name
    }


def load_weights(model: nn.Module, file: Path) -> str:
    """Loads ``file`` into ``model``: every tensor, under its very name, shape and dtype.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        ConfigError: the file cannot be read, is not safetensors, or belongs to another model; says what differs.
    """
    try:
        tensors = safetensors.torch.load_file(file)
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read the weights {file}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not a safetensors file ({error}): give what `cloister train` wrote") from error
    own = model.state_dict()
    _refuse_other_names(own, tensors, file)
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise ConfigError(
                f"{file}: {name} is {_kind(tensor)}, the model's is {_kind(own[name])}: "
                "these weights are of another model; check model.factory and model.args",
            )
    model.load_state_dict(tensors, strict=False)
    return digest


def write_whole(file: Path, data: bytes) -> None:
    """Writes ``file`` durably, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        replace_file(file, data)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; choose another place (--out)") from error


def _place(tensor: torch.Tensor, name: str) -> tuple[object, ...]:
    """Alike for two names of one tensor; an empty tensor is nowhere, so its name tells it apart."""
    if not tensor.numel():
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _refuse_other_names(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], file: Path) -> None:
    there = {_place(own[name], name) for name in found if name in own}
    missing = [name for name, tensor in own.items() if name not in found and _place(tensor, name) not in there]
    unknown = [name for name in found if name not in own]
    if missing or unknown:
        said = [f"{kind} {_some(names)}" for kind, names in (("lacks", missing), ("also holds", unknown)) if names]
        raise ConfigError(f"{file} {' and '.join(said)}: these weights are of another model; check model.factory")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
