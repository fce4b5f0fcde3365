"""Every recipe builds, validates and describes the model that its header names."""

import dataclasses
import importlib
import math
import pathlib

import pytest

from model.transformer import parameter_shapes
from tests.step_test import mesh_of
from trainer.config import Config, from_dict
from trainer.interchange.exporting import form_of
from trainer.state import Program

# The vocabulary, and the number of parameters in millions, without the rows that pad the vocabulary.
RECIPES = {
    ("tiny", ""): (98, 0.87),
    ("shakespeare_char", ""): (65, 10.6),
    ("shakespeare_char", "cpu"): (65, 0.85),
    ("default", ""): (65, 0.85),
    ("sft", ""): (65, 0.85),  # of the default; the weights that a run begins with decide its shape
}
# The published vocabulary, and the published number of parameters in millions.
MEMBERS = {
    # nanoGPT's GPT-2 has no biases.
    ("gpt2", "124m"): (50257, 124.337664), ("gpt2", "350m"): (50257, 354.551808), ("gpt2", "774m"): (50257, 773.52192),
    ("gpt2", "1558m"): (50257, 1556.7648),
    ("llama", "1b"): (32000, 1100.048384), ("llama", "8b"): (128256, 8030.261248),
    ("llama", "70b"): (128256, 70553.706496), ("mistral", "7b"): (32000, 7241.732096),
    ("qwen2", "0.5b"): (151936, 494.032768), ("qwen2", "1.5b"): (151936, 1543.714304),
    ("qwen2", "3b"): (151936, 3085.938688), ("qwen2", "7b"): (152064, 7615.616512),
    ("qwen3", "0.6b"): (151936, 596.04992), ("qwen3", "1.7b"): (151936, 1720.574976),
    ("qwen3", "4b"): (151936, 4022.468096), ("qwen3", "8b"): (151936, 8190.73536),
    ("qwen3", "14b"): (151936, 14768.3072), ("qwen3", "32b"): (151936, 32762.123264),
    ("gemma2", "2b"): (256000, 2614.341888), ("gemma2", "9b"): (256000, 9241.705984),
    ("gemma2", "27b"): (256000, 27227.12832), ("gemma3", "1b"): (262144, 999.885952),
    ("gemma3", "270m"): (262144, 268.098176), ("gemma3", "4b"): (262144, 3880.099328),
    ("olmo2", "1b"): (100352, 1484.916736), ("olmo2", "7b"): (100352, 7298.617344),
    ("olmo2", "13b"): (100352, 13716.1984),
}  # fmt: skip


def recipe(name: str, variant: str = "") -> Config:
    module = importlib.import_module(f"configs.{name}")
    return from_dict((module.get_config(variant) if variant else module.get_config()).to_dict())


def test_all_recipes_are_listed():
    names = {p.stem for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")}
    assert names - {"__init__", "members"} == {name for name, _ in (*RECIPES, *MEMBERS)}
    for family in {name for name, _ in MEMBERS}:
        module = importlib.import_module(f"configs.{family}")
        assert set(module.SIZES) == {size for name, size in MEMBERS if name == family}


@pytest.mark.parametrize(("name", "variant"), RECIPES)
def test_recipes(name, variant):
    vocabulary, millions = RECIPES[name, variant]
    config = recipe(name, variant)
    model = dataclasses.replace(config.model, vocab_size=vocabulary, max_seq_len=config.data.seq_len)
    program = Program(dataclasses.replace(config, model=model), mesh_of("one"))  # shapes only; nothing is allocated
    assert program.num_params / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(("name", "size"), MEMBERS)
def test_a_member_has_the_published_number_of_parameters_and_is_of_its_family(name, size):
    vocabulary, millions = MEMBERS[name, size]
    config = recipe(name, size)
    model = dataclasses.replace(config.model, vocab_size=vocabulary, max_seq_len=config.data.seq_len)
    padding = (model.padded_vocab_size - vocabulary) * model.embed_dim * (1 if model.tie_embeddings else 2)
    params = sum(math.prod(shape) for shape in parameter_shapes(model).values()) - padding
    assert params == round(millions * 1e6)
    assert form_of(model)[0].model_type.removesuffix("_text") == name


# Devices that the docstrings name, if they are not 16 TPUs or 8 GPUs.
DEVICES = {("gpt2", "124m-tpu"): 4, ("gpt2", "124m-one"): 1, ("llama", "1b-one"): 1, ("llama", "8b"): 64,
           ("llama", "8b-v6e"): 256, ("llama", "70b"): 512, ("llama", "70b-two"): 1024, ("mistral", "7b"): 64,
           ("qwen2", "7b"): 64, ("qwen3", "8b"): 64, ("qwen3", "14b"): 64, ("qwen3", "32b"): 64, ("gemma2", "9b"): 64,
           ("gemma2", "27b"): 64, ("olmo2", "7b"): 64, ("olmo2", "13b"): 64}  # fmt: skip


@pytest.mark.parametrize("family", sorted({name for name, _ in MEMBERS}))
def test_a_microbatch_can_be_split_over_the_devices_that_the_docstring_names(family):
    module = importlib.import_module(f"configs.{family}")
    for variant in (*module.SIZES, *getattr(module, "MACHINES", {})):
        config = recipe(family, variant)
        rows = config.global_batch_size // config.grad_accum_steps
        devices = DEVICES.get((family, variant), 8 if family == "gpt2" or "gpus" in variant else 16)
        assert rows * config.grad_accum_steps == config.global_batch_size and rows % devices == 0, variant
        assert str(devices) in module.__doc__ or devices in (1, 1024), variant


@pytest.mark.parametrize(("name", "size"), MEMBERS)
def test_a_size_is_the_same_experiment_on_all_its_machines(name, size):
    """Only microbatches, remat and the mesh differ."""
    usual = dataclasses.asdict(recipe(name, size))
    for variant in getattr(importlib.import_module(f"configs.{name}"), "MACHINES", {}):
        if variant.startswith(f"{size}-"):
            other = dataclasses.asdict(recipe(name, variant))
            for config in (usual, other):
                config["grad_accum_steps"] = config["mesh"] = config["model"]["remat"] = None
            assert other == usual


@pytest.mark.parametrize(("name", "variant", "said"), [
    ("shakespeare_char", "gpu", "no variant 'gpu'"),
    ("llama", "8b-tpu", "llama has no variant '8b-tpu'; it has 1b, 8b, 70b, 1b-one, 8b-gpus"),
])  # fmt: skip
def test_an_unknown_variant(name, variant, said):
    with pytest.raises(ValueError, match=said):
        recipe(name, variant)
