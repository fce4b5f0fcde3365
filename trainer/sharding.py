"""The mesh, and the one table that maps the model's logical axes to it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.config import Config, MeshConfig, check_divisible
from trainer.errors import ConfigError

MESH_AXES = MeshConfig.AXES
# The axes that may shard parameters. Along `data` each device has its own replica of them.
PARAMETER_AXES = tuple(axis for axis in MESH_AXES if axis != "data")

BATCH_AXES: tuple[str, ...] = ("data", "fsdp")
EMBED_AXES: tuple[str, ...] = ("fsdp", "context")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "seq": "context",
    "embed": EMBED_AXES,  # of parameters; for activations the axis is None, since fsdp splits their batch
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "position": None,
    "layers": None,
}
# Rules for the code of a step, which works on one replica of the model and does not see the axis `data` (by_replica).
REPLICA_BATCH_AXES = tuple(axis for axis in BATCH_AXES if axis != "data")
REPLICA_RULES = RULES | {"batch": REPLICA_BATCH_AXES}
# Rules for the optimizer's state with mesh.shard_optimizer: replicas split it, each updates its shard of parameters.
ZERO1_RULES = RULES | {"embed": (*EMBED_AXES, "data")}
# The axes that shard the tokens of a replica. A sum over tokens is a sum over these axes, too.
TOKEN_AXES = (*REPLICA_BATCH_AXES, "context")


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices. Raises ConfigError if axes do not divide devices, batch or model."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config.mesh, len(devices))
    try:
        check_divisible(config, sizes)
    except ValueError as e:
        raise ConfigError(f"config.{e}") from None
    return mesh_of(sizes, devices, config.mesh.num_slices)


def mesh_of(sizes: dict[str, int], devices: list[jax.Device], num_slices: int = 0) -> Mesh:
    """A mesh whose neighbours are neighbours in the network, and whose slices differ only in `data`.

    Args:
      num_slices: the number of groups of devices with a fast network inside each (slices of TPUs, nodes of GPUs). If
        devices do not report their group, the groups are equal parts of `devices`, in order. 0: as devices report.

    Raises:
      ConfigError: `data` is not divisible by the slices.
    """
    groups = _slices(devices, num_slices)
    if sizes["data"] % len(groups):
        raise ConfigError(
            f"config.mesh.data = {sizes['data']} is not divisible by the {len(groups)} slices of devices, and no other "
            "axis may cross the slow network between them; change mesh.data, or set mesh.num_slices"
        )
    shape = [sizes[a] for a in MESH_AXES]
    shape[0] //= len(groups)
    grids = [mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.concatenate(grids), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slices(devices: list[jax.Device], num_slices: int) -> list[list[jax.Device]]:
    told = [getattr(d, "slice_index", 0) or 0 for d in devices]
    found = sorted(set(told))
    if len(found) > 1 and num_slices in (0, len(found)):
        return [[d for d, i in zip(devices, told, strict=True) if i == index] for index in found]
    if len(found) > 1 and num_slices > 1:
        raise ConfigError(
            f"config.mesh.num_slices = {num_slices}, but the devices are in {len(found)} slices; leave it 0"
        )
    if len(devices) % (num_slices or 1):
        raise ConfigError(f"config.mesh.num_slices = {num_slices} does not divide the {len(devices)} devices there are")
    size = len(devices) // (num_slices or 1)
    return [devices[i : i + size] for i in range(0, len(devices), size)]


def axis_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """The sizes of all axes, with -1 replaced by the number of remaining devices."""
    sizes = mesh.sizes()
    named = {k: v for k, v in sizes.items() if v != -1}
    product = 1
    for size in named.values():
        product *= size
    shown = " x ".join(f"mesh.{k} = {v}" for k, v in named.items())
    if len(named) < len(sizes):
        if num_devices % product:
            raise ConfigError(f"config.{shown} = {product} does not divide the {num_devices} devices there are")
        sizes = {k: num_devices // product if v == -1 else v for k, v in sizes.items()}
    elif product != num_devices:
        raise ConfigError(
            f"config.{shown} = {product}, but there are {num_devices} devices; set one axis to -1 to take what is left"
        )
    return sizes


def inference_mesh(config: Config) -> Mesh:
    """A mesh for sampling and evaluation: the run's own if it fits this machine, else all devices as replicas."""
    try:
        return make_mesh(config)
    except ConfigError:
        return mesh_of(dict.fromkeys(MESH_AXES, 1) | {"data": jax.device_count()}, jax.devices())


def batch_shards(sizes: Mapping[str, int]) -> int:
    """The number of shards of the rows of a batch, on a mesh with these sizes of its axes."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def spec(axes: tuple[str | None, ...], rules: dict = RULES) -> PartitionSpec:
    """The mesh axes for logical axes: spec(('batch', 'seq', None)) == P(('data', 'fsdp'), 'context', None)."""
    return PartitionSpec(*(None if a is None else rules[a] for a in axes))


def named(mesh: Mesh | AbstractMesh, *axes: str | None, rules: dict = RULES) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, rules))


def by_replica(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """A function that runs `f` on the rows of each replica of the model: a shard_map over `data` only. The compiler
    splits the other axes.

    So replicas communicate only what `f` says, and when it says so. With one replica this is `f` itself, because in a
    shard_map XLA would fuse other operations, which changes the last bits of sums.
    """
    if mesh.shape["data"] == 1:
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={"data"}, check_vma=False)


def by_device(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """A function that runs `f` on each device's shards: a shard_map over all axes. Specs follow REPLICA_RULES."""

    def mapped(*arguments: Any) -> Any:
        here = mesh_here(mesh)
        axes = set(MESH_AXES) - set(here.abstract_mesh.manual_axes if isinstance(here, Mesh) else here.manual_axes)
        by_axes = jax.shard_map(f, mesh=here, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
        return by_axes(*arguments)

    return mapped


def mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh to pass to JAX in code that is being traced: inside by_replica, the abstract mesh of the context, in
    which the compiler does not split `data`."""
    here = jax.sharding.get_abstract_mesh()
    return mesh if here.empty else here


def of_optimizer_state(state: Any, params: dict, shardings: dict, other: NamedSharding) -> Any:
    """Shardings of an optimizer's state, a tree like `state`; `shardings` has the sharding of each parameter's moments.

    Optax keeps moments in copies of the parameters' tree, in which optax.masked and optax.partition leave out some
    parameters. So an array belongs to the parameter whose path is the longest part of the array's own path.

    Args:
      state, params: abstract trees.
      shardings: the sharding of each parameter's moments, a tree like `params`.
      other: the sharding of arrays that do not belong to a parameter (a count of steps) or do not have its shape (a
        factored moment). replicated_share tells whether they are large.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    of_path = {path: (p.shape, where) for (path, p), where in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def of_array(path: tuple, array: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = (path[i:j] for j in range(len(path), 0, -1) for i in range(j))  # of equally long parts the last first
        parameter = max((part for part in parts if part in of_path), key=len, default=())
        shape, where = of_path.get(parameter, (None, other))
        return where if shape == array.shape else other

    return jax.tree_util.tree_map_with_path(of_array, state)


def replicated_share(tree: Any, mesh: Mesh, *, of: Any = None, axes: tuple[str, ...] = PARAMETER_AXES) -> float:
    """The share of numbers that every device holds although `axes` of the mesh could split them.

    Args:
      tree: the replicated numbers in this tree count.
      of: the tree whose numbers are the whole; None: `tree`.
    """
    if all(mesh.shape[axis] == 1 for axis in axes):
        return 0.0
    replicated = sum(x.size for x in jax.tree.leaves(tree) if x.sharding.is_fully_replicated)
    return replicated / sum(x.size for x in jax.tree.leaves(tree if of is None else of))
