"""Errors a user can cause that do not come from data. See data/errors.py for the root of the family."""

from data.errors import UserError


class ConfigError(UserError):
    """A flag, a field of the configuration, or a run directory that does not go with it."""

    exit_code = 2


class CheckpointError(UserError):
    """No usable checkpoint where one is needed."""

    exit_code = 3


class Diverged(UserError):
    """Loss or gradient is not finite, or out of all proportion, and the policy is to stop."""

    exit_code = 4


class Stopped(UserError):
    """The run cannot go on here and now, but the same command can: a peer is missing, a step stalls."""

    exit_code = 42
