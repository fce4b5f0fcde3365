"""Which checkpoints are kept, and when a save is due by time, whatever the steps and times."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import CheckpointConfig
from trainer.reliability.retention import RETRY_S, STALLS, SaveClock, kept, planned

LOSSES = st.none() | st.floats()


@given(
    steps=st.dictionaries(st.integers(1, 200), LOSSES),
    last=st.integers(1, 5),
    multiple=st.integers(0, 20),
    best=st.integers(0, 4),
)
def test_the_last_the_permanent_and_the_best_stay_and_nothing_else(steps, last, multiple, best):
    keep = kept(steps, CheckpointConfig(keep_last=last, keep_every_steps=multiple, keep_best=best))
    newest = set(sorted(steps)[-last:])
    permanent = {step for step in steps if multiple and step % multiple == 0}
    assert newest | permanent <= keep <= set(steps)
    finite = {step: loss for step, loss in steps.items() if loss is not None and math.isfinite(loss)}
    evaluated = sorted(finite.values())
    by_loss = [finite[step] for step in keep if step in finite]
    assert sorted(by_loss)[:best] == evaluated[:best], "the lowest losses are among those kept"
    assert len(keep - newest - permanent) <= best


@given(
    every=st.integers(1, 9),
    last=st.integers(1, 4),
    stops=st.sets(st.integers(1, 99)),
    end=st.integers(1, 99),
)
def test_what_a_stop_leaves_takes_the_place_of_no_planned_step(every, last, stops, end):
    config = CheckpointConfig(every_steps=every, every_minutes=0, keep_last=last, keep_best=0)
    there: dict[bool, set[int]] = {}
    for stopped in (False, True):
        steps: set[int] = set()
        for step in range(1, end + 1):
            if step % every == 0 or (stopped and step in stops):
                steps = kept(dict.fromkeys(steps | {step}), config)
        there[stopped] = {step for step in steps if planned(step, config)}
        assert len(steps) <= last + 1
    assert there[False] == there[True]


@given(st.dictionaries(st.integers(1, 99), LOSSES), st.dictionaries(st.integers(1, 99), st.integers(0, 2)))
def test_losses_over_other_windows_are_not_compared(steps, windows):
    """For each number of evaluated windows, the best checkpoint is kept as if there were no others."""
    config = CheckpointConfig(keep_last=1, keep_best=1)
    wanted = set()
    for number in {windows.get(step) for step in steps} | {None}:
        of_it = {step: loss if windows.get(step) == number else None for step, loss in steps.items()}
        wanted |= kept(of_it, config)
    assert kept(steps, config, windows) == wanted


@given(st.dictionaries(st.integers(1, 99), LOSSES), st.integers(1, 5), st.integers(0, 3))
def test_a_newer_step_never_brings_an_older_one_back(steps, last, best):
    """The checkpoints to keep are chosen again after every save; a deleted checkpoint must not be among them."""
    config = CheckpointConfig(keep_last=last, keep_best=best)
    before = kept(steps, config)
    assert kept({step: steps.get(step) for step in before} | {100: None}, config) <= before | {100}
    assert kept({step: steps[step] for step in before}, config) == before


def clock(minutes: float = 1.0, share: float = 0.01) -> SaveClock:
    return SaveClock(CheckpointConfig(every_minutes=minutes, max_share=share), now=1000.0)


@given(st.floats(0.01, 1e4), st.floats(0, 1e5))
def test_due_after_the_minutes_and_not_before(minutes, later):
    assert clock(minutes).due(1000.0 + later) == (1000.0 + later - 1000.0 >= 60 * minutes)
    assert not clock(0).due(1000.0 + later), "0 minutes: never by time"


@given(stalls=st.lists(st.floats(0, 1e3), min_size=1), share=st.floats(0.001, 1))
def test_slow_saves_become_rarer(stalls, share):
    """Saves stall the loop for at most `share` of the time, or are three times the configured minutes apart."""
    saves = clock(share=share)
    for stall in stalls:
        saves.started(2000.0, stall)
    usual = statistics.median(stalls[-STALLS:])
    assert 60 <= saves.interval_s <= 180
    assert usual <= saves.interval_s * share * 1.0001 or saves.interval_s == 180
    assert not saves.due(2000.0 + 0.99 * saves.interval_s) and saves.due(2000.0 + 1.01 * saves.interval_s)


@given(st.lists(st.floats(0, 0.1), min_size=4), st.floats(0.2, 1e6))
def test_one_slow_save_puts_nothing_off(fast, slow):
    saves = clock(share=0.01)
    for stall in fast:
        saves.started(2000.0, stall)
    saves.started(2000.0, slow)
    assert saves.interval_s == 60


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_failed_save_is_tried_again_ever_more_rarely(minutes):
    """Fault 12: a save to a full disk is tried again soon, but saving does not keep the loop busy."""
    saves, now = clock(minutes), 2000.0
    for pause in (RETRY_S, 2 * RETRY_S, 4 * RETRY_S):
        saves.started(now, 0.0)
        saves.ended(False, now)
        assert not saves.due(now + pause - 0.1) and saves.due(now + pause)
        now += pause
    saves.started(now, 0.0)
    assert not saves.due(now + 1), "one under way is not tried again"
    saves.ended(True, now)
    saves.started(now, 0.0)
    saves.ended(False, now)
    assert saves.due(now + RETRY_S), "after a success the pause is short again"


def test_a_save_that_is_due_is_requested_once():
    saves = clock(minutes=1)
    assert not saves.request(1059.0)
    assert saves.request(1060.0) and not saves.request(1061.0)
    saves.started(1062.0, 0.0)
    assert saves.saving and not saves.request(1063.0)
    saves.ended(True, 1064.0)
    assert not saves.saving and saves.request(1122.0)
