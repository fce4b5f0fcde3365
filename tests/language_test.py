"""The words of this repository: plain English and the field's terms (docs/design.md, Glossary).

  python -m tests.language_test [PATH ...]      prints what is wrong, a line each

The test is a list of patterns, like a linter: it keeps the worst habits out of comments, docstrings, messages, pages
and scripts. It finds some bad text; it cannot recognize good text.
"""

import io
import pathlib
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATTERNS = {  # a pattern that must not occur: what to write instead
    r"\bwhere (?:it|there|they|he|she|one|none|this|that|these|those|nothing|nobody|such) \w+": "if or when",
    r"\b(?<!there )(?:is|was) no (?!longer|more|other|less|such|need|way|one)\w+": "is not a, or has no",
    r"\b(?<!there )(?:are|were) no (?!longer|more|other|less|such)\w+": "are not, or have no",
    r"\b(?:go|goes|going|went|gone) on\b": "resume or continue",
    r"\bbut for\b": "except",
    r"(?<!stand-)(?<!let )\balone\b": "only, or by itself",
    r"\b(?:somebody|nobody|whoever|whatever it is)\b": "the user, a caller, no one",
    r"\b(?:is|are|was|were|be|been) told\b": "the verb: is configured, hears, is passed",
    r"\bowed\b": "pending",
    r"\bgangs?\b": "processes or group",
    r"\bwithout a word\b": "silently",
    r"\b(?:as|so) long as it lives\b": "while it runs",
    r"\bof its own accord\b": "by itself",
    r"\bbegins? anew\b": "starts again",
    r"\bnot to be had\b": "not available",
    r"\brubbish\b": "garbage, or padding",
    r"\bhave a look\b": "see",
    r"\bmicro-batch(?:es)?\b": "microbatch",
    r"\ball-?gathered together\b": "all-gathered",
}
# Files whose text is data: samples of text to tokenize, messages of other programs, and the patterns themselves.
NOT_OURS = {"tests/language_test.py", "tests/texts.py", "tests/random_corpora.py", "LICENSE"}
FOLDERS_NOT_OURS = ("tests/system/fakes/",)
# The words of a key of summary.json are part of its format, so they stay.
ALLOWED = re.compile(r"noqa|https?://|stands alone|text that is no string")


def texts_of(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of the text that people read: comments and strings of Python files, every line of other
    files."""
    source = path.read_text(errors="replace")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            for i, line in enumerate(token.string.splitlines()):
                yield token.start[0] + i, line


def wrong_in(path: pathlib.Path) -> list[str]:
    found = []
    for number, line in texts_of(path):
        for pattern, instead in PATTERNS.items():
            match = re.search(pattern, line, re.IGNORECASE)
            if match and not ALLOWED.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead}")
    return found


def files() -> list[pathlib.Path]:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    suffixes = {".py", ".md", ".sh", ".yaml", ".toml", ".sbatch", ".env", ".c", ""}
    return [
        ROOT / name
        for name in names
        if name
        and pathlib.Path(name).suffix in suffixes
        and name not in NOT_OURS
        and not name.startswith(FOLDERS_NOT_OURS)
        and (ROOT / name).is_file()
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_has_these_habits(path):
    found = wrong_in(path)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "a file that is no dataset",
        "where there is none",
        "the run goes on",
        "all but for one",
        "process 0 alone writes",
    ],
)
def test_each_habit_is_found(tmp_path, text, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "x.py").write_text(f'"""{text}."""\n')
    assert wrong_in(tmp_path / "x.py")


if __name__ == "__main__":
    chosen = [pathlib.Path(name).resolve() for name in sys.argv[1:]] or files()
    for line in (line for path in chosen for line in wrong_in(path)):
        print(line)
