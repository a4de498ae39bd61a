"""Gives memory that ended sessions held back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """Collects what is left of ended sessions, and asks the C library to return free pages.

    glibc keeps what was freed for itself, in one heap for each of many threads; a node that served large sessions would
    look full for ever. Where there is no glibc, this only collects.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
