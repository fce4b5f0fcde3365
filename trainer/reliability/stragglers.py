"""Which host is slow. In a synchronous run all processes have the same step time, so each measures only itself.

It measures the time for which it has delayed the steps itself, and a probe, which is a computation on a single device.
This module does not send the values; trainer/loop.py gathers them.
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

PROBES = 3  # number of measurements, of which the median counts
SHOWN = 3  # the most slow hosts to name for each measure

# For each measure its name in messages, its unit, and a floor below which differences do not matter.
MEASURES = {
    "probe_ms": ("probe", "ms", 0.5),
    "data_wait_s": ("waiting for data", "s", 1.0),  # seconds since the last report
    "host_s": ("Python", "s", 1.0),
}


def measure_probe() -> float:
    """Milliseconds that some matrix products take on this process's slowest device. The devices run one after another.

    Waits until the devices are idle. A CPU is shared with everything that runs on the machine, this program's own
    threads included, so a value twice as high as the last one means nothing there. The first call compiles, ~1 s.
    """
    return max(_probe_ms(device) for device in jax.local_devices())


def _probe_ms(device: jax.Device) -> float:
    # Without this, JAX refuses to use a single device, because the trainer has set the mesh of the run.
    with jax.set_mesh(Mesh(np.array([device]), ("probe",))):
        size, products = (128, 64) if device.platform == "cpu" else (2048, 64)
        run = _products(size, products, jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
        run(1 / size).block_until_ready()  # the first call compiles; later ones wait until the device is idle
        times = []
        for _ in range(PROBES):
            start = time.perf_counter()
            run(1 / size).block_until_ready()
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@functools.cache
def _products(size: int, products: int, dtype: jnp.dtype) -> Callable[[float], Array]:
    """The probe. A matrix of 1 / size is its own square, so values stay the same, and no product can be skipped.

    The matrix is made on the device, which holds three such matrices, 24 MiB at most, while the probe runs.
    """

    def probe(value: Array) -> Array:
        start = jnp.full((size, size), value, dtype)
        return jax.lax.fori_loop(0, products, lambda _, x: x @ x, start)[0, 0]

    return jax.jit(probe)


def report(
    values: Mapping[int, tuple[str, Mapping[str, float]]], threshold: float = 1.5
) -> tuple[dict[str, float], list[str]]:
    """The metrics perf/slowest_<measure>_ratio, and a line for each slow host; nothing if there is one process.

    A process is compared with the median of the others: if it were included, the ratio of two processes could never
    reach 2. Values below a measure's floor count as the floor: 0.1 ms of waiting for data is not ten times 0.01 ms.

    Args:
      values: by process, the name of its host and its MEASURES; missing measures are skipped.
      threshold: the ratio from which a host counts as slow.
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
