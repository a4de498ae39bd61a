"""Arrays of numbers as NumPy files: read within what the file really holds, never unpickled, written whole."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.lib import format as npy

from cloister.weights import write_whole
from wire.errors import ConfigError

__all__ = ["load_arrays", "save_array"]

MAX_INPUT_BYTES: Final = 64 * 2**30  # unpacked, of an .npz: more is a bomb, or belongs into several files


def load_arrays(file: Path) -> tuple[torch.Tensor, ...]:
    """The arrays of an ``.npy`` (one) or ``.npz`` file (in its order), all of them with rows first.

    Raises:
        ConfigError: it cannot be read, holds Python objects, lies about its size, or its arrays differ in rows.
    """
    try:
        arrays = _zipped(file) if file.suffix == ".npz" else [_mapped(file)]
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile, EOFError, SyntaxError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{file} is no NumPy file of numbers ({error}): write it with numpy.save") from error
    tensors = tuple(_tensor(array, file) for array in arrays)
    if not tensors or any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) != 1 or not len(tensors[0]):
        shapes = ", ".join(str(list(t.shape)) for t in tensors) or "nothing"
        raise ConfigError(f"{file} holds {shapes}: every array needs the same number of rows, one at least, as axis 0")
    return tensors


def save_array(file: Path, tensor: torch.Tensor) -> None:
    """Writes ``tensor`` as an ``.npy`` file; bfloat16, which NumPy has not, as float32.

    Raises:
        ConfigError: the file cannot be written.
    """
    plain = tensor.detach().to("cpu")
    buffer = io.BytesIO()
    np.save(buffer, (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(), allow_pickle=False)
    write_whole(file, buffer.getvalue())


def _mapped(file: Path) -> np.ndarray:
    # Mapped: a header that claims more than the file holds is refused, and nothing is allocated for it.
    array = np.load(file, mmap_mode="c", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an .npz: name it so")  # noqa: TRY004 - what load_arrays catches of a wrong file
    return array


def _zipped(file: Path) -> list[np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_INPUT_BYTES:
            raise ConfigError(f"{file} unpacks to more than {MAX_INPUT_BYTES} bytes: split it into several files")
        return [_member(archive, member) for member in members]


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as opened:
        version = npy.read_magic(opened)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(opened)
        claimed, there = math.prod(shape) * dtype.itemsize, member.file_size - opened.tell()
    if claimed != there:
        raise ValueError(f"{member.filename} claims {claimed} bytes and holds {there}")
    with archive.open(member) as opened:
        return npy.read_array(opened, allow_pickle=False)


def _tensor(array: np.ndarray, file: Path) -> torch.Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(native if native.flags.c_contiguous else native.copy())
    except TypeError as error:
        raise ConfigError(f"{file} holds {array.dtype}: a model takes numbers such as float32 or int64") from error
