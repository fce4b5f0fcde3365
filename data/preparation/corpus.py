"""Finds the files of a corpus, which is a file, a directory, a glob, or a corpus known by name."""

import dataclasses
import errno
import hashlib
import http.client
import os
import pathlib
import stat
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import IO, NamedTuple

from data.errors import DataError
from data.preparation import recognize, spool, walk
from data.preparation.input_errors import InputErrors
from data.storage import names
from data.storage.files import write_durably

SHAKESPEARE_REPOSITORY_FILE = "karpathy/char-rnn, file data/tinyshakespeare/input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Folders below the standard library that do not have its own source code.
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "pydoc_data", "encodings"}


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file of a corpus. `name` is relative to the corpus, so splits by name do not depend on its location."""

    name: str
    path: pathlib.Path
    kind: str = recognize.TEXT  # 'text' (the file is a document), 'jsonl' or 'parquet' (each record is a document)
    compression: str = ""  # 'gz', 'zst', or '' for none
    content: str = ""  # a hash of the content, if known; it replaces inode and times in comparisons (spool.py)

    def size(self) -> int:
        """The current size on disk, in bytes."""
        return self.path.stat().st_size

    def open(self) -> IO[bytes]:
        return open_source(self.path)


def open_source(path: str | pathlib.Path) -> IO[bytes]:
    """Opens a file for reading bytes. Raises DataError if it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


class Found(NamedTuple):
    files: list[File]  # sorted by name
    left_out: InputErrors


def is_there(source: str) -> bool:
    """Whether the source is on this machine."""
    if source == "tinyshakespeare":
        return False
    root = source if os.path.lexists(source) else names.split_at_wildcard(source)[0]
    return source == "python-stdlib" or os.path.lexists(root)


def find_files(
    source: str,
    cache: pathlib.Path,
    *,
    kind: str = "auto",
    bad_records: str = "error",
    own: Sequence[pathlib.Path] = (),
    tokenizer: pathlib.Path | None = None,
) -> Found:
    """The files of `source`, and what was left out.

    Args:
      source: PATH of a file or directory, a glob (** allowed), 'python-stdlib' or 'tinyshakespeare'.
      cache: the folder for downloads.
      kind: the kind of all files, one of recognize.KINDS; 'auto' detects the kind of each file.
      bad_records: 'skip' leaves out files of a folder or glob that are not text; 'error' reports the first one.
      own: paths that the preparation itself writes, which are ignored.
      tokenizer: the tokenizer's file, which is left out even if it looks like text.

    Raises:
      DataError: the source does not exist or has no text; a file cannot be read, or is not text.
    """
    left_out = InputErrors()
    if source == "python-stdlib":
        return Found(_python_stdlib(), left_out)
    if source == "tinyshakespeare":
        return Found([File("tinyshakespeare.txt", tinyshakespeare(cache))], left_out)
    path = pathlib.Path(source)
    status, not_text = _status(path), _status(tokenizer) if tokenizer is not None else None
    if status is not None:
        names.check_one_meaning(source)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        if not_text is not None and os.path.samestat(status, not_text):
            raise DataError(f"--source={source} is the tokenizer; name the text")
        return Found([_named(path, status, kind)], left_out)
    root, pattern = (path, walk.ALL) if status is not None else names.split_at_wildcard(source)
    there = walk.walk(root, pattern, left_out, _skip(own)) if _status(root) is not None else []
    if status is None and not there:
        raise DataError(
            f"--source={source} is not a file, a directory or a glob that matches a text, and not one of the corpora "
            f"known by name: python-stdlib, tinyshakespeare. {_listed(left_out)}"
        )
    if not_text is not None:
        there = [one for one in there if not _is_tokenizer(one, not_text, left_out)]
    files = [file for one in there if (file := _recognized(one, kind, bad_records, left_out)) is not None]
    if not files:
        raise DataError(f"--source={source} holds no text: {_listed(left_out) or 'it is empty'}")
    return Found(files, left_out)


def named_as_held_out(source: str, files: Sequence[File]) -> list[str]:
    """The files of a folder or a glob whose names say that they are for validation or tests."""
    if source in ("python-stdlib", "tinyshakespeare") or os.path.isfile(source):
        return []
    return [file.name for file in files if names.has_word(file.name, names.TEST)]


def is_pipe(source: str) -> bool:
    """Whether the source is a pipe, which can be read only once. Raises DataError if its status cannot be read."""
    status = _status(pathlib.Path(source))
    return status is not None and stat.S_ISFIFO(status.st_mode)


def _status(path: pathlib.Path) -> os.stat_result | None:
    """The status of a file; None if it does not exist."""
    try:
        return path.stat()
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno not in walk.NOWHERE and e.errno != errno.ENAMETOOLONG:
            raise DataError(f"cannot read {path}: {e.strerror}") from None
        return None


def _named(path: pathlib.Path, status: os.stat_result, kind: str) -> File:
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"--source={path} is not a regular file; write its content to one, or use --source=- < {path}")
    if not status.st_size:
        raise DataError(f"--source={path} holds no text: it is empty")
    found = recognize.recognize(path, kind)
    return File(path.name, path, found.name, found.compression, spool.content_hash(path))


def _recognized(there: walk.Found, kind: str, bad_records: str, left_out: InputErrors) -> File | None:
    path = pathlib.Path(there.path)
    try:
        found = recognize.recognize(path, kind)
    except recognize.Refusal as e:
        if not e.is_beside and bad_records == "error":
            raise DataError(f"{e}; --bad_records=skip leaves such files out, counted") from None
        what = f"{e.what}; {e.advice}" if e.is_beside and not e.is_media else e.what
        left_out.record("media, left out" if e.is_media else "not text, left out", f"{path} ({what})")
        return None
    return File(there.name, path, found.name, found.compression)


def _is_tokenizer(there: walk.Found, tokenizer: os.stat_result, left_out: InputErrors) -> bool:
    if there.size != tokenizer.st_size or not os.path.samestat(os.stat(there.path), tokenizer):
        return False
    left_out.record("the tokenizer, left out", there.path)
    return True


def _listed(left_out: InputErrors) -> str:
    return "; ".join(f"{kind}: {n}, first {left_out.examples[kind][0]}" for kind, n in left_out.counts.items())


def _skip(own: Sequence[pathlib.Path]) -> walk.Skip:
    places = {(os.path.realpath(path.parent), path.name) for path in own}
    own_names = {name for _, name in places}
    return lambda folder, name: name in own_names and (os.path.realpath(folder), name) in places


def _python_stdlib() -> list[File]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    there = walk.walk(root, "**/*.py", InputErrors(), lambda folder, name: name in STDLIB_SKIP)
    return [File(one.name, path) for one in there if _is_utf8(path := pathlib.Path(one.path))]


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
                f"cannot download tinyshakespeare ({getattr(e, 'reason', e)}); download it in another way from GitHub "
                f"({SHAKESPEARE_REPOSITORY_FILE}), put it at {path} and run this again, or name your copy with "
                "--source=PATH"
            ) from None
        _check_sha256(raw, SHAKESPEARE_URL)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_durably(path, raw)
        except OSError as e:
            raise DataError(f"cannot write tinyshakespeare to {path}: {e.strerror}") from None
    else:
        _check_sha256(path.read_bytes(), str(path))
    return path


def _check_sha256(raw: bytes, where: str) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(
            f"{where} is not tinyshakespeare: sha256 {found} ({len(raw)} bytes), expected {SHAKESPEARE_SHA256} "
            "(1115394 bytes); remove it and download it again"
        )


def split_files(files: list[File], val_fraction: float) -> tuple[list[File], list[File]]:
    """Training and validation files. Files are taken for validation in the order of a hash of their names, until they
    have `val_fraction` of the bytes.

    A file is skipped if the validation files would have more than twice that share, or most of the corpus. At least one
    file stays on each side. A corpus of one file is not split here (see pipeline.make_plan).
    """
    if val_fraction > 0.5:
        val, train = split_files(files, 1 - val_fraction)
        return train, val
    sizes = {file.name: file.size() for file in files}
    wanted = val_fraction * sum(sizes.values())
    most = min(2 * wanted, max(sum(sizes.values()) / 2, 1.25 * wanted))
    chosen: set[str] = set()
    size, rest = 0, []
    for name in sorted(sizes, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if size < wanted and size + sizes[name] <= most:
            chosen.add(name)
            size += sizes[name]
        else:
            rest.append(name)
    if wanted and size < wanted and len(rest) > 1:
        nearest = min(rest, key=sizes.__getitem__)
        if not chosen or size + sizes[nearest] - wanted < wanted - size:
            chosen.add(nearest)
    return [file for file in files if file.name not in chosen], [file for file in files if file.name in chosen]
