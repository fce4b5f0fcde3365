"""One small tokenizer of each family, trained on a few words: all kinds of tokenizer.json, and SentencePiece models."""

import functools
import io
import json
from collections.abc import Callable

import sentencepiece
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.tokenizers.base import Tokenizer
from data.tokenizers.hf_json import JsonTokenizer, train_bpe
from data.tokenizers.sentencepiece_file import PieceTokenizer
from tests.texts import CORPUS

SPECIALS = ["<unk>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
WORDS = [*CORPUS, "Straße naïve  two\n\n\tx1 ÀÉ e\u0301 日本語日本語東京東京\n" * 3, "the  end. \n \n" * 3]


def of_json(model, trainer, normalizer=None, before=None, decoder=None) -> JsonTokenizer:
    tokenizer = library.Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if before:
        tokenizer.pre_tokenizer = before
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(WORDS, trainer)
    return JsonTokenizer(tokenizer.to_str().encode())


def bpe(**options) -> JsonTokenizer:
    spec = json.loads(train_bpe(WORDS, 400).file()[1])
    return JsonTokenizer(json.dumps(spec | options).encode())


def llama2() -> JsonTokenizer:
    """▁ stands for a space, one is put before each text, and there is no splitting into words: any characters may
    merge."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return of_json(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *BYTES], show_progress=False),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(steps),
    )


def unigram() -> JsonTokenizer:
    """Like T5's tokenizer: it normalises text, merges repeated spaces, and puts one before each text."""
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    before = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(library.Regex(" {2,}"), " ")])
    return of_json(models.Unigram(), trainer, before, pre_tokenizers.Metaspace(), decoders.Metaspace())


def unigram_without_words() -> JsonTokenizer:
    before = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    return of_json(models.Unigram(), trainer, None, before, decoders.Metaspace())


def word_piece() -> JsonTokenizer:
    return of_json(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )


def word_level() -> JsonTokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=SPECIALS, show_progress=False)
    return of_json(models.WordLevel(unk_token="<unk>"), trainer, normalizers.Strip(), pre_tokenizers.Whitespace())


def sentence_piece(**options) -> PieceTokenizer:
    model = io.BytesIO()
    lines = [line for text in WORDS for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
    )
    return PieceTokenizer(model.getvalue())


AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "bpe": bpe,
    "bpe-nfc": functools.partial(bpe, normalizer={"type": "NFC"}),
    "bpe-prefix-space": functools.partial(bpe, pre_tokenizer=PREFIX),
    "bpe-no-words": functools.partial(bpe, pre_tokenizer=PREFIX | {"add_prefix_space": False, "use_regex": False}),
    "llama2": llama2,
    "unigram": unigram,
    "unigram-no-words": unigram_without_words,
    "word-piece": word_piece,
    "word-level": word_level,
    "sp-unigram": functools.partial(sentence_piece, vocab_size=160),  # the defaults of spm_train
    "sp-bpe": functools.partial(sentence_piece, vocab_size=400, model_type="bpe", byte_fallback=True, **AS_IT_IS),
    "sp-no-words": functools.partial(sentence_piece, vocab_size=200, split_by_whitespace=False, **AS_IT_IS),
    "sp-suffix": functools.partial(sentence_piece, vocab_size=160, treat_whitespace_as_suffix=True),
}


@functools.cache
def make(family: str) -> Tokenizer:
    return FAMILIES[family]()
