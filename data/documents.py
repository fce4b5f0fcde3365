"""Documents out of files. A stretch is a part of one file that can be read alone: a byte range of text or JSON lines,
a row group of Parquet, a whole compressed file. A unit is a few stretches: what one worker does at a time, and what a
preparation that was killed need not do again.

The cuts depend on the files alone, never on the number of workers, so neither does the result.
"""

import codecs
import collections
import dataclasses
import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

from data.corpus import File
from data.errors import DataError

UNIT_BYTES = 8 << 20  # a worker holds some 20 bytes of memory for each
LONG_LINE_BYTES = 64 << 20  # of a record; taken, and counted: most often newlines were lost
LINE_SEARCH_BYTES = 1 << 20  # a text without a newline for so long is cut between two characters
BLOCK_BYTES = 1 << 16  # read or decompressed at a time
EXAMPLES = 3  # of each kind of problem that are named; all are counted


@dataclasses.dataclass(frozen=True)
class Stretch:
    file: File
    start: int  # bytes; of Parquet, the row group; of a compressed file 0
    stop: int
    last: bool  # whether the file ends here
    size: int  # bytes on disk, for the progress
    split: str | None = None  # 'train' or 'val' where the whole file goes to one


Unit = tuple[Stretch, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read: the key of the text in a record, and what is done with what cannot be read."""

    text_key: str = "text"
    invalid_utf8: str = "replace"  # by U+FFFD, counted; or 'error'
    bad_records: str = "error"  # or 'skip', counted: broken JSON, no text under the key, a compressed file cut off
    raw: bool = False  # text as bytes, whatever they are


def bytes_of(unit: Unit) -> int:
    """Bytes on disk."""
    return sum(stretch.size for stretch in unit)


class Problems:
    """What was wrong with the input and where: everything counted, a few of each kind named."""

    def __init__(self, counts: dict[str, int] | None = None, examples: dict[str, list[str]] | None = None):
        self.counts = collections.Counter(counts or {})
        self.examples: dict[str, list[str]] = examples or {}

    def found(self, kind: str, where: str, times: int = 1) -> None:
        self.counts[kind] += times
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    def add(self, other: "Problems") -> None:
        self.counts.update(other.counts)
        for kind, examples in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine.extend(examples[: EXAMPLES - len(mine)])

    def to_json(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "examples": self.examples}


def plan(files: list[File], splits: dict[str, str] | None = None) -> list[Unit]:
    """The units of all files in their order: large files cut, small ones together. `splits`: of each file's name."""
    units: list[Unit] = []
    current: list[Stretch] = []
    filled = 0
    for file in files:
        for stretch in _stretches(file):
            if splits is not None:
                stretch = dataclasses.replace(stretch, split=splits[file.name])
            if current and filled + stretch.size > UNIT_BYTES:
                units.append(tuple(current))
                current, filled = [], 0
            current.append(stretch)
            filled += stretch.size
    return [*units, tuple(current)] if current else units


def _stretches(file: File) -> Iterator[Stretch]:
    size = file.size()
    if file.kind == "parquet":
        groups = _parquet(file).num_row_groups
        for i in range(groups):
            yield Stretch(file, i, i + 1, i == groups - 1, size // groups)
        return
    start = 0
    if not file.compression:
        with file.open() as f:
            while size - start > UNIT_BYTES * 5 // 4:
                stop = _cut(f, start + UNIT_BYTES, size, LINE_SEARCH_BYTES if file.kind == "text" else size)
                if stop == size:
                    break
                yield Stretch(file, start, stop, False, stop - start)
                start = stop
    yield Stretch(file, start, size, True, size - start)


def _cut(f: IO[bytes], at: int, size: int, search: int) -> int:
    """The place after the first newline from `at` on; without one for `search` bytes, between two characters."""
    f.seek(at)
    seen = 0
    while seen < search:
        block = f.read(min(1 << 16, search - seen))
        if not block:
            return size
        if (newline := block.find(b"\n")) >= 0:
            return at + seen + newline + 1
        seen += len(block)
    f.seek(at)
    following = f.read(4)  # a character has at most three continuation bytes, 0b10xxxxxx
    return at + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def read(stretch: Stretch, reading: Reading, problems: Problems) -> Iterator[tuple[str | bytes, bool]]:
    """(text, whether a document ends with it) of a stretch, in order; empty documents are counted and left out.

    Raises:
      DataError: the file cannot be read, or holds what `reading` does not allow; it names file and place.
    """
    kind = {"text": _read_text, "jsonl": _read_json_lines, "parquet": _read_parquet}[stretch.file.kind]
    try:
        yield from kind(stretch, reading, problems)
    except OSError as e:
        raise DataError(f"cannot read {stretch.file.path}: {e.strerror or e}") from None


def _read_text(stretch: Stretch, reading: Reading, problems: Problems) -> Iterator[tuple[str | bytes, bool]]:
    offset, empty = stretch.start, True
    for raw, last in _pieces(stretch, reading, problems):
        where = f"{stretch.file.path} offset {offset}"
        offset += len(raw)
        empty = empty and not raw
        if raw or not empty:
            yield (raw if reading.raw else _decode(raw, stretch.file, offset - len(raw), reading, problems)), last
        if b"\0" in raw and not reading.raw:
            problems.found("text with NUL characters", where)
    if empty:
        problems.found("empty document", str(stretch.file.path))


def _pieces(stretch: Stretch, reading: Reading, problems: Problems) -> Iterator[tuple[bytes, bool]]:
    """Bytes of a text and whether they end it: all of a stretch; of a compressed file, UNIT_BYTES at a time."""
    with stretch.file.open() as f:
        if not stretch.file.compression:
            f.seek(stretch.start)
            raw = f.read(stretch.stop - stretch.start)
            if len(raw) < stretch.stop - stretch.start:
                raise DataError(f"{stretch.file.path} became shorter while it was read; start again")
            yield raw, stretch.last
            return
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        for block in _decompressed(f, stretch, reading, problems):
            # Held back until it is whole: a character cut by the end of a block.
            piece = block if reading.raw else decoder.decode(block).encode("utf-8", "surrogateescape")
            yield piece, False
        yield (b"" if reading.raw else decoder.decode(b"", True).encode("utf-8", "surrogateescape")), True


def _decompressed(f: IO[bytes], stretch: Stretch, reading: Reading, problems: Problems) -> Iterator[bytes]:
    """UNIT_BYTES at a time; of a damaged file what comes before the damage."""
    gathered = io.BytesIO()
    try:
        for block in _gunzip(f) if stretch.file.compression == "gz" else _unzstd(f, stretch.file):
            gathered.write(block)
            if gathered.tell() >= UNIT_BYTES:
                yield gathered.getvalue()
                gathered = io.BytesIO()
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        _bad("damaged compressed file", f"{stretch.file.path} ({e})", reading, problems)
    yield gathered.getvalue()


def _gunzip(f: IO[bytes]) -> Iterator[bytes]:
    return iter(functools.partial(gzip.GzipFile(fileobj=f).read1, BLOCK_BYTES), b"")


def _unzstd(f: IO[bytes], file: File) -> Iterator[bytes]:
    """As _gunzip; zstandard's own reader takes a frame that is cut off for the end of the file."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file.path} needs the zstandard package: pip install 'meshlm[data]'") from None
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    while raw := f.read(BLOCK_BYTES):
        while raw:
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as e:
                raise EOFError(str(e)) from None
            begun, raw = not frame.eof, frame.unused_data
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
    if begun:
        raise EOFError("the file ended before its last frame did")


def _decode(raw: bytes, file: File, offset: int, reading: Reading, problems: Problems) -> str:
    """Text with newlines as they are."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        at = offset + e.start
        if reading.invalid_utf8 == "error":
            raise DataError(
                f"{file.path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {at}; convert the file, "
                "use --invalid_utf8=replace, or --tokenizer=byte, which takes any bytes"
            ) from None
        text = raw.decode("utf-8", "replace")
        problems.found(
            "invalid UTF-8, now U+FFFD", f"{file.path} offset {at}", text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
        )
        return text


def _read_json_lines(stretch: Stretch, reading: Reading, problems: Problems) -> Iterator[tuple[str, bool]]:
    with stretch.file.open() as f:
        lines: Iterator[bytes]
        if stretch.file.compression:
            lines, before = _lines(_decompressed(f, stretch, reading, problems)), 0
        else:
            f.seek(stretch.start)
            lines, before = iter(_until(f, stretch.stop)), -1  # counted when there is something to say
        for i, line in enumerate(map(bytes.strip, lines), 1):
            if not line:
                continue

            def where(i: int = i) -> str:
                nonlocal before
                if before < 0:
                    before = _newlines_before(stretch)
                return f"{stretch.file.path} line {before + i}"

            if len(line) > LONG_LINE_BYTES:
                problems.found(f"line longer than {LONG_LINE_BYTES >> 20} MiB", where())
            text = _record_text(line, where, reading, problems)
            if text is not None:
                yield text, True


def _until(f: IO[bytes], stop: int) -> Iterator[bytes]:
    left = stop - f.tell()
    while left > 0 and (line := f.readline()):
        left -= len(line)
        yield line


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = io.BytesIO()
    for block in blocks:
        *whole, tail = block.split(b"\n")
        for line in whole:
            rest.write(line)
            yield rest.getvalue()
            rest = io.BytesIO()
        rest.write(tail)
    yield rest.getvalue()


def _newlines_before(stretch: Stretch) -> int:
    with stretch.file.open() as f:
        count, left = 0, stretch.start
        while left and (block := f.read(min(left, 1 << 20))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def _record_text(line: bytes, where, reading: Reading, problems: Problems) -> str | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        if reading.invalid_utf8 == "error":
            raise DataError(f"{where()} is not UTF-8; convert the file or use --invalid_utf8=replace") from None
        problems.found("invalid UTF-8, now U+FFFD", where())
        return _record_text(line.decode("utf-8", "replace").encode(), where, reading, problems)
    except (ValueError, RecursionError) as e:
        _bad("broken JSON", f"{where()} ({str(e)[:80]})", reading, problems)
        return None
    return _text_of(record, where, reading, problems)


def _text_of(record: Any, where, reading: Reading, problems: Problems) -> str | None:
    """The text of a record; None when there is none, which was counted or raised."""
    if not isinstance(record, dict) or reading.text_key not in record:
        keys = ", ".join(sorted(map(str, record))[:8]) if isinstance(record, dict) else type(record).__name__
        _bad("record without the text key", f"{where()} (no {reading.text_key!r}; it has: {keys})", reading, problems)
        return None
    text = record[reading.text_key]
    if not isinstance(text, str):
        _bad("text that is no string", f"{where()} ({type(text).__name__})", reading, problems)
        return None
    if not text:
        problems.found("empty document", where())
        return None
    if "\0" in text:
        problems.found("text with NUL characters", where())
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # JSON may hold halves of a pair
        problems.found("invalid UTF-8, now U+FFFD", where())
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _parquet(file: File) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file.path} needs the pyarrow package: pip install 'meshlm[data]'") from None
    import pyarrow

    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (OSError, pyarrow.ArrowException) as e:
        raise DataError(f"{file.path} is not a Parquet file that can be read: {str(e).splitlines()[0]}") from None


def _read_parquet(stretch: Stretch, reading: Reading, problems: Problems) -> Iterator[tuple[str, bool]]:
    import pyarrow

    table = _parquet(stretch.file)
    if reading.text_key not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names[:8])
        raise DataError(f"{stretch.file.path} has no column {reading.text_key!r}; name one with --text_key: {names}")
    number = sum(table.metadata.row_group(i).num_rows for i in range(stretch.start))
    groups = list(range(stretch.start, stretch.stop))
    try:
        for batch in table.iter_batches(row_groups=groups, columns=[reading.text_key], batch_size=1024):
            for value in batch.column(0).to_pylist():
                number += 1

                def where(number: int = number) -> str:
                    return f"{stretch.file.path} row {number}"

                text = _text_of({reading.text_key: value}, where, reading, problems)
                if text is not None:
                    yield text, True
    except pyarrow.ArrowException as e:
        raise DataError(f"{stretch.file.path} cannot be read after row {number}: {str(e).splitlines()[0]}") from None


def _bad(kind: str, where: str, reading: Reading, problems: Problems) -> None:
    if reading.bad_records == "error":
        raise DataError(f"{kind}: {where}; mend it, or pass --bad_records=skip to leave such records out, counted")
    problems.found(kind, where)
