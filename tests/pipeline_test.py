"""From text to dataset: documents are split and kept whole, and the folder is either complete or does not exist."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import zstandard

from data import tokenizers
from data.errors import DataError
from data.preparation import corpus, documents, encode, merge, pipeline
from data.token_files import formats

ROOT = pathlib.Path(__file__).parents[1]
PROSE = "".join(f"line {i * i} of prose\n" for i in range(80))
POEM = "".join(f"Line {i}: the sëa, 東 and 🚀 again.\n" for i in range(37))


def tokens(folder: pathlib.Path, split: str) -> np.ndarray:
    """The tokens of a split, read as the format's documentation says and not with the code under test."""
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
    return pipeline.prepare_dataset(out, source=str(source), tokenizer=tokenizer, **changes)


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
        # text_bytes counts bytes, not characters: bits per byte divides by it.
        assert spec.text_bytes == len(text.encode("utf-8")) > len(text)
    assert codec.decode(tokens(out, "train")) + codec.decode(tokens(out, "val")) == POEM
    assert sorted(contents(out)) == [
        "manifest.json", "summary.json", "tokenizer/meshlm_tokenizer.json", "train-00000.bin", "train.documents.bin",
        "val-00000.bin", "val.documents.bin",
    ]  # fmt: skip


def test_byte_tokenizer_cuts_at_bytes_and_takes_any(tmp_path):
    raw = bytes(range(256)) * 5
    (tmp_path / "raw.bin").write_bytes(raw)
    manifest = run(tmp_path / "out", tmp_path / "raw.bin", "byte", format="text")
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
    train, val = corpus.split_files(corpus.find_files(str(folder), tmp_path).files, 0.3)
    assert found == {
        "train": [d.path.read_text("utf-8") for d in train],
        "val": [d.path.read_text("utf-8") for d in val],
    }


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
        run(tmp_path / "out", folder, invalid_utf8="error")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "replaced", folder)
    problems = json.loads((tmp_path / "replaced" / "summary.json").read_text())["problems"]
    assert problems["counts"] == {"invalid UTF-8, now U+FFFD": 1} and "9.txt offset 3" in str(problems["examples"])
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
    """Every id is read back on both sides of the border; in uint16, the last of 65537 ids would be read back as 0."""
    text = "".join(map(chr, range(0x10000, 0x10000 + vocab_size)))
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    manifest = run(tmp_path / "out", tmp_path / "in.txt", val_fraction=0.5)
    assert (manifest.dtype, manifest.vocab_size) == (dtype, vocab_size)
    ids = np.concatenate([tokens(tmp_path / "out", split) for split in ("train", "val")])
    assert np.array_equal(ids, np.arange(vocab_size))


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 64])
def test_shards_join_to_what_one_shard_would_hold(shard_tokens, folder, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", folder)
    monkeypatch.setattr(merge, "SHARD_TOKENS", shard_tokens)
    manifest = run(tmp_path / "cut", folder)
    for split in ("train", "val"):
        assert np.array_equal(tokens(tmp_path / "cut", split), tokens(tmp_path / "whole", split))
        sizes = [shard.tokens for shard in manifest.splits[split].shards]
        assert len(sizes) == -(-whole.splits[split].tokens // shard_tokens)
        assert set(sizes[:-1]) <= {shard_tokens} and 0 < sizes[-1] <= shard_tokens
        offsets = f"{split}.documents.bin"  # offsets count through all shards, so cuts do not change them
        assert (tmp_path / "cut" / offsets).read_bytes() == (tmp_path / "whole" / offsets).read_bytes()
        files = formats.TokenFiles(tmp_path / "cut", manifest, split)  # checks sizes and hashes
        assert np.array_equal(np.concatenate(files.shards), tokens(tmp_path / "whole", split))


def test_shards_that_fill_exactly_leave_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "SHARD_TOKENS", 9)
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
        {"invalid_utf8": "error"},
        {"split": "document"},
        {"text_key": "content"},
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
        patch.setattr(merge, "SHARD_TOKENS", 50)
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
from data.preparation import documents, encode, pipeline
documents.UNIT_BYTES = 40
encode_unit, calls = encode.encode_unit, []
def encode_then_die(*args):
    calls.append(encode_unit(*args))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls[-1]
encode.encode_unit = encode_then_die
out, source = map(pathlib.Path, sys.argv[1:])
pipeline.prepare_dataset(out, source=str(source), tokenizer="char", val_fraction=0.3, overwrite=True)
"""


@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_run_leaves_the_name_as_it_was_and_the_next_goes_on(replacing, folder, tmp_path, monkeypatch):
    """kill -9 between two units: the next run encodes only the units that are left, and writes the same bytes."""
    out = tmp_path / "out"
    if replacing:
        run(out, folder, "byte")
    before = contents(out)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, out, folder], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert out.exists() == replacing and contents(out) == before
    done = sorted(p.stem for p in (tmp_path / "out.partial" / "units").glob("*.json"))
    assert done == ["000000", "000001", "000002"]

    monkeypatch.setattr(documents, "UNIT_BYTES", 40)
    encoded = []
    encode_unit = encode.encode_unit

    def note(index, *args):
        encoded.append(index)
        return encode_unit(index, *args)

    monkeypatch.setattr(encode, "encode_unit", note)
    run(out, folder, val_fraction=0.3, overwrite=replacing)
    assert encoded and encoded[0] == 3
    assert not (tmp_path / "out.partial").exists()
    run(tmp_path / "undisturbed", folder, val_fraction=0.3)
    assert without_times(out) == without_times(tmp_path / "undisturbed")


def without_times(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in contents(folder).items()}


@pytest.mark.parametrize(
    "change", ["another request", "another file", "a file changed"], ids=lambda change: change.replace(" ", "-")
)
def test_what_an_earlier_run_of_something_else_left_is_not_used(change, folder, tmp_path, monkeypatch):
    out, kind = tmp_path / "out", "char"
    subprocess.run([sys.executable, "-c", KILLED, out, folder], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert (tmp_path / "out.partial" / "units" / "000002.json").exists()
    if change == "another request":
        kind = "byte"
    elif change == "another file":
        (folder / "0a.txt").write_text("new")
    else:
        path = folder / "0.txt"
        stat = path.stat()
        path.write_bytes(path.read_bytes()[::-1].decode("utf-8", "ignore").encode()[: stat.st_size].ljust(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    monkeypatch.setattr(documents, "UNIT_BYTES", 40)
    run(out, folder, kind, val_fraction=0.3)
    run(tmp_path / "undisturbed", folder, kind, val_fraction=0.3)
    assert without_times(out) == without_times(tmp_path / "undisturbed")


def texts_of(word: str) -> list[str]:
    return [f"{i} {word} wörd 東\n" * (i % 7 + 1) for i in range(60)]


def json_lines(word: str) -> bytes:
    """JSON lines, half of them with escaped characters."""
    rows = [json.dumps({"n": 1, "text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in texts_of(word)]
    return "".join(rows).encode()


def records(folder: pathlib.Path) -> pathlib.Path:
    """JSON lines, Parquet and text, plain and compressed, each large enough to be cut."""
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines("plain"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines("gz")))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(json_lines("zst")))
    table = pyarrow.table({"n": range(60), "text": texts_of("row")})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=16)
    (folder / "e.txt").write_text(PROSE)
    (folder / "f.txt.gz").write_bytes(gzip.compress(PROSE.upper().encode()))
    return folder


@pytest.mark.parametrize("split", ["auto", "last", "file", "document"])
def test_the_result_does_not_depend_on_the_workers(split, tmp_path, monkeypatch):
    """One process, and three workers that take units of the files in any order, write the same dataset."""
    source = records(tmp_path / "corpus")
    one = run(tmp_path / "one", source, split=split, count_duplicates=True)
    monkeypatch.setattr(pipeline, "INLINE_BYTES", 0)
    run(tmp_path / "three", source, split=split, workers=3, count_duplicates=True)
    assert without_times(tmp_path / "one") == without_times(tmp_path / "three")
    assert sum(s.documents for s in one.splits.values()) == 4 * 60 + 2 or split == "last"
    assert one.eos_id is not None and all(s.tokens for s in one.splits.values())


def test_units_cut_anywhere_join_to_the_same_documents(tmp_path, monkeypatch):
    """UNIT_BYTES changes only where text is cut; characters are encoded one by one, so nothing may change."""
    source = records(tmp_path / "corpus")
    run(tmp_path / "whole", source)
    for size in (64, 300, 1000):
        monkeypatch.setattr(documents, "UNIT_BYTES", size)
        assert len(pipeline.make_plan(pipeline.Request(str(source), "char"), tmp_path).units) > 5
        run(tmp_path / f"cut{size}", source)
        assert without_times(tmp_path / f"cut{size}") == without_times(tmp_path / "whole")


def test_records_become_documents(tmp_path):
    """The tokens decode to every text of every format, complete and exactly once."""
    source = records(tmp_path / "corpus")
    manifest = run(tmp_path / "out", source)
    codec = tokenizers.load(tmp_path / "out" / "tokenizer")
    found = []
    for split in ("train", "val"):
        starts = np.fromfile(tmp_path / "out" / f"{split}.documents.bin", "<u8").astype(int)
        for ids in np.split(tokens(tmp_path / "out", split), starts[1:]):
            assert ids[-1] == manifest.eos_id
            found.append(codec.decode(ids[:-1]))
    expected = [text for word in ("plain", "gz", "zst", "row") for text in texts_of(word)]
    assert sorted(found) == sorted([*expected, PROSE, PROSE.upper()])


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
    """What the errors advise must help: the same request says what is wrong, and --overwrite repairs it."""
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


def test_two_processes_do_not_prepare_one_dataset(folder, tmp_path):
    """The second process names the first one and changes nothing; the lock of a dead process is free."""
    holder = subprocess.Popen(
        [sys.executable, "-c", KILLED.replace("signal.SIGKILL", "signal.SIGSTOP"), tmp_path / "out", folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        before = contents(tmp_path / "out.partial")
        with pytest.raises(DataError, match=rf"being written by .* process {holder.pid}"):
            run(tmp_path / "out", folder)
        assert contents(tmp_path / "out.partial") == before
    finally:
        holder.kill()
        holder.wait()
    run(tmp_path / "out", folder)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from launch import cli, prepare
cli.run(prepare.main)
"""


@pytest.mark.parametrize(
    ("limit", "units_done"), [(1000, 0), (1_000_000, 0), (7_000_000, 2)], ids=["tokenizer", "units", "shards"]
)
def test_a_disk_that_fills_up_leaves_no_dataset_and_the_same_command_goes_on(limit, units_done, tmp_path):
    """Real writes fail: those of the tokenizer, of a unit or of the merge. The four texts of 3 MB make two units."""
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("".join(map(chr, range(32, 1000))) * 1600)
    out = tmp_path / "out"
    argv = [sys.executable, "-c", FULL, str(limit), f"--source={tmp_path}/*.txt", f"--out={out}"]
    failed = subprocess.run(
        argv, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=60
    )
    assert failed.returncode == 3, failed
    assert failed.stderr.count("\n") == 1 and "File too large" in failed.stderr and "same command" in failed.stderr
    assert not out.exists()
    assert len(list((tmp_path / "out.partial" / "units").glob("*.json"))) == units_done
    run(out, tmp_path / "*.txt")
    run(tmp_path / "undisturbed", tmp_path / "*.txt")
    assert without_times(out) == without_times(tmp_path / "undisturbed")


def prepare_stdin(raw: bytes, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.prepare", "--source=-", *argv]
    return subprocess.run(command, cwd=ROOT, input=raw, capture_output=True, timeout=60)


def test_standard_input(tmp_path):
    out = tmp_path / "out"
    raw = json_lines("piped")
    done = prepare_stdin(raw, f"--out={out}", "--stdin_format=jsonl", "--count_duplicates")
    assert done.returncode == 0, done
    assert b"60 documents occurred before" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sum(s.documents for s in formats.read_manifest(out).splits.values()) == 60
    before = contents(out)
    again = prepare_stdin(raw, f"--out={out}", "--stdin_format=jsonl", "--count_duplicates")
    assert again.returncode == 0 and b"exists already" in again.stdout and contents(out) == before
    other = prepare_stdin(raw + b'{"text": "more"}\n', f"--out={out}", "--stdin_format=jsonl")
    assert other.returncode == 3 and b"--overwrite" in other.stderr and contents(out) == before
    assert prepare_stdin(b"", f"--out={tmp_path / 'none'}").returncode == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_wrong_is_said_at_the_end(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(json_lines("x") + b'{"text": ""}\nbroken\n{"text": "a\\u0000b"}\n')
    argv = [sys.executable, "-m", "launch.prepare", f"--source={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out'}"]
    stopped = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert stopped.returncode == 3 and "line 62" in stopped.stderr and stopped.stderr.count("\n") == 1
    done = subprocess.run([*argv, "--bad_records=skip"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done
    for line in ("empty document: 1, first in", "broken JSON: 1, first in", "NUL characters: 1, first in"):
        assert line in done.stdout
    summary = pipeline.read_summary(tmp_path / "out")
    assert summary["documents"] == 61 and sum(summary["problems"]["counts"].values()) == 3


@pytest.mark.parametrize("size", [40, 1 << 20])
def test_long_texts_are_compared_as_wholes(tmp_path, monkeypatch, size):
    """The pieces in which texts are read do not matter. Some texts are copies, one is compressed, and one is longer."""
    (tmp_path / "texts").mkdir()
    for name, text in {"a": "word " * 40, "b": "word " * 41, "c": "word " * 40, "d": "word", "e": "word"}.items():
        (tmp_path / f"texts/{name}.txt").write_text(text)
    (tmp_path / "texts/f.txt.gz").write_bytes(gzip.compress(b"word " * 40))
    monkeypatch.setattr(documents, "UNIT_BYTES", size)
    run(tmp_path / "out", tmp_path / "texts", "byte", count_duplicates=True)
    assert pipeline.read_summary(tmp_path / "out")["duplicates"] == 3


@pytest.mark.parametrize("names", [[""], ["a", "a"], ["\ud800"]])
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
def test_names_of_special_tokens_are_checked_for_every_tokenizer(file, tmp_path, tokenizer, names):
    with pytest.raises(DataError, match="special token"):
        run(tmp_path / "out", file, tokenizer, special_tokens=names)


def test_invalid_records_are_refused_for_the_byte_tokenizer_too(tmp_path):
    """JSON is decoded whatever the tokenizer is, so bytes in it that are not UTF-8 are replaced."""
    (tmp_path / "in.jsonl").write_bytes('{"text": "né é"}\n'.encode("latin-1") * 50)
    with pytest.raises(DataError, match="--max_invalid"):
        run(tmp_path / "out", tmp_path / "in.jsonl", "byte")
    assert run(tmp_path / "out", tmp_path / "in.jsonl", "byte", max_invalid=0.5)


def test_duplicates_are_counted_and_kept(tmp_path, monkeypatch):
    texts = [f"text {n % 10}" for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    monkeypatch.setattr(documents, "UNIT_BYTES", 100)
    manifest = run(tmp_path / "out", tmp_path / "in.jsonl", count_duplicates=True, val_fraction=0.4)
    assert pipeline.read_summary(tmp_path / "out")["duplicates"] == 20
    assert sum(s.documents for s in manifest.splits.values()) == 30
    # All copies of a text are on one side of the split: validation uses no text that was trained on.
    codec = tokenizers.load(tmp_path / "out" / "tokenizer")
    sides = [set(codec.decode(tokens(tmp_path / "out", s)).split("<eos>")) - {""} for s in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10


def test_a_tokenizer_that_changed_under_its_name_is_noticed(file, tmp_path):
    for size in (300, 290):
        made = tokenizers.make(f"bpe:{size}", [POEM])
        (tmp_path / "tokenizer.json").write_bytes(made.file()[1])
        if size == 300:
            run(tmp_path / "out", file, str(tmp_path / "tokenizer.json"))
            run(tmp_path / "out", file, str(tmp_path / "tokenizer.json"))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"a tokenizer that differs from .*--overwrite"):
        run(tmp_path / "out", file, str(tmp_path / "tokenizer.json"))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("spec", ["bpe:300", "bpe:300:llama3"])
def test_bpe_is_trained_and_the_result_does_not_depend_on_the_workers(spec, tmp_path, monkeypatch):
    source = records(tmp_path / "corpus")
    monkeypatch.setattr(documents, "UNIT_BYTES", 1000)
    manifest = run(tmp_path / "one", source, spec)
    monkeypatch.setattr(pipeline, "INLINE_BYTES", 0)
    run(tmp_path / "three", source, spec, workers=3)
    assert without_times(tmp_path / "one") == without_times(tmp_path / "three")
    codec = tokenizers.load(tmp_path / "one" / "tokenizer")
    assert manifest.vocab_size == codec.vocab_size == 300 and manifest.eos_id == codec.eos_id == 299
    text = "".join(codec.decode(tokens(tmp_path / "one", split)) for split in ("train", "val"))
    expected = [t for word in ("plain", "gz", "zst", "row") for t in texts_of(word)] + [PROSE, PROSE.upper()]
    assert sorted(text.split("<|endoftext|>")[:-1]) == sorted(expected)


def test_a_text_that_spells_the_end_of_text_does_not_end_a_document(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one <|endoftext|> still one"}\n{"text": "two"}\n' * 20)
    manifest = run(tmp_path / "out", tmp_path / "in.jsonl", "bpe:280", val_fraction=0.0)
    ids = tokens(tmp_path / "out", "train")
    assert (ids == manifest.eos_id).sum() == manifest.splits["train"].documents == 40


def test_text_that_names_a_tokenizer_of_another_dataset_is_compared_by_content(file, tmp_path):
    """A char or byte tokenizer is stored only in meshlm_tokenizer.json; its content is compared as well."""
    run(tmp_path / "a", file)
    run(tmp_path / "b", file, str(tmp_path / "a"))
    assert run(tmp_path / "b", file, str(tmp_path / "a")) == formats.read_manifest(tmp_path / "b")
    file.write_text(POEM + "ß")
    run(tmp_path / "a", file, overwrite=True)
    before = contents(tmp_path / "b")
    with pytest.raises(DataError, match="a tokenizer that differs"):
        run(tmp_path / "b", file, str(tmp_path / "a"))
    assert contents(tmp_path / "b") == before


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_tokenizer_that_changed_before_a_run_resumes(kind, folder, tmp_path):
    """Units that were encoded with the old tokenizer are not used with the new one."""
    given = tmp_path / "given"

    def give(number: int) -> None:
        codec = tokenizers.make(f"bpe:{300 - number}", [POEM], eos=True)
        if kind == "char":
            codec = tokenizers.make(
                "char", [POEM, *(p.read_text() for p in folder.iterdir()), "xyz"[:number]], eos=True
            )
        tokenizers.save(codec, given)

    give(0)
    code = KILLED.replace('"char"', repr(str(given)))
    argv = [sys.executable, "-c", code, tmp_path / "out", folder]
    subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert (tmp_path / "out.partial/units/000002.json").exists()
    give(3)
    run(tmp_path / "out", folder, str(given), val_fraction=0.3)
    run(tmp_path / "undisturbed", folder, str(given), val_fraction=0.3)
    assert without_times(tmp_path / "out") == without_times(tmp_path / "undisturbed")


def change_by_move(path: pathlib.Path) -> None:
    """Replaces a file as `mv new path` does, with the same size and time."""
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b" x ", b" y "))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def change_in_place(path: pathlib.Path) -> None:
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b" x ", b" y "))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_the_length(path: pathlib.Path) -> None:
    with path.open("a") as f:
        f.write('{"text": "more"}')


CHANGES = [change_by_move, change_in_place, change_the_length, pathlib.Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:270"])
def test_a_source_that_changes_while_it_is_read_is_an_error(tokenizer, change, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_bytes(json_lines("x"))
    monkeypatch.setattr(documents, "UNIT_BYTES", 1000)
    done, at = [], "reading" if tokenizer == "char" else "encoding"

    def progress(stage: str, *_: int) -> None:
        done.append(stage)
        if done.count(at) == 1 and stage == at:
            change(source)

    with pytest.raises(DataError, match=r"in\.jsonl(:| was changed or replaced)"):
        run(tmp_path / "out", source, tokenizer, progress=progress)
    assert not (tmp_path / "out").exists()
    if change is not pathlib.Path.unlink:
        monkeypatch.undo()
        run(tmp_path / "out", source, tokenizer)
        run(tmp_path / "undisturbed", source, tokenizer)
        assert without_times(tmp_path / "out") == without_times(tmp_path / "undisturbed")


EMPTY = {
    "blank.jsonl": b"\n \n\n",
    "texts.jsonl": b'{"text": ""}\n' * 3,
    "broken.jsonl": b"broken\n" * 3,
}


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:260"])
@pytest.mark.parametrize("name", [*EMPTY, "rows.parquet", "groups.parquet"])
def test_a_corpus_without_a_token_is_an_error(name, tokenizer, tmp_path):
    source = tmp_path / name
    if name == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), source)
    elif name == "groups.parquet":
        pyarrow.parquet.ParquetWriter(source, pyarrow.schema([("text", pyarrow.string())])).close()
    else:
        source.write_bytes(EMPTY[name])
    for duplicates in (False, True):
        with pytest.raises(DataError, match="text"):
            run(tmp_path / "out", source, tokenizer, bad_records="skip", count_duplicates=duplicates)
        assert not (tmp_path / "out").exists()


def test_text_of_which_all_validates_is_an_error(tmp_path):
    (tmp_path / "in.txt").write_text("a")
    with pytest.raises(DataError, match="are for validation"):
        run(tmp_path / "out", tmp_path / "in.txt", "byte", val_fraction=0.5)


@pytest.mark.parametrize(
    ("records", "fraction", "expected"),
    [(3, 0.001, "there is no validation text"), (400, 0.1, ""), (3, 0.0, ""), (1, 0.1, "there is no validation text")],
)
def test_a_split_far_from_what_was_asked_for_is_said(records, fraction, expected, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "a text {i}"}}\n' for i in range(records)))
    notices = pipeline.notices(run(tmp_path / "out", tmp_path / "in.jsonl", "byte", val_fraction=fraction))
    assert len(notices) == bool(expected) and expected in str(notices)


def test_a_split_of_unequal_documents_is_said(tmp_path):
    lines = [json.dumps({"text": f"{i} " * (100000 if i == 7 else 1)}) for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    manifest = run(tmp_path / "out", tmp_path / "in.jsonl", "byte", val_fraction=0.3)
    assert "of the text is for validation although --val_fraction is 0.3" in pipeline.notices(manifest)[0]


def test_a_corpus_that_is_not_utf8_is_refused_and_may_be_taken(tmp_path):
    (tmp_path / "in.txt").write_bytes("né, ".encode("latin-1") * 100)
    with pytest.raises(DataError, match=r"25\.000% .*first in .*in\.txt.* --max_invalid=0\.25 \(the byte tokenizer"):
        run(tmp_path / "out", tmp_path / "in.txt", format="text")
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", tmp_path / "in.txt", format="text", max_invalid=0.25)
    assert run(tmp_path / "bytes", tmp_path / "in.txt", "byte", format="text")


def test_a_dataset_of_a_version_that_knew_fewer_settings_is_found(file, tmp_path):
    run(tmp_path / "out", file)
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["request"]["format"]
    path.write_text(json.dumps(manifest))
    assert run(tmp_path / "out", file) == formats.read_manifest(tmp_path / "out")


def test_what_was_left_out_is_said(folder, tmp_path):
    (folder / "none.txt").touch()
    (folder / ".hidden").write_text("x")
    argv = [sys.executable, "-m", "launch.prepare", f"--source={folder}", f"--out={folder / 'out'}"]
    done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and "hidden file or folder, left out: 1" in done.stdout, done
    assert pipeline.read_summary(folder / "out")["left_out"]["counts"] == {
        "empty file, left out": 1,
        "hidden file or folder, left out": 1,
    }
    again = subprocess.run([*argv, "--overwrite"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert again.returncode == 0 and again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]


@pytest.mark.parametrize("change", ["appended", "added", "removed", "same size"])
def test_a_finished_dataset_is_not_the_same_when_its_source_has_changed(folder, tmp_path, change):
    run(tmp_path / "out", folder)
    before = contents(tmp_path / "out")
    one = folder / "1.txt"
    if change == "appended":
        one.write_text(one.read_text() + "more")
    elif change == "added":
        (folder / "new.txt").write_text("one more")
    elif change == "removed":
        one.unlink()
    else:
        one.write_text(one.read_text().swapcase())
        os.utime(one, ns=(0, 0))
    with pytest.raises(DataError, match="files that differ"):
        run(tmp_path / "out", folder)
    folder.rename(tmp_path / "moved away")
    run(tmp_path / "out", folder)
    assert contents(tmp_path / "out") == before


def test_files_named_as_held_out_are_trained_on_and_it_is_said(tmp_path, caplog):
    source = tmp_path / "test"
    (source / "dev").mkdir(parents=True)
    for name in ("train.jsonl", "validation.jsonl", "test-00000-of-00001.jsonl", "dev/a.jsonl", "contest.jsonl"):
        (source / name).write_text(json.dumps({"text": name}))
    manifest = run(tmp_path / "out", source)
    assert sum(split.documents for split in manifest.splits.values()) == 5
    (warning,) = caplog.messages
    assert all(part in warning for part in ("WARNING: 3 file(s)", "dev/a.jsonl", "test-00000", "validation", "a glob"))
    caplog.clear()
    run(tmp_path / "one", source / "test-00000-of-00001.jsonl", val_fraction=0)
    run(tmp_path / "named", source / "t*n.jsonl", val_fraction=0)
    assert not caplog.messages
