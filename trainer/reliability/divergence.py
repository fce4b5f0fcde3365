"""Which steps go wrong, decided on the device so that a bad update is never applied; the loop acts on the metrics.

The guard is part of the training state: a flat dict of scalars, the same on every device. It has the mean and variance
of the loss and of the logarithm of the gradient norm over the good steps, and remembers `window` of them: the plain
mean and variance of the first `window` (Welford, 1962), then exponential ones, so that no start value has to fade.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from trainer.config import DivergenceConfig

# Both values are logarithms (the loss is that of the perplexity), so one floor serves: steps that agree to a hundredth
# are flat, and what then rises by less than spike_z hundredths is rounding or chance, whatever multiple it is.
STD_FLOOR = 0.01
# A larger loss counts as this one: its square is still finite in float32.
LARGEST = 1e18


CONTINUE, SKIP, ROLLBACK, STOP = "continue", "skip", "rollback", "stop"  # the last three: values of config.divergence


class Verdict(NamedTuple):
    """What the loop does about a step, and why: CONTINUE, SKIP (the device left its update out), ROLLBACK or STOP."""

    action: str
    reason: str = ""


def needs_guard(config: DivergenceConfig) -> bool:
    """Whether steps are judged on the device. If not, one that is not finite stops the run: that needs no guard."""
    return config.spike != "ignore" or config.not_finite == "skip"


def init_guard(config: DivergenceConfig) -> dict[str, Array]:
    """The guard before the first step: float32 and int32 scalars; {} where none is needed.

    The same whatever the config that needs one, so that a checkpoint fits any of its values.
    """
    if not needs_guard(config):
        return {}
    counts = {name: jnp.zeros((), jnp.int32) for name in ("good", "bad_in_a_row")}  # good: steps in the statistics
    return counts | {f"{of}_{what}": jnp.zeros(()) for of in ("loss", "grad_norm") for what in ("mean", "var")}


def judge(
    config: DivergenceConfig, guard: dict[str, Array], loss: Array, grad_norm: Array
) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """The guard after a step, whether the step is bad (bool), and metrics.

    Bad is what is not finite, whatever is to happen then, and with config.spike what stands out by more than spike_z
    standard deviations. It does not enter the statistics.

    Args:
      loss: nats a token, float32.
      grad_norm: before clipping, float32.

    Returns metrics:
      train/skipped: 1.0 where the step is bad.
      train/loss_z, train/grad_norm_z: standard deviations above the mean; 0 where there are none to tell: before
        `window` good steps, and in a step that is not finite.
      train/bad_in_a_row: int32, bad steps up to and with this one.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    known = finite & (guard["good"] >= config.window)
    gain = 1 / jnp.minimum(guard["good"] + 1, config.window).astype(jnp.float32)
    after, z = {"good": guard["good"] + 1}, {}
    logs = {
        "loss": jnp.clip(loss, -LARGEST, LARGEST),
        "grad_norm": jnp.log(jnp.maximum(grad_norm, jnp.finfo(jnp.float32).tiny)),  # a gradient of zeros is finite
    }
    for name, x in logs.items():
        mean, var = guard[f"{name}_mean"], guard[f"{name}_var"]
        z[name] = jnp.where(known, (x - mean) / jnp.maximum(jnp.sqrt(var), STD_FLOOR), 0)
        after[f"{name}_mean"] = mean + gain * (x - mean)
        after[f"{name}_var"] = (1 - gain) * (var + gain * (x - mean) ** 2)
    bad = ~finite
    if config.spike != "ignore":
        bad |= (z["loss"] > config.spike_z) | (z["grad_norm"] > config.spike_z)
    guard = {name: jnp.where(bad, guard[name], value) for name, value in after.items()} | {
        "bad_in_a_row": jnp.where(bad, guard["bad_in_a_row"] + 1, 0)
    }
    metrics = {
        "train/skipped": bad.astype(jnp.float32),
        "train/loss_z": z["loss"],
        "train/grad_norm_z": z["grad_norm"],
        "train/bad_in_a_row": guard["bad_in_a_row"],
    }
    return guard, bad, metrics


def verdict(config: DivergenceConfig, values: dict[str, float]) -> Verdict:
    """The verdict on a step.

    Args:
      values: metrics of the step.
    """
    loss, grad, param = (values[f"train/{name}"] for name in ("loss", "grad_norm", "param_norm"))
    if not all(map(math.isfinite, (loss, grad, param))):
        reason = f"is not finite: loss {loss:.4g}, gradient norm {grad:.4g}, parameter norm {param:.4g}"
        # Parameters that are not finite are there to stay.
        action = config.not_finite if math.isfinite(param) else action_for_state(config)
    elif values.get("train/skipped"):
        z = ", ".join(f"{name} {values[f'train/{name}_z']:.1f}" for name in ("loss", "grad_norm"))
        reason = f"stands out: loss {loss:.4g}, gradient norm {grad:.4g}; standard deviations above the mean: {z}"
        action = config.spike
    else:
        return Verdict(CONTINUE)
    in_a_row = values.get("train/bad_in_a_row", 1)
    if action == SKIP and in_a_row > config.max_in_a_row:
        return Verdict(STOP, f"{reason}; the {in_a_row:.0f}th in a row")
    return Verdict(action, reason)


def action_for_state(config: DivergenceConfig) -> str:
    """STOP or ROLLBACK for a state whose loss is not finite: leaving out an update does not help."""
    return ROLLBACK if config.not_finite == ROLLBACK else STOP
