"""A batch: what the loader passes to the step, the model and the loss."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "targets", "loss_weights", "positions", "segment_ids", "reference"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays [rows, seq_len] of NumPy or JAX, or their shapes. A field that a run does not need is None.

    Attributes:
      inputs: token ids, in the type of the files until `widened`.
      targets: the token that follows each input.
      loss_weights: how much each target counts, bool or float; None: all targets count the same.
      positions: int32, the position of each input in its document; None: the position in its row is used.
      segment_ids: int32, equal for inputs of a row if and only if they share a document; None: a row is one document.
      reference: float32, the same for all inputs of a row, which is a pair of chats: log p(chosen) - log p(rejected) of
        the weights with which training began (trainer/finetuning/reference.py).
    """

    inputs: Any
    targets: Any
    loss_weights: Any = None
    positions: Any = None
    segment_ids: Any = None
    reference: Any = None

    def replace(self, **changes: Any) -> "Batch":
        return dataclasses.replace(self, **changes)

    def widened(self) -> "Batch":
        """The batch in the dtypes of the step. In files and transfers, a token takes 2 or 4 bytes, and a weight one."""
        weights = None if self.loss_weights is None else self.loss_weights.astype(np.float32)
        ids = {name: getattr(self, name).astype(np.int32) for name in ("inputs", "targets")}
        return self.replace(**ids, loss_weights=weights)


def from_tokens(
    tokens: np.ndarray,
    *,
    loss_mask: np.ndarray | None = None,
    document_end: int | None = None,
    begins: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Batch:
    """The batch for rows of tokens.

    Args:
      tokens: [rows, seq_len + 1]; each token except the first of a row is the target of the token before it.
      loss_mask: bool [rows, seq_len], which targets count; None: all.
      document_end: the token that ends a document and belongs to it, if documents are masked from each other.
      begins: bool [rows, seq_len + 1], the tokens at which documents begin that are masked from each other; None: those
        after a document_end.
      reference: float32 [rows], of pairs of chats; None: it is not needed.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if begins is not None:
        positions, segment_ids = numbered(begins[:, :-1])
    elif document_end is not None:
        positions, segment_ids = documents(inputs, document_end)
    else:
        return Batch(inputs, targets, loss_mask)
    if reference is not None:
        reference = np.broadcast_to(reference[:, None], inputs.shape)
    return Batch(inputs, targets, loss_mask, positions, segment_ids, reference)


def documents(inputs: np.ndarray, document_end: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segment_ids), int32 [rows, seq_len]: a token's place in its document, and that document's number."""
    begins = np.zeros(inputs.shape, bool)
    begins[:, 1:] = inputs[:, :-1] == document_end
    return numbered(begins)


def numbered(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `documents`, of documents that begin at the tokens of which `begins`, bool [rows, seq_len], is true. The first
    token of a row always begins one."""
    index = np.arange(begins.shape[1], dtype=np.int32)[None]
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return index - first, np.cumsum(begins, axis=1, dtype=np.int32)


def abstract(
    rows: int, seq_len: int, dtype: Any, *, masked: bool, documents: bool, reference: bool, sharding: Any
) -> Batch:
    """The shapes of a batch, for compilation.

    Args:
      dtype: the dtype of the token files.
      masked: whether the loader says which targets count (data.packed).
      documents: whether documents are masked from each other (data.mask_documents).
      reference: whether the loader has what the first weights say about pairs of chats.
    """

    def shape(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=sharding)

    weights = shape(np.bool_) if masked else None
    of_documents = shape(np.int32) if documents else None
    of_pairs = shape(np.float32) if reference else None
    return Batch(shape(dtype), shape(dtype), weights, of_documents, of_documents, of_pairs)
