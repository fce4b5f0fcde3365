"""Which checkpoints are kept, and when the next timed save is due. No I/O; process 0 decides for all."""

import collections
import math
import statistics
from collections.abc import Mapping
from types import MappingProxyType

from trainer.config import CheckpointConfig

RETRY_S = 10.0  # the pause after a failed save; it doubles with each further failure
STALLS = 5  # the last saves, whose median stall counts: one slow save does not mean that the disk is slow
LONGEST_INTERVAL = 3  # x every_minutes: the most that a preemption without warning may cost, even if saves are slow


def planned(step: int, config: CheckpointConfig) -> bool:
    """Whether a run that is not stopped saves this step, too. With timed saves, it may save any step."""
    every = [n for n in (config.every_steps, config.keep_every_steps) if n]
    return bool(config.every_minutes) or not every or any(step % n == 0 for n in every)


def kept(
    steps: Mapping[int, float | None],
    config: CheckpointConfig,
    windows: Mapping[int, int | None] = MappingProxyType({}),
) -> set[int]:
    """The steps to keep: the last planned ones, the newest, the permanent ones and the best ones.

    Args:
      steps: committed steps with their val/loss; None if not evaluated. A loss that is not finite is never the best.
      windows: by step, eval.num_windows of the loss; all missing steps count as having the same number. Only losses
        over the same number of windows are compared, and the best ones of each number are kept.
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
    """When a timed save is due: after every_minutes, later if saves are slow, sooner if the last one failed.

    Each `now` is a time of the same monotonic clock, in seconds.

    Attributes:
      last: when the last save was started; before the first save, when the run was started.
      saving: whether a save was started, and its end was not reported yet.
      stalls: seconds for which the last saves stalled the loop.
    """

    def __init__(self, config: CheckpointConfig, now: float):
        self.config = config
        self.last = now
        self.stalls: collections.deque[float] = collections.deque(maxlen=STALLS)
        self.saving = False
        self._requested = False
        self._retry_at: float | None = None
        self._retry_s = RETRY_S

    @property
    def interval_s(self) -> float:
        """Seconds between timed saves: the median stall is at most config.max_share of them, within limits."""
        wanted_s = 60 * self.config.every_minutes
        usual_s = statistics.median(self.stalls) if self.stalls else 0.0
        return min(max(wanted_s, usual_s / self.config.max_share), LONGEST_INTERVAL * wanted_s)

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
        """Notes that a save was started, and stalled the loop for `stall_s`."""
        self.last = now
        self.saving = True
        self._requested = False
        self._retry_at = None
        self.stalls.append(stall_s)

    def ended(self, ok: bool, now: float) -> None:
        """Notes that the save has ended; a failed save is due again after a pause."""
        self.saving = False
        if ok:
            self._retry_s = RETRY_S
        else:
            self._retry_at = now + self._retry_s
            self._retry_s *= 2
