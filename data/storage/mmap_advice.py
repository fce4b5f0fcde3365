"""Advice to the kernel about memory-mapped files: to read rows soon, and to release pages.

One system call serves all rows of a batch: process_madvise (Linux 5.10; man 2 process_madvise). A Python loop of
madvise calls costs four times as much and holds the interpreter lock. If the kernel does not have the call, files that
are not cached are read without this advice.
"""

import ctypes
import functools
import mmap
import os
import sys

import numpy as np

PAGE = mmap.PAGESIZE
MAX_RANGES = 1024  # the most in one call: IOV_MAX
PROCESS_MADVISE = 440  # the system call has this number on every Linux


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


@functools.cache
def _self() -> int:
    return os.pidfd_open(os.getpid())


def will_need(array: np.ndarray, offsets: np.ndarray, length: int | np.ndarray) -> None:
    """Starts to read `length` bytes (one number, or one for each offset) at each of `offsets` (in bytes from the start
    of the array), and does not wait for the result."""
    libc = _libc()
    if libc is None or not array.size:
        return
    starts = array.ctypes.data + offsets
    ranges = np.empty((len(offsets), 2), np.uint64)  # struct iovec: address, length
    ranges[:, 0] = starts // PAGE * PAGE
    ranges[:, 1] = starts % PAGE + length
    for first in range(0, len(ranges), MAX_RANGES):
        part = np.ascontiguousarray(ranges[first : first + MAX_RANGES])
        pointer, count = ctypes.c_void_p(part.ctypes.data), ctypes.c_size_t(len(part))
        try:
            libc.syscall(PROCESS_MADVISE, _self(), pointer, count, mmap.MADV_WILLNEED, 0)
        except OSError:  # a kernel without pidfd_open
            return


def release(array: np.ndarray) -> None:
    """Removes a mapped file from this process's memory; the kernel may still cache its pages."""
    libc = _libc()
    if libc is not None and array.size:
        start = array.ctypes.data // PAGE * PAGE
        length = array.ctypes.data + array.nbytes - start
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def mapped_bytes() -> int:
    """How many bytes of files are in this process's memory (man 5 proc, statm); 0 if that is not known."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[2]) * PAGE
    except OSError:
        return 0


def memory_bytes() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * PAGE
