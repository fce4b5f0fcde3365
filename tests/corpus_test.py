"""Protects where text comes from: the same documents in the same order anywhere, and errors that say what to do."""

import hashlib
import http.server
import pathlib
import socket
import threading
import urllib.error

import pytest

from data import corpus
from data.errors import DataError


def write(folder: pathlib.Path, files: dict[str, str | bytes]) -> pathlib.Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(source: object, cache: pathlib.Path) -> list[str]:
    return [d.name for d in corpus.find(str(source), cache)]


@pytest.fixture
def texts(tmp_path):
    files = {"b.txt": "bee", "a.txt": "ay", "sub/deep/c.md": "sea", "sub/d.txt": "dee"}
    return write(tmp_path / "texts", files)


def test_file(texts, tmp_path):
    (document,) = corpus.find(str(texts / "b.txt"), tmp_path)
    assert (document.name, document.path.read_text(), document.size()) == ("b.txt", "bee", 3)


def test_directory_is_read_to_any_depth_sorted_by_name_without_hidden_and_empty_files(texts, tmp_path):
    write(texts, {".hidden": "x", ".git/config": "x", "sub/.cache/y.txt": "x", "empty.txt": ""})
    assert names(texts, tmp_path) == ["a.txt", "b.txt", "sub/d.txt", "sub/deep/c.md"]


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path, monkeypatch):
    """Splits go by name: the same files elsewhere must give the same validation set, however they are asked for."""
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
    write(tmp_path, {"[draft].txt": "mine", "d.txt": "other"})
    assert names(tmp_path / "[draft].txt", tmp_path) == ["[draft].txt"]


@pytest.mark.parametrize("source", ["nowhere.txt", "none/*.txt", "sub*", "python-stdlb"])
def test_nothing_there_is_an_error_that_names_the_source_and_the_corpora(source, texts, tmp_path):
    """`sub*` matches a folder only, which is not text."""
    with pytest.raises(DataError) as e:
        corpus.find(str(texts / source), tmp_path)
    assert source in str(e.value) and "python-stdlib" in str(e.value) and "tinyshakespeare" in str(e.value)
    assert e.value.exit_code == 3


@pytest.mark.parametrize("source", ["empty.txt", "hollow", "no-files", "hollow/*"])
def test_nothing_in_it_is_an_error(source, tmp_path):
    write(tmp_path, {"empty.txt": "", "hollow/1.txt": "", "hollow/2.txt": ""})
    (tmp_path / "no-files").mkdir()
    with pytest.raises(DataError, match="empty"):
        corpus.find(str(tmp_path / source), tmp_path)


def test_python_stdlib_is_there_sorted_readable_and_always_the_same(tmp_path):
    first = corpus.find("python-stdlib", tmp_path)
    found = [d.name for d in first]
    assert len(found) > 100 and {"dataclasses.py", "json/decoder.py"} <= set(found)
    assert found == sorted(set(found))
    assert found == names("python-stdlib", tmp_path / "elsewhere")
    for part in ("site-packages", "test", "tests", "__pycache__"):
        assert not any(part in pathlib.PurePosixPath(name).parts for name in found)
    assert sum(len(d.path.read_text("utf-8")) for d in first) > 1_000_000  # every one is UTF-8: this would raise
    assert not any(tmp_path.iterdir())  # no network, no cache


@pytest.fixture
def serve(monkeypatch):
    """Starts a web server on loopback that answers every request alike; corpus.SHAKESPEARE_URL points at it."""
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
        (document,) = corpus.find("tinyshakespeare", cache)
        assert document.path.read_bytes() == text
    assert len(requests) == 1 and [p.name for p in cache.iterdir()] == ["tinyshakespeare.txt"]


def test_the_frozen_hash_is_that_of_the_known_file():
    """From karpathy/char-rnn; another value would let another text pass."""
    assert corpus.SHAKESPEARE_SHA256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_a_download_of_something_else_is_an_error_and_is_not_kept(serve, tmp_path):
    serve(b"<html>sign in to the hotel's network</html>")
    with pytest.raises(DataError, match="sha256"):
        corpus.find("tinyshakespeare", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_cached_file_with_the_wrong_hash_is_an_error_that_names_it(tmp_path):
    path = write(tmp_path, {"tinyshakespeare.txt": "First Citizen: cut sh"}) / "tinyshakespeare.txt"
    with pytest.raises(DataError) as e:
        corpus.find("tinyshakespeare", tmp_path)
    assert str(path) in str(e.value) and corpus.SHAKESPEARE_SHA256 in str(e.value) and "21 bytes" in str(e.value)
    assert path.read_text() == "First Citizen: cut sh"  # the user's file is theirs to remove


def assert_says_what_to_fetch(error: DataError, cache: pathlib.Path) -> None:
    for part in ("karpathy/char-rnn", "data/tinyshakespeare/input.txt", str(cache / "tinyshakespeare.txt"), "--source"):
        assert part in str(error)
    assert not cache.exists() or not any(cache.iterdir())


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers here
        monkeypatch.setattr(corpus, "SHAKESPEARE_URL", f"http://127.0.0.1:{s.getsockname()[1]}/input.txt")
        with pytest.raises(DataError) as e:
            corpus.find("tinyshakespeare", tmp_path / "cache")
    assert_says_what_to_fetch(e.value, tmp_path / "cache")


@pytest.mark.parametrize(("length", "status"), [(1115394, 200), (None, 404)], ids=["cut off", "not found"])
def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(length, status, serve, tmp_path):
    serve(b"First Citizen:", length, status)
    with pytest.raises(DataError) as e:
        corpus.find("tinyshakespeare", tmp_path / "cache")
    if isinstance(e.value.__context__, urllib.error.HTTPError):
        e.value.__context__.close()  # its socket; a command would end here
    assert_says_what_to_fetch(e.value, tmp_path / "cache")


@pytest.fixture
def many(tmp_path):
    return corpus.find(str(write(tmp_path / "many", {f"{i:03}.txt": "x" * (50 + i) for i in range(100)})), tmp_path)


@pytest.mark.parametrize("val_fraction", [0.01, 0.1, 0.5])
def test_split_keeps_documents_whole_loses_none_and_meets_the_fraction(many, val_fraction):
    train, val = corpus.split(many, val_fraction)
    assert train and val
    assert sorted([*train, *val], key=lambda d: d.name) == many
    assert [d.name for d in train] == sorted(d.name for d in train)
    sizes = [sum(d.size() for d in part) for part in (val, many)]
    assert val_fraction <= sizes[0] / sizes[1] < val_fraction + 150 / sizes[1]  # at most one document too many


def test_split_goes_by_name_and_is_frozen(many):
    """A corpus prepared again, elsewhere or by a later version, must not leak old validation text into training."""
    _, val = corpus.split(many, 0.04)
    assert corpus.split(list(reversed(many)), 0.04)[1] == list(reversed(val))  # whatever order they come in
    expected = ["014.txt", "037.txt", "059.txt", "076.txt", "077.txt"]
    assert [d.name for d in val] == expected, "the split has changed: validation text would turn into training text"


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("val_fraction", [1e-9, 0.5, 0.999])
def test_split_leaves_a_document_on_each_side(many, count, val_fraction):
    train, val = corpus.split(many[:count], val_fraction)
    assert train and val and len(train) + len(val) == count


def test_split_of_nothing_for_validation(many):
    assert corpus.split(many, 0.0) == (many, [])
