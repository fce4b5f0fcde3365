"""Log-probabilities of continuations, which most evaluation tasks are made of.

Rows are batched in buckets of lengths, powers of 2, so that a handful of programs are compiled. Every process calls
`score` with the same pairs, and all of them get all results.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from data import loader
from data.batch import Batch, from_tokens
from data.errors import DataError
from trainer import sharding
from trainer.errors import Diverged
from trainer.evaluation import microbatch_rows
from trainer.loss import make_token_scores
from trainer.state import Program
from trainer.step import ROWS, SAME, forward

SMALLEST = 64  # the shortest bucket: shorter rows are hardly faster
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context, at least one, and of its continuation


class Interrupted(Exception):
    """The scores are not wanted any more."""


class Score(NamedTuple):
    """What a model says about a continuation.

    Attributes:
      logprob: the sum of the natural logarithms of its tokens' probabilities.
      greedy: whether each of its tokens is the most likely one.
      length: the number of its tokens.
    """

    logprob: float
    greedy: bool
    length: int

    @property
    def mean(self) -> float:
        """The mean logarithm of a token's probability; nan without tokens."""
        return self.logprob / self.length if self.length else float("nan")


class Scorer:
    """Scores continuations with a model.

    Attributes:
      program: of the run.
      context: the most tokens that the model reads. Of a longer context and continuation, the last context + 1 tokens
        count, as in lm-evaluation-harness.
      interrupted: is called after each batch; if it returns True, what computes the scores raises Interrupted.
    """

    def __init__(self, program: Program):
        """The batches of `program`, that of the run, say how many tokens are worked through at a time."""
        self.program = program
        self._batch = sharding.named(program.mesh, "batch")
        self._unit = 2 * program.mesh.shape["context"] if program.mesh.shape["context"] > 1 else 1
        longest = program.config.model.max_seq_len
        self.context = longest - longest % self._unit
        self._steps: dict[int, Callable[[dict, Batch], tuple[Array, Array]]] = {}
        self.interrupted: Callable[[], bool] = lambda: False

    def check_interrupted(self) -> None:
        if self.interrupted():
            raise Interrupted

    def score(self, params: dict, pairs: Sequence[Pair]) -> list[Score]:
        """The score of the continuation of each pair.

        Raises:
          DataError: the model cannot have such tokens, or so many.
          Diverged: its log-probabilities are not finite.
          Interrupted
        """
        rows = [self._row(*pair) for pair in pairs]
        buckets = collections.defaultdict(list)
        for i, (tokens, _) in enumerate(rows):
            buckets[self._bucket(len(tokens) - 1)].append(i)
        scores: dict[int, Score] = {}
        for length, members in sorted(buckets.items(), reverse=True):  # too little memory is noticed at once
            size = self._rows(length, len(members))
            for first in range(0, len(members), size):
                part = members[first : first + size]
                found = self._score(params, [rows[i] for i in part], length, size)
                scores |= dict(zip(part, found, strict=True))
                self.check_interrupted()
        return [scores[i] for i in range(len(pairs))]

    def check(self, pairs: Sequence[Pair]) -> list[Score]:
        """Scores without the model, all of them 0; raises what `score` would raise because of the tokens."""
        return [Score(0.0, greedy=False, length=self._row(*pair)[1]) for pair in pairs]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[np.ndarray, int]:
        """The tokens that count, and how many of them are scored."""
        tokens, vocab_size = np.array([*context, *continuation], np.int64), self.program.config.model.vocab_size
        if not len(context):
            raise DataError("a text without tokens before it cannot be scored; there must be a first token")
        if len(continuation) > self.context:
            raise DataError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context of {self.context}"
            )
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise DataError(
                f"token {tokens.min() if tokens.min() < 0 else tokens.max()} is outside the model's vocabulary of "
                f"{vocab_size}; the tokens are those of another tokenizer"
            )
        return tokens[-(self.context + 1) :].astype(np.int32), len(continuation)

    def _bucket(self, inputs: int) -> int:
        """The length of the rows in which this many inputs are read."""
        power = max(SMALLEST, 1 << max(inputs - 1, 0).bit_length())
        return min(self.context, -(-power // self._unit) * self._unit)

    def _rows(self, length: int, wanted: int) -> int:
        """The rows of a batch: as many tokens as a microbatch of training has, or a power of 2 if that suffices."""
        config, shards = self.program.config, sharding.batch_shards(self.program.mesh.shape)
        most = microbatch_rows(config, self._batch) * config.data.seq_len // length
        few = 1 << (wanted - 1).bit_length()
        return max(1, -(-min(most, few) // shards)) * shards

    def _score(self, params: dict, rows: list[tuple[np.ndarray, int]], length: int, size: int) -> list[Score]:
        """The scores of at most `size` rows, in a batch [size, length]."""
        if length not in self._steps:
            self._steps[length] = make_score_step(of_length(self.program, length))
        batch = loader.put(self._batch, size, functools.partial(_read, rows, length))
        nats, missed = map(np.asarray, self._steps[length](params, batch))
        if not np.isfinite(nats).all():
            raise Diverged("the model's log-probabilities are not finite")
        return [Score(-float(nats[i]), not missed[i], scored) for i, (_, scored) in enumerate(rows)]


def _read(rows: list[tuple[np.ndarray, int]], length: int, indices: np.ndarray) -> Batch:
    """The rows `indices` of a batch: tokens, then padding, which no scored token sees."""
    tokens, mask = np.zeros((len(indices), length + 1), np.int32), np.zeros((len(indices), length), bool)
    for k, i in enumerate(indices):
        if i < len(rows):
            row, scored = rows[i]
            tokens[k, : len(row)] = row
            mask[k, len(row) - 1 - scored : len(row) - 1] = True
    return from_tokens(tokens, loss_mask=mask)


def of_length(program: Program, length: int) -> Program:
    """The program for rows of this length: the attention kernel and the order of a split sequence depend on it."""
    config = program.config
    return Program(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=length)), program.mesh)


def make_score_step(program: Program) -> Callable[[dict, Batch], tuple[Array, Array]]:
    """(params, batch) -> of the targets with weight 1 in each row, [rows]: the sum of their nats, float32, and how many
    are not the most likely token, int32."""
    token_scores = make_token_scores(program)

    def of_replica(params: dict, batch: Batch) -> tuple[Array, Array]:
        out = forward(program, params, batch)
        targets, weights = out.batch.targets, out.batch.loss_weights
        nats, likeliest = token_scores(out.hidden, out.table, targets)
        return (nats * weights).sum(axis=1), ((likeliest != targets) & (weights > 0)).sum(axis=1)

    by_replica = sharding.by_replica(of_replica, program.mesh, (SAME, ROWS), (ROWS, ROWS))
    return jax.jit(
        lambda params, batch: by_replica(params, batch.widened()),
        out_shardings=(program.replicated, program.replicated),
    )
