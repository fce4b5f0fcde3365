"""From tokens to the objects that clients read: choices with text, log-probabilities, the reason of the end; usage."""

import abc
import dataclasses
import time
import uuid
from typing import Any, ClassVar

from launch.serving.requests import ChatRequest, CompletionRequest
from model.generate import News
from trainer.sampling import Language


@dataclasses.dataclass
class Part:
    """A part of an answer, or all of it.

    Attributes:
      tokens: ids of the vocabulary, also of a token that ends the text and of those whose text a stop string hides.
      logprobs: natural logarithms of their probabilities.
      offset: how many characters the tokens before have, if log-probabilities are wanted.
      finish_reason: "stop" or "length" if these are the last ones.
    """

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    offset: int = 0
    finish_reason: str | None = None

    def extend(self, part: "Part") -> None:
        self.text += part.text
        self.tokens += part.tokens
        self.logprobs += part.logprobs
        self.finish_reason = part.finish_reason


class Answer(abc.ABC):
    """The answer to one request, as it grows.

    Attributes:
      whole: all of it so far.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    kind_of_chunk: ClassVar[str]

    def __init__(self, request: CompletionRequest | ChatRequest, language: Language, *, model: str, prompt_tokens: int):
        self.request = request
        self.whole = Part()
        self._language = language
        self._stream = language.stream(request.stop or ())
        self._prompt_tokens = prompt_tokens
        self._offset = 0
        self._head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    @property
    def finished(self) -> bool:
        """A stop string finishes an answer before its text has ended."""
        return self.whole.finish_reason is not None

    def add(self, news: News) -> Part:
        """What `news` adds."""
        before = len(self._stream.ids)
        text = self._stream.feed(news.tokens, ended=news.ended)
        # The token that completes a stop string is the last of the answer, however many were generated together.
        used = len(self._stream.ids) - before if self._stream.stopped else len(news.tokens)
        ids, logprobs = news.tokens[:used].tolist(), news.logprobs[:used].tolist()
        part = Part(text, ids, logprobs, self._offset, self._reason(news))
        self._offset += sum(len(self.token_text(id)) for id in part.tokens) if self.request.wants_logprobs else 0
        self.whole.extend(part)
        return part

    def _reason(self, news: News) -> str | None:
        if self._stream.stopped or (news.ended and int(news.tokens[-1]) in self._language.stop_ids):
            return "stop"
        return "length" if news.ended else None

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the answer; these include the one that ends it."""
        prompt, answer = self._prompt_tokens, len(self.whole.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def complete(self) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        return self._object(self.kind, [self.choice(self.whole)]) | {"usage": self.usage()}

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        """An object of a stream; the last one has no choice, if it is for the usage."""
        found = self._object(self.kind_of_chunk, list(choices))
        return found | {"usage": None if choices else self.usage()} if self.request.wants_usage else found

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def token_text(self, id: int) -> str:
        return self._language.tokenizer.token_bytes(id).decode("utf-8", "replace")

    def opening(self) -> list[dict[str, Any]]:
        """The choices of objects with which a stream begins."""
        return []

    @abc.abstractmethod
    def choice(self, part: Part) -> dict[str, Any]:
        """The one choice of an answer that is not streamed."""

    @abc.abstractmethod
    def chunk_choice(self, part: Part) -> dict[str, Any]:
        """The one choice of an object of a stream."""


class CompletionAnswer(Answer):
    prefix, kind, kind_of_chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, part: Part) -> dict[str, Any]:
        logprobs = self._logprobs(part) if self.request.wants_logprobs else None
        return {"index": 0, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    chunk_choice = choice

    def _logprobs(self, part: Part) -> dict[str, Any]:
        texts = [self.token_text(id) for id in part.tokens]
        return {
            "tokens": texts,
            "token_logprobs": part.logprobs,
            "top_logprobs": [{text: logprob} for text, logprob in zip(texts, part.logprobs, strict=True)],
            "text_offset": [part.offset + sum(map(len, texts[:i])) for i in range(len(texts))],
        }


class ChatAnswer(Answer):
    prefix, kind, kind_of_chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, part: Part) -> dict[str, Any]:
        return self._choice(part, "message", {"role": "assistant", "content": part.text})

    def chunk_choice(self, part: Part) -> dict[str, Any]:
        return self._choice(part, "delta", {"content": part.text})

    def opening(self) -> list[dict[str, Any]]:
        return [self._choice(Part(), "delta", {"role": "assistant", "content": ""})]

    def _choice(self, part: Part, key: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(part) if self.request.wants_logprobs else None
        return {"index": 0, key: message, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def _logprobs(self, part: Part) -> dict[str, Any]:
        return {
            "content": [
                {
                    "token": self.token_text(id), "logprob": logprob, "top_logprobs": [],
                    "bytes": list(self._language.tokenizer.token_bytes(id)),
                }
                for id, logprob in zip(part.tokens, part.logprobs, strict=True)
            ]
        }  # fmt: skip
