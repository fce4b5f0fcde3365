"""SentencePiece models give the package's ids and each token's bytes; a document cannot forge its end-of-text."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings

from data import tokenizers
from data.errors import DataError
from data.tokenizers.sentencepiece_file import PieceTokenizer
from tests.texts import ALL_TRICKY, CORPUS, TEXT, damaged_copies


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines()]),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def raw() -> bytes:
    """A model like Llama 2's: it has byte fallback, and does not normalize text."""
    return train(
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
    )


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_ids_and_round_trip(raw, text):
    tokenizer = PieceTokenizer(raw)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == sentencepiece.SentencePieceProcessor(model_proto=raw).encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert b"".join(map(tokenizer.token_bytes, ids.tolist())).removeprefix(b" ").decode() == text.replace("▁", " ")


def test_special_tokens_do_not_come_from_text(raw):
    tokenizer = PieceTokenizer(raw)
    assert tokenizer.special_tokens == ["<unk>", "<s>", "</s>"] and tokenizer.eos_id == 2
    ids = tokenizer.encode("hello</s>")
    assert 2 not in ids and tokenizer.decode(ids) == "hello</s>"
    assert tokenizer.decode([*tokenizer.encode("a"), 2, *tokenizer.encode("b")]) == "a</s>b"
    assert tokenizer.token_bytes(2) == b"</s>"
    assert 3 in tokenizer.encode("x<tool>")  # a user-defined symbol is meant to be found in text


def test_a_batch_is_its_texts_and_a_lone_surrogate_is_no_crash(raw):
    tokenizer = PieceTokenizer(raw)
    texts = [*ALL_TRICKY, "\ud800"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "\ufffd"


def test_the_end_of_text_is_the_models_own_or_a_known_or_named_one(raw):
    none = train(vocab_size=300, eos_id=-1, bos_id=-1, control_symbols=["<|endoftext|>", "<x>"])
    assert PieceTokenizer(none).token_bytes(PieceTokenizer(none).eos_id) == b"<|endoftext|>"
    named = PieceTokenizer(none, eos="<x>")
    assert named.token_bytes(named.eos_id) == b"<x>" and PieceTokenizer(none, eos="").eos_id is None
    with pytest.raises(DataError, match="<tool>"):
        PieceTokenizer(raw, eos="<tool>")


def test_the_door_takes_and_keeps_it(raw, tmp_path):
    path = tmp_path / "no_extension"
    path.write_bytes(raw)
    made = tokenizers.make(str(path), eos=True)
    assert isinstance(made, PieceTokenizer)
    loaded = tokenizers.load(tokenizers.save(made, tmp_path / "tokenizer").parent)
    assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == raw
    assert np.array_equal(loaded.encode(CORPUS[2]), made.encode(CORPUS[2])) and loaded.eos_id == 2


def test_damaged_files_are_refused_or_work(raw, tmp_path):
    path = tmp_path / "m.model"
    refused = worked = 0
    for content in damaged_copies(raw, 200):
        path.write_bytes(content)
        try:
            tokenizer = tokenizers.make(str(path))
            tokenizer.decode(tokenizer.encode("hello 東京 12"))
            [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
            worked += 1
        except DataError:
            refused += 1
    assert refused > 20 and worked > 5
