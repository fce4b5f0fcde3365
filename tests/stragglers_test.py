"""The report names a slow host but not noise, and the probe detects a process that gets half of its time."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from tests import runs
from trainer.reliability import stragglers


def values(**measures: list[float]) -> dict[int, tuple[str, dict[str, float]]]:
    """What processes on hosts w0, w1, … measured; `measures` has, for each measure, one value per process."""
    count = len(next(iter(measures.values())))
    return {i: (f"w{i}", {name: of[i] for name, of in measures.items()}) for i in range(count)}


TABLE = {
    # what: the processes' probe times, the ratio, the slow processes
    "one of four": ([3.2, 3.2, 9.92, 3.1], 3.1, [2]),
    "two processes: more than twice the other": ([2.0, 10.0], 5.0, [1]),
    "two processes: alike": ([2.0, 2.2], 1.1, []),
    "all the same": ([2.0, 2.0, 2.0], 1.0, []),
    "two slow ones": ([9.0, 2.0, 2.0, 2.0, 2.0, 8.0], 4.5, [0, 5]),
    "two slow ones, the same": ([8.0, 2.0, 2.0, 8.0], 4.0, [0, 3]),
    "half of them": ([8.0, 8.0, 2.0, 2.0], 4.0, [0, 1]),
    "just slow": ([2.0, 2.0, 3.0], 1.5, [2]),
    "below what is news": ([0.01, 0.4], 1.0, []),
    "many": ([8.0] * 5 + [2.0] * 20, 4.0, [0, 1, 2]),
}


@pytest.mark.parametrize("what", TABLE)
def test_slowest_against_the_median_of_the_others(what):
    probes, ratio, slow = TABLE[what]
    ratios, lines = stragglers.report(values(probe_ms=probes))
    assert ratios == {"perf/slowest_probe_ratio": pytest.approx(ratio)}
    assert [line.split(":")[1].strip() for line in lines] == [f"w{i} (process {i})" for i in slow]


def test_lines_read_well():
    _, lines = stragglers.report(values(probe_ms=[3.1, 3.2, 9.8], data_wait_s=[0.0, 12.34, 0.01], host_s=[5, 1, 4]))
    assert lines == [
        "slow host: w2 (process 2): probe 9.8 ms, 3.1 x the median of the others, 3.15 ms",
        "slow host: w1 (process 1): waiting for data 12.3 s, more than 12.3 x the median of the others, 0.005 s",
        "slow host: w0 (process 0): Python 5 s, 2.0 x the median of the others, 2.5 s",
    ]


def test_tiny_waits_are_no_news():
    ratios, lines = stragglers.report(values(data_wait_s=[1e-5, 1e-4, 0.0], host_s=[0.0, 0.0, 0.9]))
    assert ratios == {"perf/slowest_data_wait_ratio": 1.0, "perf/slowest_host_ratio": 1.0} and lines == []


def test_the_threshold_is_the_callers():
    assert len(stragglers.report(values(probe_ms=[2.0, 2.6]), threshold=1.2)[1]) == 1
    assert stragglers.report(values(probe_ms=[2.0, 2.6]), threshold=1.4)[1] == []


def test_nothing_to_compare_with():
    assert stragglers.report({}) == ({}, [])
    assert stragglers.report(values(probe_ms=[100.0], data_wait_s=[50.0])) == ({}, [])
    some = {0: ("a", {"probe_ms": 1.0}), 4: ("b", {"probe_ms": 9.0, "host_s": 50.0}), 5: ("c", {"other": 1.0})}
    ratios, lines = stragglers.report(some)
    assert ratios == {"perf/slowest_probe_ratio": 9.0}
    assert [line.split(":")[1] for line in lines] == [" b (process 4)"]


# The probe


def test_the_probe_runs_under_the_mesh_of_a_run_and_compiles_once():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        first = stragglers.measure_probe()
        compiled = stragglers._products(128, 64, jax.numpy.float32)
        count = compiled._cache_size()
        again = stragglers.measure_probe()
        assert jax.sharding.get_mesh() == mesh
    assert compiled._cache_size() == count == 8  # one for each device
    assert first > 0 and again > 0


# The probe takes ten times as long as usual, so that it spans several turns of throttled() on a busy machine.
SCRIPT = """
import sys
from trainer.reliability import stragglers
made = stragglers._products
stragglers._products = lambda size, products, dtype: made(size, 10 * products, dtype)
stragglers.measure_probe()
print("ready", flush=True)
for line in sys.stdin:
    print(stragglers.measure_probe(), flush=True)
"""


@contextlib.contextmanager
def throttled(process: subprocess.Popen):
    """Lets the process run for half of the time."""
    done = threading.Event()

    def throttle():
        while not done.is_set():
            for number in (signal.SIGSTOP, signal.SIGCONT):
                process.send_signal(number)
                time.sleep(0.01)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_the_probe_sees_a_throttled_process():
    argv = [sys.executable, "-c", SCRIPT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=runs.ROOT, env=runs.environment(), text=True, **pipes) as process:

        def probe_ms() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        try:
            assert process.stdout.readline() == "ready\n"
            free, slow = [], []
            # Both are measured in turns, and the best are compared: other work may slow down some of either.
            while len(free) < 5 or (len(free) < 40 and min(slow) < 1.2 * min(free)):
                free.append(probe_ms())
                with throttled(process):
                    slow.append(probe_ms())
            assert min(slow) > 1.2 * min(free), (free, slow)
        finally:
            process.kill()
