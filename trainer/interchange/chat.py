"""Chat with a converted model: the chat template of its folder turns messages into a prompt; stop tokens end an answer.

A template is a Jinja program that comes with the model, so it runs in a sandbox, which is set up as in transformers.
"""

import datetime
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data.tokenizers.base import Tokenizer, name_finder
from trainer.errors import ConfigError
from trainer.interchange.folder import read_json

# Around what a template marks as {% generation %}. Unicode has no characters with these code points.
BEGIN, END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{BEGIN}{END}]")


class Rendered(NamedTuple):
    """A text of a template, and the spans [begin, end) of it that the template marks as written by the assistant."""

    text: str
    marked: list[tuple[int, int]]


class Chat:
    """The chat template and stop tokens of a converted run.

    Args:
      kept: RUN/hf, the files of the model that it was converted from; or the folder of a model.

    Attributes:
      stop_ids: tokens that end an answer.
      sha256: the hash of the template and of the names of tokens that it may write.
      marks: whether the template marks what the assistant writes.
      names_in: the names of special tokens in a text.

    Raises:
      ConfigError: the template is missing or damaged, or the jinja2 package is missing.
    """

    def __init__(self, kept: pathlib.Path, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._kept = kept
        self._keys = {name: self._json(f"{name}.json") for name in ("config", "generation_config", "tokenizer_config")}
        source = self._source()
        self._names = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.sha256 = hashlib.sha256((source + json.dumps(self._names)).encode()).hexdigest()
        self._template, self.marks = self._compiled(source)
        self.names_in = name_finder(list(tokenizer.specials.values()))
        ids: set[int] = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
        for name in ("config", "generation_config"):
            eos = self._keys[name].get("eos_token_id")
            ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self.stop_ids = frozenset(ids)

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self._kept / name, "") if (self._kept / name).is_file() else {}

    def _source(self) -> str:
        path = self._kept / "chat_template.jinja"
        found = path.read_text() if path.is_file() else self._keys["tokenizer_config"].get("chat_template")
        if isinstance(found, list):  # several templates with names
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if not isinstance(found, str):
            raise ConfigError(
                f"{self._kept} has no chat template, which chat models have; leave out --chat, or write one to "
                f"{self._kept / 'chat_template.jinja'}"
            )
        return found

    def _compiled(self, source: str) -> tuple[Any, bool]:
        """The template, and whether it has {% generation %}."""
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            from trainer.interchange.generation_tag import GenerationTag
        except ImportError:
            raise ConfigError('a chat template needs the jinja2 package: pip install "meshlm[chat]"') from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            template = environment.from_string(source)
            return template, bool(getattr(environment.extensions[GenerationTag.identifier], "used"))  # noqa: B009
        except TemplateError as e:
            raise ConfigError(f"the chat template of {self._kept} is damaged: {e}") from None

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that the model is to continue. Raises ConfigError if the template refuses the messages."""
        return self.render(messages, add_generation_prompt=True).text

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> Rendered:
        """The text of the messages. Raises ConfigError if the template refuses them.

        Args:
          add_generation_prompt: whether what begins an answer follows.
        """
        if self.marks and any(_MARKS.search(message["content"]) for message in messages):
            raise ConfigError("a message has U+FDD0 or U+FDD1, which are not characters; remove them")
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._names
            )
        except Exception as e:  # a template can raise anything
            raise ConfigError(f"the chat template of {self._kept} refuses the message: {_one_line(e)}") from None
        return _without_marks(text) if self.marks else Rendered(text, [])

    def _token(self, name: str) -> str:
        value = self._keys["tokenizer_config"].get(name)
        id = self._keys["config"].get(f"{name}_id")
        if value is None and isinstance(id, int):
            return self.tokenizer.specials.get(id, "")
        return value["content"] if isinstance(value, dict) else value or ""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a template's text, uint32 [n]. The name of a special token in it becomes that token."""
        return np.concatenate([ids for _, ids in self.parts(text)])

    def parts(self, text: str) -> Iterator[tuple[str, np.ndarray]]:
        """The parts of a template's text that are encoded by themselves, with their tokens: names of special tokens,
        and what is between them."""
        return _parts(self.tokenizer, self.names_in, text)


def encode_with_specials(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a text, uint32 [n]. The name of a special token in it becomes that token."""
    names_in = name_finder(list(tokenizer.specials.values()))
    return np.concatenate([ids for _, ids in _parts(tokenizer, names_in, text)])


def _parts(tokenizer: Tokenizer, names_in: Callable[[str], list[str]], text: str) -> Iterator[tuple[str, np.ndarray]]:
    ids, at = {name: id for id, name in tokenizer.specials.items()}, 0
    for name in names_in(text):
        begin = text.index(name, at)
        yield text[at:begin], tokenizer.encode(text[at:begin])
        yield name, np.array([ids[name]], np.uint32)
        at = begin + len(name)
    yield text[at:], tokenizer.encode(text[at:])


def _without_marks(text: str) -> Rendered:
    parts, marks = _MARKS.split(text), _MARKS.findall(text)
    borders = np.cumsum([len(part) for part in parts]).tolist()  # where each mark was
    if marks != [BEGIN, END] * (len(marks) // 2):
        raise ConfigError("the chat template has a {% generation %} inside another")
    return Rendered("".join(parts), list(zip(borders[0:-1:2], borders[1:-1:2], strict=True)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
