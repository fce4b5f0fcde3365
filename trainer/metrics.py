"""What a run reports: metrics.jsonl, TensorBoard, the console. Only process 0 writes."""

import contextlib
import json
import os
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax

from trainer import console, flops
from trainer.config import Config


def peak_memory_gib() -> float:
    """Most memory used so far: of the fullest local device, or of this process where the devices do not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    used = max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return used / 2**30


def cut_rows_after(path: pathlib.Path, step: int) -> int:
    """Drops the rows of a .jsonl file past `step`, and a torn last line; returns how many rows went.

    With it a file that a kill left ahead of its checkpoint reads, in the end, as one uninterrupted run.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            keep = line.endswith("\n") and json.loads(line)["step"] <= step
        except ValueError:
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
    return dropped


class Writers:
    """metrics.jsonl, samples.jsonl and TensorBoard of one run; a process other than 0 writes nothing."""

    def __init__(self, run: pathlib.Path, step: int, tensorboard: bool):
        self._metrics = self._samples = self._board = None
        if jax.process_index() != 0:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_rows_after(run / name, step)
        self._metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._samples = (run / "samples.jsonl").open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def metrics(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """One row. repr of a Python float is the shortest text that reads back exactly."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"step": step, "tokens": tokens, **values}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sample(self, row: dict[str, Any]) -> None:
        if self._samples is not None:
            self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._samples.flush()

    def close(self) -> None:
        for writer in (self._metrics, self._samples, self._board):
            if writer is not None:
                writer.close()


class Meter:
    """Time between rows: of the steps alone, without evaluation, sampling and saving. MFU is trainer/flops.py's."""

    def __init__(self, config: Config):
        self.tokens_per_step = config.tokens_per_step
        self.flops_per_token = flops.flops_per_token(config)
        self.peak_flops = flops.peak_flops(jax.devices()[0].device_kind)
        self.compile_s: float | None = None
        self._mark = time.perf_counter()
        self._steps = 0
        self.data_wait_s = self.checkpoint_stall_s = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.data_wait_s += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

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
