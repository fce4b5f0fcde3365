"""Checkpoints: asynchronous Orbax saves in RUN/checkpoints/<finished steps>, verified when they come back.

Orbax (v1) writes and commits the arrays; what it does not promise is added here. A flipped byte restores without an
error, so each leaf has a checksum. A directory with a number for a name counts as a step, so a step that lacks its
parts is moved to RUN/quarantine, and the one before it is tried. Another dtype is silently cast, so they are compared.
What save() is given has a digest: a flipped bit in the number of samples would go on with other data.
A failed save is reported when it fails. What stays is decided here (trainer/retention.py), for Orbax's own manager
remembers failed steps, refuses to go back, and deletes while the loop waits.
"""

import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from orbax.checkpoint import v1 as ocp

from trainer import retention
from trainer.config import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.lives import METADATA_FILE
from trainer.mirror import Mirror
from trainer.processes import Processes
from trainer.state import Program, TrainState

log = logging.getLogger("meshlm")
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tracebacks of Orbax's tasks; their errors reach us anyway

ITEMS = ("params", "opt_state")
DELETING = ".deleting"
ASIDE = ".set_aside"  # of steps that are whole, but that the run does not go on from
STEP = re.compile("0|[1-9][0-9]*")
# A host that cannot write makes the others wait, and no save begins meanwhile: for the first while nobody knows how
# long a save takes; then for the others, or for so many times the one before.
SAVE_TIMEOUT_S, LATER_TIMEOUT_S, TIMEOUT_FACTOR = 300, 60, 10
PATIENCE_S, AFTER_FAILURE_S = 30, 1  # with the save before, where a later one will do as well


@jax.jit
def _checksums(tree: Any) -> Array:
    """For each leaf the sum, modulo 2**32, of its bit pattern: any single flipped bit changes it.

    Each device sums what it holds, and the sums are added: no leaf is gathered.
    """

    def one(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
        sums = bits.astype(jnp.uint32)
        for _ in range(sums.ndim):  # one axis at a time, the last one last: ten times as fast with XLA's CPU code
            sums = jax.lax.optimization_barrier(jnp.sum(sums, axis=0, dtype=jnp.uint32))
        return sums

    return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def checksums(tree: Any) -> list[int]:
    return jax.device_get(_checksums(tree)).tolist()


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run: the run directory.
      config: what to keep. None opens them for reading only: nothing is written, moved or deleted.
      processes: all that save; None: this one alone.
      mirror: receives copies, and gives back what is lost here.
    """

    def __init__(
        self,
        run: pathlib.Path,
        config: CheckpointConfig | None = None,
        processes: Processes | None = None,
        mirror: Mirror | None = None,
    ):
        self.directory, self.quarantine = run / "checkpoints", run / "quarantine"
        self.val_losses: dict[int, float] = {}  # of steps that were evaluated; the caller fills it
        self.config, self.processes, self.mirror = config, processes or Processes(), mirror
        self._watcher: threading.Thread | None = None
        self._save_s = 0.0
        self.failed = False
        if config is None:
            if not self.directory.is_dir():
                raise CheckpointError(f"{run} has no checkpoints/ folder; train first, or name the run with --workdir")
            return
        self._on_process_0("checkpoints", self._clean_up)

    def _on_process_0(self, what: str, function: Any) -> None:
        """Runs it there, while the others wait."""

        def act() -> None:
            if self.processes.index == 0:
                try:
                    function()
                except OSError as e:
                    raise ConfigError(f"cannot write to {self.directory}: {e.strerror}") from None

        self.processes.together(what, act)

    def _clean_up(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            if STEP.fullmatch(path.name) and not self._is_whole(path):
                self._move_to_quarantine(path, "it lacks parts, so it was not committed")
            elif path.name.endswith(DELETING) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)

    # Writing

    def warm_up(self, state: TrainState) -> None:
        """Compiles what save() runs: the first would seem slow, and saves by time become rarer where they are slow."""
        _arrays(_items(state))

    def save(
        self,
        step: int,
        state: TrainState,
        meta: dict[str, Any],
        last: bool = True,
    ) -> float:
        """Starts a save of `state` after `step` finished steps and returns the seconds the caller was held up.

        When it returns, the arrays are copied and the state may be donated. One save runs at a time: a second waits for
        the first, for minutes where it is the `last`, and is left out, as one that failed, where that one is then still
        under way on any process. (One that fails on some makes Orbax wait on the others, for minutes.)
        """
        start = time.perf_counter()
        if not self._is_free(step, last):
            self.failed = True
            log.error("checkpoint at step %d LEFT OUT: the one before it is still being written, or failing", step)
            return time.perf_counter() - start
        if self.failed:
            self._clear_partial()  # again: its other threads may have written on
        self.failed = False
        items = _items(state)
        meta = meta | {"step": step, "arrays": _arrays(items)}
        meta["digest"] = _digest(meta)
        limit = max(LATER_TIMEOUT_S, int(TIMEOUT_FACTOR * self._save_s)) if self._save_s else SAVE_TIMEOUT_S
        try:
            context = ocp.Context()
            context.asynchronous.timeout_secs = limit
            with context:
                response = ocp.save_checkpointables_async(self._path(step), items, custom_metadata=meta)
        except (OSError, ValueError, RuntimeError) as e:
            self._report_failure(step, e)
            return time.perf_counter() - start
        self._watcher = threading.Thread(target=self._watch, args=(step, response), name="checkpoint", daemon=True)
        self._watcher.start()
        return time.perf_counter() - start

    def _is_free(self, step: int, last: bool) -> bool:
        """Whether the save before is over on all processes. Where one has failed, the others wait for it in vain."""
        mine = json.dumps([self.busy, self.failed])
        busy, failed = map(
            any, zip(*map(json.loads, self.processes.exchange(f"before step {step}", mine)), strict=True)
        )
        if not busy:
            return True
        self.wait(SAVE_TIMEOUT_S if last else AFTER_FAILURE_S if failed else PATIENCE_S)
        return self.processes.all_agree(f"save of step {step}", not self.busy)

    def _watch(self, step: int, response: Any) -> None:
        start = time.perf_counter()
        try:
            response.result()
        except Exception as e:
            self._report_failure(step, e)
            return
        self._save_s = time.perf_counter() - start
        if self.processes.index == 0:
            if self.mirror is not None:
                self.mirror.offer(step, self._kept())
            self.delete_old()

    def _report_failure(self, step: int, error: Exception) -> None:
        self.failed = True
        reason = " ".join(str(error).split())[:300]
        log.error("checkpoint at step %d FAILED, training goes on, the one before it is intact: %s", step, reason)
        self._clear_partial()

    def _clear_partial(self) -> None:
        """What a failed save left takes room that the next one may need."""
        if self.processes.index == 0:
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def wait(self, limit_s: float | None = None) -> bool:
        """Waits for the save in flight, if any; False if it failed."""
        if self._watcher is not None:
            self._watcher.join(limit_s)
        return not self.failed and not self.busy

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._watcher is not None and self._watcher.is_alive()

    def _kept(self) -> set[int]:
        assert self.config is not None
        return retention.kept({step: self.val_losses.get(step) for step in self.steps()}, self.config)

    def delete_old(self) -> None:
        """Deletes what need not stay, on process 0, unless a save is under way, which does so when it is over.

        Renamed first: a step half deleted must not look like one.
        """
        if self.processes.index or (self.busy and threading.current_thread() is not self._watcher):
            return
        copying = {self.mirror.copying} if self.mirror is not None else set()
        for step in set(self.steps()) - self._kept() - copying:
            with contextlib.suppress(OSError):
                doomed = self.directory / f"{step}{DELETING}"
                (self.directory / str(step)).rename(doomed)
                shutil.rmtree(doomed)

    # Reading

    def _path(self, step: int) -> pathlib.Path:
        return (self.directory / str(step)).resolve()  # by whatever links each process gets there: Orbax compares them

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(int(p.name) for p in self.directory.iterdir() if STEP.fullmatch(p.name) and self._is_whole(p))

    def _is_whole(self, path: pathlib.Path) -> bool:
        return all((path / part).exists() for part in (METADATA_FILE, *ITEMS))

    def meta(self, step: int) -> dict[str, Any]:
        """What save() was given, with `step` and `arrays`: by item and leaf, [kind, checksum].

        Raises CheckpointError.
        """
        path = self.directory / str(step) / METADATA_FILE
        try:
            meta = json.loads(path.read_text())["custom_metadata"]
            if meta["step"] != step:
                raise ValueError(f"it says step {meta['step']}")
            if meta.pop("digest") != _digest(meta):
                raise ValueError("it is not what was saved (digest)")
            return meta
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise CheckpointError(f"{path} cannot be read: {e!r}") from None

    def restore_newest(
        self, program: Program, choose: Callable[[list[int]], int | None] | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that is whole and unchanged, on the program's mesh, and its meta; None for a fresh run.

        With `choose`, that which it takes of the steps that are here, ascending; None if it takes none.

        Process 0 chooses the step, all verify it. One that fails anywhere is moved to quarantine with a message, and
        the one before it is tried.

        Raises:
          CheckpointError: there were checkpoints, but none can be used. Starting afresh would hide the loss.
          ConfigError: a checkpoint is of another model.
        """
        newest = functools.partial(self._newest, choose)
        while (step := self.processes.choose("newest checkpoint", newest)) is not None:
            result, problem = None, ""
            try:
                result = self.restore(program, step)
            except CheckpointError as e:
                problem = str(e)
            answers = self.processes.exchange(f"restored step {step}", problem)
            problems = [answer for answer in answers if answer]
            if not problems:
                assert result is not None
                return result
            move = functools.partial(self._move_to_quarantine, self._path(step), problems[0])
            self._on_process_0(f"quarantine of step {step}", move)
        return None

    def _newest(self, choose: Callable[[list[int]], int | None] | None = None) -> int | None:
        here = self.steps()
        if here and choose is not None:
            return choose(here)
        if self.mirror is not None:
            for step in self.mirror.steps():  # newest first
                if here and step <= here[-1]:
                    break
                if self.mirror.fetch(step):
                    return step
        if here:
            return here[-1]
        if self.quarantine.exists():
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}, and damaged ones in {self.quarantine}; restore one from a "
                "backup, or start over with another --workdir"
            )
        if any(self.directory.glob(f"*{ASIDE}")):
            log.warning("No checkpoint with a finite loss is left in %s; the run begins again", self.directory)
        return None

    def restore(self, program: Program, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The whole state of one step. Raises CheckpointError, ConfigError."""
        items, meta = self._load(step, _items(program.state))
        at = jax.device_put(np.int32(step), program.replicated)
        # The statistics of a guard that was switched on since begin here.
        guard = items.get("guard") or program.init_guard()
        return TrainState(at, items["params"], items["opt_state"], guard), meta

    def restore_params(self, program: Program, step: int) -> tuple[dict, dict[str, Any]]:
        """The parameters alone: for sampling and evaluation. Raises CheckpointError, ConfigError."""
        items, meta = self._load(step, {"params": program.state.params})
        return items["params"], meta

    def _load(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Without the guard where none was saved. An error of one process is one of all."""
        path, items, meta, problem = self._path(step), {}, {}, ""
        # Each process for itself: Orbax's barriers would leave the others waiting for one that cannot read.
        alone = ocp.Context()
        alone.multiprocessing.primary_host = self.processes.index
        alone.multiprocessing.active_processes = {self.processes.index}
        try:
            meta = self.meta(step)
            abstract = {name: item for name, item in abstract.items() if name != "guard" or name in meta["arrays"]}
            with alone:
                _check_leaves(path, meta["arrays"], ocp.checkpointables_metadata(path).metadata, abstract)
                items = ocp.load_checkpointables(path, abstract)
        except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):  # not of the files
            raise
        except CheckpointError as e:
            problem = str(e)
        except Exception as e:  # whatever a damaged file makes the reader raise
            problem = f"checkpoint {path} cannot be read: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
        # The sums are made by all together, so none may begin where one has nothing to sum.
        for of_one in self.processes.exchange(f"read step {step}", problem):
            if of_one:
                raise CheckpointError(of_one)
        for name, item in items.items():
            for leaf, now in zip(_leaves(item), checksums(item), strict=True):
                if now != meta["arrays"][name][leaf][1]:
                    raise CheckpointError(
                        f"checkpoint {path} is damaged: {name}.{leaf} is not what was saved (checksum)"
                    )
        return items, meta

    def discard_after(self, step: int) -> None:
        """Sets steps above `step` aside, for a run that goes back behind them."""
        later = self.processes.choose(f"after step {step}", lambda: [s for s in self.steps() if s > step])
        self.set_aside(later, f"the run goes back to before step {step + 1}")

    def set_aside(self, steps: list[int], reason: str) -> None:
        """Renames steps to <step>.set_aside: they are whole, but the run does not go on from them.

        A step of the same number that was set aside before is deleted, so that a run that goes back again and again
        does not fill its disk.
        """

        def move() -> None:
            for step in steps:
                target = self.directory / f"{step}{ASIDE}"
                if target.is_symlink():
                    target.unlink()
                elif target.exists():
                    shutil.rmtree(target)
                (self.directory / str(step)).rename(target)
                log.warning("%s; %s is now %s", reason, self.directory / str(step), target.name)
            if self.mirror is not None:
                self.mirror.wait()
                self.mirror.keep_only({s for s in self.mirror.whole() if s not in steps})

        if steps:
            self._on_process_0(f"setting aside {steps}", move)

    def _move_to_quarantine(self, path: pathlib.Path, reason: str) -> None:
        self.quarantine.mkdir(exist_ok=True)
        target = self.quarantine / f"{path.name}.{time.strftime('%Y%m%dT%H%M%S')}.{time.monotonic_ns() % 1000:03d}"
        path.rename(target)
        log.error("%s; moved %s to %s", reason, path, target)


def _items(state: TrainState) -> dict[str, Any]:
    """What is saved, by name; the step is in the metadata."""
    items = {"params": state.params, "opt_state": state.opt_state}
    return items | {"guard": state.guard} if state.guard else items


def _arrays(items: dict[str, Any]) -> dict[str, dict[str, list]]:
    """By item and leaf, [kind, checksum]."""
    return {
        name: {leaf: [kind, checksum] for (leaf, kind), checksum in zip(_leaves(x).items(), checksums(x), strict=True)}
        for name, x in items.items()
    }


def _check_leaves(
    path: pathlib.Path, saved: dict[str, dict[str, Any]], found: dict[str, Any], abstract: dict[str, Any]
) -> None:
    """Compares what was saved with what is wanted: Orbax would cast a dtype without a word.

    Raises:
      ConfigError: leaves of another name, shape or dtype: the checkpoint is of another model.
      CheckpointError: what is there is not what was saved.
    """
    for name, wanted in abstract.items():
        there, here = {leaf: kind for leaf, (kind, _) in saved[name].items()}, _leaves(wanted)
        if differing := [leaf for leaf in there | here if there.get(leaf) != here.get(leaf)]:
            leaf = differing[0]
            raise ConfigError(
                f"checkpoint {path} is of another model: {name}.{leaf} is {there.get(leaf, 'not there')} there and "
                f"{here.get(leaf, 'not there')} here ({len(differing)} such); undo the change, or use another --workdir"
            )
        if _leaves(found[name]) != there:
            raise CheckpointError(f"checkpoint {path} is damaged: the arrays of {name} are not those that were saved")


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]


def _leaves(tree: Any) -> dict[str, str]:
    """'layers.mlp.up' -> 'float32[2, 32, 96]'"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): f"{v.dtype}{list(v.shape)}" for k, v in leaves}


def choose_step(checkpoints: Checkpoints, step: int | None) -> int:
    """`step`, or the newest; CheckpointError names the steps there are."""
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.directory} holds no finished checkpoint yet")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"no checkpoint at step {step}; there are {', '.join(map(str, steps))}")
    return step
