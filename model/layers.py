"""Linear, norm, feed-forward. Parameters may carry a leading `layers` axis: a stack of layers is one module with arrays
of [num_layers, …], and a scan over it hands each step the same module with that axis sliced off.

Each Param names its logical axes in the metadata `axes`; trainer/sharding.py maps them to the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.config import ModelConfig
from model.context import Context
from model.partitioner import Partitioner, over_tokens

INIT_STD = 0.02  # GPT-2's; projections back into the residual stream use INIT_STD / sqrt(2 num_layers)


@dataclasses.dataclass(frozen=True)
class Build:
    """What modules are built with.

    Attributes:
      rngs: a `params` stream for the initial values.
      stack: layers that are one module; None: no `layers` axis.
      std: deviation of the initial weights.
    """

    config: ModelConfig
    rngs: nnx.Rngs
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    stack: int | None = None
    std: float = INIT_STD

    @property
    def out_std(self) -> float:
        """That of projections back into the residual stream."""
        return self.std * (2 * self.config.num_layers) ** -0.5

    def stacked(self, layers: int) -> "Build":
        """That of a stack of so many layers as one module."""
        return dataclasses.replace(self, stack=layers)

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
        """Normal with deviation `std`, float32 [*shape], or [stack, *shape]."""
        shape, axes = self._with_stack(shape, axes)
        return nnx.Param(std * jax.random.normal(self.rngs.params(), shape), axes=axes)

    def constant(self, value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        shape, axes = self._with_stack(shape, axes)
        return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)

    def _with_stack(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return (shape, axes) if self.stack is None else ((self.stack, *shape), ("layers", *axes))


class Linear(nnx.Module):
    """y = x W (+ b) over the last axis of x [b, t, in], W of shape (in, out)."""

    def __init__(
        self, build: Build, in_dim: int, out_dim: int, axes: tuple[str, str], *, bias: bool, std: float | None = None
    ):
        self.partitioner = build.partitioner
        self.axes = axes
        self.kernel = build.normal((in_dim, out_dim), axes, build.std if std is None else std)
        self.bias = build.constant(0.0, (out_dim,), axes[1:]) if bias else None

    def __call__(self, x: Array) -> Array:
        return project(x, self)[0]


def project(x: Array, *linears: Linear) -> list[Array]:
    """Each of `linears` on the same input [b, t, in], of which the backward pass keeps one flattened copy."""
    flat = linears[0].partitioner.flatten(x)

    def one(linear: Linear) -> Array:
        y = linear.partitioner.linear(flat, linear.kernel[...], linear.axes)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if linear.bias is None:
            return y
        # After the reshape: XLA keeps a sum in float32 for what is added next, but not through a reshape.
        return linear.partitioner.add_bias(y, linear.bias[...], linear.axes[1:])

    return [one(linear) for linear in linears]


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm over the last axis, computed in float32."""

    def __init__(self, build: Build):
        config = build.config
        self.partitioner = build.partitioner
        self.eps = config.norm_eps
        self.centre = config.norm == "layernorm"
        self.scale = build.constant(1.0, (config.embed_dim,), ("embed",))
        self.bias = build.constant(0.0, (config.embed_dim,), ("embed",)) if self.centre and config.bias else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.centre:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        y = y * self._of_embed(self.scale, y)
        if self.bias is not None:
            y = y + self._of_embed(self.bias, y)
        return y.astype(x.dtype)

    def _of_embed(self, param: nnx.Param, y: Array) -> Array:
        return over_tokens(self.partitioner.gather_param(param[...], ("embed",), y.dtype), y)


class MLP(nnx.Module):
    """Feed-forward: act(x W_gate) * (x W_up) W_down for the gated kinds, act(x W_up) W_down for the others."""

    def __init__(self, build: Build):
        config = build.config
        embed, hidden, bias = config.embed_dim, config.mlp_size, config.bias
        self.partitioner = build.partitioner
        self.kind = config.mlp
        self.up = Linear(build, embed, hidden, ("embed", "mlp"), bias=bias)
        self.gate = Linear(build, embed, hidden, ("embed", "mlp"), bias=bias) if config.gated else None
        self.down = Linear(build, hidden, embed, ("mlp", "embed"), bias=bias, std=build.out_std)

    def __call__(self, x: Array, ctx: Context) -> Array:
        activation = {
            "swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "glu": jax.nn.sigmoid,
            "gelu": jax.nn.gelu, "relu2": lambda h: jnp.square(jax.nn.relu(h)),
        }[self.kind]  # fmt: skip
        if self.gate is None:
            hidden = activation(self.up(x))
        else:
            up, gate = project(x, self.up, self.gate)
            hidden = activation(gate) * up
        return self.down(self.partitioner.constrain(hidden, ("batch", "seq", "mlp")))


def unembed(x: Array, w: Array, axes: tuple[str, str], *, vocab_size: int, first: Array | int = 0) -> Array:
    """The logits of hidden states: the one head, of the loss, of evaluation and of sampling.

    Args:
      x: [..., embed].
      w: the output table, or the shard of its vocabulary that begins with token `first`, in the type of x.
      axes: its logical axes, ('vocab', 'embed') or ('embed', 'vocab').

    Returns:
      float32 [..., tokens of w], -inf for tokens from vocab_size on.
    """
    table = axes[0][0] + axes[1][0]  # 've' or 'ev'
    logits = jnp.einsum(f"...e,{table}->...v", x, w, preferred_element_type=jnp.float32)
    token = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(token < vocab_size, logits, -jnp.inf)
