"""What is encoded in one go: the texts of a unit with their splits, long ones cut at seams (data/tokenizers/seams.py).

Two units that share a long text both look at the same characters around the cut between them, so they agree where the
one ends and the other begins. At the cut of --split=last the validation text begins as a text of its own.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

from data.preparation import documents
from data.preparation.corpus import File
from data.preparation.problems import Problems
from data.tokenizers import seams
from data.tokenizers.base import Tokenizer
from data.tokenizers.seams import Seam

NO_SEAM = "long text cut where its tokens may be others than those of the whole"


class Part(NamedTuple):
    split: str
    text: str | bytes
    ends: bool  # whether a document ends with it
    path: str  # of its file
    left: Seam | None = None  # that it begins at
    right: Seam | None = None  # that it ends at


class Splitting(NamedTuple):
    """As encode.Job has it: `kind` is 'file', 'document' or 'last'."""

    kind: str
    val_fraction: float
    cut: int


def parts(
    unit: documents.Unit,
    character: int,
    splitting: Splitting,
    reading: documents.Reading,
    codec: Tokenizer,
    problems: Problems,
    hashes: list[tuple[int, int]] | None = None,
) -> Iterator[Part]:
    """The parts of a unit in order. Appends to `hashes` that of each piece, and whether a document begins (1) and ends
    (2) with it.

    Args:
      character: how many there are in the units before.
    """
    cut = splitting.cut if splitting.kind == "last" else None
    for stretch in unit:
        path = str(stretch.file.path)
        pieces = documents.read(stretch, reading, problems)
        in_pieces = codec.joins and stretch.file.kind == "text"  # records are whole
        for piece, before, after in _with_neighbours(pieces, stretch) if in_pieces else _alone(pieces):
            if hashes is not None:
                hashes.append((_hash(piece.text), piece.begins + 2 * piece.ends))
            text, shift, left, right = piece.text, 0, None, None
            if in_pieces and isinstance(text, str) and not (piece.begins and piece.ends):
                left = _seam(codec, before, text[: _window()], character, cut)
                right = _seam(codec, text[-_window() :], after, character + len(text), cut)
                if left is None and before and character != cut:
                    problems.found(NO_SEAM, f"{path} ({before[-20:] + text[:20]!r})")
                shift = left.shift if left else 0
                text = _moved(text, before, after, shift, right.shift if right else 0)
            if cut is not None:
                at = min(max(cut - character - shift, 0), len(text))
                character += len(piece.text)
                if text[:at]:
                    whole = at == len(text)
                    yield Part("train", text[:at], piece.ends and whole, path, left, right if whole else None)
                if text[at:]:
                    yield Part("val", text[at:], piece.ends, path, None if at else left, right)
            else:
                yield Part(_split(piece, stretch, splitting), text, piece.ends, path, left, right)


def _split(piece: documents.Piece, stretch: documents.Stretch, splitting: Splitting) -> str:
    if splitting.kind == "file":
        assert stretch.split is not None
        return stretch.split
    # A file of text is one document that may come in several pieces, so its name decides.
    key = os.fsencode(stretch.file.name) if stretch.file.kind == "text" else piece.text
    return "val" if _hash(key) < splitting.val_fraction * 2**64 else "train"


def _seam(codec: Tokenizer, before: str, after: str, character: int, cut: int | None) -> Seam | None:
    """The seam where a text was cut after `character`; None if there was no cut, or no seam. It is not moved across
    the `cut` between training and validation."""
    if cut is not None and character > cut:
        before = before[-(character - cut) :]
    elif cut is not None:
        after = after[: cut - character]
    if not before or not after or codec.phased:
        return None
    return seams.find(codec.encode, before, after, min(seams.REACH, documents.UNIT_BYTES // 64))


def _moved(text: str, before: str, after: str, left: int, right: int) -> str:
    """The text between the seams, which are so many characters behind the ends of `text`."""
    text = text[left:] if left >= 0 else before[left:] + text
    return text + after[:right] if right >= 0 else text[:right]


def _window() -> int:
    """Characters around a cut that are looked at: fewer than any piece but the last of a text has."""
    return min(seams.WINDOW, documents.UNIT_BYTES // 16)


def _alone(pieces: Iterator[documents.Piece]) -> Iterator[tuple[documents.Piece, str, str]]:
    return ((piece, "", "") for piece in pieces)


def _with_neighbours(
    pieces: Iterator[documents.Piece], stretch: documents.Stretch
) -> Iterator[tuple[documents.Piece, str, str]]:
    """Each piece with the characters before and after it in its document, so many as are looked at."""
    tail = ""
    for piece, following in itertools.pairwise(itertools.chain(pieces, [None])):
        assert piece is not None and isinstance(piece.text, str)
        before = after = ""
        if not piece.begins:
            before = tail or _beside(stretch.file, stretch.start, before=True)
        if not piece.ends:
            head = following.text[: _window()] if following else _beside(stretch.file, stretch.stop, before=False)
            after = str(head)
        yield piece, before, after
        tail = piece.text[-_window() :]


def _beside(file: File, at: int, before: bool) -> str:
    """The characters before or after a byte of a file, so many as are looked at."""
    size = 4 * _window() + 4  # a character has at most four bytes; what the ends cut off is not used
    with file.open() as f:
        f.seek(max(at - size, 0) if before else at)
        text = f.read(min(size, at) if before else size).decode("utf-8", "replace")
    return text[-_window() :] if before else text[: _window()]


def _hash(text: str | bytes) -> int:
    raw = text if isinstance(text, bytes) else text.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
