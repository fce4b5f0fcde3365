"""Settings of the process that must be made before JAX does any work: allocator and compilation cache."""

import ctypes
import os
import pathlib
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def tune_allocator() -> None:
    """Lets glibc keep freed memory instead of returning it to the kernel.

    XLA's CPU backend allocates its temporary buffer anew each step; mapped and unmapped every time, its page faults
    cost up to a third of a small step (docs/performance.md). Does nothing elsewhere than on glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
