"""The content of token files without a manifest, read once at the start: its fingerprint, and checks of the ids."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.token_files import external, widths
from data.token_files.external import TokenFile
from data.tokenizers.base import MAX_ID

# A split up to this size is hashed completely at the start of a run, and every id is checked. In a larger split, only
# the headers, and blocks at fixed positions from the first to the last, are read. Changing these constants
# changes the fingerprint of every large dataset.
WHOLE_BYTES = 1 << 30
CHUNK_BYTES = 16 << 20
SAMPLED_BLOCKS, BLOCK_BYTES = 256, 64 << 10
WIDTH_BLOCKS = 16  # blocks of a file without a header that are examined for the width of its tokens
ZEROS_ARE_DAMAGE = 64  # a file of only zeros is damaged if it has this many; fewer may be tokens


@dataclasses.dataclass(frozen=True)
class Content:
    digest: str  # of header and tokens; 'sampled:…' if only a part of the tokens was read
    largest_id: int  # among the tokens that were read; -1 if there are no tokens
    layout: widths.Layout | None  # the probable layout of a file without a header; None: unclear
    hole: int  # the first byte of a block that is all zeros; -1 if there is none


def read_contents(files: list[TokenFile], whole: bool = False) -> list[Content]:
    """The content of a split's files: of all tokens if `whole` or up to WHOLE_BYTES, otherwise of samples. Cached."""
    whole = whole or sum(f.nbytes for f in files) <= WHOLE_BYTES
    return [_content(f, f.path.stat().st_mtime_ns, os.path.getsize(f.path), whole) for f in files]


@functools.cache
def _content(file: TokenFile, mtime_ns: int, size: int, whole: bool) -> Content:
    digest, largest, hole = hashlib.sha256(), -1, -1
    external.check_size(file)
    with file.path.open("rb") as f:
        digest.update(f.read(file.offset))
        if not whole:
            digest.update(str(size).encode())
        for start, length in _spans(file, whole):
            raw = _read(f, start, length)
            digest.update(raw)
            width = np.dtype(file.dtype).itemsize
            tokens = np.frombuffer(raw, np.dtype(file.dtype).newbyteorder("<"), len(raw) // width)
            largest = max(largest, int(tokens.max(initial=0)))
            if hole < 0 and (block := _zeros(raw)) >= 0:
                hole = start + block * BLOCK_BYTES
        layout = None
        if file.headerless:
            blocks = (_read(f, start, length // 8 * 8) for start, length in _blocks(file, WIDTH_BLOCKS))
            layout = widths.detect_layout(b"".join(blocks))
    return Content(("" if whole else "sampled:") + digest.hexdigest(), largest, layout, hole)


def _zeros(raw: bytes) -> int:
    """The first block of `raw` that is all zeros; -1 if there is none."""
    blocks = np.frombuffer(raw, np.uint64, len(raw) // BLOCK_BYTES * BLOCK_BYTES // 8).reshape(-1, BLOCK_BYTES // 8)
    found = np.flatnonzero(~blocks.any(axis=1))
    return int(found[0]) if found.size else -1


def _read(f: BinaryIO, start: int, length: int) -> bytes:
    f.seek(start)
    if len(raw := f.read(length)) != length:
        raise DataError(f"{f.name} became shorter while it was read; start again when no program writes it any more")
    return raw


def _spans(file: TokenFile, whole: bool) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of the parts to read: all tokens, or evenly spaced blocks from the first to the last."""
    if not whole and file.nbytes > SAMPLED_BLOCKS * BLOCK_BYTES:
        yield from _blocks(file, SAMPLED_BLOCKS)
        return
    end = file.offset + file.nbytes
    for start in range(file.offset, end, CHUNK_BYTES):
        yield start, min(CHUNK_BYTES, end - start)


def _blocks(file: TokenFile, count: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of `count` evenly spaced blocks from the first to the last token; all of a small file."""
    end = file.offset + file.nbytes
    if file.nbytes <= count * BLOCK_BYTES:
        for start in range(file.offset, end, BLOCK_BYTES):
            yield start, min(BLOCK_BYTES, end - start)
        return
    word = 8  # in bytes; at least two tokens of any type, so every block begins at an even token
    for i in range(count - 1):
        yield file.offset + (file.nbytes - BLOCK_BYTES) * i // (count - 1) // word * word, BLOCK_BYTES
    tail = file.offset + (file.nbytes - BLOCK_BYTES) // word * word
    yield tail, end - tail


def check_ids(file: TokenFile, found: Content, dtype: str, vocab_size: int) -> None:
    """Raises DataError if the ids do not fit the type or the vocabulary with which they are read."""
    if file.headerless:
        _check_width(file, found, dtype, vocab_size)
    if found.largest_id == 0 and file.tokens >= ZEROS_ARE_DAMAGE:
        raise DataError(f"{file.path} has only zeros, as an unfinished copy has; copy it again")
    if found.hole >= 0 and not dtype:
        raise DataError(
            f"{file.path} has {BLOCK_BYTES} zeros in a row from byte {found.hole} on, as an unfinished copy has; "
            f"copy it again, or set data.dtype to {file.dtype} if they are its padding"
        )
    if found.largest_id >= file.id_limit:
        raise DataError(f"{file.path} has negative ids in its {file.stored_dtype} tokens; preprocess it again")
    if vocab_size and found.largest_id >= vocab_size:
        raise DataError(
            f"token id {found.largest_id} in {file.path} is outside the vocabulary of {vocab_size}; it needs another "
            "model.vocab_size, data.tokenizer_path or data.dtype"
        )
    if found.largest_id > MAX_ID:  # this also works if the vocabulary is not known
        raise DataError(
            f"token id {found.largest_id} in {file.path} is too large for any vocabulary: it is a mark such as -1, "
            f"or the tokens are not {file.stored_dtype}; write them again, or set data.dtype"
        )


def _check_width(file: TokenFile, found: Content, dtype: str, vocab_size: int) -> None:
    """Raises DataError if the bytes of a file without a header look like tokens of another type.

    A `dtype` that the user set decides unclear cases, but does not permit an impossible type.
    """
    seen = found.layout
    if seen and seen.bytes == 8:
        raise DataError(
            f"{file.path} has 64-bit tokens, which are not supported; write them as 32-bit ones: "
            f"numpy.fromfile(FILE, '{seen.numpy}').astype('<u4').tofile(OTHER), and set data.dtype to uint32"
        )
    if seen and seen.big_endian and (seen.bytes == 4 or not dtype):
        raise DataError(
            f"{file.path} seems to have big-endian {8 * seen.bytes}-bit tokens, or not to begin with a token; write "
            f"them again: numpy.fromfile(FILE, '{seen.numpy}').astype('<u{seen.bytes}').tofile(OTHER)"
        )
    if seen and seen.bytes == 4 and not dtype:
        raise DataError(
            f"nearly every second uint16 of {file.path} is below {widths.UPPER_HALF_LIMIT}, as in uint32 tokens; set "
            "data.dtype to uint32, or to uint16 if that is right"
        )
    if seen and seen.bytes == 2 and file.dtype == "uint32" and vocab_size <= 1 << 18:
        raise DataError(f"{file.path} seems to have uint16 tokens, and not uint32; set data.dtype to uint16")
    if vocab_size > 1 << 16 and not dtype:
        raise DataError(
            f"{file.path} does not say the type of its tokens, and a vocabulary of {vocab_size} does not fit uint16; "
            "set data.dtype to uint32, or to uint16 if the ids are all below 65,536"
        )
