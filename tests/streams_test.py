"""If a console is closed, full or limited to ASCII, a run continues, and programs can read what it writes for them."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from data.preparation.pipeline import prepare_dataset
from tests import runs

# The environment of a machine without any locale, with Python's own UTF-8 mode off.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}


def in_shell(argv: list[str], redirections: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "-c", f"{shlex.join(argv)} {redirections}"],
        cwd=runs.ROOT, env=runs.environment() | ASCII, capture_output=True, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained with a closed stdout, on text in many scripts."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "corpus.txt").write_text("größe naïve 你好 привет 😀 " * 600, encoding="utf-8")
    prepare_dataset(folder / "dataset", source=str(folder / "corpus.txt"), tokenizer="char")
    fields = {"num_train_steps": 2, "sample__prompt": "r", "sample__max_new_tokens": 30}
    ended = in_shell(runs.command(folder / "run", folder / "dataset", **fields), ">&-")
    assert ended.returncode == 0 and ended.stdout == "" and "Traceback" not in ended.stderr, ended
    return folder / "run"


def test_what_a_run_writes_is_utf_8_on_any_console(run):
    assert "sample.prompt=" in (run / "command.txt").read_text(encoding="utf-8")
    assert json.loads((run / "samples.jsonl").read_text(encoding="utf-8"))["prompt"]
    assert not any(line.startswith("Traceback") for line in (run / "log.0.txt").read_text("utf-8").splitlines())


def test_a_workdir_that_is_not_utf_8_is_refused_in_one_line(tmp_path):
    """Orbax, TensorStore and XLA accept only UTF-8 names: others ended in a C++ type error."""
    for command in ("train", "sample", "evaluate", "supervise"):
        argv = [sys.executable, "-m", f"launch.{command}", f"--workdir={tmp_path}/new\udce9"]
        ended = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2 and "not UTF-8" in ended.stderr and ended.stderr.count("\n") == 1, ended


def test_a_parent_that_ignores_what_becomes_of_children_changes_nothing(run):
    """If the parent ignored SIGCHLD, a command cannot read the exit codes of its children."""
    argv = [sys.executable, "-m", "launch.evaluate", f"--workdir={run}", "--json"]
    ended = subprocess.run(
        ["bash", "-c", f"trap '' CHLD; exec {shlex.join(argv)}"],
        cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended


def test_a_configuration_that_was_changed_by_hand_is_not_evaluated(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 100.0'))
    argv = [sys.executable, "-m", "launch.evaluate", f"--workdir={tmp_path / 'run'}"]
    ended = subprocess.run(argv, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "is not what step 2 was trained with; config.model.rope_theta" in ended.stderr


STANDING_STILL = """
import os, pathlib, sys, time
from launch import signals
listening = signals.StopSignals()
listening.connect(lambda: pathlib.Path(sys.argv[1]).touch())
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 65536)
except BlockingIOError:
    os.set_blocking(2, True)
print("full", flush=True)
time.sleep(60)
"""


def test_a_console_that_stands_still_keeps_no_run_from_stopping(tmp_path):
    """If the console's reader is stopped (Ctrl-S, less), output waits, but a request to stop is still handled."""
    argv = [sys.executable, "-c", STANDING_STILL, str(tmp_path / "asked")]
    process = subprocess.Popen(argv, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "full\n"
        process.terminate()
        runs.wait_until(lambda: (tmp_path / "asked").exists(), process)
    finally:
        runs.kill([process])
