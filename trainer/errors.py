"""Errors a user can cause that do not come from data. See data/errors.py for the root of the family."""

from data.errors import UserError


class ConfigError(UserError):
    """A flag, a field of the configuration, or a run directory that does not go with it."""

    exit_code = 2


class CheckpointError(UserError):
    """No usable checkpoint where one is needed."""

    exit_code = 3


class Diverged(UserError):
    """Loss or gradient is not finite."""

    exit_code = 4
