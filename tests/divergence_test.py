"""Bad steps: the statistics are compared with NumPy; a skipped step has no effect, on one device and on several."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch, from_tokens
from tests import step_test
from tests.batches import on_mesh
from trainer import sharding
from trainer.config import Config, DivergenceConfig
from trainer.reliability.divergence import STD_FLOOR, detect, init_guard
from trainer.state import Program, TrainState
from trainer.step import make_train_step

WINDOW, VOCAB, POISON = 8, 24, 23  # the embedding of the last token is NaN
SKIP = {"not_finite": "skip", "spike": "skip", "spike_z": 8.0, "window": WINDOW}
MESHES = {"one": (1, 1), "four": (2, 2)}  # data, fsdp
NAMES = {"train/loss", "train/grad_norm", "train/param_norm", "train/lr"}
JUDGED = {"train/skipped", "train/loss_z", "train/grad_norm_z", "train/bad_in_a_row"}


def run_of_detect(config: DivergenceConfig, series) -> list[tuple[dict, bool, dict]]:
    """What detect() returns for each (loss, grad_norm), on the host."""
    step, guard, out = jax.jit(functools.partial(detect, config)), init_guard(config), []
    for loss, grad_norm in series:
        guard, bad, metrics = step(guard, jnp.float32(loss), jnp.float32(grad_norm))
        out.append(jax.device_get((guard, bool(bad), metrics)))
    return out


def test_statistics_against_their_definition():
    """The definition is a weighted mean and variance over all good steps, in float64.

    Tolerance: a mean of 2 to 4 is rounded by half of 2.4e-7 at each of the 50 steps in its window, 6e-6 in all,
    relative to the smallest deviation here, 0.05: 1.2e-4. The variance is rounded by 6e-8 of itself some six times per
    step: 2e-5.
    """
    window, rng = 50, np.random.default_rng(0)
    losses = 2.5 + np.exp(-np.arange(400) / 80) + rng.normal(0, 0.05, 400)
    norms = np.exp(rng.normal(0, 0.3, 400))
    losses[[60, 200, 201]], losses[[90, 91]], losses[30] = 6, (math.nan, math.inf), math.nan
    norms[[120, 300]], norms[310] = 60, math.inf
    series = np.stack([losses, norms], axis=1).astype(np.float32)

    history, weights, skipped = np.empty((0, 2)), np.empty(0), []
    out = run_of_detect(DivergenceConfig(not_finite="skip", spike="skip", window=window), series)
    for i, (row, (guard, bad, metrics)) in enumerate(zip(series.astype(float), out, strict=True)):
        x, z = np.array([row[0], math.log(row[1])]), np.zeros(2)
        if np.isfinite(x).all() and len(history) >= window:
            mean = weights @ history
            z = (x - mean) / np.maximum(np.sqrt(weights @ (history - mean) ** 2), STD_FLOOR)
        if not np.isfinite(x).all() or (z > 8).any():
            skipped.append(i)
        else:
            share = 1 / min(len(history) + 1, window)
            history, weights = np.vstack([history, x]), np.append(weights * (1 - share), share)
        found = [metrics["train/loss_z"], metrics["train/grad_norm_z"]]
        np.testing.assert_allclose(found, z, atol=1.2e-4, rtol=2e-5, err_msg=str(i))
        assert bad == (i in skipped) == bool(metrics["train/skipped"]) and guard["good"] == len(history)
    assert skipped == [30, 60, 90, 91, 120, 200, 201, 300, 310]
    assert [out[i][2]["train/bad_in_a_row"] for i in (90, 91, 92, 201)] == [1, 2, 0, 2]


def test_nothing_is_a_spike_before_the_window_is_full():
    config = DivergenceConfig(spike="stop", window=WINDOW)
    assert [bad for _, bad, _ in run_of_detect(config, [(2, 1)] * (WINDOW - 1) + [(99, 1)])] == [False] * WINDOW
    assert [bad for _, bad, _ in run_of_detect(config, [(2, 1)] * WINDOW + [(99, 1)])] == [False] * WINDOW + [True]


def test_a_flat_loss_may_wiggle():
    config, flat = DivergenceConfig(spike="stop", window=WINDOW), [(2, 1)] * 2 * WINDOW
    assert not run_of_detect(config, [*flat, (2.01, 1.01)])[-1][1]
    assert run_of_detect(config, [*flat, (2.1, 1)])[-1][1] and run_of_detect(config, [*flat, (2, 1.1)])[-1][1]
    assert not run_of_detect(config, [*flat, (0.5, 0.01)])[-1][1]  # a drop is not a spike


@pytest.mark.parametrize("not_finite", DivergenceConfig.POLICIES)
@pytest.mark.parametrize("spike", ["ignore", *DivergenceConfig.POLICIES])
def test_what_is_bad_under_each_policy(not_finite, spike):
    config = DivergenceConfig(not_finite=not_finite, spike=spike, window=WINDOW)
    if (not_finite, spike) in [("stop", "ignore"), ("rollback", "ignore")]:
        assert init_guard(config) == {}
        return
    out = run_of_detect(config, [(2, 1)] * WINDOW + [(math.nan, 1), (2, math.inf), (99, 1)])
    assert [bad for _, bad, _ in out[WINDOW:]] == [True, True, spike != "ignore"]
    assert out[-1][2]["train/loss_z"] == pytest.approx(97 / STD_FLOOR)


ANY = DivergenceConfig(not_finite="skip", spike="skip", window=3, spike_z=4.0)
detect_any = jax.jit(functools.partial(detect, ANY))
value = st.floats(width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(value, value.map(abs)), max_size=20))
def test_any_series(series):
    before = {k: v.item() for k, v in init_guard(ANY).items()}
    in_a_row = 0
    for loss, grad_norm in series:
        guard, bad, metrics = jax.device_get(detect_any(before, np.float32(loss), np.float32(grad_norm)))
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        assert np.isfinite([*guard.values(), *metrics.values()]).all()
        assert bad or finite
        assert not (bad and finite) or before["good"] >= ANY.window
        in_a_row = in_a_row + 1 if bad else 0
        expected = before | {"bad_in_a_row": in_a_row}
        if bad:
            assert {k: v.item() for k, v in guard.items()} == expected
        assert guard["bad_in_a_row"] == in_a_row and guard["good"] == before["good"] + (not bad)
        assert guard["loss_var"] >= 0 and guard["grad_norm_var"] >= 0
        before = {k: v.item() for k, v in guard.items()}


def config(name: str) -> Config:
    """The configuration; for four devices it also has ZeRO-1, accumulation and a scan over the layers."""
    several, (data, fsdp) = name == "four", MESHES[name]
    return step_test.config(
        model={"vocab_size": VOCAB, "tie_embeddings": False, "scan_layers": several},
        divergence=SKIP,
        grad_accum_steps=2 if several else 1,
        mesh={"data": data, "fsdp": fsdp, "shard_optimizer": several},
    )


@functools.cache
def program(name: str) -> Program:
    cfg = config(name)
    return Program(cfg, sharding.make_mesh(cfg, jax.devices()[: math.prod(MESHES[name])]))


@functools.cache
def initial() -> TrainState:
    """The state on the host. The embedding of POISON is NaN; only this token uses it, because the output table is
    separate."""
    state = jax.device_get(program("one").init())
    table = np.array(state.params["embedding"])
    table[POISON] = math.nan
    return dataclasses.replace(state, params=state.params | {"embedding": table})


@functools.cache
def compiled(name: str) -> jax.stages.Compiled:
    here = program(name)
    with jax.set_mesh(here.mesh):
        return make_train_step(here).lower(here.state, here.abstract_batch(np.int32), np.uint32(0)).compile()


def batch(kind: str) -> Batch:
    """16 rows: 'good' is always the same rows, 'random' has other tokens, and 'poison' is good except for one token."""
    rows = np.tile(np.arange(33) % 7, (16, 1))
    if kind == "random":
        rows = np.random.default_rng(0).integers(0, POISON, rows.shape)
    if kind == "poison":
        rows[5, 9] = POISON
    return from_tokens(rows.astype(np.int32))


def advance(name: str, state: TrainState, kinds: list[str]) -> tuple[list[dict], list[TrainState]]:
    """Metrics of each step and, on the host, the state after it."""
    here, rows, states = program(name), [], []
    state = jax.device_put(state, jax.tree.map(lambda s: s.sharding, here.state))
    for kind in kinds:
        state, metrics = compiled(name)(state, on_mesh(batch(kind), here.mesh), np.uint32(0))
        rows.append({k: float(v) for k, v in metrics.items()})
        states.append(jax.device_get(state))
    return rows, states


SERIES = ["good"] * 3 + ["poison"] + ["good"] * 35 + ["random", "poison"] + ["good"] * 2
BAD = [3, 39, 40]


@functools.cache
def series(name: str) -> tuple[list[dict], list[TrainState]]:
    return advance(name, initial(), SERIES)


def bits(*trees) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(trees)]


@pytest.mark.parametrize("name", MESHES)
def test_a_bad_step_is_skipped_and_nothing_but_the_count_of_steps_changes(name):
    rows, states = series(name)
    assert [i for i, row in enumerate(rows) if row["train/skipped"]] == BAD
    for i in range(1, len(rows)):
        assert states[i].step == i + 1
        before, after = (bits(state.params, state.opt_state) for state in states[i - 1 : i + 1])
        assert (before == after) == (i in BAD)
    assert [row["train/bad_in_a_row"] for row in rows[-5:]] == [0, 1, 2, 0, 0]
    assert all(set(row) == NAMES | JUDGED for row in rows)
    # Bad values (not finite, or spikes) are reported as they are; they do not enter the statistics.
    assert math.isnan(rows[3]["train/loss"]) and math.isnan(rows[3]["train/grad_norm"])
    assert rows[39]["train/loss"] > rows[38]["train/loss"] + 1 and rows[39]["train/loss_z"] > 8
    assert states[40].guard == states[38].guard | {"bad_in_a_row": 2}


def test_training_goes_on_as_if_the_bad_batch_had_not_been():
    """This holds bit for bit, including the statistics: a bad step only increments the step number."""
    rows, states = series("one")
    at = dataclasses.replace(states[2], step=np.int32(4))  # the schedule counts all steps, skipped or not
    again, after = advance("one", at, ["good"] * 2)
    np.testing.assert_equal(again, rows[4:6])
    assert bits(after[-1]) == bits(states[5])


def test_the_norm_of_the_parameters_is_of_those_that_are_kept():
    """This test has no poisoned embedding, because the norm would be NaN."""
    state = program("one").init()
    rows, states = advance("one", state, ["good"] * 35 + ["random"])
    assert rows[-1]["train/skipped"] and rows[-1]["train/param_norm"] == rows[-2]["train/param_norm"]
    assert rows[-1]["train/param_norm"] == pytest.approx(
        math.sqrt(sum(np.square(p, dtype=float).sum() for p in jax.tree.leaves(states[-1].params))), rel=1e-6
    )


def test_the_same_decisions_on_several_devices():
    """z may differ by a loss's relative rounding, 1e-6, divided by STD_FLOOR, and by more as training magnifies it
    (1e-5 was seen)."""
    one, four = series("one")[0], series("four")[0]
    for key in JUDGED - {"train/loss_z", "train/grad_norm_z"}:
        assert [row[key] for row in one] == [row[key] for row in four]
    for key in ("train/loss_z", "train/grad_norm_z"):
        np.testing.assert_allclose([row[key] for row in one], [row[key] for row in four], atol=1e-3, rtol=1e-4)
    assert all(s.sharding.is_fully_replicated for s in program("four").state.guard.values())


def test_by_default_no_step_is_judged():
    cfg, mesh = step_test.config(), step_test.mesh_of("one")
    with jax.set_mesh(mesh):
        here = Program(cfg, mesh)
        lowered = make_train_step(here).lower(here.state, here.abstract_batch(np.int32), np.uint32(0))
    state, metrics = lowered.out_info
    assert set(metrics) == NAMES and state.guard == here.state.guard == here.init_guard() == {}
    assert len(jax.tree.leaves(state)) == 1 + len(jax.tree.leaves((state.params, state.opt_state)))
    assert "is_finite" not in lowered.as_text()


def test_a_guard_that_is_switched_on_later_is_that_of_a_fresh_run():
    here = program("four")
    guard = here.init_guard()
    assert guard == init_guard(here.config.divergence)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), guard) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), here.state.guard
    )
