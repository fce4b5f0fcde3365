"""Token files of other programs: a reader gives the right tokens, or an error that names files and numbers."""

import ast
import bz2
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import dataset, sources
from data.config import DataConfig
from data.errors import DataError, UserError
from data.loader import TokenWindows
from data.token_files import ends, external, fingerprint, widths
from tests import runs
from trainer.config import from_dict
from trainer.errors import ConfigError
from trainer.reliability import run_directory

TOKENS = [1, 2, 258, 4, 5, 999]


def llmc(tokens, magic=20240520, version=1, dtype="<u2") -> bytes:
    """A file such as write_datafile of llm.c's dev/data/data_common.py writes."""
    head = struct.pack("<3i", magic, version, len(tokens)) + bytes(253 * 4)
    return head + np.asarray(tokens, dtype).tobytes()


# TOKENS as two documents, of 5 tokens (in sequences of 3 and 2) and of 1 token. IndexedDatasetBuilder of megatron-core
# 0.16.1 (megatron/core/datasets/indexed_dataset.py) wrote them as uint16, and as int32 with a mode for each sequence.
MEGATRON = {
    "uint16": (
        "01000200020104000500e703",
        "4d4d4944494458000001000000000000000803000000000000000300000000000000030000000200000001000000"
        "000000000000000006000000000000000a0000000000000000000000000000000200000000000000030000000000"
        "0000",
    ),
    "int32": (
        "0100000002000000020100000400000005000000e7030000",
        "4d4d4944494458000001000000000000000403000000000000000300000000000000030000000200000001000000"
        "00000000000000000c00000000000000140000000000000000000000000000000200000000000000030000000000"
        "0000000100",
    ),
}


MEGATRON_HEAD = struct.pack("<9sQB", b"MMIDIDX\0\0", 1, 8)


def megatron(folder, name="text_document", dtype="uint16"):
    tokens, index = (bytes.fromhex(h) for h in MEGATRON[dtype])
    (folder / f"{name}.idx").write_bytes(index)
    (folder / f"{name}.bin").write_bytes(tokens)
    return folder / f"{name}.bin"


def open_(path, vocab_size=1000, **fields) -> dataset.Dataset:
    return dataset.open_dataset(DataConfig(path=str(path), **fields), vocab_size)


def tokens_of(data: dataset.Dataset, split="train") -> list[list[int]]:
    return [shard.tolist() for shard in data.files(split).shards]


# Layouts


@pytest.mark.parametrize(
    ("name", "raw", "fields", "kind", "dtype"),
    [
        ("train.bin", struct.pack("<6H", *TOKENS), {}, "nanogpt", "uint16"),
        ("train.bin", struct.pack("<6I", *TOKENS), {"dtype": "uint32"}, "nanogpt", "uint32"),
        ("fineweb_train_000001.bin", llmc(TOKENS), {}, "llmc", "uint16"),
        ("tinystories.bin", llmc(TOKENS, 20240801, 7, "<u4"), {}, "llmc", "uint32"),
        ("part-0-00000.npy", struct.pack("<6H", *TOKENS), {}, "olmo", "uint16"),
        ("part-0-00000.npy", struct.pack("<6I", *TOKENS), {"dtype": "uint32"}, "olmo", "uint32"),
        ("tokens.u16", struct.pack("<6H", *TOKENS), {"format": "nanogpt"}, "nanogpt", "uint16"),
    ],
)
def test_layouts_byte_by_byte(tmp_path, name, raw, fields, kind, dtype):
    (tmp_path / name).write_bytes(raw)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    data = open_(tmp_path / name, **fields)
    assert tokens_of(data) == [TOKENS] and data.files("train").shards[0].dtype == dtype
    assert (data.manifest.request["format"], data.manifest.dtype, data.vocab_size) == (kind, dtype, 1000)
    assert open_(tmp_path / name, 0, **fields).manifest.fingerprint() == data.manifest.fingerprint()
    assert data.manifest.splits["train"].tokens == 6 and data.largest_id == 999
    assert data.files("train").text_bytes == 0 and data.manifest.eos_id is None and data.load_tokenizer() is None
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
@pytest.mark.parametrize(("stored", "dtype"), [("uint16", "uint16"), ("int32", "uint32")])
def test_megatron_as_its_own_writer_wrote_it(tmp_path, monkeypatch, stored, dtype, chunk):
    monkeypatch.setattr(external, "MEGATRON_CHUNK", chunk)
    path = megatron(tmp_path, dtype=stored)
    for name in (path, path.with_suffix(".idx"), tmp_path, tmp_path / "*"):
        data = open_(name)
        assert tokens_of(data) == [TOKENS] and data.manifest.dtype == dtype
        assert data.manifest.request["format"] == "megatron" and data.manifest.splits["train"].documents == 2


@pytest.mark.parametrize(("code", "stored", "width"), [(1, "<u1", 1), (2, "<i1", 1), (3, "<i2", 2)])
def test_megatrons_other_integers(tmp_path, code, stored, width):
    def write(tokens):
        (tmp_path / "x.bin").write_bytes(np.array(tokens, stored).tobytes())
        head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 1, 2)
        (tmp_path / "x.idx").write_bytes(head + struct.pack("<iqqq", len(tokens), 0, 0, 1))

    write([3, 100, 7])
    data = open_(tmp_path / "x.bin", 60_000)
    assert tokens_of(data) == [[3, 100, 7]] and data.files("train").shards[0].itemsize == width
    TokenWindows(data.files("train"), seq_len=2, seed=0).rows(np.arange(3))
    if stored != "<u1":
        write([3, -1, 7])
        with pytest.raises(DataError, match=r"x\.bin has negative ids"):
            open_(tmp_path / "x.bin", 60_000)


def test_windows_over_files_are_those_over_the_same_shards(tmp_path):
    """The loader gives the same windows for a dataset folder and for files that are read in place."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 1000, n) for n in (300, 5, 411)]
    for i, tokens in enumerate(shards):
        (tmp_path / f"a_{i}.bin").write_bytes(llmc(tokens))
    rows = TokenWindows(open_(tmp_path).files("train"), seq_len=8, seed=3).rows(np.arange(200))
    joined = ["".join(f"{t:03d} " for t in s) for s in shards]
    for row in rows:
        assert any("".join(f"{t:03d} " for t in row) in text for text in joined)
    assert len({tuple(row) for row in rows[:80]}) == 80


def test_files_without_a_token_do_no_harm_beside_others(tmp_path):
    """Writers leave files without a token if a worker had no document."""
    for name in ("a", "b"):
        megatron(tmp_path, name)
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\0\0", 1, 8, 0, 1, 0))
    data = open_(tmp_path)
    assert tokens_of(data) == [[], TOKENS] and data.manifest.splits["train"].documents == 2
    assert len(TokenWindows(data.files("train"), seq_len=2, seed=0).rows(np.arange(4))) == 4
    for name in ("a", "b"):
        (tmp_path / f"{name}.idx").unlink()
        (tmp_path / f"{name}.bin").write_bytes(llmc(TOKENS if name == "b" else []))
    assert tokens_of(open_(tmp_path)) == [[], TOKENS]


# Files that are refused


def refused(path, *parts, **fields):
    with pytest.raises(DataError) as e:
        open_(path, **fields)
    for part in parts:
        assert str(part) in str(e.value), e.value
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (llmc(TOKENS)[:-1], ["1035 bytes", "expected 1036"]),
        (llmc(TOKENS)[:-2], ["1034 bytes", "expected 1036", "6 tokens"]),
        (llmc(TOKENS) + b"\0\0", ["1038 bytes", "expected 1036"]),
        (llmc(TOKENS)[:700], ["700 bytes", "1024"]),
        (llmc(TOKENS, version=2), ["version 2", "20240520, version 1"]),
        (llmc(TOKENS, dtype="<u4"), ["1048 bytes", "expected 1036"]),
        (llmc(TOKENS, 20240801), ["20240801, version 1", "version 7"]),
        (llmc(TOKENS, 20240522), ["evaluation", "20240522"]),
        (llmc(TOKENS, 20240326, 3), ["model", "20240326"]),
        (llmc(TOKENS, 20990101), ["header", "20990101"]),
        (struct.pack("<3i", 20240520, 1, -6) + bytes(1012), ["1024 bytes", "-6 tokens"]),
        (struct.pack("<5H", *TOKENS[:5]) + b"\0", ["11 bytes", "2 bytes", "uint16"]),
        (b"", ["0 bytes"]),
    ],
)
def test_damaged_and_other_bin_files(tmp_path, raw, says):
    (tmp_path / "x.bin").write_bytes(raw)
    refused(tmp_path / "x.bin", "x.bin", *says)


def put(at, raw):
    return lambda data: data[:at] + raw + data[at + len(raw) :]


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("idx", put(0, b"X"), ["XMIDIDX", "MMIDIDX"]),
        ("idx", put(9, b"\2"), ["version 2", "version 1"]),
        ("idx", put(17, b"\5"), ["type code 5 (int64)", "int32"]),
        ("idx", put(17, b"\7"), ["type code 7 (float32)"]),
        ("idx", put(17, b"\x63"), ["type code 99 (unknown)"]),
        ("idx", put(17, b"\4"), ["sequence 1", "at byte 6", "expected at byte 12"]),
        ("idx", put(18, b"\2"), ["94 bytes", "expected 82"]),
        ("idx", put(18, b"\xff" * 8), ["94 bytes", "expected 221360928884514619438"]),
        ("idx", put(26, b"\4"), ["94 bytes", "expected 102"]),
        ("idx", put(34, b"\4"), ["sequence 1", "expected at byte 8"]),
        ("idx", put(34, b"\xff\xff\xff\xff"), ["sequence 0 has -1 tokens"]),
        ("idx", put(42, b"\2"), ["12 bytes", "end at byte 14"]),
        ("idx", put(46, b"\2"), ["sequence 0", "at byte 2", "expected at byte 0"]),
        ("idx", put(70, b"\1"), ["from 1 to 3", "from 0 to 3"]),
        ("idx", put(78, b"\x09"), ["document 1", "sequence 9", "ends at 3"]),
        ("idx", put(86, b"\2"), ["from 0 to 2", "from 0 to 3"]),
        ("idx", lambda data: data[:20], ["20 bytes", "at least 34"]),
        ("idx", lambda data: data[:-1], ["93 bytes", "expected 94"]),
        ("idx", lambda data: data + b"\0", ["95 bytes", "expected 94"]),
        ("bin", lambda data: data[:-2], ["10 bytes", "end at byte 12"]),
        ("bin", lambda data: data + b"\0", ["13 bytes", "end at byte 12"]),
    ],
)
def test_every_disagreement_of_megatrons_two_files(tmp_path, monkeypatch, file, change, says, chunk):
    monkeypatch.setattr(external, "MEGATRON_CHUNK", chunk)
    path = megatron(tmp_path)
    damaged = path.with_suffix(f".{file}")
    damaged.write_bytes(change(damaged.read_bytes()))
    refused(path, path, path.with_suffix(".idx"), *says)


def test_megatron_wants_both_files(tmp_path):
    path = megatron(tmp_path)
    path.unlink()
    refused(tmp_path, "text_document.bin is missing", "text_document.idx")
    path = megatron(tmp_path)
    path.with_suffix(".idx").unlink()
    refused(path, "text_document.idx is missing", format="megatron")


def test_what_numpy_saved_is_told_from_olmos(tmp_path):
    np.save(tmp_path / "tokens.npy", np.array(TOKENS, np.uint16))
    refused(tmp_path / "tokens.npy", "numpy.save", "tofile")
    refused(tmp_path / "tokens.npy", "numpy.save", format="nanogpt")


def test_wider_tokens_read_as_uint16_are_noticed(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 100_000, 500)
    (tmp_path / "train.bin").write_bytes(tokens.astype("<u4").tobytes())
    refused(tmp_path / "train.bin", "set data.dtype to uint32", vocab_size=100_000)
    assert tokens_of(open_(tmp_path / "train.bin", 100_000, dtype="uint32")) == [tokens.tolist()]
    assert len(tokens_of(open_(tmp_path / "train.bin", 100_000, dtype="uint16"))[0]) == 1000
    refused(tmp_path / "train.bin", "is outside the vocabulary of 1000", dtype="uint32")


def test_ids_outside_the_vocabulary_are_found_at_the_start_and_in_a_batch(tmp_path, monkeypatch):
    (tmp_path / "x.bin").write_bytes(llmc(TOKENS))
    refused(tmp_path / "x.bin", "token id 999", "x.bin", "vocabulary of 999", vocab_size=999)
    data = open_(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(llmc([5000] * 6))  # the file is replaced during a run
    with pytest.raises(DataError, match=r"token id 5000 in the train split.*data\.dtype"):
        TokenWindows(data.files("train"), seq_len=2, seed=0).rows(np.arange(2))


# Files that are not token files, although their names say so


def zipped(make) -> bytes:
    buffer = io.BytesIO()
    make(buffer)
    return buffer.getvalue()


TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 40
IDS = np.arange(1000, dtype="<u2")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1115394\n"


def lit_gpt(ids, dtype="<i4", code=4) -> bytes:
    """A file such as lit-gpt's PackedDatasetBuilder writes."""
    return b"LITPKDS" + struct.pack("<QBQ", 1, code, len(ids)) + np.asarray(ids, dtype).tobytes()


OTHERS = {
    "a Git LFS pointer": (POINTER, "Git LFS"),
    "a short answer": (b"404: Not Found\n", "text"),
    "a web page": (b"\n<!DOCTYPE html>\n<title>Sign in</title>caf\xe9", "web page"),
    "text": (TEXT, "launch.prepare"),
    "a character cut at the block": ("é".encode() * (1 << 16), "launch.prepare"),
    "UTF-16": (TEXT.decode().encode("utf-16"), "text"),
    "UTF-16, big-endian": (b"\xfe\xff" + TEXT.decode().encode("utf-16-be"), "text"),
    "JSON": (json.dumps({"tokens": list(range(100))}).encode(), "text"),
    "gzip": (gzip.compress(IDS.tobytes()), "gzip"),
    "bzip2": (bz2.compress(IDS.tobytes()), "bzip2"),
    "xz": (lzma.compress(IDS.tobytes()), "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + IDS.tobytes(), "zstd"),
    "lz4": (b"\x04\x22\x4d\x18" + IDS.tobytes(), "lz4"),
    "npz": (zipped(lambda f: np.savez(f, tokens=IDS)), "zip"),
    "tar": (tarfile.TarInfo("a").tobuf(), "tar"),
    "Parquet": (b"PAR1" + IDS.tobytes(), "Parquet"),
    "Arrow": (b"\xff\xff\xff\xff\x78\0\0\0\x10\0\0\0" + IDS.tobytes(), "Arrow"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + IDS.tobytes(), "HDF5"),
    "safetensors": (struct.pack("<Q", 300) + b'{"a":' + IDS.tobytes(), "safetensors"),
    "GGUF": (b"GGUF\x03" + IDS.tobytes(), "GGUF"),
    "a pickle": (pickle.dumps({"stoi": dict(zip("abc", range(3), strict=True))}), "pickle"),
    "an old pickle": (pickle.dumps({"stoi": 1}, 2), "pickle"),
    "numpy.save": (zipped(lambda f: np.save(f, IDS)), "numpy.save"),
    "lit-gpt, int32": (lit_gpt(IDS), "lit-gpt"),
    "lit-gpt, uint16": (lit_gpt(IDS, "<u2", 8), "lit-gpt"),
    "a Megatron index": (bytes.fromhex(MEGATRON["uint16"][1]), "Megatron"),
    "an unfinished copy": (bytes(1000), "zeros"),
}


def test_a_hole_is_an_unfinished_copy_unless_the_type_is_given(tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.tobytes() * 200 + bytes(1 << 18) + IDS.tobytes() * 200)
    with pytest.raises(DataError, match="zeros"):
        open_(tmp_path / "a.bin")
    assert open_(tmp_path / "a.bin", dtype="uint16").manifest.splits["train"].tokens > 1 << 17


@pytest.mark.parametrize("fields", [{}, {"format": "nanogpt"}, {"format": "olmo", "dtype": "uint16"}])
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_told_by_their_content(tmp_path, name, fields):
    raw, says = OTHERS[name]
    for suffix in (".bin", ".npy"):
        path = tmp_path / f"train{suffix}"
        path.write_bytes(raw + b"\n" * (len(raw) % 2))
        refused(path, path, says, vocab_size=60_000, **fields)


def test_pointers_in_place_of_megatrons_files_are_named(tmp_path):
    path = megatron(tmp_path)
    path.with_suffix(".idx").write_bytes(POINTER)
    refused(path, "text_document.idx", "Git LFS")
    megatron(tmp_path)
    path.write_bytes(POINTER)
    refused(path, "text_document.bin", "Git LFS")


def test_a_lost_index_is_missed(tmp_path):
    path = megatron(tmp_path)
    path.with_suffix(".idx").unlink()
    for where in (path, tmp_path):
        refused(where, "text_document.idx is not beside it", "data.format to nanogpt")
    assert tokens_of(open_(path, format="nanogpt")) == [TOKENS]


def test_a_vocabulary_above_uint16_wants_a_type(tmp_path):
    """The type must be given even if all ids are small, as they are here."""
    for name in ("x.bin", "x.npy"):
        np.arange(1000, dtype="<u2").tofile(tmp_path / name)
        refused(tmp_path / name, "vocabulary of 100278", "set data.dtype", vocab_size=100_278)
        assert len(tokens_of(open_(tmp_path / name, 100_278, dtype="uint16"))[0]) == 1000
        assert len(tokens_of(open_(tmp_path / name, 1 << 16))[0]) == 1000
    (tmp_path / "x.bin").write_bytes(llmc(TOKENS))  # the header names the format and the type
    assert tokens_of(open_(tmp_path / "x.bin", 100_278)) == [TOKENS]


def streams(rng: np.random.Generator, vocab_size: int, count: int) -> dict[str, np.ndarray]:
    """Ids with the distribution of text (Zipf), numbered by frequency and in another order; and uniform ids."""
    share = 1 / np.arange(1, vocab_size + 1)
    ids = rng.choice(vocab_size, count, p=share / share.sum())
    return {"text": ids, "another order": rng.permutation(vocab_size)[ids], "even": rng.integers(0, vocab_size, count)}


@pytest.mark.parametrize("vocab_size", [2, 5, 16, 65, 256, 4096, 32_000, 50_257, 65_536])
def test_sound_uint16_tokens_raise_no_alarm(vocab_size):
    """In 25,000 such streams there was no false alarm."""
    rng = np.random.default_rng(vocab_size)
    for count in (64, 70, 300, 5000):
        for kind, ids in streams(rng, vocab_size, count).items():
            for dtype in ("<u2", "<u4"):
                seen = widths.detect_layout(ids.astype(dtype).tobytes())
                assert seen is None or seen.numpy == dtype, (kind, count, dtype)


@pytest.mark.parametrize("odd", [0, 1, 30])
@pytest.mark.parametrize("header", [0, 8, 24, 256, 1022])
@pytest.mark.parametrize("stored", ["<u4", "<i8", ">u4", ">i8"])
@pytest.mark.parametrize("vocab_size", [65, 256, 4096, 32_000, 50_257, 65_536, 100_278, 151_936])
def test_wider_and_swapped_tokens_are_noticed(tmp_path, vocab_size, stored, header, odd):
    """A header of any even length comes before the tokens, and up to 30 of the ids are -1."""
    rng = np.random.default_rng(odd)
    path = tmp_path / "train.bin"
    for kind, ids in streams(rng, vocab_size, 3000).items():
        ids[rng.choice(3000, odd, replace=False)] = -1
        path.write_bytes(rng.bytes(header) + ids.astype(stored).tobytes())
        for known in (0, vocab_size):
            with pytest.raises(DataError) as e:
                open_(path, known)
            assert str(path) in str(e.value) and "\n" not in str(e.value), kind
            if stored != "<u4":
                refused(path, path, vocab_size=known, dtype="uint32")


@pytest.mark.parametrize("vocab_size", [65, 256, 4096, 32_000, 50_257])
def test_two_byte_tokens_of_another_order_or_read_as_wider_ones(tmp_path, vocab_size):
    path = tmp_path / "train.bin"
    for ids in streams(np.random.default_rng(0), vocab_size, 3000).values():
        ids.astype(">u2").tofile(path)
        refused(path, path, vocab_size=vocab_size)
        ids.astype("<u2").tofile(path)
        refused(path, path, vocab_size=vocab_size, dtype="uint32")
        assert tokens_of(open_(path, vocab_size)) == [ids.tolist()]
    text = streams(np.random.default_rng(0), vocab_size, 3000)["text"]
    text.astype(">u2").tofile(path)
    refused(path, "big-endian", vocab_size=0)
    text.astype("<u2").tofile(path)
    refused(path, path, vocab_size=0, dtype="uint32")


def test_one_file_is_read_once(tmp_path):
    """Otherwise a file with two names would train twice, or both train and validate."""
    (tmp_path / "train.bin").write_bytes(llmc(TOKENS))
    for link in (os.symlink, os.link):
        for name in ("other.bin", "val.bin"):
            link(tmp_path / "train.bin", tmp_path / name)
            data = open_(tmp_path)
            assert len(data.external_files["train"]) == 1 and not data.has("val")
            refused(tmp_path / "train.bin", "train.bin", val_path=str(tmp_path / name))
            (tmp_path / name).unlink()


def megatron_documents(folder, lengths, eos=None):
    tokens = np.arange(10, 10 + sum(lengths), dtype="<u2")
    ends = np.cumsum(lengths)
    if eos is not None:
        tokens[ends - 1] = eos
    tokens.tofile(folder / "x.bin")
    count = len(lengths)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1)
    offsets = 2 * (ends - lengths)
    arrays = (np.array(lengths, "<i4"), offsets.astype("<i8"), np.arange(count + 1, dtype="<i8"))
    (folder / "x.idx").write_bytes(head + b"".join(a.tobytes() for a in arrays))
    return open_(folder / "x.bin", 60_000)


def test_masked_documents_want_their_end_in_the_tokens(tmp_path, monkeypatch):
    ends.check_documents_end([megatron_documents(tmp_path, [7, 9, 30], eos=5)], 5)
    for eos, count in ((6, 0), (12, 1)):  # token 6 does not occur; token 12 occurs by chance
        with pytest.raises(DataError) as e:
            ends.check_documents_end([megatron_documents(tmp_path, [7, 9, 30], eos=5)], eos)
        for part in ("x.bin, which has 3 documents,", f"has it {count} times in 46 tokens", "--append-eod", "eos_id"):
            assert part in str(e.value)
    (tmp_path / "x.idx").unlink()
    (tmp_path / "x.bin").write_bytes(llmc([5, 1, 2] * 5000))  # if there is no index of documents, one end is enough
    ends.check_documents_end([open_(tmp_path / "x.bin")], 5)
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 100)
    monkeypatch.setattr(fingerprint, "SAMPLED_BLOCKS", 4)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 64)
    ends.check_documents_end([open_(tmp_path / "x.bin")], 5)
    with pytest.raises(DataError, match="has it 0 times in 128 tokens"):
        ends.check_documents_end([open_(tmp_path / "x.bin")], 6)


def test_a_run_with_masked_documents_that_never_end_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(llmc([3] * 100))
    tree = {"data": {"path": str(tmp_path / "x.bin"), "eos_id": 3, "mask_documents": True}, "model": {"vocab_size": 9}}
    run_directory.resolve(from_dict(tree))
    tree["data"]["eos_id"] = 4
    with pytest.raises(
        DataError, match=r"token 4 ends documents for data\.mask_documents, but .* 0 times in 100 tokens"
    ):
        run_directory.resolve(from_dict(tree))
    text = runs.dataset(tmp_path)  # one text is one document, without an end
    tree = {"data": {"path": str(text), "eos_id": 4, "mask_documents": True}}
    run_directory.resolve(from_dict(tree))


def test_64_bit_tokens_are_never_advised_into_half_of_them(tmp_path):
    path = tmp_path / "part.npy"
    np.random.default_rng(0).integers(0, 50_000, 1000).astype("<u8").tofile(path)
    for fields in ({}, {"dtype": "uint32"}, {"dtype": "uint16"}):
        refused(path, "64-bit", "astype('<u4')", vocab_size=50_000, **fields)


def test_files_that_change_while_they_are_opened(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    IDS.tofile(path)
    data = open_(path)
    for raw in (IDS.tobytes()[:-2], IDS.tobytes() + b"\0\0", b""):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=f"is {len(raw)} bytes, and was 2000"):
            data.files("train")
    IDS.tofile(path)
    monkeypatch.setattr(external, "check_size", lambda file: path.write_bytes(b"12"))  # runs at the check
    with pytest.raises(DataError, match="became shorter"):
        open_(path)


# Which files are chosen


def test_files_globs_and_folders(tmp_path):
    tmp_path = tmp_path / "in" / "here"
    tmp_path.mkdir(parents=True)
    for i, name in enumerate(["fineweb_val_000000", "fineweb_train_000002", "fineweb_train_000001"]):
        (tmp_path / f"{name}.bin").write_bytes(llmc([i] * 4))
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # nanoGPT's; never opened
    (tmp_path / "._fineweb_train_000001.bin").write_bytes(b"\0\5\x16")  # macOS leaves such files
    for path in (tmp_path, tmp_path / "*.bin", tmp_path.parent / "**/fineweb*"):
        data = open_(path)
        assert tokens_of(data) == [[2] * 4, [1] * 4] and tokens_of(data, "val") == [[0] * 4]
    only = open_(tmp_path / "fineweb_train_000001.bin")
    assert tokens_of(only) == [[2] * 4] and not only.has("val")
    with pytest.raises(DataError, match=r"no 'val' files; name them with data\.val_path"):
        only.files("val")
    named = open_(tmp_path, val_path=str(tmp_path / "*_000001.bin"))
    assert tokens_of(named) == [[1] * 4, [0] * 4] and tokens_of(named, "val") == [[2] * 4]
    refused(tmp_path / "*val*", "1 file(s)", "data.val_path")
    refused(tmp_path / "*", "meta.pkl", "data.format")
    refused(tmp_path / "none*.bin", "no token file matches", "none*.bin")
    refused(tmp_path / "missing.bin", "no token file matches", "missing.bin")
    refused(tmp_path, "nowhere*", val_path="nowhere*")


@pytest.mark.parametrize("word", ["val", "valid-0", "x_Validation", "validation.00"])
def test_words_that_name_validation_files(tmp_path, word):
    for name in (word, "evaluate", "interval_0", "medieval"):
        (tmp_path / f"{name}.bin").write_bytes(llmc(TOKENS))
    data = open_(tmp_path)
    assert [p.stem for p in data.files("val").paths] == [word] and len(data.files("train").paths) == 3


@pytest.mark.parametrize("word", ["val", "x-valid", "Validation.1"])
def test_folders_below_the_glob_may_name_validation_files(tmp_path, word):
    for folder in ("train", word, f"{word}/deep", "medieval"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.bin").write_bytes(llmc(TOKENS))
    data = open_(tmp_path / "**/*.bin")
    assert {p.relative_to(tmp_path).parts[0] for p in data.files("val").paths} == {word}
    assert len(data.files("val").paths) == len(data.files("train").paths) == 2
    assert not open_(tmp_path / word / "*.bin").has("val")  # a folder that is named explicitly trains


def test_kinds_and_types_are_not_mixed(tmp_path):
    (tmp_path / "a.bin").write_bytes(llmc(TOKENS))
    (tmp_path / "b.bin").write_bytes(struct.pack("<6H", *TOKENS))
    refused(tmp_path, "a.bin", "llmc", "b.bin", "nanogpt")
    (tmp_path / "b.bin").write_bytes(llmc(TOKENS, 20240801, 7, "<u4"))
    refused(tmp_path, "a.bin", "uint16", "b.bin", "uint32")
    refused(tmp_path / "a.bin", "data.dtype is uint32", "a.bin", "uint16", dtype="uint32")
    refused(tmp_path / "a.bin", "a.idx", format="megatron")


def test_a_dataset_folder_is_never_taken_for_loose_files(tmp_path):
    folder = runs.dataset(tmp_path)
    for name in ("dtype", "val_path", "tokenizer_path"):
        refused(folder, f"data.{name}", **{name: "uint16"})
    refused(folder, "meshlm dataset", format="nanogpt")
    (folder / "manifest.json").unlink()
    refused(folder, "meshlm dataset")


def test_files_of_a_dataset_folder_are_never_taken_for_loose_ones(tmp_path, monkeypatch):
    folder = runs.dataset(tmp_path)
    (folder / "train.packed-8.bin").write_bytes(b'{"format": "meshlm-packing", "version": 1, ' + bytes(1000))
    advice = f"name the folder itself: {folder}"
    for name in (
        "*.bin",
        "train-*.bin",
        "*.documents.bin",
        "val-00000.bin",
        "train.documents.bin",
        "train.packed-8.bin",
    ):
        refused(folder / name, advice)
        refused(folder / name, advice, format="nanogpt", dtype="uint32")
    refused(tmp_path / "**/*.bin", advice)
    (tmp_path / "a.bin").write_bytes(struct.pack("<6H", *TOKENS))
    with pytest.raises(DataError, match=re.escape(advice)):
        sources.open_sources(DataConfig(path=f"{tmp_path}/a.bin,{folder}/*.bin"), 1000)
    monkeypatch.chdir(folder)
    refused("*.bin", "name the folder itself: .")
    (folder / "manifest.json").unlink()
    refused(folder / "train-*.bin", advice)
    loose = tmp_path / "loose"
    loose.mkdir()
    for name in ("train-00000.bin", "train.documents.bin", "val.documents.bin", "train.packed-8.bin"):
        shutil.copy(folder / name, loose)
    assert open_(loose / "train-*.bin").manifest.splits["train"].tokens
    for name in ("train.documents.bin", "train.packed-8.bin"):
        for fields in ({}, {"format": "nanogpt"}, {"format": "olmo", "dtype": "uint32"}):
            refused(loose / name, name, "does not contain tokens", "launch.", **fields)
            refused(tmp_path / "a.bin", name, "does not contain tokens", val_path=str(loose / name))
    (loose / "my.documents.bin").write_bytes(struct.pack("<6H", *TOKENS))
    assert tokens_of(open_(loose / "my.documents.bin")) == [TOKENS]


def test_the_name_of_a_file_that_is_a_pattern_of_others_is_refused(tmp_path):
    for name in ("*.bin", "a.bin", "b.bin"):
        (tmp_path / name).write_bytes(struct.pack("<6H", *TOKENS))
    refused(tmp_path / "*.bin", "selects 2 other file(s)", f"write {tmp_path}/[*].bin for this file")
    refused(tmp_path / "a.bin", "selects 2 other file(s)", val_path=str(tmp_path / "*.bin"))
    assert tokens_of(open_(tmp_path / "[*].bin")) == [TOKENS]
    (tmp_path / "*.bin").unlink()
    assert tokens_of(open_(tmp_path / "*.bin")) == [TOKENS] * 2


def test_files_named_as_for_tests_train_and_it_is_said(tmp_path, caplog):
    held_out = ["test.bin", "My-Dev_0001.bin", "eval/a.bin", "b.holdout.bin"]
    for name in (*held_out, "train.bin", "val.bin", "latest.bin", "device.bin", "contest/a.bin"):
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name).write_bytes(struct.pack("<6H", *TOKENS))
    root = tmp_path / "test"  # the folder was named explicitly
    for path, count in ((f"{root}/**/*.bin", 4), (root, 3), (f"{root}/tes?.bin", 1)):
        caplog.clear()
        open_(path)
        (warning,) = caplog.messages
        assert (
            warning.startswith("WARNING")
            and f"{count} file(s) are named as for tests, but will be trained on" in warning
        )
        assert (str(root / "test.bin") in warning) == (count < 4) == ("…" not in warning)
        assert "contest" not in warning and "device" not in warning and "latest" not in warning
    caplog.clear()
    for path in (root / "test.bin", f"{root}/train*.bin"):
        open_(path)
    open_(f"{root}/t*.bin", val_path=str(root / "test.bin"))
    assert not caplog.messages


# Fingerprint


def test_moved_files_are_the_same_data_and_changed_ones_are_not(tmp_path, monkeypatch):
    def write(folder, tokens=TOKENS, name="train.bin"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(llmc(tokens))
        return open_(tmp_path / folder).manifest.fingerprint()

    first = write("here")
    assert write("there") == first
    assert write("here", TOKENS[::-1]) != first and write("here") == first
    with monkeypatch.context() as chunks:  # the size of the chunks that are read makes no difference
        chunks.setattr(fingerprint, "CHUNK_BYTES", 4)
        assert write("chunked") == first and open_(tmp_path / "chunked").largest_id == 999
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 5)
    monkeypatch.setattr(fingerprint, "SAMPLED_BLOCKS", 3)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 16)
    tokens = np.arange(1, 500)
    sampled = write("large", tokens)
    assert sampled == write("elsewhere", tokens)
    for i in (0, 248, 498):  # the head, the middle, the tail
        changed = tokens.copy()
        changed[i] += 1
        assert write("large", changed) != sampled, i
    assert write("large", tokens[:-1]) != sampled
    changed = tokens.copy()
    changed[100] += 1
    assert write("large", changed) == sampled, "between the blocks: only size and samples count beyond WHOLE_BYTES"


# Fuzz


def test_no_damage_reads_as_other_tokens(tmp_path):
    """A damaged header gives a DataError or the right tokens, never another error or a large allocation."""
    rng = random.Random(0)
    header = llmc(TOKENS)[:1024]
    path = tmp_path / "f" / "x.bin"
    path.parent.mkdir()
    outcomes = {"right": 0, "refused": 0}
    tracemalloc.start()
    for i in range(3000):
        for old in path.parent.iterdir():
            old.unlink()
        kind = ("llmc", "uint16", "int32")[i % 3]
        if kind == "llmc":
            path.write_bytes(damaged(header, rng, 16 if i % 2 else 1024) + llmc(TOKENS)[1024:])
        else:
            megatron(path.parent, "x", kind)
            index = path.with_suffix(".idx")
            index.write_bytes(damaged(index.read_bytes(), rng))
        try:
            found = tokens_of(open_(path))
        except DataError:
            outcomes["refused"] += 1
        else:
            assert found == [TOKENS]
            outcomes["right"] += 1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert min(outcomes.values()) > 100, "both must happen, or the damage says nothing"


@given(
    st.sampled_from(["x.bin", "x.npy"]),
    st.sampled_from([b"", llmc([])[:12], MEGATRON_HEAD, b"\x93NUMPY", b"\x1f\x8b\x08\0"]),
    st.binary(max_size=1100),
    st.one_of(st.none(), st.binary(max_size=120)),
    st.sampled_from([{}, {"dtype": "uint32"}, *({"format": kind} for kind in external.READERS)]),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_tokens_to_the_last_one_or_refused(name, head, rest, index, fields):
    """The tokens are all bytes of the file after the header, or there is an error, whatever the header claims."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_bytes(raw := head + rest)
        if index is not None:
            path.with_suffix(".idx").write_bytes(MEGATRON_HEAD[: len(index)] + index)
        try:
            data = open_(path, 0, **fields)
            (shard,) = data.files("train").shards
        except DataError as e:
            assert "\n" not in str(e) and name.split(".")[0] in str(e)
        else:
            skipped = 1024 if data.manifest.request["format"] == "llmc" else 0
            assert shard.tobytes() == raw[skipped:]


def damaged(raw: bytes, rng: random.Random, within: int = 1 << 30) -> bytes:
    at = rng.randrange(min(len(raw), within))
    return rng.choice([
        lambda: raw[:at],
        lambda: raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :],
        lambda: raw[:at] + rng.randbytes(8) + raw[at + 8 :],
        lambda: raw[:at] + b"\xff" * 8 + raw[at + 8 :],
        lambda: raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:],
        lambda: raw + rng.randbytes(rng.randrange(1, 9)),
    ])()  # fmt: skip


# Runs


def test_resolve_wants_a_vocabulary_and_takes_the_tokenizers(tmp_path):
    folder = runs.dataset(tmp_path)
    size = json.loads((folder / "manifest.json").read_text())["vocab_size"]
    (tmp_path / "x.bin").write_bytes(llmc([3] * 100))

    def resolve(vocab_size=0, **fields):
        tree = {"data": {"path": str(tmp_path / "x.bin"), **fields}, "model": {"vocab_size": vocab_size}}
        return run_directory.resolve(from_dict(tree)).model.vocab_size

    with pytest.raises(ConfigError, match=r"vocab_size is not set.*largest id seen is 3\b.*tokenizer_path"):
        resolve()
    assert resolve(50257) == 50257
    assert resolve(tokenizer_path=str(folder / "tokenizer")) == size
    with pytest.raises(ConfigError, match=rf"vocab_size is 50257, but the tokenizer .* has {size}"):
        resolve(50257, tokenizer_path=str(folder / "tokenizer"))
    with pytest.raises(DataError, match=r"there is no tokenizer"):
        resolve(tokenizer_path=str(tmp_path / "empty"))
    for wrong in ({"format": "tfrecord"}, {"dtype": "int64"}):
        with pytest.raises(UserError, match="it must be one of"):
            resolve(50257, **wrong)


STEPS = 60


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset, a run on it, and its tokens as llm.c files."""
    folder = tmp_path_factory.mktemp("foreign")
    data = runs.dataset(folder)
    runs.train(folder / "whole", data, num_train_steps=STEPS, sample__max_new_tokens=8)
    (folder / "llmc").mkdir()
    for split in ("train", "val"):
        tokens = np.fromfile(data / f"{split}-00000.bin", "<u2")
        (folder / "llmc" / f"text_{split}_000000.bin").write_bytes(llmc(tokens))
    return folder


def tool(module: str, run, *flags: str, code: int = 0) -> str:
    return runs.finish(runs.start([sys.executable, "-m", f"launch.{module}", f"--workdir={run}", *flags]), code)


def test_a_run_on_files_is_that_on_the_dataset_bit_for_bit_through_kill_and_move(prepared, tmp_path):
    run, files = tmp_path / "run", tmp_path / "files"
    shutil.copytree(prepared / "llmc", files)
    fields = {
        "num_train_steps": STEPS,
        "checkpoint__every_steps": 5,
        "data__tokenizer_path": prepared / "dataset/tokenizer",
        "sample__max_new_tokens": 8,
    }
    process = runs.start(runs.command(run, files / "*.bin", **fields))
    deadline = time.monotonic() + runs.TIMEOUT_S
    while len(runs.rows(run)) < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(runs.rows(run)) < STEPS
    files.rename(tmp_path / "moved")
    out = runs.train(run, tmp_path / "moved", **fields)
    assert "Resuming after step" in out and "llmc uint16, read in place: 1 file(s) to train on, 1 to validate on" in out
    assert runs.losses(run) == runs.losses(prepared / "whole")
    assert any("val/bits_per_byte" in row for row in runs.rows(prepared / "whole"))
    assert not any("val/bits_per_byte" in row for row in runs.rows(run))
    assert runs.rows(run, "samples.jsonl") == runs.rows(prepared / "whole", "samples.jsonl")

    # The run has the tokenizer: sampling needs no other file, and evaluation needs only the tokens.
    assert json.loads(tool("sample", run, "--prompt=mesh", "--max_new_tokens=9", "--json"))["text"]
    result = json.loads(tool("evaluate", run, "--json"))
    assert set(result) == {"step", "tokens", "val/loss", "val/perplexity"}
    assert result["val/loss"] == json.loads(tool("evaluate", prepared / "whole", "--json"))["val/loss"]

    train = tmp_path / "moved/text_train_000000.bin"
    raw = train.read_bytes()
    train.write_bytes(raw[:2000] + raw[2002:4000] + raw[2000:2002] + raw[4000:])
    assert "another dataset" in runs.train(run, tmp_path / "moved", **fields, code=2).splitlines()[-1]
    assert "is not the dataset" in tool("evaluate", run, code=2)
    train.write_bytes(raw[:-2])
    out = runs.train(run, tmp_path / "moved", **fields, code=3)
    assert len(out.splitlines()) == 1 and f"{len(raw) - 2} bytes, expected {len(raw)}" in out


def test_without_a_tokenizer_a_run_trains_and_says_that_it_does_not_sample(prepared, tmp_path):
    run = tmp_path / "run"
    fields = {"num_train_steps": 3, "model__vocab_size": 300}
    out = runs.train(run, prepared / "llmc", **fields)
    assert out.count("no samples are written") == 1 and "ln 300" in out
    tokens = ((prepared / "llmc/text_train_000000.bin").stat().st_size - 1024) // 2
    tail = tokens % runs.TINY["data.seq_len"]
    assert f"never read: {tail} tokens at the ends of files" in out or not tail
    assert "no validation:" not in out
    assert runs.rows(run, "samples.jsonl") == [] and not (run / "tokenizer").exists()
    out = tool("sample", run, code=2)
    assert "--config.data.tokenizer_path" in out.splitlines()[-1] and "Traceback" not in out
    assert "val/loss" in tool("evaluate", run)


def test_mistakes_are_answered_before_jax_is_loaded(prepared, tmp_path):
    argv = runs.command(tmp_path / "run", prepared / "llmc", data__dtype="uint32", model__vocab_size=300)
    code = "import runpy, sys\ntry: runpy.run_module('launch.train', run_name='__main__')\n"
    code += "finally: print('jax loaded:', 'jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code, *argv[3:]], cwd=runs.ROOT, env=runs.environment(), text=True, capture_output=True
    )
    assert result.returncode == 3 and "jax loaded: False" in result.stdout
    assert result.stderr.startswith("error: data.dtype is uint32") and len(result.stderr.splitlines()) == 1


# All formats are in one table


def big_tokens(path: pathlib.Path, dtype: str) -> external.TokenFile:
    """A reader of a made-up format: eight bytes of magic, then uint32 tokens."""
    return external.TokenFile(path, "ours", "uint32", 8, (path.stat().st_size - 8) // 4)


def test_a_new_format_is_a_reader_and_nothing_else(tmp_path, monkeypatch):
    """With a new reader, the configuration accepts the format, its tokens are read and identified, and errors list
    it."""
    tree = {"data": {"path": str(tmp_path / "*.ours"), "format": "ours"}, "model": {"vocab_size": 1000}}
    (tmp_path / "a.ours").write_bytes(b"OUR FILE" + np.array(TOKENS, "<u4").tobytes())
    with pytest.raises(ConfigError) as e:
        from_dict(tree)
    known = "meshlm, nanogpt, llmc, megatron, olmo"
    assert str(e.value) == f"config.data.format is 'ours'; it must be one of {known}, or empty"
    monkeypatch.setitem(external.READERS, "ours", big_tokens)
    data = sources.open_sources(from_dict(tree).data, 1000)
    (found,) = data.datasets.values()
    assert [tokens.tolist() for tokens in found.files("train").shards] == [TOKENS] and found.largest_id == 999
    assert found.manifest.request == {"format": "ours"} and len(found.manifest.fingerprint()) == 16
    with pytest.raises(ConfigError, match=f"{known}, ours, or empty"):
        from_dict({"data": {"format": "theirs"}})


def test_only_the_readers_know_the_names_of_formats():
    """A source file that repeats such a name would have to be changed together with the table."""
    root = pathlib.Path(__file__).parent.parent
    named = set()
    packages = ("configs", "data", "launch", "model", "trainer")
    for path in (path for package in packages for path in (root / package).rglob("*.py")):
        strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        if set(external.READERS) & {s for s in strings if isinstance(s, str)}:
            named.add(path.relative_to(root).as_posix())
    assert named == {"data/token_files/external.py"}


def test_the_configuration_stays_light(tmp_path):
    code = "import sys, trainer.config as c; c.from_dict({}); sys.exit('numpy' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT).returncode == 0
