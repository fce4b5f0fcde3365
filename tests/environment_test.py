"""Environment variables of JAX and XLA: a command fails with one line if they change what a configuration computes, or
break it."""

import json
import subprocess
import sys

import jax
import pytest

from launch import distributed, environment, runtime
from tests import runs
from trainer.config import from_dict
from trainer.errors import ConfigError, Stopped


@pytest.fixture(autouse=True)
def rank_promotion_of_users():
    """Allows rank promotion, as for users: tests/conftest.py forbids it, and a command would refuse that setting."""
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


@pytest.fixture(autouse=True)
def no_fork(monkeypatch):
    """Removes XLA_FLAGS, so that nothing forks to check the flags: Python warns of a fork beside JAX's threads. Tests
    in other processes check how XLA responds to its flags."""
    jax.devices()  # the devices must exist before XLA_FLAGS is removed
    monkeypatch.delenv("XLA_FLAGS")


def refused(name: str, value: str) -> str:
    with pytest.raises(ConfigError) as e:
        environment.load_jax()
    assert "\n" not in str(e.value) and f"{name.upper()}={value}" in str(e.value)
    return str(e.value)


OTHERS = {
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 5,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_legacy_prng_key": "error",
    "jax_transfer_guard": "disallow",
    "jax_transfer_guard_host_to_device": "disallow",
    "jax_transfer_guard_device_to_device": "disallow_explicit",
    "jax_transfer_guard_device_to_host": "disallow",
}


@pytest.mark.parametrize("name", [*environment.NUMBERS, *environment.WORKING])
def test_another_value_is_refused(name, monkeypatch):
    environment.load_jax()
    before = getattr(jax.config, name)
    other = OTHERS.get(name, not before)
    monkeypatch.setenv(name.upper(), str(other))
    jax.config.update(name, other)
    try:
        assert "; unset it" in refused(name, str(other))
    finally:
        jax.config.update(name, before)
    environment.load_jax()


def test_what_may_be_chosen_is_recorded(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with jax.default_matmul_precision("highest"):
        found = json.loads(json.dumps(environment.numbers()))
    assert found["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true" and found["jax_enable_x64"] is False
    assert found["jax_default_prng_impl"] == "threefry2x32" and "jax_default_matmul_precision" in found


@pytest.mark.parametrize("count", ["0", "-1", "00"])
def test_no_device_is_a_mistake_that_does_not_pass(count, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={count}")
    with pytest.raises(ConfigError, match="must be 1 or more"):
        environment.load_jax()


FAST, EIGEN = "--xla_cpu_enable_fast_math", "--xla_cpu_multi_thread_eigen"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (f"{FAST}=true {EIGEN}=true", f"{EIGEN}=true  {FAST}=true", True),
        (f"{FAST}=true {FAST}=false", f"{FAST}=false", True),
        (f"{FAST}=true --xla_dump_to=/x/0", f"--xla_dump_to=/x/1 {FAST}=true", True),
        ("--xla_gpu_dump_autotune_results_to=/x/0", "--xla_gpu_dump_autotune_results_to=/x/1", True),
        ("--xla_gpu_per_fusion_autotune_cache_dir=/x/0", "--xla_gpu_kernel_cache_file=/x/1", True),
        (f"{FAST} {EIGEN}", f"{EIGEN}=true {FAST}=true", True),
        (FAST, f"{FAST}=false", False),
        ("--xla_disable_hlo_passes=", "--xla_disable_hlo_passes", False),
        ("--xla_gpu_load_autotune_results_from=/x/0", "--xla_gpu_load_autotune_results_from=/x/1", False),
        ("--xla_force_host_platform_device_count=8", "", True),
        (f"{FAST}=true", f"{FAST}=false", False),
        ("--xla_gpu_deterministic_ops=true", "", False),
    ],
)
@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_flags_are_compared_by_what_they_do(monkeypatch, tmp_path, name, one, other, same):
    jax.devices()  # the devices must exist, so that only the comparison reads the variables
    monkeypatch.setattr(distributed, "code_version", str)

    def identity(value: str) -> dict:
        monkeypatch.setenv(name, value)
        return distributed.identity(from_dict({}))

    assert (identity(one) == identity(other)) == same
    (tmp_path / "environment.json").write_text(json.dumps({"numbers": environment.numbers()}))
    monkeypatch.setenv(name, one)
    said = environment.changes(tmp_path)
    assert (not said) == same and said.count(name) == (not same) and "\n" not in said
    if name == "XLA_FLAGS":
        (tmp_path / "flags").write_text(one)
        assert (identity(str(tmp_path / "flags")) == identity(other)) == same, "a file of them"


@pytest.mark.parametrize(("name", "differs"), [("XLA_FLAGS", True), ("LIBTPU_INIT_ARGS", False), ("NCCL_ALGO", False)])
def test_only_a_file_of_xla_flags_is_read_and_what_it_holds_is_recorded(monkeypatch, tmp_path, name, differs):
    """Other contents of the file are a different setting; a file whose name happens to equal a value is not read."""
    jax.devices()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "Ring")
    flags = tmp_path / "Ring"
    flags.write_text(f"{FAST}=false")
    (tmp_path / "environment.json").write_text(json.dumps({"numbers": environment.numbers()}))
    assert environment.changes(tmp_path) == ""
    flags.write_text(f"{FAST}=true")
    said = environment.changes(tmp_path)
    assert said == (f"XLA_FLAGS '{FAST}=false' -> '{FAST}=true'" if differs else "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_matmul_precision", "highest"),
        ("jax_disable_most_optimizations", not jax.config.values["jax_disable_most_optimizations"]),
        ("NVIDIA_TF32_OVERRIDE", "0"),
        ("NCCL_ALGO", "Tree"),
    ],
)
def test_what_else_moves_numbers_is_compared(monkeypatch, tmp_path, name, value):
    before = distributed.identity(from_dict({}))
    (tmp_path / "environment.json").write_text(json.dumps({"numbers": environment.numbers()}))
    assert environment.changes(tmp_path) == ""
    found = environment.option_of_jax(name)
    try:
        if name.islower():
            jax.config.update(name, value)
        else:
            monkeypatch.setenv(name, value)
        after = distributed.identity(from_dict({}))
        said = environment.changes(tmp_path)
    finally:
        if name.islower():
            jax.config.update(name, found)
    assert {key for key in after if after[key] != before[key]} == {name}
    assert said.startswith(f"{name} ") and said.endswith(f"-> {value!r}")


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"numbers": 1}', '{"numbers": {"jax_enable_x64": false}}'])
def test_an_older_record_is_compared_as_far_as_it_goes(tmp_path, text):
    if text is not None:
        (tmp_path / "environment.json").write_text(text)
    assert environment.changes(tmp_path) == ""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        ("Unable to initialize backend 'cpu': DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:"
         "local_topology/cpu/1 and duration: 2m", Stopped, "another process is missing, or has no devices"),
        ("INTERNAL: Barrier timed out. Id: x", Stopped, "another process is missing, or has no devices"),
        ("Backend 'x' is not in the list of known backends", ConfigError, "cannot be used here"),
        ("Unable to initialize backend 'cpu': INTERNAL: no cpu", ConfigError, "JAX_PLATFORMS=cpu cannot be used here"),
    ],
)  # fmt: skip
def test_a_peer_that_is_missing_is_no_wrong_variable(monkeypatch, error, kind, said):
    def devices():
        raise RuntimeError(error)

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(kind, match=said) as e:
        environment.find_devices()
    assert "\n" not in str(e.value)


def test_a_signal_to_the_reader_of_xla_flags_is_not_ours():
    """Both processes get a Ctrl-C; if it counted twice, the run would exit with 130, without a save."""
    script = """
import os, signal, sys
from jaxlib import _jax
from launch import environment
read, write = os.pipe()
os.set_blocking(read, False)
os.set_blocking(write, False)
signal.set_wakeup_fd(write, warn_on_full_buffer=False)
signal.signal(signal.SIGINT, lambda number, frame: None)
real = _jax.CompileOptions
def options():
    os.kill(os.getpid(), signal.SIGINT)
    return real()
_jax.CompileOptions = options
environment._check_xla_flags()
try:
    print("heard", os.read(read, 10))
except BlockingIOError:
    print("nothing")
signal.raise_signal(signal.SIGINT)
print("heard", os.read(read, 10))
"""
    variables = runs.environment() | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=runs.ROOT, env=variables, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "nothing\nheard b'\\x02'\n", ended


@pytest.mark.parametrize("share", ["abc", "0", "", "-0.5", "nan", "0.9.2"])
def test_a_share_of_a_gpu_that_is_none(share, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    with pytest.raises(ConfigError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={share} is not a share"):
        runtime.use_gpu_memory()
    for good in (".5", "0.92", "1", "1."):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", good)
        runtime.use_gpu_memory()


def test_an_option_that_this_jax_does_not_have_is_not_asked_for(monkeypatch):
    monkeypatch.setitem(environment.NUMBERS, "jax_no_such_option", True)
    environment.load_jax()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"JAX_ENABLE_X64": "1"}, "JAX_ENABLE_X64=1 would change the results of this configuration; unset it"),
        ({"JAX_ENABLE_X64": "maybe"}, "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'; correct"),
        ({"XLA_FLAGS": "--xla_gpu_no_such_flag=true"}, "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=true"),
        ({"XLA_FLAGS": "nonsense"}, 'XLA_FLAGS=nonsense: Could not open file "nonsense"'),
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda cannot be used here"),
        ({"JAX_PLATFORMS": "CPU"}, "Backend 'CPU' is not in the list of known backends"),
    ],
    ids=str,
)
def test_one_line_before_anything_is_written(tmp_path, data, variables, said):
    """Each mistake was a traceback or a crash with exit code 1, after which a supervisor restarts the run."""
    argv = runs.command(tmp_path / "run", data)
    ended = subprocess.run(
        argv, cwd=runs.ROOT, env=runs.environment() | variables, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2 and said in ended.stderr and ended.stderr.count("\n") == 1, ended
    assert ended.stderr.startswith("error: ") and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))
