"""Convert weights: a Hugging Face folder or another system's file becomes a run at step 0; a run becomes such a folder.

  python -m launch.convert --from_hf=DIR --workdir=RUN            (or --from_gguf, --from_nanogpt, --from_llmc=FILE)
  python -m launch.convert --workdir=RUN --to_hf=DIR [--step=N] [--dtype=bfloat16]
  python -m launch.convert --workdir=RUN --to_peft=DIR [--step=N]        (only the adapters of a run with model.lora)

DIR has config.json and .safetensors files; families: docs/models.md. RUN can be sampled from and evaluated at once, and
trained with --config.init_from=RUN. Output is read back and checked before it gets its name; a target that exists is
refused. Exit codes: 0 done, 2 flags or a model that is not supported, 3 files that are damaged or cannot be written.
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator

from absl import flags

from launch import cli, environment, inference
from trainer.errors import CheckpointError, ConfigError
from trainer.reliability.reading import Unreadable

FROM = {
    "from_hf": cli.define_run_path("from_hf", None, "Folder with config.json and .safetensors files to read."),
    "from_gguf": cli.define_run_path("from_gguf", None, ".gguf file of llama.cpp: Llama or GPT-2, dequantised."),
    "from_nanogpt": cli.define_run_path("from_nanogpt", None, "ckpt.pt of nanoGPT to read."),
    "from_llmc": cli.define_run_path("from_llmc", None, ".bin file of llm.c to read: GPT-2."),
}
ENDINGS = {"from_gguf": ".gguf", "from_nanogpt": ".pt", "from_llmc": ".bin"}
TOKENIZER = cli.define_path("tokenizer", None, "Tokenizer of weights that come without one, as for launch.prepare.")
TO_HF = cli.define_run_path("to_hf", None, "Folder to write, which must not exist.")
TO_PEFT = cli.define_run_path("to_peft", None, "Folder of PEFT to write, which must not exist: a run's adapters.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Type of the tensors of --to_hf.")


def main() -> int:
    given = {name: flag.value for name, flag in FROM.items() if flag.value}
    target = TO_HF.value or TO_PEFT.value
    if len(given) + bool(TO_HF.value) + bool(TO_PEFT.value) != 1:
        raise ConfigError(
            "name one of --from_hf=DIR, --from_gguf=FILE, --from_nanogpt=FILE and --from_llmc=FILE, to make a run, and "
            "--to_hf=DIR or --to_peft=DIR, to export one"
        )
    if not inference.WORKDIR.value:
        raise ConfigError("--workdir is missing; name the run directory to make, or the one to export")
    for name, path in given.items():
        if name in ENDINGS and (not path.endswith(ENDINGS[name]) or pathlib.Path(path).is_dir()):
            raise ConfigError(f"--{name}={path} is not a {ENDINGS[name]} file; --from_hf reads a folder")
        if name not in ENDINGS and pathlib.Path(path).is_file():
            raise ConfigError(f"--{name}={path} is a file; {', '.join(f'--{other}' for other in ENDINGS)} read files")
    if target and TOKENIZER.value:
        raise ConfigError("--tokenizer is of weights that are read; leave it out with --to_hf and --to_peft")
    if not target and inference.STEP.value is not None:
        raise ConfigError("--step is of an export; leave it out, or name --to_hf=DIR or --to_peft=DIR")
    if not TO_HF.value and flags.FLAGS["dtype"].present:
        raise ConfigError("--dtype is of --to_hf; leave it out, or name --to_hf=DIR")
    cli.end_in_one_line()
    with inference.memory_of_devices("convert on a machine with more memory"):
        if given:
            return read(*given.values())
        return write() if TO_HF.value else write_adapters()


def read(path: str) -> int:
    """Converts weights of another system to a run in --workdir."""
    start, workdir = time.monotonic(), pathlib.Path(inference.WORKDIR.value)
    environment.load_jax()
    from data import tokenizers
    from trainer.interchange import importing
    from trainer.interchange.source import Source, described

    source = Source.open(pathlib.Path(path))
    for line in described(source):
        cli.log.info("%s", line)
    params = importing.as_run(source, workdir, sys.argv, tokenizers.make(TOKENIZER.value) if TOKENIZER.value else None)
    command = f"launch.sample --workdir={shlex.quote(str(workdir))}"
    if not (workdir / "tokenizer").exists():
        command = f"launch.train --config=RECIPE --workdir={shlex.quote(str(workdir))} --config.data.path=DATA"
    cli.log.info(
        "%s parameters in %s, read back, %.0f s. Next: python -m %s",
        f"{params:,}", workdir, time.monotonic() - start, command,
    )  # fmt: skip
    return 0


def write() -> int:
    """Exports the run in --workdir to --to_hf."""
    start, target = time.monotonic(), new_folder(TO_HF.value)
    run = inference.open_run()
    from data import tokenizers
    from trainer.interchange import exporting
    from trainer.interchange.folder import KEPT

    tokenizer = tokenizers.load(run.path / "tokenizer") if (run.path / "tokenizer").exists() else None
    model, source = run.config.model, run.source
    tensors = exporting.of_arrays(run.load, model)
    if source is not None and exporting.form_of(model)[0] is source.family:
        tensors = exporting.of_source(source)
    with _of_a_run_that_may_train():
        family, params = exporting.export(
            target, tensors, model, tokenizer,
            dtype=DTYPE.value, card=card(run), kept=run.path / KEPT,
        )  # fmt: skip
    cli.log.info(
        "step %d as %s, %s parameters in %s, in %s, read back, %.0f s",
        run.meta["step"], family, f"{params:,}", DTYPE.value, target, time.monotonic() - start,
    )  # fmt: skip
    return 0


def write_adapters() -> int:
    """Exports the adapters of the run in --workdir to --to_peft."""
    target = new_folder(TO_PEFT.value)
    run = inference.open_run()
    if not run.lora.rank:
        raise ConfigError(f"{run.path} has no adapters (config.model.lora.rank is 0); export it by --to_hf=DIR")
    from trainer.interchange import peft

    model = dataclasses.replace(run.config.model, lora=run.lora)
    with _of_a_run_that_may_train():
        params = peft.write(target, run.adapters(), model, run.config.init_from)
    cli.log.info("the adapters of step %d, %s parameters in %s", run.meta["step"], f"{params:,}", target)
    return 0


def new_folder(target: str) -> pathlib.Path:
    """The path of a folder to write. Raises ConfigError if there is something, be it a link to nothing."""
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists; name a folder that does not")
    return pathlib.Path(target)


@contextlib.contextmanager
def _of_a_run_that_may_train() -> Iterator[None]:
    try:
        yield
    except Unreadable as e:
        raise CheckpointError(f"{e}; a run that trains deletes old steps: name a --step that it keeps") from None


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
