"""launch/slurm/train.sbatch: the same tests with fakes of Slurm's commands (fakes/slurm) and with real Slurm.

The job runs a script that plays attempts or, if losses are compared, launch.train.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tests.system import slurm_cluster
from tests.system.faults import interrupted
from tests.system.slurm_cluster import SCRIPT, Fake, Job, Real
from trainer.reliability import restarts

# With --workdir=RUN --played=ATTEMPTS, this plays the attempt whose index is the number of restarts. "save" is the step
# that process 0 commits; "row" is the last step that it took; "codes" says how each process exits: with a code; -n, by
# signal n; "wait", after a SIGTERM, with a save and 42; "slow", the same 3 s later; "deaf", not at a SIGTERM.
PLAYER = """
import json, os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
run, played, process = pathlib.Path(flags["workdir"]), json.loads(flags["played"]), int(os.environ["SLURM_PROCID"])
life = played[min(int(os.environ.get("SLURM_RESTART_COUNT", 0)), len(played) - 1)]
def save(step):
    if process == 0:
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()
        (run / "config.json").touch()
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3 * (code == "slow"))
    save(life["save"])
    print(f"process {process} stops", flush=True)
    os._exit(42)
code = life["codes"][process]
signal.signal(signal.SIGTERM, stop if code in ("wait", "slow") else signal.SIG_IGN)
started = [run.parent / f"started.{i}" for i in range(len(life["codes"]))]
with started[process].open("a") as file:
    print(len(sys.argv), file=file)
def starts(path):
    return len(path.read_text().splitlines()) if path.exists() else 0
while len(set(map(starts, started))) > 1:  # else the first to leave ends the others before they are there
    time.sleep(0.01)
if code in ("wait", "slow", "deaf"):
    time.sleep(200)
if "save" in life:
    save(life["save"])
if "row" in life and process == 0:
    with (run / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": life["row"], "tokens": 1}), file=file)
time.sleep(0.5 * process)
if code == -signal.SIGTERM:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""

WRITER = """
import json, os, pathlib, sys
kept = {name: os.environ[name] for name in ("SLURM_LOCALID", "JAX_LOCAL_DEVICE_IDS") if name in os.environ}
path = pathlib.Path(sys.argv[1].partition("=")[2]).parent / (os.environ["SLURM_PROCID"] + ".json")
path.write_text(json.dumps({"argv": sys.argv[1:], "devices": kept, "environment": dict(os.environ)}))
"""


@pytest.fixture(scope="session")
def real_slurm():
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.running() as environment:
        yield environment


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.slow)])
def submit(request, tmp_path):
    """Submits a command to the fake cluster or to the real cluster."""
    cluster = Fake(tmp_path) if request.param == "fake" else Real(tmp_path, request.getfixturevalue("real_slurm"))
    jobs = []

    def submit(*options: str, command: list[str], **more) -> Job:
        jobs.append(Job(cluster, *options, command=command, **more))
        return jobs[-1]

    submit.cluster = cluster
    yield submit
    for job in jobs:
        job.end()


@pytest.fixture
def player(tmp_path):
    """The command that plays attempts in RUN = tmp_path/run."""
    (tmp_path / "player.py").write_text(PLAYER)

    def command(*played: dict, **flags: str) -> list[str]:
        words = {"workdir": str(tmp_path / "run"), "played": json.dumps(played), **flags}
        return [sys.executable, str(tmp_path / "player.py"), *(f"--{name}={value}" for name, value in words.items())]

    return command


def journal(folder: pathlib.Path) -> list[restarts.Attempt]:
    return restarts.read_attempts(folder / "run/lives.jsonl")


only_fake = pytest.mark.parametrize("submit", ["fake"], indirect=True)


# What is started


@pytest.fixture
def writer(tmp_path):
    """The command that writes its arguments and its environment to RUN/../<process>.json."""
    (tmp_path / "writer.py").write_text(WRITER)

    def command(*words: str) -> list[str]:
        return [sys.executable, str(tmp_path / "writer.py"), f"--workdir={tmp_path / 'run'}", *words]

    return command


def written(folder: pathlib.Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_words_arrive_unchanged(tmp_path, submit, writer):
    """With one process per node, flags give its number, and JAX does not see SLURM_LOCALID, so it takes all devices."""
    words = [
        "two words",
        "",
        "it's",
        '"',
        "$HOME $(date) `date`",
        "line\nfeed\n",
        "back\\slash",
        "*",
        "ü",
        "a;b|c&d>e",
        "!",
        "\t",
    ]
    job = submit("--nodes=2", command=writer(*words, "--a=b c"))
    job.leaves(0)
    host = "localhost" if submit.cluster.name == "fake" else slurm_cluster.NODES[0]
    address = f"{host}:{65536 - 4096 + int(job.id) % 4096}"
    flags = [f"--coordinator_address={address}", "--num_processes=2"]
    assert [process["argv"] for process in written(tmp_path)] == [
        [f"--workdir={tmp_path / 'run'}", *words, "--a=b c", *flags, f"--process_id={i}"] for i in range(2)
    ]
    assert [process["devices"] for process in written(tmp_path)] == [{}, {}]


def test_one_process_for_each_gpu(tmp_path, submit, writer):
    submit("--nodes=1", "--ntasks-per-node=2", command=writer()).leaves(0)
    assert [process["argv"][2:] for process in written(tmp_path)] == [
        ["--num_processes=2", "--process_id=0"],
        ["--num_processes=2", "--process_id=1"],
    ]
    assert [process["devices"] for process in written(tmp_path)] == [{"JAX_LOCAL_DEVICE_IDS": str(i)} for i in range(2)]


def test_a_process_alone_needs_no_flags(tmp_path, submit, writer):
    submit(command=writer("word")).leaves(0)
    assert [process["argv"][1:] for process in written(tmp_path)] == [["word"]]
    assert [process["devices"] for process in written(tmp_path)] == [{}]


ROOT = str(runs.ROOT)
PYXIS = {"MESHLM_CONTAINER": "pyxis", "MESHLM_IMAGE": "a b.sqsh"}
APPTAINER = {"MESHLM_CONTAINER": "apptainer", "MESHLM_IMAGE": "a b.sif"}
IN_APPTAINER = ["apptainer", "exec", "--nv", "--bind", f"{ROOT}:{ROOT}", "--pwd", ROOT, "a b.sif"]


@only_fake
@pytest.mark.parametrize(
    ("options", "extra", "to_srun", "before"),
    [
        ([], {}, [], []),
        (["--nodes=2", "--cpus-per-task=3"], {}, ["--cpus-per-task=3"], []),
        (
            [],
            {**PYXIS, "MESHLM_MOUNTS": "/data:/data"},
            [
                "--container-image=a b.sqsh",
                f"--container-mounts={ROOT}:{ROOT},/data:/data",
                f"--container-workdir={ROOT}",
            ],
            [],
        ),
        ([], APPTAINER, [], IN_APPTAINER),
    ],
    ids=["plain", "cpus", "pyxis", "apptainer"],
)
def test_calls(tmp_path, submit, writer, options, extra, to_srun, before):
    """Compares all calls of Slurm's commands, with all arguments."""
    command = writer("a b")
    submit(*options, command=command, **extra).leaves(0)
    calls = [json.loads(line) for line in (tmp_path / "slurm/calls.jsonl").read_text().splitlines()]
    assert calls[0] == [
        "sbatch",
        "--wait",
        "--parsable",
        f"--output={tmp_path / 'job.out'}",
        *options,
        SCRIPT,
        *command,
    ]
    text = calls[1].pop(4 + len(to_srun))
    assert text.startswith("task () \n{") and text.endswith('; task "$@"')
    assert calls[1] == ["srun", "--kill-on-bad-exit=1", *to_srun, "bash", "-c", "task", "localhost", *before, *command]
    assert calls[2:] == [before + command] * bool(before)
    assert written(tmp_path)[0]["argv"][1] == "a b"


@only_fake
def test_settings_for_gpus(tmp_path, submit, writer):
    """If the job has GPUs, it gets the settings of launch/gpu/env.sh; variables in sbatch's environment take
    precedence."""
    argv = ["bash", "-c", "source launch/gpu/env.sh && env --null"]
    shown = subprocess.run(argv, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=30)
    settings = dict(word.partition("=")[::2] for word in shown.stdout.split("\0") if word)
    settings = {name: value for name, value in settings.items() if name.startswith(("JAX_", "XLA_", "NCCL_"))}
    assert settings["NCCL_DEBUG"] == "WARN" and settings["JAX_PLATFORMS"] == "cpu"
    submit("--gpus-per-node=8", command=writer()).leaves(0)
    assert settings.items() <= written(tmp_path)[0]["environment"].items()


@only_fake
@pytest.mark.parametrize(
    ("words", "extra", "parts"),
    [
        ([], {}, ["no command", "sbatch launch/slurm/train.sbatch python -m launch.train"]),
        (["python", "-m", "launch.train"], {}, ["no --workdir"]),
        (["true", "--workdir=~no-such-user/x"], {}, ["unknown user no-such-user"]),
        (["python", "-m", "launch.supervise", "--", "true", "--workdir=x"], {}, ["leave launch.supervise out"]),
        (["true", "--workdir", "x"], {"MESHLM_CONTAINER": "docker"}, ["docker must be pyxis or apptainer"]),
        (["true", "--workdir=x"], {"MESHLM_CONTAINER": "pyxis"}, ["needs an image; set MESHLM_IMAGE"]),
    ],
)
def test_one_line_for_each_mistake(submit, words, extra, parts):
    (line,) = submit(command=words, **extra).leaves(2).splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts)
    assert not submit.cluster.calls("srun")


@pytest.mark.parametrize(
    ("cwd", "part"), [(".", "this is not a Slurm job; submit it: sbatch "), ("tests", "submit from")]
)
def test_started_by_hand_or_elsewhere(cwd, part):
    result = subprocess.run(
        [runs.ROOT / SCRIPT, "true", "--workdir=x"], cwd=runs.ROOT / cwd, capture_output=True, text=True, timeout=30
    )
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and part in line


# When a job is queued again


def test_what_is_queued_again(tmp_path, submit, player):
    """A job is queued again after code 42, code 1, or death by a signal, of all processes or of one, until the run is
    done. Each attempt here saves."""
    kill, abort, term = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGTERM
    ended = [[42, term], [1, 1], [abort, 42], [kill, kill], [0, kill], [0, 0]]
    played = [{"codes": codes, "save": 10 * (i + 1), "row": 10 * (i + 1) + i} for i, codes in enumerate(ended)]
    job = submit("--nodes=2", command=player(*played))
    log = job.leaves(0, within_s=300)
    written = journal(tmp_path)
    assert [life.life for life in written] == [1, 2, 3, 4, 5, 6]
    assert [life.code for life in written] == [42, 1, 134, 137, 137, 0]
    assert [life.cause for life in written][::5] == ["stopped (42)", "done"]
    assert [(life.first_step, life.last_step) for life in written] == [(10 * i, 10 * i + 10) for i in range(6)]
    assert [life.lost_steps for life in written] == [0, 1, 2, 3, 4, 5]
    assert all(0 <= life.seconds < 60 and 0 <= life.waited < 60 for life in written) and written[0].waited == 0
    assert written[0].start < written[0].end < written[1].start
    for i, code in enumerate([42, 1, 134, 137, 137]):
        line = f"Attempt {i + 1} ended with {code}; checkpoint at step {10 * i + 10}, {10 * i} before. Job {job.id} is"
        assert f"{line} queued again." in log
    assert "Attempt 6 ended with 0; checkpoint at step 60, 50 before." in log


@pytest.mark.parametrize(
    ("codes", "code"),
    [([2, 2], 2), ([4, 4], 4), ([130, 130], 130), ([5, 1], 5), ([42, 3], 3), ([3, -signal.SIGABRT], 3)],
    ids=str,
)
def test_what_is_not(tmp_path, submit, player, codes, code):
    """If one process exits with a code for wrong data or a wrong configuration, this code counts, although srun exits
    with the highest code."""
    log = submit("--nodes=2", command=player({"codes": codes, "save": 10}, {"codes": [0, 0]})).leaves(code)
    assert f"Attempt 1 ended with {code}; checkpoint at step 10, 0 before.\n" in log and "queued" not in log
    assert [life.code for life in journal(tmp_path)] == [code]


def test_three_fruitless_lives_are_the_end(tmp_path, submit, player):
    """Attempts are counted since the last new checkpoint, and separately for each job, even before the run exists."""
    crash = {"codes": [1, 1]}
    played = [crash, crash, {"codes": [42, 42], "save": 10}, crash, crash, {"codes": [-6, -6]}]
    log = submit("--nodes=2", command=player(*played)).leaves(134, within_s=300)
    assert [life.code for life in journal(tmp_path)] == [1, 1, 42, 1, 1, 134]
    assert log.count("queued again") == 5
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "3 attempts in a row without a new one; giving up; " in line and str(tmp_path / "run/lives.jsonl") in line
    log = submit("--nodes=2", command=player(crash, {"codes": [0, 0]})).leaves(0)
    assert "Attempt 7 ended with 1" in log and [life.code for life in journal(tmp_path)][6:] == [1, 0]


def test_a_mistake_leaves_nothing_behind(tmp_path, submit, player):
    """If a command cannot be started, the job is not queued again, and no file is written to a folder that is not a
    run."""
    (tmp_path / "run").mkdir()
    log = submit(command=["no-such-command", f"--workdir={tmp_path / 'run'}"]).leaves(127)
    assert "no-such-command: not found" in log and "Attempt 1 ended with 127" in log
    assert not list((tmp_path / "run").iterdir())


@only_fake
def test_damaged_rows_of_lives_are_left_as_they_are(tmp_path, submit, player):
    """If a row was cut short when a node died, the next row starts on a new line."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lives.jsonl").write_text('{"life": 4, "start": "2')
    submit(command=player({"codes": [42], "save": 10}, {"codes": [0]})).leaves(0)
    assert [(life.life, life.code) for life in journal(tmp_path)] == [(5, 42), (6, 0)]


# Signals


# Exit codes of an attempt that Slurm ends while its tasks exit with 42: Slurm also ends srun, sometimes before srun
# learns their exit codes. The job may be started again after any of these codes.
TOLD = (42, 137, 143)


def starts(tmp_path: pathlib.Path, count: int, processes: int = 2):
    paths = [tmp_path / f"started.{i}" for i in range(processes)]
    return lambda: all(path.exists() and len(path.read_text().splitlines()) == count for path in paths)


def test_a_signal_to_the_tasks(tmp_path, submit, player):
    """The signal is that before the time limit or a preemption with a grace period: the tasks save and exit with 42,
    and the script requeues the job."""
    job = submit("--nodes=2", command=player({"codes": ["wait", "wait"], "save": 10}, {"codes": [0, 0]}))
    job.until(starts(tmp_path, 1))
    submit.cluster.do("scancel", "--signal=TERM", job.id)
    log = job.leaves(0)
    assert "process 0 stops" in log and "process 1 stops" in log
    assert f"Attempt 1 ended with 42; checkpoint at step 10, 0 before. Job {job.id} is queued again." in log


def test_a_preemption(tmp_path, submit, player):
    """If there is no grace period, Slurm ends all processes and requeues the job. The trainers have KillWait seconds to
    save."""
    job = submit("--nodes=2", command=player({"codes": ["wait", "wait"], "save": 10}, {"codes": [0, 0]}))
    job.until(starts(tmp_path, 1))
    submit.cluster.preempt(job.id)
    log = job.leaves(0)
    assert "process 0 stops" in log and "process 1 stops" in log
    first, second = journal(tmp_path)
    assert first.code in TOLD and second.code == 0, log
    says = f"Attempt 1 ended with {first.code}; checkpoint at step 10, 0 before. The job was asked to end, by scancel"
    assert says in log, log


@only_fake
def test_lives_without_a_row(tmp_path, submit, player):
    """Some attempts have no row, because they died with their node. Failures of an earlier job do not count if the run
    has progressed since."""
    (tmp_path / "run").mkdir()
    row = dict.fromkeys(("start", "end"), "2026-01-01T00:00:00+00:00") | {"waited": 0, "seconds": 0}
    row |= {"cause": "exit code 1", "code": 1, "first_step": 5, "last_step": 5, "lost_steps": 0}
    (tmp_path / "run/lives.jsonl").write_text("".join(json.dumps(row | {"life": n}) + "\n" for n in (1, 2)))
    for step in (5, 100):
        (tmp_path / f"run/checkpoints/{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/{step}/_CHECKPOINT_METADATA").touch()
    log = submit(command=player({"codes": [1]}, {"codes": [1]}, {"codes": [0]})).leaves(0)
    assert log.count("is queued again") == 2


@only_fake
def test_a_second_signal(tmp_path, submit, player):
    """A second signal comes while the tasks save: the script waits until they have exited."""
    job = submit(command=player({"codes": ["slow"], "save": 10}))
    job.until(starts(tmp_path, 1, processes=1))
    for _ in range(2):
        os.killpg(int((tmp_path / "slurm/batch").read_text()), signal.SIGTERM)
        time.sleep(0.5)
    submit.cluster.do("scancel", "--signal=TERM", job.id)
    assert "Attempt 1 ended with 42; checkpoint at step 10" in job.leaves(42)


@only_fake
def test_a_run_below_the_home(tmp_path, submit, player):
    """The script expands ~ as the trainer does, so it finds each attempt's checkpoint."""
    played = [{"codes": [42], "save": step} for step in (10, 20, 30)] + [{"codes": [0]}]
    command = [word.replace(f"--workdir={tmp_path}", "--workdir=~") for word in player(*played)]
    script = tmp_path / "player.py"
    text = script.read_text().replace('pathlib.Path(flags["workdir"])', 'pathlib.Path(flags["workdir"]).expanduser()')
    script.write_text(text)
    submit(command=command, HOME=str(tmp_path)).leaves(0)
    assert [life.last_step for life in journal(tmp_path)] == [10, 20, 30, 30]


@only_fake
def test_the_signal_comes_while_the_life_is_written(tmp_path, submit, player):
    """A subshell has no traps, so the signal would kill it, and the row would have no step."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/basename"
    signal_first = "[ \"${1##*/}\" != 10 ] || { trap '' TERM && kill -TERM 0; }"
    stand_in.write_text(f'#!/bin/sh\n{signal_first}\nexec /usr/bin/basename "$1"\n')
    stand_in.chmod(0o755)
    submit.cluster.environment["PATH"] = f"{stand_in.parent}:{submit.cluster.environment['PATH']}"
    job = submit(command=player({"codes": [42], "save": 10}))
    assert "Attempt 1 ended with 42; checkpoint at step 10, 0 before. The job was asked to end" in job.leaves(42)
    assert [life.last_step for life in journal(tmp_path)] == [10]


def test_scancel_is_the_end(tmp_path, submit, player):
    """The trainers save within KillWait seconds, and nothing starts them again."""
    job = submit("--nodes=2", command=player({"codes": ["wait", "wait"], "save": 10}, {"codes": [0, 0]}))
    job.until(starts(tmp_path, 1))
    submit.cluster.do("scancel", job.id)
    job.until(lambda: submit.cluster.end(job.process, job.id) >= 0)
    job.until(lambda: bool(journal(tmp_path)))
    (life,) = journal(tmp_path)
    assert life.code in TOLD and life.last_step == 10
    assert "The job was asked to end" in job.log() and starts(tmp_path, 1)()


def test_a_job_that_may_not_be_queued_again(tmp_path, submit, player):
    """The job ends for good, with the full time for a save; the log has Slurm's message and says how to resume."""
    job = submit("--nodes=2", command=player({"codes": ["wait", "wait"], "save": 10}, {"codes": [0, 0]}))
    job.until(starts(tmp_path, 1))
    submit.cluster.do("scontrol", "update", f"JobId={job.id}", "Requeue=0")
    submit.cluster.do("scancel", "--signal=TERM", job.id)
    *_, slurm, line = job.leaves(42).splitlines()
    assert "disabled" in slurm and line.startswith("error: Attempt 1 ended with 42; checkpoint at step 10, 0 before.")
    assert line.endswith("submit the same again to resume") and starts(tmp_path, 1)()


def test_the_time_limit(tmp_path, submit, player):
    """The signal comes before the time limit (fake: 120 s, as the script requests); the next attempt has the full time
    again."""
    times = {"fake": ["--time=2:03"], "real": ["--time=1", "--signal=TERM@20"]}[submit.cluster.name]
    job = submit("--nodes=2", *times, command=player({"codes": ["wait", "wait"], "save": 10}, {"codes": [0, 0]}))
    log = job.leaves(0, within_s=240)
    assert f"Attempt 1 ended with 42; checkpoint at step 10, 0 before. Job {job.id} is queued again." in log


def test_a_time_limit_that_was_too_near(tmp_path, submit, player):
    """Processes that have not exited by the time limit are killed. This would end the job, but it is requeued."""
    times = {"fake": ["--time=0:20", "--signal=TERM@5"], "real": ["--time=1", "--signal=TERM@20"]}[submit.cluster.name]
    job = submit("--nodes=2", *times, command=player({"codes": ["deaf", "deaf"]}, {"codes": [0, 0], "save": 10}))
    log = job.leaves(0, within_s=300)
    assert f"Attempt 1 ended with 137; checkpoint at step 0, 0 before. Job {job.id} is queued again." in log
    assert [life.code for life in journal(tmp_path)] == [137, 0]
    assert submit.cluster.name == "real" or submit.cluster.calls("squeue") == [
        ["squeue", "--noheader", f"--jobs={job.id}", "--format=%r"]
    ]


# The trainer


JOIN = """
import json, os, pathlib, sys
from launch import distributed
import jax
from jax._src import xla_bridge
flags = dict(word[2:].split("=") for word in sys.argv[1:])
distributed.initialize(flags["coordinator_address"], int(flags["num_processes"]), int(flags["process_id"]))
seen = [jax.process_count(), jax.process_index(), xla_bridge.CUDA_VISIBLE_DEVICES.value]
(pathlib.Path(flags["workdir"]).parent / f"{jax.process_index()}.json").write_text(json.dumps(seen))
distributed.shutdown()
"""


@pytest.mark.slow
@only_fake
@pytest.mark.parametrize(
    ("options", "visible"), [(["--nodes=2"], ["all", "all"]), (["--nodes=1", "--ntasks-per-node=2"], ["0", "1"])]
)
def test_devices_that_jax_takes(tmp_path, submit, options, visible):
    """A single process on a node takes all devices; otherwise each process takes the device with its number."""
    submit(*options, command=[sys.executable, "-c", JOIN, f"--workdir={tmp_path / 'run'}"]).leaves(0)
    assert written(tmp_path) == [[2, i, visible[i]] for i in range(2)]


STEPS = 400
FIELDS = interrupted.FIELDS | {"num_train_steps": STEPS, "optimizer__decay_steps": STEPS, "checkpoint__every_steps": 40}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    runs.finish(interrupted.start_one(run, data, **FIELDS))
    return run


@pytest.mark.slow
def test_the_same_run(tmp_path, submit, data, whole):
    """A job on two nodes meets a preemption, a signal as before the time limit, and a killed process. It is submitted
    once, and the losses equal those of an uninterrupted run bit for bit. (The test takes minutes, so it uses the fakes
    only if there is no Slurm.)"""
    if submit.cluster.name == "fake" and not slurm_cluster.missing():
        pytest.skip("Slurm is here")
    run = tmp_path / "run"
    job = submit("--nodes=2", command=runs.command(run, data, "--heartbeat_timeout_s=10", **FIELDS))

    def kill_one() -> None:
        os.kill(json.loads((run / "heartbeat.1.json").read_text())["pid"], signal.SIGKILL)

    faults = [
        lambda: submit.cluster.preempt(job.id),
        lambda: submit.cluster.do("scancel", "--signal=TERM", job.id),
        kill_one,
    ]
    for life, fault in enumerate(faults):
        saved = len(interrupted.saved(run)) and interrupted.saved(run)[-1]
        job.until(lambda: interrupted.saved(run)[-1:] > [saved])  # noqa: B023
        fault()
        job.until(lambda: len(journal(tmp_path)) > life)  # noqa: B023
    log = job.leaves(0, within_s=300)
    written = journal(tmp_path)
    preempted, stopped, killed, done = (life.code for life in written)
    assert preempted in TOLD and stopped == 42 and killed in {42, *interrupted.CRASHED} and done == 0, log
    assert all(after.first_step == before.last_step for before, after in itertools.pairwise(written))
    assert log.count("Resuming after step ") == 3
    assert runs.losses(run) == runs.losses(whole)
