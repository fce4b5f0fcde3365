"""Rotary position embedding (Su et al., 2021) and its scaled forms for texts longer than the original context."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotation of the queries and keys of a layer.

    Attributes:
      theta: the base of the frequencies.
      size: how many dimensions of a head, the first ones, are rotated; even.
      scaling: how the frequencies are changed for longer texts.
    """

    theta: float
    size: int
    scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)

    def __call__(self, x_bthd: Array, positions: Array) -> Array:
        """Rotates halves, as GPT-NeoX and Hugging Face's Llama do. Computes in float32 for any dtype of x.

        Args:
          x_bthd: [b, t, h, d].
          positions: int32 [b, t] or [1, t].
        """
        angle = positions[:, :, None, None].astype(jnp.float32) * self.frequencies()[None, None, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if (factor := self.attention_factor) != 1:
            cos, sin = cos * factor, sin * factor
        rotated, kept = x_bthd[..., : self.size], x_bthd[..., self.size :]
        first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate([*parts, kept] if kept.shape[-1] else parts, axis=-1).astype(x_bthd.dtype)

    @property
    def attention_factor(self) -> float:
        """YaRN's factor of queries and keys (Peng et al., 2023, section 3.4); 1 for other kinds of scaling."""
        if self.scaling.kind != "yarn":
            return 1.0
        factor = self.scaling.attention_factor
        return 0.1 * math.log(self.scaling.factor) + 1 if factor is None else factor

    def frequencies(self) -> Array:
        """Radians per position, float32 [size / 2]."""
        half = self.size // 2
        frequency = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.scaling.kind == "none":
            return frequency
        kept = self._kept(frequency)
        return (1 - kept) * frequency / self.scaling.factor + kept * frequency

    def _kept(self, frequency: Array) -> Array:
        """The share of each frequency that is kept; the rest is divided by the factor."""
        if self.scaling.kind == "llama3":
            return self._kept_llama3(frequency)
        return self._kept_yarn(frequency) if self.scaling.kind == "yarn" else jnp.zeros_like(frequency)

    def _kept_llama3(self, frequency: Array) -> Array:
        """Llama 3.1's rule (Grattafiori et al., 2024), by how many waves fit into the original length."""
        scaling = self.scaling
        waves = scaling.original_len * frequency / (2 * math.pi)
        between = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return jnp.clip(between, 0, 1)

    def _kept_yarn(self, frequency: Array) -> Array:
        """YaRN's ramp over the dimensions (Peng et al., 2023, section 3.2), as Hugging Face computes its bounds."""
        scaling = self.scaling

        def dimension(turns: float) -> float:
            """The dimension that turns `turns` times within the original length."""
            return self.size * math.log(scaling.original_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        width = high - low or 0.001
        return 1 - jnp.clip((jnp.arange(len(frequency), dtype=jnp.float32) - low) / width, 0, 1)


def rope_of(config: ModelConfig, *, local: bool) -> Rope:
    """The Rope of a local or global layer. local_rope_theta is chosen for a window, so rope_scaling does not apply."""
    if local and config.local_rope_theta:
        return Rope(config.local_rope_theta, config.rotated_size)
    return Rope(config.rope_theta, config.rotated_size, config.rope_scaling)
