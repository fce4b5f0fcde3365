"""Rules of style that can be counted."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
MOST_POSITIONAL = 5


def positional(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    """The names of the arguments that a caller may pass by position, without `self` and `cls`."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return [a.arg for i, a in enumerate(arguments) if i or a.arg not in ("self", "cls")]


def test_positional_arguments_are_counted_without_self():
    (function,) = ast.parse("def f(self, a, /, b, c=1, *rest, d, **more): pass").body
    assert positional(function) == ["a", "b", "c"]


def test_no_function_takes_more_than_five_positional_arguments():
    """The reader of a call with more cannot tell them apart; keyword-only ones are named there."""
    too_many = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {names}"
        for package in ("model", "trainer")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and len(names := positional(node)) > MOST_POSITIONAL
    ]
    assert not too_many, "\n".join(too_many)
