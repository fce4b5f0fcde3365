"""A fake cloud in a folder (tests/system/fakes/cloud/gcloud), and the scripts of launch/tpu/ that talk to it."""

import contextlib
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

from tests import runs

FAKES = runs.ROOT / "tests/system/fakes"
SETTINGS = "PROJECT=p\nZONE=us-east5-b\nNAME=run\nTYPE=v6e-16\nTIER=spot\nBUCKET=gs://b   # of the run\n"


class Cloud:
    """The fake cloud, and the scripts that talk to it."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.code = folder, runs.ROOT
        (folder / "buckets/b").mkdir(parents=True)
        (folder / "tpu.env").write_text(SETTINGS)
        self.script()
        self.environment = {
            **runs.environment(),
            "PATH": f"{FAKES / 'cloud'}:/usr/local/bin:/usr/bin:/bin",
            "FAKE_CLOUD": str(folder),
            "FAKE_PYTHON": sys.executable,
            "FAKE_JOB": str(random.randrange(10**6)),  # the coordinator's port depends on it
            "XDG_STATE_HOME": str(folder / "state"),
            "MESHLM_RETRY_S": "0",
        }

    def script(self, **what) -> None:
        with self.locked():
            (self.folder / "script.json").write_text(json.dumps(what))

    def has_faults(self) -> bool:
        """Whether any faults have not occurred yet."""
        with self.locked():
            script = json.loads((self.folder / "script.json").read_text())
        return any(fault.get("times", 1) for fault in script["faults"])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the fake gcloud from reading and writing its files in the meantime."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def command(self, name: str, *words: str) -> list[str]:
        return [str(self.code / f"launch/tpu/{name}.sh"), *words]

    def start(self, name: str, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(name, *words),
            cwd=self.folder,
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, name: str, *words: str, code: int = 0, **environment: str) -> str:
        process = self.start(name, *words, **environment)
        with runs.ending(process):
            return runs.finish(process, code, within_s=120)

    def owner(self) -> str:
        """The owner, whose name must be the label of the resources."""
        return (self.folder / "state/meshlm/tpu/p.us-east5-b.run/owner").read_text()

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        with self.locked():
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def done(self, *words: str) -> int:
        """The number of calls that contain all these words."""
        return sum(all(word in " ".join(call) for word in words) for call in self.calls)

    def put(self, name: str, **what) -> None:
        """Adds a queued resource that others have made; it replaces a resource with the same name."""
        with self.locked():
            cloud = self.resources
            cloud[name] = {"place": "projects/p/locations/us-east5-b", **what}
            (self.folder / "cloud.json").write_text(json.dumps(cloud))

    def change(self, name: str, **what) -> None:
        """Changes fields of a resource in the cloud."""
        with self.locked():
            cloud = self.resources
            cloud[name] |= what
            (self.folder / "cloud.json").write_text(json.dumps(cloud))

    @property
    def resources(self) -> dict:
        path = self.folder / "cloud.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def preempt(self) -> None:
        """Takes the machines away: all their processes die, and their disks are gone."""
        with self.locked():
            cloud = self.resources
            for found in cloud.values():
                found |= {"state": "SUSPENDING", "next": ["SUSPENDED"]}
            (self.folder / "cloud.json").write_text(json.dumps(cloud))
        self.kill_workers()
        shutil.rmtree(self.folder / "workers", ignore_errors=True)

    def reboot(self) -> None:
        """Restarts the machines: no process runs, and nothing is mounted; the disks are unchanged."""
        self.kill_workers()
        for home in (self.folder / "workers").iterdir():
            for path in (home / "meshlm/bucket", home / "meshlm/runs"):
                if path.is_symlink():
                    path.unlink()
                    path.mkdir()

    def kill_workers(self) -> None:
        """Kills all processes whose HOME is that of a worker."""
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                ours = f"HOME={self.folder / 'workers'}/".encode() in path.read_bytes()
            except OSError:
                continue
            if ours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.parent.name), signal.SIGKILL)


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[Cloud]:
    made = Cloud(folder)
    yield made
    made.kill_workers()


# A fake Python for workers, without JAX and the supervisor, which take time to start.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"- ") echo "python 3 jax 0 devices 1 of 1" ;;
"-m launch.supervise")
  while [ "$1" != -- ]; do shift; done
  shift
  exec "$@"
  ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@contextlib.contextmanager
def light(folder: pathlib.Path) -> Iterator[Cloud]:
    """A cloud with one worker, which runs the fake Python above."""
    with running(folder) as made:
        made.script(workers=1)
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        made.environment["FAKE_PYTHON"] = str(python)
        yield made


def waiting(cloud: Cloud, *more: str, workdir: str = "bucket/runs/x") -> list[str]:
    """The babysitter's arguments for a command that waits for the file `done` and exits with the code in this file."""
    script = (
        f"{'; '.join([*more, ''])}until [ -s {cloud.folder}/done ]; do sleep 0.1; done; exit $(cat {cloud.folder}/done)"
    )
    return ["--poll_s=0.2", "--", "sh", "-c", script, f"--workdir={workdir}"]


def end(cloud: Cloud, code: int = 0) -> None:
    (cloud.folder / "done").write_text(str(code))


@contextlib.contextmanager
def babysitting(cloud: Cloud, *argv: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A babysitter whose run has started."""
    with runs.ending(cloud.start("babysit", *(argv or waiting(cloud)), **environment)) as (babysitter,):
        runs.wait_until(lambda: (cloud.folder / "workers/run.0/meshlm-run/group").exists(), babysitter)
        yield babysitter


def rounds(cloud: Cloud, count: int, babysitter: subprocess.Popen) -> None:
    """Waits until the babysitter has described the resource `count` more times."""
    before = cloud.done("queued-resources describe")
    runs.wait_until(lambda: cloud.done("queued-resources describe") >= before + count, babysitter)


def starts(cloud: Cloud) -> int:
    return cloud.done("tpu-vm ssh", "worker.sh start")


def checkpoint(cloud: Cloud, step: int) -> None:
    """Adds a checkpoint, i.e. progress: the babysitter counts attempts without a new checkpoint."""
    folder = cloud.folder / f"buckets/b/runs/x/checkpoints/{step}"
    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").touch()
