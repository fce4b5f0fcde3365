"""Copies of checkpoints in a second place: what lies there decides about no other file."""

import logging

import pytest

from trainer.config import Config, to_json
from trainer.errors import ConfigError
from trainer.lives import METADATA_FILE
from trainer.mirror import Mirror


def test_keys_that_lie_elsewhere_are_not_fetched(tmp_path, monkeypatch, caplog):
    """A store has any keys; they would be written over files of this machine."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run").mkdir()
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "run", Config())
    content = {f"checkpoints/5/{METADATA_FILE}": b"{}", "checkpoints/5/a/b": b"whole"}
    keys = dict(content)

    class Store:
        def list(self, key_range):
            return Answer([key.encode() for key in keys if key.startswith(key_range.inclusive_min.decode())])

        def read(self, key):
            return Answer(Read(keys[key.decode() if isinstance(key, bytes) else key]))

    class Answer:
        def __init__(self, value):
            self.value = value

        def result(self, timeout):
            return self.value

    class Read:
        state = "value"

        def __init__(self, value):
            self.value = value

    mirror._store = Store()
    for evil in (f"checkpoints/5/{tmp_path}/thesis.tex", "checkpoints/5/../../thesis.tex", "checkpoints/5//x"):
        keys = content | {evil: b"theirs"}
        assert not mirror.fetch(5) and "is not a place below a folder" in caplog.messages[-1]
        assert not (tmp_path / "run/5").exists()
    keys = content
    assert mirror.fetch(5) and (tmp_path / "run/5/a/b").read_bytes() == b"whole"
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    keys = {f"checkpoints/{name}/{METADATA_FILE}": b"{}" for name in ("7", "²", "-1", "1" * 5000, "x", "08", "")}
    assert mirror.whole() == {7}


def test_only_leftovers_of_copies_are_removed(tmp_path):
    """A mirror may be a folder that holds other things."""
    place = tmp_path / "mirror"
    ours = ["config.json.__lock", "checkpoints/5/a.__lock", "checkpoints/5/b/c.__lock"]
    others = ["x.__lock", "project/y.__lock", "checkpoints/z.__lock", "checkpoints/notes/w.__lock", "checkpoints/5/d"]
    for name in ours + others:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x")
    Mirror(str(place), tmp_path, Config())
    left = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    assert left == {*others, *ours[1:], "config.json"}  # it was nobody's mirror yet: only what would be in the way goes
    Mirror(str(place), tmp_path, Config())
    left = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    assert left == {*others, "config.json"}


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"name": "a web app"}', '{"model": 3}', "[" * 100_000])
def test_a_folder_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.mirror"):
        Mirror(str(tmp_path), tmp_path, Config())
    assert (tmp_path / "config.json").read_text() == text


def test_a_mirror_of_this_run_is_taken_again(tmp_path):
    Mirror(str(tmp_path), tmp_path, Config())
    Mirror(str(tmp_path), tmp_path, Config())
    assert (tmp_path / "config.json").read_text() == to_json(Config())


def test_there_and_back(tmp_path):
    """Through the real store of a folder; a leftover of a copy that was killed is not in the way."""
    content = {METADATA_FILE: b"{}", "a/b/c": b"leaves", "empty": b""}
    for name, raw in content.items():
        (tmp_path / "run/5" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/5" / name).write_bytes(raw)
    (tmp_path / "mirror/checkpoints/5/a/b").mkdir(parents=True)
    (tmp_path / "mirror/checkpoints/5/a/b/c.__lock").write_bytes(b"x" * 100)
    there = Mirror(str(tmp_path / "mirror"), tmp_path / "run", Config())
    there.offer(5, {5})
    there.wait()
    (tmp_path / "other").mkdir()
    back = Mirror(str(tmp_path / "mirror"), tmp_path / "other", Config())
    assert back.steps() == [5] and back.fetch(5)
    found = {
        p.relative_to(tmp_path / "other/5").as_posix(): p for p in (tmp_path / "other/5").rglob("*") if p.is_file()
    }
    assert {name: path.read_bytes() for name, path in found.items()} == content
