"""Peaks of each chip: arithmetic, memory and links, from the vendors' pages. No JAX."""

import dataclasses

GIB = 2**30
# Fraction of a GPU's memory that JAX preallocates (launch/runtime.py; JAX's own default is 0.75). The rest is for what
# XLA does not allocate: the CUDA context, NCCL's buffers, cuDNN.
GPU_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device (half a chip of TPU7x), with the vendor's peaks (dense); programs reach only part of each."""

    platform: str  # as in JAX: 'tpu' or 'cuda'
    device_kind: str  # prefix of jax.Device.device_kind
    memory: int  # bytes a program may use
    flops: float  # bf16 FLOP/s
    hbm: float  # bytes/s
    fast: float  # bytes/s one way, over all its links in a slice or node: ICI, NVLink
    slow: float  # bytes/s one way between slices or nodes
    host: int  # devices per host
    pod: int  # most chips in a slice or node
    axes: int  # dimensions of a slice's network: 2 or 3 for a torus; 1 for a node


# FLOP/s, HBM and ICI of TPUs: cloud.google.com/tpu/docs, one page per chip; ICI there counts both ways. Memory is
# what libtpu leaves to programs. Between slices, those pages give 6.4 and 25.6 Tbit/s for the 256 chips of a v5e and a
# v6e pod, and 50 Gbit/s per v5p; v4 is assumed to equal v5p, and a TPU7x chip a v6e chip.
# GPUs: NVIDIA's data sheets of the SXM cards. Memory: GPU_FRACTION of the card. Between nodes: one network card for
# each GPU, as in NVIDIA's DGX (400 Gbit/s, 200 for A100); a cluster may have less.
CHIPS = {
    "v4": Chip("tpu", "TPU v4", int(30.75 * GIB), 275e12, 1228e9, 300e9, 6.25e9, host=4, pod=4096, axes=3),
    "v5e": Chip("tpu", "TPU v5 lite", int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, host=4, pod=256, axes=2),
    "v5p": Chip("tpu", "TPU v5", int(95.73 * GIB), 459e12, 2765e9, 600e9, 6.25e9, host=4, pod=8960, axes=3),
    "v6e": Chip("tpu", "TPU v6 lite", int(31.24 * GIB), 918e12, 1638e9, 400e9, 12.5e9, host=4, pod=256, axes=2),
    "tpu7x": Chip("tpu", "TPU7x", int(94.74 * GIB), 1155e12, 3690e9, 300e9, 6.25e9, host=8, pod=9216, axes=3),
    "a100": Chip(
        "cuda", "NVIDIA A100", int(85_097_971_712 * GPU_FRACTION), 312e12, 2039e9, 300e9, 25e9, host=8, pod=8, axes=1
    ),
    "h100": Chip(
        "cuda", "NVIDIA H100", int(84_942_979_072 * GPU_FRACTION), 989e12, 3352e9, 450e9, 50e9, host=8, pod=8, axes=1
    ),
    "h200": Chip(
        "cuda", "NVIDIA H200", int(150_754_820_096 * GPU_FRACTION), 989e12, 4800e9, 450e9, 50e9, host=8, pod=8, axes=1
    ),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a jax.Device.device_kind; None if it is not in the table, because a guess would mislead."""
    fitting = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    return max(fitting, key=lambda chip: len(chip.device_kind), default=None)
