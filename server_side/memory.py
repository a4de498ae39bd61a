"""How the node's process holds memory: what is freed is kept while sessions work, and given back when they rest."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Final

__all__ = ["give_back", "hold_on"]

# Of <malloc.h>, for mallopt.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_NEVER: Final = 2**31 - 1
_LARGE: Final = 2**30


def hold_on() -> None:
    """Lets glibc keep what is freed, in one heap for all threads, until :func:`give_back`.

    By default a message or a tensor of some megabytes is mapped when it is made and unmapped when it goes, and the
    kernel fills every page of it with zeros again: for a 16 MiB tensor that takes longer than its encryption. Threads
    with heaps of their own each keep what they once needed. For the whole process, so a program calls it, not a
    library.
    """
    libc = _glibc()
    if libc is not None:
        for setting, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _NEVER)):
            libc.mallopt(setting, value)


def give_back() -> None:
    """Collects what is left of ended sessions, and returns free pages to the system.

    Where there is no glibc, this only collects.
    """
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
