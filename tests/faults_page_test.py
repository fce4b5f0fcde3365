"""docs/faults.md names tests that exist."""

import pathlib
import re

TESTS = pathlib.Path(__file__).parent


def test_every_test_that_is_named_is_there():
    named = 0
    for line in (TESTS.parent / "docs/faults.md").read_text(encoding="utf-8").splitlines():
        file = ""
        for found in re.finditer(r"(\w+_test)?::(test_\w+)", line):
            file = found[1] or file
            (path,) = TESTS.rglob(f"{file}.py")
            assert f"def {found[2]}(" in path.read_text(encoding="utf-8"), found[0]
            named += 1
    assert named > 60
