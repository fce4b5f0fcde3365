"""XLA options that pay, by platform: the one place for them. Measurements are in docs/performance.md."""

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
