"""Protects the way from text to dataset: the split, whole documents, and a folder that is complete or not there."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from data import corpus, formats, prepare, tokenizers
from data.errors import DataError

ROOT = pathlib.Path(__file__).parents[1]
POEM = "".join(f"Line {i}: the sëa, 東 and 🚀 again.\n" for i in range(37))


def tokens(folder: pathlib.Path, split: str) -> np.ndarray:
    """The tokens of a split, read as the format is documented and not by the code under test."""
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]]
    return np.concatenate([np.fromfile(folder / s["file"], dtype) for s in manifest["splits"][split]["shards"]])


def contents(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    """Every file under a folder: its bytes and when it was written."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text(POEM, encoding="utf-8", newline="")
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(8):
        (path / f"{i}.txt").write_text(f"{i}: " + "wörd " * (i + 3), encoding="utf-8")
    return path


def run(out: pathlib.Path, source: pathlib.Path, tokenizer: str = "char", **changes) -> formats.Manifest:
    return prepare.prepare(out, source=str(source), tokenizer=tokenizer, **changes)


def test_one_file_is_prepared_as_nanogpt_does_it(file, tmp_path):
    """nanoGPT's data/shakespeare_char/prepare.py, line for line: the same ids, dtype, cut and bytes on disk."""
    run(tmp_path / "out", file)
    data = file.read_text(encoding="utf-8")
    stoi = {c: i for i, c in enumerate(sorted(set(data)))}
    n = len(data)
    expected = {"train": data[: int(n * 0.9)], "val": data[int(n * 0.9) :]}
    for split, text in expected.items():
        raw = np.array([stoi[c] for c in text], dtype=np.uint16).tobytes()
        assert (tmp_path / "out" / f"{split}-00000.bin").read_bytes() == raw


def test_manifest_counts_what_was_written(file, tmp_path):
    out = tmp_path / "out"
    manifest = run(out, file)
    assert manifest == formats.read_manifest(out)
    codec = tokenizers.load(out / "tokenizer")
    assert manifest.vocab_size == codec.vocab_size == len(set(POEM))
    assert manifest.eos_id is None and manifest.dtype == "uint16"
    assert manifest.tokenizer_sha256 == formats.sha256_file(out / "tokenizer" / tokenizers.FILE_NAME)
    for split in ("train", "val"):
        spec = manifest.splits[split]
        ids = tokens(out, split)
        text = codec.decode(ids)
        assert (spec.documents, spec.tokens) == (1, len(ids))
        assert spec.text_bytes == len(text.encode("utf-8")) > len(text)  # bits per byte needs bytes
    assert codec.decode(tokens(out, "train")) + codec.decode(tokens(out, "val")) == POEM
    assert sorted(contents(out)) == [
        "manifest.json", "tokenizer/meshlm_tokenizer.json", "train-00000.bin", "train.documents.bin",
        "val-00000.bin", "val.documents.bin",
    ]  # fmt: skip


def test_byte_tokenizer_cuts_at_bytes_and_takes_any(tmp_path):
    raw = bytes(range(256)) * 5
    (tmp_path / "raw.bin").write_bytes(raw)
    manifest = run(tmp_path / "out", tmp_path / "raw.bin", "byte")
    assert manifest.vocab_size == 256
    assert tokens(tmp_path / "out", "train").tolist() == list(raw[:1152])
    assert tokens(tmp_path / "out", "val").tolist() == list(raw[1152:])
    assert manifest.splits["val"].text_bytes == 128


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_several_documents_stay_whole_and_each_ends_with_eos(kind, folder, tmp_path):
    out = tmp_path / "out"
    manifest = run(out, folder, kind, val_fraction=0.3)
    codec = tokenizers.load(out / "tokenizer")
    assert manifest.eos_id == codec.eos_id == codec.vocab_size - 1
    found = {}
    for split in ("train", "val"):
        ids, spec = tokens(out, split), manifest.splits[split]
        starts = np.fromfile(out / f"{split}.documents.bin", "<u8").astype(int)
        assert starts[0] == 0 and spec.documents == len(starts) == np.count_nonzero(ids == manifest.eos_id) > 0
        documents = [codec.decode(d[:-1]) for d in np.split(ids, starts[1:])]
        assert np.array_equal([d[-1] for d in np.split(ids, starts[1:])], [manifest.eos_id] * len(starts))
        assert spec.text_bytes == sum(len(d.encode("utf-8")) for d in documents)  # without the eos
        found[split] = documents
    train, val = corpus.split(corpus.find(str(folder), tmp_path), 0.3)
    assert found == {"train": [d.read_text() for d in train], "val": [d.read_text() for d in val]}


def test_eos_that_was_asked_for_is_not_added_twice(folder, tmp_path):
    run(tmp_path / "out", folder, special_tokens=["<eos>", "<x>"])
    assert tokenizers.load(tmp_path / "out" / "tokenizer").special_tokens == ["<eos>", "<x>"]


def test_options_reach_the_tokenizer(tmp_path):
    (tmp_path / "in.txt").write_text("aaaabbbbz" * 2 + "q")
    manifest = run(tmp_path / "out", tmp_path / "in.txt", min_frequency=3, special_tokens=["<x>"])
    codec = tokenizers.load(tmp_path / "out" / "tokenizer")
    assert (codec.characters, codec.special_tokens) == ("ab", ["<unk>", "<x>"])
    assert codec.decode(tokens(tmp_path / "out", "val")) == "<unk><unk>" and manifest.vocab_size == 4


def test_invalid_utf8_stops_or_is_replaced_and_bytes_take_it(folder, tmp_path):
    (folder / "9.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"9\.txt is not UTF-8: byte 0xe9 at offset 3"):
        run(tmp_path / "out", folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts"]
    run(tmp_path / "replaced", folder, invalid_utf8="replace")
    assert "\ufffd" in tokenizers.load(tmp_path / "replaced" / "tokenizer").characters
    run(tmp_path / "bytes", folder, "byte")
    assert 0xE9 in np.concatenate([tokens(tmp_path / "bytes", split) for split in ("train", "val")])


def test_nothing_for_validation_is_an_empty_split_that_opens(file, tmp_path):
    out = tmp_path / "out"
    manifest = run(out, file, val_fraction=0.0)
    assert tokenizers.load(out / "tokenizer").decode(tokens(out, "train")) == POEM
    assert [shard.tokens for shard in manifest.splits["val"].shards] == [0]
    assert formats.TokenFiles(out, manifest, "val").tokens == 0


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_token_type_follows_the_vocabulary(vocab_size, dtype, tmp_path):
    """Every id survives on both sides of the border; as uint16 the last of 65537 would come back as 0."""
    text = "".join(map(chr, range(0x10000, 0x10000 + vocab_size)))
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    manifest = run(tmp_path / "out", tmp_path / "in.txt", val_fraction=0.5)
    assert (manifest.dtype, manifest.vocab_size) == (dtype, vocab_size)
    ids = np.concatenate([tokens(tmp_path / "out", split) for split in ("train", "val")])
    assert np.array_equal(ids, np.arange(vocab_size))


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 64])
def test_shards_join_to_what_one_shard_would_hold(shard_tokens, folder, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", folder)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", shard_tokens)
    manifest = run(tmp_path / "cut", folder)
    for split in ("train", "val"):
        assert np.array_equal(tokens(tmp_path / "cut", split), tokens(tmp_path / "whole", split))
        sizes = [shard.tokens for shard in manifest.splits[split].shards]
        assert len(sizes) == -(-whole.splits[split].tokens // shard_tokens)
        assert set(sizes[:-1]) <= {shard_tokens} and 0 < sizes[-1] <= shard_tokens
        offsets = f"{split}.documents.bin"  # count through the shards, so the cut does not show in them
        assert (tmp_path / "cut" / offsets).read_bytes() == (tmp_path / "whole" / offsets).read_bytes()
        files = formats.TokenFiles(tmp_path / "cut", manifest, split)  # checks sizes and hashes
        assert np.array_equal(np.concatenate(files.shards), tokens(tmp_path / "whole", split))


def test_shards_that_fill_exactly_leave_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 9)
    (tmp_path / "in.txt").write_text("abcdefghij" * 2)
    manifest = run(tmp_path / "out", tmp_path / "in.txt")
    assert [[s.tokens for s in manifest.splits[split].shards] for split in ("train", "val")] == [[9, 9], [2]]


def test_the_same_request_again_leaves_the_folder_as_it_is(file, tmp_path):
    out = tmp_path / "out"
    first = run(out, file, special_tokens=("<x>",))
    before, inode = contents(out), out.stat().st_ino
    assert run(out, file, special_tokens=["<x>"]) == first
    assert contents(out) == before and out.stat().st_ino == inode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt", "out"]


def test_the_same_text_gives_the_same_dataset_anywhere(folder, tmp_path):
    one, other = (run(tmp_path / name, folder) for name in ("one", "other"))
    assert one.fingerprint() == other.fingerprint()
    assert {n: c for n, (c, _) in contents(tmp_path / "one").items()} == {
        n: c for n, (c, _) in contents(tmp_path / "other").items()
    }


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "byte"},
        {"val_fraction": 0.2},
        {"min_frequency": 2},
        {"special_tokens": ["<unk>"]},
        {"invalid_utf8": "replace"},
    ],
)
def test_another_request_is_refused_and_harms_nothing_unless_overwrite(change, file, tmp_path):
    out = tmp_path / "out"
    run(out, file)
    before = contents(out)
    with pytest.raises(DataError, match="--overwrite") as e:
        run(out, file, **change)
    assert str(out) in str(e.value)
    assert contents(out) == before
    replaced = run(out, file, overwrite=True, **change)
    assert replaced == formats.read_manifest(out) == run(out, file, **change)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt", "out"]


def test_overwrite_leaves_nothing_of_the_old_dataset(file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "SHARD_TOKENS", 50)
        run(out, file)
    assert (out / "train-00001.bin").exists()
    run(out, file, val_fraction=0.2, overwrite=True)
    assert not (out / "train-00001.bin").exists()


def test_another_source_is_another_request(file, folder, tmp_path):
    run(tmp_path / "out", file)
    with pytest.raises(DataError, match="another request"):
        run(tmp_path / "out", folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"thesis.tex": "years of work"},
        {"manifest.json": '{"name": "a web app"}', "icon.png": ""},
        {"train-00000.bin": "ab"},
    ],
    ids=["empty", "documents", "foreign manifest", "no manifest"],
)
def test_a_folder_that_is_no_dataset_is_never_replaced(files, overwrite, file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    before = contents(out)
    with pytest.raises(DataError, match=str(out)):
        run(out, file, overwrite=overwrite)
    assert out.is_dir() and contents(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_never_replaced(overwrite, file, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="not a dataset"):
        run(tmp_path / "out", file, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "a file"


KILLED = """
import os, pathlib, signal, sys
from data import prepare
prepare.SHARD_TOKENS = 20
write, calls = prepare._ShardWriter.document, []
def document(*args):
    write(*args)
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
prepare._ShardWriter.document = document
out, source = map(pathlib.Path, sys.argv[1:])
prepare.prepare(out, source=str(source), tokenizer="char", val_fraction=0.3, overwrite=True)
"""


@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_run_leaves_the_name_as_it_was_and_the_next_run_cleans_up(replacing, folder, tmp_path):
    """kill -9 between two documents, with shards already on disk."""
    out = tmp_path / "out"
    if replacing:
        run(out, folder, "byte")
    before = contents(out)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, out, folder], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert out.exists() == replacing and contents(out) == before
    assert (tmp_path / "out.partial" / "train-00000.bin").exists()  # it really was on the way

    run(out, folder, val_fraction=0.3, overwrite=replacing)
    run(tmp_path / "undisturbed", folder, val_fraction=0.3)
    assert {n: c for n, (c, _) in contents(out).items()} == {
        n: c for n, (c, _) in contents(tmp_path / "undisturbed").items()
    }
    assert not (tmp_path / "out.partial").exists()


def test_a_document_that_vanishes_midway_leaves_the_name_free(folder, tmp_path, monkeypatch):
    """Bytes are read one document after another, so the failure comes when some are already written."""
    split = corpus.split

    def split_then_lose(*args):
        train, val = split(*args)
        train[-1].path.unlink()
        return train, val

    monkeypatch.setattr(corpus, "split", split_then_lose)
    with pytest.raises(DataError, match="cannot read"):
        run(tmp_path / "out", folder, "byte")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [{}, {"a.txt": ""}])
def test_a_source_without_text_leaves_no_folder(content, file, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, text in content.items():
        (source / name).write_text(text)
    with pytest.raises(DataError, match="no text"):
        run(tmp_path / "out", source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt", "source"]


def test_an_unknown_tokenizer_is_an_error_and_not_another_tokenizer(file, tmp_path):
    with pytest.raises(DataError, match=r"wordpiece.*char, byte"):
        run(tmp_path / "out", file, "wordpiece")
    assert not (tmp_path / "out").exists()


def test_a_damaged_dataset_is_not_taken_for_a_whole_one(file, tmp_path):
    """What the errors advise must help: the same request says what is wrong, and --overwrite mends it."""
    out = tmp_path / "set"
    whole = run(out, file)
    shard, tokenizer = out / "train-00000.bin", out / "tokenizer/meshlm_tokenizer.json"
    for path, damage in (
        (shard, b""),
        (tokenizer, tokenizer.read_bytes() + b" "),
        (out / "manifest.json", b'"meshlm-tokens"'),
    ):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="--overwrite"):
            run(out, file)
        assert run(out, file, overwrite=True) == whole
        assert run(out, file) == whole
