"""Mistakes at the command line: each gives one line and the documented exit code, without a traceback or new files."""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import launch
from configs import tiny
from launch import cli, meshlm
from tests import runs
from tests.border import Border, Ended


def call(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=runs.ROOT,
        env=runs.environment(8),
        text=True,
        capture_output=True,
        timeout=60,
    )


def assert_one_line(result: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    assert result.returncode == code, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and result.stdout == "", result
    for part in parts:
        assert part in lines[0]


TRAIN = ("launch.train", "--workdir=WORKDIR")
TINY = (*TRAIN, "--config=configs/tiny.py")


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (("launch.train", "--wrkdir=x"), 2, ["--wrkdir", "did you mean --workdir?"]),
        (TRAIN, 2, ["--config is missing"]),
        (("launch.train", "--config=configs/tiny.py"), 2, ["--workdir is missing"]),
        ((*TRAIN, "--config=configs/tyni.py"), 2, ["configs/tyni.py", "did you mean configs/tiny.py?"]),
        ((*TRAIN, "--config=configs/shakespeare_char.py:gpu"), 2, ["no variant 'gpu'", "cpu"]),
        ((*TRAIN, "--config=README.md"), 2, ["README.md"]),
        (
            (*TINY, "--config.model.num_layer=2"),
            2,
            ["--config.model.num_layer;", "did you mean --config.model.num_layers?"],
        ),
        ((*TINY, "--config.num_layers=2"), 2, ["did you mean --config.model.num_layers?"]),
        ((*TINY, "--config.modle.num_layers", "2"), 2, ["did you mean --config.model.num_layers?"]),
        ((*TINY, "--config.model=2"), 2, ["is a section", "num_layers"]),
        ((*TINY, "--config.model.num_layers=many"), 2, ["config.model.num_layers is 'many'", "whole number"]),
        ((*TINY, "--config.model.num_layers=1.5"), 2, ["config.model.num_layers is '1.5'", "whole number"]),
        ((*TINY, "--config.model.bias=maybe"), 2, ["config.model.bias is 'maybe'", "true or false"]),
        ((*TINY, "--config.model.num_layers=0"), 2, ["config.model.num_layers is 0", "at least 1"]),
        ((*TINY, "--config.model.mlp=relu"), 2, ["config.model.mlp is 'relu'", "relu2"]),
        ((*TINY, "--config.model.num_heads=3"), 2, ["num_heads = 3", "embed_dim = 128"]),
        ((*TINY, "--config.mesh.data=7"), 2, ["global_batch_size = 8", "= 7"]),
        ((*TINY, "extra"), 2, ["unexpected argument 'extra'"]),
        (("launch.prepare", "--source=a", "--out=c", "--source=b"), 2, ["--source is given 2 times"]),
        (("launch.prepare", "--source=a", "--out=c", "--special_tokens=a", "--special_tokens=b"), 2, ["given 2 times"]),
        ((*TINY, "--config.data.path=nowhere"), 3, ["launch.prepare --source=python-stdlib", "--out=nowhere"]),
        (("launch.prepare", "--source=x"), 2, ["--source and --out"]),
        (("launch.prepare", "--source=nowhere/*.txt", "--out=WORKDIR"), 3, ["nowhere/*.txt", "python-stdlib"]),
        (("launch.prepare", "--source=x", "--out=y", "--tokenizer=word"), 3, ["no tokenizer word", "char"]),
        (("launch.prepare", "--source=x", "--out=y", "--tokenizer=bpe:foo"), 2, ["--tokenizer=bpe:foo", "bpe:16384"]),
        (("launch.prepare", "--source=x", "--out=y", "--special_tokens=<a>,<a>"), 2, ["--special_tokens", "<a>"]),
        (("launch.tokenizer", "train", "--special_tokens=<a>,<a>"), 2, ["--special_tokens", "<a>"]),
        (("launch.prepare", "--source=x", "--out=y", "--val_fraction=1.5"), 2, ["val_fraction", "1.5"]),
        (("launch.sample",), 2, ["--workdir is missing"]),
        (("launch.sample", "--workdir=WORKDIR"), 2, ["not a run directory"]),
        ((*TINY, "--coordinator_address=²", "--num_processes=2", "--process_id=0"), 2, ["not HOST:PORT"]),
        ((*TINY, "--coordinator_address=a..b:5", "--num_processes=2", "--process_id=1"), 2, ["not HOST:PORT"]),
        (("launch.sample", "--workdir=README.md"), 2, ["README.md is not a run directory"]),
        (
            ("launch.plan", "--config=configs/tiny.py", f"--topology=v5p:{'9' * 5000}x1x1"),
            2,
            ["three numbers of chips"],
        ),
        (("launch.sample", "--workdir=x", "--top_p=2"), 2, ["top_p", "2"]),
        (("launch.sample", "--workdir=x", "--prompt="), 2, ["--prompt is empty"]),
        (("launch.evaluate", "--workdir=WORKDIR"), 2, ["not a run directory"]),
        (("launch.inspect",), 2, ["launch.inspect PATH"]),
        (("launch.inspect", "nowhere"), 3, ["nowhere"]),
        (("launch.inspect", "one", "two"), 2, ["unexpected argument 'two'"]),
        (("launch.inspect", "nowhere", "--seq_len=0"), 2, ["seq_len", "0"]),
        (("launch.inspect", "nowhere/*.bin"), 3, ["nowhere/*.bin"]),
    ],
)
def test_one_line_for_each_mistake(tmp_path, argv, code, parts):
    assert_one_line(call(*(a.replace("WORKDIR", str(tmp_path / "run")) for a in argv)), code, *parts)
    assert not (tmp_path / "run").exists()


def test_a_recipe_in_a_folder_with_a_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    for name in ("tiny.py", "tiny.py:one"):
        (tmp_path / "a:b/tiny.py").write_text((runs.ROOT / "configs/tiny.py").read_text())
        asked = call("launch.train", f"--workdir={tmp_path}/run", f"--config={tmp_path}/a:b/{name}")
        assert_one_line(asked, 2, "a colon begins the variant, so the path must have none")


def test_mistakes_that_need_the_devices(tmp_path):
    """The batch size is not a multiple of the eight devices, or an axis is larger than eight. Two mistakes that need no
    devices, an optimizer's name and missing flags, are checked as well."""
    data = runs.dataset(tmp_path)
    argv = runs.command(tmp_path / "run", data)[2:]
    assert_one_line(
        call(*argv, "--config.global_batch_size=12"), 2, "global_batch_size = 12", "mesh.data x mesh.fsdp = 8"
    )
    too_many = ("--config.mesh.fsdp=16", "--config.global_batch_size=16")
    assert_one_line(call(*argv, *too_many), 2, "mesh.fsdp = 16", "8 devices")
    assert_one_line(call(*argv, "--config.optimizer.name=adamv"), 2, "optimizer.name is 'adamv'", "one of adamw")
    assert_one_line(call(*argv, "--num_processes=2"), 2, "--coordinator_address", "--process_id")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["train", "prepare", "sample", "evaluate", "inspect", "tokenizer", "convert"])
def test_help(module):
    result = call(f"launch.{module}", "--help")
    assert result.returncode == 0
    assert f"python -m launch.{module}" in result.stdout
    wanted = {
        "train": "--[no]allow_config_change",
        "prepare": "--tokenizer",
        "sample": "--workdir",
        "evaluate": "--workdir",
        "inspect": "--seq_len",
        "tokenizer": "--vocab_size",
        "convert": "--from_nanogpt",
    }
    assert wanted[module] in result.stdout


SHADOWS = ("configs", "data", "json", "logging", "model", "random", "trainer", "typing")


@pytest.mark.parametrize("how", ["python -m", "meshlm", "python -m, PYTHONPATH with an empty part"])
def test_files_of_the_current_folder_are_not_taken_for_ours(tmp_path, how):
    """nanoGPT's folder has a model.py; every command that was started there ended in a traceback."""
    (tmp_path / "here").mkdir()
    for name in SHADOWS:
        (tmp_path / f"here/{name}.py").write_text("raise SystemExit('the wrong file')")
    (tmp_path / "a.txt").write_text("some words of a text\n" * 40)
    program = tmp_path / "meshlm"  # pip installs the same script
    program.write_text("import sys\nfrom launch.meshlm import main\nsys.exit(main())\n")
    command = {"meshlm": [program, "prepare"]}.get(how, ["-m", "launch.prepare"])
    argv = [sys.executable, *command, f"--source={tmp_path}/a.txt", f"--out={tmp_path}/out"]
    environment = runs.environment() | {"PYTHONPATH": f"{runs.ROOT}:" if "empty" in how else str(runs.ROOT)}
    ended = subprocess.run(argv, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and (tmp_path / "out/manifest.json").exists(), ended


def test_commands_of_the_installed_program():
    ended = call("launch.meshlm", "help")
    assert ended.returncode == 0 and all(f"  {name} " in ended.stdout for name in meshlm.COMMANDS)
    assert all((runs.ROOT / f"launch/{name}.py").exists() for name in meshlm.COMMANDS)
    assert_one_line(call("launch.meshlm", "trian"), 2, "did you mean train?")
    assert_one_line(call("launch.meshlm", "train", "--wrkdir=x"), 2, "did you mean --workdir?")
    assert "meshlm = " in (runs.ROOT / "pyproject.toml").read_text()


def test_prepare_says_what_it_made_and_does_it_once(tmp_path):
    (tmp_path / "text.txt").write_text(runs.text(1000))
    argv = ("launch.prepare", f"--source={tmp_path / 'text.txt'}", f"--out={tmp_path / 'set'}")
    first = call(*argv)
    assert first.returncode == 0 and "900 tokens" in first.stdout and len(first.stdout.splitlines()) == 2
    before = (tmp_path / "set/train-00000.bin").stat().st_mtime_ns
    assert call(*argv).returncode == 0
    assert (tmp_path / "set/train-00000.bin").stat().st_mtime_ns == before
    assert_one_line(call(*argv, "--tokenizer=byte"), 3, "another request", "--overwrite")
    assert call(*argv, "--tokenizer=byte", "--overwrite").returncode == 0


# The border: errors are one line, whatever a user or another program passes in.


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A folder of good and bad files, with names that are hard to print."""
    home = tmp_path_factory.mktemp("home")
    records = "".join(json.dumps({"text": f"{i} 中文 caf\u00e9"}, ensure_ascii=False) + "\n" for i in range(50))
    (home / "records.jsonl").write_text(records, encoding="utf-8")
    (home / "text.txt").write_text("some text\n" * 50)
    (home / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8")
    (home / "empty").touch()
    (home / "tokens.bin").write_bytes(bytes([7, 0, 9, 0]) * 250)
    (home / "ones.npy").write_bytes(b"\xff" * 64)
    (home / "folder/manifest.json").mkdir(parents=True)
    (home / "fake").mkdir()
    (home / "fake/manifest.json").write_text('{"format": "meshlm-tokens"}')
    for name, target in (("dangling", "/none/x"), ("loop", "loop")):
        (home / name).symlink_to(target)
    return home


@pytest.fixture(scope="module")
def border(home):
    border = Border(home)
    made = border("launch.prepare", "--source=records.jsonl", "--tokenizer=bpe:300", "--out=set")
    assert made.code == 0, made
    yield border
    border.close()


PATHS = (
    "records.jsonl",
    "text.txt",
    "empty",
    "tokens.bin",
    "ones.npy",
    "folder",
    "fake",
    "dangling",
    "loop",
    "loop/x",
    "set",
    "set/manifest.json",
    "set/train-00000.bin",
    "set/tokenizer",
    "text.txt/x",
    "text.txt/*",
    "set/*.bin",
    "**/*.bin",
    "*",
    "[",
    "a" * 300,
    "b/" * 3000,
    "a\udce9b",
    "caf\udce9.txt",
    "n\nl",
    "e\x1b[2J",
    "~",
    "~/x",
    "~no-such-user/x",
    "gs://",
    "gs:///x",
    "gs://My_B/x",
    "gs://b//x",
    "gs://b/../x",
    "s3://..//x",
    "s3://b/./x",
    "-",
    "",
    ",",
    ".",
    "..",
    "/dev/null",
    "/proc/self/mem",
    "char",
    "byte",
    "bpe:-1",
    "bpe:x",
    "bpe:" + "9" * 50,
    "set:llama3",
    "*/../x.bin",
    "set\\",
    "\u202e",
)
NUMBERS = (
    "0",
    "1",
    "2",
    "7",
    "64",
    "-1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    str(10**9),
    str(2**62),
    str(2**64),
    str(10**30),
    "9" * 5000,
    "",
    "\u0661",
    "0x10",
)
FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "launch.inspect": {
        "format": ("nanogpt", "llmc", "megatron", "olmo", "meshlm", "x"),
        "dtype": ("uint16", "uint32"),
        "val_path": PATHS,
        "tokenizer_path": PATHS,
        "vocab_size": NUMBERS,
        "seq_len": NUMBERS,
        "seed": NUMBERS,
        "sample": NUMBERS,
        "packed": ("true", "maybe"),
        "json": ("true",),
    },
    "launch.pack": {"seq_len": NUMBERS},
    "launch.tokenizer": {
        "tokenizer": PATHS,
        "file": PATHS,
        "start": NUMBERS,
        "rows": NUMBERS,
        "source": PATHS,
        "vocab_size": ("300", "-1"),
        "special_tokens": ("", ",", "a,a", "\udce9"),
        "out": PATHS,
        "overwrite": ("true",),
    },
    "launch.prepare": {
        "source": PATHS,
        "tokenizer": PATHS,
        "out": ("new", *PATHS),
        "val_fraction": NUMBERS,
        "split": ("last", "file"),
        "text_key": ("", "x", "\udce9"),
        "special_tokens": ("", ",", "a,a"),
        "bad_records": ("skip",),
        "stdin_format": ("parquet", "txt.gz"),
        "min_frequency": NUMBERS,
    },
}


def test_too_little_memory_is_one_line_and_sizes_have_bounds(border):
    longest = f"--seq_len={2**32 - 2}"
    assert border("launch.pack", "set", longest).code == 0
    too_large = [("launch.inspect", "set", longest, "--packed", "--batch_size=65536")]
    beyond = [
        ("launch.inspect", "set", "--batch_size=65537"),
        ("launch.inspect", "tokens.bin", f"--vocab_size={2**24 + 1}"),
        ("launch.tokenizer", "train", "--source=text.txt", "--out=new.json", "--vocab_size=99999999999"),
        ("launch.prepare", "--source=text.txt", "--out=new", "--tokenizer=bpe:16777217"),
    ]
    for argv in too_large + beyond:
        ended = border(*argv)
        assert ended.code == (3 if argv in too_large else 2) and ended.err.count("\n") == 1, (argv, ended)
        assert argv not in too_large or "error: not enough memory (Unable to allocate" in ended.err


def test_no_flag_and_no_path_ends_in_a_traceback(border):
    rng, codes = random.Random(0), collections.Counter[int]()
    for _ in range(200):
        module = rng.choice(list(FLAGS))
        argv = [module]
        if module == "launch.tokenizer":
            argv.append(rng.choice(["show", "encode", "decode", "train"]))
        names = [name for name in FLAGS[module] if rng.random() < (0.12 if len(FLAGS[module]) > 1 else 1)]
        if module == "launch.prepare":
            names = list({*names, "source", "out"})
        argv += [f"--{name}={rng.choice(FLAGS[module][name])}" for name in names]
        if module != "launch.prepare" and rng.random() < 0.9:
            argv += ["--", rng.choice(["set", rng.choice(PATHS), rng.choice(NUMBERS)])]
        ended = border(*argv)
        codes[ended.code] += 1
        assert ended.code in (0, 2, 3), (argv, ended)
        if ended.code:
            assert_one_error(ended, ended.code)
        assert "Traceback" not in ended.out + ended.err, (argv, ended)
    assert min(codes[code] for code in (0, 2, 3)) > 5


def assert_one_error(ended: Ended, code: int, *parts: str) -> None:
    lines = ended.err.splitlines()
    assert ended.code == code and len(lines) == 1 and lines[0].startswith("error: "), ended
    for part in parts:
        assert part in lines[0]


def test_the_home_is_meant_by_a_tilde(border, home):
    """The shell does not expand ~ in --out=~/x, and a folder named ~ would be a trap: `rm -rf ~` removes the home."""
    assert border("launch.prepare", "--source=~/text.txt", "--tokenizer=byte", "--out=~/at/home").code == 0
    for argv in (
        ("launch.inspect", "~/at/home", "--seq_len=8"),
        ("launch.inspect", "~/*.bin", "--tokenizer_path=~/set", "--seq_len=8"),
        ("launch.tokenizer", "show", "--tokenizer=~/at/home"),
        ("launch.tokenizer", "encode", "--tokenizer=byte", "--file=~/text.txt"),
        ("launch.tokenizer", "train", "--source=~/text.txt", "--vocab_size=260", "--out=~/tokenizer.json"),
        ("launch.pack", "~/set", "--seq_len=8"),
    ):
        assert border(*argv).code == 0, (argv, border(*argv))
    assert (home / "at/home/manifest.json").exists() and not (home / "~").exists()
    (home / "recipe.py").write_text((runs.ROOT / "configs/tiny.py").read_text())
    for recipe in (("--config=~/recipe.py",), ("--config", "~/recipe.py")):
        assert_one_error(border("launch.train", *recipe), 2, "--workdir is missing")
    unknown = border("launch.prepare", "--source=text.txt", "--out=~no-such-user/x")
    assert_one_error(unknown, 2, "'no-such-user' who is not known", "./~no-such-user")
    assert border("launch.prepare", "--source=text.txt", "--tokenizer=byte", "--out=./~").code == 0
    assert (home / "~/manifest.json").exists()


def test_the_home_in_fields_of_the_configuration(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = tiny.get_config()
    config.data.path, config.data.val_path, config.checkpoint.mirror = r"~/a, ~/b,c\,~d", "./~", "~/m"
    found = cli.config_from(cli.Recipe("tiny.py", config))
    assert (found.data.path, found.data.val_path) == (r"/home/me/a, /home/me/b,c\,~d", "./~")
    assert found.checkpoint.mirror == "/home/me/m"


def test_any_character_is_printed_on_any_console(border):
    """The console of this test accepts only ASCII."""
    shown = border("launch.inspect", "set", "--seq_len=8")
    assert shown.code == 0 and "\\u4e2d\\u6587" in shown.out
    assert border("launch.tokenizer", "decode", "--tokenizer=byte", "228 184 173").out == "\\u4e2d\n"
    assert_one_error(border("launch.inspect", "a\udce9\n\x1b[2J"), 3, "a\\udce9 \\x1b[2J")


@pytest.mark.parametrize(
    "argv",
    [
        ("launch.prepare", "--source=text.txt", "--out=gs://b/x"),
        ("launch.prepare", "--source=s3://b/x.txt", "--out=x"),
        ("launch.train", f"--config={runs.ROOT}/configs/tiny.py", "--workdir=s3://b/x"),
        ("launch.pack", "gs://b/x", "--seq_len=8"),
        ("launch.tokenizer", "show", "--tokenizer=gs://b/x"),
    ],
)
def test_a_store_is_not_a_folder_here(argv, border, home):
    assert_one_error(border(*argv), 2, "is in an object store")
    assert not (home / "gs:").exists() and not (home / "s3:").exists()


@pytest.mark.parametrize("word", ["9" * 5000, "9" * 400, "-1", "1.5", "\u0663", "1_0", "300"])
def test_a_word_that_is_not_an_id(word, border):
    ended = border("launch.tokenizer", "decode", "--tokenizer=byte", "--", word)
    assert_one_error(ended, 3 if word == "300" else 2, ascii(word)[1:40].rstrip("'"), "token id")
    assert len(ended.err) < 200


def test_messages_are_not_among_json(border, home):
    """Two names of one file give a warning, and stdout is still one JSON object."""
    (home / "twice").mkdir()
    (home / "twice/a.bin").write_bytes(bytes([7, 0, 9, 0]) * 250)
    (home / "twice/b.bin").symlink_to("a.bin")
    ended = border("launch.inspect", "twice", "--json", "--seq_len=8")
    assert json.loads(ended.out)["splits"]["train"]["tokens"] == 500 and "read once" in ended.err


def interrupted(argv: list[str], ready, by=signal.SIGINT, **options) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", *argv],
        cwd=runs.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, by)  # a terminal or a cluster also signals the whole group
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ctrl_c_is_one_line(tmp_path):
    """Ctrl-C comes while standard input is read, and while several processes work."""
    argv = ["launch.prepare", "--source=-", f"--out={tmp_path / 'a'}"]
    code, _, err = interrupted(argv, ready=lambda: list(tmp_path.glob(".meshlm-stdin-*")))
    assert code == 130 and len(err.strip().splitlines()) == 1 and not list(tmp_path.glob(".meshlm-stdin-*")), err
    (tmp_path / "in.jsonl").write_text('{"text": "some words of a document"}\n' * 1_000_000)
    argv = ["launch.prepare", f"--source={tmp_path / 'in.jsonl'}", "--tokenizer=byte", f"--out={tmp_path / 'b'}"]
    for by in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        shutil.rmtree(tmp_path / "b.partial", ignore_errors=True)
        code, _, err = interrupted([*argv, "--workers=2"], ready=(tmp_path / "b.partial").exists, by=by)
        assert code == 128 + by and len(err.strip().splitlines()) == 1, err


TRAINING = """
import os, signal, threading, time
from data.tokenizers import hf_json
from launch import cli
class EndsSlowly:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)
cli.kept = EndsSlowly()
def main():
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        hf_json.train_bpe((f"{i} " * (i % 50) for i in range(15000)), 300)
if __name__ == "__main__":
    cli.run(main)
"""
REMOVING = """
import os, signal, weakref
from launch import cli
class Object:
    pass
def main():
    kept = Object()
    reference = weakref.ref(kept, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del kept
if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.parametrize("program", [TRAINING] * 4 + [REMOVING])
def test_ctrl_c_while_a_library_works_on_a_thread_or_an_object_is_removed(tmp_path, program):
    """Python aborted (-6) in four of ten such trainings; when the object was removed, it printed a traceback and
    continued."""
    argv = [sys.executable, "-c", program]
    ended = subprocess.run(argv, cwd=runs.ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.strip()) == (130, launch.INTERRUPTED_LINE)


@pytest.mark.parametrize(
    ("redirections", "code", "words"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 0, ""),
        ("<&-", 3, "error: "),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path, redirections, code, words):
    (tmp_path / "a\x1b[31m.txt").write_text("some words of a text")
    source = "-" if redirections.startswith("<") else tmp_path
    command = f"{sys.executable} -m launch.prepare --out={tmp_path}/out --source={source} {redirections}"
    ended = subprocess.run(["sh", "-c", command], cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ended.stdout == "", ended
    assert ended.stderr.startswith(words) and ended.stderr.count("\n") == bool(words), ended.stderr


def test_what_cannot_be_printed_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("some words of a text\n" * 40)
    assert call("launch.prepare", f"--source={tmp_path}/a.txt", f"--out={tmp_path}/out").returncode == 0
    command = f"{sys.executable} -m launch.inspect {tmp_path}/out > /dev/full"
    ended = subprocess.run(["sh", "-c", command], cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3 and ended.stderr.count("\n") == 1 and "No space left" in ended.stderr, ended


def test_a_flag_that_is_not_a_number(tmp_path):
    asked = ("launch.prepare", f"--source={tmp_path}", f"--out={tmp_path}/out", "--val_fraction=nan")
    assert_one_line(call(*asked), 2, "--val_fraction=nan is not a number")
