"""Linear, norm, feed-forward. Parameters may carry a leading `layers` axis: a stack of layers is one module with arrays
of [num_layers, …], and a scan over it hands each step the same module with that axis sliced off.

Each Param names its logical axes in the metadata `axes`; trainer/sharding.py maps them to the mesh.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.config import ModelConfig
from model.partitioner import Placement


def param(rngs: nnx.Rngs, std: float, shape: tuple[int, ...], axes: tuple[str, ...], stack: int | None) -> nnx.Param:
    """Normal with deviation `std`, float32; stacked to [stack, *shape] unless `stack` is None."""
    if stack is not None:
        shape, axes = (stack, *shape), ("layers", *axes)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...], stack: int | None) -> nnx.Param:
    if stack is not None:
        shape, axes = (stack, *shape), ("layers", *axes)
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """y = x W (+ b) over the last axis of x [..., in], W of shape (in, out)."""

    def __init__(
        self, rngs: nnx.Rngs, in_dim: int, out_dim: int, axes: tuple[str, str],
        *, std: float, bias: bool, stack: int | None,
    ):  # fmt: skip
        self.axes = axes
        self.kernel = param(rngs, std, (in_dim, out_dim), axes, stack)
        self.bias = constant(0.0, (out_dim,), axes[1:], stack) if bias else None

    def __call__(self, x: Array, placement: Placement) -> Array:
        return placement.linear(x, self.kernel[...], None if self.bias is None else self.bias[...], self.axes)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm over the last axis, computed in float32."""

    def __init__(self, config: ModelConfig, stack: int | None):
        self.eps, self.centre = config.norm_eps, config.norm == "layernorm"
        self.scale = constant(1.0, (config.embed_dim,), ("embed",), stack)
        self.bias = constant(0.0, (config.embed_dim,), ("embed",), stack) if self.centre and config.bias else None

    def __call__(self, x: Array, placement: Placement) -> Array:
        y = x.astype(jnp.float32)
        if self.centre:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        y = y * placement.weight(self.scale[...], ("embed",), y.dtype)
        if self.bias is not None:
            y = y + placement.weight(self.bias[...], ("embed",), y.dtype)
        return y.astype(x.dtype)


class MLP(nnx.Module):
    """Feed-forward: act(x W_gate) * (x W_up) W_down for the gated kinds, act(x W_up) W_down for the others."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, std: float, out_std: float, stack: int | None):
        embed, hidden, bias = config.embed_dim, config.hidden_dim, config.bias
        self.kind = config.mlp
        self.up = Linear(rngs, embed, hidden, ("embed", "mlp"), std=std, bias=bias, stack=stack)
        self.gate = (
            Linear(rngs, embed, hidden, ("embed", "mlp"), std=std, bias=bias, stack=stack) if config.gated else None
        )
        self.down = Linear(rngs, hidden, embed, ("mlp", "embed"), std=out_std, bias=bias, stack=stack)

    def __call__(self, x: Array, placement: Placement) -> Array:
        activation = {
            "swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "glu": jax.nn.sigmoid,
            "gelu": jax.nn.gelu, "relu2": lambda h: jnp.square(jax.nn.relu(h)),
        }[self.kind]  # fmt: skip
        up = self.up(x, placement)
        hidden = activation(up) if self.gate is None else activation(self.gate(x, placement)) * up
        return self.down(placement.constrain(hidden, (*(("batch", "seq")[: x.ndim - 1]), "mlp")), placement)
