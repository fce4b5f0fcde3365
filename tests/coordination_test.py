"""Several real processes over loopback (gloo): they train the run of one process, and stop or fail together."""

import dataclasses
import pathlib
import shutil
import signal

import numpy as np
import pytest

from data.token_files import formats
from tests import runs

STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (1, {"mesh__data": 2}),
        (1, {"mesh__fsdp": 2}),
        pytest.param(2, {"mesh__data": 2, "mesh__fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"mesh__data": 2, "mesh__tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["data", "fsdp", "two devices each", "tensor"],
)
def test_two_processes_train_the_run_of_one(tmp_path, data, devices, mesh):
    """The losses are those of one process with the same number of devices; only process 0 prints the report.

    With two devices they are the same bit for bit. With four, gloo adds floats in another order than the collectives
    within one process do, so the last bit of a loss may differ.
    """
    fields = {"num_train_steps": STEPS, "model__dropout": 0.1, **mesh}
    runs.train(tmp_path / "one", data, devices=2 * devices, **fields)
    first, second = runs.finish_gang(runs.start_gang(tmp_path / "two", data, devices=devices, **fields))
    one, two = runs.losses(tmp_path / "one"), runs.losses(tmp_path / "two")
    if devices == 1:
        assert one == two
    else:
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert [v is None for v in a] == [v is None for v in b]
            assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=1e-5)
    assert "Everything is in" in first and "Everything is in" not in second
    assert (tmp_path / "two/log.1.txt").exists()
    # One process resumes from a checkpoint of two processes.
    fields["num_train_steps"] += 5
    assert f"Resuming after step {STEPS}." in runs.train(tmp_path / "two", data, devices=2 * devices, **fields)


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, data):
    """Fault 3."""
    run = tmp_path / "run"
    gang = runs.start_gang(run, data, num_train_steps=100_000, checkpoint__every_steps=0, eval__every_steps=0)
    with runs.ending(*gang):
        runs.wait_for_rows(run, *gang, count=5)
        gang[1].send_signal(signal.SIGTERM)
        first, _ = runs.finish_gang(gang, code=42)
    (step,) = [int(p.name) for p in (run / "checkpoints").iterdir()]
    assert step == runs.rows(run)[-1]["step"]
    assert "Stopped and saved" in first


def test_processes_that_differ_in_config_leave_together(tmp_path, data):
    """Fault 24: the processes would train with different settings and, on gloo, silently sum their gradients."""
    other = {1: {"optimizer__peak_lr": 0.5}}
    out = runs.finish_gang(runs.start_gang(tmp_path / "run", data, num_train_steps=STEPS, per_process=other), code=2)
    assert all("(process 1) has another setting: config.optimizer.peak_lr: 0.5 there, 0.001 on" in text for text in out)
    assert not (tmp_path / "run").exists()


def test_processes_of_another_environment_leave_together_and_another_life_is_told(tmp_path, data):
    """If their XLA flags differ, the processes would silently compile different programs."""
    fast = "--xla_cpu_enable_fast_math=true"
    run, other = tmp_path / "run", {"XLA_FLAGS": f"{runs.environment()['XLA_FLAGS']} {fast}"}
    out = runs.finish_gang(runs.start_gang(run, data, num_train_steps=2, environments={1: other}), code=2)
    assert all("(process 1) has another setting: XLA_FLAGS: " in text for text in out) and not run.exists()
    runs.train(run, data, num_train_steps=2)
    again = runs.finish(runs.start(runs.command(run, data, num_train_steps=4), **other))
    (line,) = (line for line in again.splitlines() if line.startswith("changed   the environment: XLA_FLAGS '"))
    assert line.count(fast) == 1 and line.endswith("'; results may differ from here on")


def test_processes_that_see_other_files_under_one_path_leave_together(tmp_path, data):
    """Fault 24: the same command runs on two machines whose disks differ; stale and new data must not be mixed."""
    gang, address = [], f"--coordinator_address=localhost:{runs.free_port()}"
    for i in range(2):
        machine = tmp_path / f"machine{i}"
        machine.mkdir()
        (machine / "configs").symlink_to(runs.ROOT / "configs")
        tokens = np.fromfile(data / "train-00000.bin", "<u2")
        tokens[1000] += i
        tokens.tofile(machine / "train.bin")
        flags = (address, "--num_processes=2", f"--process_id={i}")
        argv = runs.command(tmp_path / "run", pathlib.Path("train.bin"), *flags, model__vocab_size=300)
        gang.append(runs.start(argv, cwd=machine, PYTHONPATH=str(runs.ROOT)))
    assert all("(process 1) has another dataset: tokens and order" in text for text in runs.finish_gang(gang, code=2))
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_in_training_is_one_of_all(tmp_path, data):
    """The other processes used to fail in a collective and exit with 42, and were restarted three times."""
    bad = shutil.copytree(data, tmp_path / "bad")
    tokens = np.fromfile(bad / "train-00000.bin", "<u2")
    tokens[len(tokens) // 2] = 25  # only one of the two processes reads this window
    tokens.tofile(bad / "train-00000.bin")
    manifest = formats.read_manifest(bad)
    (shard,) = manifest.splits["train"].shards
    shard = dataclasses.replace(shard, sha256=formats.sha256_file(bad / "train-00000.bin"))
    train = dataclasses.replace(manifest.splits["train"], shards=(shard,))
    manifest = dataclasses.replace(manifest, splits=manifest.splits | {"train": train})
    (bad / formats.MANIFEST).write_text(manifest.to_json())
    out = runs.finish_gang(runs.start_gang(tmp_path / "run", bad, num_train_steps=1000, eval__every_steps=0), code=3)
    lines = [text.splitlines()[-1] for text in out]
    assert all("token id 25 in the train split is outside the vocabulary of 19" in line for line in lines)
    assert sum("(process " in line for line in lines) == 1, "one had it, and the other heard of it"


def test_divergence_is_found_by_all(tmp_path, data):
    flags = {"optimizer__peak_lr": 1e18, "optimizer__warmup_steps": 0, "optimizer__clip_norm": 0.0}
    out = runs.finish_gang(runs.start_gang(tmp_path / "run", data, num_train_steps=STEPS, **flags), code=4)
    assert all("is not finite" in text for text in out)
