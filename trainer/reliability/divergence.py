"""If needs_guard, detects bad steps on the device, and does not apply their updates. The loop acts on the metrics.

The guard is part of the training state: a flat dict of scalars, the same on every device. It has the running mean and
variance, over good steps, of the loss and of the logarithm of the gradient norm. For the first `window` steps these are
the plain mean and variance (Welford, 1962), then exponential ones, so that no start value has to fade.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from trainer.config import DivergenceConfig

# Floor of the standard deviation. The loss (log perplexity) and the logarithm of the gradient norm are both in log
# space, so one value suits both: when training is very flat, a rise below spike_z x 0.01 is noise.
STD_FLOOR = 0.01
LARGEST = 1e18  # larger losses are clipped to this, whose square is still finite in float32


CONTINUE, SKIP, ROLLBACK, STOP = "continue", "skip", "rollback", "stop"  # the last three: values of config.divergence


class Verdict(NamedTuple):
    """What the loop does about a step, and why: CONTINUE, SKIP (the device left its update out), ROLLBACK or STOP."""

    action: str
    reason: str = ""


def needs_guard(config: DivergenceConfig) -> bool:
    """Whether the device detects bad steps. If not, a step that is not finite makes the loop stop or roll back."""
    return config.spike != "ignore" or config.not_finite == "skip"


def init_guard(config: DivergenceConfig) -> dict[str, Array]:
    """The guard before the first step: float32 and int32 scalars; {} if none is needed.

    Its structure does not depend on the other values of `config`, so that a checkpoint fits any of them.
    """
    if not needs_guard(config):
        return {}
    counts = {name: jnp.zeros((), jnp.int32) for name in ("good", "bad_in_a_row")}  # good: steps in the statistics
    return counts | {f"{of}_{what}": jnp.zeros(()) for of in ("loss", "grad_norm") for what in ("mean", "var")}


def detect(
    config: DivergenceConfig, guard: dict[str, Array], loss: Array, grad_norm: Array
) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """The guard after a step, whether the step is bad (bool), and metrics.

    A step is bad if its loss or gradient norm is not finite, or, unless config.spike is "ignore", more than spike_z
    standard deviations above the mean. Bad steps do not enter the statistics.

    Args:
      loss: nats per token, float32.
      grad_norm: before clipping, float32.

    Returns metrics:
      train/skipped: 1.0 if the step is bad.
      train/loss_z, train/grad_norm_z: standard deviations above the mean; 0 if not known, which is before `window` good
        steps and for a step that is not finite.
      train/bad_in_a_row: int32, consecutive bad steps, this one included.
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
        # Parameters that are not finite stay so, whichever update is skipped.
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
    """STOP or ROLLBACK for a state whose loss is not finite. (To skip an update would not help.)"""
    return ROLLBACK if config.not_finite == ROLLBACK else STOP
