"""A recipe without a dataset: for commands that compile or time its step and read no text."""

import dataclasses

from trainer.config import Config
from trainer.errors import ConfigError

VOCAB_SIZE = 50_304  # where neither recipe nor flag says: GPT-2's, padded


def complete(config: Config) -> Config:
    """`config` with what a dataset would decide. Raises ConfigError."""
    model, data = config.model, config.data
    if model.max_seq_len and model.max_seq_len < data.seq_len:
        raise ConfigError(
            f"config.model.max_seq_len = {model.max_seq_len} is below config.data.seq_len = {data.seq_len}"
        )
    vocab_size, max_seq_len = model.vocab_size or VOCAB_SIZE, model.max_seq_len or data.seq_len
    model = dataclasses.replace(model, vocab_size=vocab_size, max_seq_len=max_seq_len)
    if (data.mask_documents or data.packed) and data.eos_id == -1:
        data = dataclasses.replace(data, eos_id=0)
    if data.eos_id >= model.vocab_size:
        raise ConfigError(f"config.data.eos_id is {data.eos_id}; it must be below the vocabulary of {model.vocab_size}")
    return dataclasses.replace(config, model=model, data=data)
