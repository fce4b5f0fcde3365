"""How the next token of a text is chosen from its logits: greedy, or drawn from a filtered distribution."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SMALLEST_TEMPERATURE = 1e-30  # dividing logits by this number, or by its inverse, gives finite float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one text are chosen. What is filtered, is filtered in the order of the attributes.

    Attributes:
      repetition_penalty: logits of tokens that the text has are divided by this number if they are positive, otherwise
        multiplied by it (Keskar et al., 2019); 1 changes nothing.
      temperature: divides the logits; 0, or a value too small to divide by in float32, means greedy decoding.
      top_k: keep the k most likely tokens, and ties with the k-th; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probabilities reach p (Holtzman et al., 2020), after
        temperature and top-k; 1 keeps all. The most likely token always stays.
      min_p: keep tokens that are at least this many times as likely as the most likely one (Nguyen et al., 2024).

    Raises:
      ValueError: a value is out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")

        require(1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty", "from 1e-6 to 1e6")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a finite number of 0 or more"
        )
        require(0 <= self.top_k < 2**31, "top_k", "0 or more, and below 2**31")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", "from 0 to 1")


def stacked(choices: Sequence[Sampling]) -> dict[str, np.ndarray]:
    """The fields of Sampling as arrays [b], one element for each text: float32, and int32 for top_k."""
    with np.errstate(over="ignore"):  # a temperature beyond float32 becomes inf
        return {
            field.name: np.array(
                [getattr(one, field.name) for one in choices], np.int32 if field.type is int else np.float32
            )
            for field in dataclasses.fields(Sampling)
        }


def choose(logits: Array, sampling: dict[str, Array], keys: Array, seen: Array) -> tuple[Array, Array]:
    """The next token of each text.

    Args:
      logits: float32 [b, vocab], -inf for tokens that are never chosen.
      sampling: of `stacked`.
      keys: random keys [b].
      seen: bool [b, vocab], the tokens that each text has.

    Returns:
      int32 [b], the tokens; float32 [b], the logarithm of their probabilities before anything was filtered.
    """
    temperature, penalty = sampling["temperature"], sampling["repetition_penalty"][:, None]
    penalised = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = jnp.argmax(penalised, -1).astype(jnp.int32)
    is_greedy = temperature < SMALLEST_TEMPERATURE

    def draw() -> Array:
        filters = {name: sampling[name] for name in ("top_k", "top_p", "min_p")}
        kept = filter_logits(penalised, temperature=jnp.where(is_greedy, 1.0, temperature), **filters)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(is_greedy, greedy, drawn)

    token = jax.lax.cond(is_greedy.all(), lambda: greedy, draw)
    of_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, of_token - jax.nn.logsumexp(logits, axis=-1)


def filter_logits(
    logits: Array, *, temperature: Array | float, top_k: Array | int, top_p: Array | float, min_p: Array | float = 0.0
) -> Array:
    """Logits whose softmax is the distribution to sample from; excluded tokens get -inf.

    The vocabulary is not sorted: the bits of each threshold are found one by one, each with one pass over the logits.

    Args:
      logits: float32 [..., vocab].
      temperature, top_k, top_p, min_p: see Sampling; each is a number, or an array [...]. temperature is above 0.
    """
    rows = logits.shape[:-1]
    temperature, top_k, top_p, min_p = (
        jnp.broadcast_to(x, rows)[..., None] for x in (temperature, top_k, top_p, min_p)
    )
    logits = logits / jnp.clip(temperature, SMALLEST_TEMPERATURE, 1 / SMALLEST_TEMPERATURE)
    limited = (top_k > 0) & (top_k < logits.shape[-1])
    logits = _above(logits, limited, lambda ordered, bound: (ordered > bound).sum(-1, keepdims=True) >= top_k)
    likelihood = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    needed = top_p * likelihood.sum(-1, keepdims=True)

    def enough(ordered: Array, bound: Array) -> Array:
        return jnp.where(ordered > bound, likelihood, 0).sum(-1, keepdims=True) >= needed

    logits = _above(logits, top_p < 1, enough)
    return jnp.where(likelihood < min_p, -jnp.inf, logits)


def _above(logits: Array, rows: Array, enough: Callable[[Array, Array], Array]) -> Array:
    """The logits [..., vocab] of which as few as possible are kept so that there are `enough`: the most likely one, and
    all above a bound.

    Args:
      rows: bool [..., 1], the rows that are changed.
      enough: (numbers [..., vocab] in the order of the logits, a bound [..., 1]) -> whether the tokens above it are
        enough, bool [..., 1]. It holds for all bounds up to one.
    """
    # In uint32 with the order of float32, the bits of the largest bound are found one after another.
    x = jnp.where(logits == 0, 0.0, logits)  # not -0, which has other bits
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def with_bit(i: Array, bound: Array) -> Array:
        higher = bound | (jnp.uint32(1 << 31) >> jnp.uint32(i))
        return jnp.where(enough(ordered, higher), higher, bound)

    lowest = jnp.zeros_like(ordered[..., :1])  # below the number of -inf
    bound = jax.lax.cond(rows.any(), lambda: jax.lax.fori_loop(0, 32, with_bit, lowest), lambda: lowest)
    most_likely = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(rows & (ordered <= bound) & ~most_likely, -jnp.inf, logits)
