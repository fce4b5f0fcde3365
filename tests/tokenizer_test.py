"""launch.tokenizer: what it prints, and that other programs can read what it writes."""

import json
import subprocess
import sys

import pytest
import tokenizers as library

from data import tokenizers
from data.tokenizers import minbpe
from data.tokenizers.characters import CharTokenizer
from launch.tokenizer import split
from tests import runs
from tests.cli_test import assert_one_line

TEXT = "def f(x):\n    return 'é東' # [x]\n"


def call(*argv: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.tokenizer", *argv],
        cwd=runs.ROOT,
        input=stdin,
        text=True,
        capture_output=True,
        timeout=60,
    )


def output(*argv: str, stdin: str = "") -> str:
    result = call(*argv, stdin=stdin)
    assert result.returncode == 0 and result.stderr == "", result
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the same vocabulary in both formats."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("t.json", "t.model"):
        said = output("train", "--source=data", "--vocab_size=400", "--special_tokens=<eos>", f"--out={folder / name}")
        assert "vocabulary 400" in said
    return folder


def test_train_writes_what_others_read(trained):
    ours = tokenizers.make(str(trained / "t.json"), eos=True)
    assert ours.vocab_size == 400 and ours.eos_id == 399
    theirs = library.Tokenizer.from_file(str(trained / "t.json"))
    assert theirs.encode(TEXT).ids == ours.encode(TEXT).tolist() and theirs.decode(ours.encode(TEXT).tolist()) == TEXT
    assert minbpe.to_minbpe(ours) == (trained / "t.model").read_bytes()


def test_train_does_not_replace(trained):
    before = (trained / "t.json").read_bytes()
    argv = ("train", "--source=tests", f"--out={trained / 't.json'}", "--vocab_size=300")
    assert_one_line(call(*argv), 2, "t.json exists", "--overwrite")
    assert (trained / "t.json").read_bytes() == before


def test_show(trained):
    lines = output("show", f"--tokenizer={trained / 't.json'}", "--rows=2").splitlines()
    assert lines[0].endswith("t.json: tokenizer.json, 400 tokens, encoded by tiktoken")
    assert lines[1] == "special token 399: <eos> (end of text)"
    ours = tokenizers.make(str(trained / "t.json"))
    left, right = (ours.plain[part] for part in ours.merges()[1])
    assert lines[-1].split()[0] == "257" and f"{left} '" in lines[-1] and f" + {right} '" in lines[-1]
    page = output("show", f"--tokenizer={trained / 't.model'}", "--start=10", "--rows=1").splitlines()
    assert page[-1] == r"      10  '\n'" and page[0].split(": ")[1].startswith("minbpe, 400")


@pytest.mark.parametrize("rows", ["1", "256"])
def test_a_reader_that_has_enough_is_no_error(rows):
    line = f"set -o pipefail; {sys.executable} -m launch.tokenizer show --tokenizer=byte --rows={rows} | true"
    result = subprocess.run(["bash", "-c", line], cwd=runs.ROOT, text=True, capture_output=True, timeout=60)
    assert result.returncode == 1 and result.stderr == ""


def test_show_a_datasets(tmp_path):
    tokenizers.save(CharTokenizer("ab\x1b", ["<eos>"]), tmp_path / "tokenizer")
    lines = output("show", f"--tokenizer={tmp_path}").splitlines()
    assert lines[1:] == ["special token 3: <eos> (end of text)", "      id  token", "       0  'a'", "       1  'b'",
                         r"       2  '\x1b'", "       3  '<eos>'"]  # fmt: skip


def test_encode_and_back(trained, tmp_path):
    name = f"--tokenizer={trained / 't.json'}"
    ids = tokenizers.make(str(trained / "t.json")).encode(TEXT).tolist()
    (tmp_path / "text").write_text(TEXT)
    printed = output("encode", name, TEXT)
    lines = printed.splitlines()
    assert list(map(int, lines[0].split())) == ids
    assert (
        lines[1].count("[") >= len(ids) and r"[\xc3][\xa9]" in lines[1] and r"\n" in lines[1] and "\x1b" not in printed
    )
    assert (
        lines[2]
        == f"{len(ids)} tokens, {len(TEXT.encode())} bytes, {len(TEXT.encode()) / len(ids):.2f} bytes per token"
    )
    assert output("encode", name, stdin=TEXT) == printed == output("encode", name, f"--file={tmp_path / 'text'}")
    only = output("encode", name, "--ids_only", "--", "-x")
    assert output("decode", name, stdin=only) == "-x\n"
    assert output("decode", name, *map(str, ids)) == TEXT + "\n" == output("decode", name, json.dumps(ids)[1:-1])


def test_split_in_colour_shows_every_token_and_nothing_that_acts_on_a_terminal():
    text = split([b"a", b"\x1b[2J", b"\xe6"], colour=True)
    assert text == "\x1b[30;46ma\x1b[0m\x1b[30;42m\\x1b[2J\x1b[0m\x1b[30;43m\\xe6\x1b[0m"


@pytest.mark.parametrize(
    "argv, code, parts",
    [
        ((), 2, ["show, encode, decode, train"]),
        (("shwo",), 2, ["not 'shwo'"]),
        (("show",), 2, ["--tokenizer is missing"]),
        (("show", "x", "--tokenizer=byte"), 2, ["unexpected argument 'x'"]),
        (("show", "--tokenizer=README.md"), 3, ["README.md", "expected a tokenizer.json"]),
        (("show", "--tokenizer=char"), 3, ["trained on text"]),
        (("encode", "--tokenizer=byte", "a", "b"), 2, ["quotes"]),
        (("encode", "--tokenizer=byte", "--file=none"), 3, ["cannot read none"]),
        (("decode", "--tokenizer=byte", "1", "2x"), 2, ["'2x' is not a token id"]),
        (("decode", "--tokenizer=byte", "1" * 5000), 2, ["11111' is not a token id"]),
        (("decode", "--tokenizer=byte", "²"), 2, ["not a token id"]),
        (("decode", "--tokenizer=byte", "999999999"), 3, ["vocabulary of 256"]),
        (("decode", "--tokenizer=byte", "256"), 3, ["256", "vocabulary of 256"]),
        (("train", "--source=data"), 2, ["--out"]),
        (("train", "--source=data", "--out=x.txt"), 2, [".json", ".model"]),
        (("train", "--source=data", "--out=x.json", "--vocab_size=99"), 3, ["at least 257"]),
    ],
)
def test_mistakes(argv, code, parts):
    assert_one_line(call(*argv), code, *parts)


def test_training_leaves_out_what_is_not_text_when_told_so(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT * 20)
    (tmp_path / "in" / "b.zip").write_bytes(b"PK\3\4" + bytes(99))
    argv = ("train", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'tokenizer.json'}", "--vocab_size=260")
    refused = call(*argv)
    assert (
        refused.returncode == 3
        and "b.zip is a zip archive" in refused.stderr
        and "--bad_records=skip" in refused.stderr
    )
    assert "not text, left out: 1" in output(*argv, "--bad_records=skip")
