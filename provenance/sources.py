"""What a data set's records are: files, rows of CSV, Parquet and npz, items of a PyTorch dataset.

A source yields each record's name and its content as bytes, one after the other: however large the data set, one
record (of a file: one block) is in memory. The content of a row does not depend on how its file is quoted, compressed
or chunked; ``docs/reference/provenance.md`` has the encodings.
"""

from __future__ import annotations

import csv
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, Protocol

import numpy as np

from wire.errors import ConfigError, ProvenanceError

__all__ = ["Csv", "Files", "Items", "Npz", "Parquet", "Source", "encode_item", "source_of"]

Kind = Literal["files", "csv", "parquet", "npz", "items"]

_BLOCK: Final = 2**20  # large enough that hashing, not Python, takes the time
_BATCH: Final = 1024  # rows of Parquet decoded at once
_DEEPEST: Final = 32  # tuples in tuples of an item


class Source(Protocol):
    """A data set, record by record."""

    @property
    def kind(self) -> Kind:
        """What its records are."""

    def records(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Each record's name (empty where it has none) and content; the content is read only if it is iterated."""


def source_of(path: Path, *, key: str | None = None) -> Source:
    """The data set at ``path``, by its suffix: a folder is its files, another file is one record.

    Args:
        path: a folder or file.
        key: the column that names the rows of a CSV or Parquet file.

    Raises:
        ConfigError: there is nothing, or its rows have no columns to be named by.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a folder, a .csv, .parquet or .npz file, or module:function")
    if path.is_file() and suffix == ".csv":
        return Csv(path, key)
    if path.is_file() and suffix in {".parquet", ".pq"}:
        return Parquet(path, key)
    if key is not None:
        raise ConfigError(f"--key {key} names the rows of a CSV or Parquet file; {path} has no columns")
    return Npz(path) if path.is_file() and suffix == ".npz" else Files(path)


@dataclass(frozen=True, slots=True)
class Files:
    """Every file under a folder, in the order of their paths as bytes; or one file."""

    root: Path
    on_bytes: Callable[[int], None] = lambda _count: None  # told of every block that was read
    kind: Kind = "files"

    def records(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Each file's path below the folder, with ``/``, and its content."""
        if self.root.is_dir():
            yield from self._under(self.root, "")
        else:
            yield self.root.name, self._blocks(self.root)

    def _under(self, folder: Path, prefix: str) -> Iterator[tuple[str, Iterable[bytes]]]:
        with os.scandir(folder) as entries:
            # A folder sorts by its name with the "/" that follows, so that whole paths come in order.
            found = sorted(
                ((os.fsencode(e.name + "/" * e.is_dir(follow_symlinks=False)), e) for e in entries), key=lambda x: x[0]
            )
        for _, entry in found:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from self._under(path, f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield f"{prefix}{_text(entry.name, path)}", self._blocks(path)
            else:
                raise ConfigError(f"{path} is a link or no regular file: commit to a folder of files alone")

    def _blocks(self, path: Path) -> Iterator[bytes]:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                self.on_bytes(len(block))
                yield block


@dataclass(frozen=True, slots=True)
class Csv:
    """The rows of a CSV file in UTF-8 with a header."""

    path: Path
    key: str | None = None
    kind: Kind = "csv"

    def records(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Each row as JSON: the header's array, a line feed, the row's array."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file, strict=True)
                header = next(rows, [])
                named = _column(header, self.key, self.path)
                first = _json(header) + b"\n"
                for number, row in enumerate(rows, 1):
                    if len(row) != len(header):
                        raise ConfigError(f"{self.path}: row {number} has {len(row)} fields, the header {len(header)}")
                    yield "" if named is None else row[named], (first, _json(row))
        except (csv.Error, UnicodeError) as error:
            raise ConfigError(f"{self.path} is no CSV in UTF-8: {error}") from error


@dataclass(frozen=True, slots=True)
class Parquet:
    """The rows of a Parquet file; needs pyarrow (``pip install 'cloister[parquet]'``)."""

    path: Path
    key: str | None = None
    kind: Kind = "parquet"

    def records(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Each row as an item: a mapping from columns to values."""
        try:
            import pyarrow as pa  # noqa: PLC0415 - an extra
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError("Parquet needs its library: pip install 'cloister[parquet]'") from error
        try:
            with pq.ParquetFile(self.path) as file:
                _column(file.schema_arrow.names, self.key, self.path)
                for batch in file.iter_batches(batch_size=_BATCH):
                    for row in batch.to_pylist():
                        yield "" if self.key is None else str(row[self.key]), encode_item(row)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self.path} is no Parquet file: {error}") from error


@dataclass(frozen=True, slots=True)
class Npz:
    """The rows of an npz file's arrays, which all have the same first dimension."""

    path: Path
    kind: Kind = "npz"

    def records(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Each row as an item: a mapping from arrays' names to their rows. Streamed, also from a compressed file."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = sorted(name for name in archive.namelist() if name.endswith(".npy"))
                streams = [archive.open(name) for name in members]
                headers = [_npy_header(stream, name) for stream, name in zip(streams, members, strict=True)]
                counts = {shape[0] for shape, _ in headers}
                if len(counts) != 1:
                    raise ConfigError(f"{self.path}: its arrays have {sorted(counts)} rows; they must be of one length")
                for _ in range(counts.pop()):
                    row = {
                        name.removesuffix(".npy"): _npy_row(stream, shape[1:], dtype)
                        for name, stream, (shape, dtype) in zip(members, streams, headers, strict=True)
                    }
                    yield "", encode_item(row)
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"{self.path} is no npz file of plain arrays: {error}") from error


@dataclass(frozen=True, slots=True)
class Items:
    """The items of a PyTorch dataset, or of anything that can be indexed or iterated."""

    dataset: Any
    kind: Kind = "items"

    def records(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Each item, encoded."""
        if hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__"):
            for index in range(len(self.dataset)):
                yield "", encode_item(self.dataset[index])
        elif hasattr(self.dataset, "__iter__"):
            for item in self.dataset:
                yield "", encode_item(item)
        else:
            raise ConfigError(f"a {type(self.dataset).__name__} is no dataset: it has neither items nor an iterator")


def encode_item(item: Any) -> tuple[bytes, ...]:  # noqa: ANN401 - whatever a dataset returns
    """An item's one encoding: each value with its kind and length, arrays with dtype and shape, mappings by key.

    Raises:
        ConfigError: it holds what is no number, text, bytes, array, list or mapping.
    """
    return tuple(_encoded(item, 0))


def _encoded(item: Any, depth: int) -> Iterator[bytes]:  # noqa: ANN401 - as above
    if depth > _DEEPEST:
        raise ConfigError(f"an item nests more than {_DEEPEST} lists deep")
    if item is None or isinstance(item, bool | int | float | str):
        yield _framed(b"j", json.dumps(item, ensure_ascii=False, allow_nan=True).encode("utf-8", "surrogatepass"))
    elif isinstance(item, bytes | bytearray | memoryview):
        yield _framed(b"b", bytes(item))
    elif isinstance(item, Mapping):
        yield _framed(b"m", len(item).to_bytes(8, "big"))
        for key in sorted(item, key=str):
            yield from _encoded(str(key), depth + 1)
            yield from _encoded(item[key], depth + 1)
    elif isinstance(item, list | tuple):
        yield _framed(b"l", len(item).to_bytes(8, "big"))
        for part in item:
            yield from _encoded(part, depth + 1)
    else:
        yield from _array(item)


def _array(item: Any) -> Iterator[bytes]:  # noqa: ANN401 - as above
    if hasattr(item, "detach"):  # a tensor, of which NumPy does not know every dtype
        import torch  # noqa: PLC0415 - only who has a tensor has torch

        tensor = item.detach().cpu().contiguous()
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        array = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    elif isinstance(item, np.ndarray | np.generic):
        plain = np.asarray(item)
        if plain.dtype.hasobject:
            raise ConfigError("an item holds an array of Python objects: make it one of numbers or of fixed text")
        dtype, shape = plain.dtype.name, plain.shape
        array = np.ascontiguousarray(plain.astype(plain.dtype.newbyteorder("<"), copy=False))
    elif hasattr(item, "isoformat") or hasattr(item, "as_tuple"):  # a date, a decimal: as Parquet's columns hold them
        yield from _encoded(str(item), _DEEPEST)
        return
    else:
        raise ConfigError(f"an item holds a {type(item).__name__}, of which there is no encoding: give tensors")
    yield _framed(b"t", f"{dtype}|{','.join(map(str, shape))}|".encode() + array.tobytes())


def _framed(kind: bytes, data: bytes) -> bytes:
    return kind + len(data).to_bytes(8, "big") + data


def _json(row: list[str]) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _column(header: list[str], key: str | None, path: Path) -> int | None:
    if key is None:
        return None
    if header.count(key) != 1:
        raise ConfigError(f"{path} has {header.count(key)} columns {key!r}; it has {', '.join(header)[:200]}")
    return header.index(key)


def _text(name: str, path: Path) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: its name is no UTF-8; rename it") from error
    return name


def _npy_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if not shape or dtype.hasobject or (fortran and len(shape) > 1):
        raise ConfigError(f"{name} has no rows to commit to: save it as a C-ordered array of numbers")
    return shape, dtype


def _npy_row(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape, dtype=np.int64))
    data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise ProvenanceError("an array ends before its last row: the file is damaged")
    return np.frombuffer(data, dtype).reshape(shape)
