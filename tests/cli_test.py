"""Mistakes at the command line: one line, the documented exit code, no traceback, nothing written."""

import subprocess
import sys

import pytest

from tests import runs


def call(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=runs.ROOT,
        env=runs.environment(8),
        text=True,
        capture_output=True,
        timeout=60,
    )


def assert_one_line(result: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    assert result.returncode == code, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and result.stdout == "", result
    for part in parts:
        assert part in lines[0]


TRAIN = ("launch.train", "--workdir=WORKDIR")
TINY = (*TRAIN, "--config=configs/tiny.py")


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (("launch.train", "--wrkdir=x"), 2, ["--wrkdir", "did you mean --workdir?"]),
        (TRAIN, 2, ["--config is missing"]),
        (("launch.train", "--config=configs/tiny.py"), 2, ["--workdir is missing"]),
        ((*TRAIN, "--config=configs/tyni.py"), 2, ["configs/tyni.py", "did you mean configs/tiny.py?"]),
        ((*TRAIN, "--config=configs/shakespeare_char.py:gpu"), 2, ["no variant 'gpu'", "cpu"]),
        ((*TRAIN, "--config=README.md"), 2, ["README.md"]),
        (
            (*TINY, "--config.model.num_layer=2"),
            2,
            ["--config.model.num_layer;", "did you mean --config.model.num_layers?"],
        ),
        ((*TINY, "--config.num_layers=2"), 2, ["did you mean --config.model.num_layers?"]),
        ((*TINY, "--config.modle.num_layers", "2"), 2, ["did you mean --config.model.num_layers?"]),
        ((*TINY, "--config.model=2"), 2, ["is a section", "num_layers"]),
        ((*TINY, "--config.model.num_layers=many"), 2, ["config.model.num_layers is 'many'", "whole number"]),
        ((*TINY, "--config.model.num_layers=1.5"), 2, ["config.model.num_layers is '1.5'", "whole number"]),
        ((*TINY, "--config.model.bias=maybe"), 2, ["config.model.bias is 'maybe'", "true or false"]),
        ((*TINY, "--config.model.num_layers=0"), 2, ["config.model.num_layers is 0", "at least 1"]),
        ((*TINY, "--config.model.mlp=relu"), 2, ["config.model.mlp is 'relu'", "relu2"]),
        ((*TINY, "--config.model.num_heads=3"), 2, ["num_heads = 3", "embed_dim = 128"]),
        ((*TINY, "--config.mesh.data=7"), 2, ["global_batch_size = 8", "= 7"]),
        ((*TINY, "extra"), 2, ["unexpected argument 'extra'"]),
        ((*TINY, "--config.data.path=nowhere"), 3, ["launch.prepare --source=python-stdlib", "--out=nowhere"]),
        (("launch.prepare", "--source=x"), 2, ["--source and --out"]),
        (("launch.prepare", "--source=nowhere/*.txt", "--out=WORKDIR"), 3, ["nowhere/*.txt", "python-stdlib"]),
        (("launch.prepare", "--source=x", "--out=y", "--tokenizer=word"), 3, ["no tokenizer word", "char"]),
        (("launch.prepare", "--source=x", "--out=y", "--val_fraction=1.5"), 2, ["val_fraction", "1.5"]),
        (("launch.sample",), 2, ["--workdir is missing"]),
        (("launch.sample", "--workdir=WORKDIR"), 2, ["not a run directory"]),
        (("launch.sample", "--workdir=x", "--top_p=2"), 2, ["top_p", "2"]),
        (("launch.sample", "--workdir=x", "--prompt="), 2, ["--prompt is empty"]),
        (("launch.evaluate", "--workdir=WORKDIR"), 2, ["not a run directory"]),
        (("launch.inspect",), 2, ["launch.inspect PATH"]),
        (("launch.inspect", "nowhere"), 3, ["nowhere"]),
        (("launch.inspect", "one", "two"), 2, ["unexpected argument 'two'"]),
        (("launch.inspect", "nowhere", "--seq_len=0"), 2, ["seq_len", "0"]),
        (("launch.inspect", "nowhere/*.bin"), 3, ["nowhere/*.bin"]),
    ],
)
def test_one_line_for_each_mistake(tmp_path, argv, code, parts):
    assert_one_line(call(*(a.replace("WORKDIR", str(tmp_path / "run")) for a in argv)), code, *parts)
    assert not (tmp_path / "run").exists()


def test_mistakes_that_need_the_devices(tmp_path):
    """A batch that does not divide by the eight devices there are; an axis that does not."""
    data = runs.dataset(tmp_path)
    argv = runs.command(tmp_path / "run", data)[2:]
    assert_one_line(
        call(*argv, "--config.global_batch_size=12"), 2, "global_batch_size = 12", "mesh.data x mesh.fsdp = 8"
    )
    too_many = ("--config.mesh.fsdp=16", "--config.global_batch_size=16")
    assert_one_line(call(*argv, *too_many), 2, "mesh.fsdp = 16", "8 devices")
    assert_one_line(call(*argv, "--num_processes=2"), 2, "--coordinator_address", "--process_id")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["train", "prepare", "sample", "evaluate", "inspect", "tokenizer"])
def test_help(module):
    result = call(f"launch.{module}", "--help")
    assert f"python -m launch.{module}" in result.stdout
    wanted = {
        "train": "--[no]allow_config_change",
        "prepare": "--tokenizer",
        "sample": "--workdir",
        "evaluate": "--workdir",
        "inspect": "--seq_len",
        "tokenizer": "--vocab_size",
    }
    assert wanted[module] in result.stdout


def test_prepare_says_what_it_made_and_does_it_once(tmp_path):
    (tmp_path / "text.txt").write_text(runs.text(1000))
    argv = ("launch.prepare", f"--source={tmp_path / 'text.txt'}", f"--out={tmp_path / 'set'}")
    first = call(*argv)
    assert first.returncode == 0 and "900 tokens" in first.stdout and len(first.stdout.splitlines()) == 2
    before = (tmp_path / "set/train-00000.bin").stat().st_mtime_ns
    assert call(*argv).returncode == 0
    assert (tmp_path / "set/train-00000.bin").stat().st_mtime_ns == before
    assert_one_line(call(*argv, "--tokenizer=byte"), 3, "another request", "--overwrite")
    assert call(*argv, "--tokenizer=byte", "--overwrite").returncode == 0
