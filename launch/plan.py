"""Plan a run for machines that are not here: does it fit, what crosses which network, what is the best possible speed.

  python -m launch.plan --config=configs/llama.py:8b --topology=v5p:4x4x4 [--num_slices=2] [--json] [--search]

The real train step, evaluation and sampling are compiled for the named TPU slices or GPU nodes, on any computer,
without an account or an accelerator. It needs the compilers: pip install -e ".[plan]". No dataset is read:
model.vocab_size is the recipe's, or 50,304.

Exit codes: 0 it fits, 1 it does not (the largest batch that fits is printed), 2 configuration.
"""

import dataclasses
import json
from typing import Any

from absl import flags

from launch import cli, environment
from model.config import ModelConfig
from trainer.config import complete_without_dataset
from trainer.errors import ConfigError
from trainer.planning import topology

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "Slice or node, as v5p:4x4x4, v6e:16x16 or h100:8.")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices, or GPU nodes, joined by a slow network.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object, and nothing else on stdout.")
SEARCH = flags.DEFINE_bool("search", False, "Also compile other meshes, remat policies and batches, and rank them.")
CANDIDATES = flags.DEFINE_integer("candidates", 6, "The most programs that --search compiles, at a minute or two each.")

MIB, GIB = 2**20, 2**30


def main() -> int:
    if not TOPOLOGY.value:
        raise ConfigError("--topology is missing; name a machine, for example --topology=v5p:4x4x4")
    config = complete_without_dataset(cli.config_from(CONFIG.value))
    topology.parse(TOPOLOGY.value, NUM_SLICES.value)
    topology.prepare_environment()
    environment.load_jax()
    from trainer.planning import plan, search

    machine = topology.describe(TOPOLOGY.value, NUM_SLICES.value)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, num_slices=NUM_SLICES.value))
    if SEARCH.value:
        found = search.search(config, machine, CANDIDATES.value, progress=lambda line: cli.log.info("%s", line))
        if not found:
            raise ConfigError(f"nothing that --search tried fits {TOPOLOGY.value}; choose a larger slice")
        print(json.dumps([as_json(p) for p in found]) if JSON.value else search.table(found))
        return 0
    planned = plan.make(config, machine)
    smaller = None if planned.fits else plan.largest_batch(planned, machine)
    if JSON.value:
        print(json.dumps(as_json(planned) | {"largest_batch": smaller.config.global_batch_size if smaller else None}))
    else:
        print(format_plan(planned))
        if not planned.fits:
            print(advice(planned, smaller))
    return 0 if planned.fits else 1


def format_plan(plan: Any) -> str:
    """The plan for people."""
    from trainer import sharding
    from trainer.planning.plan import ASSUMPTIONS
    from trainer.reporting import flops

    config, model = plan.config, plan.config.model
    slices = f"{plan.num_slices} x " if plan.num_slices > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    rows = config.global_batch_size // config.grad_accum_steps // sharding.batch_shards(plan.mesh)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{slices}{plan.topology}: {plan.devices} devices, mesh {mesh}",
        f"model     {plan.num_params:,} parameters, {model.dtype}, attention {plan.kernel}, remat {model.remat}",
        f"batch     {config.global_batch_size} x {config.data.seq_len} = {config.tokens_per_step:,} tokens per step, "
        f"{rows} sequence(s) on a device at a time, {config.grad_accum_steps} microbatch(es)",
        f"memory    {verdict}: {plan.peak / GIB:.2f} GiB at most of {plan.usable / GIB:.2f} usable on each device",
        *(f"          {part:<12}{size / GIB:9.3f} GiB" for part, size in plan.memory.items()),
        *(f"          in {name:<12}{size / GIB:6.3f} GiB at most" for name, size in plan.beside.items()),
    ]
    if plan.collectives:
        sums = f"sums of gradients in {plan.sums_dtype}"
        lines.append(f"network   collectives of each device in a step; {sums}")
        lines += [f"          {_collective(row, model)}" for row in plan.collectives]
    lines.append(
        f"flops     {plan.model_flops / 1e12:.2f} T per device and step by {flops.FORMULA}; "
        f"{plan.hardware_flops / 1e12:.2f} T with recomputation, and without what the kernel skips"
    )
    lines.append(f"roofline  {ASSUMPTIONS}")
    lines += [f"          {name:<32}{seconds * 1e3:10.1f} ms" for name, seconds in plan.seconds.items()]
    if plan.fits:
        per_device = config.tokens_per_step / plan.step_s / plan.devices
        lines.append(
            f"at best   {plan.step_s * 1e3:.1f} ms per step, {per_device:,.0f} tokens/s per device, "
            f"MFU {100 * plan.mfu:.0f} %; {config.num_train_steps:,} steps in {plan.hours:,.1f} h = "
            f"{plan.hours * plan.devices:,.0f} device hours"
        )
    return "\n".join(lines)


def _collective(row: Any, model: ModelConfig) -> str:
    from trainer.planning.plan import axes_of

    outside = "outside of layers" if model.scan_layers else "in all"  # unrolled layers cannot be distinguished
    often = f"{row.executions / model.num_layers:g} per layer" if row.in_layers else f"{row.executions} {outside}"
    across = ", across slices" if row.crosses_slices else ""
    kept = f", {row.sliced / MIB:,.1f} of them to keep a shard" if row.sliced else ""
    return (
        f"{row.kind:<19}{axes_of(row):<16}{often:<20}{row.bytes / row.executions / MIB:10,.1f} MiB each, "
        f"{row.sent / MIB:10,.1f} sent per step{across}{kept}"
    )


def advice(plan: Any, smaller: Any) -> str:
    config = plan.config
    if smaller is not None:
        return (
            f"fits with --config.global_batch_size={smaller.config.global_batch_size} ({smaller.peak / GIB:.2f} GiB), "
            f"or with more microbatches: --config.grad_accum_steps above {config.grad_accum_steps}"
        )
    return (
        "no batch fits; shard the parameters over more devices (--config.mesh.fsdp, .tensor), recompute more "
        "(--config.model.remat=full), or try --search"
    )


def as_json(plan: Any) -> dict[str, Any]:
    return {
        "topology": plan.topology, "num_slices": plan.num_slices, "devices": plan.devices, "mesh": plan.mesh,
        "fits": plan.fits, "attention": plan.kernel, "remat": plan.config.model.remat, "num_params": plan.num_params,
        "global_batch_size": plan.config.global_batch_size, "tokens_per_step": plan.config.tokens_per_step,
        "peak_bytes": plan.peak, "usable_bytes": plan.usable, "memory": plan.memory, "beside_bytes": plan.beside,
        "collectives": [dataclasses.asdict(row) for row in plan.collectives],
        "model_flops": plan.model_flops, "hardware_flops": plan.hardware_flops, "seconds": plan.seconds,
        "step_s_at_best": plan.step_s, "mfu_at_best": plan.mfu, "hours_at_best": plan.hours,
        "device_hours_at_best": plan.hours * plan.devices, "compile_s": plan.compile_s,
    }  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
