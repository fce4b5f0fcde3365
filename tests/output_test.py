"""A dataset gets its name once complete, one process writes it at a time, and only that process's files are changed."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data.errors import DataError
from data.preparation import documents, merge, output, pipeline
from data.storage import files
from data.token_files import formats

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"text {i} " * (i + 3))
    return folder


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def run(out: pathlib.Path, source: pathlib.Path, tokenizer: str = "byte", **changes) -> formats.Manifest:
    return pipeline.prepare_dataset(out, source=str(source), tokenizer=tokenizer, val_fraction=0.3, **changes)


def contents(folder: pathlib.Path) -> dict[str, bytes | str]:
    """Everything in a folder, hidden or not: the contents of files, and the kind of folders and links."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        what = f"link to {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
        found[path.relative_to(folder).as_posix()] = what
    return found


KILLED = """
import functools, itertools, os, pathlib, random, shutil, signal, sys
from data.preparation import documents, merge, output, pipeline
from tests.output_test import contents
documents.UNIT_BYTES, merge.NOTE_UNITS, merge.SHARD_TOKENS = 40, 2, 70
os.fsync = lambda handle: None  # what is written outlives a process that is killed
place, source = map(pathlib.Path, sys.argv[1:3])
before, asked = sys.argv[3:5]
out, kept = place / "out", source.parent / "kept"

def make(tokenizer):
    pipeline.prepare_dataset(out, source=str(source), tokenizer=tokenizer, val_fraction=0.3, overwrite=True)

def in_a_child(function):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        function()
    except BaseException as e:
        print(type(e).__name__, e, flush=True)
        os._exit(1)
    os._exit(0)

def killed_at(point, asked):
    calls = itertools.count()
    def hooked(function, *args, **kwargs):
        if next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, functools.partial(hooked, getattr(os, name)))
    make(asked)

assert in_a_child(lambda: make(asked)) == 0
new = contents(out)
shutil.rmtree(out)
old = new
if before:
    assert in_a_child(lambda: make(before)) == 0
    old = contents(out)
    out.rename(kept)
def check(point):
    found = [contents(path.parent) for path in place.rglob("manifest.json")]
    for one in found:
        one.pop(output.MARK, None)
    assert not before or old in found or new in found, (point, contents(place).keys())
    if out.exists():
        one = contents(out)
        one.pop(output.MARK, None)
        assert one in (old, new), (point, one.keys())

def check_end(point):
    assert in_a_child(lambda: make(asked)) == 0, point
    assert contents(out) == new and os.listdir(place) == ["out"], (point, contents(place).keys())
    shutil.rmtree(out)

def begin():
    if before:
        shutil.copytree(kept, out)

for points in itertools.count():
    begin()
    status = in_a_child(lambda: killed_at(points, asked))
    if status == 0:
        break
    assert status == signal.SIGKILL, (points, status)
    check(points)
    check_end(points)
shutil.rmtree(out)
draw = random.Random(0)
for history in range(20):
    begin()
    for _ in range(draw.randint(2, 4)):
        point = draw.randint(points // 2, points)
        status = in_a_child(lambda: killed_at(point, draw.choice([asked, asked, before or asked])))
        assert status in (0, signal.SIGKILL), (history, point, status)
        check((history, point))
    check_end(history)
print(points, "points")
"""


@pytest.mark.parametrize("before", ["", "char"])
def test_a_kill_at_any_change_to_the_disk_loses_nothing_and_the_same_command_ends_well(before, source, place):
    """Kills the process before each rename, unlink, mkdir and rmdir: one kill at a time, then a few in a row."""
    command = [sys.executable, "-c", KILLED, place, source, before, "byte"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 40


def prepare_command(out: pathlib.Path, source: pathlib.Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "launch.prepare", f"--source={source}", f"--out={out}", "--val_fraction=0.3", *more]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_preparations_of_one_dataset_at_once(there, overwrite, source, place, tmp_path):
    """Each succeeds or ends with one line; the dataset is what one of them should write, or what was there before."""
    whole = {}
    for tokenizer in ("byte", "char"):
        run(tmp_path / tokenizer, source, tokenizer)
        whole[tokenizer] = contents(tmp_path / tokenizer)
    out = place / "out"
    if there:
        shutil.copytree(tmp_path / "byte", out)
    commands = [
        [*prepare_command(out, source, f"--tokenizer={tokenizer}"), *["--overwrite"] * overwrite]
        for tokenizer in ("char", "byte", "char")
    ]
    started = [
        subprocess.Popen(c, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for c in commands
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert any(code == 0 for *_, code in ended)
    for stdout, stderr, code in ended:
        assert code in (0, 3) and stderr.count("\n") == (code == 3), (stdout, stderr)
        assert not stderr or "is being written by" in stderr or (not overwrite and "another request" in stderr)
    assert contents(out) in whole.values()
    if there and not overwrite:
        assert contents(out) == whole["byte"]
    assert os.listdir(place) == ["out"]


def foreign_folder(folder: pathlib.Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("precious one")
    (folder / "sub/b.txt").write_text("precious two")


def forged(partial: pathlib.Path, kind: str, source: pathlib.Path) -> None:
    """Puts something where a dataset is to be written, as may happen by accident."""
    elsewhere = partial.with_name("elsewhere")
    if kind == "a file":
        partial.write_text("mine")
    elif kind == "a link to a folder":
        foreign_folder(elsewhere)
        partial.symlink_to(elsewhere)
    elif kind == "a link that leads nowhere":
        partial.symlink_to(elsewhere)
    elif kind == "a folder":
        foreign_folder(partial)
    elif kind == "empty folders":
        (partial / "sub/sub").mkdir(parents=True)
    elif kind == "a hidden file":
        partial.mkdir()
        (partial / ".hidden").touch()
    elif kind == "a dataset":
        run(elsewhere, source, "char")
        elsewhere.rename(partial)
    elif kind == "names of ours":
        (partial / "units").mkdir(parents=True)
        (partial / "units/000000.json").write_text("{}")
    elif kind == "a mark that is empty":
        partial.mkdir()
        (partial / output.MARK).touch()
    else:
        output.Output(elsewhere).begin("of another request")
        (elsewhere.with_name("elsewhere.partial") / "units/000000.json").write_text("{}")
        if kind == "a copy":
            shutil.copytree(elsewhere.with_name("elsewhere.partial"), partial)
            return
        elsewhere.with_name("elsewhere.partial").rename(partial)
        if kind == "others in ours":
            foreign_folder(partial / "theirs")
        elif kind == "others in units":
            foreign_folder(partial / "units/theirs")
        elif kind == "a link in ours":
            foreign_folder(elsewhere)
            (partial / "tokenizer").symlink_to(elsewhere)
        elif kind == "a link for a file":
            (elsewhere).write_text("mine")
            (partial / "train-00000.bin").symlink_to(elsewhere)


KINDS = [
    "a file", "a link to a folder", "a link that leads nowhere", "a folder", "empty folders", "a hidden file",
    "a dataset", "names of ours", "a mark that is empty", "a copy", "others in ours", "others in units",
    "a link in ours", "a link for a file",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_taken_for_an_unfinished_dataset_that_is_not_one(kind, source, place):
    forged(place / "out.partial", kind, source)
    before = contents(place)
    with pytest.raises(DataError, match=r"out\.partial"):
        run(place / "out", source)
    assert contents(place) == before
    run(place / "other", source)


def test_what_is_left_of_another_request_is_cleared_and_what_a_kill_left_half_written_is_not_kept(source, place):
    partial = place / "out.partial"
    output.Output(place / "out").begin("of another request")
    for name in (
        "units/000000.json",
        "units/000000.train.tokens",
        f"{output.MARK}.writing-{'0' * 16}",
        "val-00000.bin",
    ):
        (partial / name).write_text("old")
    run(place / "out", source)
    run(place / "undisturbed", source)
    assert contents(place / "out") == contents(place / "undisturbed")
    assert sorted(os.listdir(place)) == ["out", "undisturbed"]


def test_a_mark_that_was_never_completed_does_not_stand_in_the_way(source, place):
    (place / "out.partial").mkdir()
    (place / f"out.partial/{output.MARK}.writing-{'0' * 16}").write_text("{")
    run(place / "out", source)
    assert os.listdir(place) == ["out"]
    assert output.MARK not in str(contents(place))


@pytest.mark.parametrize("mine", ["notes.md", "sub/notes.md", "tokenizer/notes.md", "train-00000.txt", ".hidden"])
def test_a_dataset_with_files_of_others_is_not_replaced(mine, source, place):
    out = place / "out"
    run(out, source)
    (out / mine).parent.mkdir(exist_ok=True)
    (out / mine).write_text("mine")
    before = contents(place)
    with pytest.raises(DataError, match=r"not from launch\.prepare"):
        run(out, source, "char", overwrite=True)
    assert contents(place) == before
    run(out, source)  # the folder is still a dataset


def test_packed_rows_go_with_the_dataset_that_is_replaced(source, place):
    run(place / "out", source)
    subprocess.run(
        [sys.executable, "-m", "launch.pack", place / "out", "--seq_len=16"], env=ENVIRONMENT, check=True, timeout=60
    )
    assert (place / "out/train.packed-16.bin").exists()
    files.lock_path(place / "out/train.packed-32.bin").touch()  # a killed launch.pack leaves such files
    (place / f"out/train.packed-32.bin.writing-{'0' * 16}").touch()
    run(place / "out", source, "char", overwrite=True)
    assert os.listdir(place) == ["out"] and not (place / "out/train.packed-16.bin").exists()


def test_out_may_be_a_link_or_the_folder_one_is_in(source, place, tmp_path, monkeypatch):
    run(place / "out", source)
    (place / "link").symlink_to("out")
    run(place / "link", source, "char", overwrite=True)
    assert (place / "link").is_symlink() and sorted(os.listdir(place)) == ["link", "out"]
    (place / "ahead").symlink_to(tmp_path / "disk/new")
    run(place / "ahead", source)
    assert formats.is_dataset(tmp_path / "disk/new")
    done = subprocess.run(
        [*prepare_command(pathlib.Path("."), source), "--overwrite", "--tokenizer=byte"],
        cwd=place / "out", env=ENVIRONMENT, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and f"{place}/out: train" in done.stdout, done
    assert contents(place / "out") == contents(tmp_path / "disk/new")


def refused(out: pathlib.Path, source: pathlib.Path) -> str:
    for overwrite in (False, True):
        with pytest.raises(DataError) as e:
            run(out, source, overwrite=overwrite)
    return str(e.value)


def test_places_where_no_dataset_can_be(source, place, tmp_path):
    (place / "file").write_text("mine")
    (place / "loop").symlink_to("loop")
    before = contents(tmp_path)
    for out in (place / "file/out", place / "loop", pathlib.Path("/"), place / ("n" * 300), place / "some.partial",
                source, tmp_path, pathlib.Path("/proc/out")):  # fmt: skip
        refused(out, source)
    output.Output(place / "out").begin("")
    (place / "out.partial/units/a.txt").write_text("mine")
    assert "move it away" in refused(place / "out", place / "out.partial/units")
    assert (place / "out.partial/units/a.txt").read_text() == "mine"
    shutil.rmtree(place / "out.partial")
    refused(place / "out", place / "loop")
    assert contents(tmp_path) == before
    command = prepare_command(place / "file/out", source)
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done


@pytest.mark.parametrize("character", ["n", "é"])
def test_a_name_that_leaves_no_room_for_others_is_refused_at_once(source, place, character):
    extra = len(place.joinpath("x").with_name(".x.meshlm-replaced").name) - 1
    for length in (255 - extra + 1, 242, 250, 255):
        out = (
            place
            / "folder"
            / (character * (length // len(character.encode())) + "n" * (length % len(character.encode())))
        )
        assert len(os.fsencode(out.name)) == length
        assert f"at most {255 - extra} bytes" in refused(out, source)
    deep = place.joinpath(*["d" * 200] * 19)
    assert "too long" in refused(deep / ("n" * (4000 - len(str(deep)))), source)
    assert not any(place.iterdir())
    for _ in range(2):
        run(place / ("n" * (255 - extra)), source, overwrite=True)


def test_a_folder_that_cannot_be_written(source, place):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    place.chmod(0o555)
    assert "cannot write" in refused(place / "out", source)
    place.chmod(0o755)


def test_a_dataset_is_found_where_nothing_can_be_written(source, place):
    made = run(place / "out", source)
    place.chmod(0o555)
    try:
        assert run(place / "out", source) == made
    finally:
        place.chmod(0o755)


SMALL = """
import launch
from data.preparation import documents, merge, pipeline
documents.UNIT_BYTES, merge.NOTE_UNITS, merge.SHARD_TOKENS, pipeline.INLINE_BYTES = 3000, 3, 30_000, 0
if __name__ == "__main__":
    from launch import cli, prepare
    cli.run(prepare.main)
"""


def test_killed_with_its_workers_again_and_again(tmp_path):
    """SIGKILL and Ctrl-C, at random times, leave one line at most and no process; the final bytes are the same."""
    (tmp_path / "small.py").write_text(SMALL)
    lines = (json.dumps({"text": f"{i} " * (i % 50)}) + "\n" for i in range(15000))
    (tmp_path / "in.jsonl").write_text("".join(lines))

    def start(out: str) -> subprocess.Popen:
        argv = [f"--source={tmp_path / 'in.jsonl'}", f"--out={tmp_path / out}", "--tokenizer=bpe:300", "--workers=2",
                "--count_duplicates"]  # fmt: skip
        command = [sys.executable, tmp_path / "small.py", *argv]
        return subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, start_new_session=True)

    draw, codes = random.Random(1), []
    for number in itertools.count():
        files.lock_path(tmp_path / "out").unlink(missing_ok=True)
        process = start("out")
        try:
            while process.poll() is None and not files.lock_path(tmp_path / "out").exists():
                time.sleep(0.01)
            _, stderr = process.communicate(timeout=draw.uniform(0, 0.6) if number < 5 else 120)
            assert process.returncode == 0 and not stderr
            break
        except subprocess.TimeoutExpired:
            if number % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
            codes.append(process.returncode)
        assert process.returncode in (-signal.SIGKILL, 130, 0) and "Traceback" not in stderr, stderr
        assert process.returncode == -signal.SIGKILL or stderr.strip().count("\n") == 0, stderr
        with pytest.raises(ProcessLookupError):  # every process of its group has ended
            for _ in range(200):
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    assert {130, -signal.SIGKILL} <= set(codes)
    assert start("undisturbed").wait(timeout=60) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out", "small.py", "undisturbed"]


def test_what_an_interrupted_preparation_left_is_checked(source, place, monkeypatch):
    """Truncates, extends or replaces each leftover file: the dataset is the same, or one line says what to do."""
    monkeypatch.setattr(documents, "UNIT_BYTES", 30)
    monkeypatch.setattr(merge, "NOTE_UNITS", 2)
    expected = contents(place / "expected") if run(place / "expected", source, "char") else {}
    with monkeypatch.context() as patch:
        append = merge.Merge._append

        def fails(self: merge.Merge, result: dict) -> None:
            if self.next == 3:
                raise KeyboardInterrupt
            append(self, result)

        patch.setattr(merge.Merge, "_append", fails)
        with pytest.raises(KeyboardInterrupt):
            run(place / "out", source, "char")
    shutil.copytree(place / "out.partial", place / "kept")
    written = [p.relative_to(place / "kept") for p in (place / "kept").rglob("*") if p.is_file()]
    assert {"merged.json", "train-00000.bin", "units/000002.json"} <= {p.as_posix() for p in written}
    outcomes = set()
    for name, change in itertools.product(written, (lambda raw: raw[:-2], lambda raw: raw + b"{}", lambda raw: b"{}")):
        if name.name == output.MARK:
            continue
        for path in (place / "kept").rglob("*"):
            if path.is_file():
                shutil.copyfile(path, place / "out.partial" / path.relative_to(place / "kept"))
        damaged = place / "out.partial" / name
        damaged.write_bytes(change(damaged.read_bytes()))
        try:
            run(place / "out", source, "char")
            outcomes.add("the same")
        except DataError as e:
            assert "\n" not in str(e), (name, e)
            outcomes.add("an error")
            continue
        assert contents(place / "out") == expected, name
        shutil.rmtree(place / "out")
        shutil.copytree(place / "kept", place / "out.partial")
    assert outcomes == {"the same", "an error"}


@pytest.mark.parametrize("name", ["summary.json", "train.documents.bin", "tokenizer/meshlm_tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"tokens": 1}'])
def test_a_dataset_that_is_not_whole_is_not_said_to_be_there(source, place, name, content):
    run(place / "out", source)
    if content is None:
        (place / "out" / name).unlink()
    else:
        (place / "out" / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        run(place / "out", source)
    assert "\n" not in str(e.value)
    assert run(place / "out", source, overwrite=True)


def test_a_dataset_inside_its_source_is_the_same_after_a_kill(source):
    """What a killed preparation leaves inside the source is neither read nor counted."""
    out = source / "sets/out"
    run(out, source)
    undisturbed = contents(out)
    shutil.rmtree(source / "sets")
    output.Output(out).partial.mkdir(parents=True)
    output.Output(out).begin("of another request")
    (source / "sets/out.partial/units/000000.json").write_text("{}")
    files.lock_path(out).write_text("host process 1")
    run(out, source)
    assert contents(out) == undisturbed
    run(source / "sets/more", source)
    assert pipeline.read_summary(source / "sets/more")["documents"] == 4
    assert pipeline.read_summary(source / "sets/more")["left_out"]["counts"] == {"dataset, left out": 1}


OF_DATASETS = ["train-00042.bin", "val-00007.bin", "val.packed-7.bin", "tokenizer/tokenizer.json",
               "tokenizer/tokenizer.model", "tokenizer/ranks.tiktoken", "tokenizer/minbpe.model"]  # fmt: skip
OF_UNFINISHED = ["characters.json", "merged.json", output.MARK, "units/000000.json", f"summary.json.writing-{'0' * 16}"]


@pytest.mark.parametrize(
    ("name", "complete"), [(n, True) for n in OF_DATASETS + OF_UNFINISHED] + [(n, False) for n in OF_DATASETS]
)
def test_files_named_as_ours_in_a_dataset_are_not_ours(tmp_path, name, complete):
    """Such files are also kept if the dataset is not `complete`: its preparation was killed before the last rename."""
    source = tmp_path / "a.txt"
    source.write_text("some words of a text\n" * 40)
    run(tmp_path / "out", source, "char")
    folder = tmp_path / "out"
    if not complete:
        folder = folder.rename(tmp_path / "out.partial")
        output.Output(tmp_path / "other").begin("of another request")
        mark = json.loads((tmp_path / "other.partial" / output.MARK).read_text())
        (folder / output.MARK).write_text(json.dumps(mark | {"folder": folder.stat().st_ino}))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"of others")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=f"{re.escape(name)}.*would be lost"):
        run(tmp_path / "out", source, "byte", overwrite=True)
    assert contents(tmp_path) == before


def test_a_dataset_of_an_earlier_version_is_replaced(source, place):
    """The manifest of such a dataset names only the shards."""
    out = place / "out"
    run(out, source, "bpe:300")
    manifest = dataclasses.replace(formats.read_manifest(out), files={})
    (out / formats.MANIFEST).write_text(manifest.to_json())
    run(out, source, "char", overwrite=True)
    assert not (out / "tokenizer/tokenizer.json").exists()
