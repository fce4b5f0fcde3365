"""train(): restore or start, then step, save, evaluate, sample until done or told to stop.

Counting: `step` is the number of finished steps everywhere: in rows, in checkpoint names, in the config's every_steps.
"""

import hashlib
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from data import loader, sources
from trainer import sampling, sharding, xla_options
from trainer.config import Config, to_json
from trainer.errors import CheckpointError, Diverged
from trainer.evaluation import evaluate, microbatch_rows
from trainer.reliability import divergence, identity, stragglers
from trainer.reliability.checkpoint import Checkpoints
from trainer.reliability.coordination import SAVE, STOP, Processes
from trainer.reliability.mirror import Mirror
from trainer.reliability.retention import SaveClock, planned
from trainer.reliability.watchdog import Watchdog
from trainer.reporting import metrics as reporting
from trainer.reporting import startup
from trainer.state import Program, TrainState
from trainer.step import make_eval_step, make_train_step

log = logging.getLogger("meshlm")
FINAL_RETRIES_S = (1, 5, 15)  # pauses before the last save of a run is tried again
LAST_SAVE_S = 10  # for a save in flight when another process may be gone
EVALUATION, SAMPLE = "evaluation", "sample"


class Bad(NamedTuple):
    """A step whose state is not good, to stop at or to go back behind."""

    step: int
    samples: int  # consumed with it
    reason: str
    action: str  # stop, rollback


class Trainer:
    """One run on this process's share of the mesh.

    Args:
      config: resolved (see run_directory.resolve).
      run: the run directory, written by process 0 and by the checkpoints.
      data: what config.data names, opened.
      processes: all that train; tells when to stop.
      watchdog: is told of every step.
      mirror: of the checkpoints, on process 0, if there is one.
    """

    def __init__(
        self,
        config: Config,
        run: pathlib.Path,
        data: sources.Sources,
        processes: Processes,
        watchdog: Watchdog,
        mirror: Mirror | None = None,
    ):
        self.config, self.run, self.data, self.processes, self.watchdog = config, run, data, processes, watchdog
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
            self.windows,
            global_batch_size=config.global_batch_size,
            sharding=self.batch_sharding,
            document_end=config.data.document_end,
        )
        self.tokenizer = self.data.load_tokenizer()
        self.prompt = sampling.prompt_of(config, self.tokenizer)
        self.program = Program(config, self.mesh)
        self.eval_step = make_eval_step(self.program)
        sample = config.sample
        self.generator = sampling.make_generator(
            self.program, temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p
        )
        self.mirror = mirror
        self.checkpoints = Checkpoints(run, config.checkpoint, processes, mirror)
        watchdog.save_limit_s = lambda: self.checkpoints.limit_s
        if mirror is not None:
            mirror.alive = watchdog.tick
        self.progress = reporting.Progress(config.num_train_steps)
        self.clock = SaveClock(config.checkpoint, time.monotonic())
        self.saving = self.asked_to_save = False
        self.events: set[str] = set()
        self.returns: dict[int, int] = {}  # how often the run went back to a step
        self.sound = 0  # the states up to this step are known to have finite losses; later ones may have
        self.has_stepped = False  # in this life

    def train(self) -> bool:
        """Runs to the last step and returns True, or saves and returns False when asked to stop."""
        config = self.config
        with self.watchdog.phase("restoring"):
            state, samples = self._restore_or_init()
        first = int(state.step)
        self.checkpoints.copy_missing(first)
        owed = self._owed(first)
        startup.page(config, self.program, self.windows, self.data)
        self.writers = reporting.Writers(self.run, first, config.metrics.tensorboard)
        patience_s = None
        try:
            if first >= config.num_train_steps and not owed:
                steps = config.num_train_steps
                log.info("This run already has its %d steps; more with --config.num_train_steps=N.", steps)
                self._sample(first, state.params, again=True)
                self._wait_for_copies()
                return True
            if first:
                log.info("Resuming after step %d.", first)
            self.meter = reporting.Meter(config)
            with self.watchdog.phase("compiling"):
                self.train_step = self._compile()
                self.checkpoints.warm_up(state)
            bad = self._look(first, samples, state.params, owed)
            while bad or (bad := self._steps(state, samples)):
                del state  # its memory is needed for the one that is restored
                with self.meter.paused():
                    state, samples = self._go_back(bad)
                bad = None
            self.checkpoints.delete_old()  # the last evaluation may have found a new best one
            return not self._stopping
        except jax.errors.JaxRuntimeError as e:
            # A peer may be gone, for which a save would wait; but too little memory is no reason to lose the save.
            if self.processes.size > 1 and not xla_options.is_out_of_memory(e):
                patience_s = LAST_SAVE_S
            raise
        finally:
            self.progress.clear()
            with self.watchdog.phase("saving"):
                self.checkpoints.wait(patience_s)
            self.writers.close()

    def _compile(self) -> Any:
        """The compiled train step; ConfigError on all processes where they are about to run different programs."""
        batch = self.program.abstract_batch(self.windows.dtype)
        seed = jax.ShapeDtypeStruct((), np.uint32, sharding=self.program.replicated)
        lowered = make_train_step(self.program).lower(self.program.state, batch, seed)
        if self.processes.size > 1:
            text = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
            self.processes.check_same("step", {"lowered train step": text})
        return lowered.compile()

    def _steps(self, state: TrainState, samples: int) -> Bad | None:
        """Steps on from `state`; returns the first bad one, or None at the end and when asked to stop."""
        config, step = self.config, int(state.step)
        # On the CPU, collectives of several devices in one of several processes hang unless each step is awaited.
        block = jax.default_backend() == "cpu" and jax.process_count() > 1 and jax.local_device_count() > 1
        seed = np.uint32(config.seed)
        pending: tuple[int, int, dict[str, Array]] | None = None
        batches = self.loader.prefetched(samples, config.data.prefetch)
        try:
            while step < config.num_train_steps and not self._stopping:
                with self.meter.waiting_for_data():
                    batch = next(batches)
                state, metrics = self.train_step(state, batch, seed)
                if block:
                    jax.block_until_ready(state)
                step, samples = step + 1, samples + config.global_batch_size
                # Read one step late, after the next is under way: the device never waits for Python.
                if pending is not None and (bad := self._report(*pending)):
                    return bad
                pending = (step, samples, metrics)
                self.watchdog.step(step)
                self._take_events()
                save, looks = self._save_is_due(step), self._looks(step)
                if save or looks:
                    # A state that is not finite is found here, before it is saved.
                    if bad := self._report(*pending):
                        return bad
                    pending = None
                    with self.meter.paused():
                        bad = self._pause(step, samples, state, save, looks)
                    if bad:
                        return bad
                if _every(config.watchdog.straggler_every_steps, step):
                    with self.meter.paused():
                        self._compare_speeds(step, samples)
            return None
        finally:
            batches.close()

    @property
    def _stopping(self) -> bool:
        return STOP in self.events

    def _take_events(self) -> None:
        """What all processes take up at this step; and process 0, whose clock alone counts, asks for saves by time."""
        self.events |= self.processes.tick()
        now = time.monotonic()
        if self.saving and not self.checkpoints.busy:
            self.saving = False
            self.clock.ended(not self.checkpoints.failed, now)
        if self.processes.index == 0 and not self.asked_to_save and self.clock.due(now):
            self.asked_to_save = True
            self.processes.request(SAVE)

    def _interrupted(self) -> bool:
        """Asked between the batches of an evaluation."""
        self.watchdog.tick()
        self.events |= self.processes.tick()
        return self._stopping

    def _pause(self, step: int, samples: int, state: TrainState, save: bool, looks: set[str]) -> Bad | None:
        """Saves, evaluates and samples, in this order: nothing that looking at a state does can cost its checkpoint.

        Told to stop, there may be seconds left: it saves, and the rest is owed after the restart.
        """
        if save:
            self._save(step, samples, state)
        if self._stopping:
            return None
        bad = self._look(step, samples, state.params, looks)
        if self._stopping and bad is None:
            self._save(step, samples, state, begun=save)
        return bad

    def _look(self, step: int, samples: int, params: dict, looks: set[str]) -> Bad | None:
        """Evaluates and samples; the step is bad if its state has no finite loss on held-out text."""
        if EVALUATION in looks:
            with self.watchdog.phase("evaluating"):
                val_loss = self._evaluate(step, samples, params)
            if val_loss is not None and not math.isfinite(val_loss):
                return Bad(
                    step, samples, f"the loss on held-out text after step {step} is not finite: {val_loss:.4g}",
                    divergence.action_for_state(self.config.divergence),
                )  # fmt: skip
        if SAMPLE in looks and not self._stopping:
            with self.watchdog.phase("sampling"):
                self._sample(step, params)
        return None

    def _looks(self, step: int) -> set[str]:
        """Which of evaluation and sample are due after `step`."""
        last, found = step == self.config.num_train_steps, set()
        if self.val_files and (last or _every(self.config.eval.every_steps, step)):
            found.add(EVALUATION)
        if self.prompt is not None and (last or _every(self.config.sample.every_steps, step)):
            found.add(SAMPLE)
        return found

    def _owed(self, step: int) -> set[str]:
        """Which were due after the restored `step`, and are not there: the process ended between the save and them."""
        if not step:
            return set()

        def find() -> list[str]:
            done = {EVALUATION: step in self.checkpoints.val_losses, SAMPLE: reporting.was_sampled(self.run, step)}
            return [look for look in self._looks(step) if not done[look]]

        return set(self.processes.choose("owed", find))

    def _save_is_due(self, step: int) -> bool:
        config = self.config.checkpoint
        by_step = _every(config.every_steps, step) or _every(config.keep_every_steps, step)
        return by_step or bool(self.events & {SAVE, STOP}) or step == self.config.num_train_steps

    # From a checkpoint

    def _restore_or_init(self, choose: Callable[[list[int]], int | None] | None = None) -> tuple[TrainState, int]:
        """The state of the newest checkpoint, or of that which `choose` takes, and the samples consumed."""
        restored = self.checkpoints.restore_newest(self.program, choose)
        if restored is None:
            self.checkpoints.evaluated({})
            return self.program.init(), 0
        state, meta = restored
        identity.check(meta, self.config, self.data, self.run)  # again: this one may come from the mirror
        self.checkpoints.evaluated(reporting.evaluations(self.run, meta["step"], meta.get("evaluations", ())))
        return state, meta["samples"]

    def _restore_sound(self, bad: Bad, choose: Callable[[list[int]], int | None]) -> tuple[TrainState, int]:
        """The state that `choose` takes. One without a finite loss is set aside, and `choose` takes among the others.

        A step's own loss is that of the state before its update, so a state that was saved may be the first bad one.
        """
        while True:
            try:
                state, samples = self._restore_or_init(choose)
            except CheckpointError:
                log.error("%s", bad.reason)  # why there was something to restore
                raise
            step = int(state.step)
            if step <= self.sound or self._is_sound(state.params):
                self.sound = step
                return state, samples
            del state
            self.checkpoints.set_aside([step], "its loss on held-out text is not finite")

    def _is_sound(self, params: dict) -> bool:
        """Whether a few windows of held-out text, or of training text if none is held out, have a finite loss."""
        files = self.val_files or self.data.files("train")
        rows = microbatch_rows(self.config, self.batch_sharding)
        result = evaluate(
            self.eval_step, params, files, self.config, batch_sharding=self.batch_sharding, num_windows=rows
        )
        assert result is not None  # nobody interrupts it
        return math.isfinite(result["val/loss"])

    def _go_back(self, bad: Bad) -> tuple[TrainState, int]:
        """The state of a checkpoint before `bad`, to go on from with the batches after it. Raises Diverged."""
        self.progress.clear()
        with self.watchdog.phase("saving"):
            self.checkpoints.wait()
        with self.watchdog.phase("restoring"):
            if bad.action == "stop":
                raise self._diverged(bad)
            wanted = bad.step - max(self.config.divergence.rollback_steps, 1)
            # Nothing is moved before it is known what the run can go on from.
            state, samples = self._restore_sound(
                bad, lambda steps: _newest_up_to(wanted, self._planned(bad.step, steps))
            )
            step = int(state.step)
            self.returns[step] = self.returns.get(step, 0) + 1
            if self.returns[step] > self.config.divergence.max_in_a_row:
                del state  # another may be restored
                raise self._diverged(bad, f"the run went back to step {step} {self.returns[step] - 1} times")
            self.checkpoints.discard_after(step)
        skipped = bad.samples - samples
        older = "" if step <= wanted else ", the oldest there is"
        log.warning("%s; back to step %d%s, leaving out %d samples", bad.reason, step, older, skipped)
        self.writers.close()
        self.writers = reporting.Writers(self.run, step, self.config.metrics.tensorboard)
        # Of the step after, so that a resume from the same checkpoint, which will go back again, cuts it off.
        row = {"event/rollback_from": float(bad.step), "event/skipped_samples": float(skipped)}
        self.writers.metrics(step + 1, bad.samples * self.config.data.seq_len, row)
        return state, bad.samples

    def _planned(self, before: int, steps: list[int]) -> list[int]:
        """Without those that a stop left: when it was stopped must not change where the run goes back to."""
        return [step for step in steps if step < before and planned(step, self.config.checkpoint)]

    # To a checkpoint

    def _save(self, step: int, samples: int, state: TrainState, begun: bool = False) -> None:
        """Begins a save, unless that of this state is `begun`. The last one of the run, or of this life, is awaited."""
        with self.watchdog.phase("saving"):
            if not begun:
                self._start_save(step, samples, state)
            if not self._is_last(step):
                return
            for pause_s in (*FINAL_RETRIES_S[: 1 if self._stopping else None], None):
                if self._is_saved(step):
                    break
                if pause_s is not None:
                    time.sleep(pause_s)
                    self._start_save(step, samples, state)
            else:
                steps = self.checkpoints.steps()
                raise CheckpointError(
                    f"the checkpoint at step {step} could not be written; make room in {self.run}, and the same "
                    f"command goes on from {f'step {steps[-1]}' if steps else 'the beginning'}"
                )
            self._wait_for_copies()

    def _wait_for_copies(self) -> None:
        """All wait here: in the collective of an evaluation the others would look stuck."""
        if self.config.checkpoint.mirror:
            self.processes.together("copied", lambda: self.mirror.wait() if self.mirror is not None else None)

    def _is_saved(self, step: int) -> bool:
        """Whether all processes have heard that `step` was saved or, if not, it is there: one may hear of a failure
        after the commit, and what is there cannot be saved again."""
        if self.processes.all_agree("saved", self.checkpoints.wait()):
            return True
        return self.processes.choose("is there", lambda: step in self.checkpoints.steps())

    def _is_last(self, step: int) -> bool:
        return step == self.config.num_train_steps or self._stopping

    def _start_save(self, step: int, samples: int, state: TrainState) -> None:
        meta = {
            "samples": samples,
            "data_fingerprint": self.data.fingerprint(),
            "tokenizer_sha256": identity.tokenizer_sha256(self.tokenizer),
            "config": json.loads(to_json(self.config)),
            "jax": jax.__version__,
        }
        self.writers.flush()
        stall_s = self.checkpoints.save(step, state, meta, last=self._is_last(step))
        self.meter.checkpoint_stall_s += stall_s
        self.clock.started(time.monotonic(), stall_s)
        self.events.discard(SAVE)
        self.saving, self.asked_to_save = True, False

    # Reports

    def _report(self, step: int, samples: int, metrics: dict[str, Array]) -> Bad | None:
        """Waits for the metrics of a step; writes a row when one is due. Returns what is bad."""
        with self.meter.waiting_for_device():
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.meter.step_finished()
        self.has_stepped = True
        found = divergence.verdict(self.config.divergence, values)
        if found is not None:
            action, reason = found
            if action != "skip":
                return Bad(step, samples, f"step {step} {reason}", action)
            log.warning("step %d %s; its update was left out", step, reason)
        else:
            self.sound = step - 1  # whose state made this loss
        due = _every(self.config.metrics.every_steps, step) or step == self.config.num_train_steps
        if not due and found is None:
            return None
        values |= self.windows.epochs(samples)
        perf = self.meter.read()
        self.writers.metrics(step, samples * self.config.data.seq_len, values | perf)
        self.progress.step(step, values["train/loss"], perf["perf/tokens_per_s"], perf["perf/step_time_s"])
        return None

    def _diverged(self, bad: Bad, more: str = "") -> Diverged:
        """The end of the run. The checkpoint that it names has a finite loss; later ones are set aside."""
        steps = self.processes.choose("checkpoints", self.checkpoints.steps)
        fate = "its checkpoint was set aside" if bad.step in steps else "it was not saved"
        if steps and steps[-1] > self.sound:
            state, _ = self._restore_sound(bad, lambda steps: max((s for s in steps if s < bad.step), default=None))
            del state
            self.checkpoints.discard_after(bad.step - 1)
            steps = self.processes.choose("checkpoints", self.checkpoints.steps)
        good = f"the last good checkpoint is step {steps[-1]}" if steps else "and there is no checkpoint yet"
        return Diverged(
            f"{bad.reason}; {more + '; ' if more else ''}{fate}, {good}; lower config.optimizer.peak_lr or "
            "lengthen the warm-up, or let config.divergence skip such batches"
        )

    def _compare_speeds(self, step: int, samples: int) -> None:
        """Which host is slow, if there are several."""
        if self.processes.size == 1:
            return
        with self.watchdog.phase("comparing speeds"):
            mine = self.meter.own_time() | {"probe_ms": stragglers.measure_probe()}
            everyone = map(json.loads, self.processes.gather("speeds", json.dumps(mine)))
        if self.processes.index:  # process 0 alone reports
            return
        values = {i: (host, own) for i, (host, own) in enumerate(zip(self.processes.hosts, everyone, strict=True))}
        ratios, lines = stragglers.report(values)
        for line in lines:
            log.warning("%s", line)
        self.writers.metrics(step, samples * self.config.data.seq_len, ratios)

    def _evaluate(self, step: int, samples: int, params: dict) -> float | None:
        """val/loss; None when it was cut short."""
        limit = self.config.eval.num_windows
        result = evaluate(
            self.eval_step,
            params,
            self.val_files,
            self.config,
            batch_sharding=self.batch_sharding,
            num_windows=limit,
            interrupted=self._interrupted,
        )
        if result is None:
            return None
        self.writers.metrics(step, samples * self.config.data.seq_len, result | {"val/windows": limit})
        self.progress.clear()
        shown = "  ".join(f"{name} {result[name]:.4f}" for name in ("val/loss", "val/bits_per_byte") if name in result)
        log.info("step %d  %s", step, shown)
        if math.isfinite(result["val/loss"]):
            self.sound = step
            self.checkpoints.val_losses[step], self.checkpoints.val_windows[step] = result["val/loss"], limit
        return result["val/loss"]

    def _sample(self, step: int, params: dict, again: bool = False) -> None:
        if self.tokenizer is None or self.prompt is None:  # the start-up page said so
            return
        config = self.config.sample
        (ids,) = self.generator(
            params, self.prompt, rows=1, max_new_tokens=config.max_new_tokens, seed=(self.config.seed + step) % 2**32
        )
        text = self.tokenizer.decode(ids)
        if not again:
            self.writers.sample({"step": step, "prompt": config.prompt, "text": text})
        self.progress.clear()
        log.info("--- a sample after step %d ---\n%s%s\n---", step, config.prompt, text)


def _every(n: int, step: int) -> bool:
    return n > 0 and step % n == 0


def _newest_up_to(wanted: int, steps: list[int]) -> int | None:
    """If all are later, the oldest there is; None if there is none."""
    return max((s for s in steps if s <= wanted), default=min(steps, default=None))
