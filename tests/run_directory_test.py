"""The run directory: a file of another run, or a file that is not of a run, is never overwritten."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import subprocess

import pytest

from data import sources
from data.errors import DataError, UserError
from tests import runs
from trainer.config import from_dict, to_json
from trainer.errors import ConfigError
from trainer.reliability import reading, restarts, run_directory


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = runs.dataset(tmp_path_factory.mktemp("data"))
    return run_directory.resolve(from_dict({"data": {"path": str(data), "seq_len": 16}}))


@pytest.fixture(scope="module")
def data(config):
    return sources.open_sources(config.data)


def test_resolve_fills_in_what_the_dataset_decides(config):
    manifest = json.loads(pathlib.Path(config.data.path, "manifest.json").read_text())
    assert config.model.vocab_size == manifest["vocab_size"] and config.model.max_seq_len == 16
    assert run_directory.resolve(config) == config


def test_resolve_refuses_a_vocabulary_that_is_not_the_tokenizers(config):
    for size in (5, 50257):
        wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
        with pytest.raises(ConfigError, match=rf"vocab_size is {size}, .* has {config.model.vocab_size}"):
            run_directory.resolve(wrong)


def check_changes(run: pathlib.Path, config, allow: bool):
    """As launch.train calls it."""
    return run_directory.check_changes(run, config, run_directory.config_of_run(run), allow=allow)


def test_a_dataset_that_was_not_prepared_names_the_command(tmp_path):
    data = {"path": str(tmp_path / "nothing"), "source": "python-stdlib", "tokenizer": "byte"}
    with pytest.raises(DataError, match=r"launch.prepare --source=python-stdlib --tokenizer=byte --out=") as error:
        run_directory.resolve(from_dict({"data": data}))
    assert error.value.exit_code == 3
    with pytest.raises(ConfigError, match=r"data\.path"):
        run_directory.resolve(from_dict({}))


def test_changes_of_a_recorded_run(tmp_path, config, data, caplog):
    run = tmp_path / "run"
    run.mkdir()
    run_directory.record(run, config, data, ["train", "--x=a b"])
    check_changes(run, config, allow=False)
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=9))
    for allow in (False, True):
        with pytest.raises(ConfigError, match=r"config.model.num_layers: 4 -> 9"):
            check_changes(run, deeper, allow)
    faster = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, peak_lr=0.5))
    with pytest.raises(ConfigError, match=r"peak_lr: 0.001 -> 0.5.*--allow_config_change"):
        check_changes(run, faster, allow=False)
    check_changes(run, faster, allow=True)
    check_changes(run, dataclasses.replace(config, num_train_steps=5), allow=False)


def optimizing(config, **fields):
    top = {name: fields.pop(name) for name in list(fields) if name == "num_train_steps"}
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **fields), **top)


def finish_step(run: pathlib.Path, step: int) -> None:
    folder = run / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / restarts.METADATA_FILE).touch()


@pytest.mark.parametrize("recorded_as", [0, 1000], ids=["by an older version", "by this one"])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_more_steps_or_fewer_change_the_rate_of_no_step(tmp_path, config, data, caplog, name, recorded_as):
    began = optimizing(config, schedule=name, num_train_steps=1000)
    run_directory.record(tmp_path, optimizing(began, decay_steps=recorded_as), data, [])
    finish_step(tmp_path, 990)
    for steps in (991, 5000, 2**31 - 1):
        resumed = check_changes(tmp_path, dataclasses.replace(began, num_train_steps=steps), allow=False)
        assert resumed.optimizer.decay_steps == 1000 and resumed.num_train_steps == steps


def test_a_rate_that_changes_at_the_next_step_is_shown_and_needs_the_flag(tmp_path, config, data, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    caplog.set_level(logging.INFO)
    began = optimizing(config, schedule="linear", num_train_steps=1000, peak_lr=1.0, end_lr=0.0, warmup_steps=0)
    run_directory.record(tmp_path, check_changes(tmp_path / "new", began, allow=False), data, [])
    finish_step(tmp_path, 500)
    longer = optimizing(began, decay_steps=2000)
    with pytest.raises(
        ConfigError, match=r"decay_steps: 1000 -> 2000; .*rate of step 501: 0.5 -> 0.75; .*allow_config"
    ):
        check_changes(tmp_path, longer, allow=False)
    assert check_changes(tmp_path, longer, allow=True) == longer
    assert "the learning rate of step 501: 0.5 -> 0.75" in caplog.text
    constant = optimizing(began, schedule="constant")
    assert check_changes(tmp_path, constant, allow=True).optimizer.decay_steps == 0


def test_what_is_recorded(tmp_path, config, data):
    run_directory.record(tmp_path, config, data, ["train", "--prompt=a b"])
    run_directory.record(tmp_path, config, data, ["train", "again"])
    assert run_directory.read_config(tmp_path) == config
    assert [line.split(" ", 1)[1] for line in (tmp_path / "command.txt").read_text().splitlines()] == [
        "train '--prompt=a b'",
        "train again",
    ]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert set(environment["packages"]) >= {"jax", "flax", "orbax-checkpoint"}
    assert (tmp_path / "tokenizer/meshlm_tokenizer.json").exists()


def test_the_commit_of_a_checkout_that_another_user_owns(tmp_path, monkeypatch):
    """This happens in containers: git refused such a checkout, and environment.json silently had null."""
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "run_directory.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = run_directory._commit()
    assert found["commit"] is None and "not a git repository" in found["no_commit"]
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -q --allow-empty -m x"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        os.chown(tmp_path / ".git", 65534, 65534)
    found = run_directory._commit()
    assert len(found["commit"]) == 40 and "no_commit" not in found


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a run directory"):
        check_changes(tmp_path, config, allow=True)
    with pytest.raises(ConfigError, match="not a run directory"):
        run_directory.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        run_directory.read_config(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ELOOP, errno.ENOSPC])
@pytest.mark.parametrize("method", ["stat", "iterdir", "read_text", "open"])
def test_what_cannot_be_read_or_written_is_one_line(tmp_path, config, data, monkeypatch, code, method):
    """After retries, the code is 42 if the error may pass, else 2. A run that cannot be read does not count as new."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    run = tmp_path / "run"
    run.mkdir()
    run_directory.record(run, config, data, [])
    finish_step(run, 5)
    failures, real = 0, getattr(pathlib.Path, method)

    def call(path, *args, **named):
        nonlocal failures
        if failures and run in (path, *path.parents):
            failures -= 1
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **named)

    monkeypatch.setattr(pathlib.Path, method, call)
    uses = {
        "check_changes": lambda: check_changes(run, config, allow=False),
        "record": lambda: run_directory.record(run, config, data, []),
        "recorded": lambda: run_directory.recorded(run),
        "read_config": lambda: run_directory.read_config(run),
    }
    passes, met = code not in reading.LASTING, set()
    for name, use in uses.items():
        failures = 99
        try:
            use()
        except UserError as e:
            met.add(name)
            assert e.exit_code == (42 if passes else 2)
            assert str(run) in str(e) and os.strerror(code) in str(e) and "\n" not in str(e)
        failures = 1
        if passes:
            use()
        failures = 0
    wanted = {"stat": {"check_changes", "recorded", "read_config"}, "iterdir": {"check_changes"}, "open": {"record"}}
    assert met >= wanted.get(method, {"check_changes", "recorded", "read_config"})


def test_a_path_that_is_too_long_or_leads_nowhere_is_one_line(tmp_path, config):
    """If the disk of a run is gone, the run must not start over on another disk."""
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name, reason in {
        "gone": "is a link to .*, which cannot be reached",
        "gone/below": "is a link to",
        "run": "checkpoints is a link to",
        "loop": os.strerror(errno.ELOOP),
        "x" * 300: os.strerror(errno.ENAMETOOLONG),
        "x" * 300 + "/run": os.strerror(errno.ENAMETOOLONG),
        "file": os.strerror(errno.ENOTDIR),
    }.items():
        for use in (run_directory.read_config, lambda run: check_changes(run, config, allow=False)):
            with pytest.raises(
                ConfigError, match=f"{reason}|is not a run directory" if name == "file" else reason
            ) as e:
                use(tmp_path / name)
            assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "gone", "loop", "run"]


@pytest.mark.parametrize(
    "mirror", ["run", "run/", "run/mirror", "run/checkpoints", "link", "link/below", "./other/../run"]
)
def test_copies_in_the_run_itself_are_refused(tmp_path, monkeypatch, mirror):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for run in (pathlib.Path("run"), tmp_path / "link"):
        with pytest.raises(ConfigError, match="is in the run directory"):
            run_directory.check_mirror(run, mirror)
    for elsewhere in ("", "runs", "running/run", "gs://run/run", ".."):
        run_directory.check_mirror(tmp_path / "run", elsewhere)


@pytest.mark.parametrize("left", [None, b"", b'{"global_batch', b"\0" * 100])
def test_a_config_that_is_lost_is_in_the_newest_checkpoint(tmp_path, config, monkeypatch, left):
    meta = {"config": json.loads(to_json(config))}
    if left is not None:
        (tmp_path / "config.json").write_bytes(left)
    with pytest.raises(ConfigError, match="is not a run directory" if left is None else "is damaged"):
        run_directory.read_config(tmp_path)
    monkeypatch.setattr(run_directory.identity, "newest_meta", lambda checkpoints: meta)
    assert run_directory.read_config(tmp_path) == config
    assert check_changes(tmp_path, config, allow=False).seed == config.seed
    with pytest.raises(ConfigError, match="started with another configuration"):
        check_changes(tmp_path, dataclasses.replace(config, seed=config.seed + 1), allow=False)
