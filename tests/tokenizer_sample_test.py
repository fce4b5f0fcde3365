"""The text that a tokenizer is trained on: all of a small corpus, or parts from everywhere in a large one."""

import gzip
import itertools
import json
import random

import zstandard

from data.preparation import corpus, documents, tokenizer_sample


def texts(folder, max_bytes: int = tokenizer_sample.BYTES) -> list[str]:
    files = corpus.find_files(str(folder), folder).files
    return list(
        tokenizer_sample.texts(documents.plan_units(files), documents.ReadOptions(), documents.InputErrors(), max_bytes)
    )


def test_all_of_a_small_corpus_whatever_its_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n" + json.dumps({"text": "three"}))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four"))
    assert texts(tmp_path) == ["one", "two", "three", "four"]


def test_parts_of_a_large_one_are_spread_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 100)
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 50)
    some = [int(text[:2]) for text in texts(tmp_path, 500)]
    assert 5 <= len(some) <= 6 and some == sorted(some) and some[-1] >= 40
    assert max(b - a for a, b in itertools.pairwise(some)) <= 10
    assert len(texts(tmp_path, 5000)) == 50


def test_all_of_what_fits_although_its_files_are_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 300)
    sizes = [1, 299, 2, 1000, 3, 298, 1, 1]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    for budget in (sum(sizes), 2000, 10_000):
        assert sum(map(len, texts(tmp_path, budget))) == sum(sizes)


def test_a_compressed_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    """A compressed file is one unit, however large; the sample is counted in bytes of text for any kind of file."""
    monkeypatch.setattr(documents, "UNIT_BYTES", 10_000)
    lines = [f"{i} {random.Random(i).random()} wörd\n" for i in range(20_000)]
    text = "".join(lines).encode()
    record = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    for name, raw in (
        ("a.txt.gz", gzip.compress(text)),
        ("b.txt.zst", zstandard.compress(text)),
        ("c.jsonl.gz", gzip.compress(record)),
        ("d.jsonl.zst", zstandard.compress(record)),
        ("e.jsonl", record),
        ("f.txt", text),
    ):
        (tmp_path / name).write_bytes(raw)
        taken = "".join(texts(tmp_path, 100_000)).encode()
        assert 90_000 < len(taken) < 130_000
        if not name.endswith((".jsonl", ".txt")):
            (tmp_path / name).write_bytes(raw[: len(raw) // 2])  # damage beyond the sample is not read
            assert "".join(texts(tmp_path, 100_000)).encode() == taken
        (tmp_path / name).unlink()
