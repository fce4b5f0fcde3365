"""The prompt of a run's samples."""

import types

import numpy as np
import pytest

from data.errors import DataError
from tests.step_test import config
from trainer import sampling
from trainer.errors import ConfigError


def tokenizer(encode):
    return types.SimpleNamespace(encode=encode)


def test_a_prompt_is_its_tokens_and_there_is_none_without_a_tokenizer():
    assert sampling.prompt_of(config(), tokenizer(lambda text: np.array([5, len(text)]))).tolist() == [5, 1]
    assert sampling.prompt_of(config(), None) is None
    none = config(sample={"max_new_tokens": 0})
    assert sampling.prompt_of(none, tokenizer(lambda text: np.array([], np.int32))) is None


@pytest.mark.parametrize("text", ["\n", " ", "\u200b"])
def test_a_prompt_of_which_nothing_is_kept_is_refused_in_one_line(text):
    """A SentencePiece model may drop all of a prompt that is white space."""
    with pytest.raises(ConfigError, match=r"config\.sample\.prompt is .* keeps nothing; give other text") as error:
        sampling.prompt_of(config(sample={"prompt": text}), tokenizer(lambda text: np.array([], np.int32)))
    assert str(error.value).isprintable()


def test_a_prompt_that_cannot_be_encoded_is_refused():
    def encode(text):
        raise DataError("no such character")

    with pytest.raises(ConfigError, match="--prompt: no such character"):
        sampling.encode_prompt(tokenizer(encode), "x", "--prompt")
