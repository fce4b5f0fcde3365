"""Which mesh, remat policy and microbatch are fastest on a machine: many are estimated, the best compiled.

The estimate only chooses which candidates to compile, and in which order; every plan returned was compiled and fits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from trainer import sharding
from trainer.config import Config, check_divisible
from trainer.errors import ConfigError
from trainer.planning import plan
from trainer.planning.topology import Topology
from trainer.reporting import flops
from trainer.state import Program

REMATS = ("none", "dots", "full")
ROOM = 0.9  # the share of a device's memory for parts that can be counted; the rest is for temporary arrays


def search(
    config: Config, topology: Topology, compile_at_most: int, progress: Callable[[str], None]
) -> list[plan.StepPlan]:
    """Plans that fit, fastest first. The batch of a step does not change; the number of microbatches may."""
    best: dict[tuple, tuple[float, int, Config]] = {}  # for each mesh and policy: the fastest microbatch size
    for candidate in candidates(config, topology):
        seconds = estimate(candidate, topology)
        if seconds is not None:
            key, rows = (candidate.mesh, candidate.model.remat), _rows(candidate)
            best[key] = min(
                best.get(key, (seconds, -rows, candidate)), (seconds, -rows, candidate), key=lambda e: e[:2]
            )
    estimated = sorted(best.values(), key=lambda entry: entry[:2])
    progress(f"{len(estimated)} meshes and policies may fit {topology.name}; compiling the best {compile_at_most}")
    plans: list[plan.StepPlan] = []
    for _, _, candidate in estimated[:compile_at_most]:
        found = plan.make(candidate, topology)
        result = f"{found.peak / 2**30:.1f} GiB" + ("" if found.fits else ", does not fit")
        progress(f"  {_name(candidate)}: {result}, compiled in {found.compile_s:.0f} s")
        if found.fits:
            plans.append(found)
    return sorted(plans, key=lambda p: (p.step_s, p.peak))


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Every mesh that the model allows (powers of two along fsdp and tensor), with each remat policy and microbatch."""
    devices, context = len(topology.devices), max(config.mesh.context, 1)
    for tensor in _powers_of_two(topology.chip.host):
        for fsdp in _powers_of_two(devices // topology.num_slices):
            data, rest = divmod(devices, tensor * fsdp * context)
            if rest or not data or data % topology.num_slices:
                continue
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
            for remat in REMATS:
                model = dataclasses.replace(config.model, remat=remat)
                for rows in _powers_of_two(64):
                    parts, rest = divmod(config.global_batch_size, rows * data * fsdp)
                    if rest:
                        continue
                    try:
                        candidate = dataclasses.replace(config, mesh=mesh, model=model, grad_accum_steps=parts)
                        check_divisible(candidate, mesh.sizes())
                    except ValueError:
                        continue
                    yield candidate


def estimate(config: Config, topology: Topology) -> float | None:
    """A lower bound of the seconds of a step, by arithmetic only; None if it cannot fit."""
    try:
        program = Program(config, sharding.make_mesh(config, topology.devices))
    except ConfigError:
        return None
    memory = plan.memory_by_part(program, topology)
    if sum(memory.values()) > ROOM * topology.chip.memory:
        return None
    mesh, chip, model = program.mesh.shape, topology.chip, config.model
    tokens = config.tokens_per_step / program.mesh.size * mesh["tensor"]  # a group of tensor devices shares its tokens
    itemsize = jnp.dtype(model.dtype).itemsize

    def ring(*axes: str) -> float:
        devices = math.prod(mesh[axis] for axis in axes)
        return (devices - 1) / devices

    residual = model.num_layers * tokens * model.embed_dim * itemsize
    weights = flops.matmul_params(config) / mesh["tensor"]
    summed = program.partitioner.sums_dtype(model.dtype).itemsize
    sent = {
        # In each microbatch, weights are gathered forward and backward, and gradients are scattered.
        "fsdp": (2 * itemsize + summed) * weights * ring("fsdp", "context") * config.grad_accum_steps,
        "tensor": (4 if model.remat == "none" else 6) * 2 * residual * ring("tensor"),
        # Once per step, each device sums the gradients of its shard over the replicas.
        "data": 2 * summed * params_of_a_device(program) * ring("data"),
    }
    flash = program.partitioner.kernel != "xla"
    compute = config.tokens_per_step / program.mesh.size * flops.hardware_flops_per_token(config, flash=flash)
    seconds = [compute / chip.flops, plan.traffic(program) / chip.hbm]
    seconds += [
        n / (chip.slow if axis == "data" and topology.num_slices > 1 else chip.fast) for axis, n in sent.items()
    ]
    return max(seconds)


def params_of_a_device(program: Program) -> int:
    return sum(math.prod(p.sharding.shard_shape(p.shape)) for p in jax.tree.leaves(program.params))


def table(plans: list[plan.StepPlan]) -> str:
    """The plans as a Markdown table, in their order."""
    lines = [
        "| data x fsdp x context x tensor | remat | rows a device | grad_accum_steps | GiB | "
        "tokens/s a device at best | MFU | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        limit = max(p.seconds, key=lambda name: p.seconds[name])
        per_device = p.config.tokens_per_step / p.step_s / p.devices
        lines.append(
            f"| {' x '.join(str(n) for n in p.mesh.values())} | {p.config.model.remat} | {_rows(p.config)} | "
            f"{p.config.grad_accum_steps} | {p.peak / 2**30:.1f} | {per_device:,.0f} | {100 * p.mfu:.0f} % | {limit} |"
        )
    return "\n".join(lines)


def _rows(config: Config) -> int:
    return config.global_batch_size // config.grad_accum_steps // (config.mesh.data * config.mesh.fsdp)


def _name(config: Config) -> str:
    sizes = " x ".join(f"{name} {size}" for name, size in config.mesh.sizes().items() if size > 1)
    return f"{sizes or 'one device'}, remat {config.model.remat}, {_rows(config)} sequence(s) a device"


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(int(math.log2(most)) + 1)]
