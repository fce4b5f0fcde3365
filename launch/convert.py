"""Convert weights: a Hugging Face folder or a GGUF file becomes a run at step 0, or a run becomes such a folder.

  python -m launch.convert --from_hf=DIR --workdir=RUN            (or --from_gguf=FILE)
  python -m launch.convert --workdir=RUN --to_hf=DIR [--step=N] [--dtype=bfloat16]

DIR has config.json and .safetensors files; families: docs/models.md. RUN can be sampled from and evaluated at once, and
trained with --config.init_from=RUN. Output is read back and checked before it gets its name; a target that exists is
refused. Exit codes: 0 done, 2 flags or a model that is not supported, 3 files that are damaged or cannot be written.
"""

import pathlib
import shlex
import sys
import time

from absl import flags

from data.storage import malloc
from launch import cli, environment, inference
from trainer.errors import ConfigError

FROM_HF = cli.define_run_path("from_hf", None, "Folder with config.json and .safetensors files to read.")
FROM_GGUF = cli.define_run_path("from_gguf", None, "File of llama.cpp to read: Llama or GPT-2, dequantised.")
TO_HF = cli.define_run_path("to_hf", None, "Folder to write, which must not exist.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Type of the tensors of --to_hf.")


def main() -> int:
    if sum(map(bool, (FROM_HF.value, FROM_GGUF.value, TO_HF.value))) != 1:
        raise ConfigError(
            "name one of --from_hf=DIR and --from_gguf=FILE, to make a run, and --to_hf=DIR, to export one"
        )
    if not inference.WORKDIR.value:
        raise ConfigError("--workdir is missing; name the run directory to make, or the one to export")
    if FROM_GGUF.value and not FROM_GGUF.value.endswith(".gguf"):
        raise ConfigError(f"--from_gguf={FROM_GGUF.value} is not a .gguf file; --from_hf reads a folder")
    if not TO_HF.value and (flags.FLAGS["dtype"].present or inference.STEP.value is not None):
        raise ConfigError("--dtype and --step are of an export; leave them out, or name --to_hf=DIR")
    cli.end_in_one_line()
    with inference.memory_of_devices("convert on a machine with more memory"):
        return write() if TO_HF.value else read()


def read() -> int:
    """Converts --from_hf or --from_gguf to a run in --workdir."""
    start, workdir = time.monotonic(), pathlib.Path(inference.WORKDIR.value)
    malloc.tune_allocator()
    environment.load_jax()
    environment.find_devices()
    from trainer.interchange import importing

    source = importing.Source.open(pathlib.Path(FROM_HF.value or FROM_GGUF.value))
    for line in importing.describe(source):
        cli.log.info("%s", line)
    program = importing.as_run(source, workdir, sys.argv)
    cli.log.info(
        "%s parameters in %s, read back, %.0f s. Next: python -m launch.sample --workdir=%s",
        f"{program.num_params:,}", workdir, time.monotonic() - start, shlex.quote(str(workdir)),
    )  # fmt: skip
    return 0


def write() -> int:
    """Exports the run in --workdir to --to_hf."""
    start, target = time.monotonic(), pathlib.Path(TO_HF.value)
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not")
    run = inference.open_run()
    from data import tokenizers
    from trainer.interchange import exporting
    from trainer.interchange.folder import KEPT

    tokenizer = tokenizers.load(run.path / "tokenizer") if (run.path / "tokenizer").exists() else None
    family, params = exporting.export(
        target, run.params, run.config.model, tokenizer,
        dtype=DTYPE.value, card=card(run), kept=run.path / KEPT,
    )  # fmt: skip
    cli.log.info(
        "step %d as %s, %s parameters in %s, in %s, read back, %.0f s",
        run.meta["step"], family, f"{params:,}", DTYPE.value, target, time.monotonic() - start,
    )  # fmt: skip
    return 0


def card(run: inference.LoadedRun) -> str:
    """README.md of an export: what the weights were trained on, and how well they do."""
    from trainer.reporting import metrics

    found = metrics.evaluations(run.path, run.meta["step"], run.meta.get("evaluations") or [])
    loss = found.get(run.meta["step"], {}).get("val/loss")
    lines = [
        f"# {run.path.resolve().name}",
        "",
        f"Exported by meshlm after {run.meta['step']:,} steps of {run.config.tokens_per_step:,} tokens"
        f" ({run.tokens:,} tokens in all)."
        if run.meta["step"]
        else "Exported by meshlm, without training here.",
        "",
        f"- data: {run.config.data.path or 'none'}"
        + (f" (fingerprint {run.meta['data_fingerprint']})" if run.meta.get("data_fingerprint") else ""),
        *([f"- validation loss: {loss:.4f} nats a token"] if loss is not None else []),
        *([f"- began with: {run.config.init_from}"] if run.config.init_from else []),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
