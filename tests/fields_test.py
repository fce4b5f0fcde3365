"""Typed fields: recipes, JSON and flags give the same values; an error names a value that does not fit, and what would
fit."""

import dataclasses
import json
import math
import typing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from launch import cli
from trainer import config, fields
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Window:
    sizes: tuple[int, ...] = (128, 0)
    every: int | None = None

    ON_RESUME = {"*": "harmless"}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class Attention:
    window: Window = dataclasses.field(default_factory=Window)
    softcap: float | None = None
    kind: Literal["full", "sliding"] = "full"
    groups: Literal[1, 2, 4] | None = None

    ON_RESUME = {"softcap": "flag"}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class Whole:
    attention: Attention = dataclasses.field(default_factory=Attention)
    names: tuple[str, ...] | None = ()
    scale: float = 1.0
    deep: bool = False


def test_the_fields_of_nested_sections():
    assert dict(fields.leaves(Whole)) == {
        "attention.window.sizes": tuple[int, ...],
        "attention.window.every": int | None,
        "attention.softcap": float | None,
        "attention.kind": Literal["full", "sliding"],
        "attention.groups": Literal[1, 2, 4] | None,
        "names": tuple[str, ...] | None,
        "scale": float,
        "deep": bool,
    }
    assert fields.flatten(Whole(scale=2.0))["attention.window.sizes"] == (128, 0)
    assert list(fields.flatten(config.Config())) == [name for name, _ in fields.leaves(config.Config)]


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        (
            "attention.window.sizes",
            5,
            "attention.window.sizes is 5; it must be a list in which each element is a whole",
        ),
        ("attention.window.sizes", [1, "2"], "attention.window.sizes is [1, '2']; it must be a list in which"),
        ("attention.window.sizes", None, "attention.window.sizes is None; it must be a list"),
        ("attention.window.every", 1.5, "attention.window.every is 1.5; it must be a whole number, or none"),
        ("attention.window.every", True, "attention.window.every is True; it must be a whole number, or none"),
        ("attention.kind", "ful", "attention.kind is 'ful'; it must be one of full, sliding"),
        ("attention.groups", 3, "attention.groups is 3; it must be one of 1, 2, 4, or none"),
        ("attention.groups", True, "attention.groups is True; it must be one of 1, 2, 4, or none"),
        ("attention.groups", "2", "attention.groups is '2'; it must be one of 1, 2, 4, or none"),
        ("attention.softcap", "1", "attention.softcap is '1'; it must be a number, or none"),
        ("names", ["a", None], "names is ['a', None]; it must be a list in which each element is text, or none"),
        ("scale", None, "scale is None; it must be a number"),
        ("deep", 1, "deep is 1; it must be true or false"),
        ("attention", 3, "attention is 3; it must have fields: window, softcap, kind, groups"),
        ("attention.windows", 3, "unknown field attention.windows in Attention; its fields: window, softcap"),
    ],
)
def test_a_value_of_another_type(name, value, parts):
    with pytest.raises(ValueError) as e:
        fields.build(Whole, nested({name: value}))
    assert str(e.value).startswith(parts)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = value
    return tree


# Random sections with random values

SCALARS = {
    bool: st.booleans(),
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(exclude_categories=["Cs"], exclude_characters=","), max_size=5),
}
CHOICES = (Literal["a", "b c", "none!"], Literal[1, 2, 4], Literal["x", 3])


def kinds() -> st.SearchStrategy[Any]:
    scalar = st.sampled_from([*SCALARS, *CHOICES])
    lists = scalar.map(lambda kind: tuple[kind, ...])
    return st.one_of(scalar, lists, st.one_of(scalar, lists).map(lambda kind: kind | None))


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    if (inner := fields._optional(kind)) is not None:
        return st.none() | values_of(inner)
    if typing.get_origin(kind) is tuple:
        return st.lists(values_of(typing.get_args(kind)[0]), max_size=3).map(tuple)
    return st.sampled_from(typing.get_args(kind)) if typing.get_origin(kind) is Literal else SCALARS[kind]


@st.composite
def sections(draw, depth: int = 2) -> Any:
    """An instance of a random dataclass; its values are drawn independently of the defaults."""
    made, values = [], {}
    for i in range(draw(st.integers(1, 4))):
        name = f"f{i}"
        if depth and draw(st.integers(0, 3)) == 0:
            values[name] = draw(sections(depth=depth - 1))
            made.append((name, type(values[name]), dataclasses.field(default_factory=type(values[name]))))
        else:
            kind = draw(kinds())
            values[name] = draw(values_of(kind))
            made.append((name, kind, dataclasses.field(default=draw(values_of(kind)))))
    return dataclasses.make_dataclass("Section", made, frozen=True)(**values)


def survives_text(kind: Any, value: Any) -> bool:
    """Whether a flag can express the value. A flag cannot give an optional field the text 'none', nor a list an element
    that is empty or has white space at its ends."""
    elements = value if isinstance(value, tuple) else (value,)
    texts = [element for element in elements if isinstance(element, str)]
    is_none = len(elements) == 1 and texts and texts[0].strip().lower() in fields.NONE_WORDS
    return not (is_none and fields._optional(kind)) and (
        not isinstance(value, tuple) or all(text == text.strip() != "" for text in texts)
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_sections_come_back_from_json_recipes_and_flags(data):
    made = data.draw(sections())
    section = type(made)
    tree = dataclasses.asdict(made)
    assert fields.build(section, tree) == made
    assert fields.build(section, json.loads(json.dumps(tree))) == made
    assert fields.build(section, ConfigDict(tree, convert_dict=True).to_dict()) == made
    kinds = dict(fields.leaves(section))
    flat = fields.flatten(made)
    assert fields.build(section, nested(flat)) == made and list(flat) == list(kinds)
    spoken = {
        name: fields.from_text(kinds[name], fields.to_text(value))
        for name, value in flat.items()
        if survives_text(kinds[name], value)
    }
    assert fields.build(section, nested(flat | spoken)) == made


# A configuration with such fields, read from a command line


@dataclasses.dataclass(frozen=True)
class Bigger(config.Config):
    """Config with additional fields of these types."""

    attention: Attention = dataclasses.field(default_factory=Attention)
    names: tuple[str, ...] | None = ()


@pytest.fixture
def bigger(monkeypatch):
    monkeypatch.setattr(cli, "Config", Bigger)
    monkeypatch.setattr(config, "Config", Bigger)


def parsed(recipe: ConfigDict, *words: str) -> config.Config:
    rest, overrides = cli._split_overrides(["program", "--config=x", *words, "--workdir=y"])
    assert rest == ["program", "--config=x", "--workdir=y"]
    found = cli.Recipe("x", recipe)
    found.override(overrides)
    return cli.config_from(found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.attention.window.sizes=1,2"], {"attention.window.sizes": (1, 2)}),
        (["--config.attention.window.sizes="], {"attention.window.sizes": ()}),
        (["--config.attention.window.sizes", "3"], {"attention.window.sizes": (3,)}),
        (["--config.attention.window.every=7"], {"attention.window.every": 7}),
        (
            ["--config.attention.window.every=7", "--config.attention.window.every=None"],
            {"attention.window.every": None},
        ),
        (["-config.attention.softcap=30"], {"attention.softcap": 30.0}),
        (["--config.attention.kind=sliding", "--config.attention.groups=4"], {"attention.groups": 4}),
        (["--config.names=a, b"], {"names": ("a", "b")}),
        (["--config.names=none"], {"names": None}),
        (["--config.model.bias", "--noconfig.metrics.tensorboard"], {"metrics.tensorboard": False, "model.bias": True}),
        (["--config.model.bias=False", "--config.seed", "-0"], {"model.bias": False, "seed": 0}),
        (["--config.optimizer.decay_steps=0", "--config.model.mlp_dim=0"], {"optimizer.decay_steps": 0}),
        (["--config.data.path=a=b,c"], {"data.path": "a=b,c"}),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_overrides(bigger, words, expected, partial):
    """Overrides apply to a recipe with all fields and to a recipe with none; sentinels such as 0 keep their meaning."""
    recipe = ConfigDict() if partial else ConfigDict(dataclasses.asdict(Bigger()), convert_dict=True)
    found = fields.flatten(parsed(recipe, *words))
    assert {name: found[name] for name in expected} == expected
    assert {name: type(found[name]) for name in expected} == {name: type(value) for name, value in expected.items()}
    recorded = config.from_dict(json.loads(config.to_json(parsed(recipe, *words))), recorded=True)
    assert fields.flatten(recorded) == found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("attention.window.sizes=1,x", "config.attention.window.sizes is '1,x'; it must be a list in which each "
         "element is a whole number, such as 128,0"),
        ("attention.window.every=x", "config.attention.window.every is 'x'; it must be a whole number, or none"),
        ("attention.softcap=1e", "config.attention.softcap is '1e'; it must be a number, or none"),
        ("attention.kind=slide", "config.attention.kind is 'slide'; it must be one of full, sliding, such as full"),
        ("attention.windw.every=1", "unknown field --config.attention.windw.every; did you mean "
         "--config.attention.window.every?"),
        ("attention.window=1", "--config.attention.window is a section; set one of its fields: sizes, every"),
        ("attention=1", "--config.attention is a section; set one of its fields: window.sizes, window.every, softcap"),
        ("seed=none", "config.seed is 'none'; it must be a whole number, such as 0"),
        ("attention.window.sizes=3000000000", "config.attention.window.sizes is 3000000000; it must be below 2**31"),
        ("attention.softcap=inf", "config.attention.softcap is inf; it must be a finite number"),
    ],
)  # fmt: skip
def test_mistakes_in_overrides_are_one_line(bigger, word, message):
    with pytest.raises(ConfigError) as e:
        parsed(ConfigDict(), f"--config.{word}")
    assert str(e.value).startswith(message) and "\n" not in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize("words", [["--config.seed"], ["--noconfig.seed=1"], ["--noconfig.seed", "1"]])
def test_a_field_without_a_value(words):
    with pytest.raises(ConfigError, match=r"write --config\.seed=VALUE"):
        cli._split_overrides(["program", *words])


def test_words_after_two_dashes_are_not_flags():
    words = ["program", "--config.seed=3", "--", "--config.seed=4"]
    assert cli._split_overrides(words) == (["program", "--", "--config.seed=4"], {"seed": 3})


def test_fields_that_refer_to_an_overridden_one_follow():
    recipe = ConfigDict(dataclasses.asdict(config.Config()), convert_dict=True)
    recipe.eval.every_steps = recipe.checkpoint.get_oneway_ref("every_steps")
    found = parsed(recipe, "--config.checkpoint.every_steps=7")
    assert (found.checkpoint.every_steps, found.eval.every_steps) == (7, 7)
    recipe = ConfigDict({"optimizer": {"peak_lr": 1}, "seed": config_dict.placeholder(int)})
    assert parsed(recipe, "--config.optimizer.peak_lr=3e-4", "--config.seed=5").optimizer.peak_lr == 3e-4
    with pytest.raises(ConfigError, match="model is 3; it must be a section"):
        parsed(ConfigDict({"model": 3}), "--config.model.bias")


def test_a_field_that_says_nothing_may_not_change(bigger):
    """The innermost section with a rule for the field decides; a change of a field without a rule is refused."""
    assert config.on_resume("attention.window.sizes", Bigger) == "harmless"
    assert config.on_resume("attention.softcap", Bigger) == "flag"
    assert config.on_resume("attention.kind", Bigger) == config.on_resume("names", Bigger) == "refused"
    assert config.on_resume("optimizer.moments_dtype") == "refused"
    old = config.from_dict({"attention": {"window": {"sizes": [1]}}})
    new = config.from_dict({"attention": {"window": {"sizes": (1, 2), "every": 3}, "softcap": 1, "kind": "sliding"}})
    assert config.changes(old, new) == {
        "harmless": ["config.attention.window.sizes: (1,) -> (1, 2)", "config.attention.window.every: None -> 3"],
        "flag": ["config.attention.softcap: None -> 1.0"],
        "refused": ["config.attention.kind: 'full' -> 'sliding'"],
    }


def test_infinite_limits_are_only_for_sections_that_take_them():
    assert config.from_dict({"watchdog": {"slow_s": math.inf}}).watchdog.slow_s == math.inf
    with pytest.raises(ConfigError, match=r"config\.z_loss is inf; it must be a finite number"):
        config.from_dict({"z_loss": math.inf})


def test_every_field_of_ours_has_a_type_that_is_known():
    for name, kind in fields.leaves(config.Config):
        default = fields.flatten(config.Config())[name]
        assert fields.describe(kind) and fields.from_text(kind, fields.to_text(default)) == default, name
        assert config.on_resume(name) in ("harmless", "flag", "refused")
