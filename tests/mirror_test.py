"""Copies of checkpoints in a second place: what lies there decides about no other file."""

import json
import logging
import types

import pytest

from data import remote
from data.errors import UserError
from trainer import identity, reading
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, Config, to_json
from trainer.errors import CheckpointError, ConfigError
from trainer.lives import METADATA_FILE
from trainer.mirror import UNWANTED, Mirror
from trainer.reading import Unreadable


def test_keys_that_lie_elsewhere_are_not_fetched(tmp_path, monkeypatch, caplog):
    """A store has any keys; they would be written over files of this machine."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    monkeypatch.setattr(reading, "PAUSES_S", ())
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run").mkdir()
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "run", Config())
    content = {f"checkpoints/5/{METADATA_FILE}": b"{}", "checkpoints/5/a/b": b"whole"}
    keys = dict(content)

    class Store:
        def list(self, key_range):
            return Answer([key.encode() for key in keys if key.startswith(key_range.inclusive_min.decode())])

        def read(self, key, byte_range=None, if_not_equal=None):
            value = keys[key.decode() if isinstance(key, bytes) else key]
            if byte_range and byte_range.start >= len(value):
                return Answer(ValueError("OUT_OF_RANGE: too short"))
            return Answer(Read(value))

    class Answer:
        def __init__(self, value):
            self.value = value

        def result(self, timeout):
            if isinstance(self.value, Exception):
                raise self.value
            return self.value

    class Read:
        state = "value"

        def __init__(self, value):
            self.value, self.stamp = value, types.SimpleNamespace(generation=b"1")

    mirror._store = Store()
    for evil in (f"checkpoints/5/{tmp_path}/thesis.tex", "checkpoints/5/../../thesis.tex", "checkpoints/5//x"):
        keys = content | {evil: b"theirs"}
        assert not mirror.fetch(5) and "is not a place below a folder" in caplog.messages[-1]
        assert not (tmp_path / "run/5").exists()
    keys = content
    heard: list[str] = []
    mirror.alive = lambda: heard.append("a block")
    assert mirror.fetch(5) and (tmp_path / "run/5/a/b").read_bytes() == b"whole" and heard
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


def test_a_store_that_does_not_answer_is_not_an_empty_one(tmp_path, monkeypatch):
    """A run that lost its folder must not begin again, and in the end delete the copies."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    (tmp_path / "mirror/checkpoints/5").mkdir(parents=True)
    (tmp_path / "mirror/checkpoints/5" / METADATA_FILE).write_text("{}")
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "run/checkpoints", Config())
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), mirror=mirror)
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_list", lambda: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(CheckpointError, match="no network"):
            checkpoints._next({}, choose=None)
        assert mirror.whole() == set()
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_download", lambda *a: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(Unreadable, match="no network"):
            checkpoints._next({}, choose=None)


def test_a_copy_of_another_run_changes_nothing(tmp_path):
    """The mirror's config.json is written when its newest copy has been compared."""

    def refuse(meta):
        raise ConfigError(f"not this one: {meta['samples']}")

    meta = {"samples": 7}
    Mirror(str(tmp_path), tmp_path, Config(), refuse)  # nothing to compare yet
    (tmp_path / "config.json").write_text(before := to_json(Config()).replace("\n", " "))
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    text = json.dumps({"custom_metadata": meta | {"digest": identity.digest(meta)}})
    (tmp_path / "checkpoints/5" / METADATA_FILE).write_text(text)
    with pytest.raises(ConfigError, match="not this one: 7"):
        Mirror(str(tmp_path), tmp_path, Config(), refuse)
    assert (tmp_path / "config.json").read_text() == before


def test_a_copy_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """An older one, or none, would be compared in its place, and the mirror taken over."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    real, busy = Mirror._read, []

    def read(mirror, key):
        if busy and METADATA_FILE in key and busy.pop():
            raise ValueError("ABORTED: All 32 retry attempts failed: Service Unavailable")
        return real(mirror, key)

    def refuse(meta):
        raise ConfigError("not this one")

    monkeypatch.setattr(Mirror, "_read", read)
    meta = {"samples": 7}
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    text = json.dumps({"custom_metadata": meta | {"digest": identity.digest(meta)}})
    (tmp_path / "checkpoints/5" / METADATA_FILE).write_text(text)
    for times, code in ((1, 2), (2, 42)):
        busy[:] = [True] * times
        with pytest.raises(UserError) as e:
            Mirror(str(tmp_path), tmp_path, Config(), refuse)
        assert e.value.exit_code == code and not (tmp_path / "config.json").exists()


def test_there_and_back(tmp_path, monkeypatch):
    """Through the real store of a folder, in pieces; a leftover of a copy that was killed is not in the way."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 3)
    content = {METADATA_FILE: b"{}", "a/b/c": b"leaves", "empty": b"", "d": b"four", "e": b"abc"}
    for name, raw in content.items():
        (tmp_path / "run/5" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/5" / name).write_bytes(raw)
    (tmp_path / "mirror/checkpoints/5/a/b").mkdir(parents=True)
    (tmp_path / "mirror/checkpoints/5/a/b/c.__lock").write_bytes(b"x" * 100)
    there = Mirror(str(tmp_path / "mirror"), tmp_path / "run", Config())
    there.offer(5, lambda copies: copies)
    there.wait()
    (tmp_path / "other").mkdir()
    back = Mirror(str(tmp_path / "mirror"), tmp_path / "other", Config())
    assert back.steps() == [5] and back.fetch(5)
    found = {
        p.relative_to(tmp_path / "other/5").as_posix(): p for p in (tmp_path / "other/5").rglob("*") if p.is_file()
    }
    assert {name: path.read_bytes() for name, path in found.items()} == content


@pytest.mark.parametrize("text", ["{", "3", '["6"]', "[-1]", "[true]", "[" * 100_000])
def test_a_damaged_list_of_unwanted_copies_is_one_line(text, tmp_path):
    """An empty one in its place would bring back what the run went behind."""
    (tmp_path / UNWANTED).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged: it names the copies"):
        Mirror(str(tmp_path / "mirror"), tmp_path / "checkpoints", Config())
    assert (tmp_path / UNWANTED).read_text() == text and not (tmp_path / "mirror").exists()
