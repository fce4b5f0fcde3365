"""The restart log of a run, with one row for each attempt, that is, each start of its command; and the run's goodput.

    RUN/lives.jsonl (of process 0), RUN/lives.<process>.jsonl

launch/supervise.py writes these files. This module imports neither JAX nor Orbax: a supervisor must work without them.
"""

import bisect
import dataclasses
import datetime
import itertools
import json
import logging
import math
import pathlib
import signal
import time
from collections.abc import Sequence
from typing import Any

from data.storage import files
from trainer.errors import Stopped
from trainer.reliability import reading

log = logging.getLogger("meshlm")

METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax writes it last into the folder of a step
STEP_TIME, COMPILE_TIME = "perf/step_time_s", "perf/compile_s"
MOST_SHOWN = 20  # how many rows a table shows


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of the command, and one row of the log. The names of the fields are those of the file.

    Attributes:
      life: number of the attempt, counted from 1 over all supervisors of the run.
      waited: seconds between the previous attempt and this one; 0 for the first attempt of a supervisor.
      code: exit code; 128 + n if signal n killed the process.
      first_step, last_step: the newest committed step before and after the attempt.
      lost_steps: number of steps past last_step that this attempt finished, as far as metrics.jsonl has rows of them.
      goodput: of all attempts up to this one; None if it is not known.
    """

    life: int
    start: str
    end: str
    waited: float
    seconds: float
    cause: str
    code: int
    first_step: int
    last_step: int
    lost_steps: int
    goodput: float | None = None


KINDS = {int: ("life", "code", "first_step", "last_step", "lost_steps"), float: ("waited", "seconds")}


def newest_step(run_dir: pathlib.Path) -> int:
    """The newest committed step of a run; 0 if there is none, or if the folder cannot be read."""
    try:
        return newest_committed(run_dir)
    except OSError:
        return 0


def newest_committed(run_dir: pathlib.Path) -> int:
    """The newest committed step of a run; 0 if there is none. Raises OSError."""
    if not reading.is_there(run_dir / "checkpoints"):
        return 0
    steps = [p for p in (run_dir / "checkpoints").iterdir() if p.name.isascii() and p.name.isdigit()]
    return max((int(p.name) for p in steps if reading.is_there(p / METADATA_FILE)), default=0)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; [] if it cannot be read."""
    try:
        return rows_in(path.read_bytes())
    except OSError:
        return []


def rows_in(raw: bytes) -> list[dict[str, Any]]:
    """The rows in the content of a .jsonl file; malformed lines are skipped."""
    rows = []
    for line in raw.split(b"\n")[:-1]:  # what follows the last line feed is a torn line, or empty
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_attempts(path: pathlib.Path) -> list[Attempt]:
    """The attempts in a file. Malformed rows are skipped, and a row that was written twice counts once."""
    names = [field.name for field in dataclasses.fields(Attempt)]
    rows: list[dict[str, Any]] = [{name: row.get(name) for name in names} for row in read_rows(path)]
    return list(dict.fromkeys(Attempt(**row) for row in rows if _is_attempt(row)))


def _is_attempt(row: dict[str, Any]) -> bool:
    return (
        all(_is_count(row[name]) for name in KINDS[int])
        and all(_is_seconds(row[name]) for name in KINDS[float])
        and all(isinstance(row[name], str) for name in ("start", "end", "cause"))
        and (row["goodput"] is None or _is_seconds(row["goodput"]))
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e18  # type: ignore[operator]


def goodput(rows: Sequence[dict[str, Any]], attempts: Sequence[Attempt]) -> float | None:
    """The time of the steps that were kept / the time of all attempts and of the waits between them; None if that is 0.

    Args:
      rows: the rows of metrics.jsonl. A row has the mean time of the steps since the previous row. Steps after the last
        row have no known time, and do not count. A row that has only the first step is skipped, because that is mostly
        compilation; the next row's step time counts for that step, too.
      attempts: the attempts, in order. Steps that belong to no attempt, or were lost later, do not count.
    """
    wall = sum(attempt.seconds + attempt.waited for attempt in attempts)
    if not wall:
        return None
    times = {row["step"]: row[STEP_TIME] for row in rows if _has_step_time(row)} | {0: 0.0}
    steps = sorted(times)
    times_up_to = list(
        itertools.accumulate(((step - before) * times[step] for before, step in itertools.pairwise(steps)), initial=0.0)
    )

    def up_to(step: int) -> float:
        i = bisect.bisect_left(steps, step)
        return times_up_to[i] - (steps[i] - step) * times[steps[i]] if i < len(steps) else times_up_to[-1]

    useful, counted, kept = 0.0, 0, attempts[-1].last_step
    for attempt in attempts:
        first, last = max(attempt.first_step, counted), min(attempt.last_step, kept)
        if first < last:
            useful += up_to(last) - up_to(first)
            counted = last
    return min(max(useful / wall, 0.0), 1.0)


def _has_step_time(row: dict[str, Any]) -> bool:
    seconds = row.get(STEP_TIME)
    return _is_count(row.get("step")) and _is_seconds(seconds) and seconds != row.get(COMPILE_TIME)


class RestartLog:
    """The file with the attempts of a run, and the attempt that is running, from begin() to end().

    Nothing is written before the run has its config.json, because the trainer refuses a folder that is not empty and
    not a run. Rows that cannot be written are kept, and written with the next one.
    """

    def __init__(self, run_dir: pathlib.Path, process: int = 0):
        self.run_dir = run_dir
        self.metrics = run_dir / "metrics.jsonl"
        self.path = run_dir / (f"lives.{process}.jsonl" if process else "lives.jsonl")
        self.attempts = read_attempts(self.path)
        self._unwritten: list[Attempt] = []
        self._start = ""
        self._start_s = 0.0
        self._end_s = math.inf
        self._first_step = 0
        self._metrics_before: tuple[int, ...] | None = None

    def begin(self) -> None:
        """Starts an attempt."""
        self._start = _now()
        self._start_s = time.monotonic()
        self._first_step = newest_step(self.run_dir)
        self._metrics_before = _version(self.metrics)

    def end(self, returncode: int) -> Attempt:
        """Ends the attempt and writes its row.

        Args:
          returncode: that of subprocess: -n if signal n killed the process.
        """
        now, last_step, rows = time.monotonic(), newest_step(self.run_dir), read_rows(self.metrics)
        reached = max((row["step"] for row in rows if _is_count(row.get("step"))), default=0)
        if _version(self.metrics) == self._metrics_before:  # all rows are those of earlier attempts
            reached = 0
        attempt = Attempt(
            life=max((earlier.life for earlier in self.attempts), default=0) + 1,
            start=self._start,
            end=_now(),
            waited=round(max(self._start_s - self._end_s, 0.0), 3),
            seconds=round(now - self._start_s, 3),
            cause=cause(returncode),
            code=returncode if returncode >= 0 else 128 - returncode,
            first_step=self._first_step,
            last_step=last_step,
            lost_steps=max(reached - last_step, 0),
        )
        attempt = dataclasses.replace(attempt, goodput=goodput(rows, [*self.attempts, attempt]))
        self._end_s = now
        self.attempts.append(attempt)
        self._unwritten.append(attempt)
        if (self.run_dir / "config.json").exists():
            self._write()
        return attempt

    def _write(self) -> None:
        try:
            with self.path.open("a+b") as f:
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)  # cuts off a torn line, if there is one
                f.writelines(json.dumps(dataclasses.asdict(row)).encode() + b"\n" for row in self._unwritten)
                files.close_durably(f)
        except OSError as e:
            log.warning("%s cannot be written (%s); its rows are kept until the next one", self.path, e.strerror)
            return
        self._unwritten.clear()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _version(path: pathlib.Path) -> tuple[int, ...] | None:
    """A value that changes when the file is written; None if it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def cause(returncode: int) -> str:
    if returncode < 0:
        try:
            return f"signal {signal.Signals(-returncode).name}"
        except ValueError:  # real-time signals have no name
            return f"signal {-returncode}"
    stopped = Stopped.exit_code
    return {0: "done", stopped: f"stopped ({stopped})"}.get(returncode, f"exit code {returncode}")


def table(attempts: Sequence[Attempt], since: int = 0) -> list[str]:
    """Lines for people: a table of attempts[since:], of which it shows MOST_SHOWN at most, then one line about all."""
    lines = ["attempt  cause             steps                 lost   seconds    waited"]
    for attempt in attempts[since:][-MOST_SHOWN:]:
        steps = f"{attempt.first_step} to {attempt.last_step}"
        numbers = f"{attempt.lost_steps:>6,}{attempt.seconds:>10,.1f}{attempt.waited:>10,.1f}"
        lines.append(f"{attempt.life:>7}  {attempt.cause:<16}  {steps:<20}{numbers}")
    share = attempts[-1].goodput
    lost = sum(attempt.lost_steps for attempt in attempts)
    known = f"goodput {100 * share:.1f} %" if share is not None else "goodput not known"
    return [*lines, f"attempts {len(attempts)}, steps lost {lost:,}, {known}"]
