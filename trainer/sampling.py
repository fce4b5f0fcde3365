"""Sampling from a run's model: the prompt as tokens, and the generator."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from data import tokenizers
from data.errors import DataError
from data.tokenizers.base import Tokenizer
from model.generate import Generator
from trainer import sharding
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.interchange.chat import Chat
from trainer.interchange.folder import KEPT
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


def make_generator(program: Program, **options: Any) -> Generator:
    """The generator of a run's model; its context is data.seq_len, the length of the training rows.

    Args:
      options: of Generator. vocab_size should be the number of tokens of the tokenizer: imported weights may have more
        rows than that.
    """
    config = program.config
    return Generator(
        config.model, program.model_of_compiler, context=config.data.seq_len, out_sharding=program.replicated,
        cache_sharding=sharding.named(program.mesh, None, None, None, "kv_heads", None), **options,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Language:
    """How prompts become tokens, and tokens text.

    Attributes:
      stop_ids: tokens that end a text.
      chat: the chat template; None: a prompt is a text that is continued.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    chat: Chat | None = None

    @classmethod
    def of(cls, run_dir: pathlib.Path, *, chat: bool) -> "Language":
        """The language of a run. Raises ConfigError if the run has no tokenizer, or, for a `chat`, no template."""
        if not (run_dir / "tokenizer").exists():
            raise ConfigError(
                f"{run_dir} has no tokenizer, because it began with weights or token files without one; a launch.train "
                "command with --config.data.tokenizer_path=PATH adds one, and launch.convert takes --tokenizer=PATH"
            )
        tokenizer = tokenizers.load(run_dir / "tokenizer")
        template = Chat(run_dir / KEPT, tokenizer) if chat else None
        ends = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
        return cls(tokenizer, ends if template is None else ends | template.stop_ids, template)

    def encode(self, prompt: Any, name: str = "--prompt") -> np.ndarray:
        """The tokens of a prompt: a text, or the messages of a chat. Raises ConfigError, which begins with `name`."""
        if self.chat is None:
            return encode_prompt(self.tokenizer, prompt, name)
        ids = self.chat.encode(self.chat.prompt(prompt))
        if not len(ids):
            raise ConfigError(f"{name}: the chat template makes no text of it")
        return ids

    def stream(self) -> "TextStream":
        return TextStream(self.tokenizer, self.stop_ids)


class TextStream:
    """The text of tokens that come one after another: whole characters, without the tokens that end it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]):
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._ids: list[int] = []
        self._said = 0

    @property
    def count(self) -> int:
        """The number of tokens of the text."""
        return len(self._ids)

    def text(self) -> str:
        """The text of all tokens so far."""
        return self._tokenizer.decode(self._ids)

    def collect(self, ids: np.ndarray) -> None:
        """Adds tokens."""
        self._ids += [id for id in ids.tolist() if id not in self._stop_ids]

    def feed(self, ids: np.ndarray, *, ended: bool) -> str:
        """The text that `ids` add. The bytes of an unfinished character are held back until it is complete, or until
        the text has `ended`."""
        self.collect(ids)
        text = self.text()
        known = len(text) if ended else len(text.rstrip("\ufffd"))
        new = text[self._said : known]
        self._said = max(self._said, known)
        return new
