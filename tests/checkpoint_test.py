"""Checkpoints: restores on any mesh, retention, and damage, which must never be restored silently."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import resource
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.memory_store import Gang
from tests.step_test import MESHES, config, mesh_of
from trainer.config import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.reliability import reading
from trainer.reliability.checkpoint import Checkpoints, LiteralPath, checksums, choose_step
from trainer.reliability.mirror import MIRRORS, Mirror
from trainer.reliability.reading import Suspect, Unreadable
from trainer.state import Program, TrainState

KEEP_ALL = CheckpointConfig(keep_last=100)


@pytest.fixture(scope="module")
def program():
    return Program(config(), mesh_of("one"))


@pytest.fixture(scope="module")
def state(program):
    """A state in which all leaves differ, as they do after some steps."""
    noisy = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape, x.dtype) if x.ndim else x, program.init()
    )
    return dataclasses.replace(noisy, step=jnp.int32(0))


def save(
    run: pathlib.Path, state: TrainState, *steps: int, keep: CheckpointConfig = KEEP_ALL, losses=None
) -> Checkpoints:
    checkpoints = Checkpoints(run, keep)
    checkpoints.val_losses = dict(zip(steps, losses or (), strict=False))
    for step in steps:
        checkpoints.save(step, state, {"samples": 16 * step})
    assert checkpoints.wait()
    return checkpoints


def assert_same(a: TrainState, b: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get((s.params, s.opt_state)) for s in (a, b)))


@pytest.mark.parametrize("saved", MESHES)
def test_saved_on_one_mesh_restores_on_each_of_the_others(tmp_path, state, saved):
    there = Program(config(), mesh_of(saved))
    moved = jax.device_put(state, jax.tree.map(lambda s: s.sharding, there.state))
    save(tmp_path, moved, 7)
    for name in MESHES:
        mesh = mesh_of(name)
        here = Program(config(), mesh)
        restored, meta = Checkpoints(tmp_path).restore(here, 7)
        assert_same(restored, state)
        assert int(restored.step) == 7 and meta["step"] == 7 and meta["samples"] == 112
        wanted = jax.tree.map(lambda s: s.sharding, (here.state.params, here.state.opt_state))
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding} is not {s}"),
                     (restored.params, restored.opt_state), wanted)  # fmt: skip


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path, program, state):
    copy = jax.tree.map(jnp.copy, state)
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    checkpoints.save(1, copy, {"samples": 0})
    overwritten = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(copy)
    jax.block_until_ready(overwritten)
    assert checkpoints.wait()
    assert_same(checkpoints.restore(program, 1)[0], state)


def test_parameters_alone(tmp_path, program, state):
    save(tmp_path, state, 3)
    shutil.rmtree(tmp_path / "checkpoints/3/opt_state/d")  # the optimizer state is not even read
    params, meta = Checkpoints(tmp_path).restore_params(program, 3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(state.params))
    part, _ = Checkpoints(tmp_path).restore_params(program, 3, ["embedding", "layers.mlp.up.kernel"], meta)
    assert jax.tree.structure(part) == jax.tree.structure({"embedding": 0, "layers": {"mlp": {"up": {"kernel": 0}}}})
    np.testing.assert_array_equal(part["layers"]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"])


def test_parameters_of_two_saves_are_not_mixed(tmp_path, program, state):
    save(tmp_path, state, 3)
    _, meta = Checkpoints(tmp_path).restore_params(program, 3, ["embedding"])
    shutil.rmtree(tmp_path / "checkpoints/3")
    save(tmp_path, jax.tree.map(lambda x: x + 1, state), 3)
    with pytest.raises(CheckpointError, match=r"step 3 in .* was replaced while it was read"):
        Checkpoints(tmp_path).restore_params(program, 3, ["embedding"], meta)


def test_retention(tmp_path, state):
    """Keeps the last two steps, every multiple of four, and the best step."""
    keep = CheckpointConfig(keep_last=2, keep_every_steps=4, keep_best=1)
    checkpoints = save(tmp_path, state, 1, 2, 3, 4, 5, 6, 7, keep=keep, losses=[9, 1, 8, 7, 6, 5, 4])
    assert checkpoints.steps() == [2, 4, 6, 7]


def test_what_cannot_be_read_for_a_moment_is_not_deleted(tmp_path, state, monkeypatch):
    """Nothing is deleted while steps cannot be read, and the best step stays."""
    keep = CheckpointConfig(keep_last=1, keep_best=1)
    checkpoints = save(tmp_path, state, 1, 2, keep=keep, losses=[1, 9])
    real = pathlib.Path.stat

    def stat(path, **how):
        if "/checkpoints/1/" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, **how)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "stat", stat)
        checkpoints.save(3, state, {"samples": 0})
        assert checkpoints.wait()
        checkpoints.delete_old()  # the training loop calls it at its end
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.save(4, state, {"samples": 0})
    assert checkpoints.wait() and checkpoints.steps() == [1, 4]


def test_the_best_stays_when_metrics_are_lost_and_of_each_number_of_windows(tmp_path, program, state):
    keep = CheckpointConfig(keep_last=1, keep_best=1)
    checkpoints = Checkpoints(tmp_path, keep)
    for step, loss, windows in ((1, 1.0, 8), (2, 5.0, 16), (3, 6.0, 16), (4, 0.5, None), (5, 0.6, None), (6, 9.0, 16)):
        checkpoints.save(step, state, {"samples": 0})
        assert checkpoints.wait()
        checkpoints.val_losses[step], checkpoints.val_windows[step] = loss, windows
    checkpoints.save(7, state, {"samples": 0})
    assert checkpoints.wait() and checkpoints.steps() == [1, 2, 4, 7]
    checkpoints = Checkpoints(tmp_path, keep)
    _, meta = checkpoints.restore_newest(program)
    checkpoints.set_evaluations({row["step"]: row for row in meta["evaluations"]})
    checkpoints.save(8, state, {"samples": 0})
    assert checkpoints.wait() and checkpoints.steps() == [1, 2, 4, 8]


def test_nothing_saved_is_a_fresh_run(tmp_path, program):
    assert Checkpoints(tmp_path, KEEP_ALL).restore_newest(program) is None


def flip_a_bit_in_the_parameters(step: pathlib.Path) -> None:
    """The bit is in the middle of the largest data file. Orbax itself may restore such a file without an error."""
    largest = max(
        (p for p in (step / "params").rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size
    )
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    largest.write_bytes(raw)


def test_a_flipped_bit_is_found_and_the_step_before_is_used(tmp_path, program, state):
    save(tmp_path, state, 5, 10)
    flip_a_bit_in_the_parameters(tmp_path / "checkpoints/10")
    with pytest.raises(CheckpointError, match="10"):
        Checkpoints(tmp_path).restore_params(program, 10)
    restored, _ = Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
    assert int(restored.step) == 5
    assert [p.name.split(".")[0] for p in (tmp_path / "quarantine").iterdir()] == ["10"]
    checkpoints = save(tmp_path, state, 10)  # the step can be written again
    assert checkpoints.steps() == [5, 10]


def test_checksums_see_any_single_bit():
    x = np.arange(1000, dtype=np.float32)
    for bit in range(0, 32, 5):
        y = x.copy()
        y.view(np.uint32)[777] ^= np.uint32(1 << bit)
        assert checksums({"x": jnp.asarray(x)}) != checksums({"x": jnp.asarray(y)})


def test_a_step_that_lacks_parts_is_moved_away(tmp_path, program, state):
    """An empty directory named like a newer step would otherwise be taken for the latest."""
    save(tmp_path, state, 5)
    (tmp_path / "checkpoints/30").mkdir()
    (tmp_path / "checkpoints/31.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints/32.fetched").mkdir()  # a start was killed before it had verified this copy
    restored, _ = Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
    assert int(restored.step) == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5"]


@pytest.mark.parametrize("lost", ["params", "_CHECKPOINT_METADATA"])
def test_when_all_steps_lack_parts_nothing_is_moved(tmp_path, program, state, lost):
    save(tmp_path, state, 5, 10)
    for part in tmp_path.glob(f"checkpoints/*/{lost}"):
        part.rename(tmp_path / f"{lost}.{part.parent.name}")
    with pytest.raises(CheckpointError, match="10, 5 are incomplete; nothing was moved"):
        Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "5"] and not (tmp_path / "quarantine").exists()


def lost_folder(run: pathlib.Path) -> None:
    (run / "checkpoints").rename(run.parent / "elsewhere")


def lost_steps(run: pathlib.Path) -> None:
    for step in list((run / "checkpoints").iterdir()):
        step.rename(step.with_suffix(".bak"))


def disk_that_is_not_mounted(run: pathlib.Path) -> None:
    lost_folder(run)
    (run.parent / "disk").mkdir()
    (run / "checkpoints").symlink_to(run.parent / "disk")


@pytest.mark.parametrize("lose", [lost_folder, lost_steps, disk_that_is_not_mounted])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path, program, state, lose):
    run = tmp_path / "run"
    save(run, state, 5)
    lose(run)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="has saved checkpoints, but none is left"):
            Checkpoints(run, KEEP_ALL).restore_newest(program)


def test_nothing_moves_until_another_step_was_restored(tmp_path, program, state):
    """If every step seems to be damaged, something else may be the cause, so all steps stay."""
    save(tmp_path, state, 5, 10)
    flip_a_bit_in_the_parameters(tmp_path / "checkpoints/10")
    flip_a_bit_in_the_parameters(tmp_path / "checkpoints/5")
    with pytest.raises(CheckpointError, match="nothing was moved"):
        Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
    assert Checkpoints(tmp_path).steps() == [5, 10] and not (tmp_path / "quarantine").exists()


@pytest.mark.parametrize("name", ["a [b]", "[x]", "*", "run?", "**", "a]b[c", "[!x]", "{a,b}", "~", "%s", "né \t"])
def test_a_run_of_any_name(tmp_path, program, state, name):
    """A library globs for the files it wrote. It found none here: all checkpoints were empty, with exit code 0."""
    checkpoints = save(tmp_path / name / "run", state, 5)
    assert checkpoints.steps() == [5]
    assert_same(Checkpoints(tmp_path / name / "run", KEEP_ALL).restore_newest(program)[0], state)


def test_a_commit_counts_when_what_was_written_can_be_found(tmp_path, state, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    checkpoints = save(tmp_path, state, 5)
    monkeypatch.setattr(LiteralPath, "glob", lambda path, pattern: iter(()))  # brackets in the name had this effect
    checkpoints.save(10, state, {"samples": 0})
    assert not checkpoints.wait() and "step 10 FAILED" in caplog.text
    assert checkpoints.steps() == [5] and len(list((tmp_path / "quarantine").iterdir())) == 1
    monkeypatch.undo()
    checkpoints.save(10, state, {"samples": 0})
    assert checkpoints.wait() and checkpoints.steps() == [5, 10]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES])  # reading_test has the other codes
@pytest.mark.parametrize("place", ["open", "metadata", "load"])
def test_what_cannot_be_read_is_not_damaged(tmp_path, program, state, monkeypatch, code, place):
    """A temporary error has no effect; a lasting error ends the start with its reason, and nothing is moved."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0, 0.0))
    save(tmp_path, state, 5, 10)
    failures = 2

    def failing(function):
        def fails_first(*arguments, **named):
            nonlocal failures
            failures -= 1
            if failures < 0:
                return function(*arguments, **named)
            if place == "open":
                raise OSError(code, os.strerror(code), str(arguments[0]))
            raise ValueError(f"UNKNOWN: Failed to open: {os.strerror(code)} [os_error_code='{code}']")

        return fails_first

    owner, name = {
        "open": (pathlib.Path, "read_bytes"),
        "metadata": (ocp.handlers.PyTreeHandler, "metadata"),
        "load": (ocp.handlers.PyTreeHandler, "load"),
    }[place]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    restored, _ = Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
    assert int(restored.step) == 10
    failures = 1000
    with pytest.raises(Unreadable, match=os.strerror(code)) as e:
        Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
    assert e.value.exit_code == (3 if code == errno.EACCES else 42)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "saved_step"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "5"]


def test_a_step_that_is_committed_is_not_saved_again(tmp_path, program, state):
    """A process that learns of a failure late saves the same step again. If the state differs, the old step stays."""
    checkpoints = save(tmp_path, state, 5)
    before = (tmp_path / "checkpoints/5/_CHECKPOINT_METADATA").read_bytes()
    checkpoints.failed = True
    checkpoints.save(5, state, {"samples": 0})
    assert checkpoints.wait() and not checkpoints.failed
    checkpoints.save(5, jax.tree.map(lambda x: x + 1, state), {"samples": 0})
    assert not checkpoints.wait()
    assert (tmp_path / "checkpoints/5/_CHECKPOINT_METADATA").read_bytes() == before
    assert_same(checkpoints.restore(program, 5)[0], state)


def test_the_limit_of_a_save_learns(tmp_path, state, monkeypatch):
    """Storage that needs longer than the limit must not fail every save forever."""
    monkeypatch.setattr("trainer.reliability.checkpoint.SAVE_TIMEOUT_S", 0.2)
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)

    class Slow:
        """A save that takes a second and writes nothing, so the speed of the machine does not matter."""

        def result(self):
            time.sleep(min(1.0, checkpoints._limit_s))
            if checkpoints._limit_s < 1.0:
                raise TimeoutError("timed out")

    monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *_, **__: Slow())
    monkeypatch.setattr(checkpoints, "_check_commit", lambda step: {})
    for step in range(1, 10):
        checkpoints.save(step, state, {"samples": 0})
        if checkpoints.wait():
            break
    assert step == 4  # limits of 0.2, 0.4, 0.8 and 1.6 s
    assert checkpoints._limit({"x": types.SimpleNamespace(nbytes=10**12)}) >= 10**12 / 50e6


def test_one_that_cannot_write_makes_no_save_of_the_others_slower(tmp_path):
    """A process fails at once, and the others time out, which used to double the limit. All have the same limit."""
    gang, one_gb = Gang(3), {"x": types.SimpleNamespace(nbytes=3 * 10**9)}
    made = gang.all(lambda p: Checkpoints(tmp_path, KEEP_ALL, p))

    def limit(save_s: list[float], timeouts: list[int]) -> float:
        for i, checkpoints in enumerate(made):
            checkpoints._save_s, checkpoints._timeouts = save_s[i], timeouts[i]
        (limit,) = set(gang.all(lambda p: made[p.index]._limit(one_gb)))
        return limit

    assert limit([0, 0, 0], [0, 0, 0]) == 300
    assert limit([0, 0, 0], [1, 0, 1]) == 300
    assert limit([0, 0, 0], [1, 1, 1]) == 600
    assert limit([2, 20, 2], [0, 0, 0]) == 200
    assert limit([2, 20, 2], [9, 9, 9]) == 6 * 3600


def test_a_run_on_two_disks(tmp_path, program, state, monkeypatch):
    """checkpoints/ may be a link: damaged steps go to a quarantine on the same disk."""
    real = pathlib.Path.rename

    def disk(path):
        return tmp_path / "disk" in pathlib.Path(path).parent.resolve().parents

    def rename(path, target):
        if disk(path) != disk(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    (tmp_path / "run").mkdir()
    (tmp_path / "disk/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    save(tmp_path / "run", state, 5, 10)
    (tmp_path / "run/checkpoints/10/_CHECKPOINT_METADATA").unlink()
    restored, _ = Checkpoints(tmp_path / "run", KEEP_ALL).restore_newest(program)
    assert int(restored.step) == 5 and not (tmp_path / "run/quarantine").exists()
    (moved,) = os.listdir(tmp_path / "disk/checkpoints/quarantine")
    assert moved.startswith("10.")


def test_a_step_that_is_a_link_is_deleted_without_what_it_leads_to(tmp_path, state):
    save(tmp_path, state, 5)
    (tmp_path / "archive").mkdir()
    (tmp_path / "checkpoints/5").rename(tmp_path / "archive/5")
    (tmp_path / "checkpoints/5").symlink_to(tmp_path / "archive/5")
    (tmp_path / "checkpoints/3.deleting").symlink_to(tmp_path / "archive/5")  # an earlier version left such links
    checkpoints = save(tmp_path, state, 6, keep=CheckpointConfig(keep_last=1, keep_best=0))
    assert checkpoints.steps() == [6] and os.listdir(tmp_path / "checkpoints") == ["6"]
    assert (tmp_path / "archive/5/_CHECKPOINT_METADATA").exists()


def test_every_step_bad_is_an_error_not_a_fresh_start(tmp_path, program, state):
    save(tmp_path, state, 5)
    flip_a_bit_in_the_parameters(tmp_path / "checkpoints/5")
    for _ in range(2):  # the second start fails, too
        with pytest.raises(CheckpointError, match="no usable checkpoint") as error:
            Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)
        assert error.value.exit_code == 3


def test_another_model_does_not_restore_and_is_no_damage(tmp_path, state):
    save(tmp_path, state, 5)
    wider = Program(config(model={"mlp_dim": 64}), mesh_of("one"))
    with pytest.raises(ConfigError, match=r"down.kernel is float32\[2, 128, 32\] there and float32\[2, 64, 32\] here"):
        Checkpoints(tmp_path, KEEP_ALL).restore_newest(wider)
    assert Checkpoints(tmp_path).steps() == [5]


def test_another_dtype_is_not_cast_without_a_word(tmp_path, state):
    save(tmp_path, state, 5)
    halved = Program(config(optimizer={"moments_dtype": "bfloat16", "b2": 0.95}), mesh_of("one"))
    with pytest.raises(ConfigError, match=r"opt_state.* is float32\[.*\] there and bfloat16\[.*\] here"):
        Checkpoints(tmp_path, KEEP_ALL).restore_newest(halved)
    assert Checkpoints(tmp_path).steps() == [5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # threads of Orbax raise
def test_a_failed_save_is_reported_and_the_next_succeeds(tmp_path, program, state, caplog, monkeypatch):
    """No file may grow past 8 KiB, so writes fail as on a full disk."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    checkpoints = save(tmp_path, state, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        checkpoints.save(10, state, {"samples": 0})
        assert not checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 10 FAILED" in caplog.text
    checkpoints.save(15, state, {"samples": 0})
    assert checkpoints.wait()
    assert checkpoints.steps() == [5, 15]
    assert_same(checkpoints.restore(program, 15)[0], state)


def test_choosing_a_step(tmp_path, state):
    with pytest.raises(CheckpointError, match="no checkpoints/ folder"):
        Checkpoints(tmp_path)
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        choose_step(checkpoints, None)
    save(tmp_path, state, 2, 4)
    assert choose_step(checkpoints, None) == 4 and choose_step(checkpoints, 2) == 2
    with pytest.raises(CheckpointError, match="no checkpoint at step 3; the steps are 2, 4"):
        choose_step(checkpoints, 3)


def failing_once(monkeypatch, at: str) -> None:
    """Makes the first rename of a path with this name fail."""
    rename, failed = pathlib.Path.rename, []

    def renamed(path, target):
        if path.name == at and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", renamed)


def test_setting_aside_is_tried_again_where_it_failed(tmp_path, state, monkeypatch):
    """The retry does not delete steps that were set aside before."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    checkpoints = save(tmp_path, state, 2, 4, 6)
    failing_once(monkeypatch, "6")
    checkpoints.discard_after(2)
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["2", "4.set_aside", "6.set_aside"]


def test_a_step_that_cannot_be_deleted_keeps_no_other(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path, state, 2, 4, 6, 8)
    checkpoints.config = CheckpointConfig(keep_last=1, keep_best=0)
    failing_once(monkeypatch, "4")
    checkpoints.delete_old()
    assert checkpoints.steps() == [4, 8]


def test_copies_are_discarded_by_name(tmp_path, state, monkeypatch):
    """The list of copies does not decide which copies are deleted, because a failed listing is empty."""
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "run/checkpoints", config())
    checkpoints = Checkpoints(tmp_path / "run", KEEP_ALL, mirror=mirror)
    for step in (2, 4, 6):
        checkpoints.save(step, state, {"samples": 0})
        assert checkpoints.wait()
        mirror.wait()
    monkeypatch.setattr(mirror, "complete_copies", lambda: set())
    checkpoints.discard_after(4)
    assert mirror._list() == {2, 4}


def test_steps_that_cannot_be_listed_are_one_line(tmp_path, program, state, monkeypatch):
    """A temporary error has no effect, and a lasting error is not taken for an empty folder."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    checkpoints = save(tmp_path, state, 2, 4)
    real, failures = pathlib.Path.iterdir, 0

    def iterdir(path):
        nonlocal failures
        failures -= 1
        if failures >= 0 and path == checkpoints.directory:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)
    for use in (
        checkpoints.steps,
        lambda: checkpoints.discard_after(4),
        lambda: choose_step(checkpoints, None),
        lambda: checkpoints.restore_newest(program),
        lambda: Checkpoints(tmp_path, KEEP_ALL),
    ):
        failures = 1
        use()
        failures = 99
        with pytest.raises(Unreadable, match="Input/output error") as e:
            use()
        assert e.value.exit_code == 42
    failures = 0
    assert checkpoints.steps() == [2, 4]


def test_a_chosen_step_is_restored_and_what_is_set_aside_is_no_step(tmp_path, program, state):
    checkpoints = save(tmp_path, state, 2, 4, 6)
    restored, _ = checkpoints.restore_newest(program, lambda steps: steps[1])
    assert int(restored.step) == 4 and checkpoints.steps() == [2, 4, 6], "nothing was moved"
    assert checkpoints.restore_newest(program, lambda steps: None) is None
    for _ in range(2):  # after each repetition, one folder is left for each step
        checkpoints.discard_after(2)
        assert checkpoints.steps() == [2] and not checkpoints.quarantine.exists()
        assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["2", "4.set_aside", "6.set_aside"]
        save(tmp_path, state, 4, 6)
    assert int(Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)[0].step) == 6


# With a mirror


def mirrored(run: pathlib.Path, keep: CheckpointConfig = KEEP_ALL) -> Checkpoints:
    """Opens checkpoints as a start does. The run is in `run`, its mirror beside it."""
    mirror = Mirror(str(run.with_name("mirror")), run / "checkpoints", config())
    return Checkpoints(run, keep, mirror=mirror)


def save_both(checkpoints: Checkpoints, state: TrainState, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, state, {"samples": 0})
        assert checkpoints.wait()
        checkpoints.mirror.wait()


def whole_in(checkpoints: pathlib.Path) -> list[int]:
    return sorted(int(p.parent.name) for p in checkpoints.glob("*/_CHECKPOINT_METADATA") if p.parent.name.isdigit())


@pytest.fixture(scope="module")
def both(tmp_path_factory, state):
    """A run and its mirror, with steps 2, 4 and 6 in both."""
    folder = tmp_path_factory.mktemp("both")
    save_both(mirrored(folder / "run"), state, 2, 4, 6)
    assert whole_in(folder / "mirror/checkpoints") == [2, 4, 6]
    return folder


def before_6(steps: list[int]) -> int | None:
    return max((step for step in steps if step < 6), default=None)


@pytest.mark.parametrize("choose", [None, before_6])
@pytest.mark.parametrize(
    ("here", "there"),  # a letter for each of the steps 2, 4 and 6; w: whole, d: damaged, -: missing
    [("ddw", "www"), ("-dw", "w-w"), ("wdw", "www"), ("--w", "www"), ("w-w", "www"), ("ddd", "dwd"), ("wdd", "ddd"),
     ("---", "wdd"), ("d--", "d--"), ("ddd", "---"), ("w--", "-d-"), ("-d-", "-d-"), ("--d", "-w-")],
)  # fmt: skip
def test_what_is_restored_is_the_newest_whole_step_wherever_it_lies(
    tmp_path, program, both, monkeypatch, here, there, choose
):
    """A rollback uses the mirror, too. Damaged steps are moved when another step is restored, and no copy is lost."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    for name, found in (("run", here), ("mirror", there)):
        shutil.copytree(both / name, tmp_path / name)
        for step, how in zip((2, 4, 6), found, strict=True):
            folder = tmp_path / name / "checkpoints" / str(step)
            if how == "-":
                shutil.rmtree(folder)
            elif how == "d":
                flip_a_bit_in_the_parameters(folder)
    candidates = [i for i in range(3) if choose is None or i < 2]
    usable = [2 * i + 2 for i in candidates if "w" in (here[i], there[i])]
    checkpoints = mirrored(tmp_path / "run")
    if not usable:
        with pytest.raises(CheckpointError, match="nothing was moved"):
            checkpoints.restore_newest(program, choose)
        assert whole_in(tmp_path / "run/checkpoints") == [2 * i + 2 for i in range(3) if here[i] != "-"]
        assert not (tmp_path / "run/quarantine").exists()
    else:
        restored, _ = checkpoints.restore_newest(program, choose)
        assert int(restored.step) == usable[-1] in checkpoints.steps()
        checkpoints.restore(program, usable[-1])
        tried = [i for i in candidates if 2 * i + 2 >= usable[-1] and here[i] != "w"]
        damaged = [str(2 * i + 2) for i in tried for found in (here, there) if found[i] == "d"]  # of copies, too
        assert sorted(p.name.split(".")[0] for p in (tmp_path / "run").glob("quarantine/*")) == damaged
        checkpoints.discard_after(usable[-1])
    left = whole_in(tmp_path / "mirror/checkpoints")
    assert set(left) >= {2 * i + 2 for i in candidates if there[i] == "w" and usable and 2 * i + 2 <= usable[-1]}
    assert usable or left == [2 * i + 2 for i in range(3) if there[i] != "-"]
    assert not list((tmp_path / "run/checkpoints").glob("*tmp*")) and Checkpoints(tmp_path / "run", KEEP_ALL)
    assert not list((tmp_path / "run/checkpoints").glob("*.fetched"))


def test_a_rollback_without_an_answer_of_the_mirror_begins_nothing_again(tmp_path, program, both, monkeypatch):
    """If a start cannot list the copies, it fails, unless a local step is usable."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    for name in ("run", "mirror"):
        shutil.copytree(both / name, tmp_path / name)
    checkpoints = mirrored(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.mirror, "_list", lambda: (_ for _ in ()).throw(ValueError("ABORTED: busy")))
        assert int(checkpoints.restore_newest(program, before_6)[0].step) == 4
        for step in (2, 4):
            flip_a_bit_in_the_parameters(tmp_path / f"run/checkpoints/{step}")
        with pytest.raises(Unreadable, match="ABORTED: busy") as e:
            checkpoints.restore_newest(program, before_6)
        assert e.value.exit_code == 42
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.mirror, "_download", lambda *_: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(CheckpointError):
            checkpoints.restore_newest(program, before_6)
    assert checkpoints.steps() == [2, 4, 6] == whole_in(tmp_path / "mirror/checkpoints")


def test_what_proves_nothing_stays_until_its_copy_was_restored(tmp_path, program, both, monkeypatch):
    """A library of another version may fail to read any step: each start used to move one more step to quarantine."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    for name in ("run", "mirror"):
        shutil.copytree(both / name, tmp_path / name)
    with monkeypatch.context() as patched:
        patched.setattr(ocp.handlers.PyTreeHandler, "load", lambda *_: {}["another version"])
        for _ in range(2):
            with pytest.raises(CheckpointError, match="nothing was moved"):
                mirrored(tmp_path / "run").restore_newest(program)
    assert whole_in(tmp_path / "run/checkpoints") == [2, 4, 6] and not (tmp_path / "run/quarantine").exists()
    assert int(mirrored(tmp_path / "run").restore_newest(program)[0].step) == 6


def test_copies_of_a_run_that_was_lost_stay_as_its_steps_would(tmp_path, program, state, monkeypatch):
    """When a run is lost, its permanent and best steps are only in the mirror, and metrics.jsonl is lost, too."""
    keep = CheckpointConfig(keep_last=1, keep_every_steps=4, keep_best=1)
    checkpoints = mirrored(tmp_path / "run", keep)
    for step, loss in ((3, 1.0), (4, 5.0), (5, 4.0), (6, 3.0)):
        save_both(checkpoints, state, step)
        checkpoints.val_losses[step], checkpoints.val_windows[step] = loss, 8
    save_both(checkpoints, state, 7)
    assert whole_in(tmp_path / "mirror/checkpoints") == [3, 4, 7] == checkpoints.steps()
    shutil.rmtree(tmp_path / "run")
    for last in (9, 10):  # in the second attempt after the loss, the local checkpoints do not include the best step
        checkpoints = mirrored(tmp_path / "run", keep)
        _, meta = checkpoints.restore_newest(program)
        assert meta["step"] == (7 if last == 9 else 9)
        checkpoints.set_evaluations({row["step"]: row for row in meta["evaluations"]})
        save_both(checkpoints, state, last)
        assert whole_in(tmp_path / "mirror/checkpoints") == [3, 4, last]
    with monkeypatch.context() as patched:  # nothing is deleted while the copies cannot be listed
        patched.setattr(checkpoints.mirror, "_list", lambda: (_ for _ in ()).throw(OSError("no network")))
        save_both(checkpoints, state, 11)
    assert whole_in(tmp_path / "mirror/checkpoints") == [3, 4, 10, 11]


def test_a_copy_that_should_be_deleted_is_not_offered_and_goes_later(tmp_path, state, monkeypatch):
    """Such a copy would bring the run back to a state that a rollback has discarded."""
    checkpoints = mirrored(tmp_path / "run")
    save_both(checkpoints, state, 2, 4)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.mirror, "_delete", lambda step: (_ for _ in ()).throw(OSError("no network")))
        checkpoints.discard_after(2)
    assert checkpoints.mirror.steps() == [2]
    save_both(checkpoints, state, 3)
    assert whole_in(tmp_path / "mirror/checkpoints") == [2, 3]


@pytest.fixture
def copied(tmp_path, both, monkeypatch):
    """A copy of the run and its mirror for one test, which may change them."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    for name in ("run", "mirror"):
        shutil.copytree(both / name, tmp_path / name)
    return tmp_path


def up_to(newest: int):
    return lambda steps: max((step for step in steps if step <= newest), default=None)


def step_of(checkpoints: Checkpoints, program: Program, choose=None) -> int:
    return int(checkpoints.restore_newest(program, choose)[0].step)


def busy(*_):
    raise ValueError("UNAVAILABLE: busy")


class Kill(BaseException):
    pass


def kill(*_):
    raise Kill


def test_a_rollback_leaves_no_copy_above_it(copied, program, state):
    """A rollback also deletes copies of steps that are not here (the machine was replaced), so that none can return."""
    shutil.rmtree(copied / "run")
    checkpoints = mirrored(copied / "run")
    assert step_of(checkpoints, program) == 6
    assert step_of(checkpoints, program, up_to(3)) == 2
    checkpoints.discard_after(2)
    save_both(checkpoints, state, 3)
    assert whole_in(copied / "mirror/checkpoints") == [2, 3] and step_of(mirrored(copied / "run"), program) == 3


@pytest.mark.parametrize("how", ["it is busy", "killed after the renames", "killed before them"])
def test_no_later_life_takes_a_copy_that_the_run_went_behind(copied, program, state, monkeypatch, how):
    """A list of discarded copies is written first. A step is removed from it when its copy is deleted or made again."""
    checkpoints = mirrored(copied / "run")
    with monkeypatch.context() as patched:
        if how == "it is busy":
            patched.setattr(checkpoints.mirror, "_delete", busy)
            checkpoints.discard_after(2)
        else:
            owner, name = (checkpoints.mirror, "wait") if "after" in how else (pathlib.Path, "rename")
            patched.setattr(owner, name, kill)
            with pytest.raises(Kill):
                checkpoints.discard_after(2)
    checkpoints = mirrored(copied / "run")
    assert checkpoints.mirror.steps() == [2]
    if "before" not in how:
        assert step_of(checkpoints, program) == 2
        save_both(checkpoints, state, 4)
        assert checkpoints.mirror.steps() == [4, 2] == mirrored(copied / "run").mirror.steps()
        assert whole_in(copied / "mirror/checkpoints") == [2, 4]
        assert [*json.loads((copied / "run" / MIRRORS).read_text()).values()] == [[[], None]]


def test_a_copy_half_deleted_is_deleted_later(copied, state):
    """The file that marks a copy as complete is deleted first, so the copy is not listed any more."""
    checkpoints = mirrored(copied / "run")
    store = checkpoints.mirror._store
    checkpoints.mirror._store = types.SimpleNamespace(read=store.read, write=store.write, delete_range=busy)
    checkpoints.discard_after(2)
    assert list((copied / "mirror/checkpoints/4").rglob("*"))
    save_both(mirrored(copied / "run"), state, 5)  # in the next attempt
    assert not [path for path in (copied / "mirror/checkpoints/4").rglob("*") if path.is_file()]


@pytest.mark.parametrize("here", ["damaged", "lost"])
def test_nothing_older_takes_the_place_of_a_copy_that_cannot_be_fetched_now(copied, program, monkeypatch, here):
    if here == "lost":
        shutil.rmtree(copied / "run")
    else:
        flip_a_bit_in_the_parameters(copied / "run/checkpoints/6")
    checkpoints = mirrored(copied / "run")
    real = checkpoints.mirror._download
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.mirror, "_download", lambda step, to: busy() if step == 6 else real(step, to))
        with pytest.raises(Unreadable, match=r"step 6 cannot be fetched.*busy") as e:
            checkpoints.restore_newest(program)
        assert e.value.exit_code == 42
    assert step_of(checkpoints, program) == 6


def test_a_copy_may_be_fetched_again(copied, program):
    """A copy that one restore has fetched may be needed again by a later restore of the same process."""
    shutil.rmtree(copied / "run")
    checkpoints = mirrored(copied / "run")
    assert step_of(checkpoints, program) == 6
    flip_a_bit_in_the_parameters(copied / "run/checkpoints/6")
    assert step_of(checkpoints, program, up_to(7)) == 6
    shutil.rmtree(copied / "run/checkpoints/6")
    assert step_of(checkpoints, program, up_to(7)) == 6


def test_a_mirror_that_vanishes_is_not_an_empty_one(copied, program):
    """A mirror vanishes if its folder is unmounted."""
    for step in (2, 4):
        shutil.rmtree(copied / f"run/checkpoints/{step}")
    checkpoints = mirrored(copied / "run")
    (copied / "mirror").rename(copied / "unmounted")
    (copied / "mirror").mkdir()
    for _ in range(2):  # the second time, a copy has been put into the folder that is left
        with pytest.raises(Unreadable, match=r"mirror\.json is gone") as e:
            checkpoints.restore_newest(program, before_6)
        assert e.value.exit_code == 42
        shutil.copytree(copied / "unmounted/checkpoints/6", copied / "mirror/checkpoints/6", dirs_exist_ok=True)


def test_no_copy_is_offered_that_is_being_deleted(copied, program, monkeypatch):
    """The mirror's thread may be deleting old copies when a rollback begins."""
    shutil.rmtree(copied / "run/checkpoints/2")
    shutil.rmtree(copied / "run/checkpoints/4")
    checkpoints = mirrored(copied / "run")
    copy, download, fetched = checkpoints.mirror._copy, checkpoints.mirror._download, []
    monkeypatch.setattr(checkpoints.mirror, "_copy", lambda step: (time.sleep(0.3), copy(step)))
    monkeypatch.setattr(checkpoints.mirror, "_download", lambda step, to: (fetched.append(step), download(step, to)))
    checkpoints.mirror.offer(6, lambda copies: {2, 6})
    assert step_of(checkpoints, program, before_6) == 2 and fetched == [2]


def test_one_that_cannot_read_is_heard_before_one_that_finds_something_wrong(tmp_path, program, state, monkeypatch):
    """A library may fail for lack of file descriptors: this proves no damage, but would send a step to quarantine."""
    checkpoints = save(tmp_path, state, 5)
    words = [[Suspect.__name__, "strange", 3], None, [Unreadable.__name__, "no descriptor", 42]]
    monkeypatch.setattr(
        checkpoints.processes, "distinct_values", lambda name, mine: [json.dumps(word) for word in words]
    )
    with pytest.raises(Unreadable, match="no descriptor"):
        checkpoints.restore(program, 5)


def test_a_fetched_copy_survives_a_kill_while_it_takes_its_place(copied, program, monkeypatch):
    flip_a_bit_in_the_parameters(copied / "run/checkpoints/6")
    checkpoints, real = mirrored(copied / "run"), pathlib.Path.rename
    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "rename", lambda p, to: kill() if p.name == "6.fetched" else real(p, to))
        with pytest.raises(Kill):
            checkpoints.restore_newest(program)
    checkpoints = mirrored(copied / "run")
    monkeypatch.setattr(checkpoints.mirror, "_list", busy)
    assert step_of(checkpoints, program) == 6 and checkpoints.steps() == [2, 4, 6]


def test_a_copy_takes_the_place_of_a_step_that_lost_parts_meanwhile(copied, program):
    checkpoints = mirrored(copied / "run")
    (copied / "run/checkpoints/6/_CHECKPOINT_METADATA").unlink()
    assert step_of(checkpoints, program) == 6 and checkpoints.steps() == [2, 4, 6]
    assert [path.name.split(".")[0] for path in (copied / "run/quarantine").iterdir()] == ["6"]


def test_a_damaged_copy_is_in_quarantine_once(copied, program):
    """Each start fetches the damaged copy again, because nothing in the mirror is deleted for damage."""
    shutil.rmtree(copied / "run/checkpoints/6")
    flip_a_bit_in_the_parameters(copied / "mirror/checkpoints/6")
    for _ in range(3):
        assert step_of(mirrored(copied / "run"), program) == 4
        assert len(list((copied / "run/quarantine").iterdir())) == 1
    assert whole_in(copied / "mirror/checkpoints") == [2, 4, 6] and not list((copied / "run").glob("*/*.fetched"))


def test_a_listing_that_fails_once_hides_no_better_step(copied, program, monkeypatch):
    """Otherwise a rollback would go further back than necessary, and discard the copy that it needs."""
    shutil.rmtree(copied / "run/checkpoints/4")
    checkpoints = mirrored(copied / "run")
    listed, answers = checkpoints.mirror._list, [busy]
    monkeypatch.setattr(checkpoints.mirror, "_list", lambda: (answers.pop() if answers else listed)())
    assert step_of(checkpoints, program, up_to(5)) == 4 and not answers
    monkeypatch.setattr(checkpoints.mirror, "_list", busy)
    shutil.rmtree(copied / "run/checkpoints/4")
    with pytest.raises(Unreadable, match="busy"):
        checkpoints.restore_newest(program, up_to(5))
    assert step_of(checkpoints, program, up_to(3)) == 2  # step 2 is here, and no copy is newer


def test_folders_that_lack_parts_are_not_in_the_way_of_saves(copied, program, state):
    """No folder was moved until a copy was restored, because no local step was complete."""
    for step in (2, 4, 6):
        (copied / f"run/checkpoints/{step}/_CHECKPOINT_METADATA").unlink()
    checkpoints = mirrored(copied / "run")
    assert step_of(checkpoints, program, before_6) == 4
    save_both(checkpoints, state, 6)
    assert not checkpoints.failed and checkpoints.steps()[-1] == 6
    assert {path.name.split(".")[0] for path in (copied / "run/quarantine").iterdir()} == {"2", "4", "6"}


def test_an_old_step_that_was_set_aside_does_not_hide_that_checkpoints_are_lost(tmp_path, program, state):
    checkpoints = save(tmp_path, state, 4)
    checkpoints.set_aside([4], "a test")
    assert checkpoints.restore_newest(program) is None  # the last saved step was set aside: the run begins again
    checkpoints = save(tmp_path, state, 5)
    shutil.rmtree(tmp_path / "checkpoints/5")
    with pytest.raises(CheckpointError, match="none is left"):
        Checkpoints(tmp_path, KEEP_ALL).restore_newest(program)


def test_a_part_on_a_disk_that_is_not_mounted_is_not_missing(copied, program):
    """Nothing is moved, and the run does not resume from an older step."""
    for name in ("6", "6/params"):
        place, away = copied / "run/checkpoints" / name, copied / "away"
        place.rename(away)
        place.symlink_to(copied / "gone")
        with pytest.raises(Unreadable, match=r"is a link to .*gone, which is not there") as e:
            mirrored(copied / "run").restore_newest(program)
        assert e.value.exit_code == 42 and not (copied / "run/quarantine").exists()
        place.unlink()
        away.rename(place)
    assert step_of(mirrored(copied / "run"), program) == 6


def test_a_step_that_the_mirror_lacks_is_copied_at_the_next_start(copied, program):
    """A mirror lacks a step if it was full, or if it is new."""
    shutil.rmtree(copied / "mirror/checkpoints/6")
    checkpoints = mirrored(copied / "run")
    step = step_of(checkpoints, program)
    checkpoints.set_evaluations({})
    checkpoints.copy_missing(step)
    checkpoints.mirror.wait()
    assert whole_in(copied / "mirror/checkpoints") == [2, 4, 6]
