"""The supervisor with real child processes: small scripts that save, die and exit as instructed, without JAX."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import runtime, supervise
from tests import runs
from trainer.reliability import restarts

TIMEOUT_S = 20
# CHILD --workdir=RUN ATTEMPTS plays the next entry of ATTEMPTS. "save" is a step to commit; "step" is the step of a
# row; "end" is an exit code, a signal's name, or "wait". In the last case the child notes each signal that it gets in
# RUN/signals; "codes" has, for each of these signals, an exit code, or None to continue.
CHILD = """
import json, os, pathlib, signal, sys, time
run, played = pathlib.Path(sys.argv[1].partition("=")[2]), json.loads(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
(run / "config.json").touch()
with (run / "starts").open("a") as f:
    f.write(f"{os.getpid()} {os.getsid(0)}\\n")
life = played[min(len((run / "starts").read_text().splitlines()), len(played)) - 1]
with (run / "metrics.jsonl").open("a") as f:
    if "step" in life:
        f.write(json.dumps({"step": life["step"], "tokens": 1, "perf/step_time_s": 1e-4}) + "\\n")
if "save" in life:
    (run / "checkpoints" / str(life["save"])).mkdir(parents=True)
    (run / "checkpoints" / str(life["save"]) / "_CHECKPOINT_METADATA").touch()
codes = list(life.get("codes", []))
def note(number, frame):
    with (run / "signals").open("a") as f:
        f.write(signal.Signals(number).name + "\\n")
    code = codes.pop(0)
    if code is not None:
        os._exit(code)
if life["end"] == "wait":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, note)
    (run / "ready").touch()
    for _ in range(600):  # bounded, should a test fail to end it
        time.sleep(0.05)
    os._exit(99)
if isinstance(life["end"], str):
    os.kill(os.getpid(), getattr(signal, life["end"]))
print("child leaves", flush=True)
os._exit(life["end"])
"""


class Supervised:
    """A supervisor of a run in `folder` whose attempts are `played`; the last attempt is repeated if more are
    needed."""

    def __init__(self, folder: pathlib.Path, *played: dict, flags: tuple[str, ...] = ("--backoff_s=0.01",), **env: str):
        self.run = folder / "run"
        script = folder / "child.py"
        script.write_text(CHILD)
        child = [sys.executable, "-I", "-S", str(script), f"--workdir={self.run}", json.dumps(played)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.supervise", *flags, "--", *child],
            cwd=runs.ROOT,
            env={k: v for k, v in os.environ.items() if k not in runtime.RANKS} | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def leaves(self, code: int) -> str:
        """Waits at most TIMEOUT_S for the supervisor's end, asserts the exit code, and returns the output."""
        try:
            self.out, self.err = self.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == code, (self.out, self.err)
        return self.out

    def until(self, name: str) -> None:
        """Waits until the child has written RUN/name."""
        until(lambda: (self.run / name).exists())

    def words(self, name: str) -> list[str]:
        return (self.run / name).read_text().splitlines()

    def lives(self, process: str = "") -> list[restarts.Attempt]:
        return restarts.read_attempts(self.run / f"lives{process}.jsonl")


def until(true) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


# Restarts


def test_what_is_started_again(tmp_path):
    played = [
        {"end": 42, "save": 10, "step": 10},
        {"end": 1, "save": 20, "step": 20},
        {"end": 134, "save": 30, "step": 37},
        {"end": "SIGKILL", "save": 40, "step": 40},
        {"end": "SIGSEGV"},
        {"end": 0, "save": 50, "step": 50},
    ]
    supervised = Supervised(tmp_path, *played)
    out = supervised.leaves(0)
    assert supervised.err == ""
    written = supervised.lives()
    causes = ["stopped (42)", "exit code 1", "exit code 134", "signal SIGKILL", "signal SIGSEGV", "done"]
    assert [life.cause for life in written] == causes
    assert [life.code for life in written] == [42, 1, 134, 137, 139, 0]
    assert [life.life for life in written] == [1, 2, 3, 4, 5, 6]
    assert [(life.first_step, life.last_step) for life in written] == [
        *((0, 10), (10, 20), (20, 30), (30, 40), (40, 40), (40, 50))
    ]
    assert [life.lost_steps for life in written] == [0, 0, 7, 0, 0, 0]
    assert [life.waited > 0 for life in written] == [False, True, True, True, True, True]
    wall = sum(life.seconds + life.waited for life in written)
    assert written[-1].goodput == pytest.approx(50e-4 / wall)
    assert out.count("child leaves") == 4  # the child's output is passed through
    assert "steps lost 7, goodput " in out
    assert all(cause in out for cause in causes)


@pytest.mark.parametrize("code", [2, 3, 4, 5, 127, 130])
def test_what_is_not(tmp_path, code):
    supervised = Supervised(tmp_path, {"end": code})
    out = supervised.leaves(code)
    assert len(supervised.words("starts")) == 1
    assert supervised.lives()[0].cause == f"exit code {code}"
    assert out == "child leaves\n" and supervised.err == ""


def test_three_restarts_without_progress_are_the_end(tmp_path):
    supervised = Supervised(tmp_path, {"end": 1}, {"end": 134}, {"end": 42}, {"end": "SIGKILL"})
    supervised.leaves(137)
    assert len(supervised.words("starts")) == 4
    (line,) = supervised.err.splitlines()
    for part in (
        "3 restarts",
        "exit codes 134, 42, 137",
        f"{supervised.run}/log.0.txt",
        f"{supervised.run}/lives.jsonl",
    ):
        assert part in line


def test_progress_resets_count_and_wait(tmp_path):
    crash = {"end": 1}
    supervised = Supervised(
        tmp_path,
        *(crash, crash, {"end": 1, "save": 10}, crash, {"end": 1, "save": 20}, crash, crash),
        flags=("--backoff_s=0.05", "--max_restarts_without_progress=2"),
    )
    out = supervised.leaves(1)
    assert len(supervised.words("starts")) == 7
    waits = [0.05, 0.1, 0.05, 0.1, 0.05, 0.1]
    assert [float(line.split()[-2]) for line in out.splitlines() if "Restarting in" in line] == waits
    assert all(life.waited >= wait for life, wait in zip(supervised.lives()[1:], waits, strict=True))


def test_waits_have_a_limit(tmp_path):
    supervised = Supervised(tmp_path, {"end": 1}, flags=("--backoff_s=0.02", "--max_backoff_s=0.03"))
    assert supervised.leaves(1).count("in 0.03 s") == 2


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_is_passed_on_once_and_ends_it(tmp_path, name):
    supervised = Supervised(tmp_path, {"end": "wait", "codes": [42]})
    supervised.until("ready")
    os.killpg(supervised.process.pid, signal.Signals[name])  # a terminal also signals the whole group
    supervised.leaves(42)
    assert supervised.words("signals") == [name]
    assert [life.cause for life in supervised.lives()] == ["stopped (42)"]
    child, session = supervised.words("starts")[0].split()
    assert child == session


def test_nohup_is_heeded(tmp_path):
    """Under nohup, a run does not stop when a terminal is closed, but it stops at SIGTERM."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup starts a command in this way
    try:
        supervised = Supervised(tmp_path, {"end": "wait", "codes": [42]})
    finally:
        signal.signal(signal.SIGHUP, before)
    supervised.until("ready")
    supervised.process.send_signal(signal.SIGHUP)
    supervised.process.send_signal(signal.SIGTERM)
    supervised.leaves(42)
    assert supervised.words("signals") == ["SIGTERM"]


def test_each_signal_is_passed_on(tmp_path):
    supervised = Supervised(tmp_path, {"end": "wait", "codes": [None, None, 130]})
    supervised.until("ready")
    for count, number in enumerate((signal.SIGUSR1, signal.SIGINT, signal.SIGINT), start=1):
        supervised.process.send_signal(number)
        if count < 3:
            supervised.until("signals")
            until(lambda: len(supervised.words("signals")) == count)  # noqa: B023
    supervised.leaves(130)
    assert supervised.words("signals") == ["SIGUSR1", "SIGINT", "SIGINT"]
    assert len(supervised.words("starts")) == 1


def test_a_question_where_it_is_does_not_end_it(tmp_path):
    supervised = Supervised(tmp_path, {"end": "wait", "codes": [1]}, {"end": 0})
    supervised.until("ready")
    supervised.process.send_signal(signal.SIGQUIT)
    supervised.leaves(0)
    assert supervised.words("signals") == ["SIGQUIT"]


def test_a_crash_after_a_signal_is_not_started_again(tmp_path):
    supervised = Supervised(tmp_path, {"end": "wait", "codes": [134]})
    supervised.until("ready")
    supervised.process.terminate()
    supervised.leaves(134)
    assert len(supervised.words("starts")) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_between_two_lives_ends_it_at_once(tmp_path, name):
    supervised = Supervised(tmp_path, {"end": 1, "save": 10}, flags=("--backoff_s=60",))
    supervised.until("lives.jsonl")
    until(lambda: supervised.lives())
    start = time.monotonic()
    supervised.process.send_signal(signal.Signals[name])
    out = supervised.leaves(42)
    assert time.monotonic() - start < 5
    assert "resumes from step 10" in out
    assert len(supervised.words("starts")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_supervisor_stops_its_child(tmp_path):
    supervised = Supervised(tmp_path, {"end": "wait", "codes": [42]})
    supervised.until("ready")
    supervised.process.kill()
    supervised.leaves(-signal.SIGKILL)  # waits until all processes that hold the pipes have ended, also the child
    assert supervised.words("signals") == ["SIGTERM"]


# lives.jsonl


def test_a_second_supervisor_goes_on_with_the_file(tmp_path):
    Supervised(tmp_path, {"end": 42, "save": 10}, {"end": 3}).leaves(3)
    path = tmp_path / "run" / "lives.jsonl"
    with path.open("a") as f:
        f.write('{"life": 3, "start": "2')
    (tmp_path / "run" / "starts").unlink()
    again = Supervised(tmp_path, {"end": 0, "save": 20})
    out = again.leaves(0)
    assert [(life.life, life.cause) for life in again.lives()] == [(1, "stopped (42)"), (2, "exit code 3"), (3, "done")]
    assert [life.waited > 0 for life in again.lives()] == [False, True, False]
    assert len(path.read_text().splitlines()) == 3
    assert "done" in out and "exit code 3" not in out and "attempts 3" in out  # lists its own, counts all


def test_supervision_goes_on_when_the_file_cannot_be_written(tmp_path):
    (tmp_path / "run" / "lives.jsonl").mkdir(parents=True)
    supervised = Supervised(tmp_path, {"end": 1, "save": 10}, {"end": 0, "save": 20})
    assert "lives.jsonl cannot be written" in supervised.leaves(0)


def test_a_missing_run_is_left_missing(tmp_path):
    """If a command dies before it creates its run, the supervisor writes no files there."""
    argv = [sys.executable, "-m", "launch.supervise", "--backoff_s=0", f"--workdir={tmp_path / 'run'}", "--", "false"]
    assert subprocess.run(argv, cwd=runs.ROOT, capture_output=True, timeout=TIMEOUT_S).returncode == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({"SLURM_PROCID": "2"}, ".2"),
        ({"OMPI_COMM_WORLD_RANK": "3"}, ".3"),
        ({"JOB_COMPLETION_INDEX": "1", "TPU_WORKER_ID": "x"}, ".1"),
        ({"TPU_WORKER_ID": "0"}, ""),
    ],
)
def test_each_process_has_its_own_file(tmp_path, environment, process):
    supervised = Supervised(tmp_path, {"end": 0}, **environment)
    supervised.leaves(0)
    assert len(supervised.lives(process)) == 1


def test_a_process_that_is_told_its_number(tmp_path):
    """On TPU VMs the environment does not have the process number."""
    supervised = Supervised(tmp_path, {"end": 0}, flags=("--process=5",), TPU_WORKER_ID="2")
    supervised.leaves(0)
    assert len(supervised.lives(".5")) == 1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--workdir=a", "a"),
        ("-workdir a", "a"),
        ("--workdir a --workdir=b=c", "b=c"),
        ("--workdir", ""),
        ("--workdirs=a workdir=b", None),
    ],
)
def test_flags_of_the_command(words, value):
    assert supervise._flag(words.split(), "workdir") == value


def test_process_id_of_the_command_comes_first(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert supervise._process(["x", "--process_id=1"]) == 1
    assert supervise._process(["x", "--process_id=what"]) == 2


# Mistakes


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ((), ["name a command"]),
        (("--",), ["name a command"]),
        (("--", "no-such-command", "--workdir=x"), ["no-such-command"]),
        (("--", "true"), ["--workdir"]),
        (("--backof_s=1", "--", "true"), ["--backof_s", "did you mean --backoff_s?"]),
        (("--max_restarts_without_progress=0", "--", "true"), ["max_restarts_without_progress", "0"]),
        (("--workdir=x", "--", "SCRIPT"), ["cannot be started"]),
    ],
)
def test_one_line_for_each_mistake(tmp_path, argv, parts):
    (tmp_path / "script").write_bytes(b"\0")
    (tmp_path / "script").chmod(0o755)
    argv = [word.replace("SCRIPT", str(tmp_path / "script")) for word in argv]
    result = subprocess.run(
        [sys.executable, "-m", "launch.supervise", *argv],
        cwd=runs.ROOT,
        text=True,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 2 and result.stdout == "", result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_it_does_not_load_jax():
    code = "import sys, launch.supervise; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT).returncode == 0
