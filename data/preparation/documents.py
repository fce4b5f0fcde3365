"""Reads documents from files. A span is a part of one file that can be read by itself: a byte range of text or JSON
lines, row groups of Parquet, or a complete compressed file. A work unit is a few spans: it is a worker's
task, and a preparation that was killed does not repeat finished units.

The borders of units depend only on the files, so the result does not depend on the number of workers.
"""

import codecs
import dataclasses
import functools
import gzip
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from data.errors import DataError
from data.preparation.corpus import File
from data.preparation.input_errors import NUL, REPLACED, InputErrors, Lines, Place

UNIT_BYTES = 8 << 20  # the size of a work unit; a worker needs some 20 bytes of memory for each byte
LONG_LINE_BYTES = 64 << 20  # a longer record is used, but counted: usually its newlines were lost
MAX_LINE_BYTES = 1 << 30  # a longer record is a bad record: reading one takes several times its size in memory
LINE_SEARCH_BYTES = 1 << 16  # how much is searched for a place at which a text can be split
BLOCK_BYTES = 1 << 16  # bytes that are read or decompressed at a time
ZSTD_BYTES = 256  # bytes given to zstandard at a time: four bytes may become 128 KiB
ZSTD_WINDOW_BYTES = 1 << 31  # the window of files that `zstd --long=31` writes
ROWS = 128  # rows of Parquet in memory at a time
BYTE_ORDER_MARK = codecs.BOM_UTF8


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a file that can be read by itself."""

    file: File
    start: int  # in bytes, or in row groups for Parquet; 0 for a compressed file
    stop: int
    first: bool  # whether the file begins here; `start` is after a byte order mark
    last: bool  # whether the file ends here
    size: int  # bytes on disk, for the progress
    split: str | None = None  # 'train' or 'val' if the complete file belongs to that split


WorkUnit = tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How files are read: the key of the text in a record, and what happens to text that cannot be read."""

    text_key: str = "text"
    invalid_utf8: str = "replace"  # 'replace' with U+FFFD, and count; or 'error'
    # 'error', or 'skip' and count: broken JSON, a record without text under the key, a truncated compressed file.
    bad_records: str = "error"
    raw: bool = False  # read text as bytes, valid or not; the text of a record is then UTF-8

    @functools.cached_property
    def key_in_json(self) -> re.Pattern[str]:
        """A pattern of the text key in JSON, where each character may be written as it is or as an escape."""
        return re.compile(f'"{"".join(map(_spellings, self.text_key))}"\\s*:')


def _spellings(character: str) -> str:
    """The pattern of a character in a JSON string (RFC 8259, section 7)."""
    units = character.encode("utf-16-be", "surrogatepass").hex(" ", 2).split()  # two units if it is beyond U+FFFF
    short, long = json.dumps(character)[1:-1], "".join(rf"\\u(?i:{unit})" for unit in units)
    return rf"(?:\\?{re.escape(character)}|{re.escape(short)}|{long})"


class Chunk(NamedTuple):
    """A document, or a part of a long one."""

    text: str | bytes  # never empty
    begins: bool  # whether a document begins with it
    ends: bool  # whether a document ends with it


def bytes_of(unit: WorkUnit) -> int:
    """The size of a unit on disk."""
    return sum(span.size for span in unit)


def plan_units(files: list[File], splits: dict[str, str] | None = None) -> list[WorkUnit]:
    """The work units of all files in order: large files are divided, small ones are grouped.

    Args:
      splits: 'train' or 'val' by file name, if complete files are assigned to splits; else None.

    Raises:
      DataError: a file cannot be read.
    """
    units: list[WorkUnit] = []
    current: list[Span] = []
    filled = 0
    for file in files:
        for span in _spans(file):
            if splits is not None:
                span = dataclasses.replace(span, split=splits[file.name])
            if current and filled + span.size > UNIT_BYTES:
                units.append(tuple(current))
                current, filled = [], 0
            current.append(span)
            filled += span.size
    return [*units, tuple(current)] if current else units


def _spans(file: File) -> Iterator[Span]:
    try:
        yield from _file_spans(file, file.size())
    except OSError as e:
        raise DataError(_cannot_read(file, e)) from None


def _cannot_read(file: File, error: OSError) -> str:
    return f"cannot read {file.path}: {error.strerror or _first_line(error)}"


def _file_spans(file: File, size: int) -> Iterator[Span]:
    if file.kind == "parquet":
        groups = _parquet(file)[0].num_row_groups
        some = max(1, UNIT_BYTES * groups // size)
        for start in range(0, max(1, groups), some):
            stop = min(start + some, groups)
            yield Span(file, start, stop, start == 0, stop == groups, size * (stop - start) // max(1, groups))
    elif file.compression:
        yield Span(file, 0, size, True, True, size)
    else:
        with file.open() as f:
            start = begin = len(BYTE_ORDER_MARK) if f.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
            cut = _text_split if file.kind == "text" else _line_split
            while size - start > UNIT_BYTES and (stop := cut(f, start + UNIT_BYTES, size)) < size:
                yield Span(file, start, stop, start == begin, False, stop - start)
                start = stop
        yield Span(file, start, size, start == begin, True, size - start)


def _line_split(f: IO[bytes], at: int, size: int) -> int:
    """The offset after the first newline from `at` on."""
    f.seek(at)
    while block := f.read(BLOCK_BYTES):
        if (newline := block.find(b"\n")) >= 0:
            return at + newline + 1
        at += len(block)
    return size


def _text_split(f: IO[bytes], at: int, size: int) -> int:
    f.seek(at)
    return at + split_point(f.read(3 + LINE_SEARCH_BYTES))


# Tokenizers begin a token at a single space between two words, and after a newline between two lines; so if a text is
# split there, its parts have the tokens of the complete text. A longer run of white space can be one token.
SPLIT_PLACES = [re.compile(place) for place in (r"(?<=\S)(?= \S)", r"(?<=\S\n)(?=\S)", r"(?=\s)")]


def split_point(window: bytes) -> int:
    """The offset in `window`, a part of a UTF-8 text, at which the text is split: before a single space, else after a
    single newline, else before other white space, else between characters."""
    begin = _rest_of_character(window)
    text = window[begin:].decode("utf-8", "surrogateescape")
    for place in SPLIT_PLACES:
        if found := place.search(text):
            return begin + len(text[: found.start()].encode("utf-8", "surrogateescape"))
    return begin


def _rest_of_character(raw: bytes) -> int:
    """How many bytes at the start of `raw` may end a character: at most three continuation bytes, 0b10xxxxxx."""
    return next((i for i, byte in enumerate(raw[:3]) if byte & 0xC0 != 0x80), min(3, len(raw)))


def read_chunks(span: Span, options: ReadOptions, errors: InputErrors) -> Iterator[Chunk]:
    """The documents of a span in order, as bytes if options.raw, else as str. A long text comes in several chunks; they
    are the same whether its file is compressed or not. Empty documents are counted and left out.

    Raises:
      DataError: the file cannot be read, or has something that `options` do not allow; the message names the place.
    """
    kind = {"text": _read_text, "jsonl": _read_json_lines, "parquet": _read_parquet}[span.file.kind]
    try:
        for chunk in kind(span, options, errors):
            errors.characters += len(chunk.text)
            yield chunk
    except OSError as e:
        raise DataError(_cannot_read(span.file, e)) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _read_text(span: Span, options: ReadOptions, errors: InputErrors) -> Iterator[Chunk]:
    with span.file.open() as f:
        offset, blocks = _content(f, span, options, errors)
        chunks = _rechunk(blocks) if span.file.compression else iter([b"".join(blocks)])
        begins = span.first
        raw = next(chunks)
        while raw:
            following = next(chunks, b"")
            text = raw if options.raw else _text(raw, span.file, offset, options, errors)
            yield Chunk(text, begins, span.last and not following)
            offset, raw, begins = offset + len(raw), following, False
        if begins:
            errors.record("empty document", str(span.file.path))


def _rechunk(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks of a text that comes in blocks, split as plan_units splits one on disk. At least one, maybe empty."""
    held = bytearray()
    for block in itertools.chain(blocks, [None]):
        held += block or b""
        enough = UNIT_BYTES + 3 + LINE_SEARCH_BYTES
        while len(held) >= enough or (block is None and len(held) > UNIT_BYTES):
            at = UNIT_BYTES + split_point(bytes(held[UNIT_BYTES:enough]))
            yield bytes(held[:at])
            del held[:at]
    yield bytes(held)


def _content(f: IO[bytes], span: Span, options: ReadOptions, errors: InputErrors) -> tuple[int, Iterator[bytes]]:
    """The offset of the first byte of text or JSON lines, and blocks of it, decompressed, without a byte order mark."""
    start, blocks = span.start, _on_disk(f, span)
    if span.file.compression:
        blocks, head = _decompressed(f, span, options, errors), b""
        while len(head) < len(BYTE_ORDER_MARK) and (block := next(blocks, b"")):
            head += block
        start = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
        blocks = itertools.chain([head[start:]], blocks)
    if span.first and start:
        errors.record("byte order mark, taken off", str(span.file.path))
    return start, blocks


def _on_disk(f: IO[bytes], span: Span) -> Iterator[bytes]:
    f.seek(span.start)
    left = span.stop - span.start
    while left:
        block = f.read(min(left, BLOCK_BYTES))
        if not block:
            raise DataError(f"{span.file.path} became shorter while it was read; run the command again")
        left -= len(block)
        yield block


def _decompressed(f: IO[bytes], span: Span, options: ReadOptions, errors: InputErrors) -> Iterator[bytes]:
    """Blocks that are not empty; for a damaged file, the blocks before the damage."""
    try:
        yield from filter(None, _gunzip(f) if span.file.compression == "gz" else _unzstd(f, span.file))
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        bad("damaged compressed file", f"{span.file.path} ({e})", options, errors)


def _gunzip(f: IO[bytes]) -> Iterator[bytes]:
    return iter(functools.partial(gzip.GzipFile(fileobj=f).read1, BLOCK_BYTES), b"")


def _unzstd(f: IO[bytes], file: File) -> Iterator[bytes]:
    """Decompressed blocks. zstandard's own reader would take a truncated frame for the end of the file."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file.path} needs the zstandard package: pip install 'meshlm[data]'") from None
    new_frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj
    frame, begun = new_frame(), False
    while raw := f.read(ZSTD_BYTES):
        while raw:
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as e:
                if "allocation" in str(e).lower():  # the file itself is not damaged
                    raise DataError(f"cannot decompress {file.path}: {e}; its window needs up to 2 GiB") from None
                hint = "; perhaps it was compressed with a dictionary: zstd -d -D FILE" if "ictionary" in str(e) else ""
                raise EOFError(f"{e}{hint}") from None
            begun, raw = not frame.eof, frame.unused_data
            if frame.eof:
                frame = new_frame()
    if begun:
        raise EOFError("the file ended before its last frame did")


def _not_utf8(where: str) -> DataError:
    return DataError(
        f"{where}; convert the file, use --invalid_utf8=replace, or --tokenizer=byte, which accepts any bytes of text"
    )


def _text(raw: bytes, file: File, offset: int, options: ReadOptions, errors: InputErrors) -> str:
    """Decodes a chunk that begins at `offset` of a text file; newlines are kept as they are."""
    if nuls := raw.count(b"\0"):
        errors.record(NUL, Place(str(file.path), "offset", offset + raw.index(b"\0")), nuls)
    parts, start = [], 0
    while start < len(raw):  # by block: strict decoding is several times faster, and most blocks are valid
        stop = start + BLOCK_BYTES
        stop += _rest_of_character(raw[stop : stop + 3])
        part = raw[start:stop]
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError as e:
            at = offset + start + e.start
            if options.invalid_utf8 == "error":
                raise _not_utf8(f"{file.path} is not UTF-8: byte 0x{part[e.start]:02x} at offset {at}") from None
            text = part.decode("utf-8", "replace")
            replaced = text.count("\ufffd") - part.count("\ufffd".encode())
            errors.record(REPLACED, Place(str(file.path), "offset", at), replaced)
        parts.append(text)
        start = stop
    return "".join(parts)


# Stands for the bytes of a record that are not UTF-8 until they are counted. JSON escapes may spell such halves, too.
HALF = "\ud800"


def _half(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return HALF, error.end


codecs.register_error("half of a surrogate pair", _half)


def _decode(raw: bytes, place: Place, options: ReadOptions) -> str:
    try:
        return raw.decode("utf-8", "strict" if options.invalid_utf8 == "error" else "half of a surrogate pair")
    except UnicodeDecodeError:
        raise _not_utf8(f"{_exact(place)} is not UTF-8") from None


def whole(text: str, place: Place, options: ReadOptions, errors: InputErrors) -> str:
    """`text` with U+FFFD in place of each half of a surrogate pair; the replacements are counted."""
    replaced = 0
    while (half := _first_half(text)) is not None:
        replaced += text.count(half)
        text = text.replace(half, "\ufffd")
    if replaced and options.invalid_utf8 == "error":
        raise _not_utf8(f"{_exact(place)} is not UTF-8: it has half of a surrogate pair")
    if replaced:
        errors.record(REPLACED, place, replaced)
    return text


def _first_half(text: str) -> str | None:
    try:
        text.encode()  # by far the fastest check
        return None
    except UnicodeEncodeError as e:
        return text[e.start]


def _read_json_lines(span: Span, options: ReadOptions, errors: InputErrors) -> Iterator[Chunk]:
    path, after = str(span.file.path), 0 if span.first else span.start
    with span.file.open() as f:
        number = 0
        for number, line in enumerate(_lines(_content(f, span, options, errors)[1]), 1):
            text = _of_line(line, Place(path, "line", number, after=after), options, errors)
            if text:
                yield Chunk(text, True, True)
    if not span.file.compression:
        errors.count_lines(Lines(path, after, span.stop, number - 1))  # no newline follows the last line


def read_records(file: File, options: ReadOptions, errors: InputErrors) -> Iterator[tuple[Place, Any]]:
    """The JSON values of the lines of a file, and their places. Texts in them may have halves of surrogate pairs.

    Raises:
      DataError: as read_chunks.
    """
    try:
        with file.open() as f:
            size = file.size()
            mark = not file.compression and f.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
            span = Span(file, len(BYTE_ORDER_MARK) if mark else 0, size, True, True, size)
            for number, line in enumerate(_lines(_content(f, span, options, errors)[1]), 1):
                place = Place(str(file.path), "line", number)
                if (found := _record(line, place, options, errors)) is not None:
                    yield place, found[0]
    except OSError as e:
        raise DataError(_cannot_read(file, e)) from None


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their newlines; the last may be empty. None stands for a line above MAX_LINE_BYTES."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        size += len(first)
        if size <= MAX_LINE_BYTES:
            held.append(first)
        else:
            held.clear()
        if others:
            yield b"".join(held) if size <= MAX_LINE_BYTES else None
            yield from others[:-1]
            held, size = [others[-1]], len(others[-1])
    yield b"".join(held) if size <= MAX_LINE_BYTES else None


# parse_int: Python's int() refuses more than 4,300 digits, and the values of numbers are not needed.
_parse = json.JSONDecoder(parse_int=len).decode


def _of_line(line: bytes | None, place: Place, options: ReadOptions, errors: InputErrors) -> str | bytes | None:
    found = _record(line, place, options, errors)
    if found is None:
        return None
    (record,) = found
    if not isinstance(record, dict) or options.text_key not in record:
        keys = ", ".join(sorted(map(str, record))[:8]) if isinstance(record, dict) else type(record).__name__
        hint = "; a chat needs --format=chat" if isinstance(record, dict) and "messages" in record else ""
        note = f"no {options.text_key!r}; it has: {keys}{hint}"
        bad("record without the text key", place._replace(note=note), options, errors)
        return None
    return _of_value(record[options.text_key], place, options, errors)


def _record(line: bytes | None, place: Place, options: ReadOptions, errors: InputErrors) -> tuple[Any] | None:
    """The JSON value of a line, in a tuple; None, after counting, if it has none, or has the text key twice."""
    if line is None:
        bad(f"record longer than {MAX_LINE_BYTES >> 20} MiB", place, options, errors)
        return None
    if not line or line.isspace():
        return None
    if len(line) > LONG_LINE_BYTES:
        errors.record(f"line longer than {LONG_LINE_BYTES >> 20} MiB", place)
    try:
        text = _decode(line, place, options)
        record = _parse(text)
        is_given_twice = _is_given_twice(text, options)
    except (ValueError, RecursionError) as e:
        bad("broken JSON", place._replace(note=str(e)[:80]), options, errors)
        return None
    if is_given_twice:
        bad("record with the text key twice", place, options, errors)
        return None
    return (record,)


def _is_given_twice(text: str, options: ReadOptions) -> bool:
    """Whether a JSON object has the text key twice at its top level; Python's decoder would keep only the last value.

    Raises:
      RecursionError: the line is nested too deeply for a decoder with a hook.
    """
    if next(itertools.islice(options.key_in_json.finditer(text), 1, None), None) is None:
        return False
    keys: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [name for name, _ in pairs]  # the object that ends last is the outermost

    json.JSONDecoder(object_pairs_hook=note, parse_int=len).decode(text)
    return keys.count(options.text_key) > 1


def _of_value(value: Any, place: Place, options: ReadOptions, errors: InputErrors) -> str | bytes | None:
    """The text of a record; None, after counting, if there is none. Raises DataError for a bad record."""
    if not isinstance(value, str | bytes):
        bad("text that is no string", place._replace(note=type(value).__name__), options, errors)
        return None
    if not value:
        errors.record("empty document", place)
        return None
    if isinstance(value, bytes):  # from Parquet
        if options.raw:
            return value
        value = _decode(value, place, options)
    text = whole(value, place, options, errors)
    if options.raw:
        return text.encode()
    if nuls := text.count("\0"):
        errors.record(NUL, place, nuls)
    return text


@functools.lru_cache(maxsize=1)
def _open_parquet(path: pathlib.Path, size: int, mtime_ns: int) -> tuple[Any, list[int]]:
    """The file, and the number of rows before each row group. Cached, because opening takes time for each row group."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the pyarrow package: pip install 'meshlm[data]'") from None
    import pyarrow

    try:
        opened = pyarrow.OSFile(os.fsencode(path))  # a file name may not be UTF-8
        table = pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)
        groups = map(table.metadata.row_group, range(table.num_row_groups))
        return table, list(itertools.accumulate((group.num_rows for group in groups), initial=0))
    except (OSError, ValueError, pyarrow.ArrowException) as e:  # column names that are not UTF-8 also raise these
        raise DataError(f"{path} is not a Parquet file that can be read: {_first_line(e)}") from None


def _parquet(file: File) -> tuple[Any, list[int]]:
    stat = file.path.stat()
    return _open_parquet(file.path, stat.st_size, stat.st_mtime_ns)


def _read_parquet(span: Span, options: ReadOptions, errors: InputErrors) -> Iterator[Chunk]:
    import pyarrow

    path, key = span.file.path, options.text_key
    table, rows_before = _parquet(span.file)
    names = table.schema_arrow.names
    if names.count(key) != 1:
        if key in names:
            raise DataError(f"{path} has two columns {key!r}; rename one")
        raise DataError(f"{path} has no column {key!r}; name one with --text_key: {', '.join(names[:8])}")
    number, groups = rows_before[span.start], list(range(span.start, span.stop))
    try:
        for batch in table.iter_batches(ROWS, row_groups=groups, columns=[key], use_threads=False):
            for value in _values(batch.column(key)):
                number += 1
                text = _of_value(value, Place(str(path), "row", number), options, errors)
                if text:
                    yield Chunk(text, True, True)
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as e:  # for example for values of another type
        raise DataError(f"{path} cannot be read after row {number}: {_first_line(e)}") from None


def _values(column: Any) -> list[Any]:
    """The values of a column; strings are returned as bytes, because Parquet does not check that they are UTF-8."""
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if isinstance(column, pyarrow.DictionaryArray):
        column = column.dictionary_decode()
    binary = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.large_binary(),
    }
    return column.cast(binary.get(column.type, column.type)).to_pylist()


def bad(kind: str, where: str | Place, options: ReadOptions, errors: InputErrors) -> None:
    if options.bad_records == "error":
        raise DataError(
            f"{kind}: {_exact(where)}; fix it, or pass --bad_records=skip to count such records and leave them out"
        )
    errors.record(kind, where)


def _exact(where: str | Place) -> str | Place:
    """The place, with its line number in the whole file. This reads the file up to there: only for an error."""
    if isinstance(where, str) or not where.after:
        return where
    with open(where.path, "rb") as f:
        left, lines = where.after, 0
        while left and (block := f.read(min(left, 1 << 20))):
            left, lines = left - len(block), lines + block.count(b"\n")
    return where._replace(number=where.number + lines, after=0)
