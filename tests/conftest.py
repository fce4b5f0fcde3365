"""Gives every test eight virtual CPU devices and a compilation cache that outlives a run; both are set before JAX
loads."""

import importlib.metadata
import os
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of a test's time: a run of two processes took 21 s, and 13 s with machine code that is not
# optimized. Users have optimized code, which the newcomer and soak jobs of CI run.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Compiling takes half of the time: 22 s, not 35 to 43 s, for step_test.py. Later versions do not have this flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "meshlm-jax-cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

# JAX must not add axes by itself: the code says how arrays of different ranks are combined. (An environment variable
# would reach the commands that tests start, and they refuse it.)
jax.config.update("jax_numpy_rank_promotion", "raise")

# If pytest is started by nohup, or in the background of a script, it and its child processes would ignore these
# signals.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take minutes, the longest first. They start before the others, so that all workers end at about the same
# time.
LONG = (
    "slurm_test.py", "train_test.py", "differing_test.py", "storage_test.py", "smollm2_test.py", "tpu_test.py",
    "babysit_test.py", "convert_test.py", "parallel_test.py", "beside_test.py", "network_test.py",
    "fault_injection_test.py", "sky_test.py", "namespaces_test.py", "generate_test.py", "serve_test.py", "loop_test.py",
    "finetuning_test.py", "step_test.py", "packing_test.py", "peft_test.py", "dpo_test.py", "lora_test.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def no_mesh_is_left():
    """Resets the mesh of the process after a test: a Trainer sets it, and later tests would compute on it."""
    before = jax.sharding.get_mesh()
    yield
    if jax.sharding.get_mesh() != before:
        jax.set_mesh(before)
