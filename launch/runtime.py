"""Settings of the process that must be made before JAX does any work."""

import os
import pathlib

from trainer.topology import GPU_FRACTION


def default_compilation_cache() -> str:
    """$JAX_COMPILATION_CACHE_DIR, or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "meshlm", "xla"))


def use_compilation_cache(folder: str) -> None:
    """Keeps every compiled program, so that a second start takes seconds; '' turns it off."""
    import jax

    if not folder:
        return
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home is no reason not to train
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def use_gpu_memory() -> None:
    """Lets JAX have most of a GPU's memory, unless the environment says how much. Call it before JAX is loaded."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))


# Where a cluster says which process this is without being asked. (A TPU pod's metadata server has to be asked.)
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")


def seems_alone(*flags: object) -> bool:
    """Whether neither the flags nor the environment speak of other processes."""
    return all(flag is None for flag in flags) and not any(name in os.environ for name in RANKS)
