"""Weak scaling on paper: one model, the same work per chip, from 8 to 4,096 chips. Prints a Markdown table.

  python -m benchmarks.weak_scaling [--config=llama:8b] [--rows=2] [--sizes=2x2x2,4x4x4,8x8x8,16x16x16]

Each size is compiled, which takes a minute or two on two CPU cores: bytes and memory are the compiler's figures, times
are the roofline's. Parameters are sharded over at most --max_fsdp chips; further chips are replicas.
"""

import dataclasses

from absl import app, flags

from trainer.planning import topology

CONFIG = flags.DEFINE_string("config", "llama:8b", "Recipe.")
FAMILY = flags.DEFINE_string("family", "v5p", "Chip.")
SIZES = flags.DEFINE_list("sizes", ["2x2x2", "4x4x4", "8x8x8", "16x16x16"], "Slices.")
ROWS = flags.DEFINE_integer("rows", 2, "Sequences of a chip in a step.")
MAX_FSDP = flags.DEFINE_integer("max_fsdp", 512, "Most chips over which the parameters are sharded.")
GIB = 2**30
COLUMNS = (
    "chips", "mesh", "peak GiB", "parameters + optimizer + gradients GiB", "a chip sends GiB: fsdp", "data",
    "tokens a step", "at best: step", "MFU", "limit", "next to it",
)  # fmt: skip


def main(argv: list[str]) -> None:
    topology.prepare_environment()
    from benchmarks import plans
    from trainer.planning import plan

    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    recipe = plans.recipe(CONFIG.value)
    model = dataclasses.replace(
        recipe.model, vocab_size=plans.vocab_size(CONFIG.value), max_seq_len=recipe.data.seq_len
    )
    for size in SIZES.value:
        machine = topology.describe(f"{FAMILY.value}:{size}")
        chips = len(machine.devices)
        fsdp = min(chips, MAX_FSDP.value)
        mesh = dataclasses.replace(recipe.mesh, fsdp=fsdp, data=chips // fsdp)
        config = dataclasses.replace(
            recipe, model=model, mesh=mesh, grad_accum_steps=1, global_batch_size=ROWS.value * chips
        )
        p = plan.make(config, machine)

        def sent(*axes: str, p: plan.StepPlan = p) -> float:
            return sum(r.sent for r in p.collectives if r.axes == axes) / GIB

        state = sum(p.memory[part] for part in ("parameters", "optimizer", "gradients")) / GIB
        first, second = sorted(p.seconds, key=lambda name: -p.seconds[name])[:2]
        over_data = sent("data") + sent("data", "fsdp")  # a sum over both axes is one of full gradients
        cells = (
            f"{chips:,}", f"data {mesh.data} x fsdp {fsdp}", f"{p.peak / GIB:.1f}", f"{state:.2f}",
            f"{sent('fsdp'):.2f}", f"{over_data:.2f}", f"{config.tokens_per_step:,}", f"{p.step_s:.2f} s",
            f"{100 * p.mfu:.0f} %", first, f"{second}, {p.seconds[second] / p.step_s:.2f} of it",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
