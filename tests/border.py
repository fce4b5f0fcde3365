"""Runs commands as a user would, many per second: a process that has imported their libraries forks for each."""

import dataclasses
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parent.parent
SHARED = (
    "numpy",
    "launch.cli",
    "data.preparation.pipeline",
    "data.sources",
    "data.token_files.integrity",
    "data.packing",
    "tokenizers",
)
TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int  # -n: killed by signal n
    out: str
    err: str


class Border:
    """Runs commands in `folder`, which is also their HOME; their console accepts only ASCII. Call close() last."""

    def __init__(self, folder: pathlib.Path):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "PYTHONIOENCODING": "ascii:strict"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.border"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *argv: str) -> Ended:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(argv) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    for name in SHARED:
        importlib.import_module(name)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if not (child := os.fork()):
                _become(json.loads(line), out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [os.pread(f.fileno(), 1 << 20, 0).decode("utf-8", "backslashreplace") for f in (out, err)]
        print(json.dumps({"code": code, "out": texts[0], "err": texts[1]}), flush=True)


def _become(argv: Sequence[str], out: int, err: int) -> None:
    signal.alarm(TIMEOUT_S)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv = list(argv)
    code: object = 1
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
