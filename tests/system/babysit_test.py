"""launch/tpu/babysit.sh under uncertainty: answers that are lost, empty or late, machines of others, and changed
settings.

The run is a shell that waits for a file, so that a test decides when it is done.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from tests import runs
from tests.system.tpu_cloud import Cloud, babysitting, checkpoint, end, light, rounds, starts, waiting

# Text that gcloud 528 prints around its errors.
ACCOUNT = "This command is authenticated as a@b which is the active account specified by the [core/account] property."
TIMED_OUT = "ssh: connect to host 1.2.3.4 port 22: Connection timed out"
WAITS = "Create request issued for: [run]\nWaiting for operation [o] to complete...\n..failed.\n"


@pytest.fixture
def cloud(tmp_path):
    with light(tmp_path) as made:
        yield made


def forget_all(cloud: Cloud) -> None:
    shutil.rmtree(cloud.folder / "state")


# Unknown states


def test_looking_is_no_reason_to_start(cloud):
    """Scripts that ask the same workers at the same time do not mix up their answers."""
    with babysitting(cloud) as babysitter:
        looking = [cloud.start(name, *words) for name, *words in 3 * (["logs"], ["status"], ["ssh", "--", "true"])]
        for look in looking:
            runs.finish(look, within_s=60)
        rounds(cloud, 2, babysitter)
        end(cloud)
        runs.finish(babysitter)
    assert starts(cloud) == 1 and cloud.resources == {}


ANSWERS = [
    {"match": "worker status", "code": 0, "stdout": said}
    for said in (
        "",
        "running",
        "running x",
        "exited",
        "exited 0",
        "step 4,010  loss 2.31",
        "none",
        "nonesuch 0",
        "done 1",
    )
]
ANSWERS += [
    {"match": "worker status", "code": code, "stderr": said}
    for code, said in ((1, "ERROR: gcloud crashed (ConnectionError): …"), (255, "reset"), (1, "exited 0 7"))
]
ANSWERS += [
    {"match": "queued-resources describe", "code": 0, "stdout": said}
    for said in ("", ",,,,", "SUSPENDED", "FAILED,", ",2026-11-01,v6e-16,,", "FAILED 2026-11-01 v6e-16")
]
ANSWERS += [
    {"match": "queued-resources describe", "stderr": said}
    for said in ("ERROR: (gcloud) NOT_FOUND: the project p was not found", "ERROR: server not found", "x")
]
ANSWERS += [{"match": "tpu-vm describe", "code": 0, "stdout": said} for said in ("", "0", "many")]


def test_an_answer_that_is_none_is_no_reason_to_act(cloud):
    """Invalid output in place of an answer never makes the babysitter start a healthy run again or delete anything."""
    with babysitting(cloud, MESHLM_LOST_S="60") as babysitter:
        for answer in ANSWERS:
            cloud.script(workers=1, faults=[answer | {"times": 2}])
            runs.wait_until(lambda: not cloud.has_faults(), babysitter)
        rounds(cloud, 2, babysitter)
        assert starts(cloud) == 1 and not cloud.done("queued-resources delete")
        end(cloud)
        runs.finish(babysitter)


def test_what_gcloud_says_around_an_answer(cloud):
    with babysitting(cloud) as babysitter:
        said = "SSH: Attempting to connect to worker 0...\nrunning 12\n\nUpdates are available for some components."
        cloud.script(workers=1, faults=[{"match": "worker status", "code": 0, "stdout": said}])
        runs.wait_until(lambda: not cloud.has_faults(), babysitter)
        rounds(cloud, 1, babysitter)
        end(cloud)
        assert "running, step 12" in runs.finish(babysitter)


def test_a_worker_that_is_gone_for_long(cloud):
    """A worker that is gone for long is replaced, and the run resumes on the new worker."""
    with babysitting(cloud, MESHLM_LOST_S="1") as babysitter:
        cloud.script(workers=1, faults=[{"match": "worker status", "code": 255, "stderr": TIMED_OUT, "times": 30}])
        runs.wait_until(lambda: cloud.done("queued-resources create") == 2, babysitter)
        cloud.script(workers=1)
        runs.wait_until(lambda: starts(cloud) == 2, babysitter)
        end(cloud)
        assert "a worker has not answered for 1 s" in runs.finish(babysitter)


@pytest.mark.parametrize("what", ["start", "worker.sh setup", "queued-resources create", "tpu-vm scp"])
def test_an_answer_that_is_lost(cloud, what):
    """The action was carried out although its answer is lost: it is not repeated, or repeating it changes nothing."""
    said = "ERROR: gcloud crashed (ConnectionError): ('Connection aborted.', RemoteDisconnected('…'))"
    code = 255 if what == "start" else 1
    match = "worker.sh start" if what == "start" else what
    cloud.script(workers=1, faults=[{"match": match, "lost": True, "code": code, "stderr": said}])
    lives = f"echo x >>{cloud.folder}/lives"
    with babysitting(cloud, *waiting(cloud, lives)) as babysitter:
        runs.wait_until(lambda: not cloud.has_faults(), babysitter)
        rounds(cloud, 2, babysitter)
        end(cloud)
        out = runs.finish(babysitter)
    assert (cloud.folder / "lives").read_text() == "x\n" and "attempt ended" not in out
    assert not cloud.resources and cloud.done("queued-resources create") <= 2


def test_a_create_of_which_nothing_is_known(cloud):
    """The resource may bill, so create.sh says so and exits with 42, a code at which the babysitter keeps asking."""
    lost = {
        "match": "queued-resources create",
        "lost": True,
        "stderr": "ERROR: (gcloud) DEADLINE_EXCEEDED: x",
        "times": 9,
    }
    silent = {"match": "queued-resources describe", "stderr": "ERROR: (gcloud) x", "times": 1}
    cloud.script(faults=[lost])
    cloud.run("create")
    assert cloud.run("create", "--name=other") and len(cloud.resources) == 2
    cloud.script(faults=[{"match": "describe third", "stderr": "NOT_FOUND: '/queuedResources/third'"}, lost, silent])
    out = cloud.run("create", "--name=third", code=42)
    assert "not known whether third was created in us-east5-b of p; IT MAY BE BILLING" in out


@pytest.mark.parametrize("state", ["SUSPENDING", "FAILED"])
def test_a_create_whose_answer_is_lost_and_what_became_of_it(cloud, state):
    """The resource is ours, whatever its state is after the lost answer."""
    lost = {"match": "queued-resources create", "lost": True, "stderr": "ERROR: (gcloud) DEADLINE_EXCEEDED: x"}
    cloud.script(states=["WAITING_FOR_RESOURCES", state], faults=[lost])
    assert "run is requested" in cloud.run("create")
    cloud.script(workers=1)
    end(cloud)
    cloud.change("run", next=["SUSPENDED"] if state == "SUSPENDING" else [])
    assert "done at step 0" in cloud.run("babysit", *waiting(cloud))
    assert cloud.resources == {}


# Resources that are not ours


def made_by(cloud: Cloud, mark: str | None = None, **what) -> None:
    """Creates `run`, sets the fields in `what`, and gives it another label: `mark`, or none."""
    cloud.run("create")
    cloud.change("run", labels={"meshlm": mark} if mark else {}, **what)


@pytest.mark.parametrize("mark", [None, "another-user-0123456789ab"])
@pytest.mark.parametrize("state", ["ACTIVE", "FAILED"])
def test_what_others_have_made(cloud, state, mark):
    """Neither a babysitter nor scripts that are run by hand change a resource of others; they say how to adopt it."""
    made_by(cloud, mark, state=state)
    calls = len(cloud.calls)
    out = cloud.run("babysit", *waiting(cloud), code=2)
    assert len(out.splitlines()) == 1, out
    for said in (f"run in us-east5-b of p was not made from here (label meshlm: {mark or 'none'})", "--adopt"):
        assert said in out
    for script in ("setup", "run", "stop", "delete"):
        assert "was not made from here" in cloud.run(script, "--", *waiting(cloud)[2:], code=2)
    assert {call[3] for call in cloud.calls[calls:]} == {"describe"}


@pytest.mark.parametrize("words", [["--slices=4"], ["--type=v6e-8"]])
def test_ours_and_not_what_was_asked_for(cloud, words):
    cloud.run("create")
    out = cloud.run("babysit", *words, *waiting(cloud), code=2)
    assert "NAME=run is in use, by 1 x v6e-16" in out and "run in us-east5-b of p may exist, and may be billing" in out
    assert cloud.resources and not cloud.done("delete")


def test_state_that_is_lost(cloud):
    """Without its state, as on another machine, the same command ends with 2; with --adopt it watches the run."""
    with babysitting(cloud) as babysitter:
        babysitter.kill()
    forget_all(cloud)
    assert "--adopt" in cloud.run("babysit", *waiting(cloud), code=2)
    with runs.ending(cloud.start("babysit", "--adopt", *waiting(cloud))) as (babysitter,):
        rounds(cloud, 3, babysitter)
        assert starts(cloud) == 1
        cloud.preempt()
        runs.wait_until(lambda: starts(cloud) == 2, babysitter)
        assert cloud.resources["run"]["labels"] == {"meshlm": cloud.owner()}
        end(cloud)
        runs.finish(babysitter)
    assert cloud.resources == {}


def test_an_owner_that_is_damaged(cloud):
    """An empty owner does not match a resource without a label."""
    made_by(cloud)
    (owner,) = (cloud.folder / "state").rglob("owner")
    for text in ("", "x"):
        owner.write_text(text)
        assert "owner is damaged" in cloud.run("babysit", *waiting(cloud), code=2)
    assert not cloud.done("delete")


def test_another_command_on_the_same_machines(cloud):
    """The babysitter does not end the run in progress for another command; running stop.sh by hand does."""
    argv = waiting(cloud)
    with babysitting(cloud) as babysitter:
        babysitter.send_signal(signal.SIGINT)
        runs.finish(babysitter, 42)
    other = [*argv[:-1], "--workdir=bucket/runs/other"]
    assert "runs another command; end it with launch/tpu/stop.sh" in cloud.run("babysit", *other, code=2)
    assert starts(cloud) == 1 and "running" in cloud.run("status")
    cloud.run("stop")
    end(cloud)
    assert "done at step 0" in cloud.run("babysit", *other)
    assert starts(cloud) == 2 and not cloud.resources


def test_a_run_that_was_started_by_hand(cloud):
    """The babysitter watches a run that was started by hand, and does not start it again."""
    argv = waiting(cloud)
    cloud.run("create")
    cloud.run("wait")
    cloud.run("setup")
    cloud.run("run", *argv[1:])
    with babysitting(cloud) as babysitter:
        rounds(cloud, 2, babysitter)
        end(cloud)
        runs.finish(babysitter)
    assert starts(cloud) == 1


# Resources that bill

REFUSALS = {
    "tokens": "ERROR: (gcloud.x) There was a problem refreshing your current auth tokens: Failed to resolve 'oauth2.x'",
    "network": "ERROR: gcloud crashed (ConnectionError): HTTPSConnectionPool(…): Max retries exceeded with url: /v2",
    "rights": f"ERROR: (gcloud.x) PERMISSION_DENIED: Permission 'tpu.nodes.delete' denied. {ACCOUNT}",
    "state": f'{WAITS}ERROR: (gcloud.x) {{\n  "code": 9,\n  "message": "busy"\n}}',
}


@pytest.mark.parametrize(("why", "code"), [("tokens", 0), ("network", 3), ("rights", 0), ("state", 3)])
def test_what_cannot_be_deleted(cloud, why, code):
    """The exit code is never 0: the message names the resource that bills, and the same command resumes the
    deletion."""
    end(cloud, code)
    cloud.script(workers=1, faults=[{"match": "resources delete", "stderr": REFUSALS[why], "times": 10**6}])
    out = cloud.run("babysit", *waiting(cloud), code=code or 42, MESHLM_LOST_S="1")
    assert "DELETE IT YOURSELF: run in us-east5-b of p keeps billing" in out
    assert "run in us-east5-b of p KEEPS BILLING" in cloud.run("delete", code=42)
    assert cloud.done("queued-resources delete") > 5
    cloud.script(workers=1)
    assert "run is deleted" in cloud.run("babysit", *waiting(cloud), code=code)
    assert cloud.resources == {} and starts(cloud) == 1


def test_what_is_deleted_after_a_while(cloud):
    """A deletion succeeds even if answers are lost, or report a deletion that did not happen."""
    end(cloud)
    faults = [{"match": "resources delete", "stderr": REFUSALS["network"], "times": 7}]
    faults += [{"match": "resources delete", "code": 0, "times": 7}]
    faults += [{"match": "resources delete", "stderr": REFUSALS["tokens"], "lost": True}]
    cloud.script(workers=1, faults=faults)
    cloud.run("babysit", *waiting(cloud))
    assert cloud.resources == {} and not cloud.has_faults()


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_names_what_bills(cloud, signal_):
    with babysitting(cloud) as babysitter:
        babysitter.send_signal(signal_)
        assert "run in us-east5-b of p keeps running, and billing" in runs.finish(babysitter, 42, within_s=5)


def test_the_same_command_at_once(cloud):
    """After Ctrl-C, which the whole process group gets, the same command works at once. The signal comes in a pause,
    while gcloud hangs, or during a setup."""
    for round_, hang in enumerate((None, "queued-resources describe", "worker status", "worker.sh setup")):
        if hang:
            cloud.script(workers=1, faults=[{"match": hang, "hang": 20, "code": 1}])
        if hang == "worker.sh setup":
            cloud.kill_workers()
        argv = cloud.command("babysit", "--poll_s=20" if hang is None else "--poll_s=0.2", *waiting(cloud)[1:])
        options = {"cwd": cloud.folder, "env": cloud.environment, "text": True, "start_new_session": True}
        babysitter = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        with runs.ending(babysitter):
            if hang:
                runs.wait_until(lambda: not cloud.has_faults(), babysitter)
            else:
                runs.wait_until(lambda: "worker.sh start" in str(cloud.calls), babysitter)
            time.sleep(0.5)
            os.killpg(babysitter.pid, signal.SIGINT)
            # Does not wait until the output is closed: a process that keeps running would hold it open.
            assert babysitter.wait(timeout=5) == 42, round_
        held = cloud.folder / "state/meshlm/tpu/p.us-east5-b.run/babysitter"
        assert subprocess.run(["flock", "-n", held, "true"]).returncode == 0, hang
    cloud.script(workers=1)
    end(cloud)
    cloud.run("babysit", *waiting(cloud))


# Settings


def commands(out: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("asks: ")) for line in out.splitlines() if "gcloud" in line]


def test_the_settings_of_another_file(cloud):
    """A setting that is empty in --env=FILE or on the command line stays empty for every script that is started."""
    first = "VALID_FOR=6h\nNFS=10.0.0.2:/first\nSERVICE_ACCOUNT=x@a\nINTERNAL_IPS=1\n"
    (cloud.folder / "tpu.env").write_text(f"PROJECT=a\nZONE=z\nNAME=first\nTYPE=v6e-8\n{first}")
    (cloud.folder / "second.env").write_text("PROJECT=b\nZONE=z\nNAME=second\nTYPE=v6e-8\nBUCKET=b\n")
    empty = ["--valid_for=", "--nfs=", "--service_account=", "--internal_ips=", "--bucket=b"]
    for words in (["--env=second.env"], ["--env", "second.env"], empty):
        out = cloud.run("babysit", *words, "--dry_run", *waiting(cloud))
        for option in ("10.0.0.2", "valid-until", "service-account", "internal-ip"):
            assert option not in out
    out = cloud.run("babysit", "--dry_run", "--", "sh", "--workdir=runs/x", "--env=second.env")
    for option in ("10.0.0.2", "valid-until-duration=6h", "service-account=x@a", "--internal-ips", "--internal-ip"):
        assert option in out


def test_settings_of_the_shell(cloud):
    """Variables that happen to be set in the shell are not settings."""
    (cloud.folder / "tpu.env").write_text("PROJECT=p\nZONE=z\nNAME=run\nTYPE=v6e-8\nBUCKET=b\n")
    shell = {"NFS": "10.0.0.2:/x", "SLICES": "7", "TIER": "reserved", "VALID_FOR": "6h", "DRY_RUN": "", "ADOPT": "1"}
    out = cloud.run("babysit", "--dry_run", *waiting(cloud), **shell)
    assert not [option for option in ("10.0.0.2", "node-count", "reserved", "valid-until") if option in out]


def test_settings_are_read_once(cloud):
    """A file that changes while the babysitter runs has no effect on it."""
    with babysitting(cloud) as babysitter:
        (cloud.folder / "tpu.env").write_text("PROJECT=q\nZONE=z\nNAME=other\nTYPE=v6e-8\nBUCKET=c\n")
        cloud.preempt()
        runs.wait_until(lambda: starts(cloud) == 2, babysitter)
        end(cloud)
        runs.finish(babysitter)
    assert all("--project=p" in call and "other" not in call for call in cloud.calls)


# Machines that restart, and code that changes


def test_a_machine_without_its_mounts(cloud):
    """A machine that has restarted has no mounts: the run resumes in the shared folder, never on the machine's own
    disk."""
    argv = waiting(cloud, "echo x >>runs/lives", workdir="runs/x")
    with babysitting(cloud, "--nfs=server:/shared", *argv) as babysitter:
        lives = cloud.folder / "exports/shared/lives"
        runs.wait_until(lambda: lives.exists() and lives.read_text() == "x\n", babysitter)
        cloud.reboot()
        runs.wait_until(lambda: lives.read_text() == "x\nx\n", babysitter)
        end(cloud)
        runs.finish(babysitter)
    assert (cloud.folder / "mounts.txt").read_text().count("server:/shared runs") == 2


@pytest.mark.parametrize("words", [["--nfs=server:/shared"], ["--nfs=server:/other"], ["--nfs="]])
def test_a_start_by_hand_without_mounts(cloud, words):
    """A start by hand mounts the folder of the settings, or refuses."""
    cloud.run("create")
    cloud.run("wait")
    cloud.run("setup", "--nfs=server:/shared")
    end(cloud)
    argv = ["--", "sh", "-c", "exit 0", "--workdir=bucket/x"]
    cloud.run("run", *words, *argv, code=0 if words[0].endswith("/shared") else 2)
    cloud.reboot()
    shutil.rmtree(cloud.folder / "exports")
    (cloud.folder / "exports").touch()  # the server does not answer
    out = cloud.run("run", "--nfs=server:/shared", *argv, code=2)
    assert "NFS=server:/shared could not be mounted" in out


def test_the_code_of_the_first_start(cloud, tmp_path):
    """The code of the first start is kept for a command while the clone changes; --new_code takes the current code."""
    cloud.code = runs.clone(tmp_path / "clone")
    changed, copied = "launch/tpu/example.env", cloud.folder / "workers/run.0/meshlm"
    with babysitting(cloud) as babysitter:
        (cloud.code / changed).write_text("changed")
        cloud.preempt()
        runs.wait_until(lambda: starts(cloud) == 2, babysitter)
        assert (copied / changed).read_text() != "changed"
        checkpoint(cloud, 1)
        rounds(cloud, 3, babysitter)
        babysitter.send_signal(signal.SIGINT)
        assert "code of " in runs.finish(babysitter, 42)
    for words, new in (([], False), (["--new_code"], True)):
        cloud.preempt()
        before = starts(cloud)
        with babysitting(cloud, *words, *waiting(cloud)) as babysitter:
            runs.wait_until(lambda before=before: starts(cloud) == before + 1, babysitter)
            rounds(cloud, 1, babysitter)  # an interrupted start counts as an attempt without a checkpoint
            assert ((copied / changed).read_text() == "changed") is new
            babysitter.send_signal(signal.SIGINT)
            out = runs.finish(babysitter, 42)
        assert ("from the first start of this command; the code here differs: --new_code uses it" in out) is not new
    end(cloud)
    cloud.run("babysit", *waiting(cloud))


def test_an_agent_with_another_key(cloud):
    """gcloud refuses such an agent for several workers in one call, so the code is copied to each separately."""
    cloud.script(workers=3)
    cloud.run("create")
    cloud.run("wait")
    assert "3 workers: python" in cloud.run("setup")
    assert sorted(word for call in cloud.calls if call[3] == "scp" for word in call if "--worker" in word) == [
        "--worker=0",
        "--worker=1",
        "--worker=2",
    ]


# Messages of gcloud


PASSING = [
    "gcloud crashed (ConnectionError): HTTPConnectionPool(host='x', port=9): Max retries exceeded with url: /",
    "gcloud crashed (ConnectionError): (Caused by NewConnectionError('x: Failed to establish a new connection: …'))",
    "gcloud crashed (ConnectionError): (Caused by NameResolutionError(\"x: Failed to resolve 'y' ([Errno -2] …)\"))",
    "gcloud crashed (ConnectionError): ('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))",
    'gcloud crashed (InvalidDataFromServerError): Error decoding response "{" as type QueuedResource: Expecting …',
    "(gcloud.x) There was a problem refreshing your current auth tokens: ('internal_failure: None', {})",
    "(gcloud.x) HttpError accessing <https://x>: response: <{'status': 502}>, content <<html>>",
    "(gcloud.x) HttpError accessing <https://x>: response: <>\nThis may be due to network connectivity issues. …",
    "(gcloud.x) RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' and limit 'Reads per minute'",
    '(gcloud.x) {\n  "code": 14,\n  "message": "later"\n}',
    "(gcloud.x) UNAVAILABLE: The service is currently unavailable.",
    "(gcloud.x) [Errno 101] Network is unreachable",
]
LOG_IN = "log in: gcloud auth login"
LASTING = {
    "There was a problem refreshing your current auth tokens: ('invalid_grant: Bad Request', {})": LOG_IN,
    "Reauthentication is needed. Please run `gcloud auth login` to reauthenticate.": LOG_IN,
    f"PERMISSION_DENIED: Permission 'tpu.x' denied. {ACCOUNT}": "the role TPU Admin in p",
    f"PERMISSION_DENIED: Permission denied on 'locations/u' (or it may not exist). {ACCOUNT}": "ZONE=us-east5-b right",
    '{\n  "code": 8,\n  "message": "There is no more capacity in the zone"\n}': "there is no capacity for v6e-16",
}


@pytest.mark.parametrize("said", PASSING)
def test_what_passes(cloud, said):
    """Temporary errors are retried. Their texts are those of gcloud 528, after its message that it waits."""
    cloud.script(faults=[{"match": "resources create", "stderr": f"{WAITS}ERROR: {said}", "times": 2}])
    out = cloud.run("create")
    assert out.count("gcloud: ERROR: ") == 2 and cloud.resources


@pytest.mark.parametrize("said", LASTING)
def test_what_lasts(cloud, said):
    cloud.script(faults=[{"match": "resources create", "stderr": f"{WAITS}ERROR: (gcloud.x) {said}"}])
    (line,) = cloud.run("create", code=2).splitlines()
    assert line.startswith("error: cannot create run: ERROR: (gcloud") and LASTING[said] in line
