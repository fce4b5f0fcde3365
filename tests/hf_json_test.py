"""tokenizer.json gives the ids of the library that wrote it, with or without tiktoken; no document can forge an end of
text."""

import base64
import itertools
import json
import os
import random
import re
import signal
import threading
import time
import unicodedata

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.errors import DataError
from data.tokenizers import hf_json, ranks
from data.tokenizers.hf_json import JsonTokenizer, byte_level_json, train_bpe
from data.tokenizers.ranks import BYTE_CHARACTERS
from tests import merge_lists
from tests.texts import ALL_TRICKY, CORPUS, TEXT, damaged_copies

QUICK = settings(max_examples=100, deadline=None)
EOT = "<|endoftext|>"


def slow(tokenizer: JsonTokenizer, text: str) -> list[int]:
    """The ids of the library itself, from the unchanged file. The text must not have names of special tokens."""
    return library.Tokenizer.from_str(tokenizer.file()[1].decode()).encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["gpt2", "llama3"])
def trained(request) -> JsonTokenizer:
    return train_bpe(CORPUS, 350, pattern=request.param)


def test_a_trained_vocabulary_is_bytes_then_merges_then_special_tokens(trained):
    assert trained.vocab_size == 350 and trained.special_tokens == [EOT] and trained.eos_id == 349
    assert [trained.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert len(trained.merges()) == 93
    for i, pair in enumerate(trained.merges()):
        assert trained.token_bytes(256 + i) == bytes(hf_json.BYTE_OF[c] for c in "".join(pair))
    assert trained.token_bytes(349) == EOT.encode()
    assert len(trained.encode("".join(CORPUS))) < len("".join(CORPUS)) / 2


def test_training_is_deterministic_whatever_the_order_of_texts():
    first = train_bpe(CORPUS, 350).file()
    assert train_bpe(iter(CORPUS), 350).file() == first == train_bpe(CORPUS[::-1], 350).file()


def test_more_tokens_than_the_text_has_gives_those_there_are():
    tokenizer = train_bpe(["abab"], 5000, special_tokens=["<a>", "<b>"])
    assert 256 + 2 < tokenizer.vocab_size < 270
    assert tokenizer.special_tokens == ["<a>", "<b>"] and tokenizer.eos_id is None
    assert tokenizer.encode("abab").tolist() == [tokenizer.vocab_size - 3]


def test_no_text_gives_bytes():
    assert train_bpe([], 300, special_tokens=[]).encode("aé").tolist() == [0x61, 0xC3, 0xA9]


@pytest.mark.parametrize(
    "size, options, words",
    [
        (255, {"special_tokens": []}, "at least 256"),
        (257, {"special_tokens": ["<a>", "<b>"]}, "at least 258"),
        (300, {"pattern": "gpt5"}, "gpt2, llama3"),
        (300, {"special_tokens": ["<a>", "<a>"]}, "twice"),
        (300, {"special_tokens": [""]}, "empty"),
        (300, {"special_tokens": ["a"]}, "already"),
    ],
)
def test_what_cannot_be_trained_is_refused(size, options, words):
    with pytest.raises(DataError, match=words):
        train_bpe(CORPUS, size, **options)


RUNS = {
    "dashes": lambda n: "-" * n,
    "spaces": lambda n: f"x{' ' * n}y",
    "lines": lambda n: "\n \n" * (n // 3),
    "DNA": lambda n: "".join(random.Random(0).choices("ACGT", k=n)),
    "base64": lambda n: base64.b64encode(random.Random(0).randbytes(n * 3 // 4)).decode(),
    "CJK": lambda n: "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x5E00), k=n))),
}


@pytest.mark.parametrize("pattern", hf_json.PATTERNS)
@pytest.mark.parametrize("run", RUNS)
def test_training_time_does_not_grow_with_the_square_of_a_run(run, pattern):
    """Earlier, 200,000 dashes took 50 s, as many letters of DNA 20 s, and as many CJK characters over 600 s."""
    text = RUNS[run](200_000)
    start = time.monotonic()
    trained = train_bpe(["the fox", text, "the end"], 300, pattern=pattern)
    assert time.monotonic() - start < 8
    assert trained.decode(trained.encode(text)) == text


def test_only_long_words_are_cut_for_training():
    """No text is lost, and a text without such words is used unchanged."""
    whole = ["", " ", "the fox " * 500, "日本語、" * 900, "1" * 999, "-" * 999 + "\n", "a" * 999 + " " + "b" * 999]
    for text in whole:
        assert list(hf_json._without_long_words(text)) == [text]
    for text in ("a" * 1000, f"x {'é' * 5000}9 y", " " * 3000 + "z", "東" * 4001 + "、" + "京" * 4001):
        parts = list(hf_json._without_long_words(text))
        assert "".join(parts) == text and 1 < len(parts) < 11
        assert all(len(word) <= 1000 for part in parts for word in re.findall(r"\w+|\s+", part))


class Hung:
    """A library that trains for a long time and ignores signals."""

    def train_from_iterator(self, texts, trainer) -> None:
        time.sleep(60)


def test_ctrl_c_ends_training():
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hf_json._train(Hung(), [], None)
    assert time.monotonic() - start < 30


def test_an_unreadable_text_ends_training():
    def texts():
        yield "a"
        raise DataError("cannot read it")

    with pytest.raises(DataError, match="cannot read it"):
        train_bpe(texts(), 300)


def test_special_tokens_do_not_come_from_text(trained):
    ids = trained.encode(f"a{EOT}b")
    assert trained.eos_id not in ids and trained.decode(ids) == f"a{EOT}b"
    assert trained.decode([*trained.encode("a"), trained.eos_id, *trained.encode("é")]) == f"a{EOT}é"


@QUICK
@given(TEXT)
def test_round_trip(trained, text):
    ids = trained.encode(text)
    assert ids.dtype == np.uint32 and trained.decode(ids) == text
    assert b"".join(map(trained.token_bytes, ids.tolist())) == text.encode()


@QUICK
@given(TEXT)
def test_tiktoken_gives_the_ids_of_the_library(trained, text):
    assert trained._tiktoken is not None
    ids = trained._tiktoken(text).tolist()
    assert ids == trained._encode(text).tolist()
    if EOT not in text:
        assert ids == slow(trained, text)


def test_hard_texts_alone_and_in_a_batch(trained):
    texts = [*ALL_TRICKY, "\ud800 lone"]
    plain = JsonTokenizer(trained.file()[1], accelerate=False)
    for text, ids, others in zip(texts, trained.encode_batch(texts), plain.encode_batch(texts), strict=True):
        assert np.array_equal(ids, others) and np.array_equal(ids, trained.encode(text))
        assert trained.decode(ids) == text.replace("\ud800", "\ufffd")


def test_white_space_too_long_for_tiktoken():
    trained = train_bpe(CORPUS, 300)
    text = "a" + " " * 1_000_000 + "x"
    assert trained._tiktoken(text) is None and trained.decode(trained.encode(text)) == text


def test_an_id_outside_the_vocabulary_is_refused(trained):
    with pytest.raises(DataError, match=r"token id 350 .* of 350"):
        trained.decode([1, 350])


def edited(tokenizer: JsonTokenizer, **changes) -> JsonTokenizer:
    """The tokenizer with some fields replaced; model__FIELD is a field of its model."""
    spec = json.loads(tokenizer.file()[1])
    for field, value in changes.items():
        (spec["model"] if field.startswith("model__") else spec)[field.removeprefix("model__")] = value
    return JsonTokenizer(json.dumps(spec).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model__dropout": 0.5},
    ],
)
def test_what_tiktoken_cannot_do_is_left_to_the_library(trained, changes):
    assert edited(trained).accelerated and not edited(trained, **changes).accelerated


def test_an_unknown_token_that_bytes_never_need_does_not_matter(trained):
    other = edited(trained, model__unk_token=EOT)
    assert other.accelerated and all(np.array_equal(other.encode(t), trained.encode(t)) for t in ALL_TRICKY)


def test_dropout_is_left_out(trained):
    """With dropout, the same corpus would have different tokens each time."""
    assert np.array_equal(edited(trained, model__dropout=0.9).encode(CORPUS[0]), trained.encode(CORPUS[0]))


def test_merges_as_strings_and_as_pairs_are_the_same(trained):
    old = edited(trained, model__merges=[" ".join(pair) for pair in trained.merges()])
    assert old._tiktoken is not None and old.merges() == trained.merges()
    assert np.array_equal(old.encode(CORPUS[0]), trained.encode(CORPUS[0]))


def test_ids_in_another_order_than_merges_are_mapped(trained):
    vocabulary = json.loads(trained.file()[1])["model"]["vocab"]
    turned = {token: id if token == EOT else 348 - id for token, id in vocabulary.items()}
    other = edited(trained, model__vocab=turned)
    assert other._tiktoken is not None
    for text in ALL_TRICKY:
        ids = other.encode(text).tolist()
        assert ids == slow(other, text) or EOT in text
        assert ids == [348 - i for i in trained.encode(text).tolist()]


def any_merges(draw, tokens: int) -> list[tuple[str, str]]:
    """Random pairs of earlier tokens, which no training would produce."""
    known, merges = ["a", "b", "c"], []
    for _ in range(tokens):
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if left + right not in known and len(left + right) < 8:
            merges.append((left, right))
            known.append(left + right)
    return merges


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_merges_give_the_ids_of_the_library(data):
    """For any merge list, either tiktoken gives the library's ids, or it is not used."""
    merges = any_merges(data.draw, 8)
    spec = json.loads(byte_level_json(merges, "", {}))
    spec["model"]["ignore_merges"] = data.draw(st.booleans())
    if data.draw(st.booleans()):  # as in files that are converted from ranks: all merges that make a token
        tokens = data.draw(st.permutations([a + b for a, b in merges]))
        made = {"a", "b", "c", *tokens}
        spec["model"]["merges"] = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if {t[:i], t[i:]} <= made]
    tokenizer = JsonTokenizer(json.dumps(spec).encode())
    if tokenizer._tiktoken is not None:
        for _ in range(8):
            text = data.draw(st.text("abc", max_size=30))
            assert tokenizer._tiktoken(text).tolist() == slow(tokenizer, text)


@pytest.mark.parametrize("seed", range(2))
def test_merge_lists_that_no_training_makes(seed):
    """In some lists, two merges of the same token are not adjacent: 2 of 1,000 lists once gave other ids (`c c, c cc,
    c b, cc c` on cccb)."""
    rng, fast = random.Random(seed), 0
    for _ in range(250):
        raw, letters = merge_lists.tokenizer_json(rng)
        tokenizer, theirs = JsonTokenizer(raw), library.Tokenizer.from_str(raw.decode())
        fast += tokenizer.accelerated
        for _ in range(50 * tokenizer.accelerated):
            text = merge_lists.text(rng, letters)
            assert tokenizer._tiktoken(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, (raw, text)
    assert fast > 50  # tiktoken is used for enough of the lists


def test_two_merges_of_one_product_that_lie_apart():
    spec = json.loads(byte_level_json([], hf_json.PATTERNS["gpt2"], {}))
    spec["model"]["vocab"] |= {"cc": 256, "ccc": 257, "cb": 258}
    spec["model"]["merges"] = [("c", "c"), ("c", "cc"), ("c", "b"), ("cc", "c")]
    tokenizer = JsonTokenizer(json.dumps(spec).encode())
    assert not tokenizer.accelerated and tokenizer.encode("cccb").tolist() == [256, 258] == slow(tokenizer, "cccb")


PUBLISHED = [
    *hf_json.PATTERNS.values(),
    ranks.PATTERNS["o200k"],
    ranks.PATTERNS["llama3"].replace("{1,3}", ""),  # Qwen2's pattern
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_expressions_are_accelerated(pattern):
    assert JsonTokenizer(byte_level_json([], pattern, {})).accelerated


@pytest.mark.parametrize("pattern", [hf_json.PATTERNS["gpt2"], ranks.PATTERNS["o200k"]])
def test_every_character_is_cut_alike(pattern):
    """The two libraries have the same Unicode tables. Any two bytes merge, so the ids show each split."""
    pairs = list(itertools.product(BYTE_CHARACTERS, repeat=2))
    random.Random(0).shuffle(pairs)
    tokenizer = JsonTokenizer(byte_level_json(pairs, pattern, {}))
    assigned = (c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs"))
    text = "".join(f"a{c} {c}1{c}" for c in assigned)
    assert np.array_equal(tokenizer._tiktoken(text), tokenizer._encode(text))


@pytest.mark.parametrize(
    "pattern",
    [
        r"^#[^\n]*|\s+|\S+",  # in one of the two libraries, ^ matches at each line
        r"\p{N}{1,3}+|\s+|[^\s\p{N}]+",  # possessive in one library, repeated in the other
        r"\w+|[^\w\s]+|\s+",
        r"(?i:straße)|\s+|\S+",
        r" ?\p{L}*|\s+|\S",
        r"[一-龥]+|\s+|\S+|.",
        r"(a)\1|\s+|\S+",
        r"\s+|\S+\b",
    ],
)
def test_expressions_that_may_mean_another_thing_are_left_to_the_library(pattern):
    """The library is used even if both give the same ids for the few texts that are compared when a file is read."""
    assert not JsonTokenizer(byte_level_json([], pattern, {})).accelerated


def test_text_that_an_expression_leaves_out_is_kept():
    """The library makes a piece of the text between two matches, and tiktoken drops it; TRICKY does not have every such
    character."""
    tokenizer = JsonTokenizer(byte_level_json([], r"[^\u0f00]+", {}))
    text = "a\u0f00b"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.encode(text).tolist() == slow(tokenizer, text)


def test_merges_that_make_no_whole_of_a_token_are_not_given_to_tiktoken():
    """bc is merged first, so ab and c are never merged into abc; tiktoken would accept abc as a whole word."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokenizer = JsonTokenizer(byte_level_json(merges, hf_json.PATTERNS["gpt2"], {}))
    assert tokenizer._tiktoken is None and tokenizer.encode("abc").tolist() == [ord("a"), 256]
    with_all = edited(tokenizer, model__ignore_merges=True, model__merges=[*merges, ("a", "bc")])
    assert with_all._tiktoken is not None and with_all.encode("abc").tolist() == slow(with_all, "abc") == [258]


def test_a_token_that_no_merge_makes_is_found_as_a_whole_word_only():
    """Llama 3's vocabulary has tokens that no merge makes."""
    spec = json.loads(byte_level_json([("x", "y")], hf_json.PATTERNS["llama3"], {}))
    spec["model"] |= {"ignore_merges": True, "vocab": spec["model"]["vocab"] | {"pqr": 257}}
    tokenizer = JsonTokenizer(json.dumps(spec).encode())
    assert tokenizer.accelerated
    for text, ids in (("pqr", [257]), ("pqr pqr", [257, 32, *b"pqr"]), ("pqrxy", [*b"pqr", 256])):
        assert tokenizer.encode(text).tolist() == ids == slow(tokenizer, text)


def special(id: int, content: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": special, **flags}


def of_library(tokenizer: library.Tokenizer, added: list[dict]) -> JsonTokenizer:
    spec = json.loads(tokenizer.to_str()) | {"added_tokens": added}
    return JsonTokenizer(json.dumps(spec).encode())


def unigram() -> JsonTokenizer:
    """Like T5's tokenizer: the end of text is a piece of the model, which would find this piece in text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁hello", -1.0), ("▁world", -1.5)]
    tokenizer = library.Tokenizer(models.Unigram([*pieces, *((c, -5.0) for c in "helowrd</s>")], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return of_library(tokenizer, [special(0, "<unk>"), special(1, "</s>")])


def word_piece() -> JsonTokenizer:
    names = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "##ly", "[", "]", "s", "##e", "##p"]
    tokenizer = library.Tokenizer(models.WordPiece({t: i for i, t in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    return of_library(tokenizer, [special(i, names[i]) for i in range(3)])


def test_unigram():
    tokenizer = unigram()
    assert tokenizer.eos_id == 1 and tokenizer._tiktoken is None
    assert tokenizer.encode("hello world").tolist() == [3, 4] == slow(tokenizer, "hello world")
    assert tokenizer.decode([3, 4, 1, 3]) == "hello world</s>hello"
    assert tokenizer.token_bytes(3) == b" hello"
    assert 1 not in tokenizer.encode("hello</s>") and tokenizer.decode(tokenizer.encode("hello</s>")) == "hello</s>"
    assert 0 in tokenizer.encode("東")


def test_word_piece_without_its_truncation_and_padding():
    tokenizer = word_piece()
    assert tokenizer.eos_id == 2 and tokenizer.special_tokens == ["[UNK]", "[CLS]", "[SEP]"]
    assert tokenizer.encode("Hello worldly world").tolist() == [3, 4, 5, 4]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["hello", "worldly " * 3])] == [[3], [4, 5] * 3]
    assert tokenizer.decode([3, 4, 5, 2]) == "hello worldly[SEP]"
    assert tokenizer.token_bytes(5) == b"ly"
    assert 2 not in tokenizer.encode("[SEP] hello")


def test_byte_fallback():
    """Like Llama 2's tokenizer.json: ▁ stands for a space, text that is not a piece becomes bytes, and <unk> is never
    used."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "i", "hi", "▁hi"]
    merges = [("h", "i"), ("▁", "hi")]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    llama = of_library(tokenizer, [special(i, pieces[i]) for i in range(3)])
    assert llama.eos_id == 2 and not llama.accelerated
    for text in ("hi hi", "é hi\n", "</s>hi<unk>", "東京"):
        ids = llama.encode(text)
        assert llama.decode(ids) == text and not {0, 1, 2} & set(ids.tolist())
        assert b"".join(map(llama.token_bytes, ids.tolist())) == b" " + text.encode()
    assert llama.decode([263, 2, 263]) == "hi</s>hi"


@pytest.mark.parametrize("model", [models.BPE(byte_fallback=True, unk_token="<unk>"), None])
def test_bytes_that_are_marked_special_are_found_all_the_same(model):
    """The library's trainer can add the bytes of byte_fallback only as special tokens."""
    names = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    if model is None:
        pieces = [*((name, 0.0) for name in names), *((c, -1.0) for c in "ne▁")]
        tokenizer = library.Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    else:
        tokenizer = library.Tokenizer(model)
        tokenizer.train_from_iterator(["ne e"], trainers.BpeTrainer(special_tokens=names, show_progress=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ours = of_library(tokenizer, [special(i, name) for i, name in enumerate(names)])
    assert ours.encode("née 中").tolist() == slow(ours, "née 中") and ours.decode(ours.encode("née 中")) == "née 中"
    assert ours.special_tokens == ["<unk>", "</s>"] and ours.unknown_id == 0
    assert not {0, 1} & set(ours.encode("</s><unk>").tolist())


def test_a_byte_that_has_two_ids_is_refused():
    names = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = library.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    with pytest.raises(DataError, match="'<0x07>' the ids 9"):
        of_library(tokenizer, [special(9, "<0x07>")])


def test_a_text_that_bpe_without_unknown_token_would_drop_is_an_error():
    tokenizer = of_library(library.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])), [])
    assert tokenizer.vocab_size == 3 and tokenizer.encode("abba").tolist() == [2, 1, 0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match=r"'é' \(U\+00E9\)"):
            encode("abéb")


def test_added_tokens_that_are_not_special_are_found_in_text():
    tokenizer = of_library(
        library.Tokenizer(models.BPE({"a": 0, "b": 1}, [])),
        [special(2, "ab", special=False), special(3, "<eos>", False)],
    )
    assert tokenizer.encode("aba").tolist() == [2, 0]
    assert tokenizer.eos_id == 3 and tokenizer.special_tokens == ["<eos>"]  # by name, so text may not have it
    with pytest.raises(DataError):
        tokenizer.encode("<eos>")


def test_a_merge_that_makes_a_special_token_is_not_used():
    spec = json.loads(byte_level_json([("<", "e"), ("<e", ">")], "", {}))
    spec["added_tokens"] = [special(257, "<e>")]
    tokenizer = JsonTokenizer(json.dumps(spec).encode())
    assert tokenizer.encode("<e>").tolist() == [256, ord(">")] and tokenizer.decode([257]) == "<e>"


def test_the_end_of_text_is_the_first_known_or_the_one_named(trained):
    both = [special(349, "<|eot_id|>"), special(350, "</s>"), special(351, "<x>")]
    vocabulary = json.loads(trained.file()[1])["model"]["vocab"]
    del vocabulary[EOT]
    raw = edited(trained, model__vocab=vocabulary, added_tokens=both).file()[1]
    assert JsonTokenizer(raw).eos_id == 350
    assert JsonTokenizer(raw, eos="<x>").eos_id == 351 and JsonTokenizer(raw, eos="").eos_id is None
    with pytest.raises(DataError, match=r"'<y>'.*</s>"):
        JsonTokenizer(raw, eos="<y>")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": {}}, "damaged"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "damaged"),
        ({"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}}, "above"),
        ({"model__merges": [["Z", "東"]]}, "damaged"),
        (
            {"pre_tokenizer": hf_json.pre_tokenizer("(")},
            "damaged",
        ),
        ({"added_tokens": [special(7, EOT)]}, "ids 7 and 349"),
        ({"added_tokens": [special(7, "<x>")]}, "same id"),
        ({"added_tokens": [{"id": 7}]}, "damaged"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(trained, changes, words):
    with pytest.raises(DataError, match=words):
        edited(trained, **changes)


@pytest.mark.parametrize("make", [lambda: train_bpe(CORPUS, 270), unigram, word_piece])
def test_damaged_files_are_refused_or_work(make):
    raw = make().file()[1]
    refused = worked = 0
    for content in damaged_copies(raw, 300):
        try:
            tokenizer = JsonTokenizer(content)
            tokenizer.decode(tokenizer.encode("hello, worldly 東京 </s>"))
            [tokenizer.token_bytes(i) for i in range(min(tokenizer.vocab_size, 300))]
            worked += 1
        except DataError:
            refused += 1
    assert refused > 90 and worked > 5  # a cut file is refused; a changed character of a token works
