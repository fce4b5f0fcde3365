"""docs/clusters.md: each of our commands on the page is valid, and each of its links leads to a page."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import runs

PAGE = runs.ROOT / "docs/clusters.md"
PLACES = {"PROJECT": "p", "ZONE": "us-east5-b", "CLUSTER": "c", "IMAGE": "i", "NFS": "10.0.0.2:/runs"}


def commands() -> list[str]:
    """The lines of code blocks, and the inline code, that start one of our scripts."""
    text = PAGE.read_text()
    lines = runs.code_lines(PAGE)
    lines += re.findall(r"`([^`]*launch/[^`]*)`", text)
    lines += [f"launch/tpu/{command}" for command in re.findall(r"^\| `(\w+\.sh[^`]*)`", text, re.M)]
    return sorted(
        {line.partition("  #")[0].strip() for line in lines if re.match(r"([A-Z_]+=\S+ )*launch/\S+\.sh", line)}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone such as a reader of the page has, with settings in tpu.env and xpk.env."""
    made = tmp_path_factory.mktemp("clone")
    for name in ("tpu", "xpk"):
        text = (runs.ROOT / f"launch/{name}/example.env").read_text()
        for setting, value in PLACES.items():
            text = re.sub(f"^{setting}=", f"{setting}={value}", text, flags=re.M)
        (made / f"{name}.env").write_text(text)
    runs.clone(made)
    return made


@pytest.mark.parametrize("line", commands())
def test_each_command_is_one(folder, line):
    if "…" in line or "COMMAND" in line:
        line = re.sub(r"-- .*", "-- python -m launch.train --config=configs/tiny.py --workdir=runs/a", line)
    for name, value in {"N": "2", "I": "1", "HOST:PORT": "h:1"}.items():
        line = re.sub(rf"(?<==){name}\b", value, line)
    script = re.search(r"launch/\S+\.sh", line)[0]
    line = line.replace(script, f"{script} --dry_run", 1).replace("--dry_run --dry_run", "--dry_run")
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(folder / "state"),
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, (line, done.stderr)
    assert done.stdout or "asks: gcloud" in done.stderr, "a dry run shows what would be done"


def test_there_are_some():
    names = {shlex.split(line)[0] for line in commands()}
    assert len(commands()) > 15 and {"launch/tpu/babysit.sh", "launch/gpu/run.sh", "launch/xpk/run.sh"} <= names


def test_links():
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (PAGE.parent / path).exists(), target
        assert path or anchor in anchors, target
