"""A SkyPilot whose machines are folders: plays `sky jobs launch FILE` with real processes on this machine.

    $FAKE_SKY/calls.jsonl       the arguments of its calls
    $FAKE_SKY/hosts/N.I/        the home of host I of the N-th set of machines; its output is in N.I.log.txt
    $FAKE_SKY/states.txt        the states of the job so far, a line each
    $FAKE_SKY/preempt           a test creates it: the machines are taken away after this many seconds of notice

It treats scripts and exit codes as SkyPilot 0.14 does (see its log_lib.py, task_codegen.py, recovery_strategy.py): the
first host that fails ends the others, whose code is then 137; a code in recover_on_exit_codes brings new machines.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import yaml

STATE = pathlib.Path(os.environ["FAKE_SKY"])
HOST_TOOLS = pathlib.Path(__file__).parent / "host"
CANCELLED = 137
GRACE_S = 30


class Host:
    """A machine: a home folder in which one script runs at a time."""

    def __init__(self, name: str, environment: dict[str, str]):
        self.home = STATE / "hosts" / name
        self.home.mkdir(parents=True)
        (self.home / "sky_workdir").symlink_to(os.getcwd())
        self.environment = environment

    def start(self, commands: str, variables: dict[str, str]) -> None:
        exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        lines = ["#!/bin/bash", "cd ~/sky_workdir", *exports, f"unset RAY_RAYLET_PID; {commands}", "exit $?", ""]
        script = self.home / "script.sh"
        script.write_text("\n".join(lines))
        path = f"{HOST_TOOLS}:{self.environment['PATH']}"
        with self.home.with_name(f"{self.home.name}.log.txt").open("a") as log:
            self.process = subprocess.Popen(
                f"/bin/bash -i {script}",
                shell=True,
                env={**self.environment, "HOME": str(self.home), "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> None:
        """Ends the script as SkyPilot does: SIGTERM to each process, and later SIGKILL."""
        pids = tree(self.process.pid)
        kill(pids, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        kill(pids, signal.SIGKILL)
        self.process.wait()


def kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def take_away(hosts: list[Host], notice_s: float) -> None:
    """Removes the hosts as a cloud does: SIGTERM and a pause if there is notice, then SIGKILL."""
    pids = [pid for host in hosts for pid in tree(host.process.pid)]
    if notice_s:
        kill(pids, signal.SIGTERM)
        time.sleep(notice_s)
    kill(pids, signal.SIGKILL)
    for host in hosts:
        host.process.wait()
        shutil.rmtree(host.home)


def wait(hosts: list[Host]) -> list[int] | None:
    """Waits until all hosts have ended, or one has failed and the others were ended. Returns their exit codes, or None
    if the machines were taken away."""
    while True:
        if (STATE / "preempt").exists():
            take_away(hosts, float((STATE / "preempt").read_text()))
            (STATE / "preempt").unlink()
            return None
        codes = [host.process.poll() for host in hosts]
        if any(codes):
            for host, code in zip(hosts, codes, strict=True):
                if code is None:
                    host.end()
            return [CANCELLED if code is None else code for code in codes]
        if None not in codes:
            return [0] * len(codes)
        time.sleep(0.02)


def say(state: str) -> None:
    print(state, flush=True)
    with (STATE / "states.txt").open("a") as f:
        f.write(state + "\n")


def run(task: dict, attempt: int, count: int) -> list[int] | None:
    hosts = [Host(f"{attempt}.{i}", dict(os.environ)) for i in range(count)]
    for host in hosts:
        host.start(task["setup"], {**task["envs"], "SKYPILOT_NUM_NODES": str(count)})
    if any(codes := wait(hosts) or [0]):
        say(f"FAILED_SETUP {codes}")
        return codes
    for rank, host in enumerate(hosts):
        place = {"NODE_IPS": "\n".join(["localhost"] * count), "NODE_RANK": str(rank), "NUM_NODES": str(count)}
        host.start(task["run"], {**task["envs"], **{f"SKYPILOT_{name}": value for name, value in place.items()}})
    return wait(hosts)


def main(argv: list[str]) -> int:
    with (STATE / "calls.jsonl").open("a") as f:
        f.write(json.dumps(argv) + "\n")
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs=2, choices=["jobs", "launch"])
    parser.add_argument("file")
    parser.add_argument("-n", "--name")
    parser.add_argument("--infra")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--num-nodes", type=int)
    flags = parser.parse_args(argv)
    task = yaml.safe_load(pathlib.Path(flags.file).read_text())
    task["envs"] |= dict(pair.split("=", 1) for pair in flags.env)
    if missing := [name for name, value in task["envs"].items() if value is None]:
        sys.exit(f"ValueError: Environment variable {missing[0]!r} is None.")
    recovery = task["resources"]["job_recovery"]
    count = flags.num_nodes or task.get("num_nodes", 1)
    for attempt in range(20):
        codes = run(task, attempt, count)
        if codes is not None and not set(codes) & set(recovery["recover_on_exit_codes"]):
            say(f"{'FAILED' if any(codes) else 'SUCCEEDED'} {codes}")
            return int(any(codes))
        say(f"RECOVERING {'preempted' if codes is None else codes}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
