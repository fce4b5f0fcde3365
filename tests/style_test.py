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
    """With more, the reader of a call cannot tell the arguments apart; keyword-only arguments are named in the call."""
    too_many = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {names}"
        for package in ("data", "launch", "model", "trainer")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and len(names := positional(node)) > MOST_POSITIONAL
    ]
    assert not too_many, "\n".join(too_many)


def attributes_made_late(tree: ast.Module) -> list[str]:
    """Attributes that a method assigns although neither the body nor the __init__ of the class or a base does."""
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return [
        f"{name}.{method.name} makes {', '.join(sorted(late))}"
        for name, node in classes.items()
        for method in methods_of(node)
        if (late := stored(method) - made_at_once(node, classes))
    ]


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [n for n in node.body if isinstance(n, ast.FunctionDef)]


def stored(method: ast.FunctionDef) -> set[str]:
    targets = [n for n in ast.walk(method) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {n.attr for n in targets if isinstance(n.value, ast.Name) and n.value.id == "self"}


def made_at_once(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    made = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    made |= {
        name.id for n in node.body if isinstance(n, ast.Assign) for name in n.targets if isinstance(name, ast.Name)
    }
    for method in methods_of(node):
        made |= stored(method) if method.name == "__init__" else set()
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            made |= made_at_once(classes[base.id], classes)
    return made


def test_a_late_attribute_is_found():
    text = "class A:\n def __init__(self): self.a = 1\nclass B(A):\n def f(self): self.a = self.b = self.c[0] = 2"
    assert attributes_made_late(ast.parse(text)) == ["B.f makes b"]


def test_every_attribute_is_made_in_init():
    """If this holds, __init__ shows the whole state of an object."""
    late = [
        f"{path.relative_to(ROOT)}: {what}"
        for package in ("data", "launch", "model", "trainer")
        for path in sorted((ROOT / package).rglob("*.py"))
        for what in attributes_made_late(ast.parse(path.read_text()))
    ]
    assert not late, "\n".join(late)
