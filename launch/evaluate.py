"""Evaluate a checkpoint on the full validation split: every token is predicted once.

  python -m launch.evaluate --workdir=runs/tiny [--step=1000] [--data_path=PATH] [--json]

With --json it prints one object: step, tokens (trained on), val/loss (nats per token), val/perplexity and
val/bits_per_byte (if the bytes of the text are known, which they are not for external token files). A loss that is not
finite is null in the object. With or without --json such a loss ends in exit code 4.
"""

import dataclasses
import json
import math

from data import tokenizers
from data.storage import malloc
from data.tokenizers import Tokenizer
from launch import cli, inference
from trainer.errors import ConfigError, Diverged
from trainer.reliability import identity

DATA_PATH = cli.define_data_path(
    "data_path", None, "The current path of the run's dataset, instead of config.data.path."
)
VAL_PATH = cli.define_data_path("val_path", None, "Likewise for config.data.val_path.")


def main() -> int:
    with inference.memory_of_devices("use more or larger devices"):
        return measure()


def measure() -> int:
    malloc.tune_allocator()
    run = inference.open_run()
    from data import sources
    from trainer import sharding
    from trainer.evaluation import evaluate
    from trainer.step import make_eval_step

    config = dataclasses.replace(run.config.data, tokenizer_path="")  # the tokenizer is not needed, and may be missing
    given = {"path": DATA_PATH.value, "val_path": VAL_PATH.value}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if not config.path:
        raise ConfigError(f"{run.path} was not trained on data; name some with --data_path")
    try:
        data = sources.open_sources(config, run.config.model.vocab_size)
    except FileNotFoundError as e:
        raise ConfigError(f"the dataset of {run.path} is not at {e}; name its path with --data_path") from None
    if run.meta["data_fingerprint"] is None:  # launch.convert made the run, and it was not trained yet
        check_tokenizer(run, data.load_tokenizer())
    elif data.fingerprint() != run.meta["data_fingerprint"]:
        raise ConfigError(f"{config.path} is not the dataset of {run.path}; name the right one with --data_path")
    files = data.files("val")
    if not files:
        raise ConfigError(f"{config.path} has no validation data; prepare it with --val_fraction above 0")
    batch = sharding.named(run.program.mesh, "batch")
    result = evaluate(make_eval_step(run.program), run.params, files, run.config, batch_sharding=batch, num_windows=0)
    assert result is not None  # evaluate returns None only when it is interrupted, which cannot happen here
    row = {"step": run.meta["step"], "tokens": run.tokens, **result}
    if inference.JSON.value:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}))
    else:
        print("\n".join(f"{name:<18}{value:,.6g}" for name, value in row.items()))
    if not math.isfinite(result["val/loss"]):
        raise Diverged(f"the loss of step {run.meta['step']} is not finite; --step=N uses an earlier checkpoint")
    return 0


def check_tokenizer(run: inference.LoadedRun, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if the data has another tokenizer than the run."""
    own = tokenizers.load(run.path / "tokenizer") if (run.path / "tokenizer").exists() else None
    if own is None or tokenizer is None:
        cli.log.warning("the tokenizer of the data cannot be compared with that of %s", run.path)
    elif identity.tokenizer_sha256(own) != identity.tokenizer_sha256(tokenizer):
        raise ConfigError(
            f"the data has another tokenizer than {run.path}; prepare it with launch.prepare --tokenizer={run.path}"
        )


if __name__ == "__main__":
    cli.run(main)
