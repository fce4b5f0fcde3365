"""Bad input is named by file and place, counted, and never swallowed; what can be read is read whole."""

import gzip
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data import corpus, documents
from data.errors import DataError

SKIP = {"bad_records": "skip"}


def read(path: pathlib.Path, **reading) -> tuple[list, documents.Problems]:
    """All documents of a file, and what was wrong."""
    texts, parts, problems = [], [], documents.Problems()
    for unit in documents.plan([corpus.File(path.name, path)]):
        for stretch in unit:
            for text, ends in documents.read(stretch, documents.Reading(**reading), problems):
                parts.append(text)
                if ends:
                    texts.append(type(text)().join(parts))
                    parts = []
    assert not parts
    return texts, problems


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
    texts, problems = read(path, **SKIP)
    assert texts == ["good", "last"]
    assert problems.counts == {kind: 2}
    assert [f"{path} line {n}" in where for n, where in zip((2, 4), problems.examples[kind], strict=True)] == [True] * 2


def test_lines_are_numbered_through_the_file_although_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[GOOD] * 50, b"bad", *[GOOD] * 50, b"bad"))
    assert sum(map(len, documents.plan([corpus.File("a", path)]))) > 5
    texts, problems = read(path, **SKIP)
    assert len(texts) == 100
    assert [where.split(" (")[0] for where in problems.examples["broken JSON"]] == [
        f"{path} line 51",
        f"{path} line 102",
    ]


def test_all_are_counted_and_a_few_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*[b"bad"] * 1000))
    texts, problems = read(tmp_path / "a.jsonl", **SKIP)
    assert texts == [] and problems.counts == {"broken JSON": 1000} and len(problems.examples["broken JSON"]) == 3


def test_empty_documents_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, {"text": ""}, b"", b"  ", LAST)[:-1])  # no newline at the end
    texts, problems = read(path)
    assert texts == ["good", "last"]
    assert problems.counts == {"empty document": 1}
    assert problems.examples["empty document"] == [f"{path} line 2"]


def test_nul_is_kept_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a\0b"}))
    (tmp_path / "b.txt").write_bytes(b"one\0two")
    for name, text in (("a.jsonl", "a\0b"), ("b.txt", "one\0two")):
        texts, problems = read(tmp_path / name)
        assert texts == [text] and problems.counts == {"text with NUL characters": 1}
        assert str(tmp_path / name) in problems.examples["text with NUL characters"][0]


def test_invalid_utf8_is_replaced_and_counted_or_named_with_its_offset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("gut \ufffd é ".encode() + b"\xe9 \xff\xfe end")
    texts, problems = read(path)
    assert texts == ["gut \ufffd é \ufffd \ufffd\ufffd end"]
    assert problems.counts == {"invalid UTF-8, now U+FFFD": 3}  # the one that was there is no damage
    with pytest.raises(DataError, match=r"0xe9 at offset 11.*--invalid_utf8=replace"):
        read(path, invalid_utf8="error")
    assert read(path, raw=True)[0] == [path.read_bytes()]
    records = tmp_path / "a.jsonl"
    records.write_bytes(lines(GOOD, b'{"text": "\xe9"}'))
    texts, problems = read(records)
    assert texts == ["good", "\ufffd"] and problems.examples["invalid UTF-8, now U+FFFD"] == [f"{records} line 2"]
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read(records, invalid_utf8="error")


def test_offsets_count_through_a_file_that_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" * 50 + b"\xff")
    assert read(path)[1].examples == {"invalid UTF-8, now U+FFFD": [f"{path} offset 550"]}


def test_halves_of_surrogate_pairs(tmp_path):
    """JSON may hold a half; nothing else can encode it. Whole pairs are what they stand for."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(b'{"text": "a\\ud83d b"}', b'{"text": "\\ud83d\\ude00"}'))
    texts, problems = read(path)
    assert texts == ["a\ufffd b", "\U0001f600"]
    assert problems.counts == {"invalid UTF-8, now U+FFFD": 1}


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
        texts, problems = read(path, **SKIP)
        assert problems.counts["damaged compressed file"] == 1
        if damaged == whole[: len(whole) // 2] and kind == "jsonl":  # what came before the damage is kept
            assert 1000 < len(texts) < 19_000
    path.write_bytes(whole + whole)  # members one after the other, as gzip and zstd allow
    texts, problems = read(path)
    assert not problems.counts
    assert texts == [(raw + raw).decode()] if kind == "txt" else len(texts) == 40_000


def test_characters_across_the_blocks_of_a_compressed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 7)
    path = tmp_path / "a.txt.gz"
    text = "aé東\U0001f600" * 50
    path.write_bytes(gzip.compress(text.encode() + b"\xe6\x9d"))  # and one that never ends
    texts, problems = read(path)
    assert texts == [text + "\ufffd"] and problems.counts == {"invalid UTF-8, now U+FFFD": 1}


def test_a_very_long_line_is_taken_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONG_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, {"text": "x" * (3 << 20)}, LAST))
    monkeypatch.setattr(documents, "UNIT_BYTES", 1 << 18)
    texts, problems = read(path)
    assert [len(text) for text in texts] == [4, 3 << 20, 4]
    assert [(kind[:16], where) for kind, (where,) in problems.examples.items()] == [
        ("line longer than", f"{path} line 2")
    ]


def test_a_text_without_newlines_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 50)
    monkeypatch.setattr(documents, "LINE_SEARCH_BYTES", 10)
    for text in ("東" * 100, "é" * 99, "\U0001f600x" * 55):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert len(documents.plan([corpus.File("a", tmp_path / "a.txt")])) > 2
        texts, problems = read(tmp_path / "a.txt")
        assert texts == [text] and not problems.counts


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
    texts, problems = read(path, **SKIP)
    assert texts == ["a", "b"]
    assert problems.examples == {
        "text that is no string": [f"{path} row 2 (NoneType)", f"{path} row 5 (NoneType)"],
        "empty document": [f"{path} row 4"],
    }


def test_a_file_that_shrinks_or_vanishes_after_the_plan(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    (unit,) = documents.plan([corpus.File("a", path)])
    for act in (lambda: path.write_text("some"), path.unlink):
        act()
        with pytest.raises(DataError, match=str(path)):
            list(documents.read(unit[0], documents.Reading(), documents.Problems()))
