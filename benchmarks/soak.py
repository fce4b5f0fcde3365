"""Break a run of two processes again and again, then compare it with an undisturbed one.

  python -m benchmarks.soak --minutes=10 --seed=0

Faults come at random moments: SIGKILL, SIGSTOP and signals to one or all processes, kills in the middle of a save, a
full disk, flipped bits and missing files in the newest checkpoint, a second job on the same run. At each restart the
two devices belong to two processes or to one. What must hold: every attempt ends in time, with a code that allows a
restart; the losses of every step are those of the undisturbed run, bit for bit. Prints a table; exit code 1 if
something did not hold. The undisturbed run takes extra time: as long as the same number of steps.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from tests import runs

MINUTES = flags.DEFINE_float("minutes", 10.0, "How long to break things.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the faults and their times.")

HEARTBEAT_S = 10
LEAVE_S = 120  # limit for an attempt to end after its fault; long, because the machine may be busy
START_S = 240
STEPS = 1_000_000  # more than will be done
FIELDS = {
    "num_train_steps": STEPS,
    "optimizer.decay_steps": 10_000,
    "optimizer.warmup_steps": 20,
    "model.dropout": 0.1,
    "checkpoint.every_steps": 25,
    "checkpoint.keep_last": 3,
    "checkpoint.keep_best": 0,
    "eval.every_steps": 100,
    "eval.num_windows": 16,
    "mesh.data": 2,
    "watchdog.min_s": 10,
    "watchdog.slow_s": 180,
    "watchdog.stop_s": 30,
}
RESUMABLE = {42, -signal.SIGKILL, -signal.SIGABRT}  # codes that allow a restart


@dataclasses.dataclass
class Attempt:
    """The processes of one start of the run."""

    run: pathlib.Path
    processes: list[subprocess.Popen]
    outputs: list[pathlib.Path]

    def wait_for_rows(self, after: int) -> float:
        """Seconds until a step past `after` is in metrics.jsonl."""
        start = time.monotonic()
        while last_step(self.run) <= after:
            if time.monotonic() - start > START_S or any(p.poll() is not None for p in self.processes):
                raise Broken(f"no step past {after} within {time.monotonic() - start:.0f} s", self)
            time.sleep(0.02)
        return time.monotonic() - start

    def leave(self, *, within_s: float = LEAVE_S) -> float:
        """Seconds until all processes are gone; raises Broken if one stays, or if its exit code forbids a restart."""
        start = time.monotonic()
        for process in self.processes:
            try:
                process.wait(max(within_s - (time.monotonic() - start), 0.1))
            except subprocess.TimeoutExpired:
                raise Broken(f"process {process.pid} still there after {within_s:.0f} s", self) from None
        seconds = time.monotonic() - start
        if bad := [p.returncode for p in self.processes if p.returncode not in RESUMABLE]:
            raise Broken(f"exit codes {bad}", self)
        return seconds

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


class Broken(Exception):
    def __init__(self, reason: str, attempt: Attempt):
        tails = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in attempt.outputs)
        super().__init__(f"{reason}\n{tails}")


def command(run: pathlib.Path, data: pathlib.Path, *words: str, **changed: object) -> list[str]:
    fields = {name.replace(".", "__"): value for name, value in (FIELDS | changed).items()}
    return runs.command(run, data, *words, **fields)


def begin(run: pathlib.Path, data: pathlib.Path, scratch: pathlib.Path, number: int, size: int) -> Attempt:
    """Starts `size` processes, one or two, which share the two devices."""
    address = f"--coordinator_address=localhost:{runs.free_port()}"
    limits = (f"--heartbeat_timeout_s={HEARTBEAT_S}", "--start_timeout_s=60")
    processes, outputs = [], []
    for i in range(size):
        words = (address, f"--num_processes={size}", f"--process_id={i}", *limits) if size > 1 else limits
        outputs.append(scratch / f"attempt{number}.{i}.txt")
        with outputs[-1].open("w") as out:
            processes.append(
                subprocess.Popen(
                    command(run, data, *words),
                    cwd=runs.ROOT,
                    env=runs.environment(2 // size),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    return Attempt(run, processes, outputs)


def last_step(run: pathlib.Path) -> int:
    """The last finished step in metrics.jsonl; read from its end, because the file becomes long."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as f:
        f.seek(max(f.seek(0, os.SEEK_END) - 8192, 0))
        complete = [line for line in f.read().split(b"\n")[:-1] if line.startswith(b'{"step"')]
    return json.loads(complete[-1])["step"] if complete else 0


def committed(run: pathlib.Path) -> list[pathlib.Path]:
    steps = (p for p in (run / "checkpoints").glob("*") if p.name.isdigit())
    return sorted(steps, key=lambda p: int(p.name))


# Faults. Each ends a running attempt; faults of the disk are made after its end.


def kill_all(attempt: Attempt, dice: random.Random) -> None:
    for process in attempt.processes:
        process.send_signal(signal.SIGKILL)


def kill_one(attempt: Attempt, dice: random.Random) -> None:
    dice.choice(attempt.processes).send_signal(signal.SIGKILL)


def kill_in_a_save(attempt: Attempt, dice: random.Random) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not list((attempt.run / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
        time.sleep(0.001)
    kill_all(attempt, dice)


def ask_to_stop(attempt: Attempt, dice: random.Random) -> None:
    dice.choice(attempt.processes).send_signal(dice.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)))


def freeze_one(attempt: Attempt, dice: random.Random) -> None:
    """Freezes a process: the others must exit by themselves; then the frozen one continues, and must exit, too."""
    frozen = dice.choice(attempt.processes)
    frozen.send_signal(signal.SIGSTOP)
    for process in attempt.processes:
        if process is not frozen:
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                raise Broken("the others did not notice a frozen process", attempt) from None
    if len(attempt.processes) == 1:  # there are no others: the process just continues
        time.sleep(2)
    frozen.send_signal(signal.SIGCONT)
    if len(attempt.processes) == 1:
        kill_all(attempt, dice)


def full_disk(attempt: Attempt, dice: random.Random) -> None:
    """Makes the disk full for a while: saves fail, and the run must continue."""
    before = last_step(attempt.run)
    with runs.quota(*attempt.processes):
        time.sleep(dice.uniform(1, 3))
        if dead := [p.poll() for p in attempt.processes if p.poll() is not None]:
            raise Broken(f"a full disk ended the run: {dead}", attempt)
    attempt.wait_for_rows(before)
    kill_all(attempt, dice)


def second_job(attempt: Attempt, dice: random.Random) -> None:
    """Starts a second job on the same run: it must be refused, and the first must not be disturbed."""
    flag = "--config.data.path="
    data = pathlib.Path(next(w for w in attempt.processes[0].args if w.startswith(flag)).removeprefix(flag))
    other = subprocess.run(
        command(attempt.run, data), cwd=runs.ROOT, env=runs.environment(2), capture_output=True, timeout=START_S
    )
    if other.returncode != 2:
        raise Broken(f"a second job left with {other.returncode}: {other.stderr[-500:].decode()}", attempt)
    kill_all(attempt, dice)


def newest_of_two(attempt: Attempt, dice: random.Random) -> pathlib.Path:
    """Ends the attempt once it has two checkpoints; returns the newest. With only one, a restart would exit with 3."""
    deadline = time.monotonic() + START_S
    while len(committed(attempt.run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_all(attempt, dice)
    attempt.leave()
    return committed(attempt.run)[-1]


def flip_a_bit(attempt: Attempt, dice: random.Random) -> None:
    newest = newest_of_two(attempt, dice)
    path = dice.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.parent.name == "d"))
    raw = bytearray(path.read_bytes())
    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    path.write_bytes(raw)


def cut_a_file(attempt: Attempt, dice: random.Random) -> None:
    newest = newest_of_two(attempt, dice)
    path = dice.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
    if dice.random() < 0.5:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)


FAULTS: tuple[Callable[[Attempt, random.Random], None], ...] = (
    kill_all, kill_one, kill_in_a_save, ask_to_stop, freeze_one, full_disk, second_job, flip_a_bit, cut_a_file,
)  # fmt: skip


@dataclasses.dataclass
class Count:
    tried: int = 0
    survived: int = 0
    leave_s: float = 0.0
    recover_s: float = 0.0
    lost: int = 0


def soak(run: pathlib.Path, data: pathlib.Path, scratch: pathlib.Path, dice: random.Random) -> dict[str, Count]:
    counts: dict[str, Count] = collections.defaultdict(Count)
    deadline, number, reached, fault = time.monotonic() + 60 * MINUTES.value, 0, 0, ""
    deck: list[Callable[[Attempt, random.Random], None]] = []
    while True:
        attempt = begin(run, data, scratch, number, dice.choice((1, 2)))
        try:
            seconds = wait_for_resume(attempt, fault)
            if fault:
                count = counts[fault]
                count.survived += 1
                count.recover_s = max(count.recover_s, seconds)
                count.lost = max(count.lost, reached - resumed_after(attempt))
            attempt.wait_for_rows(resumed_after(attempt) + dice.randrange(1, 60))
            if time.monotonic() > deadline:
                ask_to_stop(attempt, dice)
                attempt.leave()
                return counts
            if not deck:  # every fault occurs once before one repeats
                deck = dice.sample(FAULTS, len(FAULTS))
            chosen = deck.pop()
            fault = chosen.__name__
            counts[fault].tried += 1
            time.sleep(dice.uniform(0, 1.5))
            chosen(attempt, dice)
            seconds = attempt.leave()
            counts[fault].leave_s = max(counts[fault].leave_s, seconds)
            reached, number = last_step(run), number + 1
            print(f"attempt {number}: {fault}, left at step {reached} in {seconds:.1f} s", flush=True)
        finally:
            attempt.kill()


def resumed_after(attempt: Attempt) -> int:
    text = attempt.outputs[0].read_text(errors="replace")
    _, found, rest = text.partition("Resuming after step ")
    return int(rest.split(".")[0]) if found else 0


def wait_for_resume(attempt: Attempt, fault: str) -> float:
    """Seconds until the output says that the run resumes or, without an earlier fault, that a new run begins."""
    start = time.monotonic()
    while True:
        text = attempt.outputs[0].read_text(errors="replace")
        if "Resuming after step" in text or (not fault and "untrained ln" in text):
            return time.monotonic() - start
        if time.monotonic() - start > START_S or any(p.poll() is not None for p in attempt.processes):
            raise Broken(f"after {fault or 'nothing'} the run did not start again", attempt)
        time.sleep(0.02)


def differing(run: pathlib.Path, reference: pathlib.Path) -> tuple[int, list[str]]:
    """The number of rows compared, and the rows that differ."""
    last = last_step(reference)
    ours, theirs = ([row for row in runs.losses(folder) if is_compared(row, last)] for folder in (run, reference))
    pairs = itertools.zip_longest(ours, theirs)
    return len(theirs), [f"{a} here, {b} undisturbed" for a, b in pairs if a != b]


def is_compared(row: tuple, last: int) -> bool:
    """All rows except the validation after the last step, which only the undisturbed run has done."""
    return row[-1] is None or row[0] < last


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # an exception, so that no process is left
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="soak"))
    data, dice, start = runs.dataset(scratch), random.Random(SEED.value), time.monotonic()
    run, reference = scratch / "run", scratch / "reference"
    counts = soak(run, data, scratch, dice)
    minutes, steps = (time.monotonic() - start) / 60, last_step(run)
    print(f"{minutes:.1f} minutes, {steps} steps; now the undisturbed run", flush=True)
    undisturbed = command(reference, data, **{"num_train_steps": steps, "checkpoint.every_steps": 1000})
    subprocess.run(undisturbed, cwd=runs.ROOT, env=runs.environment(2), check=True, stdout=subprocess.DEVNULL)
    rows, wrong = differing(run, reference)
    print("\n| fault | tried | survived | to leave, s | to start again, s | steps lost |\n|---|---|---|---|---|---|")
    for name, c in sorted(counts.items()):
        fields = f"{c.tried} | {c.survived} | {c.leave_s:.1f} | {c.recover_s:.1f} | {c.lost}"
        print(f"| {name.replace('_', ' ')} | {fields} |")
    tried, survived = sum(c.tried for c in counts.values()), sum(c.survived for c in counts.values())
    print(f"\n{tried} faults, {survived} survived; {rows} rows compared, {len(wrong)} differ")
    print("Seconds and steps are the largest of all attempts.")
    print(*wrong[:5], sep="\n")
    shutil.rmtree(scratch)
    return int(bool(wrong) or survived < tried)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
