"""Evaluate a checkpoint on the full validation split, on which every token is predicted once, or on tasks.

  python -m launch.evaluate --workdir=runs/tiny [--step=1000] [--data_path=PATH] [--json]
  python -m launch.evaluate --workdir=RUN --tasks=arc_easy,hellaswag_val.bin,eval_bundle/ [--limit=100] [--json]

With --json it prints one object: step, tokens (trained on), val/loss (nats per token), val/perplexity and
val/bits_per_byte (if the bytes of the text are known, which they are not for external token files). A loss that is not
finite is null in the object. With or without --json such a loss ends in exit code 4.

A task is one of lm-evaluation-harness, by its name, a file of HellaSwag (.jsonl, or .bin of llm.c), or a folder with
the tasks of DCLM CORE (nanochat's eval_bundle); see docs/evaluation.md. The object then has step, tokens and tasks,
which has the metrics of each task. Give each of several processes --coordinator_address, --num_processes, --process_id.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

from absl import flags

from data import tokenizers
from data.storage import malloc
from data.tokenizers import Tokenizer
from launch import cli, inference
from trainer.errors import ConfigError, Diverged
from trainer.reliability import identity
from trainer.tasks.asked import Asked

DATA_PATH = cli.define_data_path(
    "data_path", None, "The current path of the run's dataset, instead of config.data.path."
)
VAL_PATH = cli.define_data_path("val_path", None, "Likewise for config.data.val_path.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness, and paths, separated by commas.")
OF_TASKS = {
    "tasks_path": cli.define_path(
        "tasks_path", None, "Folder with .yaml files of tasks, instead of the harness's own; no network is used."
    ),
    "limit": flags.DEFINE_integer("limit", None, "Use only so many examples of each task.", lower_bound=1),
    "num_fewshot": flags.DEFINE_integer(
        "num_fewshot", None, "Examples in a prompt, instead of the number of the harness's task.", lower_bound=0
    ),
}
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)


def main() -> int:
    asked = asked_tasks()
    malloc.tune_allocator()
    with inference.memory_of_devices("use more or larger devices"):
        run = inference.open_run(join=join, for_loss=asked is None)
        row: dict[str, Any] = evaluate_loss(run) if asked is None else {"tasks": measure(run, asked)}
    report({"step": run.meta["step"], "tokens": run.tokens, **row})
    from launch import distributed

    distributed.shutdown()
    if asked is None and not math.isfinite(row["val/loss"]):
        raise Diverged(f"the loss of step {run.meta['step']} is not finite; --step=N uses an earlier checkpoint")
    return 0


def join() -> None:
    """Joins the other processes, if flags name them. Raises ConfigError, Stopped."""
    from launch import distributed

    process_flags = (COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if any(flag is not None for flag in process_flags):
        distributed.initialize(*process_flags, run=inference.WORKDIR.value)


def asked_tasks() -> Asked | None:
    """What --tasks asks for; None without the flag. Raises ConfigError."""
    given = {name: flag.value for name, flag in OF_TASKS.items() if flag.value is not None}
    if not flags.FLAGS["tasks"].present:
        if given:
            raise ConfigError(f"--{min(given)} is for --tasks; name some")
        return None
    if DATA_PATH.value is not None or VAL_PATH.value is not None:
        raise ConfigError("--data_path and --val_path are for the loss; leave them or --tasks out")
    folder = given.pop("tasks_path", None)
    return Asked(TASKS.value, folder if folder is None else pathlib.Path(folder), **given)


def report(row: dict[str, Any]) -> None:
    """Prints the result, on process 0."""
    import jax

    if jax.process_index():
        return
    if inference.JSON.value:
        print(json.dumps(plain(row)))
        return
    results = row.pop("tasks", None)
    print("\n".join(f"{name:<18}{value:,.6g}" for name, value in row.items()))
    if results is not None:
        print(table(results))


def table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric of a task, with its standard error."""
    lines = [("task", "metric", "value")]
    for task, row in results.items():
        for metric, value in row.items():
            name, _, filter = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            error = row.get(f"{name}_stderr,{filter}" if filter else f"{name}_stderr")
            lines.append((task, metric, f"{value:.6g}" + ("" if error is None else f" ± {error:.4f}")))
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(2)]
    return "\n".join(f"{task:<{widths[0]}}{metric:<{widths[1]}}{value}" for task, metric, value in lines)


def plain(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value if math.isfinite(value) else None


def measure(run: inference.LoadedRun, asked: Asked) -> dict[str, dict[str, float]]:
    """The metrics of each task. Raises ConfigError, DataError, Diverged."""
    from trainer.tasks.measure import Tasks

    tasks = run.processes.run_on_all("tasks", lambda: Tasks(run.program, run.path, asked))
    if run.processes.size > 1:
        digest = run.processes.run_on_all("questions", tasks.check)
        run.processes.check_same("questions", {"sha256": digest})
    try:
        results = tasks.measure(run.params)
    except Diverged as e:
        raise Diverged(f"{e}; --step=N uses an earlier checkpoint") from None
    assert results is not None  # because nothing interrupts it
    return results


def evaluate_loss(run: inference.LoadedRun) -> dict[str, float]:
    """The loss on the validation split. Raises ConfigError."""
    from data import sources
    from trainer import sharding
    from trainer.evaluation import evaluate
    from trainer.finetuning import reference
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
    if run.config.stores_reference:
        reference.read(run.path, files.values())
    batch = sharding.named(run.program.mesh, "batch")
    result = evaluate(make_eval_step(run.program), run.params, files, run.config, batch_sharding=batch, num_windows=0)
    assert result is not None  # evaluate returns None only when it is interrupted, which cannot happen here
    return result


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
