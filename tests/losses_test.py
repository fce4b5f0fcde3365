"""Text that a tokenizer loses is counted, and does not make bits per byte look better."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data import tokenizers
from data.preparation import losses, pipeline
from data.preparation.losses import CHANGED, SPELLED, UNKNOWN
from data.token_files import formats
from data.tokenizers.base import Tokenizer, name_finder
from data.tokenizers.characters import CharTokenizer
from data.tokenizers.hf_json import JsonTokenizer
from tests import families, runs


def prepared(
    folder, codec: Tokenizer | str, texts: list[str], **request
) -> tuple[formats.Manifest, dict[str, int], dict]:
    """The manifest of a dataset of these documents, the number of problems of each kind, and an example of each
    kind."""
    if not isinstance(codec, str):
        tokenizers.save(codec, folder / "tokenizer")
        codec = str(folder)
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = pipeline.prepare_dataset(folder / "out", source=str(folder / "x.jsonl"), tokenizer=codec, **request)
    summary = pipeline.read_summary(folder / "out")
    assert summary["loses_text"] == any(kind in summary["problems"]["counts"] for kind in losses.LOSSES)
    assert manifest.loses_text == summary["loses_text"]
    assert formats.TokenFiles(folder / "out", manifest, "train").text_bytes == (
        0 if manifest.loses_text else manifest.splits["train"].text_bytes
    )
    return manifest, summary["problems"]["counts"], {k: v[0] for k, v in summary["problems"]["examples"].items()}


PLAIN = ["the quick fox hello\n", "naïve\n  two\n\n\tx1 ÀÉ"] * 20
KEEP_ALL = ["bpe", "bpe-nfc", "bpe-prefix-space", "bpe-no-words", "llama2", "sp-bpe"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_that_lose_text_are_told_from_those_that_do_not(family, tmp_path):
    manifest, counts, examples = prepared(tmp_path, families.make(family), PLAIN)
    lost = sum(counts.get(kind, 0) for kind in losses.LOSSES)
    assert (lost == 0) == (family in KEEP_ALL), examples
    assert sum(split.tokens for split in manifest.splits.values()) > 100


def test_text_that_is_normalised_is_counted(tmp_path):
    _, counts, examples = prepared(tmp_path, families.make("bpe-nfc"), ["e\u0301 the fox"])
    assert counts == {CHANGED: 1} and "x.jsonl" in examples[CHANGED] and r"'é the fox'" in examples[CHANGED]


def test_each_unknown_token_is_counted(tmp_path):
    _, counts, examples = prepared(tmp_path, families.make("sp-unigram"), ["the ☃ fox ☃", "the fox"] * 100)
    assert counts[UNKNOWN] == 200 and "the<unk>" in examples[UNKNOWN].replace(" ", "")


def test_characters_outside_the_vocabulary(tmp_path):
    manifest, counts, _ = prepared(tmp_path, "char", ["aaaa", "aab", "c"] * 9 + ["z"], min_frequency=2)
    assert counts == {UNKNOWN: 1} and manifest.loses_text
    kept = dataclasses.replace(manifest, loses_text=False)  # an earlier version wrote this
    assert kept.fingerprint() == manifest.fingerprint()


@pytest.mark.parametrize("codec", ["char", "byte", "bpe:300"])
def test_what_loses_nothing_is_not_decoded(codec, tmp_path, monkeypatch):
    """If a tokenizer is lossless, decoding would cost time, and its result is known."""
    monkeypatch.setattr(losses.Losses, "_compare", None)
    manifest, counts, _ = prepared(tmp_path, codec, [*PLAIN, "☃ e\u0301 \ufffd"])
    assert not counts and manifest.splits["train"].text_bytes > 0 and not manifest.loses_text


def test_names_of_special_tokens_in_text_are_counted(tmp_path):
    texts = ["a <|endoftext|> b <|endoftext|>", "<|endoftext", "<|end", "c"] * 3
    _, counts, examples = prepared(tmp_path, "bpe:300", texts)
    assert counts == {SPELLED: 6} and examples[SPELLED].endswith("('<|endoftext|>')")


def test_a_newline_that_is_a_special_token_is_counted_as_lost(tmp_path):
    """A WordPiece file may add a newline as a special token, so that the library finds it in text."""
    names = ["[UNK]", "[SEP]", "\n", "a", "b"]
    tokenizer = library.Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(names[:3])
    _, counts, _ = prepared(tmp_path, JsonTokenizer(tokenizer.to_str().encode()), ["a b", "a\nb\n\na"])
    assert counts == {SPELLED: 3, CHANGED: 1}


def test_one_character_in_sixteen_is_compared(monkeypatch):
    """Only the beginning of long texts is compared; the same characters are compared each time."""
    calls: list[str] = []
    codec = CharTokenizer("a")
    monkeypatch.setattr(CharTokenizer, "lossless", False)
    monkeypatch.setattr(codec, "encode", lambda text: calls.append(text) or [0] * len(text))
    look = losses.Losses(codec, pipeline.documents.InputErrors())
    for size in [1000] * 1000 + [10_000_000]:
        look.look(losses.Part("train", "a" * size, True, "x"), codec.encode("a")[:0])
    compared = sum(len(text) for text in calls[:]) - 1001
    assert 1_000_000 / 16 < compared < 1_000_000 / 16 + 3 * losses.COMPARED


@pytest.mark.parametrize("names", [[], ["<eos>"], ["<|a|>", "<|a|>b", "</s>", "\n", "x"]])
def test_names_are_found_as_a_plain_search_finds_them(names):
    text = "<eos> <|a|>b<|a|> </s>x\n<eo"
    expected = [name for name in names for _ in range(text.count(name)) if name != "<|a|>"]
    expected += ["<|a|>"] if "<|a|>" in names else []
    assert sorted(name_finder(names)(text)) == sorted(expected)


def test_the_command_says_that_text_is_lost(tmp_path):
    (tmp_path / "x.txt").write_text("aab" * 100 + "z")
    argv = [sys.executable, "-m", "launch.prepare", f"--source={tmp_path / 'x.txt'}", "--min_frequency=2"]
    result = subprocess.run(
        [*argv, f"--out={tmp_path / 'out'}"], cwd=runs.ROOT, text=True, capture_output=True, timeout=60
    )
    assert result.returncode == 0 and "0.33 % of the tokens are unknown" in result.stdout + result.stderr
