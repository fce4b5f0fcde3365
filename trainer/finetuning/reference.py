"""The reference of DPO for a run without adapters: what its first weights say about each pair, computed once.

    RUN/reference/KEY.safetensors   log_ratios: float32 [rows], log p(chosen) - log p(rejected) of each row of a
                                    packing; in the metadata: digests, their sha256 and that of the weights. KEY is of
                                    the dataset, the split and its packing

A run that has no checkpoint yet computes them anew, because it may begin with other weights than at its last start.
Later they are read; if they are lost or damaged, the first weights are loaded once more. Checkpoints have the digest of
these weights, so that others are not taken for them. TRL calls this precompute_ref_log_probs.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax import Array

from data import loader
from data.batch import Batch
from data.storage.files import write_durably
from data.token_files.formats import TokenFiles
from trainer import sharding
from trainer.errors import ConfigError
from trainer.evaluation import microbatch_rows
from trainer.reliability.checkpoint import checksums_by_name
from trainer.reliability.coordination import Processes
from trainer.state import Program
from trainer.step import ROWS, SAME, forward, make_log_ratio

log = logging.getLogger("meshlm")
FOLDER, NAME = "reference", "log_ratios"
ADVICE = "the next start of launch.train computes it again"


def read(run_dir: pathlib.Path, files: Iterable[TokenFiles]) -> str:
    """Gives each of `files` its log-ratios; returns the digest of the weights that they are of.

    Raises:
      ConfigError: the run does not have all of them, undamaged and of the same weights.
    """
    weights = set()
    for of_source in files:
        path = path_of(run_dir, of_source)
        try:
            with safetensors.safe_open(path, "np") as opened:
                found, digests = opened.get_tensor(NAME), (opened.metadata() or {}).get("digests", "")
        except (OSError, safetensors.SafetensorError) as e:
            problem = f"{path}, what the first weights say about the pairs, cannot be read: {e}; {ADVICE}"
            raise ConfigError(problem) from None
        assert of_source.index is not None  # of pairs
        own, _, of_weights = digests.partition(" ")
        if found.shape != (of_source.index.rows,) or _sha256(found) != own:
            raise ConfigError(f"{path}, what the first weights say about the pairs, is damaged; {ADVICE}")
        weights.add(of_weights)
        of_source.reference = found
    if len(weights) != 1:
        raise ConfigError(f"{run_dir / FOLDER} has what several weights say about the pairs; {ADVICE}")
    return weights.pop()


def read_on_all(processes: Processes, run_dir: pathlib.Path, files: Iterable[TokenFiles]) -> str:
    """As `read`, on all processes; returns '', with a warning, if one of them cannot read it."""
    weights, problem = "", "another process cannot read what the first weights say about the pairs"
    try:
        weights = read(run_dir, files)
    except ConfigError as e:
        problem = str(e)
    if processes.all_agree("reference", bool(weights)):
        return weights
    log.warning("%s", problem)
    return ""


def compute(program: Program, params: dict, files: Iterable[TokenFiles], interrupted: Callable[[], bool]) -> bool:
    """Gives each of `files` its log-ratios, computed from the first weights of the run.

    Args:
      interrupted: is called after each batch, on all processes; if it returns true, so does this function's end: False.
    """
    step, batch_sharding = make_log_ratio_step(program), sharding.named(program.mesh, "batch")
    for of_source in files:
        assert of_source.index is not None  # of pairs
        of_source.reference, parts = None, []
        for batch in loader.evaluation_batches(
            of_source, seq_len=program.config.data.seq_len, batch_size=microbatch_rows(program.config, batch_sharding),
            sharding=batch_sharding,
        ):  # fmt: skip
            parts.append(np.asarray(step(params, batch)))
            if interrupted():
                return False
        of_source.reference = np.concatenate(parts)[: of_source.index.rows]
    return True


def write(run_dir: pathlib.Path, files: Iterable[TokenFiles], weights: str) -> None:
    (run_dir / FOLDER).mkdir(exist_ok=True)
    for of_source in files:
        found = of_source.reference
        assert found is not None  # it was computed
        content = safetensors.numpy.save({NAME: found}, {"digests": f"{_sha256(found)} {weights}"})
        write_durably(path_of(run_dir, of_source), content)


def path_of(run_dir: pathlib.Path, files: TokenFiles) -> pathlib.Path:
    assert files.index is not None  # of pairs
    index = files.index  # its name has the split
    key = hashlib.sha256(f"{index.fingerprint} {index.path.name} {index.sha256}".encode()).hexdigest()[:16]
    return run_dir / FOLDER / f"{key}.safetensors"


def digest(params: dict) -> str:
    """16 hex digits of these weights, the same on every mesh."""
    return hashlib.sha256(json.dumps(checksums_by_name(params), sort_keys=True).encode()).hexdigest()[:16]


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()


def make_log_ratio_step(program: Program) -> Callable[[dict, Batch], Array]:
    """(params, batch) -> float32 [rows], log p(chosen) - log p(rejected) of the pair in each row."""
    log_ratio = make_log_ratio(program)

    def of_replica(params: dict, batch: Batch) -> Array:
        return log_ratio(forward(program, params, batch))

    by_replica = sharding.by_replica(of_replica, program.mesh, (SAME, ROWS), ROWS)
    return jax.jit(lambda params, batch: by_replica(params, batch.widened()), out_shardings=program.replicated)
