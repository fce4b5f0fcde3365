"""Sources of text: they give the same documents in the same order anywhere, and their errors say what to do."""

import collections
import glob
import hashlib
import http.server
import itertools
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizers
from data.errors import DataError
from data.preparation import corpus, pipeline
from data.token_files import formats


def write(folder: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(source: object, cache: pathlib.Path) -> list[str]:
    return [d.name for d in corpus.find_files(str(source), cache).files]


@pytest.fixture
def texts(tmp_path):
    files = {"b.txt": "bee", "a.txt": "ay", "sub/deep/c.md": "sea", "sub/d.txt": "dee"}
    return write(tmp_path / "texts", files)


def test_file(texts, tmp_path):
    (document,) = corpus.find_files(str(texts / "b.txt"), tmp_path).files
    assert (document.name, document.path.read_text(), document.size()) == ("b.txt", "bee", 3)


def test_directory_is_read_to_any_depth_sorted_by_name_without_hidden_and_empty_files(texts, tmp_path):
    write(texts, {".hidden": "x", ".git/config": "x", "sub/.cache/y.txt": "x", "empty.txt": ""})
    assert names(texts, tmp_path) == ["a.txt", "b.txt", "sub/d.txt", "sub/deep/c.md"]


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path, monkeypatch):
    """Splits depend on names: the same files elsewhere must give the same validation set, however they are selected."""
    here, there = (write(tmp_path / root, {"a.txt": "1", "s/b.txt": "2"}) for root in ("here", "there/deeper"))
    expected = ["a.txt", "s/b.txt"]
    for source in (here, there, here / "**/*.txt", there / "**/*.txt"):
        assert names(source, tmp_path) == expected
    monkeypatch.chdir(there)
    for source in (".", "**/*.txt", "./**/*.txt", "../../here/**/*.txt"):
        assert names(source, tmp_path) == expected


def test_glob(texts, tmp_path):
    assert names(texts / "*.txt", tmp_path) == ["a.txt", "b.txt"]
    assert names(texts / "**" / "*.txt", tmp_path) == ["a.txt", "b.txt", "sub/d.txt"]
    assert names(texts / "[a]*", tmp_path) == ["a.txt"]


def test_glob_that_matches_a_file_in_several_ways_reads_it_once(texts, tmp_path):
    assert names(texts / "**" / "**" / "*.md", tmp_path) == ["sub/deep/c.md"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    write(tmp_path, {"[draft].txt": "mine", "x.txt": "other"})
    assert names(tmp_path / "[draft].txt", tmp_path) == ["[draft].txt"]


@pytest.mark.parametrize("source", ["nowhere.txt", "none/*.txt", "sub*", "python-stdlb"])
def test_nothing_there_is_an_error_that_names_the_source_and_the_corpora(source, texts, tmp_path):
    """`sub*` matches only a folder, and a folder is not a text file."""
    with pytest.raises(DataError) as e:
        corpus.find_files(str(texts / source), tmp_path)
    assert source in str(e.value) and "python-stdlib" in str(e.value) and "tinyshakespeare" in str(e.value)
    assert e.value.exit_code == 3


@pytest.mark.parametrize("source", ["empty.txt", "hollow", "no-files", "hollow/*"])
def test_nothing_in_it_is_an_error(source, tmp_path):
    write(tmp_path, {"empty.txt": "", "hollow/1.txt": "", "hollow/2.txt": ""})
    (tmp_path / "no-files").mkdir()
    with pytest.raises(DataError, match="empty"):
        corpus.find_files(str(tmp_path / source), tmp_path)


# Random trees of files, compared with a simple implementation

NAMES = st.sampled_from(["a", "b.txt", "c.txt", ".h", "caf\udce9", "a b\n", "ü"])
ENTRIES = st.lists(
    st.tuples(st.integers(0, 9), NAMES, st.sampled_from(["file", "empty", "folder", "folder", "link", "hard", "pipe"])),
    max_size=14,
)


def grow(root: str, entries: list[tuple[int, str, str]], loops: bool) -> None:
    """Creates each of `entries` in one of the existing folders; a link leads to anything that exists, or to nothing."""
    folders, files, everything = [root], [], [*([root] if loops else []), f"{root}/nowhere"]
    for number, name, kind in entries:
        path = os.path.join(folders[number % len(folders)], name)
        if os.path.lexists(path):
            continue
        if kind == "folder":
            os.mkdir(path)
            folders.append(path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "hard" and files:
            os.link(files[number % len(files)], path)
        elif kind == "link":
            target = everything[number % len(everything)]
            if not loops and pathlib.Path(path).is_relative_to(target):
                continue
            os.symlink(os.path.relpath(target, os.path.dirname(path)) if number % 2 else target, path)
        else:
            pathlib.Path(path).write_text("" if kind == "empty" else f"text {len(files)}")
            files.append(path)
        everything.append(path)


def read_plainly(root: str) -> tuple[dict[str, str], collections.Counter]:
    """The name and path of each file of a folder, found slowly; and how many entries of each kind are left out."""
    found: dict[str, str] = {}
    entered: list[str] = []
    left: collections.Counter = collections.Counter()
    tops, links = [("", root)], []
    while tops or links:
        if not tops:
            tops, links = sorted(links), []
        name, top = tops.pop(0)
        places = [(name, top)]
        if os.path.isdir(top):
            places = []
            for folder, inside, files in os.walk(top, onerror=lambda e: (_ for _ in ()).throw(e)):
                below = os.path.normpath(os.path.join(name, os.path.relpath(folder, top)))
                if os.path.realpath(folder) in entered:
                    left["again"] += 1
                    inside.clear()
                    continue
                entered.append(os.path.realpath(folder))
                for entry in sorted(inside + files):
                    place = (os.path.normpath(os.path.join(below, entry)), os.path.join(folder, entry))
                    if entry.startswith("."):
                        left["hidden"] += 1
                    elif os.path.islink(place[1]):
                        links.append(place)
                    elif entry in files:
                        places.append(place)
                inside[:] = [entry for entry in inside if not entry.startswith(".")]
        for name, path in sorted(places):
            if not os.path.exists(path):
                left["nowhere"] += 1
            elif not os.path.isfile(path):
                left["neither"] += 1
            elif not os.path.getsize(path):
                left["empty"] += 1
            elif any(os.path.samefile(path, other) for other in found.values()):
                left["again"] += 1
            else:
                found[name] = path
        if not tops and links:
            tops, links = sorted(links), []
    return found, left


KINDS = {
    "again": "the same file or folder by another name, left out",
    "hidden": "hidden file or folder, left out",
    "nowhere": "link that leads nowhere, left out",
    "neither": "neither file nor folder, left out",
    "empty": "empty file, left out",
}


@settings(max_examples=150, deadline=None)
@given(ENTRIES)
def test_any_folder_is_read_as_a_plain_reading_does(entries):
    with tempfile.TemporaryDirectory() as folder:
        grow(folder, entries, loops=True)
        expected, left = read_plainly(folder)
        try:
            files, left_out = corpus.find_files(folder, pathlib.Path("unused"))
        except DataError as e:
            assert not expected and all(KINDS[kind] in str(e) for kind in left)
            return
        assert {file.name: str(file.path) for file in files} == expected
        assert left_out.counts == {KINDS[kind]: count for kind, count in left.items()}


PARTS = st.sampled_from(["**", "*", "a", "?*", "*.txt", "[ab]*", ".h", ".*", "caf*"])


@settings(max_examples=150, deadline=None)
@given(ENTRIES, st.lists(PARTS, min_size=1, max_size=4))
def test_any_glob_selects_the_files_that_pythons_does_and_each_once(entries, pattern):
    """Python's glob finds a file once for each of its names, and does not end if links form a loop."""
    with tempfile.TemporaryDirectory() as folder:
        grow(folder, entries, loops=False)
        pattern = "/".join([*pattern, "*"])
        matches = glob.glob(pattern, root_dir=folder, recursive=True)
        matches = [m for m in matches if os.path.isfile(f"{folder}/{m}") and os.path.getsize(f"{folder}/{m}")]
        try:
            files = corpus.find_files(f"{folder}/{pattern}", pathlib.Path("unused")).files
        except DataError:
            files = []
        plain = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/")))
        assert {file.name for file in files} <= {os.path.relpath(m, plain or ".") for m in matches}
        inodes = [os.stat(file.path).st_ino for file in files]
        assert sorted(inodes) == sorted({os.stat(f"{folder}/{m}").st_ino for m in matches})


def test_a_loop_is_entered_once(tmp_path):
    texts = write(tmp_path / "texts", {"a.txt": "1", "b/c.txt": "2"})
    for at, target in (("self", "."), ("b/up", ".."), ("b/me", "me"), ("x", "y"), ("y", "x")):
        (texts / at).symlink_to(target)
    for source in (texts, texts / "**", texts / "**/*.txt"):
        files, left_out = corpus.find_files(str(source), tmp_path)
        assert [file.name for file in files] == ["a.txt", "b/c.txt"]
        assert sum(left_out.counts.values()) == 5


def test_a_link_out_of_the_folder_is_followed_and_a_name_without_a_link_is_kept(tmp_path):
    texts = write(tmp_path / "texts", {"z/b.txt": "2"})
    write(tmp_path / "disk", {"c.txt": "3"})
    (texts / "part").symlink_to(tmp_path / "disk")
    (texts / "a.txt").symlink_to("z/b.txt")
    (texts / "q").symlink_to(tmp_path / "disk")
    files, left_out = corpus.find_files(str(texts), tmp_path)
    assert [file.name for file in files] == ["part/c.txt", "z/b.txt"]
    (kind,) = left_out.counts
    assert left_out.counts[kind] == 2 and left_out.examples[kind] == [str(texts / "a.txt"), str(texts / "q")]


WITHOUT_PRIVILEGE = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)


@pytest.mark.parametrize("secret", ["secret.txt", "secret/x.txt"])
@pytest.mark.parametrize("source", ["", "/**/*.txt", "/*/x.txt", "/secret*", "/secret/x.txt", "/secret/*.txt"])
def test_what_may_not_be_read_is_an_error_that_names_it(secret, source, tmp_path):
    texts = write(tmp_path / "texts", {"a.txt": "1", "b/x.txt": "1", secret: "2"})
    closed = texts / secret.split("/")[0]
    if closed.is_dir() and source == "/secret*":
        return  # the glob does not enter this folder
    if closed.is_file() and source.endswith(("/x.txt", "t/*.txt")):
        return  # the glob does not select this file
    closed.chmod(0)
    script = (
        "import pathlib, sys\nfrom data.preparation import corpus\n"
        "corpus.is_pipe(sys.argv[1]) or corpus.find_files(sys.argv[1], pathlib.Path('.'))"
    )
    command = [sys.executable, "-c", script, f"{texts}{source}"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and setpriv is not there")
        command = [*WITHOUT_PRIVILEGE, *command]
    result = subprocess.run(command, text=True, capture_output=True, timeout=60)
    closed.chmod(stat.S_IRWXU)
    error = result.stderr.splitlines()[-1]
    assert result.returncode and f"DataError: cannot read {closed}" in error and "Permission denied" in error


def test_own_output_is_never_read(tmp_path):
    dataset = {formats.MANIFEST: '{"format": "meshlm-tokens"}', "train-00000.bin": b"\0\1", "summary.json": "{}"}
    texts = write(tmp_path / "texts", {"a.txt": "1", "ds.partial/x.txt": "half", "other/ds.partial/y.txt": "mine"})
    write(texts / "old", dataset)
    files, left_out = corpus.find_files(str(texts), tmp_path, own=[texts / "ds", texts / "ds.partial"])
    assert [file.name for file in files] == ["a.txt", "other/ds.partial/y.txt"]
    assert left_out.summary() == {
        "counts": {"dataset, left out": 1},
        "examples": {"dataset, left out": [str(texts / "old")]},
    }
    with pytest.raises(DataError, match="dataset, left out"):
        corpus.find_files(str(texts / "old"), tmp_path)


def test_what_is_not_text_is_an_error_or_is_left_out_and_counted(tmp_path):
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    texts = write(
        tmp_path / "texts", {"a.txt": "1", "b.zip": b"PK\x03\x04" + bytes(99), "c.png": png, "_metadata": "PAR1"}
    )
    with pytest.raises(DataError, match=r"b\.zip is a zip archive.*--bad_records=skip"):
        corpus.find_files(str(texts), tmp_path)
    files, left_out = corpus.find_files(str(texts), tmp_path, bad_records="skip")
    assert [file.name for file in files] == ["a.txt"]
    assert left_out.examples == {
        "metadata of Parquet files, left out": [str(texts / "_metadata")],
        "not text, left out": [f"{texts / 'b.zip'} (a zip archive)"],
        "media, left out": [f"{texts / 'c.png'} (an image)"],
    }
    for name in ("b.zip", "c.png"):  # a file that is named explicitly is not skipped
        with pytest.raises(DataError, match=name):
            corpus.find_files(str(texts / name), tmp_path, bad_records="skip")
        assert corpus.find_files(str(texts / name), tmp_path, kind="text").files[0].kind == "text"
    assert len(corpus.find_files(str(texts), tmp_path, kind="text").files) == 3


def test_kinds_of_files_in_one_folder(tmp_path):
    record = '{"text": "x"}\n'
    texts = write(tmp_path / "texts", {"a.txt": "x", "b.jsonl": "x", "c.json": record, "d.parquet": "PAR1"})
    files = corpus.find_files(str(texts), tmp_path).files
    assert [(file.name, file.kind) for file in files] == [
        ("a.txt", "text"),
        ("b.jsonl", "jsonl"),
        ("c.json", "jsonl"),
        ("d.parquet", "parquet"),
    ]


def test_a_pipe_is_said_to_be_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="--source=- <"):
        corpus.find_files(str(tmp_path / "pipe"), tmp_path)


def test_python_stdlib_is_there_sorted_readable_and_always_the_same(tmp_path):
    first = corpus.find_files("python-stdlib", tmp_path).files
    found = [d.name for d in first]
    assert len(found) > 100 and {"dataclasses.py", "json/decoder.py"} <= set(found)
    assert found == sorted(set(found))
    assert found == names("python-stdlib", tmp_path / "elsewhere")
    for part in ("site-packages", "test", "tests", "__pycache__"):
        assert not any(part in pathlib.PurePosixPath(name).parts for name in found)
    assert sum(len(d.path.read_text("utf-8")) for d in first) > 1_000_000  # all are UTF-8: read_text did not raise
    assert not any(tmp_path.iterdir())  # no network, no cache


@pytest.fixture
def serve(monkeypatch):
    """Starts a web server on loopback that gives every request the same answer; corpus.SHAKESPEARE_URL points at it."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(body: bytes, length: int | None = None, status: int = 200) -> list[str]:
        requests: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(corpus, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_tinyshakespeare_is_downloaded_once_and_kept(serve, tmp_path, monkeypatch):
    text = b"First Citizen:\n"
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    requests = serve(text)
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        (document,) = corpus.find_files("tinyshakespeare", cache).files
        assert document.path.read_bytes() == text
    assert len(requests) == 1 and [p.name for p in cache.iterdir()] == ["tinyshakespeare.txt"]


def test_the_frozen_hash_is_that_of_the_known_file():
    """The file is that of karpathy/char-rnn; another hash would accept another text."""
    assert corpus.SHAKESPEARE_SHA256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_a_download_of_something_else_is_an_error_and_is_not_kept(serve, tmp_path):
    serve(b"<html>sign in to the hotel's network</html>")
    with pytest.raises(DataError, match="sha256"):
        corpus.find_files("tinyshakespeare", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_cached_file_with_the_wrong_hash_is_an_error_that_names_it(tmp_path):
    path = write(tmp_path, {"tinyshakespeare.txt": "First Citizen: cut sh"}) / "tinyshakespeare.txt"
    with pytest.raises(DataError) as e:
        corpus.find_files("tinyshakespeare", tmp_path)
    assert str(path) in str(e.value) and corpus.SHAKESPEARE_SHA256 in str(e.value) and "21 bytes" in str(e.value)
    assert path.read_text() == "First Citizen: cut sh"  # only the user may remove this file


def assert_says_what_to_fetch(error: DataError, cache: pathlib.Path) -> None:
    for part in ("karpathy/char-rnn", "data/tinyshakespeare/input.txt", str(cache / "tinyshakespeare.txt"), "--source"):
        assert part in str(error)
    assert not cache.exists() or not any(cache.iterdir())


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # the socket is bound but not listening, so connections are refused
        monkeypatch.setattr(corpus, "SHAKESPEARE_URL", f"http://127.0.0.1:{s.getsockname()[1]}/input.txt")
        with pytest.raises(DataError) as e:
            corpus.find_files("tinyshakespeare", tmp_path / "cache")
    assert_says_what_to_fetch(e.value, tmp_path / "cache")


@pytest.mark.parametrize(("length", "status"), [(1115394, 200), (None, 404)], ids=["cut off", "not found"])
def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(length, status, serve, tmp_path):
    serve(b"First Citizen:", length, status)
    with pytest.raises(DataError) as e:
        corpus.find_files("tinyshakespeare", tmp_path / "cache")
    if isinstance(e.value.__context__, urllib.error.HTTPError):
        e.value.__context__.close()  # closes its socket; a command would end here
    assert_says_what_to_fetch(e.value, tmp_path / "cache")


@pytest.fixture
def many(tmp_path):
    return corpus.find_files(
        str(write(tmp_path / "many", {f"{i:03}.txt": "x" * (50 + i) for i in range(100)})), tmp_path
    ).files


@pytest.mark.parametrize("val_fraction", [0.01, 0.1, 0.5])
def test_split_keeps_documents_whole_loses_none_and_meets_the_fraction(many, val_fraction):
    train, val = corpus.split_files(many, val_fraction)
    assert train and val
    assert sorted([*train, *val], key=lambda d: d.name) == many
    assert [d.name for d in train] == sorted(d.name for d in train)
    sizes = [sum(d.size() for d in part) for part in (val, many)]
    assert val_fraction <= sizes[0] / sizes[1] < val_fraction + 150 / sizes[1]  # at most one extra document


def test_split_goes_by_name_and_is_frozen(many):
    """A corpus prepared again, elsewhere or by a later version, must not leak old validation text into training."""
    _, val = corpus.split_files(many, 0.04)
    assert corpus.split_files(list(reversed(many)), 0.04)[1] == list(reversed(val))  # in any order of the files
    expected = ["014.txt", "037.txt", "059.txt", "076.txt", "077.txt"]
    assert [d.name for d in val] == expected, "the split has changed: validation text would turn into training text"


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("val_fraction", [1e-9, 0.5, 0.999])
def test_split_leaves_a_document_on_each_side(many, count, val_fraction):
    train, val = corpus.split_files(many[:count], val_fraction)
    assert train and val and len(train) + len(val) == count


def test_split_of_nothing_for_validation(many):
    assert corpus.split_files(many, 0.0) == (many, [])


SIZES = st.lists(st.integers(1, 20) | st.integers(1, 10_000), min_size=2, max_size=9)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.floats(0.01, 0.9))
def test_split_is_never_far_off_where_there_is_a_better_one(sizes, val_fraction):
    with tempfile.TemporaryDirectory() as folder:
        files = [corpus.File(f"{i}", pathlib.Path(folder, f"{i}")) for i in range(len(sizes))]
        for file, size in zip(files, sizes, strict=True):
            with file.path.open("wb") as f:
                f.truncate(size)
        train, val = corpus.split_files(files, val_fraction)
    assert train and val and [*train, *val] != val
    size = dict(zip(files, sizes, strict=True))
    share = sum(size[file] for file in val) / sum(sizes)
    subsets = itertools.chain.from_iterable(itertools.combinations(sizes, n) for n in range(1, len(sizes)))
    best = min(abs(sum(subset) / sum(sizes) - val_fraction) for subset in subsets)
    smaller = min(val_fraction, 1 - val_fraction)
    assert abs(share - val_fraction) <= max(best, smaller) + 1e-9
    if 2 * max(sizes) > sum(sizes) and smaller < 0.25:  # the largest file goes to the larger side
        assert (share < 0.5) == (val_fraction < 0.5)


def test_json_and_tokenizers_beside_text_are_left_out_and_counted(tmp_path):
    texts = {"a.txt": "a text", "package.json": '{\n "name": "x"\n}\n', "b.jsonl": '{"text": "x"}'}
    folder = write(
        tmp_path / "texts", {**texts, "mine.json": '{"added_tokens": [], "model": 1}', "t.txt": "any tokenizer"}
    )
    for tokenizer in (folder / "t.txt", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("texts/t.txt")
        for kind, source in (("auto", folder), ("auto", folder / "*"), ("text", folder)):
            found = corpus.find_files(str(source), tmp_path, kind=kind, tokenizer=tokenizer)
            assert "t.txt" not in [file.name for file in found.files]
            assert found.left_out.counts["the tokenizer, left out"] == 1
            if kind == "auto":
                assert [file.name for file in found.files] == ["a.txt", "b.jsonl"]
                assert found.left_out.counts["not text, left out"] == 2
                assert "jq -c ." in str(found.left_out.examples)
    with pytest.raises(DataError, match="is the tokenizer; name the text"):
        corpus.find_files(str(folder / "t.txt"), tmp_path, kind="text", tokenizer=tmp_path / "link")
    with pytest.raises(DataError, match=r"package\.json is one JSON value.*jq -c"):
        corpus.find_files(str(folder / "package.json"), tmp_path)
    (folder / "c.jsonl").write_text('{\n "text": "x"\n}\n')  # leaving out a .jsonl would lose documents
    with pytest.raises(DataError, match=r"c\.jsonl is JSON over several lines.*--bad_records=skip"):
        corpus.find_files(str(folder), tmp_path)


def test_a_tokenizer_is_not_trained_on_with_itself(tmp_path):
    folder = write(tmp_path / "own", {f"{i}.txt": f"document number {i} with text {i * i}" for i in range(30)})
    (folder / "set").mkdir()
    raw = tokenizers.make("bpe:300", ["a text of some words"] * 9).file()[1]
    for name in ("tok.json", "set/tokenizer.json", "copy.txt"):
        (folder / name).write_bytes(raw)
    for spec in ("tok.json", "set"):
        manifest = pipeline.prepare_dataset(tmp_path / f"out {spec}", source=str(folder), tokenizer=str(folder / spec))
        assert sum(split.documents for split in manifest.splits.values()) == 30
        left_out = pipeline.read_summary(tmp_path / f"out {spec}")["left_out"]["counts"]
        assert left_out == {"the tokenizer, left out": 1, "not text, left out": 2}


@pytest.mark.parametrize("name", ["*.txt", "?.txt", "[ab].txt", "d*/a.txt", "a[b].txt"])
def test_the_name_of_a_file_that_is_a_pattern_of_others_is_refused(tmp_path, name):
    folder = write(tmp_path / "gl", {name: "oops"})
    (meant,) = corpus.find_files(f"{folder}/{name}", tmp_path).files  # a name with one match is unambiguous
    assert meant.path == folder / name
    write(folder, {"a.txt": "1", "b.txt": "2", "ab.txt": "3", "d/a.txt": "4"})
    with pytest.raises(DataError, match=r"as a pattern it selects \d other file\(s\), such as .*; write ") as e:
        corpus.find_files(f"{folder}/{name}", tmp_path)
    escaped = str(e.value).split("; write ")[1].split(" for this file")[0]
    assert [file.path for file in corpus.find_files(escaped, tmp_path).files] == [folder / name]
    (folder / name).rename(folder / "renamed")
    assert corpus.find_files(f"{folder}/{name}", tmp_path).files
