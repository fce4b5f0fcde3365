"""Chat with a converted model: the chat template of its folder turns messages into a prompt; stop tokens end an answer.

A template is a Jinja program that comes with the model, so it runs in a sandbox, which is set up as in transformers.
"""

import datetime
import json
import pathlib
from typing import Any

import numpy as np

from data.tokenizers.base import Tokenizer, name_finder
from trainer.errors import ConfigError
from trainer.interchange.folder import read_json


class Chat:
    """The chat template and stop tokens of a converted run.

    Args:
      kept: RUN/hf, the files of the model that it was converted from.

    Attributes:
      stop_ids: tokens that end an answer.

    Raises:
      ConfigError: the template is missing or damaged, or the jinja2 package is missing.
    """

    def __init__(self, kept: pathlib.Path, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._kept = kept
        self._keys = {name: self._json(f"{name}.json") for name in ("config", "generation_config", "tokenizer_config")}
        self._template = self._compiled(self._source())
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
        if not isinstance(found, str):
            raise ConfigError(
                f"{self._kept.parent} has no chat template, as runs have that were converted from a chat model; leave "
                "out --chat"
            )
        return found

    def _compiled(self, source: str) -> Any:
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ConfigError('--chat needs the jinja2 package: pip install "meshlm[chat]"') from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(source)
        except TemplateError as e:
            raise ConfigError(f"the chat template of {self._kept} is damaged: {e}") from None

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that the model is to continue. Raises ConfigError if the template refuses the messages."""
        names = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **names)
        except Exception as e:  # a template can raise anything
            raise ConfigError(f"the chat template of {self._kept} refuses the message: {e}") from None

    def _token(self, name: str) -> str:
        value = self._keys["tokenizer_config"].get(name)
        id = self._keys["config"].get(f"{name}_id")
        if value is None and isinstance(id, int):
            return self._tokenizer.specials.get(id, "")
        return value["content"] if isinstance(value, dict) else value or ""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a template's text, uint32 [n]. The name of a special token in it becomes that token."""
        ids = {name: id for id, name in self._tokenizer.specials.items()}
        parts, at = [], 0
        for name in name_finder(list(ids))(text):
            begin = text.index(name, at)
            parts += [self._tokenizer.encode(text[at:begin]), np.array([ids[name]], np.uint32)]
            at = begin + len(name)
        return np.concatenate([*parts, self._tokenizer.encode(text[at:])])
