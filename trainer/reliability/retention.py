"""Which checkpoints stay, and when the next is due by time. Pure; process 0 decides for all."""

import collections
import math
import statistics
from collections.abc import Mapping
from types import MappingProxyType

from trainer.config import CheckpointConfig

RETRY_S = 10.0  # after a save that failed; doubled with each that fails again
STALLS = 5  # that are remembered; one slow save is none of a slow disk
RAREST = 3  # times every_minutes: what a preemption without warning may cost, however slow saves are


def planned(step: int, config: CheckpointConfig) -> bool:
    """Whether a run that nobody stops has this step, too. If saves are also made by time, none is told from another."""
    every = [n for n in (config.every_steps, config.keep_every_steps) if n]
    return bool(config.every_minutes) or not every or any(step % n == 0 for n in every)


def kept(
    steps: Mapping[int, float | None],
    config: CheckpointConfig,
    windows: Mapping[int, int | None] = MappingProxyType({}),
) -> set[int]:
    """The steps to keep: the last ones (of those that are planned; and the newest), the permanent ones, the best ones.

    Args:
      steps: committed steps, with the val/loss of those that were evaluated; one that is not finite is never the best.
      windows: over how many the loss of a step was measured. Losses over the same number are compared with each other
        only, and of each number the best stay; steps that are not named are of one more.
    """
    ordered = sorted(steps)
    keep = {*[step for step in ordered if planned(step, config)][-config.keep_last :], *ordered[-1:]}
    if config.keep_every_steps:
        keep |= {step for step in ordered if step % config.keep_every_steps == 0}
    evaluated: dict[int | None, list[tuple[float, int]]] = collections.defaultdict(list)
    for step, loss in steps.items():
        if loss is not None and math.isfinite(loss):
            evaluated[windows.get(step)].append((loss, step))
    return keep | {step for losses in evaluated.values() for _, step in sorted(losses)[: config.keep_best]}


class SaveClock:
    """When a save by time is due: after every_minutes, later if saves are slow, sooner if the last one failed.

    Times are of one monotonic clock, in seconds.
    """

    def __init__(self, config: CheckpointConfig, now: float):
        self.config = config
        self.last = now
        self.stalls: collections.deque[float] = collections.deque(maxlen=STALLS)
        self.saving = False  # a save was started, and its end was not reported yet
        self._requested = False
        self._retry_at: float | None = None
        self._retry_s = RETRY_S

    @property
    def interval_s(self) -> float:
        """Long enough that the usual stall is at most config.max_share of it, within limits."""
        wanted_s = 60 * self.config.every_minutes
        usual_s = statistics.median(self.stalls) if self.stalls else 0.0
        return min(max(wanted_s, usual_s / self.config.max_share), RAREST * wanted_s)

    def request(self, now: float) -> bool:
        """True if a save is due and was not requested before."""
        if self._requested or not self.due(now):
            return False
        self._requested = True
        return True

    def due(self, now: float) -> bool:
        if self._retry_at is not None and now >= self._retry_at:
            return True
        return self.config.every_minutes > 0 and now - self.last >= self.interval_s

    def started(self, now: float, stall_s: float) -> None:
        """A save was started, and stalled the loop for `stall_s`."""
        self.last = now
        self.saving = True
        self._requested = False
        self._retry_at = None
        self.stalls.append(stall_s)

    def ended(self, ok: bool, now: float) -> None:
        """The save has ended."""
        self.saving = False
        if ok:
            self._retry_s = RETRY_S
        else:
            self._retry_at = now + self._retry_s
            self._retry_s *= 2
