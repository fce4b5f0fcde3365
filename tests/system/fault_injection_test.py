"""Tiny runs whose file operations fail at random: no saved step is lost, and the same command resumes the run.

  python -m tests.system.fault_injection_test --runs=500 --seed=1

fault_injector.c is preloaded and makes open, read, write, rename, fsync and unlink fail, wait, or do less than
requested; only files of the run are affected. All runs are forks of one process that has loaded the libraries.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import itertools
import json
import logging
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

from tests import runs

SOURCE = pathlib.Path(__file__).with_name("fault_injector.c")
STEPS = 8
FIELDS = {
    "num_train_steps": STEPS,
    "optimizer__warmup_steps": 2,
    "model__num_layers": 1,
    "model__embed_dim": 16,
    "model__num_heads": 2,
    "data__seq_len": 16,
    "eval__every_steps": 4,
    "eval__num_windows": 8,
    "checkpoint__every_steps": 2,
    "sample__max_new_tokens": 2,
    "metrics__tensorboard": True,
}
OPERATIONS = ["open", "read", "write", "rename", "fsync", "unlink"]
DOCUMENTED = {0, 2, 3, 42, 128 + signal.SIGKILL}
ERRORS = ["EIO", "ESTALE", "EACCES", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "ENOSPC", "EINTR"]
LIMIT_S = 300


@dataclasses.dataclass
class Plan:
    """Which calls break. The bits of `only` select operations. Of their calls, counted from 0, `count` calls from
    `first` on break, each with a probability of `chance` in 1000.

    If `error` is 0, the call fails with any error that it may return. With delay_ms or shorten, the call is delayed or
    does less than requested instead of failing; with kill, the process is killed.
    """

    seed: int
    only: int = 63
    first: int = 0
    count: int = 1
    chance: int = 1000
    error: int = 0
    delay_ms: int = 0
    shorten: int = 0
    kill: int = 0

    def __str__(self) -> str:
        names = "+".join(name for i, name in enumerate(OPERATIONS) if self.only >> i & 1)
        what = "kill" if self.kill else "less" if self.shorten else f"<{self.delay_ms} ms" if self.delay_ms else ""
        what = what or (errno.errorcode[self.error] if self.error else "errors")
        return f"{what} at {names}: {self.count} from {self.first}, {self.chance}/1000"


def random_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    only = rng.choice([63, 63, 1 << rng.randrange(6), 1 << rng.randrange(6), 0b000011, 0b111100])
    # A tiny run calls open and read about five hundred times, and each other operation fifty to a hundred times.
    first = int(10 ** rng.uniform(0, 2.7 if only & 0b11 else 2)) - 1
    plan = Plan(seed, only, first)
    plan.count, plan.chance = rng.choice([(1, 1000), (1, 1000), (5, 1000), (100, 1000), (10**9, 1000), (10**9, 30)])
    how = rng.random()
    if how < 0.1:
        plan.kill, plan.count = 1, 1
    elif how < 0.2:
        plan.delay_ms, plan.count, plan.chance = 300, 10**9, 50
    elif how < 0.3:
        plan.shorten, plan.only = 1, plan.only & 0b000110 or 0b000110
    elif how < 0.6:
        plan.error = getattr(errno, rng.choice(ERRORS))
        if plan.error == errno.EINTR:
            plan.count = min(plan.count, 5)  # Python retries an interrupted call forever
    return plan


# One process that has loaded the libraries


class Forks:
    """Runs commands as forks of a process that has imported the libraries, because imports take seconds."""

    def __init__(self, library: pathlib.Path):
        environment = runs.environment(LD_PRELOAD=str(library), INJECTOR=str(library))
        argv = [sys.executable, "-m", "tests.system.fault_injection_test", "--serve"]
        self._process = subprocess.Popen(
            argv, cwd=runs.ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, argv: list[str], out: pathlib.Path, plan: Plan | None = None, folder: str = "") -> int:
        """Returns the exit code (128 + n for signal n). `out` gets the output; a file beside it has the broken
        calls."""
        assert self._process.stdin is not None and self._process.stdout is not None
        arm = {**dataclasses.asdict(plan), "folder": folder} if plan else None
        self._process.stdin.write(json.dumps({"argv": argv, "out": str(out), "arm": arm}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    import jax  # noqa: F401
    import optax  # noqa: F401
    import tensorboardX  # noqa: F401
    import tensorstore  # noqa: F401

    import trainer.loop  # noqa: F401

    library = ctypes.CDLL(os.environ["INJECTOR"])
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(job, library)
        print(json.dumps(_wait(child)), flush=True)


def _wait(child: int) -> int:
    deadline = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGQUIT)
            time.sleep(2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _become(job: dict, library: ctypes.CDLL) -> None:
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if plan := job["arm"]:
        log = os.open(f"{job['out']}.calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        library.injector_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long] + [
            ctypes.c_int] * 5 + [ctypes.c_uint64, ctypes.c_int]  # fmt: skip
        fields = [plan[n] for n in ("only", "first", "count", "chance", "error", "delay_ms", "shorten", "kill", "seed")]
        library.injector_arm(plan["folder"].encode(), *fields, log)
    sys.argv = job["argv"]
    try:
        runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        logging.exception("not caught")
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        import atexit

        atexit._run_exitfuncs()
    os._exit(code)


# The test


class World:
    """An undisturbed run, with which broken runs are compared, and its first half, from which some broken runs
    start."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        library = folder / "fault_injector.so"
        cc = shutil.which("cc") or pytest.skip("there is no C compiler")
        subprocess.run([cc, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
        self.data = runs.dataset(folder)
        self.forks = Forks(library)
        self.whole, self.half = folder / "whole", folder / "half"
        out = folder / "out"
        for run, fields in ((self.whole, {}), (self.half, {"optimizer__decay_steps": STEPS, "num_train_steps": 4})):
            assert self.forks.run(self.command(run, **fields), out) == 0, out.read_text()
        self.losses = runs.losses(self.whole)
        assert len(self.losses) > STEPS

    def command(self, run: pathlib.Path, **fields) -> list[str]:
        return runs.command(run, self.data, **{**FIELDS, "optimizer__decay_steps": STEPS, **fields})[2:]

    def broken(self, seed: int) -> tuple[list[str], str]:
        """Runs a training with faults. Returns what is wrong afterwards, and a line that describes the run."""
        rng = random.Random(seed)
        run = self.folder / f"run{seed}"
        if rng.random() < 0.6:
            shutil.copytree(self.half, run)
        plan, wrong, codes, broken = random_plan(seed), list[str](), list[int](), 0
        before = healthy(run)
        out = run.with_suffix(".out")
        calls = out.with_name(out.name + ".calls")
        for life in range(rng.choice([1, 1, 2])):
            plan.seed = seed * 10 + life
            code = self.forks.run(self.command(run), out, plan, str(run.resolve()))
            codes.append(code)
            broken += len(calls.read_text(errors="replace").splitlines())
            text = out.read_text(errors="replace")
            said = [line for line in text.splitlines() if line.startswith("error: ")]
            if code not in DOCUMENTED or (code in (2, 3) and len(said) != 1):
                wrong.append(f"life {life} ended with {code}, saying {said}")
            if before and (left := max(healthy(run), default=0)) < max(before):
                wrong.append(f"had steps {before}, and now the newest is {left}")
            before = healthy(run)
        last = run.with_suffix(".last")
        if code := self.forks.run(self.command(run), last):
            wrong.append(f"the same command, undisturbed, ended with {code}")
        elif runs.losses(run) != self.losses:
            wrong.append("the losses are others")
        elif (
            before
            and f"Resuming after step {max(before)}." not in (text := last.read_text())
            and (f"already has its {STEPS} steps" not in text)
        ):
            wrong.append(f"it did not resume from step {max(before)}")
        if moved := healthy(run, "quarantine"):
            wrong.append(f"healthy steps are in quarantine: {moved}")
        if not wrong:
            shutil.rmtree(run)
            for path in (out, last, calls):
                path.unlink(missing_ok=True)
        return wrong, f"seed {seed}: {plan}; {broken} broken, codes {codes}"


def healthy(run: pathlib.Path, folder: str = "checkpoints") -> list[int]:
    """The complete steps in a folder: they have all files, and the name that Orbax gives a step after writing it."""
    found = []
    for path in (run / folder).glob("*"):
        name = path.name.split(".")[0]
        parts = [path / "_CHECKPOINT_METADATA", *(path / item / "manifest.ocdbt" for item in ("params", "opt_state"))]
        if name.isdigit() and "orbax-checkpoint-tmp" not in path.name and all(p.exists() for p in parts):
            if folder == "checkpoints" and not path.name.isdigit():
                continue
            found.append(int(name))
    return sorted(found)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.forks.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_run_whose_calls_fail(world, seed):
    wrong, line = world.broken(seed)
    assert not wrong, line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--keep", default="", help="folder for what failed")
    options = parser.parse_args()
    if options.serve:
        return serve()
    folder = options.keep or tempfile.mkdtemp()
    world, failed, start = World(pathlib.Path(folder)), list[int](), time.monotonic()
    for seed in itertools.islice(itertools.count(options.seed), options.runs):
        wrong, line = world.broken(seed)
        print(f"{'WRONG' if wrong else 'ok'} {line} {'; '.join(wrong)}", flush=True)
        failed += [seed] * bool(wrong)
    world.forks.close()
    print(f"{options.runs} runs, {len(failed)} wrong {failed}, {time.monotonic() - start:.0f} s, in {folder}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
