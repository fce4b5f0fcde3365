"""Checks environment variables of JAX and XLA like flags: values that would change or prevent a run are refused.

Options that affect the numerics have a fixed value here, so that the configuration determines a run. They are recorded
in environment.json nevertheless, with the options that users may set by a variable: flags of XLA and its libraries, and
the precision of matrix products, for which trainer/xla_options.py has the default. All recorded values must be the same
on all processes; if they differ from those of the attempt before, a line says so.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
from typing import Any

from trainer.errors import ConfigError, Stopped

# Any other value changes the numerics of the same configuration.
NUMBERS: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
}
# With any other value the program does not work, or not correctly.
WORKING: dict[str, Any] = {
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_legacy_prng_key": "allow",
    "jax_enable_recoverability": False,
    "jax_use_simplified_jaxpr_constants": False,  # a step would transfer its constants each time
    "jax_transfer_guard": ("allow", "log", None),
    "jax_transfer_guard_host_to_device": ("allow", "log", None),
    "jax_transfer_guard_device_to_device": ("allow", "log", None),
    "jax_transfer_guard_device_to_host": ("allow", "log", None),
}
CHOSEN = (
    "jax_default_matmul_precision",
    "jax_optimization_level",
    "jax_disable_most_optimizations",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_cpu_collectives_implementation",
)
# Flags of XLA and of libraries that it calls: JAX has no options for these.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
VARIABLES = (*FLAGS, "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO")
# Flags that do not affect numerics: each process may have its own files for what XLA writes. (The number of devices is
# compared and shown separately.)
NEUTRAL = re.compile("dump|_cache_(dir|file)$|^--xla_force_host_platform_device_count$|^--xla_hlo_profile")


def load_jax() -> None:
    """Imports JAX. Raises ConfigError if an environment variable has a value that JAX or we refuse."""
    try:
        import jax  # noqa: F401
    except ValueError as e:
        raise ConfigError(f"JAX does not start with this environment: {e}; correct the variable") from None
    for options, why in ((NUMBERS, "would change the results of this configuration"), (WORKING, "does not work here")):
        for option, right in options.items():
            value = option_of_jax(option, right)
            if value not in (right if isinstance(right, tuple) else (right,)):
                raise ConfigError(f"{option.upper()}={os.environ.get(option.upper(), value)} {why}; unset it")
    if option_of_jax("jax_num_cpu_devices", 1) == 0:
        raise ConfigError("JAX_NUM_CPU_DEVICES=0 leaves no device; it must be 1 or more")
    _check_xla_flags()


def option_of_jax(name: str, default: Any = None) -> Any:
    """The value of an option; the default if this version of JAX has no option of that name."""
    import jax

    value = getattr(jax.config, name, jax.config.values.get(name, default))  # some options are only in `values`
    return getattr(value, "value", value)


def numbers() -> dict[str, Any]:
    """The settings besides the configuration that a run's numerics depend on, for environment.json."""
    found = {name: _plain(option_of_jax(name)) for name in (*NUMBERS, *CHOSEN)}
    return found | {name: _given(name) for name in VARIABLES}


def compared(numbers: dict[str, Any]) -> dict[str, Any]:
    """A form that differs only if the numerics may differ: flags are sorted by name, and neutral ones left out."""
    return {name: _flags(str(value)) if name in FLAGS else value for name, value in numbers.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


def _given(name: str) -> str:
    """The value of a variable; if XLA_FLAGS names a file, the text of that file, which may change between attempts."""
    text = os.environ.get(name, "")
    if name == "XLA_FLAGS" and text and not text.lstrip().startswith("-"):
        with contextlib.suppress(OSError, ValueError):  # XLA has read the file, but it was deleted since
            return pathlib.Path(text).read_text()
    return text


def _flags(text: str) -> str:
    """Flags sorted by name; the last of a repeated flag counts, as in XLA, and --flag is --flag=true."""
    words = [word if "=" in word else f"{word}=true" for word in text.split()]
    last = {word.partition("=")[0]: word for word in words}
    return " ".join(word for name, word in sorted(last.items()) if not NEUTRAL.search(name))


def changes(run: pathlib.Path) -> str:
    """How this attempt differs from the one in environment.json; '' if it does not differ, or if that is not known."""
    try:
        before = compared(json.loads((run / "environment.json").read_text())["numbers"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    now = compared(numbers())
    other = [name for name in now if name in before and before[name] != now[name]]
    return "; ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in other)


def _check_xla_flags() -> None:
    """Lets a child process parse XLA's flags first: a wrong flag ends the process with exit code 1, like a crash."""
    if not os.environ.get("XLA_FLAGS"):
        return
    if wrong := re.search(r"--xla_force_host_platform_device_count=(0+|-\d+)(?!\S)", os.environ["XLA_FLAGS"]):
        raise ConfigError(f"XLA_FLAGS={os.environ['XLA_FLAGS']}: {wrong[1]} devices; it must be 1 or more")
    from jaxlib import _jax

    read, write = os.pipe()
    # The child shares our signal pipe (launch/signals.py): a Ctrl-C, which a terminal sends to both, would count twice.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if not (child := os.fork()):
        os.dup2(write, 2)
        _ = _jax.CompileOptions().executable_build_options.debug_options
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        words = pipe.read().decode("utf-8", "backslashreplace")
    if os.waitpid(child, 0)[1]:
        found = re.search(r"^[EF]\d.*?\] (.*)", words, re.MULTILINE)
        raise ConfigError(f"XLA_FLAGS={os.environ['XLA_FLAGS']}: {found[1] if found else 'XLA rejects them'}")


# Errors of a backend that waited for its peers.
OF_OTHERS = r"KeyValue\(\)|Barrier|[Cc]oordination ?[Ss]ervice|heartbeat|topolog"


def find_devices() -> None:
    """Raises ConfigError if JAX_PLATFORMS names a platform that is not installed, Stopped if no device is available."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        reason = " ".join(str(e).split()).partition(" (set JAX_PLATFORMS")[0]
        if re.search(OF_OTHERS, reason):
            raise Stopped(f"another process is missing, or has no devices: {reason}; start all of them again") from None
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        lasting = isinstance(e, AssertionError) or re.search(
            "not in the list of known|cannot open shared object", reason
        )
        if lasting or os.environ.get("JAX_PLATFORMS") == "cpu":
            raise ConfigError(
                f"{asked} cannot be used here: {reason or 'it is not installed'}; unset it, or install JAX for it: "
                'pip install -e ".[cuda]" or ".[tpu]"'
            ) from None
        raise Stopped(f"no device is available, with {asked}: {reason}; free it, and start again") from None
