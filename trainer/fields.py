"""Typed fields of the configuration: dataclasses from plain values, and single fields from text. No heavy imports.

A field is of type int, float, bool or str, one of the choices of a Literal, a tuple[X, ...] of these, X | None, or
another dataclass (a section). Plain values are what JSON and an ml_collections.ConfigDict hold: a tuple may be a list,
and a whole number may stand for a float.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

NONE_WORDS = ("none", "null")
TRUE_WORDS = ("true", "t", "yes", "y", "1")
FALSE_WORDS = ("false", "f", "no", "n", "0")

# Called with (section, dotted name, value); the value is a bool, int, float or str. Raises ValueError to refuse it.
Check = Callable[[type, str, Any], None]


def types_of(section: type) -> dict[str, Any]:
    """The type of each field of a dataclass, in the order of the fields."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def leaves(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field that is not a section, in order: ('model.num_layers', int)."""
    for name, kind in types_of(section).items():
        if is_section(kind):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.num_layers': 4, …}: the leaves of a dataclass and their values."""
    flat: dict[str, Any] = {}
    for name, kind in types_of(type(config)).items():
        value = getattr(config, name)
        flat |= flatten(value, f"{prefix}{name}.") if is_section(kind) else {f"{prefix}{name}": value}
    return flat


def build(section: type, tree: Any, *, prefix: str = "", check: Check = lambda section, name, value: None) -> Any:
    """An instance of a dataclass from nested plain values; a missing field takes its default.

    Args:
      prefix: the beginning of each name in messages, such as 'model.'.
      check: checks further conditions on single values.

    Raises:
      ValueError: a field is not known, or a value is not of its field's type. (The dataclasses may raise other errors.)
    """
    kinds = types_of(section)
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {tree!r}; it must have fields: {', '.join(kinds)}")
    values = {}
    for name, value in tree.items():
        if name not in kinds:
            raise ValueError(f"unknown field {prefix}{name} in {section.__name__}; its fields: {', '.join(kinds)}")
        kind = kinds[name]
        if is_section(kind):
            values[name] = build(kind, value, prefix=f"{prefix}{name}.", check=check)
            continue
        try:
            values[name] = _convert(kind, value, functools.partial(check, section, f"{prefix}{name}"))
        except TypeError:
            raise ValueError(f"{prefix}{name} is {value!r}; it must be {describe(kind)}") from None
    return section(**values)


def _convert(kind: Any, value: Any, check: Callable[[Any], None]) -> Any:
    """`value` as the type `kind`. Raises TypeError, and what `check` raises."""
    if (inner := _optional(kind)) is not None:
        return None if value is None else _convert(inner, value, check)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_convert(_element(kind), element, check) for element in value)
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if type(value) is type(choice) and value == choice:
                return value
        raise TypeError
    if kind is float and type(value) is int:
        value = float(value)  # raises OverflowError, which is not a ValueError, if the number is too large
    if type(value) is not kind:
        raise TypeError
    check(value)
    return value


def from_text(kind: Any, text: str) -> Any:
    """The plain value that `text` means in a flag: 3e-4, true, none, 1,2. Raises ValueError."""
    if (inner := _optional(kind)) is not None:
        return None if text.strip().lower() in NONE_WORDS else from_text(inner, text)
    if typing.get_origin(kind) is tuple:
        return tuple(from_text(_element(kind), part.strip()) for part in text.split(",")) if text.strip() else ()
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if text.strip() == str(choice):
                return choice
        raise ValueError
    if kind is bool:
        if (word := text.strip().lower()) not in TRUE_WORDS + FALSE_WORDS:
            raise ValueError
        return word in TRUE_WORDS
    return kind(text)


def to_text(value: Any) -> str:
    """The text that from_text reads as `value`."""
    if value is None:
        return NONE_WORDS[0]
    if isinstance(value, tuple | list):
        return ",".join(map(to_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe(kind: Any) -> str:
    """What a value of this type must be, for messages: 'a whole number, or none'."""
    if (inner := _optional(kind)) is not None:
        return f"{describe(inner)}, or none"
    if typing.get_origin(kind) is tuple:
        return f"a list in which each element is {describe(_element(kind))}"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _optional(kind: Any) -> Any:
    """The type X if `kind` is X | None; None for any other type."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return None
    (inner,) = (argument for argument in typing.get_args(kind) if argument is not type(None))
    return inner


def _element(kind: Any) -> Any:
    """The type X of tuple[X, ...]."""
    element, ellipsis = typing.get_args(kind)
    assert ellipsis is Ellipsis, f"{kind}: a field may be tuple[X, ...], not a tuple of a fixed length"
    return element
