"""The lives of a run: one row for each time its command was started, and how much of their time was of use.

    RUN/lives.jsonl (of process 0), RUN/lives.<process>.jsonl

launch/supervise.py writes them. No JAX and no Orbax here: a supervisor has to start, and go on, without either.
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
from trainer.reliability import reading

log = logging.getLogger("meshlm")

DONE, STOPPED = 0, 42
METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's, in each step of checkpoints/; written last
STEP_TIME, COMPILE_TIME = "perf/step_time_s", "perf/compile_s"
MOST_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Life:
    """One row.

    Attributes:
      life: from 1, through all supervisors of the run.
      waited: seconds between the life before and this one; 0 for the first one of a supervisor.
      code: exit code; 128 + n for a death by signal n.
      first_step, last_step: newest committed step before and after.
      lost_steps: steps this life did past last_step, as far as metrics.jsonl has rows of them.
      goodput: of all lives up to this one, where that is known.
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


def newest_step(run: pathlib.Path) -> int:
    """The newest committed step of a run; 0 when there is none, or none can be seen."""
    try:
        return newest_committed(run)
    except OSError:
        return 0


def newest_committed(run: pathlib.Path) -> int:
    """The newest committed step of a run; 0 when there is none. Raises OSError."""
    if not reading.is_there(run / "checkpoints"):
        return 0
    steps = [p for p in (run / "checkpoints").iterdir() if p.name.isascii() and p.name.isdigit()]
    return max((int(p.name) for p in steps if reading.is_there(p / METADATA_FILE)), default=0)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a file that cannot be read has none."""
    try:
        return rows_in(path.read_bytes())
    except OSError:
        return []


def rows_in(raw: bytes) -> list[dict[str, Any]]:
    """The rows of a .jsonl file's bytes; lines that are torn or damaged are left out."""
    rows = []
    for line in raw.split(b"\n")[:-1]:  # what comes after the last line feed is a torn line
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_lives(path: pathlib.Path) -> list[Life]:
    """The lives in a file. Rows that are none are left out, and a row that was written twice counts once."""
    names = [field.name for field in dataclasses.fields(Life)]
    rows: list[dict[str, Any]] = [{name: row.get(name) for name in names} for row in read_rows(path)]
    return list(dict.fromkeys(Life(**row) for row in rows if _is_life(row)))


def _is_life(row: dict[str, Any]) -> bool:
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


def goodput(rows: Sequence[dict[str, Any]], lives: Sequence[Life]) -> float | None:
    """Time of the steps that were kept, over the time of all lives and the waits between them; None if there is none.

    Args:
      rows: of metrics.jsonl. A row's step time stands for the steps since the row before; steps after the last row
        have none, and do not count. Nor does a row of nothing but a first step, which is mostly compilation: the next
        one stands for both.
      lives: in their order. Steps that belong to none of them, or were lost again, do not count.
    """
    wall = sum(life.seconds + life.waited for life in lives)
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

    useful, counted, kept = 0.0, 0, lives[-1].last_step
    for life in lives:
        first, last = max(life.first_step, counted), min(life.last_step, kept)
        if first < last:
            useful += up_to(last) - up_to(first)
            counted = last
    return min(max(useful / wall, 0.0), 1.0)


def _has_step_time(row: dict[str, Any]) -> bool:
    seconds = row.get(STEP_TIME)
    return _is_count(row.get("step")) and _is_seconds(seconds) and seconds != row.get(COMPILE_TIME)


class Journal:
    """The file of lives, and the one under way.

    Nothing is written before the run has its config.json: the trainer refuses a folder that has something in it and is
    no run. Rows that could not be written yet are kept for the next time.
    """

    def __init__(self, run: pathlib.Path, process: int = 0):
        self.run, self.metrics = run, run / "metrics.jsonl"
        self.path = run / (f"lives.{process}.jsonl" if process else "lives.jsonl")
        self.lives = read_lives(self.path)
        self._unwritten: list[Life] = []
        self._ended = math.inf

    def begin(self) -> None:
        """A life begins."""
        self._start, self._began = _now(), time.monotonic()
        self._first_step, self._metrics_before = newest_step(self.run), _version(self.metrics)

    def end(self, returncode: int) -> Life:
        """It ended with `returncode`, that of subprocess: -n for a death by signal n. Writes its row."""
        now, last_step, rows = time.monotonic(), newest_step(self.run), read_rows(self.metrics)
        reached = max((row["step"] for row in rows if _is_count(row.get("step"))), default=0)
        if _version(self.metrics) == self._metrics_before:  # rows past the last step are those of a life before
            reached = 0
        life = Life(
            life=max((earlier.life for earlier in self.lives), default=0) + 1,
            start=self._start,
            end=_now(),
            waited=round(max(self._began - self._ended, 0.0), 3),
            seconds=round(now - self._began, 3),
            cause=cause(returncode),
            code=returncode if returncode >= 0 else 128 - returncode,
            first_step=self._first_step,
            last_step=last_step,
            lost_steps=max(reached - last_step, 0),
        )
        life = dataclasses.replace(life, goodput=goodput(rows, [*self.lives, life]))
        self._ended = now
        self.lives.append(life)
        self._unwritten.append(life)
        if (self.run / "config.json").exists():
            self._write()
        return life

    def _write(self) -> None:
        try:
            with self.path.open("a+b") as f:
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)  # a torn line, if there is one
                f.writelines(json.dumps(dataclasses.asdict(life)).encode() + b"\n" for life in self._unwritten)
                files.close_durably(f)
        except OSError as e:
            log.warning("%s cannot be written (%s); its rows are kept for the next time", self.path, e.strerror)
            return
        self._unwritten.clear()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _version(path: pathlib.Path) -> tuple[int, ...] | None:
    """What changes when somebody writes to a file."""
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
    return {DONE: "done", STOPPED: f"stopped ({STOPPED})"}.get(returncode, f"exit code {returncode}")


def table(lives: Sequence[Life], since: int = 0) -> list[str]:
    """Lines for people: the lives from number `since` in the list on, then one for all of them."""
    lines = ["life  cause             steps                 lost   seconds    waited"]
    for life in lives[since:][-MOST_SHOWN:]:
        steps = f"{life.first_step} to {life.last_step}"
        numbers = f"{life.lost_steps:>6,}{life.seconds:>10,.1f}{life.waited:>10,.1f}"
        lines.append(f"{life.life:>4}  {life.cause:<16}  {steps:<20}{numbers}")
    share = lives[-1].goodput
    lost = sum(life.lost_steps for life in lives)
    known = f"goodput {100 * share:.1f} %" if share is not None else "goodput not known"
    return [*lines, f"lives {len(lives)}, steps lost {lost:,}, {known}"]
