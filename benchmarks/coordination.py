"""What coordination of many processes costs: python -m benchmarks.coordination [--most=4096] [--requests=10000]

Processes are threads with an in-memory store that counts calls, bytes and keys: they run the code that training uses,
without the network. Then two real processes make requests through JAX's service on this machine.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from tests.memory_store import Gang
from trainer.reliability.coordination import SAVE, Processes

MOST = flags.DEFINE_integer("most", 4096, "Most processes.")
REQUESTS = flags.DEFINE_integer("requests", 10_000, "Requests of two real processes.")
CHILD = flags.DEFINE_string("child", None, "Of this program's own: PORT of the service of the two.")
FIELDS = {f"config.section.field{i}": "a value of some length" for i in range(120)}

EVENTS: dict[str, Callable[[Processes], Any]] = {
    "all train the same (check_same)": lambda p: p.check_same("setting", FIELDS),
    "one differs (check_same)": lambda p: p.check_same("setting", FIELDS | {"seed": p.index // (p.size - 1)}),
    "one error for all (run_on_all)": lambda p: p.run_on_all("data", lambda: None),
    "process 0 chooses (broadcast_from_0)": lambda p: p.broadcast_from_0("newest checkpoint", lambda: 1000),
    "before and after a save (all_agree)": lambda p: p.all_agree("saved", True),
    "one reports a problem (distinct_values)": lambda p: p.distinct_values(
        "read", "a file is cut" if p.index == 1 else ""
    ),
    "all report different problems (distinct_values)": lambda p: p.distinct_values(
        "read", f"host {p.index:04}: a file is cut"
    ),
    "speeds of all hosts (gather)": lambda p: p.gather("speeds", '{"probe_ms": 1.234, "data_wait_s": 0.01}'),
    "a save or stop is asked for (request)": lambda p: ask(p),
}


def ask(process: Processes) -> None:
    if process.index == 0:
        process.request(SAVE)
    while SAVE not in process.tick():
        time.sleep(process.size / 4000)  # thousands of threads take turns


def simulate(size: int) -> dict[str, tuple[int, int, int]]:
    """For each event the calls, bytes and most keys at a time, counted from the start of the event."""
    gang, costs = Gang(size, timeout_s=600), {}
    gang.all(lambda p: p.listen_for_requests(lambda: None, lambda: None, lambda error: None))
    store = gang.store
    for name, event in EVENTS.items():
        calls = store.calls
        sent = store.sent
        store.most_keys = 0
        gang.all(event)
        costs[name] = (store.calls - calls, store.sent - sent, store.most_keys)
    gang.close()
    return costs


def table() -> None:
    sizes = sorted({min(size, MOST.value) for size in (16, 256, MOST.value)})
    costs = {size: simulate(size) for size in sizes}
    print("| event | " + " | ".join(f"{size:,} processes: calls, bytes, keys" for size in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for name in EVENTS:
        shown = (f"{calls:,}, {sent:,}, {keys:,}" for calls, sent, keys in (costs[size][name] for size in sizes))
        print(f"| {name} | " + " | ".join(shown) + " |")


def requests_of_two() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    argv = [sys.executable, "-m", "benchmarks.coordination", f"--child={port}", f"--requests={REQUESTS.value}"]
    ends = socket.socketpair()
    pair = [
        subprocess.Popen([*argv, str(i), str(end.fileno())], stdout=subprocess.PIPE, text=True, pass_fds=[end.fileno()])
        for i, end in enumerate(ends)
    ]
    for end in ends:
        end.close()
    try:
        print(pair[0].communicate(timeout=60 + REQUESTS.value)[0], end="")  # usually it takes a hundredth
    finally:
        for process in pair:
            process.kill()
            process.wait()


def child(port: str, index: int, peer: socket.socket) -> None:
    """Process 0 asks for a save, trains until both have agreed on the step, and asks again.

    In a step each process sends the other a byte, so that, as with gradients, neither gets a step ahead.
    """
    import jax
    from jax._src import distributed

    jax.distributed.initialize(f"localhost:{port}", 2, index)
    processes = Processes(600)
    processes.listen_for_requests(lambda: None, lambda: None, lambda error: None)

    def step(goes_on: bool = True) -> tuple[bool, bool]:
        peer.sendall(b"+" if goes_on else b".")
        theirs = peer.recv(1) == b"+"
        return SAVE in processes.tick(), theirs

    if index == 0:
        times = [agreed(processes, step) for _ in range(REQUESTS.value)]
        step(goes_on=False)
        share = max(len(times) // 100, 1)
        parts = {"first_ms": times[:share], "last_ms": times[-share:], "median_ms": times, "longest_ms": [max(times)]}
        keys = len(distributed.global_state.client.key_value_dir_get("meshlm/"))
        shown = {name: round(1e3 * sorted(part)[len(part) // 2], 2) for name, part in parts.items()}
        print(json.dumps({"requests": len(times)} | shown | {"keys_left": keys}), flush=True)
    else:
        while step()[1]:
            pass
    processes.exit_barrier()
    os._exit(0)


def agreed(processes: Processes, step: Callable[[], tuple[bool, bool]]) -> float:
    """Seconds from a request to the step after which both processes save."""
    started = time.perf_counter()
    processes.request(SAVE)
    while not step()[0]:
        pass
    return time.perf_counter() - started


def main(argv: list[str]) -> None:
    if CHILD.value is not None:
        child(CHILD.value, int(argv[1]), socket.socket(fileno=int(argv[2])))
    table()
    requests_of_two()


if __name__ == "__main__":
    app.run(main)
