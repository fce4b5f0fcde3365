"""meshlm COMMAND [--flags]: the commands of launch/ as one program, which files of the current folder cannot shadow.

`meshlm train …` is `python -m launch.train …`; `meshlm COMMAND --help` describes its flags.
"""

import difflib
import pathlib
import runpy
import sys

import launch

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "generate text with a trained model",
    "serve": "answer over HTTP with a trained model",
    "evaluate": "the loss of a checkpoint on held-out text",
    "prepare": "make a dataset from text",
    "inspect": "show and check a dataset or token files",
    "pack": "pack complete documents into rows",
    "tokenizer": "train, show and use tokenizers",
    "plan": "compile for machines that are not here: memory, speed",
    "bench": "time the step of a recipe",
    "supervise": "restart a command while it makes progress",
    "gpu_check": "check drivers, wheels and links of GPUs",
}


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        print("\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {words[0]!a} is not one of the commands {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        sys.exit(2)
    # Goes before all of PYTHONPATH, because an empty part of PYTHONPATH means the current folder.
    sys.path.insert(0, str(pathlib.Path(launch.__file__).parent.parent))
    sys.argv[:2] = [words[0]]
    runpy.run_module(f"launch.{words[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
