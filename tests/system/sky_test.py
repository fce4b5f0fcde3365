"""Tests of the SkyPilot jobs, on a fake SkyPilot with real processes (fakes/sky) and with the real package.

The tests of the real package need a Python that has SkyPilot: .venv-sky/bin/python, or the path in MESHLM_SKY_PYTHON.
"""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest

from tests import runs
from tests.system.faults import interrupted

FAKES = runs.ROOT / "tests/system/fakes/sky"
YAML = {"tpu": "launch/sky/tpu_spot.yaml", "cuda": "launch/sky/gpu_spot.yaml"}
ODD = ["two words", 'it\'s "quoted" $HOME `id` \\', "new\nline", "", "*", "--flag=a b", "#", "${x}", "$$", "é"]
TRAIN = ["python", "-m", "launch.train", "--config=configs/tiny.py"]
MIRROR = "--config.checkpoint.mirror=gs://b/mirror"
# A fake Python that records its arguments and exits with $CODE; with $WAIT it waits for a SIGTERM first.
PYTHON = """#!/bin/bash
[[ $1.$2 != -m.launch.gpu_check ]] || exit 0
printf '%s\\0' "$@" >"$HOME/words"
[[ -z ${WAIT:-} ]] || { trap 'exit $CODE' TERM; touch "$HOME/waits"; for i in {1..400}; do sleep 0.05; done; }
exit "${CODE:-0}"
"""


def signal_all(home: pathlib.Path, number: int) -> None:
    """Signals all processes of a host, i.e. those with this HOME, except SkyPilot's own, which run script.sh."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"HOME={home}".encode() in (path / "environ").read_bytes().split(b"\0")
            if ours and b"script.sh" not in (path / "cmdline").read_bytes():
                os.kill(int(path.name), number)


class Host:
    """A home directory in which launch/sky/run.sh finds a fake Python that only records its arguments."""

    def __init__(self, home: pathlib.Path):
        self.home, self.runs = home, home / "runs"
        (home / "meshlm-env/bin").mkdir(parents=True)
        (home / "sky_workdir").symlink_to(runs.ROOT)
        self.runs.mkdir()
        python = home / "meshlm-env/bin/python"
        python.write_text(PYTHON)
        python.chmod(0o755)

    def environment(self, command: str, shared: bool = True, **extra: str) -> dict[str, str]:
        if shared:
            (self.runs / ".mounted").write_text("server:/runs\n")
        own = {
            "HOME": str(self.home),
            "RUNS": str(self.runs),
            "COMMAND": command,
            "PATH": f"{FAKES / 'host'}:{os.environ['PATH']}",
        }
        return {**os.environ, **own, **extra}

    def start(self, script: str, environment: dict[str, str]) -> subprocess.Popen:
        """Runs a script as SkyPilot does: in an interactive bash, without a terminal."""
        path = self.home / "script.sh"
        path.write_text(script)
        return subprocess.Popen(
            ["/bin/bash", "-i", path],
            cwd=runs.ROOT,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, accelerator: str, command: list[str] | str, code: int = 0, shared: bool = True, **extra: str) -> str:
        text = command if isinstance(command, str) else shlex.join(command)
        process = self.start(
            f"bash launch/sky/run.sh {accelerator}\nexit $?\n", self.environment(text, shared, **extra)
        )
        with runs.ending(process):
            out = runs.finish(process, code, within_s=30)
        return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("bash: "))

    def words(self) -> list[str]:
        """The arguments that the fake Python was called with."""
        return (self.home / "words").read_text().split("\0")[:-1]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "home")


def gang(rank: int, size: int = 2) -> dict[str, str]:
    return {"SKYPILOT_NUM_NODES": str(size), "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}


# What runs on a host


def test_a_tpu_host_runs_the_command_unchanged(host):
    """TPU hosts find each other without flags; only the supervisor needs the process number."""
    words = [*TRAIN, f"--workdir={host.runs}/a", *ODD]
    host.run("tpu", words, **gang(rank=1))
    assert host.words() == ["-m", "launch.supervise", "--process=1", "--", *words]


def test_each_tpu_host_keeps_its_own_lives(host):
    """This uses the real supervisor, which must not act as process 0 on other hosts."""
    run = host.runs / "a"
    run.mkdir()
    (run / "config.json").touch()
    (host.home / "meshlm-env/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    host.run("tpu", ["true", f"--workdir={run}"], **gang(rank=1))
    assert [path.name for path in run.glob("lives*")] == ["lives.1.jsonl"]


def test_a_gpu_node_is_told_its_place(host):
    words = [*TRAIN, f"--workdir={host.runs}/a", *ODD]
    joining = ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    host.run("cuda", words, **gang(rank=1))
    assert host.words() == ["-m", "launch.supervise", "--", *words, *joining]


def test_a_single_gpu_node_is_told_no_place(host):
    words = [*TRAIN, f"--workdir={host.runs}/a"]
    host.run("cuda", words, **gang(rank=0, size=1))
    assert host.words() == ["-m", "launch.supervise", "--", *words]


def test_what_a_shell_would_expand_is_expanded_on_the_host(host):
    host.run("tpu", 'python -m launch.train --workdir="$RUNS"/a \\\n  "$HOME" *.md')
    assert host.words()[-4:] == ["launch.train", f"--workdir={host.runs}/a", str(host.home), "*.md"]


def test_one_host_may_keep_its_run_on_its_disk_when_checkpoints_are_mirrored(host):
    host.run("tpu", [*TRAIN, f"--workdir={host.runs}/a", MIRROR], shared=False)
    assert host.words()[-1] == MIRROR


# The exit code for SkyPilot


@pytest.mark.parametrize("code, expected", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (42, 1), (130, 130), (134, 134)])
def test_what_the_supervisor_gives_up_new_machines_do_not_mend(host, code, expected):
    host.run("tpu", [*TRAIN, f"--workdir={host.runs}/a"], code=expected, CODE=str(code))


@pytest.mark.parametrize("code, expected", [(0, 0), (1, 42), (2, 2), (3, 3), (4, 4), (42, 42), (134, 42), (143, 42)])
def test_what_was_told_to_stop_asks_for_new_machines(host, code, expected):
    """At SIGTERM, the scripts wait for the process, which saves, and turn its code into a code that asks for new
    machines."""
    environment = host.environment(shlex.join([*TRAIN, f"--workdir={host.runs}/a"]), CODE=str(code), WAIT="1")
    process = host.start("bash launch/sky/run.sh tpu\nexit $?\n", environment)
    with runs.ending(process):
        runs.wait_until((host.home / "waits").exists, process)
        signal_all(host.home, signal.SIGTERM)
        runs.finish(process, expected, within_s=30)


# Mistakes


@pytest.mark.parametrize(
    "command, message",
    [
        ("", "COMMAND is empty; say --env COMMAND="),
        ("python 'open", "all quotes closed; it is: python 'open"),
        ("python -m launch.train --workdir=$RUNS/$NO_SUCH_NAME", "all variables set"),
        ("cd x && python -m launch.train", "COMMAND must be one command with its arguments"),
        ("python -m launch.train", "the command has no --workdir=…"),
        ("python -m launch.train --workdir=runs/a", "--workdir=runs/a must be below"),
        ("python -m launch.train --workdir=$RUNS/../a", "/../a must be below"),
        ("python -m launch.train --workdir=$RUNS/a -workdir=/tmp/a", "--workdir=/tmp/a must be below"),
        ("x) ; touch here; WORDS=(true --workdir=$RUNS/a", "must be one command"),
    ],
)
def test_a_command_that_cannot_be(host, command, message):
    out = host.run("tpu", command, code=2)
    assert message in out and out.count("\n") == 1 and not (host.home / "words").exists()


def test_run_directories_that_would_be_lost(host):
    words = [*TRAIN, f"--workdir={host.runs}/a"]
    assert "add --config.checkpoint.mirror=gs://" in host.run("tpu", words, code=2, shared=False)
    out = host.run("tpu", [*words, MIRROR], code=2, shared=False, **gang(rank=0))
    assert "2 hosts need one folder for the run; say --env NFS=SERVER:/EXPORT" in out


def test_an_accelerator_that_is_none(host):
    assert "name the accelerator" in host.run("gpu", [*TRAIN], code=2)


# A complete job


class Sky:
    """The fake SkyPilot, its machines, and a shared folder."""

    def __init__(self, folder: pathlib.Path):
        self.state, self.runs = folder / "sky", folder / "runs"
        self.state.mkdir()
        self.environment = {
            **runs.environment(),
            "PATH": f"{FAKES}:{os.environ['PATH']}",
            "FAKE_SKY": str(self.state),
            "FAKE_PYTHON": sys.executable,
            "RUNS": str(self.runs),
            "COORDINATOR_PORT": str(runs.free_port()),
        }

    def launch(self, accelerator: str, command: list[str], *flags: str, **envs: str) -> subprocess.Popen:
        envs = {"BUCKET": "gs://b", "COMMAND": shlex.join(command), "NFS": "server:/runs", **envs}
        pairs = [word for name, value in envs.items() for word in ("--env", f"{name}={value}")]
        return subprocess.Popen(
            ["sky", "jobs", "launch", "-n", "run", YAML[accelerator], *flags, *pairs],
            cwd=runs.ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def preempt(self, notice_s: float) -> None:
        (self.state / "new").write_text(str(notice_s))
        (self.state / "new").rename(self.state / "preempt")

    def states(self) -> str:
        path = self.state / "states.txt"
        return path.read_text() if path.exists() else ""

    def logs(self, machines: int) -> str:
        return "".join(path.read_text() for path in sorted((self.state / "hosts").glob(f"{machines}.*.log.txt")))

    def kill(self) -> None:
        for home in (path for path in (self.state / "hosts").glob("*") if path.is_dir()):
            signal_all(home, signal.SIGKILL)


@pytest.fixture
def sky(tmp_path):
    made = Sky(tmp_path)
    yield made
    made.kill()


def test_setup(sky):
    """The job's setup installs known-good packages and mounts the folder; then a mistake in the command ends the
    job."""
    process = sky.launch("tpu", [*TRAIN, "--workdir=elsewhere"])
    with runs.ending(process):
        assert "FAILED [2]" in runs.finish(process, 1, within_s=60)
    home = sky.state / "hosts/0.0"
    assert (sky.state / "host_calls.txt").read_text().splitlines() == [
        f"mount -t nfs -o hard,lookupcache=positive server:/runs {sky.runs}",
        f"uv venv --quiet --python=3.12 {home}/meshlm-env",
        f"uv pip install --quiet --python={home}/meshlm-env/bin/python -c .ci/constraints-3.12.txt -e .[tpu,data]",
    ]
    assert "--workdir=elsewhere must be below" in sky.logs(0)


def test_a_shared_folder_that_is_not_there(sky):
    process = sky.launch("cuda", TRAIN, NFS="absent:/runs")
    with runs.ending(process):
        assert "FAILED_SETUP [2]" in runs.finish(process, 1, within_s=60)
    assert "error: cannot mount NFS=absent:/runs; is it SERVER:/EXPORT, in the region" in sky.logs(0)


def test_a_bucket_is_asked_for(sky):
    process = subprocess.Popen(
        ["sky", "jobs", "launch", "-n", "run", YAML["tpu"], "--env", "COMMAND=x"],
        cwd=runs.ROOT, env=sky.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert "'BUCKET' is None" in runs.finish(process, 1, within_s=30)


@pytest.mark.slow
def test_a_job_that_loses_its_machines(sky, tmp_path):
    """A job runs on two GPU nodes (on the CPU here). The command on one node gets SIGTERM; then the machines are
    preempted, with and without notice. The losses equal those of an uninterrupted run."""
    data = runs.dataset(tmp_path)
    fields = {**interrupted.FIELDS, "num_train_steps": interrupted.STEPS}
    whole, run = tmp_path / "whole", sky.runs / "a"
    runs.finish(runs.start(runs.command(whole, data, **fields), devices=2))
    job = sky.launch("cuda", ["python", *runs.command(run, data, **fields)[1:]], "--num-nodes", "2")
    with runs.ending(job):
        runs.wait_for_rows(run, job, count=20)
        signal_all(sky.state / "hosts/0.1", signal.SIGTERM)
        runs.wait_until(lambda: sky.states().count("RECOVERING") == 1, job)
        told = all_is_saved(run)
        runs.wait_for_rows(run, job, count=told + 20)
        sky.preempt(notice_s=15)
        runs.wait_until(lambda: sky.states().count("RECOVERING") == 2, job)
        noticed = all_is_saved(run)
        runs.wait_for_rows(run, job, count=noticed + 20)
        sky.preempt(notice_s=0)
        out = runs.finish(job, within_s=runs.TIMEOUT_S)
    first, *others = out.splitlines()
    assert first in ("RECOVERING [137, 42]", "RECOVERING [42, 137]")
    assert others == ["RECOVERING preempted", "RECOVERING preempted", "SUCCEEDED [0, 0]"]
    assert f"Resuming after step {told}." in sky.logs(1) and f"Resuming after step {noticed}." in sky.logs(2)
    assert interrupted.trained(run) == interrupted.trained(whole)


def all_is_saved(run: pathlib.Path) -> int:
    """The step of the newest checkpoint, which must be the last step in the log."""
    step = interrupted.saved(run)[-1]
    assert step == runs.rows(run)[-1]["step"]
    return step


# The real SkyPilot

# Keys are exit codes of the hosts; values say whether SkyPilot starts the job again. SkyPilot reports 137 for a host
# that it ended because another host failed.
CODES = {
    "[42]": True,
    "[42, 137]": True,
    "[137, 42]": True,
    "[1]": False,
    "[2, 137]": False,
    "[3]": False,
    "[4]": False,
    "[134, 137]": False,
}


@pytest.fixture(scope="session")
def real_python():
    python = os.environ.get("MESHLM_SKY_PYTHON") or str(runs.ROOT / ".venv-sky/bin/python")
    try:
        found = subprocess.run([python, "-c", "import sky; print(sky.__version__)"], capture_output=True, timeout=120)
    except OSError:
        found = None
    if found is None or found.returncode:
        pytest.skip(f"{python} has no SkyPilot; make .venv-sky with skypilot in it, or set MESHLM_SKY_PYTHON")
    return python


def really_launch(python: str, home: pathlib.Path, *words: str) -> dict:
    """The job that the real package makes from a command line, without any settings of this machine."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "CODES": json.dumps(list(map(json.loads, CODES))),
    }
    out = subprocess.run(
        [python, FAKES / "real.py", "jobs", "launch", "-y", "-n", "run", *words],
        cwd=runs.ROOT, env=env, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout.splitlines()[-1])


def documented(accelerator: str) -> list[str]:
    """The words after `sky jobs launch -n run` in the comment at the top of the file."""
    lines = [
        line.removeprefix("#")
        for line in (runs.ROOT / YAML[accelerator]).read_text().splitlines()
        if line[:4] == "#   "
    ]
    words = shlex.split("".join(line.removesuffix("\\") for line in lines))
    assert words[:5] == ["sky", "jobs", "launch", "-n", "run"]
    return words[5:]


@pytest.mark.parametrize(
    "accelerator, kind, place, nodes, bucket",
    [("tpu", {"tpu-v6e-16": 1}, "gcp/us-east5/us-east5-b", 1, "gs://mine"),
     ("cuda", {"H100": 8}, "aws/us-east-2", 2, "s3://mine")],
)  # fmt: skip
def test_the_real_package(host, real_python, accelerator, kind, place, nodes, bucket):
    """SkyPilot's parser accepts the file and the documented flags, and a command passes through its scripts
    unchanged."""
    words = [*TRAIN, f"--workdir={host.runs}/a", *ODD]
    job = really_launch(real_python, host.home, *documented(accelerator), "--env", f"COMMAND={shlex.join(words)}")
    assert (job["name"], job["nodes"], job["mounts"]) == ("run", nodes, {"/bucket": [bucket, "MOUNT"]})
    assert job["resources"]["accelerators"] == kind and job["resources"]["use_spot"] is True
    assert job["resources"]["infra"] == place
    assert dict(zip(CODES, job["starts_again"], strict=True)) == CODES
    assert job["setup"].strip() == f"bash launch/sky/setup.sh {accelerator}"
    environment = host.environment("")
    nfs = next(word.partition("=")[2] for word in documented(accelerator) if word.startswith("NFS="))
    (host.runs / ".mounted").write_text(f"{nfs}\n")
    process = host.start(job["script"], environment)
    with runs.ending(process):
        runs.finish(process, within_s=30)
    start = host.words().index("python")
    assert host.words()[start : start + len(words)] == words
