"""A name from outside has one place below the folder or is refused; a pattern means the same on disks and in stores."""

import glob
import os
import pathlib
import random

import pytest

from data.errors import DataError
from data.storage import names

ALPHABET = ("a", "b", ".", "..", "/", "//", "*", "\\", "\0", "\n", "é", "\udce9", "~", " ", "x" * 300, "")


def test_any_name_has_a_place_below_the_folder_or_is_refused(tmp_path):
    """Tries random names of dangerous parts: files of accepted names are in the folder, and nothing is outside."""
    rng = random.Random(0)
    inside = tmp_path / "outer" / "inside"
    made = 0
    for _ in range(3000):
        name = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 6)))
        try:
            with names.open_parent(inside, name) as (folder, last):
                os.close(os.open(last, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, dir_fd=folder))
        except DataError:
            continue
        except OSError:  # a file is where a folder should be
            continue
        path = inside / name
        assert path.is_file() and inside in path.resolve().parents
        made += 1
    assert made > 200
    assert os.listdir(tmp_path) == ["outer"] and os.listdir(tmp_path / "outer") == ["inside"]


@pytest.mark.parametrize(
    "name",
    ["", "/etc/x", "a//b", "a/", "./a", "a/..", "a/../../b", "a\0b", "é" * 130, "/".join(["d" * 99] * 40), "\ud800"],
)
def test_a_name_without_a_place_is_refused(name):
    with pytest.raises(DataError, match="rename it"):
        names.safe_parts(name)


def test_links_lead_nowhere(tmp_path):
    """No link is followed, even if it replaces a folder while the folder is in use."""
    (tmp_path / "elsewhere").mkdir()
    with names.open_parent(tmp_path / "cache", "a/b/c"):
        pass
    (tmp_path / "cache/a/b").rmdir()
    (tmp_path / "cache/a/b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="b is a link or a file"), names.open_parent(tmp_path / "cache", "a/b/c"):
        pass
    with names.open_parent(tmp_path / "cache", "d/e") as (folder, last):
        (tmp_path / "cache/d").rename(tmp_path / "cache/f")
        (tmp_path / "cache/d").symlink_to(tmp_path / "elsewhere")
        os.close(os.open(last, os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    assert os.listdir(tmp_path / "elsewhere") == [] and (tmp_path / "cache/f/e").exists()


def test_a_file_is_no_folder():
    names.check_apart(["a/b", "a/c", "ab", "a.b/c"], "gs://x")
    for both in (["a", "a/b"], ["a/b", "a/b/c/d"]):
        with pytest.raises(DataError, match="a file cannot be a folder"):
            names.check_apart(both, "gs://x")


def test_patterns_are_those_of_the_file_system(tmp_path):
    """Compares random trees and patterns with the standard library's glob, without links, whose loops glob follows."""
    rng = random.Random(1)
    pieces = ["a", "b", ".h", "a.txt", "b.bin", "[a", "c?d"]
    wild = ["*", "**", "a*", "*.txt", "?", "[ab]", "[!a]*", ".*", "*.*", "a", "b", "[[]a", "c[?]d"]
    for i in range(60):
        root = tmp_path / str(i)
        for _ in range(12):
            path = root.joinpath(*rng.choices(pieces, k=rng.randint(1, 4)))
            if not any(p.is_file() for p in path.parents) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("x")
        there = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        for _ in range(40):
            pattern = "/".join(rng.choices(wild, k=rng.randint(1, 4)))
            expected = {
                pathlib.Path(p).relative_to(root).as_posix()
                for p in glob.glob(f"{root}/{pattern}", recursive=True)
                if os.path.isfile(p)
            }
            assert {name for name in there if names.matches(name, pattern)} == expected, pattern
            assert names.find_files(root, pattern) == (sorted(expected), 0), pattern


def test_every_file_once_by_its_own_name(tmp_path):
    """The tree has loops, links to folders and files, hard links, and links that lead nowhere or to themselves."""
    for name in ("a/1.txt", "a/b/2.txt", "other/3.txt", "a/.h/9.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    root = tmp_path / "a"
    for link, target in (
        ("self", "."),
        ("b/up", ".."),
        ("part", "../other"),
        ("x", "x"),
        ("d.txt", "/none"),
        ("0.txt", "1.txt"),
    ):
        (root / link).symlink_to(target)
    (root / "z.txt").hardlink_to(root / "b/2.txt")
    assert names.find_files(root, "**/*.txt") == (["1.txt", "b/2.txt", "part/3.txt"], 2)
    assert names.find_files(root, "*/*.txt")[0] == [
        "b/2.txt",
        "part/3.txt",
        "self/1.txt",
    ]  # no other name of this file has two parts
    assert names.find_files(tmp_path / "none", "*") == ([], 0)


def test_a_folder_that_cannot_hold_a_match_is_not_entered(tmp_path, monkeypatch):
    (tmp_path / "a/tokens").mkdir(parents=True)
    (tmp_path / "a/secret").mkdir()
    (tmp_path / "a/tokens/1.bin").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names.find_files(tmp_path, "*/tokens/*.bin") == (["a/tokens/1.bin"], 0)
    with pytest.raises(PermissionError):
        names.find_files(tmp_path, "**/*.bin")


def test_a_pattern_stays_below_its_folder():
    assert names.split_at_wildcard("/a/b/*/c") == (pathlib.Path("/a/b"), "*/c")
    assert names.split_at_wildcard("*.txt") == (pathlib.Path("."), "*.txt")
    with pytest.raises(DataError, match="after a wildcard"):
        names.split_at_wildcard("a/*/../b")


@pytest.mark.parametrize(
    "name", ["validate", "my_vals", "valset", "trainval", "VALID-set", "x-validations", "devset", "tests"]
)
def test_names_of_files_that_may_be_held_out(name):
    assert names.has_word(f"{name}.bin", names.TEST)


@pytest.mark.parametrize(
    "name", ["train", "interval", "value", "latest", "device", "contest", "valley", "dataset", "data"]
)
def test_names_of_other_files(name):
    assert not names.has_word(f"{name}_0.bin", names.TEST)
