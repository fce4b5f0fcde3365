"""launch.inspect shows what a run trains on and finds every kind of damage, in one line."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc

import jax
import make_dataset
import numpy as np
import pytest

from data import dataset, packing
from data.config import DataConfig
from data.errors import DataError
from data.loader import Loader, PackedWindows, TokenWindows, Unreached
from data.preparation import pipeline
from data.token_files import formats, integrity
from tests import runs
from tests.batches import tokens_of
from tests.external_test import llmc


def call(*argv: str, code: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, "-m", "launch.inspect", *map(str, argv)],
        cwd=runs.ROOT, env=runs.environment(), text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == code, result
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A dataset of several documents, so that it has offsets and end-of-text tokens."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(runs.text(6000)[i * 300 :])
    pipeline.prepare_dataset(folder / "set", source=str(folder / "text"), tokenizer="char", val_fraction=0.3)
    return folder / "set"


def opened(path, vocab_size=0, **fields):
    return dataset.open_dataset(DataConfig(path=str(path), **fields), vocab_size)


def test_the_batch_is_the_one_a_run_trains_on(text):
    """The rows after 1,000 samples, in a later epoch, are those that the loader puts on devices."""
    report = json.loads(call(text, "--seq_len=48", "--batch_size=8", "--seed=5", "--sample=1000", "--json").stdout)
    windows = TokenWindows(opened(text).files("train"), seq_len=48, seed=5)
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = Loader(windows, global_batch_size=8, sharding=sharding).batch(1000)
    assert [row["ids"] for row in report["batch"]["rows"]] == tokens_of(batch).tolist()
    assert report["batch"]["epoch"] == 1000 / windows.num_windows and report["batch"]["epoch"] > 1
    for row in report["batch"]["rows"]:
        parts = row["text"].split("<eos>")
        assert all(part in runs.text(6000) for part in parts)


def test_the_batch_of_packed_rows(text):
    refused = call(text, "--seq_len=48", "--packed", code=3)
    assert f"python -m launch.pack {text} --seq_len=48" in refused.stderr
    index, _ = packing.pack_dataset(text, 48)
    flags = ("--seq_len=48", "--batch_size=8", "--seed=5", "--sample=70", "--packed", "--json")
    report = json.loads(call(text, *flags).stdout)
    rows = PackedWindows(opened(text).files("train"), index, seed=5).rows(70 + np.arange(8))
    assert [row["ids"] for row in report["batch"]["rows"]] == rows.tolist()
    assert report["batch"]["samples_per_epoch"] == index.rows


def test_what_is_said_of_a_dataset(text):
    manifest = formats.read_manifest(text)
    report = json.loads(call(text, "--json").stdout)
    for key in ("fingerprint", "dtype", "vocab_size", "eos_id", "request"):
        value = getattr(manifest, key)
        assert report[key] == (value() if callable(value) else value)
    for name, split in manifest.splits.items():
        told = report["splits"][name]
        assert (told["tokens"], told["documents"]) == (split.tokens, split.documents)
        assert told["bytes_per_token"] == split.text_bytes / split.tokens
        tokens = opened(text).files(name)
        assert report["check"][name] == {"nbytes": 2 * split.tokens, "largest_id": max(s.max() for s in tokens.shards)}
        assert report["text"][name][0]["ids"][:5] == tokens.shards[0][:5].tolist()
    page = call(text).stdout
    for part in (manifest.fingerprint(), f"{manifest.splits['train'].tokens:,}", "intact:", "made from source"):
        assert part in page
    assert "intact:" not in call(text, "--nocheck").stdout


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "a bit of a shard": (lambda d: flip(d / "train-00000.bin", 100), ["train-00000.bin", "sha256"]),
    "a bit of validation": (lambda d: flip(d / "val-00000.bin"), ["val-00000.bin", "sha256"]),
    "a cut": (lambda d: (d / "val-00000.bin").write_bytes(b"1234"), ["val-00000.bin", "4 bytes", "expected"]),
    "a lost shard": (lambda d: (d / "val-00000.bin").unlink(), ["val-00000.bin", "missing"]),
    "lost offsets": (lambda d: (d / "val.documents.bin").unlink(), ["val.documents.bin", "missing"]),
    "cut offsets": (lambda d: (d / "val.documents.bin").write_bytes(bytes(8)), ["val.documents.bin", "8 bytes"]),
    "falling offsets": (lambda d: flip(d / "train.documents.bin", 8 * 3 - 2), ["train.documents.bin", "offsets"]),
    "the tokenizer": (lambda d: flip(d / "tokenizer/meshlm_tokenizer.json", 40), ["meshlm_tokenizer.json"]),
    "the manifest": (lambda d: flip(d / "manifest.json", 200), ["manifest.json"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_and_exit_3(name, text, tmp_path, monkeypatch):
    """This holds even if the dataset is so large that a run would not hash it at its start."""
    damage, parts = DAMAGES[name]
    shutil.copytree(text, tmp_path / "set")
    damage(tmp_path / "set")
    result = call(tmp_path / "set", code=3)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    monkeypatch.setattr(formats, "HASH_AT_START_BYTES", 0)
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 64)
    with pytest.raises(DataError) as e:
        integrity.verify_dataset(opened(tmp_path / "set"))
    for part in parts:
        assert part in result.stderr and part in str(e.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A minimal dataset folder with every kind of file, packed for two lengths."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": "ab" * (i % 7 + 1)}) + "\n" for i in range(30)))
    pipeline.prepare_dataset(folder / "tok", source=str(folder / "in.jsonl"), tokenizer="bpe:260")
    pipeline.prepare_dataset(
        folder / "set", source=str(folder / "in.jsonl"), tokenizer=str(folder / "tok"), val_fraction=0.3
    )
    for seq_len in (8, 16):
        packing.pack_dataset(folder / "set", seq_len)
    return folder / "set"


def check(folder):
    data = opened(folder)
    integrity.verify_dataset(data)
    packing.verify_packings(folder, data.manifest)


def test_all_bytes_of_every_file_are_checked(tiny, tmp_path):
    """One byte is changed at a time: every seventh, and in files of 4 KiB or more (a tokenizer's), every 97th."""
    check(tiny)
    shutil.copytree(tiny, tmp_path / "set")
    names = sorted(p.relative_to(tiny).as_posix() for p in tiny.rglob("*") if p.is_file())
    kinds = {"manifest.json", "summary.json", "val.documents.bin", "train.packed-8.bin", "tokenizer/tokenizer.json"}
    assert kinds < set(names)
    for name in names:
        path = tmp_path / "set" / name
        raw = path.read_bytes()
        for i in range(0, len(raw), 7 if len(raw) < 4096 else 97):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ (1 + i % 255)]) + raw[i + 1 :])
            with pytest.raises(DataError) as e:
                check(tmp_path / "set")
            assert path.name in str(e.value) and "\n" not in str(e.value), (name, i)
        for changed in (raw + b" ", raw[:-1], b""):
            if changed != raw:
                path.write_bytes(changed)
                with pytest.raises(DataError):
                    check(tmp_path / "set")
        path.unlink()
        if "packed" not in name and name != "manifest.json":
            with pytest.raises(DataError, match=path.name):
                check(tmp_path / "set")
        path.write_bytes(raw)
    check(tmp_path / "set")


def as_before(folder):
    """Rewrites a dataset as an earlier version wrote it: its manifest has no hashes of the other files."""
    old = dataclasses.replace(formats.read_manifest(folder), files={})
    (folder / "manifest.json").write_text(old.to_json())
    return old


def test_offsets_of_earlier_versions_are_compared_with_the_tokens(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "set")
    fingerprint = formats.read_manifest(tiny).fingerprint()
    old = as_before(tmp_path / "set")
    assert old.fingerprint() == fingerprint and "sha256" not in json.loads((tmp_path / "set/manifest.json").read_text())
    check(tmp_path / "set")
    path = tmp_path / "set/train.documents.bin"
    raw = path.read_bytes()
    for chunk, step in ((1 << 20, 1), (16, 29)):
        monkeypatch.setattr(integrity, "CHUNK_BYTES", chunk)
        for i in range(0, len(raw), step):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ (1 + i % 255)]) + raw[i + 1 :])
            with pytest.raises(DataError, match=r"train\.documents\.bin"):
                integrity.verify_dataset(opened(tmp_path / "set"))
        path.write_bytes(raw)
        check(tmp_path / "set")


def test_what_no_window_reads_is_said(tiny, tmp_path):
    """Reports what is left out of shards, token files of other programs, and documents."""
    tokens = np.random.default_rng(0).integers(0, 50_000, 16_000).astype("<u2")
    parts = np.split(tokens, [10_000, *range(10_120, 16_000, 120)])
    make_dataset.write(tmp_path / "set", parts, vocab_size=50_000)
    (tmp_path / "set/train.documents.bin").write_bytes(bytes(8))
    for folder in ("nanogpt", "llmc", "megatron"):
        (tmp_path / folder).mkdir()
    for i, part in enumerate(parts):
        (tmp_path / f"nanogpt/{i:02d}.bin").write_bytes(part.tobytes())
        (tmp_path / f"llmc/{i:02d}.bin").write_bytes(llmc(part))
        index = struct.pack("<9sQBQQiqqq", b"MMIDIDX\0\0", 1, 8, 1, 2, len(part), 0, 0, 1)
        (tmp_path / f"megatron/{i:02d}.idx").write_bytes(index)
        (tmp_path / f"megatron/{i:02d}.bin").write_bytes(part.tobytes())
    (tmp_path / "nanogpt/more.bin.gz").write_bytes(b"")
    for folder in ("set", "nanogpt", "llmc", "megatron"):
        windows = TokenWindows(opened(tmp_path / folder).files("train"), seq_len=128, seed=0)
        assert windows.unreached == Unreached(files=50, tokens=6000, tails=10_000 % 128)
        assert str(windows.unreached).endswith("(6,000 tokens) and 16 tokens at the ends of files")
    report = json.loads(call(tmp_path / "nanogpt", "--seq_len=128", "--json").stdout)
    assert report["left_out"] == {
        "files": 50, "tokens": 6000, "tails": 16, "documents_cut": None, "empty_splits": ["val"],
    }  # fmt: skip
    assert report["other_files"] == ["more.bin.gz"]
    page = call(tmp_path / "nanogpt", "--seq_len=128", "--nocheck").stdout
    for said in (
        "never read with seq_len 128: 50 file(s)",
        "the val split has no token to predict",
        "1 other entries",
        "bin.gz",
    ):
        assert said in page
    page = call(tiny, "--seq_len=8").stdout
    assert "training document(s) are cut" in page and "packed for seq_len 16" in page
    short = call(tmp_path / "llmc", "--val_path", tmp_path / "llmc/00.bin", "--seq_len=128", code=3)
    assert "6000 tokens" in short.stderr and "at most 120 in a file" in short.stderr


def test_chunks_do_not_change_what_is_found_and_memory_stays_small(text, tmp_path, monkeypatch):
    whole = integrity.verify_dataset(opened(text))
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 64)
    assert integrity.verify_dataset(opened(text)) == whole
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 1 << 18)
    make_dataset.write(tmp_path, [np.arange(4 << 20) % 1000], vocab_size=1000)
    (tmp_path / "train.documents.bin").write_bytes(bytes(8))
    data = opened(tmp_path)
    tracemalloc.start()
    found = integrity._split(tmp_path, data.manifest, "train")
    assert tracemalloc.get_traced_memory()[1] < 2 << 20 < found.nbytes
    tracemalloc.stop()


def test_an_id_outside_the_vocabulary_is_found_wherever_it_is(tmp_path):
    """The shard agrees with the manifest, but its tokens are wrong."""
    tokens = np.arange(9000) % 100
    tokens[-1] = 100
    make_dataset.write(tmp_path, [tokens], vocab_size=100)
    with pytest.raises(DataError, match=r"token id 100 in .*train-00000\.bin is outside the vocabulary of 100"):
        integrity._split(tmp_path, opened(tmp_path).manifest, "train")


def test_token_files_of_other_programs(text, tmp_path):
    for split in ("train", "val"):
        shutil.copyfile(text / f"{split}-00000.bin", tmp_path / f"{split}.bin")
    report = json.loads(call(tmp_path, "--json", "--sample=3").stdout)
    assert report["format"] == "nanogpt" and report["vocab_size"] is None
    assert "text" not in report["batch"]["rows"][0] and report["splits"]["train"]["bytes_per_token"] is None
    with_text = json.loads(call(tmp_path, "--json", "--sample=3", f"--tokenizer_path={text / 'tokenizer'}").stdout)
    of_dataset = json.loads(call(text, "--json", "--sample=3").stdout)
    assert with_text["batch"] == of_dataset["batch"] and with_text["check"] == of_dataset["check"] == report["check"]
    assert with_text["fingerprint"] == report["fingerprint"] and with_text["vocab_size"] == of_dataset["vocab_size"]
    assert [row["ids"] for row in report["batch"]["rows"]] == [row["ids"] for row in of_dataset["batch"]["rows"]]
    assert "vocabulary of 5" in call(tmp_path, "--vocab_size=5", code=3).stderr
    assert "magic" in call(tmp_path, "--format=llmc", code=3).stderr
    (tmp_path / "train.bin").write_bytes(b"123")
    assert "3 bytes" in call(tmp_path, code=3).stderr
    assert "--vocab_size=5" in call(text, "--vocab_size=5", code=2).stderr
