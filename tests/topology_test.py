"""topology.py: which machines it knows and, with the extra `plan`, how the compilers interpret their names."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from trainer import chips
from trainer.errors import ConfigError
from trainer.planning import topology
from trainer.reporting import metrics

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restores, after the test, the environment variables that `describe` sets."""
    for name, value in topology.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("v5p:4x4x4", ("v5p", (4, 4, 4))),
        ("v5p:2x2x1", ("v5p", (2, 2, 1))),
        ("v5p:16x20x28", ("v5p", (16, 20, 28))),  # the whole pod
        ("tpu7x:16x24x24", ("tpu7x", (16, 24, 24))),
        ("v6e:16x16", ("v6e", (16, 16))),
        ("v5e:1x1", ("v5e", (1, 1))),
        ("h100:8", ("h100", (8,))),
    ],
)
def test_names(name, parsed):
    assert topology.parse(name) == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5litepod:4x4", "topology 'v5litepod:4x4': no chip is called 'v5litepod'; there are v4:4x4x4, v5e:16x16, "),
        ("", "no chip is called ''"),
        ("v5e", "after v5e: comes two numbers of chips, as in v5e:16x16"),
        ("v5e:4", "after v5e: comes two numbers of chips"),
        ("v5p:4x4", "after v5p: comes three numbers of chips, as in v5p:4x4x4"),
        ("v5p:4x4xfour", "after v5p: comes three numbers of chips"),
        ("v5p:4x4x-4", "after v5p: comes three numbers of chips"),
        ("v5p:0x4x4", "after v5p: comes three numbers of chips"),
        ("h100:2x8", "after h100: comes a number of GPUs, as in h100:8"),
        ("v5e:3x4", "a v5e slice is one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v6e:32x32", "a v6e slice is one of"),
        ("v4:2x2x3", "a v4 slice is 2x2x1, 2x2x2, 2x2x4, 2x4x4, or has multiples of 4 on every axis"),
        ("v5p:32x32x32", "32,768 chips, but a v5p pod has 8,960; take a smaller slice, or several with --num_slices"),
        ("h100:16", "a node has 8 GPUs; for more, h100:8 and --num_slices=NODES"),
    ],
)
def test_what_there_is_not(name, message):
    with pytest.raises(ConfigError) as e:
        topology.parse(name)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_no_slices():
    with pytest.raises(ConfigError, match="num_slices is 0; it must be at least 1"):
        topology.parse("v5e:4x4", 0)


def test_a_mistake_is_answered_without_jax():
    code = """
import sys
from trainer.planning import topology
from trainer.errors import ConfigError
for name in ("v9:4", "v5e:5x5"):
    try:
        topology.describe(name)
    except ConfigError:
        pass
    else:
        raise AssertionError(name)
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parent.parent)


@pytest.mark.parametrize("name", ["v5e:4x4", "h100:8"])
def test_without_the_compiler(name, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'not installed; pip install -e "\.\[plan\]"'):
        topology.describe(name)


def test_chip_of_a_device_kind():
    assert chips.chip_of("TPU v5 lite") is chips.CHIPS["v5e"]
    assert chips.chip_of("TPU v5") is chips.CHIPS["v5p"]
    assert chips.chip_of("NVIDIA H100 80GB HBM3") is chips.CHIPS["h100"]
    assert chips.chip_of("NVIDIA RTX A6000") is None
    assert chips.chip_of("cpu") is None


def test_one_table_of_peaks():
    known = getattr(metrics, "PEAK_TFLOPS", {})
    for chip in chips.CHIPS.values():
        assert known.get(chip.device_kind, chip.flops / 1e12) == chip.flops / 1e12


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; pip install -e '.[plan]'")
@pytest.mark.parametrize(
    ("name", "slices", "devices", "hosts"),
    [
        ("v4:2x2x1", 1, 4, 1),
        ("v5e:1x1", 1, 1, 1),
        ("v5e:8x16", 1, 128, 32),
        ("v5p:4x4x4", 2, 128, 32),
        ("v6e:16x16", 2, 512, 128),
        ("tpu7x:4x4x4", 1, 128, 16),
    ],
)
def test_tpus(name, slices, devices, hosts):
    found = topology.describe(name, slices)
    check(found, name, slices, devices, hosts)
    told = [getattr(d, "slice_index", 0) or 0 for d in found.devices]
    assert told == sorted(told)
    assert len(set(told)) == slices


@pytest.mark.skipif(not HAS_CUDA, reason="the CUDA plugin is not installed; pip install -e '.[plan]'")
@pytest.mark.parametrize(
    ("name", "slices", "devices", "hosts"),
    [("a100:8", 1, 8, 1), ("h100:8", 2, 16, 2), ("h200:4", 1, 4, 1)],
)
def test_gpus(name, slices, devices, hosts):
    found = topology.describe(name, slices)
    check(found, name, slices, devices, hosts)
    assert [d.process_index for d in found.devices] == sorted(d.process_index for d in found.devices)


def check(found: topology.Topology, name: str, slices: int, devices: int, hosts: int) -> None:
    assert (found.name, found.num_slices, len(found.devices), found.num_hosts) == (name, slices, devices, hosts)
    assert found.chip is chips.chip_of(found.devices[0].device_kind)
    assert found.chip.host * hosts == devices or hosts == 1
