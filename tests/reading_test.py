"""Diagnosis of read errors: only wrong content proves damage, in whatever way a library reports the error."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError, UserError
from data.storage import remote
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.reliability import reading
from trainer.reliability.mirror import Mirror
from trainer.reliability.reading import Damaged, Suspect, Unreadable
from trainer.reliability.run_lock import RunLock

CODES = sorted(set(errno.errorcode) - set(reading.MISSING))
WRONG = [
    ValueError("DATA_LOSS: Error decoding manifest"),
    ValueError("OUT_OF_RANGE: Requested byte range"),
    ValueError('NOT_FOUND: Error reading local file "x"'),
    FileNotFoundError("Metadata file (named _METADATA) does not exist"),
    json.JSONDecodeError("x", "y", 0),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "y"),
]


def wrapped(error: BaseException, words: list[bool]) -> BaseException:
    """Wraps an error as libraries do: another error is raised from it, or while it is handled."""
    for from_it in words:
        outer = RuntimeError("Failed to load checkpointable: params due to incompatible handler")
        outer.__cause__, outer.__context__ = (error, None) if from_it else (None, error)
        error = outer
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@given(st.sampled_from(CODES), st.booleans(), st.lists(st.booleans(), max_size=4))
def test_an_error_of_the_operating_system_is_never_damage(folder, code, in_words, wraps):
    text = f"NOT_FOUND: Error reading local file \"x\": {os.strerror(code)} [os_error_code='{code}']"
    error = ValueError(text) if in_words else OSError(code, os.strerror(code), "x")
    found = reading.diagnose(folder, wrapped(error, wraps))
    assert type(found) is Unreadable and os.strerror(code) in str(found)
    assert found.exit_code == (3 if code in (*reading.FORBIDDEN, *reading.NOT_A_FILE) else 42)


@given(st.sampled_from(WRONG), st.lists(st.booleans(), max_size=4))
def test_what_was_read_and_is_wrong_is_damage(folder, error, wraps):
    assert type(reading.diagnose(folder, wrapped(error, wraps))) is Damaged


@given(st.sampled_from([KeyError("x"), TypeError("y"), ValueError("trees differ"), OSError("z"), RuntimeError()]))
def test_anything_else_proves_nothing(folder, error):
    assert type(reading.diagnose(folder, error)) is Suspect


def test_what_seems_to_be_missing_and_may_not_be_looked_at_is_not_damage(tmp_path):
    """Orbax asks whether files exist, and treats any error as "no". If a mount is gone, even the folder is missing."""
    found = reading.diagnose(tmp_path / "gone", WRONG[3])
    assert type(found) is Unreadable and str(tmp_path / "gone") in str(found)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), Unreadable("x", 42), Damaged("x"), Suspect("x")])
def test_patience(tmp_path, monkeypatch, error):
    """A failed read is retried several times; wrong content is read only once more."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0, 0.0, 0.0))
    tried = []

    def fails(times: int):
        def function():
            tried.append(1)
            if len(tried) <= times:
                raise error
            return "read"

        tried.clear()
        return function

    assert reading.patiently(fails(1), tmp_path) == "read"
    with pytest.raises(Unreadable if isinstance(error, OSError) else type(error)):
        reading.patiently(fails(100), tmp_path)
    assert len(tried) == (2 if isinstance(error, Damaged | Suspect) else 4)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    errors = []

    def function():
        if errors:
            raise errors.pop()
        return "written"

    errors += [OSError(errno.ESTALE, "x")]
    assert reading.writing(function, tmp_path) == "written"
    for code, kind, exit_code in (
        (errno.ENOSPC, ConfigError, 2),
        (errno.EROFS, ConfigError, 2),
        (errno.EIO, Unreadable, 42),
    ):
        errors += [OSError(code, os.strerror(code), "a/file")] * 5
        with pytest.raises(kind, match=f"a/file.*{os.strerror(code)}") as e:
            reading.writing(function, tmp_path)
        assert e.value.exit_code == exit_code
        errors.clear()


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        ("ABORTED: All 32 retry attempts failed: Internal Server Error [http_response_code='500']", True),
        ("UNAVAILABLE: CURL error Could not connect to server [curl_code='7']", True),
        ("DEADLINE_EXCEEDED: x", True),
        ("cannot read gs://b/x: no answer within 60 s; is there a network?", True),
        ("PERMISSION_DENIED: Error reading [http_response_code='403']; ABORTED", False),
        ("NOT_FOUND: The specified bucket does not exist.", False),
        ("UNAUTHENTICATED: x", False),
        ('Invalid S3 bucket name: "B"', False),
        ("gs:// names no bucket", False),
        ("FAILED_PRECONDITION: Not a directory [os_error_code='20']", False),
        ("UNKNOWN: Stale file handle [os_error_code='116']", True),
    ],
)
def test_the_words_of_a_store_say_whether_an_error_may_pass(words, passes, tmp_path, monkeypatch):
    """A store's errors have no errno. The mirror and the lock exit with 42 if an error may pass, and else with 2."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    tried = []

    def fail(*_):
        tried.append(1)
        raise ValueError(words)

    for kind in (ValueError, RuntimeError, DataError):
        assert reading.passes(kind(words)) is passes
    monkeypatch.setattr(remote, "open_store", fail)
    for i, use in enumerate(
        (lambda: Mirror("gs://b/x", tmp_path, Config()), lambda: RunLock("gs://b/x", on_lost=print))
    ):
        with pytest.raises(UserError) as e:
            use()
        assert e.value.exit_code == (42 if passes else 2) and len(tried) == (i + 1) * (2 if passes else 1)


@given(st.sampled_from(sorted(errno.errorcode)))
def test_an_errno_says_whether_an_error_may_pass(code):
    assert reading.passes(OSError(code, "x")) is (code not in reading.LASTING)
    assert reading.passes(TimeoutError("no answer"))
