"""train(): restore or start, then step, evaluate, sample, save until done or told to stop.

Counting: `step` is the number of finished steps everywhere: in rows, in checkpoint names, in the config's every_steps.
"""

import json
import logging
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from data import formats, loader, mixture, sources
from data.errors import DataError
from model.generate import Generator
from trainer import metrics as reporting
from trainer import sharding, startup
from trainer.checkpoint import Checkpoints
from trainer.config import Config, to_json
from trainer.errors import ConfigError, Diverged
from trainer.state import Program, TrainState
from trainer.step import make_eval_step, make_train_step

log = logging.getLogger("meshlm")


class Trainer:
    """One run on this process's share of the mesh.

    Args:
      config: resolved (see run_directory.resolve).
      run: the run directory, written by process 0 and by the checkpoints.
      data: what config.data names, opened.
      should_stop: asked after each step with its number; must answer the same on every process.
    """

    def __init__(self, config: Config, run: pathlib.Path, data: sources.Sources, should_stop: Callable[[int], bool]):
        self.config, self.run, self.data, self.should_stop = config, run, data, should_stop
        self.mesh = sharding.make_mesh(config)
        jax.set_mesh(self.mesh)
        self.val_files = self.data.files("val")
        self.windows = loader.MixedWindows(
            self.data.files("train"),
            self.data.stages,
            seq_len=config.data.seq_len,
            seed=config.seed,
            packings=self.data.packings,
        )
        self.batch_sharding = sharding.named(self.mesh, "batch")
        self.loader = loader.Loader(
            self.windows, global_batch_size=config.global_batch_size, sharding=self.batch_sharding
        )
        self.tokenizer = self.data.load_tokenizer()
        try:  # found out now, not at the first sample
            self.prompt = self.tokenizer.encode(config.sample.prompt) if self.tokenizer is not None else None
        except DataError as e:
            raise ConfigError(f"config.sample.prompt: {e}") from None
        self.program = Program(config, self.mesh)
        self.train_step = make_train_step(self.program)
        self.eval_step = make_eval_step(self.program)
        self.generator = Generator(
            config.model,
            self.program.model,
            temperature=config.sample.temperature,
            top_k=config.sample.top_k,
            top_p=config.sample.top_p,
            out_sharding=self.program.replicated,
        )
        self.checkpoints = Checkpoints(run, config.checkpoint)
        self.progress = reporting.Progress(config.num_train_steps)
        self.last_saved_at = time.monotonic()

    def train(self) -> bool:
        """Runs to the last step and returns True, or saves and returns False when asked to stop."""
        config = self.config
        state, samples, owed = self._restore_or_init()
        step = first = int(state.step)
        startup.page(config, self.program, self.windows, self.data)
        self.writers = reporting.Writers(self.run, first, config.metrics.tensorboard)
        if first >= config.num_train_steps:
            log.info("This run already has its %d steps; more with --config.num_train_steps=N.", config.num_train_steps)
            self._sample(first, state.params)
            return True
        if first:
            log.info("Resuming after step %d.", first)
        if owed:
            self._look(first, samples, state.params)

        self.meter = reporting.Meter(config)
        batches = self.loader.prefetched(samples, config.data.prefetch)
        # On the CPU, collectives of several devices in one of several processes hang unless each step is awaited.
        block = jax.default_backend() == "cpu" and jax.process_count() > 1 and jax.local_device_count() > 1
        seed = np.uint32(config.seed)
        pending: tuple[int, int, dict[str, Array]] | None = None
        stopped = False
        try:
            while step < config.num_train_steps and not stopped:
                with self.meter.waiting_for_data():
                    batch = next(batches)
                state, metrics = self.train_step(state, batch, seed)
                if block:
                    jax.block_until_ready(state)
                step, samples = step + 1, samples + config.global_batch_size
                # Read one step late, after the next is under way: the device never waits for Python.
                if pending is not None:
                    self._report(*pending)
                pending = (step, samples, metrics)
                last = step == config.num_train_steps
                stopped = self.should_stop(step) and not last
                save = last or stopped or _every(config.checkpoint.every_steps, step) or self._save_is_timely(step)
                if save or self._evaluation_is_due(step) or self._sample_is_due(step):
                    self._report(*pending)  # a state that is not finite is found here, before it is saved
                    pending = None
                    with self.meter.paused():
                        # Told to stop, there may be seconds left: save now, and look after the restart.
                        val_loss = None if stopped else self._look(step, samples, state.params)
                        if save:
                            self._save(step, samples, state, val_loss, owed=stopped)
            if not self.checkpoints.wait():
                log.error("The last checkpoint could not be written; the run goes on from the one before it.")
        finally:
            self.progress.clear()
            batches.close()
            self.checkpoints.wait()
            self.writers.close()
        return not stopped

    def _evaluation_is_due(self, step: int) -> bool:
        return step == self.config.num_train_steps or _every(self.config.eval.every_steps, step)

    def _sample_is_due(self, step: int) -> bool:
        return step == self.config.num_train_steps or _every(self.config.sample.every_steps, step)

    def _look(self, step: int, samples: int, params: dict) -> float | None:
        """Evaluates and samples where that is due after `step`; returns val/loss if evaluated."""
        val_loss = self._evaluate(step, samples, params) if self._evaluation_is_due(step) else None
        if self._sample_is_due(step):
            self._sample(step, params)
        return val_loss

    def _restore_or_init(self) -> tuple[TrainState, int, bool]:
        """State, samples consumed, and whether the evaluation and sample of that step are still owed."""
        restored = self.checkpoints.restore_newest(self.program)
        if restored is None:
            return self.program.init(), 0, False
        state, meta = restored
        if meta["data_fingerprint"] != self.data.fingerprint():
            raise ConfigError(
                f"{self.run} was trained on another dataset (fingerprint {meta['data_fingerprint']}) than the one at "
                f"{self.config.data.path} ({self.data.fingerprint()}); name that one, or another --workdir"
            )
        weights = meta["config"]["data"].get("weights", "")
        old = mixture.parse_stages(weights, len(self.data.datasets))
        mixture.check_change(old, self.data.stages, meta["samples"])
        return state, meta["samples"], meta["owed"]

    def _save_is_timely(self, step: int) -> bool:
        """Whether checkpoint.every_minutes have passed; process 0's clock decides for all, at metric steps."""
        minutes = self.config.checkpoint.every_minutes
        if not minutes or not _every(self.config.metrics.every_steps, step):
            return False
        due = time.monotonic() - self.last_saved_at >= 60 * minutes
        return bool(multihost_utils.broadcast_one_to_all(np.int32(due))) if jax.process_count() > 1 else due

    def _save(self, step: int, samples: int, state: TrainState, val_loss: float | None, owed: bool) -> None:
        meta = {
            "samples": samples,
            "owed": owed,
            "data_fingerprint": self.data.fingerprint(),
            "config": json.loads(to_json(self.config)),
            "jax": jax.__version__,
        }
        self.meter.checkpoint_stall_s += self.checkpoints.save(step, state, meta, val_loss)
        self.last_saved_at = time.monotonic()

    def _report(self, step: int, samples: int, metrics: dict[str, Array]) -> None:
        """Waits for the metrics of a step; writes a row when one is due. Raises Diverged."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.meter.step_finished()
        if not all(map(math.isfinite, values.values())):
            self.checkpoints.wait()
            steps = self.checkpoints.steps()
            good = f"the last good checkpoint is step {steps[-1]}" if steps else "and there is no checkpoint yet"
            loss, grad, param = (values[f"train/{name}"] for name in ("loss", "grad_norm", "param_norm"))
            raise Diverged(
                f"step {step} is not finite: loss {loss:.4g}, gradient norm {grad:.4g}, parameter norm {param:.4g}; "
                f"it was not saved, {good}; lower config.optimizer.peak_lr or lengthen the warm-up"
            )
        if not _every(self.config.metrics.every_steps, step) and step != self.config.num_train_steps:
            return
        values |= self.windows.epochs(samples)
        perf = self.meter.read()
        self.writers.metrics(step, samples * self.config.data.seq_len, values | perf)
        self.progress.step(step, values["train/loss"], perf["perf/tokens_per_s"], perf["perf/step_time_s"])

    def _evaluate(self, step: int, samples: int, params: dict) -> float | None:
        if not self.val_files:
            return None
        limit = self.config.eval.num_windows
        result = evaluate(self.eval_step, params, self.val_files, self.config, self.batch_sharding, limit)
        self.writers.metrics(step, samples * self.config.data.seq_len, result)
        self.progress.clear()
        shown = "  ".join(f"{name} {result[name]:.4f}" for name in ("val/loss", "val/bits_per_byte") if name in result)
        log.info("step %d  %s", step, shown)
        return result["val/loss"]

    def _sample(self, step: int, params: dict) -> None:
        if self.tokenizer is None or self.prompt is None:  # the start-up page said so
            return
        config = self.config.sample
        (ids,) = self.generator(
            params, self.prompt, rows=1, max_new_tokens=config.max_new_tokens, seed=(self.config.seed + step) % 2**32
        )
        text = self.tokenizer.decode(ids)
        self.writers.sample({"step": step, "prompt": config.prompt, "text": text})
        self.progress.clear()
        log.info("--- a sample after step %d ---\n%s%s\n---", step, config.prompt, text)


def evaluate(
    eval_step: Callable[[dict, Array, Array], Array],
    params: dict,
    sources: dict[str, formats.TokenFiles],
    config: Config,
    batch_sharding: jax.sharding.Sharding,
    num_windows: int,
) -> dict[str, float]:
    """val/loss (nats a token), val/perplexity and, where the text's bytes are known, val/bits_per_byte.

    Over `num_windows` fixed windows of each source; 0: its whole split. Of several sources the mean over all their
    targets, and val/loss/NAME of each.
    """
    totals, counts = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0.0)
    for name, files in sources.items():
        batches = loader.evaluation_batches(
            files,
            seq_len=config.data.seq_len,
            batch_size=config.global_batch_size,
            sharding=batch_sharding,
            limit=num_windows,
        )
        for tokens, lengths in batches:
            totals[name] += float(eval_step(params, tokens, lengths))
            counts[name] += float(lengths.sum())
    loss = sum(totals.values()) / sum(counts.values())
    result = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700))}
    if all(files.text_bytes for files in sources.values()):
        tokens, text_bytes = (sum(getattr(f, what) for f in sources.values()) for what in ("tokens", "text_bytes"))
        result["val/bits_per_byte"] = loss / math.log(2) * tokens / text_bytes
    if len(sources) > 1:
        result |= {f"val/loss/{name}": totals[name] / counts[name] for name in sources}
    return result


def _every(n: int, step: int) -> bool:
    return n > 0 and step % n == 0
