"""The data section of the configuration. It has no heavy imports: a launcher validates it before it loads JAX."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

Task = Literal["pretrain", "sft", "dpo"]  # what a dataset is for: text, chats, or pairs of chats
DTYPES = ("uint16", "uint32")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # A dataset folder written by launch.prepare; or token files of another program: a file, a folder or a glob; or
    # several of these, separated by commas.
    path: str = ""
    # Weights of the sources: 0.7,0.3; or in stages, each with its first sequence: 0:0.7,0.3; 50000:0.5,0.5. '': equal.
    weights: str = ""
    seq_len: int = 64  # T, the tokens predicted per sequence; a sequence has T + 1 tokens
    mask_documents: bool = False  # tokens attend only within their document, and positions restart with each document
    packed: bool = False  # read rows of complete documents, which launch.pack arranged, instead of windows
    eos_id: int = -1  # the token after each document; -1: the dataset's own
    prefetch: int = 2  # batches that the loader's thread reads ahead
    source: str = ""  # what launch.prepare makes `path` from; named in the error message if `path` does not exist
    tokenizer: str = "char"  # the tokenizer that launch.prepare makes; also named in that message
    # The next fields are for token files that are read in place. With several sources: one value for all, or one value
    # for each source, separated by commas.
    format: str = ""  # meshlm, or a format of data/token_files/external.py; '': detected
    dtype: str = ""  # uint16 or uint32, if the format does not say (nanogpt, olmo); '': uint16
    val_path: str = ""  # validation files; '': files of `path` with val, valid or validation in their names
    # A tokenizer, in the form of launch.prepare's --tokenizer. '': no text is generated; model.vocab_size is needed.
    tokenizer_path: str = ""

    # What a change means for a run that is resumed (trainer.config.changes); fields that are not named may not change.
    # Another path is harmless if it has the same data, which the fingerprint shows. Weights may change for sequences
    # that the run has not trained on yet (mixture.check_change).
    ON_RESUME: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "path", "weights", "prefetch", "source", "tokenizer", "format", "dtype", "val_path", "tokenizer_path",
        ),
        "harmless",
    )  # fmt: skip

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len is {self.seq_len}; it must be at least 2 tokens")
        if self.eos_id < -1:
            raise ValueError(f"data.eos_id is {self.eos_id}; it must be a token id, or -1 for the dataset's own")
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch is {self.prefetch}; it must be at least 1 batch")
        self._check_choices("dtype", DTYPES)
        if self.format:  # imported only if needed: the readers need NumPy
            from data.token_files.external import format_names

            self._check_choices("format", format_names())

    def _check_choices(self, name: str, choices: tuple[str, ...]) -> None:
        for value in getattr(self, name).split(","):
            if value.strip() and value.strip() not in choices:
                raise ValueError(f"data.{name} is {value!r}; it must be one of {', '.join(choices)}, or empty")

    @property
    def document_end(self) -> int | None:
        """The token that ends a document, if documents are masked from each other."""
        return self.eos_id if self.mask_documents else None
