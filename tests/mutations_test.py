"""benchmarks/mutations.py: each fault fits the code as it is now, and the runner tells killed from survived."""

import ast
import collections
import pathlib
import subprocess

import pytest

from benchmarks import mutations
from benchmarks.mutations import FAULTS, KILLED, SURVIVED, Fault, apply, copy_of, verdict
from tests import runs

every_fault = pytest.mark.parametrize("one", FAULTS, ids=[one.name for one in FAULTS])


@every_fault
def test_a_fault_is_another_program(one):
    """The old text of a fault occurs once in its file, in code, and the file can be parsed with the new text."""
    text = (runs.ROOT / one.file).read_text()
    assert text.count(one.old) == 1, f"{one.file} changed: give the fault {one.name!r} its new text"
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text.replace(one.old, one.new)))


@every_fault
def test_the_tests_of_a_fault_exist(one):
    assert one.tests
    for test in one.tests:
        path, _, name = test.partition("::")
        tree = ast.parse((runs.ROOT / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in functions


def test_faults_are_in_every_part_and_have_names_of_their_own():
    assert len(FAULTS) >= 40 and len({one.name for one in FAULTS}) == len(FAULTS)
    places = collections.Counter(one.file.split("/")[0] for one in FAULTS)
    assert set(places) == {"data", "launch", "model", "trainer"}
    assert all(count >= 10 for package, count in places.items() if package != "launch")


def test_faults_are_chosen_by_parts_of_names_and_files():
    assert mutations.chosen([]) == FAULTS
    assert {one.file for one in mutations.chosen(["data/order.py"])} == {"data/order.py"}
    some = mutations.chosen(["dropout repeats", "norm has"])
    assert len(some) == 6 and not mutations.chosen(["no such fault"])


@pytest.fixture
def repository(tmp_path) -> pathlib.Path:
    """A git repository with a module of two functions, one of them tested, and a file that git ignores."""
    (tmp_path / "module.py").write_text("def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n")
    (tmp_path / "module_test.py").write_text(
        "import time\n\nimport module\n\n\n"
        "def test_add():\n    assert module.add(2, 3) == 5\n\n\n"
        "def test_two_and_two():\n    assert module.add(2, 2) == 4\n"
    )
    (tmp_path / ".gitignore").write_text("data\n")
    (tmp_path / "data").write_text("large")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def fault(old: str, new: str, test: str = "module_test.py") -> Fault:
    return Fault("", "module.py", old, new, (test,))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (fault("a + b", "a * b"), KILLED),
        (fault("a + b", "a * b", "module_test.py::test_two_and_two"), SURVIVED),
        (fault("a - b", "a + b"), SURVIVED),
        (fault("a / b", "a * b"), "its old text occurs 0 times in module.py"),
        (fault("return", "raise"), "its old text occurs 2 times in module.py"),
        (fault("def add(a, b)", "def add(a, b"), "pytest ended with 2"),
        (fault("a + b", "a * b", "other_test.py"), "pytest ended with 4"),
        (fault("return a + b", "while True: pass"), "not done within 5 s"),
    ],
    ids=lambda value: None if isinstance(value, Fault) else value,
)
def test_verdicts(repository, one, expected):
    before = (repository / "module.py").read_text()
    result, by = verdict(repository, one, 5 if "within" in expected else runs.TIMEOUT_S)
    assert result.startswith(expected)
    assert ("FAILED module_test.py::test_add - assert 6 == 5" in by) == (result == KILLED)
    assert (repository / "module.py").read_text() == before


def test_a_copy_has_changes_and_new_files_and_is_gone_afterwards(repository):
    subprocess.run(["git", "add", "module.py"], cwd=repository, check=True)
    (repository / "module.py").write_text("changed = True\n")
    with copy_of(repository) as copy:
        assert (copy / "module.py").read_text() == "changed = True\n" and (copy / "module_test.py").exists()
        assert not (copy / "data").exists() and not (copy / ".git").exists()
        apply(copy, fault("True", "False"))
    assert not copy.exists() and (repository / "module.py").read_text() == "changed = True\n"


def test_the_exit_code_is_0_only_if_all_faults_were_killed(monkeypatch, capsys, repository):
    """The table has a row for each fault, whatever its verdict."""
    found = {}
    for name, faults in {
        "killed": [fault("a + b", "a * b")],
        "survived": [fault("a + b", "a * b"), fault("a - b", "a + b")],
        "not found": [fault("a / b", "a * b")],
    }.items():
        monkeypatch.setattr(mutations, "ROOT", repository)
        monkeypatch.setattr(mutations, "chosen", lambda parts, faults=faults: faults)
        found[name] = mutations.main(["--minutes=3"])
        rows = capsys.readouterr().out.splitlines()
        assert len([row for row in rows if row.startswith("| ")]) == 1 + len(faults)
    assert found == {"killed": 0, "survived": 1, "not found": 1}


def test_a_list_tries_nothing_and_an_unknown_name_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(mutations, "run_tests", None)
    assert mutations.main(["--list", "--only=top-p, order.py"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "model/sampling.py",
        "data/order.py",
    ]
    assert mutations.main(["--only=no such fault"]) == 2 and "'no such fault'" in capsys.readouterr().err
