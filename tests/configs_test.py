"""Every recipe builds, validates and describes the model that its header names."""

import dataclasses
import importlib
import pathlib

import pytest

from tests.step_test import mesh_of
from trainer.config import Config, from_dict
from trainer.state import Program

# The number of parameters in millions, without the rows that pad the vocabulary.
RECIPES = {
    ("tiny", ""): (98, 0.87),
    ("shakespeare_char", ""): (65, 10.6),
    ("shakespeare_char", "cpu"): (65, 0.85),
    ("gpt2_124m", ""): (50257, 124.3),
    ("llama_1b", ""): (32000, 1100.0),
    ("llama_8b", ""): (128256, 8030.3),
    ("llama_8b", "gpus"): (128256, 8030.3),
    ("llama_8b", "v6e"): (128256, 8030.3),
    ("llama_70b", ""): (128256, 70553.7),
    ("llama_70b", "two"): (128256, 70553.7),
    ("default", ""): (65, 0.85),
}


def recipe(name: str, variant: str = "") -> Config:
    module = importlib.import_module(f"configs.{name}")
    return from_dict((module.get_config(variant) if variant else module.get_config()).to_dict())


def test_all_recipes_are_listed():
    names = {p.stem for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")} - {"__init__"}
    assert names == {name for name, _ in RECIPES}


@pytest.mark.parametrize(("name", "variant"), RECIPES)
def test_recipes(name, variant):
    vocabulary, millions = RECIPES[name, variant]
    config = recipe(name, variant)
    model = dataclasses.replace(config.model, vocab_size=vocabulary, max_seq_len=config.data.seq_len)
    program = Program(dataclasses.replace(config, model=model), mesh_of("one"))  # shapes only; nothing is allocated
    assert program.num_params / 1e6 == pytest.approx(millions, rel=0.02)


def test_an_unknown_variant():
    with pytest.raises(ValueError, match="no variant 'gpu'"):
        recipe("shakespeare_char", "gpu")
