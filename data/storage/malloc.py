"""The C library's allocator. Imports nothing heavy: it must be tuned before anything allocates."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def tune_allocator() -> None:
    """Lets glibc keep freed memory instead of returning it to the kernel.

    Otherwise large buffers that are reallocated all the time, by XLA's CPU backend for each step or by numpy for each
    piece of text, are mapped and unmapped each time, and their page faults cost up to a third of a small step and half
    of the kernel's share of a preparation (docs/performance.md). Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_ARENA_MAX, 1)  # other threads' arenas return full heaps whatever the threshold
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
