"""Names from outside: of objects in a store and of files in a folder, and the patterns that select such names.

A name is a path below a folder, with '/' between its parts. Only `safe_parts` and `open_parent` turn such a name into a
path that is written, replaced or removed, and only `matches` defines what a pattern means, on a disk and in a store.
"""

import contextlib
import errno
import fnmatch
import functools
import glob
import itertools
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator

from data.errors import DataError

PART_BYTES = 255  # the most for one part of a path, in the usual file systems
NAME_BYTES = 3072  # the most for a complete name: a path has at most 4096, including the folder
WILDCARDS = re.compile(r"[*?[]")


# Safe paths


def safe_parts(name: str, what: str = "") -> list[str]:
    """The parts of a name that is a path below any folder.

    Args:
      name: a name from outside.
      what: how errors refer to it.

    Raises:
      DataError: a part is empty, '.' or '..' (an absolute name has an empty part), has a NUL, or is too long for a file
        system.
    """
    found, what = name.split("/"), what or repr(name)
    if odd := [part for part in found if part in ("", ".", "..")]:
        which = repr(odd[0]) if odd[0] else "an empty part (two slashes in a row, or one at an end)"
        raise DataError(f"{what} has {which} in its name, which is not a path below a folder; rename it")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        raise DataError(f"{what} has a character that no file name can have; rename it") from None
    if b"\0" in encoded:
        raise DataError(f"{what} has a NUL character, which no file name can have; rename it")
    if len(encoded) > NAME_BYTES or max(map(len, encoded.split(b"/"))) > PART_BYTES:
        raise DataError(
            f"{what[:200]} has a name that is too long for a file system ({PART_BYTES} bytes between slashes, "
            f"{NAME_BYTES} in all); rename it"
        )
    return found


def check_apart(names: Iterable[str], what: str) -> None:
    """Raises DataError if a name is also the folder of another: a store may have both, but a file system cannot."""
    files = set(names)
    for name in sorted(files):
        for folder in itertools.accumulate(name.split("/")[:-1], "{}/{}".format):
            if folder in files:
                raise DataError(f"{what} has both {folder} and {name}, but a file cannot be a folder; rename one")


@contextlib.contextmanager
def open_parent(root: pathlib.Path, name: str) -> Iterator[tuple[int, str]]:
    """A descriptor (dir_fd) of the folder that contains `name` below `root`, and the last part of the name.

    Missing folders are made. No folder below `root` may be a link, because a link would lead to another place. This
    holds even if a folder is replaced by a link meanwhile.

    Raises:
      DataError: the name is not a path below a folder.
      OSError: a folder is a link or a file, or cannot be made.
    """
    *folders, last = safe_parts(name)
    root.mkdir(parents=True, exist_ok=True)
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=at)
            try:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            except NotADirectoryError as e:
                raise OSError(e.errno, f"{part} is a link or a file, and not a folder") from None
            os.close(at)
            at = below
        yield at, last
    finally:
        os.close(at)


# Words

VALIDATION = re.compile("val|valid|validation")
TEST = re.compile("(train)?(test|dev|eval|evaluation|holdout|heldout|val|valid|validate|validation)(s|set|sets|data)?")


def has_word(name: str, words: re.Pattern[str]) -> bool:
    """Whether a name contains one of the words as a complete word, in upper or lower case."""
    return any(map(words.fullmatch, re.split(r"[^a-z]+", name.lower())))


# Patterns


def is_pattern(path: str) -> bool:
    return WILDCARDS.search(path) is not None


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern selects a name; both are relative to the same folder, with '/' between their parts.

    `*`, `?` and `[…]` stand for characters of one part. `**` as a part stands for any number of parts, including none;
    at the end, for at least one. Only a part of the pattern that begins with '.' selects a part that begins with '.'.
    """
    return len(_steps(pattern)) in matched_steps(name, pattern)


def may_contain(folder: str, pattern: str) -> bool:
    """Whether a pattern may select a name below this folder; '' is the folder to which both are relative."""
    return bool(next_steps(folder, pattern))


def next_steps(folder: str, pattern: str) -> frozenset[int]:
    """The steps of the pattern that may come next below this folder. Fewer steps select a subset of the names."""
    return matched_steps(folder, pattern) - {len(_steps(pattern))}


def matched_steps(name: str, pattern: str) -> frozenset[int]:
    """Every number of steps of the pattern that the complete name may match; empty if it cannot match."""
    steps = _steps(pattern)
    reached = _with_skipped({0}, steps)
    for part in name.split("/") if name else ():
        following = set()
        for at in reached:
            if at == len(steps):
                continue
            step = steps[at]
            if step is None:
                following |= {at} if not part.startswith(".") else set()
            elif step.fullmatch(part):
                following.add(at + 1)
        reached = _with_skipped(following, steps)
    return frozenset(reached)


def _with_skipped(reached: set[int], steps: tuple[re.Pattern[str] | None, ...]) -> set[int]:
    """Adds the steps that are reached if `**` stands for zero parts."""
    for at in sorted(reached):
        while at < len(steps) and steps[at] is None:
            at += 1
            reached.add(at)
    return reached


@functools.lru_cache(maxsize=64)
def _steps(pattern: str) -> tuple[re.Pattern[str] | None, ...]:
    pieces = [piece for piece in pattern.split("/") if piece]
    if pieces[-1:] == ["**"]:
        pieces.append("*")
    return tuple(None if piece == "**" else _step(piece) for piece in pieces)


def _step(piece: str) -> re.Pattern[str]:
    hidden = "" if piece.startswith(".") else r"(?!\.)"
    return re.compile(hidden + fnmatch.translate(piece))


def split_at_wildcard(pattern: str) -> tuple[pathlib.Path, str]:
    """The folder before the first wildcard, and the pattern of the names below it.

    Raises:
      DataError: the pattern has '..' after a wildcard.
    """
    pieces = pathlib.PurePath(pattern).parts
    root = list(itertools.takewhile(lambda piece: not is_pattern(piece), pieces))
    below = pieces[len(root) :]
    if ".." in below:
        raise DataError(f"{pattern} has '..' after a wildcard; write the folder without it")
    return pathlib.Path(*root), "/".join(below)


def check_one_meaning(path: str) -> None:
    """Raises DataError for the name of an existing file that, as a pattern, also selects other files.

    For example, the shell command `> *.txt` makes such a file in a folder without text files.
    """
    if not is_pattern(path) or ".." in pathlib.PurePath(path).parts:
        return
    root, pattern = split_at_wildcard(path)
    try:
        others = [root / name for name in find_files(root, pattern)[0] if root / name != pathlib.Path(path)]
    except OSError as e:
        raise DataError(f"cannot read {e.filename}: {e.strerror}") from None
    if others:
        raise DataError(
            f"{path} exists, and as a pattern it selects {len(others)} other file(s), such as {others[0]}; write "
            f"{glob.escape(path)} for this file, or rename it and write the pattern for the others"
        )


def find_files(root: pathlib.Path, pattern: str) -> tuple[list[str], int]:
    """The files below `root` that a pattern selects, sorted, and the number of further names of the same files.

    Links are followed. Every real folder is entered once, or again if another step of the pattern comes next, and every
    real file is taken once, so loops end and no file counts twice. A file is listed by a name without links if it has
    one, or else by the first name in sorted order.

    Raises:
      OSError: a folder that may contain selected files cannot be read.
    """
    found: list[str] = []
    seen: dict[tuple[int, int], list[frozenset[int]]] = {}  # the next steps of the pattern, by visit
    repeated = 0
    pending, links = [""], list[str]()
    while pending or links:
        if not pending:
            links.sort(reverse=True)
        name = (pending or links).pop()
        selected = bool(name) and matches(name, pattern)
        status = _status(root / name) if selected or may_contain(name, pattern) else None
        if status is None:
            continue
        steps, before = next_steps(name, pattern), seen.setdefault((status.st_dev, status.st_ino), [])
        is_new = not any(steps <= others for others in before)
        if stat.S_ISREG(status.st_mode) and selected:
            found += [name] if not before else []
            repeated += bool(before)
            before.append(steps)
        elif stat.S_ISDIR(status.st_mode) and is_new:
            before.append(steps)
            with os.scandir(root / name) as entries:
                for entry in sorted(entries, key=lambda e: e.name, reverse=True):
                    (links if entry.is_symlink() else pending).append(f"{name}/{entry.name}".lstrip("/"))
    return sorted(found), repeated


def _status(path: pathlib.Path) -> os.stat_result | None:
    """The status of a file; None for a broken link."""
    try:
        return path.stat()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
