"""Time the train step on the available devices, and print one row of JSON. Needs no dataset: tokens are random.

  python -m launch.bench --config=configs/gpt2.py [--steps=20] [--warmup=3] [--rounds=5] [--trace=DIR]
                         [--peer [--torch_python=PYTHON]] [--config.section.field=value ...]

A round is --steps steps, with one wait for the devices, at its end; medians are over rounds, and the state is donated
as in training. Numbers are printed only if the first loss is that of an untrained model and all losses are finite. With
--peer, a plain GPT in PyTorch (benchmarks/peer.py) alternates with our model, round by round, on one device. Without
config.model.vocab_size the vocabulary has 50304 tokens, and the row says so.

Several processes find each other on TPU pods and under Slurm or Open MPI; process 0 prints.
Exit codes: 0 done, 2 configuration, 4 the losses are wrong.
"""

import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from data.storage import malloc
from launch import cli, environment, runtime
from trainer.config import Config, complete_without_dataset
from trainer.errors import ConfigError, Diverged
from trainer.reporting import flops

if TYPE_CHECKING:
    from data.batch import Batch
    from trainer.state import Program

CONFIG = cli.define_config()
STEPS = flags.DEFINE_integer("steps", 20, "Steps in a round.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 3, "Steps before the first round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of rounds.", lower_bound=1)
TRACE = cli.define_path("trace", None, "Folder for a profile of a few more steps and the text of the compiled program.")
PEER = flags.DEFINE_bool("peer", False, "Take turns with a PyTorch GPT of the same size, on one device.")
PEER_COMPILE = flags.DEFINE_bool("peer_compile", None, "Use torch.compile for the peer; default: on a GPU.")
TORCH_PYTHON = cli.define_path("torch_python", sys.executable, "A Python with torch.")

TRACED_STEPS = 5
LOSS_TOLERANCE = 0.03
PEER_FILE = pathlib.Path(__file__).parent.parent / "benchmarks" / "peer.py"


def main() -> None:
    given = cli.config_from(CONFIG.value)
    config = complete_without_dataset(given)
    if PEER.value:
        check_peer()
    malloc.tune_allocator()
    runtime.use_gpu_memory()
    if PEER.value:  # two programs share the device, and JAX would take most of its memory at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment.load_jax()
    import jax

    from launch import distributed
    from trainer import xla_options

    distributed.initialize(None, None, None)
    jax.config.update("jax_enable_compilation_cache", False)  # compile_s must be the time of a compilation
    if jax.process_index() != 0:
        cli.quiet_console()
    try:
        row = measure(config)
    except jax.errors.JaxRuntimeError as e:
        if not xla_options.is_out_of_memory(e):
            raise
        raise ConfigError(
            xla_options.out_of_memory(e) + "lower config.global_batch_size, raise config.grad_accum_steps, or choose "
            "another config.model.remat"
        ) from e
    row |= {"vocab_size": config.model.vocab_size, "vocab_size_is_default": not given.model.vocab_size}
    if jax.process_index() == 0:
        print(json.dumps({"config": CONFIG.value.name} | row))
    distributed.shutdown()


def measure(config: Config) -> dict[str, Any]:
    """The row: what was timed, its speed and, with --peer, the speed of the peer."""
    import jax

    bench = Bench(config)
    peer = Peer(config) if PEER.value and jax.process_index() == 0 else None
    try:
        times, peer_times = rounds(bench, peer)
    finally:
        if peer is not None:
            peer.close()
    check_losses(config, bench.losses)
    row = bench.about() | speed(config, times)
    if peer is not None:
        row |= peer.speed(peer_times)
        row["ratio"] = row["tokens_per_s_per_device"] / row["peer_tokens_per_s"]
    if TRACE.value:
        bench.trace(pathlib.Path(TRACE.value))
    return row


def random_batch(program: "Program") -> "Batch":
    """A batch of random tokens, in the types that datasets have."""
    import numpy as np

    from data import loader
    from data.batch import from_tokens
    from trainer import sharding

    config = program.config
    shape = (config.global_batch_size, config.data.seq_len + 1)
    dtype = np.uint16 if config.model.vocab_size <= 2**16 else np.uint32
    tokens = np.random.default_rng(config.seed).integers(config.model.vocab_size, size=shape, dtype=dtype)
    mask = np.ones((shape[0], shape[1] - 1), bool) if config.data.packed else None

    def read(rows: np.ndarray) -> "Batch":
        of_rows = None if mask is None else mask[rows]
        return from_tokens(tokens[rows], loss_mask=of_rows, document_end=config.data.document_end)

    return loader.put(sharding.named(program.mesh, "batch"), config.global_batch_size, read)


class Bench:
    """The compiled train step, its state and a batch.

    Attributes:
      losses: the losses of all steps so far.
      compile_s: seconds from tracing the function to the executable.
    """

    def __init__(self, config: Config):
        import jax
        import numpy as np

        from trainer import sharding
        from trainer.state import Program
        from trainer.step import make_train_step

        self.config = config
        self.mesh = sharding.make_mesh(config)
        jax.set_mesh(self.mesh)
        self.program = Program(config, self.mesh)
        self.batch = random_batch(self.program)
        self.seed = np.uint32(config.seed)
        start = time.perf_counter()
        self.step = make_train_step(self.program).lower(self.program.state, self.batch, self.seed).compile()
        self.compile_s = time.perf_counter() - start
        self.state = self.program.init()
        self.losses: list[float] = []

    def run(self, steps: int) -> float:
        """Seconds per step; waits for the devices only at the end."""
        import jax

        losses: list[Any] = []
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch, self.seed)
            losses.append(metrics["train/loss"])
        jax.block_until_ready((self.state, losses))
        seconds = (time.perf_counter() - start) / steps
        self.losses += map(float, losses)
        return seconds

    def trace(self, folder: pathlib.Path) -> None:
        """Writes a profile (for TensorBoard, XProf or benchmarks/gpu.py), and step.hlo.txt to name its operations."""
        import jax

        with jax.profiler.trace(str(folder)):
            self.run(TRACED_STEPS)
        (folder / "step.hlo.txt").write_text(self.step.as_text())

    def about(self) -> dict[str, Any]:
        """What was timed, and on which devices."""
        import jax

        from trainer.reporting import metrics

        config, model, device = self.config, self.config.model, jax.devices()[0]
        return {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(self.mesh.shape),
            "jax": jax.__version__,
            "dtype": model.dtype,
            "attention": self.program.partitioner.kernel,
            "remat": model.remat,
            "scan_layers": model.scan_layers,
            "loss_chunk_tokens": config.loss_chunk_tokens,
            "moments_dtype": config.optimizer.moments_dtype,
            "num_params": self.program.num_params,
            "seq_len": config.data.seq_len,
            "global_batch_size": config.global_batch_size,
            "grad_accum_steps": config.grad_accum_steps,
            "tokens_per_step": config.tokens_per_step,
            "compile_s": self.compile_s,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "peak_memory_gib": metrics.peak_memory_gib(),
        }


def rounds(bench: Bench, peer: "Peer | None") -> tuple[list[float], list[float]]:
    """Seconds per step in each round, of our step and of the peer's; their rounds alternate."""
    bench.run(WARMUP.value)
    check_losses(bench.config, bench.losses)
    if peer is not None:
        peer.run(WARMUP.value)
    times, peer_times = [], []
    for _ in range(ROUNDS.value):
        times.append(bench.run(STEPS.value))
        if peer is not None:
            peer_times.append(peer.run(STEPS.value))
    return times, peer_times


def expected_first_loss(config: Config) -> float:
    """ln V + embed_dim std² / 2 for random targets: a head of standard deviation std turns a normalised stream into
    normally distributed logits, and the mean of their exp is exp of half their variance."""
    return math.log(config.model.vocab_size) + config.model.embed_dim * config.model.init_std**2 / 2


def check_losses(config: Config, losses: list[float]) -> None:
    """Raises Diverged if the losses are not those of a working model."""
    wrong = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if wrong is not None:
        raise Diverged(f"the loss of step {wrong + 1} is {losses[wrong]}; the time of such a step means nothing")
    expected = expected_first_loss(config)
    if abs(losses[0] - expected) > LOSS_TOLERANCE * expected:
        raise Diverged(
            f"the first loss is {losses[0]:.4f}; of an untrained model on random tokens, it must be within "
            f"{LOSS_TOLERANCE:.0%} of ln {config.model.vocab_size} + embed_dim std² / 2 = {expected:.4f}"
        )


def speed(config: Config, times: list[float]) -> dict[str, Any]:
    """Rates of the median round, and the range of step times; mfu only for a device with a known peak."""
    import jax

    step, devices = statistics.median(times), jax.device_count()
    tokens_per_s = config.tokens_per_step / step
    flops_per_s = tokens_per_s * flops.flops_per_token(config) / devices
    row = {
        "rounds": len(times),
        "steps": STEPS.value,
        "step_time_s": step,
        "step_time_s_min": min(times),
        "step_time_s_max": max(times),
        "steps_per_s": 1 / step,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / devices,
        "tflops_per_device": flops_per_s / 1e12,
        "flops_formula": flops.FORMULA,
    }
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return row if peak is None else row | {"mfu": flops_per_s / peak}


# The peer


def check_peer() -> None:
    """Raises ConfigError if the peer cannot run."""
    if not PEER_FILE.exists():
        raise ConfigError(f"--peer needs {PEER_FILE}, which is in the repository but not in an installed package")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        without_torch = subprocess.run([TORCH_PYTHON.value, "-c", code], capture_output=True).returncode
    except OSError as e:
        raise ConfigError(f"--torch_python={TORCH_PYTHON.value} cannot be started: {e.strerror}") from None
    if without_torch:
        raise ConfigError(f"--peer: {TORCH_PYTHON.value} has no torch; name a Python with it by --torch_python")


def peer_spec(config: Config, devices: int) -> dict[str, Any]:
    """benchmarks/peer.py's Spec: our sizes, the rows of one of our `devices`, and a feed-forward width with which the
    matrices of a layer are as large as in our model."""
    model, width = config.model, config.model.num_heads * config.model.head_size
    layer = flops.attention_params(model) + flops.mlp_params(model)
    return {
        "num_layers": model.num_layers,
        "embed_dim": model.embed_dim,
        "num_heads": model.num_heads,
        "head_dim": model.head_size,
        "mlp_dim": max(1, round((layer - 4 * model.embed_dim * width) / (2 * model.embed_dim))),
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "seq_len": config.data.seq_len,
        "rows": max(1, config.global_batch_size // config.grad_accum_steps // devices),
        "accum": config.grad_accum_steps,
        "bias": model.bias,
        "dropout": model.dropout,
        "tie_embeddings": model.tie_embeddings,
        "bfloat16": model.dtype == "bfloat16",
        "clip_norm": config.optimizer.clip_norm,
    }


class Peer:
    """benchmarks/peer.py in its own process, which waits while our step is timed.

    Attributes:
      about: torch's version, the device, whether the model is compiled, and the number of parameters.
      losses: the last loss of each round.
    """

    def __init__(self, config: Config):
        import jax

        self.config = config
        self.spec = peer_spec(config, jax.device_count()) | {"compile": PEER_COMPILE.value}
        command = [TORCH_PYTHON.value, str(PEER_FILE), json.dumps(self.spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.losses: list[float] = []
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(f"--peer: its process ended with {self.process.wait()}; its output is above")
        return json.loads(line)

    def run(self, steps: int) -> float:
        """Seconds per step. Raises Diverged if the peer's loss is not finite."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        if not math.isfinite(answer["loss"]):
            raise Diverged(f"the peer's loss is {answer['loss']}; a comparison with it means nothing")
        self.losses.append(answer["loss"])
        return answer["seconds"]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.communicate()

    def speed(self, times: list[float]) -> dict[str, Any]:
        """The peer's part of the row, from its seconds per step in each round."""
        model, spec, step = self.config.model, self.spec, statistics.median(times)
        of_gpt2 = (model.mlp, model.norm, model.position) == ("gelu", "layernorm", "learned")
        what = "GPT-2 blocks"
        if not of_gpt2 or model.kv_heads != model.num_heads:
            what += f" of the nearest size (mlp_dim {spec['mlp_dim']}), not this model's"
        return {
            "peer": what,
            "peer_torch": self.about["torch"],
            "peer_device": self.about["device"],
            "peer_compiled": self.about["compiled"],
            "peer_num_params": self.about["num_params"],
            "peer_last_loss": self.losses[-1],
            "peer_step_time_s": step,
            "peer_step_time_s_min": min(times),
            "peer_step_time_s_max": max(times),
            "peer_tokens_per_s": spec["rows"] * spec["accum"] * spec["seq_len"] / step,
        }


if __name__ == "__main__":
    cli.run(main)
