"""What a forward pass carries besides activations: indices and documents of tokens, dropout, and what layers report."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from model.dropout import NO_DROPOUT, Dropout


class Aux(NamedTuple):
    """What layers report besides their result: float32 scalars by name, each a mean over the tokens of the batch.

    Attributes:
      losses: terms that are added to the training loss, such as the load-balancing loss of experts.
      metrics: values that are shown as train/NAME.
    """

    losses: dict[str, Array]
    metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Context:
    """The context of one forward pass over b rows of t tokens.

    Attributes:
      index: int32 [t], the index of each token in its row, or [b, t] if the rows differ. A token sees tokens of a lower
        index, and itself. A cache keeps the token at this index. Tokens may lie in another order than their indices
        (see Partitioner).
      positions: int32 [b, t] or [1, t], the position of each token in its document.
      segment_ids: int32 [b, t], the document of each token; None: a row is one document.
      dropout: the dropout of the current layer.
      local: whether the current layer is local, as ModelConfig.local_layers says.
      keep: whether attention returns the keys and values of these tokens, for a cache.
      aux: what the current layer reports.
    """

    index: Array
    positions: Array
    segment_ids: Array | None = None
    dropout: Dropout = NO_DROPOUT
    local: bool = False
    keep: bool = False
    aux: Aux = dataclasses.field(default_factory=lambda: Aux({}, {}))

    def of_layer(self, key: Array | None, *, local: bool) -> "Context":
        """The same tokens, for a layer with its own dropout key and reports."""
        return dataclasses.replace(self, dropout=self.dropout._replace(key=key), local=local, aux=Aux({}, {}))

    def with_dropout(self, dropout: Dropout) -> "Context":
        """The same tokens and reports, with the dropout of a part of the layer."""
        return dataclasses.replace(self, dropout=dropout)

    def report_loss(self, name: str, value: Array) -> None:
        """Adds `value`, a scalar, to the loss; the layers' values of one name are summed."""
        self.aux.losses[name] = value.astype(jnp.float32)

    def report_metric(self, name: str, value: Array) -> None:
        """Shows `value`, a scalar, as train/NAME: the mean over the layers that report it."""
        self.aux.metrics[name] = jax.lax.stop_gradient(value).astype(jnp.float32)
