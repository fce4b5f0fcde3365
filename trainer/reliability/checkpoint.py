"""Checkpoints: asynchronous Orbax saves in RUN/checkpoints/<finished steps>, verified when they are restored.

Orbax (v1) writes and commits the arrays; this module adds what Orbax does not promise:
- A flipped byte restores without an error, so each leaf has a checksum, and the metadata has a digest.
- Orbax takes any directory whose name is a number for a step, so incomplete ones are moved to RUN/quarantine.
- Orbax casts another dtype silently, so dtypes and shapes are compared.
- The metadata of a committed step is read back before the step counts, and a failed save is reported at once.
- A step counts as damaged only if that is proved (reading.py). It is moved away only after another one was restored.
- retention.py decides which steps are kept: Orbax's own manager remembers failed steps, refuses to go back to an
  earlier step, and deletes while the loop waits.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import platform
import shutil
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import gpath
from flax import traverse_util
from jax import Array
from orbax.checkpoint import v1 as ocp

from data.storage import files
from trainer.config import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError, Stopped
from trainer.reliability import identity, reading, retention
from trainer.reliability.coordination import Processes
from trainer.reliability.mirror import Mirror
from trainer.reliability.reading import Damaged, Suspect, Unreadable
from trainer.reliability.restarts import METADATA_FILE
from trainer.state import Program, TrainState

log = logging.getLogger("meshlm")
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # hides tracebacks of Orbax's tasks, whose errors are raised

T = TypeVar("T")

ITEMS = ("params", "opt_state")
DELETING = ".deleting"
ASIDE = ".set_aside"  # suffix of intact steps from which the run must not resume
FETCHED = ".fetched"  # suffix of copies that were fetched from the mirror but not restored yet
# Timeout of an async save: a host that cannot write makes the others wait, and meanwhile no other save can start. The
# first save gets SAVE_TIMEOUT_S, since its duration is unknown; later saves get max(LATER_TIMEOUT_S, TIMEOUT_FACTOR x
# the duration of the previous save). To let saves succeed on slow storage, the timeout is at least the time of a save
# at SLOWEST_BYTES_S, and it doubles after each save that reached it.
SAVE_TIMEOUT_S, LATER_TIMEOUT_S, TIMEOUT_FACTOR = 300, 60, 10
SLOWEST_BYTES_S, LONGEST_TIMEOUT_S = 50e6, 6 * 3600  # bytes/s of one process
# A shard is written in chunks of at most this size, so that a process which reads it needs less memory.
CHUNKS = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=64 << 20)
# How long to wait for the previous save before skipping this one: usually, and if that save failed on a process.
PATIENCE_S, AFTER_FAILURE_S = 30, 1


@jax.jit
def _checksums(tree: Any) -> Array:
    """The sum of the bit patterns of each leaf modulo 2**32, uint32 [leaves]: any single flipped bit changes it.

    Each device sums its shard, and the sums are added, so no leaf is gathered.
    """

    def one(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
        sums = bits.astype(jnp.uint32)
        for _ in range(sums.ndim):  # one axis at a time, from the first: ten times as fast on XLA's CPU backend
            sums = jax.lax.optimization_barrier(jnp.sum(sums, axis=0, dtype=jnp.uint32))
        return sums

    return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def checksums(tree: Any) -> list[int]:
    return jax.device_get(_checksums(tree)).tolist()


def checksums_by_name(tree: Any) -> dict[str, int]:
    return dict(zip(_leaves(tree), checksums(tree), strict=True))


class LiteralPath(gpath.PosixGPath):
    """A path for Orbax that is taken literally: no character starts a pattern, and no folder means an object store.

    Orbax finds its files with glob(), in which a [ in the name of any parent folder would start a pattern.
    """

    _uri_scheme = None  # /gs and /s3 are ordinary folders

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        for path in pathlib.Path(self).glob(pattern):
            yield type(self)(path)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run_dir: the run directory.
      config: which checkpoints to keep. None opens them only for reading: nothing is written, moved or deleted.
      processes: all processes that save; None: only this one.
      mirror: receives copies of the steps, and returns copies of steps that are lost here.

    Attributes:
      val_losses: val/loss of the steps that were evaluated; the caller fills it.
      val_windows: by step, eval.num_windows of its loss; None or missing if not known. The caller fills it.
      failed: whether the last save failed.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        config: CheckpointConfig | None = None,
        processes: Processes | None = None,
        mirror: Mirror | None = None,
    ):
        self.directory = run_dir / "checkpoints"
        self.quarantine = run_dir / "quarantine"
        self.quarantine_there = self.directory / "quarantine"  # used if checkpoints/ is on another disk
        self.saved_step_file = run_dir / "saved_step"  # shows that checkpoints existed if all are lost
        self.config = config
        self.processes = processes or Processes()
        self.mirror = mirror
        self.val_losses: dict[int, float] = {}
        self.val_windows: dict[int, int | None] = {}
        self.failed = False
        self._watcher: threading.Thread | None = None  # waits for the save in flight
        self._save_s = 0.0  # how long the last save took
        self._limit_s = float(SAVE_TIMEOUT_S)
        self._timeouts = 0  # saves in a row that reached their limit
        if config is None:
            if not reading.patiently(self._is_folder, self.directory):
                raise CheckpointError(
                    f"{run_dir} has no checkpoints/ folder; train first, or name the run with --workdir"
                )
            return
        self._change_files("checkpoints", self._clean_up)

    def _change_files(self, what: str, function: Callable[[], None]) -> None:
        """Runs `function` on process 0, with retries if a file error may pass. The other processes wait."""
        self.processes.run_on_process_0(what, lambda: reading.writing(function, self.directory))

    def _clean_up(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._steps():  # if no step is complete, something else is wrong, and all stay
            self._move_incomplete()
        # This comes after incomplete steps were moved, so that copies can take their numbers.
        for path in self.directory.iterdir():
            if identity.STEP.fullmatch(path.name):
                continue
            if path.name.endswith(FETCHED) and self._is_complete(path) and not reading.is_there(path.with_suffix("")):
                # The process that fetched this copy died; the restore verifies the copy.
                path.rename(path.with_suffix(""))
            elif path.name.endswith((DELETING, FETCHED)) or ".orbax-checkpoint-tmp" in path.name:
                _remove(path)

    def _move_incomplete(self) -> None:
        """Moves incomplete steps to quarantine, because they would block saves and copies with the same numbers."""
        for path in self.directory.iterdir():
            if identity.STEP.fullmatch(path.name) and not self._is_complete(path):
                self._move_to_quarantine(path, "it is incomplete")

    # Writing

    def warm_up(self, state: TrainState) -> None:
        """Compiles what save() runs. Otherwise the first save would seem slow, and timed saves would become rarer."""
        _arrays(_items(state))

    def save(self, step: int, state: TrainState, meta: dict[str, Any], *, last: bool = True) -> float:
        """Starts a save of `state` after `step` finished steps; returns the seconds for which it stalled the caller.

        When this returns, the arrays are copied, and the state may be donated. Only one save runs at a time. A second
        save waits for the first, for minutes if it is the `last` one. If the first is still in flight on any process
        after that, the second is skipped and counts as failed. (When a save fails on some processes, Orbax waits on the
        others.)

        Args:
          meta: JSON values that restore_newest() returns with the state.
        """
        start = time.perf_counter()
        free, committed = self._prepare(step, last)
        if not free:
            self.failed = True
            log.error("checkpoint at step %d SKIPPED: the previous one is still being written, or failing", step)
            return time.perf_counter() - start
        if self.failed:
            self._clear_partial()  # again, because other threads of the failed save may have written more
        self.failed = False
        items = _items(state)
        arrays = _arrays(items)
        if committed == identity.digest(arrays):  # a save that failed late, on some processes, has committed it
            log.info("checkpoint at step %d is committed already", step)
            return time.perf_counter() - start
        meta = meta | {"step": step, "arrays": arrays, "evaluations": self._evaluations()}
        meta["digest"] = identity.digest(meta)
        self._limit_s = self._limit(items)
        try:
            context = ocp.Context()
            context.asynchronous.timeout_secs = int(self._limit_s)
            context.array_options.saving.storage_options = CHUNKS
            with context:
                response = ocp.save_checkpointables_async(self._path(step), items, custom_metadata=meta)
        except Exception as e:  # a failing disk makes Orbax raise many types
            self._report_failure(step, e)
            return time.perf_counter() - start
        self._watcher = threading.Thread(target=self._watch, args=(step, response), name="checkpoint", daemon=True)
        self._watcher.start()
        return time.perf_counter() - start

    def set_evaluations(self, rows: dict[int, dict[str, Any]]) -> None:
        """Sets the evaluations of a run that is resumed: rows of metrics.jsonl with a finite val/loss, by step."""
        self.val_losses = {step: row["val/loss"] for step, row in rows.items()}
        windows = {step: row.get("val/windows") for step, row in rows.items()}
        self.val_windows = {step: n if type(n) is int else None for step, n in windows.items()}

    def _evaluations(self) -> list[dict[str, Any]]:
        """Rows for the metadata, in case metrics.jsonl is lost: the evaluations of steps that may still exist.

        On processes other than 0 this is [], because only the metadata of process 0 is written.
        """
        if self.processes.index:
            return []
        steps = set(self.val_losses)
        with _postponed():
            steps &= {*self._steps(), *(self.mirror.copies if self.mirror is not None else ())}
        return [
            {"step": step, "val/loss": self.val_losses[step], "val/windows": self.val_windows.get(step)}
            for step in sorted(steps)
        ]

    @property
    def limit_s(self) -> float:
        """The time limit of the save in flight, or of the last save."""
        return self._limit_s

    def _limit(self, items: dict[str, Any]) -> float:
        """Seconds that a save of `items` may take; the same on all processes.

        If one process cannot write, it fails at once, but the others reach their limit. So a save counts as too slow
        only if it reached the limit on all processes.
        """

        def of_all(values: list[tuple[float, int]]) -> tuple[float, int]:
            return max(save_s for save_s, _ in values), min(timeouts for _, timeouts in values)

        self._save_s, self._timeouts = self.processes.decide("limit", [self._save_s, self._timeouts], of_all)
        own_bytes = sum(x.nbytes for x in jax.tree.leaves(items)) / self.processes.size
        known = max(LATER_TIMEOUT_S, TIMEOUT_FACTOR * self._save_s) if self._save_s else SAVE_TIMEOUT_S
        return min(max(known, own_bytes / SLOWEST_BYTES_S) * 2**self._timeouts, LONGEST_TIMEOUT_S)

    def _prepare(self, step: int, last: bool) -> tuple[bool, str | None]:
        """Whether the previous save has ended on all processes, and the digest of the arrays committed as `step`.

        If the save has failed on one process, it will not end soon on the others, so this does not wait long for it.
        """
        free, failed, committed = self._save_status(f"before step {step}", step)
        if not free:
            self.wait(self._limit_s if last else AFTER_FAILURE_S if failed else PATIENCE_S)
            free, _, committed = self._save_status(f"save of step {step}", step)
        return free, committed

    def _save_status(self, name: str, step: int) -> tuple[bool, bool, str | None]:
        """Whether no process is saving, whether a save has failed on any, and the digest of `step` on process 0."""
        committed = self._committed(step) if self.processes.index == 0 and not self.busy else None
        mine = json.dumps([self.busy, self.failed, committed])
        everyone = [json.loads(answer) for answer in self.processes.distinct_values(name, mine)]
        return not any(busy for busy, _, _ in everyone), any(failed for _, failed, _ in everyone), everyone[0][2]

    def _committed(self, step: int) -> str | None:
        """The digest of the arrays of `step`; None if it does not exist or is not complete."""
        if not os.path.exists(self.directory / str(step)):
            return None
        try:
            return identity.digest(self._check_commit(step)["arrays"])
        except CheckpointError:
            return None

    def _check_commit(self, step: int) -> dict[str, Any]:
        """The meta of a step, after a check that all its arrays exist. Raises Damaged, Suspect, Unreadable."""

        def check() -> dict[str, Any]:
            meta = self.meta(step)
            self._check_found(self._path(step), meta, meta["arrays"])
            return meta

        return reading.patiently(check, self.directory)

    def _watch(self, step: int, response: Any) -> None:
        start = time.perf_counter()
        try:
            response.result()
            if self.processes.index == 0:
                self._check_commit(step)
        except Damaged as e:
            self._report_failure(step, e)
            with contextlib.suppress(OSError):
                self._move_to_quarantine(self.directory / str(step), str(e))
            return
        except Exception as e:
            self._timeouts += time.perf_counter() - start >= 0.9 * self._limit_s
            self._report_failure(step, e)
            return
        self._save_s = time.perf_counter() - start
        self._timeouts = 0
        if self.processes.index == 0:
            with contextlib.suppress(OSError):  # it is written again after the next save
                files.write_durably(self.saved_step_file, b"%d\n" % step)
        self._offer(step)
        self.delete_old()

    def _offer(self, step: int) -> None:
        if self.processes.index == 0 and self.mirror is not None:
            with _postponed():
                here = set(self._steps())
                self.mirror.offer(step, lambda copies: self._kept(here) | self._kept(here | copies))

    def copy_missing(self, step: int) -> None:
        """Copies the restored `step` to a mirror that lacks it, because the mirror is new or was full.

        Call this after `set_evaluations`.
        """
        if self.mirror is not None and step not in self.mirror.known:
            self._offer(step)

    def _report_failure(self, step: int, error: Exception) -> None:
        self.failed = True
        reason = " ".join(str(error).split())[:300]
        log.error("checkpoint at step %d FAILED, training continues, the previous one is intact: %s", step, reason)
        self._clear_partial()

    def _clear_partial(self) -> None:
        """Removes the files that a failed save has left, because the next save may need their space."""
        if self.processes.index == 0:
            with contextlib.suppress(OSError):  # the next save tries this again
                for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    _remove(path)

    def wait(self, limit_s: float | None = None) -> bool:
        """Waits for the save in flight, if any; False if it failed."""
        if self._watcher is not None:
            self._watcher.join(limit_s)
        return not self.failed and not self.busy

    def wait_for_copies(self) -> None:
        """Waits until the mirror has copied the last save, if there is a mirror.

        All processes wait here. If the others waited in the collective of an evaluation, they would look stuck.
        """

        def wait() -> None:
            if self.mirror is not None:
                self.mirror.wait()

        assert self.config is not None
        if self.config.mirror:
            self.processes.run_on_process_0("copied", wait)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._watcher is not None and self._watcher.is_alive()

    def _kept(self, steps: set[int]) -> set[int]:
        """Which of `steps` to keep."""
        assert self.config is not None
        return retention.kept({step: self.val_losses.get(step) for step in steps}, self.config, self.val_windows)

    def delete_old(self) -> None:
        """Deletes, on process 0, the steps that are not to be kept. A save in flight does so itself when it has ended.

        A step is renamed first, so that a half-deleted one does not look like a step.
        """
        if self.processes.index or (self.busy and threading.current_thread() is not self._watcher):
            return
        copying = {self.mirror.copying} if self.mirror is not None else set()
        unwanted: set[int] = set()
        with _postponed():
            steps = set(self._steps())
            unwanted = steps - self._kept(steps) - copying
        for step in unwanted:
            with _postponed():  # if one cannot be deleted, the others still are
                away = self.directory / f"{step}{DELETING}"
                (self.directory / str(step)).rename(away)
                _remove(away)

    # Reading

    def _path(self, step: int, suffix: str = "") -> LiteralPath:
        """The folder of a step, with symlinks resolved, because Orbax compares paths across processes."""
        return LiteralPath((self.directory / f"{step}{suffix}").resolve())

    def steps(self) -> list[int]:
        """Committed steps, ascending. Raises Unreadable."""
        return reading.patiently(self._steps, self.directory)

    def _steps(self) -> list[int]:
        folders = [path for path in self.directory.iterdir() if identity.STEP.fullmatch(path.name)]
        return sorted(int(path.name) for path in folders if self._is_complete(path))

    def _is_folder(self) -> bool:
        return reading.is_there(self.directory) and self.directory.is_dir()

    def _is_complete(self, path: pathlib.Path) -> bool:
        """Whether a step's folder has all its parts.

        Raises OSError for a broken symlink, because a part on a disk that is not mounted is not missing.
        """
        for part in (path, path / METADATA_FILE, *(path / item for item in ITEMS)):
            if not reading.is_there(part):
                if part.is_symlink():
                    raise OSError(errno.ESTALE, f"it is a link to {part.readlink()}, which is not there", str(part))
                return False
        return True

    def meta(self, step: int, suffix: str = "") -> dict[str, Any]:
        """The meta that was passed to save(), with `step` and `arrays`, which has [kind, checksum] by item and leaf.

        Raises Damaged, Unreadable.
        """
        folder = self.directory / f"{step}{suffix}"
        meta = identity.read_meta(folder)
        if meta.get("step") != step:
            raise Damaged(f"{folder} says that it is step {meta.get('step')}")
        return meta

    def restore_newest(
        self, program: Program, choose: Callable[[list[int]], int | None] | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that is complete and undamaged, on the program's mesh, and its meta; None for a new run.

        Process 0 chooses the step, and all processes verify it. If a step fails on any process, another one is chosen.
        When a step was restored, those that failed are moved to quarantine with a message; if all fail, nothing is
        moved. A copy from the mirror takes its place in the run only after it was restored.

        Args:
          choose: called with the existing steps, ascending; returns one of them, or None for a new run. If `choose`
            itself is None, the newest step is restored.

        Raises:
          CheckpointError: there were checkpoints, but none is usable. (To start a new run would hide the loss.)
          Unreadable: files cannot be read here and now.
          ConfigError: a checkpoint is of another model.
        """
        failed: dict[tuple[int, str], str] = {}  # by step and suffix: "" for a step here, FETCHED for a copy
        next_step = functools.partial(self._next_step, failed, choose)
        while (found := self.processes.broadcast_from_0("newest checkpoint", next_step)) is not None:
            (step, suffix), result, problem = found, None, ""
            try:
                result = self.restore(program, step, suffix)
            except (Damaged, Suspect) as e:
                problem = str(e)
            answers = self.processes.distinct_values(f"restored step {step}", problem)
            problem = next(filter(None, answers), "")
            if not problem:
                self._change_files("quarantine", functools.partial(self._finish_restore, failed, step, suffix))
                return result
            log.error("%s", problem)
            failed[step, suffix] = problem
        return None

    def _next_step(
        self, failed: dict[tuple[int, str], str], choose: Callable[[list[int]], int | None] | None
    ) -> tuple[int, str] | None:
        """The newest step that has not failed, or the one that `choose` returns, and its suffix; fetches its copy.

        The mirror is always asked. Otherwise a run might start again, or resume from an older step, and would in the
        end delete the newer copies.
        """
        here = [step for step in self.steps() if (step, "") not in failed]
        choose = choose or max
        known = self.mirror.known if self.mirror is not None else set()
        best = choose(sorted({*here, *(step for step in known if (step, FETCHED) not in failed)})) if here else None
        offered = self._steps_in_mirror(optional=best in here)
        copies = [step for step in offered if (step, FETCHED) not in failed]
        while here or copies:
            if (found := choose(sorted({*here, *copies}))) is None:
                break
            if found in here:
                return found, ""
            assert self.mirror is not None
            copy, problem = self.directory / f"{found}{FETCHED}", "cannot be fetched"
            _remove(copy)  # left by an earlier attempt
            if self.mirror.fetch(found, FETCHED):
                if reading.patiently(functools.partial(self._is_complete, copy), copy):
                    return found, FETCHED
                problem = "is incomplete"
            failed[found, FETCHED] = f"the copy of step {found} in the mirror {problem}"
            copies.remove(found)
        if failed:
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}: {'; '.join(failed.values())}; nothing was moved; restore "
                "one from a backup, or start over with another --workdir"
            )
        if not here:
            reading.patiently(self._check_lost, self.directory)
        return None

    def _check_lost(self) -> None:
        """Called if no step is left. Raises CheckpointError if the run has had steps; OSError if it cannot read."""
        if reading.is_there(self.quarantine) or reading.is_there(self.quarantine_there):
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}, and some in quarantine; put one back, restore one from a "
                "backup, or start over with another --workdir"
            )
        names = [path.name for path in self.directory.iterdir()]
        lost = "restore it from a backup, mount its disk, or start over with another --workdir"
        if broken := sorted(name for name in names if identity.STEP.fullmatch(name)):
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}: {', '.join(broken)} are incomplete; nothing was moved; "
                f"{lost}"
            )
        saved = self.saved_step_file.read_text().strip() if reading.is_there(self.saved_step_file) else ""
        if saved and f"{saved}{ASIDE}" not in names:
            raise CheckpointError(f"this run has saved checkpoints, but none is left in {self.directory}; {lost}")
        if any(name.endswith(ASIDE) for name in names):
            log.warning("No checkpoint with a finite loss is left in %s; the run starts again", self.directory)

    def _steps_in_mirror(self, optional: bool) -> list[int]:
        """The steps of which the mirror has copies.

        If the mirror cannot be read: [] and a warning if the copies are `optional`, because the step to restore is in
        the run; else raises CheckpointError, Unreadable.
        """
        if self.mirror is None:
            return []
        if self.mirror.busy:  # the mirror may be deleting a copy
            self.mirror.wait()
        try:
            return reading.patiently(self.mirror.steps, self.directory)
        except CheckpointError as e:
            if not optional:
                raise
            log.warning("%s", e)
            return []

    def _finish_restore(self, failed: dict[tuple[int, str], str], step: int, suffix: str) -> None:
        """After `step` was restored: moves failed steps to quarantine, and a fetched copy to its place. Idempotent."""
        self._move_incomplete()
        for (other, other_suffix), reason in failed.items():
            path = self.directory / f"{other}{other_suffix}"
            if other_suffix and self._is_in_quarantine(path.name):
                _remove(path)  # the mirror still has it, and each start would add another copy
            elif reading.is_there(path):
                self._move_to_quarantine(path, reason)
        copy = self.directory / f"{step}{FETCHED}"
        if suffix and reading.is_there(copy):  # if not, an earlier attempt has moved it
            copy.rename(self.directory / str(step))

    def _is_in_quarantine(self, name: str) -> bool:
        folders = [folder for folder in (self.quarantine, self.quarantine_there) if reading.is_there(folder)]
        return any(path.name.startswith(f"{name}.") for folder in folders for path in folder.iterdir())

    def restore(self, program: Program, step: int, suffix: str = "") -> tuple[TrainState, dict[str, Any]]:
        """The full state of one step, whose folder is <step><suffix>. Raises CheckpointError, ConfigError."""
        items, meta = self._load(step, _items(program.state), suffix)
        at = jax.device_put(np.int32(step), program.replicated)
        # If the guard was switched on after this step was saved, its statistics start here.
        guard = items.get("guard") or program.init_guard()
        return TrainState(at, items["params"], items["opt_state"], guard), meta

    def restore_params(
        self,
        program: Program,
        step: int,
        only: Iterable[str] | None = None,
        expected: dict[str, Any] | None = None,
    ) -> tuple[dict, dict[str, Any]]:
        """Only the parameters of a step, for sampling, evaluation and export. Raises CheckpointError, ConfigError.

        Args:
          only: the dotted paths of the parameters to read; None: all.
          expected: the meta that the step had before, if its parameters are read in several calls.
        """
        items, meta = self._load(step, {"params": program.state.params}, only=only)
        if expected is not None and meta != expected:
            raise CheckpointError(f"step {step} in {self.directory} was replaced while it was read; try again")
        return items["params"], meta

    def _load(
        self, step: int, abstract: dict[str, Any], suffix: str = "", only: Iterable[str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The items of a step, or the leaves `only` of each, and its meta. Omits the guard if it was not saved.

        An error on any process is raised on all.
        """
        path, problem = self._path(step, suffix), None
        items: dict[str, Any] = {}
        meta: dict[str, Any] = {}
        try:
            items, meta = reading.patiently(lambda: self._read(step, abstract, suffix, only), path)
        except (Damaged, Suspect, Unreadable) as e:
            problem = [type(e).__name__, str(e), e.exit_code]
        # Checksums are computed by a collective, so they start only if every process has loaded its shards.
        answers = map(json.loads, self.processes.distinct_values(f"read step {step}", json.dumps(problem)))
        problems = {kind: (reason, exit_code) for kind, reason, exit_code in filter(None, reversed(list(answers)))}
        if Unreadable.__name__ in problems:  # first: if one process cannot read, errors of others prove less
            raise Unreadable(*problems[Unreadable.__name__])
        for kind in (Damaged, Suspect):
            if kind.__name__ in problems:
                raise kind(problems[kind.__name__][0])
        for name, item in items.items():
            for leaf, now in checksums_by_name(item).items():
                if now != meta["arrays"][name][leaf][1]:
                    raise Damaged(f"checkpoint {path} is damaged: {name}.{leaf} is not what was saved (checksum)")
        return items, meta

    def _read(
        self, step: int, abstract: dict[str, Any], suffix: str, only: Iterable[str] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a step without Orbax's barriers, in which the others would wait for a process that cannot read."""
        path = self._path(step, suffix)
        # Process 0 chose the step. If it is incomplete here, this host sees an older state of the file system, or none.
        if not self._is_complete(self.directory / f"{step}{suffix}"):
            raise Unreadable(
                f"{path} is missing or incomplete on {platform.node()}; nothing was moved", Stopped.exit_code
            )
        meta = self.meta(step, suffix)
        abstract = {name: item for name, item in abstract.items() if name != "guard" or name in meta["arrays"]}
        _check_wanted(path, meta["arrays"], abstract)
        self._check_found(path, meta, abstract)
        if only is not None:
            abstract = {name: _part(item, set(only)) for name, item in abstract.items()}
        context = self._single_process()
        context.pytree.loading.partial_load = only is not None
        try:
            with context:
                return _completed(_load_items(path, abstract)), meta
        except (MemoryError, jax.errors.JaxRuntimeError):  # not a problem of the files
            raise
        except Exception as e:  # a damaged file makes the reader raise many types
            raise reading.diagnose(path, e) from None

    def _single_process(self) -> ocp.Context:
        context = ocp.Context()
        context.multiprocessing.primary_host = self.processes.index
        context.multiprocessing.active_processes = {self.processes.index}
        return context

    def _check_found(self, path: LiteralPath, meta: dict[str, Any], names: Iterable[str]) -> None:
        """Compares the arrays that Orbax finds in the items `names` with what was saved. (Orbax casts dtypes silently.)

        Raises Damaged, Suspect, Unreadable.
        """
        try:
            with self._single_process():
                # checkpointables_metadata would return None for an item that it cannot read.
                handler = ocp.handlers.PyTreeHandler()
                found = {name: _completed(handler.metadata(path / name)) for name in names}
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:
            raise reading.diagnose(path, e) from None
        for name, item in found.items():
            if _leaves(item) != _kinds(meta["arrays"][name]):
                raise Damaged(f"checkpoint {path} is damaged: the arrays of {name} are not those that were saved")

    def discard_after(self, step: int) -> None:
        """Sets the steps after `step` aside and deletes their copies, for a run that rolls back past them."""

        def later() -> list[int]:
            existing = {*self.steps(), *(self.mirror.copies if self.mirror is not None else ())}
            return sorted(s for s in existing if s > step)

        steps = self.processes.broadcast_from_0(f"after step {step}", later)
        self.set_aside(steps, f"the run is rolled back to before step {step + 1}")

    def set_aside(self, steps: list[int], reason: str) -> None:
        """Renames steps to <step>.set_aside: they are intact, but the run must not resume from them or their copies.

        A step of the same number that was set aside before is deleted, so that many rollbacks do not fill the disk.
        """

        def move() -> None:
            if self.mirror is not None:  # first, so that the run cannot return to them if this process dies
                self.mirror.list_unwanted(steps)
            for step in steps:
                target = self.directory / f"{step}{ASIDE}"
                if not reading.is_there(self.directory / str(step)):
                    continue  # an earlier attempt has moved it, or only the mirror has it
                _remove(target)
                (self.directory / str(step)).rename(target)
                log.warning("%s; %s is now %s", reason, self.directory / str(step), target.name)
            if self.mirror is not None:
                self.mirror.wait()
                self.mirror.delete_unwanted()

        if steps:
            self._change_files(f"setting aside {steps}", move)

    def _move_to_quarantine(self, path: pathlib.Path, reason: str) -> None:
        name = f"{path.name}.{time.strftime('%Y%m%dT%H%M%S')}.{time.monotonic_ns() % 1000:03d}"
        try:
            target = _renamed(path, self.quarantine / name)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            with contextlib.suppress(OSError):
                self.quarantine.rmdir()  # remove it if it was made just now, and is empty
            target = _renamed(path, self.quarantine_there / name)
        log.error("%s; moved %s to %s", reason, path, target)


@contextlib.contextmanager
def _postponed() -> Iterator[None]:
    """Postpones deletions, with a warning, if the file system fails; what cannot be read is not deleted."""
    try:
        yield
    except OSError as e:
        log.warning("old checkpoints are kept for now: %s", e)


def _renamed(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.parent.mkdir(exist_ok=True)
    return path.rename(target)


def _remove(path: pathlib.Path) -> None:
    """Removes as much of `path` as possible. Of a symlink it removes only the link: the target is not the run's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


async def _load_items(path: LiteralPath, abstract: dict[str, Any]) -> dict[str, Any]:
    """Like ocp.load_checkpointables, which counts its calls: after a retry on one process, saves would not match."""
    handler = ocp.handlers.PyTreeHandler()
    return {name: await (await handler.load(path / name, item)) for name, item in abstract.items()}


def _completed(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine of Orbax returns, which waits only in functions that are not coroutines.

    It runs without an event loop, because under one Orbax reads in a thread with a loop of uvloop, and these sometimes
    crash when they close: github.com/MagicStack/uvloop/issues/706.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("this version of Orbax needs an event loop for reading")


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint by name; the step is in the metadata."""
    items = {"params": state.params, "opt_state": state.opt_state}
    return items | {"guard": state.guard} if state.guard else items


def _arrays(items: dict[str, Any]) -> dict[str, dict[str, list]]:
    """[kind, checksum] by item and leaf."""
    return {
        name: {leaf: [kind, checksum] for (leaf, kind), checksum in zip(_leaves(x).items(), checksums(x), strict=True)}
        for name, x in items.items()
    }


def _check_wanted(path: pathlib.PurePath, saved: dict[str, dict[str, Any]], abstract: dict[str, Any]) -> None:
    """Raises ConfigError if leaves have other names, shapes or dtypes: the checkpoint is of another model."""
    for name, wanted in abstract.items():
        there, here = _kinds(saved[name]), _leaves(wanted)
        if differing := [leaf for leaf in there | here if there.get(leaf) != here.get(leaf)]:
            leaf = differing[0]
            raise ConfigError(
                f"checkpoint {path} is of another model: {name}.{leaf} is {there.get(leaf, 'missing')} there and "
                f"{here.get(leaf, 'missing')} here ({len(differing)} such); undo the change, or use another --workdir"
            )


def _part(tree: dict, names: set[str]) -> dict:
    """The leaves of a nested dict that have these dotted names."""
    flat = traverse_util.flatten_dict(tree, sep=".")
    return traverse_util.unflatten_dict({name: flat[name] for name in names}, sep=".")


def _kinds(saved: dict[str, Any]) -> dict[str, str]:
    return {leaf: kind for leaf, (kind, _) in saved.items()}


def _leaves(tree: Any) -> dict[str, str]:
    """The kind of each leaf by name: 'layers.mlp.up' -> 'float32[2, 32, 96]'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): f"{v.dtype}{list(v.shape)}" for k, v in leaves}


def choose_step(checkpoints: Checkpoints, step: int | None) -> int:
    """`step`, or the newest if it is None. Raises CheckpointError, which names the existing steps."""
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.directory} holds no finished checkpoint yet")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"no checkpoint at step {step}; the steps are {', '.join(map(str, steps))}")
    return step
