"""Mesh arithmetic, the sharding rules, and the check against parameters that are replicated by accident."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.step_test import MESHES, config, mesh_of
from trainer import optimizer, sharding
from trainer.config import Config, MeshConfig, OptimizerConfig, from_dict
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
    """A stand-in for JAX's device of a TPU."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_devices_say_which_slice_they_are_in():
    """The order in which devices are listed does not matter; a num_slices that contradicts them is an error."""
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
    """If a mesh has only the axis tensor, embed is not split: the norms are replicated, and nothing else."""
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


# Matrices of the same shape are split in different ways, and the path of one is the end of the paths of others.
PARAMETERS = {
    "kernel": ((8, 8), P("fsdp", None)),
    "up/kernel": ((8, 8), P("fsdp", "tensor")),
    "down/kernel": ((8, 8), P("tensor", "fsdp")),
    "stack/norm/scale": ((2, 8), P(None, "fsdp")),
    "stack/mlp/kernel": ((2, 8, 16), P(None, "fsdp", "tensor")),
    "stack/mlp/bias": ((2, 16), P(None, "tensor")),
}
MATRICES = {name: "kernel" in name for name in PARAMETERS}


def nested(values: dict) -> dict:
    return traverse_util.unflatten_dict({tuple(name.split("/")): value for name, value in values.items()})


def labelled(yes: str, no: str) -> dict:
    return nested({name: yes if is_matrix else no for name, is_matrix in MATRICES.items()})


def kept_by_parameter(params: dict) -> dict:
    """A state in which the names of moments come below the parameter's name, not above it."""
    return jax.tree.map(lambda p: {"m": jnp.zeros_like(p), "seen": jnp.zeros((), jnp.int32)}, params)


def muon_dimensions(params: dict) -> dict:
    of = {name: optax.contrib.MuonDimensionNumbers(-2, -1) if matrix else None for name, matrix in MATRICES.items()}
    return nested(of)


TRANSFORMATIONS = {
    "adam": (optax.scale_by_adam(), ["mu", "nu"]),
    "masked": (optax.masked(optax.scale_by_adam(), nested(MATRICES)), ["mu", "nu"]),
    "partition": (
        optax.partition({"a": optax.scale_by_lion(), "b": optax.scale_by_adam()}, labelled("a", "b")), ["mu", "nu"],
    ),
    "chain": (
        optax.chain(optax.ema(0.9), optax.clip_by_global_norm(1.0), optax.apply_if_finite(optax.trace(0.9), 3)),
        ["ema", "trace"],
    ),
    "muon": (optax.contrib.muon(1e-3, muon_weight_dimension_numbers=muon_dimensions), ["mu", "nu"]),
    "by parameter": (optax.GradientTransformation(kept_by_parameter, None), ["m"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_moment_is_split_as_its_parameter(name):
    transformation, moments = TRANSFORMATIONS[name]
    mesh = mesh_of("mixed")
    params = nested({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in PARAMETERS.items()})
    shardings = nested({name: NamedSharding(mesh, spec) for name, (_, spec) in PARAMETERS.items()})
    state = jax.eval_shape(transformation.init, params)
    found = sharding.of_optimizer_state(state, params, shardings, NamedSharding(mesh, P()))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    seen = set()
    for path, where in jax.tree_util.tree_leaves_with_path(found):
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        of = next((p for p in sorted(PARAMETERS, key=len, reverse=True) if p in keys), None)
        kept = next((m for m in moments if m in keys.split("/")), None)
        assert where.spec == (PARAMETERS[of][1] if kept else P()), keys
        seen |= {(kept, of)} if kept else set()
    both = {(moment, p) for moment in moments for p in PARAMETERS}
    matrices = {(moment, p) for moment, p in both if MATRICES[p]}
    expected = {"masked": matrices, "partition": {("mu", p) for p in PARAMETERS} | (both - matrices)}
    expected["muon"] = expected["partition"]
    assert seen == expected.get(name, both)


def test_a_factored_moment_is_not_split():
    """A factored moment does not have its parameter's shape, but may have that of another parameter."""
    mesh = mesh_of("mixed")
    params = {
        "scale": jax.ShapeDtypeStruct((8,), jnp.float32),
        "up": {"scale": jax.ShapeDtypeStruct((8, 16), jnp.float32)},
    }
    split = {"scale": NamedSharding(mesh, P("fsdp")), "up": {"scale": NamedSharding(mesh, P("fsdp", "tensor"))}}
    state = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=8).init, params)
    assert {state.v_row["up"]["scale"].shape, state.v_col["up"]["scale"].shape} == {(8,), (16,)}
    found = sharding.of_optimizer_state(state, params, split, NamedSharding(mesh, P()))
    assert found.v_row["up"]["scale"].spec == found.v_col["up"]["scale"].spec == P()
    assert found.v["scale"].spec == P("fsdp") and found.v["up"]["scale"].spec == P()


def muon(c: OptimizerConfig) -> optax.GradientTransformation:
    def dimensions(params: dict) -> dict:
        return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(1, 2) if p.ndim == 3 else None, params)

    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=dimensions)


@pytest.mark.parametrize("name", MESHES)
def test_no_large_moment_of_a_partition_is_replicated(monkeypatch, name):
    monkeypatch.setitem(optimizer.OPTIMIZERS, "muon", muon)
    program = Program(config(optimizer={"name": "muon"}), mesh_of(name))
    assert len(jax.tree.leaves(program.state.opt_state)) > len(jax.tree.leaves(program.params))
    assert sharding.replicated_share(program.state.opt_state, program.mesh) <= 0.01


def test_inference_falls_back_to_replicas():
    fits = sharding.inference_mesh(config(mesh={"fsdp": 2, "data": 4}))
    other = sharding.inference_mesh(config(mesh={"fsdp": 4, "data": 4}))
    assert tuple(fits.shape.values()) == (4, 2, 1, 1) and tuple(other.shape.values()) == (8, 1, 1, 1)
