"""launch/gpu/: reports of the check about machines with GPUs, from recorded answers of nvidia-smi and a fake libcuda;
the settings, which the installed XLA must know; and the processes that run.sh starts."""

import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests import runs
from tests.system.faults import interrupted

SCRIPT = str(runs.ROOT / "launch/gpu/run.sh")
TRAIN = [sys.executable, "-m", "launch.train", "--config=configs/tiny.py", "--workdir=runs/x"]
SOON_S = 60

# Answers of nvidia-smi

H100 = "{i}, GPU-{i}e18afb8d-1627-f8ff-2ba3-c05c5a8e9e67, NVIDIA H100 80GB HBM3, {driver}, 81559, {used}\n"
DGX_H100 = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPIX\tNODE\t0-55,112-167\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tNODE\tPIX\t0-55,112-167\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tSYS\tSYS\t56-111,168-223\t1\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tSYS\tSYS\t56-111,168-223\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\tSYS\t X \tNODE
NIC1\tNODE\tPIX\tSYS\tSYS\tNODE\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
FOUR_4090 = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tPHB\tSYS\tSYS\t0-55,112-167\t0\t\tN/A
GPU1\tPHB\t X \tSYS\tSYS\t0-55,112-167\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tPHB\t56-111,168-223\t1\t\tN/A
GPU3\tSYS\tSYS\tPHB\t X \t56-111,168-223\t1\t\tN/A
"""
TWO_BRIDGED_PAIRS = FOUR_4090.replace("PHB", "NV4")
COMMUNICATE = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n"

NVIDIA_SMI = """#!/bin/sh
[ ! -f "$0.failure" ] || { cat "$0.failure"; exit "$(cat "$0.code")"; }
case $1 in
--query-gpu=index,uuid,name,driver_version,memory.total,memory.used) cat "$0.gpus" ;;
--query-compute-apps=gpu_uuid,pid,process_name) cat "$0.apps" ;;
--list-gpus) sed 's/\\([0-9]*\\), \\([^,]*\\), \\([^,]*\\).*/GPU \\1: \\3 (UUID: \\2)/' "$0.gpus" ;;
topo) cat "$0.topology" ;;
*) echo "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help."; exit 2 ;;
esac
"""
LIBCUDA = """
#include <stdlib.h>
static int number(const char *name) { return atoi(getenv(name)); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA"); return 0; }
int cuInit(unsigned flags) { return number("FAKE_CUINIT"); }
int cuDeviceGetCount(int *count) { *count = number("FAKE_COUNT"); return 0; }
"""


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory):
    """A folder with a libcuda.so.1 whose answers are set by the environment."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "libcuda.c").write_text(LIBCUDA)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "libcuda.c")]
    subprocess.run(command, check=True)
    return folder


def machine(
    folder: pathlib.Path,
    *,
    gpus: int = 4,
    driver: str = "580.65.06",
    cuda: int = 13000,
    used: tuple[int, ...] = (),
    apps: str = "",
    topology: str = DGX_H100,
    plugins: tuple[str, ...] = ("jax-cuda13-plugin", "jax-cuda13-pjrt"),
    version: str = "",
    failure: tuple[int, str] | None = None,
    cuinit: int = 0,
    count: int | None = None,
    libcuda: pathlib.Path | None = None,
    **environment: str,
) -> dict[str, str]:
    """The environment of a process on a machine with these GPUs, driver and wheels."""
    smi = folder / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    rows = [H100.format(i=i, driver=driver, used=used[i] if i < len(used) else 4) for i in range(gpus)]
    for name, text in {"gpus": "".join(rows), "apps": apps, "topology": topology}.items():
        pathlib.Path(f"{smi}.{name}").write_text(text)
    if failure:
        pathlib.Path(f"{smi}.code").write_text(str(failure[0]))
        pathlib.Path(f"{smi}.failure").write_text(failure[1])
    version = version or importlib.metadata.version("jaxlib")
    for name in plugins:
        wheel = folder / f"site/{name.replace('-', '_')}-{version}.dist-info"
        wheel.mkdir(parents=True)
        (wheel / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    left_out = (
        "JAX_OPTIMIZATION_LEVEL",
        "JAX_PLATFORMS",
        "CUDA_VISIBLE_DEVICES",
        "XLA_FLAGS",
        "NCCL_DEBUG",
        "LD_LIBRARY_PATH",
    )
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return {
        **inherited,
        "PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "site"),
        "LD_LIBRARY_PATH": str(libcuda or ""),
        "FAKE_CUDA": str(cuda),
        "FAKE_CUINIT": str(cuinit),
        "FAKE_COUNT": str(gpus if count is None else count),
        **environment,
    }


def check(environment: dict[str, str], code: int) -> list[str]:
    """Runs the check. Returns the lines that it prints: results first, then errors."""
    argv = [sys.executable, "-m", "launch.gpu_check"]
    done = subprocess.run(argv, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=SOON_S)
    assert done.returncode == code, done
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
    return (done.stdout + done.stderr).splitlines()


# The check


def test_a_machine_that_is_ready(tmp_path, libcuda):
    lines = check(machine(tmp_path, libcuda=libcuda), 0)
    assert lines == ["4 x NVIDIA H100 80GB HBM3, driver 580.65.06, CUDA 13 wheels: ready"]


def test_an_older_driver_with_its_wheels(tmp_path, libcuda):
    wheels = ("jax-cuda12-plugin", "jax-cuda12-pjrt")
    lines = check(machine(tmp_path, libcuda=libcuda, driver="535.161.08", cuda=12020, plugins=wheels), 0)
    assert lines == ["4 x NVIDIA H100 80GB HBM3, driver 535.161.08, CUDA 12 wheels: ready"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"driver": "570.86.10", "cuda": 12080},
         "driver 570.86.10 is for CUDA 12 and the wheels are for CUDA 13, which needs driver 580 or newer"),
        ({"driver": "470.57.02", "cuda": 11040, "plugins": ("jax-cuda12-plugin", "jax-cuda12-pjrt")},
         "driver 470.57.02 is for CUDA 11 and the wheels are for CUDA 12, which needs driver 525 or newer"),
        ({"version": "0.9.1"}, "jax-cuda13-plugin is 0.9.1 and jaxlib is "),
        ({"plugins": ("jax-cuda13-plugin",)}, "jax-cuda13-pjrt is missing and jaxlib is "),
        ({"plugins": ("jax-cuda12-plugin", "jax-cuda13-plugin")}, "are both installed; uninstall one"),
        ({"JAX_PLATFORMS": "cpu"}, "JAX_PLATFORMS=cpu keeps JAX from the GPUs; unset it"),
        ({"failure": (9, COMMUNICATE)}, "its kernel module is not loaded; reboot after an update of the kernel"),
        ({"failure": (18, MISMATCH)}, "the driver was updated while the old one was loaded; reboot"),
        ({"failure": (6, "No devices were found\n")}, "there is no GPU, or this container has none"),
        ({"failure": (15, "Unable to determine the device handle for GPU0000:4E:00.0: Unknown Error\n")},
         "15: Unable to determine the device handle for GPU0000:4E:00.0: Unknown Error: see dmesg"),
        ({"gpus": 0}, "nvidia-smi does not list a GPU"),
        ({"cuinit": 802}, "does not start (cuInit: 802): the GPUs wait for their switches; start the fabric manager"),
        ({"cuinit": 100, "CUDA_VISIBLE_DEVICES": ""}, "no GPU is visible to this process; see CUDA_VISIBLE_DEVICES"),
        ({"cuinit": 999}, "the driver does not start (cuInit: 999): see dmesg"),
    ],
)  # fmt: skip
def test_what_would_not_work(tmp_path, libcuda, fields, message):
    lines = check(machine(tmp_path, libcuda=libcuda, **fields), 2)
    assert any(line.startswith("error: ") and message in line for line in lines), lines
    assert not any("ready" in line for line in lines)
    if fields.get("version") != "0.9.1":  # with this version, each wheel has an error
        assert len(lines) == 1


def test_no_driver_at_all(tmp_path):
    environment = machine(tmp_path)
    shutil.rmtree(tmp_path / "bin")
    if shutil.which("nvidia-smi", path=environment["PATH"]):
        pytest.skip("there is a driver here")
    (line,) = check(environment, 2)
    assert "there is no nvidia-smi: install the NVIDIA driver (580 or newer), or start the container with" in line


def test_a_container_without_the_drivers_library(tmp_path):
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a driver here")
    (line,) = check(machine(tmp_path), 2)
    assert "libcuda.so.1 is not found" in line and "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in line


def test_no_wheel(tmp_path, libcuda):
    if any("cuda" in name.name for name in importlib.metadata.distributions() if name.name.startswith("jax-")):
        pytest.skip("there is a plugin here")
    (line,) = check(machine(tmp_path, libcuda=libcuda, plugins=()), 2)
    assert f"JAX has no CUDA plugin in {sys.prefix}; pip install " in line


def test_all_that_is_wrong_is_said(tmp_path, libcuda):
    fields = {"driver": "570.86.10", "cuda": 12080, "JAX_PLATFORMS": "cpu", "used": (79000,), "version": "0.9.1"}
    assert len(check(machine(tmp_path, libcuda=libcuda, **fields), 2)) == 5


def test_memory_that_others_hold(tmp_path, libcuda):
    apps = [(0, 11, "python"), (1, 4711, "/opt/env/bin/python3, old"), (1, 4712, "[Not Found]"), (2, 12, "Xorg")]
    rows = "".join(f"GPU-{i}e18afb8d-1627-f8ff-2ba3-c05c5a8e9e67, {pid}, {name}\n" for i, pid, name in apps)
    environment = machine(tmp_path, libcuda=libcuda, used=(4, 75132, 500, 75000), apps=rows)
    first, second = check(environment, 2)
    assert "GPU 1: 75,132 of 81,559 MiB are taken by pid 4711 (/opt/env/bin/python3, old), pid 4712 ([Not" in first
    assert "GPU 3: 75,000 of 81,559 MiB are taken by a process that is not visible here" in second
    environment["CUDA_VISIBLE_DEVICES"] = "0,GPU-2e18"
    assert check(environment | {"FAKE_COUNT": "2"}, 0)[-1].startswith("2 x NVIDIA H100")


def test_fewer_gpus_than_there_are(tmp_path, libcuda):
    by_hand = machine(tmp_path, libcuda=libcuda, count=2, CUDA_VISIBLE_DEVICES="0,1")
    assert check(by_hand, 0)[0] == (
        "warning: JAX will see 2 of the 4 GPUs that nvidia-smi lists: CUDA_VISIBLE_DEVICES=0,1"
    )
    del by_hand["CUDA_VISIBLE_DEVICES"]
    assert "2 of the 4 GPUs that nvidia-smi lists: a limit of the container or of Slurm" in check(by_hand, 0)[0]


@pytest.mark.parametrize(
    ("topology", "warning"),
    [
        (FOUR_4090, "no two GPUs have NVLink between them (0-1, 0-2, 0-3, 1-2, …: PHB, SYS): "),
        (TWO_BRIDGED_PAIRS, "of 6 pairs of GPUs, 4 do not have NVLink between them (0-2, 0-3, 1-2, 1-3: SYS): "),
    ],
)
def test_gpus_without_nvlink(tmp_path, libcuda, topology, warning):
    first, second = check(machine(tmp_path, libcuda=libcuda, topology=topology), 0)
    assert first.startswith(f"warning: {warning}") and second.endswith(": ready")


# Settings


def settings(**environment: str) -> dict[str, str]:
    """The variables that env.sh sets, in an environment without other GPU settings."""
    clean = {"PATH": os.environ["PATH"], **environment}
    command = ["bash", "-euc", "source launch/gpu/env.sh; env -0"]
    done = subprocess.run(command, cwd=runs.ROOT, env=clean, capture_output=True, text=True, check=True)
    assert not done.stderr
    after = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {name: value for name, value in after.items() if name.startswith(("XLA", "JAX", "NCCL", "CUDA"))}


def test_settings():
    assert settings() == {"JAX_OPTIMIZATION_LEVEL": "O1", "JAX_PLATFORMS": "cuda,cpu", "NCCL_DEBUG": "WARN"}
    own = {
        "JAX_OPTIMIZATION_LEVEL": "O0",
        "XLA_FLAGS": "--xla_gpu_autotune_level=2",
        "JAX_PLATFORMS": "cpu",
        "NCCL_DEBUG": "INFO",
        "NCCL_ALGO": "Tree",
    }
    assert settings(**own) == own
    asked = settings(**own, DETERMINISTIC="1")
    assert asked["XLA_FLAGS"].endswith("--xla_gpu_autotune_level=0 --xla_gpu_autotune_level=2")
    assert asked | {"XLA_FLAGS": ""} == own | {"XLA_FLAGS": ""}


def test_deterministic_settings_are_those_of_the_documentation():
    found = settings(DETERMINISTIC="1")
    assert found["NCCL_ALGO"] == "Ring"
    assert f'XLA_FLAGS="{found["XLA_FLAGS"]}"' in (runs.ROOT / "docs/reliability.md").read_text()


@pytest.mark.parametrize("unknown", [False, True])
def test_jax_knows_the_settings(unknown):
    """XLA ends the process if it does not know a flag, as the second case shows."""
    found = settings(DETERMINISTIC="1")
    found["XLA_FLAGS"] += " --xla_gpu_no_such_flag=1" * unknown
    code = "import jax; jax.jit(lambda x: x + 1)(1); print(jax.config.jax_optimization_level)"
    environment = {**os.environ, **found, "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=SOON_S)
    if unknown:
        assert done.returncode != 0 and "Unknown flag" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "O1\n"), done.stderr


# What is started


def script(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *words], cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=SOON_S
    )


def test_one_process_with_all_gpus(tmp_path):
    done = script(machine(tmp_path), "--dry_run", "--", *TRAIN)
    assert done.returncode == 0 and [shlex.split(line) for line in done.stdout.splitlines()] == [
        ["export", "JAX_OPTIMIZATION_LEVEL=O1"],
        ["export", "JAX_PLATFORMS=cuda,cpu"],
        ["export", "NCCL_DEBUG=WARN"],
        [sys.executable, "-m", "launch.gpu_check"],
        [sys.executable, "-m", "launch.supervise", "--", *TRAIN],
    ]


@pytest.mark.parametrize(("visible", "gpus"), [(None, 4), ("2,3", 2), ("1", 1)])
def test_one_process_for_each_gpu(tmp_path, visible, gpus):
    environment = machine(tmp_path, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    place = ("--nodes=2", "--node=1", "--coordinator=10.0.0.1:1234", "--deterministic", "--skip_check", "--dry_run")
    done = script(environment, "--per_gpu", *place, "--", *TRAIN)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    exported = dict(words[1].split("=", 1) for words in lines if words[0] == "export")
    assert "--xla_gpu_deterministic_ops=true" in exported["XLA_FLAGS"] and exported["NCCL_ALGO"] == "Ring"
    started = [words for words in lines if words[0] != "export"]
    assert started == [
        [
            *("env", f"JAX_LOCAL_DEVICE_IDS={i}", sys.executable, "-m", "launch.supervise", "--", *TRAIN),
            *("--coordinator_address=10.0.0.1:1234", f"--num_processes={2 * gpus}", f"--process_id={gpus + i}"),
        ]
        for i in range(gpus)
    ]


def test_jax_takes_the_device_it_is_given():
    """JAX_LOCAL_DEVICE_IDS names the device, because the other GPUs must stay visible to NCCL."""
    code = """
import jax, sys
from jax._src import xla_bridge
jax.distributed.initialize(sys.argv[1], 1, 0)
print(xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
    argv = [sys.executable, "-c", code, f"localhost:{runs.free_port()}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_LOCAL_DEVICE_IDS": "3"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=SOON_S)
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize(
    ("words", "fields", "message"),
    [
        (["--", *TRAIN], {"failure": (18, MISMATCH)}, "the driver was updated while the old one was loaded; reboot"),
        (["--per_gpu", "--skip_check", "--", *TRAIN], {"failure": (18, MISMATCH)}, "nvidia-smi lists no GPU; "),
        (["--skip_check"], {}, "no command; it follows --"),
        (
            ["--skip_check", "--", "python", "train.py"],
            {},
            "the command after -- must look like python -m launch.train",
        ),
        (["--gpus=8", "--", *TRAIN], {}, "unknown flag --gpus; the flags are --nodes"),
        (["--skip_check", "--nodes=2", "--", *TRAIN], {}, "--nodes=2 needs --node=I"),
    ],
)
def test_mistakes(tmp_path, words, fields, message):
    done = script(machine(tmp_path, **fields), *words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and message in line and not done.stdout


@pytest.mark.slow
def test_a_training_with_one_process_for_each_device(tmp_path):
    """Tests everything except a GPU: two GPUs are counted, and two processes start, find each other and train."""
    data, run = runs.dataset(tmp_path), tmp_path / "run"
    environment = machine(tmp_path, gpus=2) | {"JAX_PLATFORMS": "cpu"}
    argv = runs.command(run, data, **interrupted.FIELDS | {"num_train_steps": 5})
    with runs.ending(runs.start([SCRIPT, "--per_gpu", "--skip_check", "--", *argv], **environment)) as (process,):
        out = runs.finish(process)
    assert "2 cpu in 2 process(es)" in out and runs.rows(run)[-1]["step"] == 5
