"""Checkpoints: asynchronous Orbax saves in RUN/checkpoints/<finished steps>, verified when they come back.

Orbax (v1) writes and commits the arrays; what it does not promise is added here. A flipped byte restores without an
error, so each leaf has a checksum. A directory with a number for a name counts as a step, so a step that lacks its
parts is moved to RUN/quarantine. Another dtype is silently cast, so they are compared. What save() is given has a
digest: a flipped bit in the number of samples would go on with other data. A commit is looked at before it counts.
Damage has to be proved (reading.py), and what is damaged is moved away only when another step was restored.
A failed save is reported when it fails. What stays is decided here (retention.py), for Orbax's own manager
remembers failed steps, refuses to go back, and deletes while the loop waits.
"""

import asyncio
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import gpath
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
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tracebacks of Orbax's tasks; their errors reach us anyway

ITEMS = ("params", "opt_state")
DELETING = ".deleting"
ASIDE = ".set_aside"  # of steps that are whole, but that the run does not go on from
FETCHED = ".fetched"  # of copies from the mirror that have not been restored yet
# A host that cannot write makes the others wait, and no save begins meanwhile: for the first while nobody knows how
# long a save takes; then for the others, or for so many times the one before. Slow storage must not make every save too
# late: the limit grows with what is written, and doubles after each save that came to it.
SAVE_TIMEOUT_S, LATER_TIMEOUT_S, TIMEOUT_FACTOR = 300, 60, 10
SLOWEST_BYTES_S, LONGEST_TIMEOUT_S = 50e6, 6 * 3600  # of one process
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


class LiteralPath(gpath.PosixGPath):
    """A path for Orbax in which no character is a pattern, and no folder means an object store.

    Orbax finds what it has written with glob(), for which a [ in the name of any folder above begins a pattern.
    """

    _uri_scheme = None  # /gs and /s3 are folders

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        for path in pathlib.Path(self).glob(pattern):
            yield type(self)(path)


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
        self.saved = run / "saved_step"  # tells a run that has lost its checkpoints from one that never saved
        self.val_losses: dict[int, float] = {}  # of steps that were evaluated; the caller fills both
        self.val_windows: dict[int, int | None] = {}  # eval.num_windows of that; None or missing: not known
        # Of a folder on another disk; there no rename leads to RUN/quarantine.
        self.quarantine_there = self.directory / "quarantine"
        self.config, self.processes, self.mirror = config, processes or Processes(), mirror
        self._watcher: threading.Thread | None = None
        self._save_s, self._limit_s, self._timeouts = 0.0, float(SAVE_TIMEOUT_S), 0
        self.failed = False
        if config is None:
            if not reading.patiently(self._is_folder, self.directory):
                raise CheckpointError(f"{run} has no checkpoints/ folder; train first, or name the run with --workdir")
            return
        self._on_process_0("checkpoints", self._clean_up)

    def _on_process_0(self, what: str, function: Callable[[], None]) -> None:
        """Runs it there, while the others wait; again where files cannot be read or written just now."""

        def act() -> None:
            if self.processes.index == 0:
                reading.writing(function, self.directory)

        self.processes.together(what, act)

    def _clean_up(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        usable = self._steps()
        if usable:  # if all lack parts, something else is wrong
            self._move_broken()
        for path in self.directory.iterdir():  # when no such step is in the way of a copy any more
            if identity.STEP.fullmatch(path.name):
                continue
            if path.name.endswith(FETCHED) and self._is_whole(path) and not reading.is_there(path.with_suffix("")):
                path.rename(path.with_suffix(""))  # the start that fetched it ended too early; a restore verifies it
            elif path.name.endswith((DELETING, FETCHED)) or ".orbax-checkpoint-tmp" in path.name:
                _remove(path)

    def _move_broken(self) -> None:
        """Steps that lack parts go to quarantine: they would be in the way of saves and copies of their numbers."""
        for path in self.directory.iterdir():
            if identity.STEP.fullmatch(path.name) and not self._is_whole(path):
                self._move_to_quarantine(path, "it lacks parts")

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
        free, committed = self._prepare(step, last)
        if not free:
            self.failed = True
            log.error("checkpoint at step %d LEFT OUT: the one before it is still being written, or failing", step)
            return time.perf_counter() - start
        if self.failed:
            self._clear_partial()  # again: its other threads may have written on
        self.failed = False
        items = _items(state)
        arrays = _arrays(items)
        if committed == identity.digest(arrays):  # by a save that failed late, on some processes
            log.info("checkpoint at step %d is committed already", step)
            return time.perf_counter() - start
        meta = meta | {"step": step, "arrays": arrays, "evaluations": self._evaluations()}
        meta["digest"] = identity.digest(meta)
        self._limit_s = self._limit(items)
        try:
            context = ocp.Context()
            context.asynchronous.timeout_secs = int(self._limit_s)
            with context:
                response = ocp.save_checkpointables_async(self._path(step), items, custom_metadata=meta)
        except Exception as e:  # whatever a disk makes Orbax raise
            self._report_failure(step, e)
            return time.perf_counter() - start
        self._watcher = threading.Thread(target=self._watch, args=(step, response), name="checkpoint", daemon=True)
        self._watcher.start()
        return time.perf_counter() - start

    def evaluated(self, rows: dict[int, dict[str, Any]]) -> None:
        """Takes the evaluations of a run that goes on: rows of metrics.jsonl with a finite val/loss, by step."""
        self.val_losses = {step: row["val/loss"] for step, row in rows.items()}
        windows = {step: row.get("val/windows") for step, row in rows.items()}
        self.val_windows = {step: n if type(n) is int else None for step, n in windows.items()}

    def _evaluations(self) -> list[dict[str, Any]]:
        """The same of the steps that may still be there, for when metrics.jsonl is lost, with the run or alone.

        On process 0, whose metadata is written.
        """
        if self.processes.index:
            return []
        there = set(self.val_losses)
        with _later():
            there &= {*self._steps(), *(self.mirror.copies if self.mirror is not None else ())}
        return [
            {"step": step, "val/loss": self.val_losses[step], "val/windows": self.val_windows.get(step)}
            for step in sorted(there)
        ]

    @property
    def limit_s(self) -> float:
        """That the save under way, or the last one, may take."""
        return self._limit_s

    def _limit(self, items: dict[str, Any]) -> float:
        """Seconds that a save of this may take, the same on all processes.

        One that cannot write fails at once, and makes the others come to their limit: slow is what all find slow.
        """

        def of_all(values: list[tuple[float, int]]) -> tuple[float, int]:
            return max(save_s for save_s, _ in values), min(timeouts for _, timeouts in values)

        self._save_s, self._timeouts = self.processes.decide("limit", [self._save_s, self._timeouts], of_all)
        own_bytes = sum(x.nbytes for x in jax.tree.leaves(items)) / self.processes.size
        known = max(LATER_TIMEOUT_S, TIMEOUT_FACTOR * self._save_s) if self._save_s else SAVE_TIMEOUT_S
        return min(max(known, own_bytes / SLOWEST_BYTES_S) * 2**self._timeouts, LONGEST_TIMEOUT_S)

    def _prepare(self, step: int, last: bool) -> tuple[bool, str | None]:
        """Whether the save before is over on all processes, and the digest of the arrays already committed as `step`.

        Where a save has failed on one process, the others wait for it in vain.
        """
        free, failed, committed = self._ask(f"before step {step}", step)
        if not free:
            self.wait(self._limit_s if last else AFTER_FAILURE_S if failed else PATIENCE_S)
            free, _, committed = self._ask(f"save of step {step}", step)
        return free, committed

    def _ask(self, name: str, step: int) -> tuple[bool, bool, str | None]:
        """Whether none is busy, whether one has failed, and what process 0 sees of the step."""
        there = self._committed(step) if self.processes.index == 0 and not self.busy else None
        mine = json.dumps([self.busy, self.failed, there])
        everyone = [json.loads(answer) for answer in self.processes.exchange(name, mine)]
        return not any(busy for busy, _, _ in everyone), any(failed for _, failed, _ in everyone), everyone[0][2]

    def _committed(self, step: int) -> str | None:
        """The digest of the arrays of a step that is whole."""
        if not os.path.exists(self.directory / str(step)):
            return None
        try:
            return identity.digest(self._look(step)["arrays"])
        except CheckpointError:
            return None

    def _look(self, step: int) -> dict[str, Any]:
        """The meta of a step of which all parts can be found. Raises Damaged, Suspect, Unreadable."""

        def look() -> dict[str, Any]:
            meta = self.meta(step)
            self._check_found(self._path(step), meta, meta["arrays"])
            return meta

        return reading.patiently(look, self.directory)

    def _watch(self, step: int, response: Any) -> None:
        start = time.perf_counter()
        try:
            response.result()
            if self.processes.index == 0:
                self._look(step)
        except Damaged as e:
            self._report_failure(step, e)
            with contextlib.suppress(OSError):
                self._move_to_quarantine(self.directory / str(step), str(e))
            return
        except Exception as e:
            self._timeouts += time.perf_counter() - start >= 0.9 * self._limit_s
            self._report_failure(step, e)
            return
        self._save_s, self._timeouts = time.perf_counter() - start, 0
        if self.processes.index == 0:
            with contextlib.suppress(OSError):  # it is written again after the next save
                files.write_durably(self.saved, b"%d\n" % step)
        self._offer(step)
        self.delete_old()

    def _offer(self, step: int) -> None:
        if self.processes.index == 0 and self.mirror is not None:
            with _later():
                here = set(self._steps())
                self.mirror.offer(step, lambda copies: self._kept(here) | self._kept(here | copies))

    def copy_missing(self, step: int) -> None:
        """Copies the restored `step` if the mirror, which may be new or was full, lacks it. After `evaluated`."""
        if self.mirror is not None and step not in self.mirror.known:
            self._offer(step)

    def _report_failure(self, step: int, error: Exception) -> None:
        self.failed = True
        reason = " ".join(str(error).split())[:300]
        log.error("checkpoint at step %d FAILED, training goes on, the one before it is intact: %s", step, reason)
        self._clear_partial()

    def _clear_partial(self) -> None:
        """What a failed save left takes room that the next one may need."""
        if self.processes.index == 0:
            with contextlib.suppress(OSError):  # it is cleared again before the next save
                for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    _remove(path)

    def wait(self, limit_s: float | None = None) -> bool:
        """Waits for the save in flight, if any; False if it failed."""
        if self._watcher is not None:
            self._watcher.join(limit_s)
        return not self.failed and not self.busy

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._watcher is not None and self._watcher.is_alive()

    def _kept(self, steps: set[int]) -> set[int]:
        """Those of them that are to stay."""
        assert self.config is not None
        return retention.kept({step: self.val_losses.get(step) for step in steps}, self.config, self.val_windows)

    def delete_old(self) -> None:
        """Deletes what need not stay, on process 0, unless a save is under way, which does so when it is over.

        Renamed first: a step half deleted must not look like one.
        """
        if self.processes.index or (self.busy and threading.current_thread() is not self._watcher):
            return
        copying = {self.mirror.copying} if self.mirror is not None else set()
        doomed: set[int] = set()
        with _later():
            steps = set(self._steps())
            doomed = steps - self._kept(steps) - copying
        for step in doomed:
            with _later():  # one that cannot be deleted keeps no other
                away = self.directory / f"{step}{DELETING}"
                (self.directory / str(step)).rename(away)
                _remove(away)

    # Reading

    def _path(self, step: int, suffix: str = "") -> LiteralPath:
        """By whatever links each process gets there: Orbax compares them."""
        return LiteralPath((self.directory / f"{step}{suffix}").resolve())

    def steps(self) -> list[int]:
        """Committed steps, ascending. Raises Unreadable."""
        return reading.patiently(self._steps, self.directory)

    def _steps(self) -> list[int]:
        return sorted(
            int(p.name) for p in self.directory.iterdir() if identity.STEP.fullmatch(p.name) and self._is_whole(p)
        )

    def _is_folder(self) -> bool:
        return reading.is_there(self.directory) and self.directory.is_dir()

    def _is_whole(self, path: pathlib.Path) -> bool:
        """Raises OSError for a link that leads nowhere: a part on a disk that is not mounted is not missing."""
        for part in (path, path / METADATA_FILE, *(path / item for item in ITEMS)):
            if not reading.is_there(part):
                if part.is_symlink():
                    raise OSError(errno.ESTALE, f"it leads to {part.readlink()}, which is not there", str(part))
                return False
        return True

    def meta(self, step: int, suffix: str = "") -> dict[str, Any]:
        """What save() was given, with `step` and `arrays`: by item and leaf, [kind, checksum].

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
        """The newest state that is whole and unchanged, on the program's mesh, and its meta; None for a fresh run.

        With `choose`, that which it takes of the steps there are, ascending; None if it takes none.

        Process 0 chooses the step, all verify it. When one fails anywhere, another is chosen; when that one is
        restored, those that failed are moved to quarantine with a message. So nothing moves when all fail. A copy from
        the mirror takes its place in the run when it was restored.

        Raises:
          CheckpointError: there were checkpoints, but none can be used. Starting afresh would hide the loss.
          Unreadable: files cannot be read here and now.
          ConfigError: a checkpoint is of another model.
        """
        failed: dict[tuple[int, str], str] = {}  # by step and suffix: here, and the copy
        while (found := self.processes.choose("newest checkpoint", lambda: self._next(failed, choose))) is not None:
            (step, suffix), result, problem = found, None, ""
            try:
                result = self.restore(program, step, suffix)
            except (Damaged, Suspect) as e:
                problem = str(e)
            problems = [answer for answer in self.processes.exchange(f"restored step {step}", problem) if answer]
            if not problems:
                self._on_process_0("quarantine", functools.partial(self._settle, failed, step, suffix))
                return result
            log.error("%s", problems[0])
            failed[step, suffix] = problems[0]
        return None

    def _next(
        self, failed: dict[tuple[int, str], str], choose: Callable[[list[int]], int | None] | None
    ) -> tuple[int, str] | None:
        """Of the steps that have not failed, here or from the mirror, the newest or what `choose` takes; its suffix.

        The mirror is always asked: a run that begins again, or goes on from an older step, deletes copies in the end.
        """
        here = [step for step in self.steps() if (step, "") not in failed]
        take = choose or max
        known = self.mirror.known if self.mirror is not None else set()
        best = take(sorted({*here, *(step for step in known if (step, FETCHED) not in failed)})) if here else None
        offered = self._offered(needless=best in here)
        copies = [step for step in offered if (step, FETCHED) not in failed]
        while here or copies:
            if (found := take(sorted({*here, *copies}))) is None:
                break
            if found in here:
                return found, ""
            assert self.mirror is not None
            copy, problem = self.directory / f"{found}{FETCHED}", "cannot be fetched"
            _remove(copy)  # of an attempt before
            if self.mirror.fetch(found, FETCHED):
                if reading.patiently(functools.partial(self._is_whole, copy), copy):
                    return found, FETCHED
                problem = "lacks parts"
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
        """Where no step is left. Raises CheckpointError if there were some, OSError."""
        if reading.is_there(self.quarantine) or reading.is_there(self.quarantine_there):
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}, and some in quarantine; put one back, restore one from a "
                "backup, or start over with another --workdir"
            )
        names = [path.name for path in self.directory.iterdir()]
        lost = "restore it from a backup, mount its disk, or start over with another --workdir"
        if broken := sorted(name for name in names if identity.STEP.fullmatch(name)):
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}: {', '.join(broken)} lack parts; nothing was moved; {lost}"
            )
        saved = self.saved.read_text().strip() if reading.is_there(self.saved) else ""
        if saved and f"{saved}{ASIDE}" not in names:
            raise CheckpointError(f"this run has saved checkpoints, and none is left in {self.directory}; {lost}")
        if any(name.endswith(ASIDE) for name in names):
            log.warning("No checkpoint with a finite loss is left in %s; the run begins again", self.directory)

    def _offered(self, needless: bool) -> list[int]:
        """What the mirror has; nothing, with a line, if that cannot be told and is `needless`: the step to restore is
        here. Raises CheckpointError, Unreadable."""
        if self.mirror is None:
            return []
        if self.mirror.busy:  # it may delete meanwhile what is offered here
            self.mirror.wait()
        try:
            return reading.patiently(self.mirror.steps, self.directory)
        except CheckpointError as e:
            if not needless:
                raise
            log.warning("%s", e)
            return []

    def _settle(self, failed: dict[tuple[int, str], str], step: int, suffix: str) -> None:
        """When `step` was restored: those that failed go to quarantine, and a copy to its place. May be done again."""
        self._move_broken()
        for (other, how), reason in failed.items():
            path = self.directory / f"{other}{how}"
            if how and self._is_in_quarantine(path.name):
                _remove(path)  # the mirror still has it: each start would bring one more
            elif reading.is_there(path):
                self._move_to_quarantine(path, reason)
        copy, place = self.directory / f"{step}{FETCHED}", self.directory / str(step)
        if suffix and reading.is_there(copy):  # else it was moved by the attempt before
            copy.rename(place)

    def _is_in_quarantine(self, name: str) -> bool:
        folders = [folder for folder in (self.quarantine, self.quarantine_there) if reading.is_there(folder)]
        return any(path.name.startswith(f"{name}.") for folder in folders for path in folder.iterdir())

    def restore(self, program: Program, step: int, suffix: str = "") -> tuple[TrainState, dict[str, Any]]:
        """The whole state of one step, whose folder is <step><suffix>. Raises CheckpointError, ConfigError."""
        items, meta = self._load(step, _items(program.state), suffix)
        at = jax.device_put(np.int32(step), program.replicated)
        # The statistics of a guard that was switched on since begin here.
        guard = items.get("guard") or program.init_guard()
        return TrainState(at, items["params"], items["opt_state"], guard), meta

    def restore_params(self, program: Program, step: int) -> tuple[dict, dict[str, Any]]:
        """The parameters alone: for sampling and evaluation. Raises CheckpointError, ConfigError."""
        items, meta = self._load(step, {"params": program.state.params})
        return items["params"], meta

    def _load(self, step: int, abstract: dict[str, Any], suffix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Without the guard where none was saved. An error of one process is one of all."""
        path, problem = self._path(step, suffix), None
        items: dict[str, Any] = {}
        meta: dict[str, Any] = {}
        try:
            items, meta = reading.patiently(lambda: self._read(step, abstract, suffix), path)
        except (Damaged, Suspect, Unreadable) as e:
            problem = [type(e).__name__, str(e), e.exit_code]
        # The sums are made by all together, so none may begin where one has nothing to sum.
        answers = [json.loads(answer) for answer in self.processes.exchange(f"read step {step}", json.dumps(problem))]
        problems = {kind: (reason, exit_code) for kind, reason, exit_code in filter(None, reversed(answers))}
        if Unreadable.__name__ in problems:  # first: where one cannot read, the others' words prove less
            raise Unreadable(*problems[Unreadable.__name__])
        for kind in (Damaged, Suspect):
            if kind.__name__ in problems:
                raise kind(problems[kind.__name__][0])
        for name, item in items.items():
            for leaf, now in zip(_leaves(item), checksums(item), strict=True):
                if now != meta["arrays"][name][leaf][1]:
                    raise Damaged(f"checkpoint {path} is damaged: {name}.{leaf} is not what was saved (checksum)")
        return items, meta

    def _read(self, step: int, abstract: dict[str, Any], suffix: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """By this process for itself: Orbax's barriers would leave the others waiting for one that cannot read."""
        path = self._path(step, suffix)
        if not self._is_whole(
            self.directory / f"{step}{suffix}"
        ):  # process 0 chose it: this one has an older view, or none
            raise Unreadable(
                f"{path} is not seen, or not whole, on {platform.node()}; nothing was moved", Stopped.exit_code
            )
        meta = self.meta(step, suffix)
        abstract = {name: item for name, item in abstract.items() if name != "guard" or name in meta["arrays"]}
        _check_wanted(path, meta["arrays"], abstract)
        self._check_found(path, meta, abstract)
        try:
            with self._alone():
                return asyncio.run(_load_items(path, abstract)), meta
        except (MemoryError, jax.errors.JaxRuntimeError):  # not of the files
            raise
        except Exception as e:  # whatever a damaged file makes the reader raise
            raise reading.judged(path, e) from None

    def _alone(self) -> ocp.Context:
        alone = ocp.Context()
        alone.multiprocessing.primary_host = self.processes.index
        alone.multiprocessing.active_processes = {self.processes.index}
        return alone

    def _check_found(self, path: LiteralPath, meta: dict[str, Any], names: Iterable[str]) -> None:
        """Compares what Orbax finds of the items `names` with what was saved: it would cast a dtype without a word.

        Raises Damaged, Suspect, Unreadable.
        """
        try:
            with self._alone():
                # Not checkpointables_metadata, which says None of what it cannot read.
                handler = ocp.handlers.PyTreeHandler()
                found = {name: asyncio.run(handler.metadata(path / name)) for name in names}
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:
            raise reading.judged(path, e) from None
        for name, item in found.items():
            if _leaves(item) != _kinds(meta["arrays"][name]):
                raise Damaged(f"checkpoint {path} is damaged: the arrays of {name} are not those that were saved")

    def discard_after(self, step: int) -> None:
        """Sets steps above `step` aside, and discards all copies above it, for a run that goes back behind them."""

        def later() -> list[int]:
            there = {*self.steps(), *(self.mirror.copies if self.mirror is not None else ())}
            return sorted(s for s in there if s > step)

        steps = self.processes.choose(f"after step {step}", later)
        self.set_aside(steps, f"the run goes back to before step {step + 1}")

    def set_aside(self, steps: list[int], reason: str) -> None:
        """Renames steps to <step>.set_aside: they are whole, but the run does not go on from them, nor from copies.

        A step of the same number that was set aside before is deleted, so that a run that goes back again and again
        does not fill its disk.
        """

        def move() -> None:
            if self.mirror is not None:  # first: whatever happens in between, the run does not come back to them
                self.mirror.list_unwanted(steps)
            for step in steps:
                target = self.directory / f"{step}{ASIDE}"
                if not reading.is_there(self.directory / str(step)):
                    continue  # by the attempt before, or there is only a copy
                _remove(target)
                (self.directory / str(step)).rename(target)
                log.warning("%s; %s is now %s", reason, self.directory / str(step), target.name)
            if self.mirror is not None:
                self.mirror.wait()
                self.mirror.delete_unwanted()

        if steps:
            self._on_process_0(f"setting aside {steps}", move)

    def _move_to_quarantine(self, path: pathlib.Path, reason: str) -> None:
        name = f"{path.name}.{time.strftime('%Y%m%dT%H%M%S')}.{time.monotonic_ns() % 1000:03d}"
        try:
            target = _renamed(path, self.quarantine / name)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            with contextlib.suppress(OSError):
                self.quarantine.rmdir()  # if it was made just now
            target = _renamed(path, self.quarantine_there / name)
        log.error("%s; moved %s to %s", reason, path, target)


@contextlib.contextmanager
def _later() -> Iterator[None]:
    """Leaves for another time what cannot be done now: while it cannot be seen what is there, nothing is deleted."""
    try:
        yield
    except OSError as e:
        log.warning("old checkpoints are kept for now: %s", e)


def _renamed(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.parent.mkdir(exist_ok=True)
    return path.rename(target)


def _remove(path: pathlib.Path) -> None:
    """As far as that is possible. Of a link the link: what it leads to is not the run's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


async def _load_items(path: LiteralPath, abstract: dict[str, Any]) -> dict[str, Any]:
    """As ocp.load_checkpointables, which counts its calls: a process that tried again would then save alone."""
    handler = ocp.handlers.PyTreeHandler()
    return {name: await (await handler.load(path / name, item)) for name, item in abstract.items()}


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


def _check_wanted(path: pathlib.PurePath, saved: dict[str, dict[str, Any]], abstract: dict[str, Any]) -> None:
    """Raises ConfigError for leaves of another name, shape or dtype: the checkpoint is of another model."""
    for name, wanted in abstract.items():
        there, here = _kinds(saved[name]), _leaves(wanted)
        if differing := [leaf for leaf in there | here if there.get(leaf) != here.get(leaf)]:
            leaf = differing[0]
            raise ConfigError(
                f"checkpoint {path} is of another model: {name}.{leaf} is {there.get(leaf, 'not there')} there and "
                f"{here.get(leaf, 'not there')} here ({len(differing)} such); undo the change, or use another --workdir"
            )


def _kinds(saved: dict[str, Any]) -> dict[str, str]:
    return {leaf: kind for leaf, (kind, _) in saved.items()}


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
