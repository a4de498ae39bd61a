"""Small disks that tests fill up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["mount", "small_disk"]


def mount(folder: Path, size: int) -> str | None:
    """Puts an empty file system of ``size`` bytes at ``folder``; says why where that is not permitted."""
    if os.geteuid():
        return "only root may mount a file system"
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return mounted.stderr.strip() or f"mount ended with {mounted.returncode}" if mounted.returncode else None


@contextlib.contextmanager
def small_disk(folder: Path, size: int = 2**20) -> Iterator[None]:
    """A file system of ``size`` bytes at ``folder`` while the context lasts; skips the test where none can be made."""
    folder.mkdir(exist_ok=True)
    if why := mount(folder, size):
        pytest.skip(f"no small disk here: {why}; run this test as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
