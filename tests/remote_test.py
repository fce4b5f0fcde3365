"""Object stores: what is in the cache is what is in the store, fetched once; a run from a store is that from a folder.

The clients are the real ones, the stores speak their protocols on loopback (object_store.py).
"""

import os
import pathlib

import object_store
import pytest

from data import remote, sources
from data.config import DataConfig
from data.errors import DataError
from tests import runs


@pytest.fixture
def store(tmp_path, monkeypatch):
    with object_store.running() as running:
        for name, value in environment(running, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        remote.local.cache_clear()
        yield running
    remote.local.cache_clear()


def environment(store: object_store.Store, cache: pathlib.Path) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_EC2_METADATA_DISABLED": "true"}
    urls = {"AWS_ENDPOINT_URL": store.url, "TENSORSTORE_GCS_HTTP_URL": store.url}
    return {**keys, **urls, "MESHLM_CACHE": str(cache)}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


schemes = pytest.mark.parametrize("scheme", ["gs", "s3"])


@schemes
def test_a_folder_is_fetched_once_and_again_where_it_changed(scheme, store):
    store.put("data/set/manifest.json", b"{}")
    store.put("data/set/tokenizer/x.json", b"tokens")
    store.put("data/setter.bin", b"another")
    path = f"{scheme}://a-bucket/data/set/"
    folder = pathlib.Path(remote.local(path))
    assert contents(folder) == {"manifest.json": b"{}", "tokenizer/x.json": b"tokens"}
    assert remote.local(path) == str(folder)
    store.requests.clear()
    remote.local.cache_clear()  # as a new process
    assert remote.local(path) == str(folder)
    assert store.requests == []
    store.put("data/set/manifest.json", b"{ }")
    del store.objects["data/set/tokenizer/x.json"]
    remote.local.cache_clear()
    remote.local(path)
    assert contents(folder) == {"manifest.json": b"{ }"}
    assert {request.split()[0] for request in store.requests} == {"data/set/manifest.json"}


@schemes
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_objects_are_whole_in_blocks_of_any_size(scheme, size, store, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 64)
    content = os.urandom(size)
    store.put("tokens.bin", content)
    assert pathlib.Path(remote.local(f"{scheme}://a-bucket/tokens.bin")).read_bytes() == content


@schemes
def test_globs_and_what_belongs_to_what_they_match(scheme, store):
    for key in ("t/a_1.bin", "t/a_2.bin", "t/a_2.idx", "t/b.bin", "t/deep/a_3.bin"):
        store.put(key, key.encode())
    found = pathlib.Path(remote.local(f"{scheme}://a-bucket/t/a_*.bin"))
    assert found.name == "a_*.bin"
    assert contents(found.parent) == {n: f"t/{n}".encode() for n in ("a_1.bin", "a_2.bin", "a_2.idx")}
    alone = remote.local(f"{scheme}://a-bucket/t/a_2.idx")
    assert pathlib.Path(alone).with_suffix(".bin").read_bytes() == b"t/a_2.bin"


def test_an_object_that_changes_while_it_is_read_is_noticed(store, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 64)
    store.put("tokens.bin", bytes(200))
    content = object_store.Handler.content

    def change_then_send(handler, key, known):
        if len(store.requests) == 3:
            store.put("tokens.bin", bytes(200))
        content(handler, key, known)

    monkeypatch.setattr(object_store.Handler, "content", change_then_send)
    with pytest.raises(DataError, match=r"gs://a-bucket/tokens\.bin changed while it was read"):
        remote.local("gs://a-bucket/tokens.bin")
    assert not contents(remote.cache_folder() / "files")


@schemes
def test_what_is_wrong_is_said_in_one_line(scheme, store, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=rf"nothing at {scheme}://a-bucket/none.*cp"):
        remote.local(f"{scheme}://a-bucket/none")
    with pytest.raises(DataError, match=r"names no object"):
        remote.local(f"{scheme}://a-bucket/")
    store.put("a/../../etc", b"x")
    with pytest.raises(DataError, match=r"'\.\.' in its name"):
        remote.local(f"{scheme}://a-bucket/a")
    store.put("b.bin", b"x")
    monkeypatch.setenv("MESHLM_CACHE", "/proc/none")
    with pytest.raises(DataError, match=r"cannot keep .*MESHLM_CACHE"):
        remote.local(f"{scheme}://a-bucket/b.bin")
    store.denied = True
    credentials = {"gs": "gcloud auth application-default login", "s3": "AWS_SECRET_ACCESS_KEY"}[scheme]
    with pytest.raises(DataError, match=credentials) as e:
        remote.local(f"{scheme}://a-bucket/b.bin")
    assert "\n" not in str(e.value)


def test_a_run_from_a_store_is_that_from_the_folder(store, tmp_path):
    """And a mixture of a store and a folder opens."""
    folder = runs.dataset(tmp_path)
    for name, content in contents(folder).items():
        store.put(f"sets/dataset/{name}", content)
    path = "gs://a-bucket/sets/dataset"
    steps = {"num_train_steps": 3, "eval__every_steps": 0}
    runs.train(tmp_path / "local", folder, **steps)
    process = runs.start(runs.command(tmp_path / "remote", path, **steps), **environment(store, tmp_path / "other"))
    runs.finish(process)
    assert runs.losses(tmp_path / "remote") == runs.losses(tmp_path / "local")
    assert f'"path": "{path}"' in (tmp_path / "remote" / "config.json").read_text()
    (tmp_path / "copy").symlink_to(folder)
    found = sources.open_sources(DataConfig(path=f"s3://a-bucket/sets/dataset,{tmp_path / 'copy'}"))
    assert list(found.datasets) == ["dataset", "copy"]
