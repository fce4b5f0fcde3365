"""Cross-entropy of hidden states without their logits: a chunk of tokens at a time, on shards of the vocabulary.

Logits of a whole batch would be the largest array of a step by far. Here a device computes the logits of one chunk and
from them the loss and, because the loss is a weighted sum, its final gradients. It keeps nothing else of the chunk and
computes nothing twice (as in Liger Kernel's fused linear cross-entropy, Hsu et al., 2024; the sums over vocabulary
shards are Megatron's, Shoeybi et al., 2019).

Shape suffixes: n token of one device, c token of a chunk, v column of this device's vocabulary shard, e embed.
"""

import jax
import jax.numpy as jnp
from jax import Array

from model.layers import unembed, unembed_slope
from trainer import sharding
from trainer.parallel.collectives import Collectives
from trainer.state import Program


def make_loss(program: Program):
    """(x, table, targets, weights) -> (total loss, cross-entropy), both float32 scalars, of the rows of one replica.

    Args of the result:
      x: hidden states [b, t, embed].
      table: the parameter of Transformer.output_table, float32.
      targets: [b, t], integers below vocab_size.
      weights: [b, t], float32. The cross-entropy is sum(weights * nats of each token), and the total loss is
        cross-entropy + z_loss * sum(weights * log(Z) ** 2).

    Only the total loss has a gradient (to x and table); the cross-entropy is only for reports.
    """
    axes = program.output_axes
    x_spec, table_spec, tokens, scalar = (
        sharding.spec(names, sharding.REPLICA_RULES) for names in (("batch", "seq", None), axes, ("batch", "seq"), ())
    )

    def by_device(body, out_specs):
        return sharding.by_device(body, program.mesh, (x_spec, table_spec, tokens, tokens), out_specs)

    shard = _Shard(program)
    value = by_device(shard.value, (scalar, scalar))
    with_gradients = by_device(shard.gradients, ((scalar, scalar), (x_spec, table_spec)))

    loss = jax.custom_vjp(value)

    def backward(gradients, cotangents):
        of_total, _ = cotangents
        dx, dtable = gradients
        return (dx * of_total.astype(dx.dtype), dtable * of_total, None, None)

    loss.defvjp(with_gradients, backward)
    return loss


def make_token_scores(program: Program):
    """(x, table, targets) -> (nats of each target, float32; the most likely token, int32), both [b, t], of the rows of
    one replica. The arguments are those of make_loss. Of equally likely tokens the one with the lowest id is taken."""
    x_spec, table_spec, tokens = (
        sharding.spec(names, sharding.REPLICA_RULES)
        for names in (("batch", "seq", None), program.output_axes, ("batch", "seq"))
    )
    shard = _Shard(program)
    return sharding.by_device(shard.scores, program.mesh, (x_spec, table_spec, tokens), (tokens, tokens))


class _Shard:
    """The work of one device, inside shard_map."""

    def __init__(self, program: Program):
        config = program.config
        self.collectives = Collectives(program.mesh)
        self.model = config.model
        self.z_loss = config.z_loss
        self.chunk_tokens = config.loss_chunk_tokens
        self.axes = program.output_axes
        self.embed_axis = self.axes.index("embed")
        self.table = self.axes[0][0] + self.axes[1][0]  # subscripts for einsum: 've' or 'ev'
        self.columns = config.model.padded_vocab_size // program.mesh.shape["tensor"]

    def value(self, x: Array, table: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        w = self.collectives.all_gather_param(table.astype(x.dtype), self.embed_axis)

        def one(sums, chunk):
            return jax.tree.map(jnp.add, sums, self.chunk(w, *chunk)[0]), None

        sums, _ = self.over_chunks(one, (jnp.zeros(()),) * 2, (x, targets, weights))
        return self.over_tokens(sums)

    def gradients(self, x: Array, table: Array, targets: Array, weights: Array):
        w = self.collectives.all_gather_param(table.astype(x.dtype), self.embed_axis)

        def one(carry, chunk):
            sums, dw = carry
            of_chunk, dlogits_cv = self.chunk(w, *chunk)
            dx_ce = jnp.einsum(f"cv,{self.table}->ce", dlogits_cv, w, preferred_element_type=jnp.float32)
            dx_ce = self.collectives.psum(dx_ce, "tensor").astype(x.dtype)
            dw += jnp.einsum(f"cv,ce->{self.table}", dlogits_cv, chunk[0], preferred_element_type=jnp.float32)
            return (jax.tree.map(jnp.add, sums, of_chunk), dw), dx_ce

        zero = ((jnp.zeros(()),) * 2, jnp.zeros(w.shape, jnp.float32))
        (sums, dw), dx = self.over_chunks(one, zero, (x, targets, weights))
        dtable = self.collectives.reduce_scatter_grad(dw, self.embed_axis)
        return self.over_tokens(sums), (dx.reshape(x.shape), dtable)

    def chunk(self, w: Array, x_ce: Array, targets_c: Array, weights_c: Array):
        """((total loss, cross-entropy), gradient of the total loss to the logits [c, v], in the dtype of x)."""
        logits_cv, log_z_c1, is_target_cv, target_c = self.softmax(w, x_ce, targets_c)
        log_z_c = log_z_c1[:, 0]
        loss = jnp.sum(weights_c * (log_z_c - target_c))
        total = loss + self.z_loss * jnp.sum(weights_c * jnp.square(log_z_c)) if self.z_loss else loss
        p_cv = jnp.exp(logits_cv - log_z_c1)
        dlogits_cv = weights_c[:, None] * (p_cv * (1 + 2 * self.z_loss * log_z_c1) - is_target_cv)
        dlogits_cv *= unembed_slope(logits_cv, self.model)
        return (total, loss), dlogits_cv.astype(x_ce.dtype)

    def softmax(self, w: Array, x_ce: Array, targets_c: Array) -> tuple[Array, Array, Array, Array]:
        """The logits [c, v], log(Z) [c, 1], whether a column is the target's [c, v], and the target's logit [c]."""
        first = self.collectives.index("tensor") * self.columns
        logits_cv = unembed(x_ce, w, self.axes, config=self.model, first=first)
        top_c1 = self.collectives.pmax(jnp.max(logits_cv, axis=1, keepdims=True), "tensor")
        exp_sum_c1 = self.collectives.psum(jnp.sum(jnp.exp(logits_cv - top_c1), axis=1, keepdims=True), "tensor")
        log_z_c1 = top_c1 + jnp.log(exp_sum_c1)
        # A comparison picks the target's logit, because only one of the shards has it.
        is_target_cv = first + jnp.arange(self.columns)[None] == targets_c[:, None]
        target_c = self.collectives.psum(jnp.sum(jnp.where(is_target_cv, logits_cv, 0), axis=1), "tensor")
        return logits_cv, log_z_c1, is_target_cv, target_c

    def scores(self, x: Array, table: Array, targets: Array) -> tuple[Array, Array]:
        w = self.collectives.all_gather_param(table.astype(x.dtype), self.embed_axis)

        def one(carry, chunk):
            x_ce, targets_c, _ = chunk
            logits_cv, log_z_c1, _, target_c = self.softmax(w, x_ce, targets_c)
            return carry, (log_z_c1[:, 0] - target_c, self.most_likely(logits_cv))

        _, scores = self.over_chunks(one, (), (x, targets, targets))
        return jax.tree.map(lambda of_token: of_token.reshape(targets.shape), scores)

    def most_likely(self, logits_cv: Array) -> Array:
        """int32 [c], the first of the columns with the largest logit, among those of all shards."""
        own = self.collectives.index("tensor") * self.columns + jnp.argmax(logits_cv, axis=1)
        top_c = jnp.max(logits_cv, axis=1)
        has_top = top_c == self.collectives.pmax(top_c, "tensor")
        return -self.collectives.pmax(-jnp.where(has_top, own, self.model.vocab_size), "tensor").astype(jnp.int32)

    def over_chunks(self, one, carry, tokens: tuple[Array, Array, Array]):
        """Folds `one` over equal chunks of (x, targets, weights): as few as possible, of loss_chunk_tokens at most.

        The last chunk is padded with tokens of weight 0; their number is below the number of chunks.
        """
        x, targets, weights = tokens
        n = targets.size
        chunks = -(-n // (self.chunk_tokens or n))
        padding = -n % chunks

        def split(a: Array) -> Array:
            return jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, -1, *a.shape[1:])

        flat = (x.reshape(n, -1), targets.reshape(-1), weights.reshape(-1))
        carry, of_chunks = jax.lax.scan(one, carry, jax.tree.map(split, flat))
        return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], of_chunks)

    def over_tokens(self, sums):
        return jax.tree.map(lambda s: self.collectives.psum(s, *sharding.TOKEN_AXES), sums)
