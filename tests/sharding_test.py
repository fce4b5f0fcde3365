"""Mesh arithmetic, the rules, and the check against parameters left whole by accident."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests.step_test import MESHES, config, mesh_of
from trainer import sharding
from trainer.config import MeshConfig, from_dict
from trainer.errors import ConfigError
from trainer.state import Program


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
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
    ],
)
def test_axes_that_do_not_fit_the_devices(mesh, parts):
    with pytest.raises(ConfigError) as error:
        sharding.axis_sizes(mesh, 8)
    assert all(part in str(error.value) for part in parts)


def test_a_batch_that_does_not_divide_by_the_devices_there_are():
    with pytest.raises(ConfigError, match=r"global_batch_size = 12 is not divisible by .* = 8"):
        sharding.make_mesh(from_dict({"global_batch_size": 12}))


def test_rules():
    assert sharding.spec(("batch", "seq", None)) == P(("data", "fsdp"), None, None)
    assert sharding.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    for rule in sharding.RULES.values():
        assert rule is None or set([rule] if isinstance(rule, str) else rule) <= set(sharding.MESH_AXES)


@pytest.mark.parametrize("name", MESHES)
def test_nothing_large_is_left_whole(name):
    program = Program(config(model={"position": "learned", "tie_embeddings": False}), mesh_of(name))
    assert sharding.replicated_share(program.axes, program.params, program.mesh) <= 0.01
    sizes = [max(program.mesh.shape["fsdp"], 1), max(program.mesh.shape["tensor"], 1)]
    kernel = program.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // sizes[0], kernel.shape[2] // sizes[1])


def test_the_share_counts_what_the_rules_do_not_split():
    """On a mesh of tensor alone, embed is whole: norms and nothing else."""
    mesh = sharding.mesh_of({"data": 1, "fsdp": 1, "tensor": 8}, jax.devices())
    program = Program(config(model={"num_heads": 8, "num_kv_heads": 8}), mesh)
    share = sharding.replicated_share(program.axes, program.params, mesh)
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
    assert tuple(fits.shape.values()) == (4, 2, 1) and tuple(other.shape.values()) == (8, 1, 1)
