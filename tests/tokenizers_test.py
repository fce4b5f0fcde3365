"""Text is decoded as it was encoded, ids mean the same as in nanoGPT, and nothing is dropped silently."""

import ast
import collections
import hashlib
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest

import data
from data import tokenizers
from data.errors import DataError, UserError
from data.tokenizers import ByteTokenizer, CharTokenizer, characters
from data.tokenizers.hf_json import JsonTokenizer, train_bpe
from tests.texts import ALL_TRICKY, CORPUS

# The 65 characters of tiny Shakespeare, in another order than that of their ids.
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
    tokenizer = CharTokenizer.train(["aaab", "bbc"], min_frequency=3)  # frequencies are counted over all documents
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
    assert "<unk>" in str(e.value)  # the error says what to do


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
    assert tokenizer.decode([*rocket[:2], 257, 0x61]) == "\ufffd<eos>a"  # a model may emit stray bytes
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


# What a tokenizer is made from: specs, files, folders


@pytest.mark.parametrize(
    "spec, needed", [("char", True), ("bpe:300", True), ("bpe:300:llama3", True), ("byte", False), ("x.json", False)]
)
def test_which_specs_need_text(spec, needed):
    assert tokenizers.needs_texts(spec) is needed


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:16k", "bpe:0300", "bpe:99", "bpe:300:gpt9", "bpe:300:", "bpe:-1"])
def test_a_bpe_that_is_none_is_refused_before_any_text_is_read(spec):
    if spec == "bpe:300:":
        assert tokenizers.needs_texts(spec)
        return
    with pytest.raises(DataError, match=r"bpe:16384.*gpt2, llama3"):
        tokenizers.needs_texts(spec)


@pytest.mark.parametrize(
    "spec, given, eos, specials, eos_name",
    [
        ("byte", [], False, [], None),
        ("byte", [], True, ["<eos>"], "<eos>"),
        ("char", ["<unk>"], True, ["<unk>", "<eos>"], "<eos>"),
        ("char", ["<eos>"], True, ["<eos>"], "<eos>"),
        ("bpe:300", [], False, ["<|endoftext|>"], "<|endoftext|>"),
        ("bpe:300", [], True, ["<|endoftext|>"], "<|endoftext|>"),
        ("bpe:300", ["<x>", "</s>"], True, ["<x>", "</s>"], "</s>"),
    ],
)
def test_a_new_tokenizer_gets_the_special_tokens_asked_for_and_an_end_of_text_where_needed(
    spec, given, eos, specials, eos_name
):
    tokenizer = tokenizers.make(spec, CORPUS, special_tokens=given, eos=eos)
    assert tokenizer.special_tokens == specials
    assert (None if tokenizer.eos_id is None else tokenizer.token_bytes(tokenizer.eos_id).decode()) == eos_name
    assert tokenizer.vocab_size == {"byte": 256 + len(specials), "bpe:300": 300}.get(spec, tokenizer.vocab_size)


def test_text_is_asked_for_where_it_is_needed():
    with pytest.raises(DataError, match="trained on text"):
        tokenizers.make("char")


@pytest.fixture(scope="module")
def trained() -> JsonTokenizer:
    return train_bpe(CORPUS, 300, special_tokens=["<x>", "</s>"])


def test_a_file_and_a_folder_that_holds_one(trained, tmp_path):
    path = tmp_path / "any name.txt"  # only the content counts
    path.write_bytes(trained.file()[1])
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(trained.file()[1])
    tokenizers.save(trained, tmp_path / "dataset" / "tokenizer")
    for spec in (path, folder, tmp_path / "dataset", tmp_path / "dataset" / "tokenizer"):
        found = tokenizers.make(str(spec), eos=True)
        assert found.file() == trained.file() and found.eos_id == 299 == trained.eos_id
    assert tokenizers.make(str(path), special_tokens=["<x>"]).eos_id == 298
    with pytest.raises(DataError, match=r"no special token '<y>'.*<x>, </s>"):
        tokenizers.make(str(path), special_tokens=["</s>", "<y>"])


def test_documents_need_an_end_of_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    for specials, words in (([], "choose another"), (["<x>", "<y>"], "--special_tokens, of: <x>, <y>")):
        path.write_bytes(train_bpe(CORPUS, 300, special_tokens=specials).file()[1])
        assert tokenizers.make(str(path)).eos_id is None
        with pytest.raises(DataError, match=f"end-of-text.*{words}"):
            tokenizers.make(str(path), eos=True)
    assert tokenizers.make(str(path), eos=True, special_tokens=["<y>"]).eos_id == 299


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n....", "an image"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"}}', "safetensors"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08....", "compressed"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b'{"model_type": "gpt2"}', 'no "model"'),
        (b'{"model": ', "not JSON"),
        (b'{"model": {}}', "damaged"),
        (b"Once upon a time", "not a tokenizer of a known kind"),
        (bytes(range(256)), "not a tokenizer of a known kind"),
        (b"[" * 100_000, "not a tokenizer"),
        (b'{"a":' * 100_000, "not JSON"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_was_expected(content, words, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as e:
        tokenizers.make(str(path))
    assert str(path) in str(e.value)


def test_what_is_not_there_or_cannot_be_read(tmp_path):
    for spec in ("chars", str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(DataError, match=r"tokenizer.*expected a tokenizer.json"):
            tokenizers.make(spec)


def test_a_saved_file_is_the_same_byte_for_byte_and_loads_as_the_same(trained, tmp_path):
    path = tokenizers.save(trained, tmp_path / "tokenizer")
    assert (path.parent / "tokenizer.json").read_bytes() == trained.file()[1]
    loaded = tokenizers.load(path.parent, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (loaded.vocab_size, loaded.eos_id, loaded.special_tokens) == (300, 299, ["<x>", "</s>"])
    for text, ids in zip(ALL_TRICKY, loaded.encode_batch(ALL_TRICKY), strict=True):
        assert np.array_equal(ids, trained.encode(text))
    again = tokenizers.load(tokenizers.save(JsonTokenizer(trained.file()[1], eos="<x>"), tmp_path / "x").parent)
    assert again.eos_id == 298  # the chosen end-of-text token is kept


def test_either_file_changed_or_gone_is_detected(trained, tmp_path):
    path = tokenizers.save(trained, tmp_path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(path.read_text().replace("</s>", "<x>"))
    with pytest.raises(DataError, match=r"meshlm_tokenizer.json is not the tokenizer of the dataset"):
        tokenizers.load(tmp_path, sha256)
    tokenizers.save(trained, tmp_path)
    other = tmp_path / "tokenizer.json"
    other.write_bytes(other.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"/tokenizer.json was changed"):
        tokenizers.load(tmp_path, sha256)
    other.unlink()
    with pytest.raises(DataError, match=r"/tokenizer.json is missing"):
        tokenizers.load(tmp_path, sha256)


def test_a_saved_tokenizer_does_not_lead_out_of_its_folder(trained, tmp_path):
    (tmp_path / "secret.json").write_bytes(trained.file()[1])
    path = tokenizers.save(trained, tmp_path / "folder")
    path.write_text(path.read_text().replace('"file": "tokenizer.json"', '"file": "../secret.json"'))
    with pytest.raises(DataError, match=r"folder/secret.json is missing"):
        tokenizers.load(path.parent)


def test_without_the_packages(trained, tmp_path, monkeypatch):
    """char and byte need no package; without tiktoken the ids are the same; other errors name the extra to install."""
    ids = trained.encode(CORPUS[0])
    folder = tokenizers.save(trained, tmp_path / "json").parent
    (tmp_path / "ranks").write_bytes(b"YQ== 0\n")
    (tmp_path / "pieces").write_bytes(b"\n\x0e\n\x05<unk>")
    for package in ("tiktoken", "sentencepiece"):
        monkeypatch.setitem(sys.modules, package, None)
    slow = tokenizers.load(folder)
    assert isinstance(slow, JsonTokenizer) and not slow.accelerated and np.array_equal(slow.encode(CORPUS[0]), ids)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for spec in ("json", "ranks", "pieces"):
        with pytest.raises(DataError, match=r"package: pip install 'meshlm\[data\]'"):
            tokenizers.make(str(tmp_path / spec))
    with pytest.raises(DataError, match="tokenizers package"):
        tokenizers.make("bpe:300", CORPUS)
    assert tokenizers.make("byte").decode([97]) == "a" == tokenizers.make("char", ["a"]).decode([0])


@pytest.mark.parametrize("tokenizer", [CharTokenizer("aé"), ByteTokenizer(["<eos>"])], ids=["char", "byte"])
def test_what_the_simple_ones_share_with_all(tokenizer):
    assert [ids.tolist() for ids in tokenizer.encode_batch(["é", "a"])] == [
        tokenizer.encode(text).tolist() for text in ("é", "a")
    ]
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("aé").tolist()) == "aé".encode()
    with pytest.raises(DataError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(DataError, match="outside"):
        tokenizer.decode([-1])


def test_a_lone_surrogate_is_encoded():
    assert (
        ByteTokenizer().encode("\ud83d\ude80 \ud800").tobytes()
        == np.frombuffer("🚀 \ufffd".encode(), np.uint8).astype(np.uint32).tobytes()
    )
    char = CharTokenizer.train(["\ud800"])
    assert char.decode(char.encode("\ud800")) == "\ud800"


class _Exploit:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def test_a_pickle_in_place_of_a_tokenizer_is_refused_and_not_run(tmp_path):
    """nanoGPT's meta.pkl runs whatever code it holds; a dataset from another user must run none."""
    touched = tmp_path / "touched"
    (tmp_path / tokenizers.FILE_NAME).write_bytes(pickle.dumps(_Exploit(touched)))
    with pytest.raises(DataError):
        tokenizers.load(tmp_path)
    assert not touched.exists()
    json.loads(tokenizers.save(CharTokenizer("ab"), tmp_path).read_text())  # `save` writes plain JSON


def test_no_module_of_the_data_package_can_unpickle():
    """No module imports a pickle-like module or uses NumPy's allow_pickle."""
    modules = sorted(pathlib.Path(data.__file__).parent.rglob("*.py"))
    assert len(modules) > 40
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {(node.module or "").split(".")[0]}
            else:
                imported = {node.arg} if isinstance(node, ast.keyword) else set()
            assert not imported & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "allow_pickle"}, path


@pytest.mark.parametrize(
    "text", ["", "a", "ab", "aba", "é", "xé東\U0001f600x\x00\x7f\x80", "\ud83d!", "hello 東 " * 1001]
)
def test_characters_are_counted_as_one_by_one(text):
    counts = np.zeros(tokenizers.CODE_POINTS, np.int64)
    characters.count(text, counts)
    assert {chr(i): int(counts[i]) for i in np.flatnonzero(counts)} == dict(collections.Counter(text))
