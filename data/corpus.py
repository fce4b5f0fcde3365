"""Where text comes from: a file, a directory, a glob, or a corpus known by name. A corpus is a list of files."""

import dataclasses
import glob
import hashlib
import http.client
import itertools
import os
import pathlib
import sysconfig
import tempfile
import urllib.error
import urllib.request
from typing import IO

from data.errors import DataError

SHAKESPEARE_REPOSITORY_FILE = "karpathy/char-rnn, file data/tinyshakespeare/input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Folders of the standard library that are not what a reader would call its source.
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "pydoc_data", "encodings"}


@dataclasses.dataclass(frozen=True)
class File:
    """A file of text, JSON lines or Parquet, told by its name, perhaps compressed.

    `name` does not depend on where the corpus lies, so splits by name are the same anywhere.
    """

    name: str
    path: pathlib.Path

    @property
    def compression(self) -> str:
        suffix = self.path.suffix.lower()
        return suffix[1:] if suffix in (".gz", ".zst") else ""

    @property
    def kind(self) -> str:
        """'text' (the file is one document), 'jsonl' or 'parquet' (a document a record)."""
        name = self.path.with_suffix("") if self.compression else self.path
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(name.suffix.lower(), "text")

    def size(self) -> int:
        return self.path.stat().st_size

    def open(self) -> IO[bytes]:
        try:
            return self.path.open("rb")
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror}") from None


def find(source: str, cache: pathlib.Path) -> list[File]:
    """The files of `source`, sorted by name, empty ones left out.

    Args:
      source: PATH of a file or directory, a glob (** allowed), 'python-stdlib' or 'tinyshakespeare'.
      cache: where a download is kept.

    Raises:
      DataError: nothing there, or nothing in it.
    """
    if source == "python-stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = [
            File(p.relative_to(root).as_posix(), p)
            for p in root.rglob("*.py")
            if not STDLIB_SKIP & set(p.relative_to(root).parts) and _is_utf8(p)
        ]
    elif source == "tinyshakespeare":
        files = [File("tinyshakespeare.txt", tinyshakespeare(cache))]
    elif os.path.isdir(source):
        root = pathlib.Path(source)
        files = [
            File(p.relative_to(root).as_posix(), p)
            for p in root.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
        ]
    elif os.path.exists(source):
        files = [File(os.path.basename(source), pathlib.Path(source))]
    else:
        # Names are relative to the part before the first wildcard. Several ** can match one file more than once.
        root = pathlib.Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pathlib.Path(source).parts))
        paths = {pathlib.Path(p) for p in glob.glob(source, recursive=True) if os.path.isfile(p)}
        files = [File(p.relative_to(root).as_posix(), p) for p in paths]
        if not files:
            raise DataError(
                f"--source={source} is no file, directory or matching glob, and not one of the corpora known by name: "
                "python-stdlib, tinyshakespeare"
            )
    files = sorted((d for d in files if d.size() > 0), key=lambda d: d.name)
    if not files:
        raise DataError(f"--source={source} holds no text: it is empty, or every file in it is")
    return files


def spool(stream: IO[bytes], folder: pathlib.Path, suffix: str) -> pathlib.Path:
    """Keeps a stream in a file of `folder`, named and dated so that the same text is the same file.

    Raises:
      DataError: the folder cannot be written.
    """
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".stdin-", delete=False) as f:
            try:
                while block := stream.read(1 << 20):
                    f.write(block)
                    digest.update(block)
            except BaseException:
                os.unlink(f.name)
                raise
        path = folder / f".stdin-{digest.hexdigest()[:16]}.{suffix}"
        os.utime(f.name, (0, 0))
        return pathlib.Path(f.name).replace(path)
    except OSError as e:
        raise DataError(f"cannot keep standard input in {folder}: {e.strerror}") from None


def _is_utf8(path: pathlib.Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def tinyshakespeare(cache: pathlib.Path) -> pathlib.Path:
    """Karpathy's tiny Shakespeare, 1,115,394 bytes, from `cache` or the network, checked by its sha256."""
    path = cache / "tinyshakespeare.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                raw = response.read()
        except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
            raise DataError(
                f"cannot download tinyshakespeare ({getattr(e, 'reason', e)}); fetch it by other means from GitHub "
                f"({SHAKESPEARE_REPOSITORY_FILE}), put it at {path} and run this again, or name your copy with "
                "--source=PATH"
            ) from None
        _check_sha256(raw, SHAKESPEARE_URL)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(raw)
        partial.replace(path)
    else:
        _check_sha256(path.read_bytes(), str(path))
    return path


def _check_sha256(raw: bytes, where: str) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(
            f"{where} is not tinyshakespeare: sha256 {found} ({len(raw)} bytes), expected {SHAKESPEARE_SHA256} "
            "(1115394 bytes); remove it and fetch it again"
        )


def split(files: list[File], val_fraction: float) -> tuple[list[File], list[File]]:
    """Train and validation files, whole, chosen by a hash of their names until `val_fraction` of the bytes is met.

    At least one file stays on each side. A corpus of one file is not split here (see prepare).
    """
    by_hash = sorted(files, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    wanted = val_fraction * sum(d.size() for d in files)
    val: list[File] = []
    size = 0
    while size < wanted and len(val) < len(files) - 1:
        val.append(by_hash[len(val)])
        size += val[-1].size()
    names = {d.name for d in val}
    return [d for d in files if d.name not in names], [d for d in files if d.name in names]
