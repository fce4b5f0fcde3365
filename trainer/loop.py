"""train(): restore or start, then step, save, evaluate and sample until the last step, or until asked to stop.

`step` is the number of finished steps everywhere: in rows, in checkpoint names, in the config's every_steps.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from data import loader, sources
from data.batch import Batch
from trainer import sampling, sharding, xla_options
from trainer.config import Config, to_json
from trainer.errors import CheckpointError, ConfigError, Diverged
from trainer.evaluation import evaluate, microbatch_rows
from trainer.finetuning import reference
from trainer.interchange import initial
from trainer.reliability import divergence, identity, stragglers
from trainer.reliability.checkpoint import Checkpoints
from trainer.reliability.coordination import SAVE, STOP, Processes
from trainer.reliability.divergence import Verdict
from trainer.reliability.mirror import Mirror
from trainer.reliability.retention import SaveClock, planned
from trainer.reliability.watchdog import Watchdog
from trainer.reporting import metrics, startup
from trainer.state import Program, TrainState
from trainer.step import make_eval_step, make_train_step
from trainer.tasks.asked import Asked
from trainer.tasks.measure import Tasks

log = logging.getLogger("meshlm")
FINAL_RETRIES_S = (1, 5, 15)  # pauses before retries of the last save of a run
LAST_SAVE_S = 10  # limit for a save in flight when another process may have died
EVALUATION, TASKS, SAMPLE = "evaluation", "tasks", "sample"

TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Cursor:
    """How far the run is.

    Attributes:
      step: finished steps.
      samples: training sequences consumed, including those that a rollback has skipped.
      pending: those of EVALUATION, TASKS and SAMPLE that are due after `step` but not done yet.
    """

    step: int
    samples: int
    pending: frozenset[str] = frozenset()

    def tokens(self, seq_len: int) -> int:
        return self.samples * seq_len


class BadStep(NamedTuple):
    """A step after which the run must not continue: the run stops or rolls back past the step, as the verdict says."""

    cursor: Cursor
    verdict: Verdict


class Trainer:
    """One run, on this process's share of the mesh.

    Args:
      config: resolved (see run_directory.resolve).
      run_dir: the run directory. Process 0 and the checkpoints write to it.
      data: the opened datasets of config.data.
      processes: all processes of the run; they agree on when to save and to stop.
      watchdog: is notified of every step.
      mirror: second place for checkpoints, if the run has one; only process 0 has it.

    Attributes:
      has_stepped: whether this process has finished a step since it was started.
    """

    def __init__(
        self,
        config: Config,
        run_dir: pathlib.Path,
        data: sources.Sources,
        processes: Processes,
        watchdog: Watchdog,
        *,
        mirror: Mirror | None = None,
    ):
        self.config = config
        self.run_dir = run_dir
        self.data = data
        self.processes = processes
        self.watchdog = watchdog
        mesh = sharding.make_mesh(config)
        jax.set_mesh(mesh)
        self.train_files, self.val_files = data.files("train"), data.files("val")
        self.windows = loader.MixedWindows(
            self.train_files, data.stages, seq_len=config.data.seq_len, seed=config.seed, packings=data.packings
        )
        batch_sharding = sharding.named(mesh, "batch")
        self.loader = loader.Loader(
            self.windows,
            global_batch_size=config.global_batch_size,
            sharding=batch_sharding,
            document_end=config.data.document_end,
        )
        self.program = Program(config, mesh)
        self.evaluate = functools.partial(
            evaluate, make_eval_step(self.program), config=config, batch_sharding=batch_sharding
        )
        tokenizer = data.load_tokenizer()
        self.sampler = None
        if tokenizer is not None and config.sample.max_new_tokens:
            self.sampler = sampling.Sampler(self.program, tokenizer)
        self.tasks = self._checked_tasks()
        self.checkpoint_meta = {
            "data_fingerprint": data.fingerprint(),
            "tokenizer_sha256": identity.tokenizer_sha256(tokenizer),
            "config": json.loads(to_json(config)),
            "jax": jax.__version__,
        }
        self.checkpoints = Checkpoints(run_dir, config.checkpoint, processes, mirror)
        watchdog.save_limit_s = lambda: self.checkpoints.limit_s
        if mirror is not None:
            mirror.on_progress = watchdog.tick
        self.save_clock = SaveClock(config.checkpoint, time.monotonic())
        self.writers = metrics.MetricWriters(run_dir, tensorboard=config.metrics.tensorboard)
        self.timer = metrics.StepTimer(config)
        self.progress = metrics.ProgressLine(config.num_train_steps)
        self.events: set[str] = set()  # those of SAVE and STOP that all processes have agreed on
        self.rollbacks: dict[int, int] = {}  # by step: how often the run was rolled back to it
        self.last_good_step = 0  # the losses of all states up to this step are known to be finite
        self.has_stepped = False

    def _checked_tasks(self) -> Tasks | None:
        """The tasks of config.eval, which are the same on all processes; None if there are none."""
        asked = Asked.of_config(self.config.eval)
        if asked is None:
            return None
        log.info("Checking the tasks %s", ", ".join(asked.names))
        with self.watchdog.phase("checking tasks"):
            tasks = Tasks(self.program, self.run_dir, asked)
            self.processes.check_same("questions", {"sha256": tasks.check(self.watchdog.tick)})
        return tasks

    def train(self) -> bool:
        """Runs to the last step and returns True, or saves and returns False when asked to stop."""
        patience_s = None
        try:
            return self._train()
        except jax.errors.JaxRuntimeError as e:
            # A peer may have died, so do not wait long for a save that needs it. Out of memory is not a sign of that.
            if self.processes.size > 1 and not xla_options.is_out_of_memory(e):
                patience_s = LAST_SAVE_S
            raise
        finally:
            self.progress.clear()
            with self.watchdog.phase("saving"):
                self.checkpoints.wait(patience_s)
            self.writers.close()

    def _train(self) -> bool:
        keep: Callable[[], None] | None = None
        if self.config.stores_reference:
            with self.watchdog.phase("comparing pairs"):
                keep = self._find_reference()
            if keep is None:
                return False
        with self.watchdog.phase("restoring"):
            state, cursor = self._restore_or_init()
        if keep is not None:  # not before the checkpoint has said that it began with these weights
            self.processes.run_on_process_0("the reference", keep)
        self.checkpoints.copy_missing(cursor.step)
        cursor = dataclasses.replace(cursor, pending=self._pending_at_start(cursor.step))
        startup.log_summary(self.config, self.program, self.windows, self.data)
        self.writers.open(cursor.step)
        if cursor.step >= self.config.num_train_steps and not cursor.pending:
            steps = self.config.num_train_steps
            log.info("This run already has its %d steps; for more, pass --config.num_train_steps=N.", steps)
            self._sample(cursor, state.params, record=False)
            self.checkpoints.wait_for_copies()
            return True
        if cursor.step:
            log.info("Resuming after step %d.", cursor.step)
        self.timer.start()
        with self.watchdog.phase("compiling"):
            train_step = self._compile()
            self.checkpoints.warm_up(state)
        bad = self._evaluate_and_sample(cursor, state.params) or self._steps(train_step, state, cursor)
        while bad:
            del state  # the restored state needs its memory
            with self.timer.paused():
                state, cursor = self._rollback(bad)
            bad = self._steps(train_step, state, cursor)
        self.checkpoints.delete_old()  # the last evaluation may have found a new best checkpoint
        return not self._stopping

    def _compile(self) -> TrainStep:
        """The compiled train step. Raises ConfigError on all processes if their programs are not the same."""
        batch = self.program.abstract_batch(self.windows.dtype)
        seed = jax.ShapeDtypeStruct((), np.uint32, sharding=self.program.replicated)
        lowered = make_train_step(self.program).lower(self.program.state, batch, seed)
        if self.processes.size > 1:
            text = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
            self.processes.check_same("step", {"lowered train step": text})
        return lowered.compile()

    def _steps(self, train_step: TrainStep, state: TrainState, cursor: Cursor) -> BadStep | None:
        """Trains from `state`. Returns the first bad step, or None after the last step or a request to stop."""
        config = self.config
        # On CPUs, collectives of several processes with several devices each hang unless each step is awaited.
        block = jax.default_backend() == "cpu" and jax.process_count() > 1 and jax.local_device_count() > 1
        seed = self._seed_on_devices()
        unread: tuple[Cursor, dict[str, Array]] | None = None
        batches = self.loader.prefetched(cursor.samples, config.data.prefetch)
        try:
            while cursor.step < config.num_train_steps and not self._stopping:
                with self.timer.waiting_for_data():
                    batch = next(batches)
                with jax.transfer_guard("disallow"):  # an implicit transfer would make the devices wait for Python
                    state, step_metrics = train_step(state, batch, seed)
                if block:
                    jax.block_until_ready(state)
                cursor = self._next(cursor)
                # The metrics of a step are read while the next step runs, so the device never waits for Python.
                if unread is not None and (bad := self._report(*unread)):
                    return bad
                unread = (cursor, step_metrics)
                self.watchdog.step(cursor.step)
                self._take_events()
                save = self._save_is_due(cursor.step)
                if save or cursor.pending:
                    # A state that is not finite is found here, before it is saved.
                    if bad := self._report(*unread):
                        return bad
                    unread = None
                    with self.timer.paused():
                        bad = self._run_due_actions(cursor, state, save=save)
                    if bad:
                        return bad
                if _every(config.watchdog.straggler_every_steps, cursor.step):
                    with self.timer.paused():
                        self._compare_speeds(cursor)
            return None
        finally:
            batches.close()

    def _seed_on_devices(self) -> Array:
        """config.seed on every device, uint32 []; each process puts it on its own devices."""
        seed = np.asarray(self.config.seed, np.uint32)
        return jax.make_array_from_callback((), self.program.replicated, lambda _: seed)

    def _next(self, cursor: Cursor) -> Cursor:
        step = cursor.step + 1
        return Cursor(step, cursor.samples + self.config.global_batch_size, self._due_after(step))

    # Events

    @property
    def _stopping(self) -> bool:
        return STOP in self.events

    def _take_events(self) -> None:
        """Takes up the events that all agreed on for this step. Process 0 requests timed saves, by its own clock."""
        self.events |= self.processes.tick()
        now = time.monotonic()
        if self.save_clock.saving and not self.checkpoints.busy:
            self.save_clock.ended(not self.checkpoints.failed, now)
        if self.processes.index == 0 and self.save_clock.request(now):
            self.processes.request(SAVE)

    def _interrupted(self) -> bool:
        """Whether an evaluation should end early; called after each of its batches."""
        self.watchdog.tick()
        self.events |= self.processes.tick()
        return self._stopping

    # What is due after a step

    def _run_due_actions(self, cursor: Cursor, state: TrainState, *, save: bool) -> BadStep | None:
        """Saves, evaluates and samples, in this order, so that a failure after the save cannot cost the checkpoint.

        When asked to stop, the process may have only seconds left, so it only saves; the next start does the rest.
        """
        if save:
            self._save(cursor, state)
        if self._stopping:
            return None
        bad = self._evaluate_and_sample(cursor, state.params)
        if self._stopping and bad is None:
            self._save(cursor, state, started=save)
        return bad

    def _evaluate_and_sample(self, cursor: Cursor, params: dict) -> BadStep | None:
        """Does the pending actions. The step is bad if what its state says about held-out text is not finite."""
        if EVALUATION in cursor.pending:
            with self.watchdog.phase("evaluating"):
                val_loss = self._evaluate(cursor, params)
            if val_loss is not None and not math.isfinite(val_loss):
                reason = f"the loss on held-out text after step {cursor.step} is not finite: {val_loss:.4g}"
                return self._bad_state(cursor, reason)
        if TASKS in cursor.pending and not self._stopping:
            with self.watchdog.phase("evaluating tasks"):
                if bad := self._measure_tasks(cursor, params):
                    return bad
        if SAMPLE in cursor.pending and not self._stopping:
            with self.watchdog.phase("sampling"):
                self._sample(cursor, params)
        return None

    def _bad_state(self, cursor: Cursor, reason: str) -> BadStep:
        return BadStep(cursor, Verdict(divergence.action_for_state(self.config.divergence), reason))

    def _due_after(self, step: int) -> frozenset[str]:
        """Those of EVALUATION, TASKS and SAMPLE that are due after `step`."""
        last = step == self.config.num_train_steps
        due = set()
        if self.val_files and (last or _every(self.config.eval.every_steps, step)):
            due.add(EVALUATION)
        if self.tasks is not None and (last or _every(self.config.eval.tasks_every_steps, step)):
            due.add(TASKS)
        if self.sampler is not None and (last or _every(self.config.sample.every_steps, step)):
            due.add(SAMPLE)
        return frozenset(due)

    def _pending_at_start(self, step: int) -> frozenset[str]:
        """The actions due after the restored `step` that have no row, because the process ended before them."""
        if not step:
            return frozenset()

        def find() -> list[str]:
            done = {
                EVALUATION: step in self.checkpoints.val_losses,
                TASKS: metrics.has_tasks(self.run_dir, step),
                SAMPLE: metrics.was_sampled(self.run_dir, step),
            }
            return [action for action in self._due_after(step) if not done[action]]

        return frozenset(self.processes.broadcast_from_0("pending actions", find))

    def _save_is_due(self, step: int) -> bool:
        config = self.config.checkpoint
        by_step = _every(config.every_steps, step) or _every(config.keep_every_steps, step)
        return by_step or bool(self.events & {SAVE, STOP}) or step == self.config.num_train_steps

    # From a checkpoint

    def _restore_or_init(self, choose: Callable[[list[int]], int | None] | None = None) -> tuple[TrainState, Cursor]:
        """The state of the newest checkpoint, or of the one whose step `choose` returns; else a new state."""
        restored = self.checkpoints.restore_newest(self.program, choose)
        if restored is None:
            self.checkpoints.set_evaluations({})
            return self._new_state(), Cursor(0, 0)
        state, meta = restored
        identity.check(meta, self.config, self.data, self.run_dir)  # again: this checkpoint may come from the mirror
        if meta.get("first_weights") != self.checkpoint_meta.get("first_weights"):
            raise ConfigError(
                f"{self.run_dir} began with other weights than config.init_from = {self.config.init_from} has now, and "
                "its answers are compared with what those say: name them, or another --workdir"
            )
        self.checkpoints.set_evaluations(metrics.evaluations(self.run_dir, meta["step"], meta.get("evaluations", ())))
        return state, Cursor(meta["step"], meta["samples"])

    def _new_state(self) -> TrainState:
        if not self.config.init_from:
            return self.program.init()
        tokenizer = self.data.load_tokenizer()
        return self.program.init_with(initial.params_of(self.program, self.run_dir, tokenizer, self.processes))

    def _find_reference(self) -> Callable[[], None] | None:
        """Gives all pairs of the run what its first weights say about them. Returns a function that keeps this for
        later starts, if need be; None if a stop ends it early.

        It comes before the state, so that the devices have room for the first weights.
        """
        files = [*self.train_files.values(), *self.val_files.values()]
        new = self.processes.broadcast_from_0("a new run", lambda: initial.is_needed(self.run_dir))
        if not new and (weights := reference.read_on_all(self.processes, self.run_dir, files)):
            self.checkpoint_meta["first_weights"] = weights
            return lambda: None
        log.info("Computing what the first weights say about each pair.")
        params = self._new_state().params
        self.checkpoint_meta["first_weights"] = weights = reference.digest(params)
        if not reference.compute(self.program, params, files, self._interrupted):
            return None
        return functools.partial(reference.write, self.run_dir, files, weights)

    def _restore_good(self, bad: BadStep, choose: Callable[[list[int]], int | None]) -> tuple[TrainState, Cursor]:
        """The state of the step that `choose` returns. Sets steps aside until one has a finite loss.

        A step's own loss is that of the state before its update, so the newest checkpoint may be the first bad state.
        """
        while True:
            try:
                state, cursor = self._restore_or_init(choose)
            except CheckpointError:
                log.error("%s", bad.verdict.reason)  # says why a checkpoint had to be restored
                raise
            if cursor.step <= self.last_good_step or self._has_finite_loss(state.params):
                self.last_good_step = cursor.step
                return state, cursor
            del state
            self.checkpoints.set_aside([cursor.step], "its loss on held-out text is not finite")

    def _has_finite_loss(self, params: dict) -> bool:
        """Evaluates a few windows of held-out text, or of training text if none is held out."""
        files = self.val_files or self.train_files
        rows = microbatch_rows(self.config, sharding.named(self.program.mesh, "batch"))
        result = self.evaluate(params, files, num_windows=rows)
        assert result is not None  # because nothing interrupts this evaluation
        return math.isfinite(result["val/loss"])

    def _rollback(self, bad: BadStep) -> tuple[TrainState, Cursor]:
        """The state of a checkpoint before `bad`, and a cursor that skips the batches up to `bad`. Raises Diverged."""
        self.progress.clear()
        with self.watchdog.phase("saving"):
            self.checkpoints.wait()
        with self.watchdog.phase("restoring"):
            if bad.verdict.action == divergence.STOP:
                raise self._diverged(bad)
            wanted = bad.cursor.step - max(self.config.divergence.rollback_steps, 1)
            # Later checkpoints are not moved until one is found from which the run can resume.
            state, restored = self._restore_good(
                bad, lambda steps: _newest_up_to(wanted, self._planned(bad.cursor.step, steps))
            )
            step = restored.step
            self.rollbacks[step] = self.rollbacks.get(step, 0) + 1
            if self.rollbacks[step] > self.config.divergence.max_in_a_row:
                del state  # _diverged may restore another one, which needs the memory
                raise self._diverged(bad, f"the run was rolled back to step {step} {self.rollbacks[step] - 1} times")
            self.checkpoints.discard_after(step)
        skipped = bad.cursor.samples - restored.samples
        oldest = "" if step <= wanted else ", the oldest checkpoint"
        log.warning("%s; back to step %d%s, skipping %d samples", bad.verdict.reason, step, oldest, skipped)
        self.writers.open(step)
        # The row has step + 1. A run that resumes from this checkpoint rolls back again, and first cuts this row off.
        row = {"event/rollback_from": float(bad.cursor.step), "event/skipped_samples": float(skipped)}
        self._write_row(Cursor(step + 1, bad.cursor.samples), row)
        return state, Cursor(step, bad.cursor.samples)

    def _planned(self, before: int, steps: list[int]) -> list[int]:
        """Steps below `before`, except those saved only for a stop: its time must not decide where a rollback leads."""
        return [step for step in steps if step < before and planned(step, self.config.checkpoint)]

    def _diverged(self, bad: BadStep, more: str = "") -> Diverged:
        """The error that ends the run. The checkpoint that it names has a finite loss; later ones are set aside."""
        at = bad.cursor.step
        steps = self.processes.broadcast_from_0("checkpoints", self.checkpoints.steps)
        fate = "its checkpoint was set aside" if at in steps else "it was not saved"
        if steps and steps[-1] > self.last_good_step:
            state, _ = self._restore_good(bad, lambda steps: max((s for s in steps if s < at), default=None))
            del state
            self.checkpoints.discard_after(at - 1)
            steps = self.processes.broadcast_from_0("checkpoints", self.checkpoints.steps)
        good = f"the last good checkpoint is step {steps[-1]}" if steps else "and there is no checkpoint yet"
        return Diverged(
            f"{bad.verdict.reason}; {more + '; ' if more else ''}{fate}, {good}; lower config.optimizer.peak_lr or "
            "lengthen the warm-up, or let config.divergence skip such batches"
        )

    # To a checkpoint

    def _save(self, cursor: Cursor, state: TrainState, *, started: bool = False) -> None:
        """Starts a save, unless it was `started` already. Waits for the save if the run ends or stops after it."""
        with self.watchdog.phase("saving"):
            if not started:
                self._start_save(cursor, state)
            if not self._is_last(cursor.step):
                return
            for pause_s in (*FINAL_RETRIES_S[: 1 if self._stopping else None], None):
                if self._is_saved(cursor.step):
                    break
                if pause_s is not None:
                    time.sleep(pause_s)
                    self._start_save(cursor, state)
            else:
                steps = self.checkpoints.steps()
                raise CheckpointError(
                    f"the checkpoint at step {cursor.step} could not be written; make room in {self.run_dir}, and the "
                    f"same command resumes from {f'step {steps[-1]}' if steps else 'the beginning'}"
                )
            self.checkpoints.wait_for_copies()

    def _is_saved(self, step: int) -> bool:
        """Whether `step` is committed; all processes get the same answer.

        A process may report a failure after the commit, and a committed step cannot be saved again.
        """
        if self.processes.all_agree("saved", self.checkpoints.wait()):
            return True
        return self.processes.broadcast_from_0("is there", lambda: step in self.checkpoints.steps())

    def _is_last(self, step: int) -> bool:
        return step == self.config.num_train_steps or self._stopping

    def _start_save(self, cursor: Cursor, state: TrainState) -> None:
        self.writers.flush()
        meta = {"samples": cursor.samples} | self.checkpoint_meta
        stall_s = self.checkpoints.save(cursor.step, state, meta, last=self._is_last(cursor.step))
        self.timer.checkpoint_stall_s += stall_s
        self.save_clock.started(time.monotonic(), stall_s)
        self.events.discard(SAVE)

    # Reports

    def _report(self, cursor: Cursor, step_metrics: dict[str, Array]) -> BadStep | None:
        """Waits for the metrics of a step and judges them; writes a row if one is due. Returns the step if bad."""
        with self.timer.waiting_for_device():
            values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        self.timer.step_finished()
        self.has_stepped = True
        verdict = divergence.verdict(self.config.divergence, values)
        if verdict.action in (divergence.STOP, divergence.ROLLBACK):
            return BadStep(cursor, verdict._replace(reason=f"step {cursor.step} {verdict.reason}"))
        if verdict.action == divergence.SKIP:
            log.warning("step %d %s; its update was left out", cursor.step, verdict.reason)
        else:
            self.last_good_step = cursor.step - 1  # the loss is that of the state before the update
        due = _every(self.config.metrics.every_steps, cursor.step) or cursor.step == self.config.num_train_steps
        if due or verdict.action == divergence.SKIP:
            values |= self.windows.epochs(cursor.samples)
            perf = self.timer.read()
            self._write_row(cursor, values | perf)
            self.progress.step(cursor.step, values["train/loss"], perf["perf/tokens_per_s"], perf["perf/step_time_s"])
        return None

    def _compare_speeds(self, cursor: Cursor) -> None:
        """Warns of slow hosts, if there are several processes."""
        if self.processes.size == 1:
            return
        with self.watchdog.phase("comparing speeds"):
            mine = self.timer.own_time() | {"probe_ms": stragglers.measure_probe()}
            everyone = map(json.loads, self.processes.gather("speeds", json.dumps(mine)))
        if self.processes.index:  # only process 0 reports
            return
        values = {i: (host, own) for i, (host, own) in enumerate(zip(self.processes.hosts, everyone, strict=True))}
        ratios, lines = stragglers.report(values)
        for line in lines:
            log.warning("%s", line)
        self._write_row(cursor, ratios)

    def _evaluate(self, cursor: Cursor, params: dict) -> float | None:
        """val/loss; None if a stop ended the evaluation early."""
        limit = self.config.eval.num_windows
        result = self.evaluate(params, self.val_files, num_windows=limit, interrupted=self._interrupted)
        if result is None:
            return None
        self._write_row(cursor, result | {"val/windows": limit})
        self.progress.clear()
        shown = "  ".join(f"{name} {result[name]:.4f}" for name in ("val/loss", "val/bits_per_byte") if name in result)
        log.info("step %d  %s", cursor.step, shown)
        if math.isfinite(result["val/loss"]):
            self.last_good_step = cursor.step
            self.checkpoints.val_losses[cursor.step] = result["val/loss"]
            self.checkpoints.val_windows[cursor.step] = limit
        return result["val/loss"]

    def _measure_tasks(self, cursor: Cursor, params: dict) -> BadStep | None:
        """Writes a row with the metrics of tasks, unless a stop ends it early or the state turns out to be bad."""
        assert self.tasks is not None  # because TASKS is due
        try:
            results = self.tasks.measure(params, self._interrupted)
        except Diverged as e:
            return self._bad_state(cursor, f"in tasks after step {cursor.step}, {e}")
        if results is None:
            return None
        values = {f"task/{task}/{metric}": x for task, row in results.items() for metric, x in row.items()}
        self._write_row(cursor, values)
        self.progress.clear()
        shown = (f"{task} {next(iter(row))} {next(iter(row.values())):.4f}" for task, row in results.items() if row)
        log.info("step %d  %s", cursor.step, "  ".join(shown))
        return None

    def _sample(self, cursor: Cursor, params: dict, *, record: bool = True) -> None:
        """Logs a sample, and writes it to samples.jsonl if `record`."""
        if self.sampler is None:
            return
        prompt, text = self.config.sample.prompt, self.sampler.sample(params, cursor.step)
        if record:
            self.writers.sample({"step": cursor.step, "prompt": prompt, "text": text})
        self.progress.clear()
        log.info("--- a sample after step %d ---\n%s%s\n---", cursor.step, prompt, text)

    def _write_row(self, cursor: Cursor, values: dict[str, float]) -> None:
        self.writers.metrics(cursor.step, cursor.tokens(self.config.data.seq_len), values)


def _every(n: int, step: int) -> bool:
    return n > 0 and step % n == 0


def _newest_up_to(wanted: int, steps: list[int]) -> int | None:
    """The newest of `steps` that is not after `wanted`; if all are after it, the oldest; None if `steps` is empty."""
    return max((s for s in steps if s <= wanted), default=min(steps, default=None))
