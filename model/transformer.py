"""The decoder-only transformer: embedding, a stack of blocks, norm, head. docs/models.md lists its switches."""

import functools
import itertools
import operator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from model.attention import Attention, Cache, LayerCache
from model.config import LoraConfig, ModelConfig
from model.context import Aux, Context
from model.dropout import Dropout
from model.layers import MLP, Build, Linear, Norm, unembed
from model.partitioner import Partitioner

T = TypeVar("T")
LAYER_INPUT = "layer_input"  # a name for jax.checkpoint's policies


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with norms where ModelConfig.norm_at has them.

    If build.stack is set, one module holds that many blocks.
    """

    def __init__(self, build: Build):
        self.partitioner = build.partitioner
        self.parallel = build.config.parallel
        before, after = (build.config.norm_at in (place, "both") for place in ("before", "after"))
        self.attention_norm = Norm(build) if before else None
        self.attention = Attention(build.at("attention"))
        self.attention_post_norm = Norm(build) if after else None
        self.mlp_norm = Norm(build) if before else None
        self.mlp = MLP(build.at("mlp"))
        self.mlp_post_norm = Norm(build) if after else None

    def __call__(self, x: Array, ctx: Context, cache: LayerCache | None = None) -> tuple[Array, LayerCache | None]:
        x = checkpoint_name(x, LAYER_INPUT)
        weights, attended, fed = ctx.dropout.split(3)
        with jax.named_scope("attention"):
            y, cache = self.attention(_normed(self.attention_norm, x), ctx.with_dropout(weights), cache)
            y = attended(_normed(self.attention_post_norm, y))
        between = self._residual(x + y)
        with jax.named_scope("mlp"):
            z = self.mlp(_normed(self.mlp_norm, x if self.parallel else between), ctx)
            z = fed(_normed(self.mlp_post_norm, z))
        return self._residual(between + z), cache

    def _residual(self, x: Array) -> Array:
        return self.partitioner.constrain(x, ("batch", "seq", None))


def _normed(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Transformer(nnx.Module):
    """Token ids to logits.

    Args:
      config: its vocab_size and max_seq_len must be set.
      rngs: a `params` stream for the initial values.
      partitioner: lays out the parameters and activations; None: a single device.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, partitioner: Partitioner | None = None):
        if not config.vocab_size or not config.max_seq_len:
            raise ValueError("model.vocab_size and model.max_seq_len must be set before a Transformer is built")
        vocab, embed = config.padded_vocab_size, config.embed_dim
        self.config = config
        self.partitioner = partitioner or Partitioner()
        build = Build(config, rngs, self.partitioner)
        self.embedding = build.normal((vocab, embed), ("vocab", "embed"), build.std)
        self.position = (
            build.normal((config.max_seq_len, embed), ("position", "embed"), build.std)
            if config.position == "learned"
            else None
        )
        self.layers = Block(build.stacked(config.num_layers).at("layers"))
        self.norm = Norm(build)
        self.head = None if config.tie_embeddings else Linear(build, embed, vocab, ("embed", "vocab"), bias=False)

    def __call__(
        self, inputs: Array, *, logits_at: Array | None = None, cache: Cache | None = None, **arguments
    ) -> tuple[Array, Cache | None]:
        """Logits of the next token after each input.

        Args:
          inputs, cache, arguments: see `hidden`.
          logits_at: int32 [b], the position along t of each row whose logits are wanted; the result then has t = 1.

        Returns:
          logits float32 [b, t, padded_vocab_size], -inf beyond vocab_size; the new cache.
        """
        x, _, cache = self.hidden(inputs, cache=cache, **arguments)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        w = self.partitioner.gather_param(self.output_table(), self.output_axes, x.dtype)
        logits = unembed(x, w, self.output_axes, config=self.config)
        return self.partitioner.constrain(logits, ("batch", "seq", "vocab")), cache

    @property
    def output_axes(self) -> tuple[str, str]:
        """The logical axes of output_table."""
        return ("vocab", "embed") if self.head is None else ("embed", "vocab")

    def output_table(self) -> Array:
        """The parameter that maps hidden states to logits, float32."""
        return self.embedding[...] if self.head is None else self.head.kernel[...]

    def hidden(
        self,
        inputs: Array,
        *,
        index: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: Cache | None = None,
        keep: bool = False,
        dropout_rate: Array | float = 0.0,
        dropout_key: Array | None = None,
    ) -> tuple[Array, Aux, Cache | None]:
        """The hidden states from which the head computes logits: the normalised residual stream after the last layer.

        Args:
          inputs: integer [b, t], ids below vocab_size.
          index: int32 [t], the index of each input in its row; None: 0, 1, …. It may be in another order only if that
            is the partitioner's order. With a cache that holds the tokens before: [b, t].
          positions: int32 [b, t], the position of each input in its document; None: its index.
          segment_ids: int32 [b, t], the document of each input: no token sees another document. None: a row is one
            document. It cannot be combined with a cache.
          cache: see attention.empty_cache; gains the keys and values of `inputs`.
          keep: without a cache, whether to return the keys and values of `inputs` as one of length t.
          dropout_rate, dropout_key: the rate, and the random key; without a key nothing is dropped.

        Returns:
          [b, t, embed]; what the layers report; the new cache.
        """
        config = self.config
        if inputs.shape[1] > config.max_seq_len:  # learned positions would be clamped silently
            raise ValueError(f"{inputs.shape[1]} tokens are more than model.max_seq_len = {config.max_seq_len}")
        if segment_ids is not None and cache is not None:
            raise ValueError("a cache holds one document a row; segment_ids cannot be given with it")
        index = jnp.arange(inputs.shape[1], dtype=jnp.int32) if index is None else index
        positions = jnp.atleast_2d(index) if positions is None else positions
        dropout = Dropout(dropout_rate, dropout_key, self.partitioner.bernoulli)
        of_embedding, of_layers = dropout.split(2)
        ctx = Context(index, positions, segment_ids, of_layers, keep=keep)
        x = of_embedding(self._embed(inputs, positions))
        x, aux, cache = self._layers(self.partitioner.constrain(x, ("batch", "seq", None)), ctx, cache)
        with jax.named_scope("norm"):
            return self.norm(x), aux, cache

    def _embed(self, inputs: Array, positions: Array) -> Array:
        dtype = jnp.dtype(self.config.dtype)
        with jax.named_scope("embedding"):
            x = self.partitioner.embed(self.embedding[...], inputs, ("vocab", "embed"), dtype)
            if self.config.embedding_scale is not None:
                x = x * jnp.asarray(self.config.embedding_scale, dtype)
            if self.position is None:
                return x
            positions = jnp.broadcast_to(positions, inputs.shape)
            return x + self.partitioner.embed(self.position[...], positions, ("position", "embed"), dtype)

    def _layers(self, x: Array, ctx: Context, cache: Cache | None) -> tuple[Array, Aux, Cache | None]:
        """Runs the layers: one period of the layer pattern is compiled and looped over, or all layers are unrolled, as
        they always are with a cache, which would be copied at each turn of a loop. The parameters are stacked in all
        cases, so that checkpoints are the same; for generation they may also be `separate`."""
        config = self.config
        graph, stacked = nnx.split(self.layers)
        key = ctx.dropout.key
        keys = None if key is None else jax.random.split(key, config.num_layers)

        def layer(x: Array, of_layer, local: bool):
            params, layer_cache, key = of_layer
            layer_ctx = ctx.of_layer(key, local=local)
            x, layer_cache = nnx.merge(graph, params)(x, layer_ctx, layer_cache)
            return x, (layer_cache, layer_ctx.aux)

        if cache is None and not _is_separate(stacked):
            x, (kept, aux) = _over_layers(config, layer, self.partitioner, x, (stacked, None, keys))
            cache = tuple(_nth(kept, i) for i in range(config.num_layers)) if ctx.keep else None
        else:
            results = []
            for i, local in enumerate(config.local_layers):
                of_layer = (_nth(stacked, i), None if cache is None else cache[i], None if keys is None else keys[i])
                x, result = layer(x, of_layer, local)
                results.append(result)
            caches, reports = zip(*results, strict=True)
            cache = caches if ctx.keep or cache is not None else None
            aux = jax.tree.map(lambda *each: jnp.stack(each), *reports)
        losses = {name: values.sum() for name, values in aux.losses.items()}
        return x, Aux(losses, {name: values.mean() for name, values in aux.metrics.items()}), cache


def separate(params: dict, config: ModelConfig) -> dict:
    """Parameters, all or some, whose layers are not stacked: each of "layers" is a tuple of arrays, one a layer."""
    layers = {"layers": params["layers"]} if "layers" in params else {}
    return params | jax.tree.map(lambda leaf: tuple(leaf[i] for i in range(config.num_layers)), layers)


def merged(params: dict, lora: LoraConfig) -> dict:
    """Parameters, all or some, with adapters that are added to their projections: W + alpha / rank A B, float32."""
    flat = traverse_util.flatten_dict(params, sep=".")
    base = without_adapters(flat)
    for path in flat.keys() - base.keys():
        if path.endswith(".lora.a"):
            projection = path.removesuffix(".lora.a")
            product = jnp.matmul(flat[path], flat[f"{projection}.lora.b"], precision="highest")
            base[f"{projection}.kernel"] = base[f"{projection}.kernel"] + lora.alpha / lora.rank * product
    return traverse_util.unflatten_dict(base, sep=".")


def without_adapters(by_path: dict[str, T]) -> dict[str, T]:
    """The entries, by dotted paths of parameters, that are not an adapter's."""
    return {path: value for path, value in by_path.items() if ".lora." not in path}


def _is_separate(layers) -> bool:
    return any(isinstance(leaf, tuple) for leaf in jax.tree.leaves(layers, is_leaf=_is_tuple))


def _is_tuple(x) -> bool:
    return isinstance(x, tuple)


def _nth(layers, i: int):
    """The i-th of layers that are stacked or separate."""
    return jax.tree.map(operator.itemgetter(i), layers, is_leaf=_is_tuple)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by dotted path: tables with their padding, layers stacked."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
    return {".".join(map(str, path)): v.get_value().shape for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _over_layers(config: ModelConfig, layer, partitioner: Partitioner, x: Array, of_layers):
    """Folds layer(x, a layer's slice of of_layers, whether it is local) over the layers, as jax.lax.scan does."""
    plan = turns(config.local_layers)
    if len(plan) == 1:
        return _loop(config, layer, partitioner, x, of_layers, turn=plan[0])
    results, begin = [], 0
    for kinds, count in plan:
        part = slice(begin, begin := begin + len(kinds) * count)
        of_part = jax.tree.map(lambda a, part=part: a[part], of_layers)
        x, result = _loop(config, layer, partitioner, x, of_part, turn=(kinds, count))
        results.append(result)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)


def _loop(config: ModelConfig, layer, partitioner: Partitioner, x: Array, of_layers, *, turn):
    """_over_layers for layers that are equal turns; `turn`: (kinds of the layers of a turn, number of turns)."""
    kinds, count = turn
    of_kind = {
        local: _remat(config, functools.partial(layer, local=local), partitioner) for local in sorted(set(kinds))
    }
    unroll = 1 if config.scan_layers else count
    if len(kinds) == 1:
        return jax.lax.scan(of_kind[kinds[0]], x, of_layers, unroll=unroll)

    def one_turn(x: Array, of_turn):
        results = []
        for i, local in enumerate(kinds):
            x, result = of_kind[local](x, jax.tree.map(operator.itemgetter(i), of_turn))
            results.append(result)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *results)

    of_turns = jax.tree.map(lambda a: a.reshape(count, len(kinds), *a.shape[1:]), of_layers)
    x, result = jax.lax.scan(one_turn, x, of_turns, unroll=unroll)
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), result)


def turns(local: tuple[bool, ...]) -> list[tuple[tuple[bool, ...], int]]:
    """Layers as equal turns that a loop repeats, and a rest: [(kinds of the layers of a turn, number of turns)].

    The shortest period is taken, for example five local layers and a global one. If there is no period, each run of
    equal layers is a loop.
    """
    layers = len(local)
    for period in range(1, layers // 2 + 1):
        if all(local[i] == local[i - period] for i in range(period, layers)):
            whole = layers - layers % period
            rest = [(local[whole:], 1)] if whole < layers else []
            return [(local[:period], whole // period), *rest]
    return [((kind,), len(list(run))) for kind, run in itertools.groupby(local)]


def _remat(config: ModelConfig, layer, partitioner: Partitioner):
    """`layer` with config.remat's choice of what is kept for the backward pass."""
    policies = jax.checkpoint_policies
    if config.remat in ("none", "attention"):
        if not partitioner.gathers_params:
            return layer
        policy = _all_but_constrained
    elif config.remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    elif config.remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    else:
        policy = None
    # A compiled loop already keeps the recomputation from being merged with the forward pass; an unrolled one does not.
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=not config.scan_layers)(layer)


def _all_but_constrained(primitive, *_, **__) -> bool:
    """Saves everything except outputs of sharding constraints, so that gathered weights are gathered again in the
    backward pass. (Activations are kept as they were before their constraint.)"""
    return primitive.name != "sharding_constraint"
