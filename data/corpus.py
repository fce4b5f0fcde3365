"""Where text comes from: a file, a directory, a glob, or a corpus known by name. A corpus is a list of documents."""

import dataclasses
import glob
import hashlib
import http.client
import itertools
import os
import pathlib
import sysconfig
import urllib.error
import urllib.request

from data.errors import DataError

SHAKESPEARE_REPOSITORY_FILE = "karpathy/char-rnn, file data/tinyshakespeare/input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Folders of the standard library that are not what a reader would call its source.
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "pydoc_data", "encodings"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of text. `name` does not depend on where the corpus lies, so splits by name are the same anywhere."""

    name: str
    path: pathlib.Path

    def size(self) -> int:
        return self.path.stat().st_size

    def read_bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror}") from None

    def read_text(self, invalid_utf8: str = "error") -> str:
        """The document as text, with newlines as they are. `invalid_utf8`: 'error' stops, 'replace' puts U+FFFD."""
        raw = self.read_bytes()
        try:
            return raw.decode("utf-8", "strict" if invalid_utf8 == "error" else "replace")
        except UnicodeDecodeError as e:
            raise DataError(
                f"{self.path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}; convert the file, "
                "use --invalid_utf8=replace, or --tokenizer=byte, which takes any bytes"
            ) from None


def find(source: str, cache: pathlib.Path) -> list[Document]:
    """The documents of `source`, sorted by name, empty files left out.

    Args:
      source: PATH of a file or directory, a glob (** allowed), 'python-stdlib' or 'tinyshakespeare'.
      cache: where a download is kept.

    Raises:
      DataError: nothing there, or nothing in it.
    """
    if source == "python-stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        documents = [
            Document(p.relative_to(root).as_posix(), p)
            for p in root.rglob("*.py")
            if not STDLIB_SKIP & set(p.relative_to(root).parts) and _is_utf8(p)
        ]
    elif source == "tinyshakespeare":
        documents = [Document("tinyshakespeare.txt", tinyshakespeare(cache))]
    elif os.path.isdir(source):
        root = pathlib.Path(source)
        documents = [
            Document(p.relative_to(root).as_posix(), p)
            for p in root.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
        ]
    elif os.path.exists(source):
        documents = [Document(os.path.basename(source), pathlib.Path(source))]
    else:
        # Names are relative to the part before the first wildcard. Several ** can match one file more than once.
        root = pathlib.Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pathlib.Path(source).parts))
        paths = {pathlib.Path(p) for p in glob.glob(source, recursive=True) if os.path.isfile(p)}
        documents = [Document(p.relative_to(root).as_posix(), p) for p in paths]
        if not documents:
            raise DataError(
                f"--source={source} is no file, directory or matching glob, and not one of the corpora known by name: "
                "python-stdlib, tinyshakespeare"
            )
    documents = sorted((d for d in documents if d.size() > 0), key=lambda d: d.name)
    if not documents:
        raise DataError(f"--source={source} holds no text: it is empty, or every file in it is")
    return documents


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


def split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents, whole, chosen by a hash of their names until `val_fraction` of the bytes is met.

    At least one document stays on each side. A corpus of one document is not split here (see prepare).
    """
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    wanted = val_fraction * sum(d.size() for d in documents)
    val: list[Document] = []
    size = 0
    while size < wanted and len(val) < len(documents) - 1:
        val.append(by_hash[len(val)])
        size += val[-1].size()
    names = {d.name for d in val}
    return [d for d in documents if d.name not in names], [d for d in documents if d.name in names]
