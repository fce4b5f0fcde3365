"""Protects text: what is encoded comes back, ids mean the same as in nanoGPT, nothing is dropped without a word."""

import ast
import json
import pathlib
import pickle

import numpy as np
import pytest

from data import tokenizers
from data.errors import DataError, UserError
from data.tokenizers import ByteTokenizer, CharTokenizer

# The 65 characters of tiny Shakespeare, in an order that is not theirs.
SHAKESPEARE_LIKE = (
    "zyxwvutsrqponmlkjihgfedcba ZYXWVUTSRQPONMLKJIHGFEDCBA\n?;:3.-,'&$!"
    "\nFirst Citizen:\nBefore we proceed any further, hear me speak.\n"
)
MIXED = "naïve café — 東京 🚀\r\n\ttabs, NUL \x00 and \ufeff a mark\U0010ffff"


@pytest.mark.parametrize("text", ["", "a", "hello\nworld", MIXED])
def test_char_round_trip(text):
    tokenizer = CharTokenizer.train([MIXED, "hello world"])
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32 and ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text


def test_char_ids_are_those_of_nanogpt():
    """nanoGPT's prepare.py: chars = sorted(set(data)), ids by position."""
    tokenizer = CharTokenizer.train([SHAKESPEARE_LIKE])
    stoi = {c: i for i, c in enumerate(sorted(set(SHAKESPEARE_LIKE)))}
    assert tokenizer.vocab_size == len(stoi) == 65
    assert tokenizer.encode(SHAKESPEARE_LIKE).tolist() == [stoi[c] for c in SHAKESPEARE_LIKE]
    assert tokenizer.encode("\n !az").tolist() == [0, 1, 2, 39, 64]


def test_char_ids_are_in_code_point_order_beyond_ascii_and_do_not_depend_on_the_order_of_the_documents():
    tokenizer = CharTokenizer.train(["b🚀", "東a"])
    assert tokenizer.characters == "ab東🚀" == CharTokenizer.train(["東a", "b🚀"]).characters
    assert tokenizer.encode("🚀東ba").tolist() == [3, 2, 1, 0]


def test_special_tokens_come_after_the_characters_and_have_their_own_ids():
    tokenizer = CharTokenizer.train(["abc"], special_tokens=["<unk>", "<eos>", "<x>"])
    assert tokenizer.vocab_size == 6 and tokenizer.eos_id == 4
    assert tokenizer.encode("cab").tolist() == [2, 0, 1]
    assert tokenizer.decode([2, 4, 5, 3]) == "c<eos><x><unk>"
    assert CharTokenizer("abc").eos_id is None


def test_text_that_spells_a_special_token_is_not_one():
    """A document cannot put an end-of-text token into the training data by writing its name."""
    char = CharTokenizer.train(["<eos>"], special_tokens=["<eos>"])
    assert char.eos_id not in char.encode("<eos>") and char.decode(char.encode("<eos>")) == "<eos>"
    byte = ByteTokenizer(["<eos>"])
    assert byte.encode("<eos>").tolist() == list(b"<eos>")


def test_characters_below_min_frequency_become_unk():
    tokenizer = CharTokenizer.train(["aaab", "bbc"], min_frequency=3)  # counted over all documents
    assert tokenizer.characters == "ab" and tokenizer.special_tokens == ["<unk>"]
    assert tokenizer.encode("abcz").tolist() == [0, 1, 2, 2]
    assert tokenizer.decode([0, 2]) == "a<unk>"


def test_min_frequency_that_drops_nothing_adds_no_unk():
    tokenizer = CharTokenizer.train(["aabb"], min_frequency=2)
    assert tokenizer.special_tokens == [] and tokenizer.vocab_size == 2


def test_an_unk_that_was_asked_for_keeps_its_place():
    tokenizer = CharTokenizer.train(["aab"], min_frequency=2, special_tokens=["<eos>", "<unk>"])
    assert tokenizer.special_tokens == ["<eos>", "<unk>"]
    assert tokenizer.encode("ab").tolist() == [0, 2]


def test_unknown_character_without_unk_is_an_error_that_names_it():
    tokenizer = CharTokenizer.train(["abc"], special_tokens=["<eos>"])
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\), '🚀' \(U\+1F680\)") as e:
        tokenizer.encode("ab🚀cé")
    assert "<unk>" in str(e.value)  # says what to do


def test_byte_ids_are_the_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256 and tokenizer.eos_id is None
    ids = tokenizer.encode("aé🚀")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x9A, 0x80]
    assert tokenizer.encode_bytes(bytes(range(256))).tolist() == list(range(256))


@pytest.mark.parametrize("text", ["", "hello", MIXED])
def test_byte_round_trip(text):
    tokenizer = ByteTokenizer(["<eos>"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_decode_joins_characters_of_several_bytes_and_puts_special_tokens_between_them():
    tokenizer = ByteTokenizer(["<x>", "<eos>"])
    assert tokenizer.eos_id == 257 and tokenizer.vocab_size == 258
    rocket = tokenizer.encode("🚀").tolist()
    assert tokenizer.decode([*rocket, 257, *rocket, 256]) == "🚀<eos>🚀<x>"
    assert tokenizer.decode([*rocket[:2], 257, 0x61]) == "\ufffd<eos>a"  # what a model may emit: stray bytes
    assert tokenizer.decode(np.array(rocket, np.uint16)) == "🚀"


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer.train([MIXED]),
        CharTokenizer.train(["aab"], min_frequency=2, special_tokens=["<eos>"]),
        ByteTokenizer(),
        ByteTokenizer(["<eos>", "<x>"]),
    ],
    ids=["char", "char-special", "byte", "byte-special"],
)
def test_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    path = tokenizers.save(tokenizer, tmp_path / "new" / "tokenizer")
    assert list(path.parent.iterdir()) == [path]
    loaded = tokenizers.load(path.parent)
    assert type(loaded) is type(tokenizer) and loaded.to_json() == tokenizer.to_json()
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert np.array_equal(loaded.encode("aa"), tokenizer.encode("aa"))
    assert loaded.decode(range(loaded.vocab_size)) == tokenizer.decode(range(loaded.vocab_size))


def test_frozen_files_of_earlier_versions_still_load(tmp_path):
    """A dataset or checkpoint keeps its tokenizer for years."""
    path = tmp_path / "meshlm_tokenizer.json"
    path.write_text('{"kind": "char", "characters": "a\\u00e9\\ud83d\\ude80", "special_tokens": ["<unk>", "<eos>"]}')
    char = tokenizers.load(tmp_path)
    assert char.encode("🚀éaz").tolist() == [2, 1, 0, 3] and char.eos_id == 4
    path.write_text('{"kind": "byte", "special_tokens": ["<eos>"]}')
    assert tokenizers.load(tmp_path).eos_id == 256


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b'{"characters": "ab", "special_tokens": []}',
        b'{"kind": "wordpiece", "special_tokens": []}',
        b'{"kind": ["char"]}',
        b'{"kind": "char", "special_tokens": []}',
        b'{"kind": "char", "characters": ["ab"], "special_tokens": []}',
        b'{"kind": "byte", "special_tokens": null}',
        b'{"kind": "char", "characters": "ab',
    ],
)
def test_a_bad_file_is_a_data_error_that_names_it(content, tmp_path):
    path = tmp_path / tokenizers.FILE_NAME
    path.write_bytes(content)
    with pytest.raises(DataError, match=tokenizers.FILE_NAME) as e:
        tokenizers.load(tmp_path)
    assert e.value.exit_code == 3 and isinstance(e.value, UserError)


def test_a_missing_file_is_a_data_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=tokenizers.FILE_NAME):
        tokenizers.load(tmp_path / "nowhere")


class _Exploit:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def test_a_pickle_in_place_of_a_tokenizer_is_refused_and_not_run(tmp_path):
    """nanoGPT's meta.pkl runs whatever it holds; a dataset from somebody else must not."""
    touched = tmp_path / "touched"
    (tmp_path / tokenizers.FILE_NAME).write_bytes(pickle.dumps(_Exploit(touched)))
    with pytest.raises(DataError):
        tokenizers.load(tmp_path)
    assert not touched.exists()
    json.loads(tokenizers.save(CharTokenizer("ab"), tmp_path).read_text())  # what is written is plain JSON


def test_no_module_of_the_data_package_can_unpickle():
    """Neither an import of a pickle-like module nor numpy's allow_pickle."""
    modules = sorted(pathlib.Path(tokenizers.__file__).parent.glob("*.py"))
    assert len(modules) > 5
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {(node.module or "").split(".")[0]}
            else:
                imported = {node.arg} if isinstance(node, ast.keyword) else set()
            assert not imported & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "allow_pickle"}, path
