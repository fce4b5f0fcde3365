"""The tokens before a text are those that the model's own tokenizer puts there."""

import json
import pathlib

import numpy as np
import pytest

from data import tokenizers
from tests import chat_models
from trainer.errors import ConfigError
from trainer.sampling import Language

transformers = pytest.importorskip("transformers")

BOS = {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}
RULE = {
    "type": "TemplateProcessing", "special_tokens": {"<|start|>": BOS},
    "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
}  # fmt: skip


def run_with(folder: pathlib.Path, post_processor: dict | None, *, converted: bool = True) -> pathlib.Path:
    """A run directory with a tokenizer and, if it was converted, the files of the model."""
    chat_models.folder(folder / "hf")
    path = folder / "hf/tokenizer.json"
    spec = json.loads(path.read_text())
    named = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if post_processor is not None:
        post_processor["special_tokens"]["<|start|>"]["ids"] = [named["<|start|>"]]
    path.write_text(json.dumps(spec | {"post_processor": post_processor}))
    tokenizers.save(tokenizers.make(str(path)), folder / "tokenizer")
    if not converted:
        (folder / "hf").rename(folder / "other")
    return folder


@pytest.mark.parametrize("rule", [RULE, None])
def test_a_prompt_has_the_tokens_that_transformers_gives_it(tmp_path, rule):
    run = run_with(tmp_path, rule)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(run / "hf/tokenizer.json"))
    language = Language.of(run, chat=False)
    for text in ("hello there", "a", " mesh shard token"):
        np.testing.assert_array_equal(language.encode(text), theirs(text)["input_ids"])
    assert len(language.added) == (rule is not None)
    assert language.encode("a").dtype == np.int32


def test_a_run_that_was_trained_here_has_no_token_before_a_text(tmp_path):
    """launch.prepare puts none there."""
    assert Language.of(run_with(tmp_path, RULE, converted=False), chat=False).added == ()


def test_a_token_that_the_model_does_not_know_is_named(tmp_path):
    language = Language.of(run_with(tmp_path, None), chat=False, vocab_size=50)
    with pytest.raises(ConfigError, match=r"--prompt has token \d+, but the model knows only 50 tokens"):
        language.encode("mesh shard token layer")
