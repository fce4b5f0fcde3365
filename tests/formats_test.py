"""Datasets on disk: later versions, too, read back what was written, and nothing else is accepted as a dataset."""

import dataclasses
import hashlib
import json
import random

import make_dataset
import numpy as np
import pytest

from data import order
from data.errors import DataError
from data.token_files import formats

TRAIN = [np.array([1, 258, 3, 4, 5]), np.array([6, 7, 999])]
VAL = [np.array([8, 9])]


@pytest.fixture
def dataset(tmp_path):
    make_dataset.write(tmp_path / "set", TRAIN, VAL, vocab_size=1000)
    return tmp_path / "set"


def open_train(folder):
    return formats.TokenFiles(folder, formats.read_manifest(folder), "train")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_and_counts_come_back(dtype, tmp_path):
    manifest = make_dataset.write(tmp_path, TRAIN, VAL, dtype=dtype)
    assert formats.read_manifest(tmp_path) == manifest
    files = formats.TokenFiles(tmp_path, manifest, "train")
    assert [shard.tolist() for shard in files.shards] == [array.tolist() for array in TRAIN]
    assert all(shard.dtype == dtype for shard in files.shards)
    assert (files.tokens, files.text_bytes) == (8, 16)
    assert [shard.tolist() for shard in formats.TokenFiles(tmp_path, manifest, "val").shards] == [[8, 9]]


FROZEN = (
    "datasets and checkpoints of earlier versions would no longer be read or recognised; if that is meant, raise "
    "formats.VERSION and say in the docs how to move on"
)
FROZEN_MANIFEST = """{
 "format": "meshlm-tokens", "version": 1, "fingerprint": "46420151cfce841f",
 "dtype": "uint16", "vocab_size": 1000, "eos_id": 999,
 "tokenizer_sha256": "5f97e3774c51edd1d63706c2ec3826c564a067794770cdab0f8c4797971cacf9",
 "splits": {
  "train": {"tokens": 4, "text_bytes": 7, "documents": 1, "shards": [
   {"file": "train-00000.bin", "tokens": 3,
    "sha256": "c967508a2e6d3f0979f9206c05358b0263ff8dc907c1e400dd787f871dd61932"},
   {"file": "train-00001.bin", "tokens": 1,
    "sha256": "2921a11f25dadaa24aa79a548e4e81508c2e5e56af2d833d65e2bcce448ce2f5"}]},
  "val": {"tokens": 0, "text_bytes": 0, "documents": 0, "shards": [
   {"file": "val-00000.bin", "tokens": 0,
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]}
 },
 "request": {"source": "input.txt"}
}"""


def test_golden_dataset_of_version_1(tmp_path):
    """The folder is written here byte by byte: little-endian shards without a header, and a manifest with its
    fingerprint."""
    (tmp_path / "manifest.json").write_text(FROZEN_MANIFEST)
    (tmp_path / "train-00000.bin").write_bytes(b"\x01\x00\x02\x01\xe7\x03")
    (tmp_path / "train-00001.bin").write_bytes(b"\x05\x00")
    (tmp_path / "val-00000.bin").write_bytes(b"")
    manifest = formats.read_manifest(tmp_path)
    assert [s.tolist() for s in formats.TokenFiles(tmp_path, manifest, "train").shards] == [[1, 258, 999], [5]], FROZEN
    assert [s.tolist() for s in formats.TokenFiles(tmp_path, manifest, "val").shards] == [[]], FROZEN
    assert manifest.fingerprint() == json.loads(FROZEN_MANIFEST)["fingerprint"], FROZEN


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], ["9 bytes", "expected 10"]),
        (lambda raw: raw[:-2], ["8 bytes", "expected 10"]),
        (lambda raw: raw + b"\0\0", ["12 bytes", "expected 10"]),
        (lambda raw: b"", ["0 bytes", "expected 10"]),
        (lambda raw: None, ["missing", "0 bytes", "expected 10"]),
        (lambda raw: raw[:4] + bytes([raw[4] ^ 1]) + raw[5:], ["right size (10 bytes)", "sha256"]),
        (lambda raw: raw[2:] + raw[:2], ["right size (10 bytes)", "sha256"]),
    ],
    ids=["a byte short", "a token short", "longer", "empty", "missing", "flipped bit", "tokens in another order"],
)
def test_a_damaged_shard_is_an_error_that_names_it_and_the_sizes(damage, says, dataset):
    path = dataset / "train-00000.bin"
    raw = damage(path.read_bytes())
    path.unlink()
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(DataError) as e:
        open_train(dataset)
    for part in (str(path), *says):
        assert part in str(e.value)
    assert e.value.exit_code == 3


def test_every_shard_is_checked(dataset):
    (dataset / "train-00001.bin").write_bytes(b"\x06\x00\x07\x00\xe6\x03")
    with pytest.raises(DataError, match=r"train-00001\.bin"):
        open_train(dataset)


def test_beyond_the_size_that_is_hashed_sizes_are_still_checked(dataset, monkeypatch):
    path = dataset / "train-00000.bin"
    raw = path.read_bytes()
    path.write_bytes(b"\xff" + raw[1:])
    monkeypatch.setattr(formats, "HASH_AT_START_BYTES", 15)  # the split has 16 bytes
    assert open_train(dataset).shards[0][0] == 255  # a split above the limit is not hashed
    path.write_bytes(raw[:-2])
    with pytest.raises(DataError, match="8 bytes, expected 10"):
        open_train(dataset)


def test_a_split_that_is_not_there_is_an_error_that_names_it(tmp_path):
    manifest = make_dataset.write(tmp_path, TRAIN)
    with pytest.raises(DataError, match="'val'"):
        formats.TokenFiles(tmp_path, manifest, "val")


def edited(change):
    def edit(raw: bytes) -> bytes:
        manifest = json.loads(raw)
        change(manifest)
        return json.dumps(manifest).encode()

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edited(lambda m: m.update(vocab_size=1001)),
        edited(lambda m: m.update(dtype="uint32")),
        edited(lambda m: m.update(eos_id=0)),
        edited(lambda m: m.update(tokenizer_sha256="1" * 64)),
        edited(lambda m: m["splits"]["train"].update(tokens=9)),
        edited(lambda m: m["splits"]["val"].update(text_bytes=1)),
        edited(lambda m: m["splits"]["train"]["shards"][0].update(sha256="1" * 64)),
        edited(lambda m: m["splits"]["train"]["shards"].pop()),
        edited(lambda m: m["splits"]["train"]["shards"].reverse()),
        edited(lambda m: m["splits"].update(train=m["splits"]["val"])),
        edited(lambda m: m.update(fingerprint="0" * 16)),
        edited(lambda m: m.pop("fingerprint")),
        edited(lambda m: m.update(version=2)),
        edited(lambda m: m.update(format="megatron")),
        edited(lambda m: m.update(more=1)),
        edited(lambda m: m.update(dtype="int8")),
        edited(lambda m: m.update(request=["--source=x"])),
        lambda raw: b'{"name": "a web app", "version": 1}',
        lambda raw: b"[]",
        lambda raw: b"3",
        lambda raw: b"",
        lambda raw: raw[:-10],
        lambda raw: b"\x80" + raw[1:],
    ],
)
def test_an_edited_cut_off_or_foreign_manifest_is_an_error_that_names_it(edit, dataset):
    path = dataset / "manifest.json"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(DataError) as e:
        formats.read_manifest(dataset)
    assert str(path) in str(e.value) and e.value.exit_code == 3


def test_no_flipped_bit_makes_another_manifest(dataset):
    """Each changed byte gives an error, or the same dataset. Fields outside the fingerprint, such as the request, may
    differ."""
    path = dataset / "manifest.json"
    raw, manifest = path.read_bytes(), formats.read_manifest(dataset)
    for i in range(len(raw)):
        for bit in (0, 7):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1 :])
            try:
                found = formats.read_manifest(dataset)
            except DataError:
                continue
            outside = {"request": {}, "files": {}, "loses_text": False}
            assert dataclasses.replace(found, **outside) == dataclasses.replace(manifest, **outside)


def leaves(node, at=()):
    """The paths to all values of a JSON tree."""
    yield at
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from leaves(node[key], (*at, key))


STRANGE = (
    None, True, 0, -1, 1.5, 10**30, float("nan"), "", "..", "../up", "/etc/passwd", "a/b", "a\0b", "\ud800", "uint32",
    [], {}, [None], {"tokens": 1}, "x" * 5000,
)  # fmt: skip


def replaced(tree, rng):
    """`tree` with one value, at any depth, replaced by a strange one."""
    *parents, last = rng.choice([at for at in leaves(tree) if at])
    node = tree
    for key in parents:
        node = node[key]
    node[last] = rng.choice(STRANGE)
    return tree


def test_fuzz_of_the_manifest(dataset):
    """A manifest that is cut, overwritten, or has a value replaced gives a DataError or the same manifest, and no other
    error."""
    rng = random.Random(0)
    path = dataset / "manifest.json"
    raw, manifest = path.read_bytes(), formats.read_manifest(dataset)
    for i in range(3000):
        at = rng.randrange(len(raw))
        changed = [
            rng.choice([raw[:at], raw[at:], raw[:at] + rng.randbytes(4) + raw[at:]]),
            raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at + 4 :],
            json.dumps(replaced(json.loads(raw), rng)).encode(),
        ]
        path.write_bytes(changed[i % 3])
        try:
            found = formats.read_manifest(dataset)
        except DataError as e:
            assert str(path) in str(e)
        else:
            outside = {"request": {}, "files": {}, "loses_text": False}
            assert dataclasses.replace(found, **outside) == dataclasses.replace(manifest, **outside)


@pytest.mark.parametrize("depth", [300, 700, 100_000])
def test_a_deeply_nested_manifest_is_an_error(depth, dataset):
    path = dataset / "manifest.json"
    raw = path.read_bytes()
    nested = b"[" * depth + b"]" * depth
    path.write_bytes(raw.replace(b'"eos_id": null', b'"eos_id": ' + nested))
    with pytest.raises(DataError, match=r"manifest\.json"):
        formats.read_manifest(dataset)


def test_a_forged_fingerprint_opens_no_file_outside_the_folder(dataset):
    """Strange values with a matching fingerprint: if the manifest is read, its files have plain names in the folder."""
    rng = random.Random(0)
    raw = (dataset / "manifest.json").read_bytes()
    read = refused = 0
    for _ in range(3000):
        tree = replaced(json.loads(raw), rng)
        outside = ("format", "version", "fingerprint", "sha256", *formats.NOT_IN_FINGERPRINT)
        content = {k: v for k, v in tree.items() if k not in outside}
        canonical = json.dumps([formats.VERSION, order.VERSION, content], sort_keys=True)
        tree["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        (dataset / "manifest.json").write_text(json.dumps(tree))
        try:
            manifest = formats.read_manifest(dataset)
            for split in manifest.splits:
                files = formats.TokenFiles(dataset, manifest, split)
                assert all(path.parent == dataset and ".." not in path.name for path in files.paths)
            read += 1
        except DataError:
            refused += 1
    assert read > 100 and refused > 1000


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "sub/x.bin", "..", ".", "", "a\0"])
def test_a_shard_is_a_plain_name(name, dataset):
    manifest = formats.read_manifest(dataset)
    split = manifest.splits["val"]
    forged = dataclasses.replace(split, shards=(dataclasses.replace(split.shards[0], file=name),))
    (dataset / "manifest.json").write_text(dataclasses.replace(manifest, splits={"val": forged}).to_json())
    with pytest.raises(DataError, match="file name"):
        formats.read_manifest(dataset)


def test_a_dataset_is_known_by_its_mark(dataset, tmp_path):
    """A dataset's manifest is recognized even if it is cut off or of another version. A file that only mentions the
    format is not recognized, because --overwrite would delete its folder."""
    path = dataset / "manifest.json"
    raw = path.read_bytes()
    for ours in (raw, raw[:60], raw.replace(b'"version": 1', b'"version": 9')):
        path.write_bytes(ours)
        assert formats.is_dataset(dataset)
    others = (
        b"",
        b"{}",
        b'{"name": "meshlm-tokens"}',
        b'{"files": ["%s"], "uses": "meshlm-tokens"}' % (b"x" * 5000),
        raw[:9],
    )
    for other in others:
        path.write_bytes(other)
        assert not formats.is_dataset(dataset)
    path.unlink()
    assert not formats.is_dataset(dataset) and not formats.is_dataset(tmp_path / "none")


def test_no_manifest_is_told_apart_from_a_bad_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        formats.read_manifest(tmp_path)


def test_fingerprint_does_not_depend_on_the_folder_or_the_request(tmp_path):
    """A copy of a dataset has the same fingerprint, so a run resumes with the copy."""
    one, other = (make_dataset.write(tmp_path / name, TRAIN, VAL) for name in ("here", "there"))
    asked = dataclasses.replace(other, request={"source": "/elsewhere", "val_fraction": 0.2})
    assert one.fingerprint() == other.fingerprint() == asked.fingerprint()
    (tmp_path / "there" / "manifest.json").write_text(asked.to_json())
    assert formats.read_manifest(tmp_path / "there").fingerprint() == one.fingerprint()


def test_fingerprint_changes_with_every_part_of_the_content(tmp_path, monkeypatch):
    manifest = make_dataset.write(tmp_path / "a", TRAIN, VAL)
    other_token = make_dataset.write(tmp_path / "b", [np.array([1, 258, 3, 4, 6]), TRAIN[1]], VAL)
    other_cut = make_dataset.write(tmp_path / "c", [np.concatenate(TRAIN)], VAL)  # the windows differ
    no_val = make_dataset.write(tmp_path / "d", TRAIN)
    replaced = [
        dataclasses.replace(manifest, **change)
        for change in ({"dtype": "uint32"}, {"vocab_size": 7}, {"eos_id": 0}, {"tokenizer_sha256": "1" * 64})
    ]
    prints = {m.fingerprint() for m in (manifest, other_token, other_cut, no_val, *replaced)}
    monkeypatch.setattr(order, "VERSION", "feistel-2")
    prints.add(manifest.fingerprint())
    monkeypatch.setattr(formats, "VERSION", 2)
    prints.add(manifest.fingerprint())
    assert len(prints) == 10


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "uint16"), (65, "uint16"), (65536, "uint16"), (65537, "uint32"), (10**6, "uint32")]
)
def test_token_dtype_holds_the_largest_id(vocab_size, dtype):
    assert formats.token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_check_ids_names_the_id_and_the_vocabulary(dataset):
    files = open_train(dataset)
    files.check_ids(np.array([0, 999], np.uint16), "here")
    files.check_ids(np.empty(0, np.uint16), "here")
    with pytest.raises(DataError, match="token id 1000 in here is outside the vocabulary of 1000"):
        files.check_ids(np.array([[5, 1000], [6, 7]], np.uint16), "here")
