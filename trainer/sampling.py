"""Sampling from a run's model: the prompt as tokens, and the generator."""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from data import tokenizers
from data.errors import DataError
from data.tokenizers.base import Tokenizer
from model.config import ModelConfig
from model.generate import Generator
from model.quantized import Quantized, quantize
from model.sampling import Sampling
from model.transformer import separate
from trainer import sharding
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.interchange.chat import Chat
from trainer.interchange.folder import KEPT
from trainer.interchange.special_tokens import SpecialTokens
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
    """The tokens of config.sample.prompt; None if no samples are made. Raises ConfigError."""
    if tokenizer is None or not config.sample.max_new_tokens:
        return None
    return encode_prompt(tokenizer, config.sample.prompt, "config.sample.prompt")


OUTPUTS = {"kernel": 1, "embedding": 0}  # parameters that may be int8, and the axis of each whose entries have scales


class Sampler:
    """Samples text from a run's model, as config.sample says."""

    def __init__(self, program: Program, tokenizer: Tokenizer):
        """Raises ConfigError if config.sample.prompt cannot be encoded."""
        self._config = program.config
        self._tokenizer = tokenizer
        self._prompt = encode_prompt(tokenizer, program.config.sample.prompt, "config.sample.prompt")
        self._generator = make_generator(program, vocab_size=tokenizer.vocab_size)

    def sample(self, params: dict, step: int) -> str:
        """A text that follows the prompt; the random seed depends on the step."""
        sample = self._config.sample
        (ids,) = self._generator(
            params,
            self._prompt,
            rows=1,
            max_new_tokens=sample.max_new_tokens,
            seed=(self._config.seed + step) % 2**32,
            sampling=Sampling(temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p),
        )
        return self._tokenizer.decode(ids)


def make_generator(program: Program, **options: Any) -> Generator:
    """The generator of a run's model; its context is data.seq_len, the length of the training rows.

    Args:
      options: of Generator. vocab_size should be the number of tokens of the tokenizer: imported weights may have more
        rows than that.
    """
    config = program.config
    rows = dict(sharding.RULES, batch="data")  # a split over fsdp, too, would gather the weights for each token
    return Generator(
        config.model, program.model_of_compiler, context=config.data.seq_len, out_sharding=program.replicated,
        row_sharding=sharding.named(program.mesh, "batch", rules=rows),
        cache_sharding=sharding.named(program.mesh, "batch", None, "kv_heads", None, rules=rows),
        shards=program.mesh.shape["data"], **options,
    )  # fmt: skip


def fast_params(params: dict, config: ModelConfig, *, int8: bool = False) -> dict:
    """Parameters from which each token is generated faster: layers are separate, and matrices have the dtype in which
    they are used, so that a pass reads no more bytes than it must. It computes the same, except with `int8`, which
    rounds the matrices of products and the embedding."""

    def used(path: tuple, leaf: jax.Array) -> jax.Array | Quantized:
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        if int8 and name in OUTPUTS:
            return quantize(leaf, OUTPUTS[name])
        return leaf.astype(config.dtype) if leaf.ndim > 1 else leaf  # norms are computed in float32

    return jax.jit(lambda params: jax.tree_util.tree_map_with_path(used, separate(params, config)))(params)


@dataclasses.dataclass(frozen=True)
class Language:
    """How prompts become tokens, and tokens text.

    Attributes:
      stop_ids: tokens that end a text.
      chat: the chat template; None: a prompt is a text that is continued.
      vocab_size: the number of tokens that the model knows; None: those of the tokenizer.
      added: the tokens that the model's own tokenizer puts before a text: BOS, or nothing. A chat template writes it.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    chat: Chat | None = None
    added: tuple[int, ...] = ()
    vocab_size: int | None = None

    @classmethod
    def of(cls, run_dir: pathlib.Path, *, chat: bool, vocab_size: int | None = None) -> "Language":
        """The language of a run. Raises ConfigError if the run has no tokenizer, or, for a `chat`, no template."""
        if not (run_dir / "tokenizer").exists():
            raise ConfigError(
                f"{run_dir} has no tokenizer, because it began with weights or token files without one; a launch.train "
                "command with --config.data.tokenizer_path=PATH adds one, and launch.convert takes --tokenizer=PATH"
            )
        tokenizer = tokenizers.load(run_dir / "tokenizer")
        template = Chat(run_dir / KEPT, tokenizer) if chat else None
        ends = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
        if template is None:
            added = tuple(SpecialTokens(run_dir, tokenizer).added)
            return cls(tokenizer, ends, added=added, vocab_size=vocab_size)
        return cls(tokenizer, ends | template.stop_ids, template, vocab_size=vocab_size)

    def encode(self, prompt: Any, name: str = "--prompt") -> np.ndarray:
        """The tokens of a prompt: a text, or the messages of a chat. Raises ConfigError, which begins with `name`."""
        if self.chat is None:
            ids = np.concatenate([self.added, encode_prompt(self.tokenizer, prompt, name)]).astype(np.int32)
        else:
            ids = self.chat.encode(self.chat.prompt(prompt))
        if not len(ids):
            raise ConfigError(f"{name}: the chat template makes no text of it")
        if self.vocab_size is not None and (largest := int(ids.max())) >= self.vocab_size:
            raise ConfigError(f"{name} has token {largest}, but the model knows only {self.vocab_size} tokens")
        return ids

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        return TextStream(self.tokenizer, self.stop_ids, stop)


class TextStream:
    """The text of tokens that come one after another: whole characters, without what ends it.

    Args:
      stop_ids: tokens that end the text, and are not in it.
      stop: strings that end the text, and are not in it.

    Attributes:
      ids: the tokens of the text, up to the one with which a stop string is complete.
      stopped: whether a stop string was found.
      text: what `feed` has returned.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int] = (), stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stop = [one for one in stop if one]
        self.ids: list[int] = []
        self.stopped = False
        self.text = ""

    def feed(self, ids: np.ndarray, *, ended: bool) -> str:
        """The text that `ids` add. What may be the beginning of a character or of a stop string is held back until more
        is known, or until the text has `ended`."""
        if self.stopped:
            return ""
        begin = len(self.ids)
        self.ids += [id for id in ids.tolist() if id not in self._stop_ids]
        text = self._tokenizer.decode(self.ids)
        # A tokenizer with byte_fallback decodes a run of bytes as a whole: half a character after a stop string makes
        # the string illegible, so that it is only found among the first tokens.
        if self._stop and (self._found(text) is not None or "\ufffd" in text[len(self.text) :]):
            text = self._up_to_stop(begin, text)
        known = len(text) if ended or self.stopped else self._certain(text)
        new = text[len(self.text) : known]
        self.text += new
        return new

    def _found(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for one in self._stop if (at := text.find(one)) >= 0), default=None)

    def _up_to_stop(self, begin: int, text: str) -> str:
        """`text`, or if a stop string is complete with one of the tokens from `begin` on, what is before it. The tokens
        after that one are dropped."""
        for n in range(begin + 1, len(self.ids) + 1):
            beginning = self._tokenizer.decode(self.ids[:n])
            if (at := self._found(beginning)) is not None:
                self.ids, self.stopped = self.ids[:n], True
                return beginning[:at]
        return text

    def _certain(self, text: str) -> int:
        """How many characters of an unfinished text are certain."""
        whole = text.rstrip("\ufffd")
        begun = (n for one in self._stop for n in range(len(one) - 1, 0, -1) if whole.endswith(one[:n]))
        return len(whole) - max(begun, default=0)
