"""Files of a run: written whole or not at all, and errors of the disk that say what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from wire.errors import CheckpointError

__all__ = ["disk_errors", "sync_folder", "write_whole"]


@contextlib.contextmanager
def disk_errors(where: Path | str) -> Iterator[None]:
    """Inside, what the system refuses becomes a :class:`CheckpointError`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise CheckpointError(
            f"cannot write to {where}: {why}; mend that (is the disk full?) and resume the run"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``path`` down to the disk: beside it, then renamed, so that it is there whole or not at all.

    Raises:
        CheckpointError: the disk is full, or fails.
    """
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
