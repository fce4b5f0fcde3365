"""Errors that a user can cause; each of them ends a command with one line and an exit code.

The base class is here because data is the lowest package that raises such errors; trainer/errors.py adds the others.
"""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do; `exit_code` is documented."""

    exit_code = 1


class DataError(UserError):
    """A corpus, tokenizer or dataset that cannot be used."""

    exit_code = 3
