"""Report what keeps JAX from using this machine's GPUs, one problem per line, before a training is started on them.

  python -m launch.gpu_check

It checks the wheels, the driver, memory taken by other programs, and the links between the GPUs, without loading JAX.
Exit codes: 0 if training would work, even if slower than it could be (warnings); 2 if it would not work.
"""

import ctypes
import dataclasses
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys

from launch import cli
from trainer.chips import GPU_FRACTION
from trainer.errors import ConfigError

log = logging.getLogger("meshlm")

SMI_S = 60  # nvidia-smi takes seconds if the driver is not kept loaded; a hanging GPU blocks it forever
DRIVERS = {13: 580, 12: 525}  # the oldest drivers for CUDA 13 and CUDA 12
SMI_FAILURES = {
    "version mismatch": "the driver was updated while the old one was loaded; reboot",
    "communicate": "its kernel module is not loaded; reboot after an update of the kernel, or install the driver again",
    "No devices": "there is no GPU, or this container has none (docker run --gpus all)",
}
CUINIT_FAILURES = {
    100: "no GPU is visible to this process; see CUDA_VISIBLE_DEVICES, or start the container with --gpus all",
    802: "the GPUs wait for their switches; start the fabric manager (systemctl start nvidia-fabricmanager)",
    803: "the kernel module and the library have different versions; reboot, or restart the container",
    804: "the CUDA compatibility libraries do not support this GPU; install a newer driver instead",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One row of nvidia-smi."""

    index: str
    uuid: str
    name: str
    driver: str
    total_mib: int
    used_mib: int


class Report:
    """Prints findings as they come."""

    def __init__(self) -> None:
        self.errors = 0

    def error(self, message: str) -> None:
        self.errors += 1
        log.error("error: %s", message)

    def warning(self, message: str) -> None:
        log.warning("warning: %s", message)


def main() -> int:
    report = Report()
    cuda = check_wheels(report)
    check_platforms(report)
    try:
        listed = list_gpus()
    except ConfigError as e:
        report.error(str(e))
        return ConfigError.exit_code
    used = to_be_used(listed)
    check_driver(report, listed, cuda)
    check_memory(report, used)
    if len(used) > 1:
        check_links(report, used)
    if report.errors:
        return ConfigError.exit_code
    log.info("%d x %s, driver %s, CUDA %s wheels: ready", len(used), used[0].name, used[0].driver, cuda)
    return 0


# The wheels


def check_wheels(report: Report) -> int | None:
    """The CUDA version that the wheels are for, if there is exactly one."""
    plugins = {cuda: version(f"jax-cuda{cuda}-plugin") for cuda in DRIVERS}
    there = [cuda for cuda, found in plugins.items() if found]
    if not there:
        report.error(f'JAX has no CUDA plugin in {sys.prefix}; pip install -e ".[cuda]" (CUDA 13, driver 580 or newer)')
        return None
    if len(there) > 1:
        report.error("jax-cuda12-plugin and jax-cuda13-plugin are both installed; uninstall one, and its -pjrt")
        return None
    (cuda,), jaxlib = there, version("jaxlib")
    for name in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"):
        if version(name) != jaxlib:
            report.error(
                f"{name} is {version(name) or 'missing'} and jaxlib is {jaxlib}, so JAX would not use the GPUs; "
                f'pip install "jax[cuda{cuda}]=={version("jax")}"'
            )
    return cuda


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_platforms(report: Report) -> None:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        report.error(f"JAX_PLATFORMS={platforms} keeps JAX from the GPUs; unset it")


# The driver


def list_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists, at least one. Raises ConfigError."""
    fields = "index,uuid,name,driver_version,memory.total,memory.used"
    rows = [row.split(", ") for row in smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()]
    if not rows or any(len(row) != 6 for row in rows):
        raise ConfigError(f"nvidia-smi does not list a GPU, but {rows[:1]}")
    return [Gpu(index, uuid, name, driver, mib(total), mib(used)) for index, uuid, name, driver, total, used in rows]


def smi(*arguments: str) -> str:
    """What nvidia-smi prints. Raises ConfigError."""
    if shutil.which("nvidia-smi") is None:
        raise ConfigError(
            "there is no nvidia-smi: install the NVIDIA driver (580 or newer), or start the container with --gpus all"
        )
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"nvidia-smi did not answer in {SMI_S} s: a GPU hangs; see dmesg for Xid, reboot") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        why = next((why for words, why in SMI_FAILURES.items() if words in said), "see dmesg")
        raise ConfigError(f"nvidia-smi ended with {done.returncode}: {said[:120]}: {why}")
    return done.stdout


def mib(text: str) -> int:
    return int(text) if text.isdigit() else 0  # [N/A] if a GPU shares the memory of the CPU


def check_driver(report: Report, listed: list[Gpu], cuda: int | None) -> None:
    """Checks the library that JAX will use: a container may have another one than nvidia-smi reports."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        report.error(
            "the driver's libcuda.so.1 is not found; install it, or start the container with --gpus all and "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
        return
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    has = number.value // 1000
    if cuda and has < cuda:
        report.error(
            f"driver {listed[0].driver} is for CUDA {has} and the wheels are for CUDA {cuda}, which needs driver "
            f"{DRIVERS[cuda]} or newer; update the driver" + (', or pip install "jax[cuda12]"' if has == 12 else "")
        )
        return
    if code := library.cuInit(0):
        report.error(f"the driver does not start (cuInit: {code}): {CUINIT_FAILURES.get(code, 'see dmesg')}")
        return
    library.cuDeviceGetCount(ctypes.byref(number))
    if number.value < len(listed):
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "a limit of the container or of Slurm" if setting is None else f"CUDA_VISIBLE_DEVICES={setting}"
        report.warning(f"JAX will see {number.value} of the {len(listed)} GPUs that nvidia-smi lists: {why}")


def to_be_used(listed: list[Gpu]) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES selects; all if it matches none."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return listed
    names = [name for name in setting.split(",") if name]
    used = [gpu for gpu in listed if any(gpu.index == name or gpu.uuid.startswith(name) for name in names)]
    return used or listed


# Memory and links


def check_memory(report: Report, gpus: list[Gpu]) -> None:
    """Checks that enough memory is free: JAX allocates its share of a GPU at start, and fails if less is free."""
    setting = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    fraction = float(setting) if re.fullmatch(r"0?\.\d+|1(\.0*)?", setting) else GPU_FRACTION
    taken = [gpu for gpu in gpus if gpu.used_mib > (1 - fraction) * gpu.total_mib]
    if not taken:
        return
    fields = "gpu_uuid,pid,process_name"
    rows = [row.split(", ", 2) for row in smi(f"--query-compute-apps={fields}", "--format=csv,noheader").splitlines()]
    for gpu in taken:
        owners = [f"pid {pid} ({name})" for uuid, pid, name in rows if uuid == gpu.uuid]
        report.error(
            f"GPU {gpu.index}: {gpu.used_mib:,} of {gpu.total_mib:,} MiB are taken by "
            f"{', '.join(owners) or 'a process that is not visible here, maybe in another container'}, and "
            f"training takes {fraction:.0%}; end it, or leave the GPU out with CUDA_VISIBLE_DEVICES"
        )


def check_links(report: Report, gpus: list[Gpu]) -> None:
    """Warns of slow links: gradients and weights cross them in each step, and PCIe has a tenth of NVLink's speed."""
    links = read_topology(smi("topo", "-m"))
    indices = [gpu.index for gpu in gpus]
    pairs = [(a, b) for a in indices for b in indices if int(a) < int(b)]
    slow = [(a, b) for a, b in pairs if not links.get((a, b), "NV").startswith("NV")]
    if not slow:
        return
    kinds = ", ".join(sorted({links[pair] for pair in slow}))
    some = ", ".join(f"{a}-{b}" for a, b in slow[:4]) + (", …" if len(slow) > 4 else "")
    which = "no two GPUs have" if len(slow) == len(pairs) else f"of {len(pairs)} pairs of GPUs, {len(slow)} do not have"
    report.warning(
        f"{which} NVLink between them ({some}: {kinds}): what the GPUs send each other goes over PCIe; "
        "config.mesh.data sends least (docs/scaling.md)"
    )


def read_topology(text: str) -> dict[tuple[str, str], str]:
    """The link between each pair of GPUs, by index, from `nvidia-smi topo -m`: NV18, PIX, PHB, NODE, SYS."""
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    names = next((words for words in lines if words[:1] == ["GPU0"] and words[1:2] != ["X"]), [])
    links = {}
    for words in lines:
        if len(words) > 1 and re.fullmatch(r"GPU\d+", words[0]) and words is not names:
            for name, link in zip(names, words[1:], strict=False):
                if name.startswith("GPU"):
                    links[words[0][3:], name[3:]] = link
    return links


if __name__ == "__main__":
    cli.run(main)
