"""The learning rate of each step, and warnings about odd settings. No JAX, so that a resume shows changes at once."""

import dataclasses
from typing import Any

import numpy as np

from trainer.config import Config, OptimizerConfig


def learning_rate(config: OptimizerConfig, num_train_steps: int, step: Any, xp: Any = np) -> Any:
    """The rate of the update after `step` finished steps: linear warmup to the peak, then as config.schedule says.

    Args:
      step: an array of integers, of any shape.
      xp: the library that computes, in float32: numpy or jax.numpy.
    """
    warmup, last = config.warmup_steps, length(config, num_train_steps)
    peak, end = config.peak_lr, config.end_lr
    step = xp.asarray(step, xp.float32)
    done = xp.clip((step - warmup) / max(last - warmup, 1), 0, 1)
    if config.schedule == "cosine":
        lr = end + (peak - end) * 0.5 * (1 + xp.cos(xp.pi * done))
    elif config.schedule == "linear":
        lr = peak + (end - peak) * done
    elif config.schedule == "wsd":
        falling = _wsd_steps(config, last)
        lr = peak + (end - peak) * xp.clip((step - (last - falling)) / falling, 0, 1)
    else:
        lr = xp.full_like(step, peak)
    return xp.where(step < warmup, peak * (step + 1) / max(warmup, 1), lr)


def length(config: OptimizerConfig, num_train_steps: int) -> int:
    """The step at which end_lr is reached."""
    return config.decay_steps or num_train_steps


def _wsd_steps(config: OptimizerConfig, last: int) -> float:
    return max(config.wsd_decay_fraction * last, 1)


def fixed(config: Config, before: Config | None = None) -> Config:
    """`config` with an explicit decay_steps, so that the schedule stays the same if the run gets more steps.

    Args:
      before: the configuration that a resumed run began with; the length of its schedule is kept if
        `config` does not set decay_steps.
    """
    optimizer = config.optimizer
    if optimizer.schedule == "constant" or optimizer.decay_steps:
        return config
    decays = config if before is None or before.optimizer.schedule == "constant" else before
    steps = length(decays.optimizer, decays.num_train_steps)
    return dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, decay_steps=steps))


def oddities(config: Config) -> list[str]:
    """Settings that are unlikely to be intended, or that the user should know about: a phrase each."""
    optimizer, steps = config.optimizer, config.num_train_steps
    warmup, last, falls = optimizer.warmup_steps, length(optimizer, steps), optimizer.schedule != "constant"
    if warmup >= steps:
        most = float(learning_rate(optimizer, steps, steps - 1))
        return [f"warmup_steps = {warmup} does not end within the {steps} steps; the rate of the last is {most:.3g}"]
    found = []
    if falls and last <= warmup:
        found.append(f"decay_steps = {last} is not above warmup_steps = {warmup}: the rate falls to end_lr in one step")
    elif optimizer.schedule == "wsd" and (start := last - _wsd_steps(optimizer, last)) < warmup:
        found.append(
            f"wsd falls from step {start:.0f} on, but warmup_steps = {warmup}: the rate never stays at its peak"
        )
    if falls and last < steps:
        found.append(f"from step {last} (decay_steps) to {steps} it stays at end_lr = {optimizer.end_lr:g}")
    return found
