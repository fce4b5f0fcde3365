"""Checkpoints: asynchronous Orbax saves in RUN/checkpoints/<finished steps>, verified when they come back.

Orbax (v1) writes and commits the arrays; what it does not promise is added here. A flipped byte restores without an
error, so each leaf has a checksum. A directory with a number for a name counts as a step, so a step that lacks its
parts is moved to RUN/quarantine, and the one before it is tried. A failed save is reported when it fails.
"""

import json
import logging
import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from orbax.checkpoint import v1 as ocp

from trainer import sharding
from trainer.config import CheckpointConfig
from trainer.errors import CheckpointError
from trainer.state import Program, TrainState

log = logging.getLogger("meshlm")

ITEMS = ("params", "opt_state")
METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's; holds what save() was given as `meta`


@jax.jit
def _checksums(tree: Any) -> list[Array]:
    """For each leaf the sum, modulo 2**32, of its bit pattern: any single flipped bit changes it."""

    def one(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(tree)]


def checksums(tree: Any) -> list[int]:
    return [int(c) for c in jax.device_get(_checksums(tree))]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run: the run directory.
      config: what to keep. None opens them for reading only: nothing is written, moved or deleted.
    """

    def __init__(self, run: pathlib.Path, config: CheckpointConfig | None = None):
        self.directory, self.quarantine = run / "checkpoints", run / "quarantine"
        self.config = config
        self._watcher: threading.Thread | None = None
        self._failed = False
        if config is None:
            if not self.directory.is_dir():
                raise CheckpointError(f"{run} has no checkpoints/ folder; train first, or name the run with --workdir")
            return
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._quarantine_broken()
        sharding.barrier("checkpoints ready")
        self._open()

    def _open(self) -> None:
        assert self.config is not None
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(self.config.keep_last)]
        if self.config.keep_every_steps:
            keep.append(policies.EveryNSteps(self.config.keep_every_steps))
        if self.config.keep_best:
            # reverse: the policy keeps the end of the sorted list, and low is good.
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["val/loss"],
                    reverse=True,
                    n=self.config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._orbax = ocp.training.Checkpointer(
            self.directory.absolute(),
            # When to save is the loop's decision, the same on every process.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    # Writing

    def save(self, step: int, state: TrainState, meta: dict[str, Any], val_loss: float | None = None) -> float:
        """Starts a save of `state` after `step` finished steps and returns the seconds the caller was held up.

        When it returns, the arrays are copied and the state may be donated. One save runs at a time: a second waits.
        """
        start = time.perf_counter()
        self.wait()
        if self._failed:  # Orbax remembers a failed step; begin anew from what is on disk.
            self._failed = False
            self._open()
        items = {"params": state.params, "opt_state": state.opt_state}
        meta = meta | {"step": step, "checksums": {name: checksums(item) for name, item in items.items()}}
        try:
            response = self._orbax.save_checkpointables_async(
                step,
                items,
                force=True,
                metrics=None if val_loss is None else {"val/loss": val_loss},
                custom_metadata=meta,
            )
        except (OSError, ValueError) as e:
            self._report_failure(step, e)
            return time.perf_counter() - start
        self._watcher = threading.Thread(target=self._watch, args=(step, response), name="checkpoint", daemon=True)
        self._watcher.start()
        return time.perf_counter() - start

    def _watch(self, step: int, response: Any) -> None:
        try:
            response.result()
        except Exception as e:
            self._report_failure(step, e)

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failed = True
        log.error("checkpoint at step %d FAILED, training goes on, the one before it is intact: %s", step, error)

    def wait(self) -> bool:
        """Waits for the save in flight, if any; False if it failed."""
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        return not self._failed

    # Reading

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and self._is_whole(p))

    def _is_whole(self, path: pathlib.Path) -> bool:
        return all((path / part).exists() for part in (METADATA_FILE, *ITEMS))

    def meta(self, step: int) -> dict[str, Any]:
        """What save() was given, with `step` and `checksums`."""
        path = self.directory / str(step) / METADATA_FILE
        try:
            return json.loads(path.read_text())["custom_metadata"]
        except (OSError, ValueError, KeyError) as e:
            raise CheckpointError(f"{path} cannot be read: {e!r}") from None

    def restore_newest(self, program: Program) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that is whole and unchanged, on the program's mesh, and its meta; None for a fresh run.

        A step that fails is moved to quarantine with a message, and the one before it is tried.

        Raises:
          CheckpointError: there were checkpoints, but none can be used. Starting afresh would hide the loss.
        """
        for step in reversed(self.steps()):
            try:
                return self.restore(program, step)
            except CheckpointError as e:
                if jax.process_count() > 1 and not isinstance(e, _ChecksumMismatch):
                    raise  # other processes may have read it; a checksum, being global, fails everywhere
                log.error("%s", e)
                if jax.process_index() == 0:
                    self._move_to_quarantine(self.directory / str(step))
                sharding.barrier(f"quarantined {step}")
                self._open()
        if self.quarantine.exists():
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}, and damaged ones in {self.quarantine}; restore one from a "
                "backup, or start over with another --workdir"
            )
        return None

    def restore(self, program: Program, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The whole state of one step. Raises CheckpointError."""
        abstract = {"params": program.state.params, "opt_state": program.state.opt_state}
        items, meta = self._load(step, abstract)
        at = jax.device_put(np.int32(step), program.replicated)
        return TrainState(at, items["params"], items["opt_state"]), meta

    def restore_params(self, program: Program, step: int) -> tuple[dict, dict[str, Any]]:
        """The parameters alone: for sampling and evaluation. Raises CheckpointError."""
        items, meta = self._load(step, {"params": program.state.params})
        return items["params"], meta

    def _load(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        path, meta = self.directory / str(step), self.meta(step)
        try:
            items = ocp.load_checkpointables(path.absolute(), abstract)
        except Exception as e:  # whatever a damaged file makes the reader raise
            reason = " ".join(str(e).split())[:300]
            raise CheckpointError(f"checkpoint {path} cannot be read: {type(e).__name__}: {reason}") from e
        for name in abstract:
            for (key, _), found, expected in zip(
                jax.tree_util.tree_leaves_with_path(items[name]),
                checksums(items[name]),
                meta["checksums"][name],
                strict=True,
            ):
                if found != expected:
                    leaf = name + jax.tree_util.keystr(key)
                    raise _ChecksumMismatch(f"checkpoint {path} is damaged: {leaf} is not what was saved (checksum)")
        return items, meta

    def _quarantine_broken(self) -> None:
        for path in self.directory.iterdir():
            if path.name.isdigit() and not self._is_whole(path):
                log.error("checkpoint %s lacks parts: it was not committed", path)
                self._move_to_quarantine(path)

    def _move_to_quarantine(self, path: pathlib.Path) -> None:
        self.quarantine.mkdir(exist_ok=True)
        target = self.quarantine / f"{path.name}.{time.strftime('%Y%m%dT%H%M%S')}"
        path.rename(target)
        log.error("moved %s to %s", path, target)


class _ChecksumMismatch(CheckpointError):
    pass


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
