"""The mirror, a second place for copies of checkpoints: its content must not affect any other file."""

import dataclasses
import errno
import functools
import json
import logging
import shutil
import types

import pytest

from data.errors import UserError
from data.storage import remote
from trainer.config import CheckpointConfig, Config, OptimizerConfig, to_json
from trainer.errors import CheckpointError, ConfigError
from trainer.reliability import identity, reading
from trainer.reliability.checkpoint import Checkpoints
from trainer.reliability.mirror import MARK, MIRRORS, Mirror
from trainer.reliability.reading import Unreadable
from trainer.reliability.restarts import METADATA_FILE


def test_keys_that_lie_elsewhere_are_not_fetched(tmp_path, monkeypatch, caplog):
    """A store may contain any key, and some keys would overwrite other files of this machine."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    monkeypatch.setattr(reading, "PAUSES_S", ())
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run").mkdir()
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "run", Config())
    content = {f"checkpoints/5/{METADATA_FILE}": b"{}", "checkpoints/5/a/b": b"whole"}
    content[MARK] = (tmp_path / "mirror" / MARK).read_bytes()
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
        assert not mirror.fetch(5) and "is not a path below a folder" in caplog.messages[-1]
        assert not (tmp_path / "run/5").exists()
    keys = content
    heard: list[str] = []
    mirror.on_progress = lambda: heard.append("a block")
    assert mirror.fetch(5) and (tmp_path / "run/5/a/b").read_bytes() == b"whole" and heard
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    keys = {MARK: content[MARK]} | {
        f"checkpoints/{name}/{METADATA_FILE}": b"{}" for name in ("7", "²", "-1", "1" * 5000, "x", "08", "")
    }
    assert mirror.complete_copies() == {7}


def test_only_leftovers_of_copies_are_removed(tmp_path):
    """A mirror may be a folder that holds other things."""
    place = tmp_path / "mirror"
    ours = ["config.json.__lock", "checkpoints/5/a.__lock", "checkpoints/5/b/c.__lock"]
    others = ["x.__lock", "project/y.__lock", "checkpoints/z.__lock", "checkpoints/notes/w.__lock"]

    def write(*names):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("x")

    def left():
        return {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}

    write(ours[0], *others)
    Mirror(str(place), tmp_path, Config())
    assert left() == {*others, "config.json", MARK}
    write(*ours, "checkpoints/5/d")
    Mirror(str(place), tmp_path, Config())
    assert left() == {*others, "config.json", MARK, "checkpoints/5/d"}


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
    """If a run has lost its folder, it must not start over, because it would later delete the copies."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    Mirror(str(tmp_path / "mirror"), tmp_path / "other", Config())
    (tmp_path / "mirror/checkpoints/5").mkdir(parents=True)
    (tmp_path / "mirror/checkpoints/5" / METADATA_FILE).write_text("{}")
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "run/checkpoints", Config())
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), mirror=mirror)
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_list", lambda: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(CheckpointError, match="no network"):
            checkpoints._next_step({}, choose=None)
        assert mirror.complete_copies() == set()
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_download", lambda *a: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(Unreadable, match="no network"):
            checkpoints._next_step({}, choose=None)


def test_a_copy_of_another_run_changes_nothing(tmp_path):
    """The mirror's config.json is written only after its newest copy has been compared with the run."""

    def refuse(meta):
        raise ConfigError(f"not this one: {meta['samples']}")

    meta = {"samples": 7}
    Mirror(str(tmp_path), tmp_path, Config(), check=refuse)  # the mirror has no copy to compare yet
    (tmp_path / "config.json").write_text(before := to_json(Config()).replace("\n", " "))
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    text = json.dumps({"custom_metadata": meta | {"digest": identity.digest(meta)}})
    (tmp_path / "checkpoints/5" / METADATA_FILE).write_text(text)
    with pytest.raises(ConfigError, match="not this one: 7"):
        Mirror(str(tmp_path), tmp_path, Config(), check=refuse)
    assert (tmp_path / "config.json").read_text() == before


def test_a_copy_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """Otherwise an older copy, or none, would be compared instead, and this run would take over the mirror."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    real, busy = Mirror._read, []

    def read(mirror, key):
        if busy and METADATA_FILE in key and busy.pop():
            raise ValueError("ABORTED: All 32 retry attempts failed: Service Unavailable")
        return real(mirror, key)

    def refuse(meta):
        raise ConfigError("not this one")

    Mirror(str(tmp_path), tmp_path, Config())
    before = (tmp_path / "config.json").read_text()
    monkeypatch.setattr(Mirror, "_read", read)
    meta = {"samples": 7}
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    text = json.dumps({"custom_metadata": meta | {"digest": identity.digest(meta)}})
    (tmp_path / "checkpoints/5" / METADATA_FILE).write_text(text)
    for times, code in ((1, 2), (2, 42)):
        busy[:] = [True] * times
        with pytest.raises(UserError) as e:
            Mirror(str(tmp_path), tmp_path, Config(), check=refuse)
        assert e.value.exit_code == code and (tmp_path / "config.json").read_text() == before


def test_there_and_back(tmp_path, monkeypatch):
    """The real store copies a checkpoint to a folder and back, in pieces; leftovers of a killed copy do no harm."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 3)
    content = {METADATA_FILE: b"{}", "a/b/c": b"leaves", "empty": b"", "d": b"four", "e": b"abc"}
    for name, raw in content.items():
        (tmp_path / "run/5" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/5" / name).write_bytes(raw)
    Mirror(str(tmp_path / "mirror"), tmp_path / "run", Config())
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


@pytest.mark.parametrize(
    "text", ["{", "3", '["6"]', '{"a": [[-1], null]}', '{"a": [[true], null]}', '{"a": 3}', "[" * 100_000]
)
def test_a_damaged_list_of_unwanted_copies_is_one_line(text, tmp_path):
    """If the list were treated as empty, copies that the run has rolled back past would be offered again."""
    (tmp_path / MIRRORS).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged: it names the copies"):
        Mirror(str(tmp_path / "mirror"), tmp_path / "checkpoints", Config())
    assert (tmp_path / MIRRORS).read_text() == text and not (tmp_path / "mirror").exists()


def mirror_of(tmp_path, **fields) -> Mirror:
    (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
    return Mirror(str(tmp_path / "mirror"), tmp_path / "run/checkpoints", Config(**fields))


def copy(mirror: Mirror, *steps: int, keep=lambda copies: copies) -> None:
    for step in steps:
        (mirror.source / str(step)).mkdir(exist_ok=True)
        for name in ("a", METADATA_FILE):
            (mirror.source / str(step) / name).write_text("{}")
        mirror.offer(step, keep)
        mirror.wait()


def unmount(tmp_path) -> None:
    (tmp_path / "mirror").rename(tmp_path / "away")
    (tmp_path / "mirror").mkdir()


def mount(tmp_path) -> None:
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "away").rename(tmp_path / "mirror")


def test_nothing_happens_in_a_mirror_that_is_not_mounted(tmp_path, monkeypatch, caplog):
    """Nothing is copied to the mount point, no copy counts as deleted, and the mirror does not count as empty."""
    monkeypatch.setattr(reading, "PAUSES_S", ())
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    mirror = mirror_of(tmp_path)
    copy(mirror, 2, 4, 6)
    unmount(tmp_path)
    with pytest.raises(Unreadable, match="is its file system mounted"):
        mirror.steps()
    with pytest.raises(Unreadable, match="is its file system mounted"):
        mirror.fetch(6)
    mirror.list_unwanted([4, 6])
    mirror.delete_unwanted()
    copy(mirror, 7)
    assert "checkpoint at step 7 was NOT copied" in caplog.text and not list((tmp_path / "mirror").iterdir())
    mount(tmp_path)
    assert mirror.steps() == [2] == mirror_of(tmp_path).steps()


def test_a_life_without_the_mirror_forgets_nothing(tmp_path, caplog, monkeypatch):
    """Unwanted copies are deleted once the mirror is mounted again; meanwhile a new mirror is created in its place."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    mirror = mirror_of(tmp_path)
    copy(mirror, 2, 4, 6)
    mirror.list_unwanted([4, 6])
    unmount(tmp_path)
    other = mirror_of(tmp_path)
    assert "a new one is created" in caplog.text and other.steps() == []
    copy(other, 3, 4)
    other.list_unwanted([3])
    mount(tmp_path)
    mirror = mirror_of(tmp_path)
    assert mirror.steps() == [2]
    copy(mirror, 5)
    assert mirror.steps() == [5, 2] and not (tmp_path / "mirror/checkpoints/6/a").exists()


@pytest.mark.parametrize("name", ["environment.json", "command.txt", "checkpoints/5/manifest.ocdbt"])
def test_what_is_not_ours_is_no_mirror(tmp_path, name):
    (tmp_path / "mirror" / name).parent.mkdir(parents=True)
    (tmp_path / "mirror" / name).write_text("theirs")
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.mirror = .*; name "):
        mirror_of(tmp_path)
    assert [p.read_text() for p in (tmp_path / "mirror").rglob("*") if p.is_file()] == ["theirs"]


def test_a_run_that_was_lost_comes_back_with_the_settings_of_its_copies(tmp_path):
    """The lost run has no settings of its own to compare. If the mirror has no copy, any settings are accepted."""
    other = {"optimizer": dataclasses.replace(Config().optimizer, peak_lr=1.0)}
    mirror_of(tmp_path)
    strict = functools.partial(Mirror, str(tmp_path / "mirror"), tmp_path / "lost/checkpoints", strict=True)
    strict(Config(**other))
    copy(mirror_of(tmp_path), 2)
    with pytest.raises(
        ConfigError, match=r"other settings; config\.optimizer\.peak_lr: .* -> 1.0; .*--allow_config_change"
    ):
        strict(Config(**other))
    assert strict(Config()).steps() == [2]
    assert mirror_of(tmp_path, **other).steps() == [2]


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(errno.ENOSPC, "full"), ValueError("odd")])
def test_a_copy_that_fails_leaves_nothing_and_later_ones_are_made(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    mirror = mirror_of(tmp_path)
    copy(mirror, 2)
    real = Mirror._copy_file

    def fail(self, path, key):
        if path.name == METADATA_FILE:
            raise error
        real(self, path, key)

    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "_copy_file", fail)
        copy(mirror, 4)
    assert "checkpoint at step 4 was NOT copied" in caplog.text and not mirror.busy
    assert [p.name for p in (tmp_path / "mirror/checkpoints").iterdir() if any(p.iterdir())] == ["2"]
    copy(mirror, 4, 6)
    assert mirror.steps() == [6, 4, 2]


def test_what_a_killed_copy_left_goes(tmp_path, monkeypatch):
    mirror = mirror_of(tmp_path)
    copy(mirror, 2)
    (tmp_path / "mirror/checkpoints/4").mkdir()
    (tmp_path / "mirror/checkpoints/4/a").write_text("half")
    mirror._record(unfinished=4)
    mirror = mirror_of(tmp_path)
    copy(mirror, 6)
    assert not (tmp_path / "mirror/checkpoints/4/a").exists() and mirror.steps() == [6, 2]


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "full"), 3), (PermissionError(errno.EACCES, "no"), 3), (OSError("no network"), 42)],
)
def test_nothing_older_takes_the_place_of_a_copy_that_cannot_be_fetched(tmp_path, monkeypatch, error, code):
    """Only damage to the copy is a reason to fetch an older one; a failed fetch leaves no partial copy on the disk."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    copy(mirror_of(tmp_path), 2, 6)
    shutil.rmtree(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), mirror=mirror_of(tmp_path))

    def fail(self, step, partial):
        partial.mkdir(parents=True, exist_ok=True)
        raise error

    monkeypatch.setattr(Mirror, "_download", fail)
    with pytest.raises(Unreadable) as e:
        checkpoints._next_step({}, choose=None)
    assert e.value.exit_code == code and not list((tmp_path / "run/checkpoints").iterdir())


def test_a_copied_run_does_not_take_the_mirror_and_a_moved_one_does(tmp_path):
    copy(mirror_of(tmp_path), 5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(ConfigError, match="run, of which this run directory is a copy; name another place"):
        Mirror(str(tmp_path / "mirror"), tmp_path / "copy/checkpoints", Config())
    shutil.copytree(tmp_path / "mirror", tmp_path / "mirror of the copy")
    Mirror(str(tmp_path / "mirror of the copy"), tmp_path / "copy/checkpoints", Config())
    (tmp_path / "run").rename(tmp_path / "moved")
    for run in ("moved", "copy"):  # nothing distinguishes the two runs now, so the first that opens the mirror takes it
        (tmp_path / run).rename(tmp_path / "here")
        Mirror(str(tmp_path / "mirror"), tmp_path / "here/checkpoints", Config())
        (tmp_path / "here").rename(tmp_path / run)


def test_a_later_copy_of_a_run_with_other_settings_is_not_gone_on_from(tmp_path):
    """A copy of the run on another machine may have made the later copy, with another learning rate."""
    copy(mirror_of(tmp_path), 40)
    place, checkpoints = str(tmp_path / "mirror"), tmp_path / "run/checkpoints"
    other = Config(optimizer=OptimizerConfig(peak_lr=0.5))
    copy(Mirror(place, checkpoints, other), 60)
    with pytest.raises(ConfigError, match="a run with other settings"):
        Mirror(place, checkpoints, Config(), newest=40, strict=True)
    Mirror(place, checkpoints, other, newest=40, strict=True)
    Mirror(place, checkpoints, Config(), newest=60, strict=True)
    Mirror(place, checkpoints, Config(), newest=40, strict=True)
    Mirror(place, checkpoints, other, newest=40)
