"""Token files of other programs, read in place: nanoGPT, llm.c, Megatron and OLMo. Nothing is copied, written or
unpickled, and every number in a header is compared with the files before a token is used.

This module finds the files of a path, and reads their formats and headers. docs/formats.md describes the layouts;
fingerprint.py reads the content; not_tokens.py recognises files that are not token files.
"""

import dataclasses
import functools
import logging
import pathlib
import struct
from collections.abc import Callable, Mapping

import numpy as np

from data import tokenizers
from data.errors import DataError
from data.storage import names, remote
from data.token_files import formats, not_tokens

log = logging.getLogger("meshlm")

SUFFIXES = (".bin", ".npy", ".idx")
# llm.c's files begin with 256 int32. By their magic: (version, dtype), from llm.c's dev/data/data_common.py.
LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
LLMC_HEADER_BYTES = 1024
LLMC_OTHERS = {20240522: "an llm.c evaluation file", 20240326: "an llm.c model"}
DOCUMENTS = ".documents.bin"  # a file of 64-bit offsets in a dataset of launch.prepare; the first offset is 0
NUMPY_MAGIC = b"\x93NUMPY"
# Megatron's index, from megatron/core/datasets/indexed_dataset.py.
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
MEGATRON_DTYPES = ("", "uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
MEGATRON_NAMES = ("_document", "_sentence")  # how its preprocess_data.py ends the names of both files
MEGATRON_CHUNK = 1 << 20  # sequences checked at a time, because an index may be larger than memory


@dataclasses.dataclass(frozen=True)
class TokenFile:
    path: pathlib.Path
    kind: str
    stored_dtype: str  # 'uint8', 'int8', 'uint16', 'int16', 'uint32' or 'int32', little-endian
    offset: int  # bytes before the first token
    tokens: int
    documents: int = 0  # 0: the format does not say
    headerless: bool = False  # raw tokens: the file does not say how wide they are

    @property
    def dtype(self) -> str:
        """The dtype for reading: the unsigned type of the same width, so that negative ids become very large ones."""
        return self.stored_dtype if self.stored_dtype.startswith("u") else "u" + self.stored_dtype

    @property
    def id_limit(self) -> int:
        """All ids of an undamaged file are below this number, for any vocabulary."""
        return int(np.iinfo(self.stored_dtype).max) + 1

    @property
    def nbytes(self) -> int:
        return self.tokens * np.dtype(self.dtype).itemsize


class Files(formats.TokenFiles):
    """The token files of one split, memory-mapped. Attributes: see formats.TokenFiles; text_bytes is 0 (unknown)."""

    advice = "it belongs to another vocabulary or data.dtype"

    def __init__(self, files: list[TokenFile], vocab_size: int):
        self.vocab_size = min(vocab_size or files[0].id_limit, files[0].id_limit)  # a vocab_size of 0 is not known
        self.tokens = sum(f.tokens for f in files)
        self.text_bytes = 0
        self.paths = [f.path for f in files]
        self.shards = [_mapped(f) for f in files]


def _mapped(file: TokenFile) -> np.ndarray:
    if not file.tokens:
        return np.empty(0, file.dtype)
    check_size(file)
    return np.memmap(file.path, np.dtype(file.dtype).newbyteorder("<"), "r", file.offset, (file.tokens,))


def check_size(file: TokenFile) -> None:
    """Raises DataError if the size of the file has changed since its header was read."""
    if (size := file.path.stat().st_size) != file.offset + file.nbytes:
        raise DataError(
            f"{file.path} is {size} bytes, and was {file.offset + file.nbytes} a moment ago; start again when no "
            "program writes it any more"
        )


def find_token_files(path: str) -> list[pathlib.Path]:
    """The token files of a file, a folder (its .bin and .npy) or a glob, on this machine or in a store, sorted by name.

    Raises:
      DataError: there are no token files.
      OSError: a folder cannot be read.
    """
    place = pathlib.Path(remote.fetch(path) if remote.is_remote(path) else path)
    if place.exists() and not remote.is_remote(path):  # in a store, no one makes such a name by accident
        names.check_one_meaning(path)
    found = remote.fetch_files(path) if remote.is_remote(path) else _find_local(place)
    if place.is_dir():
        if (place / "tokenizer" / tokenizers.FILE_NAME).exists():  # document offsets of a dataset are not tokens
            raise DataError(f"{path} is a meshlm dataset; leave data.format empty (without a manifest: prepare again)")
        found = [p for p in found if p.parent == place and p.suffix in SUFFIXES and not p.name.startswith(".")]
    # The name of a Megatron index becomes the name of its tokens, so that a glob may select both files.
    files = sorted({p.with_suffix(".bin") if p.suffix == ".idx" else p for p in found})
    if not files:
        raise DataError(
            f"no token file matches {path}; name .bin or .npy files by a path, a folder or a glob, or a dataset "
            "folder made by launch.prepare"
        )
    return files


def folder_and_pattern(place: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The folder of a path or glob, and the pattern of the names below it. Raises DataError."""
    return (place, "*") if place.is_dir() else names.split_at_wildcard(str(place))


def _find_local(place: pathlib.Path) -> list[pathlib.Path]:
    """The file, the files of the folder, or the files that the glob selects; a file with two names is listed once."""
    if place.is_file():
        return [place]
    root, pattern = folder_and_pattern(place)
    found, repeated = names.find_files(root, pattern) if pattern else ([], 0)
    if repeated:
        log.warning(
            "%s: %d name(s) are links to files that have another name there; each file is read once (earlier versions "
            "read it twice, and their runs cannot be resumed like this: list the files without the links)",
            place, repeated,
        )  # fmt: skip
    return [root / name for name in found]


def read_headers(paths: list[pathlib.Path], kind: str, dtype: str) -> list[TokenFile]:
    """Reads and checks the headers of the files, which must all have one format and type.

    Args:
      kind: a key of READERS; '': detect the format.
      dtype: 'uint16' or 'uint32', for files that do not say their type; '': uint16.

    Raises:
      DataError: a file contradicts itself, its index, `dtype` or the first file, or is not a token file.
    """
    files = [READERS[kind or detect_format(path)](path, dtype) for path in paths]
    _check_distinct(paths)
    first = files[0]
    for file in files:
        for what, a, b in (("format", first.kind, file.kind), ("type", first.stored_dtype, file.stored_dtype)):
            if a != b:
                raise DataError(
                    f"{first.path} has the {what} {a}, but {file.path} has {b}; name files of one kind, for example by "
                    "a glob in data.path"
                )
    if dtype and dtype != first.dtype:
        raise DataError(f"data.dtype is {dtype}, but {first.path} has {first.stored_dtype}; leave data.dtype empty")
    return files


def _check_distinct(paths: list[pathlib.Path]) -> None:
    """Raises DataError for one file under two names: the run would train on it twice, or train and validate on it."""
    names: dict[tuple[int, int], pathlib.Path] = {}
    for path in paths:
        stat = path.stat()
        if (other := names.setdefault((stat.st_dev, stat.st_ino), path)) != path:
            raise DataError(f"{other} and {path} are the same file under two names; name it once")


def unread_files(path: str, files: Mapping[str, list[TokenFile]]) -> list[str]:
    """The files in the folder data.path that the run does not read; empty if data.path is not a folder."""
    folder = pathlib.Path(path)
    if not files or not folder.is_dir():
        return []
    read = {file.path.name for of_split in files.values() for file in of_split}
    read |= {str(pathlib.PurePath(name).with_suffix(".idx")) for name in read}
    return sorted(p.name for p in folder.iterdir() if p.name not in read and not p.name.startswith("."))


def detect_format(path: pathlib.Path) -> str:
    """The format of a file, by its name, its index and its first bytes. Raises DataError if it is not a token file."""
    if path.suffix == ".npy":
        return "olmo"
    if path.suffix != ".bin":
        raise DataError(f"{path} is neither .bin nor .npy; set data.format ({', '.join(READERS)})")
    if path.with_suffix(".idx").exists():
        return "megatron"
    if path.stem.endswith(MEGATRON_NAMES):
        raise DataError(
            f"{path} is named as Megatron's tokens are, but {path.with_suffix('.idx').name} is not beside it; copy it "
            "there, or set data.format to nanogpt (and data.dtype) if there is none"
        )
    head = _head(path, LLMC_HEADER_BYTES)
    magic = int.from_bytes(head[:4], "little")
    if magic in LLMC:
        return "llmc"
    # 253 zeros in a row are a damaged or newer header. If it were read as nanoGPT's, the run would train on it.
    if magic in LLMC_OTHERS or (len(head) == LLMC_HEADER_BYTES and not any(head[12:])):
        what = LLMC_OTHERS.get(magic, "not a known llm.c file, although it has such a header")
        raise DataError(f"{path} is {what} (magic {magic}); name files of training tokens, or set data.format")
    return "nanogpt"


def _head(path: pathlib.Path, count: int) -> bytes:
    with path.open("rb") as f:
        return f.read(count)


def _refuse_others(path: pathlib.Path) -> None:
    """Raises DataError for a file that is neither a token file nor the index of one."""
    head = _head(path, not_tokens.HEAD_BYTES)
    what = not_tokens.describe(head)
    if path.name.endswith(DOCUMENTS) and not any(head[:8]):
        what = "the document offsets of a dataset of launch.prepare; name the folder of the dataset"
    if what:
        raise DataError(f"{path} does not contain tokens: it is {what}")


def _headerless(kind: str, path: pathlib.Path, dtype: str) -> TokenFile:
    """Raw tokens to the last byte, as in nanoGPT's prepare.py and OLMo's memmaps."""
    if _head(path, len(NUMPY_MAGIC)) == NUMPY_MAGIC:
        raise DataError(
            f"{path} was saved by numpy.save, with a header, and is not a raw memmap as OLMo's files are; write only "
            "the tokens: numpy.load(FILE).astype('uint16').tofile(OTHER), or 'uint32' for a vocabulary above 65,536"
        )
    _refuse_others(path)
    dtype = dtype or "uint16"
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0:
        raise DataError(f"{path} is empty: 0 bytes; copy it again or leave it out")
    if size % width:
        raise DataError(
            f"{path} is {size} bytes, not a multiple of the {width} bytes of a {dtype} token; it is truncated, or "
            "data.dtype is not its type"
        )
    return TokenFile(path, kind, dtype, 0, size // width, headerless=True)


def _llmc(path: pathlib.Path, dtype: str) -> TokenFile:
    head, size = _head(path, 12), path.stat().st_size
    if size < LLMC_HEADER_BYTES:
        raise DataError(f"{path} is {size} bytes, expected at least the {LLMC_HEADER_BYTES} of llm.c's header")
    magic, version, tokens = struct.unpack("<iii", head)
    if magic not in LLMC or LLMC[magic][0] != version:
        known = " or ".join(f"{m}, version {v}" for m, (v, _) in LLMC.items())
        raise DataError(f"{path} begins with magic {magic}, version {version}; llm.c's token files have {known}")
    stored = LLMC[magic][1]
    expected = LLMC_HEADER_BYTES + tokens * np.dtype(stored).itemsize
    if tokens < 0 or size != expected:
        raise DataError(
            f"{path} is {size} bytes, expected {expected} ({LLMC_HEADER_BYTES} and {tokens} tokens of {stored}); "
            "it was truncated or replaced: copy it again"
        )
    return TokenFile(path, "llmc", stored, LLMC_HEADER_BYTES, tokens)


def _megatron(path: pathlib.Path, dtype: str) -> TokenFile:
    index = path.with_suffix(".idx")
    for file in (path, index):
        if not file.exists():
            raise DataError(f"{file} is missing: Megatron's tokens are {path.name} and {index.name}, side by side")
    _refuse_others(path)
    size, head = index.stat().st_size, _head(index, MEGATRON_HEADER.size)
    if len(head) < MEGATRON_HEADER.size:
        raise DataError(f"{index}, the index of {path}, is {size} bytes, expected at least {MEGATRON_HEADER.size}")
    magic, version, code, sequences, boundaries = MEGATRON_HEADER.unpack(head)
    if magic != MEGATRON_MAGIC:
        _refuse_others(index)
    if magic != MEGATRON_MAGIC or version != 1:
        raise DataError(
            f"{index}, the index of {path}, begins with {magic!r}, version {version}; Megatron's have "
            f"{MEGATRON_MAGIC!r}, version 1"
        )
    stored = MEGATRON_DTYPES[code] if code < len(MEGATRON_DTYPES) else ""
    if stored in ("", "int64", "float64", "float32"):
        raise DataError(
            f"{index} gives {path} the type code {code} ({stored or 'unknown'}); integers of 1, 2 or 4 bytes are read: "
            "preprocess again with Megatron's --vocab-size, or convert .bin and .idx to int32"
        )
    expected = MEGATRON_HEADER.size + 12 * sequences + 8 * boundaries
    raw = np.asarray(np.memmap(index, np.uint8, "r"))
    if (size := len(raw)) not in (expected, expected + sequences):  # one byte for each sequence, its mode, may follow
        raise DataError(
            f"{index}, the index of {path}, is {size} bytes, expected {expected} ({sequences} sequences, {boundaries} "
            "document boundaries); it was truncated or replaced: copy both again"
        )
    ends = MEGATRON_HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * boundaries])
    lengths, offsets, documents = (
        raw[start:stop].view(t) for start, stop, t in zip(ends[:-1], ends[1:], ("<i4", "<i8", "<i8"), strict=True)
    )
    _check_documents(documents, sequences, path, index)
    width = np.dtype(stored).itemsize
    end, size = _end_of_sequences(lengths, offsets, width, path, index), path.stat().st_size
    if end != size:
        raise DataError(
            f"{path} is {size} bytes, but the sequences of {index} end at byte {end}; one of the two was truncated or "
            "replaced: copy both again"
        )
    return TokenFile(path, "megatron", stored, 0, size // width, boundaries - 1)


def _check_documents(documents: np.ndarray, sequences: int, path: pathlib.Path, index: pathlib.Path) -> None:
    """Raises DataError unless the boundaries start at 0, never decrease, and end at the number of sequences."""
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        found = f"from {documents[0]} to {documents[-1]}" if len(documents) else "missing"
        raise DataError(f"{index}: the document boundaries of {path} are {found}, expected from 0 to {sequences}")
    for start in range(0, len(documents) - 1, MEGATRON_CHUNK):
        part = documents[start : start + MEGATRON_CHUNK + 1]
        falls = np.flatnonzero(part[1:] < part[:-1])
        if falls.size:
            i = int(falls[0])
            raise DataError(
                f"{index}: document {start + i} of {path} starts at sequence {part[i]} and ends at {part[i + 1]}; copy "
                "both again"
            )


def _end_of_sequences(
    lengths: np.ndarray, offsets: np.ndarray, width: int, path: pathlib.Path, index: pathlib.Path
) -> int:
    """The byte after the last sequence. Raises DataError unless the sequences are contiguous from byte 0."""
    end = 0
    for start in range(0, len(lengths), MEGATRON_CHUNK):
        part = lengths[start : start + MEGATRON_CHUNK].astype(np.int64)
        expected = end + width * (np.cumsum(part) - part)
        wrong = np.flatnonzero((part < 0) | (offsets[start : start + MEGATRON_CHUNK] != expected))
        if wrong.size:
            i = int(wrong[0])
            raise DataError(
                f"{index}: sequence {start + i} has {part[i]} tokens at byte {offsets[start + i]} of {path}, expected "
                f"at byte {expected[i]}, after the one before; only files without gaps are read: preprocess again"
            )
        end += width * int(part.sum())
    return end


# The readers of other programs' formats. A new format needs a function here, and a case in `detect_format`.
READERS: dict[str, Callable[[pathlib.Path, str], TokenFile]] = {
    "nanogpt": functools.partial(_headerless, "nanogpt"),
    "llmc": _llmc,
    "megatron": _megatron,
    "olmo": functools.partial(_headerless, "olmo"),
}


def format_names() -> tuple[str, ...]:
    """The values of data.format: meshlm, for a dataset folder (formats.py), and the formats of other programs."""
    return ("meshlm", *READERS)
