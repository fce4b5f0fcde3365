"""Random folders of files as users have them, each with what a reader must find in it.

The truth of a file is known because this module wrote it: nothing is detected, and no code of data/ is used.
"""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import zstandard

BOM = b"\xef\xbb\xbf"
ALPHABETS = [
    "ab c\n",
    "the quick\r\nbrown  fox\t",
    "naïve é東京さ 🚀\n",
    "e\u0301\u200b\u2028\u0085ﬁ \n",
    "{}[]\":,'\\ \n",
]
NAMES = [
    "a",
    "b c",
    "ü",
    "東",
    "x'y",
    "[z]",
    "q?",
    "w*",
    "-n",
    "~",
    "line\nbreak",
    "c,d",
    "k=v",
    "caf\udce9",
    "UP",
    "up",
]
SUFFIXES = [".txt", ".md", ".py", "", ".TXT", ".log"]
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
REPLACED = "\ufffd"
BAD_RECORDS = [b'{"text": ', b'{"txt": "a"}', b'{"text": 5}', b'["text"]', b"[" * 3000, b'{"text": null}', b"nonsense"]


@dataclasses.dataclass
class Truth:
    """What a reader must find in a file.

    kind: 'text' (one document: `raw`), 'records' (`records`; `raw` is the last of them if that is not UTF-8),
      'refused' (text in a format that is not read, or content that is not text), or 'left out'.
    records: the text of each record; None if a record has no text (an error unless bad records are skipped), '' if its
      text is empty.
    """

    kind: str
    raw: bytes = b""
    records: list[str | None] = dataclasses.field(default_factory=list)
    replaced: int = 0  # the number of U+FFFD that replace invalid text
    bom: bool = False
    certain: bool = True  # if False, a reader may also call the file damaged: it is compressed and cut off


@dataclasses.dataclass
class Corpus:
    folder: pathlib.Path
    files: dict[str, Truth]  # by name relative to the folder, on a path without links if there is one
    left_out: int  # the number of entries that are not read, whatever they contain
    has_loop: bool = False


def text(rng: random.Random, least: int = 0) -> str:
    alphabet = rng.choice(ALPHABETS)
    return "".join(rng.choice(alphabet) for _ in range(max(least, rng.choice((0, 1, 7, 40, 300)))))


def some_bytes(rng: random.Random) -> bytes:
    """The bytes of a text: UTF-8, perhaps with a few bytes that are not UTF-8, or with a NUL."""
    raw = text(rng).encode()
    while any(line.strip().startswith(b"{") and line.strip().endswith(b"}") for line in raw.splitlines()):
        raw = text(rng).encode()  # such a line might pass for a record
    if rng.random() < 0.15 and len(raw) >= 200:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice((b"\xff", b"\0", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f")) + raw[at:]
    return raw


def plain_text(rng: random.Random) -> tuple[bytes, Truth]:
    raw = some_bytes(rng)
    bom = rng.random() < 0.1
    replaced = raw.decode("utf-8", "replace").count(REPLACED) - raw.count(REPLACED.encode())
    return (BOM if bom else b"") + raw, Truth("text", raw=raw, replaced=replaced, bom=bom)


def json_lines(rng: random.Random) -> tuple[bytes, Truth]:
    truth = Truth("records")
    lines = []
    for _ in range(rng.randrange(8)):
        kind = rng.random()
        if kind < 0.8:
            lines.append(_record(rng, truth))
        elif kind < 0.86:  # NaN, huge numbers, other keys, the key in another place
            value = text(rng)
            lines.append(b'{"n": ' + b"9" * rng.choice((5, 6000)) + b', "x": NaN, "a": {"text": "not this"}, "text": '
                         + json.dumps(value).encode() + b"}")  # fmt: skip
            truth.records.append(value)
        elif kind < 0.9:
            lines.append(b"")
        elif kind < 0.94:
            half = rng.choice(("\\ud83d", "\\ude80", "a\\ud83d b"))
            lines.append(b'{"text": "' + half.encode() + b'"}')
            truth.records.append(half.replace("\\ud83d", REPLACED).replace("\\ude80", REPLACED))
            truth.replaced += 1
        elif kind < 0.97:
            lines.append(b'{"text": "caf\xe9!"}')
            truth.records.append(f"caf{REPLACED}!")
            truth.replaced += 1
        else:
            bad = (
                b'{"text": ',
                b'{"txt": "a"}',
                b'{"text": 5}',
                b'["text"]',
                b"[" * 3000,
                b'{"text": null}',
                b'{"text": "first", "text": "second"}',
                b"nonsense",
            )
            lines.append(rng.choice(bad))
            truth.records.append(None)
    truth.bom = rng.random() < 0.1
    end = rng.choice((b"\n", b"\r\n"))
    raw = end.join(lines) + (end if rng.random() < 0.8 else b"")
    return (BOM if truth.bom else b"") + raw, truth


def _record(rng: random.Random, truth: Truth) -> bytes:
    value = text(rng)
    truth.records.append(value)
    record = {"id": len(truth.records), "text": value} if rng.random() < 0.5 else {"text": value, "more": {"text": [1]}}
    return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode()


def parquet(rng: random.Random) -> tuple[bytes, Truth]:
    truth = Truth("records")
    values: list = [text(rng) for _ in range(rng.randrange(6))]
    kind = rng.choice((pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), "dictionary", "invalid", "null"))
    if kind == "invalid":
        values.append("x")
        truth.records = [*values[:-1], f"a{REPLACED}b"]
        truth.replaced, truth.raw = 1, b"a\xe9b"
        raw = [v.encode() for v in values[:-1]] + [b"a\xe9b"]
        column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    elif kind == "null":
        column = pyarrow.array([*values, None], pyarrow.string())
        truth.records = [*values, None]
    elif kind == "dictionary":
        column = pyarrow.array(values, pyarrow.string()).dictionary_encode()
        truth.records = values
    else:
        column = pyarrow.array([v.encode() if kind == pyarrow.binary() else v for v in values], kind)
        truth.records = values
    sink = io.BytesIO()
    table = pyarrow.table({"id": pyarrow.array(range(len(column))), "text": column})
    pyarrow.parquet.write_table(table, sink, row_group_size=rng.choice((1, 2, 100)))
    return sink.getvalue(), truth


def not_ours(rng: random.Random) -> tuple[str, bytes]:
    """(suffix, content) of a file whose text is not read, or which is not text."""
    body = (text(rng, 50) * 3).encode()
    tar, archive, arrow = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        t.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("a.txt", body)
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    words = "word " * 100
    lines = b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(3))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    return rng.choice(
        [
            (rng.choice((".bz2", ".txt", "")), bz2.compress(body)),
            (rng.choice((".xz", ".txt")), lzma.compress(body)),
            (rng.choice((".zip", "", ".txt", ".docx")), archive.getvalue()),
            (rng.choice((".tar", ".txt")), tar.getvalue()),
            (rng.choice((".tar.gz", ".tgz", ".gz")), gzip.compress(tar.getvalue())),
            (rng.choice((".arrow", ".txt")), arrow.getvalue()),
            (rng.choice((".txt", ".md", ".json", "")), pointer),
            (rng.choice((".txt", "")), words.encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "utf-16-be")))),
            (rng.choice((".txt", "")), BOM[:0] + words.encode("utf-16")),
            (".json", json.dumps([{"text": words}, {"text": "b"}], indent=rng.choice((None, 1))).encode()),
            (rng.choice((".txt", "", ".log")), lines),
            (rng.choice((".csv", ".tsv")), b"id,text\n1,hello\n"),
            (rng.choice((".pdf", ".txt")), b"%PDF-1.7\n" + body),
            (rng.choice((".txt", ".dat")), b"SQLite format 3\0" + bytes(100)),
            (rng.choice((".npy", ".txt")), b"\x93NUMPY\x01\0" + bytes(120)),
            (rng.choice((".txt", "", ".dat")), rng.randbytes(2000)),
            (rng.choice((".txt", "")), "Привет, мир. ".encode("cp1251") * 20),
        ]
    )


def media(rng: random.Random) -> tuple[str, bytes]:
    return rng.choice(
        [
            (rng.choice((".png", ".txt")), PNG + rng.randbytes(300)),
            (".jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + rng.randbytes(300)),
            (".gif", b"GIF89a" + rng.randbytes(300)),
            (rng.choice((".so", "")), b"\x7fELF\x02\x01\x01\0" + rng.randbytes(300)),
            (".woff2", b"wOF2\0\x01\0\0" + rng.randbytes(300)),
        ]
    )


def compressed(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    """(suffix, content): two gzip members or zstd frames, perhaps with a window that zstd refuses by default."""
    cut = rng.randrange(len(raw) + 1)
    if rng.random() < 0.5:
        return ".gz", gzip.compress(raw[:cut]) + gzip.compress(raw[cut:])
    window = zstandard.ZstdCompressionParameters(window_log=rng.choice((10, 27, 28, 31)), compression_level=1)
    frames = []
    for part in (raw[:cut], raw[cut:]):
        packer = zstandard.ZstdCompressor(compression_params=window).compressobj()
        frames.append(packer.compress(part) + packer.flush())
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip" if rng.random() < 0.3 else b""
    return ".zst", skippable + frames[0] + frames[1]


def write(rng: random.Random, root: pathlib.Path) -> Corpus:
    """Writes a random folder below `root`, and the targets of its links next to it."""
    source, outside = root / "source", root / "outside"
    source.mkdir()
    outside.mkdir()
    corpus = Corpus(source, {}, 0)
    folders = [source]
    for _ in range(rng.randrange(4)):
        folder = rng.choice(folders) / f"{rng.choice(NAMES)}{rng.choice('0123')}"
        if not folder.exists():
            folder.mkdir()
            folders.append(folder)
    pure = rng.choice((None, None, "text", "records"))
    for i in range(rng.choice((1, 1, 2, 5, 12))):
        _write_file(rng, corpus, rng.choice(folders), f"{rng.choice(NAMES)}{i}", pure)
    for i in range(rng.choice((0, 0, 1, 3))):
        _write_other(rng, corpus, rng.choice(folders), f"{rng.choice(NAMES)}_{i}", outside)
    return corpus


def _write_file(rng: random.Random, corpus: Corpus, folder: pathlib.Path, name: str, pure: str | None) -> None:
    kind = rng.random()
    if kind > 0.94 and pure is None:
        suffix, raw = not_ours(rng)
        truth = Truth("refused")
    elif kind > 0.9 and pure is None:
        suffix, raw = media(rng)
        truth = Truth("left out")
    elif pure == "records" or (pure is None and kind < 0.3):
        if rng.random() < 0.3:
            suffix, (raw, truth) = ".parquet", parquet(rng)
        else:
            suffix, (raw, truth) = rng.choice((".jsonl", ".ndjson", ".jl")), json_lines(rng)
            if rng.random() < 0.2 and truth.records and truth.records[0] is not None:
                suffix = ".json"  # C4 and Dolma name JSON lines like this
    else:
        suffix, (raw, truth) = rng.choice(SUFFIXES), plain_text(rng)
    if truth.kind in ("text", "records") and suffix != ".parquet" and rng.random() < 0.25:
        end, raw = compressed(rng, raw)
        suffix += end if rng.random() < 0.9 else ""  # without the suffix, the content shows compression
        if rng.random() < 0.05:
            raw, truth.certain = raw[: rng.randrange(1, len(raw))], False
    path = folder / (name + suffix)
    if path.exists():
        return
    path.write_bytes(raw)
    if not raw:
        truth = Truth("left out")
    corpus.files[path.relative_to(corpus.folder).as_posix()] = truth


def _write_other(rng: random.Random, corpus: Corpus, folder: pathlib.Path, name: str, outside: pathlib.Path) -> None:
    """Adds a link, or a hidden, special or empty file. It is left out, unless it is a link to one more file."""
    path, kind = folder / name, rng.randrange(9)
    # With both a link back to the folder and a link to a file outside, that file has two names, and a reader may
    # choose either: only one of these links is made.
    if path.exists() or (kind == 0 and any(outside.iterdir())) or (kind > 6 and corpus.has_loop):
        return
    corpus.has_loop |= kind == 0
    relative = path.relative_to(corpus.folder).as_posix()
    if kind == 0:
        path.symlink_to(rng.choice((".", corpus.folder, "..")) if folder != corpus.folder else ".")
    elif kind == 1:
        path.symlink_to("nowhere")
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        (folder / f".{name}").write_text("hidden")
    elif kind == 4:
        (folder / f".{name}").mkdir()
        (folder / f".{name}" / "a.txt").write_text("hidden")
    elif kind == 5:
        path.write_bytes(b"")
    elif kind == 6:
        own = (n for n in corpus.files if (corpus.folder / n).resolve().is_relative_to(corpus.folder.resolve()))
        names = [n for n in own if corpus.files[n].kind in ("text", "records")]
        if not names:
            return
        path.symlink_to(corpus.folder / rng.choice(names))
    else:  # a link to a file outside, or to a folder that holds one
        raw, truth = plain_text(rng)
        raw, truth = (raw, truth) if raw else (b"x", Truth("text", raw=b"x"))
        there = outside / f"{len(list(outside.iterdir()))}"
        if kind == 7:
            there.write_bytes(raw)
        else:
            there.mkdir()
            (there / "x.txt").write_bytes(raw)
            relative += "/x.txt"
        path.symlink_to(there)
        corpus.files[relative] = truth
        return
    corpus.left_out += 1
