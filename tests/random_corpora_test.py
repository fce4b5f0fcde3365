"""Datasets of random folders hold what a plain reading of the folders finds: the same documents, in the same order, on
the right side of the split, with everything else counted. Otherwise the preparation must end with one line.

    python -m tests.random_corpora_test --folders=2000 [--seed=0]
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time

import numpy as np
import pytest

from data.errors import UserError
from data.preparation import documents, encode, merge, pipeline
from tests import random_corpora
from tests.random_corpora import Corpus, Truth


@dataclasses.dataclass
class Request:
    source: str
    tokenizer: str
    split: str
    val_fraction: float
    bad_records: str
    invalid_utf8: str
    max_invalid: float


class Refused(Exception):
    """The preparation must fail with one line, for this reason."""


@dataclasses.dataclass
class Reading:
    documents: list[tuple[str, str | bytes]]  # (name of the file, text), in order
    eos: bool
    split: str
    left_out: int
    boms: int
    certain: bool


def request(rng: random.Random, corpus: Corpus) -> Request:
    folder = str(corpus.folder)
    return Request(
        source=rng.choice((folder, folder, folder + "/", folder + "/**/*", folder + "/**")),
        tokenizer=rng.choice(("byte", "char")),
        split=rng.choice(("auto", "auto", "auto", "last", "file", "document")),
        val_fraction=rng.choice((0.0, 0.1, 0.3)),
        bad_records=rng.choice(("error", "skip", "skip")),
        invalid_utf8=rng.choice(("replace", "replace", "error")),
        max_invalid=rng.choice((0.01, 0.9)),
    )


def read(corpus: Corpus, asked: Request) -> Reading:
    """Reads all files in the plainest way. Raises Refused if a preparation must fail."""
    raw, skip = asked.tokenizer == "byte", asked.bad_records == "skip"
    reading = Reading([], True, asked.split, corpus.left_out, 0, True)
    taken: list[Truth] = []
    characters = damage = 0
    for name, truth in sorted(corpus.files.items()):
        if truth.kind == "left out" or (truth.kind == "refused" and skip):
            reading.left_out += 1
            continue
        if truth.kind == "refused":
            raise Refused(f"{name!r} is not read")
        taken.append(truth)
        reading.certain &= truth.certain
        reading.boms += truth.bom
        if truth.kind == "text":
            texts: list[str | bytes | None] = [truth.raw if raw else truth.raw.decode("utf-8", "replace")]
        else:
            texts = [t.encode() if raw and t is not None else t for t in truth.records]
            if raw and truth.raw:  # the byte tokenizer takes the bytes of a column unchanged
                texts[-1] = truth.raw
        if None in texts and not skip:
            raise Refused(f"a record of {name!r} has no text")
        if truth.replaced and asked.invalid_utf8 == "error" and not (raw and (truth.kind == "text" or truth.raw)):
            raise Refused(f"{name!r} is not UTF-8")
        found = [(name, t) for t in texts if t]
        reading.documents += found
        if not (raw and (truth.kind == "text" or truth.raw)):  # in the other cases nothing is decoded
            damage += truth.replaced
        if not raw:
            damage += sum(t.count("\0") for _, t in found)
        characters += sum(len(t) for _, t in found)
    if not taken:
        raise Refused("nothing is left")
    if characters and damage / characters > asked.max_invalid:
        raise Refused("too much of it is not text")
    one_text = len(taken) == 1 and taken[0].kind == "text"
    reading.eos = not one_text
    if asked.split == "auto":
        records = any(truth.kind == "records" for truth in taken)
        reading.split = "document" if records else "last" if one_text else "file"
    return reading


def splits(corpus: Corpus, reading: Reading, asked: Request, got: dict) -> dict[str, list]:
    """The documents of both sides of the split. If the split is by whole files, `got` shows the side of each file."""
    found: dict[str, list] = {"train": [], "val": []}
    if reading.split == "last":
        cut = int(sum(len(text) for _, text in reading.documents) * (1 - asked.val_fraction))
        for _, text in reading.documents:
            before = min(max(cut, 0), len(text))
            cut -= len(text)
            found["train"] += [text[:before]] if before else []
            found["val"] += [text[before:]] if text[before:] else []
    elif reading.split == "document":
        for name, text in reading.documents:
            key = text if corpus.files[name].kind == "records" else name
            raw = key if isinstance(key, bytes) else key.encode("utf-8", "surrogateescape")
            value = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
            found["val" if value < asked.val_fraction * 2**64 else "train"].append(text)
    else:
        _whole_files(reading, asked, got, found)
    return found


def _sides(files: list[list], train: list, val: list) -> list[str] | None:
    """The side of each file; None if the two sides do not consist of complete files in order."""
    if not files:
        return None if train or val else []
    texts = files[0]
    if train[: len(texts)] == texts and (rest := _sides(files[1:], train[len(texts) :], val)) is not None:
        return ["train", *rest]
    if val[: len(texts)] == texts and (rest := _sides(files[1:], train, val[len(texts) :])) is not None:
        return ["val", *rest]
    return None


def _whole_files(reading: Reading, asked: Request, got: dict, found: dict[str, list]) -> None:
    of_file = collections.defaultdict(list)
    for name, text in reading.documents:
        of_file[name].append(text)
    files = list(of_file.values())
    sides = _sides(files, got["train"], got["val"])
    assert sides is not None, "a file is on neither side, or in part on both"
    for side, texts in zip(sides, files, strict=True):
        found[side] += texts
    if asked.val_fraction == 0:
        assert not found["val"]


def prepared(out: pathlib.Path) -> dict[str, list[str | bytes]]:
    """The documents of a dataset, read as docs/formats.md describes it."""
    manifest = json.loads((out / "manifest.json").read_text())
    spec = json.loads((out / "tokenizer/meshlm_tokenizer.json").read_text())
    found: dict[str, list] = {}
    for side, split in manifest["splits"].items():
        shards = [np.fromfile(out / shard["file"], manifest["dtype"]) for shard in split["shards"]]
        ids = np.concatenate(shards)
        assert len(ids) == split["tokens"]
        begins = np.fromfile(out / f"{side}.documents.bin", "<u8").astype(int)
        assert len(begins) == split["documents"] and (not len(begins) or begins[0] == 0)
        found[side] = []
        for begin, end in itertools.pairwise([*begins, len(ids)]):
            tokens = ids[begin:end]
            if manifest["eos_id"] is not None and len(tokens) and tokens[-1] == manifest["eos_id"]:
                tokens = tokens[:-1]
            if spec["kind"] == "byte":
                found[side].append(tokens.astype(np.uint8).tobytes())
            else:
                found[side].append("".join(spec["characters"][i] for i in tokens))
    return found


def check(seed: int, root: pathlib.Path) -> str:
    """Prepares random folder `seed` and compares. Returns 'refused' or 'prepared'."""
    rng = random.Random(seed)
    corpus = random_corpora.write(rng, root)
    asked = request(rng, corpus)
    try:
        reading = read(corpus, asked)
        refused = None
    except Refused as e:
        reading, refused = None, e
    with tiny_units(rng):
        try:
            manifest = pipeline.prepare_dataset(root / "out", **dataclasses.asdict(asked))
        except UserError as e:
            assert len(str(e)) < 3000 and not (root / "out").exists()
            assert refused or not reading.certain or not splits_have_train(corpus, reading, asked), f"refused: {e}"
            return "refused"
        assert refused is None, f"{refused}, but it was prepared"
        if not reading.certain:
            return "prepared"
        got = prepared(root / "out")
        expected = splits(corpus, reading, asked, got)
        assert got == expected, (got, expected)
        assert reading.eos == (manifest.eos_id is not None)
        summary = pipeline.read_summary(root / "out")
        assert sum(summary["left_out"]["counts"].values()) == reading.left_out, summary["left_out"]
        counts = summary["problems"]["counts"]
        assert counts.get("byte order mark, taken off", 0) == reading.boms, counts
        killed_and_resumed(rng, root, corpus, asked)
    return "prepared"


def splits_have_train(corpus: Corpus, reading: Reading, asked: Request) -> bool:
    """Whether a training token exists; a dataset without one is refused."""
    if reading.split == "file":  # if only one file has text, it may be in validation
        return len({name for name, _ in reading.documents}) > 1
    return any(splits(corpus, reading, asked, {})["train"])


class Killed(BaseException):
    pass


def killed_and_resumed(rng: random.Random, root: pathlib.Path, corpus: Corpus, asked: Request) -> None:
    """A preparation that is killed at a random unit and then started again writes the same bytes."""
    left = rng.randrange(4)

    def dying(*args, real=encode.encode_unit):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real(*args)

    real, encode.encode_unit = encode.encode_unit, dying
    try:
        pipeline.prepare_dataset(root / "again", **dataclasses.asdict(asked))
    except Killed:
        pass
    finally:
        encode.encode_unit = real
    pipeline.prepare_dataset(root / "again", **dataclasses.asdict(asked))
    first, second = (
        {p.relative_to(root / name): p.read_bytes() for p in (root / name).rglob("*") if p.is_file()}
        for name in ("out", "again")
    )
    assert first == second


class tiny_units:
    """Makes units so small that they are cut everywhere: within files, documents, lines and characters."""

    def __init__(self, rng: random.Random):
        self.values = [
            (documents, "UNIT_BYTES", rng.choice((20, 50, 200, 8 << 20))),
            (documents, "LINE_SEARCH_BYTES", rng.choice((1, 7, 30, 1 << 20))),
            (documents, "BLOCK_BYTES", rng.choice((8, 64, 1 << 16))),
            (encode, "BATCH_CHARACTERS", rng.choice((1, 30, 1000))),
            (merge, "SHARD_TOKENS", rng.choice((17, 100, 10**6))),
            (merge, "COPY_TOKENS", rng.choice((5, 1000))),
        ]

    def __enter__(self):
        self.before = [(module, name, getattr(module, name)) for module, name, _ in self.values]
        for module, name, value in self.values:
            setattr(module, name, value)

    def __exit__(self, *_):
        for module, name, value in self.before:
            setattr(module, name, value)


@pytest.mark.parametrize("first", range(0, 120, 10))
def test_a_random_folder_is_read_as_a_plain_reader_reads_it(tmp_path, first):
    for seed in range(first, first + 10):
        root = tmp_path / str(seed)
        root.mkdir()
        check(seed, root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes: collections.Counter = collections.Counter()
    start = time.monotonic()
    for seed in range(args.seed, args.seed + args.folders):
        root = pathlib.Path(tempfile.mkdtemp())
        try:
            outcomes[check(seed, root)] += 1
            shutil.rmtree(root)
        except BaseException as e:
            outcomes["differs" if isinstance(e, AssertionError) else "traceback"] += 1
            print(f"seed {seed}: {type(e).__name__} {str(e)[:600]} (kept: {root})", flush=True)
            if isinstance(e, KeyboardInterrupt):
                raise
    print(dict(outcomes), f"{time.monotonic() - start:.0f} s")
    return 1 if outcomes["differs"] + outcomes["traceback"] else 0


if __name__ == "__main__":
    sys.exit(main())
