"""Train a model, or resume a run: the same command with the same --workdir continues it.

  python -m launch.train --config=configs/tiny.py --workdir=runs/tiny [--config.section.field=value ...]

Ctrl-C or SIGTERM saves and exits with 42; the same command resumes from there. A second Ctrl-C exits at once, with 130.
Exit codes: 0 done, 2 configuration, 3 data or checkpoint unusable, 4 diverged, 42 stopped and resumable.

Several processes find each other on TPU pods and under Slurm or Open MPI; elsewhere give each of them
--coordinator_address, --num_processes and --process_id.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import logging
import os
import pathlib
import shlex
import sys
import threading
import time
from typing import TYPE_CHECKING

from absl import flags

from data.errors import UserError
from data.storage import malloc
from launch import cli, environment, runtime, signals
from trainer.errors import ConfigError, Stopped
from trainer.interchange import initial
from trainer.reliability import reading, run_directory, watchdog
from trainer.reliability.run_lock import RunLock
from trainer.tasks.asked import Asked

if TYPE_CHECKING:
    from data.sources import Sources
    from trainer.config import Config
    from trainer.reliability.coordination import Processes
    from trainer.reliability.mirror import Mirror

EXPLANATION_S = 1.0  # how long to wait after a failed collective for the other process's error that explains it
FAILED_S = 5.0  # after another process failed, this one exits within this time, even if it waits for something

CONFIG = cli.define_config()
WORKDIR = cli.define_run_path("workdir", None, "Run directory; created, or resumed if it holds a run.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume although the learning rate, the batch size or similar settings have changed."
)
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
STEAL_LOCK = flags.DEFINE_bool("steal_lock", False, "Take the run over at once from the job that holds it.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout_s",
    300,
    "Seconds to wait for the coordinator, the other processes, and their answers.",
    lower_bound=1,
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_s",
    100,
    "Seconds without a heartbeat after which a process counts as dead and the others exit.",
    lower_bound=1,
)
COMPILATION_CACHE = cli.define_run_path(
    "compilation_cache",
    None,
    "Folder for compiled programs; empty: none. Default: $JAX_COMPILATION_CACHE_DIR, or .xla beside --workdir.",
)

MORE_MEMORY = (
    "raise config.grad_accum_steps, lower config.global_batch_size or config.loss_chunk_tokens, choose "
    "config.model.remat=full, or split the model over more devices (config.mesh.fsdp)"
)


def main() -> int:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing; name a folder for the run, for example --workdir=runs/tiny")
    run_dir = pathlib.Path(WORKDIR.value)
    stop_signals = signals.StopSignals()
    process_flags = (COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    # A single process checks its configuration before it imports JAX, which takes a second. Several processes check
    # theirs after they have joined, so that all of them report an error of any one of them.
    config = resolve_config(run_dir) if runtime.seems_alone(*process_flags) else None

    load_jax()
    from launch import distributed

    num_processes = distributed.initialize(
        *process_flags, run=WORKDIR.value, timeout_s=START_TIMEOUT.value, heartbeat_s=HEARTBEAT_TIMEOUT.value
    )
    job = Job.begin(run_dir)
    try:
        job.processes.check_same("number of processes", {"--num_processes": num_processes})
        config = job.processes.run_on_all("configuration", lambda: config or resolve_config(run_dir))
        runtime.use_compilation_cache(run_dir, COMPILATION_CACHE.value)
        finished = train(job, config, stop_signals)
    except BaseException as e:
        job.processes.report_error(e)
        job.processes.exit_barrier(e)
        raise
    distributed.shutdown()
    stop_signals.close()
    return report_end(run_dir, config, finished)


def resolve_config(run_dir: pathlib.Path) -> Config:
    """The configuration, completed from the dataset and compared with that of the run. Raises UserError."""
    before = run_directory.config_of_run(run_dir)
    config = run_directory.resolve(initial.adopted(cli.config_from(CONFIG.value), run_dir, before))
    run_directory.check_mirror(run_dir, config.checkpoint.mirror)
    return run_directory.check_changes(run_dir, config, before, allow=ALLOW_CONFIG_CHANGE.value)


def load_jax() -> None:
    """Settings that must be made before JAX starts, then JAX itself. Raises ConfigError."""
    malloc.tune_allocator()
    runtime.use_gpu_memory()
    environment.load_jax()
    watchdog.dump_on_quit(None)


@dataclasses.dataclass(frozen=True)
class Job:
    """This process's part in a run: the other processes, and the locks that it holds (process 0)."""

    run_dir: pathlib.Path
    processes: Processes
    locks: list[RunLock] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(cls, run_dir: pathlib.Path) -> Job:
        """A job that exits as soon as another process reports an error."""
        from trainer.reliability.coordination import Processes

        job = cls(run_dir, Processes(START_TIMEOUT.value))
        job.processes.listen_for_errors(lambda error: job.exit_with(error, after_s=FAILED_S if error.process else 0))
        return job

    def release_locks(self) -> None:
        for lock in self.locks:
            lock.release()

    def exit_with(self, error: UserError, after_s: float) -> None:
        """Exits after an error, from another thread: the main thread may wait forever for a process that has ended.

        If the main thread does not wait, it exits by itself within `after_s`, and may first wait for a save. Process 0
        waits for the saves of all processes before it reports its own error to them.
        """
        time.sleep(after_s)
        cli.log.error("error: %s", error)
        self.processes.exit_barrier(error)
        self.release_locks()
        os._exit(error.exit_code)

    def exit_deaf(self, error: UserError) -> None:
        """Exits because requests to stop or to save cannot be received any more."""
        self.processes.report_error(error)
        self.exit_with(error, after_s=FAILED_S)

    def exit_before_first_step(self) -> None:
        """Exits at a request to stop before the first step: there is nothing to save, and compiling takes minutes."""
        cli.log.info("Stopped before the first step was done; the same command resumes the run.")
        self.processes.exit_barrier()
        self.release_locks()
        os._exit(cli.STOPPED)

    def exit_without_run(self, message: str) -> None:
        """Exits because another job has taken the run over: nothing more may be written to it."""
        error = ConfigError(message)
        cli.log.error("error: %s", error)
        threading.Timer(EXPLANATION_S, os._exit, [error.exit_code]).start()
        self.processes.report_error(error)
        self.processes.exit_barrier()
        os._exit(error.exit_code)


def train(job: Job, config: Config, stop_signals: signals.StopSignals) -> bool:
    """Trains to the last step, or until a request to stop. Returns whether the run is finished."""
    import jax

    from trainer import xla_options
    from trainer.loop import Trainer

    dog = trainer = None
    try:
        data = check_processes_agree(job.processes, job.run_dir, config)
        mirror = enter_run_directory(job, config, data)
        dog = watchdog.Watchdog(job.run_dir, config.watchdog, job.processes.index, of=job.processes.size)
        handle_stop_requests(job, config, dog, stop_signals)
        trainer = Trainer(config, job.run_dir, data, job.processes, dog, mirror=mirror)
        finished = trainer.train()
        job.processes.close()
        return finished
    except jax.errors.JaxRuntimeError as e:
        if xla_options.is_out_of_memory(e):
            raise out_of_memory(e, stepped=trainer is not None and trainer.has_stepped) from e
        if job.processes.size == 1:
            raise
        raise explain_failed_collective(e, job.processes) from e
    finally:
        if dog is not None:
            dog.close()
        job.release_locks()


def check_processes_agree(processes: Processes, run_dir: pathlib.Path, config: Config) -> Sources:
    """Makes sure that all processes are about to train the same run, before anything is written. Returns the data."""
    from data import sources
    from launch import distributed
    from model.transformer import parameter_shapes
    from trainer import optimizer, sampling, sharding, xla_options
    from trainer.finetuning import trainable
    from trainer.parallel.partitioner import MeshPartitioner

    processes.check_same("setting", distributed.identity(config))
    # These checks are quick: the mesh must divide devices, batch and model, and there must be an attention kernel.
    placed = processes.run_on_all("mesh", lambda: MeshPartitioner(config, sharding.make_mesh(config)))
    processes.run_on_all("optimizer", lambda: optimizer.chosen(config.optimizer))
    if config.frozen:
        processes.run_on_all("frozen", lambda: trainable.chosen(config, parameter_shapes(config.model)))
    xla_options.use_precision(config.model.dtype, placed.mesh)  # before the settings in use are recorded
    data = processes.run_on_all("data", lambda: sources.open_sources(config.data, run_directory.vocab_size(config)))
    tokenizer = data.tokenizer_source.manifest.tokenizer_sha256
    if config.init_from and processes.broadcast_from_0("a new run", lambda: initial.is_needed(run_dir)):
        processes.run_on_all("init_from", lambda: initial.check_tokenizer(config, run_dir, data.load_tokenizer()))
        processes.check_same("adapters", {"sha256": initial.sha256_of_adapters(config)})
    processes.check_same("dataset", {"tokens and order": data.fingerprint(), "tokenizer": tokenizer})
    asked = processes.run_on_all("tasks", lambda: Asked.of_config(config.eval))
    if asked is not None and not tokenizer:
        raise ConfigError("config.eval.tasks needs a tokenizer; name that of the data by config.data.tokenizer_path")
    processes.run_on_all("prompt", lambda: sampling.prompt_of(config, data.load_tokenizer()))
    return data


def enter_run_directory(job: Job, config: Config, data: Sources) -> Mirror | None:
    """Locks the run, checks that all processes see its directory, and logs there. Process 0 gets the mirror."""
    run_dir, processes = job.run_dir, job.processes
    mirror = processes.run_on_process_0("run directory", lambda: take_run(job, config, data))
    # Every process must find what process 0 has just written there, under the same path, or Orbax refuses each save.
    environment_json = processes.run_on_all("shared run directory", lambda: run_directory.recorded(run_dir))
    seen = {"environment.json": environment_json, "path": str(run_dir.resolve())}
    processes.check_same("run directory (it must be shared by all)", seen)
    if processes.index:
        cli.quiet_console()
    log = run_dir / f"log.{processes.index}.txt"
    processes.run_on_all("log", lambda: reading.writing(lambda: cli.log_to_file(log), log))
    return mirror


def take_run(job: Job, config: Config, data: Sources) -> Mirror | None:
    """Locks the run and its mirror, compares both with the configuration, and records the latter; for process 0."""
    from trainer.reliability import identity
    from trainer.reliability.mirror import Mirror

    run_dir, steal = job.run_dir, STEAL_LOCK.value
    job.locks.append(RunLock(run_dir, steal=steal, on_lost=job.exit_without_run))
    if place := config.checkpoint.mirror:
        flag = "--config.checkpoint.mirror"  # if the mirror vanishes, the run continues
        job.locks.append(RunLock(place, flag=flag, steal=steal, on_lost=job.exit_without_run, regain=True))
    # Run and mirror are compared with the configuration before any file of the run changes.
    if (newest := identity.newest_meta(run_dir / "checkpoints")) is not None:
        identity.check(newest, config, data, run_dir)
    if changed := environment.changes(run_dir):
        cli.log.info("changed   the environment: %s; results may differ from here on", changed)
    mirror = None
    if place:
        check_copy = functools.partial(identity.check, config=config, data=data, where=place)
        step, strict = (newest or {}).get("step"), not ALLOW_CONFIG_CHANGE.value
        mirror = Mirror(place, run_dir / "checkpoints", config, check=check_copy, newest=step, strict=strict)
    run_directory.record(run_dir, config, data, sys.argv, environment.numbers())
    if config.init_from and newest is None:
        initial.keep_companions(config, run_dir)
    return mirror


def handle_stop_requests(job: Job, config: Config, dog: watchdog.Watchdog, stop_signals: signals.StopSignals) -> None:
    """From here on a signal to any process stops all of them after the same step, which is saved."""
    from trainer.reliability.coordination import STOP

    job.processes.watched_by(lambda: dog.phase(watchdog.WAITING))
    job.processes.listen_for_requests(
        on_stop=lambda: exit_if_stuck(config.watchdog.stop_s),
        on_early_stop=job.exit_before_first_step,
        on_disconnect=job.exit_deaf,
    )
    stop_signals.connect(lambda: job.processes.request(STOP))


def exit_if_stuck(after_s: float) -> None:
    """Exits if this process has not stopped `after_s` after the request: the machine may soon be taken away."""
    time.sleep(after_s)
    threading.Timer(watchdog.DUMP_LIMIT_S, os._exit, [cli.STOPPED]).start()  # in case writing the log hangs
    cli.log.error("error: not stopped %.0f s after the request; exiting. The stack trace is on stderr", after_s)
    faulthandler.dump_traceback()
    os._exit(cli.STOPPED)


def out_of_memory(error: Exception, stepped: bool) -> UserError:
    """The error in one line. If steps were already done, another program may have taken the memory, and a restart may
    help; otherwise the next attempt would end in the same way."""
    from trainer import xla_options

    what = xla_options.out_of_memory(error)
    if stepped:
        return Stopped(f"{what}what was saved is kept; if the same command ends here again, {MORE_MEMORY}")
    return ConfigError(what + MORE_MEMORY)


def explain_failed_collective(error: Exception, processes: Processes) -> UserError:
    """The error of the other process that made a collective fail here, if it reports one soon."""
    if (reported := processes.remote_error(within_s=EXPLANATION_S)) is not None:
        return reported
    logging.exception("meshlm: a collective failed")
    reason = " ".join(str(error).split())[:200]
    return Stopped(f"a collective failed, probably because another process has ended; see the other logs: {reason}")


def report_end(run_dir: pathlib.Path, config: Config, finished: bool) -> int:
    """Says how to continue, and returns the exit code."""
    if not finished:
        cli.log.info("Stopped and saved in %s; the same command resumes from here.", run_dir)
        return cli.STOPPED
    command = f"python -m launch.sample --workdir={shlex.quote(str(run_dir))}"
    if config.sample.max_new_tokens and config.sample.prompt.isprintable():
        command += f" --prompt={shlex.quote(config.sample.prompt)}"
    cli.log.info("Everything is in %s (metrics.jsonl, tensorboard/, checkpoints/). Next: %s", run_dir, command)
    return 0


if __name__ == "__main__":
    cli.run(main, restarted=True)
