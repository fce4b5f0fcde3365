"""A dataset and uninterrupted runs for all faults."""

import pytest

from tests import runs
from tests.system.faults import interrupted


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("runs") / "whole"
    runs.finish(interrupted.start_one(run, data, num_train_steps=interrupted.STEPS))
    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    """An uninterrupted run on one device that kept every tenth step. Tests change only copies of it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    runs.train(run, data, num_train_steps=interrupted.WHOLE_STEPS, checkpoint__keep_last=10)
    return run
