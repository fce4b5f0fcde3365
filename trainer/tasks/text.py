"""Text as the tokens of a task, by the rules of transformers and lm-evaluation-harness for the same tokenizer."""

import pathlib
from collections.abc import Iterable

from trainer.errors import ConfigError
from trainer.interchange.chat import encode_with_specials
from trainer.interchange.special_tokens import SpecialTokens
from trainer.sampling import Language


class Text:
    """Encodes and decodes text for the model of a run.

    Attributes:
      tokenizer: that of the run.
      added: the tokens that transformers puts before each text: [BOS] or nothing.
      stop_ids: the tokens that end a generated text.

    Raises:
      ConfigError: the run has no tokenizer.
    """

    def __init__(self, run_dir: pathlib.Path):
        self.tokenizer = Language.of(run_dir, chat=False).tokenizer
        self._where = run_dir
        special = SpecialTokens(run_dir, self.tokenizer)
        self._bos, self.eos_id, self.added, self.stop_ids = special.bos, special.eos, special.added, special.stop_ids

    @property
    def first_id(self) -> int:
        """The token before a text that has no context: BOS, or else EOS. Raises ConfigError if there is neither."""
        id = self.eos_id if self._bos is None else self._bos
        if id is None:
            raise ConfigError(
                f"the tokenizer of {self._where} has no token that begins or ends a text, which this task needs"
            )
        return id

    def encode(self, text: str, *, add: bool | None = None) -> list[int]:
        """The tokens of a text, in which the names of special tokens are these tokens.

        Args:
          add: whether `added` comes before the text; None: unless the text begins with the name of that token.
        """
        ids = encode_with_specials(self.tokenizer, text).tolist()
        if add is None:
            add = not (self.added and ids[:1] == [self.first_id])
        return [*self.added, *ids] if add else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode([id for id in ids if id not in self.tokenizer.specials])

    def name(self, id: int | None) -> str:
        """The name of a special token; "" for None."""
        return "" if id is None else self.tokenizer.specials.get(id, "")
