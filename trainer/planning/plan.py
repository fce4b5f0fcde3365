"""What a train step costs on a machine that is not here: it is compiled for that machine, and its HLO is read.

The compiler tells whether the step fits, its peak of memory, and every collective with its bytes and axes; FLOPs and
parameters are counted. The step time is a roofline, a lower bound (`ASSUMPTIONS`), not a prediction.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import Batch
from model.config import ModelConfig
from trainer import sharding
from trainer.config import Config, MeshConfig
from trainer.errors import ConfigError
from trainer.evaluation import microbatch_rows
from trainer.finetuning import trainable
from trainer.parallel.partitioner import MeshPartitioner
from trainer.planning import hlo
from trainer.planning.topology import Topology
from trainer.reporting import flops
from trainer.sampling import make_generator
from trainer.state import Program
from trainer.step import forward, make_eval_step, make_train_step

ASSUMPTIONS = (
    "matrix products at the vendor's bf16 peak, memory and links at theirs; collectives of an axis overlap with "
    "compute and with those of other axes; whichever takes longest is the step"
)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The cost of a step. Bytes and FLOPs are those of one device; seconds are those of one step.

    Attributes:
      memory: bytes by part: parameters, optimizer, gradients, activations (kept for the backward pass), temporary (the
        rest of the peak). Only `peak` is the compiler's; the parts are counted from shapes, and activations are limited
        to what the peak allows.
      peak: the most bytes in use at one time in a step. If the compiler gave up because there is less memory, the bytes
        that it asked for; `collectives` is then empty.
      seconds: the roofline's seconds by limit: compute, memory, and each network by its axes.
      beside: the most bytes in use at one time in evaluation and in sampling, which run between steps; {} if a step
        does not fit.
    """

    config: Config
    topology: str
    num_slices: int
    devices: int
    mesh: dict[str, int]
    kernel: str
    num_params: int
    usable: int
    peak: int
    memory: dict[str, int]
    collectives: list[hlo.Row]
    model_flops: float
    hardware_flops: float
    seconds: dict[str, float]
    compile_s: float
    beside: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return max([self.peak, *self.beside.values()]) <= self.usable

    @property
    def step_s(self) -> float:
        return max(self.seconds.values())

    @property
    def sums_dtype(self) -> str:
        """The dtype in which devices sum gradients."""
        return str(jnp.promote_types(self.config.optimizer.gradients_dtype, self.config.model.dtype))

    @property
    def mfu(self) -> float:
        """The roofline's upper bound of MFU: model FLOPs / the FLOPs that the chip's peak allows in step_s."""
        return self.model_flops / self.hardware_flops * self.seconds["compute"] / self.step_s

    @property
    def hours(self) -> float:
        """Hours of the full run at the roofline's step time."""
        return self.step_s * self.config.num_train_steps / 3600


def lower(config: Config, devices: list[jax.Device]) -> tuple[Program, Any]:
    """The program and its lowered train step for `devices`, which may be absent. Raises ConfigError like make_mesh."""
    program = Program(config, sharding.make_mesh(config, devices))
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=program.replicated)
    return program, make_train_step(program).lower(program.state, program.abstract_batch(_dtype(config)), seed)


def _dtype(config: Config) -> Any:
    """The dtype of token files with this vocabulary."""
    return jnp.uint16 if config.model.vocab_size <= 1 << 16 else jnp.uint32


def lower_beside(program: Program) -> dict[str, Any]:
    """The lowered programs that run between steps: evaluation, and sampling from a prompt of one token, if the run
    does."""
    sample, batch = program.config.sample, sharding.named(program.mesh, "batch")
    rows = microbatch_rows(program.config, batch)
    evaluated = program.abstract_batch(_dtype(program.config), rows, masked=True)
    lowered = {"evaluation": make_eval_step(program).lower(program.params, evaluated)}
    if sample.max_new_tokens:
        generator = make_generator(program)
        lowered["sampling"] = generator.lower(program.params, rows=1, wanted=1 + sample.max_new_tokens)
    return lowered


def peaks_beside(program: Program, usable: int) -> dict[str, int]:
    """The most bytes in use in evaluation and in sampling, with the optimizer's state, which stays on the devices."""
    kept = _bytes_of_shards((program.state.opt_state, program.state.guard))
    peaks = {}
    for name, lowered in lower_beside(program).items():
        try:
            peaks[name] = kept + int(lowered.compile().memory_analysis().peak_memory_in_bytes)
        except jax.errors.JaxRuntimeError as e:
            peaks[name] = kept + _out_of_memory(e, usable)
    return peaks


def make(config: Config, topology: Topology) -> StepPlan:
    """Compiles the train step for `topology` and reads its HLO.

    Args:
      config: resolved: vocab_size and max_seq_len are set.

    Raises:
      ConfigError: the mesh does not fit the devices or the model, or the compiler fails for another reason than memory.
    """
    program, lowered = lower(config, topology.devices)
    chip, start = topology.chip, time.perf_counter()
    rows: list[hlo.Row] = []
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        peak = _out_of_memory(e, chip.memory)
    else:
        peak = int(compiled.memory_analysis().peak_memory_in_bytes)
        found = hlo.collectives(compiled.as_text(), dict(program.mesh.shape), topology.num_slices)
        rows = hlo.summary(found, config.model.num_layers)
    beside = peaks_beside(program, chip.memory) if peak <= chip.memory else {}
    compile_s = time.perf_counter() - start
    memory = memory_by_part(program, topology)
    # The compiler keeps fewer activations than autodiff lists, because it fuses some into the backward pass.
    state = sum(memory.values()) - memory["activations"]
    memory["activations"] = min(memory["activations"], max(0, peak - state))
    memory["temporary"] = max(0, peak - sum(memory.values()))
    share = config.tokens_per_step / program.mesh.size
    flash = program.partitioner.kernel != "xla"
    model_flops = share * flops.flops_per_token(config)
    hardware_flops = share * flops.hardware_flops_per_token(config, flash=flash)
    seconds = {"compute": hardware_flops / chip.flops, "memory": traffic(program) / chip.hbm}
    for row in rows:
        network, bandwidth = ("slow", chip.slow) if row.crosses_slices else ("fast", chip.fast)
        name = f"{network} network, {axes_of(row)}"
        seconds[name] = seconds.get(name, 0.0) + row.sent / bandwidth
    return StepPlan(
        config, topology.name, topology.num_slices, program.mesh.size, dict(program.mesh.shape),
        program.partitioner.kernel, program.num_params, chip.memory, peak, memory, rows, model_flops, hardware_flops,
        seconds, compile_s, beside,
    )  # fmt: skip


def axes_of(row: hlo.Row) -> str:
    return " x ".join(row.axes) or "unknown axes"


def _out_of_memory(error: Exception, usable: int) -> int:
    """The bytes that the compiler asked for when memory was too small. Raises ConfigError for any other failure."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text or "vmem" in text.lower():
        raise ConfigError(f"the compiler refuses this step: {text[:300]}") from error
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", text)
    number, unit = [g for g in found.groups() if g] if found else (0, "K")
    return max(int(float(number) * 1024 ** (1 + "KMGT".index(unit))), usable + 1)


def _bytes_of_shards(tree: Any) -> int:
    def one(x: Any) -> int:
        return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def memory_by_part(program: Program, topology: Topology) -> dict[str, int]:
    gradients = jax.tree.map(
        lambda p, where: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=where),
        program.part(program.params), program.part(program.moments),
    )  # fmt: skip
    return {
        "parameters": _bytes_of_shards(program.params),
        "optimizer": _bytes_of_shards(program.state.opt_state),
        "gradients": _bytes_of_shards(gradients),
        "activations": kept_activations(program, topology.devices[0]),
    }


def kept_activations(program: Program, device: jax.Device) -> int:
    """Bytes that the forward pass keeps on a device for the backward pass, without parameters.

    These are what jax.vjp closes over in a one-device model with the heads, feed-forward and sequence of a shard.
    """
    config, mesh = program.config, program.mesh.shape
    model, tensor = config.model, mesh["tensor"]
    local = dataclasses.replace(
        model, num_heads=model.num_heads // tensor, num_kv_heads=model.kv_heads // tensor, head_dim=model.head_size,
        mlp_dim=model.mlp_size // tensor,
    )  # fmt: skip
    seq_len = config.data.seq_len // mesh["context"]
    rows = config.global_batch_size // config.grad_accum_steps // sharding.batch_shards(mesh)
    one = dataclasses.replace(
        config, model=local, data=dataclasses.replace(config.data, seq_len=seq_len), grad_accum_steps=1,
        global_batch_size=rows, mesh=MeshConfig(data=1),
    )  # fmt: skip
    one_device = sharding.make_mesh(one, [device])
    partitioner = MeshPartitioner(one, one_device, gathers_params=program.partitioner.gathers_params)
    shard = Program(one, one_device, partitioner)

    def residuals(params: dict, batch: Batch) -> Any:
        def hidden(trained: dict) -> Any:
            return forward(shard, trainable.whole(params, trained), batch.widened()).hidden

        return jax.vjp(hidden, shard.part(params))[1]

    kept = jax.eval_shape(residuals, shard.params, shard.abstract_batch(jnp.int32))
    not_activations = {(p.shape, p.dtype) for p in jax.tree.leaves(shard.params)}
    leaves = [x for x in jax.tree.leaves(kept) if (x.shape, x.dtype) not in not_activations]
    return sum(x.size * x.dtype.itemsize for x in leaves)


def traffic(program: Program) -> float:
    """A rough lower bound of the bytes that a step moves between a device and its memory.

    The optimizer reads and writes trained parameters and moments, and reads gradients. Each pass over a layer (forward,
    backward, and forward again under remat) reads its weights in the compute dtype. Each residual stream and each
    hidden activation is written once and read once per pass.
    """
    config, mesh = program.config, program.mesh.shape
    model, itemsize = config.model, jnp.dtype(config.model.dtype).itemsize
    trained = _bytes_of_shards(program.part(program.params))
    state = 2 * _bytes_of_shards(program.state.opt_state) + 3 * trained
    passes = 3 if model.remat in ("full", "offload", "dots") else 2
    weights = flops.matmul_params(config) / mesh["tensor"] * itemsize * passes * config.grad_accum_steps
    tokens = config.tokens_per_step / (sharding.batch_shards(mesh) * mesh["context"])
    activations = tokens * model.num_layers * _widths(model, mesh["tensor"]) * itemsize * 2 * passes
    logits = 3 * 4 * tokens * model.padded_vocab_size / mesh["tensor"]
    return state + weights + activations + logits


def _widths(model: ModelConfig, tensor: int) -> float:
    """Elements that a token writes in a layer: norms and residuals, queries to attention's output, feed-forward."""
    heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_size
    hidden = (3 if model.gated else 2) * model.mlp_size
    return 4 * model.embed_dim + (heads + hidden) / tensor


def largest_batch(failed: StepPlan, topology: Topology, attempts: int = 3) -> StepPlan | None:
    """The plan with the largest batch that was found to fit, given a plan that does not; None if no batch was found.

    Memory that depends on the batch is proportional to it, so the first guess is close.
    """
    config, parts = failed.config, sharding.batch_shards(failed.mesh) * failed.config.grad_accum_steps
    rows = config.global_batch_size // parts
    fixed = sum(failed.memory[part] for part in ("parameters", "optimizer", "gradients"))
    guess = min(rows - 1, int(rows * (failed.usable - fixed) / max(failed.peak - fixed, 1)))
    best, too_many = None, rows
    for _ in range(attempts):
        if not 0 < guess < too_many or (best is not None and guess <= best.config.global_batch_size // parts):
            break
        plan = make(dataclasses.replace(config, global_batch_size=guess * parts), topology)
        if plan.fits:
            best, guess = plan, guess + 1
        else:
            too_many, guess = guess, guess - max(1, guess // 8)
    return best
