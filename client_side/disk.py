"""Files of a run: written whole or not at all, and errors of the disk that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from wire.errors import CheckpointError
from wire.files import replace_file

__all__ = ["disk_errors", "write_whole"]


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
    """Writes ``path`` durably: it is there whole, or not at all.

    Raises:
        CheckpointError: the disk is full, or fails.
    """
    with disk_errors(path.parent):
        replace_file(path, data)
