"""The scripts of launch/tpu/ against a fake cloud in a folder (fakes/cloud/gcloud): arguments, states, exit codes."""

import json
import os
import pathlib
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

from tests import runs
from tests.system.tpu_cloud import Cloud, running

DICE = random.Random(1)
ODD = ["two words", 'it\'s "quoted" $HOME `id` \\', "new\nline", "", "*", "--flag=a b"]


@pytest.fixture
def cloud(tmp_path):
    with running(tmp_path) as made:
        yield made


def without_gcloud(folder: pathlib.Path) -> str:
    """A PATH with all the commands of /usr/bin and /bin, except gcloud."""
    folder.mkdir()
    for path in (path for place in ("/usr/bin", "/bin") for path in pathlib.Path(place).iterdir()):
        if path.name != "gcloud" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return str(folder)


def last_line(out: str) -> str:
    return out.splitlines()[-1]


# Calls of gcloud


def test_create(cloud):
    cloud.run("create")
    place = ["--project=p", "--zone=us-east5-b", "--quiet"]
    kind = ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]
    create = ["compute", "tpus", "queued-resources", "create", "run"]
    assert cloud.calls[-1] == [*create, *kind, f"--labels=meshlm={cloud.owner()}", "--node-id=run", "--spot", *place]
    assert "run exists already" in cloud.run("create")
    assert sum(call[3] == "create" for call in cloud.calls) == 1


def test_a_name_in_use(cloud):
    cloud.run("create", "--type=v6e-8")
    out = last_line(cloud.run("create", code=2))
    assert "NAME=run is in use, by 1 x v6e-8; take another for your 1 x v6e-16" in out
    assert "by 1 x v6e-16; take another for your 2 x v6e-16" in cloud.run("create", "--name=two", code=0) + cloud.run(
        "create", "--name=two", "--slices=2", code=2
    )
    cloud.script(faults=[{"match": "queued-resources create", "stderr": "ERROR: (gcloud) ALREADY_EXISTS: node x"}])
    assert "NAME=x is in use" in last_line(cloud.run("create", "--name=x", code=2))


def test_create_several_reserved_slices(cloud):
    cloud.run("create", "--slices=2", "--tier", "reserved", "--valid_for=6h", "--internal_ips=1")
    expected = "--node-count=2 --node-prefix=run --reserved --valid-until-duration=6h --internal-ips"
    assert expected in " ".join(cloud.calls[-1])


def test_a_shell_on_the_first_of_many_slices(cloud):
    """The script does not read the names of the other slices; the SIGPIPE of this must not end the script."""
    first = "gcloud compute tpus tpu-vm ssh run-0 --worker=0 --project=p --zone=us-east5-b\n"
    assert cloud.run("ssh", "--slices=5000", "--dry_run") == first


def test_arguments_arrive_unchanged(cloud):
    """The arguments pass through the script's shell, gcloud's ssh and the worker's shell."""
    cloud.run("create")
    cloud.run("wait")
    argv = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *ODD]
    out = cloud.run("ssh", "--", *argv)
    assert [json.loads(line) for line in out.splitlines() if line.startswith("[")] == [ODD, ODD]


def test_a_dry_run_of_everything_needs_no_cloud(cloud):
    """A dry run shows each command of a spot run before anything bills."""
    argv = ["python", "-m", "launch.train", "--workdir=bucket/runs/x", "--config.sample.prompt=two words"]
    out = cloud.run("babysit", "--dry_run", "--", *argv, PATH=without_gcloud(cloud.folder / "bin"))
    lines = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud")]
    verbs = [" ".join(line[3:5]) for line in lines]
    assert verbs == [
        "queued-resources create",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "queued-resources delete",
    ]
    (told,) = [word for word in lines[3] if word.startswith("--command=")]
    assert shlex.split(told.partition("=")[2])[-len(argv) :] == argv
    assert not cloud.calls


@pytest.fixture(scope="module")
def real_gcloud(tmp_path_factory):
    """A function that checks that the real gcloud can parse a command line; without an account, gcloud stops after
    that."""
    if shutil.which("gcloud") is None:
        pytest.skip("no gcloud here to parse the command lines")
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path_factory.mktemp("gcloud"))}

    def parse(argv: list[str]) -> None:
        found = subprocess.run(["gcloud", *argv], env=environment, capture_output=True, text=True, timeout=60)
        assert found.returncode and "active account" in found.stderr, found.stderr

    return parse


def test_the_real_gcloud_can_read_all_of_it(cloud, real_gcloud):
    for words in (["--internal_ips=1", "--valid_for=6h", "--service_account=a@b"], ["--slices=2", "--tier=reserved"]):
        cloud.run("create", *words)
        cloud.run("wait", *words)
        cloud.run("ssh", *words, "--", "true")
        cloud.run("setup", *words)
        cloud.run("status", *words)
        cloud.run("delete", *words)
    seen = {}
    for call in cloud.calls:
        seen[tuple(word.partition("=")[0] for word in call)] = call
    assert len(seen) > 8
    for call in seen.values():
        real_gcloud(call)


# States


def test_wait(cloud):
    cloud.script(states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert "there is no run" in cloud.run("wait", code=2)
    cloud.run("create")
    out = cloud.run("wait", "--poll_s=0.1")
    assert [line.split()[-1] for line in out.splitlines()] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_wait_for_what_will_not_come(cloud, state):
    cloud.script(states=["WAITING_FOR_RESOURCES", state])
    cloud.run("create")
    assert "delete.sh, then create.sh" in last_line(cloud.run("wait", "--poll_s=0.1", code=42))
    assert "exists, but is dead" in last_line(cloud.run("create", code=2))
    cloud.run("delete")
    assert cloud.resources == {}


def test_delete_what_is_not_there(cloud):
    cloud.run("create")
    out = cloud.run("delete", "--zone=us-central1-a", code=2)
    assert out.startswith("error: there is no run in us-central1-a of p") and "run" in cloud.resources
    cloud.run("create", "--name=other")
    out = cloud.run("delete")
    assert "run is deleted\nstill billing in us-east5-b:\nqueued resource other ACTIVE" in out
    assert "there is no run in us-east5-b of p" in cloud.run("delete", code=2)


def test_status_names_what_is_billing(cloud):
    cloud.run("create")
    cloud.run("wait")
    out = cloud.run("status")
    assert "run ACTIVE" in out and "billing in us-east5-b:\nqueued resource run ACTIVE\nTPU VM run READY" in out


def test_status_where_the_workers_are_not_known(cloud):
    """Earlier answers of the workers are not shown as current answers."""
    cloud.run("create")
    cloud.run("wait")
    cloud.run("ssh", "--", "echo", "before")
    cloud.script(faults=[{"match": "tpu-vm describe", "stderr": "ERROR: (gcloud) x"}])
    first, error, *rest = cloud.run("status", code=42).splitlines()
    assert first == "run ACTIVE" and error.startswith("error: cannot ask for the workers of run")
    assert rest == ["billing in us-east5-b:", "queued resource run ACTIVE", "TPU VM run READY"]


def test_a_babysitter_for_whom_the_workers_are_not_known(cloud):
    """The workers are not known for a while; meanwhile the run continues."""
    done = cloud.folder / "done"
    argv = ["sh", "-c", f"until [ -e {done} ]; do sleep 0.1; done", "--workdir=bucket/runs/x"]
    with runs.ending(cloud.start("babysit", "--poll_s=0.2", "--", *argv)) as (babysitter,):
        runs.wait_until(lambda: (cloud.folder / "workers/run.1/meshlm-run/group").exists(), babysitter)
        cloud.script(faults=[{"match": "tpu-vm describe", "stderr": "ERROR: (gcloud) x", "times": 2}])
        runs.wait_until(lambda: not cloud.has_faults(), babysitter)
        done.touch()
        out = runs.finish(babysitter)
    assert "it is not known what the workers do" in out and "done at step 0" in out


# Mistakes: each is reported in one line

MISTAKES = {
    "not logged in": ("You do not currently have an active account selected.", "gcloud auth login"),
    "zone": ("Permission denied on 'locations/us-eats5-b' (or it may not exist).", "ZONE=us-east5-b"),
    "rights": ("PERMISSION_DENIED: caller lacks tpu.nodes.create", "TPU Admin in p"),
    "type": ("INVALID_ARGUMENT: Accelerator type v6e-17 is invalid", "accelerator-types list"),
    "runtime": ("INVALID_ARGUMENT: runtimeVersion: Runtime version x not found", "versions list"),
    "quota": (
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptible' has been exceeded. Limit: 0",
        "ask for quota of v6e-16",
    ),
    "room": ("RESOURCE_EXHAUSTED: There is no more capacity in the zone", "another zone"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_the_cloud_says_no(cloud, what):
    said, advice = MISTAKES[what]
    cloud.script(faults=[{"match": "queued-resources create", "stderr": f"ERROR: (gcloud) {said}"}])
    out = cloud.run("create", code=2)
    assert len(out.splitlines()) == 1 and said[:40] in out and advice in out


@pytest.mark.parametrize("script", ["setup", "run", "logs", "ssh", "stop"])
def test_before_there_are_machines(cloud, script):
    """The error is the same after the machines were taken away, or if they are in another zone."""
    out = cloud.run(script, "--", "python", "--workdir=bucket/x", code=2)
    (line,) = [line for line in out.splitlines() if not line.startswith("code of ")]
    assert "launch/tpu/create.sh" in line and not [call for call in cloud.calls if call[3] == "ssh"]


def test_what_passes_is_tried_again(cloud):
    cloud.script(faults=[{"match": "create", "stderr": "ERROR: UNAVAILABLE: try later", "times": 3}])
    out = cloud.run("create")
    assert out.count("UNAVAILABLE") == 3 and cloud.resources["run"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--zome=x"], "unknown flag --zome"),
        (["--name=Run_1"], "NAME=Run_1 must be small letters"),
        (["--type="], "TYPE is not set"),
        (["--type=v9-8"], "TYPE=v9-8 is not known"),
        (["--slices=two"], "SLICES=two must be a number"),
        (["--tier=cheap"], "TIER=cheap must be"),
        (["--valid_for=6"], "VALID_FOR=6 must be a duration with its unit"),
        (["--env=nowhere.env"], "--env=nowhere.env: no such file"),
        (["--env", "nowhere.env"], "--env=nowhere.env: no such file"),
        (["--env=bad.env"], "bad.env, line 2: ZON=x sets none of"),
        (["zone"], "unexpected argument zone"),
    ],
)
def test_settings_that_cannot_be(cloud, words, says):
    (cloud.folder / "bad.env").write_text("PROJECT=p\nZON=x\n")
    out = cloud.run("create", *words, code=2)
    assert says in out and len(out.splitlines()) == 1 and not cloud.calls


@pytest.mark.parametrize(
    ("script", "word", "says"),
    [
        ("wait", "--poll_s=often", "--poll_s=often must be a number"),
        ("wait", "--limit_s=1.5", "--limit_s=1.5 must be a whole number"),
        ("logs", "--lines=-1", "--lines=-1 must be a whole number"),
        ("babysit", "--max_hours=day", "--max_hours=day must be a number"),
    ],
)
def test_numbers_that_are_none(cloud, script, word, says):
    out = cloud.run(script, word, "--", "python", "--workdir=bucket/x", code=2)
    assert says in out and len(out.splitlines()) == 1 and not cloud.calls


def test_a_terminal_does_not_say_how_many_lines(cloud):
    """--lines must win although bash sets LINES if it has a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (50, 80))
    argv = cloud.command("logs", "--dry_run", "--lines=7")
    out = subprocess.run(
        argv, cwd=cloud.folder, env=cloud.environment, text=True, stdout=subprocess.PIPE, stdin=theirs, stderr=theirs
    ).stdout
    os.close(ours)
    os.close(theirs)
    assert "worker.sh log 7'" in out


def test_gcloud_is_missing(cloud):
    out = cloud.run("create", code=2, PATH=without_gcloud(cloud.folder / "bin"))
    assert "gcloud is missing; install" in out and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name the training command after --"),
        (["--", "python", "-m", "launch.train"], "has no --workdir"),
        (["--", "python", "--workdir=/tmp/x"], "--workdir=/tmp/x must be below runs/ (NFS) or bucket/ (BUCKET)"),
        (["--", "python", "--workdir=runs/x"], "put NFS=SERVER:/EXPORT into tpu.env"),
        (["--type=v6e-8", "--", "python", "--workdir=runs/x"], "on a disk that is deleted with the machine"),
        (["--nfs=10.0.0.2", "--", "python", "--workdir=runs/x"], "NFS=10.0.0.2 must be SERVER:/EXPORT"),
        (["--bucket=", "--", "python", "--workdir=bucket/x"], "none is set; put BUCKET into tpu.env"),
        (["--", "python", "--workdir=bucket/../x"], "--workdir=bucket/../x must be below"),
        (["--", "python", "--workdir=bucket/./x"], "--workdir=bucket/./x must be below"),
        (["--", "python", "--workdir=bucket//x"], "--workdir=bucket//x must be below"),
        (["--", "python", "--workdir=bucket/x", "-workdir=/tmp/x"], "--workdir=/tmp/x must be below"),
        (["--", "python", "--workdir=bucket/x", "-workdir", "/tmp/x"], "--workdir=/tmp/x must be below"),
        (["--", "python", "--workdir=bucket/x", "--flagfile=f"], "leave --flagfile=f out"),
        (["--", "python", "--workdir=bucket/a\nb"], "has a line feed or the like in it"),
    ],
)
def test_commands_that_cannot_be(cloud, words, says):
    for script in ("run", "babysit"):
        out = cloud.run(script, *words, code=2)
        assert says in out and len(out.splitlines()) == 1 and not cloud.calls


# Workers


def test_workers_that_fail_are_named(cloud):
    """One worker refuses connections for a while, one hangs, and on one a command fails; only the last two are
    named."""
    cloud.script(workers=3, faults=[{"match": "--worker=0", "code": 255, "times": 2}])
    cloud.run("create")
    cloud.run("wait")
    cloud.run("ssh", "--", "true")
    hang = {"match": "--worker=1", "hang": 30, "times": 1}
    cloud.script(workers=3, faults=[hang])
    command = "case $HOME in *.2) echo broken >&2; exit 7 ;; esac"
    out = cloud.run("ssh", "--limit_s=3", "--", "sh", "-c", command, code=2)
    assert "worker run.1: no answer within 3 s" in out and "worker run.2: exit code 7: broken" in out
    assert "worker run.0" not in out


def test_the_code_that_is_copied(cloud, tmp_path):
    """The copied code is the commit plus changes to tracked files. A file with a new time but the same content is not
    changed."""
    cloud.code, copied = runs.clone(tmp_path / "clone"), cloud.folder / "workers/run.1/meshlm"
    cloud.run("create")
    cloud.run("wait")
    changed = "launch/tpu/example.env"
    os.utime(cloud.code / changed, (0, 0))
    assert "with changes" not in cloud.run("setup") and (copied / changed).read_text().startswith("#")
    (cloud.code / changed).write_text("changed")
    (cloud.code / "untracked").touch()
    assert "with changes, without 1 untracked files" in cloud.run("setup")
    assert (copied / changed).read_text() == "changed" and not (copied / "untracked").exists()
    (cloud.code / ".git/index.lock").touch()
    assert ".git/index.lock" in last_line(cloud.run("setup", code=2))


def test_a_shared_folder(cloud):
    """NFS is mounted at runs/ on each worker, shows other workers' writes at once, and survives a second setup."""
    cloud.run("create")
    cloud.run("wait")
    for _ in range(2):
        assert "2 workers: python" in cloud.run("setup", "--nfs=server:/runs")
        cloud.run("ssh", "--", "sh", "-c", "echo $MESHLM_PROCESS >>meshlm/runs/numbers")
    assert sorted((cloud.folder / "exports/runs/numbers").read_text().split()) == ["0", "0", "1", "1"]
    mounts = (cloud.folder / "mounts.txt").read_text().splitlines()
    assert mounts == 2 * ["-t nfs -o hard,lookupcache=positive server:/runs runs"], "once a worker"
    out = cloud.run("setup", "--nfs=server:/other", code=2)
    assert "runs/ is server:/runs here, and the settings say server:/other" in out, "another run's folder is not taken"


def test_a_shared_folder_that_is_not_there(cloud):
    cloud.run("create")
    cloud.run("wait")
    out = cloud.run("setup", "--nfs=nowhere:/runs", code=2)
    assert "NFS=nowhere:/runs could not be mounted" in out and "2 workers of run are not set up" in last_line(out)


def test_a_command_that_cannot_be_stopped(cloud):
    """No process of the command may be left, or the next command finds the TPU in use."""
    cloud.run("create")
    cloud.run("wait")
    cloud.run("setup")
    stubborn = "trap '' TERM; echo $$ >pid.$$; while :; do sleep 0.1; done"
    cloud.run("run", "--", "sh", "-c", stubborn, "--workdir=bucket/runs/x")
    pids = [int(path.name.removeprefix("pid.")) for path in cloud.folder.glob("workers/*/meshlm/pid.*")]
    assert len(pids) == 2 and all(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
    cloud.run("stop", MESHLM_STOP_S="2")
    runs.wait_until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids))
    assert cloud.run("status").count("exited 137 0") == 2


def test_a_machine_that_was_started_again(cloud):
    """The command counts as ended, even if another process has its pid now."""
    cloud.run("create")
    cloud.run("wait")
    cloud.run("setup")
    cloud.run("run", "--", "sleep", "1000", "--workdir=bucket/runs/x")
    assert cloud.run("status").count("running 0") == 2
    cloud.kill_workers()
    for path in cloud.folder.glob("workers/*/meshlm-run/group"):
        path.write_text(f"{os.getpid()}\n")
    assert cloud.run("status").count("exited 137 0") == 2
    cloud.run("stop")


def test_half_of_the_workers_are_not_set_up(cloud):
    """Only the workers that failed are named, and running the same command again sets them up."""
    cloud.script(
        workers=4, faults=[{"match": f"ssh run --worker={i}", "code": 1, "stderr": "No space left"} for i in (1, 3)]
    )
    cloud.run("create")
    cloud.run("wait")
    out = cloud.run("setup", code=2).splitlines()
    assert [line.partition(":")[0] for line in out[1:-1]] == ["worker run.1", "worker run.3"]
    assert "No space left" in out[1] and "2 workers of run are not set up" in out[-1]
    assert "4 workers: python" in cloud.run("setup")


def test_a_bucket_that_is_not_there(cloud):
    cloud.run("create")
    cloud.run("wait")
    out = cloud.run("setup", "--bucket=wrong", code=2)
    assert "gs://wrong could not be mounted" in out and "2 workers of run are not set up" in last_line(out)


# From create to done

TRAIN = {
    "num_train_steps": 60,
    "data__seq_len": 64,
    "mesh__data": 2,
    "model__dropout": 0.1,
    "checkpoint__every_steps": 5,
    "checkpoint__keep_last": 3,
    "eval__every_steps": 1,
    "eval__num_windows": 0,
}


def training(cloud: Cloud, **fields) -> list[str]:
    """The command for a worker; its dataset is in the bucket."""
    argv = runs.command(pathlib.Path("bucket/runs/x"), pathlib.Path("bucket/dataset"), **TRAIN | fields)
    return ["python", *argv[1:]]


def newest(cloud: Cloud) -> int:
    names = (
        path.parent.name for path in (cloud.folder / "buckets/b/runs/x/checkpoints").glob("*/_CHECKPOINT_METADATA")
    )
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
def test_a_babysitter_and_three_preemptions(cloud, tmp_path):
    """The machines are preempted at random moments, and once the babysitter also dies; the losses are unaffected."""
    data = runs.dataset(cloud.folder / "buckets/b")
    runs.finish_gang(runs.start_gang(tmp_path / "whole", data, **TRAIN))
    cloud.script(states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    argv = ["--poll_s=0.5", "--", *training(cloud)]
    babysitters = [cloud.start("babysit", *argv)]
    try:
        for life, step in enumerate((5, 20, 35)):
            runs.wait_until(lambda step=step: newest(cloud) >= step, babysitters[-1])
            time.sleep(DICE.uniform(0, 1))
            if life == 1:
                babysitters[-1].kill()
                babysitters[-1].communicate()
            cloud.preempt()
            if life == 1:
                babysitters.append(cloud.start("babysit", *argv))
        out = runs.finish(babysitters[-1])
    finally:
        runs.kill(babysitters)
    assert "done at step 60" in out and last_line(out) == "run is deleted"
    assert out.count("deleting") + out.count("is deleted") >= 2
    assert cloud.resources == {}, "nothing keeps costing"
    assert runs.losses(cloud.folder / "buckets/b/runs/x") == runs.losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "code"), [({"model__num_heads": 7}, 2), ({"num_train_steps": 10}, 0)])
def test_a_babysitter_knows_when_to_end(cloud, fields, code):
    """The babysitter ends at an error that a restart does not fix, and when the run is done; it deletes the
    machines."""
    runs.dataset(cloud.folder / "buckets/b")
    out = cloud.run("babysit", "--poll_s=0.5", "--", *training(cloud, **fields), code=code)
    assert "which a restart does not fix" in out if code else "done at step 10" in out
    assert out.count("error: ") == bool(code), "once, not for each worker"
    assert cloud.resources == {}


@pytest.mark.slow
def test_a_babysitter_gives_up(cloud):
    """A babysitter gives up after three attempts without a checkpoint; in each, the workers' supervisors have
    retried."""
    argv = ["sh", "-c", "exit 1", "--workdir=bucket/runs/x"]
    out = cloud.run("babysit", "--poll_s=0.2", "--", *argv, code=1)
    assert "3 attempts without a new checkpoint" in out and cloud.resources == {}


@pytest.mark.slow
def test_the_hours_of_a_babysitter(cloud):
    runs.dataset(cloud.folder / "buckets/b")
    argv = ["--poll_s=0.5", "--max_hours=1", "--keep", "--", *training(cloud, num_train_steps=100_000)]
    with runs.ending(cloud.start("babysit", *argv)) as (babysitter,):
        runs.wait_until(lambda: newest(cloud) > 0, babysitter)
        babysitter.send_signal(signal.SIGINT)
        runs.finish(babysitter, 42)
    (age,) = (cloud.folder / "state").rglob("age")
    age.write_text(str(int(age.read_text()) + 3600))
    with runs.ending(cloud.start("babysit", *argv)) as (babysitter,):
        out = runs.finish(babysitter, 42)
    assert "the run saves" in out and "still billing in us-east5-b:\nqueued resource run ACTIVE" in out
    rows = runs.rows(cloud.folder / "buckets/b/runs/x")
    assert rows[-1]["step"] == newest(cloud)


@pytest.mark.slow
def test_start_stop_and_start_again(cloud):
    """Uses run, status, logs and stop by hand; the same command resumes the run."""
    runs.dataset(cloud.folder / "buckets/b")
    cloud.run("create")
    cloud.run("wait")
    cloud.run("setup")
    argv = training(cloud, num_train_steps=100_000)
    cloud.run("run", "--", *argv)
    deadline = time.monotonic() + runs.TIMEOUT_S
    while not newest(cloud) and time.monotonic() < deadline:
        time.sleep(0.1)
    out = cloud.run("status")
    assert re.search(r"run.0 running [1-9]", out) and re.search(r"run.1 running [1-9]", out)
    cloud.run("run", "--", *argv)  # stops the first command, or two would train one run
    assert "Resuming after step" in cloud.run("logs", "--lines=200") or newest(cloud)
    cloud.run("stop")
    assert "exited 42" in cloud.run("status")
