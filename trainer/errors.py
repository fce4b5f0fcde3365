"""Errors that a user can cause, except those of data; data/errors.py has their base class."""

from data.errors import UserError


class ConfigError(UserError):
    """A flag or a field of the configuration is wrong, or does not fit the run directory."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint is needed, and none is usable."""

    exit_code = 3


class Diverged(UserError):
    """The loss or gradient is not finite, or is a spike, and config.divergence says to stop."""

    exit_code = 4


class Stopped(UserError):
    """The run has to stop, but the same command can resume it: a peer is missing, or a step stalls."""

    exit_code = 42
