"""Standard input is kept in a file that exists while a process reads it, and no longer."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from data.errors import DataError
from data.preparation import spool
from data.token_files import formats

ROOT = pathlib.Path(__file__).parents[1]
TEXT = b"".join(b"line %d of the text\n" % i for i in range(2000))


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_text_is_the_same_file_and_the_last_user_removes_it(tmp_path):
    with spool.spooled(io.BytesIO(TEXT), tmp_path, "txt") as first:
        with spool.spooled(io.BytesIO(TEXT), tmp_path, "txt") as second:
            assert first == second and first.read_bytes() == TEXT
            with spool.spooled(io.BytesIO(TEXT + b"x"), tmp_path, "txt") as other:
                assert other != first and other.read_bytes() == TEXT + b"x"
        assert first.read_bytes() == TEXT and names(tmp_path) == [first.name]
        assert spool.content_hash(first) and not spool.content_hash(tmp_path / "a.txt")
    assert not names(tmp_path)


def test_what_a_killed_run_left_is_taken_up_if_it_is_whole_and_is_removed_in_the_end(tmp_path):
    with spool.spooled(io.BytesIO(TEXT), tmp_path, "txt") as path:
        name = path.name
    others = [".meshlm-stdin-notes", ".meshlm-stdin-notes.txt", ".stdin-abc.txt", "a.txt"]
    for other in others:
        (tmp_path / other).write_text("mine")
    (tmp_path / ".meshlm-stdin-abcd_123.partial").write_text("half")
    for left in (TEXT, TEXT[:99]):
        (tmp_path / name).write_bytes(left)
        before = (tmp_path / name).stat()
        with spool.spooled(io.BytesIO(TEXT), tmp_path, "txt") as path:
            assert path.name == name and path.read_bytes() == TEXT
            assert (path.stat().st_ino == before.st_ino) == (left == TEXT)
        assert names(tmp_path) == sorted(others)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(DataError, match="cannot store standard input"),
        spool.spooled(io.BytesIO(TEXT), tmp_path / "file", "txt"),
    ):
        pass


def start(tmp_path: pathlib.Path, source: str, *argv: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.prepare", f"--source={source}", f"--out={tmp_path / 'out'}", *argv]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_nothing_that_the_next_run_does_not_remove(number, tmp_path):
    process = start(tmp_path, "-", "--tokenizer=byte")
    process.stdin.write(TEXT * 50)
    process.stdin.flush()
    for _ in range(600):
        if any(tmp_path.glob(".meshlm-stdin-*")):
            break
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate()
    assert process.returncode not in (0, None)
    left = names(tmp_path)
    assert len(left) == 1 if number == signal.SIGKILL else not left
    again = start(tmp_path, "-", "--tokenizer=byte")
    _, errors = again.communicate(TEXT)
    assert again.returncode == 0, errors
    assert names(tmp_path) == ["out"]


def test_a_pipe_is_read_as_standard_input_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = start(tmp_path, str(tmp_path / "pipe"), "--stdin_format=jsonl")
    (tmp_path / "pipe").write_bytes(b'{"text": "one"}\n{"text": "two"}\n' * 20)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert formats.read_manifest(tmp_path / "out").splits["train"].documents
    assert names(tmp_path) == ["out", "pipe"]


@pytest.mark.parametrize("source", ["/dev/stdin", "/dev/fd/0"])
def test_standard_input_by_its_name(source, tmp_path):
    process = start(tmp_path, source)
    _, errors = process.communicate(TEXT)
    assert process.returncode == 0, errors
    assert names(tmp_path) == ["out"]


def test_two_preparations_of_the_same_standard_input_in_one_folder(tmp_path):
    processes = [start(tmp_path, "-", f"--out={tmp_path / name}") for name in ("a", "b", "c")]
    for process in processes:
        process.stdin.write(TEXT)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert names(tmp_path) == ["a", "b", "c"]
    assert len({formats.read_manifest(tmp_path / name).fingerprint() for name in "abc"}) == 1
