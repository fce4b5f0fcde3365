"""Tokenizers from minbpe's files give the ids of minbpe's own algorithm, reimplemented here from its description."""

import itertools
import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizers
from data.errors import DataError
from data.tokenizers import hf_json, minbpe
from data.tokenizers.hf_json import JsonTokenizer, train_bpe
from data.tokenizers.minbpe import MinbpeTokenizer
from tests.texts import CORPUS, OLD_TEXT, OLD_TRICKY, damaged_copies

# The patterns of minbpe/regex.py
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4 = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
PATTERNS = {"basic": "", "gpt2": GPT2, "gpt4": GPT4}


def merged(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        out.append(new if found else ids[i])
        i += 1 + found
    return out


def reference_train(texts: list[str], pattern: str, merges: int) -> list[tuple[int, int]]:
    """minbpe's train: repeatedly merges the most common pair."""
    chunks = [list(c.encode()) for t in texts for c in (regex.findall(pattern, t) if pattern else [t])]
    found = []
    for new in range(256, 256 + merges):
        counts: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            for pair in itertools.pairwise(chunk):
                counts[pair] = counts.get(pair, 0) + 1
        found.append(max(counts, key=counts.__getitem__))
        chunks = [merged(chunk, found[-1], new) for chunk in chunks]
    return found


def reference_encode(text: str, pattern: str, merges: list[tuple[int, int]]) -> list[int]:
    """minbpe's encode_ordinary: repeatedly merges, everywhere, the present pair that was merged first in training."""
    rank = {pair: 256 + i for i, pair in enumerate(merges)}
    out = []
    for chunk in regex.findall(pattern, text) if pattern else [text]:
        ids = list(chunk.encode())
        while pairs := [pair for pair in itertools.pairwise(ids) if pair in rank]:
            best = min(pairs, key=rank.__getitem__)
            ids = merged(ids, best, rank[best])
        out += ids
    return out


def model(pattern: str, merges: list[tuple[int, int]], specials: dict[str, int] | None = None) -> bytes:
    """A model file as minbpe's save writes it."""
    lines = ["minbpe v1", pattern, str(len(specials or {})), *(f"{n} {i}" for n, i in (specials or {}).items())]
    return "".join(f"{line}\n" for line in [*lines, *(f"{a} {b}" for a, b in merges)]).encode()


@pytest.fixture(scope="module", params=PATTERNS)
def trained(request):
    pattern = PATTERNS[request.param]
    merges = reference_train(CORPUS[:3], pattern, 60)
    return MinbpeTokenizer(model(pattern, merges, {"<|endoftext|>": 400, "<x>": 317})), pattern, merges


@settings(max_examples=100, deadline=None)
@given(OLD_TEXT)
def test_ids_are_those_of_minbpe(trained, text):
    tokenizer, pattern, merges = trained
    ids = tokenizer.encode(text).tolist()
    assert ids == reference_encode(text, pattern, merges) and tokenizer.decode(ids) == text


def test_ids_of_hard_texts(trained):
    tokenizer, pattern, merges = trained
    for text in OLD_TRICKY:
        assert tokenizer.encode(text).tolist() == reference_encode(text, pattern, merges)


def test_special_tokens_have_the_ids_of_the_file(trained):
    tokenizer, _, _ = trained
    assert tokenizer.special_tokens == ["<x>", "<|endoftext|>"] and tokenizer.eos_id == 400
    assert tokenizer.vocab_size == 401
    assert tokenizer.decode([97, 400, 317, 98]) == "a<|endoftext|><x>b"
    assert tokenizer.token_bytes(350) == b""  # no token has this id


def test_the_first_example_of_minbpe():
    """README: "aaabdaaabac" with three merges becomes [258, 100, 258, 97, 99]."""
    merges = reference_train(["aaabdaaabac"], "", 3)
    assert merges == [(97, 97), (256, 97), (257, 98)]
    assert MinbpeTokenizer(model("", merges)).encode("aaabdaaabac").tolist() == [258, 100, 258, 97, 99]


def test_written_and_read_again(trained):
    tokenizer, pattern, merges = trained
    ordered = {"<x>": 317, "<|endoftext|>": 400}
    assert minbpe.to_minbpe(tokenizer) == model(pattern, merges, ordered)


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_a_trained_bpe_is_written(pattern):
    tokenizer = train_bpe(CORPUS, 320, pattern=pattern)
    raw = minbpe.to_minbpe(tokenizer)
    again = MinbpeTokenizer(raw)
    assert raw.splitlines()[1].decode() == hf_json.PATTERNS[pattern] and raw.splitlines()[3] == b"<|endoftext|> 319"
    merges = [tuple(map(int, line.split())) for line in raw.decode().splitlines()[4:]]
    for text in OLD_TRICKY:
        ids = tokenizer.encode(text).tolist()
        assert again.encode(text).tolist() == ids == reference_encode(text, hf_json.PATTERNS[pattern], merges)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda spec: spec.update(normalizer={"type": "NFC"}), "not plain"),
        (lambda spec: spec["model"]["merges"].reverse(), "merges|order"),
        (
            lambda spec: spec["model"].update(vocab={t: (i + 5) % 259 for t, i in spec["model"]["vocab"].items()}),
            "not the bytes 0 to 255",
        ),
        (lambda spec: spec["added_tokens"][0].update(content="<a b>"), "has a space"),
    ],
)
def test_what_cannot_be_written_says_why(change, words):
    spec = json.loads(train_bpe(["abcabc abc"], 260, special_tokens=["<s>"]).file()[1])
    del spec["model"]["vocab"]["<s>"]
    change(spec)
    with pytest.raises(DataError, match=words):
        minbpe.to_minbpe(JsonTokenizer(json.dumps(spec).encode()))


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"minbpe v1", "line 1"),
        (b"minbpe v2\n\n0\n", "line 1"),
        (b"minbpe v1\n\nx\n", "line 3"),
        (b"minbpe v1\n\n1\n<x>\n", "line 4"),
        (b"minbpe v1\n\n0\n97 98\n97 258\n", "line 5"),
        (b"minbpe v1\n\n0\n97 -1\n", "line 4"),
        (b"minbpe v1\n\n0\n97 97 97\n", "line 4"),
        (b"minbpe v1\n\n0\n97 97\n\n98 98\n", "line 5"),
        (b"minbpe v1\n\n0\n97 97\n97 97\n", "same token"),
        (b"minbpe v1\n\n0\n97 97\n256 97\n97 256\n", "same token"),
        (b"minbpe v1\n\n1\n<x> 256\n97 97\n", "above 256"),
        (b"minbpe v1\n\n2\n<x> 256\n<y> 256\n", "above 255"),
        (b"minbpe v1\n\n0\n" + b"".join(b"%d %d\n" % (i, i) for i in [97, *range(256, 400)]), "line 20"),
        (b"minbpe v1\n(\n0\n", "cannot be used"),
        (b"minbpe v1\n[a-z]+\n0\n", "leaves text out"),
        (rb"minbpe v1" + b"\n" + rb"\p{N}{1,2}+|[^\p{N}]" + b"\n0\n", "splits it differently"),
        (b"minbpe v1\n\xff\n0\n", "line 0"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(raw, words):
    with pytest.raises(DataError, match=f"my.model.*{words}"):
        MinbpeTokenizer(raw, "my.model")


def test_the_door_takes_and_keeps_it(trained, tmp_path):
    tokenizer, _, _ = trained
    path = tmp_path / "m.model"
    path.write_bytes(tokenizer.file()[1])
    made = tokenizers.make(str(path), eos=True)
    assert isinstance(made, MinbpeTokenizer)
    loaded = tokenizers.load(tokenizers.save(made, tmp_path / "tokenizer").parent)
    assert (tmp_path / "tokenizer" / "minbpe.model").read_bytes() == path.read_bytes()
    assert loaded.encode(CORPUS[0]).tolist() == tokenizer.encode(CORPUS[0]).tolist() and loaded.eos_id == 400


def test_damaged_files_are_refused_or_work(trained):
    refused = worked = 0
    for raw in damaged_copies(trained[0].file()[1], 150):
        try:
            tokenizer = MinbpeTokenizer(raw)
            assert tokenizer.decode(tokenizer.encode("hello 東京 12")) == "hello 東京 12"
            worked += 1
        except DataError:
            refused += 1
    assert refused > 20 and worked > 5


@given(st.binary(max_size=200))
def test_garbage_is_refused(raw):
    with pytest.raises(DataError):
        MinbpeTokenizer(raw)
