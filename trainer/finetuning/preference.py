"""Direct preference optimization (DPO): Rafailov et al., 2023, equation 7.

A row of a batch is a pair of chats: document 1 is the preferred one. With log-probabilities summed over the supervised
tokens of a chat,

    margin = beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected)),     loss = -log sigmoid(margin),

and the loss of a batch is the mean over its pairs. The reference is the model without its adapters, which needs neither
memory nor a file, or, without adapters, the model before training (reference.py). For each token the slope of the loss
by its -log p is a number; with these numbers as weights, the weighted cross-entropy of trainer/loss.py has the gradient
of the loss, and no logits are kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from data.batch import Batch

CHOSEN = 1  # the number of the preferred document of a row (data.batch.numbered)


class Pairs(NamedTuple):
    """The pairs of some rows.

    Attributes:
      loss: float32 [b], -log sigmoid(margin) of each row.
      margin: float32 [b].
      slopes: float32 [b, t], the derivative of each row's loss by the nats of each of its targets.
    """

    loss: Array
    margin: Array
    slopes: Array


def compare(batch: Batch, ratio: Array, reference: Array, *, beta: float) -> Pairs:
    """Compares the chats of each row.

    Args:
      batch: rows of pairs, whose loss_weights are not 0 for the supervised tokens.
      ratio, reference: float32 [b], the log_ratio of the model and of the reference.
    """
    margin = beta * (ratio - reference)
    slopes = beta * jax.nn.sigmoid(-margin)[:, None] * _signs(batch)
    return Pairs(jax.nn.softplus(-margin), margin, slopes)


def log_ratio(batch: Batch, nats: Array) -> Array:
    """float32 [b], log p(chosen) - log p(rejected) of each row; `nats`, float32 [b, t], are -log p of each target."""
    return -(_signs(batch) * nats).sum(1)


def _signs(batch: Batch) -> Array:
    """float32 [b, t], 1 for the supervised tokens of the chosen chat, and -1 for those of the rejected one."""
    return jnp.where(batch.segment_ids == CHOSEN, 1.0, -1.0) * (batch.loss_weights != 0)


def shares(batch: Batch) -> Array:
    """float32 [b], the weight of each row in the loss: 0 for rows that only fill up a batch."""
    return batch.loss_weights.max(1)


def with_mean_weights(batch: Batch) -> Batch:
    """`batch` with weights of which each row has its share in the mean over the pairs of the batch."""
    pairs = shares(batch).sum()
    return batch.replace(loss_weights=batch.loss_weights / jnp.where(pairs > 0, pairs, 1))


def reference(params: dict) -> dict:
    """The parameters of the model without adapters."""
    flat = traverse_util.flatten_dict(params, sep=".")
    off = {path: jnp.zeros_like(leaf) if path.endswith(".lora.b") else leaf for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(off, sep=".")
