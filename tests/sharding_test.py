"""Mesh arithmetic, the rules, and the check against parameters left whole by accident."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests.step_test import MESHES, config, mesh_of
from trainer import sharding
from trainer.config import Config, MeshConfig, from_dict
from trainer.errors import ConfigError
from trainer.state import Program


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=1, fsdp=2, context=-1), (1, 2, 4, 1)),
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_what_is_left(mesh, sizes):
    assert tuple(sharding.axis_sizes(mesh, 8).values()) == sizes


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (MeshConfig(fsdp=3), ["mesh.fsdp = 3", "8 devices"]),
        (MeshConfig(data=2, fsdp=2, tensor=1), ["= 4", "8 devices", "-1"]),
        (MeshConfig(data=16), ["= 16", "8 devices"]),
        (MeshConfig(data=2, fsdp=2, context=2, tensor=2), ["mesh.context = 2", "= 16", "8 devices", "-1"]),
    ],
)
def test_axes_that_do_not_fit_the_devices(mesh, parts):
    with pytest.raises(ConfigError) as error:
        sharding.axis_sizes(mesh, 8)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (MeshConfig(data=1, fsdp=8, num_slices=2), ["mesh.data = 1", "2 slices", "change mesh.data"]),
        (MeshConfig(data=2, fsdp=4, num_slices=4), ["mesh.data = 2", "4 slices", "change mesh.data"]),
        (MeshConfig(data=-1, num_slices=3), ["mesh.num_slices = 3", "8 devices"]),
        (MeshConfig(data=3, fsdp=2), ["mesh.data = 3", "= 6", "8 devices", "-1"]),
    ],
)
def test_slices_that_do_not_fit(mesh, parts):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(Config(global_batch_size=24, mesh=mesh))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert all(part in str(error.value) for part in ["config.", *parts])


@dataclasses.dataclass(frozen=True)
class Device:
    """What a TPU tells of itself."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_devices_say_which_slice_they_are_in():
    """In whatever order they are listed; a number of slices that contradicts them is an error."""
    devices = [Device(i, i % 2) for i in range(8)]
    sizes = {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    for num_slices in (0, 2):
        mesh = sharding.mesh_of(sizes, devices, num_slices)
        assert [{d.slice_index for d in half.flat} for half in (mesh.devices[:2], mesh.devices[2:])] == [{0}, {1}]
        assert {d.id for d in mesh.devices.flat} == set(range(8))
    with pytest.raises(ConfigError, match=r"num_slices .* 4, but the devices are in 2 slices; leave it 0"):
        sharding.mesh_of(sizes, devices, 4)


def test_a_batch_that_does_not_divide_by_the_devices_there_are():
    with pytest.raises(ConfigError, match=r"global_batch_size = 12 is not divisible by .* = 8"):
        sharding.make_mesh(from_dict({"global_batch_size": 12}))


def test_rules():
    assert sharding.spec(("batch", "seq", None)) == P(("data", "fsdp"), "context", None)
    assert sharding.spec(("layers", "embed", "mlp")) == P(None, ("fsdp", "context"), "tensor")
    for rule in (*sharding.RULES.values(), *sharding.ZERO1_RULES.values()):
        assert rule is None or set([rule] if isinstance(rule, str) else rule) <= set(sharding.MESH_AXES)


@pytest.mark.parametrize("name", MESHES)
def test_nothing_large_is_left_whole(name):
    program = Program(config(model={"position": "learned", "tie_embeddings": False}), mesh_of(name))
    assert sharding.replicated_share(program.params, program.mesh) <= 0.01
    shape = program.mesh.shape
    sizes = [shape["fsdp"] * shape["context"], shape["tensor"]]
    kernel = program.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // sizes[0], kernel.shape[2] // sizes[1])


def test_the_share_counts_what_the_rules_do_not_split():
    """On a mesh of only tensor, embed is whole: norms and nothing else."""
    mesh = sharding.mesh_of({"data": 1, "fsdp": 1, "context": 1, "tensor": 8}, jax.devices())
    program = Program(config(model={"num_heads": 8, "num_kv_heads": 8}), mesh)
    share = sharding.replicated_share(program.params, mesh)
    norms = 5 * 32  # two in each of two layers, one at the end
    assert share == pytest.approx(norms / sum(p.size for p in jax.tree.leaves(program.params)))


def test_optimizer_state_is_split_like_the_parameters():
    program = Program(config(), mesh_of("fsdp"))
    shardings = {leaf.sharding.spec for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim >= 2}
    assert P() not in shardings
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(program.params) if leaf.ndim >= 2} == shardings


def test_inference_falls_back_to_replicas():
    fits = sharding.inference_mesh(config(mesh={"fsdp": 2, "data": 4}))
    other = sharding.inference_mesh(config(mesh={"fsdp": 4, "data": 4}))
    assert tuple(fits.shape.values()) == (4, 2, 1, 1) and tuple(other.shape.values()) == (8, 1, 1, 1)
