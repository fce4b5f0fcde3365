"""Which checkpoints stay, and when the next is due by time. Pure; process 0 decides for all."""

import math
from collections.abc import Mapping

from trainer.config import CheckpointConfig

RETRY_S = 10.0  # after a save that failed; doubled with each that fails again


def kept(steps: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """The steps to keep: the last ones, the permanent ones, the best ones.

    Args:
      steps: committed steps, with the val/loss of those that were evaluated; one that is not finite is never the best.
    """
    ordered = sorted(steps)
    keep = set(ordered[-config.keep_last :])
    if config.keep_every_steps:
        keep |= {step for step in ordered if step % config.keep_every_steps == 0}
    evaluated = [(loss, step) for step, loss in steps.items() if loss is not None and math.isfinite(loss)]
    return keep | {step for _, step in sorted(evaluated)[: config.keep_best]}


class SaveClock:
    """When a save by time is due: after every_minutes, later if saves are slow, sooner if the last one failed.

    Times are of one monotonic clock, in seconds.
    """

    def __init__(self, config: CheckpointConfig, now: float):
        self.config, self.last, self.stall_s = config, now, 0.0
        self.retry_at: float | None = None
        self.retry_s = RETRY_S

    @property
    def interval_s(self) -> float:
        """Long enough that the measured stall is at most config.max_share of it."""
        return max(60 * self.config.every_minutes, self.stall_s / self.config.max_share)

    def due(self, now: float) -> bool:
        if self.retry_at is not None and now >= self.retry_at:
            return True
        return self.config.every_minutes > 0 and now - self.last >= self.interval_s

    def started(self, now: float, stall_s: float) -> None:
        """A save was begun, and held the loop up for `stall_s`."""
        self.last, self.stall_s, self.retry_at = now, stall_s, None

    def ended(self, ok: bool, now: float) -> None:
        if ok:
            self.retry_s = RETRY_S
        else:
            self.retry_at, self.retry_s = now + self.retry_s, 2 * self.retry_s
