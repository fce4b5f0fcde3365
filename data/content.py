"""What identifies the content of token files without a manifest, and what their ids tell: read once at the start."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator

import numpy as np

from data.errors import DataError
from data.foreign import TokenFile

# Up to this size a split is hashed whole at the start of a run and every id is looked at; of a larger one the header,
# the head, the tail and the blocks between them, at fixed positions. A change makes every such dataset another one.
WHOLE_BYTES = 1 << 30
CHUNK_BYTES = 16 << 20
SAMPLED_BLOCKS, BLOCK_BYTES = 256, 64 << 10
# A uint32 stream read as uint16 has the upper halves of its ids in every second place: 0 to 3 up to id 262,143.
UPPER_HALF_LIMIT, TOKENS_TO_TELL = 4, 64


@dataclasses.dataclass(frozen=True)
class Content:
    digest: str  # of header and tokens; 'sampled:…' where not all of them were read
    largest_id: int  # among the tokens that were read; -1 without any
    maybe_uint32: bool  # uint16 tokens that look like the halves of wider ones


def contents(files: list[TokenFile], whole: bool = False) -> list[Content]:
    """What the files of a split hold, `whole` or beyond WHOLE_BYTES by samples; read once while they do not change."""
    whole = whole or sum(f.nbytes for f in files) <= WHOLE_BYTES
    return [_content(f, f.path.stat().st_mtime_ns, os.path.getsize(f.path), whole) for f in files]


@functools.cache
def _content(file: TokenFile, mtime_ns: int, size: int, whole: bool) -> Content:
    digest, largest = hashlib.sha256(), -1
    odd_below_limit, even_above = True, False
    with file.path.open("rb") as f:
        digest.update(f.read(file.offset))
        if not whole:
            digest.update(str(size).encode())
        for start, length in _spans(file, whole):
            f.seek(start)
            raw = f.read(length)
            digest.update(raw)
            width = np.dtype(file.dtype).itemsize
            tokens = np.frombuffer(raw, np.dtype(file.dtype).newbyteorder("<"), len(raw) // width)
            largest = max(largest, int(tokens.max(initial=0)))
            if odd_below_limit and file.dtype == "uint16":
                odd_below_limit = bool((tokens[1::2] < UPPER_HALF_LIMIT).all())
                even_above = even_above or bool((tokens[::2] >= UPPER_HALF_LIMIT).any())
    maybe_uint32 = file.dtype == "uint16" and file.tokens >= TOKENS_TO_TELL and odd_below_limit and even_above
    return Content(("" if whole else "sampled:") + digest.hexdigest(), largest, maybe_uint32)


def _spans(file: TokenFile, whole: bool) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of what is read: all tokens, or blocks from the first to the last at even distances."""
    end = file.offset + file.nbytes
    if whole or file.nbytes <= SAMPLED_BLOCKS * BLOCK_BYTES:
        for start in range(file.offset, end, CHUNK_BYTES):
            yield start, min(CHUNK_BYTES, end - start)
        return
    pair = 8  # bytes, a multiple of two tokens of any type: every block begins at an even token
    for i in range(SAMPLED_BLOCKS - 1):
        yield file.offset + (file.nbytes - BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1) // pair * pair, BLOCK_BYTES
    tail = file.offset + (file.nbytes - BLOCK_BYTES) // pair * pair
    yield tail, end - tail


def check(file: TokenFile, found: Content, dtype: str, vocab_size: int) -> None:
    """Raises DataError when the ids cannot be what they are read as."""
    if found.maybe_uint32 and not dtype and file.kind in ("nanogpt", "olmo"):
        raise DataError(
            f"every second uint16 of {file.path} is below {UPPER_HALF_LIMIT}, as in uint32 tokens; set "
            "data.dtype to uint32, or to uint16 if it is that"
        )
    if found.largest_id >= file.id_limit:
        raise DataError(f"{file.path} holds negative ids in its {file.stored_dtype} tokens; preprocess it again")
    if vocab_size and found.largest_id >= vocab_size:
        raise DataError(
            f"token id {found.largest_id} in {file.path} is outside the vocabulary of {vocab_size}; another "
            "model.vocab_size, data.tokenizer_path or data.dtype belongs to it"
        )
