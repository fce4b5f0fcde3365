"""Runs that resume with another tokenizer, other devices or another batch size; a second job; and hosts that differ."""

import contextlib
import itertools
import os
import pathlib
import shutil
import subprocess
import time

import pytest

from data.preparation.pipeline import prepare_dataset
from tests import runs
from tests.system.faults.interrupted import WHOLE_STEPS as STEPS
from tests.system.faults.storage_test import wait_for_line

pytestmark = pytest.mark.slow
QUICK = {"num_train_steps": 800, "eval__every_steps": 0, "checkpoint__every_steps": 200}
SLOW = QUICK | {"eval__every_steps": 1, "eval__num_windows": 0}


def forget_after(run: pathlib.Path, step: int) -> None:
    """Makes the run look as if it had been killed after this save."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def one_line(out: str) -> str:
    (line,) = out.splitlines()
    return line


# Another tokenizer, other devices, another batch size


def test_another_tokenizer(tmp_path, data, whole):
    """Fault 19: another tokenizer is refused, because the ids would have other meanings. (train_test has another
    dataset.)"""
    source = tmp_path / "corpus.txt"
    source.write_text(runs.text())
    prepare_dataset(tmp_path / "bytes", source=str(source), tokenizer="byte")
    before = (whole / "config.json").read_bytes()
    line = one_line(runs.train(whole, tmp_path / "bytes", num_train_steps=STEPS, code=2))
    assert "config.model.vocab_size: 19 -> " in line
    # The vocabulary has the same size, but the ids of a text differ.
    (tmp_path / "swapped.txt").write_text(runs.text().replace("m", "M"))
    prepare_dataset(tmp_path / "swapped", source=str(tmp_path / "swapped.txt"), tokenizer="char")
    run = shutil.copytree(whole, tmp_path / "run")
    out = runs.train(run, tmp_path / "swapped", num_train_steps=STEPS, code=2)
    assert "another dataset" in out.splitlines()[-1]
    assert (whole / "config.json").read_bytes() == before and runs.losses(run) == runs.losses(whole)


def test_other_devices(tmp_path, data, whole):
    """Fault 20: runs on one device, then four, then two processes have the same samples, and losses within 1e-5."""
    run = shutil.copytree(whole, tmp_path / "run")
    forget_after(run, 20)
    fields = {"num_train_steps": STEPS, "checkpoint__keep_last": 10}
    out = runs.train(run, data, devices=4, mesh__data=2, mesh__fsdp=2, **fields)
    assert "Resuming after step 20." in out and "4 cpu in 1 process(es)" in out
    forget_after(run, 40)
    out = runs.finish_gang(runs.start_gang(run, data, mesh__fsdp=2, **fields))
    assert "Resuming after step 40." in out[0] and "2 cpu in 2 process(es)" in out[0]
    found, expected = runs.losses(run), runs.losses(whole)
    assert [row[:2] for row in found] == [row[:2] for row in expected]  # compares steps and tokens
    for a, b in zip(found, expected, strict=True):
        assert [v is None for v in a] == [v is None for v in b]
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=1e-5)


def test_another_batch_goes_on_with_the_next_sample(tmp_path, data):
    """Fault 20: without learning, a loss shows the samples of a step: a step of 16 has those of two steps of 8."""
    fields = {"optimizer__peak_lr": 1e-30, "optimizer__end_lr": 0.0, "checkpoint__keep_last": 10}
    whole = tmp_path / "whole"
    runs.train(whole, data, num_train_steps=STEPS, **fields)
    run = shutil.copytree(whole, tmp_path / "run")
    forget_after(run, 20)
    fields |= {"global_batch_size": 16, "num_train_steps": 40}
    assert "pass --allow_config_change" in one_line(runs.train(run, data, code=2, **fields))
    runs.train(run, data, "--allow_config_change", **fields)
    of_8 = [row["train/loss"] for row in runs.rows(whole) if "train/loss" in row]
    of_16 = [row for row in runs.rows(run) if "train/loss" in row]
    assert [row["tokens"] for row in of_16[20:]] == [32 * (8 * 20 + 16 * n) for n in range(1, 21)]
    pairs = [(a + b) / 2 for a, b in zip(of_8[20::2], of_8[21::2], strict=True)]
    assert [row["train/loss"] for row in of_16[20:]] == pytest.approx(pairs, rel=1e-6)
    assert min(abs(a - b) for a, b in itertools.pairwise(pairs)) > 1e-6, "else any order would do"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"global_batch_size": 6, "mesh__data": 4}, "global_batch_size = 6 is not divisible by mesh.data x"),
        ({"global_batch_size": 6}, "global_batch_size = 6 is not divisible by mesh.data x mesh.fsdp = 4"),
        ({"mesh__data": 3, "global_batch_size": 9}, "4 device"),
        ({"mesh__tensor": 3}, "model.num_heads = 4 is not divisible by mesh.tensor = 3"),
    ],
)  # fmt: skip
def test_what_does_not_divide(tmp_path, data, fields, expected):
    """Fault 21: sizes that do not divide are refused before anything is compiled or written."""
    started = time.monotonic()
    out = runs.train(tmp_path / "run", data, devices=4, code=2, **fields)
    assert expected in one_line(out)
    assert time.monotonic() - started < 15 and not (tmp_path / "run").exists()


# A second job


def test_a_run_that_is_taken_over(tmp_path, data):
    """Fault 22: a second job is refused, and the error names host and pid of the first. --steal_lock makes the first
    job exit, and the losses are still those of one run. The lock of a killed job is released at once."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.train(whole, data, **QUICK)
    first = runs.start(runs.command(run, data, **SLOW | {"checkpoint__every_steps": 20}))
    with runs.ending(first):
        runs.wait_for_rows(run, first, count=100)
        out = runs.train(run, data, **SLOW, code=2)
        assert (
            f"is being trained by {pathlib.Path('/proc/sys/kernel/hostname').read_text().strip()} pid {first.pid};"
            in out
        )
        second = runs.start(runs.command(run, data, "--steal_lock", **SLOW))
        with runs.ending(second):
            lost = runs.finish(first, 2)
            assert "was taken over by" in lost and f"pid {second.pid}" in lost
            written = len(runs.rows(run))
            runs.wait_for_rows(run, second, count=written + 100)
            second.kill()
    out = runs.train(run, data, **QUICK)
    assert "which has ended" in out and "waiting" not in out
    rows, expected = ([row for row in runs.losses(at) if row[2] is not None] for at in (run, whole))  # of training
    assert rows == expected and len(rows) == 800


# Hosts that differ


def copy_of_the_code(folder: pathlib.Path) -> pathlib.Path:
    for package in ("configs", "data", "launch", "model", "trainer"):
        shutil.copytree(runs.ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def gang_that_differs(run, data, cwd: dict[int, pathlib.Path] | None = None, **environment: str) -> list[str]:
    """Returns the output of two processes. Only the second gets `environment`; each may have its own working
    directory."""
    return gang_in(cwd or {}, run, data, code=2, **environment)


def gang_in(cwd: dict[int, pathlib.Path], run, data, code: int, **environment: str) -> list[str]:
    return runs.finish_gang(start_gang(cwd, run, data, **environment), code=code)


def start_gang(cwd: dict[int, pathlib.Path], run, data, **environment: str) -> list[subprocess.Popen]:
    return [
        runs.start(argv, cwd=cwd.get(i, runs.ROOT), **environment if i else {})
        for i, argv in enumerate(commands_of_gang(run, data))
    ]


def commands_of_gang(run, data) -> list[list[str]]:
    flags = (f"--coordinator_address=localhost:{runs.free_port()}", "--num_processes=2")
    return [runs.command(run, data, *flags, f"--process_id={i}", num_train_steps=9) for i in range(2)]


def assert_not_admitted(folders: dict[int, pathlib.Path], run: pathlib.Path, data) -> None:
    """Process 1 must exit with 2, and both must say why. Process 0 keeps waiting for a process in the right folder."""
    first, second = gang = start_gang(folders, run, data)
    with runs.ending(*gang):
        said = f"has --workdir={(folders[1] / run).resolve()}, and process 0 at localhost:"
        line = runs.finish(second, 2)
        assert said in line and f"--workdir={(folders[0] / run).resolve()};" in line
        assert said in wait_for_line(first, "refused: process 1") and first.poll() is None
    assert not (folders[0] / run).exists() and not (folders[1] / run).exists()


def test_other_code(tmp_path, data):
    """Fault 24: code that differs only in a comment is refused, because other parts of it may be outdated, too."""
    code = copy_of_the_code(tmp_path / "code")
    with (code / "trainer/step.py").open("a") as file:
        file.write("# newer\n")
    out = gang_that_differs(tmp_path / "run", data, {1: code}, PYTHONPATH=str(code))
    assert all("(process 1) has another setting: code: " in text for text in out)
    assert not (tmp_path / "run").exists()


def test_another_version_of_a_library(tmp_path, data):
    """Fault 24."""
    info = tmp_path / "packages/optax-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    out = gang_that_differs(tmp_path / "run", data, PYTHONPATH=str(tmp_path / "packages"))
    assert all('(process 1) has another setting: optax: "0.0.1" there' in text for text in out)
    assert not (tmp_path / "run").exists()


def test_another_precision(tmp_path, data):
    """Fault 24: code and versions are equal, but an environment variable changes the arithmetic of one process."""
    out = gang_that_differs(tmp_path / "run", data, JAX_DEFAULT_MATMUL_PRECISION="highest")
    assert all("(process 1) has another setting: jax_default_matmul_precision: " in text for text in out)
    assert not (tmp_path / "run").exists()


def test_another_step(tmp_path, data):
    """Fault 24: a library has the same version on both hosts, but was modified on one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import jax\nplain = jax.nn.silu\njax.nn.silu = lambda x: plain(2 * x) / 2\n"
    )
    out = gang_that_differs(tmp_path / "run", data, PYTHONPATH=str(tmp_path))
    assert all("(process 1) has another step: lowered train step" in text for text in out)
    assert runs.rows(tmp_path / "run") == []


def folders_of_hosts(tmp_path: pathlib.Path, monkeypatch) -> dict[int, pathlib.Path]:
    """A working directory for each of two processes, as if each were on its own host."""
    folders = {i: tmp_path / f"host{i}" for i in range(2)}
    for folder in folders.values():
        folder.mkdir()
        (folder / "configs").symlink_to(runs.ROOT / "configs")
    monkeypatch.setenv("PYTHONPATH", str(runs.ROOT))
    return folders


def test_a_run_directory_that_is_not_shared(tmp_path, data):
    """Fault 24: the path is the same, but each process has its own disk there. A checkpoint with one part on each host
    could never be restored."""
    if os.geteuid():
        pytest.skip("only root can mount a folder for a single process")
    gang, run = [], tmp_path / "runs/run"
    run.parent.mkdir()
    for i, argv in enumerate(commands_of_gang(run, data)):
        (tmp_path / f"disk{i}").mkdir()
        mount = f'mount --bind {tmp_path}/disk{i} {run.parent} && exec "$@"'
        gang.append(runs.start(["unshare", "--mount", "sh", "-c", mount, "sh", *argv]))
    out = runs.finish_gang(gang, code=2)
    assert all(f"--workdir={run} is not the same folder for all processes" in text for text in out)


def test_a_run_directory_in_the_current_folder(tmp_path, data, monkeypatch):
    """Fault 24: the two processes are started in different folders."""
    assert_not_admitted(folders_of_hosts(tmp_path, monkeypatch), pathlib.Path("run"), data)


@pytest.mark.parametrize("how", ["links", "mounts"])
def test_a_run_directory_under_two_names(tmp_path, data, how, monkeypatch):
    """Each host may have its own symlink to one folder. A folder that is mounted in two places is refused, because each
    save by Orbax would fail."""
    (tmp_path / "shared").mkdir()
    folders = folders_of_hosts(tmp_path, monkeypatch)
    if how == "links":
        for folder in folders.values():
            (folder / "shared").symlink_to(tmp_path / "shared")
        gang_in(folders, pathlib.Path("shared/run"), data, code=0)
        assert (tmp_path / "shared/run/checkpoints/9/_CHECKPOINT_METADATA").exists()
        return
    if os.geteuid():
        pytest.skip("only root mounts a folder a second time")
    with contextlib.ExitStack() as mounts:
        for folder in folders.values():
            mounts.enter_context(runs.mounted(folder / "shared", "--bind", tmp_path / "shared"))
        assert_not_admitted(folders, pathlib.Path("shared/run"), data)
