"""The learning rate schedule is the same in NumPy and JAX and fixed when a run begins; an odd one causes a warning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import schedule
from trainer.config import Config, OptimizerConfig
from trainer.optimizer import make_schedule


def config(num_train_steps: int = 1000, **optimizer) -> Config:
    return Config(num_train_steps=num_train_steps, optimizer=OptimizerConfig(**{"warmup_steps": 10} | optimizer))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(OptimizerConfig.SCHEDULES),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 300),
    decay=st.integers(0, 300),
)
def test_what_a_resume_shows_is_what_a_step_uses(name, warmup, steps, decay):
    optimizer = OptimizerConfig(schedule=name, warmup_steps=warmup, decay_steps=decay)
    at = np.arange(320)
    shown, used = schedule.learning_rate(optimizer, steps, at), make_schedule(optimizer, steps)(at)
    np.testing.assert_allclose(shown, np.asarray(used), rtol=1e-5)


@given(st.sampled_from(OptimizerConfig.SCHEDULES), st.integers(0, 2000), st.integers(1, 2000), st.integers(1, 2000))
def test_a_run_that_gets_another_number_of_steps_keeps_its_course(name, decay, before, after):
    began = schedule.fixed(config(before, schedule=name, decay_steps=decay))
    resumed = schedule.fixed(config(after, schedule=name, decay_steps=decay), began)
    assert resumed.optimizer == began.optimizer and resumed.num_train_steps == after
    assert schedule.fixed(resumed, began) == resumed
    at = np.arange(0, 2000, 97)
    rates = [schedule.learning_rate(c.optimizer, c.num_train_steps, at) for c in (began, resumed)]
    np.testing.assert_array_equal(*rates)


def test_a_schedule_that_replaces_a_constant_rate_lasts_as_long_as_the_run():
    assert schedule.fixed(config(60), config(20, schedule="constant")).optimizer.decay_steps == 60


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"schedule": "constant", "decay_steps": 5}, []),
        ({"schedule": "wsd"}, []),
        ({"decay_steps": 2000}, []),
        (
            {"warmup_steps": 1000},
            ["warmup_steps = 1000 does not end within the 1000 steps; the rate of the last is 0.001"],
        ),
        (
            {"warmup_steps": 50_000, "schedule": "constant"},
            ["does not end within the 1000 steps; the rate of the last is"],
        ),
        ({"warmup_steps": 100, "decay_steps": 100}, ["decay_steps = 100 is not above warmup_steps = 100", "at end_lr"]),
        ({"decay_steps": 900, "end_lr": 0.0}, ["from step 900 (decay_steps) to 1000 it stays at end_lr = 0"]),
        ({"schedule": "wsd", "warmup_steps": 900}, ["wsd falls from step 800 on, but warmup_steps = 900"]),
    ],
    ids=str,
)
def test_what_is_odd_about_a_schedule_is_said(fields, said):
    found = schedule.oddities(config(**fields))
    assert len(found) == len(said)
    for phrase, expected in zip(found, said, strict=True):
        assert expected in phrase
    assert schedule.oddities(schedule.fixed(config(**fields))) == found
