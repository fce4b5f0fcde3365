"""Writes chats about Python's standard library, to try supervised fine-tuning with: JSON lines on standard output.

  python -m benchmarks.chats [--count=400] > chats.jsonl

Each chat asks what a function or class does, and the answer is the first paragraph of its docstring. They come from the
Python that runs this command, so they differ between versions of Python and are the same for one.
"""

import argparse
import ast
import json
import pathlib
import re
import sysconfig
from collections.abc import Iterator

LONGEST = 400  # characters of an answer
SYSTEM = "Answer in the words of Python's documentation."


def documented() -> Iterator[tuple[str, str]]:
    """The full name of each public function and class at the top of a module, and its docstring's first paragraph."""
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        for node in ast.parse(path.read_text(errors="replace")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 20 <= len(paragraph) <= LONGEST and re.search(r"\w", paragraph):
                yield f"{path.stem}.{node.name}", paragraph


def chats(count: int) -> Iterator[dict]:
    """Chats of one question, and every fourth with two and a system message."""
    found = list(documented())
    step = max(1, len(found) // count)
    for i, (name, said) in enumerate(found[::step][:count]):
        messages = [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": said}]
        if i % 4 == 3:
            other, also = found[(i * step + 1) % len(found)]
            messages.insert(0, {"role": "system", "content": SYSTEM})
            messages += [{"role": "user", "content": f"And {other}?"}, {"role": "assistant", "content": also}]
        yield {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    for chat in chats(parser.parse_args().count):
        print(json.dumps(chat))


if __name__ == "__main__":
    main()
