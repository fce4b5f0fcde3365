"""Data in object stores (gs://, s3://): copied into a local cache, and read from there like any other.

    CACHE/files/gs/BUCKET/KEY             a copy of the object
    CACHE/state/gs/BUCKET/KEY.generation  which of its generations that is; the store is asked for another one alone
    CACHE/state/gs/BUCKET/KEY.lock        held by the process of this machine that fetches it

What is gone from the store goes from the cache. Stores are read through tensorstore (docs/data.md: credentials).
"""

import fcntl
import fnmatch
import functools
import glob
import logging
import os
import pathlib
import time
from typing import Any

from data.errors import DataError

log = logging.getLogger("meshlm")

SCHEMES = ("gs://", "s3://")
BLOCK_BYTES = 64 << 20  # fetched, and held in memory, at a time
TIMEOUT_S = 60  # for one block
CACHE_VARIABLE = "MESHLM_CACHE"


def is_remote(path: str) -> bool:
    return path.startswith(SCHEMES)


def cache_folder() -> pathlib.Path:
    """$MESHLM_CACHE, or a folder in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(given or os.path.join(home, "meshlm"), "data")


@functools.cache
def local(path: str) -> str:
    """The local path of a file, folder or glob in a store, after fetching what is new; once for each in a process.

    Raises:
      DataError: nothing is there, it cannot be read, or the cache has no room.
    """
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket or not key.strip("/"):
        raise DataError(f"{path} names no object; write {scheme}://BUCKET/PATH")
    key = key.rstrip("/")
    store = _open(scheme, bucket, path)
    keys = _matching(store, key, path)
    if not keys:
        copy = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}[scheme]
        raise DataError(f"there is nothing at {path}; put a dataset there, for example with {copy} DATASET {path}")
    files, state = (cache_folder() / part / scheme / bucket for part in ("files", "state"))
    try:
        for name in keys:
            _fetch(store, name, files / name, state / name, f"{scheme}://{bucket}/{name}")
        for stale in _copies(files, key) - {files / name for name in keys}:
            stale.unlink(missing_ok=True)
    except OSError as e:
        raise DataError(f"cannot keep {path} in {files}: {e.strerror}; make room, or set {CACHE_VARIABLE}") from None
    return str(files / key)


def _copies(files: pathlib.Path, key: str) -> set[pathlib.Path]:
    """What was fetched for `key` at any time."""
    found = (files / key).rglob("*") if (files / key).is_dir() else map(pathlib.Path, glob.glob(str(files / key)))
    return {path for path in found if path.is_file()}


def open_store(location: str) -> Any:
    """A folder, gs://BUCKET/PATH or s3://BUCKET/PATH as a tensorstore.KvStore of what is below. Raises DataError."""
    import tensorstore

    if not is_remote(location):
        spec = {"driver": "file", "path": os.path.join(os.path.abspath(location), "")}
        return tensorstore.KvStore.open(spec).result(TIMEOUT_S)
    scheme, _, rest = location.partition("://")
    bucket, _, key = rest.partition("/")
    store = _open(scheme, bucket, location)
    return store / (key.rstrip("/") + "/") if key.strip("/") else store


def _open(scheme: str, bucket: str, path: str) -> Any:
    import tensorstore

    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return _wait(tensorstore.KvStore.open(spec), path)


def _matching(store: Any, key: str, path: str) -> list[str]:
    """Keys of the object, of the folder, or of the glob `key`, sorted."""
    import tensorstore

    glob_at = min((key.index(c) for c in "*?[" if c in key), default=len(key))
    prefix = key[:glob_at].removesuffix(".bin").removesuffix(".idx")
    listed = _wait(store.list(tensorstore.KvStore.KeyRange(prefix, _after(prefix))), path)
    names = {name.decode() for name in listed if not name.endswith(b"/")}
    found = {name for name in names if name == key or name.startswith(key + "/")}
    if glob_at < len(key):  # as in a file system, a * does not cross folders
        found |= {n for n in names if n.count("/") == key.count("/") and fnmatch.fnmatchcase(n, key)}
    # Megatron's tokens and their index: without it they would be taken for something else.
    stems = {name[:-4] for name in found if name.endswith((".bin", ".idx"))}
    found |= {stem + suffix for stem in stems for suffix in (".bin", ".idx")} & names
    if any(".." in name.split("/") for name in found):
        raise DataError(f"{path} has an object with '..' in its name, which is no place in a cache")
    return sorted(found)


def _after(prefix: str) -> bytes:
    """The first key that does not begin with `prefix`."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1]) if raw else b""


def _fetch(store: Any, key: str, path: pathlib.Path, state: pathlib.Path, name: str) -> None:
    """Makes `path` the object's content of now. A copy is replaced whole or not at all."""
    for folder in (path.parent, state.parent):
        folder.mkdir(parents=True, exist_ok=True)
    generation, partial = (state.with_name(state.name + suffix) for suffix in (".generation", ".partial"))
    with state.with_name(state.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this machine may be fetching it
        known = generation.read_bytes() if generation.exists() and path.exists() else None
        if known and (seen := _read(store, key, name, slice(0, 1), known)) and seen.state == "unspecified":
            return  # not changed
        start, stamp = time.monotonic(), None
        with partial.open("wb") as f:
            while True:
                # A store refuses a range that goes past the end, and does not say where that is.
                full = _read(store, key, name, slice(f.tell() + BLOCK_BYTES - 1, f.tell() + BLOCK_BYTES)) is not None
                rest = slice(f.tell(), f.tell() + BLOCK_BYTES if full else None)
                block = _read(store, key, name, rest if f.tell() or full else None)
                if block is None:  # the object ended with the last block
                    break
                stamp = stamp or block.stamp
                if block.state != "value" or block.stamp.generation != stamp.generation:
                    raise DataError(f"{name} changed while it was read; start again when it is complete")
                f.write(block.value)
                if not full:
                    break
            size = f.tell()
        assert stamp is not None
        generation.unlink(missing_ok=True)
        partial.replace(path)
        generation.write_bytes(stamp.generation)
        if size >= BLOCK_BYTES:
            log.info("fetched   %s: %.1f GB in %.0f s, kept at %s", name, size / 1e9, time.monotonic() - start, path)


def _read(store: Any, key: str, name: str, byte_range: slice | None, if_not_equal: bytes | None = None) -> Any:
    """tensorstore's ReadResult; None where the object does not have all these bytes."""
    try:
        future = store.read(key, byte_range=byte_range, if_not_equal=if_not_equal)
        return _wait(future, name)
    except _OutOfRange:
        return None


class _OutOfRange(Exception):
    pass


def _wait(future: Any, path: str) -> Any:
    try:
        return future.result(timeout=TIMEOUT_S)
    except TimeoutError:
        raise DataError(f"cannot read {path}: no answer within {TIMEOUT_S} s; is there a network?") from None
    except (ValueError, OSError, RuntimeError) as e:
        if str(e).startswith("OUT_OF_RANGE"):
            raise _OutOfRange from None
        hint = {
            "gs": "log in with gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
            "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        }[path[:2]]
        raise DataError(f"cannot read {path}: {str(e).splitlines()[0][:300]}; where access is denied, {hint}") from None
