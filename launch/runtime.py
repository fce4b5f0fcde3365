"""Process settings that must be made before JAX does any work."""

import logging
import os
import pathlib
import re
import stat

from trainer.chips import GPU_FRACTION
from trainer.errors import ConfigError

log = logging.getLogger("meshlm")


def use_compilation_cache(run: pathlib.Path, folder: str | None = None) -> None:
    """Keeps every compiled program in `folder`, so that a second start takes seconds; '' turns the cache off.

    The default is $JAX_COMPILATION_CACHE_DIR, or .xla beside the run directory, where all processes and the machines
    of a later attempt find it; JAX lets only process 0 write. Cached programs are executed, so a folder in which
    another user can write is not used, with a warning.

    Raises:
      ConfigError: the folder is in an object store.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", None)  # JAX has read the variable already
    if folder is None:
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(run.absolute().parent / ".xla"))
    if not folder:
        return
    if "://" in folder:
        raise ConfigError(f"the compilation cache {folder} is in an object store; name a local folder, or '' for none")
    path = pathlib.Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = _others_who_write(path.resolve())
    except OSError:
        return
    if others:
        log.warning("%s is not used for compiled programs: %s; remove it, or chmod go-w what is yours", folder, others)
    if others or not os.access(folder, os.W_OK):  # another user's run, to sample from, is not writable
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _others_who_write(folder: pathlib.Path) -> str:
    """Why users other than this one and root can put files there; '' if they cannot."""
    status, above = folder.stat(), folder.parent.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return "it belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users can write there"
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        return "other users can replace it"
    return ""


def use_gpu_memory() -> None:
    """Lets JAX use most of a GPU's memory, unless the environment sets the share. Call it before JAX is loaded.

    Raises ConfigError if the environment's value is not a share of the memory.
    """
    share = os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", share) or not float(share):
        raise ConfigError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={share} is not a share of a GPU's memory; {GPU_FRACTION} is usual"
        )


# Variables in which a cluster says which process this is. (A TPU pod's metadata server has to be queried instead.)
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")


def seems_alone(*flags: object) -> bool:
    """Whether neither the flags nor the environment mention other processes."""
    return all(flag is None for flag in flags) and not any(name in os.environ for name in RANKS)
