"""Linear, norm, feed-forward. Parameters may carry a leading `layers` axis: a stack of layers is one module with arrays
of [num_layers, …], and a scan over it hands each step the same module with that axis sliced off.

Each Param names its logical axes in the metadata `axes`; trainer/sharding.py maps them to the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.config import PROJECTIONS, ModelConfig
from model.context import Context
from model.dropout import NO_DROPOUT, Dropout
from model.partitioner import Partitioner, over_tokens
from model.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Build:
    """What a module's constructor needs.

    Attributes:
      rngs: a `params` stream for the initial values.
      stack: the number of layers that are stacked in one module; None: parameters have no `layers` axis.
      path: the dotted path of the module, by which config.lora chooses projections.
    """

    config: ModelConfig
    rngs: nnx.Rngs
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    stack: int | None = None
    path: str = ""

    @property
    def std(self) -> float:
        """The standard deviation of initial weights."""
        return self.config.init_std

    @property
    def out_std(self) -> float:
        """The standard deviation of initial weights of projections back into the residual stream."""
        return self.std * (2 * self.config.num_layers) ** -0.5 if self.config.init_depth_scale else self.std

    def stacked(self, layers: int) -> "Build":
        """A Build for one module that is a stack of `layers` layers."""
        return dataclasses.replace(self, stack=layers)

    def at(self, name: str) -> "Build":
        """A Build for the attribute `name` of the module."""
        return dataclasses.replace(self, path=f"{self.path}.{name}" if self.path else name)

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
        """A normally distributed parameter with standard deviation `std`, float32 [*shape] or [stack, *shape]."""
        shape, axes = self._with_stack(shape, axes)
        return nnx.Param(std * jax.random.normal(self.rngs.params(), shape), axes=axes)

    def constant(self, value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        shape, axes = self._with_stack(shape, axes)
        return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)

    def _with_stack(self, shape: tuple[int, ...], axes: tuple[str | None, ...]):
        return (shape, axes) if self.stack is None else ((self.stack, *shape), ("layers", *axes))


class Lora(nnx.Module):
    """What an adapter adds to a projection: alpha / rank dropout(x) A B. B is 0 at first."""

    def __init__(self, build: Build, in_dim: int, out_dim: int, axes: tuple[str, str]):
        config = build.config.lora
        self.partitioner = build.partitioner
        self.axes = axes
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.number = PROJECTIONS.index(build.path)
        # The variance of PEFT's uniform numbers between -1 / sqrt(in) and 1 / sqrt(in).
        self.a = build.normal((in_dim, config.rank), (axes[0], None), (3 * in_dim) ** -0.5)
        self.b = build.constant(0.0, (config.rank, out_dim), (None, axes[1]))

    def __call__(self, x: Array, flat: Array, dropout: Dropout) -> Array:
        """x [b, t, in], which is also given as `flat`, to [b, t, out]; `dropout` is that of the layer."""
        own = dropout.of_adapter(self.dropout, self.number)
        flat = flat if own.key is None else self.partitioner.flatten(own(x))
        low = self.partitioner.linear(flat, self.a[...], (self.axes[0], None))
        y = self.scale * self.partitioner.linear(low, self.b[...], (None, self.axes[1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Linear(nnx.Module):
    """y = x W (+ b) over the last axis of x [b, t, in], and what an adapter adds; W has the shape (in, out)."""

    def __init__(
        self, build: Build, in_dim: int, out_dim: int, axes: tuple[str, str], *, bias: bool, std: float | None = None
    ):
        self.partitioner = build.partitioner
        self.axes = axes
        self.kernel = build.normal((in_dim, out_dim), axes, build.std if std is None else std)
        self.bias = build.constant(0.0, (out_dim,), axes[1:]) if bias else None
        self.lora = Lora(build, in_dim, out_dim, axes) if build.config.lora.adapts(build.path) else None

    def __call__(self, x: Array, dropout: Dropout = NO_DROPOUT) -> Array:
        return project(x, self, dropout=dropout)[0]


def project(x: Array, *linears: Linear, dropout: Dropout = NO_DROPOUT) -> list[Array]:
    """The output of each of `linears` for one input [b, t, in]; the backward pass keeps one flattened copy of it.

    `dropout` is that of the layer; adapters use its key.
    """
    flat = linears[0].partitioner.flatten(x)

    def one(linear: Linear) -> Array:
        y = linear.partitioner.linear(flat, linear.kernel[...], linear.axes)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if linear.lora is not None:
            y = y + linear.lora(x, flat, dropout)
        if linear.bias is None:
            return y
        # Added after the reshape: XLA keeps a sum in float32 for the next addition, but not across a reshape.
        return linear.partitioner.add_bias(y, linear.bias[...], linear.axes[1:])

    return [one(linear) for linear in linears]


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm over the last axis, computed in float32.

    Args:
      size, axis: the size and logical axis of the last axis; a size of None is embed_dim.
    """

    def __init__(self, build: Build, size: int | None = None, axis: str | None = "embed"):
        config = build.config
        size = config.embed_dim if size is None else size
        self.partitioner = build.partitioner
        self.axis = axis
        self.eps = config.norm_eps
        self.centre = config.norm == "layernorm"
        self.plus_one = config.norm_plus_one
        self.scale = build.constant(0.0 if self.plus_one else 1.0, (size,), (axis,))
        self.bias = build.constant(0.0, (size,), (axis,)) if self.centre and config.bias else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.centre:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        scale = self._over_tokens(self.scale, y)
        y = y * (1 + scale if self.plus_one else scale)
        if self.bias is not None:
            y = y + self._over_tokens(self.bias, y)
        return y.astype(x.dtype)

    def _over_tokens(self, param: nnx.Param, y: Array) -> Array:
        return over_tokens(self.partitioner.gather_param(param[...], (self.axis,), y.dtype), y)


def _exact_gelu(h: Array) -> Array:
    return jax.nn.gelu(h, approximate=False)


ACTIVATIONS = {  # the keys are values of ModelConfig.mlp
    "swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "geglu_exact": _exact_gelu, "glu": jax.nn.sigmoid,
    "gelu": jax.nn.gelu, "gelu_exact": _exact_gelu, "silu": jax.nn.silu, "relu2": lambda h: jnp.square(jax.nn.relu(h)),
}  # fmt: skip


class MLP(nnx.Module):
    """Feed-forward: act(x W_gate) * (x W_up) W_down for the gated kinds, act(x W_up) W_down for the others."""

    def __init__(self, build: Build):
        config = build.config
        embed, hidden, bias = config.embed_dim, config.mlp_size, config.has_bias(config.mlp_bias)
        self.partitioner = build.partitioner
        self.kind = config.mlp
        self.up = Linear(build.at("up"), embed, hidden, ("embed", "mlp"), bias=bias)
        self.gate = Linear(build.at("gate"), embed, hidden, ("embed", "mlp"), bias=bias) if config.gated else None
        self.down = Linear(build.at("down"), hidden, embed, ("mlp", "embed"), bias=bias, std=build.out_std)

    def __call__(self, x: Array, ctx: Context) -> Array:
        activation = ACTIVATIONS[self.kind]
        if self.gate is None:
            hidden = activation(self.up(x, ctx.dropout))
        else:
            up, gate = project(x, self.up, self.gate, dropout=ctx.dropout)
            hidden = activation(gate) * up
        return self.down(self.partitioner.constrain(hidden, ("batch", "seq", "mlp")), ctx.dropout)


def unembed(
    x: Array, w: Array | Quantized, axes: tuple[str, str], *, config: ModelConfig, first: Array | int = 0
) -> Array:
    """The logits of hidden states. The loss, evaluation and sampling all use this function.

    Args:
      x: [..., embed].
      w: the output table, or a shard of its vocabulary that begins with token `first`, in the dtype of x.
      axes: the logical axes of w, ('vocab', 'embed') or ('embed', 'vocab').

    Returns:
      float32 [..., tokens of w], -inf for tokens from config.vocab_size on.
    """
    table, values = axes[0][0] + axes[1][0], w.values if isinstance(w, Quantized) else w  # 've' or 'ev'
    logits = jnp.einsum(f"...e,{table}->...v", x, values, preferred_element_type=jnp.float32)
    if isinstance(w, Quantized):
        logits = w.scaled(logits)
    if (cap := config.logits_softcap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    token = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(token < config.vocab_size, logits, -jnp.inf)


def unembed_slope(logits: Array, config: ModelConfig) -> Array | float:
    """The derivative of unembed's logits by the uncapped ones: 1 without a cap; with one, 0 for tokens of -inf."""
    cap = config.logits_softcap
    return 1.0 if cap is None else 1 - jnp.square(jnp.maximum(logits, -cap) / cap)
