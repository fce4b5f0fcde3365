"""XLA options that improve speed or memory, by platform. Measurements are in docs/performance.md."""

import jax
from jax.sharding import Mesh

OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # By default a product with an fsdp-sharded weight becomes a ring of small products and permutes, 15 of each on
        # 16 chips. With plain collectives instead, llama:1b on v5e:4x4 takes 19 % fewer estimated cycles and 16 % less
        # memory.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    },
}


def options(mesh: Mesh) -> dict[str, str]:
    """Options for jax.jit(compiler_options=…) of programs on `mesh`."""
    return OPTIONS.get(mesh.devices.flat[0].platform, {})


def use_precision(dtype: str, mesh: Mesh) -> None:
    """Makes accelerators compute float32 products in float32; by default they round factors to TF32 or bfloat16.

    $JAX_DEFAULT_MATMUL_PRECISION takes precedence if it is set. On the CPU, products are always computed in float32.
    """
    exact = dtype == "float32" and mesh.devices.flat[0].platform != "cpu"
    if exact and _precision() is None:
        jax.config.update("jax_default_matmul_precision", "float32")


def precision_shown() -> str:
    """The precision of products, for the start-up page; '' if JAX's default for the dtype applies."""
    return f" (products: {_precision()})" if _precision() else ""


def _precision() -> str | None:
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device ran out of memory, at run time or in the compiler. (Other limits share the error code.)"""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text and ("memory" in text.lower() or "hbm" in text.lower())


def out_of_memory(error: Exception) -> str:
    """The beginning of an error message, to which the caller appends what to do."""
    return f"the devices' memory is too small: {' '.join(str(error).split())[:200]}; "
