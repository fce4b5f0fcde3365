"""A file's bytes show what it is: records are never read as one text, and what is not text is named and refused."""

import base64
import bz2
import gzip
import io
import json
import lzma
import pathlib
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.preparation import recognize

ZSTD = zstandard.ZstdCompressor()
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0pzst"
LONG_WINDOW = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
)
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": ZSTD.compress,
    ".gz of two members": lambda raw: gzip.compress(b"") + gzip.compress(raw),
    ".zst of two frames": lambda raw: SKIPPABLE + ZSTD.compress(b"") + ZSTD.compress(raw),
    ".zst --long": LONG_WINDOW.compress,
}
RECORD, PRETTY = b'{"text": "a", "n": 1}\n', b'{\n  "text": "a"\n}\n'
LONG = b'{"text": "' + b"a long text " * 20_000 + b'"}\n'
HUGE = b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n"
DEEP = b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n"
PROSE = "Wer nicht wagt, der nicht gewinnt. Ça va, 東京.\n".encode() * 9


def told(folder: pathlib.Path, name: str, raw: bytes, asked: str = "auto") -> recognize.Kind:
    path = folder / name
    path.write_bytes(raw)
    return recognize.recognize(path, asked)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    ("name", "raw", "kind"),
    [
        ("a.txt", PROSE, "text"),
        ("a", PROSE, "text"),
        ("a.md", b"{x}\n" + PROSE, "text"),
        ("a.txt", RECORD + PROSE, "text"),
        ("a.py", b"{}\nx = 1\n", "text"),
        ("a.json", RECORD * 3, "jsonl"),
        ("a.JSON", b"\xef\xbb\xbf\r\n \n" + RECORD, "jsonl"),
        ("c4-train.00000-of-01024.json", RECORD.strip(), "jsonl"),
        ("a.json", LONG * 2, "jsonl"),
        ("a.json", HUGE, "jsonl"),
        ("a.json", DEEP, "jsonl"),
        ("a.json", RECORD + b"broken\n", "jsonl"),
        ("a.txt", PRETTY, "text"),
        ("a.j2", b'{\n  "name": {{ name }}\n}\n', "text"),
        ("a.json", b"{{ cookiecutter }}\n", "text"),
        ("a.c", b"{\n  int x;\n}\n", "text"),
        ("a.txt", b'"Yes", she said.\n"No."\n', "text"),
        ("a.txt", b'"Yes."\n"No", he said.\n', "text"),
        ("a.txt", b'"one sentence"', "text"),
        ("a.txt", b"{}{}", "text"),
        ("a.md", b"[[one]]\n[[two]]\n", "text"),
        ("a.txt", b"[1, 2]\n[3]\n", "text"),
        ("a.json", b'"a string"', "text"),
        ("a.json", PROSE, "text"),
        ("a.jsonl", b"not json", "jsonl"),
        ("a.ndjson", RECORD, "jsonl"),
        ("a.jl", RECORD, "jsonl"),
    ],
)
def test_kinds_that_are_read(name, raw, kind, packed, tmp_path):
    suffix = packed.split(" ")[0]
    expected = recognize.Kind(kind, suffix[1:])
    assert told(tmp_path, name + suffix, PACK[packed](raw)) == expected
    assert told(tmp_path, name, PACK[packed](raw)) == expected  # only the bytes show compression


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.json", b'[{"text": "a"}]'),
        ("a.json", b' \n[\n  {\n "text": "a"}]'),
        ("a.json", PRETTY * 2),
        ("a.json", b'{"text": "a"}{"text": "b"}'),
        ("a.json", b'{"text": "a"},\n{"text": "b"},\n'),
        ("a.txt", RECORD * 3),
        ("a.txt", RECORD),
        ("a", b"\n\n" + RECORD),
        ("a.txt", LONG),
        ("a.txt", RECORD + LONG),
        ("a.json-00000-of-00010", RECORD * 9),
        ("stream-1", b'{"text": "a"}' * 9),
        ("a.txt", PRETTY * 2),
        ("a.txt", b'{"text": "a"}\r' * 9),
        ("a.txt", b'"one text"\n"and another"\n'),
        ("a.txt", b'"one text of many"\n' * 9000),
        ("a", b'["a", "b"]\n["c"]\n[["d"]]\n'),
    ],
)
def test_records_under_another_name_are_never_one_text(name, raw, packed, tmp_path):
    suffix = packed.split(" ")[0]
    for full in (name + suffix, name):
        with pytest.raises(recognize.Refusal, match=r"JSON.*--format=text"):
            told(tmp_path, full, PACK[packed](raw))
    assert told(tmp_path, name, PACK[packed](raw), "jsonl") == recognize.Kind("jsonl", suffix[1:])
    assert told(tmp_path, name, PACK[packed](raw), "text") == recognize.Kind("text", suffix[1:])


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("a.txt", PROSE)
    else:
        with tarfile.open(fileobj=out, mode="w") as t:
            info = tarfile.TarInfo("a.txt")
            info.size = len(PROSE)
            t.addfile(info, io.BytesIO(PROSE))
    return out.getvalue()


def arrow(stream: bool) -> bytes:
    out, table = io.BytesIO(), pa.table({"text": ["a", "b"]})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), out)
    return out.getvalue()


def numpy_saved(save) -> bytes:
    out = io.BytesIO()
    save(out, np.arange(99))
    return out.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table t (x)")
    raw = connection.serialize()
    connection.close()
    return raw


SAFETENSORS = (header := b'{"w":{"dtype":"F32"}}') and len(header).to_bytes(8, "little") + header
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NOT_TEXT = {
    "bzip2": bz2.compress(PROSE),
    "bzip2 ": bz2.compress(b""),
    "xz": lzma.compress(PROSE),
    "lzma": lzma.compress(PROSE, lzma.FORMAT_ALONE),
    "lz4": b"\x04\x22\x4d\x18" + bytes(99),
    "zip": archive("zip"),
    "tar": archive("tar"),
    "7z": b"7z\xbc\xaf\x27\x1c" + bytes(9),
    "rar": b"Rar!\x1a\x07\0",
    "Arrow": arrow(False),
    "Arrow ": arrow(True),
    "Git LFS": POINTER,
    "UTF-16": PROSE.decode().encode("utf-16"),
    "UTF-16 ": b"\xfe\xff" + PROSE.decode().encode("utf-16-be"),
    "UTF-32": PROSE.decode().encode("utf-32"),
    "UTF-32 ": b"\0\0\xfe\xff" + PROSE.decode().encode("utf-32-be"),
    "PDF": b"%PDF-1.7\n",
    "web archive": b"WARC/1.0\r\nWARC-Type: warcinfo\r\n",
    "office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(9),
    "SQLite": database(),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(9),
    "pickle": pickle.dumps(PROSE),
    "NumPy": numpy_saved(np.save),
    "zip ": numpy_saved(np.savez),
    "safetensors": SAFETENSORS,
    "GGUF": b"GGUF\3\0\0\0",
    "token file": b"LITPKDS" + bytes(99),
    "token file ": b"MMIDIDX\0\0" + bytes(99),
    "not text": PROSE.decode().encode("utf-16-le"),
    "not text ": "Широкая электрификация южных губерний\n".encode("cp1251") * 9,
    "not text  ": np.random.default_rng(0).bytes(9999),
    "not text   ": bytes(9999),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("what", NOT_TEXT)
def test_what_is_no_text_is_refused_by_what_it_is(what, name, packed, tmp_path):
    """The file's name does not matter, except that random bytes in records and Parquet are left to their readers."""
    if what.startswith("not text") and name not in ("a.txt", "a"):
        return
    with pytest.raises(recognize.Refusal, match=rf"{what.strip()}.*--format=text") as e:
        told(tmp_path, name + packed, PACK[packed](NOT_TEXT[what]))
    assert str(tmp_path / name) in str(e.value) and e.value.exit_code == 3 and not e.value.is_media
    assert told(tmp_path, name + packed, PACK[packed](NOT_TEXT[what]), "text").name == "text"


MEDIA = {
    "image": [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM\1\2\3\4\0\0\0\0",
        b"II*\0",
        b"RIFF\1\2\3\4WEBP",
    ],
    "media": [
        b"ID3\3\0",
        b"\xff\xfb\x90",
        b"OggS\0",
        b"fLaC\0\0\0\x22",
        b"RIFF\1\2\3\4WAVE",
        b"\0\0\0\x20ftypisom",
        b"\x1aE\xdf\xa3",
    ],
    "font": [b"OTTO\0", b"wOFF\0\1\0\0", b"wOF2OTTO", b"\0\1\0\0\0\x0a\0\x80\0\3\0\x20"],
    "program": [b"\x7fELF\2\1\1", b"MZ\x90\0\3\0", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe\0\0", b"\0asm\1\0\0\0"],
}


@pytest.mark.parametrize(("what", "head"), [(what, head) for what, heads in MEDIA.items() for head in heads])
def test_media_are_known(what, head, tmp_path):
    with pytest.raises(recognize.Refusal, match=what) as e:
        told(tmp_path, "a.txt", head + bytes(range(256)))
    assert e.value.is_media


WORDS = """GGUF ORC OggS fLaC BM MZ ID3 OTTO wOFF wOF2 PK ARROW1 Obj FEA1 8BPS RIFF LZIP BZh9 Rar! 7z LITPK MMIDI PDF
II* MM ttcf FLV GIF8 1234ftyp MSCF NUMPY SQLite"""


@pytest.mark.parametrize("word", WORDS.split())
@pytest.mark.parametrize("after", [" ", "\n", ": "])
def test_prose_that_begins_with_the_first_letters_of_another_kind_is_text(word, after, tmp_path):
    assert told(tmp_path, "a.txt", f"{word}{after}is a word. ".encode() + PROSE).name == "text"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.arrow", "a.br", "a.bin", "a.npy", "a.tar", "a.TGZ"])
def test_names_that_say_it_is_no_text(name, tmp_path):
    with pytest.raises(recognize.Refusal, match="--format=text"):
        told(tmp_path, name, gzip.compress(PROSE) if "gz" in name else PROSE)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.gz", "a.ZST"])
def test_a_name_of_a_compressed_file_that_is_none(name, tmp_path):
    with pytest.raises(recognize.Refusal, match=r"not (gzip|zstd), though"):
        told(tmp_path, name, PROSE)
    assert told(tmp_path, name, PROSE, "text") == recognize.Kind("text", "")


def test_parquet(tmp_path):
    assert told(tmp_path, "a.parquet", parquet()) == told(tmp_path, "a", parquet()) == recognize.Kind("parquet", "")
    for asked in ("auto", "parquet"):
        with pytest.raises(recognize.Refusal, match="Parquet inside gz"):
            told(tmp_path, "a.parquet.gz", gzip.compress(parquet()), asked)


def test_a_tar_archive_inside_another_compression_says_both(tmp_path):
    with pytest.raises(recognize.Refusal, match="a tar archive inside gz"):
        told(tmp_path, "a.tar.gz", gzip.compress(archive("tar")))
    with pytest.raises(recognize.Refusal, match="compressed twice"):
        told(tmp_path, "a.txt.gz", gzip.compress(gzip.compress(PROSE)))
    word = archive("zip")
    with pytest.raises(recognize.Refusal, match="an office document"):
        told(tmp_path, "a.docx", word)


@pytest.mark.parametrize("pack", [gzip.compress, ZSTD.compress], ids=["gz", "zst"])
def test_a_damaged_file_is_told_by_what_comes_before(pack, tmp_path):
    raw = b"".join(json.dumps({"text": f"{i * i} words"}).encode() + b"\n" for i in range(50_000))
    whole = pack(raw)
    for damaged in (whole[: len(whole) // 2], whole[:20_000] + b"XXXX" + whole[20_004:]):
        assert told(tmp_path, "a.json", damaged).name == "jsonl"
    assert told(tmp_path, "a.jsonl", whole[:12]).name == "jsonl"


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        recognize.recognize(tmp_path / "nowhere")


@settings(max_examples=120, deadline=None)
@given(st.text(max_size=400), st.sampled_from([".txt", ".md", ".py", "", ".html"]))
def test_prose_of_any_script_is_text(tmp_path_factory, text, suffix):
    """NUL characters are not prose, so the test removes them; other control characters stay."""
    raw = ("Once, " + text.replace("\0", "")).encode("utf-8", "replace")
    assert told(tmp_path_factory.getbasetemp(), f"prose{suffix}", raw).name == "text"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=9), st.text() | st.integers() | st.none()), min_size=2, max_size=5),
    st.sampled_from([".json", ".txt", "", ".log"]),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    st.sampled_from(sorted(PACK)),
    st.booleans(),
)
def test_any_records_are_never_read_as_one_text(tmp_path_factory, records, suffix, newline, packed, ascii_only):
    raw = newline.join(json.dumps(r, ensure_ascii=ascii_only) for r in records).encode("utf-8", "surrogatepass")
    try:
        kind = told(tmp_path_factory.getbasetemp(), f"records{suffix}", PACK[packed](raw)).name
    except recognize.Refusal as e:
        assert "JSON lines" in str(e) and suffix != ".json"
        kind = "jsonl"
    assert kind == "jsonl"


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.json", b'["one text", "another"]'),
        ("a.json", b'"one text"\n"another"\n'),
        ("a.json", b'""\n"another"\n'),
        ("a.json", b'{} {"text": "a"}'),
        ("a.json", b'["one text", 1]\n["another", 2]\n'),
        ("a.json", b'ing of a record that was cut"}\n{"text": "a"}\n{"text": "b"}\n'),
        ("a.log", b'# made by a program\n{"text": "a"}\n{"text": "b"}\n'),
        ("a.txt", b'[{"text": "a"},\n {"text": "b"}]'),
        ("a.tfrecord", b"text of a record " * 30),
        ("a.rec", (b"\xf4\1\0\0\0\0\0\0\x12\x34\x56\x78" + b"text of a record " * 30) * 9),
        ("a.dat", b"(lp0\nVone text\np1\naVanother\np2\na."),
    ],
)
def test_records_of_other_shapes_are_never_one_text(tmp_path, name, raw):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(recognize.Refusal):
        recognize.recognize(path)


@pytest.mark.parametrize(
    "letters",
    ["PAR1", "PARE", "GIF89a", "GIF87a", "BM", "II*", "RIFFraffWAVE", "RIFF1234WEBP", "FORMulaeAIFF", "OggS",
     "fLaC", "ID3", "MThd", "MZ", "ORC", "Obj", "ARROW1",
     "FEA1", "LITPKDS", "MMIDIDX", "GGUF", "SQLite format 3", "PK", "7z", "Rar!",
     "LZIP", "BZh91AY&SY", "WARC/1", "%PDF-1.7", "MSCF", "8BPS", "OTTO", "wOFFOTTO", "FLV", "version https://git-lfs",
     "/annex/objects/", "!<arch>", "asm"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_text_may_begin_with_the_letters_of_any_format(tmp_path, name, letters):
    assert told(tmp_path, name, f"{letters} stand here\nat the beginning of a text.\n".encode()).name == "text"
    assert told(tmp_path, name, f"{letters}’s a word, é.\n".encode()).name == "text"


RANKS = b"".join(b"%s== %d\n" % (base64.b64encode(bytes([33 + i]))[:2], i) for i in range(8))
ADDED = {"added_tokens": [{"id": 0, "content": "a long name of a token " * 5000}], "model": {"type": "BPE"}}
TOKENIZERS = {
    "tokenizer.json": json.dumps({"version": "1.0", "truncation": None, **ADDED}).encode(),
    "tokenizer.json of two lines": b"\n" + json.dumps({"added_tokens": [], "pre_tokenizer": None}, indent=2).encode(),
    "minbpe": b"minbpe v1\n\n0\n32 116\n",
    "ranks": RANKS,
    "merges": b"#version: 0.2\n" + "Ġ t\nĠ a\nh e\n".encode(),
}
JSON_VALUES = [PRETTY, b"\xef\xbb\xbf" + PRETTY, b"[1, 2]", b"[]", b'{\n "text": "cut', b"[true,\n", b'{\n"a": 1, //\n',
               b'{\n "a": "' + b"a long text " * 9000 + b'"\n}', b"[-1.5e3,\n" + b"1,\n" * 60_000 + b"1]"]  # fmt: skip


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("what", TOKENIZERS)
@pytest.mark.parametrize("name", ["a.json", "a.txt", "a", "a.model"])
def test_tokenizers_are_no_text(what, name, packed, tmp_path):
    with pytest.raises(recognize.Refusal, match=r"a tokenizer.*--format=text") as e:
        told(tmp_path, name + packed, PACK[packed](TOKENIZERS[what]))
    assert e.value.is_beside and not e.value.is_media


def test_records_and_prose_about_tokenizers_are_read(tmp_path):
    record = {"text": json.dumps(ADDED), "version": "1.0", "truncation": None}
    assert told(tmp_path, "a.json", json.dumps(record).encode() + b"\n").name == "jsonl"
    texts = ["minbpe v1 is a program", "#version: 3 of a text\n\nBy me\n", "Text== 0\n", "apples 0\noranges 1\n" * 9]
    for text in texts:
        assert told(tmp_path, "a.txt", text.encode()).name == "text"


@pytest.mark.parametrize("packed", ["", ".zst"])
@pytest.mark.parametrize("raw", JSON_VALUES)
def test_one_json_value_is_no_text(raw, packed, tmp_path):
    """The value may be complete, cut off, or longer than the examined part. In a file named .txt, it is text."""
    with pytest.raises(recognize.Refusal, match=r"JSON.*jq -c \..*--format=text") as e:
        told(tmp_path, "a.json" + packed, PACK[packed](raw))
    assert e.value.is_beside
    assert told(tmp_path, "a.txt" + packed, PACK[packed](raw)).name == "text"


@pytest.mark.parametrize("raw", [PRETTY, b"[\n" + PRETTY + b"]", b"\n{\r\n", b'{"a":\n1}', b"[" + RECORD + b"]"])
def test_json_lines_that_are_not_lines(raw, tmp_path):
    for name in ("a.jsonl", "a.ndjson", "a.jl"):
        with pytest.raises(recognize.Refusal, match=r"JSON over several lines; .*jq -c \.") as e:
            told(tmp_path, name, raw)
        assert not e.value.is_beside
    for lines in (RECORD * 2, b'{"text": "cut\n' + RECORD, LONG, DEEP, b"[1]\n[2]\n"):
        assert told(tmp_path, "a.jsonl", lines).name == "jsonl"
