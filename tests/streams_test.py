"""Consoles that are closed, full or have ASCII alone: a run goes on, and what is read by programs can be read."""

import json
import shlex
import subprocess
import sys

import pytest

from data.prepare import prepare
from tests import runs

# As on a machine without any locale, where Python's own UTF-8 mode is off, too.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}


def in_shell(argv: list[str], redirections: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "-c", f"{shlex.join(argv)} {redirections}"],
        cwd=runs.ROOT, env=runs.environment() | ASCII, capture_output=True, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained with a closed stdout, of a text of many scripts."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "corpus.txt").write_text("größe naïve 你好 привет 😀 " * 600, encoding="utf-8")
    prepare(folder / "dataset", source=str(folder / "corpus.txt"), tokenizer="char")
    fields = {"num_train_steps": 2, "sample__prompt": "r", "sample__max_new_tokens": 30}
    ended = in_shell(runs.command(folder / "run", folder / "dataset", **fields), ">&-")
    assert ended.returncode == 0 and ended.stdout == "" and "Traceback" not in ended.stderr, ended
    return folder / "run"


def test_what_a_run_writes_is_utf_8_on_any_console(run):
    assert "sample.prompt=" in (run / "command.txt").read_text(encoding="utf-8")
    assert json.loads((run / "samples.jsonl").read_text(encoding="utf-8"))["prompt"]
    assert not any(line.startswith("Traceback") for line in (run / "log.0.txt").read_text("utf-8").splitlines())


def test_a_workdir_that_is_not_utf_8_is_refused_in_one_line(tmp_path):
    """Orbax, TensorStore and XLA take no other name: it ended in a type error of C++."""
    for command in ("train", "sample", "evaluate", "supervise"):
        argv = [sys.executable, "-m", f"launch.{command}", f"--workdir={tmp_path}/new\udce9"]
        ended = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2 and "not UTF-8" in ended.stderr and ended.stderr.count("\n") == 1, ended
