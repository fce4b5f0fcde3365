"""Data in object stores (gs://, s3://), which is copied into a local cache (cache.py) and read from there.

Only objects that the store lists are read, even if the cache has copies of others. Stores are read through tensorstore
(docs/data.md: credentials).
"""

import functools
import itertools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from data.errors import DataError
from data.storage import names
from data.storage.cache import Cache

log = logging.getLogger("meshlm")

SCHEMES = ("gs://", "s3://")
BLOCK_BYTES = 64 << 20  # bytes that are fetched, and in memory, at a time
TIMEOUT_S = 60  # for one call, such as reading a block
CACHE_VARIABLE = "MESHLM_CACHE"


def is_remote(path: str) -> bool:
    return path.startswith(SCHEMES)


def parse(path: str) -> tuple[str, str, str]:
    """The scheme, the bucket and the key ('' for the whole bucket) of gs://BUCKET/KEY or s3://BUCKET/KEY.

    Raises:
      DataError: the key is not a path below a folder, such as a/../b, or /data in gs://BUCKET//data.
    """
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    key = key.removesuffix("/")
    if not bucket:
        raise DataError(f"{path} names no bucket; write {scheme}://BUCKET/PATH")
    names.safe_parts(f"{bucket}/{key}" if key else bucket, path)
    return scheme, bucket, key


def cache_folder() -> pathlib.Path:
    """$MESHLM_CACHE, or a folder in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return pathlib.Path(os.path.expanduser(given or os.path.join(home, "meshlm")), "data")


@functools.cache
def fetch(path: str) -> str:
    """Downloads what has changed of a file, folder or glob in a store; returns its local path. Cached for the process.

    Raises:
      DataError: the path does not exist or cannot be read, or the disk is full.
    """
    scheme, bucket, key = parse(path)
    if not key:
        raise DataError(f"{path} names no object; write {scheme}://BUCKET/PATH")
    store = _open(scheme, bucket, path)
    keys = _matching(store, key, path)
    if not keys:
        copy = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}[scheme]
        raise DataError(f"there is nothing at {path}; put a dataset there, for example with {copy} DATASET {path}")
    cache = Cache(cache_folder(), scheme, bucket)
    try:
        for gone in _stale_keys(cache.keys(), keys, key):
            cache.remove(gone)
        for name in keys:
            _refresh_copy(store, name, cache, f"{scheme}://{bucket}/{name}")
        _fetched[path] = [cache.path(name) for name in keys]
        if len({(s.st_dev, s.st_ino) for s in map(os.stat, _fetched[path])}) < len(keys):
            raise DataError(f"{path} has names that {cache_folder()} cannot distinguish; set {CACHE_VARIABLE}")
    except OSError as e:
        why = e.strerror or e
        raise DataError(f"cannot store {path} in {cache_folder()}: {why}; make room, or set {CACHE_VARIABLE}") from None
    return str(cache.path(key))


def fetch_files(path: str) -> list[pathlib.Path]:
    """Downloads a file, folder or glob in a store; returns the local copies of all its objects. Raises DataError."""
    fetch(path)
    return _fetched[path]


def source_of(copy: pathlib.Path) -> str:
    """The path in the store from which a copy, or a folder of copies, was made."""
    _, scheme, *below = copy.relative_to(cache_folder()).parts
    return f"{scheme}://{'/'.join(below)}"


def read_head(path: str, count: int) -> bytes:
    """The first `count` bytes of an object; empty if it does not exist, or has fewer bytes. Raises DataError."""
    scheme, bucket, key = parse(path)
    found = _read(_open(scheme, bucket, path), os.fsencode(key), path, slice(0, count))
    return found.value if found is not None and found.state == "value" else b""


_fetched: dict[str, list[pathlib.Path]] = {}  # the copies of each path that `fetch` has downloaded


def _stale_keys(copied: set[str], keys: list[str], key: str) -> set[str]:
    """The copies of deleted objects that `key` would select, or that are in the way of objects that `key` selects."""
    folders = {folder for name in keys for folder in itertools.accumulate(name.split("/"), "{}/{}".format)}
    gone = copied - set(keys)
    below = tuple(f"{name}/" for name in keys)
    return (
        _selected(gone, key)
        | _companions(set(keys), gone)
        | (gone & folders)
        | {n for n in gone if n.startswith(below)}
    )


def open_store(location: str) -> Any:
    """A folder, gs://BUCKET/PATH or s3://BUCKET/PATH as a tensorstore.KvStore. Raises DataError."""
    import tensorstore

    if not is_remote(location):
        spec = {"driver": "file", "path": os.path.join(os.path.abspath(location), "")}
        return tensorstore.KvStore.open(spec).result(TIMEOUT_S)
    scheme, bucket, key = parse(location)
    store = _open(scheme, bucket, location)
    return store / f"{key}/" if key else store


def _open(scheme: str, bucket: str, path: str) -> Any:
    import tensorstore

    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return _call(path, tensorstore.KvStore.open, spec)


def _matching(store: Any, key: str, path: str) -> list[str]:
    """The sorted keys of the object, folder or glob `key`. Raises DataError for one that is not a path in a folder."""
    import tensorstore

    glob_at = min((key.index(c) for c in "*?[" if c in key), default=len(key))
    prefix = key[:glob_at].removesuffix(".bin").removesuffix(".idx")
    listed = _call(path, store.list, tensorstore.KvStore.KeyRange(os.fsencode(prefix), _after(prefix)))
    there = {os.fsdecode(name) for name in listed if not name.endswith(b"/")}
    found = _selected(there, key)
    found |= _companions(found, there)
    for name in found:
        names.safe_parts(name, f"{path} has an object {name!r}, which")
    names.check_apart(found, path)
    return sorted(found)


def _selected(there: set[str], key: str) -> set[str]:
    """The names that are the object `key`, are in the folder `key`, or are selected by the pattern `key`."""
    return {
        n for n in there if n == key or n.startswith(f"{key}/") or (names.is_pattern(key) and names.matches(n, key))
    }


def _companions(found: set[str], there: set[str]) -> set[str]:
    """The .bin and .idx files beside each name of `found`: Megatron's tokens are recognised only by their index."""
    stems = {name[:-4] for name in found if name.endswith((".bin", ".idx"))}
    return {stem + suffix for stem in stems for suffix in (".bin", ".idx")} & there


def _after(prefix: str) -> bytes:
    """The first key that does not begin with `prefix`."""
    raw = os.fsencode(prefix).rstrip(b"\xff")
    return raw[:-1] + bytes([raw[-1] + 1]) if raw else b""


def _refresh_copy(store: Any, key: str, cache: Cache, name: str) -> None:
    """Updates the copy in the cache to the object's current content."""
    raw = os.fsencode(key)

    def is_current(generation: bytes) -> bool:
        seen = _read(store, raw, name, slice(0, 1), generation)
        return seen is not None and seen.state == "unspecified"

    def download(f: IO[bytes]) -> bytes:
        start, generation = time.monotonic(), b""
        for block in read_blocks(store, raw, name):
            f.write(block.value)
            generation = block.stamp.generation
        if f.tell() >= BLOCK_BYTES:
            log.info("fetched   %s: %.1f GB in %.0f s", name, f.tell() / 1e9, time.monotonic() - start)
        return generation

    cache.refresh(key, is_current, download)


def read_blocks(store: Any, key: bytes, name: str) -> Iterator[Any]:
    """The blocks of one generation of an object, as ReadResults of tensorstore. Raises DataError."""
    at, generation = 0, None
    while True:
        # A store refuses a range beyond the end of an object, and does not report the object's size.
        full = _read(store, key, name, slice(at + BLOCK_BYTES - 1, at + BLOCK_BYTES)) is not None
        block = _read(store, key, name, slice(at, at + BLOCK_BYTES if full else None) if at or full else None)
        if block is None:  # the object ended with the last block
            return
        generation = generation or block.stamp.generation
        if block.state != "value" or block.stamp.generation != generation:
            raise DataError(f"{name} changed while it was read; start again when it is complete")
        yield block
        if not full:
            return
        at += BLOCK_BYTES


def _read(store: Any, key: bytes, name: str, byte_range: slice | None, if_not_equal: bytes | None = None) -> Any:
    """A ReadResult of tensorstore; None if the object does not have all the requested bytes."""
    try:
        return _call(name, store.read, key, byte_range=byte_range, if_not_equal=if_not_equal)
    except _OutOfRange:
        return None


class _OutOfRange(Exception):
    pass


def _call(path: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a call of tensorstore. Raises DataError, or _OutOfRange for bytes beyond the end of an object."""
    try:
        return method(*arguments, **named).result(timeout=TIMEOUT_S)
    except TimeoutError:
        raise DataError(f"cannot read {path}: no answer within {TIMEOUT_S} s; is there a network?") from None
    except (ValueError, OSError, RuntimeError) as e:
        if str(e).startswith("OUT_OF_RANGE"):
            raise _OutOfRange from None
        hint = {
            "gs://": "log in with gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
            "s3://": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        }.get(path[:5], "let this user read it")
        why = (str(e).splitlines() or [type(e).__name__])[0][:300]
        raise DataError(f"cannot read {path}: {why}; if access is denied, {hint}") from None
