"""What stops, crashes, saves and restores cost; docs/reliability.md has the table.

  python -m benchmarks.reliability [--kill_minutes=8] [--only=save,stall]

Cases that need two processes use two on loopback; the cost of a save is measured with one process and a model of 10 M
parameters, whose checkpoints have 120 MB. Seconds are those of this machine; ratios are taken within one run.
"""

import functools
import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

from tests import runs
from trainer.reliability import restarts

KILL_MINUTES = flags.DEFINE_float("kill_minutes", 8, "How long to train under a kill every two minutes.")
ONLY = flags.DEFINE_list("only", [], "Of signals, slow_host, save, stall, goodput; empty: all.")
KILL_EVERY_S = 120
HEARTBEAT_S = 10
SAVES = 15
LARGER = {
    "model.num_layers": 6,
    "model.embed_dim": 384,
    "model.num_heads": 6,
    "data.seq_len": 128,
    "global_batch_size": 4,
    "eval.every_steps": 0,
    "checkpoint.keep_best": 0,
}


def start(run: pathlib.Path, data: pathlib.Path, size: int, *words: str, **fields: object) -> list:
    """Starts the processes of a run; returns them once its first steps are done."""
    values = {"num_train_steps": 1_000_000, "checkpoint__every_steps": 50, "eval__every_steps": 0} | fields
    address = f"--coordinator_address=localhost:{runs.free_port()}"
    processes = []
    for i in range(size):
        own = (address, f"--num_processes={size}", f"--process_id={i}") if size > 1 else ()
        argv = runs.command(run, data, f"--heartbeat_timeout_s={HEARTBEAT_S}", *own, *words, **values)
        out = (run.parent / f"{run.name}.{i}.txt").open("w")
        processes.append(subprocess.Popen(argv, cwd=runs.ROOT, env=runs.environment(), stdout=out, stderr=out))
    while len(runs.rows(run)) < 20:
        assert all(p.poll() is None for p in processes), (run.parent / f"{run.name}.0.txt").read_text()[-3000:]
        time.sleep(0.05)
    return processes


def leaving(processes: list, act: Callable[[], None], who: list) -> float:
    """Calls `act`; returns the seconds until the processes `who` have ended, and ends all processes."""
    began = time.monotonic()
    act()
    for process in who:
        process.wait(300)
    seconds = time.monotonic() - began
    for process in processes:
        process.kill()
        process.wait()
    return seconds


def signals(folder: pathlib.Path, data: pathlib.Path) -> dict[str, str]:
    table = {}
    for size in (1, 2):
        processes = start(folder / f"term{size}", data, size)
        seconds = leaving(processes, functools.partial(processes[-1].send_signal, signal.SIGTERM), processes)
        assert all(p.returncode == 42 for p in processes)
        table[f"SIGTERM to exit, {size} process(es)"] = f"{seconds:.1f} s"
    for name, number in (("dead", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        processes = start(folder / name, data, 2, watchdog__min_s=10)
        seconds = leaving(processes, functools.partial(processes[1].send_signal, number), processes[:1])
        table[f"a {name} process: until the other has left (heartbeat and watchdog 10 s)"] = f"{seconds:.1f} s"
    return table


def slow_host(folder: pathlib.Path, data: pathlib.Path) -> dict[str, str]:
    """One of two processes is paused for half of the time, a tenth of a second at a time."""
    every = 50
    processes = start(folder / "slow", data, 2, watchdog__straggler_every_steps=every, checkpoint__every_steps=0)
    output, began, step = folder / "slow.0.txt", time.monotonic(), runs.rows(folder / "slow")[-1]["step"]
    while "slow host" not in (text := output.read_text()) and time.monotonic() - began < 120:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            processes[1].send_signal(number)
            time.sleep(0.1)
    seconds, steps = time.monotonic() - began, runs.rows(folder / "slow")[-1]["step"] - step
    for process in processes:
        process.kill()
        process.wait()
    line = next((line for line in text.splitlines() if "slow host" in line), "not noticed")
    what = f"a host at half speed: until it is named (compared every {every} steps)"
    return {what: f"{seconds:.1f} s, {steps} steps: {line}"}


def save_and_restore(folder: pathlib.Path) -> dict[str, str]:
    import jax

    from trainer import sharding
    from trainer.config import CheckpointConfig, from_dict
    from trainer.reliability.checkpoint import Checkpoints, checksums
    from trainer.state import Program

    model = {"num_layers": 6, "embed_dim": 384, "num_heads": 6, "vocab_size": 64, "max_seq_len": 128}
    config = from_dict({"model": model, "data": {"seq_len": 128}})
    program = Program(config, sharding.make_mesh(config, jax.devices()[:1]))
    state = jax.block_until_ready(program.init())
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    items = (state.params, state.opt_state)
    checksums(items)  # compiles
    checkpoints, times = Checkpoints(folder / "saves", CheckpointConfig(keep_last=1)), []
    for step in range(1, SAVES + 1):
        began = time.perf_counter()
        stall = checkpoints.save(step, state, {"samples": 0})
        assert checkpoints.wait()
        whole = time.perf_counter() - began
        time.sleep(0.5)  # lets deletions end; a save computes its checksums before it writes
        began = time.perf_counter()
        checksums(items)
        times.append((stall, whole, time.perf_counter() - began))
    restores = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(program, SAVES)[0])
        restores.append(time.perf_counter() - began)
    stall, whole, summed = (statistics.median(t) for t in zip(*times[1:], strict=True))
    return {
        f"a save of {size / 1e6:.0f} MB: until it is committed": f"{whole:.2f} s",
        "… of which the loop waits": f"{stall:.2f} s = {100 * stall / whole:.0f} %",
        "… checksums": f"{1e3 * summed:.0f} ms = {100 * summed / whole:.1f} %",
        "restoring it, with checksums": f"{statistics.median(restores):.2f} s",
    }


def stall(folder: pathlib.Path, data: pathlib.Path) -> dict[str, str]:
    """A save every minute for three minutes, of a model whose step takes a large part of a second."""
    run = folder / "stall"
    fields = {k.replace(".", "__"): v for k, v in LARGER.items()}
    processes = start(run, data, 1, **fields, checkpoint__every_steps=0, checkpoint__every_minutes=1.0)
    time.sleep(185)
    processes[0].kill()
    processes[0].wait()
    rows = [r for r in runs.rows(run) if "perf/step_time_s" in r][5:]
    stalls = [r["perf/checkpoint_stall_s"] for r in rows if r["perf/checkpoint_stall_s"] > 0]
    step_s = statistics.median(r["perf/step_time_s"] for r in rows)
    one = statistics.mean(stalls)
    return {
        f"stall of a save, step of {step_s:.2f} s": f"{one:.2f} s = {one / step_s:.2f} steps (of {len(stalls)} saves)",
        "… at a save a minute": f"{100 * one / 60:.2f} % of the time",
    }


def goodput(folder: pathlib.Path, data: pathlib.Path) -> dict[str, str]:
    """Kills the run every two minutes; the supervisor restarts it. The run saves every half minute."""
    run = folder / "kills"
    fields = {k.replace(".", "__"): v for k, v in LARGER.items()}
    values = {"num_train_steps": 1_000_000, "checkpoint__every_steps": 0, "checkpoint__every_minutes": 0.5} | fields
    argv = [sys.executable, "-m", "launch.supervise", "--", *runs.command(run, data, **values)]
    out = (folder / "kills.txt").open("w")
    supervisor = subprocess.Popen(argv, cwd=runs.ROOT, env=runs.environment(), stdout=out, stderr=out)
    deadline = time.monotonic() + 60 * KILL_MINUTES.value
    while time.monotonic() < deadline:
        time.sleep(min(KILL_EVERY_S, max(deadline - time.monotonic(), 1)))
        heartbeat = json.loads((run / "heartbeat.0.json").read_text())
        subprocess.run(["kill", "-KILL", str(heartbeat["pid"])], check=False)
    time.sleep(30)
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(120)
    found = restarts.read_attempts(run / "lives.jsonl")
    print(*restarts.table(found), sep="\n", file=sys.stderr)
    return {
        "goodput under a kill every two minutes": f"{100 * found[-1].goodput:.1f} % over {len(found)} attempts",
        "… steps lost at a kill, at most (saves every half minute)": f"{max(attempt.lost_steps for attempt in found)}",
    }


def main(argv: list[str]) -> None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="reliability"))
    data = runs.dataset(folder)
    parts: dict[str, Callable[[], dict[str, str]]] = {
        "signals": lambda: signals(folder, data),
        "slow_host": lambda: slow_host(folder, data),
        "save": lambda: save_and_restore(folder),
        "stall": lambda: stall(folder, data),
        "goodput": lambda: goodput(folder, data),
    }
    print("| what | measured |\n|---|---|")
    for name in ONLY.value or parts:
        for what, value in parts[name]().items():
            print(f"| {what} | {value} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
