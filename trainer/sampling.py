"""Sampling from a run's model: the prompt as tokens, and the generator."""

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
      ConfigError: the text (of the setting `name`) has an unknown character, or the tokenizer drops all of it.
    """
    try:
        ids = tokenizer.encode(text)
    except DataError as e:
        raise ConfigError(f"{name}: {e}") from None
    if not len(ids):
        raise ConfigError(f"{name} is {text!r}, but this tokenizer keeps nothing; give other text, such as a word")
    return ids


def prompt_of(config: Config, tokenizer: Tokenizer | None) -> np.ndarray | None:
    """The tokens of config.sample.prompt; None without a tokenizer, when no samples are made. Raises ConfigError."""
    if tokenizer is None:
        return None
    return encode_prompt(tokenizer, config.sample.prompt, "config.sample.prompt")


class Sampler:
    """Samples text from a run's model, as config.sample says."""

    def __init__(self, program: Program, tokenizer: Tokenizer):
        """Raises ConfigError if config.sample.prompt cannot be encoded."""
        self._config = program.config
        self._tokenizer = tokenizer
        self._prompt = encode_prompt(tokenizer, program.config.sample.prompt, "config.sample.prompt")
        sample = program.config.sample
        self._generator = make_generator(
            program,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            vocab_size=tokenizer.vocab_size,
        )

    def sample(self, params: dict, step: int) -> str:
        """A text that follows the prompt; the random seed depends on the step."""
        (ids,) = self._generator(
            params,
            self._prompt,
            rows=1,
            max_new_tokens=self._config.sample.max_new_tokens,
            seed=(self._config.seed + step) % 2**32,
        )
        return self._tokenizer.decode(ids)


def make_generator(
    program: Program, *, temperature: float, top_k: int, top_p: float, vocab_size: int | None = None
) -> Generator:
    """The generator of a run's model; its context is data.seq_len, the length of the training rows.

    Args:
      vocab_size: the number of tokens of the tokenizer. Imported weights may have more rows than that.
    """
    config = program.config
    return Generator(
        config.model, program.model_of_compiler, context=config.data.seq_len, vocab_size=vocab_size,
        temperature=temperature, top_k=top_k, top_p=top_p, out_sharding=program.replicated,
    )  # fmt: skip
