"""The loss of a checkpoint over the whole validation split: every token is predicted once.

  python -m launch.evaluate --workdir=runs/tiny [--step=1000] [--json]

With --json one object: step, tokens (trained on), val/loss (nats a token), val/perplexity, val/bits_per_byte.
"""

import json
import pathlib

from launch import cli, inference
from trainer.errors import ConfigError


def main() -> int:
    run = inference.open_run()
    from data import formats
    from trainer import sharding
    from trainer.loop import evaluate
    from trainer.step import make_eval_step

    folder = pathlib.Path(run.config.data.path)
    try:
        manifest = formats.read_manifest(folder)
    except FileNotFoundError:
        raise ConfigError(f"the dataset of {run.path} is not at {folder} any more; run this where it is") from None
    if manifest.fingerprint() != run.meta["data_fingerprint"]:
        raise ConfigError(f"{folder} is not the dataset that {run.path} was trained on; prepare that one again")
    files = formats.TokenFiles(folder, manifest, "val")
    batch = sharding.named(run.program.mesh, "batch")
    result = evaluate(make_eval_step(run.program), run.params, files, run.config, batch, num_windows=0)
    row = {"step": run.meta["step"], "tokens": run.tokens, **result}
    if inference.JSON.value:
        print(json.dumps(row))
    else:
        print("\n".join(f"{name:<18}{value:,.6g}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    cli.run(main)
