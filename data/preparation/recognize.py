"""Detects what a file is: text, JSON lines, Parquet, or not text. All rules for source files are here.

The first bytes decide, after decompression; the name decides only if the bytes fit several kinds.
"""

import codecs
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator

from data.errors import DataError

HEAD_BYTES = 1 << 16  # bytes that are read of a file, and of its decompressed content
BLOCK_BYTES = 1 << 10  # bytes for one call of a decompressor; small, so that data before a damaged place is used
MAX_WRONG = 0.1  # share of the first bytes that are NUL or not UTF-8; a text in Latin-1 has fewer
MAX_NUL = 0.005  # share of the first bytes; binary records have NULs in the numbers between their texts
SEEN_LINES = 20  # lines searched for records: the first may be truncated, or a header
FEW_BYTES = 256  # a shorter file counts as this long, so that one invalid byte does not make it binary
TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
CHAT = "chat"  # JSON lines with a chat each; only if asked for
PREFERENCE = "preference"  # JSON lines with two chats each, of which one is preferred; only if asked for
KINDS = ("auto", TEXT, JSONL, PARQUET, CHAT, PREFERENCE)

# RFC 1952 and RFC 8878, including its skippable frames.
COMPRESSIONS = ((re.compile(rb"\x1f\x8b"), "gz"), (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zst"))
COMPRESSION_SUFFIXES = {".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst"}
PROGRAMS = {"gz": "gzip", "zst": "zstd"}
RECORD_SUFFIXES = {".jsonl": JSONL, ".ndjson": JSONL, ".jl": JSONL, ".parquet": PARQUET}

UNPACK = "unpack it (gzip and zstd need not be)"
TO_RECORDS = "convert it to JSON lines or Parquet"
TO_LINES = "write one record a line, for example with jq -c ."
TO_UTF8 = "convert it with iconv -t UTF-8"
TOKENS = "launch.train reads token files itself: --config.data.path"
NO_TEXT = "leave it out"

# A pattern of the first bytes, what such a file is, and what to do. These formats consist of text.
REFUSED_TEXT = (
    (
        rb"version https://git-lfs\S*\n|/annex/objects/\S+\s*\Z",
        "a Git LFS or git-annex pointer",
        "fetch the file itself",
    ),
    (rb"!<arch>\n", "an archive", UNPACK),
    (rb"WARC/\d\.\d\r?\n", "a web archive", "take the text of its pages out"),
    (rb"%PDF-\d\.\d\s*[\r\n]", "a PDF", "take its text out, for example with pdftotext"),
    (rb"\{\\rtf\d", "an office document", "save it as text"),
    (
        rb"\([ld]p0\n|c(copy_reg|numpy|builtins|__builtin__)[\w.]*\n\w+\n",
        "a pickle, which is never opened",
        TO_RECORDS,
    ),
)
# Formats of tokenizers that consist of text: minbpe's, tiktoken's (single bytes first), merges.txt, tokenizer.json.
TOKENIZERS = (
    rb"minbpe v\d+\r?\n|([A-Za-z0-9+/]{2}== \d+\r?\n){8}|#version: \d[^\n]*\n(\S+ \S+\r?\n){3}",
    rb'\{\s*"version"\s*:\s*"[^"]*"\s*,\s*"truncation"\s*:',
    rb'\{(?=\s*")(?=.*(?<!\\)"added_tokens"\s*:)(?=.*(?<!\\)"(pre_tokenizer|model)"\s*:)',
)
# The same for formats with bytes that text does not have. They are needed, because a text may begin with the letters.
REFUSED = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", TO_UTF8),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", TO_UTF8),
    (rb"BZh[1-9](1AY&SY|\x17rE8P)", "compressed by bzip2", UNPACK),
    (rb"\xfd7zXZ\0", "compressed by xz", UNPACK),
    (rb"\]\0\0.{2}[\0\xff]{4}", "compressed by lzma", UNPACK),
    (rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "compressed by lz4", UNPACK),
    (rb"\x1f[\x9d\xa0\x1e]|LZIP[\0\x01]|\x89LZO|\xff\x06\0\0sNaPpY", "compressed by another program than gzip", UNPACK),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive", UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", UNPACK),
    (rb".{257}ustar[\0 ]", "a tar archive", UNPACK),
    (rb"\xed\xab\xee\xdb|MSCF\0", "an archive", UNPACK),
    (rb"ARROW1\0|\xff\xff\xff\xff.{3}\0|FEA1\0", "Arrow data", TO_RECORDS),
    (rb"ORC[\0-\x08]|Obj\x01", "ORC or Avro", TO_RECORDS),
    (rb"PARE.{4}", "encrypted Parquet", TO_RECORDS),
    (rb"SQLite format 3\0", "an SQLite database", TO_RECORDS),
    (rb"\x89HDF\r\n\x1a\n", "HDF5", TO_RECORDS),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", "save it as text"),
    (rb"\x80[\x02-\x05]", "a pickle, which is never opened", TO_RECORDS),
    (rb"\x93NUMPY", "a NumPy array", TOKENS),
    (rb"LITPKDS|MMIDIDX\0", "a token file", TOKENS),
    (rb".{6}\0\0\{\"", "safetensors: a model's weights", NO_TEXT),
    (rb"GGUF[\x01-\x09]\0", "a GGUF model", NO_TEXT),
)
# Files that are often in a folder with text, and that are then left out. Java's class files begin like Mach-O files.
MEDIA = (
    (
        rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0\0\0\0|II\*\0|MM\0\*|\0\0\x01\0|8BPS\0\x01|RIFF.{4}WEBP",
        "an image",
    ),
    (rb"RIFF.{4}(WAVE|AVI )|FORM.{4}AIFF|ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]|MThd\0", "media"),
    (rb"OggS\0|fLaC[\0\x80]\0|\0\0.{2}ftyp|\x1aE\xdf\xa3|FLV\x01|\0\0\x01\xba", "media"),
    (rb"\0\x01\0\0\0.{7}|OTTO\0|ttcf\0|wOF[F2](\0\x01\0\0|OTTO|true|ttcf)", "a font"),
    (rb"\x7fELF|MZ.{0,64}\0|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm", "a program"),
)
# Suffixes of files that their first bytes do not identify.
REFUSED_SUFFIXES = {
    ".csv": ("a table", TO_RECORDS),
    ".tsv": ("a table", TO_RECORDS),
    ".bz2": ("named as compressed by bzip2", UNPACK),
    ".xz": ("named as compressed by xz", UNPACK),
    ".lzma": ("compressed by lzma", UNPACK),
    ".lz4": ("named as compressed by lz4", UNPACK),
    ".br": ("compressed by brotli", UNPACK),
    ".zip": ("named as a zip archive", UNPACK),
    ".7z": ("named as a 7z archive", UNPACK),
    ".rar": ("named as a rar archive", UNPACK),
    ".tar": ("named as a tar archive", UNPACK),
    ".tgz": ("named as a tar archive", UNPACK),
    ".arrow": ("Arrow data", TO_RECORDS),
    ".feather": ("Arrow data", TO_RECORDS),
    ".orc": ("ORC", TO_RECORDS),
    ".avro": ("Avro", TO_RECORDS),
    ".bin": ("a token file", TOKENS),
    ".idx": ("the index of a token file", TOKENS),
    ".npy": ("a NumPy array", TOKENS),
    ".npz": ("NumPy arrays", TO_RECORDS),
    ".pkl": ("a pickle, which is never opened", TO_RECORDS),
    ".pickle": ("a pickle, which is never opened", TO_RECORDS),
    ".safetensors": ("safetensors: a model's weights", NO_TEXT),
    ".gguf": ("a GGUF model", NO_TEXT),
    ".tfrecord": ("TFRecord data", TO_RECORDS),
    ".tfrecords": ("TFRecord data", TO_RECORDS),
    ".mds": ("MosaicML shards", TO_RECORDS),
}
OFFICE_SUFFIXES = {".docx", ".xlsx", ".pptx", ".odt", ".ods", ".odp", ".epub"}
# Media with various first bytes; the suffix counts only if the file is not text.
MEDIA_SUFFIXES = {
    ".bmp",
    ".mp3",
    ".aac",
    ".ts",
    ".mpg",
    ".mpeg",
    ".tga",
    ".pyc",
    ".pyo",
    ".class",
    ".o",
    ".obj",
    ".dds",
}

_REFUSED_TEXT, _REFUSED = (
    [(re.compile(pattern, re.DOTALL), what, advice) for pattern, what, advice in table]
    for table in (REFUSED_TEXT, REFUSED)
)
_TOKENIZERS = [re.compile(pattern, re.DOTALL) for pattern in TOKENIZERS]
_NOT_OF_TEXT = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
_MEDIA = [(re.compile(pattern, re.DOTALL), what) for pattern, what in MEDIA]
_BEGINS_OBJECT = re.compile(rb'\s*\{\s*("([^"\\]|\\.)*"\s*:|\})')
_BEGINS_ARRAY = re.compile(rb'\s*\[\s*\{\s*("([^"\\]|\\.)*"\s*:|\})')
_BEGINS_JSON_ARRAY = re.compile(rb'\s*\[\s*[\[{"]')  # an array of what may be texts, in a file named .json
_BEGINS_TEXT = re.compile(rb'\s*("|\[\s*[\[{"])')
_BEGINS_VALUES = re.compile(rb"\s*\[\s*((-?\d[\d.eE+-]*|true|false|null)\s*[,\]]|\])")  # an array of other values


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    name: str  # 'text' (the file is one document), 'jsonl' or 'parquet' (each record is a document)
    compression: str  # 'gz', 'zst', or '' for none


class Refusal(DataError):
    """A file that is not text.

    Attributes:
      what: what the file is instead.
      is_media: it is an image, sound, a font or a program.
      is_beside: it is media, or another kind of file that is often in a folder with text; folders are read without it.
    """

    def __init__(self, path: pathlib.Path, what: str, advice: str, is_media: bool = False, is_beside: bool = False):
        super().__init__(f"{path} is {what}; {advice}, or say --format=text to take it as it is")
        self.what = what
        self.advice = advice
        self.is_media = is_media
        self.is_beside = is_media or is_beside


def recognize(path: pathlib.Path, asked: str = "auto") -> Kind:
    """Detects what a file is.

    Args:
      asked: one of KINDS; a kind other than 'auto' is not checked against the content.

    Raises:
      Refusal: the file is not text, or its kind must be given.
      DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(HEAD_BYTES)
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    compression = next((name for pattern, name in COMPRESSIONS if pattern.match(raw)), "")
    head = _decompressed(raw, compression, path) if compression else raw
    is_whole = max(len(raw), len(head)) < HEAD_BYTES
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        named = COMPRESSION_SUFFIXES[suffixes.pop()]
        if not compression and asked == "auto":
            raise Refusal(path, f"not {PROGRAMS[named]}, though it is named so", "rename it, copy it again")
    suffix = suffixes[-1] if suffixes else ""
    name = asked if asked != "auto" else _kind(path, suffix, head, is_whole, compression)
    if name == PARQUET and compression:
        raise Refusal(path, f"Parquet inside {PROGRAMS[compression]}", "unpack it")
    return Kind(name, compression)


def _kind(path: pathlib.Path, suffix: str, head: bytes, is_whole: bool, compression: str) -> str:
    inside = f" inside {PROGRAMS[compression]}" if compression else ""
    if compression and any(pattern.match(head) for pattern, _ in COMPRESSIONS):
        raise Refusal(path, "compressed twice", UNPACK)
    wrong = _share_wrong(head)
    is_binary = wrong > 0 or _NOT_OF_TEXT.search(head) is not None
    for pattern, what, advice in _REFUSED_TEXT + (_REFUSED if is_binary else []):
        if pattern.match(head):
            raise Refusal(path, ("an office document" if suffix in OFFICE_SUFFIXES else what) + inside, advice)
    for pattern, what in _MEDIA if is_binary else []:
        if pattern.match(head):
            raise Refusal(path, what + inside, NO_TEXT, is_media=True)
    if head.startswith(b"PAR1") and is_binary:
        return PARQUET
    if suffix in RECORD_SUFFIXES:
        if RECORD_SUFFIXES[suffix] == JSONL and _is_over_several_lines(head):
            raise Refusal(path, "JSON over several lines", TO_LINES)
        return RECORD_SUFFIXES[suffix]
    if any(pattern.match(head.removeprefix(codecs.BOM_UTF8).lstrip()) for pattern in _TOKENIZERS):
        raise Refusal(path, "a tokenizer", NO_TEXT, is_beside=True)
    if suffix in REFUSED_SUFFIXES:
        raise Refusal(path, *REFUSED_SUFFIXES[suffix])
    if wrong > MAX_WRONG or head.count(0) > MAX_NUL * max(len(head), FEW_BYTES):
        if suffix in MEDIA_SUFFIXES:
            raise Refusal(path, "media", NO_TEXT, is_media=True)
        what = f"not text: {wrong:.1%} of its first bytes are NUL or not UTF-8"
        raise Refusal(path, what, f"{TO_UTF8} if it is text in another encoding, leave it out")
    return _text_or_records(path, suffix, head.removeprefix(codecs.BOM_UTF8), is_whole)


def _text_or_records(path: pathlib.Path, suffix: str, head: bytes, is_whole: bool) -> str:
    lines = list(filter(bytes.strip, io.BytesIO(head)))
    objects = [_is_object(line, is_cut=not is_whole and not line.endswith(b"\n")) for line in lines[:SEEN_LINES]]
    is_json = suffix == ".json"
    if is_json and objects and objects[0]:
        return JSONL
    if (_BEGINS_JSON_ARRAY if is_json else _BEGINS_ARRAY).match(head):
        raise Refusal(path, "a JSON array", "write one record a line, for example with jq -c '.[]'")
    if is_json and _is_one_of_many(head):
        raise Refusal(path, "JSON objects that are not one a line", "write them so, for example with jq -c .")
    if is_json and (_BEGINS_OBJECT.match(head) or _BEGINS_VALUES.match(head)):
        raise Refusal(path, "one JSON value, and not a record a line", TO_LINES, is_beside=True)
    if objects and (all(objects) or any(a and b for a, b in itertools.pairwise(objects))):
        raise Refusal(path, "text that looks like JSON lines", "say --format=jsonl if it is")
    if _is_one_of_many(head, as_text=True):  # on one line, as some services write them
        raise Refusal(path, "JSON objects that are not one a line", "write them so, for example with jq -c .")
    if len(lines) > 1 and all(map(_is_text_value, lines[: min(SEEN_LINES, len(lines) - (not is_whole))])):
        raise Refusal(
            path, "JSON values that are not records", "write one record a line, for example with jq -c '{text: .}'"
        )
    return TEXT


def _is_object(line: bytes, is_cut: bool) -> bool:
    """Whether a line is a JSON object; if the end of the head truncates the line, whether it begins like one."""
    if is_cut or not line.lstrip().startswith(b"{"):
        return is_cut and _BEGINS_OBJECT.match(line) is not None
    try:
        return isinstance(json.loads(line.decode("utf-8", "replace"), parse_int=len), dict)  # of any length
    except RecursionError:
        return _BEGINS_OBJECT.match(line) is not None
    except ValueError:
        return False


def _is_text_value(line: bytes) -> bool:
    """Whether a line is a JSON string, or an array of strings, arrays or objects."""
    if not _BEGINS_TEXT.match(line):
        return False
    try:
        json.loads(line.decode("utf-8", "replace"), parse_int=len)
    except (ValueError, RecursionError):
        return False
    return True


def _is_one_of_many(head: bytes, as_text: bool = False) -> bool:
    """Whether another value follows the first object or string, which may have several lines.

    Args:
      as_text: require that both are objects and the first is not empty, as no text begins.
    """
    text = head.decode("utf-8", "replace").lstrip()
    try:
        first, end = json.JSONDecoder(parse_int=len).raw_decode(text)
    except (ValueError, RecursionError):
        return False
    following = text[end:].lstrip()[:1]
    if as_text:
        return isinstance(first, dict) and bool(first) and following == "{"
    return isinstance(first, dict | str) and following in ("{", '"', "[", ",")


def _is_over_several_lines(head: bytes) -> bool:
    """Whether the first value contains a newline. A JSON line never does: newlines in strings are escaped."""
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text.partition("\n")[0].rstrip() in ("{", "["):
        return True
    try:
        _, end = json.JSONDecoder(parse_int=len).raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _share_wrong(head: bytes) -> float:
    """The share of bytes that are NUL or not UTF-8. A character that the end of the head truncates does not count."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    wrong = head.count(0)
    if not head.isascii():
        wrong += text.count("\ufffd") - head.count("\ufffd".encode())
    return wrong / max(len(head), FEW_BYTES)


def _decompressed(raw: bytes, compression: str, path: pathlib.Path) -> bytes:
    """The first HEAD_BYTES of the content; fewer if the file is damaged (its reader will report the damage)."""
    head = bytearray()
    for block in _gunzip(raw) if compression == "gz" else _unzstd(raw, path):
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return bytes(head[:HEAD_BYTES])


def _gunzip(raw: bytes) -> Iterator[bytes]:
    member, left = zlib.decompressobj(zlib.MAX_WBITS | 16), raw
    while left:
        try:
            yield member.decompress(left[:BLOCK_BYTES], HEAD_BYTES)
        except zlib.error:
            return
        left = member.unconsumed_tail + member.unused_data + left[BLOCK_BYTES:]
        if member.eof:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)


def _unzstd(raw: bytes, path: pathlib.Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path} needs the zstandard package: pip install 'meshlm[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    with decompressor.stream_reader(raw, read_across_frames=True) as reader:
        try:
            yield from iter(functools.partial(reader.read, BLOCK_BYTES), b"")
        except zstandard.ZstdError:
            return
