"""launch -> trainer -> {model, data}, and their sub-packages: no import goes the other way, there are no cycles, and
modules that run before JAX is loaded do not import it. This holds at any depth of folders."""

import ast
import fnmatch
import pathlib
import subprocess
import sys
import tomllib

import pytest

from launch import distributed

ROOT = pathlib.Path(__file__).parent.parent
# A package or sub-package, and what else it may import. Modules at the top of data/, model/ and trainer/ count as the
# package itself: sub-packages may import them and be imported by them, as long as there is no cycle.
MAY_IMPORT = {
    "data": {"data.storage", "data.token_files", "data.tokenizers"},
    "data.storage": {"data"},
    "data.tokenizers": {"data", "data.storage"},
    "data.token_files": {"data", "data.storage", "data.tokenizers"},
    "data.preparation": {"data", "data.storage", "data.token_files", "data.tokenizers"},
    "model": set(),
    "model.families": {"model"},
    "trainer": {"data", "data.token_files", "data.tokenizers", "model", "trainer.parallel", "trainer.reliability"},
    "trainer.finetuning": {"data", "data.storage", "data.token_files", "trainer", "trainer.reliability"},
    "trainer.interchange": {
        "data",
        "data.storage",
        "data.tokenizers",
        "model",
        "model.families",
        "trainer",
        "trainer.reliability",
    },
    "trainer.parallel": {"model", "trainer"},
    "trainer.reliability": {"data", "data.storage", "data.token_files", "data.tokenizers", "trainer"},
    "trainer.reporting": {"data", "data.storage", "data.token_files", "model", "trainer", "trainer.reliability"},
    "trainer.tasks": {"data", "data.tokenizers", "model", "trainer", "trainer.interchange"},
    "trainer.planning": {"data", "model", "trainer", "trainer.finetuning", "trainer.parallel", "trainer.reporting"},
    "launch.serving": {"data", "launch", "model", "trainer"},
    "configs": {"trainer"},  # default.py has the defaults of trainer's dataclasses
}
# The loop reports, imports weights and evaluates tasks; a step may train a part of the parameters, or compare answers.
MAY_IMPORT["trainer"] |= {"trainer.reporting", "trainer.interchange", "trainer.finetuning", "trainer.tasks"}
MAY_IMPORT["launch"] = set(MAY_IMPORT) - {"configs"}
FORBIDDEN_LIBRARIES = {"absl", "ml_collections"}  # data, model and trainer must not import these: only launch has flags
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("configs", "data", "launch", "model", "trainer")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(path: pathlib.Path, *, at_import: bool = False) -> set[str]:
    """The modules that a file imports; with `at_import`, only the imports that run when the file is imported."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in SOURCES else node.module for a in node.names
            }
    return names


def package_of(module: str) -> str:
    return max((p for p in MAY_IMPORT if module == p or module.startswith(p + ".")), key=len)


def ours(names: set[str]) -> set[str]:
    return names & set(SOURCES)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_run_one_way(package):
    files = {module: path for module, path in SOURCES.items() if package_of(module) == package}
    assert len(files) > 1
    for module, path in files.items():
        others = {package_of(name) for name in ours(imported(path))} - {package}
        assert others <= MAY_IMPORT[package], f"{module} imports {others - MAY_IMPORT[package]}"
        if package.split(".")[0] in ("data", "model", "trainer"):
            libraries = {name.split(".")[0] for name in imported(path)}
            assert not libraries & FORBIDDEN_LIBRARIES, f"{module} knows of flags or ConfigDict"


def test_every_folder_of_sources_is_a_package_of_the_list():
    """For a new sub-package, the list must say what it may import."""
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES.values()}
    assert folders == set(MAY_IMPORT)


def test_nothing_imports_in_a_circle():
    arrows = {module: ours(imported(path, at_import=True)) - {module} for module, path in SOURCES.items()}
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(arrows[module]):
                follow(other, (*way, module))
            done.add(module)

    for module in arrows:
        follow(module, ())


def test_recipes_are_imported_by_nobody():
    for module, path in SOURCES.items():
        if package_of(module) != "configs":
            assert not any(name.split(".")[0] == "configs" for name in imported(path)), module


def test_the_wheel_and_the_version_of_the_code_have_every_sub_package(tmp_path, monkeypatch):
    """Code that globs folders must work at any depth: a module that the glob misses would be missing from an
    installation, or could silently differ between hosts."""
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert not find["namespaces"]
    for folder in {path.parent for path in SOURCES.values()}:
        name = ".".join(folder.relative_to(ROOT).parts)
        assert (folder / "__init__.py").exists(), f"{name} is not a package: setuptools would leave it out"
        assert any(fnmatch.fnmatch(name, pattern) for pattern in find["include"]), name
    deep = tmp_path / "trainer" / "one" / "two"
    deep.mkdir(parents=True)
    monkeypatch.setattr(distributed, "__file__", str(tmp_path / "launch" / "distributed.py"))
    before = distributed.code_version()
    (deep / "three.py").write_text("x = 1\n")
    after = distributed.code_version()
    (deep / "three.py").write_text("x = 2\n")
    assert len({before, after, distributed.code_version()}) == 3


@pytest.mark.parametrize(
    "module",
    [
        "launch.cli",
        "launch.train",
        "launch.sample",
        "launch.serve",
        "launch.prepare",
        "launch.supervise",
        "launch.inspect",
        "launch.pack",
        "launch.tokenizer",
        "trainer.reliability.run_directory",
    ],
)
def test_what_answers_a_typo_does_not_load_jax(module):
    """A mistyped field is reported within a second only if these modules do not import JAX."""
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
