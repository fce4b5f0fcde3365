"""Which host is slow. In a synchronous run all have the same step time, so this compares what each can measure alone.

That is: the time in which a process held up the step itself, and a probe, a computation that no other device shares.
How the values get from process to process is not known here.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

PROBES = 3  # the median of them counts
SHOWN = 3  # slow hosts named for each measure

# Measure: what it is called, its unit, and the value below which differences are no news.
MEASURES = {
    "probe_ms": ("probe", "ms", 0.5),
    "data_wait_s": ("waiting for data", "s", 1.0),  # seconds since the last report
    "host_s": ("Python", "s", 1.0),
}


def measure_probe() -> float:
    """Milliseconds that some matrix products take on this process's slowest device; the devices run one by one.

    Waits for what they have to do before. A CPU is shared with all that runs on the machine, this program's own threads
    included, and a value of it twice as high as the last means nothing. The first call compiles: a second or so.
    """
    return max(_probe_ms(device) for device in jax.local_devices())


def _probe_ms(device: jax.Device) -> float:
    # A mesh of its own: under that of the run, which the trainer sets for good, a single device is refused.
    with jax.set_mesh(Mesh(np.array([device]), ("probe",))):
        size, products = (128, 64) if device.platform == "cpu" else (2048, 64)
        run = _products(size, products, jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
        run(1 / size).block_until_ready()  # compiles at first; later waits until the device is free
        times = []
        for _ in range(PROBES):
            start = time.perf_counter()
            run(1 / size).block_until_ready()
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@functools.cache
def _products(size: int, products: int, dtype: jnp.dtype) -> Callable[[float], Array]:
    """A matrix of 1 / size is its own square: the values stay as they are, and no product can be left out.

    It is made on the device, which holds three of them, 24 MiB at most, for as long as the probe runs.
    """

    def probe(value: Array) -> Array:
        start = jnp.full((size, size), value, dtype)
        return jax.lax.fori_loop(0, products, lambda _, x: x @ x, start)[0, 0]

    return jax.jit(probe)


def report(
    values: Mapping[int, tuple[str, Mapping[str, float]]], threshold: float = 1.5
) -> tuple[dict[str, float], list[str]]:
    """The metrics perf/slowest_<measure>_ratio, and a line for each host that is slow; of one process nothing.

    A process is compared with the median of the others. With itself among them the ratio of two processes could never
    reach 2, however slow one is. Values below a measure's floor count as the floor, so that 0.1 ms of waiting for data
    is not ten times 0.01 ms.

    Args:
      values: by process, the name of its host and its MEASURES; one that a process lacks is left out.
      threshold: from which ratio on a host is slow.
    """
    ratios: dict[str, float] = {}
    lines: list[str] = []
    for measure, (label, unit, floor) in MEASURES.items():
        of = {process: own[measure] for process, (_, own) in values.items() if measure in own}
        if len(of) < 2:
            continue
        slowest = sorted(of, key=of.__getitem__, reverse=True)[:SHOWN]
        for process in slowest:
            median = statistics.median(value for other, value in of.items() if other != process)
            ratio = max(of[process], floor) / max(median, floor)
            if process == slowest[0]:
                ratios[f"perf/slowest_{measure.rpartition('_')[0]}_ratio"] = ratio
            if ratio >= threshold:
                more = "more than " if median < floor else ""
                lines.append(
                    f"slow host: {values[process][0]} (process {process}): {label} {of[process]:.3g} {unit}, "
                    f"{more}{ratio:.1f} x the median of the others, {median:.3g} {unit}"
                )
    return ratios, lines
