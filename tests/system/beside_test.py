"""Several scripts of launch/tpu/ and other users at the same time: who may act, what is reported, and what is kept."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tests.system.tpu_cloud import Cloud, babysitting, end, light, rounds, starts, waiting

STATE = "state/meshlm/tpu/p.us-east5-b.run"


@pytest.fixture
def cloud(tmp_path):
    with light(tmp_path) as made:
        yield made


@pytest.fixture
def machines(cloud):
    """Machines that were created and set up by hand."""
    for script in ("create", "wait", "setup"):
        cloud.run(script)
    return cloud


def of_others(cloud: Cloud, second: int = 0) -> None:
    """Makes NAME a machine that others have created."""
    created = f"2026-11-29T23:59:{second:02}.000000001Z"
    cloud.put("run", state="ACTIVE", next=[], nodes=["run"], type="v6e-16", labels={}, created=created)


# Whose machines they are


def test_adopting_is_for_what_is_there(cloud):
    """--adopt takes over the resource that exists now, and not a later one with the same name."""
    of_others(cloud)
    with babysitting(cloud, "--adopt", *waiting(cloud)) as babysitter:
        of_others(cloud, 1)
        out = runs.finish(babysitter, 2)
    assert "was not made from here" in out and not cloud.done("resources delete") and starts(cloud) == 1


def test_nothing_is_adopted_that_is_not_there(cloud):
    cloud.script(workers=1, faults=[{"match": "resources create", "stderr": "ERROR: (gcloud) UNAVAILABLE", "times": 9}])
    with runs.ending(cloud.start("babysit", "--adopt", *waiting(cloud))) as (babysitter,):
        runs.wait_until(lambda: cloud.done("resources create") > 0, babysitter)
        of_others(cloud)
        runs.finish(babysitter, 2)
    assert not cloud.done("resources delete") and not starts(cloud)


def test_a_name_that_is_another_machine_by_now(machines):
    """A deletion is carried out, but its answer is lost. Then the name belongs to a new machine, which must stay."""
    machines.script(faults=[{"match": "resources delete", "lost": True, "hang": 1, "stderr": "ERROR: UNAVAILABLE"}])
    process = machines.start("delete")
    runs.wait_until(lambda: not machines.resources, process)
    of_others(machines)
    assert "run is deleted" in runs.finish(process)
    assert machines.done("resources delete") == 1 and machines.resources


@pytest.mark.parametrize("hours", ["0", "0.00001"])
def test_hours_are_those_of_this_command(machines, hours):
    argv = waiting(machines)
    machines.run("run", *argv[1:])
    other = [f"--max_hours={hours}", *argv[:-1], "--workdir=bucket/runs/other"]
    assert "runs another command" in machines.run("babysit", *other, code=2)
    assert "running" in machines.run("status") and not machines.done("worker.sh stop")


def test_a_run_that_vanishes(cloud):
    """A run that vanishes is started again, but only a few times."""
    with babysitting(cloud) as babysitter:
        for life in (1, 2, 3):
            runs.wait_until(lambda life=life: starts(cloud) == life, babysitter)
            rounds(cloud, 3, babysitter)
            cloud.kill_workers()
            shutil.rmtree(cloud.folder / "workers/run.0/meshlm-run")
        out = runs.finish(babysitter, 42)
    assert "it has vanished" in out and "3 attempts without a new checkpoint" in out and not cloud.resources


@pytest.mark.parametrize("script", ["stop", "delete", "setup", "run"])
def test_nobody_acts_beside_a_babysitter(cloud, script):
    argv = waiting(cloud)
    with babysitting(cloud) as babysitter:
        before = len(cloud.calls)
        out = cloud.run(script, *(argv[1:] if script == "run" else []), code=2)
        assert f"a babysitter has run (pid {babysitter.pid})" in out
        assert not [call for call in cloud.calls[before:] if "delete" in call or "scp" in call]
        end(cloud)
        runs.finish(babysitter)
    assert starts(cloud) == 1


def test_its_reader_goes_away(cloud):
    """When the reader of its output is gone, the babysitter and the run continue, and the log records the end."""
    with babysitting(cloud) as babysitter:
        babysitter.stdout.close()
        rounds(cloud, 2, babysitter)
        end(cloud)
        assert babysitter.wait(timeout=60) == 0
    assert "done at step 0" in (cloud.folder / STATE / "babysit.log").read_text() and not cloud.resources


def test_nodes_of_another_name_are_not_adopted(cloud):
    """The scripts could not reach such nodes."""
    of_others(cloud)
    cloud.change("run", nodes=["mine"])
    assert "are called 'mine', and only those called run" in cloud.run("babysit", "--adopt", *waiting(cloud), code=2)
    assert not cloud.done("resources delete")


def test_a_script_that_acts_keeps_a_babysitter_away(machines):
    """A script is starting a command: a babysitter must neither stop it nor start it again."""
    machines.script(workers=1, faults=[{"match": "worker.sh start", "hang": 3, "lost": True, "code": 0}])
    process = machines.start("run", *waiting(machines)[1:])
    runs.wait_until(lambda: not machines.has_faults(), process)
    assert "or another script acts on it" in machines.run("babysit", *waiting(machines), code=2)
    runs.finish(process, 42)
    with babysitting(machines) as babysitter:
        rounds(machines, 3, babysitter)
        end(machines)
        runs.finish(babysitter)
    assert starts(machines) == 1


# Unknown states


@pytest.mark.parametrize(
    "why",
    ["x@1.2.3.4: Permission denied (publickey).", "ssh: connect to host x port 22: Network is unreachable", "x", ""],
)
def test_an_ssh_that_is_broken_here(cloud, why):
    """Such an error does not show the state of the workers, so they are not replaced. After --max_hours the babysitter
    ends."""
    with babysitting(cloud, "--max_hours=0.002", *waiting(cloud), MESHLM_LOST_S="1") as babysitter:
        cloud.script(workers=1, faults=[{"match": "worker status", "code": 255, "stderr": why, "times": 10**6}])
        out = runs.finish(babysitter, 42)
    assert "hours" in out and cloud.done("worker.sh start") == 1 and "does not answer" not in out


def test_what_runs_was_never_seen(machines):
    """If the babysitter has not learned what runs after --max_hours, the command may be another user's, so it is not
    stopped."""
    machines.script(workers=1, faults=[{"match": "worker status", "code": 0, "times": 10**6}])
    out = machines.run("babysit", "--max_hours=0.0001", *waiting(machines), code=42, MESHLM_LOST_S="1")
    assert "KEEPS BILLING" in out and machines.resources and not machines.done("worker.sh stop")


def test_silence_ends_with_an_answer(cloud):
    """Two periods of silence with an answer in between do not add up."""
    silent = {"match": "worker status", "code": 255, "stderr": "ssh: connect to host x port 22: Connection timed out"}
    cloud.script(workers=1, faults=[{**silent, "times": 6}])
    with babysitting(cloud, MESHLM_LOST_S="4") as babysitter:
        cloud.script(workers=1, faults=[{**silent, "times": 6}])
        runs.wait_until(lambda: not cloud.has_faults(), babysitter)
        rounds(cloud, 2, babysitter)
        end(cloud)
        runs.finish(babysitter)
    assert cloud.done("resources create") == 1 and starts(cloud) == 1


def test_scripts_that_are_gone(cloud, tmp_path):
    """If the clone is moved away, the attempt does not count as ended."""
    cloud.code = runs.clone(tmp_path / "clone")
    with babysitting(cloud, MESHLM_LOST_S="9") as babysitter:
        setup = cloud.code / "launch/tpu/setup.sh"
        text = setup.read_text()
        setup.unlink()
        end(cloud, 42)
        rounds(cloud, 5, babysitter)
        (cloud.folder / "done").unlink()
        setup.write_text(text)
        setup.chmod(0o755)
        runs.wait_until(lambda: starts(cloud) == 2, babysitter)
        end(cloud)
        out = runs.finish(babysitter)
    assert out.count("attempt ended") == 1


@pytest.mark.parametrize("lost", [{"code": 0}, {"code": 75}, {"code": 0, "lost": True, "stdout": "runn"}])
@pytest.mark.parametrize(
    ("script", "match"), [("setup", "worker.sh setup"), ("run", "worker.sh start"), ("stop", "worker.sh")]
)
def test_an_answer_that_is_not_one_is_no_success(machines, lost, script, match):
    argv = waiting(machines)[1:] if script == "run" else []
    machines.script(workers=1, faults=[{"match": match, "times": 3, **lost}])
    out = machines.run(script, *argv, code=42)
    assert out.splitlines()[-1].startswith("error: 1 workers of run have not answered")
    machines.script(workers=1)
    machines.run(script, *argv)


def test_as_many_slices_as_were_made(cloud):
    """Settings that no longer match the machines are refused, and so is an answer with fewer workers than before."""
    cloud.script(workers=2)
    cloud.run("create", "--slices=2")
    cloud.run("wait", "--slices=2")
    assert "2 x v6e-16" in cloud.run("setup", code=2)
    cloud.run("setup", "--slices=2")
    cloud.run("run", "--slices=2", *waiting(cloud)[1:])
    cloud.script(workers=2, faults=[{"match": "tpu-vm describe run-1", "code": 0, "stdout": "1"}])
    assert "the cloud names 3 workers of run, and there were 4" in cloud.run("stop", code=42)
    cloud.run("stop")
    assert cloud.run("status").count("exited") == 4


def test_requests_that_fail(cloud):
    """The reason why a request failed is reported; after five failures in a row the babysitter ends."""
    cloud.script(workers=1, states=["FAILED"])
    with runs.ending(cloud.start("babysit", *waiting(cloud))) as (babysitter,):
        runs.wait_until(lambda: bool(cloud.resources), babysitter)
        cloud.change("run", reason="There is no more capacity\nin the zone")
        out = runs.finish(babysitter, 42)
    assert "it is FAILED: There is no more capacity in the zone" in out
    assert "5 requests have brought no machines" in out and cloud.done("resources create") == 5


def test_another_type_is_asked_for_anew(cloud):
    """An error in the first request for the other type ends the babysitter, even if an earlier type was accepted."""
    with babysitting(cloud) as babysitter:
        babysitter.send_signal(signal.SIGTERM)
        runs.finish(babysitter, 42)
    cloud.run("delete")
    cloud.script(faults=[{"match": "resources create", "stderr": "ERROR: (gcloud) INVALID_ARGUMENT: acceleratorType"}])
    assert "accelerator-types list" in cloud.run("babysit", "--type=v6e-32", *waiting(cloud), code=2)


def test_deleted_and_the_list_is_refused(machines):
    machines.script(faults=[{"match": "list", "stderr": "ERROR: (gcloud) PERMISSION_DENIED", "times": 9}])
    assert "it cannot be listed now" in machines.run("delete")


# Signals


@pytest.mark.parametrize(("script", "match"), [("create", "resources create"), ("delete", "resources delete")])
def test_a_signal_to_what_acts(cloud, script, match):
    if script == "delete":
        cloud.run("create")
    cloud.script(workers=1, faults=[{"match": match, "hang": 30, "lost": True}])
    process = cloud.start(script)
    with runs.ending(process):
        runs.wait_until(lambda: not cloud.has_faults(), process)
        process.send_signal(signal.SIGINT)
        assert "run in us-east5-b of p may exist, and may be billing" in runs.finish(process, 42, within_s=10)


def test_a_signal_while_the_workers_are_asked_for(cloud):
    with babysitting(cloud) as babysitter:
        rounds(cloud, 2, babysitter)
        cloud.script(workers=1, faults=[{"match": "tpu-vm describe", "hang": 30}])
        runs.wait_until(lambda: not cloud.has_faults(), babysitter)
        babysitter.send_signal(signal.SIGTERM)
        assert "keeps running, and billing" in runs.finish(babysitter, 42, within_s=10)


def test_what_a_dead_babysitter_has_begun(cloud):
    """If a start has no connection yet, it is not retried after its babysitter has died."""
    cloud.script(workers=1, faults=[{"match": "worker.sh start", "code": 255, "hang": 2, "times": 3}])
    with runs.ending(cloud.start("babysit", *waiting(cloud))) as (babysitter,):
        runs.wait_until(lambda: starts(cloud) == 1, babysitter)
        babysitter.kill()
        babysitter.wait()
    time.sleep(4)
    assert starts(cloud) == 1 and not (cloud.folder / "workers/run.0/meshlm-run").exists()


# Files that are kept


def test_a_setup_by_hand_ends_nothing(machines):
    machines.run("run", *waiting(machines)[1:])
    assert "a command runs here, which setup would end" in machines.run("setup", code=2)
    machines.run("stop")
    machines.run("setup")
    assert (machines.folder / "workers/run.0/meshlm-run.before/log.txt").exists()


def test_a_setup_removes_what_it_has_brought(machines):
    """A setup removes only files that an earlier setup has copied: datasets and mounts stay."""
    home = machines.folder / "workers/run.0/meshlm"
    for name in ("datasets/mine", "launch/old.py"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()
    machines.run("setup")
    assert (home / "datasets/mine").exists() and not (home / "launch/old.py").exists()


def test_a_supervisor_that_dies(machines):
    """The supervisor dies while its trainer runs, so stop.sh waits until the trainer has saved."""
    saved = machines.folder / "saved"
    saves = f"trap 'sleep 4; touch {saved}; exit 42' TERM; while :; do sleep 0.1; done"
    argv = ["--", "sh", "-c", saves, "--workdir=bucket/runs/x"]
    machines.environment["FAKE_PYTHON"] = sys.executable
    machines.run("run", *argv)
    group = (machines.folder / "workers/run.0/meshlm-run/group").read_text().strip()
    supervisor = subprocess.run(["pgrep", "--parent", group], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(supervisor), signal.SIGKILL)
    assert "run.0 running" in machines.run("status")
    machines.run("stop")
    assert saved.exists()


@pytest.mark.parametrize("code", [0, 3])
def test_logs_outlive_the_machines(cloud, code):
    end(cloud, code)
    out = cloud.run("babysit", *waiting(cloud, "echo error: the last words"), code=code)
    (log,) = (cloud.folder / STATE / "logs").glob("*/run.0.txt")
    assert "error: the last words" in log.read_text() and not cloud.resources
    assert ("error: the last words" in out) is bool(code)


@pytest.mark.parametrize("name", ["GIT_DIR", "CDPATH", "POSIXLY_CORRECT", "symlink"])
def test_the_code_is_that_of_these_scripts(machines, tmp_path, name):
    """Variables of the shell that name another clone have no effect."""
    other = tmp_path / "other"
    (other / "launch").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", other], check=True)
    if name == "symlink":
        (machines.folder / "setup").symlink_to(machines.code / "launch/tpu/setup.sh")
        subprocess.run([machines.folder / "setup"], cwd=machines.folder, env=machines.environment, check=True)
    machines.run("setup", **{name: str(other / ".git" if name == "GIT_DIR" else other)})
    assert (machines.folder / "workers/run.0/meshlm/pyproject.toml").exists()


# Exit codes and messages


@pytest.mark.parametrize("code", [5, 127, 130])
def test_codes_that_no_restart_mends(cloud, code):
    end(cloud, code)
    assert f"the command ended with {code}" in cloud.run("babysit", *waiting(cloud), code=code)
    assert starts(cloud) == 1 and not cloud.resources


def test_a_mistake_that_was_mended(cloud):
    """With --keep, the machines still exist and have the exit code of the last attempt, which must not end the next
    babysitter."""
    end(cloud, 2)
    cloud.run("babysit", "--keep", *waiting(cloud), code=2)
    end(cloud)
    assert "done at step 0" in cloud.run("babysit", *waiting(cloud))
    assert starts(cloud) == 2 and not cloud.resources


def test_nothing_costs_yet(cloud):
    """Before the machines exist, the babysitter does not say that they bill."""
    cloud.script(workers=1, states=["PROVISIONING"] * 99)
    with runs.ending(cloud.start("babysit", *waiting(cloud))) as (babysitter,):
        rounds(cloud, 3, babysitter)
        babysitter.send_signal(signal.SIGTERM)
        out = runs.finish(babysitter, 42)
    assert "keeps billing" not in out and "may exist, and may be billing" in out


def empty(folder: pathlib.Path) -> str:
    """A PATH with the commands that the scripts need, except git."""
    (folder / "bin").mkdir()
    for name in (
        "bash",
        "dirname",
        "gcloud",
        "timeout",
        "flock",
        "mkdir",
        "find",
        "rm",
        "cat",
        "sed",
        "grep",
        "readlink",
    ):
        (folder / "bin" / name).symlink_to(shutil.which(name) or "/bin/true")
    return str(folder / "bin")


@pytest.mark.parametrize(
    ("script", "words", "environment", "says"),
    [
        ("setup", [], {"PATH": ""}, "git is missing"),
        ("babysit", ["--", "true", "--workdir=bucket/x"], {"GIT_CONFIG_GLOBAL": "bad.env"}, "git does not work here"),
        ("create", [], {"HOME": "", "XDG_STATE_HOME": ""}, "HOME is not set"),
        ("create", [], {"XDG_STATE_HOME": "/proc/x"}, "is not writable"),
        ("create", [], {"TMPDIR": "/nowhere"}, "no file can be made in /nowhere"),
        ("create", ["--dry_run"], {"TMPDIR": "/nowhere"}, "no file can be made in /nowhere"),
        ("create", ["--project zone=x"], {}, "unknown flag"),
        ("create", ["--keep?=x"], {}, "unknown flag"),
        ("create", ["--name=a\nb"], {}, "NAME=a b must be"),
        ("create", ["--nfs=-o:/x"], {}, "must be SERVER:/EXPORT"),
        ("create", ["--bucket=-o"], {}, "must be the name of a bucket"),
        ("create", ["--bucket=gs://mine/sub"], {}, "without a folder"),
    ],
)
def test_a_mistake_is_one_line(cloud, script, words, environment, says):
    (cloud.folder / "bad.env").write_text("[")
    if environment.get("PATH") == "":
        environment = {"PATH": empty(cloud.folder)}
    out = cloud.run(script, *words, code=2, **environment)
    assert says in out and (len(out.splitlines()) == 1 or "as it says above" in out) and not cloud.calls


def test_flags_in_a_turkish_locale(cloud):
    """In this locale, the upper case of i is a different letter."""
    made = ["localedef", "--inputfile=tr_TR", "--charmap=UTF-8", cloud.folder / "tr_TR.UTF-8"]
    if not shutil.which("localedef") or subprocess.run(made, capture_output=True).returncode > 1:
        pytest.skip("the sources of locales are not here")
    place = {"LOCPATH": str(cloud.folder), "LC_ALL": "tr_TR.UTF-8"}
    assert "asks: gcloud" in cloud.run("create", "--dry_run", "--tier=spot", "--valid_for=6h", **place)


def test_a_file_of_settings_with_a_byte_order_mark(cloud):
    path = cloud.folder / "tpu.env"
    path.write_text("\ufeff" + path.read_text())
    cloud.run("create")
    path.write_text("PROJECT=p\nZON=x\n")
    assert "launch/tpu/create.sh" in cloud.run("create", "--help")
