"""The clusters that tests of launch/slurm submit jobs to: fakes of Slurm's commands, or a real cluster on this machine.

The real cluster has Debian's munged, slurmctld and two slurmd, with their files in a temporary folder. It needs root
and the packages slurmctld, slurmd, slurm-client and munge; the system's daemons need not run, and /etc and /var stay
unchanged. A node is a slurmd with its own port. The first node has this machine's name, because the other nodes connect
to it by name.
"""

import contextlib
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

from launch import supervise
from tests import runs

SCRIPT = "launch/slurm/train.sbatch"
FAKES = runs.ROOT / "tests/system/fakes/slurm"
JOB_S = 120  # the limit from submission to the end, for a job that does not train
NODES = (platform.node(), f"{platform.node()}-2")  # Slurm allocates nodes in the order of their names
KILL_WAIT_S = 10  # the time from a SIGTERM to the SIGKILL
START_S, END_S = 60, 60
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
PATH = f"{os.environ['PATH']}:/usr/sbin"
# cred_expire is also the time, in seconds, that a requeued job has to wait; 5 is the minimum.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/linear
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
ReturnToService=2
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> str:
    """The reason why a cluster cannot run here; empty if it can."""
    commands = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
    absent = [name for name in commands if not shutil.which(name, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}; apt-get install slurmctld slurmd slurm-client munge"
    try:
        socket.gethostbyname(NODES[0])
    except OSError:
        return f"the name of this machine, {NODES[0]}, has no address"
    return "" if os.geteuid() == 0 else "slurmd has to be root"


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Starts the cluster and yields the variables with which Slurm's commands find it; stops it and removes its
    files."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name:  # a short name, because paths of sockets are limited
        folder = pathlib.Path(name)
        environment = {"SLURM_CONF": str(configure(folder)), "PATH": PATH}
        with daemons(folder, environment) as start:
            munge = ("socket", "key-file", "pid-file", "log-file", "seed-file")
            start("munged", "--foreground", *(f"--{what}={folder}/munge/{what}" for what in munge))
            until((folder / "munge/socket").exists, START_S)
            start("slurmctld", "-D", "-i")
            for node in NODES:
                start("slurmd", "-D", "-N", node)
            states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
            until(lambda: ask(environment, *states).split() == ["idle"] * len(NODES), START_S)
            try:
                yield environment
            finally:
                # A running job has its own daemon, which would outlive slurmd.
                ask(environment, "scancel", f"--user={os.getuid()}")
                until(lambda: not ask(environment, "squeue", "--noheader"), END_S)


def configure(folder: pathlib.Path) -> pathlib.Path:
    """Creates the files that the daemons need; returns the path of slurm.conf."""
    folder.chmod(0o755)  # munged requires a folder that all users can enter
    for name in ("munge", "state", *NODES):
        (folder / name).mkdir()
    (folder / "munge/key-file").write_bytes(os.urandom(1024))
    (folder / "munge/key-file").chmod(0o400)
    config, ports = folder / "slurm.conf", [runs.free_port() for _ in range(3)]
    config.write_text(CONFIG.format(folder=folder, ports=ports, nodes=NODES, kill_wait=KILL_WAIT_S))
    return config


@contextlib.contextmanager
def daemons(folder: pathlib.Path, environment: dict[str, str]) -> Iterator[Callable[..., None]]:
    """Yields a function that starts a daemon, with its log in the folder; at the end, stops the daemons in reverse
    order."""
    started: list[subprocess.Popen] = []

    def start(*argv: str) -> None:
        with (folder / f"{len(started)}.{argv[0]}.log").open("w") as log:
            end = supervise.end_with_parent()  # in case this process dies before it stops them
            environ = os.environ | environment
            started.append(subprocess.Popen(argv, env=environ, stdout=log, stderr=log, cwd=folder, preexec_fn=end))

    try:
        yield start
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"{log.name}:\n{log.read_text()[-2000:]}")
        raise
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def ask(environment: dict[str, str], *argv: str) -> str:
    """What one of Slurm's commands prints."""
    answer = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, timeout=START_S)
    return answer.stdout.strip()


def until(true: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"did not happen within {within_s} s"
        time.sleep(0.2)


class Fake:
    """The fakes of Slurm's commands: sbatch is also the controller, and exits when the job ends."""

    kill_wait_s = 15

    def __init__(self, folder: pathlib.Path):
        self.folder, self.name = folder, "fake"
        (folder / "slurm").mkdir()
        self.environment = {"FAKE_SLURM": str(folder / "slurm"), "PATH": f"{FAKES}:{os.environ['PATH']}"}

    def end(self, process: subprocess.Popen, job: str) -> int:
        return runs.exit_code(process) if process.poll() is not None else -1

    def preempt(self, job: str) -> None:
        """Requeues the job: it gets SIGTERM without an earlier warning signal, and is started again."""
        self.do("scontrol", "requeue", job)

    def do(self, *argv: str) -> None:
        subprocess.run(argv, env=os.environ | self.environment, check=True, timeout=30)

    def calls(self, name: str) -> list[list[str]]:
        rows = map(json.loads, (self.folder / "slurm/calls.jsonl").read_text().splitlines())
        return [row for row in rows if row[0] == name]


class Real(Fake):
    kill_wait_s = KILL_WAIT_S

    def __init__(self, folder: pathlib.Path, environment: dict[str, str]):
        self.folder, self.name, self.environment = folder, "real", environment

    def end(self, process: subprocess.Popen, job: str) -> int:
        shown = ask(self.environment, "scontrol", "show", "job", job)
        state, code = (shown.partition(f"{what}=")[2].split()[0] for what in ("JobState", "ExitCode"))
        if state not in ENDS:  # not final; some such states are brief: SIGNALING, CONFIGURING, REQUEUED
            return -1
        code, number = map(int, code.split(":"))
        return code or (128 + number if number else 0)

    def preempt(self, job: str) -> None:
        """Runs a job in a partition of higher priority, which preempts this job."""
        argv = ["srun", "--partition=urgent", "--nodes=2", "sleep", "1"]
        subprocess.run(argv, env=os.environ | self.environment, check=True, timeout=60, capture_output=True)


class Job:
    def __init__(self, cluster: Fake, *options: str, command: list[str], devices: int = 1, **extra: str):
        self.cluster, self.out = cluster, cluster.folder / "job.out"
        argv = ["sbatch", "--parsable", f"--output={self.out}", *options, SCRIPT, *command]
        if cluster.name == "fake":
            argv.insert(1, "--wait")
        environment = runs.environment(devices, **cluster.environment, **extra)
        self.process = subprocess.Popen(argv, cwd=runs.ROOT, env=environment, text=True, stdout=subprocess.PIPE)
        self.id = self.process.stdout.readline().strip()

    def leaves(self, code: int, within_s: float = JOB_S) -> str:
        """Waits until the job ends; its exit code must be `code`. Returns its log."""
        self.until(lambda: self.cluster.end(self.process, self.id) >= 0, within_s)
        left = self.cluster.end(self.process, self.id)
        assert left == code, f"exit code {left}, expected {code}:\n{self.log()}"
        return self.log()

    def log(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def until(self, true, within_s: float = JOB_S) -> None:
        deadline = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < deadline, f"did not happen within {within_s} s:\n{self.log()}"
            time.sleep(0.1)

    def end(self) -> None:
        """Cancels the job if it has not ended, and waits for its end."""
        if self.cluster.end(self.process, self.id) < 0:
            self.cluster.do("scancel", self.id)
            self.until(lambda: self.cluster.end(self.process, self.id) >= 0, 60)
        self.process.wait(timeout=60)
