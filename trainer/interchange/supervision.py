"""A chat as tokens, and which of them are supervised: what the assistant writes, with the token that ends its turn.

If the template marks them with {% generation %}, the marks decide, as in transformers. Otherwise an answer is what the
template adds to the prompt of the messages before it, up to the special token that ends it. So the model is trained to
continue the prompts that launch.sample --chat gives it.
"""

import os
import pathlib

import numpy as np

from data import tokenizers
from data.errors import DataError
from data.tokenizers.chat import Message, Supervised
from trainer.errors import ConfigError
from trainer.interchange.chat import Chat
from trainer.interchange.folder import KEPT

NO_END = "answer without one of the model's end tokens, which it does not learn to write"
MERGED = "answer whose first token begins in the prompt"
SPELLED = "text that spells a special token, which it becomes"

Span = tuple[int, int]  # [begin, end) of a text


def template_of(path: str) -> "ChatTemplate":
    """The template of a run, or of a folder of Hugging Face. Raises ConfigError, DataError."""
    place = pathlib.Path(path)
    kept = place / KEPT if os.path.isdir(place / KEPT) else place
    if not place.is_dir():
        raise ConfigError(f"--tokenizer={path}: chats need the run or the folder of a model with a chat template")
    return ChatTemplate(Chat(kept, tokenizers.make(path)))


class ChatTemplate:
    """The data.tokenizers.chat.Template of a model."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.tokenizer = chat.tokenizer
        self.sha256 = chat.sha256

    def supervised(self, messages: list[Message]) -> Supervised:
        try:
            text, spans = self.chat.render(messages, add_generation_prompt=False)
            if not self.chat.marks:
                spans = self._answers(messages, text)
        except ConfigError as e:
            raise DataError(str(e)) from None
        ids, mask, notes = self._encoded(text, spans)
        if any(self.chat.names_in(message["content"]) for message in messages):
            notes.add(SPELLED)
        return Supervised(ids, mask, tuple(sorted(notes)))

    def _answers(self, messages: list[Message], text: str) -> list[Span]:
        """Where the assistant's messages are. Raises DataError if the text before one depends on what follows it."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.chat.render(messages[:i], add_generation_prompt=True).text
            answered = self.chat.render(messages[: i + 1], add_generation_prompt=False).text
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise DataError(
                    f"the chat template renders message {i + 1} or those before it in another way in a prompt than in "
                    "the whole chat, so the answer cannot be located; mark it in the template with {% generation %}"
                )
            spans.append((len(prompt), len(prompt) + self._until_end(answered[len(prompt) :])))
        return spans

    def _until_end(self, answer: str) -> int:
        """The length of an answer without the white space after the special token that ends it, if one does."""
        stripped = answer.rstrip()
        names = self.chat.names_in(stripped)
        return len(stripped) if names and stripped.endswith(names[-1]) else len(answer)

    def _encoded(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray, set[str]]:
        """The tokens, which of them are in the spans, and notes."""
        at, count, parts, notes = 0, 0, [], set()
        borders = dict.fromkeys(border for span in spans for border in span)
        places: dict[int, int] = {}  # from borders to numbers of tokens
        for part, ids in self.chat.parts(text):
            for border in [b for b in borders if b not in places and at <= b <= at + len(part)]:
                place, exact = self._place(part, ids, border - at)
                places[border] = count + place
                if not exact and any(border == begin for begin, _ in spans):
                    notes.add(MERGED)
            parts.append(ids)
            at, count = at + len(part), count + len(ids)
        ids, mask = np.concatenate(parts), np.zeros(count, bool)
        for begin, end in spans:
            mask[places[begin] : places[end]] = True
            if places[end] > places[begin] and int(ids[places[end] - 1]) not in self.chat.stop_ids:
                notes.add(NO_END)
        return ids, mask, notes

    def _place(self, part: str, ids: np.ndarray, border: int) -> tuple[int, bool]:
        """How many tokens of a part are before a border in it, and whether none lies across it."""
        if border in (0, len(part)):
            return (0 if border == 0 else len(ids)), True
        before = self.tokenizer.encode(part[:border])
        same = np.cumprod(before[: len(ids)] == ids[: len(before)])
        return int(same.sum()), len(before) <= len(ids) and bool(same.all())
