"""Train a model, or go on with a run: the same command on the same --workdir resumes it.

  python -m launch.train --config=configs/tiny.py --workdir=runs/tiny [--config.section.field=value ...]

Ctrl-C or SIGTERM saves and leaves with 42; the same command goes on from there. A second Ctrl-C leaves at once, with
130. Exit codes: 0 done, 2 configuration, 3 data or checkpoint unusable, 4 diverged, 42 stopped and resumable.

Several processes: on TPU pods and under Slurm or Open MPI they find each other; elsewhere give each
--coordinator_address, --num_processes and --process_id.
"""

import pathlib
import shlex
import sys

from absl import flags

from data import allocator
from launch import cli, runtime
from trainer import run_directory
from trainer.errors import ConfigError, Diverged

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; made, or resumed when it holds a run.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume although the learning rate, batch size and the like were changed."
)
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", runtime.default_compilation_cache(), "Folder for compiled programs; empty for none."
)


def main() -> int:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing; name a folder for the run, for example --workdir=runs/tiny")
    run = pathlib.Path(WORKDIR.value)
    config = run_directory.resolve(cli.config_from(CONFIG.value))
    run_directory.check_changes(run, config, ALLOW_CONFIG_CHANGE.value)

    # From here on JAX is loaded, which takes a second.
    allocator.tune_allocator()
    runtime.use_gpu_memory()
    runtime.use_compilation_cache(COMPILATION_CACHE.value)
    import jax

    from data import sources
    from launch import distributed

    distributed.initialize(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    process = jax.process_index()
    from trainer import sharding
    from trainer.placement import MeshPlacement

    # Axes, devices, batch and model must divide, and a kernel be found; the answer should not wait for the rest.
    MeshPlacement(config, sharding.make_mesh(config))
    distributed.check_same(config, "config")  # before anything is written: a refused gang leaves no run behind
    data = sources.open_sources(config.data, config.model.vocab_size)
    distributed.check_same(data.fingerprint(), "dataset")
    lock = run_directory.lock(run) if process == 0 else None
    sharding.barrier("run directory")
    if process == 0:
        run_directory.record(run, config, data, sys.argv)
    else:
        cli.quiet_console()
    cli.log_to_file(run / f"log.{process}.txt")

    from trainer.loop import Trainer

    stop = distributed.Stop()
    try:
        finished = Trainer(config, run, data, stop.requested).train()
    except Diverged:  # found by every process, at the same step
        distributed.shutdown()
        raise
    distributed.shutdown()
    if lock is not None:
        lock.close()
    command = f"python -m launch.sample --workdir={shlex.quote(str(run))}"
    if config.sample.prompt.isprintable():
        command += f" --prompt={shlex.quote(config.sample.prompt)}"
    if finished:
        cli.log.info("Everything is in %s (metrics.jsonl, tensorboard/, checkpoints/). Go on: %s", run, command)
        return 0
    cli.log.info("Stopped and saved in %s; the same command goes on from here.", run)
    return cli.STOPPED


if __name__ == "__main__":
    cli.run(main)
