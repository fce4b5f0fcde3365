"""launch/local/run.sh: the processes of a run on one machine are stopped, killed and restarted, as on a pod."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tests.system.faults import interrupted
from trainer.reliability import restarts

SCRIPT = str(runs.ROOT / "launch/local/run.sh")
TRAIN = [sys.executable, "-m", "launch.train", "--config=configs/tiny.py", "--workdir=runs/x"]
SOON_S = 60


def script(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs run.sh to its end, without any training."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [SCRIPT, *words], cwd=runs.ROOT, env=variables, capture_output=True, text=True, timeout=SOON_S
    )


# What is started


def test_scripts_of_a_clone_that_git_gives_the_ends_of_lines_of_windows(tmp_path):
    """If git writes CRLF, each script would fail at its first line: "bash\\r: No such file"."""
    source = tmp_path / "source"
    source.mkdir()
    for name in (".gitattributes", "Makefile"):
        shutil.copy(runs.ROOT / name, source)
    shutil.copytree(runs.ROOT / "tests/system/fakes", source / "tests/system/fakes")
    runs.clone(source)
    for words in ("add -A", "-c user.name=x -c user.email=x commit -q -m x"):
        subprocess.run(["git", *words.split()], cwd=source, check=True)
    there = tmp_path / "there"
    subprocess.run(["git", "-c", "core.autocrlf=true", "clone", "-q", source, there], check=True)
    files = [path for path in there.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert b"\r\n" in (there / "launch/__init__.py").read_bytes(), "git has done it"
    started = [path for path in files if path.read_bytes().startswith(b"#!") or path.suffix in (".sh", ".sbatch")]
    read_by_tools = [path for path in files if path.suffix == ".env" or path.name in ("Makefile", "Dockerfile")]
    assert len(started) > 30 and len(read_by_tools) > 2
    assert [path for path in started + read_by_tools if b"\r" in path.read_bytes()] == []
    argv = [there / "launch/local/run.sh", "--dry_run", "--", *TRAIN]
    ended = subprocess.run(argv, cwd=there, capture_output=True, text=True, timeout=SOON_S)
    assert ended.returncode == 0, ended


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command; it follows --"),
        (["--processes=2"], "no command; it follows --"),
        (["--procs=2", "--", *TRAIN], "unknown flag --procs; the flags are --processes"),
        (["2", "--", *TRAIN], "unexpected argument 2"),
        (["--processes=0", "--", *TRAIN], "--processes=0 must be a whole number, 1 or more"),
        (["--processes=two", "--", *TRAIN], "--processes=two must be a whole number"),
        (["--devices_per_process=08", "--", *TRAIN], "--devices_per_process=08 must be"),
        (["--", sys.executable, "-m", "launch.evaluate", "--workdir=x"], "must look like python -m launch.train "),
        (["--", "/nowhere/python3", *TRAIN[1:]], "/nowhere/python3 is not a command here; activate the environment"),
        (["--", *TRAIN[:4]], "the command has no --workdir"),
        (["--", *TRAIN, "--process_id=0"], "--process_id=0 is set for each process; leave it out"),
        (["--nodes=2", "--", *TRAIN], "--nodes=2 needs --node=I, from 0, and --coordinator=HOST:PORT"),
        (["--nodes=2", "--node=2", "--coordinator=h:1", "--", *TRAIN], "--node=2 must be below --nodes=2"),
        (["--nodes=2", "--node=0", "--coordinator=h", "--", *TRAIN], "--coordinator=h must be HOST:PORT"),
    ],
)
def test_mistakes(words, message):
    done = script(*words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and message in line and not done.stdout


def test_a_python_without_our_packages(tmp_path):
    """The system's Python lacks our packages if the environment was not activated."""
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    for launcher in ("local", "gpu"):
        argv = [runs.ROOT / f"launch/{launcher}/run.sh", "--", bare, *TRAIN[1:]]
        done = subprocess.run(argv, text=True, capture_output=True, timeout=60)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and f"{bare} lacks our packages; activate the environment" in line


def test_words_arrive_as_they_are():
    odd = ['--config.sample.prompt=it\'s "$HOME" `x`; &\n*', "--workdir=runs/a b", ""]
    done = script("--processes=2", "--devices_per_process=3", "--dry_run", "--", *TRAIN, *odd, XLA_FLAGS="--xla_a=b c")
    words, count = shlex.split(done.stdout), len(TRAIN) + len(odd) + 9
    assert done.returncode == 0 and not done.stderr and len(words) == 2 * count
    ports = set()
    for i, own in enumerate((words[:count], words[count:])):
        assert own[:6] == [
            *("env", "XLA_FLAGS=--xla_a=b c --xla_force_host_platform_device_count=3"),
            *(sys.executable, "-m", "launch.supervise", "--"),
        ]
        assert own[6:-3] == [*TRAIN, *odd] and own[-2:] == ["--num_processes=2", f"--process_id={i}"]
        host, _, port = own[-3].partition("=")[2].partition(":")
        assert host == "localhost"
        ports.add(int(port))
    (port,) = ports
    first_of_the_kernel = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 20_000 <= port < 30_000 <= first_of_the_kernel


def test_several_machines():
    place = ("--nodes=3", "--node=1", "--coordinator=10.0.0.1:1234")
    done = script("--processes=2", "--per_gpu", *place, "--dry_run", "--", *TRAIN)
    for i, line in enumerate(done.stdout.splitlines()):
        words = shlex.split(line)
        assert words[:2] == ["env", f"JAX_LOCAL_DEVICE_IDS={i}"]
        assert words[-3:] == ["--coordinator_address=10.0.0.1:1234", "--num_processes=6", f"--process_id={2 + i}"]


def test_one_process_needs_no_coordinator():
    done = script("--processes=1", "--dry_run", "--", *TRAIN)
    assert shlex.split(done.stdout) == [sys.executable, "-m", "launch.supervise", "--", *TRAIN]


# Concurrent commands, without training


def gang(*commands: list[str]) -> subprocess.Popen:
    """Starts the commands in one process group, as a terminal would."""
    lines = [shlex.join(command) for command in commands]
    argv = [sys.executable, "-m", "launch.local_launcher", *lines]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(argv, cwd=runs.ROOT, text=True, stdout=pipe, stderr=both, start_new_session=True)


def bash(text: str) -> list[str]:
    return ["bash", "-c", text]


def listening(folder: pathlib.Path, name: str, then: str = "") -> list[str]:
    """A command that prints which signals it gets, runs `then` at a SIGTERM, and ends by itself after a minute."""
    traps = "".join(f"trap 'echo {s}' {s}; " for s in ("INT", "USR1", "QUIT")) + f"trap 'echo TERM; {then}' TERM; "
    return bash(f"{traps} touch {folder}/{name}; for ((i = 0; i < 1200; i++)); do sleep 0.05; done")


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, 42], 42),
        ([42, 134, 42], 134),
        ([1, 42], 1),
        ([134, 2], 2),
        ([42, 3, 1], 3),
        ([42, 4], 4),
        ([42, 130], 130),
        ([42, "-9"], 137),
    ],
)
def test_the_most_telling_code_counts(codes, code):
    ends = [bash(f"echo 'it is {c}'; kill {c} $$" if c == "-9" else f"echo 'it is {c}'; exit {c}") for c in codes]
    out = runs.finish(gang(*ends), code, SOON_S)
    assert sorted(out.splitlines()) == sorted(f"[{i}] it is {c}" for i, c in enumerate(codes))


def test_a_command_that_is_none():
    out = runs.finish(gang(["/nowhere/python"]), 2, SOON_S)
    assert out == "error: /nowhere/python cannot be started: No such file or directory\n"


def test_each_signal_comes_to_all_as_often_as_it_was_sent(tmp_path):
    """The whole process group of a terminal gets a Ctrl-C, but a command must get it only once: a second one means exit
    at once."""
    with runs.ending(gang(*(listening(tmp_path, name, "exit 42") for name in "ab"))) as (process,):
        runs.wait_until(lambda: all((tmp_path / name).exists() for name in "ab"), process)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM):
            os.killpg(process.pid, number)
            time.sleep(0.3)  # two pending signals of the same kind count as one
        out = runs.finish(process, 42, SOON_S)
    for i in range(2):
        own = [line.split()[1] for line in out.splitlines() if line.startswith(f"[{i}]")]
        assert own == ["INT", "INT", "USR1", "QUIT", "TERM"]


@pytest.mark.slow  # the launcher waits 10 s
def test_what_is_left_over_is_told_to_stop(tmp_path):
    with runs.ending(gang(bash("exit 3"), listening(tmp_path, "a", "exit 42"))) as (process,):
        out = runs.finish(process, 3, 10 + SOON_S)
    assert out.splitlines() == ["Ended: process 0 with 3. Stopping the others.", "[1] TERM"]


def test_killed_it_leaves_nobody_behind(tmp_path):
    """A launcher that is killed cannot pass a signal on: the commands get a SIGTERM, and can still print and write
    files."""
    saves = f"sleep 0.5; echo saved; touch {tmp_path}/saved; exit 42"
    process = gang(listening(tmp_path, "a", saves))
    with runs.ending(process):
        runs.wait_until(lambda: (tmp_path / "a").exists(), process)
        process.kill()
        out = runs.finish(process, 137, SOON_S)  # waits until all processes that hold its output have ended
    assert (tmp_path / "saved").exists() and out.splitlines() == ["[0] TERM", "[0] saved"]


def test_a_reader_that_is_gone_stops_nothing(tmp_path):
    """The reader is gone after `| head`, or when a terminal is closed."""
    saves = f"for ((i = 0; i < 9; i++)); do echo saving; sleep 0.05; done && touch {tmp_path}/saved; exit 42"
    with runs.ending(gang(listening(tmp_path, "a", saves))) as (process,):
        runs.wait_until(lambda: (tmp_path / "a").exists(), process)
        assert process.stdout is not None
        process.stdout.close()
        process.terminate()
        assert process.wait(SOON_S) == 42 and (tmp_path / "saved").exists()


# A run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


def start(run: pathlib.Path, data: pathlib.Path, **fields) -> subprocess.Popen:
    flags = ("--heartbeat_timeout_s=10", "--start_timeout_s=60")
    fields = {**interrupted.FIELDS, "num_train_steps": interrupted.STEPS, **fields}
    return runs.start([SCRIPT, "--processes=2", "--", *runs.command(run, data, *flags, **fields)])


def pids(run: pathlib.Path) -> list[int]:
    return [json.loads((run / f"heartbeat.{i}.json").read_text())["pid"] for i in range(2)]


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def codes(run: pathlib.Path) -> list[list[int]]:
    """The exit codes of each process's attempts. (On a busy machine JAX may fail to connect the processes, which costs
    an attempt.)"""
    return [[life.code for life in restarts.read_attempts(run / name)] for name in ("lives.jsonl", "lives.1.jsonl")]


def last_codes(run: pathlib.Path) -> list[int]:
    return [own[-1] for own in codes(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An uninterrupted run that the script starts."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with runs.ending(start(run, data)) as (process,):
        out = runs.finish(process)
    assert last_codes(run) == [0, 0]
    assert any(line.startswith("[0] Everything is in") for line in out.splitlines())
    return run


@pytest.mark.slow
def test_one_process_or_several_are_the_same_run(tmp_path, data, whole):
    runs.finish(interrupted.start_one(tmp_path / "run", data, num_train_steps=interrupted.STEPS))
    assert interrupted.trained(tmp_path / "run") == interrupted.trained(whole)


@pytest.mark.slow
def test_stopped_all_save_the_same_step(tmp_path, data, whole):
    run = tmp_path / "run"
    with runs.ending(start(run, data, num_train_steps=100_000)) as (process,):
        runs.wait_until(lambda: bool(interrupted.saved(run)), process)
        process.terminate()
        runs.finish(process, 42, SOON_S)
    step = interrupted.saved(run)[-1]
    assert step == runs.rows(run)[-1]["step"] and last_codes(run) == [42, 42]
    assert not any(map(alive, pids(run)))
    with runs.ending(start(run, data, num_train_steps=max(step + 5, interrupted.STEPS))) as (process,):
        out = runs.finish(process)
    assert f"[0] Resuming after step {step}." in out
    assert interrupted.trained(run)[: interrupted.STEPS] == interrupted.trained(whole)


@pytest.mark.slow
def test_one_killed_the_supervisors_start_all_again(tmp_path, data, whole):
    """Process 0 hosts the coordinator; when it is killed, the port of the coordinator is used again a moment later."""
    run = tmp_path / "run"
    with runs.ending(start(run, data)) as (process,):
        runs.wait_until(lambda: bool(interrupted.saved(run)), process)
        os.kill(pids(run)[0], signal.SIGKILL)
        out = runs.finish(process)
    assert 137 in codes(run)[0] and last_codes(run) == [0, 0], out
    assert interrupted.trained(run) == interrupted.trained(whole)


@pytest.mark.slow
def test_stopped_when_nobody_reads_any_more(tmp_path, data):
    run = tmp_path / "run"
    with runs.ending(start(run, data, num_train_steps=100_000)) as (process,):
        runs.wait_until(lambda: bool(interrupted.saved(run)), process)
        assert process.stdout is not None
        process.stdout.close()
        runs.wait_for_rows(run, process, count=runs.rows(run)[-1]["step"] + 20)
        process.terminate()
        assert process.wait(SOON_S) == 42
    assert interrupted.saved(run)[-1] == runs.rows(run)[-1]["step"] and last_codes(run) == [42, 42]


@pytest.mark.slow
def test_the_script_killed_leaves_a_run_that_goes_on(tmp_path, data, whole):
    run = tmp_path / "run"
    with runs.ending(start(run, data, num_train_steps=100_000)) as (process,):
        runs.wait_until(lambda: bool(interrupted.saved(run)), process)
        trainers = pids(run)
        process.kill()
        runs.finish(process, 137, SOON_S)
    assert not any(map(alive, trainers))
    step = interrupted.saved(run)[-1]
    assert step == runs.rows(run)[-1]["step"] and last_codes(run) == [42, 42]
    with runs.ending(start(run, data, num_train_steps=max(step + 5, interrupted.STEPS))) as (process,):
        runs.finish(process)
    assert interrupted.trained(run)[: interrupted.STEPS] == interrupted.trained(whole)
