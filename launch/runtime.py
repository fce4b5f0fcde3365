"""Settings of the process that must be made before JAX does any work: allocator and compilation cache."""

import ctypes
import os
import pathlib
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


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
    mallopt(M_ARENA_MAX, 1)  # the arenas of other threads give back whole heaps whatever the threshold
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)


def default_compilation_cache() -> str:
    """$JAX_COMPILATION_CACHE_DIR, or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "meshlm", "xla"))


def use_compilation_cache(folder: str) -> None:
    """Keeps every compiled program, so that a second start takes seconds; '' turns it off."""
    import jax

    if not folder:
        return
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home is no reason not to train
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
