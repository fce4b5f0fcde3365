"""Tests of hlo.py on compiled programs: excerpts of real programs, CPU programs whose answer is known, and (slow, with
the extra `plan`) a complete FSDP step that is compiled for TPUs and GPUs that are not attached."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.errors import ConfigError
from trainer.planning import hlo, topology

F32 = 4


def module(entry: str, others: str = "") -> str:
    body = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    others = textwrap.dedent(others).strip()
    return f"HloModule jit_step\n\n{others}\n\nENTRY %main (p: f32[8,4]) -> f32[] {{\n{body}\n}}\n"


def one(entry: str, others: str = "", mesh: dict | None = None, num_slices: int = 1) -> hlo.Collective:
    (found,) = hlo.collectives(module(entry, others), mesh or {"data": 2, "fsdp": 4}, num_slices)
    return found


def all_reduce(groups: str, mesh: dict | None = None, num_slices: int = 1) -> hlo.Collective:
    return one(
        f"""
        %p = f32[8,4]{{1,0}} parameter(0)
        ROOT %ar = f32[8,4]{{1,0}} all-reduce(%p), channel_id=1, \
replica_groups={groups}, use_global_device_ids=true, to_apply=%add
        """,
        mesh=mesh,
        num_slices=num_slices,
    )


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("[2,4]<=[8]", ("fsdp",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "fsdp"), 8),
        ("{}", ("data", "fsdp"), 8),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", ("fsdp",), 4),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", ("data", "fsdp"), 8),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("fsdp",), 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", ("data",), 2),
        ("mesh['x'=8], device_ids=(0,4,1,5,2,6,3,7) {'x':(4)2}", ("data",), 2),
        ("mesh['x'=8] {'x':(1)2}", ("data",), 2),
        ("mesh['x'=8] {'x':(2)4}", ("fsdp",), 4),
        ("{{0,99}}", (), 2),
    ],
)
def test_groups_in_every_spelling(groups, axes, size):
    found = all_reduce(groups)
    assert (found.axes, found.group_size) == (axes, size)
    assert found.bytes == 8 * 4 * F32
    assert found.sent == 2 * (size - 1) * found.bytes // size


def test_groups_across_slices():
    mesh = {"data": 4, "fsdp": 2}  # there are two slices, and each has two of `data`
    assert not all_reduce("{{0,2},{1,3},{4,6},{5,7}}", mesh, num_slices=2).crosses_slices
    assert all_reduce("{{0,4},{1,5},{2,6},{3,7}}", mesh, num_slices=2).crosses_slices
    assert not all_reduce("{{0,4},{1,5},{2,6},{3,7}}", mesh).crosses_slices


def test_gather_and_scatter_count_the_whole_buffer():
    gather = one(
        """
        %p = bf16[1,256,16]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
        ROOT %all-gather.1 = bf16[1,256,64]{1,2,0:T(8,128)(2,1)} all-gather(%p), channel_id=4, \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={2}, metadata={op_name="jit(step)/params[\\'embed\\']"}
        """
    )
    assert (gather.kind, gather.bytes, gather.sent) == ("all-gather", 2 * 256 * 64, 2 * 256 * 48)
    assert (gather.dtype, gather.op_name) == ("bf16", "jit(step)/params['embed']")
    scatter = one(
        """
        %p = f32[64]{0} parameter(0)
        ROOT %rs = f32[16]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
        """
    )
    assert (scatter.kind, scatter.bytes, scatter.sent) == ("reduce-scatter", 256, 192)


def test_combined_and_asynchronous_of_a_gpu():
    found = one(
        """
        %a = bf16[32,1024]{1,0} parameter(0)
        %b = f32[32,256]{1,0} parameter(1)
        %all-gather-start = ((bf16[32,1024]{1,0}, f32[32,256]{1,0}), (bf16[128,1024]{1,0}, f32[128,256]{1,0})) \
all-gather-start(%a, %b), channel_id=5, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
        ROOT %done = (bf16[128,1024]{1,0}, f32[128,256]{1,0}) all-gather-done(%all-gather-start)
        """
    )
    assert (found.bytes, found.dtype) == (128 * 1024 * 2 + 128 * 256 * 4, "bf16+f32")


def test_asynchronous_computation():
    wrapped = """
    %async_computation (q: f32[8]) -> f32[2] {
      %q = f32[8]{0} parameter(0)
      ROOT %rs = f32[2]{0} reduce-scatter(%q), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
    }
    """
    found = one(
        """
        %p = f32[8]{0} parameter(0)
        %start = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%async_computation
        ROOT %done = f32[2]{0} async-done(%start), calls=%async_computation
        """,
        wrapped,
    )
    assert (found.kind, found.bytes) == ("reduce-scatter", 32)


def test_clones_of_a_tpu_are_one():
    """The compiler copies an asynchronous collective into each fusion from its start to its end; it counts once."""
    fusion = """
    %fusion_{0} (q: bf16[16]) -> bf16[64] {{
      %q = bf16[16]{{0}} parameter(0)
      %all-gather.{0} = bf16[64]{{0}} all-gather(%q), channel_id=4, replica_groups=[2,4]<=[8], dimensions={{0}}
      ROOT %custom-call.{0} = bf16[64]{{0}} custom-call(%all-gather.{0}), custom_call_target="AsyncCollective{1}"
    }}
    """
    text = module(
        """
        %p = bf16[16]{0} parameter(0)
        %async-collective-start = bf16[64]{0} fusion(%p), kind=kCustom, calls=%fusion_1
        ROOT %async-collective-done = bf16[64]{0} fusion(%p), kind=kCustom, calls=%fusion_2
        """,
        fusion.format(1, "Start") + fusion.format(2, "Done"),
    )
    assert len(hlo.collectives(text, {"data": 2, "fsdp": 4})) == 1
    assert hlo.custom_calls(text) == {"AsyncCollectiveStart": 1, "AsyncCollectiveDone": 1}


def test_reduce_scatter_of_a_tpu():
    """The compiler fuses an all-reduce and the slice of this device: this is one reduce-scatter."""
    fused = """
    %all-reduce-scatter.7 (q: bf16[64,8]) -> bf16[16,8] {
      %q = bf16[64,8]{1,0} parameter(0)
      %all-reduce.23 = bf16[64,8]{1,0} all-reduce(%q), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      %id = u32[] partition-id()
      %zero = u32[] constant(0)
      ROOT %dynamic-slice.72 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.23, %id, %zero), dynamic_slice_sizes={16,8}
    }
    """
    found = one(
        """
        %p = bf16[64,8]{1,0} parameter(0)
        ROOT %fusion.1 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.7, \
metadata={op_name="jit(step)/dot"}
        """,
        fused,
    )
    assert (found.kind, found.bytes, found.sent, found.op_name) == ("reduce-scatter", 1024, 768, "jit(step)/dot")


SLICED = """
    %fused (q: f32[2,64,4], r: bf16[64,4], i: s32[]) -> f32[2,64,4] {{
      %q = f32[2,64,4]{{2,1,0}} parameter(0)
      %r = bf16[64,4]{{1,0}} parameter(1)
      %i = s32[] parameter(2)
      %slice = bf16[{size},4]{{1,0}} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={{{size},4}}
      ROOT %out = f32[2,64,4]{{2,1,0}} dynamic-update-slice(%q, %slice, %i)
    }}
    """


@pytest.mark.parametrize(("size", "other_user", "sliced"), [(16, False, 512), (24, False, 0), (16, True, 0)])
def test_all_reduce_of_which_each_device_keeps_its_part(size, other_user, sliced):
    """The TPU compiler turns a reduce-scatter over two axes of the network into an all-reduce: its use shows this."""
    user = "%copy.9 = bf16[64,4]{1,0} negate(%part)" if other_user else ""
    found = one(
        f"""
        %p = bf16[64,4]{{1,0}} parameter(0)
        %norm = bf16[4]{{0}} parameter(1)
        %state = f32[2,64,4]{{2,1,0}} parameter(2)
        %index = s32[] parameter(3)
        %all-reduce.20 = (bf16[64,4]{{1,0}}, bf16[4]{{0}}) all-reduce(%p, %norm), \
replica_groups=[2,4]<=[8], to_apply=%add
        %part = bf16[64,4]{{1,0}} get-tuple-element(%all-reduce.20), index=0
        %whole = bf16[4]{{0}} get-tuple-element(%all-reduce.20), index=1
        {user}
        %fusion.1 = f32[2,64,4]{{2,1,0}} fusion(%state, %part, %index), kind=kLoop, calls=%fused
        ROOT %tuple = (f32[2,64,4]{{2,1,0}}, bf16[4]{{0}}) tuple(%fusion.1, %whole)
        """,
        SLICED.format(size=size),
    )
    assert (found.kind, found.bytes, found.sliced) == ("all-reduce", 64 * 4 * 2 + 8, sliced)


def test_transfer_between_tpu_slices():
    """The host sends the data; in the text, the transfer is a pair of send and recv."""
    what = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    found = one(
        f"""
        %p = bf16[16,8]{{1,0:T(8,128)(2,1)}} parameter(0)
        %token = token[] after-all()
        %send.1 = (bf16[16,8]{{1,0}}, u32[], token[]) send(%p, %token), channel_id=2, is_host_transfer=true, {what}
        %recv.1 = (bf16[16,8]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%token), channel_id=1, is_host_transfer=true, {what}
        ROOT %recv-done = (bf16[16,8]{{1,0}}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
        """,
        num_slices=2,
    )
    assert (found.kind, found.axes, found.group_size, found.bytes) == ("all-reduce", ("data",), 2, 256)
    assert found.crosses_slices


def test_permute():
    found = one(
        """
        %p = bf16[16]{0} parameter(0)
        %start = (bf16[16]{0}, bf16[16]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
        ROOT %done = bf16[16]{0} collective-permute-done(%start)
        """
    )
    assert (found.kind, found.axes, found.bytes, found.sent) == ("collective-permute", ("fsdp",), 32, 32)


LOOP = """
    %body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
      %s = (s32[], f32[8]{{0}}) parameter(0)
      %x = f32[8]{{0}} get-tuple-element(%s), index=1
      %ar = f32[8]{{0}} all-reduce(%x), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
      %n = s32[] get-tuple-element(%s), index=0
      ROOT %next = (s32[], f32[8]{{0}}) tuple(%n, %ar)
    }}

    %condition (c: (s32[], f32[8])) -> pred[] {{
      %limit = s32[]{{:T(128)}} constant(4)
      %c = (s32[], f32[8]{{0}}) parameter(0)
      %i = s32[] get-tuple-element(%c), index=0
      ROOT %lt = pred[] compare(%i, %limit), direction={direction}
    }}
    """


@pytest.mark.parametrize(
    ("start", "direction", "told", "trips"),
    [
        ("constant(0)", "LT", "", 4),
        ("constant(1)", "LT", "", 3),  # one iteration was peeled off
        ("constant(0)", "LE", "", 5),
        ("constant(9)", "GT", "", 5),
        ("parameter(1)", "LT", "", None),
        ("parameter(1)", "LT", ', backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_trips(start, direction, told, trips):
    text = module(
        f"""
        %p = f32[8]{{0}} parameter(0)
        %start = s32[] {start}
        %copy = s32[] copy(%start)
        %state = (s32[], f32[8]{{0}}) tuple(%copy, %p)
        ROOT %while.1 = (s32[], f32[8]{{0}}) while(%state), condition=%condition, body=%body{told}
        """,
        LOOP.format(direction=direction),
    )
    (loop,) = hlo.loops(text)
    assert (loop.name, loop.trips, loop.depth) == ("while.1", trips, 0)
    (found,) = hlo.collectives(text, {"data": 8})
    assert (found.trips, found.depth, found.count) == ((trips,), 1, trips or 1)


def test_conditional_and_newlines_in_an_instruction():
    branch = """
    %branch_{0} (q: f32[8]) -> f32[8] {{
      %q = f32[8]{{0}} parameter(0)
      ROOT %ar.{0} = f32[8]{{0}} all-reduce(%q), channel_id={0}, replica_groups=[1,8]<=[8], to_apply=%add
    }}
    """
    text = module(
        """
        %p = f32[8]{0} parameter(0)
        %which = s32[] parameter(1)
        %splash_mha_fwd.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
        "xprof_metadata":"{\\"block_q\\": 128}"
        }}, metadata={op_name="jit(f)/pallas_call"}
        ROOT %conditional = f32[8]{0} conditional(%which, %p, %p), branch_computations={%branch_1, %branch_2}
        """,
        branch.format(1) + branch.format(2),
    )
    assert len(hlo.collectives(text, {"data": 8})) == 2
    assert hlo.custom_calls(text) == {"tpu_custom_call:splash_mha_fwd": 1}


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("module @jit_step {}", {"data": 8})


# Programs that are compiled for the eight devices of the tests


def compiled(function, *shapes, mesh=None, specs=None) -> str:
    mesh = mesh or Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(("data", "fsdp")), check_vma=False)
    return jax.jit(mapped).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).compile().as_text()


def test_collectives_in_a_scan():
    def layer(x, _):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # [32, 16], gathered from 4 parts
        part = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True)
        return jax.lax.psum(jnp.cos(part), "data"), None

    def step(x):
        x, _ = jax.lax.scan(layer, x, length=5)
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    text = compiled(step, (64, 16), specs=P(("data", "fsdp")))
    found = {c.kind: c for c in hlo.collectives(text, {"data": 2, "fsdp": 4})}
    assert {kind: (c.axes, c.count, c.bytes) for kind, c in found.items()} == {
        "all-gather": (("fsdp",), 5, 32 * 16 * F32),
        "reduce-scatter": (("fsdp",), 5, 32 * 16 * F32),
        "all-reduce": (("data",), 5, 8 * 16 * F32),
        "collective-permute": (("data",), 1, 8 * 16 * F32),
    }
    assert [(loop.trips, loop.depth) for loop in hlo.loops(text)] == [(5, 0)]
    rows = hlo.summary(list(found.values()), num_layers=5)
    assert [(r.kind, r.in_layers, r.executions, r.bytes, r.sent) for r in rows if r.kind != "all-reduce"] == [
        ("all-gather", True, 5, 5 * 2048, 5 * 1536),
        ("reduce-scatter", True, 5, 5 * 2048, 5 * 1536),
        ("collective-permute", False, 1, 512, 512),
    ]


def test_loops_in_loops():
    def step(x):
        def inner(x, _):
            return jax.lax.psum(jnp.sin(x), "fsdp"), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0] + 1, None

        return jax.lax.scan(outer, x, length=7)[0]

    text = compiled(step, (64, 16), specs=P(("data", "fsdp")))
    assert [(loop.trips, loop.depth) for loop in hlo.loops(text)] == [(7, 0), (3, 1)]
    (found,) = hlo.collectives(text, {"data": 2, "fsdp": 4})
    assert (found.trips, found.count, found.axes) == ((7, 3), 21, ("fsdp",))
    (row,) = hlo.summary([found], num_layers=3)
    assert (row.in_layers, row.executions) == (True, 21)


def test_shapes_tell_what_has_a_buffer():
    def fused(x, w):
        return jnp.sum(jnp.exp(x)[:, :, None] * w[None], axis=(1, 2))

    x, w = jax.ShapeDtypeStruct((48, 24), jnp.float32), jax.ShapeDtypeStruct((24, 96), jnp.float32)
    text = jax.jit(fused).lower(x, w).compile().as_text()
    found = hlo.shapes(text)
    assert hlo.Shape("f32", (48, 24), True) in found
    assert hlo.Shape("f32", (48, 24, 96), True) not in found
    assert hlo.Shape("f32", (48, 24, 96), False) in found


# The complete step of an FSDP transformer, compiled for machines that are not attached

LAYERS, EMBED, MLP, VOCAB, SEQ, HEADS = 4, 256, 1024, 2048, 128, 2


def fsdp_step(mesh: Mesh) -> str:
    """The text of the compiled step: a scan over layers with remat, parameters [L, d, f] sharded over fsdp, AdamW, and
    donated buffers; each weight is gathered in bf16 before its use."""

    def constrain(x, *spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def whole(w):
        return constrain(w.astype(jnp.bfloat16), *[None] * w.ndim)

    batch = ("data", "fsdp")
    sizes = {"qkv": (EMBED, 3 * EMBED), "o": (EMBED, EMBED), "up": (EMBED, MLP), "down": (MLP, EMBED)}
    shapes = {"embed": (VOCAB, EMBED), "layers": {name: (LAYERS, *size) for name, size in sizes.items()}}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P(*[None] * (len(s) - 2), "fsdp"))),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def layer(x, p):
        q, k, v = jnp.split((x @ whole(p["qkv"])).reshape(*x.shape[:2], HEADS, -1), 3, -1)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = constrain(x + y @ whole(p["o"]), batch)
        return constrain(x + jax.nn.silu(x @ whole(p["up"])) @ whole(p["down"]), batch), None

    def loss(params, tokens):
        table = whole(params["embed"])
        x, _ = jax.lax.scan(jax.checkpoint(layer), constrain(table[tokens[:, :-1]], batch), params["layers"])
        logits = (x @ table.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(params, moments, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    everywhere = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda p: p.sharding, params)
    moments = jax.eval_shape(optimizer.init, params)
    of_moments = optax.tree_map_params(
        optimizer, lambda _, s: s, moments, shardings, transform_non_params=lambda _: everywhere
    )
    tokens = jax.ShapeDtypeStruct((2 * mesh.size, SEQ + 1), jnp.int32)
    step = jax.jit(
        step,
        in_shardings=(shardings, of_moments, NamedSharding(mesh, P(batch))),
        out_shardings=(shardings, of_moments, everywhere),
        donate_argnums=(0, 1),
    )
    return step.lower(params, moments, tokens).compile().as_text()


@pytest.fixture
def abroad(monkeypatch):
    """Sets the environment of such compilations, and turns the compilation cache off: their entries cannot be read
    back."""
    for name, value in topology.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def describe(name: str, num_slices: int = 1) -> topology.Topology:
    try:
        return topology.describe(name, num_slices)
    except ConfigError as e:
        if "not installed" in str(e):
            pytest.skip(str(e))
        raise


def fsdp_rows(name: str, num_slices: int = 1) -> tuple[str, dict]:
    machine = describe(name, num_slices)
    mesh = Mesh(np.array(machine.devices).reshape(num_slices, -1), ("data", "fsdp"))
    text = fsdp_step(mesh)
    found = [c for c in hlo.collectives(text, dict(mesh.shape), num_slices) if c.bytes > 4096]  # not norms and losses
    assert all(None not in c.trips for c in found)
    return text, {(row.kind, row.axes, row.in_layers): row for row in hlo.summary(found, LAYERS)}


WEIGHTS = EMBED * (3 * EMBED + EMBED + 2 * MLP)  # of one layer
GATHERED = LAYERS * WEIGHTS


@pytest.mark.slow
@pytest.mark.usefixtures("abroad")
def test_fsdp_on_a_ring_of_tpus():
    text, rows = fsdp_rows("v5e:2x4")
    table = 2 * VOCAB * EMBED
    assert {key: (row.executions, row.bytes) for key, row in rows.items()} == {
        ("all-gather", ("fsdp",), True): (2 * 4 * LAYERS, 2 * 2 * GATHERED),  # weights in bf16, forward and backward
        ("reduce-scatter", ("fsdp",), True): (LAYERS, 2 * GATHERED),  # a layer's gradients are combined
        ("all-gather", ("fsdp",), False): (1, table),
        ("reduce-scatter", ("fsdp",), False): (1, table),  # the embedding's gradient as output table
        ("all-reduce", ("fsdp",), False): (1, table),  # and as input table: XLA adds the two unsharded
    }
    assert [(loop.trips, loop.depth) for loop in hlo.loops(text)] == [(LAYERS, 0)] * 2
    assert hlo.Shape("f32", (2, SEQ, VOCAB), True) in hlo.shapes(text)


@pytest.mark.slow
@pytest.mark.usefixtures("abroad")
@pytest.mark.parametrize("name", ["v5p:2x2x4", "v6e:4x4"])
def test_fsdp_on_a_torus_of_tpus(name):
    """A reduce-scatter over several axes of the network becomes an all-reduce, which is recognized by its use."""
    _, rows = fsdp_rows(name)
    assert {key: (row.executions, row.bytes) for key, row in rows.items()} == {
        ("all-gather", ("fsdp",), True): (2 * 4 * LAYERS, 2 * 2 * GATHERED),
        ("all-reduce", ("fsdp",), True): (LAYERS, 2 * GATHERED),
        ("all-gather", ("fsdp",), False): (1, 2 * VOCAB * EMBED),
        ("all-reduce", ("fsdp",), False): (2, 2 * 2 * VOCAB * EMBED),
    }
    gradients = rows["all-reduce", ("fsdp",), True]
    assert gradients.sliced == gradients.bytes
    assert gradients.sent == 2 * gradients.bytes * 15 // 16


@pytest.mark.slow
@pytest.mark.usefixtures("abroad")
def test_fsdp_on_two_slices_of_tpus():
    """The compiler peels one layer off the backward loop, to overlap the transfers between the slices."""
    text, rows = fsdp_rows("v5e:2x4", num_slices=2)
    assert [loop.trips for loop in hlo.loops(text)] == [LAYERS, LAYERS - 1]
    parts = {}
    for (kind, axes, _), row in rows.items():
        assert row.crosses_slices == (axes == ("data",))
        parts[kind, axes] = parts.get((kind, axes), 0) + row.bytes
    table = 2 * VOCAB * EMBED
    assert parts == {
        ("all-gather", ("fsdp",)): 2 * 2 * GATHERED + 2 * table,  # one more is for the embedding's gradient
        ("reduce-scatter", ("fsdp",)): 2 * GATHERED + 2 * table,
        ("all-reduce", ("data",)): (2 * GATHERED + 2 * table) // 8,  # only the shards go between slices
    }


@pytest.mark.slow
@pytest.mark.usefixtures("abroad")
def test_fsdp_on_gpus():
    _, rows = fsdp_rows("h100:8")
    in_layers = {kind: row for (kind, _, inside), row in rows.items() if inside}
    assert set(in_layers) == {"all-gather", "reduce-scatter"}
    assert in_layers["all-gather"].executions == 2 * LAYERS  # the weights of a layer are gathered together
    assert in_layers["reduce-scatter"].executions == LAYERS
    assert in_layers["reduce-scatter"].bytes == 2 * GATHERED
    assert in_layers["all-gather"].bytes >= 2 * 2 * GATHERED  # some are gathered as f32 and converted afterwards
    assert {axes for _, axes, _ in rows} == {("fsdp",)}


@pytest.mark.slow
@pytest.mark.usefixtures("abroad")
def test_fsdp_on_two_nodes_of_gpus():
    _, rows = fsdp_rows("h100:8", num_slices=2)
    gradients = rows["all-reduce", ("data", "fsdp"), True]
    assert (gradients.executions, gradients.bytes, gradients.crosses_slices) == (LAYERS, 2 * GATHERED, True)
    gathers = rows["all-gather", ("fsdp",), True]
    assert (gathers.executions, gathers.crosses_slices) == (2 * LAYERS, False)
