"""What a run reports: metrics.jsonl, TensorBoard, the console. Only process 0 writes."""

import contextlib
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
FLUSH_S = 60  # seconds between two flushes of TensorBoard's file


def peak_memory_gib() -> float:
    """The most memory that any local device has used so far; that of this process if devices do not report it (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    used = max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return used / 2**30


def cut_rows_after(path: pathlib.Path, step: int) -> int:
    """Drops the rows of a .jsonl file past `step`, and malformed lines; returns how many lines it dropped.

    A killed run leaves rows past its checkpoint. Without them, the file reads like that of an uninterrupted run.
    """
    if not reading.is_there(path):
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        files.write_durably(path, b"".join(kept))
    return len(lines) - len(kept)


def _step_of(line: bytes) -> float:
    """The step of a row; infinity for a malformed line."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def was_sampled(run_dir: pathlib.Path, step: int) -> bool:
    """Whether samples.jsonl has a sample of `step`."""
    return any(row.get("step") == step for row in restarts.read_rows(run_dir / "samples.jsonl"))


def has_tasks(run_dir: pathlib.Path, step: int) -> bool:
    """Whether metrics.jsonl has the metrics of tasks for `step`."""
    rows = restarts.read_rows(run_dir / "metrics.jsonl")
    return any(row.get("step") == step and any(name.startswith("task/") for name in row) for row in rows)


def evaluations(run_dir: pathlib.Path, last: int, saved: Any = ()) -> dict[int, dict[str, Any]]:
    """The rows with a finite loss on held-out text, by step, up to `last`. Only process 0 needs them; others get {}.

    Args:
      saved: such rows from a checkpoint's metadata. They count only for steps that metrics.jsonl does not have.

    Raises Unreadable if the file cannot be read, because without these rows the best checkpoint would be deleted.
    """
    if jax.process_index() != 0:
        return {}
    path = run_dir / "metrics.jsonl"
    content = reading.patiently(lambda: path.read_bytes() if reading.is_there(path) else b"", path)
    rows = [*saved, *restarts.rows_in(content)]
    return {row["step"]: row for row in rows if type(row.get("step")) is int and row["step"] <= last and _has_loss(row)}


def _has_loss(row: dict[str, Any]) -> bool:
    loss = row.get("val/loss")
    return type(loss) is float and math.isfinite(loss)


class MetricWriters:
    """metrics.jsonl, samples.jsonl and TensorBoard of one run. On processes other than 0 nothing is written.

    A disk that becomes full or fails does not stop the run.
    """

    def __init__(self, run_dir: pathlib.Path, *, tensorboard: bool):
        self._run_dir = run_dir
        self._tensorboard = tensorboard
        self._metrics: JsonlWriter | None = None
        self._samples: JsonlWriter | None = None
        self._board: TensorBoardWriter | None = None

    def open(self, step: int) -> None:
        """Opens the files to continue after `step`, and cuts off rows past it. Closes the files first if they are open.

        Raises:
          ConfigError: the files cannot be written.
          Unreadable: the files cannot be written just now.
        """
        self.close()
        if jax.process_index() != 0:
            return
        self._metrics = self._open_jsonl("metrics.jsonl", step)
        self._samples = self._open_jsonl("samples.jsonl", step)
        if self._tensorboard:
            self._board = TensorBoardWriter(self._run_dir / "tensorboard", step + 1)

    def _open_jsonl(self, name: str, step: int) -> "JsonlWriter":
        path = self._run_dir / name

        def cut_and_open() -> JsonlWriter:
            cut_rows_after(path, step)
            return JsonlWriter(path)

        return reading.writing(cut_and_open, self._run_dir, f"cannot write to --workdir={self._run_dir}:")

    def metrics(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Writes one row. A float is written as its repr, the shortest text that reads back exactly."""
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
        """Syncs all rows to the disk before a checkpoint, so that a run that resumes from it finds its rows."""
        for writer in (self._metrics, self._samples):
            if writer is not None:
                writer.write()
                writer.sync()

    def close(self) -> None:
        for writer in (self._metrics, self._samples, self._board):
            if writer is not None:
                writer.close()


class JsonlWriter:
    """A .jsonl file. Rows that cannot be written are kept, and are written with a later row."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._unwritten = b""
        self._failing = False
        self._file = path.open("ab", buffering=0)

    def add(self, row: str) -> None:
        self._unwritten += row.encode(errors="replace") + b"\n"
        self.write()

    def write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as e:
            if not self._failing:
                log.error("%s CANNOT BE WRITTEN, training continues, its rows are kept: %s", self._path, e.strerror)
            self._failing = True
            return
        if self._failing:
            log.info("%s is written again", self._path)
        self._failing = False

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # errors of writing were logged already
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. A second call, which may come while an error is being handled, does nothing."""
        if self._file.closed:
            return
        self.write()
        self.sync()
        if self._unwritten:
            log.error("the last rows of %s are LOST, %d bytes", self._path, len(self._unwritten))
        self._file.close()


class TensorBoardWriter:
    """TensorBoard's file, written by the caller's thread.

    tensorboardX's own SummaryWriter has a thread that dies when the disk is full, and the run then waits for it. Here,
    rows that cannot be written are dropped, and later rows go to another file.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._folder = folder
        self._first_step = first_step
        self._failing = False
        self._file: Any = None
        self._flush_at = 0.0

    def add(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                self._file = event_file_writer.EventsWriter(str(self._folder / "events"), f".{step}")
                # This makes TensorBoard hide what an earlier start wrote for these steps.
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                first = step if self._failing else self._first_step
                self._file.write_event(event_pb2.Event(wall_time=time.time(), step=first, session_log=start))
            for name, value in values.items():
                scalar = summary.scalar(name, value)
                self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar))
            if time.monotonic() >= self._flush_at:  # flush() syncs to the disk, too
                self._file.flush()
                self._failing = False
                self._flush_at = time.monotonic() + FLUSH_S
        except OSError as e:
            if not self._failing:
                log.error("%s CANNOT BE WRITTEN, training continues: %s", self._folder, e.strerror)
            self._failing = True
            self._flush_at = 0.0
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None


class StepTimer:
    """The time per step between two rows, without evaluation, sampling and saving. The formula of MFU is in flops.py.

    Attributes:
      compile_s: seconds from start() to the end of the first step, which compiles or loads from the cache; None before.
      data_wait_s, checkpoint_stall_s: for how many seconds since the last row the loop waited for data, or for a save.
    """

    def __init__(self, config: Config):
        self._tokens_per_step = config.tokens_per_step
        self._flops_per_token = flops.flops_per_token(config)
        self._peak_flops = flops.peak_flops(jax.devices()[0].device_kind)
        self.compile_s: float | None = None
        self.data_wait_s = 0.0
        self.checkpoint_stall_s = 0.0
        self._steps = 0
        self._row_start = 0.0
        self._own_start = 0.0
        self._own_data_s = 0.0
        self._own_device_s = 0.0
        self.start()

    def start(self) -> None:
        """Starts the time of the first step."""
        self._row_start = self._own_start = time.perf_counter()

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
        self._own_device_s += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._row_start += time.perf_counter() - start
        self._own_start += time.perf_counter() - start

    def own_time(self) -> dict[str, float]:
        """For how many seconds since the last call this process itself delayed the steps (stragglers.py)."""
        now = time.perf_counter()
        host_s = max(now - self._own_start - self._own_data_s - self._own_device_s, 0.0)
        own = {"data_wait_s": self._own_data_s, "host_s": host_s}
        self._own_start = now
        self._own_data_s = 0.0
        self._own_device_s = 0.0
        return own

    def step_finished(self) -> None:
        self._steps += 1
        if self.compile_s is None:  # the first step compiles or loads from the cache; it says nothing about speed
            now = time.perf_counter()
            self.compile_s = now - self._row_start
            self._row_start = now
            self._steps = 0

    def read(self) -> dict[str, float]:
        """The perf/ and memory/ metrics since the last call."""
        now = time.perf_counter()
        compile_s = self.compile_s or 0.0
        step_time = (now - self._row_start) / self._steps if self._steps else compile_s
        tokens_per_s = self._tokens_per_step / step_time
        flops_per_s = tokens_per_s * self._flops_per_token / jax.device_count()
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
        if self._peak_flops is not None:
            row["perf/mfu"] = flops_per_s / self._peak_flops
        self._row_start = now
        self._steps = 0
        self.data_wait_s = 0.0
        self.checkpoint_stall_s = 0.0
        return row


class ProgressLine(console.StatusLine):
    def __init__(self, num_steps: int):
        super().__init__()
        self.num_steps = num_steps

    def step(self, step: int, loss: float, tokens_per_s: float, seconds_per_step: float) -> None:
        left = console.duration((self.num_steps - step) * seconds_per_step)
        line = f"step {step}/{self.num_steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {left} left"
        if jax.process_index() == 0:
            self.show(line, now=step == self.num_steps)
