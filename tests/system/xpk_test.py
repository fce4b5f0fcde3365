"""The workload for GKE: xpk's arguments, what a container does with them, and the manifest of the real xpk package.

The tests of the real package need a Python that has xpk: .venv-xpk/bin/python, or the path in MESHLM_XPK_PYTHON.
"""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import runs

FAKES = runs.ROOT / "tests/system/fakes/xpk"
SETTINGS = (
    "PROJECT=p\nZONE=us-east5-b\nCLUSTER=c\nTYPE=v6e-16\nIMAGE=europe-docker.pkg.dev/p/r/meshlm:1   # EXTRA=tpu\n"
)
ODD = ["two words", 'it\'s "quoted" $HOME `id` \\', "new\nline $$ $(HOME)", "", "*", "--flag=a b", "#", "$$(HOME)", "é"]
TRAIN = ["python", "-m", "launch.train", "--config=configs/tiny.py", "--workdir=/runs/a"]
PLACE = ["--cluster=c", "--project=p", "--zone=us-east5-b"]
# The code that xpk 1.16 puts around a command (xpk/core/docker_container.py).
CONTAINER = """\
echo XPK Start: $(date);
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
(COMMAND) & PID=$!;
while kill -0 $PID 2>/dev/null;
    do sleep 5;
done;
wait $PID;
EXIT_CODE=$?;
echo EXIT_CODE=$EXIT_CODE;
exit $EXIT_CODE
"""
SAY_WORDS = "#!/bin/sh\nprintf '%s\\0' \"$@\" >words\n"
STOPS_WITH_42 = (
    "import os, signal, time; signal.signal(15, lambda *_: os._exit(42)); print('ready', flush=True); time.sleep(60)"
)


def run(
    folder: pathlib.Path, *words: str, code: int = 0, path: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Runs launch/xpk/run.sh in a folder, with the fake xpk."""
    env = {
        **os.environ,
        "PATH": path or f"{FAKES}:{os.environ['PATH']}",
        "FAKE_XPK": str(folder / "call"),
        **environment,
    }
    done = subprocess.run(
        [runs.ROOT / "launch/xpk/run.sh", *words], cwd=folder, env=env, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "xpk.env").write_text(SETTINGS)
    return tmp_path


def told(folder: pathlib.Path) -> list[str]:
    return (folder / "call").read_text().split("\0")[:-1]


def create(folder: pathlib.Path, *command: str) -> list[str]:
    """The command line that would start the real xpk."""
    return shlex.split(run(folder, "--name=run", "--dry_run", "--", *command).stdout)


def kubernetes(text: str, variables: dict[str, str]) -> str:
    """Expands a container's command as Kubernetes does: $(NAME) from the container's variables, and $$ to $."""
    return re.sub(
        r"\$(\$|\((\w+)\))",
        lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]),
        text,
    )


# The arguments of xpk


def test_arguments(folder):
    done = run(folder, "--name=run", "--slices=2", "--max_restarts", "7", "--storage=shared", "--", *TRAIN)
    expected = ["workload", "create", "--workload=run", *PLACE, "--tpu-type=v6e-16", "--num-slices=2"]
    expected += ["--docker-image=europe-docker.pkg.dev/p/r/meshlm:1", "--storage=shared", "--max-restarts=7"]
    expected += [
        "--restart-on-exit-codes=1",
        "--termination-grace-period-seconds=120",
        f"--command=exec {' '.join(TRAIN)}",
    ]
    assert told(folder) == expected
    assert f"to end it: xpk workload delete --workload=run {' '.join(PLACE)}" in done.stderr


def test_a_dry_run_runs_nothing(folder):
    assert create(folder, *TRAIN)[:3] == ["xpk", "workload", "create"]
    assert not (folder / "call").exists()


# What the container does with the command


@pytest.mark.parametrize("word", ODD)
def test_the_command_is_one_plain_line(folder, word):
    """The command has to fit into a YAML block, and Kubernetes must find nothing to replace in it."""
    command = create(folder, *TRAIN, word)[-1].removeprefix("--command=")
    assert command.isascii() and command.isprintable()
    assert kubernetes(command, {"HOME": "/elsewhere"}) == command


def test_the_command_arrives_unchanged(folder):
    run(folder, "--name=run", "--", str(folder / "say"), "--workdir=/runs/a", *ODD)
    say_words(folder)
    command = told(folder)[-1].removeprefix("--command=")
    subprocess.run(["bash", "-c", CONTAINER.replace("COMMAND", command)], cwd=folder, check=True, timeout=60)
    assert (folder / "words").read_text().split("\0")[:-1] == ["--workdir=/runs/a", *ODD]


def say_words(folder: pathlib.Path) -> None:
    (folder / "say").write_text(SAY_WORDS)
    (folder / "say").chmod(0o755)


@pytest.mark.slow
def test_sigterm_reaches_the_command(folder):
    """Kubernetes sends SIGTERM to the container's bash, which passes it on and exits with the command's code."""
    run(folder, "--name=run", "--", sys.executable, "-c", STOPS_WITH_42, "--workdir=/runs/a")
    command = told(folder)[-1].removeprefix("--command=")
    container = runs.start(["bash", "-c", CONTAINER.replace("COMMAND", command)])
    with runs.ending(container):
        assert container.stdout is not None
        while container.stdout.readline() != "ready\n":
            pass
        sent = time.monotonic()
        container.send_signal(signal.SIGTERM)
        assert "EXIT_CODE=42" in runs.finish(container, 42, within_s=30)
    print("SIGTERM to exit:", time.monotonic() - sent)


# Mistakes


@pytest.mark.parametrize(
    "words, message",
    [
        (["--name=run"], "name the training command after --"),
        (["--name=run", "--", *TRAIN[:-1], "--workdir=/runs/../tmp/a"], "or has . or .. in it"),
        (["--name=run", "--", *TRAIN, "-workdir=/"], "--workdir=/ is in the container"),
        (["--name=run", "--", *TRAIN, "--workdir=/tmp/a"], "--workdir=/tmp/a is in the container"),
        (
            ["--name=run", "--", *TRAIN[:-1], "--workdir=runs/a"],
            "--workdir=runs/a is in the container, and is lost with it",
        ),
        (["--name=Run_1", "--", *TRAIN], "--name=Run_1 must be small letters"),
        (["--", *TRAIN], "--name= must be small letters"),
        (["--name=run", "--slices=two", "--", *TRAIN], "SLICES=two must be a number"),
        (["--name=run", "--max_restarts=-1", "--", *TRAIN], "MAX_RESTARTS=-1 must be a number"),
        (["--name=run", "--cluster=", "--", *TRAIN], "CLUSTER is not set; put it into xpk.env"),
        (["--name=run", "--klaster=c", "--", *TRAIN], "unknown flag --klaster"),
        (["--name=run", "--env=nowhere.env", "--", *TRAIN], "--env=nowhere.env: no such file"),
    ],
)
def test_mistakes(folder, words, message):
    done = run(folder, *words, code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1 and not (folder / "call").exists()


def test_a_setting_that_is_none(folder):
    (folder / "xpk.env").write_text(SETTINGS + "MACHINE=big\n")
    assert "xpk.env, line 6: MACHINE=big sets none of" in run(folder, "--name=run", "--", *TRAIN, code=2).stderr


def test_without_xpk(folder):
    (folder / "bin").mkdir()
    for name in ("bash", "env", "dirname", "readlink", "sed"):
        (folder / "bin" / name).symlink_to(f"/usr/bin/{name}")
    done = run(folder, "--name=run", "--", *TRAIN, code=2, path=str(folder / "bin"))
    assert done.stderr == "error: xpk is missing; install it: pip install xpk\n"


def test_what_xpk_refuses(folder):
    done = run(folder, "--name=run", "--cluster=none", "--", *TRAIN, code=2)
    assert done.stdout.splitlines()[-1] == "[XPK] XPK failed, error code 1"
    assert done.stderr.splitlines() == [
        "error: xpk did not start run; see its error above; to see what runs all the same: "
        "xpk workload list --cluster=none --project=p --zone=us-east5-b",
    ]


# The real xpk


@pytest.fixture(scope="session")
def real_xpk():
    python = pathlib.Path(os.environ.get("MESHLM_XPK_PYTHON") or runs.ROOT / ".venv-xpk/bin/python")
    if not (xpk := python.with_name("xpk")).exists():
        pytest.skip(f"{python} has no xpk; make .venv-xpk with xpk in it, or set MESHLM_XPK_PYTHON")
    return xpk


def manifest(xpk: pathlib.Path, folder: pathlib.Path, words: list[str]) -> dict:
    """The JobSet that the real package makes from our command line, without calling any cloud."""
    path = folder / "manifest.yaml"
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "TELEMETRY_ENABLED": "false"}
    dry = ["--dry-run", "--skip-validation", f"--output-manifest-file={path}"]
    done = subprocess.run([xpk, *words[1:], *dry], cwd=folder, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return yaml.safe_load(path.read_text())


def test_the_real_package(folder, real_xpk):
    """xpk's parser accepts our flags, and its manifest agrees with our documentation."""
    words = create(folder, str(folder / "say"), "--workdir=/runs/a", *ODD)
    spec = manifest(real_xpk, folder, words)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 50
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert set(rule["onExitCodes"]["values"]) == {1, 42, *range(127, 256)}, "others end it: 2, 3, 4"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert job["template"]["metadata"]["labels"]["xpk.google.com/workload"] == "run", "kubectl logs finds it by that"
    (container,) = pod["containers"]
    assert container["image"] == "europe-docker.pkg.dev/p/r/meshlm:1"
    say_words(folder)
    argv = [kubernetes(word, {"HOME": "/elsewhere"}) for word in container["command"]]
    subprocess.run(argv, cwd=folder, check=True, timeout=60)
    assert (folder / "words").read_text().split("\0")[:-1] == ["--workdir=/runs/a", *ODD]


def test_the_real_package_fails_as_the_fake(folder, real_xpk):
    """Both fail alike if there is no such cluster; the real package calls gcloud to find out."""
    (folder / "bin").mkdir()
    (folder / "bin/gcloud").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin/gcloud").chmod(0o755)
    words = shlex.split(run(folder, "--name=run", "--cluster=none", "--dry_run", "--", *TRAIN).stdout)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "TELEMETRY_ENABLED": "false"}
    env["FAKE_XPK"] = str(folder / "call")
    real, fake = (
        subprocess.run([xpk, *words[1:], *more], cwd=folder, env=env, text=True, capture_output=True, timeout=120)
        for xpk, *more in ((real_xpk, "--skip-validation"), (FAKES / "xpk",))
    )
    assert real.returncode == fake.returncode
    assert real.stdout.splitlines()[-2:] == fake.stdout.splitlines()


def test_the_real_package_knows_the_types_we_name(folder, real_xpk):
    for kind in ("v6e-16", "v5p-128", "v5litepod-16", "tpu7x-16"):
        words = shlex.split(run(folder, "--name=run", f"--type={kind}", "--dry_run", "--", *TRAIN).stdout)
        assert manifest(real_xpk, folder, words)["kind"] == "JobSet"


# A Python that has xpk runs this: each line of the input is a command that xpk's parser must accept.
PARSE = """
import argparse, shlex, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser=parser)
for line in sys.stdin:
    parser.parse_args(shlex.split(line)[1:])
"""


def test_the_real_package_takes_the_documented_commands(real_xpk):
    lines = [line for page in (runs.ROOT / "docs").glob("*.md") for line in runs.code_lines(page)]
    commands = [line.split(" #")[0] for line in lines if line.startswith("xpk ")]
    assert len(commands) >= 4
    parse = [real_xpk.with_name("python"), "-c", PARSE]
    done = subprocess.run(parse, input="\n".join(commands), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
