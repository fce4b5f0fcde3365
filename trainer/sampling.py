"""Samples of a run: its prompt as tokens, and the generator of its model."""

import numpy as np

from data.errors import DataError
from data.tokenizers.base import Tokenizer
from model.generate import Generator
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.state import Program


def encode_prompt(tokenizer: Tokenizer, text: str, name: str) -> np.ndarray:
    """The tokens of a prompt, at least one.

    Raises:
      ConfigError: the setting `name` has a character that the tokenizer does not know, or nothing that it keeps.
    """
    try:
        ids = tokenizer.encode(text)
    except DataError as e:
        raise ConfigError(f"{name}: {e}") from None
    if not len(ids):
        raise ConfigError(f"{name} is {text!r}, of which this tokenizer keeps nothing; give other text, such as a word")
    return ids


def prompt_of(config: Config, tokenizer: Tokenizer | None) -> np.ndarray | None:
    """That of the samples of a run; None if it has no tokenizer, and so no samples. Raises ConfigError."""
    if tokenizer is None:
        return None
    return encode_prompt(tokenizer, config.sample.prompt, "config.sample.prompt")


def make_generator(program: Program, *, temperature: float, top_k: int, top_p: float) -> Generator:
    """The generator of a run's model; its context is no longer than the rows that the model was trained on."""
    config = program.config
    return Generator(
        config.model, program.model_of_compiler, context=config.data.seq_len,
        temperature=temperature, top_k=top_k, top_p=top_p, out_sharding=program.replicated,
    )  # fmt: skip
