"""Devices of a machine that is not here, to compile for (launch.plan).

Nothing runs on them: XLA compiles for a described TPU slice or GPU node on any computer that has the compilers (the
extra `plan`). JAX is not imported at the top, so that a mistyped name is reported at once.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any

from trainer.chips import CHIPS, Chip
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from jax import Device

COMPILERS = 'pip install -e ".[plan]"'  # jax[tpu] and jax[cuda13-local]: libtpu and the CUDA plugin without CUDA
EXAMPLES = {2: "16x16", 3: "4x4x4", 1: "8"}
FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # all slices of v5e and v6e
PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of other TPUs; larger slices consist of 4x4x4 cubes


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to compile for.

    Attributes:
      name: one slice, as the user typed it: 'v5p:4x4x4', 'h100:8'.
      devices: the devices of all slices, slice after slice. Their slice_index distinguishes TPU slices, but is 0 for
        all GPUs, so a mesh over several nodes of GPUs needs mesh.num_slices.
      num_slices: the number of TPU slices, or of nodes of GPUs.
    """

    name: str
    chip: Chip
    devices: list["Device"]
    num_slices: int

    @property
    def num_hosts(self) -> int:
        return len({d.process_index for d in self.devices})


def describe(name: str, num_slices: int = 1) -> Topology:
    """The devices of `num_slices` slices like 'v5p:4x4x4' (chips along each axis) or nodes like 'h100:8' (GPUs).

    A v4, v5p or TPU7x slice of complete 4x4x4 cubes wraps around on every axis, a smaller slice on none; v5e and
    v6e slices wrap around on an axis that has the pod's 16 chips. (Without the wrap XLA would turn all-gathers into
    all-reduces.) Twisted tori are not supported.

    Raises:
      ConfigError: there is no such machine, or its compiler is not installed.
    """
    family, shape = parse(name, num_slices)
    chip = CHIPS[family]
    _require_compiler(name, chip.platform)
    prepare_environment()
    from jax.experimental import topologies

    if chip.platform == "tpu":
        options = _tpu_options(chip, shape, num_slices)
    else:
        options = {"target_config": gpu_target(family), "topology": f"{num_slices}x1x{shape[0]}"}
        answer_for_capability(family)
    asked = f"{family}:{'x'.join(map(str, shape))}"
    try:
        devices = topologies.get_topology_desc(asked, chip.platform, **options).devices
    except Exception as e:  # its type varies: a missing library, a version that does not fit, an odd shape
        raise ConfigError(f"topology {name}: the compiler refuses it: {str(e).splitlines()[0]}") from e
    return Topology(name, chip, devices, num_slices)


def parse(name: str, num_slices: int = 1) -> tuple[str, tuple[int, ...]]:
    """'v5p:4x4x4' -> ('v5p', (4, 4, 4)), without JAX. Raises ConfigError if there is no such machine."""
    family, _, text = name.partition(":")
    if family not in CHIPS:
        known = ", ".join(f"{f}:{EXAMPLES[c.axes]}" for f, c in CHIPS.items())
        raise ConfigError(f"topology {name!r}: no chip is called {family!r}; there are {known}")
    axes = CHIPS[family].axes
    sizes = text.split("x")
    if len(sizes) != axes or not all(re.fullmatch("0*[1-9][0-9]{0,8}", s) for s in sizes):
        numbers = {1: "a number of GPUs", 2: "two numbers of chips", 3: "three numbers of chips"}[axes]
        raise ConfigError(f"topology {name!r}: after {family}: comes {numbers}, as in {family}:{EXAMPLES[axes]}")
    shape = tuple(map(int, sizes))
    _check_shape(name, family, shape)
    if num_slices < 1:
        raise ConfigError(f"topology {name}: num_slices is {num_slices}; it must be at least 1")
    return family, shape


def _check_shape(name: str, family: str, shape: tuple[int, ...]) -> None:
    chip = CHIPS[family]
    if chip.axes == 1 and shape[0] > chip.pod:
        raise ConfigError(f"topology {name}: a node has {chip.pod} GPUs; for more, {family}:8 and --num_slices=NODES")
    if chip.axes == 2 and shape not in FLAT_SHAPES:
        raise ConfigError(f"topology {name}: a {family} slice is one of {_shown(FLAT_SHAPES)}")
    if chip.axes == 3 and shape not in PARTS_OF_A_CUBE:
        if any(size % 4 for size in shape):
            small = _shown(PARTS_OF_A_CUBE)
            raise ConfigError(f"topology {name}: a {family} slice is {small}, or has multiples of 4 on every axis")
        if math.prod(shape) > chip.pod:
            raise ConfigError(
                f"topology {name}: {math.prod(shape):,} chips, but a {family} pod has {chip.pod:,}; "
                "take a smaller slice, or several with --num_slices"
            )


def _shown(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # arrays of this process are on the CPU, even if there is an accelerator
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # programs for absent devices would be written to it, but cannot be read
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # else the CUDA plugin does not load without cuDNN, cuBLAS, …
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu queries Google Cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second plan, or one during a training run, finds libtpu locked
    "TPU_WORKER_HOSTNAMES": "localhost",  # libtpu warns without these two
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def prepare_environment() -> None:
    """Sets the variables for compiling for absent devices. Most have no effect after JAX was imported."""
    os.environ.update(ENVIRONMENT)


def _require_compiler(name: str, platform: str) -> None:
    if platform == "tpu":
        found = "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None
        missing = "libtpu"
    else:
        plugins = importlib.util.find_spec("jax_plugins")
        folders = plugins.submodule_search_locations if plugins and plugins.submodule_search_locations else []
        found = any(os.path.isdir(os.path.join(folder, f"xla_cuda{n}")) for folder in folders for n in (12, 13))
        missing = "jax-cuda13-plugin"
    if not found:
        raise ConfigError(f"topology {name}: its compiler, {missing}, is not installed; {COMPILERS}")


def _tpu_options(chip: Chip, shape: tuple[int, ...], num_slices: int) -> dict[str, Any]:
    if chip.axes == 2:
        wrap = [size == 16 for size in shape] + [False]
    else:
        wrap = [all(size % 4 == 0 for size in shape)] * 3
    options: dict[str, Any] = {"wrap": tuple(wrap)}
    if num_slices > 1:
        options["num_slices"] = num_slices
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.device_kind == "TPU v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores are one device, as usual
    return options


# What cudaGetDeviceProperties reports: name, major compute capability, number of multiprocessors, bytes of memory and
# of L2, bytes of shared memory per multiprocessor, the most of these that a block may use, and the clock in GHz. XLA
# tiles, fuses and estimates costs by these numbers.
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 85_097_971_712, 41_943_040, 167_936, 166_912, 1.41),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 52_428_800, 233_472, 232_448, 1.98),
    "h200": ("NVIDIA H200", 9, 132, 150_754_820_096, 52_428_800, 233_472, 232_448, 1.98),
}


def answer_for_capability(family: str) -> None:
    """Lets JAX's cuDNN attention take the described GPU's compute capability, on which the largest head size depends.

    It would ask the local GPU, and refuse heads that it does not know to fit. No public function sets it.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    major = GPUS[family][1]
    attention.check_compute_capability = lambda wanted: (major, 0) >= tuple(map(int, wanted.split(".")))


def gpu_target(family: str) -> str:
    """The card as a text protocol buffer, stream_executor.GpuTargetConfigProto of XLA."""
    name, major, cores, memory, l2, shared_of_core, shared_of_block, clock = GPUS[family]
    return f"""
        platform_name: "CUDA"
        device_description_str: "{name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: 0 }}
          core_count: {cores} fpus_per_core: {128 if major > 8 else 64} clock_rate_ghz: {clock}
          device_memory_size: {memory} memory_bandwidth: {int(CHIPS[family].hbm)} l2_cache_size: {l2}
          shared_memory_per_core: {shared_of_core} shared_memory_per_block: 49152
          shared_memory_per_block_optin: {shared_of_block}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
    """
