""".tiktoken files: their ids, their special tokens, and that any kind of text can be encoded."""

import base64

import numpy as np
import pytest
import tiktoken_ext.openai_public as public
from hypothesis import given, settings

from data import tokenizers
from data.errors import DataError
from data.tokenizers import ranks, tiktoken_file
from data.tokenizers.hf_json import JsonTokenizer, train_bpe
from data.tokenizers.tiktoken_file import RankTokenizer
from tests.texts import ALL_TRICKY, CORPUS, TEXT, damaged_copies


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="module", params=["gpt2", "llama3"])
def pair(request) -> tuple[JsonTokenizer, RankTokenizer]:
    """The same tokenizer as tokenizer.json and as ranks."""
    trained = train_bpe(CORPUS, 340, pattern=request.param)
    raw = lines([trained.token_bytes(i) for i in range(339)])
    return trained, RankTokenizer(raw, pattern=request.param)


def test_ids_and_special_token(pair):
    trained, tokenizer = pair
    assert tokenizer.vocab_size == 340 and tokenizer.eos_id == 339 and tokenizer.special_tokens == ["<|endoftext|>"]
    texts = [*ALL_TRICKY, "\ud800"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(ids, trained.encode(text)) and ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text.replace("\ud800", "\ufffd")
    assert tokenizer.decode([97, 339, 98]) == "a<|endoftext|>b"
    with pytest.raises(DataError, match="outside"):
        tokenizer.decode([340])


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_white_space_too_long_for_tiktoken(pair):
    trained, tokenizer = pair
    text = "a" + " " * 1_000_000 + "x"
    with pytest.raises(ValueError):
        tokenizer._encoding.encode_to_numpy(text)
    assert np.array_equal(tokenizer.encode(text), trained.encode(text))


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_ids_of_any_text(pair, text):
    trained, tokenizer = pair
    ids = tokenizer.encode(text)
    assert np.array_equal(ids, trained.encode(text)) and tokenizer.eos_id not in ids
    assert b"".join(map(tokenizer.token_bytes, ids.tolist())) == text.encode()


@pytest.mark.parametrize(
    "count, name, size, eos",
    [(50256, "gpt2", 50257, 50256), (100256, "cl100k", 100277, 100257), (128000, "llama3", 128256, 128001)],
)
def test_files_known_by_the_number_of_ranks(count, name, size, eos, tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b"\xff" + i.to_bytes(3, "big") for i in range(count - 256)]
    path = tmp_path / "tokenizer.model"  # Llama 3 names its ranks like this
    path.write_bytes(lines(tokens))
    tokenizer = tokenizers.make(str(path), eos=True)
    assert isinstance(tokenizer, RankTokenizer) and tokenizer.pattern == name
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size, eos)


@pytest.mark.parametrize("name, pattern", [("gpt2", "gpt2"), ("cl100k_base", "cl100k"), ("o200k_base", "o200k")])
def test_patterns_and_special_tokens_are_those_of_tiktoken(name, pattern, monkeypatch):
    """Compares tiktoken's constants, without downloading the ranks that go with them."""
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *args, **kwargs: {})
    theirs = getattr(public, name)()
    assert ranks.PATTERNS[pattern] == theirs["pat_str"]
    assert theirs["special_tokens"] in [specials for _, specials in tiktoken_file.KNOWN.values()]


def test_llama_3_special_tokens():
    """Checks ids of llama3/tokenizer.py that are easy to get wrong."""
    ids = tiktoken_file.KNOWN[128000][1]
    assert len(ids) == 256 and list(ids.values()) == list(range(128000, 128256))
    assert ids["<|reserved_special_token_3|>"] == 128005 and ids["<|reserved_special_token_4|>"] == 128008
    assert ids["<|eot_id|>"] == 128009 and ids["<|reserved_special_token_5|>"] == 128010
    assert ids["<|reserved_special_token_250|>"] == 128255


def test_the_pattern_of_an_unknown_file_is_named_and_kept(pair, tmp_path):
    _, tokenizer = pair
    path = tmp_path / "my.tiktoken"
    path.write_bytes(tokenizer.file()[1])
    with pytest.raises(DataError, match=r"339 ranks.*my.tiktoken:PATTERN.*gpt2, cl100k, o200k, llama3"):
        tokenizers.make(str(path))
    with pytest.raises(DataError, match="pattern 'gpt9' is unknown"):
        tokenizers.make(f"{path}:gpt9")
    made = tokenizers.make(f"{path}:{tokenizer.pattern}", eos=True)
    loaded = tokenizers.load(tokenizers.save(made, tmp_path / "tokenizer").parent)
    assert (tmp_path / "tokenizer" / "ranks.tiktoken").read_bytes() == path.read_bytes()
    assert np.array_equal(loaded.encode(CORPUS[1]), tokenizer.encode(CORPUS[1])) and loaded.eos_id == 339


def test_other_files_take_no_pattern(pair, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(pair[0].file()[1])
    with pytest.raises(DataError, match=r"only a .tiktoken file"):
        tokenizers.make(f"{path}:gpt2")


BYTES = [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(
    "raw, words",
    [
        (lines(BYTES[:255]), "1 of the 256 bytes"),
        (lines([*BYTES, b"a"]), "damaged"),
        (lines(BYTES) + b"YWI= 7\n", "1 occur twice"),
        (lines(BYTES) + b"YWI= -7\n", "damaged"),
        (lines(BYTES) + b"YWI= 99999999999\n", "damaged"),
        (lines(BYTES) + b"YWI\n", "line 257"),
        (lines(BYTES) + b"Y? 256\n", "line 257"),
        (b"", "damaged"),
    ],
)
def test_a_bad_file_is_refused(raw, words):
    with pytest.raises(DataError, match=f"my.tiktoken.*{words}"):
        RankTokenizer(raw, "my.tiktoken", pattern="gpt2")


def test_damaged_files_are_refused_or_work(pair):
    refused = worked = 0
    for raw in damaged_copies(pair[1].file()[1], 200):
        try:
            tokenizer = RankTokenizer(raw, pattern="gpt2")
            assert tokenizer.decode(tokenizer.encode("hello 東京 12")) == "hello 東京 12"
            worked += 1
        except DataError:
            refused += 1
    assert refused > 20 and worked > 5
