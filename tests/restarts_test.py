"""The restart log has complete rows after any cut, and goodput is from 0 to 1 whatever the files hold."""

import json
import pathlib
import resource
import signal
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.reliability import restarts
from trainer.reliability.restarts import Attempt, RestartLog

quick = settings(max_examples=60, deadline=None)


def commit(run: pathlib.Path, step: int) -> None:
    (run / "checkpoints" / str(step)).mkdir(parents=True)
    (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()


def write_rows(run: pathlib.Path, *rows: object) -> None:
    with (run / "metrics.jsonl").open("a") as f:
        f.writelines(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def row(step: int, seconds: float, compile_s: float = 7.0) -> dict:
    return {"step": step, "tokens": 1, "perf/step_time_s": seconds, "perf/compile_s": compile_s}


def attempt(first: int, last: int, seconds: float, waited: float = 0.0, number: int = 1) -> Attempt:
    return Attempt(number, "start", "end", waited, seconds, "done", 0, first, last, 0)


def begun(folder: pathlib.Path) -> pathlib.Path:
    """Makes the folder a run directory, as the trainer does."""
    (folder / "config.json").touch()
    return folder


def ended(log: RestartLog, returncode: int = 1) -> Attempt:
    log.begin()
    return log.end(returncode)


# The file


@quick
@given(count=st.integers(1, 4), cut=st.floats(0, 1))
def test_cut_at_any_byte_it_is_a_prefix_and_goes_on(count, cut):
    with tempfile.TemporaryDirectory() as folder:
        run = begun(pathlib.Path(folder))
        log = RestartLog(run)
        written = [ended(log) for _ in range(count)]
        content = log.path.read_bytes()
        log.path.write_bytes(content[: round(cut * len(content))])
        again = RestartLog(run)
        kept = len(again.attempts)
        assert again.attempts == written[:kept]
        assert kept == content[: round(cut * len(content))].count(b"\n")
        assert ended(again).life == kept + 1
        assert RestartLog(run).attempts == again.attempts
        assert again.path.read_bytes().count(b"\n") == kept + 1


@quick
@given(garbage=st.lists(st.one_of(st.binary(), st.just(b"[" * 20_000), st.just(b'{"life": NaN}'))))
def test_damaged_lines_are_left_out(garbage):
    with tempfile.TemporaryDirectory() as folder:
        run = begun(pathlib.Path(folder))
        log = RestartLog(run)
        one = ended(log)
        with log.path.open("ab") as f:
            f.write(b"\n".join(garbage))
        two = ended(RestartLog(run), -signal.SIGKILL)
        assert RestartLog(run).attempts == [one, two]


def test_a_row_written_twice_counts_once(tmp_path):
    log = RestartLog(begun(tmp_path))
    one = ended(log)
    log.path.write_bytes(2 * log.path.read_bytes())
    assert RestartLog(tmp_path).attempts == [one]


def test_a_full_disk_is_a_warning_and_the_rows_follow(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(restarts.log, "warning", lambda text, *values: warned.append(text % values))
    log = RestartLog(begun(tmp_path))
    ended(log)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
    try:
        ended(log)  # ten bytes of the row are written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(warned) == 1 and str(log.path) in warned[0]
    assert len(RestartLog(tmp_path).attempts) == 1
    ended(log)
    assert len(warned) == 1
    assert [a.life for a in RestartLog(tmp_path).attempts] == [1, 2, 3]


def test_nothing_is_written_into_a_folder_that_is_no_run_yet(tmp_path):
    """The log must write nothing there: the trainer refuses a folder that has files but is not a run directory."""
    log = RestartLog(tmp_path / "run")
    ended(log)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    ended(log)
    assert list((tmp_path / "run").iterdir()) == []
    begun(tmp_path / "run")
    ended(log)
    assert [a.life for a in RestartLog(tmp_path / "run").attempts] == [1, 2, 3]


def test_each_process_has_a_file_of_its_own(tmp_path):
    assert RestartLog(tmp_path, 0).path == tmp_path / "lives.jsonl"
    assert RestartLog(tmp_path, 3).path == tmp_path / "lives.3.jsonl"


# What a row says


def test_only_committed_steps_count(tmp_path):
    assert restarts.newest_step(tmp_path) == 0
    commit(tmp_path, 20)
    commit(tmp_path, 100)
    (tmp_path / "checkpoints" / "200").mkdir()  # this checkpoint is being written
    for name in ("300.orbax-checkpoint-tmp", "²"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "_CHECKPOINT_METADATA").touch()
    (tmp_path / "checkpoints" / "400").touch()
    assert restarts.newest_step(tmp_path) == 100


def test_lost_steps_are_those_of_this_attempt(tmp_path):
    log = RestartLog(begun(tmp_path))
    log.begin()
    commit(tmp_path, 20)
    write_rows(tmp_path, row(10, 0.1), row(20, 0.1), "garbage", row(30, 0.1), '{"step": 99, "perf')
    died = log.end(-signal.SIGKILL)
    assert (died.cause, died.code, died.first_step, died.last_step, died.lost_steps) == (
        "signal SIGKILL",
        137,
        0,
        20,
        10,
    )
    # This attempt ends before it has cut the rows that the previous one lost; they count as lost only once.
    assert ended(log).lost_steps == 0
    log.begin()
    (tmp_path / "metrics.jsonl").unlink()
    write_rows(tmp_path, row(10, 0.1), row(20, 0.1), row(30, 0.1))
    commit(tmp_path, 30)
    assert log.end(42).lost_steps == 0


@pytest.mark.parametrize(
    ("returncode", "cause", "code"),
    [
        (0, "done", 0),
        (42, "stopped (42)", 42),
        (-9, "signal SIGKILL", 137),
        (134, "exit code 134", 134),
        (-35, "signal 35", 163),
    ],
)
def test_causes(tmp_path, returncode, cause, code):
    found = ended(RestartLog(tmp_path), returncode)
    assert (found.cause, found.code) == (cause, code)


def test_table(tmp_path):
    log = RestartLog(tmp_path)
    for _ in range(30):
        ended(log)
    lines = restarts.table(log.attempts, since=28)
    assert len(lines) == 4 and lines[-1].startswith("attempts 30, steps lost 0, goodput ")
    assert len(restarts.table(log.attempts)) == restarts.MOST_SHOWN + 2


# Goodput


def test_goodput_by_hand():
    rows = [row(10, 1.0), {"step": 10, "val/loss": 1.0}, row(20, 2.0), row(30, 1.0)]
    assert restarts.goodput(rows, [attempt(0, 30, 80.0)]) == 40 / 80
    # Steps that are not committed are lost.
    assert restarts.goodput(rows, [attempt(0, 25, 80.0)]) == 35 / 80
    # Steps before supervision do not count, nor do steps between two attempts.
    assert restarts.goodput(rows, [attempt(20, 30, 80.0)]) == 10 / 80
    assert restarts.goodput(rows, [attempt(0, 10, 30.0), attempt(20, 30, 40.0, waited=10.0)]) == 20 / 80
    # A step that was done twice counts once.
    assert restarts.goodput(rows, [attempt(0, 20, 40.0), attempt(10, 30, 40.0)]) == 40 / 80
    # Steps whose checkpoint was quarantined are lost again.
    assert restarts.goodput(rows, [attempt(0, 20, 40.0), attempt(20, 10, 40.0)]) == 10 / 80
    # The time of steps after the last row is not known.
    assert restarts.goodput(rows, [attempt(0, 90, 80.0)]) == 40 / 80
    assert restarts.goodput(rows, []) is None
    assert restarts.goodput([], [attempt(0, 30, 80.0)]) == 0


def test_a_row_of_compilation_is_no_step_time():
    rows = [row(1, 7.0), row(2, 1.0), row(3, 1.0)]
    assert restarts.goodput(rows, [attempt(0, 3, 12.0)]) == 3 / 12


@quick
@given(
    every=st.integers(1, 20),
    step_time=st.floats(1e-4, 100),
    ends=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.floats(0, 100), st.floats(0, 100)), min_size=1),
)
def test_goodput_of_a_run_is_the_share_of_kept_steps(every, step_time, ends):
    """Each attempt keeps `kept` steps and loses `lost`, with overhead and a wait."""
    attempts, at, wall = [], 0, 0.0
    for number, (kept, lost, overhead, waited) in enumerate(ends, start=1):
        seconds = (kept + lost) * step_time + overhead + 1e-3
        attempts.append(attempt(at, at + kept, seconds, waited, number))
        at, wall = at + kept, wall + seconds + waited
    rows = [row(step, step_time, compile_s=1e6) for step in range(every, at + 21, every)]
    known = min(at, rows[-1]["step"]) if rows else 0
    assert restarts.goodput(rows, attempts) == pytest.approx(known * step_time / wall)
    assert 0 <= restarts.goodput(rows, attempts) <= 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
damaged_rows = st.dictionaries(st.sampled_from(["step", "perf/step_time_s", "perf/compile_s"]), json_values)
counts, times = st.integers(0, 2**63 - 1), st.floats(0, 1e17)


@quick
@given(
    lines=st.lists(st.one_of(st.binary(), st.one_of(damaged_rows, json_values).map(lambda v: json.dumps(v).encode()))),
    attempts=st.lists(st.builds(attempt, counts, counts, times, times)),
)
def test_goodput_never_fails_on_damaged_rows(lines, attempts):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "metrics.jsonl"
        path.write_bytes(b"\n".join(lines))
        share = restarts.goodput(restarts.read_rows(path), attempts)
    assert share is None or 0 <= share <= 1
