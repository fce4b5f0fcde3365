"""Helpers for batches in tests: the tokens that a batch was made of, and the batch as it lies on a mesh."""

import jax
import numpy as np

from data.batch import Batch
from trainer import sharding


def tokens_of(batch: Batch) -> np.ndarray:
    """[rows, seq_len + 1]: the inputs and the last target. Each other target must be the next input."""
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    assert inputs.dtype == targets.dtype and np.array_equal(inputs[:, 1:], targets[:, :-1])
    return np.concatenate([inputs, targets[:, -1:]], axis=1)


def on_mesh(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The batch with the sharding that the loader gives it."""
    return jax.device_put(batch, sharding.named(mesh, "batch"))
