"""Advice reaches the kernel: cold rows are read ahead, and a mapped file does not fill this process's memory."""

import ctypes
import mmap
import os
import pathlib
import sys

import numpy as np
import pytest

from data import loader
from data.storage import mmap_advice
from data.token_files import formats
from tests import make_dataset

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the advice is for Linux only")


def resident(array: np.ndarray) -> np.ndarray:
    """Whether each page of a mapped file is in memory (man 2 mincore)."""
    answer = np.zeros(-(-array.nbytes // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    start, length = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
    assert libc.mincore(start, length, ctypes.c_void_p(answer.ctypes.data)) == 0
    return answer & 1


def cold_file(path: pathlib.Path, size: int) -> np.ndarray:
    path.write_bytes(os.urandom(size))
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    array = np.memmap(path, np.uint16, mode="r")
    if resident(array).any():
        pytest.skip("this file system keeps files in memory")
    return array


def test_exactly_the_rows_that_are_needed_are_read_ahead(tmp_path):
    array = cold_file(tmp_path / "a", 8 << 20)
    offsets = np.array([0, 1_000_001, 5_000_000, array.nbytes - 2050])
    mmap_advice.will_need(array, offsets, 2050)
    wanted = np.unique(np.concatenate([np.arange(o // 4096, (o + 2049) // 4096 + 1) for o in offsets]))
    for _ in range(200):  # will_need does not wait for the disk
        if resident(array)[wanted].all():
            break
        os.sched_yield()
    assert resident(array)[wanted].all()
    assert resident(array).sum() < 200  # the whole file has 2,048 pages


def test_more_rows_than_one_call_takes(tmp_path):
    array = cold_file(tmp_path / "a", 16 << 20)
    mmap_advice.will_need(array, np.arange(0, array.nbytes, mmap.PAGESIZE), 10)
    for _ in range(2000):
        if resident(array).all():
            break
        os.sched_yield()
    assert resident(array).all()


def test_memory_is_bounded_on_files_larger_than_it(tmp_path, monkeypatch):
    """Reads a file twice, without a bound on memory and with a bound below its size; the rows are the same."""
    tokens = np.random.default_rng(0).integers(0, 60_000, size=64 << 20, dtype=np.uint16)
    manifest = make_dataset.write(tmp_path, [tokens])
    monkeypatch.setattr(formats, "HASH_AT_START_BYTES", 0)
    monkeypatch.setattr(loader, "CHECK_ROWS", 512)

    def read_all() -> tuple[int, int]:
        """The sum of all rows, and the most bytes that were mapped after a batch."""
        windows = loader.TokenWindows(formats.TokenFiles(tmp_path, manifest, "train"), seq_len=1024, seed=0)
        before, most, total = mmap_advice.mapped_bytes(), 0, 0
        for first in range(0, windows.num_windows - loader.CHECK_ROWS, loader.CHECK_ROWS):
            rows = windows.rows(np.arange(first, first + loader.CHECK_ROWS))
            most, total = max(most, mmap_advice.mapped_bytes() - before), total + int(rows.sum(dtype=np.int64))
        return total, most

    total, unbounded = read_all()
    assert unbounded > 100 << 20
    monkeypatch.setattr(loader, "RESIDENT_BYTES", mmap_advice.mapped_bytes() + (16 << 20))
    same, bounded = read_all()
    assert same == total
    assert bounded <= 16 << 20
