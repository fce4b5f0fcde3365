"""docs/design.md and docs/tour.md name things that exist: files with about the stated number of lines, and lines with
the stated text."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DESIGN, TOUR = ((ROOT / "docs" / name).read_text() for name in ("design.md", "tour.md"))
ROWS = re.findall(r"^\| (\d+) \| (\S+) \| ([\d,]+) \|", DESIGN, re.MULTILINE)
ANSWERS = re.findall(r"^- `([\w/.]+)`: `(.+)`", TOUR, re.MULTILINE)
PATHS = re.compile(r"\b((?:configs|data|launch|model|trainer|tests|benchmarks)/[\w/.]*\w)\b")


def test_the_reading_order_is_numbered_and_short():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, len(ROWS) + 1))
    assert 18 <= len(ROWS) <= 24


@pytest.mark.parametrize(("path", "lines"), [(path, lines) for _, path, lines in ROWS])
def test_a_file_of_the_reading_order_has_about_so_many_lines(path, lines):
    actual = len((ROOT / path).read_text().splitlines())
    assert abs(int(lines.replace(",", "")) - actual) <= max(10, actual // 10), f"{path} has {actual} lines"


def test_the_tour_asks_at_least_ten_questions():
    questions = re.findall(r"^\*\*.+\?\*\*", TOUR, re.MULTILINE)
    assert len(questions) >= 10 and len(ANSWERS) >= len(questions)


@pytest.mark.parametrize(("path", "line"), ANSWERS)
def test_an_answer_of_the_tour_is_one_line_that_exists(path, line):
    found = [i for i, text in enumerate((ROOT / path).read_text().splitlines(), 1) if line in text]
    assert len(found) == 1, f"{line!r} occurs on {len(found)} lines of {path}"


@pytest.mark.parametrize("page", ["design.md", "tour.md"])
def test_every_path_on_the_page_exists(page):
    missing = {path for path in PATHS.findall((ROOT / "docs" / page).read_text()) if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("package", ["trainer", "model", "data"])
def test_the_top_of_a_package_shows_only_the_path_of_a_batch(package):
    assert len(list((ROOT / package).glob("*.py"))) <= 16
