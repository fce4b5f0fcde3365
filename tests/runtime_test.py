"""The compilation cache is used only in a folder that no other user can write to."""

import os

import jax
import pytest

from launch import runtime
from trainer.errors import ConfigError


@pytest.fixture
def used(monkeypatch):
    """A function that returns the cache folder that JAX is configured with, or None."""
    told = {"jax_compilation_cache_dir": "what JAX has read from the variable"}
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.update({name: value}))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return lambda: told.get("jax_compilation_cache_dir")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_new_folder_is_ours_alone(tmp_path, used, umask):
    before = os.umask(umask)
    try:
        runtime.use_compilation_cache(tmp_path / "runs/a")
    finally:
        os.umask(before)
    assert used() == str(tmp_path / "runs/.xla") and (tmp_path / "runs/.xla").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o750])
def test_a_folder_that_others_read_is_used(tmp_path, used, mode):
    (tmp_path / ".xla").mkdir(mode)
    runtime.use_compilation_cache(tmp_path / "run")
    assert used() == str(tmp_path / ".xla")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o722, 0o1777])
@pytest.mark.parametrize("how", ["beside", "named", "variable", "link"])
def test_a_folder_that_others_can_write_is_not_used(tmp_path, used, monkeypatch, mode, how):
    folder = tmp_path / ("real" if how == "link" else ".xla")
    folder.mkdir()
    folder.chmod(mode)
    if how == "link":
        (tmp_path / ".xla").symlink_to(folder)
    if how == "variable":
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    runtime.use_compilation_cache(tmp_path / "run", str(folder) if how == "named" else None)
    assert used() is None


def test_a_folder_that_others_can_replace_is_not_used(tmp_path, used):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    runtime.use_compilation_cache(tmp_path / "open/run")
    assert used() is None
    (tmp_path / "open").chmod(0o1777)  # like /tmp
    runtime.use_compilation_cache(tmp_path / "open/run")
    assert used() == str(tmp_path / "open/.xla")


def test_a_folder_of_another_user_is_not_used(tmp_path, used):
    if os.geteuid():
        pytest.skip("only root gives folders away")
    (tmp_path / ".xla").mkdir()
    os.chown(tmp_path / ".xla", 65534, 65534)
    runtime.use_compilation_cache(tmp_path / "run")
    assert used() is None


@pytest.mark.parametrize("place", ["gs://a-bucket/cache", "s3://a-bucket/cache", "az://x", "file:///x"])
def test_a_store_is_refused_and_no_folder_of_that_name_made(tmp_path, used, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    with pytest.raises(ConfigError, match=place):
        runtime.use_compilation_cache(tmp_path / "run")
    assert list(tmp_path.iterdir()) == [] and used() is None
