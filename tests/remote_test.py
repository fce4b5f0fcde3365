"""Object stores: the cache holds each object, fetched once; a run on a dataset in a store equals one on a folder.

The clients are the real ones; the stores speak their protocols on loopback (object_store.py).
"""

import errno
import os
import pathlib
import subprocess
import sys
from typing import IO

import object_store
import pytest

from data import sources
from data.config import DataConfig
from data.errors import DataError
from data.storage import cache, remote
from data.token_files import external
from tests import runs


@pytest.fixture
def store(tmp_path, monkeypatch):
    with object_store.running() as running:
        for name, value in environment(running, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        remote.fetch.cache_clear()
        yield running
    remote.fetch.cache_clear()


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
    folder = pathlib.Path(remote.fetch(path))
    assert contents(folder) == {"manifest.json": b"{}", "tokenizer/x.json": b"tokens"}
    assert remote.fetch(path) == str(folder)
    store.requests.clear()
    remote.fetch.cache_clear()  # as in a new process
    assert remote.fetch(path) == str(folder)
    assert store.requests == []
    store.put("data/set/manifest.json", b"{ }")
    del store.objects["data/set/tokenizer/x.json"]
    remote.fetch.cache_clear()
    remote.fetch(path)
    assert contents(folder) == {"manifest.json": b"{ }"}
    assert {request.split()[0] for request in store.requests} == {"data/set/manifest.json"}


@schemes
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_objects_are_whole_in_blocks_of_any_size(scheme, size, store, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 64)
    content = os.urandom(size)
    store.put("tokens.bin", content)
    assert pathlib.Path(remote.fetch(f"{scheme}://a-bucket/tokens.bin")).read_bytes() == content


@schemes
def test_globs_and_what_belongs_to_what_they_match(scheme, store):
    for key in ("t/a_1.bin", "t/a_2.bin", "t/a_2.idx", "t/b.bin", "t/deep/a_3.bin"):
        store.put(key, key.encode())
    found = pathlib.Path(remote.fetch(f"{scheme}://a-bucket/t/a_*.bin"))
    assert found.name == "a_*.bin"
    assert contents(found.parent) == {n: f"t/{n}".encode() for n in ("a_1.bin", "a_2.bin", "a_2.idx")}
    alone = remote.fetch(f"{scheme}://a-bucket/t/a_2.idx")
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
        remote.fetch("gs://a-bucket/tokens.bin")
    assert not contents(remote.cache_folder() / "files")


@schemes
def test_what_is_wrong_is_said_in_one_line(scheme, store, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=rf"nothing at {scheme}://a-bucket/none.*cp"):
        remote.fetch(f"{scheme}://a-bucket/none")
    with pytest.raises(DataError, match=r"names no object"):
        remote.fetch(f"{scheme}://a-bucket/")
    store.put("a/../../etc", b"x")
    with pytest.raises(DataError, match=r"'\.\.' in its name"):
        remote.fetch(f"{scheme}://a-bucket/a")
    with pytest.raises(DataError, match=r"cannot read .*://My!Data/mine.*[Ii]nvalid"):
        remote.fetch(f"{scheme}://My!Data/mine")
    store.put("b.bin", b"x")
    monkeypatch.setenv("MESHLM_CACHE", "/proc/none")
    with pytest.raises(DataError, match=r"cannot store .*MESHLM_CACHE"):
        remote.fetch(f"{scheme}://a-bucket/b.bin")
    store.denied = True
    credentials = {"gs": "gcloud auth application-default login", "s3": "AWS_SECRET_ACCESS_KEY"}[scheme]
    with pytest.raises(DataError, match=credentials) as e:
        remote.fetch(f"{scheme}://a-bucket/b.bin")
    assert "\n" not in str(e.value)


@schemes
def test_no_key_writes_or_removes_anything_outside_the_cache(scheme, store, tmp_path):
    """A path or key that leads outside the cache is refused, and the files there stay unchanged."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    (victim / "train.bin").write_text("mine")
    keys = [f"{victim}/train.bin", "a//b.bin", "c/./d.bin", "e/../../../f.bin", "g/" + "x" * 300, "h.bin/", "i/j\0k"]
    for key in keys:
        store.put(key, b"theirs")
    for path in (f"/{victim}", str(victim), "a", "a/", "a//", "c", "c/.", "e/..", "e", "g", "../x", "/", "i", "*//*"):
        with pytest.raises(DataError):
            remote.fetch(f"{scheme}://a-bucket/{path}")
    for bucket in ("..", ".", ""):
        with pytest.raises(DataError):
            remote.fetch(f"{scheme}://{bucket}/a")
    assert contents(victim) == {"thesis.tex": b"years of work", "train.bin": b"mine"}
    assert {path.name for path in tmp_path.iterdir()} <= {"victim", "cache"} and not contents(tmp_path / "cache")


def test_inspect_writes_nothing_outside_the_cache(store, tmp_path):
    store.put(f"{tmp_path}/set/manifest.json", b"{}")
    result = subprocess.run(
        [sys.executable, "-m", "launch.inspect", f"gs://a-bucket/{tmp_path}/set"],
        cwd=runs.ROOT, env=os.environ | environment(store, tmp_path / "cache"), text=True, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 3 and "is not a path below a folder" in result.stderr
    assert not (tmp_path / "set").exists()


@schemes
def test_a_pattern_is_that_of_a_disk_and_what_is_listed_is_what_is_read(scheme, store):
    """This holds whatever another run has fetched before. Hidden names do not match, and a folder is not a match."""
    for key in ("t/0.bin", "t/a/1.bin", "t/b/c/2.bin", "t/.h/3.bin", "t/x.bin/4.bin"):
        store.put(key, key.encode())
    remote.fetch(f"{scheme}://a-bucket/t")
    store.put("t/b/c/2.bin", b"changed")
    del store.objects["t/a/1.bin"]
    remote.fetch.cache_clear()
    found = {
        path.parent.name: path.read_bytes() for path in external.find_token_files(f"{scheme}://a-bucket/t/**/*.bin")
    }
    assert found == {"t": b"t/0.bin", "c": b"changed", "x.bin": b"t/x.bin/4.bin"}
    assert [path.name for path in external.find_token_files(f"{scheme}://a-bucket/t/*.bin")] == ["0.bin"]
    assert [path.name for path in external.find_token_files(f"{scheme}://a-bucket/t")] == ["0.bin"]


def test_an_index_that_left_the_store_is_not_found_beside_the_tokens(store):
    for key in ("t/a.bin", "t/a.idx"):
        store.put(key, b"x")
    remote.fetch("gs://a-bucket/t/a.bin")
    del store.objects["t/a.idx"]
    remote.fetch.cache_clear()
    assert not pathlib.Path(remote.fetch("gs://a-bucket/t/a.bin")).with_suffix(".idx").exists()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: b"", lambda raw: raw[::-1]]
)
def test_a_copy_that_is_not_as_it_was_made_is_fetched_again(damage, store):
    store.put("set/tokens.bin", b"all of it")
    copy = pathlib.Path(remote.fetch("gs://a-bucket/set"), "tokens.bin")
    copy.write_bytes(damage(copy.read_bytes()))
    remote.fetch.cache_clear()
    remote.fetch("gs://a-bucket/set")
    assert copy.read_bytes() == b"all of it"


def test_only_copies_are_removed_from_the_cache(store):
    """An index that launch.pack wrote next to the copies stays, and so does an index that replaced a copy."""
    store.put("set/manifest.json", b"{}")
    store.put("set/train.packed-8.bin", b"old")
    store.put("set/gone.bin", b"x")
    folder = pathlib.Path(remote.fetch("gs://a-bucket/set"))
    (folder / "train.packed-16.bin").write_bytes(b"mine")
    (folder / "train.packed-8.bin").write_bytes(b"mine, too")
    for key in ("set/train.packed-8.bin", "set/gone.bin"):
        del store.objects[key]
    remote.fetch.cache_clear()
    remote.fetch("gs://a-bucket/set")
    mine = {"train.packed-16.bin": b"mine", "train.packed-8.bin": b"mine, too"}
    assert contents(folder) == {"manifest.json": b"{}", **mine}


def test_an_object_becomes_a_folder_and_a_folder_an_object(store):
    store.put("set/a", b"file")
    store.put("set/b/c/d", b"deep")
    folder = pathlib.Path(remote.fetch("gs://a-bucket/set"))
    del store.objects["set/a"], store.objects["set/b/c/d"]
    store.put("set/a/e", b"below")
    store.put("set/b", b"flat")
    remote.fetch.cache_clear()
    remote.fetch("gs://a-bucket/set/b")
    remote.fetch("gs://a-bucket/set/a/e")
    assert contents(folder) == {"a/e": b"below", "b": b"flat"}
    store.put("set/b/x", b"both")
    with pytest.raises(DataError, match="has both set/b and set/b/x"):
        remote.fetch("gs://a-bucket/set")


def test_a_link_in_the_cache_leads_nowhere(store, tmp_path):
    store.put("set/a.bin", b"theirs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.bin").write_bytes(b"mine")
    bucket = remote.cache_folder() / "files/gs/a-bucket"
    bucket.mkdir(parents=True)
    (bucket / "set").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="set is a link or a file, and not a folder"):
        remote.fetch("gs://a-bucket/set")
    (bucket / "set").unlink()
    (bucket / "set").mkdir()
    (bucket / "set/a.bin").symlink_to(tmp_path / "elsewhere/a.bin")
    assert contents(pathlib.Path(remote.fetch("gs://a-bucket/set"))) == {"a.bin": b"theirs"}
    assert (tmp_path / "elsewhere/a.bin").read_bytes() == b"mine"


def test_a_disk_that_is_full_is_left_as_it_was(store, monkeypatch):
    """No partial file is left, because it would take up the space that is missing."""
    store.put("set/a.bin", b"old")
    folder = pathlib.Path(remote.fetch("gs://a-bucket/set"))
    store.put("set/a.bin", b"new")
    remote.fetch.cache_clear()

    def full(file: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "close_durably", full)
    with pytest.raises(DataError, match="No space left on device; make room, or set MESHLM_CACHE"):
        remote.fetch("gs://a-bucket/set")
    assert contents(folder) == {"a.bin": b"old"}
    assert not [name for name in contents(remote.cache_folder() / "state") if name.endswith(".partial")]


def test_keys_of_any_characters(store):
    """A file in the cache has the same name as its key."""
    for key in ("set/caf\xe9 \u4e2d.bin", "set/#?%.bin", "set/back\\slash.bin", "set/~.bin"):
        store.put(key, key.encode())
    folder = pathlib.Path(remote.fetch("gs://a-bucket/set"))
    assert contents(folder) == {key.removeprefix("set/"): content for key, content in store.objects.items()}


@schemes
def test_files_of_a_dataset_in_a_store_are_never_taken_for_loose_ones(scheme, store, tmp_path):
    """Only the store's current content counts: a manifest that exists only in the cache is ignored."""
    path = f"{scheme}://a-bucket/sets/dataset"
    for name, content in contents(runs.dataset(tmp_path)).items():
        store.put(f"sets/dataset/{name}", content)
    for pattern in ("*.bin", "train-*.bin", "val-00000.bin"):
        with pytest.raises(DataError, match=f"name the folder itself: {path}$"):
            sources.open_sources(DataConfig(path=f"{path}/{pattern}"), 60_000)
    sources.open_sources(DataConfig(path=path))
    del store.objects["sets/dataset/manifest.json"]
    remote.fetch.cache_clear()
    assert sources.open_sources(DataConfig(path=f"{path}/train-*.bin"), 60_000)


def test_a_run_from_a_store_is_that_from_the_folder(store, tmp_path):
    """A mixture of a dataset in a store and one in a folder can be opened, too."""
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
