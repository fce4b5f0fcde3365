"""Cross-entropy of hidden states without their logits: a chunk of tokens at a time, on shards of the vocabulary.

Logits of a whole batch would be the largest array of a step by far. Here a device makes those of one chunk, takes from
them the loss and, as the loss is a weighted sum, its final gradients at once; nothing of the chunk is kept and nothing
is computed twice (as in Liger Kernel's fused linear cross-entropy, Hsu et al., 2024; the sums over vocabulary shards
are Megatron's, Shoeybi et al., 2019).

Shape suffixes: n token of one device, c token of a chunk, v column of this device's vocabulary shard, e embed.
"""

import jax
import jax.numpy as jnp
from jax import Array

from trainer import sharding
from trainer.parallel.collectives import Shards
from trainer.state import Program


def make_loss(program: Program):
    """(x, table, targets, weights) -> (objective, loss), both float32 scalars, of the rows of one replica.

    Args of the result:
      x: hidden states as Transformer.hidden returns them.
      table: the parameter of Transformer.output_table, float32.
      targets, weights: [b, t] integers below vocab_size, and float32: loss = sum(weights * nats of each token),
        objective = loss + z_loss * sum(weights * log(Z) ** 2).

    Only the objective has a gradient (to x and table); the loss is for reading.
    """
    axes = program.output_axes
    subscripts = axes[0][0] + axes[1][0]  # 've' or 'ev'
    x_axes = ("batch", "seq", None) if program.placement.splits_sequence else ("batch", None)
    x_spec, table_spec, tokens, scalar = (
        sharding.spec(names, sharding.REPLICA_RULES) for names in (x_axes, axes, ("batch", "seq"), ())
    )

    def by_shard(body, out_specs):
        return sharding.by_device(program.mesh, body, (x_spec, table_spec, tokens, tokens), out_specs)

    shard = _Shard(program, subscripts, axes.index("embed"))
    value = by_shard(shard.value, (scalar, scalar))
    with_gradients = by_shard(shard.gradients, ((scalar, scalar), (x_spec, table_spec)))

    loss = jax.custom_vjp(value)

    def backward(gradients, cotangents):
        of_objective, _ = cotangents
        dx, dtable = gradients
        return (dx * of_objective.astype(dx.dtype), dtable * of_objective, None, None)

    loss.defvjp(with_gradients, backward)
    return loss


class _Shard:
    """The work of one device, inside shard_map."""

    def __init__(self, program: Program, subscripts: str, embed_axis: int):
        config, self.shards = program.config, Shards(program.mesh)
        self.vocab_size, self.z_loss, self.most = config.model.vocab_size, config.z_loss, config.loss_chunk_tokens
        self.subscripts, self.embed_axis = subscripts, embed_axis
        self.columns = config.model.padded_vocab_size // program.mesh.shape["tensor"]

    def value(self, x: Array, table: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        w = self.shards.gather(table.astype(x.dtype), self.embed_axis)

        def one(sums, chunk):
            return jax.tree.map(jnp.add, sums, self.chunk(w, *chunk)[0]), None

        sums, _ = self.over_chunks(one, (jnp.zeros(()),) * 2, x, targets, weights)
        return self.over_tokens(sums)

    def gradients(self, x: Array, table: Array, targets: Array, weights: Array):
        w = self.shards.gather(table.astype(x.dtype), self.embed_axis)

        def one(carry, chunk):
            sums, dw = carry
            parts, dlogits_cv = self.chunk(w, *chunk)
            dx_ce = jnp.einsum(f"cv,{self.subscripts}->ce", dlogits_cv, w, preferred_element_type=jnp.float32)
            dx_ce = self.shards.sum(dx_ce, "tensor").astype(x.dtype)
            dw += jnp.einsum(f"cv,ce->{self.subscripts}", dlogits_cv, chunk[0], preferred_element_type=jnp.float32)
            return (jax.tree.map(jnp.add, sums, parts), dw), dx_ce

        zero = ((jnp.zeros(()),) * 2, jnp.zeros(w.shape, jnp.float32))
        (sums, dw), dx = self.over_chunks(one, zero, x, targets, weights)
        return self.over_tokens(sums), (dx.reshape(x.shape), self.shards.scatter(dw, self.embed_axis))

    def chunk(self, w: Array, x_ce: Array, targets_c: Array, weights_c: Array):
        """((objective, loss), gradient of the objective to the logits [c, v] in the type of x)."""
        logits_cv = jnp.einsum(f"ce,{self.subscripts}->cv", x_ce, w, preferred_element_type=jnp.float32)
        column = self.shards.index("tensor") * self.columns + jnp.arange(self.columns)
        logits_cv = jnp.where(column < self.vocab_size, logits_cv, -jnp.inf)
        top = self.shards.max(jnp.max(logits_cv, axis=1), "tensor")
        log_z = top + jnp.log(self.shards.sum(jnp.sum(jnp.exp(logits_cv - top[:, None]), axis=1), "tensor"))
        # Picked by comparison: the target is in one of the shards.
        is_target = column == targets_c[:, None]
        target = self.shards.sum(jnp.sum(jnp.where(is_target, logits_cv, 0), axis=1), "tensor")
        loss = jnp.sum(weights_c * (log_z - target))
        objective = loss + self.z_loss * jnp.sum(weights_c * jnp.square(log_z)) if self.z_loss else loss
        p_cv = jnp.exp(logits_cv - log_z[:, None])
        dlogits_cv = weights_c[:, None] * (p_cv * (1 + 2 * self.z_loss * log_z[:, None]) - is_target)
        return (objective, loss), dlogits_cv.astype(x_ce.dtype)

    def over_chunks(self, one, carry, x: Array, targets: Array, weights: Array):
        """Folds `one` over equal chunks of at most `most` tokens, the fewest that there can be.

        The last is filled up with tokens of weight 0, fewer than there are chunks.
        """
        tokens = targets.size
        chunks = -(-tokens // (self.most or tokens))
        padding = -tokens % chunks

        def split(a: Array) -> Array:
            return jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, -1, *a.shape[1:])

        flat = (x.reshape(tokens, -1), targets.reshape(-1), weights.reshape(-1))
        carry, of_chunks = jax.lax.scan(one, carry, jax.tree.map(split, flat))
        return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], of_chunks)

    def over_tokens(self, sums):
        return jax.tree.map(lambda s: self.shards.sum(s, "fsdp", "context"), sums)
