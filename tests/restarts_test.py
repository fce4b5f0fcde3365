"""The journal of lives: whole rows through any cut, and a goodput that is a share whatever the files hold."""

import json
import pathlib
import resource
import signal
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.reliability import restarts
from trainer.reliability.restarts import Journal, Life

quick = settings(max_examples=60, deadline=None)


def commit(run: pathlib.Path, step: int) -> None:
    (run / "checkpoints" / str(step)).mkdir(parents=True)
    (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()


def write_rows(run: pathlib.Path, *rows: object) -> None:
    with (run / "metrics.jsonl").open("a") as f:
        f.writelines(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def row(step: int, seconds: float, compile_s: float = 7.0) -> dict:
    return {"step": step, "tokens": 1, "perf/step_time_s": seconds, "perf/compile_s": compile_s}


def life(first: int, last: int, seconds: float, waited: float = 0.0, number: int = 1) -> Life:
    return Life(number, "start", "end", waited, seconds, "done", 0, first, last, 0)


def begun(folder: pathlib.Path) -> pathlib.Path:
    """A folder that the trainer has made a run."""
    (folder / "config.json").touch()
    return folder


def live(journal: Journal, returncode: int = 1) -> Life:
    journal.begin()
    return journal.end(returncode)


# The file


@quick
@given(count=st.integers(1, 4), cut=st.floats(0, 1))
def test_cut_at_any_byte_it_is_a_prefix_and_goes_on(count, cut):
    with tempfile.TemporaryDirectory() as folder:
        run = begun(pathlib.Path(folder))
        journal = Journal(run)
        written = [live(journal) for _ in range(count)]
        content = journal.path.read_bytes()
        journal.path.write_bytes(content[: round(cut * len(content))])
        again = Journal(run)
        kept = len(again.lives)
        assert again.lives == written[:kept]
        assert kept == content[: round(cut * len(content))].count(b"\n")
        assert live(again).life == kept + 1
        assert Journal(run).lives == again.lives
        assert again.path.read_bytes().count(b"\n") == kept + 1


@quick
@given(garbage=st.lists(st.one_of(st.binary(), st.just(b"[" * 20_000), st.just(b'{"life": NaN}'))))
def test_damaged_lines_are_left_out(garbage):
    with tempfile.TemporaryDirectory() as folder:
        run = begun(pathlib.Path(folder))
        journal = Journal(run)
        one = live(journal)
        with journal.path.open("ab") as f:
            f.write(b"\n".join(garbage))
        two = live(Journal(run), -signal.SIGKILL)
        assert Journal(run).lives == [one, two]


def test_a_row_written_twice_counts_once(tmp_path):
    journal = Journal(begun(tmp_path))
    one = live(journal)
    journal.path.write_bytes(2 * journal.path.read_bytes())
    assert Journal(tmp_path).lives == [one]


def test_a_full_disk_is_a_warning_and_the_rows_follow(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(restarts.log, "warning", lambda text, *values: warned.append(text % values))
    journal = Journal(begun(tmp_path))
    live(journal)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, hard))
    try:
        live(journal)  # ten bytes of it are written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(warned) == 1 and str(journal.path) in warned[0]
    assert len(Journal(tmp_path).lives) == 1
    live(journal)
    assert len(warned) == 1
    assert [a.life for a in Journal(tmp_path).lives] == [1, 2, 3]


def test_nothing_is_written_into_a_folder_that_is_no_run_yet(tmp_path):
    """The trainer refuses such a folder unless it is empty."""
    journal = Journal(tmp_path / "run")
    live(journal)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    live(journal)
    assert list((tmp_path / "run").iterdir()) == []
    begun(tmp_path / "run")
    live(journal)
    assert [a.life for a in Journal(tmp_path / "run").lives] == [1, 2, 3]


def test_each_process_has_a_file_of_its_own(tmp_path):
    assert Journal(tmp_path, 0).path == tmp_path / "lives.jsonl"
    assert Journal(tmp_path, 3).path == tmp_path / "lives.3.jsonl"


# What a row says


def test_only_committed_steps_count(tmp_path):
    assert restarts.newest_step(tmp_path) == 0
    commit(tmp_path, 20)
    commit(tmp_path, 100)
    (tmp_path / "checkpoints" / "200").mkdir()  # being written
    for name in ("300.orbax-checkpoint-tmp", "²"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "_CHECKPOINT_METADATA").touch()
    (tmp_path / "checkpoints" / "400").touch()
    assert restarts.newest_step(tmp_path) == 100


def test_lost_steps_are_those_of_this_life(tmp_path):
    journal = Journal(begun(tmp_path))
    journal.begin()
    commit(tmp_path, 20)
    write_rows(tmp_path, row(10, 0.1), row(20, 0.1), "garbage", row(30, 0.1), '{"step": 99, "perf')
    died = journal.end(-signal.SIGKILL)
    assert (died.cause, died.code, died.first_step, died.last_step, died.lost_steps) == (
        "signal SIGKILL",
        137,
        0,
        20,
        10,
    )
    # It ends before it has cut the rows of the life before, which lost them already.
    assert live(journal).lost_steps == 0
    journal.begin()
    (tmp_path / "metrics.jsonl").unlink()
    write_rows(tmp_path, row(10, 0.1), row(20, 0.1), row(30, 0.1))
    commit(tmp_path, 30)
    assert journal.end(42).lost_steps == 0


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
    ended = live(Journal(tmp_path), returncode)
    assert (ended.cause, ended.code) == (cause, code)


def test_table(tmp_path):
    journal = Journal(tmp_path)
    for _ in range(30):
        live(journal)
    lines = restarts.table(journal.lives, since=28)
    assert len(lines) == 4 and lines[-1].startswith("lives 30, steps lost 0, goodput ")
    assert len(restarts.table(journal.lives)) == restarts.MOST_SHOWN + 2


# Goodput


def test_goodput_by_hand():
    rows = [row(10, 1.0), {"step": 10, "val/loss": 1.0}, row(20, 2.0), row(30, 1.0)]
    assert restarts.goodput(rows, [life(0, 30, 80.0)]) == 40 / 80
    assert restarts.goodput(rows, [life(0, 25, 80.0)]) == 35 / 80  # what is not committed is lost
    assert restarts.goodput(rows, [life(20, 30, 80.0)]) == 10 / 80  # steps before supervision
    assert restarts.goodput(rows, [life(0, 10, 30.0), life(20, 30, 40.0, waited=10.0)]) == 20 / 80  # and between
    assert restarts.goodput(rows, [life(0, 20, 40.0), life(10, 30, 40.0)]) == 40 / 80  # done twice, counted once
    assert restarts.goodput(rows, [life(0, 20, 40.0), life(20, 10, 40.0)]) == 10 / 80  # lost again: quarantined
    assert restarts.goodput(rows, [life(0, 90, 80.0)]) == 40 / 80  # no time is known after the last row
    assert restarts.goodput(rows, []) is None
    assert restarts.goodput([], [life(0, 30, 80.0)]) == 0


def test_a_row_of_compilation_is_no_step_time():
    rows = [row(1, 7.0), row(2, 1.0), row(3, 1.0)]
    assert restarts.goodput(rows, [life(0, 3, 12.0)]) == 3 / 12


@quick
@given(
    every=st.integers(1, 20),
    step_time=st.floats(1e-4, 100),
    ends=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.floats(0, 100), st.floats(0, 100)), min_size=1),
)
def test_goodput_of_a_run_is_the_share_of_kept_steps(every, step_time, ends):
    """Lives that go `kept` steps further and lose `lost`; overhead and wait besides."""
    all_lives, at, wall = [], 0, 0.0
    for number, (kept, lost, overhead, waited) in enumerate(ends, start=1):
        seconds = (kept + lost) * step_time + overhead + 1e-3
        all_lives.append(life(at, at + kept, seconds, waited, number))
        at, wall = at + kept, wall + seconds + waited
    rows = [row(step, step_time, compile_s=1e6) for step in range(every, at + 21, every)]
    known = min(at, rows[-1]["step"]) if rows else 0
    assert restarts.goodput(rows, all_lives) == pytest.approx(known * step_time / wall)
    assert 0 <= restarts.goodput(rows, all_lives) <= 1


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
    all_lives=st.lists(st.builds(life, counts, counts, times, times)),
)
def test_goodput_never_fails_on_damaged_rows(lines, all_lives):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "metrics.jsonl"
        path.write_bytes(b"\n".join(lines))
        share = restarts.goodput(restarts.read_rows(path), all_lives)
    assert share is None or 0 <= share <= 1
