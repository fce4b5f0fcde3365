"""Random files, cut and compressed in any way, give the documents that a simple reader of the whole file finds."""

import gzip
import itertools
import json
import pathlib
import struct
import tempfile
from unittest import mock

import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizers
from data.preparation import corpus, documents, input_errors

MARK = b"\xef\xbb\xbf"
PARTS = [
    b"word", b" ", b"  ", b"\n", b"\n\n", b"\r\n", b"\r", b"\t", b"\0", b"a b c\nd e", b"x" * 40,
    MARK, "é東\U0001f600".encode(), "\u2028\u3000\u00a0\x85".encode(), "\ufffd".encode(),
    b"\xe9", b"\xf0\x9f", b"\x80" * 5, b"\xed\xa0\x80", b"\xff\xfe",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PARTS), max_size=30).map(b"".join)
STRINGS = [
    '"a b"', '"one\\ntwo"', '"\\ud83d\\ude00"', '"\\ud83d b"', '"\\ude00\\ud83d"', '"\\u0000"', '""', '"é\u2028東"',
    '"\\ufffd\ufffd"', "null", "17", "[]", '{"text": "inner"}', "1" * 5000, "NaN", "1e999999",
]  # fmt: skip
RECORDS = [
    *(f'{{"text": {value}}}'.encode() for value in STRINGS),
    *(f'{{"id": {value}, "text": "first", "text": "last wins"}}'.encode() for value in STRINGS),
    b'{"text": "\xe9 \xf0\x9f\x80"}', b'{"text": "\xe9\\udc00"}', b'{"\xff": 1, "text": "key"}',
    b'{"Text": "a"}', b'{"text": "cut',
    b'{"text": "a"}\r{"text": "b"}', b'\t {"text": "x"} \r', b"[1]", b"5", MARK + b'{"text": "m"}', b"\x0c", b" ", b"",
    b'{"deep": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"text": "' + b"long " * 30 + b'"}', b"\0", b"\xff",
]  # fmt: skip
LINES = st.tuples(
    st.sampled_from([b"", MARK]), st.lists(st.sampled_from(RECORDS), max_size=12), st.sampled_from([b"", b"\n"])
).map(lambda made: made[0] + b"\n".join(made[1]) + made[2])
SIZES = st.tuples(st.sampled_from([1, 2, 3, 7, 30, 1000]), st.sampled_from([1, 2, 5, 20]), st.sampled_from([1, 3, 64]))
CUTS = st.lists(st.integers(0, 1 << 16), max_size=3)


def compressed(raw: bytes, cuts: list[int]) -> dict[str, bytes]:
    """By suffix: `raw` unchanged, as several gzip members, and as zstd frames with skippable frames between them."""
    edges = sorted({0, len(raw), *(at % (len(raw) + 1) for at in cuts)})
    parts = [raw[a:b] for a, b in itertools.pairwise(edges)] or [b""]
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"skip!"
    zstd = zstandard.ZstdCompressor(write_checksum=True).compress
    return {
        "": raw,
        ".gz": b"".join(map(gzip.compress, parts)) + b"\0" * 8,
        ".zst": skipped + skipped.join(map(zstd, parts)) + skipped,
    }


def read(path: pathlib.Path, sizes, **options) -> tuple[list[documents.Chunk], input_errors.InputErrors]:
    """All chunks of a file, and the errors of its units, each of which goes through JSON, merged."""
    unit, search, block = sizes
    small = {"UNIT_BYTES": unit, "LINE_SEARCH_BYTES": search, "BLOCK_BYTES": block, "ZSTD_BYTES": block}
    found, merged = [], input_errors.InputErrors()
    with mock.patch.multiple(documents, **small), mock.patch.object(input_errors, "EXAMPLES", 1000):
        kind, compression = (*path.name.split(".")[1:], "")[:2]
        for unit in documents.plan_units([corpus.File(path.name, path, kind.replace("txt", "text"), compression)]):
            own = input_errors.InputErrors()
            for span in unit:
                found += documents.read_chunks(span, documents.ReadOptions(bad_records="skip", **options), own)
            merged.add(input_errors.InputErrors.from_json(json.loads(json.dumps(own.to_json()))))
    return found, merged


def joined(pieces: list[documents.Chunk]) -> list:
    """Joins chunks to documents."""
    texts, parts = [], []
    for text, begins, ends in pieces:
        assert text and begins == (not parts)
        parts.append(text)
        if ends:
            texts.append(type(text)().join(parts))
            parts = []
    assert not parts
    return texts


@settings(max_examples=150, deadline=None)
@given(TEXT, CUTS, SIZES)
def test_text_is_read_whole_and_cut_at_the_same_places_however_it_is_compressed(raw, cuts, sizes):
    text = raw.removeprefix(MARK)
    whole = text.decode("utf-8", "replace")
    expected = {
        "byte order mark, taken off": int(raw.startswith(MARK)),
        "empty document": int(not text),
        input_errors.NUL: text.count(b"\0"),
        input_errors.REPLACED: whole.count("\ufffd") - text.count("\ufffd".encode()),
    }
    with tempfile.TemporaryDirectory() as folder:
        before = None
        for suffix, content in compressed(raw, cuts).items():
            path = pathlib.Path(folder) / f"a.txt{suffix}"
            path.write_bytes(content)
            pieces, found = read(path, sizes)
            assert joined(pieces) == [whole] * bool(text)
            assert {kind: count for kind, count in found.counts.items() if count} == {
                kind: count for kind, count in expected.items() if count
            }
            assert found.characters == len(whole)
            assert joined(read(path, sizes, raw=True)[0]) == [text] * bool(text)
            assert before in (None, pieces)
            before = pieces
            for kind, value in (input_errors.NUL, b"\0"), (input_errors.REPLACED, None):
                for place in found.examples.get(kind, []):
                    there = raw[place.number :]
                    assert there.startswith(value) if value else there[:4].decode("utf-8", "replace")[0] == "\ufffd"


def names(line: bytes) -> list[str]:
    """The names in a JSON object, in order."""
    return [name for name, _ in json.loads(line.decode("utf-8", "replace"), object_pairs_hook=list, parse_int=len)]


def plain_records(raw: bytes) -> tuple[list[str], set[tuple[str, int]]]:
    """Reads records simply; returns the texts, and the kind and line of each problem."""
    texts, wrong = [], set()
    for number, line in enumerate(raw.removeprefix(MARK).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8", "replace"), parse_int=lambda digits: 0)
        except (ValueError, RecursionError):
            wrong.add(("broken JSON", number))
            continue
        if not isinstance(record, dict) or "text" not in record:
            wrong.add(("record without the text key", number))
        elif names(line).count("text") > 1:
            wrong.add(("record with the text key twice", number))
        elif not isinstance(record["text"], str):
            wrong.add(("text that is no string", number))
        elif not record["text"]:
            wrong.add(("empty document", number))
        else:
            text = record["text"].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            if b'"text": "\xe9' in line or text != record["text"]:
                wrong.add((input_errors.REPLACED, number))
            if "\0" in text:
                wrong.add((input_errors.NUL, number))
            texts.append(text)
    return texts, wrong


@settings(max_examples=60, deadline=None)
@given(LINES, CUTS, SIZES)
def test_json_lines_give_their_records_and_the_lines_of_all_problems(raw, cuts, sizes):
    texts, wrong = plain_records(raw)
    with tempfile.TemporaryDirectory() as folder:
        for suffix, content in compressed(raw, cuts).items():
            path = pathlib.Path(folder) / f"a.jsonl{suffix}"
            path.write_bytes(content)
            pieces, found = read(path, sizes)
            assert joined(pieces) == texts and all(piece.begins and piece.ends for piece in pieces)
            marks = found.examples.pop("byte order mark, taken off", [])
            assert marks == [str(path)] * raw.startswith(MARK)
            places = {(kind, place) for kind, examples in found.examples.items() for place in examples}
            assert all(place.after == 0 and place.path == str(path) for _, place in places)
            assert {(kind, place.number) for kind, place in places} == wrong
            assert joined(read(path, sizes, raw=True)[0]) == [text.encode() for text in texts]


VALUES = [None, b"", b"plain", b"caf\xe9 \xf0\x9f", "é東".encode(), b"a\0b", b"plain"]
TYPES = ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"]


def parquet_column(values: list, kind: str) -> pyarrow.Array:
    """An array of strings whose encoding is not checked: other writers make such arrays."""
    column = pyarrow.array(values, pyarrow.large_binary() if kind.startswith("large") else pyarrow.binary())
    if kind.endswith("string"):
        return column.view(kind)
    if kind == "dictionary":
        return column.view("string").dictionary_encode()
    return column.view("string").cast("string_view") if kind == "string_view" else column


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(VALUES), max_size=12), st.sampled_from(TYPES), st.sampled_from([1, 2, 5]), SIZES)
def test_parquet_gives_its_rows_whatever_strings_are_made_of(values, kind, rows, sizes):
    numbered = list(enumerate(values, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.parquet"
        column = parquet_column(values, kind)
        table = pyarrow.table([pyarrow.array(range(len(values))), column, column], ["n", "text", "text.n"])
        with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
            for at in range(0, len(values), rows):
                writer.write_table(table.slice(at, rows))
                writer.write_table(table.slice(at, 0))  # an empty row group
        pieces, found = read(path, (sizes[0] * 100, *sizes[1:]))
        assert joined(pieces) == [value.decode("utf-8", "replace") for value in values if value]
        assert {kind: [place.number for place in places] for kind, places in found.examples.items() if places} == {
            kind: numbers
            for kind, numbers in {
                "text that is no string": [n for n, value in numbered if value is None],
                "empty document": [n for n, value in numbered if value == b""],
                input_errors.REPLACED: [n for n, value in numbered if value and b"\xe9" in value],
                input_errors.NUL: [n for n, value in numbered if value and b"\0" in value],
            }.items()
            if numbers
        }
        assert joined(read(path, sizes, raw=True)[0]) == [value for value in values if value]


WORDS = ["word", "don't", "123", "(x)", "é東", "!", " ", "  ", "\n", "\n\n", "\t", "\r\n"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=20), st.integers(1, 60))
def test_a_text_that_is_cut_at_a_good_place_has_the_tokens_of_the_whole(parts, at):
    text = "".join(parts)
    raw = text.encode()
    at += documents.split_point(raw[at:])
    good = any(place.match(text, len(raw[:at].decode())) for place in documents.SPLIT_PLACES[:2])
    for codec in CODECS if good else []:
        apart = [*codec.encode(raw[:at].decode()), *codec.encode(raw[at:].decode())]
        assert apart == codec.encode(text).tolist()


CODECS = [
    tokenizers.make(spec, ["word don't (x)! 123 é東 \n\n\t word\r\n" * 9]) for spec in ("bpe:300", "bpe:300:llama3")
]
