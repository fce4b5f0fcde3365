"""What a preparation of chats asks of a model's chat template (trainer/interchange/supervision.py has one)."""

from typing import NamedTuple, Protocol

import numpy as np

from data.tokenizers.base import Tokenizer

Message = dict[str, str]  # role and content


class Supervised(NamedTuple):
    """A chat as tokens.

    Attributes:
      ids: uint32 [n].
      mask: bool [n], true for the assistant's tokens.
      notes: oddities, which are counted.
    """

    ids: np.ndarray
    mask: np.ndarray
    notes: tuple[str, ...] = ()


class Template(Protocol):
    """The tokenizer and the chat template of a model.

    Attributes:
      sha256: the hash of the template.
    """

    tokenizer: Tokenizer
    sha256: str

    def supervised(self, messages: list[Message]) -> Supervised:
        """A chat as tokens. Raises DataError if the template cannot be used for it."""
        ...
