"""The tokens of a long text's parts are those of the whole text, whatever the tokenizer does at the ends of a text."""

import gzip
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from data import tokenizers
from data.preparation import documents, parts, pipeline
from data.tokenizers import seams
from tests import families

WORDS = [
    "the",
    "quick",
    "fox",
    "hello",
    "naïve",
    "日本語",
    "東京" * 9,
    "e\u0301",
    "x1",
    "ACGT" * 12,
    "'LL",
    "🚀",
    "</s>",
    "▁",
    "1234",
]
BETWEEN = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\n  ", "\t", ". ", "", " \r\n", "\u3000"]


def any_text(rng: random.Random, length: int, run: int = 300) -> str:
    """Words and separators, and now and then a run of one character, at most `run` long."""
    parts: list[str] = []
    size = 0
    while size < length:
        part = rng.choice("a -\n東") * rng.randint(20, run) if rng.random() < 0.01 else rng.choice(WORDS)
        parts += [part, rng.choice(BETWEEN)]
        size += len(part)
    return "".join(parts)[:length]


def cut_in_two(encode, text: str, at: int) -> np.ndarray | None:
    """The tokens of the two parts of a text, as two processes make them; None if a check refuses the cut."""
    seam = seams.find_seam(encode, text[max(at - seams.WINDOW, 0) : at], text[at : at + seams.WINDOW])
    if seam is None:
        return None
    stop = max(at - seams.WINDOW, 0) + seam.at
    first, second = encode(text[:stop]), seam.take(encode(seam.before + text[stop:]))
    return np.concatenate([first, second]) if seam.ends(first) and second is not None else None


@pytest.mark.parametrize("family", families.FAMILIES)
def test_two_parts_have_the_tokens_of_the_whole(family):
    """Cuts come after a newline, before white space or anywhere else."""
    encode, rng, refused = families.make(family).encode, random.Random(family), 0
    for i in range(40):
        text = any_text(rng, rng.choice((20, 500, 6000)))
        at = rng.randrange(1, len(text))
        if i % 4:
            at = text.find("\n" if i % 4 == 1 else " ", at) + (i % 4 == 1)
        if not 0 < at < len(text):
            continue
        found = cut_in_two(encode, text, at)
        refused += found is None
        assert found is None or np.array_equal(found, encode(text)), (text, at)
    assert refused <= 1


@pytest.mark.parametrize("family", families.FAMILIES)
def test_many_parts_have_the_tokens_of_the_whole(family, monkeypatch):
    tokenizer, rng = families.make(family), random.Random(family)
    texts = [any_text(rng, length) for length in (0, 1, 300, 3000, 40_000, 100)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    monkeypatch.setattr(seams, "PART", 3000)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    assert [tokenizer.encode(text).tolist() for text in texts] == expected


@pytest.fixture
def tiny_units(monkeypatch):
    """Units of 4,000 bytes, and windows of 250 characters."""
    monkeypatch.setattr(documents, "UNIT_BYTES", 4000)
    monkeypatch.setattr(documents, "LINE_SEARCH_BYTES", 64)


def prepared(folder, text: bytes, codec, **request) -> tuple[dict[str, list[int]], dict]:
    """Prepares a file that holds `text`; returns its tokens by split, and the summary."""
    tokenizers.save(codec, folder / "tokenizer")
    (folder / request.get("name", "x.txt")).write_bytes(text)
    arguments = {key: value for key, value in request.items() if key != "name"}
    out = folder / "out"
    source = str(folder / request.get("name", "x.txt"))
    manifest = pipeline.prepare_dataset(out, source=source, tokenizer=str(folder), overwrite=out.exists(), **arguments)
    rows = {split: np.fromfile(out / f"{split}-00000.bin", manifest.dtype).tolist() for split in ("train", "val")}
    return rows, pipeline.read_summary(out)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_prepared_text_has_the_tokens_of_the_whole(family, tiny_units, tmp_path):
    """The file has many units, is compressed or not, and has a validation split at its end or none."""
    codec, rng = families.make(family), random.Random(family)
    text = any_text(rng, 20_000, run=40)  # runs must fit into the small windows
    rows, summary = prepared(tmp_path, text.encode(), codec, val_fraction=0.0)
    assert parts.NO_SEAM not in summary["problems"]["counts"]
    assert rows["train"] == codec.encode(text).tolist()
    raw = gzip.compress(text.encode())
    assert prepared(tmp_path, raw, codec, val_fraction=0.0, name="x.txt.gz")[0] == rows
    for fraction in (0.37, rng.random()):
        rows, _ = prepared(tmp_path, text.encode(), codec, val_fraction=fraction)
        cut = int(len(text) * (1 - fraction))
        assert rows == {"train": codec.encode(text[:cut]).tolist(), "val": codec.encode(text[cut:]).tolist()}


@pytest.mark.parametrize("offset", [-300, -100, -1, 0, 1, 100, 300])
def test_no_text_crosses_the_cut_to_validation(offset, tiny_units, tmp_path):
    """The cut to validation is close to the cut between two units, so there is less context."""
    codec = families.make("llama2")
    text = "\n".join(["  the quick  fox "] * 1000)
    text = text[: text.index("\n", 4000) + 1].ljust(4000) + text
    first = documents.split_point(text[4000:4064].encode()) + 4000
    fraction = 1 - (first + offset + 0.5) / len(text)
    rows, _ = prepared(tmp_path, text.encode(), codec, val_fraction=fraction)
    cut = first + offset
    assert rows == {"train": codec.encode(text[:cut]).tolist(), "val": codec.encode(text[cut:]).tolist()}


def test_bytes_that_are_no_text_near_a_cut(tiny_units, tmp_path):
    """Both units see the same bytes near their cut, so nothing is lost or duplicated."""
    codec, rng = families.make("sp-bpe"), random.Random(0)
    for i in range(10):
        raw = b"".join(
            rng.choice((b"\xe4", b"\xb8", b"\xad", b"\xf0\x9f", b"ab", b" ", b"\xc3\xa9")) for _ in range(9000)
        )
        rows, _ = prepared(tmp_path, raw, codec, val_fraction=0.0, max_invalid=1.0, format="text")
        pieces = prepared(
            tmp_path, gzip.compress(raw), codec, val_fraction=0.0, max_invalid=1.0, format="text", name="x.txt.gz"
        )[0]
        assert rows == pieces, i
        text = raw.decode("utf-8", "replace")
        assert abs(len(codec.decode(rows["train"])) - len(text)) < 8  # a cut inside a sequence makes one U+FFFD or two


def test_a_place_where_no_seam_is_found_is_counted(tiny_units, tmp_path, monkeypatch):
    monkeypatch.setattr(seams, "find_seam", lambda *args: None)
    codec = families.make("llama2")
    _, summary = prepared(tmp_path, b"hello " * 2000, codec, val_fraction=0.0)
    assert summary["problems"]["counts"][parts.NO_SEAM] == 2


@pytest.mark.parametrize("family", ["bpe-nfc", "llama2", "unigram", "word-piece", "sp-bpe", "sp-unigram"])
def test_a_long_text_is_encoded_a_part_at_a_time(family, monkeypatch):
    """The largest call decides the memory, 160 bytes per byte of text. Only a run without a seam is a single call."""
    codec, sizes = families.make(family), []
    monkeypatch.setattr(seams, "PART", 4000)

    def counted(text: str) -> np.ndarray:
        sizes.append(len(text))
        return codec.encode_batch([text])[0] if len(text) <= seams.PART else codec._encode_batch([text])[0]

    text = any_text(random.Random(0), 40_000, run=40)
    whole = codec._encode_batch([text])[0]
    assert np.array_equal(seams.encode_long(counted, text), whole) and max(sizes) < 4000 + 3 * seams.WINDOW
    with_run = f"{text}{'a' * 10_000} {text}"
    assert np.array_equal(seams.encode_long(counted, with_run), codec._encode_batch([with_run])[0])
    assert max(sizes) < 40_000


def test_many_small_texts_are_few_calls():
    calls: list[int] = []

    def encode(texts):
        calls.append(sum(map(len, texts)))
        return [np.zeros(len(text)) for text in texts]

    texts = ["ab"] * 300_000 + ["c" * 200_000, "", "d" * 100_000]
    found = seams.encode_batch(encode, texts)
    assert [len(ids) for ids in found] == [len(text) for text in texts]
    assert len(calls) == 5 and max(calls) <= seams.PART


@pytest.mark.parametrize("cutter", [pre_tokenizers.Split(Regex("[A-Z]{6}"), "isolated"), pre_tokenizers.FixedLength(6)])
def test_where_equal_ids_prove_nothing(cutter, monkeypatch):
    """Text is split into words of six characters, with runs of unknown words, of one word, and of a few in turn."""
    monkeypatch.setattr(seams, "PART", 3000)
    draw = random.Random(0)
    words = ["<unk>", *{"".join(draw.choices("ACGT", k=6)) for _ in range(3000)}, "AAAAAA", "ACACAC", "CACACA"]
    library = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = cutter
    codec = tokenizers.JsonTokenizer(library.to_str().encode())
    for _ in range(20):
        runs = [draw.choice(("N", "A", "AC", "ACG")) * draw.randrange(2000, 3000), *draw.choices("ACGT", k=4000)]
        text = "".join(["".join(draw.choices("ACGT", k=draw.randrange(3000))), *runs])
        assert np.array_equal(codec.encode(text), library.encode(text, add_special_tokens=False).ids)
