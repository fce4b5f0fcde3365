"""The mesh, and the one table that maps the model's logical axes to it."""

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.config import Config, MeshConfig, check_divisible
from trainer.errors import ConfigError

# Axes that may cross a slow network come first.
MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "seq": None,
    "embed": "fsdp",  # of parameters; an activation's embed axis is named None, since fsdp splits its batch
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "position": None,
    "layers": None,
}


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices. Raises ConfigError where axes, devices, batch or model do not divide."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config.mesh, len(devices))
    try:
        check_divisible(config, sizes)
    except ValueError as e:
        raise ConfigError(f"config.{e}") from None
    return mesh_of(sizes, devices)


def mesh_of(sizes: dict[str, int], devices: list[jax.Device]) -> Mesh:
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes[a] for a in MESH_AXES), MESH_AXES, axis_types=auto, devices=devices)


def axis_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """The sizes of all axes, with -1 filled in."""
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
    """A mesh for sampling and evaluation: the run's own where it fits this machine, else all devices as replicas."""
    try:
        return make_mesh(config)
    except ConfigError:
        return mesh_of({"data": jax.device_count(), "fsdp": 1, "tensor": 1}, jax.devices())


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes to mesh axes: spec(('batch', 'seq', None)) == P(('data', 'fsdp'), None, None)."""
    return PartitionSpec(*(None if a is None else RULES[a] for a in axes))


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Places an activation on the mesh that jax.set_mesh made current."""
    return jax.lax.with_sharding_constraint(x, spec(axes))


def replicated_share(axes_tree: dict, shapes: dict, mesh: Mesh) -> float:
    """Share of the parameters that every device holds whole although the mesh has axes to split them."""
    split_axes = {a for a in ("fsdp", "tensor") if mesh.shape[a] > 1}
    if not split_axes:
        return 0.0
    names = jax.tree.leaves(axes_tree, is_leaf=lambda a: isinstance(a, tuple))
    total = replicated = 0
    for shape, axes in zip(jax.tree.leaves(shapes), names, strict=True):
        total += shape.size
        if not split_axes & set(spec(axes)):
            replicated += shape.size
    return replicated / total
