"""XLA options that pay, by platform: the one place for them. Measurements are in docs/performance.md."""

import jax
from jax.sharding import Mesh

OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # By default a product with a weight that fsdp splits becomes a ring of small products and permutes, 15 of each
        # on 16 chips. Plain collectives instead: 19 % fewer estimated cycles and 16 % less memory for llama_1b on
        # v5e:4x4.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    },
}


def options(mesh: Mesh) -> dict[str, str]:
    """For jax.jit(compiler_options=…) of programs on `mesh`."""
    return OPTIONS.get(mesh.devices.flat[0].platform, {})


def use_precision(dtype: str, mesh: Mesh) -> None:
    """Makes products of float32 what they are called, where accelerators round their factors: to TF32, or to bfloat16.

    $JAX_DEFAULT_MATMUL_PRECISION, where it is set, stays as it is. On the CPU they are float32 anyway.
    """
    exact = dtype == "float32" and mesh.devices.flat[0].platform != "cpu"
    if exact and _precision() is None:
        jax.config.update("jax_default_matmul_precision", "float32")


def precision_shown() -> str:
    """For the start-up page; '' where JAX's default is in force, which is that of the type."""
    return f" (products: {_precision()})" if _precision() else ""


def _precision() -> str | None:
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the compiler for it, has too little memory; other limits have the same code."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text and ("memory" in text.lower() or "hbm" in text.lower())


def out_of_memory(error: Exception) -> str:
    """The beginning of a line that says so, and ends with what to do."""
    return f"the devices' memory is too small: {' '.join(str(error).split())[:200]}; "
