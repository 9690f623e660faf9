"""What the C library does with freed memory."""

import ctypes
import functools
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h."""
_LARGEST_BLOCK = 1 << 30
_KEPT_BYTES = (1 << 31) - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep what was freed for the next tensors, unless the user's MALLOC_ variables say otherwise; whether it
    does.

    Why: by default a large block goes back to the system when it is freed, and the system clears every page of the next
    one: a sixth of the time of a PPO iteration. Memory in use at the peak stays the same.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
