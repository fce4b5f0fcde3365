"""Errors in the input: all errors are counted, and a few places of each kind are named."""

import collections
from typing import Any, NamedTuple

EXAMPLES = 3  # places of each kind that are named
# Kinds of errors are keys in summary.json. The next two are counted in characters.
REPLACED = "invalid UTF-8, now U+FFFD"
NUL = "NUL characters"


class Place(NamedTuple):
    path: str
    what: str  # 'line', 'row' or 'offset'
    number: int
    note: str = ""
    after: int = 0  # `number` counts lines from this byte on; 0 once the lines before that byte have been added

    def __str__(self) -> str:
        after = f" after byte {self.after}" if self.after else ""
        return f"{self.path} {self.what} {self.number}{after}{self.note and f' ({self.note})'}"


class Lines(NamedTuple):
    """The number of newlines in bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int
    newlines: int


class InputErrors:
    """Errors of a unit, whose line numbers are counted from its own first byte. `add`, called in the order of units,
    turns them into line numbers of the file."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str | Place]] = {}
        self.characters = 0  # of all text that was read; bytes for the byte tokenizer
        self.lines: Lines | None = None  # the lines of the part that was read last

    @property
    def invalid_share(self) -> float:
        """The share of characters that are NUL, or U+FFFD instead of bytes that are not UTF-8."""
        return (self.counts[REPLACED] + self.counts[NUL]) / max(self.characters, 1)

    def record(self, kind: str, where: str | Place, times: int = 1) -> None:
        self.counts[kind] += times
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(self._from_file_start(where))

    def count_lines(self, lines: Lines) -> None:
        """Records the number of lines in the part that was read last."""
        before = self.lines
        if before is not None and (before.path, before.stop) == (lines.path, lines.start):
            lines = lines._replace(start=before.start, newlines=before.newlines + lines.newlines)
        self.lines = lines

    def add(self, other: "InputErrors") -> None:
        """Adds the errors of the unit that follows."""
        self.counts.update(other.counts)
        self.characters += other.characters
        for kind, examples in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine.extend(map(self._from_file_start, examples[: EXAMPLES - len(mine)]))
        if other.lines is not None:
            self.count_lines(other.lines)

    def _from_file_start(self, where: str | Place) -> str | Place:
        lines = self.lines
        if lines is None or isinstance(where, str) or (where.path, where.after) != (lines.path, lines.stop):
            return where
        return where._replace(number=where.number + lines.newlines, after=lines.start)

    def to_json(self) -> dict[str, Any]:
        """All fields, to be written into a unit's file."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> "InputErrors":
        errors = cls()
        errors.counts.update(written["counts"])
        errors.characters = written["characters"]
        errors.lines = Lines(*written["lines"]) if written["lines"] else None
        for kind, examples in written["examples"].items():
            errors.examples[kind] = [e if isinstance(e, str) else Place(*e) for e in examples]
        return errors

    def summary(self) -> dict[str, Any]:
        """For summary.json: how often each kind was found, and the first places."""
        return {
            "counts": dict(self.counts),
            "examples": {kind: list(map(str, examples)) for kind, examples in self.examples.items()},
        }
