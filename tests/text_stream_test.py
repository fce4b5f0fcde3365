"""Text as it is made: whole characters in order, and the same text in the end; prompts of files that are refused."""

import json

import numpy as np
import pytest

from data.errors import DataError
from data.tokenizers import ByteTokenizer, JsonTokenizer
from launch.prompt_file import Answers, read_prompts
from trainer.errors import ConfigError
from trainer.sampling import TextStream

TEXT = "né 漢字 🙂🏽 Straße\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_no_character_is_cut_and_none_is_lost(size):
    tokenizer = ByteTokenizer(["<eos>"])
    ids = np.array([*tokenizer.encode(TEXT), tokenizer.eos_id], np.int32)
    stream, parts = TextStream(tokenizer, {tokenizer.eos_id}), []
    for first in range(0, len(ids), size):
        parts.append(stream.feed(ids[first : first + size], ended=first + size >= len(ids)))
        assert "\ufffd" not in parts[-1]
    assert "".join(parts) == stream.text == TEXT and len(stream.ids) == len(ids) - 1


def test_an_unfinished_character_is_printed_only_at_the_end():
    tokenizer = ByteTokenizer([])
    ids = tokenizer.encode("aé")
    stream = TextStream(tokenizer, ())
    assert stream.feed(ids[:2], ended=False) == "a"
    assert stream.feed(ids[:0], ended=True) == "\ufffd"


@pytest.mark.parametrize(("key", "line"), [
    ("prompt", '{"prompt": ""}'), ("prompt", '{"prompt": ["a"]}'), ("prompt", "[1]"), ("prompt", "{"),
    ("prompt", '{"messages": []}'), ("messages", '{"messages": []}'), ("messages", '{"messages": [null]}'),
    ("messages", '{"messages": [{"role": "user"}]}'), ("messages", '{"messages": [{"role": "user", "content": 3}]}'),
])  # fmt: skip
def test_the_line_that_is_not_a_prompt_is_named(key, line, tmp_path):
    good = {"prompt": '{"prompt": "a"}', "messages": '{"messages": [{"role": "user", "content": "a"}]}'}[key]
    (tmp_path / "in").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(DataError, match="line 3 is not an object with"):
        read_prompts(tmp_path / "in", key)
    (tmp_path / "in").write_text(f"{good}\n\n{good}")
    assert len(read_prompts(tmp_path / "in", key)) == 2


def test_answers_are_appended_after_the_whole_lines_of_the_same_settings(tmp_path):
    path = tmp_path / "out"
    answers = Answers(path, "s")
    for text in ("a", "b"):
        answers.append({"text": text})
    answers.close()
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert rows == [{"index": i, "text": text, "settings": "s"} for i, text in enumerate("ab")]
    for torn in range(len(whole)):
        path.write_bytes(whole[:torn])
        again = Answers(path, "s")
        for text in "ab"[again.count :]:
            again.append({"text": text})
        again.close()
        assert path.read_bytes() == whole
    for content in (b"mine", whole + b"mine", whole.replace(b'"s"', b'"t"'), whole[:-1] + b"x\n", b"\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="something else than answers"):
            Answers(path, "s")
        assert path.read_bytes() == content
    with pytest.raises(ConfigError, match="is not a file"):
        Answers(tmp_path, "s")


def ended_by(text: str, stop: list[str], size: int) -> tuple[str, bool, int]:
    """(What is printed of `text` if `stop` may end it and `size` tokens come at a time, whether one did, tokens)."""
    tokenizer = ByteTokenizer([])
    ids = tokenizer.encode(text)
    stream, parts = TextStream(tokenizer, (), stop), []
    for first in range(0, len(ids), size):
        parts.append(stream.feed(ids[first : first + size], ended=first + size >= len(ids)))
    assert "".join(parts) == stream.text
    return stream.text, stream.stopped, len(stream.ids)


def test_a_stop_string_ends_a_text_whatever_comes_at_a_time():
    """Random texts of few letters, so that stop strings begin often, overlap and are cut by the end."""
    draw = np.random.default_rng(0)
    stopped = 0
    for _ in range(300):
        text = "".join(draw.choice(list("abé"), 12))
        stop = ["".join(draw.choice(list("abé"), n)) for n in draw.integers(1, 4, 2)]
        n = min((n for n in range(len(text) + 1) if any(one in text[:n] for one in stop)), default=None)
        expected = (text, False, len(text.encode()))
        if n is not None:
            cut = min(at for one in stop if (at := text[:n].find(one)) >= 0)
            expected = (text[:cut], True, len(text[:n].encode()))
            stopped += 1
        for size in (1, 2, 5, 30):
            assert ended_by(text, stop, size) == expected, (text, stop, size)
    assert 50 < stopped < 300


def test_a_stop_string_of_bytes_is_found_whatever_comes_at_a_time():
    """A tokenizer with byte_fallback decodes a run of bytes as a whole: the first byte of the next character makes the
    run illegible."""
    library = pytest.importorskip("tokenizers")
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"<unk>": 256, "a": 257, "<eos>": 258}
    model = library.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    made = library.Tokenizer(model)
    made.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Fuse()])
    made.add_special_tokens(["<eos>"])
    tokenizer = JsonTokenizer(made.to_str().encode())
    ids = np.array([*"日本".encode(), 257, 257], np.int32)
    assert tokenizer.decode(ids[:4].tolist()) == "\ufffd" * 4
    for size in range(1, 9):
        stream = TextStream(tokenizer, (), ["日"])
        for first in range(0, len(ids), size):
            stream.feed(ids[first : first + size], ended=first + size >= len(ids))
        assert (stream.text, stream.stopped, stream.ids) == ("", True, ids[:3].tolist()), size
