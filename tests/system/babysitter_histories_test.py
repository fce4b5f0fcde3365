"""Random histories of launch/tpu/babysit.sh and of a person who uses other scripts, in a model of the cloud
(babysitter_cloud.py).

Whatever happens, none of our resources keeps billing without being named, no resource of others is changed, and a
healthy run is neither started a second time nor stopped. A history that fails is printed in full, and its seed replays
it:

  python -m tests.system.babysitter_histories_test --seed=17       or many: --histories=2000 [--first=0] [--at_once=2]
"""

import argparse
import concurrent.futures
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from tests import runs
from tests.system.babysitter_cloud import COMMAND, Server, World

SETTINGS = "PROJECT=run\nZONE=us-east5-b\nNAME=run\nTYPE=v6e-16\nTIER=spot\nBUCKET=b\nSLICES={}\n"
LIMIT_S = 60
REFUSED_BESIDE = ("babysit", "delete", "run", "setup", "stop")
NAMED = re.compile(r"\brun\b.*(cost|COST|billing)|billing.*\brun\b|run .*was not made from here", re.DOTALL)
BROKEN = re.compile(r"\.sh: line \d+: .*(unbound variable|not found|syntax error|bad |ambiguous|No such file)")


class History:
    """A random history of one person with one folder, in one world."""

    def __init__(self, seed: int, code: pathlib.Path, server: Server, folder: pathlib.Path):
        self.name, self.dice = f"history {seed}", random.Random(seed)
        self.code, self.server, self.folder = code, server, folder
        self.world = server.worlds[self.name] = World(self.name)
        (folder / "tpu.env").write_text(SETTINGS.format(self.world.slices))
        (folder / "tmp").mkdir()
        self.beside: list[subprocess.Popen] = []
        self.flags = ["--poll_s=0"]
        self.keeps = self.dice.random() < 0.1
        self.lost_state, self.last = False, None
        self.clock = self.dice.choice(["", "", "", "1000000", "-1000000"])  # seconds of a jump of the clock

    def start(self, script: str, *words: str) -> subprocess.Popen:
        self.world.note(f"the person: {script} {' '.join(words)}")
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "BASH_ENV": str(runs.ROOT / "tests/system/fakes/histories.sh"),
            "HOME": str(self.folder),
            "USER": "me",
            "XDG_STATE_HOME": str(self.folder / "state"),
            "TMPDIR": str(self.folder / "tmp"),
            "MESHLM_RETRY_S": "0",
            "MESHLM_LOST_S": str(self.dice.choice([0, 0, 0, 1])),
            "HISTORY_CLOCK": self.clock if script == "babysit" else "",
            "HISTORY": self.name,
            "HISTORY_ROLE": script,
            "HISTORY_PORT": str(self.server.port),
        }
        with (self.folder / f"{script}.txt").open("ab") as out:
            start = out.tell()
            process = subprocess.Popen(
                [self.code / f"launch/tpu/{script}.sh", *words],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.said_from = start
        return process

    def said(self, process: subprocess.Popen, script: str) -> str:
        return (self.folder / f"{script}.txt").read_bytes()[process.said_from :].decode(errors="replace")

    # Actions of the person

    def tell(self) -> None:
        """Plays the whole history."""
        self.before()
        extra = ["--keep"] if self.keeps else []
        if self.dice.random() < 0.1:
            extra.append("--max_hours=0.0001")
            self.world.asked_to_stop = True
        elif self.clock:
            extra.append("--max_hours=1")
        command = list(COMMAND)
        for _ in range(self.dice.choice([0, 0, 1, 2])):
            self.world.adopts = "--adopt" in extra
            babysitter = self.start("babysit", *self.flags, *extra, "--", *command)
            if self.interrupt(babysitter):
                return self.leave(babysitter)
            if self.dice.random() < 0.1:
                self.lose_state()
                if self.dice.random() < 0.5:
                    extra.append("--adopt")
            if self.dice.random() < 0.1:
                command = [*COMMAND, "--config.seed=2"]
        self.world.adopts = "--adopt" in extra
        babysitter = self.start("babysit", *self.flags, *extra, "--", *command)
        self.live_beside(babysitter, self.dice.randrange(0, 3))
        self.wait(babysitter)
        self.leave(babysitter)

    def before(self) -> None:
        """May create a resource before the history begins: `run`, ours or of others, or one of others with another
        name."""
        world, what = self.world, self.dice.random()
        if what < 0.1:
            with world.lock:
                label = self.dice.choice(["", "you-there-0123456789ab"])
                world.resources["run"] = world.make("run", "others", world.kind, world.slices, label, "ACTIVE")
                world.note("others: create run")
        elif what < 0.2:
            self.wait(self.start("create", *self.dice.choice([[], [], ["--type=v6e-8"]])))
        elif what < 0.3:
            with world.lock:
                world.resources["other"] = world.make("other", "others", world.kind, 1, "", "ACTIVE")

    def live_beside(self, babysitter: subprocess.Popen, times: int) -> None:
        for _ in range(times):
            self.wait_for_tick(babysitter, self.world.tick + self.dice.randrange(1, 8))
            if babysitter.poll() is not None:
                return
            what = self.dice.choice(
                ["status", "logs", "ssh"] * 3 + ["stop", "delete", "setup", "run", "babysit", "create"]
            )
            if what in REFUSED_BESIDE:
                self.refused_beside(babysitter, what)
            else:
                # Others must not take the name between create.sh's check and its act: no script can prevent that.
                self.world.others_rate *= what != "create"
                self.beside.append(self.start(what, *(["--", "true"] if what == "ssh" else [])))

    def refused_beside(self, babysitter: subprocess.Popen, script: str) -> None:
        words = self.flags if script == "babysit" else []
        other = self.start(script, *words, *(["--", *COMMAND] if script in ("babysit", "run") else []))
        self.wait(other)
        if babysitter.poll() is None and other.returncode != 2:
            self.world.violation(f"{script} beside a babysitter ended with {other.returncode}")
        if script == "babysit" and other.returncode != 2:  # the first had just ended, so the second was admitted
            self.last = other

    def interrupt(self, babysitter: subprocess.Popen) -> bool:
        """Signals the babysitter at some time. Returns True if the babysitter ended without asking to be started
        again."""
        self.live_beside(babysitter, self.dice.randrange(0, 2))
        self.wait_for_tick(babysitter, self.world.tick + self.dice.randrange(0, 12))
        time.sleep(self.dice.choice([0, 0, 0.02, 0.1]))
        if babysitter.poll() is not None:
            return True
        kill = self.dice.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        self.world.note(f"the person: {kill.name}")
        if kill == signal.SIGKILL and self.dice.random() < 0.3:
            os.kill(babysitter.pid, kill)  # its child processes keep running for a while
        else:
            os.killpg(babysitter.pid, kill)  # a terminal, or a shutdown of the machine, signals the group
        self.wait(babysitter)
        if babysitter.returncode == 42:
            self.check_named(babysitter)
        return babysitter.returncode >= 0 and babysitter.returncode != 42  # negative: killed before its traps were set

    def lose_state(self) -> None:
        self.world.note("the person: rm -rf state")
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        self.lost_state = True

    def wait_for_tick(self, babysitter: subprocess.Popen, tick: int) -> None:
        end = time.monotonic() + 5
        with self.world.lock:
            while self.world.tick < tick and babysitter.poll() is None and time.monotonic() < end:
                self.world.lock.wait(0.05)

    def wait(self, process: subprocess.Popen) -> None:
        """Waits until a process ends, and kills it at the first violation."""
        end = time.monotonic() + LIMIT_S
        while process.poll() is None and not self.world.violations:
            if time.monotonic() > end:
                self.world.violation(f"no end within {LIMIT_S} s: {process.args[0]}")
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.world.note(f"{pathlib.Path(process.args[0]).stem} ended with {process.returncode}")

    # Invariants

    def leave(self, babysitter: subprocess.Popen) -> None:
        for process in self.beside:
            self.wait(process)
        babysitter = self.last or babysitter
        code, world = babysitter.returncode, self.world
        if code not in {0, 2, 42} | world.run_codes:
            world.violation(f"the babysitter ended with {code}")
        ours = [found for found in world.resources.values() if found.by == "us" and found.bills]
        created_beside = "create" in {process.args[0].stem for process in self.beside}
        if ours and code == 0 and not self.keeps and not created_beside:
            world.violation("0, and ours keeps billing")
        if "after 1 hours" in self.said(babysitter, "babysit"):
            world.violation("the clock was set, and counted as hours")
        self.check_named(babysitter)
        for path in self.folder.glob("*.txt"):
            if BROKEN.search(path.read_text(errors="replace")) and not self.lost_state:
                world.violation(f"a broken script: {path.stem}")
        if not self.lost_state:
            self.clean_up()

    def check_named(self, babysitter: subprocess.Popen) -> None:
        if self.last not in (None, babysitter):
            return
        last = "\n".join(self.said(babysitter, "babysit").splitlines()[-6:])
        world = self.world
        ours = [found for found in world.resources.values() if found.by == "us" and found.bills]
        ours += [found for _, found in world.coming]
        if ours and not NAMED.search(last) and not {"create"} & {process.args[0].stem for process in self.beside}:
            world.violation("ours bills, unnamed")

    def clean_up(self) -> None:
        """Runs delete.sh in a cloud without further failures."""
        self.world.asked_to_stop, self.world.calm, self.world.stubborn = True, -1, 0
        for _ in range(3):  # a deletion that has begun takes several ticks
            process = self.start("delete")
            self.wait(process)
            with self.world.lock:
                for _ in range(4):
                    self.world.go_on()
        if [found for found in self.world.resources.values() if found.by == "us" and found.bills]:
            self.world.violation("delete.sh leaves ours")

    def end(self) -> None:
        for process in self.beside:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def show(self) -> str:
        out = [f"== {self.name}: {'; '.join(self.world.violations)}", *self.world.log]
        for path in sorted(self.folder.glob("*.txt")):
            out += [f"-- what {path.stem} said", path.read_text(errors="replace")]
        return "\n".join(out)


def tell(seed: int, code: pathlib.Path, server: Server) -> str:
    """Plays one history. Returns its full text if an invariant is violated, else an empty string."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"history-{seed}-"))
    history = History(seed, code, server, folder)
    try:
        history.tell()
        return history.show() if history.world.violations else ""
    finally:
        history.end()
        del server.worlds[history.name]
        shutil.rmtree(folder, ignore_errors=True)


def tell_all(seeds, code: pathlib.Path, at_once: int = 2, each=lambda seed, found: None) -> dict[int, str]:
    server, found = Server(), {}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        told = {pool.submit(tell, seed, code, server): seed for seed in seeds}
        for future in concurrent.futures.as_completed(told):
            each(told[future], future.result())
            if future.result():
                found[told[future]] = future.result()
    server.shutdown()
    server.server_close()
    return found


@pytest.mark.slow
def test_histories(tmp_path):
    found = tell_all(range(50), runs.clone(tmp_path / "clone"))
    assert not found, "\n\n".join(found.values())


# Deliberate mistakes, each of which changes one place of a script; the key is the violation that reveals it.
MISTAKES = {
    "a machine of others": ("cloud.sh", "is_ours() {\n", "is_ours() {\n  return 0\n"),
    "ours keeps billing": ("babysit.sh", "! tpu delete || return 0", "tpu delete || true; return 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sign", MISTAKES)
def test_mistakes_are_noticed(tmp_path, sign):
    script, right, wrong = MISTAKES[sign]
    code = runs.clone(tmp_path / "clone")
    text = (code / "launch/tpu" / script).read_text()
    assert text.count(right) == 1
    (code / "launch/tpu" / script).write_text(text.replace(right, wrong))
    found = (tell_all(range(first, first + 4), code) for first in range(0, 60, 4))
    assert any(sign in history.splitlines()[0] for few in found for history in few.values())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--at_once", type=int, default=2)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the histories that fail")
    parser.add_argument("--code", default="", help="a clone with launch/; else that of here")
    flags = parser.parse_args()
    seeds = [flags.seed] if flags.seed is not None else range(flags.first, flags.first + flags.histories)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(flags.code) if flags.code else runs.clone(pathlib.Path(folder) / "clone")
        count = argparse.Namespace(done=0)

        def each(seed: int, found: str) -> None:
            count.done += 1
            if found:
                print(found if flags.seed is not None else found.splitlines()[0], flush=True)
                if flags.keep:
                    (flags.keep / f"{seed}.txt").write_text(found)
            if count.done % 100 == 0:
                print(f"{count.done} told", flush=True)

        found = tell_all(seeds, code, flags.at_once, each)
    print(f"{len(seeds)} histories, {len(found)} in which something does not hold, {time.monotonic() - began:.0f} s")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
