"""Train a model, or go on with a run: the same command on the same --workdir resumes it.

  python -m launch.train --config=configs/tiny.py --workdir=runs/tiny [--config.section.field=value ...]

Ctrl-C or SIGTERM saves and leaves with 42; the same command goes on from there. A second Ctrl-C leaves at once, with
130. Exit codes: 0 done, 2 configuration, 3 data or checkpoint unusable, 4 diverged, 42 stopped and resumable.

Several processes: on TPU pods and under Slurm or Open MPI they find each other; elsewhere give each
--coordinator_address, --num_processes and --process_id.
"""

from __future__ import annotations

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
from trainer.reliability import reading, run_directory, watchdog
from trainer.reliability.run_lock import RunLock

if TYPE_CHECKING:
    from data.sources import Sources
    from trainer.config import Config
    from trainer.reliability.coordination import Processes
    from trainer.reliability.mirror import Mirror

TOLD_S = 1.0  # from a failed collective to the error of another process that explains it
FAILED_S = 5.0  # from the error of another process to the end of this one, whatever it waits for

CONFIG = cli.define_config()
WORKDIR = cli.define_run_path("workdir", None, "Run directory; made, or resumed when it holds a run.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume although the learning rate, batch size and the like were changed."
)
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all.", lower_bound=1)
STEAL_LOCK = flags.DEFINE_bool("steal_lock", False, "Take the run over from the job that holds it, at once.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout_s",
    300,
    "Seconds to wait for the coordinator, the other processes, and their answers.",
    lower_bound=1,
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_s",
    100,
    "Seconds after which a process not heard of counts as dead; the others leave.",
    lower_bound=1,
)
COMPILATION_CACHE = cli.define_run_path(
    "compilation_cache",
    None,
    "Folder for compiled programs; empty for none; default: $JAX_COMPILATION_CACHE_DIR, or .xla beside --workdir.",
)

MORE_MEMORY = (
    "raise config.grad_accum_steps, lower config.global_batch_size or config.loss_chunk_tokens, choose "
    "config.model.remat=full, or split the model over more devices (config.mesh.fsdp)"
)


def main() -> int:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing; name a folder for the run, for example --workdir=runs/tiny")
    run = pathlib.Path(WORKDIR.value)
    listening = signals.Signals()
    gang = (COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    # One process is answered before JAX is loaded, which takes a second; of several, all hear of one's mistake.
    config = prepare(run) if runtime.seems_alone(*gang) else None

    malloc.tune_allocator()
    runtime.use_gpu_memory()
    environment.load_jax()
    from launch import distributed
    from trainer.reliability.coordination import Processes

    watchdog.dump_on_quit(None)
    told = distributed.initialize(
        *gang, run=WORKDIR.value, timeout_s=START_TIMEOUT.value, heartbeat_s=HEARTBEAT_TIMEOUT.value
    )
    processes, locks = Processes(START_TIMEOUT.value), list[RunLock]()
    processes.listen_for_errors(
        lambda error: leave_with(error, processes, locks, after_s=FAILED_S if error.process else 0)
    )
    try:
        processes.check_same("number of processes", {"--num_processes": told})
        config = processes.run_on_all("configuration", lambda: config or prepare(run))
        runtime.use_compilation_cache(run, COMPILATION_CACHE.value)
        finished = train(run, config, processes, locks, listening)
    except BaseException as e:
        processes.report_error(e)
        processes.exit_barrier(e)
        raise
    distributed.shutdown()
    listening.close()
    command = f"python -m launch.sample --workdir={shlex.quote(str(run))}"
    if config.sample.prompt.isprintable():
        command += f" --prompt={shlex.quote(config.sample.prompt)}"
    if finished:
        cli.log.info("Everything is in %s (metrics.jsonl, tensorboard/, checkpoints/). Go on: %s", run, command)
        return 0
    cli.log.info("Stopped and saved in %s; the same command goes on from here.", run)
    return cli.STOPPED


def train(
    run: pathlib.Path, config: Config, processes: Processes, locks: list[RunLock], listening: signals.Signals
) -> bool:
    """Whether the run is finished; if not, it was stopped and saved."""
    import jax

    from trainer import xla_options
    from trainer.loop import Trainer
    from trainer.reliability.coordination import STOP

    dog = trainer = None
    try:
        data, mirror = enter(run, config, processes, locks)
        dog = watchdog.Watchdog(run, config.watchdog, processes.index, of=processes.size)
        processes.watched_by(lambda: dog.phase(watchdog.WAITING))
        processes.listen_for_requests(
            on_stop=lambda: give_up(config.watchdog.stop_s),
            on_early_stop=lambda: leave_at_once(processes, locks),
            on_disconnect=lambda error: leave_deaf(error, processes, locks),
        )
        listening.connect(lambda: processes.request(STOP))
        trainer = Trainer(config, run, data, processes, dog, mirror=mirror)
        finished = trainer.train()
        processes.close()
        return finished
    except jax.errors.JaxRuntimeError as e:
        if xla_options.is_out_of_memory(e):
            raise out_of_memory(e, stepped=trainer is not None and trainer.has_stepped) from e
        if processes.size == 1:
            raise
        if (told := processes.remote_error(within_s=TOLD_S)) is not None:
            raise told from None
        logging.exception("meshlm: a collective failed")
        reason = " ".join(str(e).split())[:200]
        raise Stopped(f"a collective failed, probably as another process is gone; see the other logs: {reason}") from e
    finally:
        if dog is not None:
            dog.close()
        for lock in locks:
            lock.release()


def out_of_memory(error: Exception, stepped: bool) -> UserError:
    """In one line. Once steps were done in this life, they or another program may have left too little by chance; else
    the next life would end like this one."""
    from trainer import xla_options

    what = xla_options.out_of_memory(error)
    if stepped:
        return Stopped(f"{what}what was saved is kept; if the same command ends here again, {MORE_MEMORY}")
    return ConfigError(what + MORE_MEMORY)


def prepare(run: pathlib.Path) -> Config:
    """The configuration, completed by the dataset and compared with the run's."""
    config = run_directory.resolve(cli.config_from(CONFIG.value))
    run_directory.check_mirror(run, config.checkpoint.mirror)
    return run_directory.check_changes(run, config, ALLOW_CONFIG_CHANGE.value)


def enter(
    run: pathlib.Path, config: Config, processes: Processes, locks: list[RunLock]
) -> tuple[Sources, Mirror | None]:
    """Makes sure that all processes are about to train the same, and takes the run; process 0 gets its locks.

    Returns the dataset and, on process 0, the mirror.
    """
    from data import sources
    from launch import distributed
    from trainer import optimizer, sampling, sharding, xla_options
    from trainer.parallel.partitioner import MeshPartitioner
    from trainer.reliability import identity
    from trainer.reliability.mirror import Mirror

    # Before anything is written: a refused gang leaves no run behind. Axes, devices, batch and model must divide, and a
    # kernel be found; the answer should not wait for the rest.
    processes.check_same("setting", distributed.identity(config))
    placed = processes.run_on_all("mesh", lambda: MeshPartitioner(config, sharding.make_mesh(config)))
    processes.run_on_all("optimizer", lambda: optimizer.chosen(config.optimizer))
    xla_options.use_precision(config.model.dtype, placed.mesh)  # before what holds is recorded
    data = processes.run_on_all("data", lambda: sources.open_sources(config.data, config.model.vocab_size))
    tokenizer = data.speaker.manifest.tokenizer_sha256
    processes.check_same("dataset", {"tokens and order": data.fingerprint(), "tokenizer": tokenizer})
    processes.run_on_all("prompt", lambda: sampling.prompt_of(config, data.load_tokenizer()))

    def lost(message: str) -> None:
        """The run is another job's now: nothing more may be written to it."""
        error = ConfigError(message)
        cli.log.error("error: %s", error)
        threading.Timer(TOLD_S, os._exit, [error.exit_code]).start()
        processes.report_error(error)
        processes.exit_barrier()
        os._exit(error.exit_code)

    def take() -> Mirror | None:
        locks.append(RunLock(run, steal=STEAL_LOCK.value, on_lost=lost))
        if place := config.checkpoint.mirror:
            flag = "--config.checkpoint.mirror"  # a place for copies that vanishes must not end the run
            locks.append(RunLock(place, flag=flag, steal=STEAL_LOCK.value, on_lost=lost, regain=True))
        # Both are compared before any file of the run changes.
        if (newest := identity.newest_meta(run / "checkpoints")) is not None:
            identity.check(newest, config, data, run)
        if changed := environment.changes(run):
            cli.log.info("changed   the environment: %s; numbers may be others from here on", changed)
        mirror = None
        if place:
            of_copy = functools.partial(identity.check, config=config, data=data, where=place)
            step, strict = (newest or {}).get("step"), not ALLOW_CONFIG_CHANGE.value
            mirror = Mirror(place, run / "checkpoints", config, check=of_copy, newest=step, strict=strict)
        run_directory.record(run, config, data, sys.argv, environment.numbers())
        return mirror

    mirror = processes.run_on_process_0("run directory", take)
    # Every process must find there what process 0 has just written.
    seen = processes.run_on_all("shared run directory", lambda: run_directory.recorded(run))
    # And under the same name, or Orbax would refuse each save.
    where = {"environment.json": seen, "path": str(run.resolve())}
    processes.check_same("run directory (it must be shared by all)", where)
    if processes.index:
        cli.quiet_console()
    log = run / f"log.{processes.index}.txt"
    processes.run_on_all("log", lambda: reading.writing(lambda: cli.log_to_file(log), log))
    return data, mirror


def leave_at_once(processes: Processes, locks: list[RunLock]) -> None:
    """Told to stop before the first step was done: there is nothing to save, and a compilation may take minutes."""
    cli.log.info("Stopped before the first step was done; the same command goes on from here.")
    processes.exit_barrier()
    for lock in locks:
        lock.release()
    os._exit(cli.STOPPED)


def leave_with(error: UserError, processes: Processes, locks: list[RunLock], after_s: float) -> None:
    """For an error that is not of the main thread, which may wait for ever for a process that has ended.

    It ends by itself within `after_s` where it does not wait, and may have a save to wait for. Process 0 has waited for
    the saves of all before it told the others of its error.
    """
    time.sleep(after_s)
    cli.log.error("error: %s", error)
    processes.exit_barrier(error)
    for lock in locks:
        lock.release()
    os._exit(error.exit_code)


def leave_deaf(error: UserError, processes: Processes, locks: list[RunLock]) -> None:
    """Requests to stop and to save would come to nothing from now on."""
    processes.report_error(error)
    leave_with(error, processes, locks, after_s=FAILED_S)


def give_up(after_s: float) -> None:
    """A process that was told to stop and is stuck must still leave, before the machine is taken away."""
    time.sleep(after_s)
    threading.Timer(watchdog.DUMP_LIMIT_S, os._exit, [cli.STOPPED]).start()  # should the log be what is stuck
    cli.log.error("error: not stopped %.0f s after being asked to; leaving. Where it is stands on stderr", after_s)
    faulthandler.dump_traceback()
    os._exit(cli.STOPPED)


if __name__ == "__main__":
    cli.run(main, restarted=True)
