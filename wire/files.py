"""Files that matter: read within a bound, written whole or not at all, and private where they hold secrets."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wire.errors import IdentityError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_FILE_BYTES", "publish_folder", "read_bounded", "replace_file", "sync_folder", "write_private"]


MAX_FILE_BYTES: Final = 64 * 1024  # a chain of ten RSA-4096 certificates takes 25 KiB


def read_bounded(
    path: Path, *, limit: int = MAX_FILE_BYTES, private: bool = False, remedy: str = "restore it from your backup"
) -> bytes:
    """The content of a small file.

    Args:
        path: What to read.
        limit: More bytes than this are refused, and not read.
        private: Refuse a file that anyone but its owner may read.
        remedy: What the error tells the reader to do.

    Raises:
        IdentityError: It cannot be read, is too large, or is not private.
    """
    try:
        with path.open("rb") as file:
            if private:
                _refuse_shared(os.fstat(file.fileno()).st_mode, path)
            content = file.read(limit + 1)
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    if len(content) > limit:
        raise IdentityError(f"{path} is larger than {limit} bytes: it is not what it should be; {remedy}")
    return content


def _refuse_shared(mode: int, path: Path) -> None:
    if os.name == "posix" and mode & 0o077:
        raise IdentityError(f"{path} can be read by others (mode {mode & 0o777:04o}): run `chmod 600 {path}`")


def write_private(path: Path, content: bytes) -> None:
    """Writes a new file that only its owner can read, down to the disk.

    Raises:
        FileExistsError: There is one already.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def publish_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Lets ``folder`` appear with all of ``files``: a folder beside it is filled, forced to disk, and renamed.

    Raises:
        FileExistsError: There is a file, or a folder that is not empty, also one that another process just filled.
        IdentityError: The disk is full, or the place cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        ) as at:
            partial = Path(at) / "new"
            partial.mkdir(mode=0o700)
            for name, content in files.items():
                write_private(partial / name, content)
            sync_folder(partial)
            _rename(partial, folder)
            sync_folder(folder.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise IdentityError(f"cannot write {folder}: {error.strerror}; choose a folder that you can write") from error


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from error
        raise


def replace_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes ``path`` down to the disk, beside its place first: it holds all of ``content``, or what it held before.

    With ``private`` only its owner can read it.

    Raises:
        OSError: The disk is full, or fails.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
