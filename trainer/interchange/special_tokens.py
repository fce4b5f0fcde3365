"""Which tokens begin and end a text for a converted model, as the files say that came with it."""

import pathlib
from typing import Any

from data.tokenizers import JsonTokenizer
from data.tokenizers.base import Tokenizer
from trainer.interchange.folder import KEPT, read_json

FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


class SpecialTokens:
    """The special tokens of a run's model.

    Attributes:
      bos, eos: the ids of the tokens that begin and end a text; None if there is none.
      added: the tokens that transformers puts before each text: [BOS] or nothing.
      stop_ids: the tokens that end a generated text.
    """

    def __init__(self, run_dir: pathlib.Path, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        paths = {name: run_dir / KEPT / name for name in FILES}  # of the model that the run was converted from
        self._kept = {name: read_json(path, "") if path.is_file() else {} for name, path in paths.items()}
        eos, self.bos = self._named("eos_token"), self._named("bos_token")
        self.eos = tokenizer.eos_id if eos is None else eos
        self.added = self._added() if any(path.is_file() for path in paths.values()) else []
        stops = self._kept["generation_config.json"].get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        self.stop_ids = frozenset(id for id in (*stops, self.eos) if id is not None)

    def _named(self, role: str) -> int | None:
        """The id of bos_token or eos_token as the files of the converted model say; None if they do not."""
        ids = {name: id for id, name in self._tokenizer.specials.items()}
        for file in FILES[:2]:
            value: Any = self._kept[file].get(role)
            name = value.get("content") if isinstance(value, dict) else value
            if name in ids:
                return ids[name]
        found = self._kept["config.json"].get(f"{role}_id")
        for id in found if isinstance(found, list) else [found]:
            if id in self._tokenizer.specials:
                return id
        return None

    def _added(self) -> list[int]:
        """A tokenizer.json says in its post-processor what is added; for other files, tokenizer_config.json does."""
        if not isinstance(self._tokenizer, JsonTokenizer):
            add = self._kept["tokenizer_config.json"].get("add_bos_token") and self.bos is not None
            return [self.bos] if add and self.bos is not None else []
        import tokenizers

        library = tokenizers.Tokenizer.from_buffer(self._tokenizer.file()[1])
        library.no_truncation()
        library.no_padding()
        added, plain = (library.encode("a", add_special_tokens=add).ids for add in (True, False))
        begins = (i for i in range(len(added)) if added[i : i + len(plain)] == plain)
        return added[: next(begins, 0)]
