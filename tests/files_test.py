"""Files appear complete, and locks hold, even if other processes write there or a process is killed at any time."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from data import packing
from data.errors import DataError
from data.preparation import pipeline
from data.storage import files
from data.token_files import formats

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def start(code: str, *argv: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


ADD = """
import pathlib, sys
from data.storage import files
path = pathlib.Path(sys.argv[1])
for _ in range(100):
    with files.locked(path, wait=True) as held:
        assert held
        path.write_text(str(int(path.read_text()) + 1))
"""


def test_a_lock_that_is_removed_each_time_holds(tmp_path):
    """Four processes increment one counter. A process that waits for a lock file must not get the lock if the owner
    removes the file."""
    (tmp_path / "count").write_text("0")
    adding = [start(ADD, tmp_path / "count") for _ in range(4)]
    for process in adding:
        assert process.communicate(timeout=60) and process.returncode == 0
    assert (tmp_path / "count").read_text() == "400"
    assert os.listdir(tmp_path) == ["count"]


HOLD = """
import pathlib, sys, time
from data.storage import files
with files.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path):
    holder = start(HOLD, tmp_path / "x")
    try:
        assert holder.stdout and holder.stdout.readline()
        with pytest.raises(files.LockHeld, match=f"process {holder.pid}"), files.locked(tmp_path / "x"):
            pass
        assert files.lock_path(tmp_path / "x").exists()
    finally:
        holder.kill()
        holder.wait()
    with files.locked(tmp_path / "x") as alone:
        assert alone
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_what_is_not_a_lock_file_is_not_written(kind, tmp_path):
    lock = files.lock_path(tmp_path / "x")
    (tmp_path / "mine").write_text("mine")
    if kind == "link":
        lock.symlink_to("mine")
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.write_text("mine")
    with pytest.raises((OSError, DataError)), files.locked(tmp_path / "x"):
        pass
    assert (tmp_path / "mine").read_text() == "mine" and lock.lstat()
    assert kind != "file" or lock.read_text() == "mine"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    monkeypatch.setattr(files.log, "propagate", True)
    with files.locked(tmp_path / "x") as alone:
        assert not alone
    assert "cannot be locked (No locks available)" in caplog.text and not os.listdir(tmp_path)


def test_writers_of_one_path_do_not_harm_each_other(tmp_path):
    path = tmp_path / "x"
    with files.atomic_write(path) as one, files.atomic_write(path) as other:
        one.write(b"one" * 1000)
        other.write(b"other")
    assert path.read_bytes() == b"one" * 1000
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as f:
        f.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one" * 1000 and os.listdir(tmp_path) == ["x"]


def test_what_others_left_half_written_is_removed_and_nothing_else(tmp_path):
    left = [f"x.writing-{'0a' * 8}", f"x.writing-{'1b' * 8}"]
    mine = ["x", "x.writing", "x.writing-1", f"y.writing-{'0' * 16}", f"x.writing-{'0' * 16}.txt"]
    for name in left + mine:
        (tmp_path / name).touch()
    files.remove_half_written(tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == sorted(mine)


STOPPED = """
import os, pathlib, signal, sys
from data import packing
packing.pack_shard = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGSTOP)
packing.pack_dataset(pathlib.Path(sys.argv[1]), 16)
"""
PACK = "import sys; from launch import cli, pack; cli.run(pack.main, arguments=1)"


def test_hosts_that_pack_one_folder_at_once(tmp_path):
    """The other hosts wait for the first; when it is killed, one of them writes the index, and the rest find it."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    dataset = tmp_path / "set"
    pipeline.prepare_dataset(dataset, source=str(tmp_path / "in.jsonl"), tokenizer="byte")
    before = sorted(os.listdir(dataset))
    first = start(STOPPED, dataset)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    others = [start(PACK, dataset, "--seq_len=16") for _ in range(3)]
    for process in others:
        assert process.stdout and "waiting for" in process.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    ended = [(*process.communicate(timeout=60), process.returncode) for process in others]
    assert all(code == 0 and not stderr for _, stderr, code in ended), ended
    assert sum("existed already" in stdout for stdout, *_ in ended) == 2
    assert sorted(os.listdir(dataset)) == sorted([*before, "train.packed-16.bin"])
    packing.read_index(dataset, formats.read_manifest(dataset), 16).load()
