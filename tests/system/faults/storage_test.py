"""Disks that are full, read-only or damaged, with real processes: the model never gets worse, and no run silently
starts from scratch."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests import object_store, runs
from tests.checkpoint_test import flip_a_bit_in_the_parameters
from tests.system.faults import interrupted
from tests.system.faults.interrupted import WHOLE_STEPS as STEPS

pytestmark = pytest.mark.slow
# An evaluation of the full split after each step takes most of the time, which leaves time to inject faults.
SLOW = {"num_train_steps": 150, "eval__every_steps": 1, "eval__num_windows": 0, "checkpoint__every_steps": 50}


@pytest.fixture(scope="module")
def slow_whole(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("runs") / "slow"
    runs.train(run, data, **SLOW)
    return run


@contextlib.contextmanager
def disk(folder: pathlib.Path, megabytes: float, options: str = ""):
    """Mounts a small disk at `folder`."""
    if os.geteuid():
        pytest.skip("only root mounts a small disk")
    with runs.mounted(folder, "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k{options}", "tmpfs"):
        yield folder


def fill(folder: pathlib.Path) -> pathlib.Path:
    """Fills the disk with a file and returns the file: deleting it frees the space again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return ballast


def steps(run: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def copies(mirror: pathlib.Path) -> list[int]:
    """The complete steps of a mirror. (tensorstore leaves empty folders behind.)"""
    return sorted(int(path.parent.name) for path in mirror.glob("checkpoints/*/_CHECKPOINT_METADATA"))


def quarantined(run: pathlib.Path) -> list[int]:
    return sorted(int(path.name.split(".")[0]) for path in (run / "quarantine").iterdir())


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    """The output up to and including the first line that contains `text`."""
    out = ""
    for line in process.stdout:
        out += line
        if text in line:
            return out
    raise AssertionError(f"ended without {text!r}:\n{out}")


def last_line(out: str) -> str:
    assert "Traceback" not in out, out
    return out.splitlines()[-1]


# Data


def test_a_token_outside_the_vocabulary_at_the_start(tmp_path, data):
    """Fault 10."""
    tokens = np.fromfile(data / "train-00000.bin", "<u2")
    tokens[30_000] |= 0x8000
    tokens.tofile(tmp_path / "train.bin")
    out = runs.train(tmp_path / "run", tmp_path / "train.bin", model__vocab_size=300, num_train_steps=9, code=3)
    assert "train.bin" in last_line(out) and "327" in last_line(out) and len(out.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_token_outside_the_vocabulary_in_mid_run(tmp_path, data):
    """Fault 10: the file is overwritten after it was checked. The run ends, and its earlier checkpoints are intact."""
    shutil.copytree(data, tmp_path / "data")
    run, shard = tmp_path / "run", tmp_path / "data/train-00000.bin"
    process = runs.start(runs.command(run, tmp_path / "data", **SLOW | {"checkpoint__every_steps": 5}))
    with runs.ending(process):
        runs.wait_until(lambda: len(runs.rows(run)) > 20, process)
        with shard.open("r+b") as file:
            file.write(b"\xff" * shard.stat().st_size)
        line = last_line(runs.finish(process, 3))
    assert "token id 65535" in line and "train-00000.bin" in line
    before = runs.rows(run)
    shutil.copy(data / "train-00000.bin", shard)
    runs.train(run, tmp_path / "data", **SLOW | {"num_train_steps": steps(run)[-1], "checkpoint__every_steps": 5})
    assert runs.rows(run)[: len(before)][:20] == before[:20]


@pytest.mark.parametrize("how", ["file", "flag"])
def test_validation_data_that_is_missing(tmp_path, data, how):
    """Fault 11: the error comes at the start and not only at the first evaluation."""
    shutil.copytree(data, tmp_path / "data")
    fields = {}
    if how == "file":
        (tmp_path / "data/val-00000.bin").unlink()
    else:
        shutil.move(tmp_path / "data/train-00000.bin", tmp_path / "train.bin")
        fields = {"data__val_path": tmp_path / "val*.bin", "model__vocab_size": 300}
    path = tmp_path / ("data" if how == "file" else "train.bin")
    out = runs.train(tmp_path / "run", path, num_train_steps=9, code=3, **fields)
    assert ("val-00000.bin is missing" if how == "file" else "val*.bin") in last_line(out)
    assert runs.rows(tmp_path / "run") == []


# Full disks


def test_full_in_mid_run(tmp_path, data, slow_whole):
    """Fault 12: an error is logged, and the old step is intact. Soon after there is space, a save succeeds, before one
    is due.

    Rows that could not be written are written later, and TensorBoard does not hang.
    """
    with disk(tmp_path / "disk", 6) as mounted:
        run = mounted / "run"
        process = runs.start(runs.command(run, data, **SLOW, metrics__tensorboard=True))
        with runs.ending(process):
            runs.wait_until(lambda: (run / "checkpoints/50").exists(), process)
            ballast = fill(mounted)
            out = wait_for_line(process, "FAILED")
            assert "checkpoint at step 100 FAILED, training continues" in out
            assert steps(run) == [50]
            out += wait_for_line(process, "val/loss") + wait_for_line(process, "val/loss")  # the loop has noticed
            process.send_signal(signal.SIGSTOP)  # otherwise the run may end before the retry is due
            ballast.unlink()
            time.sleep(10.5)
            process.send_signal(signal.SIGCONT)
            out += runs.finish(process)
        assert "metrics.jsonl CANNOT BE WRITTEN" in out and "metrics.jsonl is written again" in out
        assert "Logging error" not in out
        saved = steps(run)
        assert saved[-1] == 150 and any(100 < step < 150 for step in saved)
        assert len(list((run / "checkpoints").iterdir())) == len(saved), "what failed takes no room"
        assert runs.losses(run) == runs.losses(slow_whole)


@pytest.mark.parametrize("who", [0, 1])
def test_full_for_one_of_two_processes(tmp_path, data, reference, who):
    """Fault 12: one process gives up a save; the other still waits for it and skips the next. Training continues, and
    later saves succeed."""
    run = tmp_path / "run"
    gang = interrupted.start_gang(run, data, checkpoint__every_steps=20)
    with runs.ending(*gang):
        runs.wait_until(lambda: len(interrupted.saved(run)) > 1, *gang)
        with runs.quota(gang[who]):
            wait_for_line(gang[who], "FAILED")
            wait_for_line(gang[1 - who], "SKIPPED")
        last, since = interrupted.saved(run)[-1], time.monotonic()
        runs.wait_until(lambda: interrupted.saved(run)[-1] > last, *gang)
        print("until a save succeeds again:", time.monotonic() - since)
        gang[0].send_signal(signal.SIGTERM)
        for process in gang:
            runs.finish(process, 42)
    assert interrupted.saved(run)[-1] == runs.rows(run)[-1]["step"]
    assert interrupted.trained(run)[: interrupted.STEPS] == interrupted.trained(reference)


def test_full_at_the_last_save(tmp_path, data, slow_whole):
    """Fault 12: if its last state is not saved, a run has failed; the same command resumes it when there is space."""
    with disk(tmp_path / "disk", 6) as mounted:
        run = mounted / "run"
        argv = runs.command(run, data, **SLOW)
        process = runs.start(argv)
        with runs.ending(process):
            runs.wait_until(lambda: (run / "checkpoints/100").exists(), process)
            ballast = fill(mounted)
            out = runs.finish(process, 3)
        (line,) = [line for line in out.splitlines() if line.startswith("error: ")]  # Orbax's threads print other lines
        assert "step 150 could not be written; make room in" in line and "from step 100" in line
        assert steps(run) == [50, 100]
        assert runs.finish(runs.start(argv), 2).count("\n") == 1  # the disk is still full
        ballast.unlink()
        runs.finish(runs.start(argv))
        assert runs.losses(run) == runs.losses(slow_whole) and steps(run)[-1] == 150


def test_full_at_the_start(tmp_path, data):
    """Fault 12: the start fails with one line and exit code 2, because another --workdir or more space is needed."""
    with disk(tmp_path / "disk", 1) as mounted:
        fill(mounted)
        out = runs.train(mounted / "run", data, num_train_steps=9, code=2)
        assert "No space left" in last_line(out) and len(out.splitlines()) == 1


@pytest.mark.parametrize("how", ["read-only", "below a file"])
def test_a_run_directory_that_cannot_be_written(tmp_path, data, how):
    """Fault 13."""
    (tmp_path / "file").write_text("")
    with disk(tmp_path / "disk", 1, ",ro") if how == "read-only" else contextlib.nullcontext(tmp_path / "file") as at:
        out = runs.train(at / "run", data, num_train_steps=9, code=2)
    assert f"cannot write to --workdir={at / 'run'}" in last_line(out) and len(out.splitlines()) == 1


# Damaged checkpoints


def largest_of(step: pathlib.Path, part: str) -> pathlib.Path:
    return max((p for p in step.rglob(part) if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_flipped_bit(tmp_path, data, whole):
    """Fault 14: the run resumes from the checkpoint before, and its losses are the same bit for bit."""
    run = shutil.copytree(whole, tmp_path / "run")
    flip_a_bit_in_the_parameters(run / "checkpoints/60")
    out = runs.train(run, data, num_train_steps=STEPS)
    assert f"checkpoint {run}/checkpoints/60" in out and "Resuming after step 50." in out
    assert quarantined(run) == [60] and steps(run)[-1] == 60
    assert runs.losses(run) == runs.losses(whole)


def test_partial_steps_in_every_way(tmp_path, data, whole):
    """Fault 15: each incomplete step is quarantined with a reason, and the newest complete step is used."""
    run = shutil.copytree(whole, tmp_path / "run")
    at = run / "checkpoints"
    (at / "80").mkdir()
    shutil.copytree(at / "60", at / "70")
    (at / "70/_CHECKPOINT_METADATA").unlink()
    cut(at / "60/params/_METADATA")
    cut(largest_of(at / "50", "d/*"))
    cut(at / "40/opt_state/manifest.ocdbt")
    largest_of(at / "30/params", "d/*").unlink()
    cut(at / "20/_CHECKPOINT_METADATA")
    out = runs.train(run, data, num_train_steps=STEPS)
    assert quarantined(run) == [20, 30, 40, 50, 60, 70, 80] and "Resuming after step 10." in out
    assert out.count("; moved ") == 7
    assert runs.losses(run) == runs.losses(whole)


def test_every_step_bad(tmp_path, data, whole):
    """Fault 16: a start fails instead of silently starting from scratch, also the second time."""
    run = shutil.copytree(whole, tmp_path / "run")
    for step in (run / "checkpoints").iterdir():
        flip_a_bit_in_the_parameters(step)
    for _ in range(2):
        assert "no usable checkpoint" in last_line(runs.train(run, data, num_train_steps=STEPS, code=3))
    assert runs.losses(run) == runs.losses(whole), "what it has done is not cut off"


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_that_one_of_two_processes_sees(tmp_path, data, gang_run, damage):
    """Faults 14 and 15: each process reads its own shard. If one shard is damaged, the other process must neither wait
    nor restore another step."""
    run = shutil.copytree(gang_run, tmp_path / "run")
    path = largest_of(run / "checkpoints/20/params/ocdbt.process_1", "d/*")
    if damage == "cut":
        cut(path)
    else:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0x10
        path.write_bytes(raw)
    started = time.monotonic()
    out = runs.finish_gang(runs.start_gang(run, data, num_train_steps=20, mesh__fsdp=2))
    assert "Resuming after step 10." in out[0] and quarantined(run) == [20]
    assert runs.losses(run) == runs.losses(gang_run)
    assert time.monotonic() - started < 60


@pytest.fixture(scope="module")
def gang_run(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("runs") / "two"
    runs.finish_gang(runs.start_gang(run, data, num_train_steps=20, mesh__fsdp=2))
    return run


# The mirror


def train_in_two(run: pathlib.Path, data: pathlib.Path, mirror: str, **environment: str) -> int:
    """Stops a run and resumes it to its end; both parts wait for the copy of their last step. Returns the step of the
    stop."""
    argv = runs.command(run, data, **SLOW, checkpoint__mirror=mirror)
    process = runs.start(argv, **environment)
    with runs.ending(process):
        runs.wait_until(lambda: (run / "checkpoints/100").exists(), process)
        process.send_signal(signal.SIGTERM)
        runs.finish(process, 42)
    stopped = steps(run)[-1]
    runs.finish(runs.start(argv, **environment))
    return stopped


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory, data, slow_whole):
    """(a folder with a run and its mirror, which have the same two steps; the first of these steps)."""
    folder = tmp_path_factory.mktemp("mirrored")
    stopped = train_in_two(folder / "run", data, folder / "mirror")
    assert copies(folder / "mirror") == steps(folder / "run") == [stopped, 150]
    assert runs.losses(folder / "run") == runs.losses(slow_whole)
    return folder, stopped


def test_checkpoints_come_back_from_the_mirror(tmp_path, data, slow_whole, mirrored):
    """Faults 14 to 16: no local checkpoint is usable, nor is the newest copy; the copy before it is usable."""
    folder, stopped = mirrored
    shutil.copytree(folder, tmp_path / "here")
    run, mirror = tmp_path / "here/run", tmp_path / "here/mirror"
    for step in (run / "checkpoints").iterdir():
        flip_a_bit_in_the_parameters(step)
    flip_a_bit_in_the_parameters(mirror / "checkpoints/150")
    out = runs.train(run, data, **SLOW, checkpoint__mirror=mirror)
    assert f"fetched   step {stopped}" in out and f"Resuming after step {stopped}." in out
    assert quarantined(run) == [stopped, 150, 150]
    assert runs.losses(run) == runs.losses(slow_whole)
    shutil.rmtree(run / "checkpoints")  # the last step was copied again, so its copy is intact
    assert "already has its 150 steps" in runs.train(run, data, **SLOW, checkpoint__mirror=mirror)


@pytest.mark.parametrize("how", ["full", "gone"])
def test_a_mirror_that_fails_does_not_disturb_the_run(tmp_path, data, slow_whole, how):
    """Fault 12, in the mirror: the failure is logged, and the run is not affected."""
    with disk(tmp_path / "disk", 0.6) if how == "full" else contextlib.nullcontext(tmp_path) as at:
        mirror = at / "mirror"
        process = runs.start(runs.command(tmp_path / "run", data, **SLOW, checkpoint__mirror=mirror))
        with runs.ending(process):
            if how == "gone":
                runs.wait_until(lambda: (mirror / "config.json").exists(), process)
                shutil.rmtree(mirror)
                mirror.write_text("no folder any more")
                process.send_signal(signal.SIGSTOP)  # until the next heartbeat of the mirror's lock is due
                time.sleep(10.5)
                process.send_signal(signal.SIGCONT)
            out = runs.finish(process)
    assert "was NOT copied to" in out and "Traceback" not in out
    assert how == "full" or "cannot renew the lock" in out  # the lock is renewed every 10 s
    assert steps(tmp_path / "run")[-1] == 150 and runs.losses(tmp_path / "run") == runs.losses(slow_whole)


def test_the_mirror_of_another_run_is_refused(tmp_path, data, mirrored):
    """Otherwise this run would resume from the other's checkpoints, or delete them."""
    mirror = mirrored[0] / "mirror"
    before = copies(mirror)
    out = runs.train(tmp_path / "run", data, seed=1, checkpoint__mirror=mirror, code=2)
    assert "holds another run's checkpoints (config.seed: 0 -> 1" in last_line(out)
    assert copies(mirror) == before


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_mirror_in_an_object_store(tmp_path, data, slow_whole, scheme):
    """The local checkpoints are lost with their machine; the mirror is sufficient to resume."""
    run, at, mirror = tmp_path / "run", "some/run/checkpoints", f"{scheme}://bucket/some/run"
    with object_store.running() as store:
        stopped = train_in_two(run, data, mirror, **store.environment)
        shutil.rmtree(run / "checkpoints")
        damaged = [key for key in store.objects if key.startswith(f"{at}/150/params/d/")]
        for key in damaged:
            store.put(key, store.objects[key][:-1])
        argv = runs.command(run, data, **SLOW, checkpoint__mirror=mirror)
        out = runs.finish(runs.start(argv, **store.environment))
    assert damaged and f"Resuming after step {stopped}." in out and quarantined(run) == [150]
    assert runs.losses(run) == runs.losses(slow_whole)
