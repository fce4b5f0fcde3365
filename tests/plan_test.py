"""Plans compile the real step for machines that are not here; these tests check what its program contains.

The compiling tests are slow and need the extra `plan`; `make test-plans` runs them in an environment that has it.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import plans
from tests import runs
from trainer import chips, sharding
from trainer.config import Config, from_dict
from trainer.errors import ConfigError
from trainer.planning import hlo, plan, topology
from trainer.sampling import fast_params, make_generator

LAYERS, VOCAB, ROWS, SEQ_LEN, CHUNK = 4, 5056, 4, 512, 256
MODEL = {
    "vocab_size": VOCAB, "max_seq_len": SEQ_LEN, "num_layers": LAYERS, "embed_dim": 512, "num_heads": 8,
    "num_kv_heads": 4, "mlp_dim": 1024, "dtype": "bfloat16", "remat": "full", "tie_embeddings": False,
}  # fmt: skip
LAYER_PARAMS = 2 * 512 * 64 * (8 + 4) + 3 * 512 * 1024

tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='no libtpu; pip install -e ".[plan]"')
gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None if importlib.util.find_spec("jax_plugins") else True,
    reason='no CUDA plugin; pip install -e ".[plan]"',
)


def config(devices: int, mesh: dict, documents: bool = False, **top) -> Config:
    model = MODEL | top.pop("model", {})
    data = {"seq_len": SEQ_LEN} | ({"mask_documents": True, "eos_id": 0} if documents else {})
    shards = devices // (mesh.get("tensor", 1) * mesh.get("context", 1))
    return from_dict(
        {
            "global_batch_size": ROWS * shards, "loss_chunk_tokens": CHUNK, "data": data,
            "model": model, "mesh": mesh, **top,
        }
    )  # fmt: skip


# As in Gemma 3: the layers differ, so the loop runs over turns of two layers.
WINDOWED = (("window", 128), ("layer_pattern", ("local", "global")), ("local_rope_theta", 5e3), ("qk_norm", "head"),
            ("norm_at", "both"))  # fmt: skip


@functools.cache
def compiled(
    name: str, num_slices: int, mesh: tuple, model: tuple = ()
) -> tuple[plan.Program, jax.stages.Compiled, str]:
    machine = topology.describe(name, num_slices)
    axes = dict(mesh) | {"num_slices": num_slices}
    cfg = config(len(machine.devices), axes, documents=axes.get("context", 1) > 1, model=dict(model))
    program, lowered = plan.lower(cfg, machine.devices)
    executable = lowered.compile()
    return program, executable, executable.as_text()


FSDP = (("data", 1), ("fsdp", 8))


def found(name: str, num_slices: int = 1, mesh: tuple = FSDP, model: tuple = ()) -> list[hlo.Collective]:
    program, _, text = compiled(name, num_slices, mesh, model)
    return hlo.collectives(text, dict(program.mesh.shape), num_slices)


def in_layers(collectives: list[hlo.Collective], kind: str, trips: int = LAYERS) -> list[hlo.Collective]:
    return [c for c in collectives if c.kind == kind and set(c.trips) & {trips, trips - 1}]


def of_gradients(collectives: list[hlo.Collective]) -> list[hlo.Collective]:
    """All-reduces of matrices: not of scalars, nor of norms' scales, which the TPU's compiler does not gather."""
    return [c for c in collectives if c.kind == "all-reduce" and c.bytes > 2 * 4 * MODEL["embed_dim"]]


@gpu
@pytest.mark.slow
def test_fsdp_on_gpus_gathers_twice_and_scatters_once_a_layer():
    collectives = found("h100:8")
    gathers, scatters = (in_layers(collectives, kind) for kind in ("all-gather", "reduce-scatter"))
    large = [c for c in gathers if c.bytes > 10_000]
    assert sum(c.count for c in large) == 2 * LAYERS  # forward and backward, all weights of a layer combined
    assert all(c.axes == ("fsdp",) and c.dtype in ("bf16", "bf16+f32") for c in large)
    assert sum(c.count * c.bytes for c in gathers) < 1.01 * 2 * LAYERS * 2 * LAYER_PARAMS
    # One reduce-scatter per layer sums the gradients of matrices and norms, in float32.
    assert {c.dtype for c in scatters} == {"f32"} and sum(c.count for c in scatters) == LAYERS
    assert sum(c.count * c.bytes for c in scatters) == LAYERS * 4 * (LAYER_PARAMS + 2 * 512)
    assert not of_gradients(collectives)
    assert any("fmha" in name for name in hlo.custom_calls(compiled("h100:8", 1, FSDP)[2])), "no flash attention"


@tpu
@pytest.mark.slow
def test_fsdp_on_a_tpu_gathers_weights_of_one_layer_in_bfloat16():
    collectives = found("v5e:2x4")
    gathers = in_layers(collectives, "all-gather")
    weights = [c for c in gathers if c.dtype == "bf16"]
    assert sum(c.count for c in weights) == 2 * 7 * LAYERS  # seven matrices, forward and backward
    assert sum(c.count * c.bytes for c in weights) == 2 * LAYERS * 2 * LAYER_PARAMS
    assert sum(c.count * c.bytes for c in gathers if c.dtype != "bf16") <= 2 * LAYERS * 2 * 4 * 512  # norms
    # Each sum of gradients is a reduce-scatter, or an all-reduce of which each device uses only its own shard.
    scatters = in_layers(collectives, "reduce-scatter")
    sums = [c for c in of_gradients(collectives) if set(c.trips) & {LAYERS, LAYERS - 1}]
    assert all(c.sliced == c.bytes for c in sums)
    assert {c.dtype for c in scatters + sums} == {"f32"}
    assert sum(c.count * c.bytes for c in scatters + sums) == pytest.approx(LAYERS * 4 * LAYER_PARAMS, rel=0.01)
    assert not in_layers(collectives, "collective-permute"), (
        "the products were cut into rings; see trainer/xla_options.py"
    )


@tpu
@pytest.mark.slow
def test_a_tpu_runs_splash_attention_in_loops_over_the_layers():
    text = compiled("v5e:2x4", 1, FSDP)[2]
    calls = hlo.custom_calls(text)
    assert any("splash" in name and "fwd" in name for name in calls), calls
    assert any("splash" in name and "dkv" in name for name in calls), calls
    trips = [loop.trips for loop in hlo.loops(text) if loop.depth == 0]
    assert sum(t in (LAYERS, LAYERS - 1) for t in trips) == 2, trips  # forward and backward
    assert ROWS * SEQ_LEN // CHUNK in trips  # the loss


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernel"), [
    pytest.param("v5e:2x4", "splash", marks=tpu), pytest.param("h100:8", "fmha", marks=gpu),
])  # fmt: skip
def test_a_family_with_windows_has_the_same_structure(name, kernel):
    """The loop runs over turns of two layers, weights are gathered twice a layer, in bfloat16, and local layers have a
    flash kernel too: there are no scores of all pairs of positions."""
    _, _, text = compiled(name, 1, FSDP, WINDOWED)
    turns = LAYERS // 2
    trips = [loop.trips for loop in hlo.loops(text) if loop.depth == 0]
    assert sum(t in (turns, turns - 1) for t in trips) >= 2, trips  # forward and backward
    plain = compiled(name, 1, FSDP)[2]
    windowed_calls, calls = (
        sum(n for call, n in hlo.custom_calls(program).items() if kernel in call) for program in (text, plain)
    )
    assert windowed_calls >= 2 * calls > 0, "local and global layers each have a kernel, forward and backward"
    weights = [c for c in in_layers(found(name, 1, FSDP, WINDOWED), "all-gather", turns) if c.bytes > 10_000]
    assert {c.axes for c in weights} == {("fsdp",)} and {c.dtype for c in weights} <= {"bf16", "bf16+f32"}
    assert sum(c.count * c.bytes for c in weights) == pytest.approx(2 * LAYERS * 2 * LAYER_PARAMS, rel=0.02)
    scores = ROWS * MODEL["num_heads"] * SEQ_LEN**2
    assert max(math.prod(shape.dims) for shape in hlo.shapes(text)) < scores


@tpu
@pytest.mark.slow
def test_two_slices_send_each_other_their_parts_of_the_gradients_and_nothing_else():
    mesh = (("data", 2), ("fsdp", 4))
    collectives = found("v5e:2x2", 2, mesh)
    crossing = [c for c in collectives if c.crosses_slices]
    assert crossing and all(c.axes[0] == "data" for c in crossing)
    assert all(not c.trips for c in crossing), "more than once a step"
    gathers = in_layers(collectives, "all-gather")
    assert gathers and all(c.axes == ("fsdp",) and not c.crosses_slices for c in gathers)
    program = compiled("v5e:2x2", 2, mesh)[0]
    whole = 4 * sum(p.size for p in jax.tree.leaves(program.params))
    assert sum(c.count * c.bytes for c in crossing) < 1.1 * whole / 4


CASES = [
    pytest.param("h100:8", 1, FSDP, marks=gpu),
    pytest.param("v5e:2x4", 1, FSDP, marks=tpu),
    pytest.param("v5e:2x4", 1, (("data", 2), ("context", 2), ("tensor", 2)), marks=tpu),
    pytest.param("v5e:2x2", 2, (("data", 2), ("fsdp", 4)), marks=tpu),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_slices", "mesh"), CASES)
def test_no_logits_of_all_tokens_and_the_state_is_donated(name, num_slices, mesh):
    """Tests several meshes, with the platform's flash kernel. The one with a context axis also masks documents."""
    program, executable, text = compiled(name, num_slices, mesh)
    shape = program.mesh.shape
    tokens = ROWS * SEQ_LEN // shape["context"]
    columns = program.config.model.padded_vocab_size // shape["tensor"]
    logits = [s for s in hlo.shapes(text) if columns in s.dims and math.prod(s.dims) >= tokens * columns]
    assert not logits
    assert any(columns in s.dims and math.prod(s.dims) == CHUNK * columns for s in hlo.shapes(text)), (
        "nothing was looked at"
    )
    calls = " ".join(hlo.custom_calls(text))
    assert "fmha" in calls if name.startswith("h100") else "splash" in calls
    memory = executable.memory_analysis()
    batch = 4 + sum(  # 4 bytes are the seed
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(program.abstract_batch(np.uint16))
    )
    assert memory.argument_size_in_bytes - memory.alias_size_in_bytes <= 64 * 1024 + batch  # arguments are padded


def by_command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", *argv], cwd=runs.ROOT, capture_output=True, text=True, timeout=900
    )


SMALL = ("--config=configs/llama.py", "--config.model.embed_dim=512", "--config.model.mlp_dim=1024",
         "--config.model.num_heads=4", "--config.grad_accum_steps=1", "--config.model.vocab_size=1024")  # fmt: skip


@tpu
@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_answered_with_the_largest_that_does():
    """The layers keep 8 GiB per row, and a device has 15.75 GiB: two rows are refused, and one fits."""
    large = ("--config.model.num_layers=256", "--config.data.seq_len=32768", "--config.global_batch_size=16")
    result = by_command(*SMALL, *large, "--topology=v5e:2x4", "--json")
    assert result.returncode == 1, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert not answer["fits"] and answer["peak_bytes"] > answer["usable_bytes"]
    assert answer["largest_batch"] == 8


@tpu
@pytest.mark.slow
def test_search_ranks_what_it_compiled():
    sizes = ("--config.model.num_layers=2", "--config.data.seq_len=512", "--config.global_batch_size=16")
    result = by_command(*SMALL, *sizes, "--topology=v5e:2x2", "--search", "--candidates=2", "--json")
    assert result.returncode == 0, result.stderr
    ranked = json.loads(result.stdout.splitlines()[-1])
    assert ranked and all(p["fits"] for p in ranked)
    rates = [p["tokens_per_step"] / p["step_s_at_best"] for p in ranked]
    assert rates == sorted(rates, reverse=True)


# One of each kind of machine; `make plans` compiles the rest, and their digests are compared below.
SMALLEST = [
    pytest.param("gpt2:124m-one", "h100:1", marks=gpu),
    pytest.param("llama:1b-one", "h200:1", marks=gpu),
    pytest.param("llama:1b", "v5p:2x2x2", marks=tpu),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "machine"), SMALLEST)
def test_the_recorded_plan_is_what_is_compiled_now(name, machine):
    (recorded,) = [p for p in json.loads(plans.FILE.read_text()) if (p["recipe"], p["topology"]) == (name, machine)]
    made = plans.make(name, machine, 1)
    assert made["fits"]
    for key in ("mesh", "attention", "num_params", "tokens_per_step", "usable_bytes", "model_flops"):
        assert made[key] == recorded[key], key
    assert made["beside_bytes"].keys() == {"evaluation", "sampling"}
    assert max(made["beside_bytes"].values()) <= made["peak_bytes"], "a run would end at its first evaluation"
    for part in ("parameters", "optimizer", "gradients", "activations"):
        assert made["memory"][part] == recorded["memory"][part], part
    if made["jax"] == recorded["jax"]:  # another compiler chooses other layouts and overlaps
        assert made["peak_bytes"] == pytest.approx(recorded["peak_bytes"], rel=0.02)
        assert made["step_s_at_best"] == pytest.approx(recorded["step_s_at_best"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [pytest.param("v5e:1x1", marks=tpu), pytest.param("h100:1", marks=gpu)])
def test_generation_reads_int8_weights_as_they_are(machine):
    """The loop over tokens has no copy of the weights in another dtype, which would cost more than int8 saves."""
    cfg = config(1, {"data": 1, "fsdp": 1}, model={"num_layers": 2, "vocab_size": 32768})
    program = plan.Program(cfg, sharding.make_mesh(cfg, topology.describe(machine).devices[:1]))
    rounded = jax.eval_shape(functools.partial(fast_params, config=cfg.model, int8=True), program.params)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=program.replicated), rounded)
    weights = sum(math.prod(a.shape) for a in jax.tree.leaves(arguments) if a.dtype == "int8")
    loop = make_generator(program).lower(arguments, rows=8, wanted=64).compile()
    assert weights > 2**25 and loop.memory_analysis().temp_size_in_bytes < weights / 2


def test_the_parts_of_memory_are_those_of_the_shapes():
    """The step is lowered for the CPU's own devices; nothing is compiled."""
    cfg = config(8, {"data": 1, "fsdp": 4, "tensor": 2}, model={"remat": "full"})
    chip = chips.CHIPS["v5e"]
    machine = topology.Topology("v5e:2x4", chip, jax.devices(), 1)
    program, _ = plan.lower(cfg, machine.devices)
    memory = plan.memory_by_part(program, machine)
    norms = (2 * LAYERS + 1) * 512
    matrices = LAYERS * LAYER_PARAMS + 2 * program.config.model.padded_vocab_size * 512
    assert memory["parameters"] == memory["gradients"] == 4 * (matrices // 8 + norms // 4)
    assert memory["optimizer"] == 2 * memory["parameters"] + 4  # 4 bytes are Adam's count of steps
    # Under full remat each layer keeps its input, in bf16. The embedding's result and what the norm keeps are added.
    inputs = LAYERS * ROWS * SEQ_LEN * 512 * 2
    assert inputs <= memory["activations"] <= 2.5 * inputs


def test_activations_that_remat_keeps_are_fewer():
    kept = {}
    for remat in ("none", "dots", "full"):
        cfg = config(8, {"data": 1, "fsdp": 8}, model={"remat": remat})
        program, _ = plan.lower(cfg, jax.devices())
        kept[remat] = plan.kept_activations(program, jax.devices()[0])
    assert kept["none"] > kept["dots"] > kept["full"]


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (["--topology=v5e:4x4"], 2, ["--config is missing"]),
        (["--config=configs/llama.py"], 2, ["--topology is missing", "v5p:4x4x4"]),
        (["--config=configs/llama.py", "--topology=v7:4x4"], 2, ["'v7'", "v5e:16x16", "h100:8"]),
        (["--config=configs/llama.py", "--topology=v5e:5x5"], 2, ["v5e:5x5", "4x4"]),
    ],
)
def test_bad_input_is_one_line(argv, code, parts):
    result = by_command(*argv)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in parts), line


@tpu
@pytest.mark.slow
def test_a_mesh_that_the_machine_does_not_have_is_one_line():
    result = by_command(*SMALL, "--topology=v5e:2x4", "--config.mesh.fsdp=4", "--config.mesh.data=1")
    assert result.returncode == 2
    assert "mesh.data = 1 x mesh.fsdp = 4" in result.stderr.splitlines()[-1] and "8 devices" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is here")
def test_a_missing_compiler_is_named_with_what_to_install():
    result = by_command("--config=configs/llama.py", "--topology=v5e:4x4")
    assert result.returncode == 2 and '".[plan]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_another_refusal_than_memory_is_an_error():
    with pytest.raises(ConfigError, match="refuses this step: INTERNAL"):
        plan._out_of_memory(RuntimeError("INTERNAL: no idea"), 100)
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: (64.15G) exceeds available HBM (15.75G)"
    assert plan._out_of_memory(RuntimeError(text), 100) == int(64.15 * 2**30)
    assert plan._out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm"), 100) == int(20.5 * 2**30)


def test_recorded_plans_cover_every_recipe_for_accelerators():
    recorded = json.loads(plans.FILE.read_text())
    assert [(p["recipe"], p["topology"], p["num_slices"]) for p in recorded] == list(plans.PLANS)
    assert all(p["fits"] for p in recorded)
    assert all(p["beside_bytes"]["evaluation"] <= p["peak_bytes"] for p in recorded)
    assert os.path.getsize(plans.FILE) < 100_000


@pytest.mark.parametrize("name", plans.FAMILIES)
def test_headers_of_recipes_are_those_of_the_recorded_plans(name):
    """If a recipe has changed since its plan was recorded, run `make plans`."""
    recorded = json.loads(plans.FILE.read_text())
    for p in recorded:
        if p["recipe"].split(":")[0] == name:
            assert p["digest"] == plans.digest(p["recipe"]), f"{p['recipe']} changed since its plan: make plans"
    text = (runs.ROOT / "configs" / f"{name}.py").read_text()
    assert plans.header(name, recorded) in text


def test_the_roofline_is_the_slowest_part():
    p = plan.StepPlan(
        from_dict({"num_train_steps": 3600}), "v5e:2x2", 1, 4, {}, "xla", 10, 100, 50, {}, [], model_flops=3e12,
        hardware_flops=4e12, seconds={"compute": 2.0, "memory": 1.0, "fast network, fsdp": 4.0}, compile_s=0.0,
    )  # fmt: skip
    assert p.fits and p.step_s == 4.0 and p.hours == 4.0
    assert p.mfu == pytest.approx(3e12 / (2e12 * 4.0))
    assert not dataclasses.replace(p, peak=101).fits
    assert dataclasses.replace(p, beside={"evaluation": 100}).fits
    assert not dataclasses.replace(p, beside={"evaluation": 101, "sampling": 3}).fits


def test_what_runs_beside_the_steps_is_lowered_as_the_run_does_it():
    """The programs are lowered but not compiled."""
    cfg = config(8, {"data": 1, "fsdp": 8}, grad_accum_steps=4)
    program, _ = plan.lower(cfg, jax.devices())
    beside = plan.lower_beside(program)
    batch = beside["evaluation"].in_avals[0][1]
    assert [(x.shape, x.dtype) for x in (batch.inputs, batch.targets, batch.loss_weights)] == [
        ((cfg.global_batch_size // 4, SEQ_LEN), dtype) for dtype in (np.uint16, np.uint16, np.bool_)
    ]
    # The cache of one text has room for the whole context.
    assert any(x.ndim == 4 and x.shape[:2] == (1, SEQ_LEN) for x in jax.tree.leaves(beside["sampling"].in_avals))
