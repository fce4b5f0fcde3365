"""What a run reports: metrics.jsonl, TensorBoard, the console. Only process 0 writes."""

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax

from data.storage import files
from trainer.config import Config
from trainer.reliability import reading, restarts
from trainer.reporting import console, flops

log = logging.getLogger("meshlm")
FLUSH_S = 60  # of TensorBoard's file


def peak_memory_gib() -> float:
    """Most memory used so far: of the fullest local device, or of this process where the devices do not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    used = max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return used / 2**30


def cut_rows_after(path: pathlib.Path, step: int) -> int:
    """Drops the rows of a .jsonl file past `step`, and lines that are no rows; returns how many lines went.

    With it a file that a kill left ahead of its checkpoint reads, in the end, as one uninterrupted run.
    """
    if not reading.is_there(path):
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        files.write_durably(path, b"".join(kept))
    return len(lines) - len(kept)


def _step_of(line: bytes) -> float:
    """Infinite where the line is no row."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def was_sampled(run: pathlib.Path, step: int) -> bool:
    """Whether samples.jsonl has a sample of `step`."""
    return any(row.get("step") == step for row in restarts.read_rows(run / "samples.jsonl"))


def evaluations(run: pathlib.Path, last: int, saved: Any = ()) -> dict[int, dict[str, Any]]:
    """The rows with a finite loss on held-out text, by step, up to `last`; on process 0, which needs them.

    Args:
      saved: such rows of a checkpoint, for those that metrics.jsonl does not have, as when it was lost.

    Raises Unreadable: without them the best checkpoint would be deleted.
    """
    if jax.process_index() != 0:
        return {}
    path = run / "metrics.jsonl"
    there = reading.patiently(lambda: path.read_bytes() if reading.is_there(path) else b"", path)
    rows = [*saved, *restarts.rows_in(there)]
    return {row["step"]: row for row in rows if type(row.get("step")) is int and row["step"] <= last and _has_loss(row)}


def _has_loss(row: dict[str, Any]) -> bool:
    loss = row.get("val/loss")
    return type(loss) is float and math.isfinite(loss)


class Writers:
    """metrics.jsonl, samples.jsonl and TensorBoard of one run; a process other than 0 writes nothing.

    A disk that is full or gone does not stop the run.

    Raises:
      ConfigError: nothing can be written from the start.
      Unreadable: not just now.
    """

    def __init__(self, run: pathlib.Path, step: int, tensorboard: bool):
        self._metrics = self._samples = self._board = None
        if jax.process_index() != 0:
            return

        def begin(name: str) -> Rows:
            cut_rows_after(run / name, step)
            return Rows(run / name)

        cannot = f"cannot write to --workdir={run}:"
        self._metrics, self._samples = (
            reading.writing(functools.partial(begin, name), run, cannot) for name in ("metrics.jsonl", "samples.jsonl")
        )
        if tensorboard:
            self._board = Board(run / "tensorboard", step + 1)

    def metrics(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """One row. repr of a Python float is the shortest text that reads back exactly."""
        if self._metrics is None:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._metrics.add(json.dumps({"step": step, "tokens": tokens, **row}))
        if self._board is not None:
            self._board.add(step, values)

    def sample(self, row: dict[str, Any]) -> None:
        if self._samples is not None:
            self._samples.add(json.dumps(row, ensure_ascii=False))

    def flush(self) -> None:
        """Brings all rows to the disk: whoever goes on from a checkpoint should find those up to it, as whole as it."""
        for rows in (self._metrics, self._samples):
            if rows is not None:
                rows.write()
                rows.sync()

    def close(self) -> None:
        for writer in (self._metrics, self._samples, self._board):
            if writer is not None:
                writer.close()


class Rows:
    """A .jsonl file. Rows that cannot be written are kept, and written with a later one."""

    def __init__(self, path: pathlib.Path):
        self._path, self._waiting, self._failing = path, b"", False
        self._file = path.open("ab", buffering=0)

    def add(self, row: str) -> None:
        self._waiting += row.encode(errors="replace") + b"\n"
        self.write()

    def write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as e:
            if not self._failing:
                log.error("%s CANNOT BE WRITTEN, training goes on, its rows are kept: %s", self._path, e.strerror)
            self._failing = True
            return
        if self._failing:
            log.info("%s is written again", self._path)
        self._failing = False

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is said, and what no disk takes is lost with it
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """A second call does nothing: it may come while an error is on its way."""
        if self._file.closed:
            return
        self.write()
        self.sync()
        if self._waiting:
            log.error("the last rows of %s are LOST, %d bytes", self._path, len(self._waiting))
        self._file.close()


class Board:
    """TensorBoard's file, written by this thread: a SummaryWriter's own dies of a full disk, and the run waits for it.

    Rows that cannot be written are left out; later ones go to another file.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._folder, self._first_step, self._failing = folder, first_step, False
        self._file: Any = None
        self._flush_at = 0.0

    def add(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                self._file = event_file_writer.EventsWriter(str(self._folder / "events"), f".{step}")
                # What an earlier start wrote of these steps is not shown.
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                first = step if self._failing else self._first_step
                self._file.write_event(event_pb2.Event(wall_time=time.time(), step=first, session_log=start))
            for name, value in values.items():
                of_name = summary.scalar(name, value)
                self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=of_name))
            if time.monotonic() >= self._flush_at:  # it syncs to the disk, too
                self._file.flush()
                self._failing, self._flush_at = False, time.monotonic() + FLUSH_S
        except OSError as e:
            if not self._failing:
                log.error("%s CANNOT BE WRITTEN, training goes on: %s", self._folder, e.strerror)
            self._failing, self._flush_at = True, 0.0
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None


class Meter:
    """Time between rows: of the steps alone, without evaluation, sampling and saving. MFU is flops.py's."""

    def __init__(self, config: Config):
        self.tokens_per_step = config.tokens_per_step
        self.flops_per_token = flops.flops_per_token(config)
        self.peak_flops = flops.peak_flops(jax.devices()[0].device_kind)
        self.compile_s: float | None = None
        self._mark = time.perf_counter()
        self._steps = 0
        self.data_wait_s = self.checkpoint_stall_s = 0.0
        self._own_mark, self._own_data_s, self._device_s = self._mark, 0.0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        waited = time.perf_counter() - start
        self.data_wait_s += waited
        self._own_data_s += waited

    @contextlib.contextmanager
    def waiting_for_device(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._device_s += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start
        self._own_mark += time.perf_counter() - start

    def own_time(self) -> dict[str, float]:
        """Seconds since the last call in which this process itself held the steps up (stragglers.py)."""
        now = time.perf_counter()
        host_s = max(now - self._own_mark - self._own_data_s - self._device_s, 0.0)
        own = {"data_wait_s": self._own_data_s, "host_s": host_s}
        self._own_mark, self._own_data_s, self._device_s = now, 0.0, 0.0
        return own

    def step_finished(self) -> None:
        self._steps += 1
        if self.compile_s is None:  # the first step compiles or loads from the cache; it says nothing about speed
            now = time.perf_counter()
            self.compile_s, self._mark, self._steps = now - self._mark, now, 0

    def read(self) -> dict[str, float]:
        """The perf/ and memory/ metrics since the last call."""
        now = time.perf_counter()
        compile_s = self.compile_s or 0.0
        step_time = (now - self._mark) / self._steps if self._steps else compile_s
        tokens_per_s = self.tokens_per_step / step_time
        flops_per_s = tokens_per_s * self.flops_per_token / jax.device_count()
        row = {
            "perf/step_time_s": step_time,
            "perf/tokens_per_s": tokens_per_s,
            "perf/tokens_per_s_per_device": tokens_per_s / jax.device_count(),
            "perf/tflops_per_device": flops_per_s / 1e12,
            "perf/data_wait_s": self.data_wait_s,
            "perf/checkpoint_stall_s": self.checkpoint_stall_s,
            "perf/compile_s": compile_s,
            "memory/peak_gib": peak_memory_gib(),
        }
        if self.peak_flops is not None:
            row["perf/mfu"] = flops_per_s / self.peak_flops
        self._mark, self._steps, self.data_wait_s, self.checkpoint_stall_s = now, 0, 0.0, 0.0
        return row


class Progress(console.StatusLine):
    def __init__(self, num_steps: int):
        super().__init__()
        self.num_steps = num_steps

    def step(self, step: int, loss: float, tokens_per_s: float, seconds_per_step: float) -> None:
        left = console.duration((self.num_steps - step) * seconds_per_step)
        line = f"step {step}/{self.num_steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {left} left"
        if jax.process_index() == 0:
            self.show(line, now=step == self.num_steps)
