"""Bad input is reported with its file and place, counted, and never dropped silently; the rest is read completely."""

import gzip
import itertools
import json
import pathlib
import re
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.errors import DataError
from data.preparation import corpus, documents, pipeline
from data.preparation.input_errors import REPLACED
from tests.texts import damaged_copies

SKIP = {"bad_records": "skip"}


def plan(path: pathlib.Path) -> list[documents.WorkUnit]:
    """The work units of a file; its name gives the kind and the compression, whatever the content."""
    kind, compression = (*path.name.split(".")[1:], "")[:2]
    kind = {"txt": "text", "ndjson": "jsonl"}.get(kind, kind)
    return documents.plan_units([corpus.File(path.name, path, kind, compression)])


def read(path: pathlib.Path, **options) -> tuple[list, documents.InputErrors]:
    """All documents of a file, and its errors."""
    texts, parts, errors = [], [], documents.InputErrors()
    for unit in plan(path):
        for span in unit:
            for text, begins, ends in documents.read_chunks(span, documents.ReadOptions(**options), errors):
                assert text and begins == (not parts)
                parts.append(text)
                if ends:
                    texts.append(type(text)().join(parts))
                    parts = []
    assert not parts
    errors.examples = errors.summary()["examples"]
    return texts, errors


def lines(*records) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


GOOD, LAST = {"text": "good"}, {"text": "last"}


@pytest.mark.parametrize(
    ("bad", "kind", "named"),
    [
        (b'{"text": "cut', "broken JSON", "Unterminated"),
        (b"not json at all", "broken JSON", "Expecting value"),
        (b"[" * 100_000, "broken JSON", "recursion"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON", "Extra data"),
        ({"content": "x", "id": 1}, "record without the text key", "no 'text'; it has: content, id"),
        ([1, 2], "record without the text key", "it has: list"),
        ({"text": None}, "text that is no string", "NoneType"),
        ({"text": ["a"]}, "text that is no string", "list"),
        (b'{"text": "first", "text": "second"}', "record with the text key twice", ""),
        (b'{"text": "a long one", "a": {"text": 1}, "text" : ""}', "record with the text key twice", ""),
        (b'{"te\\u0078t": "first", "text": "second"}', "record with the text key twice", ""),
        (b'{"\\u0074\\u0065\\u0078\\u0074": 1, "a": 2, "tex\\u0074" :"second"}', "record with the text key twice", ""),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "ndjson"])
def test_a_bad_record_stops_or_is_skipped_and_counted(bad, kind, named, suffix, tmp_path):
    raw = lines(GOOD, bad, LAST, bad)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(suffix[6:], bytes)(raw))
    with pytest.raises(DataError) as e:
        read(path)
    assert all(part in str(e.value) for part in (f"{path} line 2", kind, named, "--bad_records=skip"))
    texts, errors = read(path, **SKIP)
    assert texts == ["good", "last"]
    assert errors.counts == {kind: 2}
    assert [f"{path} line {n}" in where for n, where in zip((2, 4), errors.examples[kind], strict=True)] == [True] * 2


@pytest.mark.parametrize("key", ["text", 'a "b" \\/', "\n\t", "Ünï", "\U0001d11e", "a\u2028.*"])
def test_any_spelling_of_a_key_is_that_key(key, tmp_path):
    escaped = "".join(f"\\u{unit}" for unit in key.encode("utf-16-be").hex(" ", 2).split())
    spellings = [json.dumps(key), json.dumps(key, ensure_ascii=False), json.dumps(key).replace("/", "\\/")]
    spellings += [f'"{escaped}"', f'"{escaped.upper()}"'.replace("U", "u")]
    for one, other in itertools.product(spellings, spellings):
        (tmp_path / "a.jsonl").write_text(
            f'{{{one}: "a", {other} : "b"}}\n{{{one}: "c", "d": {{{other}: 1}}}}', "utf-8"
        )
        texts, errors = read(tmp_path / "a.jsonl", text_key=key, **SKIP)
        assert texts == ["c"] and errors.counts == {"record with the text key twice": 1}


def test_records_of_any_depth_are_read_or_broken(tmp_path):
    """The second parser of a line, which finds duplicate keys, accepts slightly less nesting than the first."""
    for depth in range(960, 1010):
        value = "[" * depth + "{}" + "]" * depth
        (tmp_path / "a.jsonl").write_bytes(lines(f'{{"text": "a", "m": {{"text": {value}}}}}'.encode(), LAST))
        texts, errors = read(tmp_path / "a.jsonl", **SKIP)
        assert (texts, errors.counts) in ((["a", "last"], {}), (["last"], {"broken JSON": 1})), depth


def test_other_places_of_the_text_key_are_not_the_key(tmp_path):
    records = [
        {"type": "text", "text": "a"},
        {"a": {"text": 1}, "text": "b"},
        {"text": '"text": "text": c', "b": "text"},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    assert read(tmp_path / "a.jsonl")[0] == [record["text"] for record in records]


def test_lines_are_numbered_through_the_file_although_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[GOOD] * 50, b"bad", *[GOOD] * 50, b"bad"))
    assert sum(map(len, plan(path))) > 5
    texts, errors = read(path, **SKIP)
    assert len(texts) == 100
    assert [where.split(" (")[0] for where in errors.examples["broken JSON"]] == [
        f"{path} line 51",
        f"{path} line 102",
    ]


def test_all_are_counted_and_a_few_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*[b"bad"] * 1000))
    texts, errors = read(tmp_path / "a.jsonl", **SKIP)
    assert texts == [] and errors.counts == {"broken JSON": 1000} and len(errors.examples["broken JSON"]) == 3


def test_empty_documents_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, {"text": ""}, b"", b"  ", LAST)[:-1])  # the last line has no newline
    texts, errors = read(path)
    assert texts == ["good", "last"]
    assert errors.counts == {"empty document": 1}
    assert errors.examples["empty document"] == [f"{path} line 2"]


def test_nul_is_kept_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a\0b"}))
    (tmp_path / "b.txt").write_bytes(b"one\0two")
    for name, text in (("a.jsonl", "a\0b"), ("b.txt", "one\0two")):
        texts, errors = read(tmp_path / name)
        assert texts == [text] and errors.counts == {"NUL characters": 1}
        assert str(tmp_path / name) in errors.examples["NUL characters"][0]


def test_invalid_utf8_is_replaced_and_counted_or_named_with_its_offset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("gut \ufffd é ".encode() + b"\xe9 \xff\xfe end")
    texts, errors = read(path)
    assert texts == ["gut \ufffd é \ufffd \ufffd\ufffd end"]
    assert errors.counts == {"invalid UTF-8, now U+FFFD": 3}  # the U+FFFD that is in the input does not count
    with pytest.raises(DataError, match=r"0xe9 at offset 11.*--invalid_utf8=replace"):
        read(path, invalid_utf8="error")
    assert read(path, raw=True)[0] == [path.read_bytes()]
    records = tmp_path / "a.jsonl"
    records.write_bytes(lines(GOOD, b'{"text": "\xe9"}'))
    texts, errors = read(records)
    assert texts == ["good", "\ufffd"] and errors.examples["invalid UTF-8, now U+FFFD"] == [f"{records} line 2"]
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read(records, invalid_utf8="error")


def test_invalid_utf8_is_counted_by_characters_and_stops_everything_when_asked_to(tmp_path):
    """This holds for all kinds of records, too; half of a surrogate pair is not UTF-8 either."""
    bad = [b"\xe9 \xf0\x9f\x98 \xff\xfe", b"\xed\xa0\x80", b"\\ud83d \\ud83d", b"\xe9\\udc00"]
    for raw, times in zip(bad, (4, 3, 2, 2), strict=True):
        (tmp_path / "a.jsonl").write_bytes(lines(GOOD, b'{"text": "' + raw + b'"}', GOOD))
        texts, errors = read(tmp_path / "a.jsonl")
        assert texts[1].count("\ufffd") == times and errors.counts == {REPLACED: times}
        assert errors.invalid_share == times / sum(map(len, texts))
        with pytest.raises(DataError, match="line 2 is not UTF-8"):
            read(tmp_path / "a.jsonl", invalid_utf8="error", **SKIP)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"good", bad[0]]}), path)
    assert read(path)[1].counts == {REPLACED: 4}
    with pytest.raises(DataError, match="row 2 is not UTF-8"):
        read(path, invalid_utf8="error", **SKIP)
    assert read(path, invalid_utf8="error", raw=True)[0] == [b"good", bad[0]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_taken_off_the_beginning_of_a_file(suffix, tmp_path):
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(suffix, bytes)
    for kind, raw, expected in (
        ("txt", b"\xef\xbb\xbfone \xef\xbb\xbftwo", ["one \ufefftwo"]),
        ("txt", b"\xef\xbb\xbf\xef\xbb\xbf", ["\ufeff"]),
        ("txt", b"\xef\xbb\xbf", []),
        ("jsonl", b"\xef\xbb\xbf" + lines(GOOD, {"text": "\ufefflast"}), ["good", "\ufefflast"]),
    ):
        path = tmp_path / f"a.{kind}{suffix}"
        path.write_bytes(compress(raw))
        for raw in (False, True):
            texts, errors = read(path, raw=raw)
            assert texts == [text.encode() if raw else text for text in expected]
            assert errors.counts.pop("byte order mark, taken off") == 1
            assert errors.counts == ({} if expected else {"empty document": 1})


def test_numbers_may_be_of_any_length(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*(b'{"n": %s, "text": "good"}' % (b"9" * digits) for digits in (1, 4300, 4301, 100_000))))
    assert read(path)[0] == ["good"] * 4


def test_offsets_count_through_a_file_that_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" * 50 + b"\xff")
    assert read(path)[1].examples == {"invalid UTF-8, now U+FFFD": [f"{path} offset 550"]}


def test_halves_of_surrogate_pairs(tmp_path):
    """JSON may hold half of a surrogate pair, which UTF-8 cannot encode. Complete pairs are decoded."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(b'{"text": "a\\ud83d b"}', b'{"text": "\\ud83d\\ude00"}'))
    texts, errors = read(path)
    assert texts == ["a\ufffd b", "\U0001f600"]
    assert errors.counts == {"invalid UTF-8, now U+FFFD": 1}


CHECKED_ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress


@pytest.mark.parametrize("compress", [gzip.compress, CHECKED_ZSTD], ids=["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_compressed_file_cut_off_or_damaged(kind, compress, tmp_path):
    suffix = "gz" if compress is gzip.compress else "zst"
    path = tmp_path / f"a.{kind}.{suffix}"
    raw = lines(*({"text": f"{i * i} number {i}"} for i in range(20_000)))
    whole = compress(raw)
    for damaged in (
        whole[: len(whole) // 2],
        whole[:-3],
        b"not compressed at all",
        whole[:100] + b"XXXX" + whole[104:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged compressed file|broken JSON") as e:
            read(path)
        assert str(path) in str(e.value)
        texts, errors = read(path, **SKIP)
        assert errors.counts["damaged compressed file"] == 1
        if damaged == whole[: len(whole) // 2] and kind == "jsonl":  # the records before the damage are kept
            assert 1000 < len(texts) < 19_000
    path.write_bytes(whole + whole)  # gzip and zstd allow several members in one file
    texts, errors = read(path)
    assert not errors.counts
    assert texts == [(raw + raw).decode()] if kind == "txt" else len(texts) == 40_000


def zstd_frame(text: bytes, window_log: int) -> bytes:
    """A zstd frame (RFC 8878) that asks for a window of 2**window_log bytes, with one block that is not compressed."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([window_log - 10 << 3]) + (len(text) << 3 | 1).to_bytes(3, "little") + text


def test_zstd_with_long_windows_is_read_and_with_a_dictionary_it_is_said(tmp_path):
    path = tmp_path / "a.txt.zst"
    for window_log in (10, 27, 28, 31):
        path.write_bytes(zstd_frame(b"some text", window_log))
        assert read(path)[0] == ["some text"]
    path.write_bytes(zstd_frame(b"some text", 32))  # zstd itself does not write such frames
    with pytest.raises(DataError, match="damaged"):
        read(path)
    dictionary = zstandard.train_dictionary(1000, [f"{i} sample {i * i}".encode() for i in range(1000)])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(b"7 sample 49"))
    with pytest.raises(DataError, match=rf"{path} \(.*ictionary.*perhaps it was compressed with a dictionary"):
        read(path)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_little_is_held_of_a_file_that_is_small_until_it_is_decompressed(suffix, compress, tmp_path):
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress(bytes(100 << 20)))
    (unit,) = plan(path)
    tracemalloc.start()
    size = sum(
        len(piece.text)
        for piece in documents.read_chunks(unit[0], documents.ReadOptions(raw=True), documents.InputErrors())
    )
    assert size == 100 << 20 and tracemalloc.get_traced_memory()[1] < 70 << 20
    tracemalloc.stop()


def test_characters_across_the_blocks_of_a_compressed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 7)
    path = tmp_path / "a.txt.gz"
    text = "aé東\U0001f600" * 50
    path.write_bytes(gzip.compress(text.encode() + b"\xe6\x9d"))  # ends in an incomplete character
    texts, errors = read(path)
    assert texts == [text + "\ufffd"] and errors.counts == {"invalid UTF-8, now U+FFFD": 1}


def test_a_very_long_line_is_taken_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONG_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, {"text": "x" * (3 << 20)}, LAST))
    monkeypatch.setattr(documents, "UNIT_BYTES", 1 << 18)
    texts, errors = read(path)
    assert [len(text) for text in texts] == [4, 3 << 20, 4]
    assert [(kind[:16], where) for kind, (where,) in errors.examples.items()] == [
        ("line longer than", f"{path} line 2")
    ]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_that_is_too_long_is_a_bad_record(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    most = {"text": "x" * ((1 << 20) - len('{"text": ""}'))}
    raw = lines(most, {"text": "x" * (1 << 20)}, LAST, {"text": "x" * (3 << 20)})
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(DataError, match=r"record longer than 1 MiB: .* line 2; .*--bad_records=skip"):
        read(path)
    texts, errors = read(path, **SKIP)
    assert texts == [most["text"], "last"] and errors.counts == {"record longer than 1 MiB": 2}


def test_the_line_of_an_error_is_counted_from_the_beginning_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(*[GOOD] * 70, b'{"text": "\\ud800"}', b"bad"))
    with pytest.raises(DataError, match=f"{path} line 72 "):
        read(path)
    with pytest.raises(DataError, match=f"{path} line 71 is not UTF-8"):
        read(path, invalid_utf8="error")
    # If a span is read by itself, as for a tokenizer's sample, the error also says at which byte its line count begins.
    span = plan(path)[-1][0]
    errors = documents.InputErrors()
    list(documents.read_chunks(span, documents.ReadOptions(**SKIP), errors))
    (where,) = errors.summary()["examples"]["broken JSON"]
    number, after = map(int, re.match(rf"{path} line (\d+) after byte (\d+) ", where).groups())
    assert path.read_bytes()[after:].split(b"\n")[number - 1] == b"bad"


def test_problems_cost_no_reading_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[GOOD, b"bad"] * 2000))
    opened = []
    monkeypatch.setattr(corpus.File, "open", lambda file: opened.append(file) or file.path.open("rb"))
    monkeypatch.setattr(documents, "_exact", None)
    assert read(path, **SKIP)[1].counts == {"broken JSON": 2000}
    assert len(opened) == 1 + len(plan(path))  # the plan opens the file once, and each unit does


def test_a_text_without_newlines_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 50)
    monkeypatch.setattr(documents, "LINE_SEARCH_BYTES", 10)
    for text in ("東" * 100, "é" * 99, "\U0001f600x" * 55):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert len(plan(tmp_path / "a.txt")) > 2
        texts, errors = read(tmp_path / "a.txt")
        assert texts == [text] and not errors.counts


def test_parquet_without_the_column_of_text_or_no_parquet_at_all(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"no column 'text'; name one with --text_key: content, id"):
        read(path)
    assert read(path, text_key="content")[0] == ["a"]
    with pytest.raises(DataError, match=r"row 1 \(int\)"):
        read(path, text_key="id")
    for damaged in (b"PAR1", path.read_bytes()[:-20], b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=str(path)):
            read(path, text_key="content")


def test_parquet_rows_are_numbered_through_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b", "", None]}), path, row_group_size=2)
    texts, errors = read(path, **SKIP)
    assert texts == ["a", "b"]
    assert errors.examples == {
        "text that is no string": [f"{path} row 2 (NoneType)", f"{path} row 5 (NoneType)"],
        "empty document": [f"{path} row 4"],
    }


def test_many_row_groups_are_read_together_and_the_file_is_opened_once(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(600)]}), path, row_group_size=2)
    monkeypatch.setattr(documents, "UNIT_BYTES", path.stat().st_size // 7)
    before = documents._open_parquet.cache_info().misses
    units = plan(path)
    assert 7 <= len(units) <= 9
    assert read(path)[0] == [f"text {i}" for i in range(600)]
    assert documents._open_parquet.cache_info().misses == before + 1


def test_a_damaged_parquet_file_is_an_error_of_one_line_or_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "ü b", None, "x" * 50] * 5, "n": range(20)})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    errors = 0
    for raw in damaged_copies(path.read_bytes(), 300):
        path.write_bytes(raw)
        documents._open_parquet.cache_clear()
        try:
            read(path, **SKIP)
        except DataError as e:
            errors += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert errors > 100
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "née": [1]}), path)
    path.write_bytes(path.read_bytes().replace("née".encode(), b"n\xe9ee"))
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        read(path)


def test_a_column_of_another_type_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    for column in (
        pyarrow.array([1_000_000_001], pyarrow.timestamp("ns", "Europe/Berlin")),
        pyarrow.array([{"text": "a"}]),
        pyarrow.array([["a"]]),
        pyarrow.nulls(1),
        pyarrow.array([1.5]),
        pyarrow.array([7]).dictionary_encode(),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(DataError, match=rf"{path} (row 1 \(\w+\)|cannot be read after row 0: .)"):
            read(path)


def test_parquet_of_several_such_columns_or_without_rows(tmp_path):
    path = tmp_path / "a.parquet"
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="two columns 'text'"):
        read(path)
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(path, schema).close()
    assert read(path)[0] == [] and len(plan(path)) == 1


@pytest.mark.parametrize("split", ["last", "file", "document"])
def test_texts_and_records_together_are_bytes_for_the_byte_tokenizer(split, tmp_path):
    """The dataset has all texts, in the order of the files; the validation split is a tenth of the bytes, or complete
    texts."""
    source = tmp_path / "source"
    source.mkdir()
    texts = [f"täxt {i} " * 9 for i in range(60)]
    (source / "a.jsonl").write_bytes(lines(*({"text": text} for text in texts[:20])))
    (source / "b.txt").write_text(texts[20])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[21:50]}), source / "c.parquet", row_group_size=7)
    (source / "d.jsonl.gz").write_bytes(gzip.compress(lines(*({"text": text} for text in texts[50:]))))
    manifest = pipeline.prepare_dataset(tmp_path / "out", source=str(source), tokenizer="byte", split=split)
    found = {
        name: np.concatenate([np.fromfile(tmp_path / "out" / shard.file, "<u2") for shard in of.shards])
        for name, of in manifest.splits.items()
    }
    if split == "last":
        joined = np.concatenate([*found.values()])
        assert bytes(joined[joined < 256].astype(np.uint8)) == "".join(texts).encode()
        size = len("".join(texts).encode())
        assert (found["train"] < 256).sum() == int(size * 0.9)
    else:
        apart = [np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1] for ids in found.values()]
        of = [bytes(d[:-1].astype(np.uint8)).decode() for ids in apart for d in ids]
        assert sorted(of) == sorted(texts)


def test_a_file_that_shrinks_or_vanishes_after_the_plan(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    (unit,) = plan(path)
    for act in (lambda: path.write_text("some"), path.unlink):
        act()
        with pytest.raises(DataError, match=str(path)):
            list(documents.read_chunks(unit[0], documents.ReadOptions(), documents.InputErrors()))


def test_a_text_has_the_same_tokens_plain_compressed_and_uncut(tmp_path, monkeypatch):
    text = "".join(f"line {i * i}: “it's” a  wörd,\n\n  and\tmore 東 text\r\n" for i in range(300)).encode()
    files = {"txt": text, "txt.gz": gzip.compress(text), "txt.zst": zstandard.compress(text)}
    datasets = set()
    for unit_bytes in (documents.UNIT_BYTES, 1000):
        monkeypatch.setattr(documents, "UNIT_BYTES", unit_bytes)
        for suffix, raw in files.items():
            (tmp_path / f"in.{suffix}").write_bytes(raw)
            out = tmp_path / f"{suffix}-{unit_bytes}"
            pipeline.prepare_dataset(out, source=str(tmp_path / f"in.{suffix}"), tokenizer="bpe:300", val_fraction=0.0)
            datasets.add((out / "train-00000.bin").read_bytes())
    assert len(datasets) == 1
