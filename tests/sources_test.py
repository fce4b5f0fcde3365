"""Several sources in one run: one vocabulary, weights that may change, validation of each, and a kill and resume."""

import itertools
import json
import os
import pathlib
import random
import signal
import struct
import time

import numpy as np
import pytest

from data import sources, tokenizers
from data.config import DataConfig
from data.errors import DataError
from data.preparation.pipeline import prepare_dataset
from data.token_files import formats
from tests import runs

WORDS = runs.text(12_000)


def llmc(path: pathlib.Path, ids: np.ndarray) -> pathlib.Path:
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, len(ids)
    path.write_bytes(head.tobytes() + ids.astype("<u2").tobytes())
    return path


def megatron(path: pathlib.Path, documents: list[np.ndarray]) -> pathlib.Path:
    """Writes documents as megatron-core's IndexedDatasetBuilder does: one int32 sequence per document."""
    path.write_bytes(b"".join(ids.astype("<i4").tobytes() for ids in documents))
    lengths = np.array([len(ids) for ids in documents], "<i4")
    offsets = (np.cumsum([0, *lengths[:-1]]) * 4).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
    borders = np.arange(len(lengths) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + offsets.tobytes() + borders.tobytes())
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> pathlib.Path:
    """A folder with a freshly prepared BPE dataset, an llm.c shard and a Megatron file of the same vocabulary."""
    folder = tmp_path_factory.mktemp("sources")
    lines = WORDS.splitlines()
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare_dataset(folder / "fresh", source=str(folder / "in.jsonl"), tokenizer="bpe:300", val_fraction=0.2)
    codec = tokenizers.load(folder / "fresh" / "tokenizer")
    upper = [np.append(codec.encode(line.upper()), codec.eos_id) for line in lines]
    titled = [np.append(codec.encode(line.title()), codec.eos_id) for line in lines]
    llmc(folder / "upper_train.bin", np.concatenate(upper[20:]))
    llmc(folder / "upper_val.bin", np.concatenate(upper[:20]))
    megatron(folder / "titled.bin", titled)
    return folder


def path_of(three: pathlib.Path) -> str:
    return ",".join(str(three / name) for name in ("fresh", "upper_*.bin", "titled.idx"))


def open_(path: str, vocab_size: int = 0, **fields) -> sources.Sources:
    return sources.open_sources(DataConfig(path=path, **fields), vocab_size)


def test_prepared_data_and_files_of_other_programs_share_its_tokenizer(three):
    found = open_(path_of(three))
    assert list(found.datasets) == ["fresh", "upper", "titled"]
    codec = found.load_tokenizer()
    assert codec is not None and found.vocab_size == codec.vocab_size and found.eos_id() == codec.eos_id
    assert list(found.files("val")) == ["fresh", "upper"]
    assert [f.shards[0].dtype for f in found.files("train").values()] == ["<u2", "<u2", "<u4"]
    text = codec.decode(found.files("train")["titled"].shards[0][:40])
    assert text.startswith(WORDS.title()[:20])


def test_the_fingerprint_follows_tokens_and_order_but_not_weights_or_folders(three, tmp_path):
    one = open_(path_of(three)).fingerprint()
    assert one == open_(path_of(three), weights="1,2,3").fingerprint()
    reordered = ",".join(reversed(path_of(three).split(",")))
    assert one != open_(reordered).fingerprint()
    alone = open_(str(three / "fresh"))
    # The fingerprint of a single source is that of its manifest.
    assert alone.fingerprint() == formats.read_manifest(three / "fresh").fingerprint()


def test_other_tokenizers_are_refused(three, tmp_path):
    prepare_dataset(tmp_path / "chars", source=str(three / "in.jsonl"), tokenizer="char")
    with pytest.raises(DataError, match=r"chars was prepared with another tokenizer than .*fresh") as e:
        open_(f"{three / 'fresh'},{tmp_path / 'chars'}")
    assert f"--tokenizer={three / 'fresh'}" in str(e.value)
    prepare_dataset(tmp_path / "same", source=str(three / "in.jsonl"), tokenizer=str(three / "fresh"), val_fraction=0.5)
    assert open_(f"{three / 'fresh'},{tmp_path / 'same'}").vocab_size == open_(str(three / "fresh")).vocab_size


def test_ids_beyond_the_vocabulary_of_the_others_are_refused(three, tmp_path):
    llmc(tmp_path / "large.bin", np.arange(5000))
    with pytest.raises(DataError, match=r"token id 4999 in .*large\.bin is outside the vocabulary"):
        open_(f"{three / 'fresh'},{tmp_path / 'large.bin'}")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"weights": "1,1"}, ["2 weights", "3 sources"]),
        ({"weights": "1,1,0.0001"}, ["less than one of the 2048"]),
        ({"val_path": "x.bin"}, ["data.val_path has 1 values", "3 sources"]),
        ({"dtype": "uint16,uint16"}, ["data.dtype has 2 values"]),
    ],
)
def test_fields_that_do_not_fit_the_sources(fields, parts, three):
    with pytest.raises(DataError) as e:
        open_(path_of(three), **fields)
    for part in parts:
        assert part in str(e.value)


def test_a_file_trains_in_one_source_and_validates_in_none_other(three, tmp_path):
    """The file's name does not matter: it may match another glob, be in a linked folder, or validate another source."""
    (tmp_path / "link").symlink_to(three)
    (tmp_path / "hard_val.bin").hardlink_to(three / "upper_train.bin")
    upper, link = f"{three}/upper_*.bin", tmp_path / "link"
    more, other = llmc(tmp_path / "more.bin", np.arange(999) % 250), megatron(tmp_path / "other.bin", [np.arange(99)])
    for path, val_path in (
        (f"{upper},{link}/upper_t*.bin", ""),
        (f"{three}/fresh,{link}/fresh", ""),
        (f"{three}/titled.bin,{other}", f",{link}/titled.bin"),
        (f"{three}/upper_train.bin,{more}", f",{tmp_path}/hard_val.bin"),
    ):
        with pytest.raises(DataError, match="are the same file, which"):
            open_(path, 300, val_path=val_path)
    twice = f"{three}/upper_val.bin,{link}/upper_val.bin"  # a file may validate both sources
    assert open_(f"{more},{three}/upper_train.bin", 300, val_path=twice)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("datasets/books", "books"),
        ("datasets/books/", "books"),
        ("tokens/fineweb_train_*.bin", "fineweb_train"),
        ("tokens/*.bin", "tokens"),
        ("megatron.idx", "megatron"),
        ("/", "/"),
    ],
)
def test_names_of_sources_for_metrics(path, name):
    assert sources._name(path) == name


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["wiki/train_*.bin", "books/train_*.bin"], ["wiki-train", "books-train"]),
        (["en/dataset", "de/dataset", "other"], ["en-dataset", "de-dataset", "other"]),
        (["/data/en/v1/x", "/data/de/v1/x"], ["en-v1-x", "de-v1-x"]),
        (["a/v1.5", "a/v1.6"], ["v1.5", "v1.6"]),
        (["wiki/*.bin", "books/wiki/*.bin"], ["wiki", "books-wiki"]),
        (["gs://one/x", "s3://two/x"], ["one-x", "two-x"]),
        (["a.bin", "a.npy"], ["a.bin", "a.npy"]),
    ],
)
def test_sources_with_one_last_name_are_told_apart_by_more_of_their_paths(paths, expected):
    assert sources.names_of(paths) == expected
    assert sources.names_of(paths[::-1]) == expected[::-1]


def test_names_are_distinct_whatever_the_paths():
    rng = random.Random(0)
    for _ in range(2000):
        parts = ["a", "b", "a.bin", "*.bin", "a-b", "v1.0", "v1.1", "é", "..", "a_*"]
        paths = list({"/".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 5))})
        try:
            names = sources.names_of(paths)
        except DataError:  # two of the paths name one place
            assert len({os.path.normpath(path) for path in paths}) < len(paths)
            continue
        assert len(set(names)) == len(paths) and all(names)
        alone = [sources._name(path) for path in paths]
        assert names == alone or len(set(alone)) < len(alone)


def test_a_comma_in_a_path_is_written_with_a_backslash(three, tmp_path):
    (tmp_path / "a,b").symlink_to(three / "fresh")
    assert list(open_(rf"{tmp_path}/a\,b").datasets) == ["a,b"]
    assert list(open_(rf"{tmp_path}/a\,b,{three / 'upper_*.bin'}").datasets) == ["a,b", "upper"]
    with pytest.raises(DataError, match=r"with a comma in its name; write \\, for"):
        open_(f"{tmp_path}/a,b")


def test_sources_need_names_of_their_own(three):
    with pytest.raises(DataError, match="the source 'fresh' twice"):
        open_(f"{three / 'fresh'},{three / 'fresh'}")
    with pytest.raises(DataError, match="an empty source"):
        open_(f"{three / 'fresh'},")
    with pytest.raises(FileNotFoundError, match="gone"):
        open_(f"{three / 'fresh'},{three / 'gone'}")


STEPS = 80
FIELDS = {
    "num_train_steps": STEPS, "data__weights": "0.5,0.3,0.2", "data__mask_documents": "true",
    "checkpoint__every_steps": 5, "eval__every_steps": 40, "eval__num_windows": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(three, tmp_path_factory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("run") / "undisturbed"
    runs.train(run, path_of(three), **FIELDS)
    return run


def test_a_mixture_is_killed_and_goes_on_bit_for_bit(three, undisturbed, tmp_path):
    """A run on a Megatron file, an llm.c shard and a freshly prepared BPE dataset gets kill -9 after a checkpoint."""
    run = tmp_path / "run"
    process = runs.start(runs.command(run, path_of(three), **FIELDS))
    deadline = time.monotonic() + runs.TIMEOUT_S
    while not (run / "checkpoints" / "5").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(runs.rows(run)) < STEPS
    out = runs.train(run, path_of(three), **FIELDS)
    assert "Resuming after step" in out
    assert runs.losses(run) == runs.losses(undisturbed)
    last = runs.rows(run)[-1]
    assert {"val/loss", "val/loss/fresh", "val/loss/upper"} <= last.keys() and "val/loss/titled" not in last
    epochs = [row for row in runs.rows(run) if "train/epoch" in row][-1]
    assert all(epochs[f"train/epoch/{name}"] > 0 for name in ("fresh", "upper", "titled"))


def test_weights_may_change_at_a_resume_from_a_later_sample_on(three, undisturbed, tmp_path):
    run, batch = tmp_path / "run", runs.TINY["global_batch_size"]
    first = FIELDS | {"num_train_steps": 10}
    runs.train(run, path_of(three), **first)
    changed = FIELDS | {"num_train_steps": 14}
    out = runs.train(run, path_of(three), code=3, **changed | {"data__weights": "0.2,0.3,0.5"})
    assert f"sequence {10 * batch} or later" in out and "0:0.5,0.3,0.2" in out
    staged = f"0:0.5,0.3,0.2; {12 * batch}:0,0,1"
    runs.train(run, path_of(three), **changed | {"data__weights": staged})
    steps = [{row["step"]: row for row in runs.rows(r) if "train/loss" in row} for r in (run, undisturbed)]
    same = [steps[0][step]["train/loss"] == steps[1][step]["train/loss"] for step in (11, 12, 13)]
    assert same == [True, True, False]
    epochs = [[steps[0][step][f"train/epoch/{name}"] for step in (12, 14)] for name in ("fresh", "titled")]
    assert epochs[0][0] == epochs[0][1] and epochs[1][0] < epochs[1][1]
    assert all(a <= b for a, b in itertools.pairwise(epochs[1]))
