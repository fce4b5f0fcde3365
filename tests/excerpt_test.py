"""Protects the text a tokenizer is trained on: all of a small corpus, parts from everywhere of a large one."""

import gzip
import itertools
import json

from data import corpus, documents, excerpt


def texts(folder, max_bytes: int = excerpt.BYTES) -> list[str]:
    files = corpus.find(str(folder), folder)
    return list(excerpt.texts(documents.plan(files), documents.Reading(), documents.Problems(), max_bytes))


def test_all_of_a_small_corpus_whatever_its_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n" + json.dumps({"text": "three"}))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four"))
    assert [text for text in texts(tmp_path) if text] == ["one", "two", "three", "four"]


def test_parts_of_a_large_one_are_spread_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 100)
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 50)
    some = [int(text[:2]) for text in texts(tmp_path, 500)]
    assert 5 <= len(some) <= 6 and some == sorted(some) and some[-1] >= 40
    assert max(b - a for a, b in itertools.pairwise(some)) <= 10
    assert len(texts(tmp_path, 5000)) == 50
