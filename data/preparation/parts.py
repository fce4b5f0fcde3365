"""Divides a unit's texts into parts, each of one split. Long texts are divided at seams (seams.py).

Two units that share a long text examine the same characters around the border between them, so they agree on the
place at which the text is divided. With --split=last, the validation text is encoded as a text of its own.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

from data.preparation import documents
from data.preparation.corpus import File
from data.preparation.input_errors import InputErrors
from data.tokenizers import seams
from data.tokenizers.base import Tokenizer
from data.tokenizers.seams import Seam

NO_SEAM = "long text cut where its tokens may be others than those of the whole"


class Part(NamedTuple):
    split: str
    text: str | bytes
    ends: bool  # whether a document ends with it
    path: str  # the file that it is from
    left: Seam | None = None  # the seam at its beginning
    right: Seam | None = None  # the seam at its end


class Splitting(NamedTuple):
    """How texts are split; `kind` is encode.Job.split: 'file', 'document' or 'last'."""

    kind: str
    val_fraction: float
    cut: int


def parts_of_unit(
    unit: documents.WorkUnit,
    character: int,
    splitting: Splitting,
    *,
    options: documents.ReadOptions,
    codec: Tokenizer,
    errors: InputErrors,
    hashes: list[tuple[int, int]] | None = None,
) -> Iterator[Part]:
    """The parts of a unit in order.

    Args:
      character: the number of characters in the units before this one.
      hashes: a pair is appended for each chunk: its hash, and a number: 1 if a document begins with the chunk,
        plus 2 if a document ends with the chunk.
    """
    cut = splitting.cut if splitting.kind == "last" else None
    for span in unit:
        path = str(span.file.path)
        chunks = documents.read_chunks(span, options, errors)
        in_chunks = codec.joins and span.file.kind == "text"  # records are not divided
        for chunk, before, after in _with_context(chunks, span) if in_chunks else _without_context(chunks):
            if hashes is not None:
                hashes.append((_hash(chunk.text), chunk.begins + 2 * chunk.ends))
            text, shift, left, right = chunk.text, 0, None, None
            if in_chunks and isinstance(text, str) and not (chunk.begins and chunk.ends):
                left = _seam(codec, before, text[: _window()], character, cut)
                right = _seam(codec, text[-_window() :], after, character + len(text), cut)
                if left is None and before and character != cut:
                    errors.record(NO_SEAM, f"{path} ({before[-20:] + text[:20]!r})")
                shift = left.shift if left else 0
                text = _moved(text, before, after, shift, right.shift if right else 0)
            if cut is not None:
                at = min(max(cut - character - shift, 0), len(text))
                character += len(chunk.text)
                if text[:at]:
                    whole = at == len(text)
                    yield Part("train", text[:at], chunk.ends and whole, path, left, right if whole else None)
                if text[at:]:
                    yield Part("val", text[at:], chunk.ends, path, None if at else left, right)
            else:
                yield Part(_split(chunk, span, splitting), text, chunk.ends, path, left, right)


def _split(chunk: documents.Chunk, span: documents.Span, splitting: Splitting) -> str:
    if splitting.kind == "file":
        assert span.split is not None
        return span.split
    # A text file is one document, maybe in several chunks, so its name decides.
    key = os.fsencode(span.file.name) if span.file.kind == "text" else chunk.text
    return "val" if _hash(key) < splitting.val_fraction * 2**64 else "train"


def _seam(codec: Tokenizer, before: str, after: str, character: int, cut: int | None) -> Seam | None:
    """The seam near the border after `character` characters; None if no text is divided there, or no seam is found. A
    seam and its border are always on the same side of the `cut` between training and validation."""
    if cut is not None and character > cut:
        before = before[-(character - cut) :]
    elif cut is not None:
        after = after[: cut - character]
    if not before or not after or codec.phased:
        return None
    return seams.find_seam(codec.encode, before, after, min(seams.REACH, documents.UNIT_BYTES // 64))


def _moved(text: str, before: str, after: str, left: int, right: int) -> str:
    """The text between two seams that are `left` and `right` characters after the ends of `text`."""
    text = text[left:] if left >= 0 else before[left:] + text
    return text + after[:right] if right >= 0 else text[:right]


def _window() -> int:
    """How many characters are examined on each side of a border: fewer than in any chunk except the last of a text."""
    return min(seams.WINDOW, documents.UNIT_BYTES // 16)


def _without_context(chunks: Iterator[documents.Chunk]) -> Iterator[tuple[documents.Chunk, str, str]]:
    return ((chunk, "", "") for chunk in chunks)


def _with_context(
    chunks: Iterator[documents.Chunk], span: documents.Span
) -> Iterator[tuple[documents.Chunk, str, str]]:
    """Each chunk, with the characters of its document before and after the chunk that are examined."""
    tail = ""
    for chunk, following in itertools.pairwise(itertools.chain(chunks, [None])):
        assert chunk is not None and isinstance(chunk.text, str)
        before = after = ""
        if not chunk.begins:
            before = tail or _beside(span.file, span.start, before=True)
        if not chunk.ends:
            head = following.text[: _window()] if following else _beside(span.file, span.stop, before=False)
            after = str(head)
        yield chunk, before, after
        tail = chunk.text[-_window() :]


def _beside(file: File, at: int, before: bool) -> str:
    """The characters that are examined before, or after, offset `at` of a file."""
    size = 4 * _window() + 4  # a character has at most four bytes; incomplete ones at the ends are not used
    with file.open() as f:
        f.seek(max(at - size, 0) if before else at)
        text = f.read(min(size, at) if before else size).decode("utf-8", "replace")
    return text[-_window() :] if before else text[: _window()]


def _hash(text: str | bytes) -> int:
    raw = text if isinstance(text, bytes) else text.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
