"""Compare the train step with nanoGPT's and with the machine's best rate of matrix products, interleaved in one run.

  python -m benchmarks.nanogpt --nanogpt=CLONE --torch_python=PYTHON_WITH_TORCH [--size=large] [--rounds=10]

small: 4 layers, 4 heads, 128 wide, T = 64, batch 12; large: 6, 6, 384, T = 256, batch 8; no dropout. In float32 nanoGPT
runs its own model and AdamW, eagerly and by torch.compile, without its data loading; our step runs with our loader.
FLOPs are 6 N + 12 L H Q T per token for each model (N excludes positions).
"""

import dataclasses
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from benchmarks.train import Stepper, recipe  # tunes the allocator before JAX is loaded

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

from data.preparation import pipeline  # isort: skip
from trainer.reporting import flops  # isort: skip
from trainer.config import Config  # isort: skip

NANOGPT = flags.DEFINE_string("nanogpt", None, "A clone of nanoGPT.", required=True)
TORCH_PYTHON = flags.DEFINE_string("torch_python", "python3", "A Python that has torch.")
SIZE = flags.DEFINE_enum("size", "small", ["small", "large"], "Of nanoGPT's shakespeare_char recipes.")
STEPS = {"small": 20, "large": 2}  # steps of a round; benchmarks.train defines --rounds

PEER = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig
layers, heads, width, length, batch, compile = map(int, sys.argv[2:])
model = GPT(GPTConfig(length, 65, layers, heads, width, dropout=0.0, bias=False))
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
tokens = torch.randint(65, (batch, length + 1))
print("parameters", model.get_num_params(), flush=True)
if compile:
    model = torch.compile(model)
for steps in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(steps)):
        _, loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    print("seconds", (time.perf_counter() - start) / int(steps), flush=True)
"""


class Peer:
    """nanoGPT in its own process, which waits while others are timed."""

    def __init__(self, config: Config, compile: bool) -> None:
        model = config.model
        sizes = (model.num_layers, model.num_heads, model.embed_dim, config.data.seq_len, config.global_batch_size)
        argv = [TORCH_PYTHON.value, "-c", PEER, NANOGPT.value, *(str(int(n)) for n in (*sizes, compile))]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.num_params = int(self._answer("parameters"))
        self.run(3)

    def _answer(self, word: str) -> float:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return float(line.split()[1])
        raise RuntimeError("nanoGPT's process ended")

    def run(self, steps: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer("seconds")

    def close(self) -> None:
        self.process.communicate()


def products(size: int = 2048) -> Callable[[int], float]:
    """Seconds of one float32 product of two [size, size] matrices, as the mean of a few."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(product(a, a))
        return (time.perf_counter() - start) / steps

    run(1)
    return run


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary, "set")
        manifest = pipeline.prepare_dataset(folder, source=flags.FLAGS.source, tokenizer="char", min_frequency=100)
        config, steps = recipe("cpu", manifest.vocab_size), STEPS[SIZE.value]
        if SIZE.value == "large":
            config = recipe("", manifest.vocab_size)
            model = dataclasses.replace(config.model, dropout=0.0)
            config = dataclasses.replace(config, global_batch_size=8, model=model)
        gpt = dataclasses.replace(config.model, mlp="gelu", norm="layernorm", position="learned")
        ours = Stepper(config, folder, manifest)
        ours_gpt = Stepper(dataclasses.replace(config, model=gpt), folder, manifest)
        peer, compiled, product = Peer(config, compile=False), Peer(config, compile=True), products()
        theirs = flops.nanogpt_flops_per_token(config, peer.num_params) * config.tokens_per_step
        rows: dict[str, tuple[Callable[[int], float], int, float]] = {
            "nanoGPT, eager": (peer.run, steps, theirs),
            "nanoGPT, torch.compile": (compiled.run, steps, theirs),
            "meshlm (SwiGLU, RMSNorm, RoPE)": (ours.run, steps, step_flops(ours)),
            "meshlm with GPT-2's blocks": (ours_gpt.run, steps, step_flops(ours_gpt)),
            "product of two 2048 x 2048 matrices": (product, 5, 2 * 2048**3),
        }
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(flags.FLAGS.rounds):
            for name, (run, steps, _) in rows.items():
                times[name].append(run(steps))
        peer.close()
        compiled.close()
    eager = float(np.median(times["nanoGPT, eager"]))
    print("| | median ms | best ms | to nanoGPT | GFLOP | best GFLOP/s |\n|---|---|---|---|---|---|")
    for name, (run, _, flop) in rows.items():
        median, best = float(np.median(times[name])), min(times[name])
        ratio = "" if run is product else f"{median / eager:.2f}"
        rate = flop / best / 1e9
        print(f"| {name} | {median * 1e3:.1f} | {best * 1e3:.1f} | {ratio} | {flop / 1e9:.2f} | {rate:.0f} |")


def step_flops(stepper: Stepper) -> float:
    return flops.nanogpt_flops_per_token(stepper.config, stepper.program.num_params) * stepper.config.tokens_per_step


if __name__ == "__main__":
    app.run(main)
