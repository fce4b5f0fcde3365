"""The training loop, with faults injected into its calls: what is saved first, what stays pending, and where a rollback
goes."""

import logging
import math
import pathlib

import jax
import numpy as np
import pytest

from data import loader, sources
from tests import runs
from tests.checkpoint_test import flip_a_bit_in_the_parameters
from trainer import loop, sharding
from trainer.config import from_dict
from trainer.errors import CheckpointError, Diverged
from trainer.reliability import reading, run_directory
from trainer.reliability.checkpoint import Checkpoints
from trainer.reliability.coordination import STOP, Processes
from trainer.reliability.watchdog import Watchdog

STEPS = 8
FIELDS = {
    **runs.TINY,
    "data.seq_len": 16,
    "model.num_layers": 1,
    "num_train_steps": STEPS,
    "eval.every_steps": 2,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 9,
    "sample.every_steps": 4,
    "sample.max_new_tokens": 4,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
}
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 393.2GiB.")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(tmp_path, data, monkeypatch):
    """A function that makes a Trainer on one device, by default with the same run directory each time."""
    real = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config: real(config, jax.devices()[:1]))

    def make(run: pathlib.Path = tmp_path / "run", **fields) -> loop.Trainer:
        tree: dict = {"data": {"path": str(data)}}
        for name, value in (FIELDS | {k.replace("__", "."): v for k, v in fields.items()}).items():
            section, _, field = name.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[field] = value
        config = run_directory.resolve(from_dict(tree))
        run.mkdir(exist_ok=True)
        found = sources.open_sources(config.data, config.model.vocab_size)
        dog = Watchdog(run, config.watchdog, 0)
        dog.close()  # these tests use only its phases
        place = config.checkpoint.mirror
        mirror = loop.Mirror(place, run / "checkpoints", config) if place else None
        trainer = loop.Trainer(config, run, found, Processes(), dog, mirror=mirror)
        trainer.processes.listen_for_requests(lambda: None, lambda: None, lambda error: None)
        return trainer

    return make


def steps(trainer: loop.Trainer) -> list[int]:
    return trainer.checkpoints.steps()


def aside(trainer: loop.Trainer) -> list[int]:
    return sorted(int(p.name.split(".")[0]) for p in trainer.checkpoints.directory.glob("*.set_aside"))


def looked(run: pathlib.Path) -> tuple[list[int], list[int]]:
    """The steps after which an evaluation ran, and those after which samples were drawn."""
    return [r["step"] for r in runs.rows(run) if "val/loss" in r], [r["step"] for r in runs.rows(run, "samples.jsonl")]


def failing(monkeypatch, what: str, at: int, error: Exception) -> None:
    real = getattr(loop.Trainer, what)

    def fail(self, cursor, *rest, **named):
        if cursor.step == at:
            raise error
        return real(self, cursor, *rest, **named)

    monkeypatch.setattr(loop.Trainer, what, fail)


@pytest.mark.parametrize(
    ("what", "at", "error"),
    [("_evaluate", 4, OUT_OF_MEMORY), ("_evaluate", STEPS, OUT_OF_MEMORY), ("_sample", STEPS, ValueError("anything"))],
    ids=["evaluation", "last evaluation", "last sample"],
)
def test_a_failed_evaluation_or_sample_costs_no_checkpoint_and_stays_pending(make, monkeypatch, what, at, error):
    with monkeypatch.context() as patched:
        failing(patched, what, at, error)
        trainer = make()
        with pytest.raises(type(error)):
            trainer.train()
        assert steps(trainer) == list(range(2, at + 1, 2)) and trainer.has_stepped
        again = make()
        with pytest.raises(type(error)):
            again.train()
        assert steps(again) == steps(trainer)
        assert not again.has_stepped, "it is the first thing that a start does"
    trainer = make()
    assert trainer.train()
    assert looked(trainer.run_dir) == ([2, 4, 6, 8], [4, 8])
    assert [r["step"] for r in runs.rows(trainer.run_dir) if "train/loss" in r] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("at", [3, 4])
def test_a_stop_in_an_evaluation_saves_once_and_waits_for_it(make, monkeypatch, at):
    """After step 3 no save is due, and after step 4 a save is in progress: in both cases the step is saved when the
    process exits."""
    real, often = loop.evaluate, {"eval__every_steps": 1, "eval__num_windows": 64}

    def evaluate(*arguments, **named):
        if trainer.watchdog._mark.step == at:
            trainer.processes.request(STOP)
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", evaluate)
        trainer = make(**often)
        assert trainer.train() is False and steps(trainer)[-1] == at
    assert make(**often).train()
    assert looked(trainer.run_dir)[0] == list(range(1, STEPS + 1))


def not_finite_at(monkeypatch, at: int, value: float, make, **fields) -> loop.Trainer:
    """A Trainer whose state after step `at` has no finite loss each time that it is evaluated."""
    real, bad = loop.evaluate, []

    def evaluate(step_function, params, *rest, **more):
        result = real(step_function, params, *rest, **more)
        sum_of_norms = float(params["norm"]["scale"].sum())  # identifies a state
        if trainer.watchdog._mark.step == at and not bad:
            bad.append(sum_of_norms)
        return dict.fromkeys(result, value) if sum_of_norms in bad else result

    monkeypatch.setattr(loop, "evaluate", evaluate)
    trainer = make(**fields)
    return trainer


@pytest.mark.parametrize(("policy", "value"), [("stop", math.nan), ("skip", math.inf)])
def test_a_state_without_a_finite_loss_on_held_out_text_is_not_good(make, monkeypatch, value, policy):
    with monkeypatch.context() as patched:
        trainer = not_finite_at(patched, 6, value, make, divergence__not_finite=policy)
        with pytest.raises(Diverged, match=r"held-out text after step 6 is not finite.*set aside.*good .* is step 4;"):
            trainer.train()
    assert steps(trainer) == [2, 4] and aside(trainer) == [6]
    assert trainer.checkpoints.val_losses.keys() == {2, 4}
    trainer = make(divergence__not_finite=policy)  # after the cause is fixed, the same command resumes
    assert trainer.train() and steps(trainer) == [2, 4, 6, 8]


def test_a_rollback_goes_behind_a_state_without_a_finite_loss(make, monkeypatch):
    trainer = not_finite_at(monkeypatch, 6, math.nan, make, divergence__not_finite="rollback")
    assert trainer.train()
    assert steps(trainer) == [2, 4, 6, 8] and aside(trainer) == [6]
    (event,) = [r for r in runs.rows(trainer.run_dir) if "event/rollback_from" in r]
    assert (event["step"], event["event/rollback_from"], event["event/skipped_samples"]) == (5, 6.0, 16.0)
    assert looked(trainer.run_dir)[0] == [2, 4, 6, 8]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_state_that_nothing_evaluated_is_found_before_it_is_called_good(make, policy):
    """The loss of a step is that of the state before the step: so the first bad state is saved, and must not block the
    run."""
    rare = {"eval__every_steps": 0, "checkpoint__every_steps": 1, "divergence__max_in_a_row": 2}
    assert make(**rare, num_train_steps=4).train()
    trainer = make(**rare, num_train_steps=STEPS, optimizer__peak_lr=1e12, divergence__not_finite=policy)
    with pytest.raises(Diverged, match="the last good checkpoint is step 4;"):
        trainer.train()
    assert steps(trainer) == [1, 2, 3, 4] and 5 in aside(trainer)
    trainer = make(**rare)
    assert trainer.train() and steps(trainer) == list(range(1, STEPS + 1))


def spiking_at(monkeypatch, at: int) -> None:
    """Makes the loss of a step NaN, once."""
    real, done = loop.Trainer._report, []

    def report(self, cursor, metrics):
        if cursor.step == at and not done:
            done.append(cursor.step)
            metrics = {**metrics, "train/loss": metrics["train/loss"] * math.nan}
        return real(self, cursor, metrics)

    monkeypatch.setattr(loop.Trainer, "_report", report)


@pytest.mark.parametrize(
    ("at", "rollback_steps", "back_to"),
    [(7, 0, 6), (7, 2, 4), (7, 1000, 2), (8, 0, 6), (2, 5, 0)],
)
def test_a_rollback_has_its_target_before_anything_is_moved(make, monkeypatch, at, rollback_steps, back_to):
    """The target is the newest checkpoint that is old enough, else the oldest; later steps are set aside and do not
    count as damaged."""
    spiking_at(monkeypatch, at)
    trainer = make(divergence__not_finite="rollback", divergence__rollback_steps=rollback_steps, eval__every_steps=0)
    assert trainer.train()
    assert trainer.rollbacks == {back_to: 1}
    assert aside(trainer) == [step for step in (2, 4, 6) if back_to < step < at]
    assert not trainer.checkpoints.quarantine.exists()
    assert steps(trainer) == [2, 4, 6, 8]


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_run_whose_older_checkpoints_are_damaged_does_not_begin_again(make, monkeypatch, caplog, policy):
    """Both problems are reported, and nothing is moved."""
    monkeypatch.setattr(logging.getLogger("meshlm"), "propagate", True)
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    trainer = not_finite_at(monkeypatch, 6, math.nan, make, divergence__not_finite=policy)
    rollback = loop.Trainer._rollback

    def damage(self, bad):
        for step in (2, 4):
            flip_a_bit_in_the_parameters(trainer.run_dir / f"checkpoints/{step}")
        return rollback(self, bad)

    monkeypatch.setattr(loop.Trainer, "_rollback", damage)
    with pytest.raises(CheckpointError, match=r"no usable checkpoint.*nothing was moved"):
        trainer.train()
    assert "held-out text after step 6 is not finite" in caplog.text
    assert steps(trainer) == [2, 4, 6] and not aside(trainer) and not trainer.checkpoints.quarantine.exists()


def test_a_save_that_failed_after_its_commit_is_a_save(make, monkeypatch):
    real, failed = Checkpoints._watch, []

    def watch(self, step, response):
        real(self, step, response)
        if step == STEPS:
            failed.append(step)
            self._report_failure(step, TimeoutError("Timed out while waiting for finalize to complete."))

    monkeypatch.setattr(Checkpoints, "_watch", watch)
    trainer = make()
    assert trainer.train() and failed == [STEPS] and steps(trainer)[-1] == STEPS


def test_every_wait_for_a_save_is_a_phase_of_the_watchdog(make, monkeypatch):
    real, phases = Checkpoints.wait, []

    def wait(self, limit_s=None):
        phases.append(trainer.watchdog._mark.phase)
        self._limit_s = 3 * trainer.config.watchdog.slow_s
        assert trainer.watchdog.limit_s("saving") > self._limit_s, "a save that may take so long is not a stall"
        return real(self, limit_s)

    monkeypatch.setattr(Checkpoints, "wait", wait)
    spiking_at(monkeypatch, 5)
    trainer = make(divergence__not_finite="rollback")
    assert trainer.train()
    assert phases and set(phases) == {"saving"}


def test_all_wait_for_the_last_copy_and_nobody_does_in_an_evaluation(make, monkeypatch, tmp_path):
    """Once, only process 0 waited for its mirror; the other processes were already in the evaluation, and seemed to be
    stuck."""
    did: list[str] = []

    def run_on_process_0(self, what, function):
        did.append(what)
        return function()

    monkeypatch.setattr(Processes, "run_on_process_0", run_on_process_0)
    monkeypatch.setattr(loop.Mirror, "wait", lambda self: did.append("waited"))
    real = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *rest, **named: did.append("evaluated") or real(*rest, **named))
    assert make(num_train_steps=2, checkpoint__mirror=str(tmp_path / "mirror")).train()
    assert did.count("waited") == 1 and did[did.index("waited") - 1] == "copied"
    assert did.index("waited") < did.index("evaluated")


def test_retention_hears_of_losses_that_come_after_the_save(make, monkeypatch):
    """The best step stays although its loss was not known when it was saved; this also holds after a restart, and
    without metrics.jsonl."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}
    real = loop.evaluate

    def evaluate(*arguments, **named):
        return real(*arguments, **named) | {"val/loss": losses.get(trainer.watchdog._mark.step, 2.0)}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    for last in (4, 6, STEPS):
        trainer = make(checkpoint__keep_last=1, num_train_steps=last)
        if last == STEPS:
            (trainer.run_dir / "metrics.jsonl").unlink()
        assert trainer.train()
        assert steps(trainer) == sorted({4, last})


@pytest.mark.parametrize("what", ["batch", "seed"])
def test_a_step_transfers_nothing_by_itself(make, monkeypatch, what):
    """An implicit transfer is an error, because it would make the devices wait for Python in each step."""
    if what == "seed":
        monkeypatch.setattr(loop.Trainer, "_seed_on_devices", lambda self: np.uint32(self.config.seed))
    else:
        real = loader.Loader.prefetched
        monkeypatch.setattr(loader.Loader, "prefetched", lambda self, *rest: on_the_host(real(self, *rest)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        make(model__dropout=0.1).train()  # a step uses the seed only for dropout


def on_the_host(batches):
    for batch in batches:
        yield jax.tree.map(np.asarray, batch)
