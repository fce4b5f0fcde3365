"""Embeddings on shards of the table: each device looks its own tokens up and scatters their gradients itself."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from trainer import sharding
from trainer.parallel.collectives import Collectives


def embed(table: Array, ids: Array, *, mesh: Mesh, axes: tuple[str, str], dtype: jnp.dtype) -> Array:
    """The rows `ids` [b, t] of `table` [n, embed], a parameter with logical axes `axes`, in `dtype`: [b, t, embed].

    The gradient of a row is the sum over all tokens that looked it up, thousands in a batch for a frequent token, so it
    is computed in float32, whatever `dtype` is. The compiler would split that sum along `embed`, and then every device
    would need the gradients of the whole batch.
    """
    collectives = Collectives(mesh)
    split = sharding.RULES[axes[0]]  # the mesh axis that splits rows: tensor for a vocabulary, None for positions
    assert split is None or isinstance(split, str)
    rows = table.shape[0] // (mesh.shape[split] if split else 1)
    tokens, results, of_table = (
        sharding.spec(names, sharding.REPLICA_RULES) for names in (("batch", "seq"), ("batch", "seq", None), axes)
    )

    def local(ids: Array) -> tuple[Array, Array | bool]:
        """Indices into this device's rows, and which of `ids` are among them."""
        if split is None or mesh.shape[split] == 1:
            return ids, True
        ids = ids - collectives.index(split) * rows
        inside = (ids >= 0) & (ids < rows)
        return jnp.where(inside, ids, 0), inside[..., None]

    def gather(table: Array, ids: Array) -> Array:
        at, inside = local(ids)
        found = jnp.where(inside, collectives.all_gather_param(table.astype(dtype), axis=1)[at], 0)
        return collectives.psum(found, split) if split else found

    def scatter(g: Array, ids: Array) -> Array:
        at, inside = local(ids)
        sums = jnp.zeros((rows, g.shape[-1]), jnp.float32).at[at].add(jnp.where(inside, g.astype(jnp.float32), 0))
        return collectives.reduce_scatter_grad(sums, axis=1)

    gather_all = sharding.by_device(gather, mesh, (of_table, tokens), results)
    scatter_all = sharding.by_device(scatter, mesh, (results, tokens), of_table)
    looked_up = jax.custom_vjp(gather_all)
    looked_up.defvjp(lambda table, ids: (gather_all(table, ids), ids), lambda ids, g: (scatter_all(g, ids), None))
    return looked_up(table, ids)
