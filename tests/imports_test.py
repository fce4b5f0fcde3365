"""launch -> trainer -> {model, data}: no arrow runs the other way, and checks before JAX stay free of it."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAY_IMPORT = {
    "data": set(),
    "model": set(),
    "trainer": {"data", "model"},
    "launch": {"trainer", "data", "model"},
    "configs": {"trainer"},  # default.py takes the dataclasses' defaults from there
}
FORBIDDEN_LIBRARIES = {
    "data": {"absl", "ml_collections"},
    "model": {"absl", "ml_collections"},
    "trainer": {"absl", "ml_collections"},
}


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_run_one_way(package):
    files = list((ROOT / package).glob("*.py"))
    assert len(files) > 1
    for path in files:
        rooms = imported(path) & set(MAY_IMPORT) - {package}
        assert rooms <= MAY_IMPORT[package], f"{path.name} imports {rooms - MAY_IMPORT[package]}"
        assert not imported(path) & FORBIDDEN_LIBRARIES.get(package, set()), f"{path.name} knows of flags or ConfigDict"


def test_recipes_are_imported_by_nobody():
    for package in ("data", "model", "trainer", "launch"):
        for path in (ROOT / package).glob("*.py"):
            assert "configs" not in imported(path), path


@pytest.mark.parametrize(
    "module",
    [
        "launch.cli",
        "launch.train",
        "launch.sample",
        "launch.prepare",
        "launch.supervise",
        "launch.inspect",
        "launch.pack",
        "launch.tokenizer",
        "trainer.run_directory",
    ],
)
def test_what_answers_a_typo_does_not_load_jax(module):
    """A mistyped field is answered within a second only as long as these leave JAX alone."""
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
