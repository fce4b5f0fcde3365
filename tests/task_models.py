"""A tiny model and tokenizer as a run directory, for the tests of evaluation tasks."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import reference
import tiny_models

from data import tokenizers
from data.tokenizers.hf_json import JsonTokenizer
from tests import families
from tests.step_test import config
from trainer import sharding
from trainer.config import Config
from trainer.state import Program
from trainer.tasks.scorer import Pair, Score, Scorer
from trainer.tasks.text import Text

CONTEXT = 96


def tokenizer() -> JsonTokenizer:
    return families.make("bpe")


def tokenizer_that_adds(token: str) -> JsonTokenizer:
    """A tokenizer.json with another special token, which its post-processor puts before each text."""
    spec = json.loads(tokenizer().file()[1])
    id = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": id, "content": token})
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }  # fmt: skip
    return JsonTokenizer(json.dumps(spec).encode())


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A model with random parameters, and its tokenizer."""

    config: Config
    text: Text
    scorer: Scorer
    params: dict

    @classmethod
    def in_folder(cls, run: pathlib.Path) -> "TaskModel":
        tokenizers.save(tokenizer(), run / "tokenizer")
        text = Text(run)
        model = {"vocab_size": text.tokenizer.vocab_size, "max_seq_len": CONTEXT, "num_layers": 1}
        cfg = config(model=model)
        mesh = sharding.mesh_of(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
        return cls(cfg, text, Scorer(Program(cfg, mesh)), tiny_models.random_params(cfg.model))

    def score(self, pairs: list[Pair]) -> list[Score]:
        return self.scorer.score(self.params, pairs)

    def nats_and_predictions(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each token except the first: its nats, and the most likely token, in plain NumPy."""
        logits = reference.forward(self.params, self.config.model, np.array([tokens[:-1]]))[0]
        probability = reference.softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
        return -np.log(probability), logits.argmax(-1)
