"""Settings of the C library's allocator. Imports only ctypes and sys: it must run before anything allocates."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def tune_allocator() -> None:
    """Lets glibc keep freed memory instead of returning it to the kernel.

    Otherwise, large buffers that are allocated repeatedly (by XLA's CPU backend for each step, by NumPy for each chunk
    of text) are mapped and unmapped every time. Their page faults cost up to a third of a small step, and half of the
    kernel's time in a preparation (docs/performance.md). This has no effect without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_ARENA_MAX, 1)  # arenas of other threads would return memory in spite of the threshold
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
